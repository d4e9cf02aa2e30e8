"""Comparisons: what is planned, kept, repeated and written; runs side by side, and how they end."""

import dataclasses
import json
import multiprocessing
import os
import struct
from pathlib import Path

import numpy as np
import pytest
import torch

from glocal import compare as comparison
from glocal import running, training
from glocal.compare import check, compare, plan, prepare_folder, recipe, run_keys
from glocal.config import CompareConfig, RunConfig
from glocal.data import ImageData, load


def write_digits(folder, train=24, test=9, side=8):
    """A small MNIST-like set of three classes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, side, side)).astype(np.uint8)
        labels = (np.arange(count) % 3).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / f"{split}-{kind}-ubyte").write_bytes(header + array.tobytes())


LAYOUTS = ("C-T", "T-T")


@pytest.fixture
def folder(tmp_path):
    write_digits(tmp_path / "data")
    return tmp_path


def config(folder, **options):
    settings = {"data": str(folder / "data"), "layouts": LAYOUTS, "seeds": 2, "epochs": 2, "out": folder / "out"}
    return CompareConfig(**(settings | options))


@pytest.fixture
def in_process(monkeypatch):
    """Runs without worker processes; returns the numbers of the runs that were trained."""
    trained = []

    def run_all(runs, data, progress, workers=None):
        for i, run in runs.items():
            trained.append(i)
            yield i, dataclasses.asdict(training.train(run, data))

    monkeypatch.setattr(comparison, "run_all", run_all)
    return trained


def test_results_are_complete_and_say_the_same_as_training(folder, in_process):
    results = compare(config(folder), quiet=True)
    assert json.loads((folder / "out" / "results.json").read_text()) == results
    assert [c["name"] for c in results["candidates"]] == list(LAYOUTS)
    data = load(str(folder / "data"))
    for candidate in results["candidates"]:
        assert candidate["data"] == str(folder / "data") and candidate["seeds"] == [0, 1]
        accuracy = candidate["test_accuracy"]
        assert accuracy["mean"] == pytest.approx(np.mean(accuracy["per_seed"]))
        runs = [run for run in plan(config(folder), data) if run.model.layout == candidate["name"]]
        for run, last, curve in zip(runs, accuracy["per_seed"], candidate["curves"], strict=True):
            expected = training.train(run, data)
            assert curve["test_accuracy"] == [epoch.test_accuracy for epoch in expected.epochs]
            assert curve["train_loss"] == [epoch.train_loss for epoch in expected.epochs]
            assert last == curve["test_accuracy"][-1] and curve["seed"] == run.seed
            assert candidate["params"] == expected.params
        assert candidate["images_per_second"] > 0 and candidate["seconds_per_epoch"] > 0
    report = (folder / "out" / "report.html").read_text()
    assert "C-T" in report and "Not complete" not in report
    assert not list((folder / "out").rglob("*.tmp"))


def test_finished_runs_are_not_repeated(folder, in_process):
    first = compare(config(folder, seeds=1), quiet=True)
    assert in_process == [0, 1]
    assert compare(config(folder, seeds=1), quiet=True) == first and in_process == [0, 1]
    compare(config(folder, layouts=(*LAYOUTS, "C-C"), seeds=1), quiet=True)
    assert in_process == [0, 1, 2]  # a layout more
    more = compare(config(folder), quiet=True)
    assert in_process == [0, 1, 2, 2, 3]  # a seed more: runs 2 and 3
    assert more["candidates"][0]["curves"][0] == first["candidates"][0]["curves"][0]
    compare(config(folder, epochs=1, seeds=1), quiet=True)
    assert in_process[5:] == [0, 1]  # another recipe
    next(iter((folder / "out" / "runs").iterdir())).write_text('{"config": {}, "resu')
    compare(config(folder), quiet=True)
    compare(config(folder, epochs=1, seeds=1), quiet=True)
    compare(config(folder, layouts=("C-C",), seeds=1), quiet=True)
    assert len(in_process) == 8  # a damaged file is trained again, once


def test_an_interrupted_comparison_keeps_its_runs(folder, monkeypatch):
    def run_all(runs, data, progress, workers=None):
        yield 0, dataclasses.asdict(training.train(runs[0], data))
        raise KeyboardInterrupt

    monkeypatch.setattr(comparison, "run_all", run_all)
    with pytest.raises(KeyboardInterrupt):
        compare(config(folder), quiet=True)
    results = json.loads((folder / "out" / "results.json").read_text())
    assert [c["name"] for c in results["candidates"]] == ["C-T"] and results["runs"] == {"finished": 1, "planned": 4}
    assert "Not complete" in (folder / "out" / "report.html").read_text()


def test_what_a_key_covers(folder, monkeypatch):
    data = load(str(folder / "data"))
    runs = plan(config(folder), data)
    keys = run_keys(runs, data)
    assert len(set(keys)) == 4 and keys == run_keys(runs, data)
    moved = [dataclasses.replace(run, data="elsewhere") for run in runs]
    assert run_keys(moved, data) == keys  # the images count, not where they lie
    other = dataclasses.replace(data, train_images=data.train_images.clone().index_fill_(0, torch.tensor([3]), 7))
    assert not set(run_keys(runs, other)) & set(keys)
    lower = dataclasses.replace(runs[0], train=dataclasses.replace(runs[0].train, lr=1e-3))
    assert run_keys([lower], data)[0] not in keys
    monkeypatch.setattr(torch, "__version__", "9.9")
    assert not set(run_keys(runs, data)) & set(keys)


def test_a_key_covers_the_users_file(folder):
    data = load(str(folder / "data"))
    path = folder / "my-ops" / "shift.py"
    path.parent.mkdir()
    run = RunConfig("d", dataclasses.replace(RunConfig().model, layout=f"C-'{path}:Shift(step=1)'"))
    path.write_text("one = 1")
    one = run_keys([run], data)
    path.write_text("one = 2")
    assert run_keys([run], data) != one


def test_the_recipe_follows_the_kind_of_data():
    def data(kind):
        images = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
        return ImageData("x", images, torch.arange(2), images, torch.arange(2), ("a", "b"), kind)

    probe, idx, folder = (recipe(data(kind), None) for kind in ("probe", "idx", "folder"))
    assert (probe.crop_padding, probe.flip) == (0, False)
    assert (idx.flip, folder.flip) == (False, True) and idx.crop_padding == folder.crop_padding > 0
    assert idx.epochs == folder.epochs == 3 and recipe(data("idx"), 7).epochs == 7


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "--seeds: 0; it must be at least 1"),
        ({"seeds": -3}, "--seeds: -3; it must be at least 1"),
        ({"epochs": 0}, "--epochs: 0; it must be at least 1"),
        ({"layouts": ()}, "--layouts: none given"),
        ({"layouts": ("C-T", "T", "C-T")}, "--layouts: 'C-T' is named twice"),
        ({"layouts": ("C-T", "C-Q")}, "unknown letter 'Q'"),
        ({"layouts": ("C-DepthwiseConv(rank=1)",)}, "rank"),  # found by running it once
        ({"data": "nowhere"}, "neither a probe"),
        ({"data": ".", "out": Path("out")}, "--out: 'out' lies inside the data folder; name one elsewhere"),
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


# Worker processes


class Silent(running.Progress):
    def __init__(self, count, **hooks):
        super().__init__([f"run {i}" for i in range(count)], quiet=True)
        self.hooks = hooks

    def epoch(self, i, epoch):
        self.hooks.get("epoch", lambda: None)()


def test_workers_give_what_one_thread_gives(folder):
    data = load(str(folder / "data"))
    runs = dict(enumerate(plan(config(folder), data)))
    found = dict(running.run_all(runs, data, Silent(4), workers=2))
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for i, run in runs.items():
            expected = training.train(run, data)
            losses = [epoch["train_loss"] for epoch in found[i]["epochs"]]
            assert losses == [epoch.train_loss for epoch in expected.epochs]
    finally:
        torch.set_num_threads(before)
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_is_reported(folder):
    data = load(str(folder / "data"))
    runs = {0: plan(config(folder, epochs=100_000), data)[0]}
    progress = Silent(1, epoch=lambda: multiprocessing.active_children()[0].kill())
    with pytest.raises(
        running.RunFailed, match=r"run 0: the process that trained it ended with code -9; perhaps .* memory"
    ):
        list(running.run_all(runs, data, progress))
    assert not multiprocessing.active_children()


OPERATORS = """
import torch
from torch import nn

