"""ResNet against timm, torchvision and transformers with the same weights, and its published sizes."""

import pytest
import torch
from torch.testing import assert_close

import glocal
from glocal.analysis import cost
from glocal.models.keys.resnet import from_transformers, to_transformers

DIMS, DEPTHS = (64, 16, 24, 32), (1, 2, 2, 1)  # timm's stem always has 64 channels
BLOCKS = ("basic", "bottleneck")

FAULTS = {
    "models/resnet.py": (
        ("the first convolution of a basic block has no stride", "out_dim=width, stride=stride,", "out_dim=width,"),
        ("bottlenecks have no stride", '"Convolution", width, stride=stride', '"Convolution", width, stride=1'),
        (
            "bottlenecks are never skipped",
            ".movedim(1, -1)\n        return F.relu(_skip(self.downsample, x) + self.drop_path(branch))",
            ".movedim(1, -1)\n        return F.relu(_skip(self.downsample, x) + branch)",
        ),
        (
            "basic blocks are never skipped",
            "self.conv2(branch))\n        return F.relu(_skip(self.downsample, x) + self.drop_path(branch))",
            "self.conv2(branch))\n        return F.relu(_skip(self.downsample, x) + branch)",
        ),
        (
            "the second convolution of a bottleneck has no activation",
            "F.relu(_normed(self.bn2, self.conv2(branch)))",
            "_normed(self.bn2, self.conv2(branch))",
        ),
        ("the first stage is coarser than the stem", "(1, *(2,) * (len(dims) - 1))", "(2,) * len(dims)"),
        ("every block is coarser", "stride = 1 if j else strides[i]", "stride = strides[i]"),
        ("strides given are dropped", 'else per_stage("strides", strides, len(dims))', "else (1, 2, 2, 2)"),
        ("wide networks are not", "round(width * width_ratio)", "width"),
        ("strides count from 2", "halving**2 * math.prod(", "2 * math.prod("),
        ("the small stem strides", '"3x3": (3, 1)', '"3x3": (3, 2)'),
        ("the small stem pools", "if self.conv1.stride[0] > 1:", "if True:"),
        ("the stem does not pool", "F.max_pool2d(x, 3, stride=2, padding=1)", "F.max_pool2d(x, 1, stride=2)"),
        ("the stem is linear", "F.relu(self.bn1(self.conv1(x.contiguous(", "(self.bn1(self.conv1(x.contiguous("),
        ("a skip path of the same grid but another width is missing", "stride == 1 and dim == out_dim", "stride == 1"),
        (
            "first values are PyTorch's",
            'nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")',
            "pass",
        ),
        ("first values count what comes in", 'mode="fan_out"', 'mode="fan_in"'),
        ("all bottlenecks have the same rate", "drop_path=next(rates), middle", "drop_path=drop_path_rate, middle"),
        ("the 101 is the 152", "(3, 4, 23, 3)", "(3, 8, 36, 3)"),
    ),
    "models/__init__.py": (("what families alone may fill in is open", "if p.kind is not p.POSITIONAL_ONLY}", "}"),),
    "models/keys/resnet.py": (
        ("stages count from 0", 'f"layer{stage + 1}.{{j}}"', 'f"layer{stage}.{{j}}"'),
        ("convolutions count from 0", 'f"{ours}.conv{k + 1}"', 'f"{ours}.conv{k}"'),
        ("norms are one behind", 'f"{ours}.bn{k + 1}"', 'f"{ours}.bn{k + 2}"'),
        (
            "the skip path's parts change places",
            '.shortcut.convolution", f"{ours}.downsample.0"',
            '.shortcut.convolution", f"{ours}.downsample.2"',
        ),
        (
            "files of transformers are not known",
            'Source("resnet.embedder.embedder.convolution.weight"',
            'Source("resnet.embedder.convolution.weight"',
        ),
    ),
}


def small(block="bottleneck", **arguments):
    return glocal.create_model(
        "resnet50", **{"block": block, "depths": DEPTHS, "dims": DIMS, "num_classes": 5, **arguments}
    )


