"""Attention in blocks, on a GPU, to the sources of a rectangle: of a window, around each query, or of all the grid.

A program has a tile of queries of one head and goes through the rectangle of sources that any of them sees, block by
block, with a running softmax; the bias of a block is looked up in the table, used and forgotten. Backward, one kernel
goes through the sources for each tile of queries, another through the queries for each tile of sources, and a third
adds the gradients of the biases over images, pair by pair; a fourth sums these over the pairs of each offset. Each
number is written by one program: nothing depends on their order.

`mode` says who sees whom. "global": everyone everyone. "window": windows that end at shift + m * window; "rolled":
those of timm (see window_attention.py). "masked", "shifted", "causal": neighborhoods; queries and sources are then
counted among the tokens with the same place modulo the dilation, their class. In all modes a token has a coordinate
along each axis (in a window's mode: its slot), differences of which are the offsets of the table.

Shape letters: B batch, H x W grid of queries, G heads, D channels of a head, E of a value. Blocks: BQ of what a program
owns, BN of what it goes through. A sequence is an image of one row.
"""

import triton
import triton.language as tl

# `shape`, a tuple: (out_h, out_w, n_h, n_w, past, shift, side_h, side_w, tiles_h, tiles_w, heads): the grid of outputs,
# the grid of sources, how many of its columns come before the first query, windows' shift and sides, tiles along the
# axes (windows, or tiles of a class), heads. `table`: (heads' stride, images' stride, entry of offset 0, strides of an
# offset's row and column). `strides`: those of q, k and v: image, token, head, of each.


@triton.jit
def _first(member, limit, K: tl.constexpr, MODE: tl.constexpr):
    """The first neighbor of a query along an axis, `limit`: how many members its class has."""
    first = member - K // 2
    if MODE == "causal":
        first = member - (K - 1)
    if MODE == "shifted":
        first = tl.maximum(tl.minimum(first, limit - K), 0)
    return first


@triton.jit
def _members(n, place, DILATION: tl.constexpr):
    """How many of n tokens are in the class of those with this place."""
    return (n - place + DILATION - 1) // DILATION


