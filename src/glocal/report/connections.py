"""What is connected with what: inputs on the left, outputs on the right, a line for every weight that is not zero."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from glocal.report.drawing import LIGHT, Series, opening, series_of, text, titled

_STEP, _SPAN, _SIDE, _TOP, _GAP = 22, 150, 26, 40, 36  # between nodes, from side to side, beside, above, between panels
_FAINTEST = 0.25  # opacity of the smallest weight that is drawn
_EQUAL = 1e-6  # relative to the largest weight: what is one weight, and what is zero


@dataclass(frozen=True)
class Connections:
    """One panel.

    Args:
        name: Over it: "positions", "channels".
        weights: One row for each output, one number for each input; 0 where nothing connects them.
    """

    name: str
    weights: Sequence[Sequence[float]]

    def __post_init__(self) -> None:
        lengths = {len(row) for row in self.weights}
        if len(lengths) != 1 or lengths == {0} or not all(math.isfinite(w) for row in self.weights for w in row):
            raise ValueError(f"weights: of {self.name!r}, must be rows of one length of finite numbers, at least one")


def connections_chart(title: str, panels: Sequence[Connections], *, sides: tuple[str, str] = ("in", "out")) -> Markup:
    """The panels side by side. Lines are as opaque as their weight is large.

    Lines of one weight have one colour, cool for the smallest, where a panel has no more different weights than there
    are colours; so that sharing is seen. In other panels all lines have one colour.

    Args:
        title: What it shows, for readers who do not see it.
        panels: What to draw, at least one.
        sides: What stands over inputs and outputs.
    """
    tallest = max(max(len(panel.weights), len(panel.weights[0])) for panel in panels)
    width = len(panels) * (_SPAN + 2 * _SIDE) + (len(panels) - 1) * _GAP
    height = _TOP + _STEP * tallest
    parts = [opening(title, width, height)]
    for i, panel in enumerate(panels):
        left = i * (_SPAN + 2 * _SIDE + _GAP) + _SIDE
        parts += _panel(panel, left, _TOP + _STEP * (tallest - 1) / 2, sides)
    return Markup("\n").join([*parts, Markup("</svg>")])


def _panel(panel: Connections, left: float, middle: float, sides: tuple[str, str]) -> list[Markup]:
    """A panel whose inputs stand at `left`, around the height `middle`."""
    outputs, inputs, right = len(panel.weights), len(panel.weights[0]), left + _SPAN
    largest = max(abs(w) for row in panel.weights for w in row)
    looks = _looks([w for row in panel.weights for w in row if abs(w) > _EQUAL * largest], largest)

    def height(place: int, count: int) -> float:
        return middle + _STEP * (place - (count - 1) / 2)

    marks = [
        text((left + right) / 2, 14, panel.name, kind="strong"),
        text(left, 28, sides[0], kind="small"),
        text(right, 28, sides[1], kind="small"),
    ]
    for o, row in enumerate(panel.weights):
        for i, weight in enumerate(row):
            if abs(weight) > _EQUAL * largest:
                _, look = looks[bisect_right(looks, weight, key=lambda look: look[0]) - 1]
                line = Markup(
                    '<line class="s{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" stroke-width="1.5" '
                    'stroke-opacity="{:.2f}"/>'
                ).format(
                    look.colour,
                    *(left, height(i, inputs), right, height(o, outputs)),
                    _FAINTEST + (1 - _FAINTEST) * abs(weight) / largest,
                )
                marks.append(titled(f"output {o} from input {i}: {weight:.3g}", [line]))
    node = Markup('<circle class="full" cx="{:.1f}" cy="{:.1f}" r="4"/>')
    marks += [node.format(left, height(i, inputs)) for i in range(inputs)]
    marks += [node.format(right, height(o, outputs)) for o in range(outputs)]
    return marks


def _looks(weights: Sequence[float], largest: float) -> list[tuple[float, Series]]:
    """A colour from each different weight on, in order; one for all if there are too many."""
    different: list[float] = []
    for weight in sorted(weights):
        if not different or weight - different[-1] > _EQUAL * largest:
            different.append(weight)
    many = len(different) > len(LIGHT)
    return [(weight, series_of(0 if many else i, 1 if many else len(different))) for i, weight in enumerate(different)]
