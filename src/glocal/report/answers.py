"""The sections that answer: verdicts, the main picture, the tables, data size, transfer, ablations, widths."""

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from glocal.report.accuracy import Panel, Row, is_sequence, panel_chart
from glocal.report.drawing import linear_axis, shorten
from glocal.report.page import Section, figures, heading, named, table, unbroken
from glocal.report.study import (
    Candidate,
    Condition,
    Study,
    amount,
    at,
    condition_of,
    count,
    decimals_for,
    mean_of,
    memory,
    number,
    seeds_of,
    whole,
    with_interval,
)

PERCENT = (0.0, 100.0)
INTERVAL = (
    "The interval of a mean is Student's t over seeds with the variance pooled over all candidates of the comparison; "
    "it holds the mean of infinitely many seeds in 95 % of studies."
)


def dagger(candidate: Candidate) -> str:
    """The mark of candidates outside the budget."""
    return "†" if candidate.get("resized") is False else ""


def verdicts(study: Study) -> Section | None:
    """One sentence for each condition, and the tests behind it."""
    found = study.results.get("verdicts") or []
    if not found:
        return None
    body, winners = [], 0
    for verdict in found:
        winners += verdict.get("winner") is not None
        body.append(
            Markup('<div class="verdict{}"><h3>{}</h3><p>{}</p></div>').format(
                " won" if verdict.get("winner") is not None else "",
                study.title(condition_of(verdict)),
                unbroken(verdict.get("sentence", "")),
            )
        )
    tests = [_tests(study, verdict) for verdict in found if verdict.get("pairs")]
    if tests:
        body.append(_folded("The tests behind this", tests))
    return Section(
        "answer",
        "Answer",
        "Which one is best?",
        [f"A winner is named in {winners} of {count(len(found), 'comparison')}."],
        Markup("\n").join(body),
        "The candidate with the highest mean is compared with each other one, twice: over seeds (Student's t with the "
        "variance pooled over all candidates: would other seeds give the same?) and over test images (paired "
        "bootstrap: would other images?). The larger of the two p-values counts, corrected after Holm for the number "
        "of pairs. A winner is named only where all of them are at most 0.05, so that among equals one is named in at "
        "most 5 % of studies.",
        "It holds for this data, recipe and size. A candidate that is not told apart from the best is not shown to be "
        "equal to it.",
    )


def _folded(summary: str, parts: list[Markup]) -> Markup:
    return Markup("<details><summary>{}</summary>{}</details>").format(summary, Markup("").join(parts))


def _tests(study: Study, verdict: dict[str, Any]) -> Markup:
    return table(
        f"{study.title(condition_of(verdict))}: each other candidate against {verdict.get('best')}.",
        ("candidate", "difference, points [95 % interval]", "p, seeds", "p, images", "p, Holm"),
        [
            (
                named(study, pair["name"]),
                with_interval({**pair, "mean": pair.get("difference")}, 2, sign=True),
                *(_p(pair.get(kind)) for kind in ("p_seeds", "p_images", "p_holm")),
            )
            for pair in verdict["pairs"]
        ],
    )


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.0001" if value < 0.0001 else f"{value:.4f}"


def panels(study: Study, conditions: Sequence[Condition]) -> list[Panel]:
    """The main picture: a panel for each condition."""
    return [_panel(study, condition) for condition in conditions]


def _panel(study: Study, condition: Condition) -> Panel:
    verdict = study.verdict(condition)
    winner = at(verdict, "winner")
    rows = [
        Row(
            candidate["name"],
            at(candidate, "test_accuracy", "mean"),
            at(candidate, "test_accuracy", "low"),
            at(candidate, "test_accuracy", "high"),
            seeds_of(candidate, "test_accuracy"),
            study.series(candidate["name"]),
            dagger(candidate),
            candidate["name"] == winner,
        )
        for candidate in study.candidates[condition]
    ]
    values = [v for row in rows for v in (row.mean, row.low, row.high, *row.seeds)]
    subtitle = ""
    if verdict is not None and len(rows) > 1:
        subtitle = f"winner: {shorten(winner, 48)}" if winner is not None else "no winner can be named"
    decimals = decimals_for([row.mean for row in rows])
    return Panel(study.title(condition), subtitle, rows, linear_axis("test accuracy, %", values, PERCENT), decimals)


