"""Comparisons: what is planned, kept, repeated, chosen and said."""

import dataclasses
import json
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from glocal import compare as comparison
from glocal import training
from glocal.checkpoint import alone_in
from glocal.compare import Study, check, compare, prepare_folder
from glocal.config import CompareConfig
from glocal.data import ImageData, load
from glocal.plan import recipe
from glocal.runs import images_of


def write_digits(folder, train=48, test=18, side=8, seed=0):
    """A small MNIST-like set of three classes, told apart by their brightness."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for split, count in (("train", train), ("t10k", test)):
        labels = (np.arange(count) % 3).astype(np.uint8)
        images = (rng.integers(0, 150, (count, side, side)) + 40 * labels[:, None, None]).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / f"{split}-{kind}-ubyte").write_bytes(header + array.tobytes())


def write_colours(folder, count=6, side=10):
    """Class folders of coloured images."""
    rng = np.random.default_rng(1)
    for name, colour in (("red", 0), ("blue", 2)):
        (folder / name).mkdir(parents=True)
        for i in range(count):
            pixels = rng.integers(0, 100, (side, side, 3)).astype(np.uint8)
            pixels[..., colour] += 100
            Image.fromarray(pixels).save(folder / name / f"{i}.png")


LAYOUTS = ("C-C-T-T", "T-T-T-T")


@pytest.fixture
def folder(tmp_path):
    write_digits(tmp_path / "data")
    return tmp_path


def config(folder, **options):
    settings = {"data": (str(folder / "data"),), "layouts": LAYOUTS, "seeds": (2,), "epochs": 1, "out": folder / "out"}
    return CompareConfig(**(settings | options))


@pytest.fixture(autouse=True)
def in_process(monkeypatch):
    """Runs without worker processes and in small networks; gives the labels of what was trained."""
    trained = []

    def run_all(jobs, data, progress, workers=None):
        for i, job in jobs.items():
            trained.append(job.label)
            training.train(job.config, data[job.config.data.source], job.folder)
            yield i

    monkeypatch.setattr(comparison, "run_all", run_all)
    monkeypatch.setattr("glocal.candidates._BASE_DIMS", (32, 32, 32, 32))
    return trained


def row(results, name, **where):
    [found] = [
        c
        for c in results["candidates"]
        if c["name"] == name and all(c[key] == value for key, value in ({"without": None} | where).items())
    ]
    return found


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


def test_finished_runs_are_not_repeated(folder, in_process):
    def trained():
        found = list(in_process)
        in_process.clear()
        return found

    first = compare(config(folder, seeds=(1,)), quiet=True)
    assert len(trained()) == 2
    assert compare(config(folder, seeds=(1,)), quiet=True) == first and not trained()
    compare(config(folder, layouts=(*LAYOUTS, "C-C-C-C"), seeds=(1,)), quiet=True)
    assert [label.partition(",")[0] for label in trained()] == ["C-C-C-C"]  # a layout more
    more = compare(config(folder), quiet=True)
    assert [label[-6:] for label in trained()] == ["seed 1", "seed 1"]  # a seed more
    assert more["candidates"][0]["curves"][0] == first["candidates"][0]["curves"][0]
    compare(config(folder, epochs=2, seeds=(1,)), quiet=True)
    assert len(trained()) == 2  # another recipe
    damaged = next((folder / "out" / "runs").glob("*/result.json"))
    damaged.write_text('{"epochs": [')
    compare(config(folder), quiet=True)
    compare(config(folder, epochs=2, seeds=(1,)), quiet=True)
    compare(config(folder, layouts=("C-C-C-C",), seeds=(1,)), quiet=True)
    assert len(trained()) == 1  # a damaged file is trained again


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


def test_an_old_report_stays_until_there_is_a_new_one(folder, monkeypatch):
    compare(config(folder), quiet=True)
    before = {path.name: path.read_bytes() for path in (folder / "out").iterdir() if path.name.startswith("re")}
    assert len(before) == 4

    def run_all(jobs, data, progress, workers=None):
        raise KeyboardInterrupt
        yield

    monkeypatch.setattr(comparison, "run_all", run_all)
    with pytest.raises(KeyboardInterrupt):
        compare(config(folder, epochs=3), quiet=True)
    assert {name: (folder / "out" / name).read_bytes() for name in before} == before


def test_a_users_own_results_are_not_overwritten(folder, in_process):
    (folder / "out").mkdir()
    (folder / "out" / "results.csv").write_text("mine")
    with pytest.raises(ValueError, match=r"results\.csv' would be overwritten; name another folder"):
        compare(config(folder), quiet=True)
    assert [path.name for path in (folder / "out").iterdir()] == ["results.csv"] and not in_process


def folders(study):
    return [study.folder(run) for phase in study.plan.phases for run in phase]


def test_what_a_runs_name_covers(folder, monkeypatch):
    source = str(folder / "data")
    data = load(source)
    study = Study(config(folder), {source: data})
    names = folders(study)
    assert len(set(names)) == 4 and names == folders(Study(config(folder), {source: data}))
    moved = Study(config(folder, data=("elsewhere",)), {"elsewhere": data})
    assert folders(moved) == names  # the images count, not where they lie
    other = dataclasses.replace(data, train_images=data.train_images.clone().index_fill_(0, torch.tensor([3]), 7))
    assert not set(folders(Study(config(folder), {source: other}))) & set(names)
    assert not set(folders(Study(config(folder, data_fractions=(0.5,)), {source: data}))) & set(names)
    models = config(folder, layouts=("C-C-T-T",), models=("timm:resnet10t",))
    before = folders(Study(models, {source: data}))
    version = comparison.metadata.version
    with monkeypatch.context() as patch:  # timm counts for its own networks, torchvision for all
        patch.setattr(comparison.metadata, "version", lambda name: "9.9" if name == "timm" else version(name))
        after = folders(Study(models, {source: data}))
        assert [one == other for one, other in zip(before, after, strict=True)] == [True, False] * 2
    with monkeypatch.context() as patch:
        patch.setattr(comparison.metadata, "version", lambda name: "9.9" if name == "torchvision" else version(name))
        assert not set(folders(Study(config(folder), {source: data}))) & set(names)
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert not set(folders(Study(config(folder), {source: data}))) & set(names)


def test_two_comparisons_do_not_share_a_folder(folder, in_process, monkeypatch):
    (folder / "out").mkdir()
    monkeypatch.setattr("glocal.checkpoint._PATIENCE", 0.2)
    with alone_in(folder / "out"), pytest.raises(ValueError, match="out: another process is at work there; wait for"):
        compare(config(folder), quiet=True)
    assert in_process == []
    compare(config(folder), quiet=True)
    assert len(in_process) == 4


def test_a_run_whose_configuration_was_changed_by_hand(folder):
    compare(config(folder), quiet=True)
    path = next((folder / "out" / "runs").iterdir())
    text = (path / "config.yaml").read_text()
    (path / "config.yaml").write_text(text.replace("epochs: 1", "epochs: 2"))
    with pytest.raises(ValueError, match=rf"{path.name}: its config\.yaml was changed since; remove that folder"):
        compare(config(folder), quiet=True)


OPERATOR = """
import torch
from torch import nn

