"""Line charts as inline SVG. Colours are CSS variables of the page, so that a chart follows light and dark."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

COLOURS = 8  # the page defines --c0 ... --c7
_DASHES = ("", "6 3", "2 3", "8 3 2 3")  # told apart without colour, too: every eighth line changes its dashes
_WIDTH, _HEIGHT = 640, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 12, 12, 40  # room for ticks such as 0.075 beside the unit


@dataclass(frozen=True)
class Line:
    """One line of a chart.

    Args:
        label: Shown by the browser when the line is pointed at.
        values: One value an epoch, from epoch 1 on; None or a non-finite value leaves a gap.
        series: Which colour and dashes; lines of one series look the same.
    """

    label: str
    values: Sequence[float | None]
    series: int


def stroke(series: int) -> Markup:
    """SVG attributes that a series is drawn with."""
    dashes = _DASHES[series // COLOURS % len(_DASHES)]
    dashed = Markup(' stroke-dasharray="{}"').format(dashes) if dashes else Markup("")
    return Markup('stroke="var(--c{})"').format(series % COLOURS) + dashed


def line_chart(title: str, unit: str, lines: Sequence[Line]) -> Markup:
    """A chart of values over epochs.

    Args:
        title: What it shows, for readers who do not see it.
        unit: Written along the value axis.
        lines: What to draw.
    """
    epochs = max((len(line.values) for line in lines), default=1)
    values = [v for line in lines for v in line.values if v is not None and math.isfinite(v)]
    ticks = _ticks(min(values, default=0.0), max(values, default=1.0))
    low, high = ticks[0], ticks[-1]

    def x(epoch: float) -> float:
        inner = _WIDTH - _LEFT - _RIGHT
        return _LEFT + inner * ((epoch - 1) / (epochs - 1) if epochs > 1 else 0.5)

    def y(value: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (high - value) / (high - low)

    parts = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">').format(_WIDTH, _HEIGHT, title)
    ]
    for tick in ticks:
        parts.append(
            Markup('<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>').format(
                _LEFT, _WIDTH - _RIGHT, y(tick), y(tick)
            )
        )
        parts.append(
            Markup('<text x="{}" y="{:.1f}" text-anchor="end">{}</text>').format(_LEFT - 6, y(tick) + 4, f"{tick:g}")
        )
    every = max(1, math.ceil(epochs / 10))
    for epoch in range(1, epochs + 1, every):
        parts.append(
            Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{}</text>').format(
                x(epoch), _HEIGHT - _BOTTOM + 18, epoch
            )
        )
    parts.append(
        Markup('<text x="{}" y="{}" text-anchor="middle">epoch</text>').format(
            (_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 6
        )
    )
    parts.append(
        Markup('<text transform="translate(13 {}) rotate(-90)" text-anchor="middle">{}</text>').format(
            (_TOP + _HEIGHT - _BOTTOM) / 2, unit
        )
    )
    for line in lines:
        parts.append(_drawn(line, x, y))
    parts.append(Markup("</svg>"))
    return Markup("\n").join(parts)


def _drawn(line: Line, x: Callable[[float], float], y: Callable[[float], float]) -> Markup:
    """The line and a dot at every epoch, so that a run of one epoch is seen."""
    pieces: list[list[str]] = [[]]
    dots = []
    for epoch, value in enumerate(line.values, 1):
        if value is None or not math.isfinite(value):
            pieces.append([])
            continue
        pieces[-1].append(f"{x(epoch):.1f},{y(value):.1f}")
        dots.append(
            Markup('<circle cx="{:.1f}" cy="{:.1f}" r="2.5" fill="var(--c{})"/>').format(
                x(epoch), y(value), line.series % COLOURS
            )
        )
    drawn = [
        Markup('<polyline fill="none" {} points="{}"/>').format(stroke(line.series), " ".join(points))
        for points in pieces
        if len(points) > 1
    ]
    return Markup("<g><title>{}</title>{}{}</g>").format(
        escape(line.label), Markup("").join(drawn), Markup("").join(dots)
    )


def _ticks(low: float, high: float) -> list[float]:
    """Four to seven round numbers that enclose low ... high."""
    if high - low < 1e-9:
        low, high = low - 0.5, high + 0.5
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * k for k in (1, 2, 2.5, 5, 10) if (high - low) / (step * k) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]
