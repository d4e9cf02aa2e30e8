"""The results of benchmarks/run.py as a picture: how many times faster than the best of the peers, case by case.

python benchmarks/picture.py results.jsonl ratios.svg
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1] / "src")]

from markupsafe import Markup  # noqa: E402

from glocal.report import drawing  # noqa: E402

LEFT, RIGHT, ROW, TOP, BAR, FOOT = 300, 210, 20, 40, 280, 12
OURS = "glocal"
COLOURS = {"forward": 1, "forward+backward": 5}


def best_peer(row: dict[str, Any]) -> tuple[str, float] | None:
    """The quickest peer and how many times longer it takes; a case without any is not drawn."""
    found = {name: one["ratio"] for name, one in row["calls"].items() if name != OURS and "ratio" in one}
    found = {name: ratio for name, ratio in found.items() if name not in row["yardsticks"]}
    return min(found.items(), key=lambda pair: pair[1]) if found else None


def draw(rows: Sequence[dict[str, Any]]) -> str:
    """One bar for each case and pass, from 1 to the ratio on a logarithmic axis; left of 1 is slower."""
    shown = [(row, best) for row in rows if (best := best_peer(row)) is not None]
    axis = drawing.log_axis("times faster than the best peer", [1.0, 2.0, *(ratio for _, (_, ratio) in shown)])
    width, height = LEFT + BAR + RIGHT, TOP + ROW * len(shown) + FOOT

    def across(ratio: float) -> float:
        return LEFT + BAR * axis.place(ratio)

    parts = [drawing.opening("Times faster than the best peer, case by case", width, height)]
    parts.append(Markup('<rect class="ground" width="{:g}" height="{:g}"/>').format(width, height))
    for place, (which, colour) in enumerate(COLOURS.items()):
        x = LEFT + 150 * place
        parts.append(Markup('<rect class="f{}" x="{}" y="4" width="11" height="11"/>').format(colour, x))
        parts.append(drawing.text(x + 16, 14, which, "start", "plain"))
    for value, label in axis.labels:
        parts.append(drawing.line("grid", (across(value), TOP - 4), (across(value), height - FOOT)))
        parts.append(drawing.text(across(value), TOP - 9, label))
    for i, (row, (peer, ratio)) in enumerate(shown):
        y = TOP + ROW * i
        if i == 0 or shown[i - 1][0]["case"] != row["case"]:
            parts.append(drawing.text(LEFT - 8, y + 14, drawing.shorten(row["case"], 44), "end", "plain"))
        start, end = sorted((across(1.0), across(ratio)))
        bar = Markup('<rect class="f{}" x="{:.1f}" y="{}" width="{:.1f}" height="{}"/>').format(
            COLOURS[row["pass"]], start, y + 3, max(end - start, 1), ROW - 6
        )
        parts.append(drawing.titled(f"{row['case']}, {row['pass']}: {ratio:.2f} x against {peer}", [bar]))
        words = f"{ratio:.{2 if ratio < 100 else 3}g} × {peer}"
        parts.append(drawing.text(max(end, across(1.0)) + 6, y + 14, words, "start", "plain small"))
    parts.append(drawing.line("axis", (across(1.0), TOP - 4), (across(1.0), height - FOOT)))
    style = Markup("<style>{}</style>").format(Markup(drawing.style(drawing.light_inks(), drawing.LIGHT)))
    picture = Markup("\n").join([parts[0], style, *parts[1:], Markup("</svg>")])
    namespace = '<svg xmlns="http://www.w3.org/2000/svg" font-family="sans-serif" '
    return str(picture).replace("<svg ", namespace, 1) + "\n"


def main() -> None:
    source, target = map(Path, sys.argv[1:])
    latest = {}
    for line in source.read_text().splitlines():
        row = json.loads(line)
        latest[row["case"], row["pass"], row["dtype"]] = row
    target.write_text(draw(list(latest.values())))


if __name__ == "__main__":
    main()
