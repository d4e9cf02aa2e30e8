"""One budget for all: the width and the MLP ratio with which a layout costs as much as another."""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from glocal.analysis import cost
from glocal.backbone import Backbone, default_dims, parse_layout

Of = Literal["macs", "params"]

REFERENCE = "C-C-T-T"
TOLERANCE = 0.02  # how far a network may be from its target
CLOSE = 0.005  # below this the standard MLP ratio stays
STANDARD, NARROWEST, WIDEST = 4.0, 1.0, 8.0  # MLP ratios
STEP = 8  # widths are its multiples where the base widths are
REACH = 64  # steps around a width that are searched for one that all operators take


class Fitted(NamedTuple):
    """A network that meets its budget: arguments of `Backbone`, and what they cost."""

    dims: tuple[int, ...]
    mlp_ratio: float
    macs: int
    params: int


def reference(
    img_size: int | Sequence[int],
    in_chans: int,
    num_classes: int,
    base_dims: Sequence[int] | None = None,
    of: Of = "macs",
) -> int:
    """The budget of a study: what C-C-T-T costs with the base widths, whichever layouts are compared.

    Args:
        img_size: As `Backbone` takes it.
        in_chans: Channels of an image.
        num_classes: Number of scores.
        base_dims: Width of every stage; `default_dims` if not given.
        of: "macs" (multiply-adds of one image) or "params".
    """
    dims = base_widths(len(parse_layout(REFERENCE)), base_dims)
    build = _builder(REFERENCE, in_chans=in_chans, num_classes=num_classes, img_size=img_size)
    return _cost(build(dims, STANDARD), of, _image(img_size, in_chans))


