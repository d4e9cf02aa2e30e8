"""PaddedQuadraticAttention against a loop over the places of a grid that torch has padded, and torch's convolutions."""

import math
from itertools import product

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import glocal

from .padded_loop import CASES, MODES, by_loop, spec_of

DIM = 4
NAME = "PaddedQuadraticAttention"


def loop_of(mixer, kernel, stride, dilation, padding, groups, mode):
    def score(head, place, query):
        spread = mixer.spreads[head].expand(len(place))
        apart = zip(place, query, mixer.centers[head], spread, strict=True)
        return -sum((s * (p - q - c)) ** 2 for p, q, c, s in apart) / 2

    pairs = [(p, p) for p in padding]
    oracle = by_loop(score, kernel, stride=stride, dilation=dilation, padding=pairs, groups=groups, mode=mode)
    return lambda x: oracle(x, mixer.value, mixer.bias)


@pytest.mark.parametrize(("grid", "kernel", "stride", "dilation", "padding", "groups", "out_dim", "mode"), CASES)
def test_is_the_loop(build, check, tokens, grid, kernel, stride, dilation, padding, groups, out_dim, mode):
    axis_spreads = groups == 2
    spec = spec_of(NAME, kernel, stride, dilation, padding, groups, out_dim, mode, axis_spreads=axis_spreads)
    mixer = build(spec, DIM)  # random centres and spreads, wide ones
    check(mixer, loop_of(mixer, kernel, stride, dilation, padding, groups, mode), tokens(2, *grid, DIM))


@pytest.mark.parametrize("heads", ["on the grid", "sharp", "one moved", "some swapped", "beyond", "one wide"])
@pytest.mark.parametrize(("grid", "kernel", "stride", "dilation", "padding", "groups", "out_dim", "mode"), CASES)
def test_where_no_gradients_are_asked_for_it_is_the_loop_too(
    heads, build, tokens, grid, kernel, stride, dilation, padding, groups, out_dim, mode
):
    """Then heads with equal weights along an axis are mixed once, and those that read one place read it."""
    mixer = build(spec_of(NAME, kernel, stride, dilation, padding, groups, out_dim, mode), DIM)
    with torch.no_grad():
        mixer.centers.copy_(mixer.taps())
        mixer.spreads.fill_(1.5 if heads == "on the grid" else 10.0)
        if heads == "one moved":
            mixer.centers[-1] += 0.3
        if heads == "some swapped":
            mixer.centers.copy_(mixer.centers.flip(0))
            mixer.centers[0] = mixer.centers[-1]
        if heads == "beyond":
            mixer.centers[0] += 3.0
        if heads == "one wide":
            mixer.spreads[0] = 1.0
        mixer.impl = "fast"
        x = tokens(2, *grid, DIM)
        expected = loop_of(mixer, kernel, stride, dilation, padding, groups, mode)(x)
        assert_close(mixer(x), expected, rtol=1e-11, atol=1e-12)


