"""The runs of a comparison: which there are, with which recipe, and which mistakes are refused before them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from glocal.compare import Study, compare
from glocal.config import CompareConfig
from glocal.data import ImageData, load
from glocal.plan import recipe

from .small_study import config, row, write_colours

pytestmark = pytest.mark.usefixtures("in_process")


def test_the_recipe_follows_the_kind_of_data():
    def data(kind):
        images = torch.zeros(2, 1, 28, 28, dtype=torch.uint8)
        return ImageData(
            "recall" if kind == "probe" else "x", images, torch.arange(2), images, torch.arange(2), ("a", "b"), kind
        )

    probe, idx, folder, digits = (recipe(data(kind), CompareConfig()) for kind in ("probe", "idx", "folder", "digits"))
    assert (probe.crop_padding, probe.flip) == (0, False) == (digits.crop_padding, digits.flip)
    assert (idx.flip, folder.flip) == (False, True) and idx.crop_padding == folder.crop_padding > 0
    assert idx.epochs == folder.epochs == 6 and recipe(data("idx"), CompareConfig(epochs=7)).epochs == 7
    assert recipe(data("idx"), CompareConfig(epochs=4), 0.25).epochs == 8
    assert recipe(data("probe"), CompareConfig(precision="bf16")).precision == "bf16"


def test_the_precision_is_that_of_all_runs(folder):
    results = compare(config(folder, precision="bf16", layouts=("C-C-T-T",), seeds=(1,)), quiet=True)
    assert results["recipe"]["precision"] == "bf16"
    [kept] = (folder / "out" / "runs").glob("*/config.yaml")
    assert "precision: bf16" in kept.read_text()


def test_every_share_of_the_images_has_its_seeds(folder):
    asked = config(folder, data_fractions=(1.0, 0.25), seeds=(1, 3), layouts=("C-C-T-T",))
    shown = {c["fraction"]: c["seeds"] for c in compare(asked, quiet=True)["candidates"]}
    assert shown == {0.25: [0, 1, 2], 1.0: [0]}
    assert len(list((folder / "out" / "runs").glob("*/result.json"))) == 4  # and none is trained that is not shown


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


# planted by scripts/mutate
FAULTS = {
    "plan.py": (
        (
            "few images have fewer epochs",
            "config.epochs) / math.sqrt(fraction)",
            "config.epochs) * math.sqrt(fraction)",
        ),
        ("every share has as many seeds as the largest", "                    if seed < cell.seeds\n", ""),
        ("after other data a network starts anew", "            parent=cell,\n", "            parent=None,\n"),
        ("folders of characters are mirrored", '"flip": data.kind == "folder"', '"flip": True'),
        ("the precision is not that of the study", ", precision=config.precision", ""),
        ("two widths may be one network", "if made.setdefault(dims, width) != width:", "if False:"),
        ("transfer claims a budget", "            target=None,\n", "            target=cell.target,\n"),
    ),
    "candidates.py": (("widths change nothing", "dim * width / 32", "dim / 32"),),
}
