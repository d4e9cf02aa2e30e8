"""Aggregation weights of recorded calls, stored small enough for a page: one byte an entry, every row with its scale.

A weight comes back within 1/128 of the largest of its row. Where weights are a softmax of named terms, the terms are
stored, not the weights, so that a page can show them alone and put them together itself: the position term exactly
enough (16 bits, or 32), and the content as how far it lies below the highest that the row allows, in steps that grow
as the weight falls. Where they are a mixture, so are the parts, each coded as weights are. `codes.py` has the
arithmetic.

A dense convolution's heads are its taps, of one place each. They are stored as one head for each group, with the share
of the kernel's norm that a tap holds as its weight: nothing is rebuilt from that, but from the taps it is.

Shape letters: B images, G heads, N queries, M sources, K weights stored per query; Q queries that are stored.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glocal.aggregation import Aggregation
from glocal.analysis.codes import Rows, coded_scores, coded_weights, table_of
from glocal.analysis.distance import mean_distance
from glocal.analysis.entropy import entropy
from glocal.analysis.heads import quadratic_heads
from glocal.inspection import Call

CONTENT = "content share"
BUDGET = 28_000_000  # entries of all layers and images; a page of them has 30 MB at most


@dataclass(frozen=True)
class Places:
    """Where queries or sources are: `prefix` of them nowhere (class tokens), then a grid in raster order.

    Args:
        prefix: how many stand in front of the grid.
        grid: lengths (rows, columns); (0, 0) where no token has a place.
        origin: place of the grid's first token, in tokens of the query grid, for rows and columns.
        step: from one token of the grid to the next, likewise.
    """

    prefix: int
    grid: tuple[int, int]
    origin: tuple[float, float] = (0.0, 0.0)
    step: tuple[float, float] = (1.0, 1.0)


@dataclass(frozen=True)
class Map:
    """The weights of one call, as a page needs them. Lists have an entry for each image, or one for all.

    Args:
        name: of the module.
        operator: its spec.
        error: with which its weights rebuild the recorded output, relative to the largest entry.
        heads: G.
        queries, sources: where they are.
        stride: every so many-th query along each axis is stored; those in front all are.
        kind: "weights" (0 or more), "signed", "scores" (of which the weights are the softmax), or "mixture" (of two
            weights, the first by the share `CONTENT`, the second by the rest).
        terms: names of the scores' terms, or of the mixture's parts; the first is in `rows`, a second one in `table`.
        rows: codes and their scales.
        table: the second term.
        index: the source of every slot, int32 [G|1, Q|1, K], -1 for none; empty where slots are sources.
        distance, entropy: of every head, the mean over queries and images; None where there is none.
        shares: further numbers by name, one a head.
        centers, precision: of heads that have them, [G, 2] and [G, 2, 2], in tokens.
        kernel: whether heads are groups of a dense convolution, and weights what taps hold of its kernel.
    """

    name: str
    operator: str
    error: float
    heads: int
    queries: Places
    sources: Places
    stride: int
    kind: str
    terms: tuple[str, ...]
    rows: list[Rows]
    table: list[Rows]
    index: list[np.ndarray]
    distance: list[float | None]
    entropy: list[float | None]
    shares: dict[str, list[float]] = field(default_factory=dict)
    centers: np.ndarray | None = None
    precision: np.ndarray | None = None
    kernel: bool = False


def maps(calls: Sequence[Call], *, budget: int = BUDGET) -> tuple[list[Map], dict[str, str]]:
    """Every call's weights, and by name why those that are missing cannot be shown.

    Args:
        calls: of an `Inspection`; the n-th call of a module that was called more than once is named NAME (n).
        budget: entries to store at most. Calls that need more than their share keep every second query along each
            axis, or every third, and so on.

    Raises:
        ValueError: there is nothing to show.
    """
    names: list[str] = []
    seen: dict[str, int] = {}
    for call in calls:
        seen[call.name] = seen.get(call.name, 0) + 1
        names.append(call.name if seen[call.name] == 1 else f"{call.name} ({seen[call.name]})")
    refused: dict[str, str] = {}
    probes: dict[str, tuple[Call, int, int]] = {}  # with the entries of one query, and the queries
    for name, call in zip(names, calls, strict=True):
        try:
            probes[name] = (call, *_size(call))
        except ValueError as error:
            refused[name] = str(error)
    limit = _share(budget, [each * count for _, each, count in probes.values()])
    found = []
    for name, (call, each, count) in probes.items():
        try:
            found.append(_map(name, call, max(1, math.ceil(math.sqrt(each * count / limit)))))
        except ValueError as error:
            refused[name] = str(error)
    if not found:
        why = next(iter(refused.values()), "no token mixer was called")
        raise ValueError(f"maps: nothing to show; {why}")
    return found, refused


def _size(call: Call) -> tuple[int, int]:
    """Entries of one query, of all images and heads; queries."""
    with torch.no_grad():
        first = torch.zeros(1, dtype=torch.int64, device=call.x.device)
        one, parts = call.weights(first).weights, [part for _, part in call.parts(first).values()]
    return sum(each.shape[0] * each.shape[1] * each.shape[3] for each in parts or [one]), call.num_queries


def _share(budget: int, needs: Sequence[int]) -> float:
    """The largest number such that all fit if each gets no more than that."""
    left, limit = float(budget), math.inf
    for i, need in enumerate(sorted(needs)):
        limit = left / (len(needs) - i)
        if need > limit:
            return max(limit, 1.0)
        left -= need
    return math.inf


def _map(name: str, call: Call, stride: int) -> Map:
    centers, precision = _ellipses(call.mixer)
    with torch.no_grad():
        whole = None if stride > 1 else call.weights()
        places = _query_places(call) if whole is None else _places_of_queries(whole)
        chosen = None if whole is not None else torch.tensor(_every(places, stride), device=call.x.device)
        found = _kernels(call, call.weights(chosen) if whole is None else whole)
        heads = found.num_groups
        kind, terms, found, rows, table = _rows(call, found, chosen)
        index = [] if found.index is None else [i.to("cpu", torch.int32).numpy() for i in found.index]
        counted = slice(places.prefix, None) if math.prod(places.grid) else slice(None)
        return Map(
            name=name,
            operator=repr(call.mixer),
            error=call.rebuild_error(chosen),
            heads=heads,
            queries=places,
            sources=_source_places(found),
            stride=stride,
            kind=kind,
            terms=terms,
            rows=rows,
            table=table,
            index=index,
            distance=_of_heads(mean_distance(found), heads, counted),
            entropy=_of_heads(entropy(found), heads, counted),
            shares={share: values.tolist() for share, values in _shares(call, chosen).items()},
            centers=centers,
            precision=precision,
            kernel=call.kernel_shares() is not None,
        )


def _rows(
    call: Call, found: Aggregation, chosen: Tensor | None
) -> tuple[str, tuple[str, ...], Aggregation, list[Rows], list[Rows]]:
    """kind, terms, what is stored, rows and table."""
    if parts := _two_parts(call, chosen):
        whole = [
            replace(found, weights=each).dense() for each in (found.weights, *(part for _, part in parts.values()))
        ]
        rows, table = ([coded_weights(w, False) for w in part] for part in whole[1:])
        return "mixture", tuple(parts), replace(found, weights=whole[0], index=None), rows, table
    terms = call.scores(chosen)
    slots = torch.ones(1, 1, 1, 1, dtype=torch.bool) if found.index is None else found.index >= 0
    if terms and set(terms) <= {"content", "position"} and all(t.isfinite().all() for t in terms.values()):
        order = [name for name in ("content", "position") if name in terms]
        first, *others = (terms[name] for name in order)
        over = _over(sum(others, first), found.weights, slots.to(found.weights.device))
        if over is not None:
            table = [table_of(each) for each in others[0]] if others else []
            second: list[Tensor | None] = [each.decoded() for each in table] or [None]
            seen = over & slots.to(over.device)
            rows = [
                coded_scores(_of(first, b), _of(second, b), _of(seen, b), _of(over, b))
                for b in range(max(first.shape[0], seen.shape[0]))
            ]
            return "scores", tuple(order), found, rows, table
    found = _merged(found)
    signed, shared = bool((found.weights < 0).any()), found.weights.shape[2] == 1 < found.num_queries
    if not shared and found.index is not None:
        found = replace(found, weights=torch.where(found.index < 0, 0, found.weights))
    rows = [coded_weights(w, signed, shared=shared) for w in found.weights]
    return "signed" if signed else "weights", (), found, rows, []


def _kernels(call: Call, found: Aggregation) -> Aggregation:
    """Taps that are heads, each with weight 1, as one head for each group: its kernel, by what each tap holds of it."""
    shares = call.kernel_shares()
    if shares is None or found.index is None:
        return found
    return replace(found, weights=shares[None, :, None].to(found.weights), index=found.index.permute(0, 3, 2, 1))


def _two_parts(call: Call, chosen: Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
    """Content and position, where weights are a mixture of these."""
    parts = call.parts(chosen)
    return {name: parts[name] for name in ("content", "position")} if {*parts} == {"content", "position"} else {}


def _shares(call: Call, chosen: Tensor | None) -> dict[str, Tensor]:
    parts = _two_parts(call, None if chosen is None else chosen[:1])
    return call.shares() | ({CONTENT: parts["content"][0]} if parts else {})


def _merged(found: Aggregation) -> Aggregation:
    """Slots of the same source as one, where there are such: as many small differences would add up."""
    if found.index is None:
        return found
    index = found.index.sort(-1).values
    twice = (index[..., 1:] == index[..., :-1]) & (index[..., 1:] >= 0)
    return found.coalesce() if bool(twice.any()) else found


def _of(entries: Any, image: int) -> Any:
    return entries[min(image, len(entries) - 1)]


def _over(total: Tensor, weights: Tensor, slots: Tensor) -> Tensor | None:
    """Which slots the softmax of the scores runs over, so that it gives these weights; None if there are none such.

    Some operators count empty slots, others do not.
    """
    total, weights = torch.broadcast_tensors(total.float(), weights.float())
    # a weight of 0 whose score is not far below the others was masked; one far below is too small to be held
    seen = (weights > 0) | (total < total.amax(-1, keepdim=True) - 80)
    for over in (seen & slots, seen):
        again = total.masked_fill(~over, -math.inf).softmax(-1).nan_to_num() * slots
        held = weights * slots
        if bool(((again - held).abs() <= 1e-3 * held.amax(-1, keepdim=True) + 1e-6).all()):
            return over
    return None


def _of_heads(values: Tensor, heads: int, counted: slice) -> list[float | None]:
    """[B|1, G|1, N] to the mean of each head."""
    means = values[:, :, counted].double().transpose(0, 1).flatten(1).nanmean(1).expand(heads)
    return [float(v) if math.isfinite(v) else None for v in means.tolist()]


# Geometry.


def _places_of_queries(found: Aggregation) -> Places:
    placed = ~found.query_positions.isnan().any(-1)
    prefix = int((~placed).sum())
    here = math.prod(found.out_grid)
    for grid in (found.out_grid, found.source_grid):  # flat tokens with class tokens in front have the sources' grid
        fits = len(grid) <= 2 and math.prod(grid) == found.num_queries - prefix and bool(placed[prefix:].all())
        if fits and (prefix or here == found.num_queries):
            return Places(prefix, _two(grid))
    return Places(found.num_queries, (0, 0))


def _query_places(call: Call) -> Places:
    """The same of a call of which not all rows are made."""
    count, grid = call.num_queries, call.query_grid
    return Places(count - math.prod(grid), _two(grid)) if len(grid) <= 2 else Places(count, (0, 0))


def _source_places(found: Aggregation) -> Places:
    grid = found.source_grid
    if len(grid) > 2 or math.prod(grid) > found.num_sources:
        return Places(found.num_sources, (0, 0))
    prefix = found.num_sources - math.prod(grid)
    places = found.source_positions[prefix:].view(*grid, -1)
    if not bool(places.isfinite().all()):
        return Places(prefix, _two(grid))
    origin = places.flatten(0, -2)[0].tolist()
    step = [
        float(places.movedim(axis, 0).flatten(1)[1, axis] - origin[axis]) if grid[axis] > 1 else 1.0
        for axis in range(len(grid))
    ] if len(grid) else []  # fmt: skip
    return Places(prefix, _two(grid), _pair(origin, 0.0), _pair(step, 1.0))


def _two(grid: Sequence[int]) -> tuple[int, int]:
    """A sequence is one row."""
    return (1, int(grid[0])) if len(grid) == 1 else (int(grid[0]), int(grid[1]))


def _pair(values: Sequence[float], other: float) -> tuple[float, float]:
    return (other, values[0]) if len(values) == 1 else (values[0], values[1])


def _every(places: Places, stride: int) -> list[int]:
    """The queries that are stored: all in front, and of the grid one in each cell of stride x stride."""
    axes = [[min(i + stride // 2, n - 1) for i in range(0, n, stride)] for n in places.grid]
    return [*range(places.prefix), *(places.prefix + r * places.grid[1] + c for r in axes[0] for c in axes[1])]


def _ellipses(mixer: Any) -> tuple[np.ndarray, np.ndarray] | tuple[None, None]:
    """Centres and precision of quadratic heads on images."""
    found = quadratic_heads(mixer).get("")
    if found is None or mixer.rank != 2:
        return None, None
    return np.array(found["centers"]), np.array(found["precision"])