def picture(study: Study) -> Section | None:
    """The main picture."""
    conditions = study.scratch()
    if not conditions:
        return None
    said = []
    for condition in study.main():
        if ranked := study.ranked(condition):
            said.append(f"{study.title(condition)}: {ranked[0]['name']} reaches {number(mean_of(ranked[0]))} %")
            said[-1] += f", {ranked[-1]['name']} {number(mean_of(ranked[-1]))} %." if len(ranked) > 1 else "."
    sequence = is_sequence([candidate["name"] for candidate in study.candidates[conditions[0]]])
    return Section(
        "accuracy",
        "Accuracy",
        "How accurate are they, and how sure is that?",
        said,
        figures((panel_chart(panel), "") for panel in panels(study, conditions)),
        "Share of test images classified rightly after the last epoch. Bar: mean over seeds. Band: its 95 % interval. "
        "Dots: single seeds."
        + (" Rows run from local to global: C is convolution, T attention over the whole image." if sequence else "")
        + f" {INTERVAL}",
        "Axes do not start at zero. Overlapping bands do not decide: the verdict above tests differences."
        + (" † differs from the others in size." if any(map(dagger, study.everyone())) else ""),
    )


def tables(study: Study) -> Section | None:
    """Every number of every condition without data before it."""
    conditions = study.scratch()
    if not conditions:
        return None
    body = []
    for condition in conditions:
        reached, cost = condition_tables(study, condition)
        body += [heading(study.title(condition)), reached, *([cost] if condition in study.main() else [])]
    outside = [candidate["name"] for candidate in study.everyone() if dagger(candidate)]
    spent = [c["macs"] for c in study.everyone() if c.get("macs") is not None]
    said = count(len(study.names), "candidate")
    if spent:
        said += (
            ", " + " to ".join(dict.fromkeys((amount(min(spent)), amount(max(spent))))) + " multiply-adds for an image"
        )
    return Section(
        "numbers",
        "Numbers",
        "What are the numbers?",
        [f"{said}."],
        Markup("\n").join(body),
        "Difference to best: mean minus the highest mean, in percentage points, with its 95 % interval. Training "
        "loss: plain cross-entropy of the final weights on the training images, without augmentation; gap: the same on "
        "test images minus that. Multiply-adds: counted for one image, attention products included. Images per second: "
        "as the runs went, perhaps with other runs beside them. Peak memory: of all tensors in one training step.",
        "Speeds and memory belong to this device and this batch size."
        + (f" † {', '.join(dict.fromkeys(outside))}: could not be resized to the budget." if outside else ""),
    )


def condition_tables(study: Study, condition: Condition) -> tuple[Markup, Markup]:
    """One table of what was reached and one of what it cost."""
    own = study.candidates[condition]
    rates = {candidate.get("lr") for candidate in own}
    tuned = len(rates) > 1 or rates - {None, at(study.datasets.get(condition.data), "recipe", "lr")}
    winner = at(study.verdict(condition), "winner")
    reached, cost = [], []
    for candidate in own:
        name = named(study, candidate["name"], dagger(candidate))
        accuracy = with_interval(candidate.get("test_accuracy"))
        reached.append(
            (
                name,
                Markup("<strong>{}</strong>").format(accuracy) if candidate["name"] == winner else accuracy,
                " ".join(number(value) for value in seeds_of(candidate, "test_accuracy")),
                with_interval(candidate.get("difference_to_best"), sign=True),
                number(at(candidate, "fit", "train_loss", "mean"), 3),
                number(at(candidate, "fit", "gap", "mean"), 3),
                *([number(candidate.get("lr"), 5)] if tuned else []),
            )
        )
        cost.append(
            (
                name,
                whole(candidate.get("params")),
                amount(candidate.get("macs")),
                whole(candidate.get("images_per_second_forward")),
                whole(candidate.get("images_per_second")),
                number(candidate.get("seconds_per_epoch")),
                memory(candidate.get("peak_memory")),
            )
        )
    budget = (study.verdict(condition) or {}).get("target")
    aim = ""
    if budget is not None:
        of = "parameters" if at(study.results, "budget", "of") == "params" else "multiply-adds"
        aim = f" Budget: {amount(budget)} {of}."
    return (
        table(
            "What they reach. The winner, where one is named, is in bold.",
            (
                *(
                    "candidate",
                    "accuracy, % [95 % interval]",
                    "every seed",
                    "difference to best",
                    "training loss",
                    "gap",
                ),
                *(["learning rate"] if tuned else []),
            ),
            reached,
        ),
        table(
            f"What they cost.{aim}",
            (
                "candidate",
                "parameters",
                "multiply-adds",
                "images/s forward",
                "images/s training",
                "s/epoch",
                "peak memory",
            ),
            cost,
        ),
    )
