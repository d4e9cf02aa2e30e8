"""Which classes are taken for which: a heat map, or the most frequent confusions where there are many classes."""

import heapq
from collections.abc import Sequence

from markupsafe import Markup

from glocal.report.drawing import Series, opening, shorten, text, upright

PANEL = 460  # width of the largest map
MOST_CLASSES = 30  # more do not fit into a heat map
_NUMBERED = 12  # up to so many classes, cells show their percentages


def confusion_chart(title: str, classes: Sequence[str], counts: Sequence[Sequence[int]], series: Series) -> Markup:
    """A heat map: rows are true classes, columns predicted ones; a cell is as strong as its share of the row.

    Args:
        title: What it shows, for readers who do not see it.
        classes: Names.
        counts: [true][predicted].
        series: Colour of the confusions; what is right is grey.
    """
    n = len(classes)
    names = [shorten(name, 12) for name in classes]
    written = 7.0 * max((len(name) for name in names), default=0)
    gutter = 24 + written
    cell = min(44.0, (PANEL - gutter - 8) / max(n, 1))
    width, height = gutter + n * cell + 8, n * cell + written + 38
    small = "small" if cell >= 12 else "tiny"
    parts = [opening(title, width, height)]
    for i, row in enumerate(counts):
        total, y = sum(row), 8 + i * cell
        parts.append(text(gutter - 6, y + cell / 2 + 4, names[i], "end", small))
        for j, count in enumerate(row):
            if not count:
                continue
            x, share = gutter + j * cell, count / total
            look = "full" if i == j else f"f{series.colour}"
            parts.append(
                Markup(
                    '<rect class="{}" opacity="{:.3f}" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}">'
                    "<title>{} taken for {}: {} of {}</title></rect>"
                ).format(
                    look, 0.12 + 0.6 * share if i == j else min(1.0, 0.08 + share**0.5),
                    x, y, cell - 1, cell - 1, classes[i], classes[j], count, total,
                )
            )  # fmt: skip
            if n <= _NUMBERED and share >= 0.005:
                parts.append(text(x + cell / 2 - 0.5, y + cell / 2 + 4, f"{100 * share:.0f}", "middle", "small number"))
    bottom = 8 + n * cell
    for j, name in enumerate(names):
        parts.append(
            Markup(
                '<text class="{}" transform="translate({:.1f} {:.1f}) rotate(-90)" text-anchor="end">{}</text>'
            ).format(small, gutter + (j + 0.5) * cell + 4, bottom + 6, name)
        )
    parts.append(text(gutter + n * cell / 2, height - 4, "predicted", kind="small"))
    parts.append(upright(11, 8 + n * cell / 2, "true", kind="small"))
    return Markup("\n").join([*parts, Markup("</svg>")])


def most_confused(counts: Sequence[Sequence[int]], most: int = 10) -> list[tuple[int, int, int, int]]:
    """The most frequent confusions: (true, predicted, how often, out of how many), most frequent first."""
    totals = [sum(row) for row in counts]
    found = (
        (i, j, times, totals[i]) for i, row in enumerate(counts) for j, times in enumerate(row) if times and i != j
    )
    return heapq.nsmallest(most, found, key=lambda pair: (-pair[2], pair[:2]))
