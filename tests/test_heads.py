"""Where heads look: centres and precision of a model's quadratic attentions, and what a run tells of them."""

import dataclasses
import json

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import glocal
from glocal import training
from glocal.analysis.heads import quadratic_heads
from glocal.config import ModelConfig

from .small_run import Stop, StopAt, easy, run, weights

pytestmark = pytest.mark.usefixtures("one_thread")

FAULTS = {
    "analysis/heads.py": (
        ("spreads are told for precisions", "module.precision().tolist()", "module.attention_spreads.tolist()"),
        ("names are those of classes", "found[name] = {", "found[type(module).__name__] = {"),
    ),
    ("mixers/_quadratic.py", "test_heads.py"): (
        ("the precision that is told is S^T S", "return spreads @ spreads.mT", "return spreads.mT @ spreads"),
        ("a precision is a spread", "torch.diag_embed(spreads.square())", "torch.diag_embed(spreads)"),
    ),
    "training.py": (
        ("heads of epochs that are done again are told twice", "len(self.epochs) if self.step else -1)", "10**9)"),
        ("heads of finished epochs are forgotten", "len(self.epochs) if self.step else -1)", "-1)"),
        (
            "heads before training are not told",
            "if self.step == 0:\n            self._note",
            "if False:\n            self._note",
        ),
        ("heads are those that are not tested", "quadratic_heads(self._tested())", "quadratic_heads(self._plain())"),
        ("networks without heads have the file", "if self.folder is None or not heads:", "if self.folder is None:"),
        (
            "heads are told after the state is kept",
            "self._note_heads()\n        self._keep()\n",
            "self._keep()\n        self._note_heads()\n",
        ),
    ),
}

MODEL = "all_attention_quadratic(dim=8, num_heads=3, depth=2, mlp_ratio=1)"


def config(model=MODEL, **recipe):
    return dataclasses.replace(run(**{"epochs": 3, **recipe}), model=ModelConfig(model=model))


def lines(folder):
    return [json.loads(line) for line in (folder / "heads.jsonl").read_text().splitlines()]


def test_heads_of_a_model():
    model = nn.ModuleDict(
        {
            "round": glocal.build("QuadraticAttention(num_heads=2)", 4),
            "other": glocal.build("SelfAttention(num_heads=2)", 4),
            "deep": nn.Sequential(
                nn.Linear(4, 4),
                glocal.build("GeneralizedQuadraticAttention(num_heads=2)", 4),
                glocal.build("GeneralizedQuadraticAttention(num_heads=2, axis_aligned=True)", 4),
                glocal.build("GeneralizedQuadraticAttention(num_heads=2, rank=1)", 4),
                glocal.build("QuadraticAttention(num_heads=3, rank=1)", 4),
            ),
        }
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    found = json.loads(json.dumps(quadratic_heads(model)))
    assert list(found) == ["round", "deep.1", "deep.2", "deep.3", "deep.4"]
    for name, heads in found.items():
        mixer = model.get_submodule(name)
        assert_close(torch.tensor(heads["centers"]), mixer.attention_centers.detach())
        # two tokens beside each other: their scores differ by what the precision says of their places
        grid = (4, 5)[: mixer.rank]
        scores = mixer.scores(torch.zeros(1, *grid, 4))["position"][0].detach()
        places = torch.cartesian_prod(*map(torch.arange, grid)).view(-1, mixer.rank).float()
        offset = places[None] - places[:, None]
        distance = offset - torch.tensor(heads["centers"])[:, None, None]
        precision = torch.tensor(heads["precision"])
        assert precision.shape == (mixer.num_heads, mixer.rank, mixer.rank)
        assert_close(scores, -0.5 * torch.einsum("gnmi,gij,gnmj->gnm", distance, precision, distance))


@pytest.mark.parametrize("axis_spreads", [False, True])
def test_heads_of_a_converted_convolution(axis_spreads):
    mixer = glocal.build(f"PaddedQuadraticAttention(kernel_size=3, padding=1, axis_spreads={axis_spreads})", 4)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.normal_()
    heads = json.loads(json.dumps(quadratic_heads(nn.Sequential(mixer))))["0"]
    scores = mixer.scores(torch.zeros(1, 4, 5, 4))["position"][0].detach()
    queries = torch.cartesian_prod(torch.arange(4), torch.arange(5)).float()
    places = torch.cartesian_prod(torch.arange(-1, 5), torch.arange(-1, 6)).float()
    distance = places[None] - queries[:, None] - torch.tensor(heads["centers"])[:, None, None]
    assert_close(
        scores, -0.5 * torch.einsum("gnmi,gij,gnmj->gnm", distance, torch.tensor(heads["precision"]), distance)
    )


def test_a_run_tells_its_heads_every_epoch(tmp_path):
    training.train(config(), easy(), tmp_path / "run")
    told = lines(tmp_path / "run")
    assert [line["epoch"] for line in told] == [0, 1, 2, 3]
    assert all(list(line["layers"]) == ["blocks.0.attn", "blocks.1.attn"] for line in told)
    first = training.build_model(config().model, in_chans=1, num_classes=2, img_size=(8, 8), seed=0)
    assert told[0]["layers"] == quadratic_heads(first)
    last = weights(tmp_path / "run")["blocks.1.attn.attention_centers"]
    assert told[-1]["layers"]["blocks.1.attn"]["centers"] == last.tolist()
    assert told[1] != told[2] | {"epoch": 1}


def test_with_an_average_of_weights_its_heads_are_told(tmp_path):
    training.train(config(ema=0.9), easy(), tmp_path / "run")
    last = weights(tmp_path / "run")["blocks.1.attn.attention_centers"]
    assert lines(tmp_path / "run")[-1]["layers"]["blocks.1.attn"]["centers"] == last.tolist()


def test_networks_without_such_heads_tell_nothing(tmp_path):
    training.train(run(epochs=1), easy(), tmp_path / "run")
    assert not (tmp_path / "run" / "heads.jsonl").exists()


@pytest.mark.parametrize("stop", [1, 3, 4, 6, 8])
def test_an_interrupted_run_tells_the_same(tmp_path, stop):
    training.train(config(), easy(), tmp_path / "whole")
    with pytest.raises(Stop):
        training.train(config(), easy(), tmp_path / "cut", listener=StopAt(stop), checkpoint_seconds=0)
    # what was told and not kept, and a line that was cut off
    with (tmp_path / "cut" / "heads.jsonl").open("a") as file:
        file.write(json.dumps({"epoch": 1 + stop // 4, "layers": {}}) + '\n{"epoch": 9, "la')
    training.train(config(), easy(), tmp_path / "cut")
    assert (tmp_path / "cut" / "heads.jsonl").read_text() == (tmp_path / "whole" / "heads.jsonl").read_text()


def test_killed_between_what_is_told_and_what_is_kept(tmp_path, monkeypatch):
    """The line of an epoch is there before its state: whatever is lost is told again."""
    training.train(config(), easy(), tmp_path / "whole")

    def killed(self):
        raise Stop

    with monkeypatch.context() as patch:
        patch.setattr(training._Run, "_keep", killed)
        with pytest.raises(Stop):
            training.train(config(), easy(), tmp_path / "cut")
    assert [line["epoch"] for line in lines(tmp_path / "cut")] == [0, 1]
    training.train(config(), easy(), tmp_path / "cut")
    assert lines(tmp_path / "cut") == lines(tmp_path / "whole")
