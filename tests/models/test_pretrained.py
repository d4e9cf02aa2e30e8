"""Weights of published models: from files, folders and the hub, all of them or none, and never a byte of code."""

import pickle
from unittest.mock import MagicMock

import pytest
import torch
from safetensors.torch import save_file

import glocal
from glocal.checkpoint import CheckpointError
from glocal.models import pretrained
from glocal.models.keys.all_attention import to_official

NAME, SMALL = "all_attention_generalized", {"dim": 8, "depth": 2, "num_heads": 2}

FAULTS = (
    ("official names are unknown", "if source is not None:", "if False:"),
    ("what is missing stays as it was", 'return f"{name} is missing"', "continue"),
    ("shapes are not compared", "if found[name].shape != own[name].shape:", "if False:"),
    ("what is too much is dropped", "for name in found if name not in own), None)", "for name in ()), None)"),
    ("a typing error is sought on the hub", 'path.suffix in (".safetensors", ".pt"', 'path.suffix in (".pt"'),
    ("the hub's second file is never asked for", "            continue\n", "            break\n"),
    ("the hub's own library asks again and again", "            ask_hub(repo, name)\n", ""),
    ("what is on this machine is asked for", "if any(isinstance(try_to", "if False and any(isinstance(try_to"),
    ("a refusal is no answer", "with suppress(HfHubHTTPError):", "with suppress(KeyError):"),
    ("what the hub says is a traceback", "except Exception as error:  # no", "except KeyError as error:  # no"),
    (
        "the file that pickles comes first",
        '= ("model.safetensors", "weights',
        '= ("pytorch_model.bin", "model.safetensors", "weights',
    ),
    ("a model on meta stays empty", "assign=meta", "assign=False"),
    ("a model on meta takes the file's precision", "t.to(own[k].dtype)", "t"),
    ("True is a path", "if isinstance(where, bool):", "if False:"),
)


@pytest.fixture
def weights():
    """Of a model: random, for each name."""
    torch.manual_seed(7)
    return glocal.create_model(NAME, **SMALL).state_dict()


def loads(where, weights, **changed):
    found = glocal.create_model(NAME, where, **{**SMALL, **changed}).state_dict()
    assert found.keys() == weights.keys() and all(torch.equal(found[key], weights[key]) for key in weights)


def test_a_file_a_folder_and_text(tmp_path, weights):
    save_file(weights, tmp_path / "model.safetensors")
    loads(tmp_path / "model.safetensors", weights)
    loads(str(tmp_path / "model.safetensors"), weights)
    torch.save({"head.weight": torch.zeros(1)}, tmp_path / "pytorch_model.bin")  # the other one counts
    loads(tmp_path, weights)


def test_a_run_of_ours(tmp_path, weights):
    (tmp_path / "run").mkdir()
    save_file(weights, tmp_path / "run" / "weights.safetensors")
    loads(tmp_path / "run", weights)


def test_the_official_file(tmp_path, weights):
    """As the release saves it: with the epoch and the accuracy."""
    official = to_official(weights)
    assert "encoder.layer.1.output.LayerNorm.bias" in official
    torch.save({"epoch": 299, "test_accuracy": 0.9, "model_state_dict": official}, tmp_path / "final.pth")
    loads(tmp_path / "final.pth", weights)
    save_file({key: value.contiguous() for key, value in official.items()}, tmp_path / "final.safetensors")
    loads(tmp_path / "final.safetensors", weights)


def test_a_model_without_memory_takes_the_file(tmp_path, weights):
    halves = {key: value.half() for key, value in weights.items()}
    torch.save({"state_dict": to_official(halves)}, tmp_path / "half.pth")
    with torch.device("meta"):
        model = glocal.create_model(NAME, tmp_path / "half.pth", **SMALL)
    for key, parameter in model.named_parameters():
        assert parameter.requires_grad and torch.equal(parameter, halves[key].float())
    assert model(torch.randn(1, 3, 6, 6)).isfinite().all()


