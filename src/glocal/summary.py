"""What a comparison found, as plain data: results.json. Accuracies in percent, times in seconds, memory in bytes."""

import base64
import io
import math
import platform
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

import glocal
from glocal.config import ModelConfig
from glocal.data import ImageData
from glocal.runs import RunResult
from glocal.statistics import interval, judge, sentence

_HARDEST = 12  # test images shown
_PICTURE_SIDE = 96  # pixels; larger ones are reduced


@dataclass(frozen=True)
class Condition:
    """What the candidates of one verdict have in common.

    Args:
        data: Source of the images.
        fraction: Share of the training images.
        after: Source that the networks were trained on before, or None.
        width: Of the budget's network, over its base widths.
    """

    data: str
    fraction: float
    after: str | None
    width: float


@dataclass(frozen=True)
class Outcome:
    """One seed of a candidate.

    Args:
        seed: Its number.
        results: Of its runs, one a fold.
        predicted: Class of every test image, all folds one after the other, [N].
        labels: The true ones, [N].
        losses: Cross-entropy of the true ones, [N].
    """

    seed: int
    results: tuple[RunResult, ...]
    predicted: NDArray[np.int64]
    labels: NDArray[np.int64]
    losses: NDArray[np.float64]

    @property
    def accuracy(self) -> float:
        """Percent of all test images."""
        return 100 * float((self.predicted == self.labels).mean())


@dataclass(frozen=True)
class Row:
    """A candidate under a condition, with the seeds that are finished."""

    name: str
    condition: Condition
    without: str | None
    model: ModelConfig
    macs: int
    resized: bool
    lr: float
    seeds: int  # that are planned
    target: int | None  # of the budget
    outcomes: tuple[Outcome, ...]


def summarise(
    rows: Sequence[Row],
    data: dict[str, ImageData],
    test_images: Callable[[Condition], torch.Tensor],
    recipes: dict[str, dict[str, Any]],
    budget: dict[str, Any],
    runs: dict[str, int],
    folds: int = 0,
) -> dict[str, Any]:
    """What results.json holds; a row without a finished seed is left out.

    Args:
        rows: In the order of the tables.
        data: Images of every source, in the order they were asked for.
        test_images: The test images of a condition, uint8 [N, C, H, W], in the order of its outcomes.
        recipes: Of every source, in plain form.
        budget: `of` and `targets`.
        runs: `finished` and `planned`.
        folds: Number of folds; 0 for the split that the data has.
    """
    incomplete = {row.condition for row in rows if row.without is None and len(row.outcomes) < row.seeds}
    rows = [row for row in rows if row.outcomes]
    candidates = [_candidate(row, len(data[row.condition.data].classes)) for row in rows]
    verdicts = [
        _verdict(condition, [rows[i] for i in members], [candidates[i] for i in members], condition in incomplete)
        for condition, members in _grouped(rows).items()
    ]
    datasets = [
        {
            "name": source,
            **_counts(images, folds),
            "classes": list(images.classes),
            "img_size": list(images.img_size),
            "in_chans": images.in_chans,
            "note": images.note,
            "recipe": recipes[source],
            "hardest": _hardest(source, images.classes, rows, test_images),
        }
        for source, images in data.items()
    ]
    return {
        "glocal": glocal.__version__,
        "torch": torch.__version__,
        "device": device_name(),
        "data": datasets[0],
        "datasets": datasets,
        "recipe": datasets[0]["recipe"],
        "budget": budget,
        "runs": runs,
        "candidates": candidates,
        "verdicts": verdicts,
        "ablations": _ablations(rows),
    }


