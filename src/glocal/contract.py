"""The contract that every token mixer keeps, as functions: the tests run them, and so can anyone for an operator
of their own.

A check takes a spec and a grid, builds the operator at `DIM` channels with random parameters, and returns None if
the promise is kept, a sentence if the operator says in words that it does not apply, and raises `Broken` if not.
"""

import copy
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from glocal import mixers
from glocal.aggregation import aggregate, grid_positions
from glocal.evidence import (
    DIM,
    Broken,
    as_function,
    close,
    numerically,
    precision,
    random_mixer,
    tokens,
    true,
    with_grads,
)
from glocal.inspection import inspect
from glocal.mixer import Cache, TokenMixer, Unsupported
from glocal.operator import Operator, TokenModule
from glocal.spec import available, build

GRIDS = ((13, 7), (8, 8), (21,), (1, 1), (1,))
# odd, non-square, multiples of small windows and not; the second of each pair is only as large as it must be
COMPILED_AT = {1: (21,), 2: (13, 11)}
EXPORTED_TO = {1: ((9,), (12,), (17,), (40,)), 2: ((9, 16), (12, 12), (17, 10), (20, 28))}
SMALL = {1: (5,), 2: (4, 3)}

# What is said where a check has nothing to look at.
ONE_PATH = "an ordinary module: its forward pass is its definition"
NO_WEIGHTS = "an ordinary module: it has no aggregation weights"
NOT_CAUSAL = "not causal"
NO_SEQUENCE = "no sequence"
NO_SOFTMAX = "no softmax"
MORE_THAN_A_SOFTMAX = "more than a softmax"
NOT_APPLICABLE = (ONE_PATH, NO_WEIGHTS, NOT_CAUSAL, NO_SEQUENCE, NO_SOFTMAX, MORE_THAN_A_SOFTMAX)


@dataclass(frozen=True)
class Outcome:
    """What one check said of one spec on one grid."""

    check: str
    spec: str
    grid: tuple[int, ...]
    state: Literal["kept", "refused", "broken"]
    sentence: str = ""


def examples() -> tuple[str, ...]:
    """Every example of every operator."""
    return tuple(spec for name in available() for spec in getattr(mixers, name).examples)


def run(spec: str, check: "Check", grid: Sequence[int]) -> Outcome:
    """Runs one check and turns whatever happens into words."""
    about = (check.__name__, spec, tuple(grid))
    try:
        why_not = check(spec, tuple(grid))
    except Broken as error:
        return Outcome(*about, "broken", str(error))
    except Exception as error:  # a check must end in words, whatever an operator throws
        if (why_not := _exempt(spec, check)) is not None:
            return Outcome(*about, "refused", why_not)
        return Outcome(*about, "broken", f"{type(error).__name__}: {error}")
    return Outcome(*about, "refused", why_not) if why_not else Outcome(*about, "kept")


def causal(mixer: Operator) -> bool:
    """Whether its tokens have an order, of which it reads the earlier ones only."""
    return bool(getattr(mixer, "causal", False))


def _exempt(spec: str, check: "Check") -> str | None:
    """What the operator says of a check that cannot run on it; a check that runs is held to its result."""
    try:
        mixer = build(spec, DIM)
    except ValueError:
        return None
    why_not = getattr(mixer, "exempt", {}).get(check.__name__)
    return None if why_not is None else f"{type(mixer).__name__}: {why_not}"


def fits(spec: str, grid: Sequence[int]) -> bool:
    """Whether the operator has this rank."""
    return rank_of(spec) in (None, len(grid))


def rank_of(spec: str) -> int | None:
    """The rank of the operator's grids; None: any."""
    return getattr(build(spec, DIM), "rank", None)


# The checks.


def forward_equals_definition(spec: str, grid: tuple[int, ...]) -> str | None:
    """Values and every gradient in float64, in training and in evaluation."""
    if not isinstance(random_mixer(spec), TokenMixer):
        return ONE_PATH
    for training in (False, True):
        mixer = random_mixer(spec).train(training)
        x = tokens(2, *grid)
        before = copy.deepcopy(mixer.state_dict())
        out = with_grads(mixer, mixer, x)
        after = copy.deepcopy(mixer.state_dict())
        mixer.load_state_dict(before)
        expected = with_grads(mixer, mixer.reference, x)
        for name, value in expected.items():
            close(f"{name} {'in training' if training else 'in evaluation'}", out[name], value, 1e-9)
        for name, value in mixer.state_dict().items():
            close(f"buffer {name} after a call", after[name], value, 1e-9)
    return None


