"""DynamicConv against a loop over positions, banded matrices and unfold."""

from itertools import product

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import glocal

FAULTS = (
    ("the softmax is taken over heads", "logits.softmax(-1)", "logits.softmax(2)"),
    ("taps are not normalised", "logits.softmax(-1)", "logits"),
    ("looking drops taps", "transpose(1, 2), update_statistics)", "transpose(1, 2), self.training)"),
    ("the fast path drops none", "kept:]), update_statistics)", "kept:]), False)"),
    ("taps are dropped in evaluation too", "self.weight_dropout, training)", "self.weight_dropout, True)"),
    ("one token too many is kept", "        return self.kernel_size - 1\n", "        return self.kernel_size\n"),
    ("kernels are predicted from kept tokens", "(values[:, kept:])", "(values[:, : len(values[0]) - kept])"),
    (
        "kernels are read tap by tap, not head by head",
        "(values.flatten(2)).unflatten(-1, (self.num_heads, -1))",
        "(values.flatten(2)).unflatten(-1, (-1, self.num_heads)).mT",
    ),
    ("a causal kernel ends one token late", "return self.kernel_size - 1 if", "return self.kernel_size - 2 if"),
    ("the gate is the first half", "glu(self.linear1(v))", "glu(self.linear1(v).roll(self.dim, -1))"),
    (
        "kernels are predicted from x, not from the values",
        "self._logits(self.values(x))",
        "self._logits(x.flatten(1, -2).unsqueeze(2))",
    ),
    ("the fast path has no output projection", "self.linear2(local_sum(", "(local_sum("),
    ("no gradient reaches the kernels", "(values.flatten(2)).unfl", "(values.flatten(2).detach()).unfl"),
)


def values_of(mixer, x):
    """The gated linear unit written out: the first half times the sigmoid of the second."""
    if not mixer.projection:
        return x
    both = x @ mixer.linear1.weight.T + mixer.linear1.bias
    dim = x.shape[-1]
    return both[..., :dim] / (1 + torch.exp(-both[..., dim:]))


def oracle_of(mixer, kernel_size, heads, causal=False):
    """Position by position and head by head, softmax by hand, taps in raster order."""

    def oracle(x, valid=None):
        batch, *grid, dim = x.shape
        v, rank, width = values_of(mixer, x), len(grid), dim // heads
        real = torch.ones(batch, *grid, dtype=torch.bool) if valid is None else valid
        back = kernel_size - 1 if causal else kernel_size // 2
        y = torch.zeros_like(x)
        for b, *at in product(range(batch), *map(range, grid)):
            centre, row = v[(b, *at)], []
            for h in range(heads):
                rows = mixer.weight_linear.weight[h * kernel_size**rank : (h + 1) * kernel_size**rank]
                tap = (rows @ centre).exp()
                tap = tap / tap.sum()
                total = torch.zeros(width, dtype=x.dtype)
                for t, offset in enumerate(product(range(kernel_size), repeat=rank)):
                    place = [a + o - back for a, o in zip(at, offset, strict=True)]
                    inside = all(0 <= p < n for p, n in zip(place, grid, strict=True))
                    if inside and real[(b, *place)]:
                        total = total + tap[t] * v[(b, *place)][h * width : (h + 1) * width]
                row.append(total)
            y = y.index_put(tuple(torch.tensor([i]) for i in (b, *at)), torch.cat(row)[None])
        if mixer.projection:
            y = y @ mixer.linear2.weight.T + mixer.linear2.bias
        return y

    return oracle


CASES = [  # arguments, kernel size, heads, causal, channels, grid
    ("num_heads=2", 3, 2, False, 4, (3, 4)),
    ("kernel_size=5, num_heads=4, projection=True", 5, 4, False, 4, (2, 4)),
    ("kernel_size=7, num_heads=1, rank=1", 7, 1, False, 4, (5,)),
    ("kernel_size=1, num_heads=2, rank=1", 1, 2, False, 4, (3,)),
    ("kernel_size=4, head_dim=3, causal=True, projection=True, rank=1", 4, 2, True, 6, (6,)),
    ("kernel_size=2, num_heads=2, causal=True", 2, 2, True, 4, (3, 4)),
]


