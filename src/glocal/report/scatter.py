"""Two measured quantities against each other: one mark a candidate, and the front where neither can be had cheaper."""

from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

from glocal.report.drawing import Axis, Frame, Series, drawable, marker, path, titled


@dataclass(frozen=True)
class Point:
    """One candidate.

    Args:
        label: Shown by the browser when the mark is pointed at.
        x, y: Where its mean stands.
        series: How it looks.
        seeds: (x, y) of every seed, drawn small.
    """

    label: str
    x: float
    y: float
    series: Series
    seeds: Sequence[tuple[float, float]] = ()


def front(points: Sequence[Point], *, more_is_better: bool) -> list[Point]:
    """The points that no other one beats: at least as good on both axes and better on one. `y` is better high.

    Args:
        points: All of them.
        more_is_better: Whether a high `x` is good (images per second) or a low one (multiply-adds).
    """
    sign = 1 if more_is_better else -1

    def beaten(point: Point) -> bool:
        return any(
            sign * other.x >= sign * point.x and other.y >= point.y and (other.x, other.y) != (point.x, point.y)
            for other in points
        )

    return sorted((point for point in points if not beaten(point)), key=lambda point: point.x)


def scatter_chart(title: str, across: Axis, up: Axis, points: Sequence[Point], best: Sequence[Point] = ()) -> Markup:
    """The points; those in `best` are ringed and joined by a dashed line; marks of one look are joined thinly.

    Args:
        title: What it shows, for readers who do not see it.
        across: Horizontal axis.
        up: Vertical axis.
        points: What to draw.
        best: The front, from left to right.
    """
    frame = Frame(title, across, up)
    places = [(frame.x(point.x), frame.y(point.y)) for point in best]
    marks = []
    if len(places) > 1:
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        marks.append(Markup('<polyline class="front" stroke-dasharray="5 4" points="{}"/>').format(corners))
    for series in dict.fromkeys(point.series for point in points):
        same = sorted((frame.x(p.x), frame.y(p.y)) for p in points if p.series == series)
        if len(same) > 1:
            marks.append(path(same, series, 1))
    for point in points:
        small = [
            marker(frame.x(x), frame.y(y), point.series, 2.5, 0.6)
            for x, y in point.seeds
            if drawable(x) and drawable(y)
        ]
        marks.append(titled(point.label, [*small, marker(frame.x(point.x), frame.y(point.y), point.series, 5.5)]))
    ring = Markup('<circle class="front" stroke-width="1.5" cx="{:.1f}" cy="{:.1f}" r="9"/>')
    marks += [ring.format(*place) for place in places]
    return frame.drawn(marks)