def empty_batch(spec: str, grid: tuple[int, ...]) -> str | None:
    """No images in, none out, in training and in evaluation, with padding and without, and no state moves."""
    mixer = random_mixer(spec)
    x = tokens(2, *grid)
    expected = (0, *mixer(x, **mixer.besides(x)).shape[1:])
    padding = _where_taken(mixer, valid=torch.ones(0, *grid, dtype=torch.bool))
    for training in (False, True):
        mixer.train(training)
        before = copy.deepcopy(mixer.state_dict())
        for path, call in itertools.product(("forward", "reference"), ({}, padding)):
            x = tokens(0, *grid).requires_grad_()
            out = getattr(mixer, path)(x, **mixer.besides(x) | call)
            out.sum().backward()
            true(out.shape == expected, f"an empty batch gives shape {tuple(out.shape)}, not {expected}")
        for name, value in mixer.state_dict().items():
            true(torch.equal(before[name], value), f"an empty batch moves the buffer {name}")
    return None


def gradient(spec: str, grid: tuple[int, ...]) -> str | None:
    """gradcheck of the forward pass, inputs and parameters."""
    mixer = random_mixer(spec)
    x, call = as_function(mixer, mixer, grid)
    numerically(torch.autograd.gradcheck, call, x)
    return None


def double_backward(spec: str, grid: tuple[int, ...]) -> str | None:
    """gradgradcheck of the definition; of the fast path too, unless it says that it has none."""
    mixer = random_mixer(spec)
    x, call = as_function(mixer, mixer.reference, grid)
    numerically(torch.autograd.gradgradcheck, call, x)
    x, call = as_function(mixer, mixer, grid)
    try:
        numerically(torch.autograd.gradgradcheck, call, x)
    except Unsupported as error:
        true("impl='reference'" in str(error), f"the fast path's refusal does not say what to do: {error}")
    return None


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


def causal_reads_no_later_token(spec: str, grid: tuple[int, ...]) -> str | None:
    """Weights above the diagonal are zero, and a later token changes no earlier output."""
    mixer = random_mixer(spec)
    if not causal(mixer):
        return NOT_CAUSAL
    x = tokens(2, *grid)
    if isinstance(mixer, TokenMixer):
        above = torch.triu(mixer.weights(x).dense(), diagonal=1)
        true(not above.any(), f"a weight above the diagonal is {above.abs().max():.1e}, not 0")
    changed = x.clone()
    changed.flatten(1, -2)[:, -1] += 1
    after, before = (mixer(t).flatten(1, -2)[:, :-1] for t in (changed, x))
    close("an earlier output after a later token changed", after, before, 0)
    return None


