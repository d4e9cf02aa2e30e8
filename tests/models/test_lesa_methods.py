"""LESA-ResNet and its baselines as models: any image, methods, training, compilation, what is refused."""

import pytest
import torch
from torch.testing import assert_close

import glocal

KINDS = ("lesa_resnet50", "sa_resnet50", "lesa_resnet50_detection", "sa_resnet50_detection", "deformable_resnet50")
SMALL = {"dims": (4, 4, 8, 16), "depths": (1, 1, 2, 2), "num_groups": 2, "num_classes": 3, "img_size": 64}

FAULTS = {
    "models/lesa.py": (
        ("positions of no kind are taken", 'one_of("position", position, ("classification", "detection"))', "pass"),
        ("attention of no kind is taken", 'one_of("attention", attention, ("lesa", "self"))', "pass"),
        ("text counts as true", 'flag("deformable", deformable)', "pass"),
        ("blocks are never skipped", "drop_path_rate=drop_path_rate,", ""),
    ),
    "inspection.py": (("attention alone has shares", "if gate is None:", "if False:"),),
}


def small(name="lesa_resnet50", **more):
    return glocal.create_model(name, **{**SMALL, **more})


@pytest.mark.parametrize("size", [(200, 312), (224, 160), (97, 131), (448, 448), (1, 1)])
@pytest.mark.parametrize("name", KINDS)
def test_any_size(name, size):
    model = small(name, depths=(1, 1, 1, 1), dims=(4, 4, 4, 4)).eval()
    with torch.no_grad():
        maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
    for reduction, found in zip(model.feature_info.reduction(), maps, strict=True):
        assert tuple(found.shape[2:]) == tuple(-(-side // reduction) for side in size)
        assert found.isfinite().all()


def test_methods():
    model = small().eval()
    image = torch.randn(2, 3, 64, 48)
    tokens = model.forward_features(image)
    assert tokens.shape == (2, 4, 3, 64)
    assert_close(model.forward_head(tokens, pre_logits=True), tokens.mean((1, 2)))
    features = small(features_only=True, out_indices=(1, 2)).eval()
    assert not any(name.startswith(("model.layer4", "model.fc")) for name in features.state_dict())
    features.model.load_state_dict(model.state_dict(), strict=False)
    assert_close(features(image), model.forward_intermediates(image, [1, 2], intermediates_only=True))
    assert model.no_weight_decay() == set()
    model.reset_classifier(0)
    assert_close(model(image), tokens.mean((1, 2)))


@pytest.mark.parametrize("name", ["lesa_resnet50", "lesa_resnet50_detection"])
def test_checkpoints_change_nothing(name):
    """Gradients, and statistics that have seen the batch once."""
    image, found = torch.randn(3, 3, 64, 48), []
    for checkpointed in (False, True):
        torch.manual_seed(4)
        model = small(name, drop_path_rate=0.5)
        model.set_grad_checkpointing(checkpointed)
        torch.manual_seed(1)
        model(image).square().sum().backward()
        found.append(({name: p.grad for name, p in model.named_parameters()}, dict(model.named_buffers())))
    assert_close(found[0], found[1])
    assert all(int(b) == 1 for name, b in found[1][1].items() if name.endswith("tracked"))


def test_branches_are_skipped_for_an_image():
    rates = [b.drop_path.rate for stage in small(drop_path_rate=0.5).stages() for b in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])
    block = small(drop_path_rate=0.999).layer4[1]
    x = torch.randn(4, 3, 5, 64)
    assert_close(block(x), x.relu())
    assert not torch.equal(block.eval()(x), x.relu())


@pytest.mark.parametrize("name", KINDS[:3])
def test_compiles_as_one_graph(name):
    model = small(name, depths=(1, 1, 1, 1), num_groups=1, dims=(4, 4, 4, 4)).eval()
    image = torch.randn(2, 3, 48, 40)
    assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(image), model(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "shares"), [("lesa_resnet50", ["unary share"]), ("sa_resnet50", [])])
def test_layers_can_be_looked_into(name, shares):
    model = small(name).eval()
    with torch.no_grad(), glocal.inspect(model) as seen:
        model(torch.randn(1, 3, 64, 48))
    shown = [call for call in seen if "relative" in dict(call.mixer.named_parameters())]
    assert [call.name for call in shown] == ["layer3.1.conv2", "layer4.0.conv2", "layer4.1.conv2"]
    assert all(call.rebuild_error() < 1e-5 and list(call.shares()) == shares for call in shown)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"attention": "global"}, "^lesa_resnet50: attention: 'global', must be 'lesa' or 'self'"),
        ({"position": "both", "attention": None}, "^lesa_resnet50: position: 'both', must be 'classification'"),
        ({"deformable": "no"}, "^lesa_resnet50: deformable: 'no', must be True or False"),
        ({"num_groups": 3}, "^lesa_resnet50: .*num_groups: 3 does not divide half of 8 channels"),
        ({"strides": (1, 2, 2)}, "^lesa_resnet50: strides: "),
        ({"strides": 2}, "^lesa_resnet50: strides: 2, must have one number"),
        ({"dims": (4, 8)}, "^lesa_resnet50: dims: "),
        ({"img_size": 0}, "^lesa_resnet50: img_size: 0"),
        ({"block": "basic"}, "^lesa_resnet50: has no argument 'block'"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lesa_resnet50", "lesa_wrn50"])
def test_full_networks_learn_from_one_step(name):
    """At the published size: finite scores and gradients, and a gate that is half open before training."""
    torch.manual_seed(0)
    model = glocal.create_model(name)
    model(torch.randn(2, 3, 224, 224)).logsumexp(1).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    gate = model.layer4[2].conv2.terms(torch.randn(2, 14, 14, model.layer4[2].conv2.dim).relu())["gate"]
    assert gate.mean().item() == pytest.approx(0.5, abs=0.02)
