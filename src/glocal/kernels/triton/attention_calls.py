"""The kernels of attention.py called for windows, neighborhoods and whole grids."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from glocal.kernels.triton import attention

PROGRAMS = 1024  # about so many, if there are so many images, add up the gradients of biases
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
        """Of a window as it is cut out."""
        h, w = (min(n, k) for n, k in zip(self.sources, self.window, strict=True))
        return h, w

    def windows(self) -> tuple[int, int]:
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
        """Tokens of a tile."""
        short = q.element_size() == 2 and max(q.shape[-1], v.shape[-1]) <= 64
        most = 64 if short else 32
        if self.near:
            return most
        area = math.prod(self.grid if self.mode == "global" else self.sides())
        return max(min(most, triton.next_power_of_2(area)), 16)

    def tile(self, block: int) -> tuple[int, int]:
        """Of neighboring tokens, in their class."""
        if self.sources[0] == 1:
            return 1, block
        height = 2 ** (int(math.log2(block)) // 2)
        return height, block // height

    def tiles(self, block: int, *, queries: bool) -> tuple[int, int, int, int]:
        """How many in an image; along the axes; and the first member of the classes that a tile has."""
        if self.mode == "global":
            return triton.cdiv(math.prod(self.sources), block), 1, 1, 0
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

    def seen(self, block: int, *, wide: bool) -> int:
        """Sources that a tile of queries goes through, at most."""
        if self.mode == "global":
            return math.prod(self.sources)
        if not self.near:
            return math.prod(self.sides())
        margins = [(2 if wide else 1) * (k - 1) for k in self.window]
        members = [triton.cdiv(n, d) for n, d in zip(self.sources, self.dilation, strict=True)]
        return math.prod(min(t + m, n) for t, m, n in zip(self.tile(block), margins, members, strict=True))

    def constants(self, q: Tensor, v: Tensor, bias: Any, valid: Any, extents: Any) -> dict[str, Any]:
        block = self.block(q, v)
        return {
            "KH": self.window[0],
            "KW": self.window[1],
            "DH": self.dilation[0],
            "DW": self.dilation[1],
            "D": q.shape[-1],
            "E": v.shape[-1],
            "BD": max(triton.next_power_of_2(q.shape[-1]), 16),
            "BE": max(triton.next_power_of_2(v.shape[-1]), 16),
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
    constants = layout.constants(q, v, bias, valid, extents)
    tiles = layout.tiles(constants["BQ"], queries=True)
    with torch.cuda.device_of(q):
        attention._forward[(len(q) * heads * tiles[0],)](
            q, k, v, *_given(q, bias, valid, extents), out, lse, float(scale), layout.shape(heads, tiles),
            _strides(q, k, v), layout.table, tiles[3], **constants, TILES=tiles[0], num_warps=_warps(constants),
            num_stages=2,
        )  # fmt: skip
    return lse


def backward(
    layout: Layout, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, valid: Tensor | None,
    extents: Tensor | None, scale: float, out: Tensor, lse: Tensor, found: Sequence[Tensor], *, of_each: bool = False,
) -> Tensor | None:  # fmt: skip
    """Writes the gradients of q, k and v, tensors like them; returns the table's, float32 [B or 1, G, *entries].

    of_each: every image has a table of its own.
    """
    heads = q.shape[2]
    if not (out.numel() and k.numel()):
        for each in found:
            each.zero_()
        tables = len(q) if of_each else 1
        return None if bias is None else q.new_zeros(tables, heads, *layout.entries, dtype=torch.float32)
    q, k, v = (_in_order(t) for t in (q, k, v))
    grad, out, lse = grad.contiguous(), out.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    constants = layout.constants(q, v, bias, valid, extents)
    given, strides, warps = _given(q, bias, valid, extents), _strides(q, k, v, *found), _warps(constants)
    block = constants["BQ"]
    tiles, owned = layout.tiles(block, queries=True), layout.tiles(block, queries=False)
    shape = layout.shape(heads, tiles)
    options = {**constants, "num_warps": warps, "num_stages": 2}
    with torch.cuda.device_of(q):
        attention._backward_queries[(len(q) * heads * tiles[0],)](
            grad, q, k, v, *given, out, lse, delta, found[0], float(scale), shape, strides, layout.table, tiles[3],
            **options, TILES=tiles[0],
        )  # fmt: skip
        attention._backward_sources[(len(q) * heads * owned[0],)](
            grad, q, k, v, *given, lse, delta, found[1], found[2], float(scale), layout.shape(heads, owned), strides,
            layout.table, **options, TILES=owned[0],
        )  # fmt: skip
        if bias is None:
            return None
        windows = 1 if layout.near or layout.mode == "global" else math.prod(layout.windows())
        count, images = tiles[0] // windows, len(q) * windows
        blocks = triton.cdiv(layout.seen(block, wide=extents is not None), block)
        each = windows if of_each else triton.cdiv(images, max(PROGRAMS // (heads * count * blocks), 1))
        parts = triton.cdiv(images, each)
        pairs = q.new_empty(parts, heads, count, blocks, block, block, dtype=torch.float32)
        attention._backward_pairs[(pairs.numel() // block**2,)](
            grad, q, k, v, *given, lse, delta, pairs, float(scale), shape, strides, layout.table, tiles[3], images,
            each, **options | {"num_warps": 2 * warps}, TILES=count, BLOCKS=blocks, WINDOWS=windows,
        )  # fmt: skip
        pairs = pairs if of_each else pairs.sum(0, keepdim=True)
        entries = q.new_empty(len(pairs), heads, *layout.entries, dtype=torch.float32)
        programs = len(pairs) * heads * triton.cdiv(math.prod(layout.entries), OFFSETS)
        rows, row = layout.entries
        names = ("KH", "KW", "DH", "DW", "TH", "TW", "BQ", "BN", "HAS_EXTENTS", "MODE")
        attention._sum_pairs[(programs,)](
            pairs, entries, shape, layout.table, tiles[3], rows, row, rows // 2, row // 2,
            **{name: constants[name] for name in names}, BO=OFFSETS, TILES=count, BLOCKS=blocks,
        )  # fmt: skip
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


def _warps(constants: dict[str, Any]) -> int:
    return 4 if constants["BQ"] >= 32 else 2
