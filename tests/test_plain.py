"""Configurations survive YAML and JSON, and what is wrong in one is said by name."""

import dataclasses
import json
from pathlib import Path

import pytest
import yaml

from glocal.config import CompareConfig, DataConfig, ModelConfig, RunConfig, TrainConfig
from glocal.plain import from_plain, to_plain

FULL = RunConfig(
    DataConfig("a/folder", fraction=0.2, folds=5, fold=4, validation=True, in_chans=3, img_size=(20, 30)),
    ModelConfig("C-T", dims=(32, 64), depths=(1, 2), mlp_ratio=2.5, drop_path=0.1, layer_scale=1e-6, skip=False),
    TrainConfig(epochs=7, lr=1e-05, mixup=0.2, flip=True, class_balanced=True, ema=0.999, precision="bf16"),
    seed=3,
    weights="some.safetensors",
)


def of_yaml(text):
    return from_plain(RunConfig, yaml.safe_load(text))


@pytest.mark.parametrize("config", [RunConfig(), FULL, RunConfig(model=ModelConfig(model="timm:resnet10t"))])
@pytest.mark.parametrize("through", [lambda p: yaml.safe_load(yaml.safe_dump(p)), lambda p: json.loads(json.dumps(p))])
def test_nothing_is_lost_on_the_way_through_a_file(config, through):
    assert from_plain(RunConfig, through(to_plain(config))) == config


def test_plain_form_holds_only_what_yaml_and_json_know():
    plain = to_plain(CompareConfig(data=("a", "b"), widths=(0.5, 1.0), out=Path("x/y")))
    assert plain["data"] == ["a", "b"] and plain["out"] == "x/y" and plain["tune"] is None
    assert from_plain(CompareConfig, plain).out == Path("x/y")

    @dataclasses.dataclass
    class Nested:
        pairs: tuple[tuple[Path, ...], ...] = ((Path("a"),),)

    assert to_plain(Nested()) == {"pairs": [["a"]]}


def test_what_is_not_given_keeps_its_default():
    assert of_yaml("train: {epochs: 9}") == RunConfig(train=TrainConfig(epochs=9))
    assert of_yaml("{}") == RunConfig()


@pytest.mark.parametrize(
    ("written", "lr"),
    [
        ("1e-3", 1e-3),
        ("2E2", 200),
        ("1.5e-4", 1.5e-4),
        (".5", 0.5),
        ("3", 3),
        ("+1e-3", 1e-3),
        ("1.e-2", 0.01),
    ],
)
def test_numbers_that_yaml_reads_as_text_are_numbers(written, lr):
    found = of_yaml(f"train: {{lr: {written}}}").train.lr
    assert found == lr and type(found) is float


