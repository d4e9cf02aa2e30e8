"""What every picture of a report is drawn with: colours, marks, ticks, axes and the frame around them, as inline SVG.

Shapes carry classes (`s3` strokes and `f3` fills with colour 3), so that one style decides what light, dark and a
picture on its own look like.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

# From cool to warm: candidates given from local to global read as a sequence. Each has a contrast of at least 3 with
# the ground it is drawn on.
LIGHT = ("#2346b5", "#0a7cc4", "#008a84", "#3b8a33", "#857f00", "#bd7000", "#cf4718", "#a8124f")
DARK = ("#8fa6ff", "#5cb8ff", "#3fd0c4", "#7fd06f", "#d2ca3e", "#ffb04a", "#ff8560", "#ff7aa6")
INKS = {  # name: (light, dark)
    "ground": ("#ffffff", "#15181c"),
    "ink": ("#1c1f23", "#e8eaed"),
    "faint": ("#5d646d", "#a0a8b2"),
    "rule": ("#dfe3e8", "#343a41"),
}

_DASHES = ("", "6 3", "2 3", "8 3 2 3")
WIDTH, HEIGHT = 480, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 64, 14, 10, 46  # room for ticks such as 0.075 beside the unit


@dataclass(frozen=True)
class Series:
    """How a candidate looks in every picture.

    Args:
        colour: Which of the eight colours.
        cycle: How often the colours were used up before; it changes dashes and marks.
    """

    colour: int
    cycle: int = 0


def series_of(i: int, count: int) -> Series:
    """The look of candidate `i` of `count`: up to eight are spread over the colours from cool to warm."""
    if count > len(LIGHT):
        return Series(i % len(LIGHT), i // len(LIGHT))
    return Series(round(i * (len(LIGHT) - 1) / (count - 1)) if count > 1 else 0)


def style(inks: dict[str, str], colours: Sequence[str]) -> str:
    """The rules that pictures need, with these colours (values such as `#123456` or `var(--c0)`)."""
    rules = [
        f".chart text{{fill:{inks['faint']};font-size:13px}}",
        f".chart .strong{{fill:{inks['ink']};font-weight:650}}",
        f".chart .plain{{fill:{inks['ink']}}}",
        # lines that cross a name are hidden around its letters
        f".chart .strong,.chart .plain{{paint-order:stroke;stroke:{inks['ground']};stroke-width:3px}}",
        f".chart .number{{fill:{inks['ink']}}}",
        f".chart .inverse{{fill:{inks['ground']};font-weight:600}}",
        f".chart .small{{font-size:11px}} .chart .grid{{stroke:{inks['rule']}}}",
        f".chart .axis,.chart .trend{{stroke:{inks['faint']};fill:none}}",
        f".chart .front{{stroke:{inks['ink']};fill:none}}",
        f".chart .chip{{fill:{inks['ground']};stroke:{inks['faint']}}} .chart .full{{fill:{inks['faint']}}}",
        f".chart .bold{{font-weight:650}} .chart .node{{fill:{inks['ground']};stroke:{inks['ink']}}}",
        f".chart .empty{{stroke:{inks['faint']}}} .chart .cell{{fill:none;stroke:{inks['rule']}}}",
        f".chart .halo{{stroke:{inks['ground']}}} .chart .ground{{fill:{inks['ground']}}}",
        *(f".s{i}{{stroke:{colour}}} .f{i}{{fill:{colour}}}" for i, colour in enumerate(colours)),
    ]
    return "\n".join(rules)


def light_inks() -> dict[str, str]:
    """The inks of a picture that stands on its own."""
    return {name: light for name, (light, _) in INKS.items()}


def drawable(value: float | None) -> bool:
    """Whether a value has a place on an axis: measured, finite and not absurd."""
    return value is not None and math.isfinite(value) and abs(value) < 1e15


def compact(value: float, digits: str = ".3g") -> str:
    """A number of at most three digits and a unit's prefix: 12.3M."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= 0.9995 * size:
            return f"{value / size:{digits}}{prefix}"
    return f"{value:{digits}}"


