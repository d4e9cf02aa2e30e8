"""The page of `glocal recall`: accuracy over the distance between a question and its answer."""

from typing import Any

from markupsafe import Markup

from glocal.report.drawing import Frame, Series, line, linear_axis, marker, path, series_of, titled
from glocal.report.page import figures, render, swatch, table
from glocal.report.study import number

_BUCKETS = 8  # at most, that distances are put together in


def distances_report(results: dict[str, Any]) -> str:
    """The page as one HTML file that needs nothing else.

    Args:
        results: What results.json of `glocal recall` holds.
    """
    operators = results["operators"]
    looks = [series_of(i, len(operators)) for i in range(len(operators))]
    buckets = bucketed(results["length"])
    rows = [[_accuracies(operator, bucket) for bucket in buckets] for operator in operators]
    return render(
        "distances.html",
        results=results,
        names=[(swatch(look), operator["mixer"]) for look, operator in zip(looks, operators, strict=True)],
        chart=figures([(_chart(results, buckets, rows, looks), "")], 40),
        sentences=[_sentence(results, operator) for operator in operators],
        table=table(
            "Accuracy in %, mean over seeds, by distance in tokens.",
            ("operator", *(_named(bucket) for bucket in buckets), "reach", "parameters"),
            [
                (
                    Markup("{}{}").format(swatch(look), operator["mixer"]),
                    *(number(sum(own) / len(own)) for own in row),
                    _reach(results, operator),
                    f"{operator['params']:,}",
                )
                for operator, row, look in zip(operators, rows, looks, strict=True)
            ],
        ),
    )


def bucketed(length: int) -> list[range]:
    """Distances 1 to length - 1 in consecutive parts of one size; the last may be smaller."""
    size = -(-(length - 1) // _BUCKETS)
    return [range(first, min(first + size, length)) for first in range(1, length, size)]


def _accuracies(operator: dict[str, Any], bucket: range) -> list[float]:
    """Percent of the test sequences at these distances, of every seed."""
    tested = sum(operator["tested"][d - 1] for d in bucket)
    return [100 * sum(right[d - 1] for d in bucket) / max(tested, 1) for right in operator["right"]]


def _chart(results: dict[str, Any], buckets: list[range], rows: list[list[list[float]]], looks: list[Series]) -> Markup:
    frame = Frame(
        "accuracy over distance",
        linear_axis("distance from the question to its answer, tokens", [0, results["length"] - 1]),
        linear_axis("test accuracy, %", [0, 100], (0, 100)),
    )
    at = [frame.x((bucket[0] + bucket[-1]) / 2) for bucket in buckets]
    chance = frame.y(results["chance"])
    marks = [line("trend", (frame.x(0), chance), (frame.x(results["length"] - 1), chance))]
    for operator, row, look in zip(results["operators"], rows, looks, strict=True):
        means = [(x, frame.y(sum(own) / len(own))) for x, own in zip(at, row, strict=True)]
        spread = [
            line(f"s{look.colour}", (x, frame.y(min(own))), (x, frame.y(max(own))), 1.5)
            for x, own in zip(at, row, strict=True)
        ]
        marks.append(titled(operator["mixer"], [*spread, path(means, look), *(marker(*m, look, 3.5) for m in means)]))
    return frame.drawn(marks)


def _sentence(results: dict[str, Any], operator: dict[str, Any]) -> str:
    within = range(1, operator["reach"] + 1)
    beyond = range(operator["reach"] + 1, results["length"])
    near = _accuracies(operator, within) if within else []
    guess = f"a guess gives {number(results['chance'])} %"
    said = f"{operator['mixer']}: its output depends on "
    if not beyond:
        return f"{said}tokens at any distance; it answers {number(sum(near) / len(near))} % of the questions ({guess})."
    far = _accuracies(operator, beyond)
    there = f"{number(sum(far) / len(far))} %"
    if not within:
        return f"{said}no other token; it answers {there} of the questions ({guess})."
    here = f"{number(sum(near) / len(near))} %"
    said += f"tokens up to {operator['reach']} away"
    return f"{said}; it answers {here} of the questions within, {there} beyond ({guess})."


def _reach(results: dict[str, Any], operator: dict[str, Any]) -> str:
    return "any distance" if operator["reach"] >= results["length"] - 1 else f"{operator['reach']}"


def _named(bucket: range) -> str:
    return f"{bucket[0]}" if len(bucket) == 1 else f"{bucket[0]}–{bucket[-1]}"
