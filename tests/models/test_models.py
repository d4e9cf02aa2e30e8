"""Models by name: what is known, what names and keywords mean, and what is refused with the nearest that is valid."""

import pytest
import torch

import glocal
from glocal import models
from glocal.models.all_attention import AllAttention

ALL_ATTENTION = [
    "all_attention_generalized",
    "all_attention_learned",
    "all_attention_learned_content",
    "all_attention_quadratic",
]
SMALL = {"dim": 8, "depth": 1, "num_heads": 2}

FAULTS = {
    "models/__init__.py": (
        ("a pattern is part of a name", "fnmatch.filter(_MODELS, pattern)", "[n for n in _MODELS if pattern in n]"),
        ("names are in any order", "return sorted(fnmatch", "return list(fnmatch"),
        ("a keyword counts more than the text", "{**arguments, **own}", "{**own, **arguments}"),
        ("what the text says is dropped", "{**arguments, **own}", "arguments"),
        ("an unknown keyword says what Python says", "if key not in valid:", "if False:"),
        ("an error does not say of which model", 'raise ValueError(f"{name}: {error}") from error', "raise"),
        ("weights are not loaded", "if pretrained is not None and pretrained is not False:", "if False:"),
        ("False is taken for a path", "pretrained is not None and pretrained is not False", "pretrained is not None"),
    ),
    "spec.py": (
        ("values of models may be any expression", 'other else "number, text or tuple"', 'other else "literal"'),
        ("a name is called an operator", 'text), text, "a name")', "text), text)"),
    ),
}


def test_names_that_are_known():
    assert glocal.list_models("all_att*") == ALL_ATTENTION
    assert glocal.list_models("*content") == ["all_attention_learned_content"]
    assert glocal.list_models("all_attention") == []
    assert set(ALL_ATTENTION) <= set(glocal.list_models()) and glocal.list_models() == sorted(glocal.list_models())


@pytest.mark.parametrize(
    ("name", "mixer"),
    [
        ("all_attention_quadratic", "QuadraticAttention(num_heads=2)"),
        ("all_attention_generalized", "GeneralizedQuadraticAttention(num_heads=2)"),
        (
            "all_attention_learned",
            "LearnedRelativeAttention(num_heads=2, grid_size=(9, 5), position_dim=8, clip_offsets=True)",
        ),
        (
            "all_attention_learned_content",
            "LearnedRelativeAttention(num_heads=2, grid_size=(9, 5), position_dim=8, content=True, key_bias=True, "
            "clip_offsets=True)",
        ),
    ],
)
def test_what_a_name_builds(name, mixer):
    model = glocal.create_model(name, img_size=(17, 9), **SMALL)
    assert type(model) is AllAttention and [repr(block.attn) for block in model.blocks] == [mixer]
    assert model.num_classes == model.head.out_features == 10 and model.patch_embed.proj.in_features == 12
    grey = glocal.create_model(name, num_classes=7, in_chans=1, **SMALL)
    assert grey(torch.randn(2, 1, 6, 4)).shape == (2, 7)


def test_arguments_may_stand_in_the_text():
    text = "all_attention_quadratic(dim=8, num_heads=4, depth=2, drop_rate=0.5)"
    model = glocal.create_model(text, in_chans=1, depth=5)
    assert len(model.blocks) == 2 and model.blocks[0].attn.num_heads == 4
    assert model.num_features == 8 and model.blocks[0].drop.p == 0.5 and model.in_chans == 1
    assert len(glocal.create_model(" all_attention_quadratic ( ) ", dim=4, depth=3).blocks) == 3


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        (
            "all_attention_quadratik",
            {},
            "^model: unknown name 'all_attention_quadratik'; did you mean 'all_attention_q",
        ),
        ("zzz", {}, "^model: unknown name 'zzz'; Valid: .*all_attention_generalized"),
        ("all_attention_learned", {"dimm": 8}, "^all_attention_learned: has no argument 'dimm'; did you mean 'dim'"),
        ("all_attention_learned(dims=8)", {}, "^all_attention_learned: has no argument 'dims'; did you mean 'dim'"),
        ("all_attention_learned", {"mixer": "LSTM"}, "has no argument 'mixer'"),
        ("all_attention_learned", {"dim": 0}, "^all_attention_learned: dim: 0"),
        ("all_attention_learned", {"depth": 0}, "^all_attention_learned: depth: 0"),
        ("all_attention_learned", {"num_classes": -1}, "^all_attention_learned: num_classes: -1"),
        ("all_attention_learned", {"patch_size": 0}, "^all_attention_learned: patch_size: 0"),
        ("all_attention_learned", {"img_size": (4, 4, 4)}, "^all_attention_learned: img_size: "),
        ("all_attention_learned", {"drop_rate": 1}, "^all_attention_learned: drop_rate: 1, must be"),
        ("all_attention_learned", {"drop_rate": "half"}, "^all_attention_learned: drop_rate: 'half', must be a number"),
        (
            "all_attention_learned",
            {"drop_path_rate": 1.5, "depth": 2},
            "^all_attention_learned: drop_path_rate: 1.5, must",
        ),
        ("all_attention_learned", {"drop_path_rate": 2, "depth": 1}, "^all_attention_learned: drop_path_rate: 2, must"),
        ("all_attention_learned", {"drop_path_rate": "1"}, "^all_attention_learned: drop_path_rate: '1', must"),
        ("all_attention_learned", {"mlp_ratio": "two"}, "^all_attention_learned: mlp_ratio: 'two', must be a number"),
        (
            "all_attention_learned",
            {"mlp_ratio": 0},
            "^all_attention_learned: mlp_ratio: 0, must be a number that makes dim 400 one",
        ),
        ("all_attention_learned", {"mlp_ratio": -1}, "^all_attention_learned: mlp_ratio: -1, must"),
        ("all_attention_learned(mlp_ratio=1e999)", {}, "^all_attention_learned: mlp_ratio: inf, must"),
        ("all_attention_learned(", {}, r"^spec: 'all_attention_learned\(' cannot be read"),
        ("all_attention_learned(8)", {}, "arguments must be named"),
        ("all_attention_learned(dim=8, dim=9)", {}, "keyword argument repeated|dim is given twice"),
        ("all_attention_learned(dim=exit())", {}, r"'exit\(\)' is no number, text or tuple$"),
        ("all_attention_learned(dim=LSTM)", {}, "'LSTM' is no number, text or tuple$"),
        ("all-attention", {}, r"^spec: 'all-attention' is not a name; write it as Name\(argument=value"),
    ],
)
def test_what_is_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message) as error:
        glocal.create_model(name, **arguments)
    assert "\n" not in str(error.value)


def test_what_python_says_is_said_of_the_model(monkeypatch):
    monkeypatch.setitem(models._MODELS, "odd", lambda width=2: width + "")
    with pytest.raises(ValueError, match=r"^odd: cannot be built: unsupported operand"):
        glocal.create_model("odd")


def test_weights_are_loaded_by_name(tmp_path):
    torch.manual_seed(1)
    one = glocal.create_model("all_attention_quadratic", **SMALL)
    torch.save(one.state_dict(), tmp_path / "one.pth")
    other = glocal.create_model("all_attention_quadratic", tmp_path / "one.pth", **SMALL)
    assert all(torch.equal(other.state_dict()[key], value) for key, value in one.state_dict().items())
    torch.manual_seed(1)
    other = glocal.create_model("all_attention_quadratic", pretrained=False, **SMALL)  # as timm's users write
    assert all(torch.equal(other.state_dict()[key], value) for key, value in one.state_dict().items())