def fit(
    layout: str,
    target: int,
    of: Of = "macs",
    *,
    in_chans: int,
    num_classes: int,
    img_size: int | Sequence[int],
    base_dims: Sequence[int] | None = None,
    **options: Any,
) -> Fitted:
    """The network of a layout whose cost agrees with the target within 2 %, as a rule within 0.5 %.

    All widths are the base widths times one scale, in steps that every operator of the layout takes. The scale is
    the one that comes nearest to the target with the standard MLP ratio 4; the ratio, between 1 and 8, does the rest:
    it sets the hidden width of every MLP and of every convolution block. The result depends on nothing but the
    arguments.

    Args:
        layout: As `Backbone` takes it; one to many stages.
        target: What to agree with, such as `reference` gives.
        of: What the target counts, "macs" (multiply-adds of one image) or "params".
        in_chans, num_classes, img_size, options: As `Backbone` takes them.
        base_dims: Widths at scale 1. Where a layout has another number of stages, `default_dims` at the same first
            width stands in. `default_dims` if not given.

    Raises:
        ValueError: The layout is not one; an operator refuses every width; no width meets the target.

    Cost: About six networks on the meta device, 0.1 to 0.5 s.
    """
    if target < 1:
        raise ValueError(f"budget: the target is {target} {of}; it must be at least 1")
    base = base_widths(len(parse_layout(layout)), base_dims)
    unit = math.gcd(STEP, *base)
    part = math.gcd(*base) // unit  # scale 1 in steps
    build = _builder(layout, in_chans=in_chans, num_classes=num_classes, img_size=img_size, **options)
    image = _image(img_size, in_chans)

    def dims_at(step: int) -> tuple[int, ...]:
        return tuple(width // part * step for width in base)

    @cache
    def cost_at(step: int, mlp_ratio: float = STANDARD) -> int:
        return _cost(build(dims_at(step), mlp_ratio), of, image)

    def first_taken(steps: Iterable[int]) -> int | None:
        """The first step whose widths every operator takes."""
        for step in steps:
            try:
                build(dims_at(step), STANDARD)
                return step
            except ValueError as error:
                refusals.append(error)
        return None

    refusals: list[ValueError] = []
    best = _nearest_step(cost_at, first_taken, target, part)
    if best is None:
        raise refusals[0]
    above, below = range(best + 1, best + REACH), range(best - 1, max(0, best - REACH), -1)
    for step in (best, first_taken(above), first_taken(below)):
        if step is None:
            continue
        ratio = _ratio(partial(cost_at, step), target)
        if abs(cost_at(step, ratio) / target - 1) <= TOLERANCE:
            net = build(dims_at(step), ratio)
            macs = cost_at(step, ratio) if of == "macs" else cost.macs(net, image)
            return Fitted(dims_at(step), ratio, macs, cost.params(net))
    raise ValueError(
        f"layout {layout!r}: no width comes within {TOLERANCE:.0%} of {target:,} {of}; the nearest, "
        f"{dims_at(best)}, has {cost_at(best):,}: change the budget or the operators' options"
    )


def base_widths(stages: int, base_dims: Sequence[int] | None = None) -> tuple[int, ...]:
    """The base widths for this number of stages: those given, or `default_dims` scaled to the same first width."""
    standard = default_dims(stages)
    if base_dims is None or len(base_dims) == stages:
        return tuple(base_dims or standard)
    return tuple(max(1, round(width * base_dims[0] / standard[0])) for width in standard)


def _nearest_step(
    cost_at: Callable[[int], int], first_taken: Callable[[Iterable[int]], int | None], target: int, start: float
) -> int | None:
    """The step whose cost is nearest to the target, as a ratio; None if none is taken. Found by secants."""
    found: dict[int, int] = {}

    def distance(step: int) -> float:
        return abs(math.log(found[step] / target))

    guess = start
    while (step := first_taken(_outward(guess))) is not None and step not in found:
        found[step] = cost_at(step)
        near = sorted(found, key=distance)[:2]
        # a cost is nearly quadratic in the width, so its root is nearly a line
        roots = [math.sqrt(found[s]) for s in near]
        slope = (roots[0] - roots[1]) / (near[0] - near[1]) if len(near) == 2 else roots[0] / near[0]
        if slope <= 0:  # an operator whose cost does not follow its width
            break
        guess = min(near[0] + (math.sqrt(target) - roots[0]) / slope, 4 * near[0])
    return min(found, key=distance, default=None)


def _outward(guess: float) -> list[int]:
    """Steps around a guess, the nearest first."""
    steps = range(max(1, round(guess) - REACH), max(1, round(guess)) + REACH)
    return sorted(steps, key=lambda step: abs(step - guess))


def _ratio(cost_at: Callable[[float], int], target: int) -> float:
    """The MLP ratio that comes nearest to the target. A cost is a line in the ratio, but for rounded hidden widths."""
    standard = cost_at(STANDARD)
    if abs(standard / target - 1) <= CLOSE:
        return STANDARD
    end = WIDEST if standard < target else NARROWEST
    if (change := cost_at(end) - standard) == 0:
        return STANDARD
    return round(STANDARD + min(1, (target - standard) / change) * (end - STANDARD), 3)


def _builder(layout: str, **arguments: Any) -> Callable[[tuple[int, ...], float], nn.Module]:
    """Networks of a layout by widths and MLP ratio: shapes without values where the operators allow it."""

    def build(dims: tuple[int, ...], mlp_ratio: float) -> nn.Module:
        make = partial(Backbone, layout, dims=dims, mlp_ratio=mlp_ratio, **arguments)
        try:
            with torch.device("meta"):
                return make()
        except ValueError:
            raise
        except Exception:  # an operator that computes with values as it is built
            with torch.random.fork_rng(devices=[]):
                return make()

    return build


def _cost(net: nn.Module, of: Of, image: torch.Tensor) -> int:
    return cost.params(net) if of == "params" else cost.macs(net, image)


def _image(img_size: int | Sequence[int], in_chans: int) -> torch.Tensor:
    grid = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    return torch.empty(1, in_chans, *grid)
