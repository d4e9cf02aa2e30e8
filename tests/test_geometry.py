"""Which places operators read: rows before columns, each image by its own size, and no token outside."""

import pytest
import torch

import glocal
from glocal import contract


def test_a_strided_operator_places_sources_in_tokens_of_the_query_grid():
    x = torch.randn(2, 5, 4, 8)
    found = glocal.build("DepthwiseConv(kernel_size=3, stride=2)", 8).weights(x)
    assert found.out_grid == (3, 2)
    assert found.query_positions[:3].tolist() == [[0, 0], [0, 1], [1, 0]]
    assert found.source_positions[:6].tolist() == [[0, 0], [0, 0.5], [0, 1], [0, 1.5], [0.5, 0], [0.5, 0.5]]
    pooled = glocal.build("AveragePooling(kernel_size=2, stride=2)", 8).weights(x)
    assert pooled.source_positions[:2].tolist() == [[-0.25, -0.25], [-0.25, 0.25]]


@pytest.mark.parametrize("spec", contract.examples())
def test_a_subset_of_the_queries_keeps_their_places(spec):
    mixer = glocal.build(spec, 32).eval()
    if isinstance(mixer, glocal.TokenModule):
        return  # no weights
    grid = (21,) if mixer.rank == 1 else (9, 8)  # at least seven outputs, whatever the stride
    x, queries = torch.randn(2, *grid, 32), torch.tensor([6, 1, 3, 1])
    also = mixer.besides(x)
    every = mixer.weights(x, **also)
    queries = queries % every.num_queries
    some = mixer.weights(x, queries=queries, **also)
    torch.testing.assert_close(some.query_positions, every.query_positions[queries], equal_nan=True)
    torch.testing.assert_close(some.source_positions, every.source_positions)
    assert (some.out_grid, some.source_grid) == ((4,), every.source_grid)


@pytest.mark.parametrize(
    ("spec", "rows", "columns"),
    [
        ("AveragePooling(kernel_size=(3, 5))", (3, 6), (2, 7)),
        ("Convolution(kernel_size=(3, 5))", (3, 6), (2, 7)),
        ("DepthwiseConv(kernel_size=(3, 5))", (3, 6), (2, 7)),
        ("DynamicDepthwiseConv(kernel_size=(3, 5))", (3, 6), (2, 7)),
        ("NeighborhoodAttention(kernel_size=(3, 5), num_heads=2)", (3, 6), (2, 7)),
        ("NeighborhoodAttention(kernel_size=(3, 5), num_heads=2, border='shifted')", (3, 6), (2, 7)),
        ("WindowAttention(window_size=(2, 3), num_heads=2)", (4, 6), (3, 6)),
        ("WindowAttention(window_size=(2, 3), num_heads=2, mask_padding=False)", (4, 6), (3, 6)),
        ("LocalMLP(window_size=(2, 3), num_heads=2)", (4, 6), (3, 6)),
    ],
)
def test_the_first_length_is_that_of_the_rows(spec, rows, columns):
    """What the query at (4, 4) of a 9 x 9 grid reads."""
    found = glocal.build(spec, 8).eval().weights(torch.randn(1, 9, 9, 8))
    seen = found.dense()[..., 4 * 9 + 4, :].ne(0).any(1)
    expected = torch.zeros(1, *found.source_grid, dtype=torch.bool)
    expected[:, slice(*rows), slice(*columns)] = True
    assert torch.equal(seen, expected.flatten(1))


HOLE = torch.tensor([[True, True, True, True], [True, False, True, True], [True, True, True, True]])


@pytest.mark.parametrize(
    "spec",
    [
        "WindowAttention(window_size=2, num_heads=2, shift_size=1)",
        "LocalMLP(window_size=2, num_heads=2, shift_size=1)",
        "NeighborhoodAttention(kernel_size=3, num_heads=2, border='shifted')",
        "RelativeAttention(grid_size=(3, 4), num_heads=2)",
    ],
)
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("valid", [HOLE, HOLE.flip(0).roll(1, 1), ~HOLE])
def test_a_geometry_of_each_images_size_refuses_holes(spec, impl, valid):
    mixer = glocal.build(spec, 8)
    mixer.impl = impl
    with pytest.raises(ValueError, match="rectangle"):
        mixer(torch.randn(1, 3, 4, 8), valid=valid[None])


