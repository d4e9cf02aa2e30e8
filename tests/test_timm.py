"""`import glocal.timm`: timm builds the models that it lacks, knows what they take, and keeps what it has."""

import json
import subprocess
import sys

import pytest
import torch
from torch.testing import assert_close

import glocal

timm = pytest.importorskip("timm")

SMALL = {"dims": (8, 16), "depths": (1, 1)}

FAULTS = {
    "timm/glocal.py": (
        ("names of timm get another meaning", "in list_models() if not is_model(name)", "in list_models()"),
        ("timm does not know what models take", "generate_default_cfgs({name: _cfg(name) for name in ADDED})", "{}"),
        ("all models take 224 pixels", '"input_size": (own["in_chans"], *size)', '"input_size": (3, 224, 224)'),
        ("small images are cropped", "0.875 if min(size) >= 224 else 1.0", "0.875"),
        ("all models have 1000 classes", '"num_classes": own["num_classes"],', ""),
        ("arguments are dropped", "= create_model(name, where, **arguments)", "= create_model(name, where)"),
        ("weights are dropped", "= create_model(name, where, **arguments)", "= create_model(name, **arguments)"),
        ("random weights are called pretrained", "if pretrained and not where:", "if False:"),
        ("weights are loaded unasked", "(cfg.file or cfg.hf_hub_id) if pretrained else None", "cfg.file"),
        ("a new head cannot be had with weights", "if where and classes != cfg.num_classes and", "if False and"),
        ("the training script's dropout is refused", 'if arguments.get("drop_rate") == 0 and', "if False and"),
        ("a model keeps its dropout at 0", '"drop_rate" not in defaults(name)', "True"),
        ("models do not say what they take", "model.pretrained_cfg = model.default_cfg = described", "pass"),
        ("the head has no name", 'described["classifier"] =', "_ ="),
        ("models stand under another module", "entry.__module__ = __name__", 'entry.__module__ = "glocal.timm"'),
    ),
    "timm/__init__.py": (
        ("another missing module is called timm", 'if error.name != "timm":', "if False:"),
        ("nobody says what to install", "except ModuleNotFoundError as error:", "except ZeroDivisionError as error:"),
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def added():
    """What timm knew before, and the names that were added."""
    before = set(timm.list_models())
    import glocal.timm

    return before, glocal.timm.ADDED


def in_fresh_process(code):
    run = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_only_what_timm_lacks_is_added():
    found = in_fresh_process(
        "import importlib, json, timm\n"
        "before = timm.list_models(); entries = {n: timm.models.model_entrypoint(n) for n in before}\n"
        "import glocal, glocal.timm\n"
        "names = glocal.timm.ADDED; importlib.reload(glocal.timm); assert names == glocal.timm.ADDED\n"
        "same = all(timm.models.model_entrypoint(n) is e for n, e in entries.items())\n"
        "after = timm.list_models()\n"
        "print(json.dumps([before, after, same, glocal.list_models(), timm.list_models(module='glocal'), "
        "list(glocal.timm.ADDED), timm.list_modules()]))"
    )
    before, after, same, ours, under_module, names, modules = found
    assert same and set(after) == {*before, *ours} and "glocal" in modules and "timm" not in modules
    assert sorted(under_module) == sorted(names) == sorted({*ours} - {*before})
    assert "dwnet_tiny" in names and "lesa_resnet50" in names and "resnet50" in {*ours} & {*before}


def test_without_timm_it_says_so():
    code = (
        "import json, sys; sys.modules[{!r}] = None\n"
        "try: import glocal.timm\n"
        "except ImportError as error: print(json.dumps([type(error).__name__, str(error)]))"
    )
    kind, said = in_fresh_process(code.format("timm"))
    assert kind == "ImportError" and said.startswith(
        "glocal.timm adds models to timm's, and timm is not installed; run"
    )
    kind, said = in_fresh_process(code.format("torchvision"))  # which timm needs
    assert kind == "ModuleNotFoundError" and "torchvision" in said


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("dwnet_tiny", {**SMALL, "num_classes": 7, "drop_path_rate": 0.1}),
        ("swin_tiny", {**SMALL, "in_chans": 1, "num_heads": (2, 2)}),
        ("all_attention_quadratic", {"dim": 8, "depth": 1, "num_heads": 2}),
        ("sa_resnet50", {"dims": (4, 4, 8, 8), "depths": (1, 1, 1, 1), "num_groups": 2}),
    ],
)
def test_timm_builds_our_models(added, name, arguments):
    torch.manual_seed(0)
    ours = glocal.create_model(name, **arguments)
    torch.manual_seed(0)
    theirs = timm.create_model(name, **arguments)
    assert type(theirs) is type(ours) and theirs.num_classes == ours.num_classes
    image = torch.randn(2, ours.in_chans, 32, 40)
    assert_close(theirs.eval()(image), ours.eval()(image), rtol=0, atol=0)


