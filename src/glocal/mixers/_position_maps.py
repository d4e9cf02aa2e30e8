"""Similarity maps of tokens with relative positions, by chunks of queries, and their sums without forming them.

A table's entry offset + length - 1 belongs to that offset. Shape letters: B images (1: all share it), G groups,
N tokens, R rows, T tokens of a row, L entries of a table, C channels.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glocal.positions.relative import offsets_between

ENTRIES = 2**22  # of a map that are formed at once: 16 MiB in float32
BLOCK = 64  # keys at least that are multiplied together


def in_chunks(rows: Callable[..., Tensor], count: int, width: int, *tensors: Tensor) -> Tensor:
    """rows(start, end, *tensors) for all of `count` queries, joined on axis 2; each has `width` entries of a map.

    Above ENTRIES in all, only a chunk's maps are held at a time, in the backward pass too: it forms them anew.
    A program that is compiled or exported has one chunk, since their number would depend on sizes; so have shapes
    alone, on the meta device.
    """
    if torch.compiler.is_compiling() or tensors[0].is_meta or count * width <= ENTRIES:
        return rows(0, count, *tensors)
    size = max(1, ENTRIES // width)
    chunks = [(start, min(start + size, count)) for start in range(0, count, size)]
    if torch._C._are_functorch_transforms_active():
        return _joined(rows, chunks, tensors)
    return _InChunks.apply(rows, chunks, *tensors)


def _joined(rows: Callable[..., Tensor], chunks: list[tuple[int, int]], tensors: Sequence[Tensor]) -> Tensor:
    return torch.cat([rows(*chunk, *tensors) for chunk in chunks], 2)


class _InChunks(torch.autograd.Function):
    """One node of the graph for all chunks.

    With a checkpoint for each, the small objects that it keeps lie between the large ones that it frees, and the
    process grew by 1.4 GiB where it grows by 0.45 now (LESA's map of 8 groups at 64x64, forward and backward).
    """

    @staticmethod
    def forward(ctx: Any, rows: Callable[..., Tensor], chunks: list[tuple[int, int]], *tensors: Tensor) -> Tensor:
        ctx.rows, ctx.chunks = rows, chunks
        ctx.save_for_backward(*tensors)
        device = tensors[0].device.type
        ctx.autocast = {
            "device_type": device,
            "dtype": torch.get_autocast_dtype(device),
            "enabled": torch.is_autocast_enabled(device),
        }
        return _joined(rows, chunks, tensors)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tensors, needed = ctx.saved_tensors, ctx.needs_input_grad[2:]
        again = torch.is_grad_enabled()  # create_graph=True: all N x N entries, which the graph holds anyway
        with torch.enable_grad(), torch.autocast(**ctx.autocast):
            if not again:
                tensors = [t.detach().requires_grad_(n) for t, n in zip(tensors, needed, strict=True)]
            wanted = [t for t, n in zip(tensors, needed, strict=True) if n]
            if again:
                sums = torch.autograd.grad(_joined(ctx.rows, ctx.chunks, tensors), wanted, grad, create_graph=True)
            else:
                sums = [torch.zeros_like(t) for t in wanted]
                for start, end in ctx.chunks:
                    part = ctx.rows(start, end, *tensors)
                    for total, more in zip(sums, torch.autograd.grad(part, wanted, grad[:, :, start:end]), strict=True):
                        with torch.no_grad():
                            total += more
        left = iter(sums)
        return None, None, *(next(left) if n else None for n in needed)


def resized(table: Tensor, lengths: Tensor, within: int) -> Tensor:
    """[L, C] resized linearly to 2 * length - 1 entries for each length [B], in the middle of 2 * within - 1."""
    low, high, share = offsets_between(table.shape[0], lengths, within)
    return table[low].lerp(table[high], share.to(table.dtype)[..., None])


# Offsets in a sequence: rows are in reverse order, so that row r reads entries r, r + 1, ... of a table.


def banded(rows: Tensor, table: Tensor, width: int) -> Tensor:
    """rows[r] . table[r + t]: [..., R, C] by [..., R + width - 1, C] -> [..., R, width]."""
    count, length = rows.shape[-2], table.shape[-2]
    products = (rows @ table.mT).flatten(-2)
    # with rows one entry longer, each begins one entry further on
    return nn.functional.pad(products, (0, count)).unflatten(-1, (count, length + 1))[..., :width]


def banded_columns(rows: Tensor, table: Tensor, width: int) -> Tensor:
    """`banded` transposed, [..., width, R], for many rows and a small width: not all products are formed."""
    count = rows.shape[-2]
    if torch.compiler.is_compiling() or count <= width:
        return banded(rows, table, width).mT
    size = max(width, BLOCK)
    blocks = [
        banded(rows[..., start : start + size, :], table[..., start : min(start + size, count) + width - 1, :], width)
        for start in range(0, count, size)
    ]
    return torch.cat([block.mT for block in blocks], -1)


def spread(weights: Tensor) -> Tensor:
    """What `banded` reads, written back: [..., R, T] -> [..., R, R + T - 1], entry t of row r at r + t."""
    count, width = weights.shape[-2:]
    wide = nn.functional.pad(weights, (0, count)).flatten(-2)
    return wide[..., : count * (count + width - 1)].unflatten(-1, (count, count + width - 1))


# Sums of a map's entries and of their squares, [G] each, in float64: the difference of large sums is a variance.


def content_sums(q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
    """Of q_i . k_j, [B, G, N, C] each; rows of zeros do not count."""
    q, k = q.double(), k.double()
    squares = torch.einsum("bgnc,bgnd->bgcd", q, q) * torch.einsum("bgnc,bgnd->bgcd", k, k)
    return (q.sum(2) * k.sum(2)).sum((0, 2)), squares.sum((0, 2, 3))


def sequence_sums(rows: Tensor, table: Tensor, length: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of rows_i . table[i - j + N - 1], [B, G, N, C] by [B, 2N - 1, C], for all i, j < length [B] (None: N).

    Those of rows_j . table[j - i + N - 1] are the same. Memory: N * C^2 numbers.
    """
    rows, table = rows.double(), table.double()
    count = rows.shape[2]
    outer = (table[..., None] * table[..., None, :]).flatten(2)
    both = torch.cat([table, outer], 2).cumsum(1)
    both = nn.functional.pad(both, (0, 0, 1, 0))  # entry e: the sum of those before e
    end = both[:, count:]
    if length is None:
        start = both[:, :count]
    else:
        first = torch.arange(count, device=rows.device) + count - length[:, None]
        start = both.gather(1, first[..., None].expand(-1, -1, both.shape[2]))
    sums, squares = (end - start).split([table.shape[2], outer.shape[2]], 2)
    squares = squares.unflatten(2, (table.shape[2], -1))
    if length is None:
        total = torch.einsum("bgnc,nc->g", rows, sums[0])
        return total, torch.einsum("bgnc,ncd,bgnd->g", rows, squares[0], rows)
    total = torch.einsum("bgnc,bnc->g", rows, sums)
    return total, torch.einsum("bgnc,bncd,bgnd->g", rows, squares, rows)


def axial_sums(height: Tensor, width: Tensor, real: Tensor | None) -> tuple[Tensor, Tensor]:
    """Of height_i[row of j] + width_i[column of j], [B, G, N, H] and [B, G, N, W]; real [B, H, W] (None: all)."""
    height, width = height.double(), width.double()
    rows, columns = height.shape[3], width.shape[3]
    if real is not None:
        in_row, in_column = real.any(2).double()[:, None, None], real.any(1).double()[:, None, None]
        mine = real.flatten(1)[:, None, :, None].double()
        height, width = height * in_row * mine, width * in_column * mine
        rows, columns = in_row.sum(-1), in_column.sum(-1)
    h, w = height.sum(-1), width.sum(-1)
    squares = columns * height.square().sum(-1) + 2 * h * w + rows * width.square().sum(-1)
    return (columns * h + rows * w).sum((0, 2)), squares.sum((0, 2))
