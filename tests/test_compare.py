"""Comparisons: what is kept, repeated and chosen, and which folders are taken."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from glocal import compare as comparison
from glocal import training
from glocal.checkpoint import alone_in
from glocal.compare import NOT_IN_RUNS, Study, check, compare, prepare_folder
from glocal.config import CompareConfig
from glocal.data import load
from glocal.runs import images_of

from .small_study import LAYOUTS, config, folders, write_digits

pytestmark = pytest.mark.usefixtures("in_process")


def test_files_that_change_no_run_are_there():
    package = Path(training.__file__).parent
    assert all((package / name).exists() for name in NOT_IN_RUNS)


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
FAULTS = (
    (
        "images do not count in a run's name",
        "        key.update(self.identities[run.cell.condition.data].encode())\n",
        "",
    ),
    ("timm's version does not count in a run's name", 'key.update(_version("timm").encode())', "pass"),
    ("the worst learning rate is chosen", "max(scores)[-1] for cell", "min(scores)[-1] for cell"),
    ("a finished run is done again", "if self.result(run) is None:", "if True:"),
    ("two comparisons write into one folder", "    with alone_in(config.out):\n", "    if True:\n"),
    ("an old report is replaced by an empty one", 'if done or not (out / "results.json").exists():', "if True:"),
    (
        "a damaged results.json of another program is overwritten",
        "if existing.exists() and not isinstance",
        "if False and not isinstance",
    ),
)
