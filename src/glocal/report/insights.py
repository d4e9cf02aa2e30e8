"""The sections behind the answer: capacity, cost, learning, confusions, hardest images, how it was computed."""

import math
import re
from typing import Any

from markupsafe import Markup

from glocal.report.confusion import MOST_CLASSES, confusion_chart, most_confused
from glocal.report.curves import Line, line_chart
from glocal.report.drawing import drawable, linear_axis, log_axis
from glocal.report.page import Section, figures, heading, key, named, table
from glocal.report.scatter import Point, front, scatter_chart
from glocal.report.study import Candidate, Condition, Study, at, count, number, seeds_of, whole

_ONE_BUDGET = 1.041  # candidates within 2 % of a budget
_PERCENT = (0.0, 100.0)


def capacity(study: Study) -> Section | None:
    """Training loss against the gap to unseen images."""
    drawn, said = [], []
    for condition in study.scratch():
        points = []
        for candidate in study.candidates[condition]:
            loss, gap = (at(candidate, "fit", kind, "mean") for kind in ("train_loss", "gap"))
            if drawable(loss) and drawable(gap):
                each = zip(seeds_of(candidate, "fit", "train_loss"), seeds_of(candidate, "fit", "gap"), strict=False)
                seeds = [(x, y) for x, y in each if x is not None and y is not None and drawable(x) and drawable(y)]
                label = f"{candidate['name']}: training loss {number(loss, 3)}, gap {number(gap, 3)}"
                points.append(Point(label, loss, gap, study.series(candidate["name"]), seeds))
        if not points:
            continue
        pairs = [(point.x, point.y) for point in points] + [pair for point in points for pair in point.seeds]
        across = linear_axis("training loss (left: more capacity)", [x for x, _ in pairs])
        up = linear_axis("gap (low: generalises better)", [y for _, y in pairs])
        title = study.title(condition)
        drawn.append((scatter_chart(f"{title}: training loss and gap", across, up, points), title))
        fits, carries = min(points, key=lambda p: p.x), min(points, key=lambda p: p.y)
        said.append(f"{title}: lowest training loss, {fits.label.split(': training')[0]} ({number(fits.x, 3)});")
        said[-1] += f" smallest gap, {carries.label.split(': training')[0]} ({number(carries.y, 3)})."
    if not drawn:
        return None
    return Section(
        "capacity",
        "Capacity",
        "Do they lack capacity or generalisation?",
        said,
        key(study, study.names) + figures(drawn),
        "Plain cross-entropy of the final weights, without augmentation or smoothing: on the training images, and on "
        "the test images minus that. Large marks: means over seeds; small ones: single seeds. These are the two axes "
        "of CoAtNet's study (Dai et al. 2021, arXiv 2106.04803).",
        "After few epochs the training loss says as much about the speed of learning as about capacity.",
    )


def pareto(study: Study) -> Section | None:
    """Accuracy against multiply-adds and against speed."""
    drawn, said = [], []
    kinds = (
        ("macs", "multiply-adds for an image", False),
        ("images_per_second_forward", "images per second, forward", True),
        ("images_per_second", "images per second, training", True),
    )
    for condition in study.main():
        conditions, data = study.same(condition), study.label(condition.data)
        for kind, unit, more in kinds:
            points = [
                Point(
                    _sized(candidate, conditions), candidate[kind], candidate["test_accuracy"]["mean"],
                    study.series(candidate["name"]),
                )
                for c in conditions
                for candidate in study.candidates[c]
                if drawable(candidate.get(kind)) and candidate[kind] > 0
                and drawable(at(candidate, "test_accuracy", "mean"))
            ]  # fmt: skip
            if len(points) < 2:
                continue
            low, high = min(point.x for point in points), max(point.x for point in points)
            equal = kind == "macs" and high / low < _ONE_BUDGET
            best = [] if equal else front(points, more_is_better=more)
            across = log_axis(unit, [point.x for point in points])
            up = linear_axis("test accuracy, %", [point.y for point in points], _PERCENT)
            names = ", ".join(point.label for point in best)
            title = f"{data}: accuracy and {unit}"
            note = "one budget, so no front" if equal else f"on the front: {names}"
            drawn.append((scatter_chart(title, across, up, points, best), f"{data}; {note}"))
            if kind == "macs":
                said.append(f"{data}: multiply-adds differ by {number(100 * (high / low - 1))} % at most.")
    if not drawn:
        return None
    return Section(
        "cost",
        "Cost",
        "What does accuracy cost?",
        said,
        key(study, study.names) + figures(drawn),
        "Ringed: the front, candidates that no other one equals or beats on both axes. Multiply-adds are counted, "
        "images per second measured; candidates at several widths are joined.",
        "The front goes by means alone: neighbours on it may not be told apart. Under one budget of multiply-adds only "
        "the measured speeds say what differs.",
    )


