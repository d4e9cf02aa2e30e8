"""MaxPooling against F.max_pool1d and F.max_pool2d where they can express it, and against a loop."""

from itertools import product

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

FAULTS = (
    ("zero stands outside the grid", "masked_fill(~inside, -torch.inf)", "masked_fill(~inside, 0)"),
    ("the fast path lets padding win", "tokens.masked_fill(~valid[..., None], -torch.inf)", "tokens"),
    (
        "the definition lets padding win",
        "index = torch.where(pick_or_zero(valid.flatten(1), index), index, -1)",
        "pass",
    ),
    ("an empty window gives minus infinity", "torch.where(some > 0, largest, 0)", "largest"),
    ("the smallest is taken", "seen.argmax(2))", "seen.argmin(2))"),
    ("all channels follow the first", "gather(2, largest)", "gather(2, largest[..., :1].expand_as(largest))"),
    ("an even window is centred right of its middle", "(p, k - 1 - p) for k, p", "(k - 1 - p, p) for k, p"),
    ("a tie is taken by the last", "seen.argmax(2))", "seen.shape[2] - 1 - seen.flip(2).argmax(2))"),
    (
        "where all are minus infinity an empty slot wins",
        "torch.where(seen.amax(2) == -torch.inf, inside.byte().argmax(2), seen.argmax(2))",
        "seen.argmax(2)",
    ),
    (
        "the stride is forgotten in the positions",
        "                stride=self.stride,\n                offset",
        "                offset",
    ),
)


def by_torch(kernel_size, stride):
    def oracle(x):
        pool = (F.max_pool1d, F.max_pool2d)[x.dim() - 3]
        return pool(x.movedim(-1, 1), kernel_size, stride, (kernel_size - 1) // 2).movedim(1, -1)

    return oracle


def by_loop(kernel_size, stride):
    """The first output's window starts (K - 1) // 2 before the first token; sizes are rounded up."""

    def oracle(x, valid=None):
        batch, *grid, dim = x.shape
        out_grid = [-(-n // stride) for n in grid]
        images = []
        for b in range(batch):
            real = torch.ones(grid, dtype=torch.bool) if valid is None else valid[b]
            rows = []
            for out in product(*map(range, out_grid)):
                row = torch.zeros(dim, dtype=x.dtype)
                for c in range(dim):
                    best = None
                    for offset in product(range(kernel_size), repeat=len(grid)):
                        place = tuple(o * stride + k - (kernel_size - 1) // 2 for o, k in zip(out, offset, strict=True))
                        if not all(0 <= p < n for p, n in zip(place, grid, strict=True)) or not real[place]:
                            continue
                        if best is None or x[(b, *place, c)] > best:
                            best = x[(b, *place, c)]
                    if best is not None:
                        row = row + F.one_hot(torch.tensor(c), dim) * best
                rows.append(row)
            images.append(torch.stack(rows).view(*out_grid, dim))
        return torch.stack(images)

    return oracle


def spec_of(kernel_size, stride, grid):
    return f"MaxPooling(kernel_size={kernel_size}, stride={stride}, rank={len(grid)})"


GRIDS = [(5, 7), (6, 4), (2, 1), (9,), (4,)]


@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (3, 1), (3, 2), (5, 1), (5, 3), (1, 2), (7, 4)])
@pytest.mark.parametrize("grid", GRIDS)
def test_odd_kernels_are_torch_pooling(build, check, tokens, grid, kernel_size, stride):
    mixer = build(spec_of(kernel_size, stride, grid), 4)
    assert not list(mixer.parameters())
    check(mixer, by_torch(kernel_size, stride), tokens(2, *grid, 4))


@pytest.mark.parametrize(("kernel_size", "stride"), [(2, 1), (2, 2), (4, 1), (4, 3), (3, 2)])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_kernel_is_the_loop(build, check, tokens, grid, kernel_size, stride):
    check(build(spec_of(kernel_size, stride, grid), 3), by_loop(kernel_size, stride), tokens(2, *grid, 3))


@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (3, 2), (4, 3), (2, 1)])
@pytest.mark.parametrize("grid", [(5, 7), (6, 4), (9,)])
def test_maximum_is_over_valid_tokens(build, check, tokens, grid, kernel_size, stride):
    mixer = build(spec_of(kernel_size, stride, grid), 3)
    valid = torch.rand(2, *grid) < 0.4
    valid[1] = False  # and an image without any
    x = tokens(2, *grid, 3) - 5  # zero would be the largest
    check(mixer, by_loop(kernel_size, stride), x, valid=valid)


@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (5, 2)])
@pytest.mark.parametrize("grid", [(6, 8), (11,)])
def test_ties_go_where_torchs_go(build, check, grid, kernel_size, stride):
    """Whole numbers, most of them equal; the gradient tells which was taken."""
    x = torch.randint(0, 2, (2, *grid, 4)).double()
    check(build(spec_of(kernel_size, stride, grid), 4), by_torch(kernel_size, stride), x)


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_tokens_of_minus_infinity_come_out_as_they_are(build, impl):
    mixer = build("MaxPooling(kernel_size=3)", 2)
    mixer.impl = impl
    x = torch.full((1, 3, 4, 2), -torch.inf, dtype=torch.float64)
    assert (mixer(x) == -torch.inf).all()


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_rectangular_windows_without_overlap_are_blocks(build, tokens, impl):
    mixer, x = build("MaxPooling(kernel_size=(1, 3), stride=1)", 4), tokens(2, 6, 8, 4)
    mixer.impl = impl
    expected = F.max_pool2d(x.movedim(-1, 1), (1, 3), 1, (0, 1)).movedim(1, -1)
    assert_close(mixer(x), expected)
    blocks = build("MaxPooling(kernel_size=2, stride=2)", 4)
    blocks.impl = impl
    assert_close(blocks(x), x.view(2, 3, 2, 4, 2, 4).amax((2, 4)))


@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (3, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize("extents", [[(4, 3), (2, 6)], [(5, 5), (1, 2)], [(4,), (7,)]])
def test_padding_leaves_images_alone(build, check_padding, extents, kernel_size, stride):
    check_padding(build(spec_of(kernel_size, stride, extents[0]), 4), extents, 4)


def test_weights_are_one_source_for_each_channel(build, tokens):
    x = tokens(2, 8, 8, 16)
    found = build("MaxPooling(kernel_size=3)", 16).weights(x)
    assert found.weights.shape == (1, 1, 1, 1) and found.index.shape == (2, 16, 64, 1)
    _, where = F.max_pool2d(x.movedim(-1, 1), 3, 1, 1, return_indices=True)
    assert torch.equal(found.index[..., 0], where.flatten(2))


def test_a_window_stands_at_its_middle(build, tokens):
    """Two tokens make one: they lie a quarter left and right of it."""
    found = build("MaxPooling(kernel_size=2, stride=2, rank=1)", 4).weights(tokens(1, 6, 4))
    assert found.query_positions[:, 0].tolist() == [0, 1, 2]
    assert found.source_positions[:, 0].tolist() == [-0.25, 0.25, 0.75, 1.25, 1.75, 2.25]
