"""The sections of studies that vary more than the candidate: data size, width, data before, parts removed."""

import math
from collections.abc import Callable, Sequence
from typing import Any

from markupsafe import Markup

from glocal.report.accuracy import Panel, Row, panel_chart
from glocal.report.answers import INTERVAL, PERCENT, condition_tables, panels
from glocal.report.curves import Measured, interval_chart
from glocal.report.drawing import linear_axis
from glocal.report.page import Section, figures, heading, key, named, table
from glocal.report.study import Candidate, Condition, Study, at, condition_of, mean_of, number, whole, with_interval


def data_size(study: Study) -> Section | None:
    """Accuracy over the number of training images."""
    drawn, said = [], []
    for data in study.datasets:
        own = [c for c in study.scratch() if c.data == data]
        if len({c.fraction for c in own}) < 2:
            continue
        smallest, largest = (pick(own, key=lambda c: c.fraction) for pick in (min, max))
        order = [[candidate["name"] for candidate in study.ranked(c)] for c in (smallest, largest)]
        if all(order):
            few, many = (whole(study.train_images(c)) for c in (smallest, largest))
            then = f", {order[1][0]} on" if order[0][0] != order[1][0] else " and on"
            said.append(f"{study.label(data)}: {order[0][0]} has the highest mean on {few} images{then} {many}.")
        lines = _lines(study, own, lambda condition, _: study.train_images(condition) or condition.fraction)
        across = "training images" if study.train_images(own[0]) is not None else "share of the training images"
        title = f"{study.label(data)}: accuracy over data size"
        drawn.append((interval_chart(title, across, "test accuracy, %", lines, PERCENT), study.label(data)))
    if not drawn:
        return None
    return Section(
        "data-size",
        "Data size",
        "Where does a built-in bias pay?",
        said,
        key(study, study.names) + figures(drawn),
        f"Each candidate was trained on stratified shares of the training images. Bars: 95 % intervals. {INTERVAL}",
        "A smaller share f gets 1 / √f times as many epochs, which still is fewer steps. Marks of one size stand a "
        "little apart, so that their intervals can be seen.",
    )


def widths(study: Study) -> Section | None:
    """Accuracy over size, where the study was repeated at several widths."""
    drawn, said = [], []
    for condition in study.main():
        own, data = study.same(condition), study.label(condition.data)
        if len(own) < 2:
            continue
        for c in sorted(own, key=lambda c: c.width):
            if ranked := study.ranked(c):
                said.append(f"{data}, width {c.width:g}: {ranked[0]['name']} reaches {number(mean_of(ranked[0]))} %.")
        lines = _lines(study, own, lambda _, candidate: candidate.get("macs"))
        title = f"{data}: accuracy over size"
        drawn.append((interval_chart(title, "multiply-adds", "test accuracy, %", lines, PERCENT), data))
    if not drawn:
        return None
    tables = [
        part
        for condition in study.candidates
        if condition.after is None and condition.width != study.reference_width(condition.data)
        for part in (heading(study.title(condition)), *condition_tables(study, condition))
    ]
    return Section(
        "widths",
        "Widths",
        "Does the order hold at other sizes?",
        said,
        key(study, study.names) + figures(drawn) + Markup("\n").join(tables),
        f"The whole comparison, repeated with every width multiplied. Bars: 95 % intervals. {INTERVAL}",
        "The recipe is the same for every size.",
    )


