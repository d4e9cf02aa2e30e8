"""Sums of an image with weights that are a product of one along each axis, and the gradients of those, on a GPU.

A program has a tile of sources and sums it along the columns, then, without leaving the chip, along the rows: what
lies between, as large as all heads' results, is never written. Sums are float32, in an order that depends on nothing
but shapes and blocks; between the axes they are rounded to the type of the values, as two matrix products would.

Shape letters: B batch, K x L grid of sources, I x J of queries, G heads, C channels of each. Blocks: BI x BJ queries,
BK x BL sources, BC channels. Tiles are matrices: [BL, BK * BC] of sources, [BI, BJ * BC] of queries.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from glocal.kernels.triton import tuning

SIDE = 32  # of a block of queries or sources, at most
CHANNELS = 64  # of a block, at most
LEAST = 16  # of anything that is multiplied by the matrix units
PARTS = 1024  # programs, about, that the gradient of the weights is summed in

# CELLS: numbers of each of the two tiles that a program adds up, of 16 bits
CONFIGURATIONS = (
    {"CELLS": 8192, "num_warps": 8},
    {"CELLS": 16384, "num_warps": 8},
    {"CELLS": 8192, "num_warps": 4},
    {"CELLS": 4096, "num_warps": 4},
)


@triton.jit
def _weights(pointer, left, lefts, right, rights, strides):
    """[left, right]: weights of one head; strides: of head, query, source."""
    there = (left < lefts)[:, None] & (right < rights)[None, :]
    return tl.load(pointer + left[:, None] * strides[1] + right[None, :] * strides[2], mask=there, other=0.0)


@triton.jit
def _lanes(down, downs, channel, channels, stride, BD: tl.constexpr, BC: tl.constexpr):
    """[1, BD * BC]: where BC channels of BD places lie, from these on, and whether they are; places are `stride` apart.

    Not reshaped from [BD, BC]: of that Triton 3.6 would not know that channels are neighbors.
    """
    lane = tl.arange(0, BD * BC)[None, :]
    place = down + lane // BC
    inside = (place < downs) & (channel + lane % BC < channels)
    return place.to(tl.int64) * stride + (channel + lane % BC), inside


@triton.jit
def _tile(pointer, down, downs, along, alongs, channel, channels, strides, BD: tl.constexpr, BC: tl.constexpr):
    """[along, BD * BC]: BD places down and BC channels, from these on; strides: of image, `down`, `along` and head."""
    lane, inside = _lanes(down, downs, channel, channels, strides[1], BD, BC)
    there = (along < alongs)[:, None] & inside
    return tl.load(pointer + along.to(tl.int64)[:, None] * strides[2] + lane, mask=there, other=0.0)


@triton.jit
def _turned(tile, BA: tl.constexpr, BD: tl.constexpr, BC: tl.constexpr):
    """[BA, BD * BC] -> [BD, BA * BC]."""
    return tl.reshape(tl.permute(tl.reshape(tile, [BA, BD, BC]), [1, 0, 2]), [BD, BA * BC])


@triton.jit
def _along_columns(
    source, columns, tile, j, k, channel, sizes, strides, weight_strides, WHOLE: tl.constexpr, BJ: tl.constexpr,
    BK: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[BK, BJ * BC]: rows of an image and head from k on, summed over their columns for each query column from j on."""
    _, queries_w, sources_h, sources_w, channels = sizes
    total = tl.zeros([BJ, BK * BC], tl.float32)
    for start in range(0, sources_w, BL):
        along = start + tl.arange(0, BL)
        read = tile
        if not WHOLE:
            read = _tile(source, k, sources_h, along, sources_w, channel, channels, strides, BK, BC)
        weights = _weights(columns, j + tl.arange(0, BJ), queries_w, along, sources_w, weight_strides)
        total += tl.dot(weights.to(read.dtype), read, input_precision=PRECISION)
    return _turned(total.to(source.dtype.element_ty), BJ, BK, BC)


