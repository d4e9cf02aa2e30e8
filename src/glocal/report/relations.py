"""The graph of relations between kinds of operators, as a picture, and the page that explains it in two languages."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from glocal.report.connections import Connections, connections_chart
from glocal.report.drawing import INKS, LIGHT, light_inks, opening, style, text, titled
from glocal.report.matrices import Matrix, matrices_chart
from glocal.report.page import render
from glocal.report.relations_words import LANGUAGES, Words

# column and row of each node, where there is room and where there is little
_PLACES = {
    "MLP": ((2, 0), (1.5, 0)),
    "Conv.": ((1, 1), (0.5, 1)),
    "Sep. MLP": ((3, 1), (2.5, 1)),
    "LR MLP": ((4, 1), (3, 0)),
    "Pyramid / MS Conv.": ((0, 2), (0, 2)),
    "Bottleneck": ((1, 2), (1, 2)),
    "DW-S Conv.": ((2, 2), (2, 2)),
    "ViT": ((3, 2), (3, 2)),
    "Dynamic DW-S Conv.": ((1, 3), (0, 3)),
    "Dynamic Local-S MLP": ((2, 3), (1, 3)),
    "Local ViT": ((3, 3), (2, 3)),
    "PVT": ((4, 3), (3, 3)),
}
KINDS = {"sparse": "s1", "dynamic": "s6", "low rank": "s3", "sharing": "axis"}  # classes of the style
_FILLS = {"sparse": "f1", "dynamic": "f6", "low rank": "f3", "sharing": "full"}
_DASHES = {"low rank": "2 4", "sharing": "7 4"}
_HEAD = 7  # length of an arrow's head
_LETTERS = 16  # in a line of a label


@dataclass(frozen=True)
class _Layout:
    """Lengths: between the middles of columns, of a box, between rows, between two arrows at one side of a box."""

    pitch: float
    wide: float
    gap: float
    apart: float


_WIDE, _NARROW = _Layout(214, 190, 92, 30), _Layout(92, 84, 46, 14)


@dataclass(frozen=True)
class Box:
    """A node.

    Args:
        name: Of it, in the graph.
        published: What the article counts to it.
        where: What is demanded of an operator: names of properties and the values allowed.
        operators: Ours that are so; none, and it is grey.
    """

    name: str
    published: Sequence[str]
    where: Mapping[str, Sequence[object]]
    operators: Sequence[str]


@dataclass(frozen=True)
class Arrow:
    """An edge.

    Args:
        start, end: Names of boxes.
        label: In the article.
        kind: One of `KINDS`.
        change: What it claims, a key of the words.
        pairs: How many pairs of operators there are.
        against: Those that do not show it.
        besides: What else changes, and in how many pairs.
    """

    start: str
    end: str
    label: str
    kind: str
    change: str
    pairs: int
    against: Sequence[tuple[str, str]]
    besides: Mapping[str, int]

    @property
    def kept(self) -> int:
        """How many pairs show what it claims."""
        return self.pairs - len(self.against)


@dataclass(frozen=True)
class Stray:
    """An operator without a node.

    Args:
        name: Of it.
        nearest: The nodes it misses by least, each with what is measured of it instead: properties and values.
    """

    name: str
    nearest: Sequence[tuple[str, Mapping[str, object]]]


@dataclass(frozen=True)
class Pictures:
    """What the principles are shown with, each drawn from a measured Jacobian.

    Args:
        positions, channels: For sparse connections: names of operators and what connects what.
        shared: For weight sharing: names of operators and the weights between positions.
        dynamic: The same of two images.
    """

    positions: Sequence[tuple[str, Sequence[Sequence[float]]]]
    channels: Sequence[tuple[str, Sequence[Sequence[float]]]]
    shared: Sequence[tuple[str, Sequence[Sequence[float]]]]
    dynamic: Sequence[tuple[str, Sequence[Sequence[float]], Sequence[Sequence[float]]]]


@dataclass(frozen=True)
class _Drawn:
    """A box with its place in the picture: its middle, top and size, and the bottom of its row."""

    box: Box
    x: float
    top: float
    width: float
    height: float
    floor: float


def relations_chart(boxes: Sequence[Box], arrows: Sequence[Arrow], *, narrow: bool = False) -> Markup:
    """The graph.

    Args:
        boxes: All nodes of the article.
        arrows: All its edges.
        narrow: For a phone: names and numbers of operators only, and no labels at arrows.
    """
    layout = _NARROW if narrow else _WIDE
    pitch, wide, gap = layout.pitch, layout.wide, layout.gap
    heights = {box.name: _height(box, narrow) for box in boxes}
    at = {box.name: _PLACES[box.name][narrow] for box in boxes}
    tops, top = [], 6.0
    for row in range(4):
        tops.append(top)
        tallest = max((heights[name] for name, (_, r) in at.items() if r == row), default=0)
        top += tallest + gap
    columns = max(column for column, _ in at.values()) + 1
    width = pitch * columns - (pitch - wide) + 4
    drawn = {}
    for box in boxes:
        column, row = at[box.name]
        floor = (tops[row + 1] if row < 3 else top) - gap
        x = 2 + wide / 2 + pitch * column
        drawn[box.name] = _Drawn(box, x, tops[row], wide, heights[box.name], floor)
    title = "Kinds of operators and how they are related"
    parts = [opening(title, width, top - gap + (30 if narrow else 62))]
    for arrow in arrows:
        parts.append(_arrow(arrow, arrows, drawn, narrow))
    parts += [_box(each, narrow) for each in drawn.values()]
    return Markup("\n").join([*parts, Markup("</svg>")])


def relations_svg(boxes: Sequence[Box], arrows: Sequence[Arrow]) -> str:
    """The graph as a picture on its own, in light colours on their ground."""
    chart = relations_chart(boxes, arrows)
    ground = Markup('<rect width="100%" height="100%" fill="{}"/>').format(INKS["ground"][0])
    font = 'svg{font-family:system-ui,-apple-system,"Segoe UI",sans-serif}'
    head, _, rest = chart.partition(Markup(">\n"))
    head = head.replace(Markup("<svg "), Markup('<svg xmlns="http://www.w3.org/2000/svg" '), 1)
    return f"{head}>\n<style>{style(light_inks(), LIGHT)}\n{font}</style>\n{ground}\n{rest}\n"


def relations_page(boxes: Sequence[Box], arrows: Sequence[Arrow], strays: Iterable[Stray], pictures: Pictures) -> str:
    """The page as one HTML file that needs nothing else, in every language; the reader chooses one."""
    return render(
        "relations.html",
        languages=LANGUAGES,
        boxes=boxes,
        arrows=arrows,
        strays=list(strays),
        chart=relations_chart(boxes, arrows),
        narrow=relations_chart(boxes, arrows, narrow=True),
        pictures=pictures,
        lines=_lines,
        matrices=_matrices,
        pair=_pair,
        key=_key,
    )


def _lines(words: Words, pairs: Iterable[tuple[str, Sequence[Sequence[float]]]], what: str) -> Markup:
    """One picture of lines, a panel for each operator."""
    panels = [Connections(name, weights) for name, weights in pairs]
    return connections_chart(words[what], panels, sides=(words["in"], words["out"]))


def _matrices(words: Words, name: str, weights: Sequence[Sequence[float]]) -> Markup:
    return matrices_chart(name, [Matrix(name, weights)], sides=(words["inputs"], words["outputs"]))


def _pair(words: Words, name: str, first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Markup:
    panels = [Matrix(words["image"].format(1), first), Matrix(words["image"].format(2), second)]
    return matrices_chart(name, panels, sides=(words["inputs"], words["outputs"]))


def _key(kind: str) -> Markup:
    """How an arrow of a kind looks."""
    return Markup('<svg class="swatch chart" viewBox="0 0 28 12" aria-hidden="true">{}{}</svg>').format(
        _stroke("M1 6 H20", kind), _head(27, 6, (1, 0), kind)
    )


def _height(box: Box, narrow: bool) -> float:
    if narrow:
        return 20 + 13 * len(_wrapped(box.name, 11))
    return 34 + 15 * max(1, len(box.operators))


def _box(drawn: _Drawn, narrow: bool) -> Markup:
    box, x = drawn.box, drawn.x
    frame = Markup(
        '<rect class="{}" x="{:.1f}" y="{:.1f}" width="{:g}" height="{:g}" rx="7" stroke-width="1.5"{}/>'
    ).format(
        "node" if box.operators else "node empty",
        *(x - drawn.width / 2, drawn.top, drawn.width, drawn.height),
        Markup(' stroke-dasharray="4 4"') if not box.operators else "",
    )
    kind = "number" if box.operators else ""
    if narrow:
        lines = _wrapped(box.name, 11)
        marks = [text(x, drawn.top + 15 + 13 * i, line, kind=f"{kind} small bold") for i, line in enumerate(lines)]
        count = str(len(box.operators)) if box.operators else "–"
        marks.append(text(x, drawn.top + 15 + 13 * len(lines), count, kind="small"))
    else:
        marks = [text(x, drawn.top + 20, box.name, kind=f"{kind} bold")]
        names = box.operators or ["–"]
        marks += [text(x, drawn.top + 38 + 15 * i, name, kind=f"{kind} small") for i, name in enumerate(names)]
    return titled(f"{box.name}: {', '.join(box.operators) or 'no operator'}", [frame, *marks])


def _arrow(arrow: Arrow, arrows: Sequence[Arrow], drawn: Mapping[str, _Drawn], narrow: bool) -> Markup:
    start, end = drawn[arrow.start], drawn[arrow.end]
    beside = start.top == end.top
    if beside and end.x > start.x:  # to the right, in a row
        y = start.top + start.height / 2
        left, right = start.x + start.width / 2, end.x - end.width / 2
        shown = [_stroke(f"M{left:.1f} {y:.1f} H{right - _HEAD:.1f}", arrow.kind), _head(right, y, (1, 0), arrow.kind)]
        place = ((left + right) / 2, y - 8)
    elif beside:  # to the left, below the row
        low, floor = start.floor + (18 if narrow else 26), end.top + end.height
        shown = [
            _stroke(
                f"M{start.x:.1f} {start.top + start.height:.1f} V{low - 8:.1f} "
                f"Q{start.x:.1f} {low:.1f} {start.x - 8:.1f} {low:.1f} H{end.x + 8:.1f} "
                f"Q{end.x:.1f} {low:.1f} {end.x:.1f} {low - 8:.1f} V{floor + _HEAD:.1f}",
                arrow.kind,
            ),
            _head(end.x, floor, (0, -1), arrow.kind),
        ]
        place = ((start.x + end.x) / 2, low + 15)
    elif _far(start, end, narrow):  # over a box of the next row: right, then down
        y, left = start.top + start.height / 2, start.x + start.width / 2
        shown = [
            _stroke(
                f"M{left:.1f} {y:.1f} H{end.x - 8:.1f} Q{end.x:.1f} {y:.1f} {end.x:.1f} {y + 8:.1f} "
                f"V{end.top - _HEAD:.1f}",
                arrow.kind,
            ),
            _head(end.x, end.top, (0, 1), arrow.kind),
        ]
        place = ((left + end.x) / 2, y - 8)
    else:
        x1, x2 = _ports(arrow, arrows, drawn, narrow)
        top, bottom = start.floor, end.top - _HEAD
        middle = (top + bottom) / 2
        shown = [
            _stroke(
                f"M{x1:.1f} {start.top + start.height:.1f} V{top:.1f} "
                f"C{x1:.1f} {middle:.1f} {x2:.1f} {middle:.1f} {x2:.1f} {bottom:.1f}",
                arrow.kind,
            ),
            _head(x2, end.top, (0, 1), arrow.kind),
        ]
        place = ((x1 + x2) / 2, middle)
    if narrow:
        return titled(f"{arrow.start} to {arrow.end}: {arrow.label}", shown)
    lines = _wrapped(arrow.label, _LETTERS) if not beside else [arrow.label]
    if arrow.pairs:
        lines = [*lines, f"{'✓ ' if not arrow.against else ''}{arrow.kept} of {arrow.pairs}"]
    low = place[1] if beside else place[1] - 13 * (len(lines) - 1) / 2 + 4
    room = 6.4 * max(map(len, lines)) + 4
    shown.append(
        Markup('<rect class="ground" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{}" rx="3"/>').format(
            place[0] - room / 2, low - 12, room, 13 * len(lines) + 3
        )
    )
    for i, line in enumerate(lines):
        last = bool(arrow.pairs) and i == len(lines) - 1
        shown.append(text(place[0], low + 13 * i, line, kind="small strong" if last else "small plain"))
    return titled(f"{arrow.start} to {arrow.end}: {arrow.label}", shown)


def _far(start: _Drawn, end: _Drawn, narrow: bool) -> bool:
    """Whether an arrow goes so far to the right that it would cross those of a box between."""
    return not narrow and end.x - start.x > 1.5 * _WIDE.pitch


def _ports(arrow: Arrow, arrows: Sequence[Arrow], drawn: Mapping[str, _Drawn], narrow: bool) -> tuple[float, float]:
    """Where an arrow that leads down starts and ends, beside the others at the same sides of the boxes."""
    down = [
        each
        for each in arrows
        if drawn[each.start].top != drawn[each.end].top and not _far(drawn[each.start], drawn[each.end], narrow)
    ]
    apart = (_NARROW if narrow else _WIDE).apart
    starting = sorted((each for each in down if each.start == arrow.start), key=lambda each: drawn[each.end].x)
    ending = sorted((each for each in down if each.end == arrow.end), key=lambda each: drawn[each.start].x)
    return (
        drawn[arrow.start].x + apart * (starting.index(arrow) - (len(starting) - 1) / 2),
        drawn[arrow.end].x + apart * (ending.index(arrow) - (len(ending) - 1) / 2),
    )


def _stroke(path: str, kind: str) -> Markup:
    dashes = Markup(' stroke-dasharray="{}"').format(_DASHES[kind]) if kind in _DASHES else Markup("")
    return Markup('<path class="{}" fill="none" stroke-width="2" d="{}"{}/>').format(KINDS[kind], path, dashes)


def _head(x: float, y: float, way: tuple[int, int], kind: str) -> Markup:
    """An arrow's head with its point at (x, y), looking along `way`."""
    back = (x - _HEAD * way[0], y - _HEAD * way[1])
    side = (0.62 * _HEAD * way[1], 0.62 * _HEAD * way[0])
    points = [(x, y), (back[0] + side[0], back[1] + side[1]), (back[0] - side[0], back[1] - side[1])]
    return Markup('<polygon class="{}" points="{}"/>').format(
        _FILLS[kind], " ".join(f"{px:.1f},{py:.1f}" for px, py in points)
    )


def _wrapped(words: str, length: int) -> list[str]:
    """Lines of at most so many letters, where words are that short."""
    lines: list[str] = []
    for word in words.split():
        if lines and len(lines[-1]) + 1 + len(word) <= length:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    return lines
