"""What the page of a report is made of: sections, figures, tables, keys. Everything given as text is escaped."""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup, escape

from glocal.report.drawing import DARK, INKS, LIGHT, Series, light_inks, marker, path, style
from glocal.report.study import Study


@dataclass(frozen=True)
class Section:
    """One section of a report.

    Args:
        name: Of its place in the page.
        title: Of the list of contents.
        question: What it answers; its heading.
        numbers: The answer, a sentence for each data set.
        body: Pictures and tables.
        how: How it was computed.
        caveat: What it does not say.
    """

    name: str
    title: str
    question: str
    numbers: Sequence[str]
    body: Markup
    how: str
    caveat: str


def render(template: str, **values: Any) -> str:
    """A page of this folder as one HTML file that needs nothing else; what is no `Markup` is escaped."""
    environment = jinja2.Environment(
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        loader=jinja2.FunctionLoader(lambda name: files("glocal.report").joinpath(name).read_text("utf-8")),
    )
    variables = {name: f"var(--{name})" for name in INKS}
    return environment.get_template(template).render(
        light={**light_inks(), **{f"c{i}": colour for i, colour in enumerate(LIGHT)}},
        dark={**{name: dark for name, (_, dark) in INKS.items()}, **{f"c{i}": colour for i, colour in enumerate(DARK)}},
        rules=Markup(style(variables, [f"var(--c{i})" for i in range(len(LIGHT))])),
        **values,
    )


def figures(drawn: Iterable[tuple[Markup, str]], least: float = 27) -> Markup:
    """Pictures with what is written below them, side by side where each has `least` rem of room."""
    cells = [
        Markup("<figure>{}<figcaption>{}</figcaption></figure>").format(chart, unbroken(below))
        for chart, below in drawn
    ]
    return Markup('<div class="figures" style="--least:{:g}rem">\n{}\n</div>').format(least, Markup("\n").join(cells))


def unbroken(words: str) -> Markup:
    """A sentence in which lines do not break inside a layout."""
    parts = re.split(r"(?<![\w-])([CT](?:-[CT])+)(?![\w-])", words)
    shown = [Markup('<span class="layout">{}</span>').format(p) if i % 2 else escape(p) for i, p in enumerate(parts)]
    return Markup("").join(shown)


def table(caption: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Markup:
    """A table; the first column names the rows."""
    head = Markup("").join(Markup('<th scope="col">{}</th>').format(cell) for cell in header)
    body = Markup("\n").join(
        Markup('<tr><th scope="row">{}</th>{}</tr>').format(
            first, Markup("").join(Markup("<td>{}</td>").format(cell) for cell in cells)
        )
        for first, *cells in rows
    )
    return Markup(
        '<div class="scroll"><table>\n<caption>{}</caption>\n<thead><tr>{}</tr></thead>\n'
        "<tbody>\n{}\n</tbody></table></div>"
    ).format(caption, head, body)


def swatch(series: Series) -> Markup:
    """A candidate's line and mark, as its pictures show them."""
    return Markup('<svg class="swatch chart" viewBox="0 0 28 12" aria-hidden="true">{}{}</svg>').format(
        path([(1, 6), (27, 6)], series), marker(14, 6, series, 4)
    )


def named(study: Study, name: str, mark: str = "") -> Markup:
    """A candidate's name with its swatch."""
    return Markup("{}{}{}").format(swatch(study.series(name)), unbroken(name), f" {mark}" if mark else "")


def key(study: Study, names: Iterable[str]) -> Markup:
    """Which look is which candidate."""
    entries = Markup("").join(Markup("<li>{}</li>").format(named(study, name)) for name in names)
    return Markup('<ul class="key">{}</ul>').format(entries)


def heading(words: str) -> Markup:
    """A heading inside a section."""
    return Markup("<h3>{}</h3>").format(words)
