"""Results for other programs: they read back to the same numbers."""

import csv
import io
import math
import re

import pytest

from glocal.report import results_csv, results_latex
from glocal.report.export import escaped

from .report_study import candidate, everything, study


def rows_of(results):
    return list(csv.DictReader(io.StringIO(results_csv(results))))


def test_csv_has_a_row_for_every_run_with_its_numbers():
    results = everything()
    rows = iter(rows_of(results))
    for one in results["candidates"]:
        for i, seed in enumerate(one["seeds"]):
            row = next(rows)
            assert (row["name"], row["data"], int(row["seed"])) == (one["name"], one["data"], seed)
            assert (float(row["fraction"]), float(row["width"])) == (one["fraction"], one["width"])
            assert (row["after"] or None, row["without"] or None) == (one["after"], one["without"])
            assert float(row["test_accuracy"]) == one["test_accuracy"]["per_seed"][i]
            assert float(row["train_loss"]) == one["train_loss"]["per_seed"][i]
            for kind, part in one["fit"].items():
                assert float(row["fit_gap" if kind == "gap" else f"fit_{kind}"]) == part["per_seed"][i]
            for kind in ("mean", "low", "high"):
                assert float(row[f"test_accuracy_{kind}"]) == one["test_accuracy"][kind]
                difference = one["difference_to_best"]
                assert row[f"difference_{kind}"] == ("" if difference is None else repr(difference[kind]))
            for key in ("params", "macs", "lr", "images_per_second", "images_per_second_forward", "peak_memory"):
                assert float(row[key]) == one[key]
            assert row["resized"] == "True"
    assert next(rows, None) is None


def test_csv_of_difficult_values():
    name = "my \"op\", <b>&\n'x.py:Op(a=1)'"
    one = candidate(name, "a,b", 50, seeds=2)
    one["train_loss"] = {"mean": None, "per_seed": [None, math.inf]}
    one["fit"] = None
    first, second = rows_of({"candidates": [one]})
    assert first["name"] == name and first["data"] == "a,b"
    assert (first["train_loss"], second["train_loss"]) == ("", "inf")
    assert first["fit_gap"] == "" and None not in first
    assert rows_of({"candidates": []}) == []


def cells(line):
    return [cell.strip() for cell in re.split(r"(?<!\\)&", line.removesuffix(r"\\"))]


def test_latex_is_balanced_and_holds_the_numbers():
    results = study()
    text = results_latex(results)
    for name in ("table", "tabular"):
        assert text.count(rf"\begin{{{name}}}") == text.count(rf"\end{{{name}}}") == 2
    assert re.sub(r"\\[{}]", "", text).count("{") == re.sub(r"\\[{}]", "", text).count("}")
    assert text.replace(r"\$", "").count("$") % 2 == 0
    rows = [cells(line) for line in text.splitlines() if line.endswith(r"\\")]
    assert all(len(row) == 5 for row in rows)
    body = [row for row in rows if row[0] != "Candidate"]
    for row, one in zip(body, results["candidates"], strict=True):
        mean, half = re.fullmatch(r"(?:\\textbf\{)?([\d.]+)\}? \$\\pm\$ ([\d.]+)", row[1]).groups()
        assert row[0] == one["name"]
        assert float(mean) == pytest.approx(one["test_accuracy"]["mean"], abs=0.05001)
        assert float(half) == pytest.approx(2.1)
        assert row[2] == f"{one['params']:,}" and row[3] == rf"{one['macs'] / 1e6:.1f}\,M"


def test_latex_is_bold_only_for_a_winner():
    text = results_latex(study())
    [bold] = re.findall(r"^(.*?) & \\textbf", text, re.MULTILINE)
    assert bold == "C-C-C-C"  # on texture; recall has none
    assert text.index("texture") < text.index(r"\textbf")


def test_latex_escapes_names():
    special = r"\ ~ ^ < > | & % $ # _ { }"
    assert escaped(special) == (
        r"\textbackslash{} \textasciitilde{} \textasciicircum{} \textless{} \textgreater{} \textbar{} "
        r"\& \% \$ \# \_ \{ \}"
    )
    results = study()
    for one in results["candidates"]:
        one["name"], one["data"] = f"{one['name']} {special}", "a_b & 50 % \\input{x}"
    results["verdicts"] = []
    text = results_latex(results)
    assert r"a\_b \& 50 \% \textbackslash{}input\{x\}" in text and r"\input{x}" not in text
    assert re.sub(r"\\[{}]", "", text).count("{") == re.sub(r"\\[{}]", "", text).count("}")
    assert all(len(cells(line)) == 5 for line in text.splitlines() if line.endswith(r"\\"))


def test_latex_of_missing_values():
    one = candidate("C", "recall", 50, seeds=1)
    one.update(macs=None, resized=False)
    text = results_latex({"candidates": [one], "datasets": [{"name": "recall"}]})
    assert r"C$^\dagger$ & " in text and " & -- & " in text and r"\pm" not in text and "1 seed each" in text
    assert results_latex({"candidates": []}) == ""


# planted by scripts/mutate
FAULTS = (
    (
        "a name's special characters reach LaTeX as they are",
        'escaped(candidate["name"]) + mark',
        'candidate["name"] + mark',
    ),
    (
        "every run is given the first seed's values",
        "*(values[i] if i < len(values) else None for values in runs)",
        "*(values[0] if values else None for values in runs)",
    ),
)
