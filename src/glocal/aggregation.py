"""The idea: a weighted sum over positions whose weights are a value.

    y[b, i, g, :] = sum over j of A[b, g, i, j] * v[b, j, g, :]

`Aggregation` holds A together with its geometry; `aggregate` applies it.

Shape letters: B batch, G groups (heads), N queries, M sources, K weights stored per query, D channels per
group. An axis of size 1 is shared by all images, groups or queries.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Aggregation:
    """How much of every source goes into every query.

    Attributes:
        weights: [B|1, G|1, N|1, K]. Any sign; rows need not sum to 1.
        index: int64, broadcastable to [B, G, N, K]: the source that each weight applies to; -1 is a slot
            outside the grid, which counts as zero whatever its weight. Slots may repeat a source.
            None: dense, K == M and slot j is source j.
        num_sources: M.
        query_positions: [N, rank], in tokens of the query grid; NaN for what has no place there
            (a class token, a token of another sequence).
        source_positions: [M, rank], in tokens of the query grid, or NaN.
        out_grid: the shape that the N queries unfold to.
        source_grid: the shape that the last prod(source_grid) sources unfold to; any sources before them
            (class tokens) have no place.
    """

    weights: Tensor
    index: Tensor | None
    num_sources: int
    query_positions: Tensor
    source_positions: Tensor
    out_grid: tuple[int, ...]
    source_grid: tuple[int, ...]

    def __post_init__(self) -> None:
        if self.weights.dim() != 4:
            raise ValueError(f"weights: has shape {tuple(self.weights.shape)}, needs [B|1, G|1, N|1, K]")
        if self.index is None and self.weights.shape[-1] != self.num_sources:
            raise ValueError(
                f"weights: {self.weights.shape[-1]} per query without an index, but there are "
                f"{self.num_sources} sources; give an index or one weight for each source"
            )
        if self.index is not None and self.index.dim() != 4:
            raise ValueError(f"index: has shape {tuple(self.index.shape)}, needs four axes [B, G, N, K], any of size 1")
        if self.index is not None:
            for axis, own, other in zip("BGNK", self.weights.shape, self.index.shape, strict=True):
                if own != other and 1 not in (own, other):
                    raise ValueError(f"index: {other} along {axis}, the weights have {own}; give as many, or 1")
        for name, rows in (("weights", self.weights), ("index", self.index)):
            if rows is not None and rows.shape[2] not in (1, self.num_queries):
                raise ValueError(f"{name}: {rows.shape[2]} queries, query_positions has {self.num_queries}")
        if self.source_positions.shape[0] != self.num_sources:
            raise ValueError(
                f"source_positions: {self.source_positions.shape[0]}, there are {self.num_sources} sources"
            )

    @property
    def num_queries(self) -> int:
        return self.query_positions.shape[0]

    @property
    def num_groups(self) -> int:
        """Groups with weights or sources of their own; 1 means shared by all."""
        return max(self.weights.shape[1], 1 if self.index is None else self.index.shape[1])

    def dense(self) -> Tensor:
        """The full matrix [B|1, G|1, N, M]. Memory: N*M per image and group; meant for looking."""
        if self.index is None:
            return self.weights.expand(-1, -1, self.num_queries, -1)
        weights, index = self._rows()
        outside = self.num_sources  # one extra column collects what lies outside, then is dropped
        index = torch.where(index < 0, outside, index)
        full = weights.new_zeros(*weights.shape[:-1], outside + 1)
        return full.scatter_add(-1, index, weights)[..., :outside]

    def coalesce(self) -> "Aggregation":
        """The same aggregation with at most one slot for each source in a row; slots left over are -1."""
        if self.index is None:
            return self
        weights, index = self._rows()
        index, order = index.sort(dim=-1)
        weights = weights.gather(-1, order)
        first = torch.ones_like(index, dtype=torch.bool)
        first[..., 1:] = index[..., 1:] != index[..., :-1]
        slot = first.cumsum(-1) - 1
        weights = torch.where(index < 0, 0, weights)
        merged = torch.zeros_like(weights).scatter_add(-1, slot, weights)
        index = torch.full_like(index, -1).scatter(-1, slot, index)
        return replace(self, weights=merged, index=index)

    def select(self, queries: Tensor) -> "Aggregation":
        """The rows of some queries: `queries` is int64 [Q], positions among the N."""
        index = self.index
        if index is not None and index.shape[2] > 1:
            index = index[:, :, queries]
        weights = self.weights[:, :, queries] if self.weights.shape[2] > 1 else self.weights
        return replace(
            self,
            weights=weights,
            index=index,
            query_positions=self.query_positions[queries],
            out_grid=(len(queries),),
        )

    def _rows(self) -> tuple[Tensor, Tensor]:
        """Weights and index with every query's row written out."""
        assert self.index is not None
        weights, index = torch.broadcast_tensors(self.weights, self.index)
        shape = (*weights.shape[:2], self.num_queries, weights.shape[-1])
        return weights.expand(shape), index.expand(shape)