def _sized(candidate: Candidate, conditions: list[Condition]) -> str:
    return f"{candidate['name']} (width {candidate.get('width', 1):g})" if len(conditions) > 1 else candidate["name"]


def curves(study: Study) -> Section | None:
    """Learning curves of every condition."""
    drawn = []
    epochs = 0
    for condition, candidates in study.candidates.items():
        title = study.title(condition)
        for quantity, unit in (("test_accuracy", "test accuracy, %"), ("train_loss", "training loss")):
            lines = [
                Line(f"{c['name']}, seed {curve['seed']}", curve[quantity], study.series(c["name"]))
                for c in candidates
                for curve in c.get("curves") or []
                if curve.get(quantity)
            ]
            if lines:
                epochs = max(epochs, *(len(line.values) for line in lines))
                drawn.append((line_chart(f"{title}: {unit} after epochs", unit, lines), f"{title}: {unit}"))
    if not drawn:
        return None
    return Section(
        "learning",
        "Learning",
        "How do they learn?",
        [f"{count(epochs, 'epoch')} at most."],
        key(study, study.names) + figures(drawn),
        "One line for each seed. Test accuracy after every epoch, or, where there are fewer training than test images, "
        "after as many training images as there are test images; training loss as it was optimised, the mean over the "
        "epoch, label smoothing and augmentation included.",
        "Nothing was chosen by the test accuracy on the way: the last epoch counts.",
    )


def confusions(study: Study) -> Section | None:
    """Which classes are taken for which, in each candidate."""
    body, said = [], []
    for condition in study.main():
        classes = [str(c) for c in study.datasets.get(condition.data, {}).get("classes") or []]
        own = [(c, c["confusion"]) for c in study.candidates[condition] if c.get("confusion")]
        own = [(c, counts) for c, counts in own if len(counts) == len(classes)]
        if not own:
            continue
        title = study.title(condition)
        body.append(heading(title))
        total = [[sum(cells) for cells in zip(*rows, strict=True)] for rows in zip(*(m for _, m in own), strict=True)]
        for i, j, times, out_of in most_confused(total, 1):
            said.append(f"{title}: most often {classes[i]} is taken for {classes[j]}, {times:,} of {out_of:,} times.")
        if len(classes) <= MOST_CLASSES:
            maps = []
            for c, counts in own:
                chart = confusion_chart(f"{title}, {c['name']}: confusions", classes, counts, study.series(c["name"]))
                maps.append((chart, c["name"]))
            body.append(figures(maps, least=17 if len(classes) <= 5 else 27))
        else:
            rows = [
                (named(study, c["name"]), classes[i], classes[j], f"{times:,} of {out_of:,}")
                for c, counts in own
                for i, j, times, out_of in most_confused(counts)
            ]
            body.append(
                table(
                    "The ten most frequent confusions of each.", ("candidate", "true", "predicted", "how often"), rows
                )
            )
    if not body:
        return None
    return Section(
        "confusions",
        "Confusions",
        "What do they take for what?",
        said,
        Markup("\n").join(body),
        "Test images of all seeds together. Rows are true classes; a cell's strength grows with its share of the row "
        "(numbers: percent), grey where it is right, in the candidate's colour where it is wrong.",
        "Rare classes have few images: a strong cell may be one of them.",
    )


