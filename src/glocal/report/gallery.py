"""The page that shows what every operator connects."""

from collections.abc import Iterable
from dataclasses import dataclass

from markupsafe import Markup

from glocal.report.connections import Connections, connections_chart
from glocal.report.page import render


@dataclass(frozen=True)
class Entry:
    """One operator.

    Args:
        name: Of the operator.
        summary: What it is, in one sentence.
        measured: What was measured of it, in words.
        panels: What to draw.
    """

    name: str
    summary: str
    measured: str
    panels: tuple[Connections, ...]

    @property
    def chart(self) -> Markup:
        """The picture."""
        return connections_chart(f"What {self.name} connects", self.panels)


def gallery(entries: Iterable[Entry]) -> str:
    """The page as one HTML file that needs nothing else."""
    return render("gallery.html", entries=list(entries))
