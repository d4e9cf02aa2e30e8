"""LightweightConv against a loop, torch's grouped convolution, banded matrices and unfold."""

from itertools import product

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import glocal

FAULTS = (
    (
        "the softmax is taken over all heads together",
        "logits.softmax(-1)",
        "logits.flatten().softmax(0).view_as(logits)",
    ),
    ("taps are not normalised", "logits.softmax(-1)", "logits"),
    ("a causal kernel ends one token late", "return self.kernel_size - 1 if", "return self.kernel_size - 2 if"),
    ("the gate is the first half", "glu(self.linear1(v))", "glu(self.linear1(v).roll(self.dim, -1))"),
    ("the fast path has no output projection", "return self.linear2(local_sum(", "return (local_sum("),
    (
        "no gradient reaches the kernels",
        "self._taps(self.weight.flatten(1)",
        "self._taps(self.weight.detach().flatten(1)",
    ),
    ("looking drops taps", "self._taps(position, update_statistics)", "self._taps(position, self.training)"),
    ("the fast path drops none", "self.weight.flatten(1), update_statistics)", "self.weight.flatten(1), False)"),
    ("taps are dropped in evaluation too", "self.weight_dropout, training)", "self.weight_dropout, True)"),
    (
        "one token too many is kept",
        "int:\n        return self.kernel_size - 1\n",
        "int:\n        return self.kernel_size\n",
    ),
    ("kept tokens have outputs of their own", "past=self._kept(cache)", "past=0"),
)


def values_of(mixer, x):
    """The gated linear unit written out: the first half times the sigmoid of the second."""
    if not mixer.projection:
        return x
    both = x @ mixer.linear1.weight.T + mixer.linear1.bias
    dim = x.shape[-1]
    return both[..., :dim] / (1 + torch.exp(-both[..., dim:]))


def projected(mixer, y):
    return y @ mixer.linear2.weight.T + mixer.linear2.bias if mixer.projection else y


