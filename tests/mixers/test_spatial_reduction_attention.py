"""SpatialReductionAttention against timm's PVT attention, and a loop over cells where timm drops tokens."""

import pytest
import torch
from timm.models.pvt_v2 import Attention
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

import glocal

HEADS, DIM = 2, 8


def spec_of(**arguments):
    options = {"num_heads": HEADS, **arguments}
    return f"SpatialReductionAttention({', '.join(f'{k}={v}' for k, v in options.items())})"


def by_timm(mixer, ratio, qkv_bias=True):
    attention = Attention(DIM, HEADS, sr_ratio=ratio, qkv_bias=qkv_bias).to(mixer.proj.weight.dtype)
    assert {k: v.shape for k, v in attention.named_parameters()} == {k: v.shape for k, v in mixer.named_parameters()}

    def oracle(x):
        return functional_call(attention, dict(mixer.named_parameters()), (x.flatten(1, 2), x.shape[1:3])).view(x.shape)

    return oracle


@pytest.mark.parametrize(
    ("ratio", "grid"), [(1, (3, 5)), (2, (4, 6)), (2, (2, 2)), (3, (3, 9)), (4, (8, 4)), (8, (8, 16))]
)
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_is_timms_attention(build, check, tokens, ratio, grid, qkv_bias):
    mixer = build(spec_of(sr_ratio=ratio, qkv_bias=qkv_bias), DIM)
    check(mixer, by_timm(mixer, ratio, qkv_bias), tokens(2, *grid, DIM))


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_is_timms_attention_in_float32(build, tokens, impl):
    mixer = build(spec_of(sr_ratio=2), DIM).float()
    mixer.impl = impl
    x = tokens(2, 6, 10, DIM).float()
    assert_close(mixer(x), by_timm(mixer, 2)(x), rtol=1e-5, atol=1e-5)


