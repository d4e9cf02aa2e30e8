"""Sums over the taps of a kernel, their transpose and the gradient of their weights, on a GPU.

Work comes in runs: RUN outputs of a row, `dilation` apart, neighbors of which see the same sources. A thread has a few
channels of a run. It reads each of the RUN + KW - 1 sources that a row of taps sees once and uses it for all that see
it. Runs of a program lie below each other: what one reads in a row, others have left in the cache. Sums are float32,
in an order that depends on nothing but shapes and blocks.

Shape letters: B batch, H x W grid, C channels, G groups of D consecutive channels, T taps. A sequence is an image of
one row. Blocks: BP runs, BG groups, BD channels of each.
"""

import math
from collections.abc import Sequence
from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

from glocal.kernels.triton import tuning

CHANNELS = 64  # of a tile, at most
PARTS = 2048  # programs, about, that the gradient of shared weights is summed in
TAPS = 8  # along a row, that are written out at a time, at most

# RUN: outputs of a run, at most. EACH: channels of a thread, 8 are 16 bytes of a short type. Longer runs read and
# convert less, but need registers; short ones make more programs of a small call. ROWS: of taps that a program sums.
SUMS = (
    {"RUN": 8, "EACH": 8, "num_warps": 4},
    {"RUN": 16, "EACH": 4, "num_warps": 4},
    {"RUN": 8, "EACH": 4, "num_warps": 4},
    {"RUN": 2, "EACH": 8, "num_warps": 2},
)
PRODUCTS = (
    {"RUN": 4, "EACH": 8, "num_warps": 4},
    {"RUN": 8, "EACH": 8, "num_warps": 4},
    {"RUN": 2, "EACH": 8, "num_warps": 2},
)
SHARED_PRODUCTS = (
    {"RUN": 8, "EACH": 4, "ROWS": 2, "num_warps": 4},
    {"RUN": 4, "EACH": 8, "ROWS": 1, "num_warps": 4},
    {"RUN": 8, "EACH": 2, "ROWS": 4, "num_warps": 4},
)


@triton.jit
def _channels(place, G: tl.constexpr, D: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr):
    """Of a program: its groups, the channels of each, and what else its number says."""
    inside = place % tl.cdiv(D, BD) * BD + tl.arange(0, BD)
    place = place // tl.cdiv(D, BD)
    group = place % tl.cdiv(G, BG) * BG + tl.arange(0, BG)
    return group, inside, place // tl.cdiv(G, BG)


@triton.jit
def _runs(run, height, width, RUN: tl.constexpr, DILATION: tl.constexpr):
    """Image, row and first column of runs, which are numbered down the rows first."""
    row = run % height
    run = run // height
    runs = tl.cdiv(width, RUN * DILATION) * DILATION
    number = run % runs
    return run // runs, row, number // DILATION * (RUN * DILATION) + number % DILATION


@triton.jit
def _pointers(pointer, image, row, column, height, width, group, inside, G: tl.constexpr, D: tl.constexpr):
    """[BP, BG, BD] into [B, H, W, G * D]."""
    token = (image.to(tl.int64) * height + row) * width + column
    return pointer + token[:, None, None] * (G * D) + (group[:, None] * D + inside[None, :])[None, :, :]


@triton.jit
def _seen(some, column, width, group, inside, G: tl.constexpr, D: tl.constexpr):
    """[BP, BG, BD]: what is there, of the runs that are and of a column."""
    there = (group < G)[:, None] & (inside < D)[None, :]
    return (some & (column >= 0) & (column < width))[:, None, None] & there[None, :, :]


