"""Recipes: each is one file that says its command, its time and what to expect, and trains."""

import ast
import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest
import torch
import yaml

from glocal.cli import main
from glocal.cli.commands import TrainCommand
from glocal.cli.parsing import parse
from glocal.compare import Study
from glocal.config import CompareConfig
from glocal.data import ImageData
from glocal.tasks.classification import build_model

from .small_study import write_digits

FOLDER = Path(__file__).parents[1] / "recipes"
RECIPES = sorted(FOLDER.glob("*.py"))


def recipe(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.RECIPE


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_says_command_time_and_what_to_expect(path):
    text = ast.get_docstring(ast.parse(path.read_text("utf-8")))
    assert f"\n    python recipes/{path.name} --data " in text and "--out" in text
    assert "\nTime: " in text and "\nExpected: " in text


@pytest.mark.parametrize(
    ("name", "parameters"), [("all_attention_cifar10", 12_086_844), ("resnet18_cifar10", 11_173_962)]
)
def test_the_papers_recipe(name, parameters):
    run = parse(TrainCommand, "glocal train", recipe(FOLDER / f"{name}.py")).run
    train = run.train
    assert (train.optimizer, train.lr, train.weight_decay, train.batch_size) == ("sgd", 0.1, 1e-4, 100)
    assert (train.epochs, train.warmup, train.crop_padding, train.flip) == (300, 0.05, 4, True)
    assert train.label_smoothing == train.max_grad_norm == 0 and run.seed == 42
    model = build_model(run.model, in_chans=3, num_classes=10, img_size=(32, 32))
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "candidates", "runs"), [("layouts_cifar10", 5, 45), ("local_operators_cifar10", 6, 18)]
)
def test_a_recipe_compares_networks_of_equal_cost(name, candidates, runs, tmp_path):
    config = parse(CompareConfig, "glocal compare", recipe(FOLDER / f"{name}.py"))
    config = dataclasses.replace(config, data=("cifar",), out=tmp_path)
    images = torch.zeros(400, 3, 32, 32, dtype=torch.uint8)
    labels = torch.arange(400) % 10
    data = ImageData("cifar", images, labels, images[:100], labels[:100], tuple("abcdefghij"), "folder")
    study = Study(config, {"cifar": data})
    assert sum(len(phase) for phase in study.plan.phases) == runs
    costs = {cell.name: cell.network.macs for cell in study.plan.cells}
    assert len(costs) == candidates and max(costs.values()) <= 1.04 * min(costs.values())


def test_a_recipe_trains_and_resumes(tmp_path):
    write_digits(tmp_path / "data")
    path = FOLDER / "all_attention_fashion_mnist.py"
    more = ["--data", str(tmp_path / "data"), "--out", str(tmp_path / "run"), "--epochs", "2", "--fraction", "1"]
    command = ["train", *recipe(path), *more]
    assert main(command) == 0
    kept = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert kept["train"]["epochs"] == 2 and kept["model"]["model"].startswith("all_attention_quadratic(")
    told = [json.loads(line)["epoch"] for line in (tmp_path / "run" / "heads.jsonl").read_text().splitlines()]
    assert told == [0, 1, 2]
    assert main([*command, "--resume"]) == 0
    assert main(["evaluate", str(tmp_path / "run")]) == 0
    assert main(command) == 2  # a run is there
