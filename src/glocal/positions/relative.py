"""Tables by offset: a number or a vector for each difference of two places.

An offset is query minus source, as in Swin and CoAtNet; the entry of offset d along an axis of n places is d + n - 1.
Shape letters: G heads, S grid, N = prod(S) tokens, Q queries, C channels.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from glocal.aggregation import grid_positions
from glocal.arguments import every_axis, one_of, positive

TABLE_STD = 0.02  # of the first entries, as in Swin

Mode = Literal["bicubic", "bilinear"]


def grid_offsets(
    grid: Sequence[int],
    *,
    queries: Tensor | None = None,
    stride: int = 1,
    device: torch.device | None = None,
) -> Tensor:
    """Source minus query in tokens of the grid, [N, N, rank], float32; the opposite sign of the tables'.

    Args:
        grid: the sources; every `stride`-th token along each axis is a query.
        queries: int64 [Q], rows wanted: [Q, N, rank].
        stride: see grid.
        device: of the result.
    """
    source = grid_positions(grid, device=device)
    query = stride * grid_positions([(n + stride - 1) // stride for n in grid], device=device)
    return source - (query if queries is None else query[queries])[:, None]


def axis_offsets(length: int, device: torch.device, *, stride: int = 1) -> Tensor:
    """Source minus query along one axis: int64 [ceil(n / stride), n]."""
    return torch.arange(length, device=device) - torch.arange(0, length, stride, device=device)[:, None]


def relative_index(
    grid: Sequence[int], *, table_grid: Sequence[int] | None = None, device: torch.device | None = None
) -> Tensor:
    """The row of a flat table [prod(2*table_grid - 1), G] for each query and source: int64 [N, N].

    Args:
        grid: the tokens, a window for Swin.
        table_grid: the grid that the table is made for, at least as large; the same by default.
        device: of the result.

    Source: Liu et al., Swin Transformer, ICCV 2021, arXiv 2103.14030, section 3.2; timm's `gen_relative_position_index`
    gives the same.
    """
    found = None
    for n, size in zip(grid, grid if table_grid is None else table_grid, strict=True):
        place = torch.arange(n, device=device)
        entry = place[:, None] - place + size - 1
        if found is None:
            found = entry
        else:
            found = (found[:, None, :, None] * (2 * size - 1) + entry[:, None]).flatten(2).flatten(0, 1)
    assert found is not None
    return found


def resized_bias(table: Tensor, grid: Sequence[int], *, mode: Mode = "bilinear") -> Tensor:
    """A table of offsets for another grid: [G, *(2*grid_size - 1)] -> [G, *(2*grid - 1)].

    Args:
        table: one number for each head and offset.
        grid: the grid wanted, of the table's rank, 1 or 2.
        mode: "bilinear" (CoAtNet) or "bicubic" (Swin's fine-tuning).

    Returns:
        In the table's dtype; at the table's own size, the same numbers.
    """
    shape, rank = [2 * n - 1 for n in grid], table.dim() - 1
    image = table.to(torch.promote_types(table.dtype, torch.float32))[None]
    if rank == 1:
        image, shape = image[:, :, None], [1, *shape]
    image = nn.functional.interpolate(image, size=shape, mode=mode)[0]
    return (image[:, 0] if rank == 1 else image).to(table.dtype)


def offsets_between(entries: int, lengths: Tensor, within: int) -> tuple[Tensor, Tensor, Tensor]:
    """Where a table of `entries` offsets is read for images of different lengths in one batch.

    Args:
        entries: L, of the table; it is resized linearly to 2 * length - 1.
        lengths: int64 [B], of each image along this axis.
        within: n, of the batch: entries for its 2 * n - 1 offsets are returned, in order. Offsets that only padding
            has are those nearest to the image's own.

    Returns:
        The entries below and above, int64 [B, 2n - 1], and the share of the one above, float64 [B, 2n - 1]. As
        torch.nn.functional.interpolate has it, but places are whole numbers until the last division: in float32 those
        in a long table would be rounded by more than anything else.
    """
    lengths = lengths.clamp(min=1)[:, None]
    new = 2 * lengths - 1
    entry = torch.arange(2 * within - 1, device=lengths.device) - within + lengths
    entry = torch.minimum(entry.clamp(min=0), new - 1)
    place = ((2 * entry + 1) * entries - new).clamp(min=0)  # in 1 / (2 * new)
    low = place // (2 * new)
    share = (place - low * 2 * new).double() / (2 * new)
    return low, (low + 1).clamp(max=entries - 1), share


def resized_bias_of_each(table: Tensor, sizes: Tensor, grid: Sequence[int]) -> Tensor:
    """`resized_bias`, bilinear, for images of different sizes in one batch.

    Args:
        table: one number for each head and offset, [G, *(2*grid_size - 1)].
        sizes: int64 [B, rank], of each image.
        grid: that of the batch, which holds all of them.

    Returns:
        [B, G, *(2*grid - 1)], in the table's dtype.
    """
    found = table.to(torch.promote_types(table.dtype, torch.float32)).expand(len(sizes), *table.shape)
    for axis, n in enumerate(grid):
        low, high, share = (
            t.view(len(sizes), *[1] * (axis + 1), 2 * n - 1, *[1] * (len(grid) - axis - 1))
            for t in offsets_between(found.shape[axis + 2], sizes[:, axis], n)
        )
        shape = [*found.shape[: axis + 2], 2 * n - 1, *found.shape[axis + 3 :]]
        below, above = (found.gather(axis + 2, t.expand(shape)) for t in (low, high))
        found = below.lerp(above, share.to(found.dtype))
    return found.to(table.dtype)


def relative_bias(table: Tensor, grid: Sequence[int], *, queries: Tensor | None = None) -> Tensor:
    """A table of offsets laid out as biases of scores: [G, *(2*grid - 1)] -> [G, N, N].

    Args:
        table: one number for each head and offset, made for this grid (see `resized_bias`).
        grid: the tokens, queries and sources.
        queries: int64 [Q], rows wanted: [G, Q, N].
    """
    if queries is not None or torch.compiler.is_compiling():  # unfold makes symbolic lengths constants
        queries = torch.arange(math.prod(grid), device=table.device) if queries is None else queries
        place = grid_positions(grid, device=table.device).long()
        offset = place[queries, None] - place + torch.tensor(grid, device=table.device) - 1
        entry = offset[..., 0]
        for axis, n in enumerate(grid[1:], start=1):
            entry = entry * (2 * n - 1) + offset[..., axis]
        return table.flatten(1)[:, entry]
    # entry query - source + n - 1: windows of the mirrored table, last one first, are its rows; views, no index
    axes = tuple(range(1, len(grid) + 1))
    table = table.flip(axes)
    for axis, n in zip(axes, grid, strict=True):
        table = table.unfold(axis, n, 1)
    return table.flip(axes).flatten(1, len(grid)).flatten(2)


def relative_rows(operator: str, axis: int, size: int, length: int, device: torch.device) -> Tensor:
    """Rows of a table [2*size - 1, C] of vectors for the offsets 1 - n, ..., n - 1 of n = `length` tokens: [2n - 1].

    Raises:
        ValueError: more tokens than the table is made for; `operator` and `axis` say whose and where.
    """
    if length > size:
        raise ValueError(
            f"{operator}: x has {length} tokens along axis {axis} of its grid, the table of offsets is made for "
            f"{size}; build it with a larger grid_size"
        )
    return torch.arange(2 * length - 1, device=device) + size - length


class RelativePositionBias(nn.Module):
    """Swin's learned bias of scores: one number for each head and offset, to be added before the softmax.

    For attention of one's own, as in `scaled_dot_product_attention(q, k, v, attn_mask=bias(grid))`;
    `WindowAttention`, `NeighborhoodAttention` and `RelativeAttention` hold tables of their own.

    Args:
        grid_size: the grid (Swin: the window) that the table is made for; its length is the rank, 1 or 2.
        num_heads: heads G.
        mode: how the table is resized for another grid, "bicubic" or "bilinear".

    Shape:
        grid -> [G, N, N], query by source; grid_size by default. `relative_position_bias_table`
        [prod(2*grid_size - 1), G], row (dy + h - 1) * (2*w - 1) + dx + w - 1 for dy, dx = query - source: the name and
        the order of Swin and timm.

    Cost: no multiply-adds; the resize is not counted.

    Raises:
        ValueError: a grid of another rank.

    Source: Liu et al., Swin Transformer, ICCV 2021, arXiv 2103.14030, section 3.2, equation 4.
    Differs from the paper: nothing. BEiT's three entries for a class token are not there.
    """

    def __init__(self, grid_size: Sequence[int], num_heads: int, *, mode: Mode = "bicubic") -> None:
        super().__init__()
        self.grid_size = every_axis("grid_size", grid_size)
        one_of("mode", mode, ("bicubic", "bilinear"))
        self.num_heads, self.mode = positive("num_heads", num_heads), mode
        entries = torch.empty(math.prod(2 * n - 1 for n in self.grid_size), num_heads)
        self.relative_position_bias_table = nn.Parameter(nn.init.trunc_normal_(entries, std=TABLE_STD))

    def forward(self, grid: Sequence[int] | None = None) -> Tensor:
        grid = self.grid_size if grid is None else tuple(grid)
        if len(grid) != len(self.grid_size):
            raise ValueError(f"RelativePositionBias: grid {grid}, the table is made for {self.grid_size}; as many axes")
        table = self.relative_position_bias_table.T.unflatten(1, [2 * n - 1 for n in self.grid_size])
        return relative_bias(resized_bias(table, grid, mode=self.mode), grid)

    def extra_repr(self) -> str:
        return f"{self.grid_size}, {self.num_heads}, mode={self.mode!r}"
