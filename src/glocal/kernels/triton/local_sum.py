"""Sums over the taps of a kernel, their transpose and the gradient of their weights, on a GPU.

A tile of what is read is loaded once for each column of taps and used for several rows of outputs, which lie `dilation`
apart: then the same sources serve them all. Sums are float32, in an order that depends on nothing but the shapes.

Shape letters: B batch, H x W grid, C channels, G groups of D consecutive channels, T taps. A sequence is an image of
one row. Blocks: BP positions of a row, BG groups, BD channels of each.
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

POSITIONS, CHANNELS = 32, 64  # of a tile, at most
ELEMENTS = 1024  # of a tile, at most
ROWS = 4  # of outputs that share what is read
PARTS = 2048  # programs, about, that the gradient of shared weights is summed in
TAPS = 8  # along a row, that are written out at a time, at most


@triton.jit
def _tile(
    pointer, image, row, column, group, inside, height, width,
    BP: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """[BP, BG, BD] of [B, H, W, G * D] from `column` of a row on; zero outside."""
    local = tl.arange(0, BP)
    p = column + local
    base = ((image.to(tl.int64) * height + row) * width + column) * (G * D)
    local = local[:, None, None] * (G * D) + group[None, :, None] * D + inside[None, None, :]
    seen = (p >= 0) & (p < width) & (row >= 0) & (row < height)
    seen = seen[:, None, None] & (group < G)[None, :, None] & (inside < D)[None, None, :]
    return tl.load(pointer + base + local, mask=seen, other=0.0).to(tl.float32)


@triton.jit
def _sum(
    read, w, bias, written, height, width, out_height, out_width, offset_h, offset_w, w_image, w_row, w_column,
    G: tl.constexpr, D: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DILATION: tl.constexpr, ROWS: tl.constexpr,
    BP: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, TAPS: tl.constexpr, AT_POSITIONS: tl.constexpr,
    TRANSPOSED: tl.constexpr, HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """A tile of ROWS x BP outputs: of the sum or, TRANSPOSED, of what the sources are given back."""
    place = tl.program_id(0)
    inside = place % tl.cdiv(D, BD) * BD + tl.arange(0, BD)
    place = place // tl.cdiv(D, BD)
    group = place % tl.cdiv(G, BG) * BG + tl.arange(0, BG)
    place = place // tl.cdiv(G, BG)
    start = place % tl.cdiv(out_width, BP) * BP
    place = place // tl.cdiv(out_width, BP)
    blocks = tl.cdiv(out_height, ROWS * DILATION) * DILATION
    h = place % blocks // DILATION * (ROWS * DILATION) + place % blocks % DILATION
    image = place // blocks
    local = tl.arange(0, BP)
    channel = group[:, None] * D + inside[None, :]
    there = (group < G)[:, None] & (inside < D)[None, :]
    weights = w + image.to(tl.int64) * w_image + group[None, :] * (KH * KW)
    total = ()
    for _ in tl.static_range(ROWS):
        total = total + (tl.zeros([BP, BG, BD], tl.float32),)
    for step in range(ROWS + KH - 1):
        row = h + offset_h + DILATION * step
        for first in range(0, KW, TAPS):
            tiles = ()
            for t in tl.static_range(TAPS):
                column = start + offset_w + DILATION * (first + t)
                at = tl.where(row * 0 + first + t < KW, row, -1)  # nothing, behind the last tap
                tiles = tiles + (_tile(read, image, at, column, group, inside, height, width, BP, G, D),)
            new = ()
            for r in tl.static_range(ROWS):
                part = total[r]
                if (step >= r) & (step - r < KH):
                    for t in tl.static_range(TAPS):
                        tap = (step - r) * KW + first + t
                        if TRANSPOSED:
                            tap = KH * KW - 1 - tap
                        pointer = weights + tap
                        seen = ((group < G) & (group * 0 + first + t < KW))[None, :]
                        if AT_POSITIONS:
                            if TRANSPOSED:  # those of the place that is read
                                p = start + offset_w + DILATION * (first + t) + local
                                pointer += row.to(tl.int64) * w_row
                                seen = seen & ((p >= 0) & (p < width) & (row >= 0) & (row < height))[:, None]
                            else:
                                p = start + local
                                pointer += (h + DILATION * r).to(tl.int64) * w_row
                                seen = seen & ((p < out_width) & (h + DILATION * r < out_height))[:, None]
                            pointer += p.to(tl.int64)[:, None] * w_column
                        weight = tl.load(pointer, mask=seen, other=0.0).to(tl.float32)
                        part += tiles[t] * weight[:, :, None]
                new = new + (part,)
            total = new
    seen = (start + local < out_width)[:, None, None] & there[None, :, :]
    if HAS_BIAS:
        more = tl.load(bias + channel, mask=there, other=0.0).to(tl.float32)[None, :, :]
    for r in tl.static_range(ROWS):
        row = h + DILATION * r
        value = total[r]
        if HAS_BIAS:
            value += more
        base = ((image.to(tl.int64) * out_height + row) * out_width + start) * (G * D)
        pointer = written + base + local[:, None, None] * (G * D) + channel[None, :, :]
        tl.store(pointer, value.to(written.dtype.element_ty), mask=seen & (row < out_height))


@triton.jit
def _products(
    x, y, w, height, width, out_height, out_width, offset_h, offset_w,
    G: tl.constexpr, D: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DILATION: tl.constexpr, BP: tl.constexpr,
    BG: tl.constexpr, BD: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Weights [B, *N, G, T] of BP positions: inner products over the channels of each group."""
    place = tl.program_id(0)
    group = place % tl.cdiv(G, BG) * BG + tl.arange(0, BG)
    place = place // tl.cdiv(G, BG)
    start = place % tl.cdiv(out_width, BP) * BP
    place = place // tl.cdiv(out_width, BP)
    h = place % out_height
    image = place // out_height
    inside = tl.arange(0, BD)
    local, tap = tl.arange(0, BP), tl.arange(0, TAPS)
    base = w + ((image.to(tl.int64) * out_height + h) * out_width + start) * (G * KH * KW)
    pointer = base + local.to(tl.int64)[:, None, None] * (G * KH * KW) + group[None, :, None] * (KH * KW)
    seen = (start + local < out_width)[:, None, None] & (group < G)[None, :, None]
    if D <= BD:
        above = _tile(y, image, h, start, group, inside, out_height, out_width, BP, G, D)
    for kh in range(KH):
        row = h + offset_h + DILATION * kh
        for first in range(0, KW, TAPS):
            found = tl.zeros([BP, BG, TAPS], tl.float32)
            for t in tl.static_range(TAPS):
                column = start + offset_w + DILATION * (first + t)
                if D <= BD:
                    source = _tile(x, image, row, column, group, inside, height, width, BP, G, D)
                    product = tl.sum(source * above, 2)
                else:
                    product = tl.zeros([BP, BG], tl.float32)
                    for channel in range(0, D, BD):
                        more = channel + inside
                        part = _tile(y, image, h, start, group, more, out_height, out_width, BP, G, D)
                        source = _tile(x, image, row, column, group, more, height, width, BP, G, D)
                        product += tl.sum(source * part, 2)
                found = tl.where((tap == t)[None, None, :], product[:, :, None], found)
            each = (first + tap)[None, None, :]
            tl.store(pointer + kh * KW + each, found.to(w.dtype.element_ty), mask=seen & (each < KW))