def shorten(text: str, length: int) -> str:
    """`text` with its middle left out where it is longer than `length` characters."""
    if len(text) <= length:
        return text
    tail = (length - 1) // 2
    return f"{text[: length - 1 - tail]}…{text[-tail:]}"


def ticks(low: float, high: float, limits: tuple[float, float] = (-math.inf, math.inf)) -> list[float]:
    """Two to seven round numbers that enclose low ... high; limits, such as 0 ... 100, are not passed."""
    if high - low < 1e-7 * max(1.0, abs(low), abs(high)):
        room = max(min(abs(low) / 2, 2.5), 1e-6 * abs(low)) if abs(low) > 0.01 else 0.5
        low, high = max(low - room, limits[0]), min(high + room, limits[1])
    step = 10 ** math.floor(math.log10((high - low) / 4))
    step = next(step * k for k in (1, 2, 2.5, 5, 10) if (high - low) / (step * k) <= 5)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


@dataclass(frozen=True)
class Axis:
    """One axis: what it measures, its ends and its labelled places."""

    unit: str
    low: float
    high: float
    labels: tuple[tuple[float, str], ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies: 0 at the low end, 1 at the high one; what lies outside is moved to the end."""
        if self.log:
            share = math.log(value / self.low) / math.log(self.high / self.low)
        else:
            share = (value - self.low) / (self.high - self.low)
        return min(1.0, max(0.0, share))


def linear_axis(unit: str, values: Iterable[float | None], limits: tuple[float, float] = (-math.inf, math.inf)) -> Axis:
    """An axis around the values that can be drawn."""
    inside = [min(max(v, limits[0]), limits[1]) for v in values if v is not None and drawable(v)]
    marks = ticks(min(inside, default=0.0), max(inside, default=1.0), limits)
    return Axis(unit, marks[0], marks[-1], tuple((tick, _tick(tick)) for tick in marks))


def log_axis(unit: str, values: Iterable[float | None], at: Iterable[float] | None = None) -> Axis:
    """A logarithmic axis around the positive values, labelled at 1, 2, 5, 10, ... or, if few, where `at` says."""
    inside = [v for v in values if v is not None and drawable(v) and v > 0]
    low, high = min(inside, default=1.0), max(inside, default=10.0)
    room = max(1.08, (high / low) ** 0.06)  # so that equal budgets are not blown up to a difference
    low, high = low / room, high * room
    if at is None:
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        few = math.log10(high / low) > 2.5
        at = [k * 10.0**d for d in decades for k in ((1,) if few else (1, 2, 5))]
        if sum(low <= mark <= high for mark in at) < 2:
            at = ticks(low, high)
    marks = tuple((mark, compact(mark)) for mark in at if low <= mark <= high)
    return Axis(unit, low, high, marks, log=True)


class Frame:
    """A chart's frame: both axes with grid, labels and units; `x` and `y` place values in it.

    Args:
        title: What it shows, for readers who do not see it.
        across: Horizontal axis.
        up: Vertical axis.
    """

    def __init__(self, title: str, across: Axis, up: Axis) -> None:
        self.title, self.across, self.up = title, across, up

    def x(self, value: float) -> float:
        """Horizontal place of a value."""
        return _LEFT + (WIDTH - _LEFT - _RIGHT) * self.across.place(value)

    def y(self, value: float) -> float:
        """Vertical place of a value."""
        return HEIGHT - _BOTTOM - (HEIGHT - _TOP - _BOTTOM) * self.up.place(value)

    def drawn(self, marks: Iterable[Markup]) -> Markup:
        """The chart with these marks in it."""
        parts = [opening(self.title, WIDTH, HEIGHT)]
        bottom, right = HEIGHT - _BOTTOM, WIDTH - _RIGHT
        for value, label in self.up.labels:
            y = self.y(value)
            parts.append(line("grid", (_LEFT, y), (right, y)))
            parts.append(text(_LEFT - 7, y + 4, label, "end"))
        parts.append(line("axis", (_LEFT, bottom), (right, bottom)))
        for value, label in _apart(self.across.labels, self.x):
            parts.append(line("axis", (self.x(value), bottom), (self.x(value), bottom + 4)))
            parts.append(text(min(self.x(value), WIDTH - 3.8 * len(label)), bottom + 18, label))
        parts.append(text((_LEFT + right) / 2, HEIGHT - 8, self.across.unit))
        parts.append(upright(14, (_TOP + bottom) / 2, self.up.unit))
        return Markup("\n").join([*parts, *marks, Markup("</svg>")])


def opening(title: str, width: float, height: float) -> Markup:
    """The start of a picture: as wide as its place, but not so wide that its words look loud."""
    return Markup(
        '<svg class="chart" style="max-width:{:.1f}rem" viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">'
    ).format(width / 14, width, height, title)


def text(x: float, y: float, words: str, anchor: str = "middle", kind: str = "") -> Markup:
    """Words at a place; `kind` is a class of the style."""
    return Markup('<text x="{:.1f}" y="{:.1f}" text-anchor="{}"{}>{}</text>').format(
        x, y, anchor, Markup(' class="{}"').format(kind) if kind else "", words
    )


def upright(x: float, y: float, words: str, anchor: str = "middle", kind: str = "") -> Markup:
    """Words that read upwards."""
    return Markup('<text transform="translate({:.1f} {:.1f}) rotate(-90)" text-anchor="{}"{}>{}</text>').format(
        x, y, anchor, Markup(' class="{}"').format(kind) if kind else "", words
    )


def line(kind: str, start: tuple[float, float], end: tuple[float, float], width: float = 1) -> Markup:
    """A straight line of a class of the style."""
    return Markup('<line class="{}" x1="{:.1f}" y1="{:.1f}" x2="{:.1f}" y2="{:.1f}" stroke-width="{:g}"/>').format(
        kind, *start, *end, width
    )


def path(points: Sequence[tuple[float, float]], series: Series, width: float = 2) -> Markup:
    """Points joined in a series' colour and dashes."""
    dashes = _DASHES[series.cycle % len(_DASHES)]
    return Markup('<polyline class="s{}" fill="none" stroke-width="{:g}"{} points="{}"/>').format(
        series.colour,
        width,
        Markup(' stroke-dasharray="{}"').format(dashes) if dashes else "",
        " ".join(f"{x:.1f},{y:.1f}" for x, y in points),
    )


def marker(x: float, y: float, series: Series, size: float, opacity: float = 1) -> Markup:
    """A series' mark: a disc, and after every eight series a square, a diamond, a ring."""
    shape = series.cycle % 4
    shown = Markup(' opacity="{:g}"').format(opacity) if opacity < 1 else Markup("")
    if shape in (1, 2):
        turned = Markup(' transform="rotate(45 {:.1f} {:.1f})"').format(x, y) if shape == 2 else Markup("")
        return Markup('<rect class="f{} mark" x="{:.1f}" y="{:.1f}" width="{:g}" height="{:g}"{}{}/>').format(
            series.colour, x - 0.9 * size, y - 0.9 * size, 1.8 * size, 1.8 * size, turned, shown
        )
    if shape == 3:
        return Markup(
            '<circle class="s{} mark" fill="none" stroke-width="2" cx="{:.1f}" cy="{:.1f}" r="{:g}"{}/>'
        ).format(series.colour, x, y, size, shown)
    return Markup('<circle class="f{} mark" cx="{:.1f}" cy="{:.1f}" r="{:g}"{}/>').format(
        series.colour, x, y, size, shown
    )


def titled(title: str, marks: Iterable[Markup]) -> Markup:
    """Marks that belong together; the browser shows the title where they are pointed at."""
    return Markup("<g><title>{}</title>{}</g>").format(title, Markup("").join(marks))


def _tick(value: float) -> str:
    return (compact(value) if abs(value) >= 10_000 else f"{value:g}").replace("-", "−")


def _apart(labels: Iterable[tuple[float, str]], x: Callable[[float], float]) -> list[tuple[float, str]]:
    """The labels that fit beside each other, from the last to the first."""
    kept: list[tuple[float, str]] = []
    room = math.inf
    for value, label in sorted(labels, reverse=True):
        half = 4 * len(label) + 4
        if x(value) + half <= room:
            kept.append((value, label))
            room = x(value) - half
    return kept