@triton.jit
def _add_taps(
    total, read, w, some, seen, column, width, out, out_width, group, inside, G: tl.constexpr, D: tl.constexpr,
    RUN: tl.constexpr, TAPS: tl.constexpr, DILATION: tl.constexpr, W_TAP: tl.constexpr, W_COLUMN: tl.constexpr,
    AT_POSITIONS: tl.constexpr, TRANSPOSED: tl.constexpr,
):  # fmt: skip
    """`total`, of RUN outputs, and what TAPS taps of a row add, of which the first sees `read`."""
    shared = ()
    if not AT_POSITIONS:
        for t in tl.static_range(TAPS):
            weight = tl.load(w + t * W_TAP, mask=some[:, None] & (group < G)[None, :], other=0.0)
            shared = shared + (weight.to(tl.float32),)
    for c in tl.static_range(RUN + TAPS - 1):
        known = _seen(seen, column + DILATION * c, width, group, inside, G, D)
        tile = tl.load(read + c * (DILATION * G * D), mask=known, other=0.0).to(tl.float32)
        new = ()
        for s in tl.static_range(RUN):
            part = total[s]
            if (c >= s) & (c - s < TAPS):
                if not AT_POSITIONS:
                    weight = shared[c - s]
                elif TRANSPOSED:  # those of the place that is read
                    there = seen & (column + DILATION * c >= 0) & (column + DILATION * c < width)
                    place = w + (c * (DILATION * W_COLUMN) + (c - s) * W_TAP)
                    weight = tl.load(place, mask=there[:, None] & (group < G)[None, :], other=0.0).to(tl.float32)
                else:
                    there = some & (out + DILATION * s < out_width)
                    place = w + (s * (DILATION * W_COLUMN) + (c - s) * W_TAP)
                    weight = tl.load(place, mask=there[:, None] & (group < G)[None, :], other=0.0).to(tl.float32)
                part += tile * weight[:, :, None]
            new = new + (part,)
        total = new
    return total


