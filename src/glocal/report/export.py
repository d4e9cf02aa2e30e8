"""Results for other programs: CSV for a data frame, LaTeX for a paper."""

import csv
import io
import re
from typing import Any

from glocal.report.study import Candidate, Condition, Study, at, decimals_for, half_width, number, seeds_of

COLUMNS = (
    *("data", "fraction", "after", "width", "without", "name", "seed"),
    *("test_accuracy", "train_loss", "fit_train_loss", "fit_test_loss", "fit_gap", "fit_train_accuracy"),
    *("test_accuracy_mean", "test_accuracy_low", "test_accuracy_high"),
    *("difference_mean", "difference_low", "difference_high"),
    *("params", "macs", "resized", "lr", "images_per_second", "images_per_second_forward", "seconds_per_epoch"),
    "peak_memory",
)


def results_csv(results: dict[str, Any]) -> str:
    """One row a run (candidate and seed) under one header, as `pandas.read_csv` expects it.

    Columns: `data`, `fraction`, `after`, `width`, `without`, `name` and `seed` say which run it is; `test_accuracy`
    (percent), `train_loss` (as optimised) and `fit_*` (plain losses and training accuracy of the final weights) are
    that run's; `test_accuracy_mean` ... `peak_memory` (bytes) belong to its candidate and repeat for every seed:
    mean and 95 % interval, and the difference to the best in percentage points. Empty: not measured.
    """
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(COLUMNS)
    for candidate in results.get("candidates") or []:
        shared = [
            *(at(candidate, "test_accuracy", kind) for kind in ("mean", "low", "high")),
            *(at(candidate, "difference_to_best", kind) for kind in ("mean", "low", "high")),
            *(candidate.get(column) for column in COLUMNS[COLUMNS.index("params") :]),
        ]
        runs = [
            seeds_of(candidate, "test_accuracy"),
            seeds_of(candidate, "train_loss"),
            *(seeds_of(candidate, "fit", kind) for kind in ("train_loss", "test_loss", "gap", "train_accuracy")),
        ]
        defaults = {"fraction": 1.0, "width": 1.0}
        which = [candidate.get(column, defaults.get(column)) for column in COLUMNS[: COLUMNS.index("seed")]]
        for i, seed in enumerate(candidate.get("seeds") or []):
            writer.writerow([*which, seed, *(values[i] if i < len(values) else None for values in runs), *shared])
    return out.getvalue()


def results_latex(results: dict[str, Any]) -> str:
    r"""A table for each condition, for a document with `\usepackage{booktabs}`.

    Accuracies are mean ± half of the 95 % interval; bold only where the verdict names a winner.
    """
    study = Study(results)
    return "\n".join(_table(study, condition) for condition in study.candidates)


def _table(study: Study, condition: Condition) -> str:
    candidates = study.candidates[condition]
    winner = at(study.verdict(condition), "winner")
    decimals = decimals_for([at(candidate, "test_accuracy", "mean") for candidate in candidates])
    seeds = sorted({len(candidate.get("seeds") or []) for candidate in candidates})
    counted = " to ".join(str(n) for n in dict.fromkeys((seeds[0], seeds[-1])))
    intervals = any(half_width(candidate.get("test_accuracy")) is not None for candidate in candidates)
    caption = f"{study.title(condition)}: test accuracy in percent, {counted} seed{'' if seeds == [1] else 's'} each"
    meaning = r" ($\pm$: 95\,\% interval of the mean)" if intervals else ""
    lines = [
        r"\begin{table}",
        r"\centering",
        rf"\caption{{{escaped(caption)}{meaning}.}}",
        r"\begin{tabular}{lrrrr}",
        r"\toprule",
        r"Candidate & Accuracy & Parameters & Multiply-adds & Images/s \\",
        r"\midrule",
        *(_row(candidate, candidate["name"] == winner, decimals) for candidate in candidates),
        r"\bottomrule",
        r"\end{tabular}",
        r"\end{table}",
        "",
    ]
    return "\n".join(lines)


def _row(candidate: Candidate, won: bool, decimals: int) -> str:
    half = half_width(candidate.get("test_accuracy"))
    mean = _value(at(candidate, "test_accuracy", "mean"), decimals)
    accuracy = rf"\textbf{{{mean}}}" if won else mean
    if half is not None:
        accuracy += rf" $\pm$ {half:.{decimals}f}"
    mark = r"$^\dagger$" if candidate.get("resized") is False else ""
    cells = [
        escaped(candidate["name"]) + mark,
        accuracy,
        _value(candidate.get("params"), 0),
        _millions(candidate.get("macs")),
        _value(candidate.get("images_per_second_forward", candidate.get("images_per_second")), 0),
    ]
    return " & ".join(cells) + r" \\"


def _value(value: float | None, decimals: int) -> str:
    shown = number(value, decimals)
    return shown.replace("–", "--").replace("−", "$-$").replace("∞", r"$\infty$")


def _millions(value: float | None) -> str:
    return "--" if value is None else f"{_value(value / 1e6, 1)}\\,M"


_SPECIAL = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    '"': r"\textquotedbl{}",
    "\n": " ",
    **{character: "\\" + character for character in "&%$#_{}"},
}


def escaped(text: str) -> str:
    """Text that LaTeX prints as it is."""
    return re.sub(r'[\\~^<>|"\n&%$#_{}]', lambda match: _SPECIAL[match[0]], text)