class Broken(nn.Module):
    def __init__(self, dim):
        super().__init__()
    def forward(self, x):
        if self.training:
            raise KeyError("in the operator")
        return x

class Infinite(Broken):
    def forward(self, x):
        return x * torch.inf if self.training else x
"""


@pytest.mark.parametrize(
    "operator, message",
    [("Broken", "(?s)seed 0:.*Traceback.*KeyError: 'in the operator'"), ("Infinite", "the loss is nan at step 1 of")],
)
def test_a_run_that_fails_says_why(folder, operator, message):
    data = load(str(folder / "data"))
    (folder / "ops.py").write_text(OPERATORS)
    runs = plan(config(folder, layouts=(f"C-'{folder / 'ops.py'}:{operator}'",)), data)
    with pytest.raises(running.RunFailed, match=message):
        list(running.run_all({0: runs[0]}, data, Silent(1)))


def test_an_interrupted_consumer_ends_the_workers(folder):
    data = load(str(folder / "data"))
    runs = dict(enumerate(plan(config(folder), data)))
    everything = running.run_all(runs, data, Silent(4), workers=1)
    next(everything)
    assert multiprocessing.active_children()
    everything.close()
    assert not multiprocessing.active_children()


# Progress


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(capsys, monkeypatch, terminal):
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    with running.Progress(["C-T seed 0", "T-T seed 0", "T seed 0"], done=[2]) as progress:
        progress.step(0, 1, 4)
        progress.step(1, 2, 4)
        progress.epoch(0, {"test_accuracy": 51.25, "train_loss": 1.5, "seconds": 3.4})
        progress.finish(0, 51.25)
        progress.finish(1, 60.0)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "1 of 3 runs were finished before and are not repeated" in captured.err
    assert "2/3 C-T seed 0: test 51.2 %; about" in captured.err and " left" in captured.err
    assert "3/3 T-T seed 0: test 60.0 %\n" in captured.err
    if not terminal:
        assert "C-T seed 0: epoch in 3 s, test 51.2 %, loss 1.500" in captured.err


@pytest.mark.parametrize(
    "seconds, text", [(4.4, "4 s"), (89, "89 s"), (90, "2 min"), (3599, "60 min"), (7500, "2 h 5 min")]
)
def test_durations(seconds, text):
    assert running._duration(seconds) == text


def test_cores():
    assert 1 <= running._cores() <= os.cpu_count()
