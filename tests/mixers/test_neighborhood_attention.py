"""NeighborhoodAttention against a loop over every query, and against NATTEN's rule for the borders."""

import pytest
import torch
from torch.nn import functional as F

import glocal

HEADS, DIM = 2, 8


def spec_of(kernel_size, **arguments):
    options = {"kernel_size": kernel_size, "num_heads": HEADS, **arguments}
    return f"NeighborhoodAttention({', '.join(f'{k}={v!r}' for k, v in options.items())})"


def axis_sources(i, length, kernel_size, dilation, causal, border):
    """The coordinates that coordinate i attends to along one axis."""
    if causal:
        reach = [i - k * dilation for k in reversed(range(kernel_size))]
    elif border == "masked":
        reach = [i + (k - kernel_size // 2) * dilation for k in range(kernel_size)]
    else:  # moved inward among the positions that are a multiple of the dilation away
        reach = list(range(i % dilation, length, dilation))
        start = min(max(reach.index(i) - kernel_size // 2, 0), max(len(reach) - kernel_size, 0))
        return reach[start : start + kernel_size]
    return [p for p in reach if 0 <= p < length]


def by_loop(mixer, attend, places, kernel_size, dilation=1, causal=False, border="masked"):
    def oracle(x, valid=None):
        batch, *grid, _ = x.shape
        where = places(grid)

        def sources(b, i):
            axes = [
                axis_sources(p, n, kernel_size, dilation, causal, border) for p, n in zip(where[i], grid, strict=True)
            ]
            near = [j for j, place in enumerate(where) if all(p in axis for p, axis in zip(place, axes, strict=True))]
            return near if valid is None else [j for j in near if valid[(b, *where[j])]]

        def bias(i, j):
            offset = [(s - q) // dilation + kernel_size - 1 for q, s in zip(where[i], where[j], strict=True)]
            return mixer.rpb[(slice(None), *offset)]

        q, k, v = mixer.qkv(x).reshape(batch, len(where), 3, HEADS, -1).unbind(2)
        return mixer.proj(attend(q, k, v, sources, bias if mixer.position_bias else None)).view(batch, *grid, -1)

    return oracle


SIZES = [  # grid, kernel size, dilation
    ((5, 7), 3, 1),
    ((6, 5), 5, 1),
    ((7, 6), 3, 2),
    ((5, 8), 3, 3),
    ((9, 1), 3, 2),
    ((3, 4), 5, 1),
    ((2, 7), 3, 2),
    ((4, 3), 1, 2),
    ((9,), 3, 1),
    ((11,), 5, 2),
    ((7,), 3, 4),
    ((4,), 7, 1),
]


@pytest.mark.parametrize("border", ["masked", "shifted"])
@pytest.mark.parametrize(("grid", "kernel_size", "dilation"), SIZES)
def test_is_the_loop(build, check, tokens, attend, places, grid, kernel_size, dilation, border):
    mixer = build(spec_of(kernel_size, dilation=dilation, border=border, rank=len(grid)), DIM)
    check(mixer, by_loop(mixer, attend, places, kernel_size, dilation, border=border), tokens(2, *grid, DIM))


@pytest.mark.parametrize(("grid", "kernel_size", "dilation"), [s for s in SIZES if s[0] != (6, 5)])
def test_causal_is_the_loop(build, check, tokens, attend, places, grid, kernel_size, dilation):
    mixer = build(spec_of(kernel_size, dilation=dilation, causal=True, rank=len(grid)), DIM)
    check(mixer, by_loop(mixer, attend, places, kernel_size, dilation, causal=True), tokens(2, *grid, DIM))


@pytest.mark.parametrize("border", ["masked", "shifted"])
@pytest.mark.parametrize(("grid", "kernel_size", "dilation"), [SIZES[0], SIZES[2], SIZES[9]])
def test_without_position_bias_is_the_loop_without(
    build, check, tokens, attend, places, grid, kernel_size, dilation, border
):
    mixer = build(spec_of(kernel_size, dilation=dilation, border=border, position_bias=False, rank=len(grid)), DIM)
    assert {name for name, _ in mixer.named_parameters()} == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    check(mixer, by_loop(mixer, attend, places, kernel_size, dilation, border=border), tokens(2, *grid, DIM))
    assert set(mixer.scores(tokens(1, *grid, DIM))) == {"content"}


def test_without_qkv_bias_is_the_loop(build, check, tokens, attend, places):
    mixer = build(spec_of(3, qkv_bias=False), DIM)
    check(mixer, by_loop(mixer, attend, places, 3), tokens(2, 4, 5, DIM))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(("grid", "kernel_size", "dilation"), [SIZES[0], SIZES[2], SIZES[9]])
def test_masked_border_takes_any_valid_tokens(
    build, check, tokens, attend, places, grid, kernel_size, dilation, causal
):
    mixer = build(spec_of(kernel_size, dilation=dilation, causal=causal, rank=len(grid)), DIM)
    valid = torch.rand(2, *grid) < 0.4  # leaves some queries without any source
    oracle = by_loop(mixer, attend, places, kernel_size, dilation, causal=causal)
    check(mixer, oracle, tokens(2, *grid, DIM), valid=valid)


# First source of each query, from NATTEN's get_window_start (csrc/cpu/natten_cpu_commons.h, v0.14).
NATTEN_STARTS = [  # length, kernel size, dilation, starts
    (7, 3, 1, [0, 0, 1, 2, 3, 4, 4]),
    (9, 3, 2, [0, 1, 0, 1, 2, 3, 4, 3, 4]),
    (11, 5, 2, [0, 1, 0, 1, 0, 1, 2, 1, 2, 1, 2]),
    (11, 3, 3, [0, 1, 2, 0, 1, 2, 3, 4, 2, 3, 4]),
]


@pytest.mark.parametrize(("length", "kernel_size", "dilation", "starts"), NATTEN_STARTS)
def test_shifted_border_is_nattens(build, tokens, length, kernel_size, dilation, starts):
    mixer = build(spec_of(kernel_size, dilation=dilation, border="shifted", rank=1), DIM)
    dense = mixer.weights(tokens(1, length, DIM)).dense()[0, 0]
    found = [row.nonzero().flatten().tolist() for row in dense]
    assert found == [[start + k * dilation for k in range(kernel_size)] for start in starts]


@pytest.mark.parametrize(("grid", "kernel_size"), [((5, 5), 5), ((4, 3), 5), ((2, 6), 7)])
def test_kernel_over_the_grid_is_self_attention_with_bias(build, check, tokens, grid, kernel_size):
    mixer = build(spec_of(kernel_size, border="shifted"), DIM)
    rows = torch.arange(grid[0]).repeat_interleave(grid[1])
    columns = torch.arange(grid[1]).repeat(grid[0])
    index = (rows - rows[:, None] + kernel_size - 1, columns - columns[:, None] + kernel_size - 1)

    def oracle(x):
        q, k, v = mixer.qkv(x).view(2, len(rows), 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mixer.rpb[:, index[0], index[1]])
        return mixer.proj(mixed.transpose(1, 2).reshape(x.shape))

    check(mixer, oracle, tokens(2, *grid, DIM))


@pytest.mark.parametrize(
    ("kernel_size", "options", "extents"),
    [
        (3, {}, [(4, 5), (2, 6)]),
        (5, {}, [(6, 3), (4, 7)]),
        (3, {"dilation": 2}, [(5, 4), (3, 7)]),
        (3, {"dilation": 2, "rank": 1}, [(9,), (5,)]),
        (3, {"border": "shifted"}, [(4, 5), (2, 6)]),
        (5, {"border": "shifted"}, [(6, 3), (4, 7)]),
        (3, {"border": "shifted", "dilation": 2}, [(5, 4), (3, 7)]),
        (3, {"border": "shifted", "dilation": 2, "rank": 1}, [(9,), (5,)]),
        (3, {"causal": True}, [(4, 3), (1, 5)]),
        (3, {"causal": True, "rank": 1}, [(6,), (2,)]),
    ],
)
def test_padding_leaves_images_alone(build, check_padding, kernel_size, options, extents):
    check_padding(build(spec_of(kernel_size, **options), DIM), extents, DIM)


def test_window_cannot_be_moved_over_later_tokens():
    with pytest.raises(ValueError, match="border"):
        glocal.build(spec_of(3, causal=True, border="shifted"), DIM)


def test_a_cache_keeps_what_the_neighborhood_reaches(build, tokens, attend, places):
    """Seven tokens seen, the last four of them kept: taps at distances 0, 2 and 4."""
    mixer = build(spec_of(3, dilation=2, causal=True, rank=1), DIM)
    x = tokens(2, 9, DIM)
    expected = by_loop(mixer, attend, places, 3, 2, causal=True)(x)[:, 7:]
    for mixer.impl in ("reference", "fast"):
        cache = glocal.Cache()
        mixer(x[:, :7], cache=cache)
        assert cache.recall("keys", 2).shape == cache.recall("values", 2).shape == (2, 4, HEADS, DIM // HEADS)
        looked = mixer.weights(x[:, 7:], cache=cache)
        assert looked.source_positions.flatten().tolist() == [3, 4, 5, 6, 7, 8]
        assert looked.index[0, 0].tolist() == [[0, 2, 4], [1, 3, 5]]
        torch.testing.assert_close(mixer(x[:, 7:], cache=cache), expected)


def test_parameters():
    def shapes(spec, dim):
        return {k: tuple(v.shape) for k, v in glocal.build(spec, dim).named_parameters()}

    square = {"qkv.weight": (192, 64), "qkv.bias": (192,), "proj.weight": (64, 64), "proj.bias": (64,)}
    assert shapes("NeighborhoodAttention()", 64) == {**square, "rpb": (2, 13, 13)}
    flat = shapes("NeighborhoodAttention(kernel_size=5, head_dim=2, qkv_bias=False, rank=1)", 8)
    assert flat == {"qkv.weight": (24, 8), "proj.weight": (8, 8), "proj.bias": (8,), "rpb": (4, 9)}


@pytest.mark.parametrize("border", ["masked", "shifted"])
def test_weights_hold_one_kernel_for_each_query(build, tokens, border):
    weights = build(spec_of(3, border=border), 16).weights(tokens(2, 8, 8, 16))
    assert weights.weights.shape == (2, HEADS, 64, 9)


# planted by scripts/mutate
FAULTS = (
    ("the fast path does not scale the queries", "scale=self.scale,", "scale=1.0,"),
    (
        "the fast path sees padding",
        "valid=None if valid is None or shifted else valid.reshape(sources)",
        "valid=None",
    ),
    (
        "the fast path's windows are moved inward by the batch's size",
        "extents=None if valid is None or not shifted else extents(valid)",
        "extents=None",
    ),
    (
        "the bias table is flipped: query minus source",
        "(torch.arange(kernel, device=x.device) + kernel - 1 - before)[None]",
        "(before - torch.arange(kernel, device=x.device) + kernel - 1)[None]",
    ),
    (
        "the shifted window's bias table is flipped",
        "(member - rank_in_class[:, None] + kernel - 1)",
        "(rank_in_class[:, None] - member + kernel - 1)",
    ),
    (
        "one neighbor too few is kept",
        "self.dilation * (self._kernel[0] - 1) if",
        "self.dilation * (self._kernel[0] - 1) - 1 if",
    ),
    ("keys are not joined", "return k if cache is None else", "return k if True else"),
    ("kept tokens are queries too", "index = index[:, kept:]", "index = index[:, : index.shape[1] - kept]"),
    ("a causal query sees the token after it", "kernel - 1 if self.causal else", "kernel - 2 if self.causal else"),
    (
        "the shifted window stops one token too late",
        "in_class - kernel).clamp(min=0)",
        "in_class - kernel + 1).clamp(min=0)",
    ),
    (
        "dilated neighbors of a shifted window all start at the first class",
        "first[:, None] + dilation * member, -1)",
        "dilation * member, -1)",
    ),
    (
        "padding takes part in the softmax",
        "return inside if valid is None else inside & pick_or_zero(valid.flatten(1), index)",
        "return inside",
    ),
    (
        "windows are moved inward by the batch's size",
        "size = extents(valid) if valid is not None and shifted else None",
        "size = None",
    ),
    (
        "the kernel's axes are exchanged",
        "enumerate(zip(grid, self._kernel, strict=True)):",
        "enumerate(zip(grid, self._kernel[::-1], strict=True)):",
    ),
    (
        "positions of a subset of the queries are those of the first",
        "places if queries is None else places[queries]",
        "places if queries is None else places[: len(queries)]",
    ),
    (
        "the first length of a kernel is taken for that of the columns",
        '(per_axis if causal else odd_kernel)("kernel_size", kernel_size, rank)',
        '(per_axis if causal else odd_kernel)("kernel_size", kernel_size, rank)[::-1]',
    ),
)