@pytest.mark.parametrize(("arguments", "kernel_size", "heads", "causal", "dim", "grid"), CASES)
def test_is_one_kernel_for_each_position_and_head(
    build, check, tokens, arguments, kernel_size, heads, causal, dim, grid
):
    mixer = build(f"DynamicConv({arguments})", dim)
    check(mixer, oracle_of(mixer, kernel_size, heads, causal), tokens(2, *grid, dim))


def test_is_a_banded_matrix(build, check, tokens):
    """The released code's long-sequence form: taps laid along the diagonals of [T, T], one product for each head."""
    mixer = build("DynamicConv(kernel_size=5, num_heads=2, rank=1)", 6)

    def banded(x):
        taps = (x @ mixer.weight_linear.weight.T).unflatten(-1, (2, 5)).softmax(-1)
        bands = []
        for offset in range(-2, 3):
            tap = taps[..., offset + 2]  # [B, T, heads]
            kept = tap[:, max(-offset, 0) : 9 - max(offset, 0)]
            bands.append(torch.diag_embed(kept.movedim(1, -1), offset)[..., :9, :9])
        out = sum(bands) @ x.unflatten(-1, (2, 3)).transpose(1, 2)
        return out.transpose(1, 2).flatten(2)

    check(mixer, banded, tokens(2, 9, 6))


def test_is_unfold(build, check, tokens):
    mixer = build("DynamicConv(kernel_size=3, num_heads=4)", 8)

    def unfolded(x):
        batch, height, width, dim = x.shape
        taps = F.conv2d(x.movedim(-1, 1), mixer.weight_linear.weight[..., None, None]).view(batch, 4, 9, height * width)
        near = F.unfold(x.movedim(-1, 1), 3, padding=1).view(batch, 4, dim // 4, 9, height * width)
        mixed = (near * taps.softmax(2)[:, :, None]).sum(3)
        return mixed.reshape(batch, dim, height, width).movedim(1, -1)

    check(mixer, unfolded, tokens(2, 4, 6, 8))


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_constant_input_is_kept_inside_and_shrinks_at_the_border(build, impl):
    """No renormalisation: taps outside take their share with them."""
    mixer = build("DynamicConv(kernel_size=5, num_heads=2, rank=1)", 4)
    mixer.impl = impl
    x = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64).expand(1, 9, 4)
    y = mixer(x)
    assert_close(y[:, 2:-2], x[:, 2:-2])
    for border in (0, 1, 7, 8):
        assert (y[:, border] < 0.999 * x[:, border]).all()


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_zero_prediction_is_the_average(build, tokens, impl):
    mixer = build("DynamicConv(kernel_size=3, num_heads=2)", 8)
    mixer.impl = impl
    with torch.no_grad():
        mixer.weight_linear.weight.zero_()
    x = tokens(2, 4, 5, 8)
    mean = F.avg_pool2d(x.movedim(-1, 1), 3, 1, 1, count_include_pad=True)
    assert_close(mixer(x), mean.movedim(1, -1))


@pytest.mark.parametrize(
    ("arguments", "heads", "causal", "grid"),
    [("num_heads=2, projection=True", 2, False, (4, 3)), ("num_heads=1, causal=True, rank=1", 1, True, (6,))],
)
def test_padding_counts_as_zero(build, tokens, arguments, heads, causal, grid):
    """Also with the projection, whose biases make something of nothing."""
    mixer = build(f"DynamicConv({arguments})", 4)
    x, valid = tokens(2, *grid, 4), torch.rand(2, *grid) < 0.6
    expected = oracle_of(mixer, 3, heads, causal)(x, valid)
    for mixer.impl in ("reference", "fast"):
        assert_close(mixer(x, valid=valid)[valid], expected[valid])