@triton.jit
def _products_shared(
    x, y, w, height, width, out_height, out_width, offset_h, offset_w, rows,
    G: tl.constexpr, D: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DILATION: tl.constexpr, BP: tl.constexpr,
    BG: tl.constexpr, BD: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Part [B * parts, blocks of channels, G, T] of the inner products over `rows` rows, for a row of taps."""
    place = tl.program_id(0)
    first = place % tl.cdiv(KW, TAPS) * TAPS
    place = place // tl.cdiv(KW, TAPS)
    kh = place % KH
    place = place // KH
    block = place % tl.cdiv(D, BD)
    inside = block * BD + tl.arange(0, BD)
    groups = place // tl.cdiv(D, BD)
    group = groups % tl.cdiv(G, BG) * BG + tl.arange(0, BG)
    part = groups // tl.cdiv(G, BG)
    parts = tl.cdiv(out_height, rows)
    image = part // parts
    begin = part % parts * rows
    total = ()
    for _ in tl.static_range(TAPS):
        total = total + (tl.zeros([BP, BG, BD], tl.float32),)
    for h in range(begin, tl.minimum(begin + rows, out_height)):
        row = h + offset_h + DILATION * kh
        for start in range(0, out_width, BP):
            above = _tile(y, image, h, start, group, inside, out_height, out_width, BP, G, D)
            new = ()
            for t in tl.static_range(TAPS):
                column = start + offset_w + DILATION * (first + t)
                source = _tile(x, image, row, column, group, inside, height, width, BP, G, D)
                new = new + (total[t] + source * above,)
            total = new
    base = w + ((part.to(tl.int64) * tl.cdiv(D, BD) + block) * G + group) * (KH * KW) + kh * KW + first
    for t in tl.static_range(TAPS):
        found = tl.sum(tl.sum(total[t], 2), 0)
        tl.store(base + t, found, mask=(group < G) & (first + t < KW))


def local_sum(
    x: Tensor, w: Tensor, bias: Tensor | None, kernel: Sequence[int], dilation: int, offset: Sequence[int],
    grid: Sequence[int],
) -> Tensor:  # fmt: skip
    """See glocal.kernels.local_sum for what these three take and return."""
    y = x.new_empty(x.shape[0], *grid, x.shape[-1])
    return _run_sum(x, w, bias, y, kernel, dilation, offset, transposed=False)


def local_sum_transposed(
    y: Tensor, w: Tensor, kernel: Sequence[int], dilation: int, offset: Sequence[int], grid: Sequence[int]
) -> Tensor:
    """What each source is given back."""
    x = y.new_empty(y.shape[0], *grid, y.shape[-1])
    back = [-o - dilation * (k - 1) for o, k in zip(offset, kernel, strict=True)]
    return _run_sum(y, w, None, x, kernel, dilation, back, transposed=True)


def local_sum_products(
    x: Tensor, y: Tensor, kernel: Sequence[int], dilation: int, offset: Sequence[int], shape: Sequence[int]
) -> Tensor:
    """Weights of `shape`, each the inner product over what shares it; parts are added in a fixed order."""
    if not (x.numel() and y.numel()):
        return x.new_zeros(shape)
    groups, taps = shape[-2:]
    width = x.shape[-1] // groups
    bg, bd, bp = _blocks(groups, width, y.shape[-2])
    heights, (rows, columns), batch = _two(kernel, 1)[0], _two(y.shape[1:-1], 1), x.shape[0]
    arguments = x.contiguous(), y.contiguous()
    sizes = *_two(x.shape[1:-1], 1), rows, columns, *_two(offset, 0)
    options = {"G": groups, "D": width, "KH": heights, "KW": kernel[-1], "DILATION": dilation, "BG": bg, "BD": bd}
    held = min(TAPS, triton.next_power_of_2(kernel[-1]))
    with torch.cuda.device_of(x):
        if any(n != 1 for n in shape[1:-2]):
            bp = max(min(bp, ELEMENTS // 2 // (bg * max(bd, held))), 1)
            w = x.new_empty(*y.shape[:-1], groups, taps)
            programs = batch * rows * triton.cdiv(columns, bp) * triton.cdiv(groups, bg)
            _products[(programs,)](*arguments, w, *sizes, **options, BP=bp, TAPS=held, num_warps=_warps(bp * bg * bd))
            return w.sum_to_size(shape).to(x.dtype)  # autocast's sums are float32
        bp = max(bp // 2, 1)
        blocks = triton.cdiv(width, bd)
        each = batch * heights * triton.cdiv(kernel[-1], held) * blocks * triton.cdiv(groups, bg)
        some = triton.cdiv(rows, max(min(PARTS // each, rows), 1))
        parts = batch * triton.cdiv(rows, some)
        w = x.new_empty(parts, blocks, groups, taps, dtype=torch.float32)
        programs = each * triton.cdiv(rows, some)
        _products_shared[(programs,)](
            *arguments, w, *sizes, some, **options, BP=bp, TAPS=held, num_warps=_warps(bp * bg * bd)
        )
    w = w.flatten(0, 1).sum(0) if shape[0] == 1 else w.unflatten(0, (batch, -1)).sum((1, 2))
    return w.to(x.dtype).view(shape)


def _run_sum(
    read: Tensor, w: Tensor, bias: Tensor | None, written: Tensor, kernel: Sequence[int], dilation: int,
    offset: Sequence[int], *, transposed: bool,
) -> Tensor:  # fmt: skip
    if not written.numel():
        return written
    groups, taps = w.shape[-2:]
    if not (read.numel() and taps):
        return written.zero_() if bias is None else written.copy_(bias)
    width = read.shape[-1] // groups
    (rows, columns), heights = _two(written.shape[1:-1], 1), _two(kernel, 1)[0]
    bg, bd, bp = _blocks(groups, width, columns)
    shared = 1 if rows == 1 else min(ROWS, triton.next_power_of_2(triton.cdiv(rows, dilation)))
    axes = [w.shape[0], *_two(w.shape[1:-2], 1)]
    strides = [math.prod(axes[i + 1 :]) * groups * taps if axes[i] > 1 else 0 for i in range(3)]
    programs = written.shape[0] * triton.cdiv(rows, shared * dilation) * dilation
    programs *= triton.cdiv(columns, bp) * triton.cdiv(groups, bg) * triton.cdiv(width, bd)
    with torch.cuda.device_of(read):
        _sum[(programs,)](
            read.contiguous(), w.contiguous(), w if bias is None else bias.contiguous(), written,
            *_two(read.shape[1:-1], 1), rows, columns, *_two(offset, 0), *strides,
            G=groups, D=width, KH=heights, KW=kernel[-1], DILATION=dilation, ROWS=shared, BP=bp, BG=bg, BD=bd,
            AT_POSITIONS=any(strides[1:]), TRANSPOSED=transposed, HAS_BIAS=bias is not None,
            TAPS=_taps(kernel[-1]), num_warps=_warps(bp * bg * bd),
        )  # fmt: skip
    return written


def _two(axes: Sequence[int], before: int) -> tuple[int, int]:
    """A sequence is an image of one row."""
    return (before, axes[0]) if len(axes) == 1 else (axes[0], axes[1])


def _blocks(groups: int, width: int, columns: int) -> tuple[int, int, int]:
    """Groups, channels of each and positions of a tile: powers of two that waste little."""
    bd = _block(width, CHANNELS)
    bg = _block(groups, CHANNELS // bd)
    return bg, bd, min(triton.next_power_of_2(columns), POSITIONS, ELEMENTS // (bg * bd))


def _block(n: int, most: int) -> int:
    """The power of two, of 16 to `most` or the next one, whose multiples cover n with the least waste."""
    sizes = [min(most, triton.next_power_of_2(n))]
    while sizes[-1] > 16:
        sizes.append(sizes[-1] // 2)
    return min(sizes, key=lambda size: triton.cdiv(n, size) * size)


def _warps(elements: int) -> int:
    return max(min(elements // 256, 4), 1)


def _taps(row: int) -> int:
    """Taps of a row at a time, of which the last time has as many as can be."""
    times = triton.cdiv(row, TAPS)
    return triton.cdiv(row, times)
