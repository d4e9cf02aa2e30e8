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
    some, every = mixer.weights(x, queries=queries), mixer.weights(x)
    torch.testing.assert_close(some.query_positions, every.query_positions[queries])
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
