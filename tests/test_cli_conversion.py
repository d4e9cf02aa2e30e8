"""`glocal convert` as a user calls it: what it writes is used, trained on and taken back."""

import json
import re

import pytest
import torch
from safetensors.torch import load_file

from glocal import cli
from glocal.conversion import ConvolutionAsAttention
from glocal.inference import load_trained

from .small_study import write_digits

FAULTS = (
    ("a network that is there is written over", 'if (command.out / "weights.safetensors").exists():', "if False:"),
    ("what is written says nothing of the conversion", "model=model, config=run)", "model=model)"),
    ("the network of before is written", "replace(network, model=model, config=run)", "replace(network, config=run)"),
    ("all layers are converted", 'layers=command.layers or "*"', 'layers="*"'),
    ("training starts anew", "weights=str(weights), new_head", "new_head"),
    ("the way back is measured the wrong way round", "pair = (model, network.model)", "pair = (network.model, model)"),
    ("gates are given to nobody", "gated=command.gated,\n                    head_dim", "head_dim"),
    ("what is written says nothing of gates", "convert_gated=command.gated,", ""),
    ("what is written says nothing of their width", "convert_head_dim=command.head_dim,", ""),
    ("a way back with gates is taken", "if command.back and (there", "if False and (there"),
    ("--back takes layers and converts all", '"--layers": command.layers is not None,', ""),
    ("a width of 0 is named by its key", "command.head_dim is not None and command.head_dim < 1:", "False:"),
    ("an alpha of 0 is named by its key", "if command.alpha is not None and not 0 <", "if False and not 0 <"),
    ("timm asks for most of a minute", "    if pretrained and about and about.hf_hub_id:", "    if False:"),
    ("levels of grey are shares", "[255.0 * value for", "[value for"),
)


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_digits(tmp_path / "data")
    options = ["--layout", "C-Convolution()", "--dims", "8", "8", "--epochs", "1"]
    assert cli.main(["train", "--data", "data", *options, "--out", "run"]) == 0
    capsys.readouterr()
    return tmp_path


