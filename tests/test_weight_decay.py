"""Which parameters weight decay leaves alone, held against timm's optimizer and models and against a step by hand."""

import pytest
import torch
from timm.models import create_model
from timm.optim import param_groups_weight_decay
from torch import nn
from torch.testing import assert_close

import glocal
from glocal import Backbone, contract, mixers
from glocal.operator import no_weight_decay
from glocal.optimizer import parameter_groups

# What published trainings exempt by name.
TABLE = "relative_position_bias_table"
OF_FOCAL = {TABLE, f"{TABLE}_to_neighbors", f"{TABLE}_to_windows"}
EXEMPT = {
    "FocalAttention": OF_FOCAL,
    "GeneralizedQuadraticAttention": {"attention_centers", "attention_spreads"},
    "NeighborhoodAttention": {"rpb"},
    "PaddedLearnedAttention": {"tables"},  # ours; in place of the centres and spreads
    "PaddedQuadraticAttention": {"centers", "spreads"},
    "QuadraticAttention": {"attention_centers", "attention_spreads"},
    "RelativeAttention": {TABLE, "relative_position_mlp"},
    "ReleasedFocalAttention": OF_FOCAL,
    "WindowAttention": {TABLE},
}

FAULTS = {
    "operator.py": (
        ("operators name none", 'if name.partition(".")[0] in self.undecayed}', "if False}"),
        ("lists of parameters are missed", 'name.partition(".")[0] in self.undecayed', "name in self.undecayed"),
        ("parts of an operator are missed", "return own | undecayed_parts(self)", "return own"),
        ("names lack those of the modules around", '{f"{part}.{name}" for', "{name for"),
        ("other models are not asked", "if own is None else set(own())", "if True else set()"),
    ),
    "optimizer.py": (
        ("all tables are decayed", "p.ndim > 1 and name not in exempt]", "p.ndim > 1]"),
        ("exempt parameters are not trained", "if p.ndim <= 1 or name in exempt]", "if p.ndim <= 1]"),
        ("frozen parameters are trained", "named_parameters() if p.requires_grad]", "named_parameters()]"),
    ),
}


@pytest.mark.parametrize("name", glocal.available())
def test_operators_exempt_what_is_published(name):
    operator = getattr(mixers, name)
    assert set(operator.undecayed) == EXEMPT.get(name, set())
    found = set()
    for spec in operator.examples:
        mixer = glocal.build(spec, contract.DIM)
        exempt = mixer.no_weight_decay()
        assert exempt <= {parameter for parameter, _ in mixer.named_parameters()}
        found |= {parameter.split(".")[0] for parameter in exempt}
    assert found >= EXEMPT.get(name, set())  # no name is a slip of the pen


def backbone():
    mixture = "GatedMixture(a=SelfAttention(num_heads=2), b=WindowAttention(window_size=2, num_heads=2))"
    focal = "FocalAttention(window_size=2, expand_size=1, focal_window=1, num_heads=2)"
    relative = "RelativeAttention(num_heads=2)"
    layout = f"C-QuadraticAttention(num_heads=2)-{relative}-{focal}-{mixture}"
    return Backbone(layout, in_chans=1, num_classes=2, img_size=16, dims=(8,) * 5)


def by_name(model):
    """The names in each of the two groups of a run's optimizer."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    decayed, free = parameter_groups(model, 0.05)
    assert (decayed["weight_decay"], free["weight_decay"]) == (0.05, 0)
    decayed, free = ([names[p] for p in group["params"]] for group in (decayed, free))
    assert sorted([*decayed, *free]) == sorted(names.values())  # each once
    return set(decayed), set(free)


def test_mixers_inside_a_network_are_found():
    model = backbone()
    decayed, free = by_name(model)
    assert {name for name in free if model.get_parameter(name).ndim > 1} == {
        "stages.1.0.mixer.attention_centers",
        f"stages.2.0.mixer.{TABLE}",
        f"stages.3.0.mixer.{TABLE}",
        f"stages.3.0.mixer.{TABLE}_to_neighbors",
        f"stages.3.0.mixer.{TABLE}_to_windows.0",
        f"stages.4.0.mixer.b.{TABLE}",
    }
    assert all(model.get_parameter(name).ndim > 1 for name in decayed)


def test_timms_optimizer_makes_the_same_groups():
    model = backbone()
    free, decayed = param_groups_weight_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay())
    assert (free["weight_decay"], decayed["weight_decay"]) == (0, 0.05)
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert by_name(model) == tuple({names[p] for p in group["params"]} for group in (decayed, free))


@pytest.mark.parametrize("name", ["swin_tiny_patch4_window7_224", "vit_tiny_patch16_224", "resnet10t"])
def test_timms_models_exempt_what_they_say(name):
    model = create_model(name, num_classes=2)
    free, decayed = param_groups_weight_decay(
        model, 0.05, no_weight_decay_list=getattr(model, "no_weight_decay", set)()
    )
    names = {parameter: name for name, parameter in model.named_parameters()}
    expected = [{names[p] for p in group["params"]} for group in (decayed, free)]
    if name.startswith("swin"):
        assert any(name.endswith("relative_position_bias_table") for name in expected[1])
    assert by_name(model) == tuple(expected)
    assert no_weight_decay(nn.Sequential(model)) == {f"0.{name}" for name in no_weight_decay(model)}


def test_a_step_leaves_them_alone():
    """Without a gradient a step is the decay alone."""
    model = nn.Sequential(nn.Linear(8, 8), glocal.build("GeneralizedQuadraticAttention(num_heads=2)", 8))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(parameter_groups(model, 0.5), lr=0.1)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        assert_close(p.detach(), before[name] * (0.95 if name.endswith(".weight") else 1))


def test_frozen_parameters_are_in_no_group():
    model = backbone()
    for p in model.stages[1].parameters():
        p.requires_grad = False
    count = sum(len(group["params"]) for group in parameter_groups(model, 0.05))
    assert count == sum(p.requires_grad for p in model.parameters()) < len(list(model.parameters()))