def aggregate(aggregation: Aggregation, values: Tensor) -> Tensor:
    """The weighted sum, by gathering: never makes A dense, and copies a source once for each slot.

    Args:
        aggregation: A.
        values: [B, M, G|1, D]; one group is offered to all groups of A.

    Returns:
        [B, N, G*D], groups in order.

    Cost: B*G*N*K*D multiply-adds; nothing to add, hence none, where K is 1.
    """
    a, batch, dim = aggregation, values.shape[0], values.shape[-1]
    if values.shape[1] != a.num_sources:
        raise ValueError(f"values: {values.shape[1]} sources, the aggregation has {a.num_sources}")
    groups = max(values.shape[2], a.num_groups)
    for name, have in (("values", values.shape[2]), ("aggregation", a.num_groups)):
        if have not in (1, groups):
            raise ValueError(f"{name}: {have} groups cannot be matched with {groups}; give 1 or {groups}")
    weights = a.weights.to(values.dtype)
    if a.index is None:
        mixed = torch.einsum("bgnm,bmgd->bngd", weights, values)
        return _as_rows(mixed, batch, a.num_queries, groups, dim)

    # one more source, zero, for the slots outside; and no weight there: neither alone stops an infinite factor
    values = torch.nn.functional.pad(values, (0, 0, 0, 0, 0, 1))
    weights = torch.where(a.index < 0, 0, weights)
    index = torch.where(a.index < 0, a.num_sources, a.index)
    if index.shape[0] == index.shape[1] == 1:
        picked, axes = values[:, index[0, 0]], "bnkgd"
    else:
        source = values.transpose(1, 2)  # [B, G, M, D]
        each = (batch, groups if index.shape[1] > 1 else source.shape[1])
        rows = index.expand(*each, -1, -1).flatten(2)[..., None].expand(-1, -1, -1, dim)
        picked = source.expand(*each, -1, -1).gather(2, rows).unflatten(2, index.shape[2:])
        axes = "bgnkd"
    if a.weights.shape[-1] == index.shape[-1] == 1:
        picked = picked.squeeze(axes.index("k"))
        if axes == "bgnkd":
            picked = picked.transpose(1, 2)
        mixed = weights.transpose(1, 2) * picked
    else:
        mixed = torch.einsum(f"bgnk,{axes}->bngd", weights, picked)
    return _as_rows(mixed, batch, a.num_queries, groups, dim)


def _as_rows(mixed: Tensor, batch: int, queries: int, groups: int, dim: int) -> Tensor:
    return mixed.expand(batch, queries, groups, dim).reshape(batch, queries, groups * dim)


def cat(parts: Sequence[Aggregation]) -> Aggregation:
    """Joins aggregations of the same queries and sources along the groups, as in parallel heads.

    A part whose weights are shared by all groups (G = 1) contributes one group. Rows are padded with empty
    slots to the longest part, so a dense part makes all rows M long.

    Raises:
        ValueError: no parts, or parts that differ in queries or sources.
    """
    if not parts:
        raise ValueError("parts: empty; give at least one aggregation")
    first = parts[0]
    for part in parts[1:]:
        if (part.num_queries, part.num_sources) != (first.num_queries, first.num_sources):
            raise ValueError(
                f"parts: one has {part.num_queries} queries and {part.num_sources} sources, the first "
                f"{first.num_queries} and {first.num_sources}; only equal ones can be joined"
            )
    written = []
    for part in parts:
        index = part.index
        if index is None:
            index = torch.arange(part.num_sources, device=part.weights.device).view(1, 1, 1, -1)
        written.append(replace(part, index=index)._rows())
    batch = max(w.shape[0] for w, _ in written)
    slots = max(w.shape[-1] for w, _ in written)
    weights = [_pad_slots(w, slots, 0.0).expand(batch, -1, -1, -1) for w, _ in written]
    index = [_pad_slots(i, slots, -1).expand(batch, -1, -1, -1) for _, i in written]
    return replace(first, weights=torch.cat(weights, 1), index=torch.cat(index, 1))


def _pad_slots(rows: Tensor, slots: int, value: float) -> Tensor:
    return torch.nn.functional.pad(rows, (0, slots - rows.shape[-1]), value=value)


def grid_positions(
    grid: Sequence[int],
    *,
    num_prefix: int = 0,
    stride: float | Sequence[float] = 1,
    offset: float | Sequence[float] = 0,
    device: torch.device | None = None,
) -> Tensor:
    """Coordinates of a grid's tokens in raster order: (coordinate - offset) / stride, [prefix + prod(grid), rank].

    Args:
        grid: lengths of the axes.
        num_prefix: class or register tokens in front, which have no place: NaN.
        stride: tokens of this grid for one token of the query grid, all axes or each.
        offset: where, on this grid, the query grid's first token lies, all axes or each.
        device: of the result.
    """
    rank = len(grid)
    strides = [stride] * rank if isinstance(stride, int | float) else list(stride)
    offsets = [offset] * rank if isinstance(offset, int | float) else list(offset)
    axes = [
        (torch.arange(n, device=device, dtype=torch.float32) - o) / s
        for n, s, o in zip(grid, strides, offsets, strict=True)
    ]
    if rank == 0:
        places = torch.zeros(1, 0, device=device)
    else:
        places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
    nowhere = torch.full((num_prefix, rank), math.nan, device=device)
    return torch.cat([nowhere, places]) if num_prefix else places