def test_what_a_model_takes(added):
    model = timm.create_model("dwnet_tiny", **SMALL)
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 224, 224) and config["crop_pct"] == 0.875
    assert model.default_cfg["num_classes"] == 1000 and model.default_cfg["architecture"] == "dwnet_tiny"
    assert model.get_submodule(model.pretrained_cfg["classifier"]).out_features == 1000
    photo = pytest.importorskip("PIL.Image").new("RGB", (300, 260))
    assert timm.data.create_transform(**config)(photo).shape[1:] == (224, 224)
    small = timm.create_model("all_attention_learned", dim=8, depth=1, num_heads=2)
    config = timm.data.resolve_model_data_config(small)
    assert config["input_size"] == (3, 32, 32) and config["crop_pct"] == 1
    assert timm.models.get_pretrained_cfg("all_attention_learned").num_classes == small.num_classes == 10
    assert timm.data.resolve_model_data_config(small, args={"img_size": 64})["input_size"] == (3, 64, 64)


def test_maps_of_stages(added):
    features = timm.create_model("dwnet_tiny", features_only=True, out_indices=(1,), **SMALL)
    assert features.feature_info.channels() == [16] and features.feature_info.reduction() == [8]
    assert [tuple(m.shape) for m in features(torch.randn(1, 3, 32, 40))] == [(1, 16, 4, 5)]


def test_dropout_of_timms_training_script(added):
    assert timm.create_model("dwnet_tiny", drop_rate=0.0, **SMALL).num_classes == 1000
    with pytest.raises(ValueError, match=r"^dwnet_tiny: has no argument 'drop_rate'"):
        timm.create_model("dwnet_tiny", drop_rate=0.2, **SMALL)
    small = {"dim": 8, "depth": 1, "num_heads": 2}
    assert timm.create_model("all_attention_quadratic", drop_rate=0.0, **small).blocks[0].drop.p == 0
    assert timm.create_model("all_attention_quadratic", **small).blocks[0].drop.p == 0.1


def test_weights(added, tmp_path):
    torch.manual_seed(1)
    source = glocal.create_model("dwnet_tiny", **SMALL)
    torch.save(source.state_dict(), tmp_path / "w.pth")
    overlay = {"file": str(tmp_path / "w.pth")}
    loaded = timm.create_model("dwnet_tiny", pretrained=True, pretrained_cfg_overlay=overlay, **SMALL)
    assert all(torch.equal(loaded.state_dict()[k], v) for k, v in source.state_dict().items())
    other = timm.create_model("dwnet_tiny", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=4, **SMALL)
    assert other.num_classes == other.head.fc.out_features == 4
    assert torch.equal(other.layers[1].blocks[0].norm2.weight, source.layers[1].blocks[0].norm2.weight)
    assert torch.equal(other.layers[0].blocks[0].mlp.fc1.weight, source.layers[0].blocks[0].mlp.fc1.weight)
    unasked = timm.create_model("dwnet_tiny", pretrained_cfg_overlay=overlay, **SMALL)
    assert not torch.equal(unasked.head.fc.weight, source.head.fc.weight)
    again = timm.create_model("dwnet_tiny", checkpoint_path=tmp_path / "w.pth", **SMALL)
    assert torch.equal(again.head.fc.weight, source.head.fc.weight)


@pytest.mark.parametrize(
    ("arguments", "kind", "message"),
    [
        ({"pretrained": True}, RuntimeError, "^dwnet_tiny: no weights are known by its name; give pretrained_cfg_over"),
        ({"embed_dim": 8}, ValueError, "^dwnet_tiny: has no argument 'embed_dim'"),
        ({"pretrained_cfg": "in1k"}, RuntimeError, r"Invalid pretrained tag \(in1k\)"),
        (
            {"pretrained": True, "pretrained_cfg_overlay": {"file": "nowhere.pth"}},
            ValueError,
            "^pretrained: no file, folder or hub id 'nowhere.pth'",
        ),
    ],
)
def test_what_is_refused(added, arguments, kind, message):
    with pytest.raises(kind, match=message):
        timm.create_model("dwnet_tiny", **arguments)