def _counts(images: ImageData, folds: int) -> dict[str, int]:
    """Training images of a run, and test images of all its folds together."""
    train, test = len(images.train_labels), len(images.test_labels)
    return (
        {"train_images": train, "test_images": test}
        if not folds
        else {"train_images": (train + test) * (folds - 1) // folds, "test_images": train + test}
    )


def device_name() -> str:
    """What runs are trained on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {torch.backends.cpu.get_cpu_capability()}), one thread a run"


def _grouped(rows: Sequence[Row]) -> dict[Condition, list[int]]:
    """Numbers of the rows that compete with each other: whole networks, not their ablations."""
    groups: dict[Condition, list[int]] = {}
    for i, row in enumerate(rows):
        if row.without is None:
            groups.setdefault(row.condition, []).append(i)
    return groups


def _candidate(row: Row, classes: int) -> dict[str, Any]:
    """A row's numbers; those that depend on the other rows are filled in by its verdict."""
    runs = [result for outcome in row.outcomes for result in outcome.results]
    epochs = [epoch for run in runs for epoch in run.epochs]
    confusion = np.zeros((classes, classes), np.int64)
    for outcome in row.outcomes:
        np.add.at(confusion, (outcome.labels, outcome.predicted), 1)
    accuracies = [outcome.accuracy for outcome in row.outcomes]
    return {
        "name": row.name,
        "data": row.condition.data,
        "fraction": row.condition.fraction,
        "after": row.condition.after,
        "width": row.condition.width,
        "without": row.without,
        "seeds": [outcome.seed for outcome in row.outcomes],
        "test_accuracy": {"mean": _mean(accuracies), "low": None, "high": None, "per_seed": accuracies},
        "difference_to_best": None,
        "train_loss": _over_seeds(row, lambda run: run.epochs[-1].train_loss),
        "fit": {
            "train_loss": _over_seeds(row, lambda run: run.train_loss),
            "test_loss": _over_seeds(row, lambda run: run.test_loss),
            "gap": _over_seeds(row, lambda run: run.test_loss - run.train_loss),
            "train_accuracy": _over_seeds(row, lambda run: run.train_accuracy),
        },
        "params": runs[0].params,
        "macs": row.macs,
        "resized": row.resized,
        "lr": row.lr,
        "dims": None if row.model.dims is None else list(row.model.dims),
        "mlp_ratio": None if row.model.model else row.model.mlp_ratio,
        "images_per_second": _mean([epoch.images_per_second for epoch in epochs]),
        "images_per_second_forward": _mean([run.images_per_second_forward for run in runs]),
        "seconds_per_epoch": _mean([epoch.seconds for epoch in epochs]),
        "peak_memory": max(run.peak_memory for run in runs),
        "confusion": confusion.tolist(),
        "curves": [
            {
                "seed": outcome.seed,
                "train_loss": _mean_curve(outcome, lambda epoch: epoch.train_loss),
                "test_accuracy": _mean_curve(outcome, lambda epoch: epoch.test_accuracy),
            }
            for outcome in row.outcomes
        ],
    }


def _verdict(
    condition: Condition, rows: Sequence[Row], candidates: Sequence[dict[str, Any]], incomplete: bool
) -> dict[str, Any]:
    """Who wins under a condition; gives the candidates their intervals."""
    names = [row.name for row in rows]
    verdict = judge([_correct(row) for row in rows])
    for candidate, (_, low, high) in zip(
        candidates, interval([c["test_accuracy"]["per_seed"] for c in candidates]), strict=True
    ):
        if low is not None and high is not None:  # no accuracy lies outside, whatever Student's t says
            candidate["test_accuracy"] |= {"low": max(low, 0.0), "high": min(high, 100.0)}
    for pair in verdict.pairs:
        if pair.low is not None:
            candidates[pair.index]["difference_to_best"] = {
                "mean": pair.difference,
                "low": pair.low,
                "high": pair.high,
            }
    equal = all(row.resized for row in rows)
    said = sentence(verdict, names, equal_budget=equal)
    return {
        "data": condition.data,
        "fraction": condition.fraction,
        "after": condition.after,
        "width": condition.width,
        "winner": None if verdict.winner is None or incomplete else names[verdict.winner],
        "best": names[verdict.best],
        "sentence": f"Runs are missing. So far: {said}" if incomplete else said,
        "seeds_needed": verdict.seeds_needed,
        "images_needed": verdict.images_needed,
        "equal_budget": equal,
        "target": rows[0].target,
        "pairs": [
            {
                "name": names[pair.index],
                "difference": pair.difference,
                "low": pair.low,
                "high": pair.high,
                "p_seeds": pair.p_seeds,
                "p_images": pair.p_images,
                "p_holm": pair.p_holm,
            }
            for pair in verdict.pairs
        ],
    }


def _ablations(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """What each ablation changes, in percentage points: without minus with."""
    whole = {(row.name, row.condition): row for row in rows if row.without is None}
    found = []
    for row in rows:
        base = whole.get((row.name, row.condition))
        if row.without is None or base is None:
            continue
        [pair] = judge([_correct(base), _correct(row)]).pairs
        sign = 1 if pair.index == 1 else -1  # a pair says other minus best
        ends = [None if end is None else sign * end for end in (pair.low, pair.high)]
        low, high = ends if sign == 1 else reversed(ends)
        found.append(
            {
                "data": row.condition.data,
                "fraction": row.condition.fraction,
                "width": row.condition.width,
                "name": row.name,
                "without": row.without,
                "difference": {"mean": sign * pair.difference, "low": low, "high": high},
            }
        )
    return found


def _hardest(
    source: str, classes: Sequence[str], rows: Sequence[Row], test_images: Callable[[Condition], torch.Tensor]
) -> list[dict[str, Any]]:
    """The test images with the highest mean loss over all whole networks trained on all images of a source."""
    own = [row for row in rows if row.condition.data == source and row.without is None]
    if not own:
        return []
    largest = max(row.condition.fraction for row in own)
    outcomes = [o for row in own if row.condition.fraction == largest for o in row.outcomes]
    losses = np.mean([np.minimum(np.nan_to_num(o.losses, nan=1e6, posinf=1e6), 1e6) for o in outcomes], axis=0)
    pictures = test_images(own[0].condition)
    found = []
    for index in np.argsort(-losses, kind="stable")[:_HARDEST].tolist():
        label = int(outcomes[0].labels[index])
        wrong = Counter(int(o.predicted[index]) for o in outcomes if o.predicted[index] != label)
        found.append(
            {
                "index": index,
                "label": classes[label],
                "loss": float(losses[index]),
                "right": 1 - wrong.total() / len(outcomes),
                "predicted": classes[wrong.most_common(1)[0][0]] if wrong else None,
                "picture": _picture(pictures[index]),
            }
        )
    return found


def _picture(image: torch.Tensor) -> str:
    """An image, uint8 [C, H, W], as a data URI."""
    pixels = image.permute(1, 2, 0).numpy()
    picture = Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels)
    picture.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"


def _correct(row: Row) -> NDArray[np.bool_]:
    return np.stack([outcome.predicted == outcome.labels for outcome in row.outcomes])


def _mean(values: Iterable[float]) -> float:
    values = list(values)
    return sum(values) / len(values)


def _over_seeds(row: Row, value: Callable[[RunResult], float]) -> dict[str, Any]:
    """A number of every run: mean over folds for each seed, and over seeds."""
    per_seed = [_finite(_mean(value(run) for run in outcome.results)) for outcome in row.outcomes]
    known = [number for number in per_seed if number is not None]
    return {"mean": _mean(known) if len(known) == len(per_seed) else None, "per_seed": per_seed}


def _mean_curve(outcome: Outcome, value: Callable[[Any], float | None]) -> list[float | None]:
    """Mean over the runs of one seed, for every epoch; None where one of them has no value."""
    found = (list(map(value, epochs)) for epochs in zip(*(run.epochs for run in outcome.results), strict=True))
    return [_finite(_mean(math.nan if v is None else v for v in values)) for values in found]


def _finite(value: float) -> float | None:
    """JSON knows no NaN."""
    return value if math.isfinite(value) else None