def pieces_equal_the_whole(spec: str, grid: tuple[int, ...]) -> str | None:
    """With a cache a causal operator gives token by token, and in uneven pieces, what it gives at once; so it does
    where tokens are padding, and its weights rebuild every piece.
    """
    mixer = random_mixer(spec)
    if not causal(mixer):
        return NOT_CAUSAL
    x = tokens(2, *grid)
    try:
        mixer(x, cache=Cache())
    except ValueError as error:
        true(type(mixer).__name__ in str(error), f"a cache is refused without the operator's name: {error}")
        return NO_SEQUENCE if len(grid) > 1 else str(error)
    length = grid[0]
    anywhere = torch.ones(2, length, dtype=torch.bool)
    anywhere[1, [0, *range(2, length, 3), length - 1]] = False
    at_the_end = torch.arange(length) < torch.tensor([[length], [length // 2]])
    for path in (mixer, mixer.reference):
        for valid in (None, anywhere, at_the_end):
            try:
                whole = path(x, **({} if valid is None else {"valid": valid}))
            except ValueError as error:
                true(type(mixer).__name__ in str(error), f"padding is refused without the operator's name: {error}")
                continue
            for ends in (range(1, length + 1), sorted({min(n, length) for n in (1, 6, 7, length // 2, length)} - {0})):
                out = torch.cat(_in_pieces(path, x, valid, ends), 1)
                real = slice(None) if valid is None else valid
                close("a sequence in pieces", out[real], whole[real], 1e-10)
    if isinstance(mixer, TokenMixer):
        with inspect(mixer) as seen:
            _in_pieces(mixer, x, None, range(1, length + 1))
        error = max(call.rebuild_error() for call in seen)
        true(error <= 1e-9, f"the weights rebuild a piece with a relative error of {error:.1e}")
    return None


def padding_changes_nothing(spec: str, grid: tuple[int, ...]) -> str | None:
    """Real tokens of a padded batch get what they would get alone, and what stands in the padding is never read."""
    own = tuple((2 * n + 2) // 3 for n in grid)
    valid = torch.zeros(2, *grid, dtype=torch.bool)
    valid[0] = True
    _corner(valid[1], own)[...] = True
    mixer = random_mixer(spec)
    x = tokens(2, *grid)

    def call(path: Callable[..., Tensor], tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """Padding is the source's where there is one: then x itself stays as it is."""
        also = mixer.besides(tokens)
        return path(x if also and valid is not None else tokens, valid=valid, **also)

    try:
        call(mixer, x, valid)
    except ValueError as error:
        true(type(mixer).__name__ in str(error), f"padding is refused without the operator's name: {error}")
        return str(error)
    own_out = mixer.out_grid(own)
    for path in (mixer, mixer.reference):
        nothing = call(path, x, torch.zeros_like(valid))
        true(bool(nothing.isfinite().all()), "queries without any real source come out infinite or NaN")
        padded = call(path, x, valid)
        close("the padded image", _corner(padded[1], own_out), call(path, _corner(x[1], own)[None])[0], 1e-9)
        close("the image that fills the grid", padded[0], call(path, x[:1])[0], 1e-9)
    mixer.train()
    rubbish = 100 * torch.randn_like(x)
    rubbish[..., 0], rubbish[..., 1] = torch.nan, torch.inf
    noise = torch.where(valid[..., None], x, rubbish)
    start = copy.deepcopy(mixer.state_dict())
    for path in (mixer, mixer.reference):
        seen = []
        for padded in (x, noise):
            mixer.load_state_dict(start)
            padded = padded.clone().requires_grad_()
            out = call(path, padded, valid)
            real = [out[0], _corner(out[1], own_out)]
            grads = torch.autograd.grad(real[0].square().sum() + real[1].square().sum(), [padded, *mixer.parameters()])
            buffers = [b.clone().double() for b in mixer.buffers()]
            seen.append([*real, *buffers, grads[0].masked_fill(~valid[..., None], 0), *grads[1:]])
        for one, other in zip(*seen, strict=True):
            close("real tokens, gradients or statistics in training, after the padding changed", one, other, 1e-9)
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
        padding = _where_taken(mixer, valid=_padded(grid))
        with inspect(mixer) as again:
            mixer(x, **also | padding)
        error = max(one.rebuild_error() for one in (call, *again))
        true(error <= 1e-9, f"the weights rebuild the output with a relative error of {error:.1e}")
    return None


def forced_fast_never_falls_back(spec: str, grid: tuple[int, ...]) -> str | None:
    """impl="fast" gives the definition's result without calling it, or raises Unsupported with the operator's name."""
    mixer = random_mixer(spec)
    if not isinstance(mixer, TokenMixer):
        return ONE_PATH
    x = tokens(2, *grid)
    mixer.impl = "fast"
    with _definition_forbidden(mixer):
        try:
            out = mixer(x, **mixer.besides(x))
        except Unsupported as error:
            true(str(error).startswith(f"{type(mixer).__name__}: "), f"the refusal does not name the operator: {error}")
            return str(error)
    close("the forced fast path", out, mixer.reference(x, **mixer.besides(x)), 1e-9)
    return None


def float32(spec: str, grid: tuple[int, ...]) -> str | None:
    """Output and gradients come in float32, within 1e-5 of the largest entry in float64."""
    precision(spec, grid, torch.float32)
    return None


def float64(spec: str, grid: tuple[int, ...]) -> str | None:
    """Output and gradients come in float64, within 1e-12 of the largest entry."""
    precision(spec, grid, torch.float64)
    return None


def bfloat16(spec: str, grid: tuple[int, ...]) -> str | None:
    """Output and gradients within twice the definition's own bfloat16 error, and one rounding, of float64."""
    precision(spec, grid, torch.bfloat16)
    return None


def autocast(spec: str, grid: tuple[int, ...]) -> str | None:
    """Under autocast to bfloat16 the output stays within 6 % of the largest entry, and every gradient is finite."""
    exact, mixer = random_mixer(spec), random_mixer(spec).float()
    x = tokens(2, *grid)
    with torch.autocast(x.device.type, torch.bfloat16):
        found = with_grads(mixer, mixer, x.float())
    expected = exact.reference(x, **exact.besides(x))
    close("the output under autocast", found["the output"].double(), expected, 0.06)
    for name, value in found.items():  # no closer: where rounding flips a ReLU, the gradient rightly jumps
        true(bool(value.isfinite().all()), f"{name} under autocast is not finite")
    return None


def compiles(spec: str, grid: tuple[int, ...]) -> str | None:
    """torch.compile(fullgraph=True) with aot_eager, forward and backward; with padding too, in evaluation."""
    for training in (False, True):
        mixer = random_mixer(spec).train(training)
        x = tokens(2, *grid)
        torch._dynamo.reset()
        compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
        expected = with_grads(mixer, mixer, x)
        for name, value in with_grads(mixer, compiled, x).items():
            close(f"{name} of the compiled module", value, expected[name], 1e-6)
    mixer.eval()
    if call := _where_taken(mixer, valid=_padded(grid)):
        close("a padded batch in the compiled module", compiled(x, **call), mixer(x, **call), 1e-6)
    torch._dynamo.reset()
    return None


def exports(spec: str, grid: tuple[int, ...]) -> str | None:
    """torch.export with every length dynamic; the program is then run at four other sizes."""
    mixer = random_mixer(spec)
    dynamic = {axis + 1: torch.export.Dim.DYNAMIC for axis in range(len(grid))}
    x = tokens(2, *grid)
    also = mixer.besides(x)
    with torch.no_grad():
        shapes = {"x": dynamic} | dict.fromkeys(also, dynamic)
        program = torch.export.export(mixer, (x,), also, dynamic_shapes=shapes).module()
        for other in EXPORTED_TO[len(grid)]:
            x = tokens(2, *other)
            also = mixer.besides(x)
            close(f"the program exported at {grid}, run at {other}", program(x, **also), mixer(x, **also), 1e-9)
    return None


def state_dict_round_trip(spec: str, grid: tuple[int, ...]) -> str | None:
    """repr builds the same operator, and its state dict carries everything that the output depends on."""
    mixer = random_mixer(spec)
    again = build(repr(mixer), DIM).double().eval()
    true(repr(again) == repr(mixer), f"repr {mixer!r} builds {again!r}")
    again.load_state_dict(mixer.state_dict())
    x = tokens(2, *grid)
    also = mixer.besides(x)
    true(torch.equal(again(x, **also), mixer(x, **also)), "the copy's output differs")
    return None


def wrong_shapes_are_refused(spec: str, grid: tuple[int, ...]) -> str | None:
    """Wrong channels, a wrong rank or another mask raise a ValueError that holds what was given and needed."""
    mixer = random_mixer(spec)
    _refuses(mixer, torch.zeros(2, *grid, DIM - 1), f"{DIM - 1} channels", f"dim is {DIM}")
    _refuses(mixer, torch.zeros(2, DIM), f"(2, {DIM})", f"[B, *grid, {DIM}]")
    if (rank := getattr(mixer, "rank", None)) is not None:
        _refuses(mixer, torch.zeros(2, *[3] * (rank + 1), DIM), f"rank {rank}", f"rank {rank + 1}")
    larger = (2, *[n + 1 for n in grid])
    _refuses(mixer, tokens(2, *grid), f"valid has shape {larger}", str((2, *grid)), valid=torch.ones(larger) > 0)
    return None


def declared_cost(spec: str, grid: tuple[int, ...]) -> str | None:
    """`macs` is what torch.utils.flop_counter counts on the definition."""
    mixer = random_mixer(spec)
    declared, counted = mixer.macs(grid), mixer.counted_macs(grid)
    true(declared == counted, f"declares {declared} multiply-adds, the definition does {counted}")
    return None


Check = Callable[[str, tuple[int, ...]], str | None]

# which checks run on which grids
ON_EVERY_GRID: tuple[Check, ...] = (
    forward_equals_definition, empty_batch, dense_says_the_same, positions_are_those_of_the_grid,
    scores_make_the_weights, query_subset, causal_reads_no_later_token, looking_changes_nothing,
    forced_fast_never_falls_back, float32, float64, bfloat16, autocast, wrong_shapes_are_refused,
)  # fmt: skip
ON_LARGE_GRIDS: tuple[Check, ...] = (padding_changes_nothing, state_dict_round_trip, declared_cost)
ON_SMALL_GRIDS: tuple[Check, ...] = (gradient, double_backward)
ON_ONE_GRID: tuple[Check, ...] = (compiles, exports, pieces_equal_the_whole)


def cases(spec: str) -> Iterator[tuple[Check, tuple[int, ...]]]:
    """Every check of the contract with every grid it runs on, for one spec."""
    large = [grid for grid in GRIDS if max(grid) > 1]
    rank = rank_of(spec)
    for checks, grids in (
        (ON_EVERY_GRID, GRIDS),
        (ON_LARGE_GRIDS, large),
        (ON_SMALL_GRIDS, SMALL.values()),
        (ON_ONE_GRID, COMPILED_AT.values()),
    ):
        for check in checks:
            yield from ((check, grid) for grid in grids if rank in (None, len(grid)))


def _in_pieces(path: Callable[..., Tensor], x: Tensor, valid: Tensor | None, ends: Sequence[int]) -> list[Tensor]:
    """The outputs of a sequence's pieces, which end at these tokens, from one cache."""
    cache, out, start = Cache(), [], 0
    for end in ends:
        padding = {} if valid is None else {"valid": valid[:, :end]}
        out.append(path(x[:, start:end], cache=cache, **padding))
        start = end
    return out


def _changes_no_state(mixer: Operator, look: Callable[[], object], what: str) -> None:
    """Broken if looking moves a buffer or the random state."""
    state, draws = copy.deepcopy(mixer.state_dict()), torch.get_rng_state()
    look()
    for name, value in mixer.state_dict().items():
        true(torch.equal(state[name], value), f"{what} moved the buffer {name}")
    true(torch.equal(draws, torch.get_rng_state()), f"{what} moved the random state")


def _corner(image: Tensor, lengths: Sequence[int]) -> Tensor:
    """The part of an image [*S, ...] that starts at the origin, as a view."""
    for axis, length in enumerate(lengths):
        image = image.narrow(axis, 0, length)
    return image


@contextmanager
def _definition_forbidden(mixer: TokenMixer) -> Iterator[None]:
    def forbidden(*args: object, **kwargs: object) -> Tensor:
        raise Broken("impl='fast' fell back to the definition")

    for name in ("reference", "weights", "_weights"):
        setattr(mixer, name, forbidden)
    try:
        yield
    finally:
        for name in ("reference", "weights", "_weights"):
            delattr(mixer, name)


def _padded(grid: Sequence[int]) -> Tensor:
    """Two images that do not fill the grid: bool [2, *grid]."""
    valid = torch.zeros(2, *grid, dtype=torch.bool)
    for image, lengths in zip(valid, ([n - 1 for n in grid], [(n + 1) // 2 for n in grid]), strict=True):
        _corner(image, lengths)[...] = True
    return valid


def _where_taken(mixer: Operator, **call: Tensor) -> dict[str, Tensor]:
    """This part of a call, or nothing where the operator refuses it in words, or it is about another sequence."""
    if mixer.needs_source:
        return {}
    try:
        mixer(tokens(2, *call["valid"].shape[1:]), valid=torch.ones(2, *call["valid"].shape[1:], dtype=torch.bool))
    except ValueError:
        return {}  # `padding_changes_nothing` says which words
    return call


def _no_weights(mixer: Operator) -> str | None:
    return None if isinstance(mixer, TokenMixer) else NO_WEIGHTS


def _refuses(mixer: Operator, x: Tensor, *words: str, **call: Tensor) -> None:
    try:
        mixer(x, **mixer.besides(x) | call)
    except ValueError as error:
        missing = [word for word in words if word not in str(error)]
        true(not missing, f"the refusal of shape {tuple(x.shape)} does not hold {' or '.join(missing)}: {error}")
    else:
        raise Broken(f"takes x of shape {tuple(x.shape)} {'and ' + ', '.join(call) if call else ''}without a word")
