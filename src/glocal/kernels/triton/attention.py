"""Attention in blocks, on a GPU, to the sources of a rectangle: of a window, around each query, or of all the grid.

A program has a tile of queries of one head and goes through the rectangle of sources that any of them sees, block by
block, with a running softmax; the bias of a block is looked up in the table, used and forgotten. What the kernels of
attention_backward.py share with this one stands here, too.

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
# the grid of sources, how many of its columns come before the first query, windows' shift and sides (without windows,
# those of the whole grid), tiles along the axes (windows, or tiles of a class), heads. `table`: (heads' stride, images'
# stride, entry of offset 0, strides of an offset's row and column). `strides`: those of q, k, v and their gradients:
# image, token, head, of each.


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
def members_of(n, place, DILATION: tl.constexpr):
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
def locate(
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
def ends_of(extents, image, n_h, n_w, HAS_EXTENTS: tl.constexpr):
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
def corner(window, shape):
    """The first coordinates of a window."""
    _, _, _, _, _, _, side_h, side_w, tiles_h, tiles_w, _ = shape
    return window // tiles_w % tiles_h * side_h, window % tiles_w * side_w


@triton.jit
def owned(
    tile, shape, begin, TH: tl.constexpr, TW: tl.constexpr, BQ: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    MODE: tl.constexpr,
):  # fmt: skip
    """The lanes that a program has, and their rectangle: first coordinates, length of a row, lanes, class."""
    _, _, _, _, _, _, side_h, side_w, tiles_h, tiles_w, _ = shape
    lane = tl.arange(0, BQ)
    if MODE == "masked" or MODE == "shifted" or MODE == "causal":
        w = tile % tiles_w
        h = tile // tiles_w % tiles_h
        place = tile // (tiles_w * tiles_h)
        region = (h * TH, begin + w * TW, TW, TH * TW, place // DW, place % DW)
    else:
        parts = tl.cdiv(side_h * side_w, BQ)
        lane += tile % parts * BQ
        base_h, base_w = corner(tile // parts, shape)
        region = (base_h, base_w, side_w, side_h * side_w, 0, 0)
    return lane, region


@triton.jit
def _span(begin, n, end, place, T: tl.constexpr, K: tl.constexpr, DILATION: tl.constexpr, SEEING: tl.constexpr,
          WIDE: tl.constexpr, MODE: tl.constexpr):  # fmt: skip
    """Along an axis: what T neighboring queries see or, SEEING, who sees T neighboring sources; first and number.

    WIDE: whatever the extents of the image.
    """
    members = members_of(n, place, DILATION)
    limit = members_of(end, place, DILATION)
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
def across_of(
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
def rows_of(pointer, number, there, stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """[lanes, BLOCK]: the channels of some tokens; zero where there is none."""
    channel = tl.arange(0, BLOCK)
    where = number.to(tl.int64)[:, None] * stride + channel[None, :]
    return tl.load(pointer + where, mask=there[:, None] & (channel < WIDTH)[None, :], other=0.0)


@triton.jit
def write(pointer, number, there, stride, value, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    """What rows_of reads."""
    channel = tl.arange(0, BLOCK)
    where = number.to(tl.int64)[:, None] * stride + channel[None, :]
    value = value.to(pointer.dtype.element_ty)
    tl.store(pointer + where, value, mask=there[:, None] & (channel < WIDTH)[None, :])


@triton.jit
def program(extents, shape, TILES, HAS_EXTENTS: tl.constexpr):
    """Whose a program is: head, tile, image; where the image ends."""
    heads = shape[10]
    number = tl.program_id(0)
    image = (number // heads // TILES).to(tl.int64)
    return number % heads, number // heads % TILES, image, ends_of(extents, image, shape[2], shape[3], HAS_EXTENTS)


@triton.jit
def queries_of(
    q, lane, region, image, head, shape, ends, strides, KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr,
    DW: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Of each lane: coordinates, number in q, whether there is a query; its row of the outputs; its channels."""
    h, w, out, number, there = locate(lane, region, shape, ends, KH, KW, DH, DW, True, MODE)
    place = (image * shape[0] * shape[1] + out) * shape[10] + head
    rows = rows_of(q + image * strides[0] + head * strides[2], number, there, strides[1], D, BD)
    return h, w, number, there, place, rows