def accuracy(name, capsys):
    assert cli.main(["evaluate", name, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    return found["accuracy"], found["loss"]


def test_a_run_is_converted_used_trained_on_and_taken_back(run, capsys):
    assert cli.main(["convert", "run", "--out", "new"]) == 0
    printed = capsys.readouterr().out
    assert re.search(r"stages.0.0.conv2_kxk +32 -> 32, 3x3, depthwise +9 ", printed)
    assert re.search(r"network .* \d\.\de-\d\d\n\nnetwork: new/weights.safetensors\n", printed)
    model = load_trained(run / "new").model
    assert any(isinstance(part, ConvolutionAsAttention) for part in model.modules())
    assert not any(isinstance(part, torch.nn.Conv2d) for part in model.modules())
    (same, loss), (expected, loss_before) = accuracy("new", capsys), accuracy("run", capsys)
    assert same == expected and loss == pytest.approx(loss_before, rel=1e-5)

    options = ["--epochs", "1", "--lr", "1e-9", "--out", "further"]
    assert cli.main(["train", "--config", "new/config.yaml", *options]) == 0
    capsys.readouterr()
    start, end = load_file(run / "new" / "weights.safetensors"), load_file(run / "further" / "weights.safetensors")
    learned = [name for name in start if "running" not in name and "num_batches" not in name]
    assert all(torch.allclose(start[name], end[name], atol=1e-6) for name in learned)  # it went on from there
    assert any("centers" in name for name in learned)

    assert cli.main(["convert", "new", "--back", "--out", "back", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["error"] < 1e-5 and len(report["layers"]) == 8
    assert report["params_before"] < report["params"]  # what is compared is the convolution, then the attention
    before, after = load_file(run / "run" / "weights.safetensors"), load_file(run / "back" / "weights.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    assert accuracy("back", capsys) == (expected, loss_before)


def test_chosen_layers_with_tables_of_scores(run, capsys):
    options = ["--encoding", "learned", "--layers", "stem.*", "--alpha", "30", "--out", "new"]
    assert cli.main(["convert", "run", *options]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2 + 2 + 4
    weights = load_file(run / "new" / "weights.safetensors")
    tables = [name for name in weights if ".tables." in name]
    assert len(tables) == 4 and weights["stem.conv1.mixer.tables.0"].max() == 30
    assert accuracy("new", capsys) == pytest.approx(accuracy("run", capsys), rel=1e-5)


def test_gates_open_in_training_and_are_then_no_convolution(run, capsys):
    assert cli.main(["convert", "run", "--gated", "--head-dim", "4", "--out", "new"]) == 0
    capsys.readouterr()
    weights = load_file(run / "new" / "weights.safetensors")
    gates = [name for name in weights if name.endswith(".gate")]
    assert len(gates) == 8 and not any(weights[name].any() for name in gates)
    assert weights["stages.0.0.conv2_kxk.q.weight"].shape == (9 * 4, 32)
    assert accuracy("new", capsys) == pytest.approx(accuracy("run", capsys), rel=1e-5)
    assert cli.main(["convert", "new", "--back", "--out", "back"]) == 0
    before, after = load_file(run / "run" / "weights.safetensors"), load_file(run / "back" / "weights.safetensors")
    assert all(torch.equal(before[name], after[name]) for name in before)
    options = ["--epochs", "1", "--lr", "1e-2", "--out", "further"]
    assert cli.main(["train", "--config", "new/config.yaml", *options]) == 0
    weights = load_file(run / "further" / "weights.safetensors")
    shut = [name for name in gates if not weights[name].any()]
    assert shut == ["stages.0.0.se.fc1.mixer.gate", "stages.0.0.se.fc2.mixer.gate"]  # with one place there is no choice
    capsys.readouterr()
    assert cli.main(["convert", "further", "--back", "--out", "again"]) == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and re.search(r"head 0 takes 0\.\d+ of its weight by content", said)


def test_a_network_of_timms(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["convert", "timm:test_resnet", "--out", "new", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["error"] < 1e-4
    found = load_trained(tmp_path / "new")
    assert found.img_size == (160, 160) and len(found.classes) == 1000 and found.mean == pytest.approx([127.5] * 3)


def test_weights_of_timms_that_cannot_be_had_are_asked_for_once(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    hub, asked = pytest.importorskip("huggingface_hub"), []

    def ask(url):
        asked.append(url)
        raise ConnectionError("no way\nout")

    monkeypatch.setattr(hub, "get_hf_file_metadata", ask)
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repo, name: None)
    monkeypatch.setattr(hub, "hf_hub_download", lambda *_, **__: pytest.fail("timm has asked"))
    assert cli.main(["convert", "timm:test_resnet", "--pretrained"]) == 2
    said = capsys.readouterr().err
    assert said == "glocal convert: --pretrained: timm's weights of timm:test_resnet cannot be had: no way\n"
    assert len(asked) == 1 and "timm/test_resnet" in asked[0]
    assert not (tmp_path / "glocal-converted").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["nowhere"], "nowhere: no trained network"),
        (["run", "--out", "run"], "--out: 'run' holds a network already; name another folder"),
        (["run", "--back"], "--back: run holds no converted network"),
        (["run", "--layers", "head"], "layers: no convolution of this Backbone matches 'head'; it has stem.conv1"),
        (["run", "--alpha", "-1"], "convert: --alpha: -1; it must be above 0"),
        (["run", "--alpha", "nan"], "convert: --alpha: nan; it must be above 0"),
        (["run", "--alpha", "inf"], "convert: --alpha: inf; it must be above 0"),
        (["run", "--pretrained"], "--pretrained: is for 'timm:NAME'"),
        (["timm:resnet1000"], "timm:resnet1000: timm has no such model"),
        (["run", "--encoding", "cubic"], "cubic"),
        (["run", "--head-dim", "4"], "--head-dim: no head has a gate; give --gated too"),
        (["run", "--gated", "--head-dim", "0"], "convert: --head-dim: 0; it must be 1 or more"),
        (["run", "--back", "--gated"], "--gated: is of the way there, not of --back"),
        (["run", "--back", "--layers", "stem.*"], "--layers: is of the way there, not of --back"),
        (["run", "--back", "--alpha", "3"], "--alpha: is of the way there, not of --back"),
        (["run", "--back", "--encoding", "learned"], "--encoding: is of the way there, not of --back"),
    ],
)
def test_a_mistake_is_one_line(run, capsys, arguments, words):
    assert cli.main(["convert", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1 and words in said.err
    assert not (run / "glocal-converted").exists()


def test_what_is_converted_is_not_converted_again(run, capsys):
    assert cli.main(["convert", "run"]) == 0
    assert cli.main(["convert", "glocal-converted", "--out", "again"]) == 2
    assert "is converted already; --back turns it into convolutions" in capsys.readouterr().err