@triton.jit
def _sum(
    read, w, bias, written, runs, height, width, out_height, out_width, offset_h, offset_w, w_image, w_row,
    G: tl.constexpr, D: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DILATION: tl.constexpr, RUN: tl.constexpr,
    BP: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, TAPS: tl.constexpr, W_GROUP: tl.constexpr,
    W_TAP: tl.constexpr, W_COLUMN: tl.constexpr, AT_POSITIONS: tl.constexpr, TRANSPOSED: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):  # fmt: skip
    """BP runs of the sum or, TRANSPOSED, of what the sources are given back."""
    group, inside, place = _channels(tl.program_id(0), G, D, BG, BD)
    run = place * BP + tl.arange(0, BP)
    some = run < runs
    image, h, out = _runs(run, out_height, out_width, RUN, DILATION)
    column = out + offset_w
    weights = w + (image.to(tl.int64) * w_image)[:, None] + group[None, :] * W_GROUP
    if AT_POSITIONS:
        line = h + offset_h if TRANSPOSED else h
        weights += (line.to(tl.int64) * w_row + (column if TRANSPOSED else out) * W_COLUMN)[:, None]
    along: tl.constexpr = DILATION * W_COLUMN if TRANSPOSED else 0
    total = ()
    for _ in tl.static_range(RUN):
        total = total + (tl.zeros([BP, BG, BD], tl.float32),)
    source = _pointers(read, image, h + offset_h, column, height, width, group, inside, G, D)
    for kh in range(KH):
        row = h + offset_h + DILATION * kh
        seen = some & (row >= 0) & (row < height)
        for first in range(0, KW // TAPS * TAPS, TAPS):
            total = _add_taps(
                total, source + first * (DILATION * G * D), weights + first * (W_TAP + along), some, seen,
                column + DILATION * first, width, out, out_width, group, inside, G, D, RUN, TAPS, DILATION, W_TAP,
                W_COLUMN, AT_POSITIONS, TRANSPOSED,
            )  # fmt: skip
        if KW % TAPS:
            last: tl.constexpr = KW // TAPS * TAPS
            total = _add_taps(
                total, source + last * (DILATION * G * D), weights + last * (W_TAP + along), some, seen,
                column + DILATION * last, width, out, out_width, group, inside, G, D, RUN, KW % TAPS, DILATION, W_TAP,
                W_COLUMN, AT_POSITIONS, TRANSPOSED,
            )  # fmt: skip
        source += width * (DILATION * G * D)
        weights += KW * W_TAP
        if AT_POSITIONS and TRANSPOSED:
            weights += w_row * DILATION
    if HAS_BIAS:
        there = (group < G)[:, None] & (inside < D)[None, :]
        more = tl.load(bias + group[:, None] * D + inside[None, :], mask=there, other=0.0).to(tl.float32)[None, :, :]
    pointer = _pointers(written, image, h, out, out_height, out_width, group, inside, G, D)
    for s in tl.static_range(RUN):
        value = total[s]
        if HAS_BIAS:
            value += more
        known = _seen(some, out + DILATION * s, out_width, group, inside, G, D)
        tl.store(pointer + s * (DILATION * G * D), value.to(written.dtype.element_ty), mask=known)


@triton.jit
def _products(
    x, y, w, runs, height, width, out_height, out_width, offset_h, offset_w,
    G: tl.constexpr, D: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DILATION: tl.constexpr, RUN: tl.constexpr,
    BP: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Weights [B, *N, G, T] of BP runs: inner products over the channels of each group."""
    place = tl.program_id(0)
    group = place % tl.cdiv(G, BG) * BG + tl.arange(0, BG)
    run = place // tl.cdiv(G, BG) * BP + tl.arange(0, BP)
    some = run < runs
    image, h, out = _runs(run, out_height, out_width, RUN, DILATION)
    column = out + offset_w
    tap = tl.arange(0, TAPS)
    token = (image.to(tl.int64) * out_height + h) * out_width + out
    pointer = w + (token[:, None] * G + group[None, :])[:, :, None] * (KH * KW) + tap[None, None, :]
    for kh in range(KH):
        row = h + offset_h + DILATION * kh
        seen = some & (row >= 0) & (row < height)
        for first in range(0, KW, TAPS):
            found = ()
            for _ in tl.static_range(RUN):
                found = found + (tl.zeros([BP, BG, TAPS], tl.float32),)
            for start in range(0, D, BD):
                inside = start + tl.arange(0, BD)
                above = ()
                read = _pointers(y, image, h, out, out_height, out_width, group, inside, G, D)
                for s in tl.static_range(RUN):
                    known = _seen(some, out + DILATION * s, out_width, group, inside, G, D)
                    tile = tl.load(read + s * (DILATION * G * D), mask=known, other=0.0)
                    above = above + (tile.to(tl.float32),)
                read = _pointers(x, image, row, column + DILATION * first, height, width, group, inside, G, D)
                for c in tl.static_range(RUN + (TAPS if TAPS < KW else KW) - 1):
                    known = _seen(seen, column + DILATION * (first + c), width, group, inside, G, D)
                    tile = tl.load(read + c * (DILATION * G * D), mask=known, other=0.0).to(tl.float32)
                    new = ()
                    for s in tl.static_range(RUN):
                        part = found[s]
                        if (c >= s) & (c - s < TAPS) & (c - s < KW):
                            product = tl.sum(tile * above[s], 2)[:, :, None]
                            if D > BD:
                                product += part
                            part = tl.where((tap == c - s)[None, None, :], product, part)
                        new = new + (part,)
                    found = new
            for s in tl.static_range(RUN):
                known = (some & (out + DILATION * s < out_width))[:, None, None] & (group < G)[None, :, None]
                known = known & (first + tap < KW)[None, None, :]
                written = pointer + s * (DILATION * G * KH * KW) + (kh * KW + first)
                tl.store(written, found[s].to(w.dtype.element_ty), mask=known)


@triton.jit
def _products_shared(
    x, y, w, runs, each, height, width, out_height, out_width, offset_h, offset_w,
    G: tl.constexpr, D: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr, DILATION: tl.constexpr, RUN: tl.constexpr,
    ROWS: tl.constexpr, BP: tl.constexpr, BG: tl.constexpr, BD: tl.constexpr, TAPS: tl.constexpr,
):  # fmt: skip
    """Part [., blocks of channels, G, T] of the inner products: `each` of what shares weights, `runs`, ROWS x TAPS."""
    place = tl.program_id(0)
    first = place % tl.cdiv(KW, TAPS) * TAPS
    place = place // tl.cdiv(KW, TAPS)
    top = place % tl.cdiv(KH, ROWS) * ROWS
    place = place // tl.cdiv(KH, ROWS)
    block = place % tl.cdiv(D, BD)
    group, inside, part = _channels(place, G, D, BG, BD)
    parts = tl.cdiv(runs, each)
    begin = part % parts * each
    total = ()
    for _ in tl.static_range(ROWS * TAPS):
        total = total + (tl.zeros([BP, BG, BD], tl.float32),)
    for start in range(begin, tl.minimum(begin + each, runs), BP):
        run = start + tl.arange(0, BP)
        some = run < runs
        image, h, out = _runs(part // parts * runs + run, out_height, out_width, RUN, DILATION)
        column = out + offset_w + DILATION * first
        read = _pointers(y, image, h, out, out_height, out_width, group, inside, G, D)
        above = ()
        for s in tl.static_range(RUN):
            known = _seen(some, out + DILATION * s, out_width, group, inside, G, D)
            above = above + (tl.load(read + s * (DILATION * G * D), mask=known, other=0.0).to(tl.float32),)
        for r in tl.static_range(ROWS):
            row = h + offset_h + DILATION * (top + r)
            seen = some & (row >= 0) & (row < height)
            read = _pointers(x, image, row, column, height, width, group, inside, G, D)
            for c in tl.static_range(RUN + TAPS - 1):
                known = _seen(seen, column + DILATION * c, width, group, inside, G, D)
                tile = tl.load(read + c * (DILATION * G * D), mask=known, other=0.0).to(tl.float32)
                new = ()
                for n in tl.static_range(ROWS * TAPS):
                    found = total[n]
                    if (n // TAPS == r) & (c >= n % TAPS) & (c - n % TAPS < RUN):
                        found += tile * above[c - n % TAPS]
                    new = new + (found,)
                total = new
    base = w + ((part.to(tl.int64) * tl.cdiv(D, BD) + block) * G + group) * (KH * KW) + top * KW + first
    for n in tl.static_range(ROWS * TAPS):
        found = tl.sum(tl.sum(total[n], 2), 0)
        known = (group < G) & (first + n % TAPS < KW) & (top + n // TAPS < KH)
        tl.store(base + (n // TAPS * KW + n % TAPS), found, mask=known)


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
    heights, (rows, columns), batch = _two(kernel, 1)[0], _two(y.shape[1:-1], 1), x.shape[0]
    x, y = x.contiguous(), y.contiguous()
    sizes = *_two(x.shape[1:-1], 1), rows, columns, *_two(offset, 0)
    options = {"G": groups, "D": width, "KH": heights, "KW": kernel[-1], "DILATION": dilation}
    kind = (x.dtype, shape[0] > 1, *options.values(), *tuning.classes(batch, rows, columns))
    if any(n != 1 for n in shape[1:-2]):
        w = x.new_empty(*y.shape[:-1], groups, taps)
        held = min(TAPS, triton.next_power_of_2(kernel[-1]))

        def run(choice: tuning.Configuration) -> None:
            runs, blocks = _blocks(choice, groups, width, batch * rows, columns, dilation)
            programs = triton.cdiv(runs, blocks["BP"]) * triton.cdiv(groups, blocks["BG"])
            _products[(programs,)](x, y, w, runs, *sizes, **options, **blocks, TAPS=held)

        with torch.cuda.device_of(x):
            tuning.run(_products, kind, PRODUCTS, run, x.device)
        return w.sum_to_size(shape).to(x.dtype)  # autocast's sums are float32

    def run_shared(choice: tuning.Configuration) -> Tensor:
        runs, blocks = _blocks(choice, groups, width, batch // shape[0] * rows, columns, dilation)
        held, down = _taps(kernel[-1]), min(choice["ROWS"], heights)
        split = triton.cdiv(width, blocks["BD"])
        each = shape[0] * triton.cdiv(heights, down) * triton.cdiv(kernel[-1], held)
        each *= split * triton.cdiv(groups, blocks["BG"])
        steps = triton.cdiv(runs, blocks["BP"])
        some = triton.cdiv(steps, max(min(PARTS // each, steps), 1)) * blocks["BP"]
        parts = triton.cdiv(runs, some)
        w = x.new_empty(shape[0], parts * split, groups, taps, dtype=torch.float32)
        _products_shared[(each * parts,)](x, y, w, runs, some, *sizes, **options, **blocks, ROWS=down, TAPS=held)
        return w

    with torch.cuda.device_of(x):
        w = tuning.run(_products_shared, kind, SHARED_PRODUCTS, run_shared, x.device)
    return w.sum(1).to(x.dtype).view(shape)


def _run_sum(
    read: Tensor, w: Tensor, bias: Tensor | None, written: Tensor, kernel: Sequence[int], dilation: int,
    offset: Sequence[int], *, transposed: bool,
) -> Tensor:  # fmt: skip
    if not written.numel():
        return written
    groups, taps = w.shape[-2:]
    if not (read.numel() and taps):
        return written.zero_() if bias is None else written.copy_(bias)
    width, batch = read.shape[-1] // groups, read.shape[0]
    (rows, columns), heights = _two(written.shape[1:-1], 1), _two(kernel, 1)[0]
    axes = [w.shape[0], *_two(w.shape[1:-2], 1)]
    strides = [math.prod(axes[i + 1 :]) * groups * taps if axes[i] > 1 else 0 for i in range(3)]
    w, steps = w.contiguous(), (taps, 1)
    if not any(strides):  # few: groups next to each other are read at once
        w, steps = w.movedim(-1, -2).contiguous(), (1, groups)
    options = {
        "G": groups, "D": width, "KH": heights, "KW": kernel[-1], "DILATION": dilation, "TAPS": _taps(kernel[-1]),
        "W_GROUP": steps[0], "W_TAP": -steps[1] if transposed else steps[1], "W_COLUMN": strides[2],
        "AT_POSITIONS": any(strides[1:]), "TRANSPOSED": transposed, "HAS_BIAS": bias is not None,
    }  # fmt: skip
    if transposed:  # from the last tap on
        w = w.view(-1)[(taps - 1) * steps[1] :]
    read, added = read.contiguous(), w if bias is None else bias.contiguous()
    sizes = *_two(read.shape[1:-1], 1), rows, columns, *_two(offset, 0), *strides[:2]

    def run(choice: tuning.Configuration) -> None:
        runs, blocks = _blocks(choice, groups, width, batch * rows, columns, dilation)
        programs = triton.cdiv(runs, blocks["BP"]) * triton.cdiv(groups, blocks["BG"])
        programs *= triton.cdiv(width, blocks["BD"])
        _sum[(programs,)](read, w, added, written, runs, *sizes, **options, **blocks)

    kind = (read.dtype, *options.values(), *tuning.classes(batch, rows, columns))
    with torch.cuda.device_of(read):
        tuning.run(_sum, kind, SUMS, run, read.device)
    return written


def _two(axes: Sequence[int], before: int) -> tuple[int, int]:
    """A sequence is an image of one row."""
    return (before, axes[0]) if len(axes) == 1 else (axes[0], axes[1])


def _blocks(
    choice: tuning.Configuration, groups: int, width: int, rows: int, columns: int, dilation: int
) -> tuple[int, dict[str, int]]:
    """How many runs there are, and the blocks of a configuration: powers of two that waste little."""
    members = triton.cdiv(columns, dilation)
    length = triton.cdiv(members, triton.cdiv(members, choice["RUN"]))
    runs = rows * triton.cdiv(columns, length * dilation) * dilation
    bg, bd = _channel_blocks(groups, width)
    lanes = bg * bd // min(choice["EACH"], bg * bd)
    bp = min(max(32 * choice["num_warps"] // lanes, 1), triton.next_power_of_2(runs))
    warps = min(choice["num_warps"], max(bp * lanes // 32, 1))
    return runs, {"RUN": length, "BP": bp, "BG": bg, "BD": bd, "num_warps": warps}


@cache
def _channel_blocks(groups: int, width: int) -> tuple[int, int]:
    """Groups, and channels of each."""
    bd = _block(width, CHANNELS)
    return _block(groups, CHANNELS // bd), bd


def _block(n: int, most: int) -> int:
    """The power of two, of 16 to `most` or the next one, whose multiples cover n with the least waste."""
    sizes = [min(most, triton.next_power_of_2(n))]
    while sizes[-1] > 16:
        sizes.append(sizes[-1] // 2)
    return min(sizes, key=lambda size: triton.cdiv(n, size) * size)


def _taps(row: int) -> int:
    """Taps of a row at a time, of which the last time has as many as can be."""
    times = triton.cdiv(row, TAPS)
    return triton.cdiv(row, times)
