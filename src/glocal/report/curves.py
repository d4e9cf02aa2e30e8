"""Line charts: values over epochs, and values with intervals over a size."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from glocal.report.drawing import (
    Axis,
    Frame,
    Series,
    drawable,
    line,
    linear_axis,
    log_axis,
    marker,
    path,
    titled,
)

_MOST_DOTS = 40  # in longer lines, dots would hide the line


@dataclass(frozen=True)
class Line:
    """One line over epochs.

    Args:
        label: Shown by the browser when the line is pointed at.
        values: One value an epoch, from epoch 1 on; None or a non-finite value is left out.
        series: How it looks.
    """

    label: str
    values: Sequence[float | None]
    series: Series


def line_chart(title: str, unit: str, lines: Sequence[Line]) -> Markup:
    """A chart of values over epochs.

    Args:
        title: What it shows, for readers who do not see it.
        unit: Written along the value axis.
        lines: What to draw.
    """
    epochs = max((len(each.values) for each in lines), default=1)
    every = max(1, math.ceil(epochs / 10))
    labels = tuple((float(epoch), str(epoch)) for epoch in range(1, epochs + 1, every))
    # A single epoch stands in the middle.
    across = Axis("epoch", 1, epochs, labels) if epochs > 1 else Axis("epoch", 0, 2, labels)
    frame = Frame(title, across, linear_axis(unit, [v for each in lines for v in each.values]))
    return frame.drawn(titled(each.label, _drawn(each, frame, epochs)) for each in lines)


def _drawn(each: Line, frame: Frame, epochs: int) -> list[Markup]:
    """The line, and a dot at every value, so that a run of one epoch is seen."""
    points = [
        (frame.x(epoch), frame.y(value))
        for epoch, value in enumerate(each.values, 1)
        if value is not None and drawable(value)
    ]
    dots = points if epochs <= _MOST_DOTS or len(points) == 1 else []
    joined = [path(points, each.series)] if len(points) > 1 else []
    return joined + [marker(x, y, each.series, 2.5) for x, y in dots]


@dataclass(frozen=True)
class Measured:
    """A candidate's values over a size.

    Args:
        label: The candidate.
        points: (size, mean, low, high), low and high None where there is no interval.
        series: How it looks.
    """

    label: str
    points: Sequence[tuple[float, float, float | None, float | None]]
    series: Series


def interval_chart(
    title: str, across: str, up: str, lines: Sequence[Measured], limits: tuple[float, float] = (-math.inf, math.inf)
) -> Markup:
    """Means with their intervals over a size on a logarithmic axis, one line a candidate.

    Args:
        title: What it shows, for readers who do not see it.
        across: What the size is.
        up: What the values are.
        lines: What to draw.
        limits: Values that the vertical axis does not pass.
    """
    points = [point for each in lines for point in each.points if drawable(point[1])]
    sizes = sorted({size for size, *_ in points})
    frame = Frame(
        title,
        log_axis(across, sizes, at=sizes if len(sizes) <= 6 else None),
        linear_axis(up, [v for _, *values in points for v in values], limits),
    )
    marks = []
    for i, each in enumerate(lines):
        shift = 3.0 * (i - (len(lines) - 1) / 2) if len(lines) <= 8 else 0.0  # so that intervals do not hide each other
        own = [(frame.x(size) + shift, point) for size, *point in sorted(each.points) if drawable(point[0])]
        bars = [
            line(f"s{each.series.colour}", (x, frame.y(low)), (x, frame.y(high)), 1.5)
            for x, (_, low, high) in own
            if low is not None and high is not None and drawable(low) and drawable(high)
        ]
        dots = [(x, frame.y(mean)) for x, (mean, *_) in own if mean is not None]
        joined = [path(dots, each.series)] if len(dots) > 1 else []
        marks.append(titled(each.label, [*bars, *joined, *(marker(x, y, each.series, 4) for x, y in dots)]))
    return frame.drawn(marks)