def test_a_file_that_holds_code_is_refused(tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"head.weight": print}))
    with pytest.raises(CheckpointError, match="no weights, or more than weights, which could run code when read"):
        glocal.create_model(NAME, tmp_path / "evil.pth", **SMALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("blocks.1.proj.bias"), "weights of another network: blocks.1.proj.bias is missing$"),
        (lambda w: w.update(extra=torch.zeros(1)), "weights of another network: extra is not one of this network$"),
        (
            lambda w: w.update({"head.bias": torch.zeros(9)}),
            r"weights of another network: head.bias has shape \(9,\), this network's \(10,\)$",
        ),
        (
            lambda w: [w.pop(name) for name in list(w)] and w.update({"conv1.weight": torch.zeros(1)}),
            "weights of another network: patch_embed.proj.weight is missing$",
        ),
        (
            lambda w: w.update({"classifier.weight": torch.zeros(1)}),
            "weights of another network: blocks.0.attn.attention_centers is not one of this family$",
        ),
    ],
)
def test_weights_of_another_network_are_refused(tmp_path, weights, change, message):
    weights = dict(weights)
    change(weights)
    save_file(weights, tmp_path / "w.safetensors")
    with pytest.raises(CheckpointError, match=message):
        glocal.create_model(NAME, tmp_path / "w.safetensors", **SMALL)


def test_paths_that_are_none(tmp_path, monkeypatch):
    monkeypatch.setattr(pretrained, "_from_hub", None)  # nobody is asked
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    for where, message in (
        ("nowhere", "^pretrained: no file, folder or hub id 'nowhere'; a hub id is written owner/name$"),
        ("runs/model.safetensors", "^pretrained: no file, folder or hub id 'runs/model.safetensors'"),
        ("runs/model.pth", "^pretrained: no file, folder"),
        ("a/b/c", "^pretrained: no file, folder"),
        ("../up", "^pretrained: no file, folder"),
        ("empty", "^pretrained: empty holds none of model.safetensors, weights.safetensors, pytorch_model.bin;"),
        (True, "^pretrained: True; weights are not downloaded by a model's name"),
    ):
        with pytest.raises(CheckpointError, match=message):
            glocal.create_model(NAME, where, **SMALL)


def test_the_hub(tmp_path, weights, monkeypatch):
    """The file that it gives is loaded; the network is not asked."""
    hub = pytest.importorskip("huggingface_hub")
    errors = pytest.importorskip("huggingface_hub.errors")
    asked = []

    def download(repo, name):
        asked.append((repo, name))
        if repo == "someone/offline":
            raise OSError("no network\nat all")
        if repo == "someone/none" or name != "pytorch_model.bin":
            raise errors.EntryNotFoundError("404")
        torch.save(weights, tmp_path / name)
        return str(tmp_path / name)

    monkeypatch.setattr(hub, "hf_hub_download", download)
    monkeypatch.setattr(hub, "get_hf_file_metadata", lambda url: None)
    loads("someone/all-attention.v1", weights)
    assert asked[0] == ("someone/all-attention.v1", "model.safetensors") and asked[-1][1] == "pytorch_model.bin"
    with pytest.raises(
        CheckpointError, match=r"^pretrained: 'someone/none' on the hub holds none of model.safetensors"
    ):
        glocal.create_model(NAME, "someone/none", **SMALL)
    with pytest.raises(CheckpointError, match=r"^pretrained: 'someone/offline' cannot be downloaded: no network$"):
        glocal.create_model(NAME, "someone/offline", **SMALL)


def test_a_hub_that_is_not_there_is_asked_once(weights, tmp_path, monkeypatch):
    """Its own library would ask again and again; what it refuses is an answer, what is here is not asked for."""
    hub = pytest.importorskip("huggingface_hub")
    errors = pytest.importorskip("huggingface_hub.errors")
    asked, here, says = [], tmp_path / "w.safetensors", ConnectionError("no way\nout")
    save_file(weights, here)

    def ask(url):
        asked.append(url)
        raise says

    monkeypatch.setattr(hub, "get_hf_file_metadata", ask)
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo, name: pytest.fail("asked again") if asked else str(here))
    with pytest.raises(CheckpointError, match=r"^pretrained: 'someone/model' cannot be downloaded: no way$"):
        glocal.create_model(NAME, "someone/model", **SMALL)
    assert len(asked) == 1 and asked.pop().endswith("someone/model/resolve/main/model.safetensors")
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repo, name: str(here))
    loads("someone/model", weights)
    assert not asked
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repo, name: None)
    monkeypatch.setattr(hub, "hf_hub_download", lambda repo, name: str(here))
    says = errors.HfHubHTTPError("401", response=MagicMock())
    loads("someone/model", weights)
    assert len(asked) == 1
