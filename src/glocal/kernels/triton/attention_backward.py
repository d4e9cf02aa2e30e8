"""The backward pass of attention.py's.

Windows, and whole grids, of no more tokens than a block: a program has several of one head, and reads and writes each
tensor once. All else: one kernel goes through the sources for each tile of queries, another through the queries for
each tile of sources, and a third adds up the gradients of the biases.

Those are first added up over images (and windows), as gradients of scores, for each pair of lanes of two tiles that
always lie alike: of a tile of queries and a block of what it goes through, the same in each image; or of any two tiles
of a grid with the same difference, of which there are far fewer. Then the pairs of each offset are added up. Each
number is written by one program, and sums are taken in a fixed order: nothing depends on the programs' order.

Names, modes and shape letters are those of attention.py.
"""

import triton
import triton.language as tl

from glocal.kernels.triton.attention import (
    across_of,
    corner,
    ends_of,
    entries_of,
    members_of,
    owned,
    program,
    queries_of,
    rows_of,
    scores_of,
    sources_of,
    write,
)


@triton.jit
def _backward_at_once(
    grad, q, k, v, bias, valid, extents, dq, dk, dv, pairs, scale, shape, strides, table, windows, each,
    KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_EXTENTS: tl.constexpr, PRECISION: tl.constexpr,
    MODE: tl.constexpr, WINDOWS,
):  # fmt: skip
    """All gradients of `each` windows, of BQ lanes; [parts, heads, BQ, BQ]: those of their scores, summed."""
    heads = shape[10]
    head = tl.program_id(0) % heads
    part = tl.program_id(0) // heads
    lane = tl.arange(0, BQ)
    h = lane // shape[7]
    w = lane % shape[7]
    there = lane < shape[6] * shape[7]
    far = (part * each // WINDOWS).to(tl.int64)  # where each image has a table, one image is a program's
    bias += head * table[0] + far * table[1] + table[2]
    both = there[:, None] & there[None, :]
    entries = entries_of(bias, table, h[None, :] - h[:, None], w[None, :] - w[:, None], both, HAS_BIAS)
    total = tl.zeros([BQ, BQ], tl.float32)
    for number in range(part * each, tl.minimum(part * each + each, windows)):
        image = tl.full([], 0, tl.int64) + number // WINDOWS
        ends = ends_of(extents, image, shape[2], shape[3], HAS_EXTENTS)
        _, region = owned(number % WINDOWS, shape, 0, TH, TW, BQ, DH, DW, MODE)
        _, _, q_number, q_there, place, queries = queries_of(
            q, lane, region, image, head, shape, ends, strides, KH, KW, DH, DW, D, BD, MODE
        )
        above = rows_of(grad, place, q_there, E, E, BE)
        _, _, k_number, k_there, k_seen, keys, values = sources_of(
            k, v, valid, lane, region, image, head, shape, ends, strides, KH, KW, DH, DW, D, E, BD, BE, HAS_VALID, MODE
        )
        # [sources, queries]: two of the three products with them need no transposing
        scores = tl.dot(keys, tl.trans(queries), input_precision=PRECISION) * scale + entries
        scores = tl.where(k_seen[:, None] & q_there[None, :], scores, float("-inf"))
        most = tl.max(scores, 0)
        weights = tl.exp(scores - tl.where(most == float("-inf"), 0.0, most)[None, :])
        divisor = tl.sum(weights, 0)
        weights = weights / tl.where(divisor > 0, divisor, 1.0)[None, :]
        dv_rows = tl.dot(weights.to(above.dtype), above, input_precision=PRECISION)
        write(dv + image * strides[15] + head * strides[17], k_number, k_there, strides[16], dv_rows, E, BE)
        slope = tl.dot(values, tl.trans(above), input_precision=PRECISION)
        slope = weights * (slope - tl.sum(weights * slope, 0)[None, :])
        total += slope
        slope = slope.to(keys.dtype)
        dk_rows = tl.dot(slope, queries, input_precision=PRECISION) * scale
        write(dk + image * strides[12] + head * strides[14], k_number, k_there, strides[13], dk_rows, D, BD)
        dq_rows = tl.dot(tl.trans(slope), keys, input_precision=PRECISION) * scale
        write(dq + image * strides[9] + head * strides[11], q_number, q_there, strides[10], dq_rows, D, BD)
    if HAS_BIAS:
        first = (part.to(tl.int64) * heads + head) * (BQ * BQ)
        tl.store(pairs + first + lane[None, :] * BQ + lane[:, None], total)


@triton.jit
def _backward_queries(
    grad, q, k, v, bias, valid, extents, out, lse, delta, dq, scale, shape, strides, table, begin,
    KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_EXTENTS: tl.constexpr, PRECISION: tl.constexpr,
    MODE: tl.constexpr, TILES,
):  # fmt: skip
    """The gradient of a tile of queries, and delta, the inner product of each output and its gradient."""
    head, tile, image, ends = program(extents, shape, TILES, HAS_EXTENTS)
    bias += head * table[0] + image * table[1] + table[2]
    lane, region = owned(tile, shape, begin, TH, TW, BQ, DH, DW, MODE)
    q_h, q_w, q_number, q_there, place, queries = queries_of(
        q, lane, region, image, head, shape, ends, strides, KH, KW, DH, DW, D, BD, MODE
    )
    above = rows_of(grad, place, q_there, E, E, BE)
    result = rows_of(out, place, q_there, E, E, BE)
    inner = tl.sum(above.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + place, inner, mask=q_there)
    divisor = tl.load(lse + place, mask=q_there, other=0.0)
    limits = (members_of(ends[0], region[4], DH), members_of(ends[1], region[5], DW))
    across = across_of(region, shape, ends, KH, KW, DH, DW, TH, TW, False, False, MODE)
    total = tl.zeros([BQ, BD], tl.float32)
    for start in range(0, across[3], BN):
        k_h, k_w, _, _, seen, keys, values = sources_of(
            k, v, valid, start + tl.arange(0, BN), across, image, head, shape, ends, strides, KH, KW, DH, DW, D, E, BD,
            BE, HAS_VALID, MODE,
        )  # fmt: skip
        scores = scores_of(
            tl.dot(queries, tl.trans(keys), input_precision=PRECISION), q_h[:, None], q_w[:, None], q_there[:, None],
            k_h[None, :], k_w[None, :], seen[None, :], table, bias, scale, limits, KH, KW, HAS_BIAS, HAS_EXTENTS, MODE,
        )  # fmt: skip
        weights = tl.exp(scores - divisor[:, None])
        slope = weights * (tl.dot(above, tl.trans(values), input_precision=PRECISION) - inner[:, None])
        total += tl.dot(slope.to(keys.dtype), keys, input_precision=PRECISION)
    write(dq + image * strides[9] + head * strides[11], q_number, q_there, strides[10], total * scale, D, BD)


@triton.jit
def _asked(
    grad, q, lse, delta, lane, region, image, head, shape, ends, strides, KH: tl.constexpr, KW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """Of each lane: a query's coordinates, whether it is, its channels, its output's gradient, delta and divisor."""
    h, w, _, there, place, queries = queries_of(
        q, lane, region, image, head, shape, ends, strides, KH, KW, DH, DW, D, BD, MODE
    )
    above = rows_of(grad, place, there, E, E, BE)
    inner = tl.load(delta + place, mask=there, other=0.0)
    return h, w, there, queries, above, inner, tl.load(lse + place, mask=there, other=0.0)


@triton.jit
def _backward_sources(
    grad, q, k, v, bias, valid, extents, lse, delta, dk, dv, scale, shape, strides, table,
    KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_EXTENTS: tl.constexpr, PRECISION: tl.constexpr,
    MODE: tl.constexpr, TILES,
):  # fmt: skip
    """The gradients of a tile of sources."""
    head, tile, image, ends = program(extents, shape, TILES, HAS_EXTENTS)
    bias += head * table[0] + image * table[1] + table[2]
    lane, region = owned(tile, shape, 0, TH, TW, BQ, DH, DW, MODE)
    k_h, k_w, k_number, k_there, k_seen, keys, values = sources_of(
        k, v, valid, lane, region, image, head, shape, ends, strides, KH, KW, DH, DW, D, E, BD, BE, HAS_VALID, MODE
    )
    limits = (members_of(ends[0], region[4], DH), members_of(ends[1], region[5], DW))
    across = across_of(region, shape, ends, KH, KW, DH, DW, TH, TW, True, False, MODE)
    total_k = tl.zeros([BQ, BD], tl.float32)
    total_v = tl.zeros([BQ, BE], tl.float32)
    for start in range(0, across[3], BN):
        q_h, q_w, q_there, queries, above, inner, divisor = _asked(
            grad, q, lse, delta, start + tl.arange(0, BN), across, image, head, shape, ends, strides, KH, KW, DH, DW, D,
            E, BD, BE, MODE,
        )  # fmt: skip
        # [sources, queries]: their products are ready to be multiplied with queries
        scores = scores_of(
            tl.dot(keys, tl.trans(queries), input_precision=PRECISION), q_h[None, :], q_w[None, :], q_there[None, :],
            k_h[:, None], k_w[:, None], k_seen[:, None], table, bias, scale, limits, KH, KW, HAS_BIAS, HAS_EXTENTS,
            MODE,
        )  # fmt: skip
        weights = tl.exp(scores - divisor[None, :])
        total_v += tl.dot(weights.to(above.dtype), above, input_precision=PRECISION)
        slope = weights * (tl.dot(values, tl.trans(above), input_precision=PRECISION) - inner[None, :])
        total_k += tl.dot(slope.to(queries.dtype), queries, input_precision=PRECISION)
    write(dk + image * strides[12] + head * strides[14], k_number, k_there, strides[13], total_k * scale, D, BD)
    write(dv + image * strides[15] + head * strides[17], k_number, k_there, strides[16], total_v, E, BE)


@triton.jit
def _backward_pairs(
    grad, q, k, v, bias, valid, extents, lse, delta, pairs, scale, shape, strides, table, begin, images, each,
    KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_EXTENTS: tl.constexpr, PRECISION: tl.constexpr,
    MODE: tl.constexpr, TILES, BLOCKS,
):  # fmt: skip
    """[parts, heads, TILES, BLOCKS, BQ, BN]: gradients of scores of neighborhoods, summed over `each` of the images."""
    heads = shape[10]
    number = tl.program_id(0)
    head = number % heads
    block = number // heads % BLOCKS
    tile = number // heads // BLOCKS % TILES
    part = number // heads // BLOCKS // TILES
    lane, region = owned(tile, shape, begin, TH, TW, BQ, DH, DW, MODE)
    total = tl.zeros([BQ, BN], tl.float32)
    for each_image in range(part * each, tl.minimum(part * each + each, images)):
        image = tl.full([], 0, tl.int64) + each_image
        ends = ends_of(extents, image, shape[2], shape[3], HAS_EXTENTS)
        q_h, q_w, q_there, queries, above, inner, divisor = _asked(
            grad, q, lse, delta, lane, region, image, head, shape, ends, strides, KH, KW, DH, DW, D, E, BD, BE, MODE
        )
        limits = (members_of(ends[0], region[4], DH), members_of(ends[1], region[5], DW))
        across = across_of(region, shape, ends, KH, KW, DH, DW, TH, TW, False, HAS_EXTENTS, MODE)
        k_h, k_w, _, _, seen, keys, values = sources_of(
            k, v, valid, block * BN + tl.arange(0, BN), across, image, head, shape, ends, strides, KH, KW, DH, DW, D, E,
            BD, BE, HAS_VALID, MODE,
        )  # fmt: skip
        scores = scores_of(
            tl.dot(queries, tl.trans(keys), input_precision=PRECISION), q_h[:, None], q_w[:, None], q_there[:, None],
            k_h[None, :], k_w[None, :], seen[None, :], table, bias + head * table[0] + table[2], scale, limits, KH, KW,
            HAS_BIAS, HAS_EXTENTS, MODE,
        )  # fmt: skip
        weights = tl.exp(scores - divisor[:, None])
        total += weights * (tl.dot(above, tl.trans(values), input_precision=PRECISION) - inner[:, None])
    first = ((part.to(tl.int64) * heads + head) * TILES + tile) * BLOCKS + block
    where = tl.arange(0, BQ)[:, None] * BN + tl.arange(0, BN)[None, :]
    tl.store(pairs + first * (BQ * BN) + where, total)


@triton.jit
def _sum_pairs(
    pairs, entries, shape, begin, rows, row, KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    TH: tl.constexpr, TW: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr, BO: tl.constexpr,
    HAS_EXTENTS: tl.constexpr, MODE: tl.constexpr, TILES, BLOCKS,
):  # fmt: skip
    """[heads, rows, row], of _backward_pairs': the sums over all pairs with the same offset."""
    blocks = tl.cdiv(rows * row, BO)
    offset = tl.program_id(0) % blocks * BO + tl.arange(0, BO)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    away_h = offset // row - rows // 2  # of a source from its query
    away_w = offset % row - row // 2
    ends = (shape[2], shape[3])
    total = tl.zeros([BO], tl.float32)
    for tile in range(0, TILES):
        lane, region = owned(tile, shape, begin, TH, TW, BQ, DH, DW, MODE)
        across = across_of(region, shape, ends, KH, KW, DH, DW, TH, TW, False, HAS_EXTENTS, MODE)
        from_h = (region[0] + lane // region[2])[:, None] + away_h[None, :] - across[0]
        from_w = (region[1] + lane % region[2])[:, None] + away_w[None, :] - across[1]
        at = from_h * across[2] + from_w
        seen = (from_h >= 0) & (from_w >= 0) & (from_w < across[2]) & (at < across[3])
        seen = seen & (lane < region[3])[:, None] & (offset < rows * row)[None, :]
        first = (head * TILES + tile) * BLOCKS * (BQ * BN)
        where = at // BN * (BQ * BN) + tl.arange(0, BQ)[:, None] * BN + at % BN
        total += tl.sum(tl.load(pairs + first + where, mask=seen, other=0.0), 0)
    tl.store(entries + head * rows * row + offset, total, mask=offset < rows * row)


@triton.jit
def _nearest_first(number):
    """0, -1, 1, -2, 2 and so on: tiles that are near are the more pairs, and such a program should not start last."""
    return tl.where(number % 2 == 1, -(number // 2) - 1, number // 2)


@triton.jit
def _backward_differences(
    grad, q, k, v, bias, valid, extents, lse, delta, pairs, scale, shape, strides, table, windows, each,
    KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_EXTENTS: tl.constexpr, PRECISION: tl.constexpr,
    MODE: tl.constexpr, PARTS, WINDOWS,
):  # fmt: skip
    """[PARTS, heads, 2 * tiles_h - 1, 2 * tiles_w - 1, BQ, BQ]: gradients of scores, for each difference of tiles.

    Windows (or whole grids) are cut into tiles of TH x TW lanes; summed are all pairs of tiles, query's less source's,
    in `each` of the windows.
    """
    heads = shape[10]
    side_h, side_w = shape[6], shape[7]
    tiles_h = tl.cdiv(side_h, TH)
    tiles_w = tl.cdiv(side_w, TW)
    number = tl.program_id(0)
    head = number % heads
    part = number // heads % PARTS
    difference = number // heads // PARTS
    tiles_away_h = _nearest_first(difference // (2 * tiles_w - 1))
    tiles_away_w = _nearest_first(difference % (2 * tiles_w - 1))
    lane = tl.arange(0, BQ)
    h = lane // TW
    w = lane % TW
    away_h = tiles_away_h * TH + h[:, None] - h[None, :]
    away_w = tiles_away_w * TW + w[:, None] - w[None, :]
    inside = (tl.abs(away_h) < side_h) & (tl.abs(away_w) < side_w)
    far = (part * each // WINDOWS).to(tl.int64)  # where each image has a table, one image is a program's
    entries = entries_of(bias + head * table[0] + far * table[1] + table[2], table, away_h, away_w, inside, HAS_BIAS)
    first_h = tl.maximum(tiles_away_h, 0)
    first_w = tl.maximum(tiles_away_w, 0)
    row = tiles_w - tl.abs(tiles_away_w)
    total = tl.zeros([BQ, BQ], tl.float32)
    for window in range(part * each, tl.minimum(part * each + each, windows)):
        image = tl.full([], 0, tl.int64) + window // WINDOWS
        ends = ends_of(extents, image, shape[2], shape[3], HAS_EXTENTS)
        base_h, base_w = corner(window % WINDOWS, shape)
        for pair in range(0, (tiles_h - tl.abs(tiles_away_h)) * row):
            q_base_h = (first_h + pair // row) * TH
            q_base_w = (first_w + pair % row) * TW
            k_base_h = q_base_h - tiles_away_h * TH
            k_base_w = q_base_w - tiles_away_w * TW
            # lanes behind the window's end are none
            q_lane = tl.where((q_base_h + h < side_h) & (q_base_w + w < side_w), lane, BQ)
            k_lane = tl.where((k_base_h + h < side_h) & (k_base_w + w < side_w), lane, BQ)
            q_region = (base_h + q_base_h, base_w + q_base_w, TW, TH * TW, 0, 0)
            k_region = (base_h + k_base_h, base_w + k_base_w, TW, TH * TW, 0, 0)
            _, _, q_there, queries, above, inner, divisor = _asked(
                grad, q, lse, delta, q_lane, q_region, image, head, shape, ends, strides, KH, KW, DH, DW, D, E, BD, BE,
                MODE,
            )  # fmt: skip
            _, _, _, _, k_seen, keys, values = sources_of(
                k, v, valid, k_lane, k_region, image, head, shape, ends, strides, KH, KW, DH, DW, D, E, BD, BE,
                HAS_VALID, MODE,
            )  # fmt: skip
            scores = tl.dot(queries, tl.trans(keys), input_precision=PRECISION) * scale + entries
            scores = tl.where(q_there[:, None] & k_seen[None, :], scores, float("-inf"))
            weights = tl.exp(scores - divisor[:, None])
            total += weights * (tl.dot(above, tl.trans(values), input_precision=PRECISION) - inner[:, None])
    first = (part.to(tl.int64) * heads + head) * (2 * tiles_h - 1) + tiles_away_h + tiles_h - 1
    first = first * (2 * tiles_w - 1) + tiles_away_w + tiles_w - 1
    tl.store(pairs + first * (BQ * BQ) + lane[:, None] * BQ + lane[None, :], total)


@triton.jit
def _sum_differences(
    pairs, entries, rows, row, tile_h, tile_w, tiles_h, tiles_w, BQ: tl.constexpr, BO: tl.constexpr
):  # fmt: skip
    """[heads, rows, row], of _backward_differences' or _backward_at_once's: the sums over all pairs of each offset."""
    blocks = tl.cdiv(rows * row, BO)
    offset = tl.program_id(0) % blocks * BO + tl.arange(0, BO)
    head = (tl.program_id(0) // blocks).to(tl.int64)
    away_h = offset // row - rows // 2  # of a query from its source
    away_w = offset % row - row // 2
    lane = tl.arange(0, BQ)
    # the source's place, counted from as far before the query's tile as there are tiles: no number is negative
    from_h = (lane // tile_w)[:, None] - away_h[None, :] + tiles_h * tile_h
    from_w = (lane % tile_w)[:, None] - away_w[None, :] + tiles_w * tile_w
    seen = (from_h >= tile_h) & (from_h < 2 * tiles_h * tile_h) & (from_w >= tile_w) & (from_w < 2 * tiles_w * tile_w)
    seen = seen & (lane < tile_h * tile_w)[:, None] & (offset < rows * row)[None, :]
    first = head * (2 * tiles_h - 1) + 2 * tiles_h - 1 - from_h // tile_h
    first = first * (2 * tiles_w - 1) + 2 * tiles_w - 1 - from_w // tile_w
    where = lane[:, None] * BQ + from_h % tile_h * tile_w + from_w % tile_w
    total = tl.sum(tl.load(pairs + first * (BQ * BQ) + where, mask=seen, other=0.0), 0)
    tl.store(entries + head * rows * row + offset, total, mask=offset < rows * row)
