"""Index tables of grids: which source each slot of each query reads.

Every table is made axis by axis, [..., n, k] (n queries along the axis, k slots each, -1 outside), and joined
by `join`, so that any rank is one code path. Lengths may be symbolic: nothing here branches on them unless it
says so.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from glocal.aggregation import grid_positions
from glocal.mixer import Cache
from glocal.positions.relative import relative_index


def join(axes: Sequence[Tensor], sizes: Sequence[int]) -> Tensor:
    """Per-axis tables to one raster-order table: [..., n_a, k_a] each -> [..., prod n_a, prod k_a].

    A slot is -1 where any of its axes is. `sizes` are the lengths that the entries index into.
    """
    joined = axes[0]
    for axis, size in zip(axes[1:], sizes[1:], strict=True):
        row, column = joined[..., :, None, :, None], axis[..., None, :, None, :]
        both = torch.where((row >= 0) & (column >= 0), row * size + column, -1)
        joined = both.flatten(-2).flatten(-3, -2)
    return joined


def taps(n: int, kernel: int, *, stride: int = 1, dilation: int = 1, left: int, device: torch.device) -> Tensor:
    """Sources under a sliding kernel along one axis, [ceil(n / stride), kernel]: o*stride - left + tap*dilation."""
    start = torch.arange(0, n, stride, device=device) - left
    position = start[:, None] + dilation * torch.arange(kernel, device=device)
    return torch.where((position >= 0) & (position < n), position, -1)


def kernel_index(
    grid: Sequence[int],
    kernel: Sequence[int],
    *,
    stride: int = 1,
    dilation: int = 1,
    left: Sequence[int],
    device: torch.device,
) -> Tensor:
    """`taps` of every axis joined: [N, K]."""
    each = [
        taps(n, k, stride=stride, dilation=dilation, left=p, device=device)
        for n, k, p in zip(grid, kernel, left, strict=True)
    ]
    return join(each, grid)


def places_behind(x: Tensor, cache: Cache | None, kept: int) -> tuple[tuple[int, ...], Tensor, Tensor]:
    """The grid of the sources, positions of queries and of sources, for tokens [B, *S, C] behind `kept` ones."""
    grid = tuple(x.shape[1:-1])
    if cache is None:
        places = grid_positions(grid, device=x.device)
        return grid, places, places
    sources = (kept + grid[0],)
    places = grid_positions(sources, offset=kept - len(cache), device=x.device)
    return sources, places[kept:], places


def centre_padding(kernel: Sequence[int], dilation: int = 1) -> tuple[int, ...]:
    """Zeros in front of each axis that centre the kernel (left of the middle for an even one)."""
    return tuple(dilation * (k - 1) // 2 for k in kernel)


class WindowAxis(NamedTuple):
    """One axis of n tokens laid out in m windows of w places."""

    source: Tensor  # [..., m, w]: token at each place, -1: none
    region: Tensor  # [m, w]: places of a window see each other only where this is equal
    place: Tensor  # [..., n]: where each token is among the m*w places


def masked_windows(n: int, window: int, shift: int, extent: Tensor | None, device: torch.device) -> WindowAxis:
    """Windows cut at shift + m*window; what does not fill a window is empty, nothing wraps around.

    An axis no longer than the window is not shifted; `extent` [B], where given, is the axis' length in each
    image, and source and place then have a leading axis B.
    """
    shifted = (window - shift) % window  # empty places in front
    place = _places((n + shifted + window - 1) // window, window, device)
    if extent is None:
        front, end, token = (0 if n <= window else shifted), n, torch.arange(n, device=device)
        source = place - front
    else:
        front = torch.where(extent > window, shifted, 0)
        end, token = extent[:, None, None], torch.arange(n, device=device) + front[:, None]
        source, front = place - front[:, None, None], 0
    source = torch.where((source >= 0) & (source < end), source, -1)
    return WindowAxis(source, torch.zeros_like(place), token + front)


def rolled_windows(n: int, window: int, shift: int, device: torch.device) -> WindowAxis:
    """timm's layout: rolled by -shift, then padded to a multiple; empty places are sources n, n+1, ...

    A window longer than the axis shrinks to it. Regions are cut at P - window and P - shift of the P places, as if
    the grid had filled them all, so at other sizes the tokens that wrap around are seen by those they are wrapped to.
    """
    window, shift = (n, 0) if n <= window else (window, shift)
    count = (n + window - 1) // window
    place = _places(count, window, device)
    source = torch.where(place < n, (place + shift) % n, place)
    region = torch.zeros_like(place)
    if shift:
        region = (place >= (count - 1) * window).long() + (place >= count * window - shift).long()
    return WindowAxis(source, region, (torch.arange(n, device=device) - shift) % n)


def _places(count: int, window: int, device: torch.device) -> Tensor:
    """0, 1, ... as [count, window]; made so, since a symbolic length cannot always be cut into windows."""
    return torch.arange(count, device=device)[:, None] * window + torch.arange(window, device=device)


class Windows:
    """A grid laid out in windows, as index tables.

    Shape letters: B images with a layout of their own (1 if all share one), N tokens, M sources, W windows,
    K places of a window.
    """

    def __init__(self, axes: Sequence[WindowAxis], sizes: Sequence[int]) -> None:
        """`sizes`: lengths of the axes of the sources."""
        self._axes, self._sizes = axes, tuple(sizes)

    def sources(self) -> Tensor:
        """[B, W, K]: the source at each place, -1: none."""
        return _with_batch(join([a.source for a in self._axes], self._sizes), 2)

    def together(self) -> Tensor:
        """[W, K, K]: places of one region."""
        region = join([a.region for a in self._axes], [3] * len(self._axes))  # at most three along an axis
        return region[:, :, None] == region[:, None]

    def where(self) -> tuple[Tensor, Tensor]:
        """[B, N], [B, N]: the window of each token, and its place there."""
        shapes = [a.region.shape for a in self._axes]
        window = [(a.place // w)[..., None] for a, (_, w) in zip(self._axes, shapes, strict=True)]
        place = [(a.place % w)[..., None] for a, (_, w) in zip(self._axes, shapes, strict=True)]
        window, place = join(window, [m for m, _ in shapes]), join(place, [w for _, w in shapes])
        return _with_batch(window[..., 0], 1), _with_batch(place[..., 0], 1)

    def offsets(self, window_size: Sequence[int]) -> Tensor:
        """[K, K]: rows of a table made for `window_size`; see `relative_index`."""
        region = self._axes[0].region
        return relative_index([a.region.shape[1] for a in self._axes], table_grid=window_size, device=region.device)


def _with_batch(table: Tensor, dims: int) -> Tensor:
    return table if table.dim() > dims else table[None]


def pick(tokens: Tensor, index: Tensor) -> Tensor:
    """tokens[b, index[b]]: [B, M, ...] by [B or 1, *I] -> [B, *I, ...]."""
    if index.shape[0] == 1:
        return tokens.index_select(1, index.flatten()).unflatten(1, index.shape[1:])
    batch = torch.arange(tokens.shape[0], device=index.device).view(-1, *[1] * (index.dim() - 1))
    return tokens[batch, index]


def pick_or_zero(tokens: Tensor, index: Tensor) -> Tensor:
    """`pick` where -1 gives zeros: a row of its own, since masking another token would let a NaN of it through."""
    zero = tokens.new_zeros(tokens.shape[0], 1, *tokens.shape[2:])
    return pick(torch.cat([tokens, zero], 1), torch.where(index < 0, tokens.shape[1], index))