@triton.jit
def sources_of(
    k, v, valid, lane, region, image, head, shape, ends, strides, KH: tl.constexpr, KW: tl.constexpr,
    DH: tl.constexpr, DW: tl.constexpr, D: tl.constexpr, E: tl.constexpr, BD: tl.constexpr, BE: tl.constexpr,
    HAS_VALID: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Of each lane: coordinates, number, whether there is a source, whether it is seen; its key and its value."""
    h, w, _, number, there = locate(lane, region, shape, ends, KH, KW, DH, DW, False, MODE)
    seen = there
    if HAS_VALID:
        seen = there & (tl.load(valid + image * shape[2] * shape[3] + number, mask=there, other=0) != 0)
    keys = rows_of(k + image * strides[3] + head * strides[5], number, seen, strides[4], D, BD)
    values = rows_of(v + image * strides[6] + head * strides[8], number, seen, strides[7], E, BE)
    return h, w, number, there, seen, keys, values


@triton.jit
def entries_of(bias, table, away_h, away_w, seen, HAS_BIAS: tl.constexpr):
    """The biases of offsets; zero without any, or where nothing is seen."""
    entries = 0.0
    if HAS_BIAS:
        entries = tl.load(bias + away_h * table[3] + away_w * table[4], mask=seen, other=0.0).to(tl.float32)
    return entries


@triton.jit
def scores_of(
    products, q_h, q_w, q_there, k_h, k_w, k_seen, table, bias, scale, limits, KH: tl.constexpr, KW: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_EXTENTS: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Of queries and sources along axes of their own, in any order: -inf where a source is not seen."""
    seen = q_there & k_seen
    away_h = q_h - k_h
    away_w = q_w - k_w
    if MODE == "masked" or MODE == "shifted" or MODE == "causal":
        from_h = k_h - _first(q_h, limits[0], KH, MODE)
        from_w = k_w - _first(q_w, limits[1], KW, MODE)
        seen = seen & (from_h >= 0) & (from_h < KH) & (from_w >= 0) & (from_w < KW)
        if HAS_EXTENTS:  # queries behind an image's end have neighbors that no entry is for
            away_h = tl.minimum(tl.maximum(away_h, 1 - KH), KH - 1)
            away_w = tl.minimum(tl.maximum(away_w, 1 - KW), KW - 1)
    scores = products * scale + entries_of(bias, table, away_h, away_w, seen, HAS_BIAS)
    return tl.where(seen, scores, float("-inf"))


@triton.jit
def _forward(
    q, k, v, bias, valid, extents, out, lse, scale, shape, strides, table, begin,
    KH: tl.constexpr, KW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr, D: tl.constexpr, E: tl.constexpr,
    BD: tl.constexpr, BE: tl.constexpr, TH: tl.constexpr, TW: tl.constexpr, BQ: tl.constexpr, BN: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_VALID: tl.constexpr, HAS_EXTENTS: tl.constexpr, PRECISION: tl.constexpr,
    MODE: tl.constexpr, TILES,
):  # fmt: skip
    head, tile, image, ends = program(extents, shape, TILES, HAS_EXTENTS)
    bias += head * table[0] + image * table[1] + table[2]
    lane, region = owned(tile, shape, begin, TH, TW, BQ, DH, DW, MODE)
    q_h, q_w, _number, q_there, place, queries = queries_of(
        q, lane, region, image, head, shape, ends, strides, KH, KW, DH, DW, D, BD, MODE
    )
    limits = (members_of(ends[0], region[4], DH), members_of(ends[1], region[5], DW))
    across = across_of(region, shape, ends, KH, KW, DH, DW, TH, TW, False, False, MODE)
    most = tl.full([BQ], float("-inf"), tl.float32)
    divisor = tl.zeros([BQ], tl.float32)
    total = tl.zeros([BQ, BE], tl.float32)
    for start in range(0, across[3], BN):
        k_h, k_w, _, _, seen, keys, values = sources_of(
            k, v, valid, start + tl.arange(0, BN), across, image, head, shape, ends, strides, KH, KW, DH, DW, D, E, BD,
            BE, HAS_VALID, MODE,
        )  # fmt: skip
        scores = scores_of(
            tl.dot(queries, tl.trans(keys), input_precision=PRECISION), q_h[:, None], q_w[:, None], q_there[:, None],
            k_h[None, :], k_w[None, :], seen[None, :], table, bias, scale, limits, KH, KW, HAS_BIAS, HAS_EXTENTS, MODE,
        )  # fmt: skip
        higher = tl.maximum(most, tl.max(scores, 1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - base[:, None])
        kept = tl.exp(most - base)
        total = total * kept[:, None] + tl.dot(weights.to(values.dtype), values, input_precision=PRECISION)
        divisor = divisor * kept + tl.sum(weights, 1)
        most = higher
    some = divisor > 0
    divisor = tl.where(some, divisor, 1.0)
    write(out, place, q_there, E, total / divisor[:, None], E, BE)
    tl.store(lse + place, tl.where(some, most + tl.log(divisor), 0.0), mask=q_there)