def oracle_of(mixer, kernel_size, heads, causal=False):
    """Position by position and channel by channel, softmax by hand, taps in raster order."""

    def oracle(x, valid=None):
        batch, *grid, dim = x.shape
        v, rank = values_of(mixer, x), len(grid)
        real = torch.ones(batch, *grid, dtype=torch.bool) if valid is None else valid
        back = kernel_size - 1 if causal else kernel_size // 2
        total = sum(mixer.weight[(slice(None), 0, *tap)].exp() for tap in taps_of(kernel_size, rank))
        taps = mixer.weight.exp() / total.view(heads, *[1] * (rank + 1))
        y = torch.zeros_like(x)
        for b, *at in product(range(batch), *map(range, grid)):
            row = []
            for c in range(dim):
                total = x.new_zeros(())
                for tap in taps_of(kernel_size, rank):
                    place = tuple(a + o - back for a, o in zip(at, tap, strict=True))
                    if all(0 <= p < n for p, n in zip(place, grid, strict=True)) and real[(b, *place)]:
                        total = total + taps[(c * heads // dim, 0, *tap)] * v[(b, *place, c)]
                row.append(total)
            y = y.index_put(tuple(torch.tensor([i]) for i in (b, *at)), torch.stack(row)[None])
        return projected(mixer, y)

    return oracle


def taps_of(kernel_size, rank):
    return product(range(kernel_size), repeat=rank)


CASES = [  # arguments, kernel size, heads, causal, channels, grid
    ("num_heads=2", 3, 2, False, 4, (3, 4)),
    ("kernel_size=5, num_heads=4, projection=True", 5, 4, False, 4, (2, 4)),
    ("kernel_size=7, num_heads=1, rank=1", 7, 1, False, 4, (5,)),
    ("kernel_size=1, num_heads=2, rank=1", 1, 2, False, 4, (3,)),
    ("kernel_size=4, head_dim=3, causal=True, projection=True, rank=1", 4, 2, True, 6, (6,)),
    ("kernel_size=2, num_heads=2, causal=True", 2, 2, True, 4, (3, 4)),
]


@pytest.mark.parametrize(("arguments", "kernel_size", "heads", "causal", "dim", "grid"), CASES)
def test_is_one_kernel_for_each_head(build, check, tokens, arguments, kernel_size, heads, causal, dim, grid):
    mixer = build(f"LightweightConv({arguments})", dim)
    check(mixer, oracle_of(mixer, kernel_size, heads, causal), tokens(2, *grid, dim))


@pytest.mark.parametrize("causal", [False, True])
def test_is_torchs_convolution_of_heads(build, check, tokens, causal):
    """The released code's form: the channels of a head become images of one batch, and heads are the groups."""
    mixer = build(f"LightweightConv(kernel_size=5, num_heads=2, causal={causal}, projection=True, rank=1)", 6)

    def by_heads(x):
        batch, length, dim = x.shape
        rows = values_of(mixer, x).mT.reshape(batch, 2, 3, length).transpose(1, 2).reshape(-1, 2, length)
        mixed = F.conv1d(rows, mixer.weight.softmax(-1), padding=4 if causal else 2, groups=2)[..., :length]
        return projected(mixer, mixed.view(batch, 3, 2, length).transpose(1, 2).reshape(batch, dim, length).mT)

    check(mixer, by_heads, tokens(2, 9, 6))


def test_is_a_banded_matrix(build, check, tokens):
    mixer = build("LightweightConv(kernel_size=5, num_heads=2, rank=1)", 6)

    def banded(x):
        taps = mixer.weight[:, 0].softmax(-1)
        bands = sum(torch.diag_embed(taps[:, [o + 2]].expand(2, 9 - abs(o)), o) for o in range(-2, 3))
        return (bands @ x.unflatten(-1, (2, 3)).transpose(1, 2)).transpose(1, 2).flatten(2)

    check(mixer, banded, tokens(2, 9, 6))


def test_is_unfold(build, check, tokens):
    mixer = build("LightweightConv(kernel_size=3, num_heads=4)", 8)

    def unfolded(x):
        batch, height, width, dim = x.shape
        near = F.unfold(x.movedim(-1, 1), 3, padding=1).view(batch, 4, 2, 9, height * width)
        taps = mixer.weight.flatten(1).softmax(-1)
        mixed = torch.einsum("bhdkn,hk->bhdn", near, taps)
        return mixed.reshape(batch, dim, height, width).movedim(1, -1)

    check(mixer, unfolded, tokens(2, 4, 6, 8))


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_is_the_depthwise_convolution_with_these_kernels(build, tokens, impl):
    mixer = build("LightweightConv(kernel_size=3, num_heads=4)", 8)
    depthwise = build("DepthwiseConv(kernel_size=3, bias=False)", 8)
    mixer.impl = impl
    with torch.no_grad():
        depthwise.weight.copy_(mixer.weight.flatten(1).softmax(-1).repeat_interleave(2, 0).view(8, 1, 3, 3))
    x = tokens(2, 5, 4, 8)
    assert_close(mixer(x), depthwise(x))


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_is_a_dynamic_convolution_that_predicts_the_same_everywhere(build, tokens, impl):
    """One channel that is 1 everywhere is all that the kernels are predicted from."""
    mixer = build("LightweightConv(kernel_size=3, num_heads=2, rank=1)", 4)
    dynamic = build("DynamicConv(kernel_size=3, num_heads=2, rank=1)", 4)
    mixer.impl = impl
    x = tokens(2, 7, 4)
    x[..., 0] = 1
    with torch.no_grad():
        dynamic.weight_linear.weight.zero_()
        dynamic.weight_linear.weight[:, 0] = mixer.weight.flatten()
    assert_close(mixer(x), dynamic(x))


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_constant_input_is_kept_inside_and_shrinks_at_the_border(build, impl):
    mixer = build("LightweightConv(kernel_size=5, num_heads=2, rank=1)", 4)
    mixer.impl = impl
    x = torch.tensor([1.0, 2.0, 0.5, 3.0], dtype=torch.float64).expand(1, 9, 4)
    y = mixer(x)
    assert_close(y[:, 2:-2], x[:, 2:-2])
    for border in (0, 1, 7, 8):
        assert (y[:, border] < 0.999 * x[:, border]).all()


@pytest.mark.parametrize(
    ("arguments", "heads", "causal", "grid"),
    [("num_heads=2, projection=True", 2, False, (4, 3)), ("num_heads=1, causal=True, rank=1", 1, True, (6,))],
)
def test_padding_counts_as_zero(build, tokens, arguments, heads, causal, grid):
    """Also with the projection, whose biases make something of nothing."""
    mixer = build(f"LightweightConv({arguments})", 4)
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
    check_padding(build(f"LightweightConv({arguments})", 8), extents, 8)


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_training_drops_taps_after_the_softmax(build, impl):
    """An impulse shows the taps: 0 or larger by 1 / (1 - rate), the same at every position and for every sequence."""
    mixer = build("LightweightConv(kernel_size=9, num_heads=4, weight_dropout=0.4, rank=1)", 8)
    mixer.impl = impl
    x = torch.zeros(2, 30, 8, dtype=torch.float64)
    x[0, 10] = x[1, 20] = 1
    taps = mixer.weight.flatten(1).softmax(-1)
    whole = torch.stack([taps.flip(1)] * 2)
    shown = [mixer(x)[0, 6:15].mT[::2], mixer(x)[1, 16:25].mT[::2]]
    assert_close(torch.stack(shown), whole)
    mixer.train()
    y = mixer(x)
    first, second = y[0, 6:15].mT, y[1, 16:25].mT
    assert_close(first, second, rtol=0, atol=0)
    assert_close(first[::2], first[1::2], rtol=0, atol=0)
    ratio = first[::2] / whole[0]
    kept = ratio > 0
    assert 0 < kept.sum() < 36
    assert_close(ratio, kept.double() / 0.6)


def test_both_paths_drop_the_same_and_looking_drops_nothing(build, tokens):
    mixer = build("LightweightConv(kernel_size=5, num_heads=4, weight_dropout=0.5, projection=True)", 8)
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
    mixer = build(f"LightweightConv(kernel_size={kernel_size}, num_heads=2, causal=True, projection=True, rank=1)", 4)
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

    assert shapes("LightweightConv(kernel_size=7, num_heads=16, rank=1)") == {"weight": (16, 1, 7)}
    assert shapes("LightweightConv(projection=True)") == {
        "weight": (2, 1, 3, 3),
        "linear1.weight": (128, 64),
        "linear1.bias": (128,),
        "linear2.weight": (64, 64),
        "linear2.bias": (64,),
    }
    start = glocal.build("LightweightConv(kernel_size=31, num_heads=16, rank=1)", 64).weight
    bound = (6 / (31 * 17)) ** 0.5  # Xavier's rule, as in the released code
    assert 0.9 * bound < start.abs().max() <= bound


def test_weights_are_shared_by_positions_and_images(build, tokens):
    weights = build("LightweightConv(num_heads=4)", 16).weights(tokens(2, 8, 8, 16))
    assert weights.weights.shape == (1, 4, 1, 9) and weights.index.shape == (1, 1, 64, 9)
    assert_close(weights.weights.sum(-1), torch.ones(1, 4, 1, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("kernel_size=4, num_heads=2", "kernel_size: 4, must be odd"),
        ("kernel_size=(3, 3), num_heads=2", r"kernel_size: \(3, 3\), must be a positive whole number"),
        ("num_heads=3", "num_heads: 3 does not divide 8 channels"),
        ("num_heads=2, causal=1", "causal: 1, must be True or False"),
        ("num_heads=2, weight_dropout=1.0", "weight_dropout: 1.0, must be a number, at least 0 and less than 1"),
        ("num_heads=2, weight_dropout=True", "weight_dropout: True, must be a number"),
        ("num_heads=2, rank=3", "rank: 3, must be 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        glocal.build(f"LightweightConv({arguments})", 8)
