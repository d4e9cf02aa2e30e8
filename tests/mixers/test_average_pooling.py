"""AveragePooling against F.avg_pool1d and F.avg_pool2d where they can express it, and against a loop."""

from itertools import product

import pytest
import torch
from torch.nn import functional as F


def by_torch(kernel_size, stride, count_include_pad):
    def oracle(x):
        pool = (F.avg_pool1d, F.avg_pool2d)[x.dim() - 3]
        y = pool(x.movedim(-1, 1), kernel_size, stride, (kernel_size - 1) // 2, count_include_pad=count_include_pad)
        return y.movedim(1, -1)

    return oracle


def by_loop(kernel_size, stride, count_include_pad):
    """The first output's window starts (K - 1) // 2 before the first token; sizes are rounded up."""

    def oracle(x, valid=None):
        batch, *grid, dim = x.shape
        out_grid = [-(-n // stride) for n in grid]
        images = []
        for b in range(batch):
            real = torch.ones(grid, dtype=torch.bool) if valid is None else valid[b]
            rows = []
            for out in product(*map(range, out_grid)):
                found = []
                for offset in product(range(kernel_size), repeat=len(grid)):
                    place = tuple(o * stride + k - (kernel_size - 1) // 2 for o, k in zip(out, offset, strict=True))
                    if all(0 <= p < n for p, n in zip(place, grid, strict=True)) and real[place]:
                        found.append(x[(b, *place)])
                total = sum(found, torch.zeros(dim, dtype=x.dtype))
                rows.append(total / (kernel_size ** len(grid) if count_include_pad else max(len(found), 1)))
            images.append(torch.stack(rows).view(*out_grid, dim))
        return torch.stack(images)

    return oracle


def spec_of(kernel_size, stride, count_include_pad, grid):
    options = f"kernel_size={kernel_size}, stride={stride}, count_include_pad={count_include_pad}"
    return f"AveragePooling({options}, rank={len(grid)})"


GRIDS = [(5, 7), (6, 4), (2, 1), (9,), (4,)]


@pytest.mark.parametrize("count_include_pad", [False, True])
@pytest.mark.parametrize(("kernel_size", "stride"), [(1, 1), (3, 1), (3, 2), (5, 1), (5, 3), (1, 2)])
@pytest.mark.parametrize("grid", GRIDS)
def test_odd_kernels_are_torch_pooling(build, check, tokens, grid, kernel_size, stride, count_include_pad):
    mixer = build(spec_of(kernel_size, stride, count_include_pad, grid), 4)
    assert not list(mixer.parameters())
    check(mixer, by_torch(kernel_size, stride, count_include_pad), tokens(2, *grid, 4))


@pytest.mark.parametrize("count_include_pad", [False, True])
@pytest.mark.parametrize(("kernel_size", "stride"), [(2, 1), (2, 2), (4, 1), (4, 3), (3, 2)])
@pytest.mark.parametrize("grid", GRIDS)
def test_every_kernel_is_the_loop(build, check, tokens, grid, kernel_size, stride, count_include_pad):
    mixer = build(spec_of(kernel_size, stride, count_include_pad, grid), 4)
    check(mixer, by_loop(kernel_size, stride, count_include_pad), tokens(2, *grid, 4))


@pytest.mark.parametrize("count_include_pad", [False, True])
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (3, 2), (4, 3)])
@pytest.mark.parametrize("grid", GRIDS[:2])
def test_mean_is_over_valid_tokens(build, check, tokens, grid, kernel_size, stride, count_include_pad):
    mixer = build(spec_of(kernel_size, stride, count_include_pad, grid), 4)
    valid = torch.zeros(2, *grid, dtype=torch.bool)
    valid[0, :4, :3] = valid[1, :1] = True
    check(mixer, by_loop(kernel_size, stride, count_include_pad), tokens(2, *grid, 4), valid=valid)


def test_pooling_without_overlap_is_the_mean_of_each_block(build, check, tokens):
    mixer = build("AveragePooling(kernel_size=2, stride=2)", 4)
    check(mixer, lambda x: x.view(2, 3, 2, 4, 2, 4).mean((2, 4)), tokens(2, 6, 8, 4))


@pytest.mark.parametrize("count_include_pad", [False, True])
@pytest.mark.parametrize(("kernel_size", "stride"), [(3, 1), (3, 2), (2, 2), (4, 1)])
@pytest.mark.parametrize("extents", [[(4, 3), (2, 6)], [(5, 5), (1, 2)], [(4,), (7,)]])
def test_padding_leaves_images_alone(build, check_padding, extents, kernel_size, stride, count_include_pad):
    check_padding(build(spec_of(kernel_size, stride, count_include_pad, extents[0]), 4), extents, 4)


# planted by scripts/mutate
FAULTS = (
    (
        "an even window of the definition has its centre right of the middle",
        "left = centre_padding(kernel)",
        "left = tuple(k // 2 for k in kernel)",
    ),
    (
        "an even window of the fast path has its centre right of the middle",
        "ends = [(p, k - 1 - p)",
        "ends = [(k - 1 - p, p)",
    ),
    (
        "the definition counts padding in the mean",
        "(index >= 0) & pick_or_zero(valid.flatten(1), index)",
        "(index >= 0).expand(len(valid), -1, -1)",
    ),
    ("the fast path divides nothing by nothing where no token counts", "torch.where(share > 0, share, 1)", "share"),
    (
        "count_include_pad means its opposite in the fast path",
        "if not self.count_include_pad:\n            grid",
        "if self.count_include_pad:\n            grid",
    ),
    (
        "sources of an even window are placed on the wrong side of the query",
        "offset=[(k - 1) / 2 - p for",
        "offset=[p - (k - 1) / 2 for",
    ),
    (
        "the first length of a kernel is taken for that of the columns",
        'self._kernel = per_axis("kernel_size", kernel_size, rank)',
        'self._kernel = per_axis("kernel_size", kernel_size, rank)[::-1]',
    ),
)