@pytest.mark.parametrize(
    ("spec", "reach"),
    [
        ("WindowAttention(window_size=4, num_heads=2)", 4),
        ("WindowAttention(window_size=4, num_heads=2, shift_size=2)", 2),
        ("LocalMLP(window_size=4, num_heads=2, shift_size=2)", 2),
        ("NeighborhoodAttention(kernel_size=3, num_heads=2)", 2),
        ("NeighborhoodAttention(kernel_size=5, num_heads=2, border='shifted', dilation=2)", 10),
    ],
)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_nan_stays_where_it_is_seen(spec, reach, impl):
    """Windows of a 6 x 5 grid have empty places, which read no other token, not even to multiply it with zero."""
    mixer, x = glocal.build(spec, 8), torch.randn(2, 6, 5, 8)
    mixer.impl = impl
    x[:, 0, 0] = float("nan")
    seen = torch.zeros(6, 5, dtype=torch.bool)
    seen[:reach, :reach] = True
    if "dilation" in spec:
        seen[1::2] = seen[:, 1::2] = False
    assert torch.equal(mixer(x).isnan().all(-1), seen.expand(2, -1, -1))
    assert torch.equal(mixer(x).isnan().any(-1), seen.expand(2, -1, -1))


# planted by scripts/mutate
FAULTS = {
    "aggregation.py": (
        ("positions count the columns first", 'indexing="ij"', 'indexing="xy"'),
        (
            "positions are moved by the offset the wrong way",
            "dtype=torch.float32) - o) / s",
            "dtype=torch.float32) + o) / s",
        ),
        ("positions are multiplied by the stride", "dtype=torch.float32) - o) / s", "dtype=torch.float32) - o) * s"),
    ),
    ("mixers/_grid.py", "mixers/test_convolution.py", "mixers/test_depthwise_conv.py", "test_contract.py"): (
        (
            "a stride starts at its last position",
            "torch.arange(0, n, stride, device=device) - left",
            "torch.arange(0, n, stride, device=device) + stride - 1 - left",
        ),
        (
            "a tap left of the grid reads from its right end",
            "torch.where((position >= 0) & (position < n), position, -1)",
            "torch.where(position < n, position % n, -1)",
        ),
        ("rows are as long as the grid is high", "row * size + column, -1)", "row * sizes[0] + column, -1)"),
    ),
    ("mixers/_library.py", "mixers/test_depthwise_conv.py"): (
        (
            "strided kernels are those of other channels",
            "weight.repeat_interleave(dim // groups, 0)",
            "weight.repeat(dim // groups, 1, 1, 1)",
        ),
    ),
    ("mixers/_library.py", "mixers/test_convolution.py", "test_contract.py"): (
        (
            "a 1-D convolution is not dilated",
            "(1, stride), (0, *padding), (1, dilation), groups",
            "(1, stride), (0, *padding), 1, groups",
        ),
        ("output lengths are rounded down", "(n + stride - 1) // stride for n", "n // stride for n"),
    ),
    ("mixers/_grid.py", "mixers/test_window_attention.py", "mixers/test_local_mlp.py", "test_contract.py"): (
        (
            "empty places hold the last token",
            "torch.where(index < 0, tokens.shape[1], index))",
            "torch.where(index < 0, tokens.shape[1] - 1, index))",
        ),
        ("windows are shifted the other way", "shifted = (window - shift) % window", "shifted = shift % window"),
        (
            "an axis as long as the window is shifted",
            "(0 if n <= window else shifted)",
            "(0 if n < window else shifted)",
        ),
        (
            "wrapping windows are shifted the other way",
            "torch.where(place < n, (place + shift) % n, place)",
            "torch.where(place < n, (place - shift) % n, place)",
        ),
        (
            "tokens that wrap around are seen by those they are wrapped to",
            "(place >= count * window - shift).long()",
            "0",
        ),
        (
            "a padded image that is no longer than the window is shifted",
            "torch.where(extent > window, shifted, 0)",
            "torch.where(extent > 0, shifted, 0)",
        ),
    ),
    "mixers/_grid.py": (
        (
            "empty places take the NaN of another token, by multiplying it with zero",
            "return pick(torch.cat([tokens, zero], 1), torch.where(index < 0, tokens.shape[1], index))",
            "return pick(tokens, index.clamp(min=0)) * (index >= 0).view(*index.shape, *[1] * (tokens.dim() - 2))",
        ),
    ),
}
