"""What a comparison found: every number against the runs, verdicts, ablations, the hardest images."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from glocal import compare as comparison
from glocal import training
from glocal.compare import Study, compare
from glocal.data import load

from .small_study import LAYOUTS, config, row

pytestmark = pytest.mark.usefixtures("in_process")


def test_results_say_the_same_as_training(folder):
    results = compare(config(folder), quiet=True)
    out = folder / "out"
    assert json.loads((out / "results.json").read_text()) == results
    assert [c["name"] for c in results["candidates"]] == list(LAYOUTS)
    study = Study(config(folder), {str(folder / "data"): load(str(folder / "data"))})
    for cell in study.plan.cells:
        found = row(results, cell.name)
        for planned in (run for run in study.plan.phases[0] if run.cell == cell):
            one = training.train(study.config_of(planned), load(str(folder / "data")))
            accuracy = found["test_accuracy"]["per_seed"][planned.seed]
            assert accuracy == pytest.approx(one.epochs[-1].test_accuracy)
            assert found["train_loss"]["per_seed"][planned.seed] == one.epochs[-1].train_loss
            assert found["fit"]["gap"]["per_seed"][planned.seed] == one.test_loss - one.train_loss
            assert found["curves"][planned.seed]["test_accuracy"] == [e.test_accuracy for e in one.epochs]
            assert found["params"] == one.params
        assert np.sum(found["confusion"]) == 2 * 18
        right = np.trace(found["confusion"]) / np.sum(found["confusion"])
        assert found["test_accuracy"]["mean"] == pytest.approx(100 * right)
    target = results["budget"]["targets"][str(folder / "data")]
    assert all(abs(c["macs"] / target - 1) < 0.02 and c["resized"] for c in results["candidates"])
    [verdict] = results["verdicts"]
    assert verdict["equal_budget"] and verdict["best"] in LAYOUTS and len(verdict["pairs"]) == 1
    best = max(results["candidates"], key=lambda c: c["test_accuracy"]["mean"])
    assert verdict["best"] == best["name"] and best["difference_to_best"] is None
    low, high = best["test_accuracy"]["low"], best["test_accuracy"]["high"]
    assert 0 <= low <= best["test_accuracy"]["mean"] <= high <= 100
    assert len(results["datasets"][0]["hardest"]) == 12
    for name in ("report.html", "results.csv", "results.tex"):
        assert "C-C-T-T" in (out / name).read_text()
    assert not list(out.rglob("*.tmp"))


def test_the_hardest_images_are_those_with_the_highest_loss(folder):
    results = compare(config(folder), quiet=True)
    losses = [load_file(path)["loss"] for path in (folder / "out" / "runs").glob("*/predictions.safetensors")]
    order = torch.stack(losses).double().mean(0).argsort(descending=True)
    hardest = results["datasets"][0]["hardest"]
    assert [h["index"] for h in hardest] == order[:12].tolist()
    labels = load(str(folder / "data")).test_labels
    assert [h["label"] for h in hardest] == [str(int(labels[h["index"]])) for h in hardest]


def test_an_interrupted_comparison_keeps_its_runs(folder, monkeypatch):
    def run_all(jobs, data, progress, workers=None):
        training.train(jobs[0].config, data[jobs[0].config.data.source], jobs[0].folder)
        yield 0
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "run_all", run_all)
    with pytest.raises(KeyboardInterrupt):
        compare(config(folder), quiet=True)
    results = json.loads((folder / "out" / "results.json").read_text())
    assert [c["name"] for c in results["candidates"]] == ["C-C-T-T"] and results["runs"] == {
        "finished": 1,
        "planned": 4,
    }
    assert results["verdicts"][0]["winner"] is None
    assert results["verdicts"][0]["sentence"].startswith("Runs are missing. So far: ")
    assert "Not complete" in (folder / "out" / "report.html").read_text()


def test_every_image_is_tested_once_in_cross_validation(folder, in_process):
    results = compare(config(folder, folds=3, seeds=(2,)), quiet=True)
    assert len(in_process) == 2 * 2 * 3
    assert len(results["candidates"]) == 2
    for candidate in results["candidates"]:
        assert np.sum(candidate["confusion"]) == 2 * (48 + 18)
        assert [sum(true) for true in candidate["confusion"]] == [44, 44, 44]
        assert len(candidate["test_accuracy"]["per_seed"]) == 2
    assert (results["data"]["train_images"], results["data"]["test_images"]) == (44, 66)


def test_ablations(folder):
    results = compare(config(folder, ablate=("skip", "mlp"), layouts=("C-C-C-C", "C-C-T-T")), quiet=True)
    shown = [(c["name"], c["without"]) for c in results["candidates"]]
    assert shown == [
        *[("C-C-C-C", None), ("C-C-C-C", "skip")],  # MBConv has no MLP of its own
        *[("C-C-T-T", None), ("C-C-T-T", "skip"), ("C-C-T-T", "mlp")],
    ]
    assert row(results, "C-C-T-T", without="mlp")["params"] < row(results, "C-C-T-T")["params"]
    assert [len(v["pairs"]) for v in results["verdicts"]] == [1]  # ablations do not compete
    for ablation in results["ablations"]:
        means = [
            row(results, ablation["name"], without=without)["test_accuracy"]["mean"]
            for without in (ablation["without"], None)
        ]
        difference = ablation["difference"]
        assert difference["mean"] == pytest.approx(means[0] - means[1])
        assert difference["low"] <= difference["mean"] <= difference["high"]
    with pytest.raises(ValueError, match="--ablate: mlp changes nothing in any of the networks"):
        compare(config(folder, ablate=("mlp",), layouts=("C-C-C-C",)), quiet=True)


def test_one_seed_and_one_candidate_have_no_interval(folder):
    for options in ({"seeds": (1,)}, {"layouts": ("C-C-T-T",)}):
        results = compare(config(folder, **options), quiet=True)
        accuracy = results["candidates"][0]["test_accuracy"]
        assert accuracy["low"] is None and accuracy["high"] is None and results["verdicts"][0]["winner"] is None


# planted by scripts/mutate
FAULTS = {
    "summary.py": (
        (
            "confusions are counted the other way round",
            "(outcome.labels, outcome.predicted), 1",
            "(outcome.predicted, outcome.labels), 1",
        ),
        ("the easiest images are shown as the hardest", "np.argsort(-losses", "np.argsort(losses"),
        (
            "an ablation's change has the wrong sign",
            "sign = 1 if pair.index == 1 else -1",
            "sign = -1 if pair.index == 1 else 1",
        ),
        ("the gap is training less test", "run.test_loss - run.train_loss", "run.train_loss - run.test_loss"),
        (
            "images are counted as without folds",
            "            **_counts(images, folds),\n",
            "            **_counts(images, 0),\n",
        ),
        ("a study that is not complete names a winner", "is None or incomplete else names", "is None else names"),
    ),
    "compare.py": (("only the first fold is counted", "for run in runs if (result", "for run in runs[:1] if (result"),),
}