class Mean(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        return self.proj(x.mean((1, 2), keepdim=True).expand_as(x))

class Tiny(nn.Module):
    def __init__(self, in_chans, num_classes, width=4):
        super().__init__()
        self.conv = nn.Conv2d(in_chans, width, 3)
        self.fc = nn.Linear(width, num_classes)

    def forward(self, x):
        return self.fc(self.conv(x).mean((2, 3)))
"""


def test_operators_and_models_of_others_stand_beside_ours(folder):
    (folder / "my-ops").mkdir()
    file = folder / "my-ops" / "own.py"
    file.write_text(OPERATOR)
    asked = config(
        folder,
        layouts=("C-C-T-T",),
        mixers=(f"{file}:Mean", "WindowAttention(window_size=2)"),
        models=(f"{file}:Tiny(width=8)", "timm:resnet10t"),
        seeds=(2,),
    )
    results = compare(asked, quiet=True)
    names = [c["name"] for c in results["candidates"]]
    assert names == [
        "C-C-T-T",
        f"{file}:Mean in C-C-T-T",
        "WindowAttention(window_size=2) in C-C-T-T",
        f"{file}:Tiny(width=8)",
        "timm:resnet10t",
    ]
    assert [c["resized"] for c in results["candidates"]] == [True, True, True, False, False]
    tiny = row(results, f"{file}:Tiny(width=8)")
    assert tiny["params"] == 9 * 8 + 8 + 8 * 3 + 3 and tiny["macs"] == 6 * 6 * 8 * 9 + 8 * 3
    assert not results["verdicts"][0]["equal_budget"]
    assert "differ in size" in results["verdicts"][0]["sentence"]

    study = Study(asked, {asked.data[0]: load(asked.data[0])})
    before = folders(study)
    file.write_text(OPERATOR.replace("mean((1, 2)", "amax((1, 2)"))
    after = folders(Study(asked, {asked.data[0]: load(asked.data[0])}))
    changed = [one != other for one, other in zip(before, after, strict=True)]
    assert changed == [False, True, False, True, False] * 2  # those of the file that changed


def test_shares_of_the_images_and_widths(folder):
    results = compare(
        config(folder, data_fractions=(0.25, 1.0), widths=(1.0, 2.0), seeds=(1,), layouts=("C-C-T-T",)), quiet=True
    )
    shown = {(c["fraction"], c["width"]): c for c in results["candidates"]}
    assert set(shown) == {(0.25, 1.0), (0.25, 2.0), (1.0, 1.0), (1.0, 2.0)}
    assert shown[1.0, 2.0]["macs"] > 3 * shown[1.0, 1.0]["macs"]
    assert [len(shown[f, 1.0]["curves"][0]["test_accuracy"]) for f in (0.25, 1.0)] == [2, 1]  # 1 / sqrt(f) epochs
    targets = {(v["fraction"], v["width"]): v["target"] for v in results["verdicts"]}
    assert targets.keys() == shown.keys()
    for condition, candidate in shown.items():
        assert candidate["macs"] == pytest.approx(targets[condition], rel=0.02)


def test_every_share_of_the_images_has_its_seeds(folder):
    asked = config(folder, data_fractions=(1.0, 0.25), seeds=(1, 3), layouts=("C-C-T-T",))
    shown = {c["fraction"]: c["seeds"] for c in compare(asked, quiet=True)["candidates"]}
    assert shown == {0.25: [0, 1, 2], 1.0: [0]}


def test_a_repeated_comparison_counts_nothing_again(folder, monkeypatch):
    first = compare(config(folder), quiet=True)
    monkeypatch.setattr("glocal.candidates.cost.macs", None)
    assert compare(config(folder), quiet=True) == first


def test_every_image_is_tested_once_in_cross_validation(folder, in_process):
    results = compare(config(folder, folds=3, seeds=(2,)), quiet=True)
    assert len(in_process) == 2 * 2 * 3
    for candidate in results["candidates"]:
        assert np.sum(candidate["confusion"]) == 2 * (48 + 18)
        assert [sum(true) for true in candidate["confusion"]] == [44, 44, 44]
        assert len(candidate["test_accuracy"]["per_seed"]) == 2
    assert (results["data"]["train_images"], results["data"]["test_images"]) == (44, 66)


def test_the_learning_rate_is_chosen_on_validation_images(folder, in_process, monkeypatch):
    tried = []
    original = training.train

    def train(run, data, out=None, **rest):
        if run.data.validation:
            tried.append(run.train.lr)
            # another rate is the best for each layout, whatever the test says
            assert len(images_of(run, data).test_labels) in range(3, 9)
        return original(run, data, out, **rest)

    monkeypatch.setattr(training, "train", train)
    results = compare(config(folder, tune="lr", epochs=3), quiet=True)
    rates = (2e-3 / 3, 2e-3, 6e-3)
    assert sorted(tried) == pytest.approx(sorted(rates * 2))
    assert len(in_process) == 2 * 3 + 2 * 2 and all("trying" in label for label in in_process[:6])
    runs = {}
    for path in (folder / "out" / "runs").iterdir():
        text = (path / "config.yaml").read_text()
        if "validation: true" in text:
            layout = re.search(r"layout: (\S+)", text)[1]
            rate = float(re.search(r"\n  lr: (\S+)", text)[1])
            last = json.loads((path / "result.json").read_text())["epochs"][-1]["test_accuracy"]
            runs.setdefault(layout, []).append((last, -abs(np.log(rate / 2e-3)), rate))
    for candidate in results["candidates"]:
        assert candidate["lr"] == pytest.approx(max(runs[candidate["name"]])[-1])


def test_tuning_looks_at_nothing_that_was_not_tuned(folder, in_process):
    compare(config(folder), quiet=True)
    in_process.clear()
    results = compare(config(folder, tune="lr", epochs=1), quiet=True)
    again = compare(config(folder, tune="lr", epochs=1, out=folder / "new"), quiet=True)
    for one, other in zip(results["candidates"], again["candidates"], strict=True):
        assert one["lr"] == other["lr"] and one["test_accuracy"] == other["test_accuracy"]
        assert one["fit"] == other["fit"] and one["curves"] == other["curves"]


@pytest.mark.parametrize("limit, chosen", [(2.1e-3, 2.1e-3), (0.0, 2e-3)])  # with 0 all diverge: the recipe's own
def test_a_rate_that_diverges_is_not_chosen(folder, monkeypatch, limit, chosen):
    original = training.train

    def train(run, data, out=None, **rest):
        if run.data.validation and run.train.lr > limit:
            raise training.NotFinite("the loss is nan")
        return original(run, data, out, **rest)

    def run_all(jobs, data, progress, workers=None):
        for i, job in jobs.items():
            try:
                train(job.config, data[job.config.data.source], job.folder)
            except training.NotFinite:
                assert job.may_diverge
            yield i

    monkeypatch.setattr(comparison, "run_all", run_all)
    results = compare(config(folder, tune="lr"), quiet=True)
    assert [len(c["seeds"]) for c in results["candidates"]] == [2, 2]
    assert all(c["lr"] <= chosen and (limit or c["lr"] == chosen) for c in results["candidates"])


def test_the_same_run_under_two_names_is_done_once(folder, in_process):
    compare(config(folder, widths=(1.0, 2.0), models=("timm:resnet10t",), seeds=(1,), layouts=("C-C-T-T",)), quiet=True)
    assert sum("resnet10t" in label for label in in_process) == 1
    write_digits(folder / "copy")
    with pytest.raises(ValueError, match="hold the same images; name one of them"):
        compare(config(folder, data=(str(folder / "data"), str(folder / "copy"))), quiet=True)


def test_networks_go_on_to_other_data(folder, in_process):
    write_colours(folder / "colours")
    asked = config(folder, then=str(folder / "colours"), seeds=(1,))
    results = compare(asked, quiet=True)
    assert [c["after"] for c in results["candidates"]] == [None, None, asked.data[0], asked.data[0]]
    second = row(results, "C-C-T-T", after=asked.data[0])
    assert second["data"] == str(folder / "colours") and np.sum(second["confusion"]) == 2
    study = Study(asked, {source: load(source) for source in (*asked.data, asked.then)})
    first, then = study.plan.phases
    config_of_second = study.config_of(then[0])
    assert config_of_second.weights == str(study.folder(first[0]) / "weights.safetensors")
    assert study.config_of(first[0]).data.in_chans == 3  # grey is repeated, so that colour can follow
    assert config_of_second.data.img_size == (8, 8) and config_of_second.data.in_chans is None
    weights = load_file(study.folder(then[0]) / "weights.safetensors")
    assert weights["stem.conv1.weight"].shape[1] == 3 and weights["head.fc.weight"].shape[0] == 2
    assert [v["after"] for v in results["verdicts"]] == [None, asked.data[0]]
    assert results["verdicts"][1]["target"] is None  # they were sized for the first data
    before = len(in_process)
    compare(asked, quiet=True)
    assert len(in_process) == before
    assert "colours" in (folder / "out" / "report.html").read_text()


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


def test_the_budget_may_be_parameters(folder):
    results = compare(config(folder, budget="params", layouts=("C-C-C-C", "T-T-T-T"), seeds=(1,)), quiet=True)
    target = results["budget"]["targets"][str(folder / "data")]
    assert all(abs(c["params"] / target - 1) < 0.02 for c in results["candidates"])
    assert results["budget"]["of"] == "params"


def test_one_seed_and_one_candidate_have_no_interval(folder):
    for options in ({"seeds": (1,)}, {"layouts": ("C-C-T-T",)}):
        results = compare(config(folder, **options), quiet=True)
        accuracy = results["candidates"][0]["test_accuracy"]
        assert accuracy["low"] is None and accuracy["high"] is None and results["verdicts"][0]["winner"] is None


def test_the_recipe_follows_the_kind_of_data():
    def data(kind):
        images = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
        return ImageData(
            "recall" if kind == "probe" else "x", images, torch.arange(2), images, torch.arange(2), ("a", "b"), kind
        )

    probe, idx, folder, digits = (recipe(data(kind), None) for kind in ("probe", "idx", "folder", "digits"))
    assert (probe.crop_padding, probe.flip) == (0, False) == (digits.crop_padding, digits.flip)
    assert (idx.flip, folder.flip) == (False, True) and idx.crop_padding == folder.crop_padding > 0
    assert idx.epochs == folder.epochs == 6 and recipe(data("idx"), 7).epochs == 7
    assert recipe(data("idx"), 4, 0.25).epochs == 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": (0,)}, "--seeds: 0; it must be at least 1"),
        ({"seeds": (-3,)}, "--seeds: -3; it must be at least 1"),
        ({"seeds": (3, 1)}, "--seeds: 2 numbers for 1 data fractions; give one for all, or one for each"),
        ({"epochs": 0}, "--epochs: 0; it must be at least 1"),
        ({"folds": 1}, "--folds: 1; it must be at least 2, or 0"),
        ({"folds": -2}, "--folds: -2; it must be at least 2, or 0"),
        ({"folds": 3, "tune": "lr"}, "--tune: validation images of one fold are test images of the others"),
        ({"widths": (float("inf"),)}, "--widths: inf; it must be above 0"),
        ({"folds": 40}, "fold"),  # more than a class has images
        ({"data_fractions": (0.5, 0)}, "--data-fractions: 0; it must be above 0 and at most 1"),
        ({"data_fractions": (1.5,)}, "--data-fractions: 1.5; it must be above 0 and at most 1"),
        ({"data_fractions": ()}, "--data-fractions: none given"),
        ({"widths": (-1.0,)}, "--widths: -1; it must be above 0"),
        ({"widths": (0.9,)}, r"--widths: 0.9 and 1 both give stages of \(32, 32, 32, 32\) channels"),
        ({"widths": (3.0, 2.9)}, r"--widths: 2.9 and 3 both give stages of \(96, 96, 96, 96\) channels"),
        ({"data": ()}, "--data: none given"),
        ({"layouts": ("C-T", "T", "C-T")}, "--layouts: 'C-T' is named twice; name it once"),
        ({"layouts": ("C-T", "C-Q")}, "unknown letter 'Q'"),
        ({"layouts": ("C-DepthwiseConv(rank=1)",)}, "rank"),  # found by running it once
        ({"models": ("timm:resnet10x",)}, "timm has no such model; did you mean 'timm:resnet10t'"),
        ({"models": ("nothing.py:Net",)}, "no file 'nothing.py'"),
        ({"mixers": ("WindowAtention",)}, "did you mean 'WindowAttention'"),
        ({"data": ("nowhere",)}, "neither a probe"),
        ({"data": (".",), "out": Path("out")}, "--out: 'out' lies inside the data folder; name one elsewhere"),
    ],
)
def test_mistakes_stop_before_training(folder, in_process, options, message):
    with pytest.raises(ValueError, match=message):
        compare(config(folder, **options), quiet=True)
    assert in_process == [] and not (folder / "out").exists()


def test_folders_that_cannot_be_written_to(tmp_path):
    (tmp_path / "file").write_text("mine")
    for out in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"--out: '.*file' is a file; name a folder"):
            check(CompareConfig(out=out))
    with pytest.raises(ValueError, match="--out: cannot write to '/proc/x'"):
        prepare_folder(tmp_path.__class__("/proc/x"))
    (tmp_path / "results.json").write_text('{"of": "another program"}')
    with pytest.raises(ValueError, match=r"results\.json' is not a result of glocal compare; name another folder"):
        prepare_folder(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("seed: 0")
    with pytest.raises(ValueError, match="holds a run of glocal train; name another folder"):
        prepare_folder(tmp_path / "run")


# planted by scripts/mutate
FAULTS = {
    "compare.py": (
        (
            "images do not count in a run's name",
            "        key.update(self.identities[run.cell.condition.data].encode())\n",
            "",
        ),
        (
            "a user's file does not count in a run's name",
            "key.update(Path(found[1]).expanduser().read_bytes())",
            "pass",
        ),
        ("timm's version does not count in a run's name", 'key.update(_version("timm").encode())', "pass"),
        ("the worst learning rate is chosen", "max(scores)[-1] for cell", "min(scores)[-1] for cell"),
        ("a finished run is done again", "if self.result(run) is None:", "if True:"),
        ("only the first fold is counted", "for run in runs if (result", "for run in runs[:1] if (result"),
        ("two comparisons write into one folder", "    with alone_in(config.out):\n", "    if True:\n"),
        ("an old report is replaced by an empty one", 'if done or not (out / "results.json").exists():', "if True:"),
        (
            "a damaged results.json of another program is overwritten",
            "if existing.exists() and not isinstance",
            "if False and not isinstance",
        ),
    ),
    "plan.py": (
        ("few images have fewer epochs", "more = 1 / math.sqrt(fraction)", "more = math.sqrt(fraction)"),
        ("every share has as many seeds as the largest", "                    if seed < cell.seeds\n", ""),
        ("after other data a network starts anew", "            parent=cell,\n", "            parent=None,\n"),
        ("folders of characters are mirrored", 'flip=data.kind == "folder"', "flip=True"),
        ("two widths may be one network", "if made.setdefault(dims, width) != width:", "if False:"),
        ("transfer claims a budget", "            target=None,\n", "            target=cell.target,\n"),
    ),
    "candidates.py": (
        (
            "a model of others counts as resized",
            "ModelConfig(model=entry.model), data, resized=False",
            "ModelConfig(model=entry.model), data, resized=True",
        ),
        ("widths change nothing", "dim * width / 32", "dim / 32"),
        ("networks are counted again at every start", "        if key not in self._known:\n", "        if True:\n"),
        (
            "what a user's file costs is remembered",
            'for key, value in self._known.items() if ".py" not in key',
            "for key, value in self._known.items()",
        ),
    ),
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
        ("a network of others is within the budget", "equal = all(row.resized for row in rows)", "equal = True"),
        ("the gap is training less test", "run.test_loss - run.train_loss", "run.train_loss - run.test_loss"),
        (
            "images are counted as without folds",
            "            **_counts(images, folds),\n",
            "            **_counts(images, 0),\n",
        ),
        ("a study that is not complete names a winner", "is None or incomplete else names", "is None else names"),
    ),
}
