"""The contract that every token mixer keeps, as functions: the tests run them, and so can anyone for an operator
of their own.

A check takes a spec and a grid, builds the operator at `DIM` channels with random parameters, and returns None if
the promise is kept, a sentence if the operator says in words that it does not apply, and raises `Broken` if not.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

from glocal import mixers
from glocal.contract.forms import EXPORTED_TO as EXPORTED_TO
from glocal.contract.forms import (
    autocast,
    bfloat16,
    compiles,
    declared_cost,
    exports,
    float32,
    float64,
    state_dict_round_trip,
    wrong_shapes_are_refused,
)
from glocal.contract.paths import (
    double_backward,
    empty_batch,
    forced_fast_never_falls_back,
    forward_equals_definition,
    gradient,
)
from glocal.contract.reading import causal_reads_no_later_token, padding_changes_nothing, pieces_equal_the_whole
from glocal.contract.weights import (
    dense_says_the_same,
    looking_changes_nothing,
    positions_are_those_of_the_grid,
    query_subset,
    scores_make_the_weights,
)
from glocal.contract.words import NOT_APPLICABLE as NOT_APPLICABLE
from glocal.evidence import DIM, Broken
from glocal.spec import available, build

GRIDS = ((13, 7), (8, 8), (21,), (1, 1), (1,))
# odd, non-square, multiples of small windows and not; the second of each pair is only as large as it must be
COMPILED_AT = {1: (21,), 2: (13, 11)}
SMALL = {1: (5,), 2: (4, 3)}

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


def fits(spec: str, grid: Sequence[int]) -> bool:
    """Whether the operator has this rank."""
    return rank_of(spec) in (None, len(grid))


def rank_of(spec: str) -> int | None:
    """The rank of the operator's grids; None: any."""
    return getattr(build(spec, DIM), "rank", None)


def _exempt(spec: str, check: "Check") -> str | None:
    """What the operator says of a check that cannot run on it; a check that runs is held to its result."""
    try:
        mixer = build(spec, DIM)
    except ValueError:
        return None
    why_not = getattr(mixer, "exempt", {}).get(check.__name__)
    return None if why_not is None else f"{type(mixer).__name__}: {why_not}"