def reduced(mixer, x, ratio, valid=None):
    """Cell by cell: [B, M, C], and which cells hold a real token."""
    batch, *grid, dim = x.shape
    counts = [-(-n // r) for n, r in zip(grid, ratio, strict=True)]
    kernel = mixer.sr.weight.reshape(dim, dim, *ratio)  # rank 1 has a kernel of one row
    cells, real = [], []
    for cell in torch.cartesian_prod(*map(torch.arange, counts)).view(-1, len(grid)).tolist():
        total = mixer.sr.bias.expand(batch, -1)
        some = torch.zeros(batch, dtype=torch.bool)
        for tap in torch.cartesian_prod(*map(torch.arange, ratio)).view(-1, len(grid)).tolist():
            place = tuple(c * r + t for c, r, t in zip(cell, ratio, tap, strict=True))
            if any(p >= n for p, n in zip(place, grid, strict=True)):
                continue
            here = torch.ones(batch, dtype=torch.bool) if valid is None else valid[(slice(None), *place)]
            token = torch.where(here[:, None], x[(slice(None), *place)], 0)
            total = total + token @ kernel[(slice(None), slice(None), *tap)].T
            some |= here
        cells.append(total)
        real.append(some)
    pooled = torch.stack(cells, 1)
    centred = pooled - pooled.mean(-1, keepdim=True)
    pooled = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt() * mixer.norm.weight + mixer.norm.bias
    return pooled, torch.stack(real, 1)


def by_loop(mixer, attend, ratio):
    def oracle(x, valid=None, queries=None):
        pooled, real = reduced(mixer, x, ratio, valid)
        k, v = mixer.kv(pooled).unflatten(-1, (2, HEADS, -1)).unbind(2)
        q = mixer.q(x.flatten(1, -2)).unflatten(-1, (HEADS, -1))
        y = mixer.proj(attend(q, k, v, lambda b, i: real[b].nonzero()[:, 0].tolist()))
        return y.view(x.shape) if queries is None else y[:, queries]

    return oracle


CASES = [  # ratio, grid
    (2, (5, 4)),
    (2, (1, 1)),
    (2, (1, 3)),
    ((3, 2), (4, 7)),
    ((1, 2), (3, 5)),
    (4, (3, 5)),
]


@pytest.mark.parametrize(("ratio", "grid"), CASES)
def test_is_the_loop_at_every_size(build, check, tokens, attend, ratio, grid):
    mixer = build(spec_of(sr_ratio=ratio), DIM)
    ratio = (ratio,) * 2 if isinstance(ratio, int) else ratio
    check(mixer, by_loop(mixer, attend, ratio), tokens(2, *grid, DIM))


@pytest.mark.parametrize("length", [1, 6, 8])
def test_sequences_are_the_loop(build, check, tokens, attend, length):
    mixer = build(spec_of(sr_ratio=3, rank=1), DIM)
    check(mixer, by_loop(mixer, attend, (3,)), tokens(2, length, DIM))


@pytest.mark.parametrize(("ratio", "grid"), [(2, (5, 4)), ((3, 2), (4, 7))])
def test_cells_without_a_real_token_are_not_seen(build, check, tokens, attend, ratio, grid):
    mixer = build(spec_of(sr_ratio=ratio), DIM)
    ratio = (ratio,) * 2 if isinstance(ratio, int) else ratio
    valid = torch.rand(3, *grid) < 0.3
    valid[1] = False
    check(mixer, by_loop(mixer, attend, ratio), tokens(3, *grid, DIM), valid=valid)
    x = tokens(3, *grid, DIM)
    check(mixer, by_loop(mixer, attend, ratio), x, fast=False, valid=valid, queries=torch.tensor([7, 0, 7]))


@pytest.mark.parametrize("extents", [[(4, 3), (2, 5)], [(1, 1), (5, 4)]])
@pytest.mark.parametrize("arguments", [{}, {"sr_ratio": 3}, {"sr_ratio": 1}])
def test_padding_leaves_images_alone(build, check_padding, extents, arguments):
    check_padding(build(spec_of(**arguments), DIM), extents, DIM)


def test_ratio_one_is_self_attention(build, check, tokens):
    mixer, plain = build(spec_of(sr_ratio=1), DIM), build(f"SelfAttention(num_heads={HEADS})", DIM)

    def oracle(x, valid=None):
        mine = dict(mixer.named_parameters())
        weights = {f"qkv.{n}": torch.cat([mine[f"q.{n}"], mine[f"kv.{n}"]]) for n in ("weight", "bias")}
        return functional_call(plain, weights | {k: v for k, v in mine.items() if "proj" in k}, x, {"valid": valid})

    check(mixer, oracle, tokens(2, 3, 5, DIM))
    check(mixer, oracle, tokens(2, 3, 5, DIM), valid=torch.rand(2, 3, 5) < 0.6)


@pytest.mark.parametrize(("ratio", "grid"), [(2, (5, 4)), ((4, 3), (6, 6))])
def test_sources_stand_at_the_centres_of_their_cells(build, tokens, ratio, grid):
    weights = build(spec_of(sr_ratio=ratio), DIM).weights(tokens(2, *grid, DIM))
    rows, columns = (ratio,) * 2 if isinstance(ratio, int) else ratio
    expected = [
        [first_row + (rows - 1) / 2, first_column + (columns - 1) / 2]
        for first_row in range(0, grid[0], rows)
        for first_column in range(0, grid[1], columns)
    ]
    assert_close(weights.source_positions, torch.tensor(expected))
    assert weights.source_grid == (-(-grid[0] // rows), -(-grid[1] // columns))
    assert weights.weights.shape == (2, HEADS, grid[0] * grid[1], len(expected))
    assert_close(weights.dense().sum(-1), torch.ones(2, HEADS, grid[0] * grid[1], dtype=torch.float64))


@pytest.mark.parametrize("name", ["SpatialReductionAttention", "LinearSpatialReductionAttention"])
def test_the_map_is_reduced_once(build, tokens, name):
    mixer, x, calls = build(f"{name}(num_heads={HEADS})", DIM), tokens(2, 4, 6, DIM), []
    mixer.sr.register_forward_hook(lambda *_: calls.append(1))
    mixer(x)
    assert calls == [1]
    mixer(x, valid=torch.ones(2, 4, 6, dtype=torch.bool))
    assert calls == [1, 1]


def test_a_watched_projection_is_called(build, tokens):
    mixer, seen = build(spec_of(), DIM), []
    x = tokens(2, 4, 6, DIM)
    expected = mixer(x)
    mixer.kv.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    assert_close(mixer(x), expected)
    assert set(seen) == {(2, 6, 2 * DIM)}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_heads": 3}, "num_heads: 3 does not divide 8"),
        ({"sr_ratio": 0}, "sr_ratio: 0"),
        ({"sr_ratio": (2, 2, 2)}, "sr_ratio"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        glocal.build(spec_of(**arguments), DIM)


def test_parameters_of_pvt():
    """Stage 1 of every PVT: 64 channels, one head, R = 8."""
    mixer = glocal.build("SpatialReductionAttention(num_heads=1, sr_ratio=8)", 64)
    assert sum(p.numel() for p in mixer.parameters()) == 4 * 64 * 65 + 64 * 64 * 64 + 64 + 2 * 64
    assert isinstance(mixer.norm, nn.LayerNorm) and mixer.norm.eps == 1e-5


# planted by scripts/mutate
FAULTS = {
    "mixers/spatial_reduction_attention.py": (
        ("zeros fill up the front of an axis", "for m in (0, end))", "for m in (end, 0))"),
        ("zeros fill up the other axis", "for end in reversed(more)", "for end in more"),
        (
            "a convolution reads what stands in the padding",
            "x = x if valid is None else x.masked_fill(~valid[..., None], 0)",
            "x = x",
        ),
        ("a cell counts only where all its tokens are real", ".any(axis + 1)", ".all(axis + 1)"),
        ("cells are not normalised", "return self.norm(self.sr(", "return (self.sr("),
        (
            "the ratio of the rows is taken for that of the columns",
            'per_axis("sr_ratio", sr_ratio, rank)',
            'per_axis("sr_ratio", sr_ratio, rank)[::-1]',
        ),
        ("a ratio that reduces one axis only is taken for none", "max(self._ratio) > 1", "min(self._ratio) > 1"),
        ("the last cell of an axis is dropped from the grid", "out_lengths((n,), r)[0]", "max(n // r, 1)"),
        ("the cost leaves out the convolution", "pooled * math.prod(self._ratio) * self.dim**2", "0"),
    ),
    "mixers/_reduced_attention.py": (
        (
            "the fast path reduces the map for keys and for values",
            "keys_and_values = self.kv(self.reduced(x, valid))",
            "keys_and_values = self.kv((self.reduced(x, valid) + self.reduced(x, valid)) / 2)",
        ),
    ),
}
