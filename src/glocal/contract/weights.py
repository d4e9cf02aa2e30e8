"""What an operator says of its weights is so: dense and stored, their places, terms and rows; looking moves nothing."""

import copy
from collections.abc import Callable

import torch

from glocal.aggregation import aggregate, grid_positions
from glocal.contract.words import MORE_THAN_A_SOFTMAX, NO_SOFTMAX, NO_WEIGHTS
from glocal.evidence import close, padded, random_mixer, tokens, true, where_taken
from glocal.inspection import inspect
from glocal.mixer import TokenMixer
from glocal.operator import Operator, TokenModule


def dense_says_the_same(spec: str, grid: tuple[int, ...]) -> str | None:
    """dense() and coalesce() give the same sums as the stored weights; geometry has the right shapes."""
    mixer = random_mixer(spec)
    if (said := _no_weights(mixer)) is not None:
        return said
    x = tokens(2, *grid)
    also = mixer.besides(x)
    found, values = mixer.weights(x, **also), mixer.values(also.get("source", x))
    mixed = aggregate(found, values)
    close("coalesce()", aggregate(found.coalesce(), values), mixed, 1e-9)
    dense = found.dense()
    groups = max(values.shape[2], dense.shape[1])
    v = values.expand(-1, -1, groups, -1)
    by_dense = torch.einsum("bgnm,bmgd->bngd", dense.expand(2, groups, -1, -1), v)
    close("dense()", by_dense.flatten(2), mixed, 1e-9)
    queries, sources = dense.shape[2:]
    true(found.query_positions.shape[0] == queries, f"{len(found.query_positions)} query positions, {queries} queries")
    true(
        found.source_positions.shape[0] == sources, f"{len(found.source_positions)} source positions, {sources} sources"
    )
    true(tuple(found.out_grid) == mixer.out_grid(grid), f"out_grid {found.out_grid}, not {mixer.out_grid(grid)}")
    return None


def positions_are_those_of_the_grid(spec: str, grid: tuple[int, ...]) -> str | None:
    """Queries stand at the output grid's coordinates; sources on a grid of equal steps, in the same raster order.

    Sources before those of the grid (pooled ones) may stand anywhere; queries of another source's have no place.
    """
    mixer = random_mixer(spec)
    if (said := _no_weights(mixer)) is not None:
        return said
    x = tokens(2, *grid)
    also = mixer.besides(x)
    found = mixer.weights(x, **also)
    if "source" in also:
        true(bool(found.query_positions.isnan().all()), "a query has a place among tokens of another source")
    else:
        close("query_positions", found.query_positions, grid_positions(found.out_grid), 0)
    coordinates, places = grid_positions(found.source_grid), found.source_positions
    true(len(coordinates) <= len(places), f"source_grid {found.source_grid} holds more than {len(places)} sources")
    places = places[len(places) - len(coordinates) :]
    steps = places[-1] - places[0]
    expected = places[0] + coordinates * (steps / coordinates[-1].clamp(min=1))
    close("source_positions", places, expected, 1e-5)
    true(bool((steps >= 0).all()), f"source_positions run backwards: {steps.tolist()}")
    return None


def scores_make_the_weights(spec: str, grid: tuple[int, ...]) -> str | None:
    """The softmax of the sum of the named terms is the weights, wherever rows sum to 1; of a mixture, the sum of its
    parts, each with rows that sum to 1, by their shares."""
    mixer = random_mixer(spec)
    if isinstance(mixer, TokenMixer) and type(mixer)._parts is not TokenMixer._parts:
        x = tokens(2, *grid)
        parts, mixed = mixer.parts(x), mixer.weights(x).weights
        total = sum(share[:, None, None] * part for share, part in parts.values())
        close("the sum of the parts by their shares", total.expand_as(mixed), mixed, 1e-9)  # type: ignore[union-attr]
        for name, (_, part) in parts.items():
            rows = part.sum(-1)
            close(f"the row sums of {name}", rows, torch.ones_like(rows), 1e-9)
        return None
    if not isinstance(mixer, TokenMixer) or type(mixer)._scores is TokenMixer._scores:
        return NO_SOFTMAX
    x = tokens(2, *grid)
    also = mixer.besides(x)
    found, terms = mixer.weights(x, **also), mixer.scores(x, **also)
    if not torch.allclose(found.weights.sum(-1), torch.ones((), dtype=torch.float64)):
        return MORE_THAN_A_SOFTMAX
    total = sum(terms.values()).expand(found.weights.shape)  # type: ignore[union-attr]
    seen = found.weights != 0
    expected = total.masked_fill(~seen, -torch.inf).softmax(-1)
    close("the softmax of the sum of scores", expected, found.weights, 1e-9)
    return None


def query_subset(spec: str, grid: tuple[int, ...]) -> str | None:
    """A subset of the queries gives those rows, of the output and of the weights."""
    mixer = random_mixer(spec)
    x = tokens(2, *grid)
    also = mixer.besides(x)
    full = mixer(x, **also).flatten(1, -2)
    queries = torch.arange(full.shape[1] - 1, -1, -2)
    close("the output at a subset of queries", mixer(x, queries=queries, **also), full[:, queries], 1e-9)
    if not isinstance(mixer, TokenMixer):
        return None
    rows, some = mixer.weights(x, **also).dense(), mixer.weights(x, queries=queries, **also)
    rows = rows.expand(-1, -1, full.shape[1], -1)[:, :, queries]
    close("the weights at a subset of queries", some.dense().expand_as(rows), rows, 1e-9)
    true(len(some.query_positions) == len(queries), "query_positions are not those of the subset")
    return None


def looking_changes_nothing(spec: str, grid: tuple[int, ...]) -> str | None:
    """inspect leaves the output bit-identical and its weights rebuild it, with padding too; no buffer and no random
    state moves.

    An ordinary module is looked at by `mix`.
    """
    for training in (False, True):
        mixer = random_mixer(spec).train(training)
        x = tokens(2, *grid)
        if isinstance(mixer, TokenModule):
            _changes_no_state(mixer, lambda: mixer.mix(x), "mix")  # noqa: B023
            continue
        also = mixer.besides(x)
        plain = copy.deepcopy(mixer)(x, **also)
        draws = torch.get_rng_state()
        with inspect(mixer) as seen:
            out = mixer(x, **also)
        true(training or torch.equal(draws, torch.get_rng_state()), "a forward pass in evaluation draws random numbers")
        true(torch.equal(out, plain), "the output differs from the one without inspect")
        (call,) = seen
        _changes_no_state(mixer, lambda: (call.weights(), mixer.weights(x, **also)), "asking for weights")  # noqa: B023
        padding = where_taken(mixer, valid=padded(grid))
        with inspect(mixer) as again:
            mixer(x, **also | padding)
        error = max(one.rebuild_error() for one in (call, *again))
        true(error <= 1e-9, f"the weights rebuild the output with a relative error of {error:.1e}")
    return None


def _changes_no_state(mixer: Operator, look: Callable[[], object], what: str) -> None:
    """Broken if looking moves a buffer or the random state."""
    state, draws = copy.deepcopy(mixer.state_dict()), torch.get_rng_state()
    look()
    for name, value in mixer.state_dict().items():
        true(torch.equal(state[name], value), f"{what} moved the buffer {name}")
    true(torch.equal(draws, torch.get_rng_state()), f"{what} moved the random state")


def _no_weights(mixer: Operator) -> str | None:
    return None if isinstance(mixer, TokenMixer) else NO_WEIGHTS