def transfer(study: Study) -> Section | None:
    """What training on other data before changes."""
    conditions = [c for c in study.candidates if c.after is not None]
    if not conditions:
        return None
    body, said = [figures((panel_chart(panel), "") for panel in panels(study, conditions))], []
    for condition in conditions:
        scratch = Condition(condition.data, condition.fraction, None, condition.width)
        before = {c["name"]: c for c in study.candidates.get(scratch, [])}
        gains = []
        for candidate in study.candidates[condition]:
            at_once = before.get(candidate["name"])
            old, new = (at(c, "test_accuracy", "mean") for c in (at_once, candidate))
            same = at_once is not None and all(at_once.get(k) == candidate.get(k) for k in ("params", "macs", "dims"))
            gain = new - old if same and old is not None and new is not None else None
            gains.append((candidate["name"], old, new, gain))
        first = study.label(condition.after or "")
        if before:
            body.append(
                table(
                    f"{study.label(condition.data)}: trained at once, and after {first}.",
                    ("candidate", "at once, %", f"after {first}, %", "gain, points"),
                    [
                        (named(study, n), number(old), number(new), number(gain, sign=True))
                        for n, old, new, gain in gains
                    ],
                )
            )
        known = [(gain, name) for name, _, _, gain in gains if gain is not None and math.isfinite(gain)]
        if known:
            gain, name = max(known)
            said.append(f"{study.title(condition)}: {name} gains most, {number(gain, sign=True)} points.")
        body += condition_tables(study, condition)
    return Section(
        "transfer",
        "Transfer",
        "What does training on other data before change?",
        said,
        Markup("\n").join(body),
        "Each network was trained on the first data set, got a new head and was trained on the second one. Where the "
        "two differ, grey images are repeated to three channels and images are resized.",
        "Gains are differences of means, without an interval. There is none where the network trained at once is "
        "another one: each is sized for the data that it sees first.",
    )


def ablated(study: Study) -> Section | None:
    """What the removal of a part changes."""
    groups: dict[Condition, list[dict[str, Any]]] = {}
    for entry in study.results.get("ablations") or []:
        groups.setdefault(condition_of(entry), []).append(entry)
    if not groups:
        return None
    drawn, tabled, worst = [], [], []
    for condition, entries in groups.items():
        rows = [
            Row(
                f"{entry['name']} without {entry['without']}",
                at(entry, "difference", "mean"),
                at(entry, "difference", "low"),
                at(entry, "difference", "high"),
                (),
                study.series(entry["name"]),
            )
            for entry in entries
        ]
        values = [0.0, *(v for row in rows for v in (row.mean, row.low, row.high))]
        axis = linear_axis("change of test accuracy, points", values)
        drawn.append((panel_chart(Panel(study.title(condition), "", rows, axis)), ""))
        tabled.append(
            table(
                f"{study.title(condition)}: without minus with.",
                ("candidate", "without", "change, points [95 % interval]"),
                [
                    (named(study, e["name"]), e["without"], with_interval(e["difference"], 2, sign=True))
                    for e in entries
                ],
            )
        )
        worst += [(row.mean, row.label) for row in rows if row.mean is not None and math.isfinite(row.mean)]
    said = [f"Largest change: {min(worst)[1]}, {number(min(worst)[0], sign=True)} points."] if worst else []
    return Section(
        "ablations",
        "Ablations",
        "What does each part contribute?",
        said,
        figures(drawn) + Markup("\n").join(tabled),
        "The same network without skip connections, MLPs or positions, trained anew with the same recipe. "
        "Bar: mean difference to the whole network. Band: its 95 % interval (Student's t over seeds, variance "
        "pooled over the two).",
        "Without its MLPs a network also is smaller. The differences are not corrected for several comparisons.",
    )


def _lines(
    study: Study, conditions: Sequence[Condition], size: Callable[[Condition, Candidate], float | None]
) -> list[Measured]:
    """Every candidate's accuracies over a size."""
    points: dict[str, list[tuple[float, float, float | None, float | None]]] = {}
    for condition in conditions:
        for candidate in study.ranked(condition):
            place = size(condition, candidate)
            if place is not None and place > 0:
                accuracy = candidate["test_accuracy"]
                points.setdefault(candidate["name"], []).append(
                    (place, accuracy["mean"], accuracy.get("low"), accuracy.get("high"))
                )
    return [Measured(name, points[name], study.series(name)) for name in study.names if name in points]
