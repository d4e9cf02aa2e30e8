"""A run as it is described and kept: which images it sees, and when its folder is its own."""

import dataclasses

import pytest
import torch

from glocal import training
from glocal.checkpoint import CheckpointError
from glocal.config import DataConfig
from glocal.data.splits import fold, fraction, hold_out
from glocal.runs import identity, images_of

from .small_run import easy, run

pytestmark = pytest.mark.usefixtures("one_thread")


def test_which_images_a_run_sees():
    data = easy()
    assert images_of(run(), data) is data

    def of(**options):
        return images_of(dataclasses.replace(run(), data=DataConfig("easy", **options), seed=3), data)

    def equal(one, other):
        names = ("train_images", "train_labels", "test_images", "test_labels")
        return all(torch.equal(getattr(one, name), getattr(other, name)) for name in names)

    assert equal(of(fraction=0.5), fraction(data, 0.5, 3))
    assert equal(of(folds=4, fold=1), fold(data, 1, 4))
    assert equal(of(validation=True), hold_out(data))
    assert equal(of(fraction=0.5, folds=4, fold=1, validation=True), hold_out(fraction(fold(data, 1, 4), 0.5, 3)))
    assert of(in_chans=3, img_size=(10, 12)).train_images.shape == (64, 3, 10, 12)


def test_what_images_are():
    data = easy()
    name = identity(data)
    assert identity(dataclasses.replace(data, name="elsewhere", train_images=data.train_images.clone())) == name
    others = [
        dataclasses.replace(data, train_images=data.train_images + 1),
        dataclasses.replace(data, train_labels=1 - data.train_labels),
        dataclasses.replace(data, test_labels=1 - data.test_labels),
        dataclasses.replace(data, classes=("left", "right")),
        dataclasses.replace(data, val_images=data.test_images, val_labels=data.test_labels),
    ]
    assert len({name, *map(identity, others)}) == 6


def test_a_finished_run_is_not_repeated(tmp_path, monkeypatch):
    first = training.train(run(), easy(), tmp_path / "run")
    monkeypatch.setattr(training, "build_model", None)
    assert training.train(run(), easy(), tmp_path / "run") == first
    moved = dataclasses.replace(run(), data=DataConfig("elsewhere"))
    assert training.train(moved, easy(), tmp_path / "run") == first  # the images count, not where they lie


@pytest.mark.parametrize("of", ["config", "images"])
def test_a_folder_of_another_run_is_refused(tmp_path, of):
    training.train(run(epochs=1), easy(), tmp_path / "run")
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    config, data = (run(epochs=2), easy()) if of == "config" else (run(epochs=1), easy(test=24))
    said = "train.epochs is 1 there, 2 here" if of == "config" else "images is"
    with pytest.raises(CheckpointError, match=rf"holds another run \({said}"):
        training.train(config, data, tmp_path / "run")
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


# planted by scripts/mutate
FAULTS = (
    (
        "every seed learns from the same share",
        "fraction(data, asked.fraction, config.seed)",
        "fraction(data, asked.fraction, 0)",
    ),
    ("settings are chosen on test images", "return hold_out(data) if asked.validation else data", "return data"),
    (
        "labels do not count for what images are",
        "if isinstance(value, Tensor):",
        "if isinstance(value, Tensor) and value.ndim > 1:",
    ),
    ("the result of another run is taken", "    if different:\n", "    if False:\n"),
    ("folds are not cut", "    if asked.folds:\n", "    if False:\n"),
)