@pytest.mark.parametrize(
    ("arguments", "extents"),
    [
        ("num_heads=2, projection=True", [(4, 3), (2, 5)]),
        ("kernel_size=4, num_heads=2, causal=True, rank=1", [(6,), (2,)]),
    ],
)
def test_padding_leaves_images_alone(build, check_padding, arguments, extents):
    check_padding(build(f"DynamicConv({arguments})", 8), extents, 8)


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_training_drops_taps_after_the_softmax(build, impl):
    """Away from an impulse kernels are uniform: each tap is 0 or larger by 1 / (1 - rate), for each token by itself."""
    mixer = build("DynamicConv(kernel_size=9, num_heads=4, weight_dropout=0.4, rank=1)", 8)
    mixer.impl = impl
    x = torch.zeros(2, 21, 8, dtype=torch.float64)
    x[:, 10] = 1
    near = [6, 7, 8, 9, 11, 12, 13, 14]
    assert_close(mixer(x)[:, near], torch.full((2, 8, 8), 1 / 9, dtype=torch.float64))
    mixer.train()
    y = mixer(x)[:, near]
    assert_close(y[..., ::2], y[..., 1::2], rtol=0, atol=0)  # channels of one head
    kept = y[..., ::2] > 0
    assert_close(y[..., ::2], kept.double() / (9 * 0.6), rtol=1e-12, atol=0)
    assert 20 < kept.sum() < 60
    assert not torch.equal(kept[0], kept[1])


def test_both_paths_drop_the_same_and_looking_drops_nothing(build, tokens):
    mixer = build("DynamicConv(kernel_size=3, num_heads=4, weight_dropout=0.5, projection=True)", 8)
    x = tokens(2, 4, 5, 8)
    looked = mixer.weights(x).weights
    mixer.train()
    outputs = []
    for mixer.impl in ("reference", "fast"):
        torch.manual_seed(5)
        outputs.append(mixer(x))
    assert_close(*outputs)
    before = torch.get_rng_state()
    assert_close(mixer.weights(x).weights, looked, rtol=0, atol=0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("impl", ["reference", "fast"])
@pytest.mark.parametrize("kernel_size", [1, 4])
def test_a_cache_keeps_the_last_taps_but_one(build, tokens, impl, kernel_size):
    mixer = build(f"DynamicConv(kernel_size={kernel_size}, num_heads=2, causal=True, projection=True, rank=1)", 4)
    mixer.impl = impl
    x, cache = tokens(2, 9, 4), glocal.Cache()
    mixer(x[:, :8], cache=cache)
    assert cache.recall("values", 2).shape == (2, kernel_size - 1, 2, 2) and len(cache) == 8
    looked = mixer.weights(x[:, 8:], cache=cache)
    assert looked.query_positions.tolist() == [[8]]
    assert looked.source_positions.flatten().tolist() == list(range(9 - kernel_size, 9))
    assert_close(mixer(x[:, 8:], cache=cache), oracle_of(mixer, kernel_size, 2, True)(x)[:, 8:])


def test_parameters():
    def shapes(spec):
        return {k: tuple(v.shape) for k, v in glocal.build(spec, 64).named_parameters()}

    assert shapes("DynamicConv(kernel_size=7, num_heads=16, rank=1)") == {"weight_linear.weight": (112, 64)}
    assert shapes("DynamicConv(projection=True)") == {
        "weight_linear.weight": (18, 64),
        "linear1.weight": (128, 64),
        "linear1.bias": (128,),
        "linear2.weight": (64, 64),
        "linear2.bias": (64,),
    }


def test_weights_are_shared_by_the_channels_of_a_head(build, tokens):
    weights = build("DynamicConv(num_heads=4)", 16).weights(tokens(2, 8, 8, 16))
    assert weights.weights.shape == (2, 4, 64, 9) and weights.index.shape == (1, 1, 64, 9)
    assert_close(weights.weights.sum(-1), torch.ones(2, 4, 64, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("kernel_size=4, num_heads=2", "kernel_size: 4, must be odd"),
        ("kernel_size=(3, 3), num_heads=2", r"kernel_size: \(3, 3\), must be a positive whole number"),
        ("num_heads=3", "num_heads: 3 does not divide 8 channels"),
        ("num_heads=2, causal=1", "causal: 1, must be True or False"),
        ("num_heads=2, weight_dropout=-0.1", "weight_dropout: -0.1, must be a number, at least 0 and less than 1"),
        ("num_heads=2, rank=3", "rank: 3, must be 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        glocal.build(f"DynamicConv({arguments})", 8)
