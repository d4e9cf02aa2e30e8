"""PaddedLearnedAttention against a loop over the places of a grid that torch has padded, and torch's convolutions."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import glocal

from .padded_loop import CASES, MODES, by_loop, spec_of

DIM = 4
NAME = "PaddedLearnedAttention"

FAULTS = (
    ("tables begin at the kernel's first tap", "return -self._sides[axis][0] - 1", "return -self._sides[axis][0]"),
    ("offsets behind the kernel start again", ".clamp(0, table.shape[1] - 1)]", "% table.shape[1]]"),
    ("tables have no gradient", "precise(self.tables[axis])", "precise(self.tables[axis].detach())"),
    ("all axes read the first table", "precise(self.tables[axis])", "precise(self.tables[0])"),
    ("what is far counts once", "places * (shares[0]", "0 * (shares[0]"),
    ("other taps count as nothing", "sum(shares[1:-1]) - 1 +", "0 +"),
    ("padding is seen as any place", "self._over_places(x, valid, queries)", "self._over_places(x, None, queries)"),
)


def loop_of(mixer, kernel, stride, dilation, padding, groups, mode):
    def score(head, place, query):
        total = 0
        for table, p, q, side, k, d in zip(mixer.tables, place, query, padding, kernel, dilation, strict=True):
            tap = p - q + side  # from the first one
            last = d * (k - 1)
            total = total + table[head, 0 if tap < 0 else last + 2 if tap > last else tap + 1]
        return total

    pairs = [(p, p) for p in padding]
    oracle = by_loop(score, kernel, stride=stride, dilation=dilation, padding=pairs, groups=groups, mode=mode)
    return lambda x: oracle(x, mixer.value, mixer.bias)


@pytest.mark.parametrize(("grid", "kernel", "stride", "dilation", "padding", "groups", "out_dim", "mode"), CASES)
def test_is_the_loop(build, check, tokens, grid, kernel, stride, dilation, padding, groups, out_dim, mode):
    mixer = build(spec_of(NAME, kernel, stride, dilation, padding, groups, out_dim, mode), DIM)
    check(mixer, loop_of(mixer, kernel, stride, dilation, padding, groups, mode), tokens(2, *grid, DIM))


@pytest.mark.parametrize("heads", ["on the grid", "sharp", "near", "far", "behind", "one wide"])
@pytest.mark.parametrize(("grid", "kernel", "stride", "dilation", "padding", "groups", "out_dim", "mode"), CASES)
def test_where_no_gradients_are_asked_for_it_is_the_loop_too(
    heads, build, tokens, grid, kernel, stride, dilation, padding, groups, out_dim, mode
):
    """Then heads with equal weights along an axis are mixed once, and those that read one place read it."""
    alpha = 2.0 if heads == "on the grid" else 50.0
    mixer = glocal.build(spec_of(NAME, kernel, stride, dilation, padding, groups, out_dim, mode, alpha=alpha), DIM)
    mixer = mixer.double()
    with torch.no_grad():
        if heads == "far":  # together more than rounding, each of them less
            mixer.tables[-1][0, -1] += 15.0
        if heads == "near":  # two taps share the weight
            mixer.tables[-1][0, 1:-1] = 50.0
        if heads == "behind":
            mixer.tables[0][0, -1] += 100.0
        if heads == "one wide":
            mixer.tables[-1][0] *= 0.01
        mixer.impl = "fast"
        x = tokens(2, *grid, DIM)
        expected = loop_of(mixer, kernel, stride, dilation, padding, groups, mode)(x)
        assert_close(mixer(x), expected, rtol=1e-14 if heads == "far" else 1e-11, atol=1e-13)


def test_far_places_count_together():
    """At e^-38 each is below float64's rounding, five hundred are not."""
    mixer = glocal.build(f"{NAME}(kernel_size=1, alpha=38.0, rank=1, bias=False)", 1).double()
    with torch.no_grad():
        mixer.value.fill_(1.0)
        x = torch.zeros(1, 501, 1, dtype=torch.float64)
        x[0, 250:] = 1.0
        got = mixer(x)[0, 0].item()
    assert got == pytest.approx(251 * 3.139132792048e-17, rel=1e-6)  # e^-38


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kernel", "stride", "padding"), [((3, 3), 1, 1), ((2, 4), 2, 1), ((5,), 1, "same")])
def test_is_a_convolution(kernel, stride, padding, mode):
    kind = (nn.Conv1d, nn.Conv2d)[len(kernel) - 1]
    for dtype, alpha, allowed in ((torch.float64, 47.0, 1e-14), (torch.float32, 26.0, 2e-6)):
        layer = kind(6, 5, kernel, stride, padding, padding_mode=mode, dtype=dtype)
        given = (kernel, stride, 1, padding, 1, 5, mode)
        mixer = glocal.build(spec_of(NAME, *given, alpha=alpha), 6).to(dtype)
        with torch.no_grad():
            mixer.value.copy_(layer.weight.flatten(2).permute(2, 1, 0)[:, None])
            mixer.bias.copy_(layer.bias)
        image = torch.randn(2, 6, *(9, 8)[: len(kernel)], dtype=dtype)
        expected = layer(image).movedim(1, -1)
        x = image.movedim(1, -1)
        outs = [mixer(x), mixer.reference(x)]
        with torch.no_grad():
            outs.append(mixer(x))
        for out in outs:
            assert (out - expected).abs().max() <= allowed * expected.abs().max()


def test_padded_batches_leave_images_alone(build, tokens):
    mixer = build(f"{NAME}(kernel_size=2, padding=1)", DIM)
    batch, valid = 100 * tokens(2, 4, 5, DIM), torch.zeros(2, 4, 5, dtype=torch.bool)
    valid[0, :3, :2] = valid[1, :2] = True
    out = mixer(batch, valid=valid)
    assert_close(out[:1, :4, :3], mixer(batch[:1, :3, :2]))
    assert_close(out[1:, :3], mixer(batch[1:, :2]))


def test_tables_are_not_decayed():
    assert glocal.build(f"{NAME}()", DIM).no_weight_decay() == {"tables.0", "tables.1"}