def at_random(model):
    """A model whose norms say something, statistics too, in double precision and evaluation."""
    generator = torch.Generator().manual_seed(1)
    for part in model.modules():
        if isinstance(part, torch.nn.BatchNorm2d):
            for tensor, low in (
                (part.weight, 0.5),
                (part.bias, -0.5),
                (part.running_mean, -0.5),
                (part.running_var, 0.5),
            ):
                tensor.data = low + torch.rand(tensor.shape, generator=generator)
    return model.double().eval()


def timms(block, **arguments):
    resnet = pytest.importorskip("timm.models.resnet")
    kind = {"basic": resnet.BasicBlock, "bottleneck": resnet.Bottleneck}[block]
    return resnet.ResNet(kind, DEPTHS, num_classes=5, channels=DIMS, **arguments).double()


def same(ours, theirs, image, names=dict):
    """Logits, statistics, and gradients of the image and of every parameter (`names`: of ours, under their names)."""
    found, expected = [], []
    for model, results in ((ours, found), (theirs, expected)):
        x = image.clone().requires_grad_()
        scores = model(x)
        scores = getattr(scores, "logits", scores)
        (scores * torch.linspace(-1, 2, scores.numel(), dtype=scores.dtype).view(scores.shape)).sum().backward()
        results += [scores.detach(), x.grad]
    assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert found[0].abs().max() > 0.01
    grads = names({name: p.grad for name, p in ours.named_parameters()})
    wanted = {name: p.grad for name, p in theirs.named_parameters()}
    assert grads.keys() == wanted.keys()
    for name in wanted:
        assert_close(grads[name], wanted[name], rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}\n{text}")
    assert_close(names(ours.state_dict()), dict(theirs.state_dict()), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(64, 64), (50, 33), (97, 131)])
@pytest.mark.parametrize("block", BLOCKS)
def test_is_timms_network(block, size):
    ours, theirs = at_random(small(block)), timms(block).eval()
    theirs.load_state_dict(ours.state_dict())
    assert list(theirs.state_dict()) == list(ours.state_dict())
    image = torch.randn(3, 3, *size, dtype=torch.float64)
    same(ours, theirs, image)
    same(ours.train(), theirs.train(), image)
    ours, theirs, image = ours.eval().float(), theirs.eval().float(), image.float()
    assert_close(ours(image), theirs(image), rtol=1e-4, atol=1e-4)


def test_is_timms_network_with_strides_of_its_own():
    """Where the last stage keeps the grid; timm dilates its convolutions then, so they are set back."""
    ours, theirs = at_random(small(strides=(1, 2, 2, 1))), timms("bottleneck", output_stride=16).eval()
    for part in theirs.layer4.modules():
        if isinstance(part, torch.nn.Conv2d) and part.kernel_size == (3, 3):
            part.dilation = part.padding = (1, 1)
    theirs.load_state_dict(ours.state_dict())
    same(ours, theirs, torch.randn(2, 3, 50, 33, dtype=torch.float64))
    assert ours.feature_info.reduction() == [4, 8, 16, 16]


def test_is_timms_wide_network():
    ours, theirs = at_random(small(width_ratio=2)), timms("bottleneck", base_width=128).eval()
    theirs.load_state_dict(ours.state_dict())
    same(ours, theirs, torch.randn(2, 3, 40, 56, dtype=torch.float64))


@pytest.mark.parametrize("block", BLOCKS)
def test_is_torchvisions_network(block):
    resnet = pytest.importorskip("torchvision.models.resnet")
    kind = {"basic": resnet.BasicBlock, "bottleneck": resnet.Bottleneck}[block]
    theirs = at_random(resnet.ResNet(kind, [1, 1, 1, 1], num_classes=5))
    ours = small(block, depths=(1, 1, 1, 1), dims=(64, 128, 256, 512)).double().eval()
    ours.load_state_dict(theirs.state_dict())
    same(ours, theirs, torch.randn(2, 3, 48, 40, dtype=torch.float64))


