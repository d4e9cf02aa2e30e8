"""The comparison's main picture: every candidate's mean, its interval and each seed, one row a candidate."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from glocal.report.drawing import Axis, Series, drawable, line, marker, opening, shorten, text, titled

PANEL = 460  # width of one panel
_ROW, _HEADER, _FOOTER = 34, 58, 48
_CHIP = 21
_BESIDE = 16  # longer names stand above their row


@dataclass(frozen=True)
class Row:
    """One candidate.

    Args:
        label: Its name.
        mean: What the bar shows; None where nothing was measured.
        low, high: What the band shows; None for no band.
        seeds: What the dots show.
        series: How it looks.
        note: Beside the name, such as a dagger.
        strong: Whether it is the winner.
    """

    label: str
    mean: float | None
    low: float | None
    high: float | None
    seeds: Sequence[float | None]
    series: Series
    note: str = ""
    strong: bool = False


@dataclass(frozen=True)
class Panel:
    """One condition: a title, a line below it, and its rows on one axis."""

    title: str
    subtitle: str
    rows: Sequence[Row]
    axis: Axis
    decimals: int = 1

    @property
    def above(self) -> bool:
        """Whether names stand above their rows, because one of them is long."""
        return max((len(row.label) for row in self.rows), default=0) > _BESIDE

    @property
    def height(self) -> float:
        """What it needs."""
        return _HEADER + len(self.rows) * (_ROW + 16 * self.above) + _FOOTER


def is_layout(name: str) -> bool:
    """Whether a name is made of C and T only, a stage each."""
    return re.fullmatch(r"[CT](-[CT])*", name) is not None


def is_sequence(names: Sequence[str]) -> bool:
    """Whether the candidates run from local to global: layouts of one length with more and more attention."""
    globality = [name.count("T") for name in names]
    return len(names) > 2 and all(map(is_layout, names)) and globality == sorted(set(globality))


def panel_chart(panel: Panel) -> Markup:
    """One panel as a picture."""
    label = f"{panel.title}: {panel.axis.unit}"
    return Markup("\n").join([opening(label, PANEL, panel.height), drawn(panel), Markup("</svg>")])


def drawn(panel: Panel) -> Markup:
    """One panel's marks, from its upper left corner."""
    pitch = _ROW + 16 * panel.above
    chips = all(is_layout(row.label) for row in panel.rows)
    left, right = _left(panel, chips), PANEL - 66
    bottom = _HEADER + len(panel.rows) * pitch

    def x(value: float) -> float:
        return left + (right - left) * panel.axis.place(value)

    parts = [text(8, 20, shorten(panel.title, 48), "start", "strong"), text(8, 40, panel.subtitle, "start")]
    for value, label in panel.axis.labels:
        parts.append(line("grid", (x(value), _HEADER - 6), (x(value), bottom)))
        parts.append(text(x(value), bottom + 18, label))
    if panel.axis.low < 0 <= panel.axis.high:
        parts.append(line("axis", (x(0), _HEADER - 6), (x(0), bottom)))
    parts.append(text((left + right) / 2, bottom + 38, panel.axis.unit))
    centres = [_HEADER + i * pitch + (pitch + 16 * panel.above) / 2 for i in range(len(panel.rows))]
    if is_sequence([row.label for row in panel.rows]):
        means = [
            (x(row.mean), y)
            for row, y in zip(panel.rows, centres, strict=True)
            if row.mean is not None and drawable(row.mean)
        ]
        points = " ".join(f"{a:.1f},{b:.1f}" for a, b in means)
        parts.append(Markup('<polyline class="trend" stroke-dasharray="1 4" points="{}"/>').format(points))
    for row, y in zip(panel.rows, centres, strict=True):
        name = [_chips(row.label, y)] if chips else [_name(row, y - 20 if panel.above else y + 5, panel.above)]
        if chips and row.note:
            name.append(text(8 + _CHIP * len(row.label.split("-")), y + 5, row.note, "start"))
        value = f"{row.mean:.{panel.decimals}f}" if row.mean is not None and drawable(row.mean) else "–"
        shown = text(PANEL - 8, y + 5, value.replace("-", "−"), "end", "strong" if row.strong else "plain")
        parts.append(titled(_described(row, panel.decimals), [*name, *_marks(row, x, y), shown]))
    return Markup("\n").join(parts)