@triton.jit
def _sum(
    source, rows, columns, out, sizes, strides, out_strides, row_strides, column_strides, each,
    ADDED: tl.constexpr, WHOLE: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr,
    BC: tl.constexpr, PRECISION: tl.constexpr, HEADS,
):  # fmt: skip
    """BI x BJ queries of `each` heads: each is written or, ADDED, their sum. WHOLE: all read the same tile."""
    queries_h, queries_w, sources_h, sources_w, channels = sizes
    number = tl.program_id(0)
    channel = number % tl.cdiv(channels, BC) * BC
    number = number // tl.cdiv(channels, BC)
    j = number % tl.cdiv(queries_w, BJ) * BJ
    number = number // tl.cdiv(queries_w, BJ)
    i = number % tl.cdiv(queries_h, BI) * BI + tl.arange(0, BI)
    number = number // tl.cdiv(queries_h, BI)
    first = (number % (HEADS // each) * each).to(tl.int64)
    image = (number // (HEADS // each)).to(tl.int64)
    source += image * strides[0] + first * strides[3]
    out += image * out_strides[0] + first * out_strides[3]
    rows += first * row_strides[0]
    columns += first * column_strides[0]
    tile = tl.zeros([BL, BK * BC], source.dtype.element_ty)
    if WHOLE:
        tile = _tile(source, 0, sources_h, tl.arange(0, BL), sources_w, channel, channels, strides, BK, BC)
    lane, inside = _lanes(j, queries_w, channel, channels, out_strides[2], BJ, BC)
    written = (i < queries_h)[:, None] & inside
    where = i.to(tl.int64)[:, None] * out_strides[1] + lane
    total = tl.zeros([BI, BJ * BC], tl.float32)
    for _ in range(0, each):
        for k in range(0, sources_h, BK):
            part = _along_columns(
                source, columns, tile, j, k, channel, sizes, strides, column_strides, WHOLE, BJ, BK, BL, BC, PRECISION
            )
            weights = _weights(rows, i, queries_h, k + tl.arange(0, BK), sources_h, row_strides)
            total += tl.dot(weights.to(part.dtype), part, input_precision=PRECISION)
        source += strides[3]
        rows += row_strides[0]
        columns += column_strides[0]
        if not ADDED:
            tl.store(out + where, total.to(out.dtype.element_ty), mask=written)
            out += out_strides[3]
            total = tl.zeros([BI, BJ * BC], tl.float32)
    if ADDED:
        tl.store(out + where, total.to(out.dtype.element_ty), mask=written)


@triton.jit
def _products(
    source, above, columns, parts, sizes, strides, above_strides, column_strides, heads, steps, each,
    BI: tl.constexpr, BJ: tl.constexpr, BK: tl.constexpr, BL: tl.constexpr, BC: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """[., heads, I, K]: the gradient of BI x BK weights of rows, of `each` of the blocks of columns and channels."""
    queries_h, queries_w, sources_h, _, channels = sizes
    number = tl.program_id(0)
    k = number % tl.cdiv(sources_h, BK) * BK
    number = number // tl.cdiv(sources_h, BK)
    i = number % tl.cdiv(queries_h, BI) * BI + tl.arange(0, BI)
    number = number // tl.cdiv(queries_h, BI)
    head = (number % heads).to(tl.int64)
    part = number // heads
    source += head * strides[3]
    above += head * above_strides[3]
    columns += head * column_strides[0]
    none = tl.zeros([BL, BK * BC], source.dtype.element_ty)
    total = tl.zeros([BI, BK], tl.float32)
    for step in range(part * each, tl.minimum(part * each + each, steps)):
        channel = step % tl.cdiv(channels, BC) * BC
        block = step // tl.cdiv(channels, BC)
        j = block % tl.cdiv(queries_w, BJ) * BJ
        image = (block // tl.cdiv(queries_w, BJ)).to(tl.int64)
        seen = _along_columns(
            source + image * strides[0], columns, none, j, k, channel, sizes, strides, column_strides, False, BJ, BK,
            BL, BC, PRECISION,
        )  # fmt: skip
        # [BI, BJ * BC]: the rows of queries lie along this tile
        asked = _tile(
            above + image * above_strides[0], j, queries_w, i, queries_h, channel, channels,
            (0, above_strides[2], above_strides[1], 0), BJ, BC,
        )  # fmt: skip
        total += tl.dot(asked, tl.trans(seen), input_precision=PRECISION)
    k += tl.arange(0, BK)
    there = (i < queries_h)[:, None] & (k < sources_h)[None, :]
    base = (part.to(tl.int64) * heads + head) * queries_h
    tl.store(parts + (base + i[:, None]) * sources_h + k[None, :], total, mask=there)


def separable_sum(rows: Tensor, columns: Tensor, source: Tensor, out: Tensor) -> None:
    """Writes out [B, I, J, G or 1, C] of rows [G, I, K], columns [G, J, L] and source [B, K, L, G or 1, C].

    Where `out` has one head it is the sum of all.
    """
    if not out.numel():
        return
    if not source.numel():
        out.zero_()
        return
    source = _in_order(source)
    sizes = rows.shape[1], columns.shape[1], rows.shape[2], columns.shape[2], out.shape[4]
    heads, shared, added = len(rows), source.shape[3] == 1, out.shape[3] == 1
    each = heads if shared or added else 1
    strides, precision = _strides(source, shared=shared), _precision()

    def run(choice: tuning.Configuration) -> None:
        blocks = _blocks(choice, sizes, source)
        programs = triton.cdiv(sizes[0], blocks["BI"]) * triton.cdiv(sizes[1], blocks["BJ"])
        programs *= triton.cdiv(sizes[4], blocks["BC"]) * len(out) * (heads // each)
        whole = blocks["BK"] >= sizes[2] and blocks["BL"] >= sizes[3] and shared
        _sum[(programs,)](
            source, rows, columns, out, sizes, strides, _strides(out, shared=added), rows.stride(),
            columns.stride(), each, ADDED=added, WHOLE=whole, **blocks, PRECISION=precision, HEADS=heads,
        )  # fmt: skip

    with torch.cuda.device_of(source):
        tuning.run(_sum, _kind(source, sizes, heads, shared, added, precision), CONFIGURATIONS, run, source.device)


def separable_sum_products(columns: Tensor, source: Tensor, above: Tensor) -> Tensor:
    """[G, I, K] in float32, of columns [G, J, L], source [B, K, L, G or 1, C] and above [B, I, J, G, C]."""
    heads, queries_w, sources_w = columns.shape
    sizes = above.shape[1], queries_w, source.shape[1], sources_w, source.shape[4]
    if not (source.numel() and above.numel()):
        return columns.new_zeros(heads, sizes[0], sizes[2], dtype=torch.float32)
    source, above = _in_order(source), _in_order(above)
    strides, precision = _strides(source, shared=source.shape[3] == 1), _precision()

    def run(choice: tuning.Configuration) -> Tensor:
        blocks = _blocks(choice, sizes, source)
        tiles = heads * triton.cdiv(sizes[0], blocks["BI"]) * triton.cdiv(sizes[2], blocks["BK"])
        steps = len(source) * triton.cdiv(queries_w, blocks["BJ"]) * triton.cdiv(sizes[4], blocks["BC"])
        some = triton.cdiv(steps, max(min(PARTS // tiles, steps), 1))
        parts = columns.new_empty(triton.cdiv(steps, some), heads, sizes[0], sizes[2], dtype=torch.float32)
        _products[(tiles * len(parts),)](
            source, above, columns, parts, sizes, strides, _strides(above, shared=False), columns.stride(), heads,
            steps, some, **blocks, PRECISION=precision,
        )  # fmt: skip
        return parts

    with torch.cuda.device_of(source):
        kind = _kind(source, sizes, heads, source.shape[3] == 1, precision)
        return tuning.run(_products, kind, CONFIGURATIONS, run, source.device).sum(0)


def _in_order(tensor: Tensor) -> Tensor:
    """Channels next to each other."""
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _strides(tensor: Tensor, *, shared: bool) -> tuple[int, int, int, int]:
    image, row, column, head, _ = tensor.stride()
    return image, row, column, 0 if shared else head


def _precision() -> str:
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def _kind(source: Tensor, sizes: Sequence[int], *others: object) -> tuple[object, ...]:
    return (source.dtype, *sizes, *others, *tuning.classes(len(source)))


def _blocks(choice: tuning.Configuration, sizes: Sequence[int], source: Tensor) -> dict[str, int]:
    """So large that neither tile, [BJ, BK * BC] or [BI, BJ * BC], has more than CELLS numbers, of float32 half."""
    cells = 2 * choice["CELLS"] // source.element_size()
    *sides, channels = (max(triton.next_power_of_2(n), LEAST) for n in sizes)
    bi, bj, bk, bl = (min(n, SIDE) for n in sides)
    bj = min(bj, max(cells // LEAST**2, LEAST))
    bi, bk = (min(n, max(cells // (bj * LEAST), LEAST)) for n in (bi, bk))
    bc = max(min(channels, CHANNELS, cells // (max(bi, bk) * bj)), LEAST)
    return {"BI": bi, "BJ": bj, "BK": bk, "BL": bl, "BC": bc, "num_warps": choice["num_warps"]}