def as_convolution(layer, alpha):
    """The attention of a convolution of torch: [out, in / groups, *kernel] tap by tap."""
    dim, rank, groups = layer.in_channels, layer.weight.dim() - 2, layer.groups
    mixer = glocal.build(
        spec_of(
            NAME, layer.kernel_size, layer.stride, layer.dilation, layer.padding, groups, layer.out_channels,
            layer.padding_mode, alpha=alpha,
        ),
        dim,
    ).to(layer.weight.dtype)  # fmt: skip
    assert rank == mixer.rank
    with torch.no_grad():
        for tap, place in enumerate(product(*map(range, layer.kernel_size))):
            for group in range(groups):
                out = slice(group * layer.out_channels // groups, (group + 1) * layer.out_channels // groups)
                mixer.value[tap, group] = layer.weight[(out, slice(None), *place)].T
        mixer.bias.copy_(layer.bias)
    return mixer


CONVOLUTIONS = [  # kernel, stride, padding, dilation, groups
    ((3, 3), 1, 1, 1, 1),
    ((7, 7), 2, 3, 1, 1),
    ((2, 4), (2, 1), (1, 0), 1, 2),
    ((3, 5), 1, "same", 2, 8),
    ((1, 1), 2, 0, 1, 1),
    ((4,), 1, "same", 1, 1),
    ((3,), 2, 2, 3, 4),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("kernel", "stride", "padding", "dilation", "groups"), CONVOLUTIONS)
@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
def test_is_a_convolution(kernel, stride, padding, dilation, groups, mode):
    kind = (nn.Conv1d, nn.Conv2d)[len(kernel) - 1]
    for dtype, alpha, allowed in ((torch.float64, 41.0, 1e-14), (torch.float32, 20.0, 2e-6)):
        layer = kind(8, 16, kernel, stride, padding, dilation, groups, padding_mode=mode, dtype=dtype)
        mixer = as_convolution(layer, alpha)
        image = torch.randn(2, 8, *(13, 12)[: len(kernel)], dtype=dtype)
        expected = layer(image).movedim(1, -1)
        x = image.movedim(1, -1)
        outs = [mixer(x), mixer.reference(x)]
        with torch.no_grad():
            outs.append(mixer(x))
        for out in outs:
            assert (out - expected).abs().max() <= allowed * expected.abs().max()


@pytest.mark.parametrize("groups", [1, 64])
def test_heads_on_places_read_them_and_no_more(largest, groups):
    """Nothing larger than the padded image is made, and it is done without gradients of places only."""
    mixer = glocal.build(f"{NAME}(padding=1, groups={groups}, alpha=20.0)", 64)
    x = torch.randn(2, 20, 24, 64)
    with torch.no_grad(), largest() as found:
        mixer(x)
    assert found.entries <= 2 * 22 * 26 * 64
    mixer.centers.requires_grad_(False)
    mixer.spreads.requires_grad_(False)
    x.requires_grad_()
    with largest() as found:
        mixer(x).sum().backward()
    assert found.entries <= 2 * 22 * 26 * 64
    assert x.grad.abs().min() > 0 and mixer.value.grad.abs().min() > 0


def test_no_matrix_of_all_pairs_is_formed(largest):
    mixer = glocal.build(f"{NAME}(padding=1, alpha=2.0)", 4)
    x = torch.randn(1, 40, 40, 4, requires_grad=True)
    with largest() as found:
        mixer(x).sum().backward()
    assert found.entries <= 9 * 42 * 42 * 4  # heads, places, channels; all pairs would be 9 * 1600 * 1764
    with torch.no_grad(), largest() as found:
        mixer(x)
    assert found.entries <= 3 * 42 * 42 * 4  # three kinds of rows and of columns


@pytest.mark.parametrize("axis_spreads", [False, True])
def test_sharp_heads_have_small_gradients_not_none(axis_spreads, tokens):
    """About e^-alpha at the taps; in float32, too, where they are below the rounding of everything else."""
    torch.manual_seed(1)
    mixer = glocal.build(f"{NAME}(padding=1, alpha=16.0, axis_spreads={axis_spreads})", DIM).double()
    x, upstream = tokens(1, 6, 7, DIM), tokens(1, 6, 7, DIM)
    places = [mixer.centers, mixer.spreads]
    with torch.no_grad():
        mixer.centers += 0.01 * torch.randn_like(mixer.centers)
    exact = torch.autograd.grad(mixer.reference(x), places, upstream)
    assert all(1e-9 < grad.abs().max() < 1e-3 for grad in exact)
    mixer.impl = "fast"
    for grad, expected in zip(torch.autograd.grad(mixer(x), places, upstream), exact, strict=True):
        assert_close(grad, expected, rtol=1e-6, atol=1e-14)
    rounded = mixer.float()
    grads = torch.autograd.grad(rounded(x.float()), [rounded.centers, rounded.spreads], upstream.float())
    for grad, expected in zip(grads, exact, strict=True):
        assert (grad - expected).abs().max() < 1e-3 * expected.abs().max()


def test_rows_sum_to_one_and_lose_what_falls_outside(build, tokens):
    x = tokens(1, 5, 6, DIM)
    mixer = glocal.build(f"{NAME}(padding=1, alpha=30.0)", DIM).double()
    found = mixer.weights(x)
    assert_close(found.weights.sum(-1), torch.ones(1, 9, 30, dtype=torch.float64))
    assert found.weights.shape == (1, 9, 30, 7 * 8) and (found.index == -1).sum() == 7 * 8 - 30
    left = found.dense().sum(-1)[0].view(9, 5, 6)
    expected = nn.functional.conv2d(  # of a head: 1 where its tap is inside
        torch.ones(1, 1, 5, 6, dtype=torch.float64), torch.eye(9, dtype=torch.float64).view(9, 1, 3, 3), padding=1
    )[0]
    assert_close(left, expected)
    for mode in ("replicate", "reflect", "circular"):
        other = glocal.build(f"{NAME}(padding=2, padding_mode={mode!r})", DIM).double()
        assert_close(other.weights(x).dense().sum(-1), torch.ones(1, 9, 7 * 8, dtype=torch.float64))


def test_a_centre_moved_by_a_third_of_a_token(tokens):
    """One head of a converted 3x3 kernel, its softmax written out."""
    mixer = glocal.build(f"{NAME}(padding=1, alpha=5.0)", DIM).double()
    with torch.no_grad():
        mixer.centers[5] += torch.tensor([0.3, 0.0])  # the tap right of the query
    got = mixer.weights(tokens(1, 4, 5, DIM)).weights[0, 5].view(4, 5, 6, 7)
    for i, j in product(range(4), range(5)):
        shares = torch.tensor(
            [[math.exp(-5 * ((a - i - 0.3) ** 2 + (b - j - 1) ** 2)) for b in range(-1, 6)] for a in range(-1, 5)],
            dtype=torch.float64,
        )
        assert_close(got[i, j], shares / shares.sum())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("extents", [[(4, 3), (2, 5)], [(2, 2), (3, 4)], [(4,), (7,)]])
def test_padded_batches_leave_images_alone(build, tokens, extents, mode):
    """Each image has a border of its own, with what its padding reads."""
    rank = len(extents[0])
    mixer = build(f"{NAME}(kernel_size={(2, 3)[:rank]}, padding=1, padding_mode={mode!r}, rank={rank})", DIM)
    grid = [max(lengths) + 1 for lengths in zip(*extents, strict=True)]
    batch = 100 * tokens(len(extents), *grid, DIM)
    valid = torch.zeros(batch.shape[:-1], dtype=torch.bool)
    for b, extent in enumerate(extents):
        valid[(b, *map(slice, extent))] = True
    out = mixer(batch, valid=valid)
    for b, extent in enumerate(extents):
        alone = mixer(batch[(slice(b, b + 1), *map(slice, extent))])
        assert_close(out[(slice(b, b + 1), *map(slice, alone.shape[1:-1]))], alone)


def test_positions_are_in_tokens_of_the_output(build, tokens):
    found = build(f"{NAME}(stride=(2, 1), padding=1)", DIM).weights(tokens(1, 3, 4, DIM))
    assert found.query_positions.tolist() == [[i, j] for i in range(2) for j in range(4)]
    assert found.source_positions.tolist() == [[i / 2, j] for i in range(3) for j in range(4)]


@pytest.mark.parametrize("groups", [1, 64])
def test_bfloat16_is_added_up_in_float32(groups):
    """On the taps, where a sum head by head in bfloat16 would round at every step, of 49 that all grow."""
    spec = f"{NAME}(kernel_size=7, padding=3, alpha=20.0, bias=False, groups={groups})"
    mixer, exact = glocal.build(spec, 64), glocal.build(spec, 64).double()
    x = torch.rand(1, 9, 9, 64).bfloat16()
    with torch.no_grad():
        mixer.value.abs_()
        exact.load_state_dict(mixer.bfloat16().state_dict())
        expected = exact(x.double())
        error = (mixer(x).double() - expected).abs().max() / expected.abs().max()
    assert error < torch.finfo(torch.bfloat16).eps


def test_starts_as_a_convolution_of_torch_does():
    torch.manual_seed(0)
    mixer = glocal.build(f"{NAME}(out_dim=6, groups=2)", 4)
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3, groups=2)
    assert torch.equal(mixer.value[4, 1], layer.weight[3:, :, 1, 1].T) and torch.equal(mixer.bias, layer.bias)
    assert_close(mixer.spreads, torch.full((9,), math.sqrt(8)))
    assert mixer.no_weight_decay() == {"centers", "spreads"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("padding=-1", "padding: -1, must be a whole number, 0 or more"),
        ("padding='full'", "padding: 'full', must be"),
        ("padding=(1, 1, 1)", "one for each of 2 axes"),
        ("padding='same', stride=2", r"padding: 'same' with stride \(2, 2\)"),
        ("padding_mode='constant'", "padding_mode: 'constant', must be 'zeros' or"),
        ("groups=3", "groups: 3 must divide dim 4 and out_dim 4"),
        ("alpha=0", "alpha: 0, must be a positive number"),
        ("stride=(1, 2, 3)", "stride: .* has 3 entries, rank is 2"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        glocal.build(f"{NAME}({options})", DIM)


def test_a_grid_smaller_than_the_kernel_is_refused(tokens):
    mixer = glocal.build(f"{NAME}(kernel_size=(3, 5), dilation=(1, 2))", DIM).double()
    with pytest.raises(
        ValueError, match=r"a grid of \(3, 8\), .* smaller than the kernel, which reaches over \(3, 9\)"
    ):
        mixer(tokens(1, 3, 8, DIM))


FAULTS = {
    "mixers/padded_quadratic_attention.py": (
        ("the centre's sign is flipped", "(offset - centre)", "(offset + centre)"),
        ("the half is missing", "return -0.5 * (spread", "return -(spread"),
        ("the first axis' spread is that of all", "self.spreads[:, axis] if", "self.spreads[:, 0] if"),
        ("centres have no gradient", "stack([self.centers[:, axis],", "stack([self.centers.detach()[:, axis],"),
        ("any spread counts as sharp", "if not 4 * math.exp(-max(least, 0.0)) < rounding", "if False"),
        ("places between tokens count as on them", "(1 - 2 * abs(centre - nearest))", "1"),
        ("padding is seen as any place", "self._over_places(x, valid, queries)", "self._over_places(x, None, queries)"),
    ),
    ("mixers/_padded.py", "mixers/test_padded_quadratic_attention.py", "mixers/test_padded_learned_attention.py"): (
        ("reflection repeats the ends", "(2 * length - 2).clamp(min=1)", "(2 * length).clamp(min=1)"),
        ("the place behind the end is inside", "place < own + self._sides", "place <= own + self._sides"),
        ("axes are strided alike", "device=device) * self._strides[axis]", "device=device) * self._strides[0]"),
        ("rows and columns of queries are swapped", "in reversed(range(len(grid))):", "in range(len(grid)):"),
        ("groups of outputs are mixed up", "bnkgc,kgco->bngo", "bnkgc,kgco->bnog"),
        ("an even kernel has its centre behind", "(r // 2, r - r // 2)", "(r - r // 2, r // 2)"),
        ("a head beyond the border reads the next row", "any(not -front <= offset", "any(False and -front <= offset"),
        ("gradients of places are dropped", "learning = torch.is_grad_enabled() and", "learning = False and"),
        ("heads are alike where their first number is", "setdefault(tuple(row)", "setdefault(tuple(row[:1])"),
        (
            "low precisions are added head by head",
            "in (torch.float32, torch.float64)",
            "in (torch.float32, torch.float64, torch.bfloat16)",
        ),
        ("weights are made in their own precision", "else torch.float64).to(", "else scores.dtype).to("),
        ("what the padding reads is added to ones", "weights.new_zeros(*weights", "weights.new_ones(*weights"),
        ("sharp heads are mixed as any", "found.append([offset + front for offset in offsets])", "return None"),
    ),
    ("mixers/_separable.py", "mixers/test_padded_quadratic_attention.py", "mixers/test_padded_learned_attention.py"): (
        ("the last queries are left out", "- max(step for _, step in steps)", "- 2 * max(step for _, step in steps)"),
        ("all phases are the first", "phase[0] :: stride[0], phase[1] ::", ":: stride[0], ::"),
        ("rows step as columns", "(down // stride[0]) * width + right", "(down // stride[0]) * height + right"),
        ("taps side by side lose their order", "wide) for t in own], 2)", "wide) for t in own[::-1]], 2)"),
        ("every head has its own column", "_chosen(mixed, column)", "_chosen(mixed, list(range(len(row))))"),
        (
            "heads have the columns of others",
            "sums[i] = _added(sums[i], mixed[j]",
            "sums[i] = _added(sums[i], mixed[i]",
        ),
    ),
}