@pytest.mark.parametrize("block", BLOCKS)
def test_is_transformers_network(tmp_path, block):
    transformers = pytest.importorskip("transformers")
    expansion = 4 if block == "bottleneck" else 1
    config = transformers.ResNetConfig(
        embedding_size=64, hidden_sizes=[expansion * dim for dim in DIMS], depths=list(DEPTHS), layer_type=block,
        num_labels=5,
    )  # fmt: skip
    theirs = at_random(transformers.ResNetForImageClassification(config))
    theirs.save_pretrained(tmp_path)
    arguments = {"block": block, "depths": DEPTHS, "dims": DIMS, "num_classes": 5}
    ours = glocal.create_model("resnet50", tmp_path, **arguments).double().eval()
    state = from_transformers(theirs.state_dict())
    assert state.keys() == ours.state_dict().keys()
    assert all(torch.equal(ours.state_dict()[name].to(value.dtype), value) for name, value in state.items())
    same(ours, theirs, torch.randn(2, 3, 48, 40, dtype=torch.float64), to_transformers)
    with pytest.raises(ValueError, match=r"^resnet.pooler.weight is not one of this family$"):
        from_transformers({"resnet.pooler.weight": torch.zeros(1)})


# Published sizes


@pytest.mark.parametrize(
    ("name", "parameters", "giga"),
    [
        ("resnet18", 11_689_512, 1.814),
        ("resnet50", 25_557_032, 4.089),
        ("resnet101", 44_549_160, 7.801),
        ("wide_resnet50", 68_883_240, 11.398),
        ("resnet50_stride16", 25_557_032, 6.209),
        ("wide_resnet50_stride16", 68_883_240, 17.41),
    ],
)
def test_parameters_and_multiply_adds(name, parameters, giga):
    with torch.device("meta"):
        model = glocal.create_model(name)
        assert cost.macs(model, torch.zeros(1, 3, 224, 224)) == pytest.approx(giga * 1e9, rel=0.001)
    assert all(p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert sum(p.numel() for p in model.parameters()) == parameters
    theirs = pytest.importorskip("timm").create_model
    with torch.device("meta"):
        other = theirs(name.removesuffix("_stride16").replace("wide_resnet50", "wide_resnet50_2"))
    assert [(k, v.shape) for k, v in other.state_dict().items()] == [
        (k, v.shape) for k, v in model.state_dict().items()
    ]


def test_the_network_for_small_images():
    theirs = pytest.importorskip("torchvision").models.resnet18(num_classes=10)
    theirs.conv1, theirs.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    ours = glocal.create_model("resnet18_cifar")
    assert sum(p.numel() for p in ours.parameters()) == 11_173_962
    assert [info["reduction"] for info in ours.feature_info] == [1, 2, 4, 8]
    with torch.device("meta"):
        assert cost.macs(glocal.create_model("resnet18_cifar"), torch.zeros(1, 3, 32, 32)) == 555_422_720
    theirs.load_state_dict(ours.state_dict())
    same(ours.double(), theirs.double(), torch.randn(2, 3, 32, 20, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet18", "resnet50", "resnet101", "wide_resnet50"])
def test_full_networks_are_torchvisions(name):
    models = pytest.importorskip("torchvision").models
    ours, theirs = (
        glocal.create_model(name).eval(),
        getattr(models, name.replace("50", "50_2") if "wide" in name else name)().eval(),
    )
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        found, expected = ours(image), theirs(image)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_first_values():
    model = small(dims=(64, 64, 64, 64))
    for tensor, fan_out in ((model.conv1.weight, 64 * 49), (model.layer2[0].conv2.weight, 64 * 9)):
        assert tensor.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.05)
    assert (model.layer1[0].bn3.weight == 1).all()


# Methods, training, compilation


@pytest.mark.parametrize("size", [(200, 312), (224, 160), (97, 131), (448, 448), (1, 1)])
def test_any_size(size):
    model = small(dims=(4, 4, 4, 8)).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, *size)).isfinite().all()
        h, w = (-(-n // 32) for n in size)
        assert model.forward_features(torch.randn(1, 3, *size)).shape == (1, h, w, 32)


def test_maps_of_stages():
    ours, theirs = at_random(small()), timms("bottleneck").eval()
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(2, 3, 50, 70, dtype=torch.float64)
    expected = theirs.forward_intermediates(image, intermediates_only=True)[1:]  # theirs begin with the stem
    assert_close(ours.forward_intermediates(image, intermediates_only=True), expected)
    features = small(features_only=True, out_indices=(0, 2)).double().eval()
    names = features.state_dict().keys()
    assert not any(name.startswith(("model.layer4", "model.fc")) for name in names)
    features.load_state_dict({name: ours.state_dict()[name.removeprefix("model.")] for name in names})
    assert_close(features(image), [expected[0], expected[2]])
    assert features.feature_info.channels() == [256, 96] and features.feature_info.reduction() == [4, 16]


@pytest.mark.parametrize("block", BLOCKS)
def test_branches_are_skipped_for_an_image(block):
    part = at_random(small(block, drop_path_rate=0.9)).layer4[0]
    x = torch.randn(64, 4, 4, part.conv1.weight.shape[1], dtype=torch.float64)
    skip = part.downsample(x.movedim(-1, 1)).movedim(1, -1)
    part.drop_path.rate = 0.5
    kept = torch.isclose(part(x), skip.relu()).flatten(1).all(1)  # in evaluation, nothing is skipped
    assert not kept.any()
    part.drop_path.train()
    skipped = torch.isclose(part(x), skip.relu()).flatten(1).all(1)
    assert 16 < skipped.sum() < 48
    rates = [b.drop_path.rate for stage in small(block, drop_path_rate=0.5).stages() for b in stage]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_checkpoints_change_nothing():
    image, found = torch.randn(4, 3, 64, 48, dtype=torch.float64), []
    for checkpointed in (False, True):
        torch.manual_seed(1)
        model = at_random(small(drop_path_rate=0.5)).train()
        model.set_grad_checkpointing(checkpointed)
        torch.manual_seed(2)
        model(image).square().sum().backward()
        found.append(({name: p.grad for name, p in model.named_parameters()}, dict(model.named_buffers())))
    assert_close(found[1], found[0])


def test_what_decay_leaves_alone():
    assert small().no_weight_decay() == set()


def test_convolutions_can_be_looked_into():
    model = small(dims=(8, 8, 8, 8)).eval()
    with glocal.inspect(model) as seen:
        model(torch.randn(1, 3, 32, 40))
    assert [call.name for call in seen][:2] == ["layer1.0.conv2", "layer2.0.conv2"]
    assert all(call.rebuild_error() < 1e-5 for call in seen)


def test_compiles_as_one_graph():
    model = small(depths=(1, 1), dims=(4, 8), block="basic")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    for size in ((32, 48), (33, 23)):
        image = torch.randn(2, 3, *size)
        assert_close(compiled(image), model(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"block": "wide"}, "^resnet50: block: 'wide', must be 'basic' or 'bottleneck'"),
        ({"dims": (4, 8)}, "^resnet50: dims: "),
        ({"depths": (1, 0, 1, 1)}, "^resnet50: depths: 0"),
        ({"width_ratio": 0}, "^resnet50: width_ratio: 0"),
        ({"strides": (1, 2)}, "^resnet50: strides: "),
        ({"middle": None}, "^resnet50: has no argument 'middle'"),
        ({"img_size": (32, 32, 32)}, "^resnet50: img_size: "),
        ({"drop_path_rate": 1}, "^resnet50: drop_path_rate: 1"),
        ({"depth": (1,)}, "^resnet50: has no argument 'depth'; did you mean 'depths'"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)


def test_what_is_no_image():
    with pytest.raises(ValueError, match=r"this network takes images \[B, 3, H, W\]"):
        small()(torch.zeros(2, 1, 32, 48))