def test_no_is_no():
    # YAML 1.1 reads an unquoted no as false
    assert of_yaml("train: {precision: no}").train.precision == "no"
    assert of_yaml("train: {flip: no}").train.flip is False


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the file: must hold names with values, such as 'seed: 0'"),
        ("- a", "the file: must hold names with values, such as 'seed: 0'"),
        ("train:", "train: must hold names with values, such as 'seed: 0'"),
        ("train: [1]", "train: must hold names with values, such as 'seed: 0'"),
        ("sed: 1", "sed: unknown; did you mean 'seed'?"),
        ("train: {epoch: 1}", "train.epoch: unknown; did you mean 'train.epochs'?"),
        ("lr: 1", "lr: unknown; did you mean 'train.lr'?"),
        ("1: 2", "1: unknown; valid are data, model, train, seed, weights, new_head"),
        ("seed: 1.0", "seed: 1.0 must be a whole number"),
        ("seed: true", "seed: True must be a whole number"),
        ("seed: '1'", "seed: '1' must be a whole number"),
        ("seed: 1e1", "seed: '1e1' must be a whole number"),
        ("seed: -1", "seed: -1; it must be 0 or more and below 2**63"),
        ("seed: 99999999999999999999", "seed: 99999999999999999999; it must be 0 or more and below 2**63"),
        ("weights: 1", "weights: 1 must be text; put it in quotes"),
        ("data: {source: 123}", "data.source: 123 must be text; put it in quotes"),
        ("data: {img_size: 32}", "data.img_size: 32 must be a list of 2"),
        ("data: {img_size: [1, 2, 3]}", "data.img_size: [1, 2, 3] must be a list of 2"),
        ("data: {img_size: [1, null]}", "data.img_size: None must be a whole number"),
        ("data: {img_size: [0, 8]}", "data.img_size: (0, 8); it must be two whole numbers, 1 or more"),
        ("data: {in_chans: 4}", "data.in_chans: 4; it must be 1 (grey) or 3 (colour)"),
        ("data: {fraction: 0}", "data.fraction: 0.0; it must be above 0 and at most 1"),
        ("data: {folds: 1}", "data.folds: 1; it must be at least 2, or 0 for one split"),
        ("data: {folds: 3, fold: 3}", "data.fold: 3; it must be 0 or more and below the number of folds"),
        ("model: {dims: [32, x]}", "model.dims: 'x' must be a whole number"),
        ("model: {dims: []}", "model.dims: (); it must be 1 or more each"),
        ("model: {depths: [1, 0]}", "model.depths: (1, 0); it must be 1 or more each"),
        ("model: {drop_path: 1}", "model.drop_path: 1.0; it must be 0 or more and below 1"),
        ("model: {mlp_ratio: .nan}", "model.mlp_ratio: nan; it must be above 0"),
        ("model: {layout: null}", "model.layout: None must be text; put it in quotes"),
        (
            "model: {model: 'timm:resnet10t', dims: [8]}",
            "model.dims: 'timm:resnet10t' is a whole network, which has none; leave it out",
        ),
        ("train: {flip: 1}", "train.flip: 1 must be true or false"),
        ("train: {lr: true}", "train.lr: True must be a number"),
        ("train: {lr: null}", "train.lr: None must be a number"),
        ("train: {lr: fast}", "train.lr: 'fast' must be a number"),
        ("train: {lr: .nan}", "train.lr: nan; it must be above 0"),
        ("train: {lr: .inf}", "train.lr: inf; it must be above 0"),
        ("train: {lr: 0}", "train.lr: 0.0; it must be above 0"),
        (f"train: {{lr: 1{'0' * 400}}}", f"train.lr: 1{'0' * 400} must be a number"),
        ("train: {epochs: 0}", "train.epochs: 0; it must be at least 1"),
        ("train: {batch_size: 0}", "train.batch_size: 0; it must be at least 1"),
        ("train: {mixup: -1}", "train.mixup: -1.0; it must be 0 or more"),
        ("train: {warmup: 1.1}", "train.warmup: 1.1; it must be from 0 to 1"),
        ("train: {label_smoothing: 1}", "train.label_smoothing: 1.0; it must be 0 or more and below 1"),
        ("train: {ema: 1}", "train.ema: 1.0; it must be 0 or more and below 1"),
        ("train: {precision: bf32}", "train.precision: 'bf32'; valid are no, bf16, fp16"),
        ("train: {precision: [bf16]}", "train.precision: ['bf16']; valid are no, bf16, fp16"),
    ],
)
def test_what_is_wrong_is_said_by_name(text, message):
    with pytest.raises(ValueError) as error:
        of_yaml(text)
    assert str(error.value) == message


# planted by scripts/mutate
FAULTS = {
    "plain.py": (
        (
            "1e-3 in a file is text",
            "if hint is float and isinstance(value, str) and _NUMBER.fullmatch(value):",
            "if False:",
        ),
        ("precision: no in a file is false", 'if value is False and "no" in inner:', "if False:"),
        ("true counts as the number 1", "type(value) in (int, float)", "isinstance(value, (int, float))"),
    ),
    "config.py": (
        ("a learning rate that is no number is taken", "lambda value: 0 < value < math.inf", "lambda value: True"),
    ),
}