def _left(panel: Panel, chips: bool) -> float:
    """Where the axis begins: right of the names, or at the edge below them."""
    if panel.above:
        return 20
    if chips:
        return 8 + _CHIP * max((len(row.label.split("-")) for row in panel.rows), default=0) + 26
    return 8 + 8.2 * max((len(row.label) + 2 * bool(row.note) for row in panel.rows), default=0) + 18


def _marks(row: Row, x: Callable[[float], float], y: float) -> list[Markup]:
    """The band of the interval, the bar of the mean, the dots of the seeds."""
    marks = []
    if row.low is not None and row.high is not None and drawable(row.low) and drawable(row.high):
        start, end = x(row.low), x(row.high)
        marks.append(
            Markup(
                '<rect class="f{} band" opacity="0.28" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="12" rx="6"/>'
            ).format(row.series.colour, start - 1, y - 6, max(end - start, 0) + 2)
        )
    if row.mean is not None and drawable(row.mean):
        marks.append(
            Markup('<rect class="f{} mean" x="{:.1f}" y="{:.1f}" width="3" height="20" rx="1.5"/>').format(
                row.series.colour, x(row.mean) - 1.5, y - 10
            )
        )
    marks += [
        Markup('<g class="halo" stroke-width="1">{}</g>').format(marker(x(seed), y, row.series, 3.6))
        for seed in row.seeds
        if seed is not None and drawable(seed)
    ]
    return marks


def _name(row: Row, y: float, above: bool) -> Markup:
    words = shorten(_without_folders(row.label), 56 if above else _BESIDE) + (f" {row.note}" if row.note else "")
    return text(8, y, words, "start", "strong" if row.strong else "plain")


def _without_folders(label: str) -> str:
    """A name in which a user's file has lost its folders, which many candidates share."""
    return re.sub(r"[^'\"():,]*/(?=[^/'\"():,]*\.py:)", "", label)


def _chips(label: str, y: float) -> Markup:
    """A layout as a row of stages, attention filled, so that local to global is seen before it is read."""
    parts = []
    for i, stage in enumerate(label.split("-")):
        full = stage == "T"
        parts.append(
            Markup('<rect class="{}" x="{:.1f}" y="{:.1f}" width="18" height="18" rx="4"/>').format(
                "chip full" if full else "chip", 8.5 + i * _CHIP, y - 9
            )
        )
        parts.append(text(17.5 + i * _CHIP, y + 4, stage, "middle", "small inverse" if full else "small"))
    return Markup("").join(parts)


def _described(row: Row, decimals: int) -> str:
    """The row in words, for whoever points at it or cannot see it."""
    words = []
    if row.mean is not None:
        words.append(f"mean {row.mean:.{decimals}f}")
    if row.low is not None and row.high is not None:
        words.append(f"95 % interval {row.low:.{decimals}f} to {row.high:.{decimals}f}")
    if row.seeds:
        words.append("seeds " + " ".join("–" if seed is None else f"{seed:.{decimals}f}" for seed in row.seeds))
    return f"{row.label}: {'; '.join(words)}"


def side_by_side(panels: Sequence[Panel], heading: str, key: str, rules: str) -> str:
    """Panels as one SVG file that stands alone, two in a line.

    Args:
        panels: What to draw.
        heading: Above all of it.
        key: Below all of it.
        rules: Style of the file.
    """
    columns = max(1, min(2, len(panels)))
    body, y = [], 52.0
    for i in range(0, len(panels), columns):
        for column, panel in enumerate(panels[i : i + columns]):
            place = Markup('<g transform="translate({:g} {:g})">{}</g>')
            body.append(place.format(12 + column * (PANEL + 8), y, drawn(panel)))
        y += max(panel.height for panel in panels[i : i + columns]) + 12
    width, height = 24 + columns * PANEL + (columns - 1) * 8, y + 30
    parts = [
        Markup('<svg xmlns="http://www.w3.org/2000/svg" class="chart" viewBox="0 0 {0:g} {1:g}" width="{0:g}"').format(
            width, height
        )
        + Markup(' height="{:g}" role="img" aria-label="{}" font-family="system-ui, sans-serif">').format(
            height, heading
        ),
        Markup("<style>{}</style>").format(Markup(rules)),
        Markup('<rect class="ground" width="100%" height="100%"/>'),
        text(20, 30, heading, "start", "strong"),
        *body,
        text(20, height - 16, key, "start"),
        Markup("</svg>\n"),
    ]
    return str(Markup("\n").join(parts))