def hardest(study: Study) -> Section | None:
    """The test images with the highest loss."""
    body, said = [], []
    for name, dataset in study.datasets.items():
        examples = dataset.get("hardest") or []
        if not examples:
            continue
        shown = Markup("").join(map(_example, examples))
        body += [heading(study.label(name)), Markup('<div class="examples">{}</div>').format(shown)]
        never = sum(example.get("right") == 0 for example in examples)
        said.append(f"{study.label(name)}: {never} of these {len(examples)} are wrong in every run.")
    if not body:
        return None
    return Section(
        "hardest",
        "Hardest images",
        "Which images are hardest?",
        said,
        Markup("\n").join(body),
        "The test images with the highest cross-entropy, the mean over all runs of all candidates. Below each: its "
        "class, what it is most often taken for, and the share of runs that classify it rightly.",
        "Wrong labels in the data come first here, too.",
    )


def _example(example: dict[str, Any]) -> Markup:
    source = str(example.get("picture") or "")
    shown = Markup("")
    if re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/]+=*", source):  # never an address
        shown = Markup('<img alt="test image {}" src="{}">').format(example.get("index", ""), source)
    right = example.get("right")
    return Markup("<figure>{}<figcaption><b>{}</b>{}<br>{} right, loss {}</figcaption></figure>").format(
        shown,
        example.get("label", ""),
        f", taken for {example['predicted']}" if example.get("predicted") else "",
        "–" if right is None or not math.isfinite(right) else f"{100 * right:.0f} %",
        number(example.get("loss"), 2),
    )


def method(study: Study) -> Section:
    """Data, recipe, versions, and what is not known."""
    results = study.results
    body = []
    for name, dataset in study.datasets.items():
        body += [heading(name), _described([("data", _data(dataset)), *_recipe(dataset.get("recipe") or {})])]
    runs = results.get("runs") or {}
    body.append(heading("Runs"))
    body.append(
        _described(
            [
                ("runs", f"{runs.get('finished', '–')} of {runs.get('planned', '–')} finished"),
                ("device", str(results.get("device", "–"))),
                ("versions", f"glocal {results.get('glocal', '–')}, torch {results.get('torch', '–')}"),
            ]
        )
    )
    seeds = sorted({len(c.get("seeds") or []) for own in study.candidates.values() for c in own})
    shown = " to ".join(map(str, sorted({seeds[0], seeds[-1]}))) if seeds else "no"
    return Section(
        "method",
        "Method",
        "How was it computed?",
        [f"{count(len(study.names), 'candidate')}, {shown} seed{'' if seeds == [1] else 's'} each."],
        Markup("\n").join(body),
        "All candidates had the same images, recipe and seeds. A seed sets the initial weights, the order of the "
        "images and the augmentation; intervals and tests are about those and about the choice of test images.",
        "Not known: what longer training, another recipe, other data or another size would give, and whether a "
        "candidate would gain more from a recipe of its own.",
    )


def _data(dataset: dict[str, Any]) -> str:
    size, classes = dataset.get("img_size") or ["–", "–"], [str(c) for c in dataset.get("classes") or []]
    listed = ", ".join(classes[:20]) + (", …" if len(classes) > 20 else "")
    return (
        f"{whole(dataset.get('train_images'))} training and {whole(dataset.get('test_images'))} test images of "
        f"{size[0]} × {size[1]} pixels, {'grey' if dataset.get('in_chans') == 1 else 'colour'}, {len(classes)} "
        f"classes ({listed}). {dataset.get('note') or ''}"
    )


def _recipe(recipe: dict[str, Any]) -> list[tuple[str, str]]:
    return [(key.replace("_", " "), str(value)) for key, value in recipe.items()]


def _described(entries: list[tuple[str, str]]) -> Markup:
    rows = Markup("\n").join(Markup("<dt>{}</dt><dd>{}</dd>").format(*entry) for entry in entries)
    return Markup("<dl>{}</dl>").format(rows)