@triton.jit
def _token(
    at, n, size, side, shift, end, place, K: tl.constexpr, DILATION: tl.constexpr, QUERY: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """The token with a coordinate along one axis, and whether there is one."""
    if MODE == "window":
        token = at - tl.where(end > K, (K - shift) % K, 0)
        there = (token >= 0) & (token < end)
    elif MODE == "rolled":
        back = tl.where(n > K, shift, 0)
        moved = at >= n - back + side
        there = ((at < n - back) | moved) & (at < n + side)
        slot = tl.where(moved, at - side, at)
        token = tl.where(slot < size, (slot + back) % size, slot)
        if QUERY:
            there = there & (token < size)
    elif MODE == "global":
        token = at
        there = (at >= 0) & (at < n)
    else:
        token = place + DILATION * at
        there = (at >= 0) & (token < n)
        if not QUERY:
            there = there & (token < end)
    return token, there


@triton.jit
def _locate(
    lane, region, shape, ends, KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    QUERY: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Of each lane of a rectangle: coordinates, number among the outputs, among q or the sources, whether it is."""
    out_h, out_w, n_h, n_w, past, shift, side_h, side_w, _, _, _ = shape
    base_h, base_w, row, count, place_h, place_w = region
    h = base_h + lane // row
    w = base_w + lane % row
    token_h, there_h = _token(h, n_h, out_h, side_h, shift, ends[0], place_h, KH, DH, QUERY, MODE)
    token_w, there_w = _token(w, n_w, out_w, side_w, shift, ends[1], place_w, KW, DW, QUERY, MODE)
    there = there_h & there_w & (lane < count)
    if QUERY:
        token_w = token_w - past
        there = there & (token_w >= 0)
        number = token_h * (n_w - past) + token_w
    else:
        number = token_h * n_w + token_w
    return h, w, token_h * out_w + token_w, number, there


@triton.jit
def _ends(extents, image, n_h, n_w, HAS_EXTENTS: tl.constexpr):
    """Where an image ends along each axis."""
    if HAS_EXTENTS:
        ends = (
            tl.minimum(tl.maximum(tl.load(extents + 2 * image), 0), n_h).to(tl.int32),
            tl.minimum(tl.maximum(tl.load(extents + 2 * image + 1), 0), n_w).to(tl.int32),
        )
    else:
        ends = (n_h, n_w)
    return ends


@triton.jit
def _owned(
    tile, shape, begin, TH: tl.constexpr, TW: tl.constexpr, BQ: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """The lanes that a program has, and their rectangle: first coordinates, length of a row, lanes, class."""
    _, _, n_h, n_w, _, _, side_h, side_w, tiles_h, tiles_w, _ = shape
    lane = tl.arange(0, BQ)
    if MODE == "global":
        lane += tile * BQ
        region = (tile * 0, tile * 0, n_w, n_h * n_w, 0, 0)
    elif MODE == "window" or MODE == "rolled":
        parts = tl.cdiv(side_h * side_w, BQ)
        lane += tile % parts * BQ
        window = tile // parts
        region = (window // tiles_w % tiles_h * side_h, window % tiles_w * side_w, side_w, side_h * side_w, 0, 0)
    else:
        w = tile % tiles_w
        h = tile // tiles_w % tiles_h
        place = tile // (tiles_w * tiles_h)
        region = (h * TH, begin + w * TW, TW, TH * TW, place // DW, place % DW)
    return lane, region


@triton.jit
def _span(begin, n, end, place, T: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr, SEEING: tl.constexpr,
          WIDE: tl.constexpr, MODE: tl.constexpr):  # fmt: skip
    """Along an axis: what T neighboring queries see or, SEEING, who sees T neighboring sources; first and number.

    WIDE: whatever the extents of the image.
    """
    members = _members(n, place, DILATION)
    limit = _members(end, place, DILATION)
    if MODE == "causal":
        if SEEING:
            first, behind = begin, begin + T + K - 1
        else:
            first, behind = begin - (K - 1), begin + T
    elif MODE == "masked":
        first, behind = begin - K // 2, begin + T + K // 2
    else:
        if WIDE:
            first, behind = begin - (K - 1), begin + T + K - 1
        elif SEEING:
            first = tl.where(begin < K, 0, begin - K // 2)
            behind = tl.where(begin + T > limit - K, members, begin + T + K // 2)
        else:
            first = _first(begin, limit, K, MODE)
            behind = _first(begin + T - 1, limit, K, MODE) + K
    first = tl.maximum(first, 0)
    return first, tl.maximum(tl.minimum(behind, members) - first, 0)


@triton.jit
def _across(
    region, shape, ends, KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, TH: tl.constexpr,
    TW: tl.constexpr, SEEING: tl.constexpr, WIDE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """The rectangle that a program goes through."""
    if MODE == "masked" or MODE == "shifted" or MODE == "causal":
        first_h, rows = _span(region[0], shape[2], ends[0], region[4], TH, KH, DH, SEEING, WIDE, MODE)
        first_w, row = _span(region[1], shape[3], ends[1], region[5], TW, KW, DW, SEEING, WIDE, MODE)
        found = (first_h, first_w, tl.maximum(row, 1), rows * row, region[4], region[5])
    else:
        found = region
    return found


@triton.jit
def _rows(pointer, number, there, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[lanes, BLOCK]: the channels of some tokens; zero where there is none."""
    channel = tl.arange(0, BLOCK)
    where = number.to(tl.int64)[:, None] * stride + channel[None, :]
    return tl.load(pointer + where, mask=there[:, None] & (channel < WIDTH)[None, :], other=0.0)


@triton.jit
def _write(pointer, number, there, stride, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    channel = tl.arange(0, BLOCK)
    where = number.to(tl.int64)[:, None] * stride + channel[None, :]
    value = value.to(pointer.dtype.element_ty)
    tl.store(pointer + where, value, mask=there[:, None] & (channel < WIDTH)[None, :])


@triton.jit
def _scores(
    q, k, q_h, q_w, q_there, k_h, k_w, k_there, table, bias, scale, limits, KH: tl.constexpr, KW: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_EXTENTS: tl.constexpr, PRECISION: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """[queries, sources], -inf where a source is not seen."""
    seen = q_there[:, None] & k_there[None, :]
    near: tl.constexpr = MODE == "masked" or MODE == "shifted" or MODE == "causal"
    if near:
        from_h = k_h[None, :] - _first(q_h, limits[0], KH, MODE)[:, None]
        from_w = k_w[None, :] - _first(q_w, limits[1], KW, MODE)[:, None]
        seen = seen & (from_h >= 0) & (from_h < KH) & (from_w >= 0) & (from_w < KW)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    if HAS_BIAS:
        away_h = q_h[:, None] - k_h[None, :]
        away_w = q_w[:, None] - k_w[None, :]
        if near and HAS_EXTENTS:  # queries behind an image's end have neighbors that no entry is for
            away_h = tl.minimum(tl.maximum(away_h, 1 - KH), KH - 1)
            away_w = tl.minimum(tl.maximum(away_w, 1 - KW), KW - 1)
        scores += tl.load(bias + away_h * table[3] + away_w * table[4], mask=seen, other=0.0).to(tl.float32)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _see(valid, image, number, there, count, HAS_VALID: tl.constexpr):
    if HAS_VALID:
        there = there & (tl.load(valid + image.to(tl.int64) * count + number, mask=there, other=0) != 0)
    return there


@triton.jit
def _forward(
    q, k, v, bias, valid, extents, out, lse, scale, shape, strides, table, begin,
    KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_EXTENTS: tl.constexpr, PRECISION: tl.constexpr,
    MODE: tl.constexpr, TILES,
):  # fmt: skip
    heads = shape[10]
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads % TILES
    image = tl.program_id(0) // heads // TILES
    ends = _ends(extents, image, shape[2], shape[3], HAS_EXTENTS)
    far = image.to(tl.int64)
    q += far * strides[0] + head * strides[2]
    k += far * strides[3] + head * strides[5]
    v += far * strides[6] + head * strides[8]
    bias += head * table[0] + far * table[1] + table[2]
    lane, region = _owned(tile, shape, begin, TH, TW, BQ, DH, DW, MODE)
    q_h, q_w, q_out, q_number, q_there = _locate(lane, region, shape, ends, KH, KW, DH, DW, True, MODE)
    queries = _rows(q, q_number, q_there, strides[1], D, BD)
    limits = (_members(ends[0], region[4], DH), _members(ends[1], region[5], DW))
    across = _across(region, shape, ends, KH, KW, DH, DW, TH, TW, False, False, MODE)
    most = tl.full([BQ], float("-inf"), tl.float32)
    divisor = tl.zeros([BQ], tl.float32)
    total = tl.zeros([BQ, BE], tl.float32)
    for start in range(0, across[3], BN):
        k_h, k_w, _, number, there = _locate(start + tl.arange(0, BN), across, shape, ends, KH, KW, DH, DW, False, MODE)
        there = _see(valid, image, number, there, shape[2] * shape[3], HAS_VALID)
        keys = _rows(k, number, there, strides[4], D, BD)
        scores = _scores(
            queries, keys, q_h, q_w, q_there, k_h, k_w, there, table, bias, scale, limits, KH, KW, HAS_BIAS,
            HAS_EXTENTS, PRECISION, MODE,
        )  # fmt: skip
        higher = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - base[:, None])
        kept = tl.exp(most - base)
        values = _rows(v, number, there, strides[7], E, BE)
        total = total * kept[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        divisor = divisor * kept + tl.sum(weights, 1)
        most = higher
    some = divisor > 0
    divisor = tl.where(some, divisor, 1.0)
    place = (far * shape[0] * shape[1] + q_out) * heads + head
    _write(out, place, q_there, E, total / divisor[:, None], E, BE)
    tl.store(lse + place, tl.where(some, most + tl.log(divisor), 0.0), mask=q_there)


@triton.jit
def _backward_queries(
    grad, q, k, v, bias, valid, extents, out, lse, delta, dq, scale, shape, strides, table, begin,
    KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_EXTENTS: tl.constexpr, PRECISION: tl.constexpr,
    MODE: tl.constexpr, TILES,
):  # fmt: skip
    """The gradient of a tile of queries, and delta, the inner product of each output and its gradient."""
    heads = shape[10]
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads % TILES
    image = tl.program_id(0) // heads // TILES
    ends = _ends(extents, image, shape[2], shape[3], HAS_EXTENTS)
    far = image.to(tl.int64)
    q += far * strides[0] + head * strides[2]
    k += far * strides[3] + head * strides[5]
    v += far * strides[6] + head * strides[8]
    dq += far * strides[9] + head * strides[11]
    bias += head * table[0] + far * table[1] + table[2]
    lane, region = _owned(tile, shape, begin, TH, TW, BQ, DH, DW, MODE)
    q_h, q_w, q_out, q_number, q_there = _locate(lane, region, shape, ends, KH, KW, DH, DW, True, MODE)
    queries = _rows(q, q_number, q_there, strides[1], D, BD)
    place = (far * shape[0] * shape[1] + q_out) * heads + head
    above = _rows(grad, place, q_there, E, E, BE)
    result = _rows(out, place, q_there, E, E, BE)
    inner = tl.sum(above.to(tl.float32) * result.to(tl.float32), 1)
    tl.store(delta + place, inner, mask=q_there)
    divisor = tl.load(lse + place, mask=q_there, other=0.0)
    limits = (_members(ends[0], region[4], DH), _members(ends[1], region[5], DW))
    across = _across(region, shape, ends, KH, KW, DH, DW, TH, TW, False, False, MODE)
    total = tl.zeros([BQ, BD], tl.float32)
    for start in range(0, across[3], BN):
        k_h, k_w, _, number, there = _locate(start + tl.arange(0, BN), across, shape, ends, KH, KW, DH, DW, False, MODE)
        there = _see(valid, image, number, there, shape[2] * shape[3], HAS_VALID)
        keys = _rows(k, number, there, strides[4], D, BD)
        scores = _scores(
            queries, keys, q_h, q_w, q_there, k_h, k_w, there, table, bias, scale, limits, KH, KW, HAS_BIAS,
            HAS_EXTENTS, PRECISION, MODE,
        )  # fmt: skip
        weights = tl.exp(scores - divisor[:, None])
        values = _rows(v, number, there, strides[7], E, BE)
        slope = weights * (tl.dot(above, tl.trans(values), input_precision=PRECISION) - inner[:, None])
        total += tl.dot(slope.to(keys.dtype), keys, input_precision=PRECISION)
    _write(dq, q_number, q_there, strides[10], total * scale, D, BD)


@triton.jit
def _backward_sources(
    grad, q, k, v, bias, valid, extents, lse, delta, dk, dv, scale, shape, strides, table,
    KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_EXTENTS: tl.constexpr, PRECISION: tl.constexpr,
    MODE: tl.constexpr, TILES,
):  # fmt: skip
    """The gradients of a tile of sources."""
    heads = shape[10]
    head = tl.program_id(0) % heads
    tile = tl.program_id(0) // heads % TILES
    image = tl.program_id(0) // heads // TILES
    ends = _ends(extents, image, shape[2], shape[3], HAS_EXTENTS)
    far = image.to(tl.int64)
    q += far * strides[0] + head * strides[2]
    k += far * strides[3] + head * strides[5]
    v += far * strides[6] + head * strides[8]
    dk += far * strides[12] + head * strides[14]
    dv += far * strides[15] + head * strides[17]
    bias += head * table[0] + far * table[1] + table[2]
    lane, region = _owned(tile, shape, 0, TH, TW, BQ, DH, DW, MODE)
    k_h, k_w, _, k_number, k_there = _locate(lane, region, shape, ends, KH, KW, DH, DW, False, MODE)
    k_seen = _see(valid, image, k_number, k_there, shape[2] * shape[3], HAS_VALID)
    keys = _rows(k, k_number, k_seen, strides[4], D, BD)
    values = _rows(v, k_number, k_seen, strides[7], E, BE)
    limits = (_members(ends[0], region[4], DH), _members(ends[1], region[5], DW))
    across = _across(region, shape, ends, KH, KW, DH, DW, TH, TW, True, False, MODE)
    total_k = tl.zeros([BQ, BD], tl.float32)
    total_v = tl.zeros([BQ, BE], tl.float32)
    for start in range(0, across[3], BN):
        q_h, q_w, q_out, q_number, q_there = _locate(
            start + tl.arange(0, BN), across, shape, ends, KH, KW, DH, DW, True, MODE
        )
        queries = _rows(q, q_number, q_there, strides[1], D, BD)
        scores = _scores(
            queries, keys, q_h, q_w, q_there, k_h, k_w, k_seen, table, bias, scale, limits, KH, KW, HAS_BIAS,
            HAS_EXTENTS, PRECISION, MODE,
        )  # fmt: skip
        place = (far * shape[0] * shape[1] + q_out) * heads + head
        above = _rows(grad, place, q_there, E, E, BE)
        inner = tl.load(delta + place, mask=q_there, other=0.0)
        divisor = tl.load(lse + place, mask=q_there, other=0.0)
        weights = tl.exp(scores - divisor[:, None])
        total_v += tl.dot(tl.trans(weights.to(above.dtype)), above, input_precision=PRECISION)
        slope = weights * (tl.dot(above, tl.trans(values), input_precision=PRECISION) - inner[:, None])
        total_k += tl.dot(tl.trans(slope.to(queries.dtype)), queries, input_precision=PRECISION)
    _write(dk, k_number, k_there, strides[13], total_k * scale, D, BD)
    _write(dv, k_number, k_there, strides[16], total_v, E, BE)


@triton.jit
def _backward_pairs(
    grad, q, k, v, bias, valid, extents, lse, delta, pairs, scale, shape, strides, table, begin, images, each,
    KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_EXTENTS: tl.constexpr, PRECISION: tl.constexpr,
    MODE: tl.constexpr, TILES, BLOCKS, WINDOWS,
):  # fmt: skip
    """[parts, heads, TILES, BLOCKS, BQ, BN]: gradients of scores, summed over `each` of the images (or windows)."""
    heads = shape[10]
    program = tl.program_id(0)
    head = program % heads
    block = program // heads % BLOCKS
    tile = program // heads // BLOCKS % TILES
    part = program // heads // BLOCKS // TILES
    total = tl.zeros([BQ, BN], tl.float32)
    for number in range(part * each, tl.minimum(part * each + each, images)):
        image = number // WINDOWS
        ends = _ends(extents, image, shape[2], shape[3], HAS_EXTENTS)
        far = tl.full([], 0, tl.int64) + image
        entries = bias + head * table[0] + far * table[1] + table[2]
        lane, region = _owned(number % WINDOWS * TILES + tile, shape, begin, TH, TW, BQ, DH, DW, MODE)
        q_h, q_w, q_out, q_number, q_there = _locate(lane, region, shape, ends, KH, KW, DH, DW, True, MODE)
        queries = _rows(q + far * strides[0] + head * strides[2], q_number, q_there, strides[1], D, BD)
        limits = (_members(ends[0], region[4], DH), _members(ends[1], region[5], DW))
        across = _across(region, shape, ends, KH, KW, DH, DW, TH, TW, False, HAS_EXTENTS, MODE)
        k_h, k_w, _, k_number, k_there = _locate(
            block * BN + tl.arange(0, BN), across, shape, ends, KH, KW, DH, DW, False, MODE
        )
        k_there = _see(valid, far, k_number, k_there, shape[2] * shape[3], HAS_VALID)
        keys = _rows(k + far * strides[3] + head * strides[5], k_number, k_there, strides[4], D, BD)
        values = _rows(v + far * strides[6] + head * strides[8], k_number, k_there, strides[7], E, BE)
        scores = _scores(
            queries, keys, q_h, q_w, q_there, k_h, k_w, k_there, table, entries, scale, limits, KH, KW, HAS_BIAS,
            HAS_EXTENTS, PRECISION, MODE,
        )  # fmt: skip
        place = (far * shape[0] * shape[1] + q_out) * heads + head
        above = _rows(grad, place, q_there, E, E, BE)
        inner = tl.load(delta + place, mask=q_there, other=0.0)
        divisor = tl.load(lse + place, mask=q_there, other=0.0)
        weights = tl.exp(scores - divisor[:, None])
        total += weights * (tl.dot(above, tl.trans(values), input_precision=PRECISION) - inner[:, None])
    first = (((tl.full([], 0, tl.int64) + part) * heads + head) * TILES + tile) * BLOCKS + block
    where = tl.arange(0, BQ)[:, None] * BN + tl.arange(0, BN)[None, :]
    tl.store(pairs + first * (BQ * BN) + where, total)


@triton.jit
def _sum_pairs(
    pairs, entries, shape, table, begin, rows, row, zero_h, zero_w, KH: tl.constexpr, KW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    BO: tl.constexpr, HAS_EXTENTS: tl.constexpr, MODE: tl.constexpr, TILES, BLOCKS,
):  # fmt: skip
    """[parts, heads, rows, row]: the sums over all pairs with the same offset; entry (zero_h, zero_w) is offset 0."""
    blocks = tl.cdiv(rows * row, BO)
    offset = tl.program_id(0) % blocks * BO + tl.arange(0, BO)
    head = tl.program_id(0) // blocks  # parts and heads
    away_h = offset // row - zero_h
    away_w = offset % row - zero_w
    if MODE == "masked" or MODE == "shifted" or MODE == "causal":
        away_h = -away_h
        away_w = -away_w
    ends = (shape[2], shape[3])
    total = tl.zeros([BO], tl.float32)
    for tile in range(0, TILES):
        lane, region = _owned(tile, shape, begin, TH, TW, BQ, DH, DW, MODE)
        across = _across(region, shape, ends, KH, KW, DH, DW, TH, TW, False, HAS_EXTENTS, MODE)
        from_h = (region[0] + lane // region[2])[:, None] - away_h[None, :] - across[0]
        from_w = (region[1] + lane % region[2])[:, None] - away_w[None, :] - across[1]
        at = from_h * across[2] + from_w
        seen = (from_h >= 0) & (from_w >= 0) & (from_w < across[2]) & (at < across[3])
        seen = seen & (lane < region[3])[:, None] & (offset < rows * row)[None, :]
        first = ((head.to(tl.int64) * TILES + tile) * BLOCKS) * (BQ * BN)
        where = at // BN * (BQ * BN) + tl.arange(0, BQ)[:, None] * BN + at % BN
        total += tl.sum(tl.load(pairs + first + where, mask=seen, other=0.0), 0)
    tl.store(entries + head.to(tl.int64) * rows * row + offset, total, mask=offset < rows * row)
