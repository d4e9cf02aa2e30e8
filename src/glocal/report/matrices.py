"""Weights between positions as squares: a row for each output, a column for each input, darker where more is read."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from glocal.report.drawing import opening, text, titled, upright

_SIDE, _LEFT, _TOP, _GAP = 18, 22, 40, 26  # of a square; beside and above the squares; between panels
_ZERO = 1e-6  # relative to the largest weight


@dataclass(frozen=True)
class Matrix:
    """One panel.

    Args:
        name: Over it.
        weights: One row for each output, one number for each input.
    """

    name: str
    weights: Sequence[Sequence[float]]

    def __post_init__(self) -> None:
        lengths = {len(row) for row in self.weights}
        if len(lengths) != 1 or lengths == {0} or not all(math.isfinite(w) for row in self.weights for w in row):
            raise ValueError(f"weights: of {self.name!r}, must be rows of one length of finite numbers, at least one")


def matrices_chart(title: str, panels: Sequence[Matrix], *, sides: tuple[str, str] = ("inputs", "outputs")) -> Markup:
    """The panels side by side, all on one scale: a square is as opaque as its weight's size is large.

    Args:
        title: What it shows, for readers who do not see it.
        panels: What to draw, at least one.
        sides: What stands beside the columns and the rows.
    """
    largest = max(abs(w) for panel in panels for row in panel.weights for w in row) or 1.0
    widths = [_SIDE * len(panel.weights[0]) for panel in panels]
    width = _LEFT + sum(widths) + _GAP * (len(panels) - 1) + 2
    tallest = max(len(panel.weights) for panel in panels)
    parts = [opening(title, width, _TOP + _SIDE * tallest + 4)]
    parts.append(upright(14, _TOP + _SIDE * tallest / 2, sides[1], kind="small"))
    left = float(_LEFT)
    for panel, wide in zip(panels, widths, strict=True):
        parts.append(text(left + wide / 2, 14, panel.name, kind="number bold"))
        parts.append(text(left + wide / 2, 32, sides[0], kind="small"))
        parts += _squares(panel, left, largest)
        left += wide + _GAP
    return Markup("\n").join([*parts, Markup("</svg>")])


def _squares(panel: Matrix, left: float, largest: float) -> list[Markup]:
    marks = []
    for o, row in enumerate(panel.weights):
        for i, weight in enumerate(row):
            x, y = left + _SIDE * i, _TOP + _SIDE * o
            shape = Markup('<rect class="cell" x="{:.1f}" y="{:.1f}" width="{}" height="{}"/>').format(
                x, y, _SIDE, _SIDE
            )
            if abs(weight) > _ZERO * largest:
                full = Markup('<rect class="f1" x="{:.1f}" y="{:.1f}" width="{}" height="{}" opacity="{:.2f}"/>')
                share = 0.12 + 0.88 * abs(weight) / largest
                marks.append(
                    titled(
                        f"output {o} from input {i}: {weight:.3g}",
                        [full.format(x, y, _SIDE, _SIDE, share), shape],
                    )
                )
            else:
                marks.append(shape)
    return marks
