"""The kernels of attention.py and attention_backward.py called for windows, neighborhoods and whole grids."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
import triton
from torch import Tensor

from glocal.kernels.triton import attention, attention_backward, tuning

PROGRAMS = 1024  # so many to twice as many, if there are so many images, add up the gradients of biases
AT_ONCE = 64  # tokens of a window, at most, all of whose gradients are taken at once
OFFSETS = 64  # entries of a table that a program sums


@dataclass(frozen=True)
class Layout:
    """Who sees whom; see attention.py for the modes. Axes are two, of a sequence the first has length 1.

    Args:
        mode: which.
        grid: of the outputs.
        sources: their grid.
        window: lengths of the window or of the kernel.
        table: what attention.py says.
        entries: axes of a table.
        dilation: of each axis.
        past: columns of sources before the first query.
        shift: of windows.
    """

    mode: str
    grid: tuple[int, int]
    sources: tuple[int, int]
    window: tuple[int, int]
    table: tuple[int, int, int, int, int]
    entries: tuple[int, int]
    dilation: tuple[int, int] = (1, 1)
    past: int = 0
    shift: int = 0

    @property
    def near(self) -> bool:
        return self.mode in ("masked", "shifted", "causal")

    def sides(self) -> tuple[int, int]:
        """Of a window as it is cut out, or of the whole grid: all in it see each other."""
        if self.mode == "global":
            return self.sources
        h, w = (min(n, k) for n, k in zip(self.sources, self.window, strict=True))
        return h, w

    def windows(self) -> tuple[int, int]:
        if self.mode == "global":
            return 1, 1
        found = []
        for n, window in zip(self.sources, self.window, strict=True):
            if n <= window:
                found.append(1)
            elif self.mode == "rolled":
                found.append(n // window + (self.shift > 0))
            else:
                found.append(triton.cdiv(n + (window - self.shift) % window, window))
        return found[0], found[1]

    def block(self, q: Tensor, v: Tensor) -> int:
        """Tokens of a tile; more do not fit into registers."""
        short, width = q.element_size() == 2, max(q.shape[-1], v.shape[-1])
        most = 64 if short and width <= 64 else 32 if short or width <= 64 else 16
        return most if self.near else min(most, self._area())

    def at_once(self, q: Tensor, v: Tensor) -> int:
        """Tokens of a block that holds a whole window, or 0: backward goes through tiles."""
        width = max(q.shape[-1], v.shape[-1])
        if q.element_size() == 2:
            most = 64 if width <= 128 else 32
        else:
            most = 32 if width <= 32 else 16 if width <= 64 else 0
        return self._area() if not self.near and self._area() <= min(most, AT_ONCE) else 0

    def _area(self) -> int:
        return max(triton.next_power_of_2(math.prod(self.sides())), 16)

    def tile(self, block: int) -> tuple[int, int]:
        """Of neighboring tokens, in their class."""
        height = 1 if self.sources[0] == 1 else 2 ** (int(math.log2(block)) // 2)
        if not self.near:  # no longer than all there is
            rows, row = (triton.next_power_of_2(n) for n in self.sides())
            height = max(min(height, rows), block // row)
        return height, block // height

    def tiles(self, block: int, *, queries: bool) -> tuple[int, int, int, int]:
        """How many in an image; along the axes; and the first member of the classes that a tile has."""
        if not self.near:
            h, w = self.windows()
            return h * w * triton.cdiv(math.prod(self.sides()), block), h, w, 0
        begin = self.past // self.dilation[1] if queries else 0
        members = [triton.cdiv(n, d) for n, d in zip(self.sources, self.dilation, strict=True)]
        tile = self.tile(block)
        h, w = triton.cdiv(members[0], tile[0]), triton.cdiv(members[1] - begin, tile[1])
        return h * w * math.prod(self.dilation), h, w, begin

    def shape(self, heads: int, tiles: Sequence[int]) -> tuple[int, ...]:
        return *self.grid, *self.sources, self.past, self.shift, *self.sides(), *tiles[1:3], heads

    def blocks(self, block: int, *, wide: bool) -> int:
        """Of sources that a tile of queries goes through, at most, in neighborhoods."""
        margins = [(2 if wide else 1) * (k - 1) for k in self.window]
        members = [triton.cdiv(n, d) for n, d in zip(self.sources, self.dilation, strict=True)]
        spans = zip(self.tile(block), margins, members, strict=True)
        return triton.cdiv(math.prod(min(t + m, n) for t, m, n in spans), block)

    def constants(self, q: Tensor, v: Tensor, bias: Any, valid: Any, extents: Any, block: int) -> dict[str, Any]:
        return {
            "KH": self.window[0],
            "KW": self.window[1],
            "DH": self.dilation[0],
            "DW": self.dilation[1],
            "D": q.shape[-1],
            "E": v.shape[-1],
            "BD": _power(q),
            "BE": _power(v),
            "TH": self.tile(block)[0],
            "TW": self.tile(block)[1],
            "BQ": block,
            "BN": block,
            "HAS_BIAS": bias is not None,
            "HAS_VALID": valid is not None,
            "HAS_EXTENTS": extents is not None,
            "PRECISION": "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee",
            "MODE": self.mode,
        }


Kind = Literal["queries", "sources", "pairs", "at once"]


def _configurations(kernel: Kind, q: Tensor, v: Tensor, block: int) -> list[tuning.Configuration]:
    """How a kernel may be launched: of what it keeps in registers no thread may have too much.

    Those that have tiles for themselves may have some of half the size; what others read is cut as they are told.
    """
    short, width = q.element_size() == 2, max(_power(q), _power(v))
    large = block * width > 64 * 32
    if block < 32:
        warps = 2 if short or width <= 32 else 4 if width <= 128 and kernel != "pairs" else 8
    elif kernel == "queries" or (kernel == "sources" and block == 32 and (short or width <= 32)):
        warps = 4
    else:
        warps = 4 if kernel == "at once" and short and not large else 8
    stages = 1 if large and (kernel == "at once" or (kernel == "sources" and block == 64)) else 2
    first = {"BLOCK": block, "num_warps": warps, "num_stages": stages}
    found: list[tuning.Configuration] = [first, *({**first, "num_stages": n} for n in (1, 2, 3) if n != stages)]
    if warps < 8:
        found.append({**first, "num_warps": 2 * warps})
    if kernel in ("queries", "sources") and block >= 32:
        found.append({"BLOCK": block // 2, "num_warps": 4, "num_stages": 2})
    return found


def _power(tensor: Tensor) -> int:
    """Of two, that holds the channels of a head."""
    return max(triton.next_power_of_2(tensor.shape[-1]), 16)


def forward(
    layout: Layout, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, valid: Tensor | None,
    extents: Tensor | None, scale: float, out: Tensor,
) -> Tensor:  # fmt: skip
    """Writes `out`, [B, *grid, G, E], where there are queries; returns the logarithms of the softmaxes' divisors.

    q, k, v [B, tokens, G, channels]; bias: what `layout.table` indexes; valid: [B, tokens]; extents int64 [B, 2].
    """
    heads = q.shape[2]
    lse = out.new_empty(out.shape[0], *layout.grid, heads, dtype=torch.float32)
    if not (out.numel() and k.numel()):
        out.zero_()
        return lse.zero_()
    q, k, v = (_in_order(t) for t in (q, k, v))

    def run(tiles: Sequence[int], options: dict[str, Any]) -> None:
        attention._forward[(len(q) * heads * tiles[0],)](
            q, k, v, *_given(q, bias, valid, extents), out, lse, float(scale), layout.shape(heads, tiles),
            _strides(q, k, v), layout.table, tiles[3], **options, TILES=tiles[0],
        )  # fmt: skip

    with torch.cuda.device_of(q):
        _tuned("queries", attention._forward, layout, (q, v, bias, valid, extents), run, layout.block(q, v))
    return lse


def _tuned(
    kind: Kind, kernel: Any, layout: Layout, given: tuple[Any, Any, Any, Any, Any],
    run: Callable[[Sequence[int], dict[str, Any]], None], block: int, *, queries: bool = True,
) -> None:  # fmt: skip
    """Runs a kernel, on tiles of queries or of sources, with the configuration that is fastest in such calls."""
    q, v = given[:2]
    constants = layout.constants(*given, block)
    about = *constants.items(), q.dtype, q.shape[2], layout.past, *tuning.classes(len(q), *layout.sources)

    def launch(choice: tuning.Configuration) -> None:
        own = choice["BLOCK"]
        options = constants if own == block else layout.constants(*given, own)
        options = {**options, "num_warps": choice["num_warps"], "num_stages": choice["num_stages"]}
        run(layout.tiles(own, queries=queries), options)

    tuning.run(kernel, about, _configurations(kind, q, v, block), launch, q.device)


def backward(
    layout: Layout, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, valid: Tensor | None,
    extents: Tensor | None, scale: float, found: Sequence[Tensor], saved: tuple[Tensor, Tensor] | None = None,
    *, of_each: bool = False,
) -> Tensor | None:  # fmt: skip
    """Writes the gradients of q, k and v, tensors like them; returns the table's, float32 [B or 1, G, *entries].

    saved: what `forward` wrote and returned; without it that is computed again, unless all gradients are taken at once.
    of_each: every image has a table of its own.

    Memory: where there is a table, up to 2*PROGRAMS * BQ * BN numbers or, if that is more, the pairs of tiles: BQ * BQ
    for each head, (2*S_h/TH - 1) * (2*S_w/TW - 1) times as many for whole grids and windows, of S_h x S_w, that do not
    fit into a block, but are cut into tiles of TH x TW = BQ. For a grid of N tokens these are about 4 * G * N * BQ, B
    times as many with tables of each image. Neighborhoods have G * N times the sources that a tile of queries sees.
    """
    heads = q.shape[2]
    if not (grad.numel() and k.numel()):
        for each in found:
            each.zero_()
        tables = len(q) if of_each else 1
        return None if bias is None else q.new_zeros(tables, heads, *layout.entries, dtype=torch.float32)
    q, k, v, grad = (*(_in_order(t) for t in (q, k, v)), grad.contiguous())
    way = _at_once if layout.at_once(q, v) else _by_tiles
    with torch.cuda.device_of(q):
        return way(layout, grad, q, k, v, bias, valid, extents, float(scale), found, saved, of_each)


def _at_once(
    layout: Layout, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, valid: Tensor | None,
    extents: Tensor | None, scale: float, found: Sequence[Tensor], saved: Any, of_each: bool,
) -> Tensor | None:  # fmt: skip
    """By programs that have whole windows."""
    heads, block = q.shape[2], layout.at_once(q, v)
    tiles = layout.tiles(block, queries=True)
    windows = len(q) * tiles[0]
    parts, each = _parts(windows, heads, tiles[0] if of_each else 0)
    pairs = q.new_empty(parts if bias is not None else 0, heads, block, block, dtype=torch.float32)

    def run(tiles: Sequence[int], options: dict[str, Any]) -> None:
        attention_backward._backward_at_once[(parts * heads,)](
            grad, q, k, v, *_given(q, bias, valid, extents), *found, pairs, scale, layout.shape(heads, tiles),
            _strides(q, k, v, *found), layout.table, windows, each, **options, WINDOWS=tiles[0],
        )  # fmt: skip

    kernel = attention_backward._backward_at_once
    _tuned("at once", kernel, layout, (q, v, bias, valid, extents), run, block)
    return None if bias is None else _table(layout, pairs, layout.sides(), (1, 1), of_each)


def _by_tiles(
    layout: Layout, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, valid: Tensor | None,
    extents: Tensor | None, scale: float, found: Sequence[Tensor], saved: tuple[Tensor, Tensor] | None, of_each: bool,
) -> Tensor | None:  # fmt: skip
    """By programs that have tiles of queries, of sources, and pairs of them."""
    heads = q.shape[2]
    if saved is None:
        out = grad.new_empty(grad.shape)
        saved = out, forward(layout, q, k, v, bias, valid, extents, scale, out)
    out, lse = (t.contiguous() for t in saved)
    delta = torch.empty_like(lse)
    given, strides, block = _given(q, bias, valid, extents), _strides(q, k, v, *found), layout.block(q, v)
    about = (q, v, bias, valid, extents)

    def run_queries(tiles: Sequence[int], options: dict[str, Any]) -> None:
        attention_backward._backward_queries[(len(q) * heads * tiles[0],)](
            grad, q, k, v, *given, out, lse, delta, found[0], scale, layout.shape(heads, tiles), strides,
            layout.table, tiles[3], **options, TILES=tiles[0],
        )  # fmt: skip

    def run_sources(tiles: Sequence[int], options: dict[str, Any]) -> None:
        attention_backward._backward_sources[(len(q) * heads * tiles[0],)](
            grad, q, k, v, *given, lse, delta, found[1], found[2], scale, layout.shape(heads, tiles), strides,
            layout.table, **options, TILES=tiles[0],
        )  # fmt: skip

    _tuned("queries", attention_backward._backward_queries, layout, about, run_queries, block)
    _tuned("sources", attention_backward._backward_sources, layout, about, run_sources, block, queries=False)
    if bias is None:
        return None
    constants = layout.constants(*about, block)
    tiles = layout.tiles(block, queries=True)
    shape = layout.shape(heads, tiles)
    if layout.near:
        blocks = layout.blocks(block, wide=extents is not None)
        parts, each = _parts(len(q), heads * tiles[0] * blocks)
        pairs = q.new_empty(parts, heads, tiles[0], blocks, block, block, dtype=torch.float32)

        def run_pairs(tiles: Sequence[int], options: dict[str, Any]) -> None:
            attention_backward._backward_pairs[(pairs.numel() // block**2,)](
                grad, q, k, v, *given, lse, delta, pairs, scale, shape, strides, layout.table, tiles[3], len(q),
                each, **options, TILES=tiles[0], BLOCKS=blocks,
            )  # fmt: skip

        _tuned("pairs", attention_backward._backward_pairs, layout, about, run_pairs, block)
        pairs, (rows, row) = _added(pairs), layout.entries
        entries = q.new_empty(1, heads, rows, row, dtype=torch.float32)
        names = ("KH", "KW", "DH", "DW", "TH", "TW", "BQ", "BN", "HAS_EXTENTS", "MODE")
        attention_backward._sum_pairs[(heads * triton.cdiv(rows * row, OFFSETS),)](
            pairs, entries, shape, tiles[3], rows, row, **{name: constants[name] for name in names}, BO=OFFSETS,
            TILES=tiles[0], BLOCKS=blocks,
        )  # fmt: skip
        return entries
    windows = math.prod(tiles[1:3])
    tile = layout.tile(block)
    cut = tuple(triton.cdiv(n, t) for n, t in zip(layout.sides(), tile, strict=True))
    differences = [2 * n - 1 for n in cut]
    parts, each = _parts(len(q) * windows, heads * math.prod(differences), windows if of_each else 0)
    pairs = q.new_empty(parts, heads, *differences, block, block, dtype=torch.float32)

    def run_differences(tiles: Sequence[int], options: dict[str, Any]) -> None:
        attention_backward._backward_differences[(pairs.numel() // block**2,)](
            grad, q, k, v, *given, lse, delta, pairs, scale, shape, strides, layout.table, len(q) * windows, each,
            **options, PARTS=parts, WINDOWS=windows,
        )  # fmt: skip

    _tuned("pairs", attention_backward._backward_differences, layout, about, run_differences, block)
    return _table(layout, pairs, tile, cut, of_each)


def _parts(count: int, programs: int, each: int = 0) -> tuple[int, int]:
    """In how many parts, of `programs` each, so many images (or windows) are added up; how many a part has."""
    each = each or max(count * programs // PROGRAMS, 1)
    return triton.cdiv(count, each), each


def _added(pairs: Tensor) -> Tensor:
    return pairs if len(pairs) == 1 else pairs.sum(0, keepdim=True)


def _table(layout: Layout, pairs: Tensor, tile: Sequence[int], tiles: Sequence[int], of_each: bool) -> Tensor:
    """The gradient of a table, from those of the pairs of all differences of tiles."""
    pairs, (rows, row) = pairs if of_each else _added(pairs), layout.entries
    entries = pairs.new_empty(*pairs.shape[:2], rows, row)
    attention_backward._sum_differences[(pairs.shape[0] * pairs.shape[1] * triton.cdiv(rows * row, OFFSETS),)](
        pairs, entries, rows, row, *tile, *tiles, BQ=pairs.shape[-1], BO=OFFSETS
    )
    return entries


def near(
    sources: Sequence[int], past: int, kernel: Sequence[int], dilation: int, *, causal: bool, shifted: bool
) -> Layout:
    """The layout of neighborhoods, with a table [G, *(2*K - 1)] of sources less queries."""
    height, width = _two(sources, 1)
    kh, kw = _two(kernel, 1)
    row = 2 * kw - 1
    return Layout(
        "causal" if causal else "shifted" if shifted else "masked",
        (height, width - past),
        (height, width),
        (kh, kw),
        ((2 * kh - 1) * row, 0, (kh - 1) * row + kw - 1, -row, -1),
        (2 * kh - 1, row),
        (dilation if len(sources) == 2 else 1, dilation),
        past,
    )


def whole(grid: Sequence[int], heads: int, tables: int) -> Layout:
    """The layout of a grid on which everyone sees everyone, with tables [tables, G, *(2*S - 1)]."""
    height, width = _two(grid, 1)
    rows, row = 2 * height - 1, 2 * width - 1
    table = (rows * row, rows * row * heads if tables > 1 else 0, (height - 1) * row + width - 1, row, 1)
    return Layout("global", (height, width), (height, width), (1, 1), table, (rows, row))


def windows(
    sources: Sequence[int], rolled_size: Sequence[int] | None, window: Sequence[int], shift: int, heads: int
) -> Layout:
    """The layout of windows, with a table [entries, G] of queries less sources."""
    wh, ww = _two(window, 1)
    row = 2 * ww - 1
    return Layout(
        "window" if rolled_size is None else "rolled",
        _two(sources if rolled_size is None else rolled_size, 1),
        _two(sources, 1),
        (wh, ww),
        (1, 0, ((wh - 1) * row + ww - 1) * heads, row * heads, heads),
        (2 * wh - 1, row),
        shift=shift,
    )


def _two(axes: Sequence[int], before: int) -> tuple[int, int]:
    return (before, axes[0]) if len(axes) == 1 else (axes[0], axes[1])


def _in_order(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 or tensor.shape[-1] == 1 else tensor.contiguous()


def _given(q: Tensor, bias: Tensor | None, valid: Tensor | None, extents: Tensor | None) -> tuple[Tensor, ...]:
    """The pointers that kernels take, something in place of what there is not."""
    return (
        q if bias is None else bias.contiguous(),
        q if valid is None else valid.contiguous().view(torch.uint8),
        q if extents is None else extents.contiguous(),
    )


def _strides(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(stride for tensor in tensors for stride in tensor.stride()[:3])
