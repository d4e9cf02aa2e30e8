"""What the two focal attentions share: windows that see themselves, a ring around them, and pooled windows.

Shape letters: B images, N tokens, M sources, W windows, P places of a window, K slots (P own, then the ring, then
the pooled windows), C channels, G heads, D channels per head.
"""

import math
from collections.abc import Sequence
from itertools import product

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import per_axis
from glocal.mixers._attention import Attention, sdpa, table_parameter
from glocal.mixers._grid import pick, pick_or_zero


class FocalWindows(Attention):
    """Abstract: sources are the pooled windows, then the tokens of the grid; parameters as the released code's."""

    undecayed = (
        "relative_position_bias_table",
        "relative_position_bias_table_to_neighbors",
        "relative_position_bias_table_to_windows",
    )

    _size: Tensor
    _fine: Tensor
    _coarse: Tensor
    _ring_kept: Tensor
    _own_rows: Tensor
    _far_rows: Tensor

    def __init__(
        self,
        dim: int,
        *,
        window_size: int | Sequence[int],
        expand_size: int,
        focal_window: int,
        num_heads: int | None,
        head_dim: int | None,
        qkv_bias: bool,
        rank: int,
        ring_once: bool,
    ) -> None:
        super().__init__(dim, num_heads=num_heads, head_dim=head_dim, qkv_bias=qkv_bias, rank=rank)
        self.window_size, self.expand_size, self.focal_window = window_size, expand_size, focal_window
        window = self._window = per_axis("window_size", window_size, rank)
        if not _whole_number(expand_size) or not 0 <= 2 * expand_size <= min(window):
            raise ValueError(  # a deeper ring would have holes
                f"expand_size: {expand_size!r}, must be a whole number from 0 (no ring) to half the window, "
                f"{min(window) // 2}"
            )
        if not _whole_number(focal_window) or focal_window < 0 or (focal_window and focal_window % 2 == 0):
            raise ValueError(
                f"focal_window: {focal_window!r}, must be 0 (no pooled windows) or odd, so that a window is its centre"
            )
        ring = ring_offsets(window, expand_size)
        kept = [i for i, offset in enumerate(ring) if not ring_once or offset not in ring[:i]]
        places, reached = list(product(*map(range, window))), range(-(focal_window // 2), focal_window // 2 + 1)
        self.relative_position_bias_table = table_parameter(math.prod(2 * w - 1 for w in window), self.num_heads)
        if expand_size:
            self.relative_position_bias_table_to_neighbors = table_parameter(1, self.num_heads, len(places), len(ring))
        if focal_window:
            entries = math.prod(w + focal_window - 1 for w in window)
            self.relative_position_bias_table_to_windows = nn.ParameterList([table_parameter(self.num_heads, entries)])
            self.pool_layers = nn.ModuleList([nn.Linear(len(places), 1)])
            nn.init.constant_(self.pool_layers[0].weight, 1 / len(places))  # type: ignore[arg-type]
            nn.init.zeros_(self.pool_layers[0].bias)  # type: ignore[arg-type]

        # what follows from the arguments alone: with the parameters on their device, but not in the state dict
        fine = torch.tensor(places + [ring[i] for i in kept])
        coarse = torch.tensor(list(product(reached, repeat=rank)) if focal_window else []).view(-1, rank).long()
        place, size = fine[: len(places)], torch.tensor(window)
        constants = {
            "_size": size,
            "_fine": fine,  # tokens, counted from the window's first place
            "_coarse": coarse,  # windows, counted from the query's own
            "_ring_kept": torch.tensor(kept, dtype=torch.int64),
            "_own_rows": _raster(place[:, None] - place + size - 1, [2 * w - 1 for w in window]),
            "_far_rows": _raster(place[:, None] - coarse + focal_window // 2, [w + focal_window - 1 for w in window]),
        }
        for name, rows in constants.items():
            self.register_buffer(name, rows, persistent=False)

    # What the sources are.

    def sources(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Pooled windows, then tokens, [B, M, C]: what is not there counts as zero."""
        if valid is not None:
            x = x.masked_fill(~valid[..., None], 0)
        tokens = x.flatten(1, -2)
        if not self.focal_window:
            return tokens
        in_window = pick_or_zero(tokens, self._own(x.shape[1:-1], x.device)[None])  # [B, W, P, C]
        pooled = self.pool_layers[0](in_window.transpose(-1, -2)).squeeze(-1)
        return torch.cat([pooled, tokens], 1)

    def real(self, valid: Tensor) -> Tensor:
        """[B, M]: tokens that are, and windows that hold one."""
        tokens = valid.flatten(1)
        if not self.focal_window:
            return tokens
        in_window = pick_or_zero(tokens, self._own(valid.shape[1:], valid.device)[None])
        return torch.cat([in_window.any(-1), tokens], 1)

    # Which of them a window sees.

    def table(self, grid: Sequence[int], device: torch.device, *, wrap: bool) -> Tensor:
        """[W, K]: the source of each slot, -1 outside the grid; `wrap`: the ring goes on at the other side."""
        counts = self.counts(grid)
        fine = reach(counts, self._window, self._fine.to(device), grid, wrap=wrap)
        if not self.focal_window:
            return fine
        coarse = reach(counts, [1] * len(counts), self._coarse.to(device), counts)
        return torch.cat([torch.where(fine < 0, fine, fine + math.prod(counts)), coarse], -1)

    def counts(self, grid: Sequence[int]) -> tuple[int, ...]:
        """Windows along each axis, the last one of which may be filled in part."""
        return tuple((n + w - 1) // w for n, w in zip(grid, self._window, strict=True))

    def _own(self, grid: Sequence[int], device: torch.device) -> Tensor:
        """[W, P]: the tokens of each window."""
        places = self._fine[: math.prod(self._window)].to(device)
        return reach(self.counts(grid), self._window, places, grid)

    # How much a query takes from each.

    def rows(self, table: Tensor, grid: Sequence[int], queries: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, N, K] sources in the slots of each query, and [N] its own place in its window."""
        window, place = self._where(grid, table.device)
        if queries is not None:
            window, place = window[queries], place[queries]
        return table[:, window], place

    def terms(
        self, x: Tensor, sources: Tensor, index: Tensor, place: Tensor, queries: Tensor | None
    ) -> dict[str, Tensor]:
        """Content and position, each broadcastable to [B, G, N, K]; the content of an empty slot is 0."""
        q = self.heads(x, 0)
        q = q if queries is None else q[:, queries]
        k = pick_or_zero(self.heads(sources, 1), index)
        return {"content": torch.einsum("bngd,bnkgd->bgnk", q, k), "position": self._bias()[None, :, place]}

    def aggregation(
        self, weights: Tensor, index: Tensor, grid: Sequence[int], source_grid: Sequence[int], queries: Tensor | None
    ) -> Aggregation:
        """`weights` with the places of everything: a pooled window stands at its centre."""
        grid, source_grid = tuple(grid), tuple(source_grid)
        places, of_sources = (grid_positions(g, device=weights.device) for g in (grid, source_grid))
        if self.focal_window:
            steps = [1 / w for w in self._window]
            centres = [(1 - w) / (2 * w) for w in self._window]
            pooled = grid_positions(self.counts(grid), stride=steps, offset=centres, device=weights.device)
            of_sources = torch.cat([pooled, of_sources])
        return Aggregation(
            weights,
            index[:, None],
            of_sources.shape[0],
            places if queries is None else places[queries],
            of_sources,
            grid if queries is None else (len(queries),),
            source_grid,
        )

    def by_window(self, x: Tensor, sources: Tensor, table: Tensor, mask: Tensor) -> Tensor:
        """The output, one window at a time: table [B, W, K], mask [B, W, K] added to the scores.

        The value of an empty slot is 0, so that a window that sees nothing gets 0.
        """
        own = self._own(x.shape[1:-1], x.device)
        q = pick_or_zero(self.heads(x, 0), own[None]).flatten(0, 1)
        k, v = (pick_or_zero(self.heads(sources, part), table).flatten(0, 1) for part in (1, 2))
        bias = (self._bias() + mask[:, :, None, None]).expand(x.shape[0], -1, -1, -1, -1).flatten(0, 1)
        mixed = sdpa(q, k, v, bias=bias).view(x.shape[0], own.shape[0] * own.shape[1], self.dim)
        window, place = self._where(x.shape[1:-1], x.device)
        return self.proj(pick(mixed, (window * own.shape[1] + place)[None]))

    def _bias(self) -> Tensor:
        """[G, P, K]: a table for offsets in the window, one entry for each place and ring slot, one for windows."""
        parts = [self.relative_position_bias_table[self._own_rows].movedim(-1, 0)]
        if self.expand_size:
            parts.append(self.relative_position_bias_table_to_neighbors[0, :, :, self._ring_kept])
        if self.focal_window:
            parts.append(self.relative_position_bias_table_to_windows[0][:, self._far_rows])
        return torch.cat(parts, -1)

    def _where(self, grid: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """[N], [N]: the window of each token, and its place there."""
        at = torch.stack(torch.meshgrid(*(torch.arange(n, device=device) for n in grid), indexing="ij"), -1).flatten(
            0, -2
        )
        size = self._size.to(device)
        return _raster(at // size, self.counts(grid)), _raster(at % size, self._window)

    def _macs(self, queries: int, tokens: int, windows: int) -> int:
        windows = windows if self.focal_window else 0
        slots, places = len(self._fine) + len(self._coarse), math.prod(self._window)
        projected = 2 * queries + 2 * (windows + tokens)  # q and the output; k and v, which are pooled for each
        return projected * self.dim**2 + 2 * windows * places * self.dim + 2 * queries * slots * self.dim


def ring_offsets(window: Sequence[int], expand: int) -> list[tuple[int, ...]]:
    """Places around a window, `expand` deep, counted from its first one, in the released order.

    The window is moved by `expand` to the end or the start of every axis, and of each move the places that have
    left the window are taken. Moves overlap, so that some places stand there twice.
    """
    ring = []
    for move in product((expand, -expand), repeat=len(window)) if expand else ():
        for place in product(*map(range, window)):
            moved = tuple(p + m for p, m in zip(place, move, strict=True))
            if any(not 0 <= p < w for p, w in zip(moved, window, strict=True)):
                ring.append(moved)
    return ring


def reach(
    counts: Sequence[int], step: Sequence[int], offsets: Tensor, sizes: Sequence[int], *, wrap: bool = False
) -> Tensor:
    """[prod(counts), K]: what stands `offsets` [K, rank] from window * step on a grid of `sizes`, -1 outside."""
    rank, slots = len(counts), offsets.shape[0]
    joined, inside = offsets.new_zeros(()), offsets.new_ones((), dtype=torch.bool)
    for axis, (count, along, size) in enumerate(zip(counts, step, sizes, strict=True)):
        at = along * torch.arange(count, device=offsets.device)[:, None] + offsets[:, axis]
        at = at % size if wrap else at
        at = at.view(*[count if a == axis else 1 for a in range(rank)], slots)
        joined, inside = joined * size + at, inside & (at >= 0) & (at < size)
    return torch.where(inside, joined, -1).flatten(0, -2)


def _raster(coordinates: Tensor, sizes: Sequence[int]) -> Tensor:
    """[..., rank] -> [...]: rows of a table of these sizes."""
    row = coordinates[..., 0]
    for axis, size in enumerate(sizes[1:], start=1):
        row = row * size + coordinates[..., axis]
    return row


def _whole_number(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
