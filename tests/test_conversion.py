"""Convolutions converted to attention against the convolutions themselves."""

import copy

import pytest
import timm
import torch
import torchvision
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import glocal
from glocal.mixers import Convolution, DepthwiseConv, PaddedQuadraticAttention

from .convolutions import KERNELS, relative

FAULTS = {
    "conversion/attention.py": (
        ("float32 is sharp enough for all types", "torch.finfo(dtype).eps", "torch.finfo(torch.float32).eps"),
        ("the padding's kind is lost", '"zeros" if own else part.padding_mode', '"zeros"'),
        ("frozen weights learn", "mixer.requires_grad_(weight.requires_grad)", "pass"),
        ("places of frozen heads learn", "mixer.requires_grad_", "mixer.value.requires_grad_"),
        ("dilation is lost", '"dilation": part.dilation,', '"dilation": 1,'),
        ("layers of one layer are ignored", 'if patterns != ["*"]:', "if False:"),
        ("what is no module is asked for its parts", "if not isinstance(given, nn.Module):", "if False:"),
        ("hooks are lost in silence", "if part._forward_hooks or", "if"),
        ("hooks of gradients are lost", " or part._backward_pre_hooks:", ":"),
        ("parametrizations are lost", "if is_parametrized(part):", "if False:"),
        ("a forward given to one layer is lost", 'if "forward" in vars(part):', "if False:"),
        ("parameters that are shared are parted", "if part is not own:", "if False:"),
        ("parameters of a shared layer count as tied", "if part is not own:", "if name != other:"),
        ("one pattern that matches is enough", "if unmatched or not patterns:", "if not chosen:"),
        ("second names are not seen", "model._modules.items()", "model.named_children()"),
        ("outputs cannot be viewed", "out if last else out.contiguous()", "out"),
        ("channels last is undone", "out if last else out.contiguous()", "out.contiguous()"),
        ("an own forward is passed over", "if type(part).forward is not kind.forward or", "if"),
        ("parts of other operators are converted", "elif not isinstance(part, Operator):", "else:"),
        ("single images lose an axis", "return out[0] if alone else out", "return out"),
        ("new layers are in training", ".train(part.training)\n    return copy", "\n    return copy"),
        ("patterns are taken for names", "fnmatchcase(name, pattern)", "name == pattern"),
    ),
}  # fmt: skip


class NoConvolution(TorchDispatchMode):
    """Every convolution of the library raises, backward ones and those of its parts included."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert "conv" not in function.name(), function.name()
        return function(*args, **(kwargs or {}))


@pytest.fixture
def no_convolution(monkeypatch):
    def called(*args, **kwargs):
        raise AssertionError("a convolution is called")

    for module in (F, torch):
        for name in ("conv1d", "conv2d", "conv3d", "convolution", "conv_transpose1d", "conv_transpose2d", "unfold"):
            if name != "unfold" and hasattr(module, name):
                monkeypatch.setattr(module, name, called)
    with NoConvolution():
        yield


def grid_of(kind):
    return (17,) if kind is nn.Conv1d else (15, 18)


@pytest.mark.parametrize("encoding", ["quadratic", "learned"])
@pytest.mark.parametrize("mode", ["zeros", "replicate", "reflect", "circular"])
@pytest.mark.parametrize(("kind", "options"), KERNELS)
def test_a_layer_is_the_convolution(kind, options, mode, encoding):
    for dtype, allowed in ((torch.float64, 1e-14), (torch.float32, 3e-6)):
        layer = kind(4, 8, **options, padding_mode=mode, dtype=dtype)
        before = copy.deepcopy(layer.state_dict())
        found = glocal.to_attention(layer, encoding=encoding)
        x = torch.randn(3, 4, *grid_of(kind), dtype=dtype)
        expected = layer(x)
        for out in (found(x), found(x[0])[None]):
            assert out.dtype == dtype
            assert relative(out, expected[: len(out)]) < allowed
        with torch.no_grad():
            assert relative(found(x), expected) < allowed
            assert relative(found(x[1]), layer(x[1])) < allowed and found(x[1]).shape == layer(x[1]).shape
        assert all(torch.equal(value, before[name]) for name, value in layer.state_dict().items())
        rows = found.mixer.weights(x.movedim(1, -1)).weights.sum(-1)
        assert_close(rows, torch.ones_like(rows))


def test_parameters_are_the_convolutions_and_three_for_each_head():
    for groups in (1, 4, 8):
        layer = nn.Conv2d(8, 16, (3, 5), groups=groups)
        mixer = glocal.to_attention(layer).mixer
        own = sum(p.numel() for p in layer.parameters())
        assert isinstance(mixer, PaddedQuadraticAttention) and mixer.num_heads == 15
        assert sum(p.numel() for p in mixer.parameters()) == own + 15 * 3
        assert mixer.centers.shape == (15, 2) and mixer.spreads.shape == (15,)
    layer = nn.Conv1d(8, 8, 3, padding=1, dilation=2)
    mixer = glocal.to_attention(layer).mixer
    assert sum(p.numel() for p in mixer.parameters()) == 8 * 8 * 3 + 8 + 3 * 2
    assert mixer.centers.tolist() == [[-1.0], [1.0], [3.0]]  # tap * dilation - padding


@pytest.mark.parametrize("encoding", ["quadratic", "learned"])
@pytest.mark.parametrize("alpha", [None, 3.0])
def test_no_convolution_is_called(no_convolution, encoding, alpha):
    """Forward and backward, on the taps and off them."""
    with torch.random.fork_rng():
        net = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8), nn.Conv2d(8, 4, 1))
    found = glocal.to_attention(net, encoding=encoding, alpha=alpha)
    assert not any(isinstance(part, nn.Conv2d) for part in found.modules())
    x = torch.randn(2, 3, 12, 13, requires_grad=True)
    found(x).sum().backward()
    assert x.grad.abs().max() > 0
    with torch.no_grad():
        found(x)
    with pytest.raises(AssertionError):
        net(x)


def test_alpha_is_as_large_as_exactness_needs():
    """Half of it shows in the output."""
    for dtype, encoding, expected in (
        (torch.float32, "quadratic", 20),
        (torch.float64, "quadratic", 41),
        (torch.float32, "learned", 26),
        (torch.bfloat16, "quadratic", 9),
    ):
        layer = nn.Conv2d(8, 8, 3, padding=1, dtype=dtype)
        assert glocal.to_attention(layer, encoding=encoding).mixer.alpha == expected
        exact, x = copy.deepcopy(layer).double(), torch.randn(1, 8, 30, 30, dtype=torch.float64)
        rounding = 4 * torch.finfo(dtype).eps
        sharp, blurred = (glocal.to_attention(exact, encoding=encoding, alpha=a) for a in (expected, expected / 2))
        assert relative(sharp(x), exact(x)) < rounding < relative(blurred(x), exact(x))


def randomised(net):
    for part in net.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(std=0.3)
            part.running_var.uniform_(0.5, 1.5)
    return net.eval()


NETWORKS = {
    "resnet18": lambda: torchvision.models.resnet18(num_classes=10),
    "mobilenet_v2": lambda: torchvision.models.mobilenet_v2(num_classes=10, width_mult=0.35),
    "convnext_atto": lambda: timm.create_model("convnext_atto", num_classes=10),
    "ours": lambda: glocal.Backbone("C-Convolution()-DepthwiseConv()-T", in_chans=3, num_classes=10, img_size=(64, 72)),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_gives_the_same_and_trains_on(name):
    net = randomised(NETWORKS[name]())
    before = copy.deepcopy(net.state_dict())
    for dtype, allowed in ((torch.float32, 1e-4), (torch.float64, 1e-9)):
        net = net.to(dtype)
        found = glocal.to_attention(net)
        x = torch.randn(2, 3, 64, 72, dtype=dtype)
        with torch.no_grad():
            expected = net(x)
            assert relative(found(x), expected) < allowed
        assert relative(found(x), expected) < allowed
        report = glocal.compare_conversion(net, found, x)
        assert len(report.layers) == sum(isinstance(p, nn.Conv2d | DepthwiseConv | Convolution) for p in net.modules())
        assert max(report.error, *(layer.error for layer in report.layers)) < allowed
    assert all(torch.equal(value.to(before[key].dtype), before[key]) for key, value in net.state_dict().items())
    back = glocal.to_convolution(found)
    assert repr(back) == repr(net)
    assert list(back.state_dict()) == list(net.state_dict())
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in back.state_dict().items())

    moving = glocal.to_attention(net.float(), alpha=2.0).train()
    loss = F.cross_entropy(moving(x.float()), torch.tensor([1, 2]))
    loss.backward()
    learned = {key: p.grad for key, p in moving.named_parameters() if key.endswith(("centers", "spreads", "value"))}
    still = [key for key, grad in learned.items() if not grad.any()]
    assert len(learned) == 3 * len(report.layers)
    # where a batch norm or the mean over the grid follows, or the grid is one place, nothing depends on some of them
    assert len(still) < len(learned) / 4, still


def test_chosen_layers_only():
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1)), nn.Conv2d(4, 4, 1))
    for layers, expected in (("1.*", {"1.0", "1.1"}), (["0", "1.1"], {"0", "1.1"}), ("*", {"0", "1.0", "1.1", "2"})):
        found = glocal.to_attention(net, layers=layers)
        done = {name.removesuffix(".mixer") for name, part in found.named_modules() if name.endswith(".mixer")}
        assert done == expected
    with pytest.raises(ValueError, match=r"layers: no convolution of this Sequential matches 'stem'; it has 0, 1.0"):
        glocal.to_attention(net, layers="stem")
    with pytest.raises(ValueError, match=r"layers: no convolution of this Sequential matches '3\.\*'; it has"):
        glocal.to_attention(net, layers=["0", "3.*"])
    with pytest.raises(ValueError, match=r"layers: .* matches \[\]"):
        glocal.to_attention(net, layers=[])
    with pytest.raises(ValueError, match=r"no convolution of this Linear matches .*; it has none"):
        glocal.to_attention(nn.Linear(3, 3))


def test_what_networks_share_or_freeze_stays_so():
    conv = nn.Conv2d(4, 4, 3, padding=1).requires_grad_(False).eval()
    net = nn.ModuleDict({"a": conv, "b": nn.Sequential(conv, nn.BatchNorm2d(4))}).train()
    conv.eval()
    found = glocal.to_attention(net)
    assert found["a"] is found["b"][0] and net["a"] is conv
    assert not found["a"].training and found["b"][1].training
    assert not any(p.requires_grad for p in found["a"].parameters())
    twice = glocal.to_attention(nn.Sequential(conv, nn.ReLU(), conv), layers="2")
    assert twice[0] is twice[2] is not conv
    back = glocal.to_convolution(found)
    assert back["a"] is back["b"][0] and not back["a"].weight.requires_grad and not back["a"].training


def test_a_frozen_weight_leaves_its_bias_to_learn():
    conv = nn.Conv2d(4, 4, 3)
    conv.weight.requires_grad_(False)
    for encoding in ("quadratic", "learned"):
        found = glocal.to_attention(conv, encoding=encoding)
        assert [name for name, p in found.named_parameters() if p.requires_grad] == ["mixer.bias"]


def test_tied_parameters_are_not_parted():
    net = nn.ModuleDict({"a": nn.Conv1d(4, 4, 1), "b": nn.Conv1d(4, 4, 1), "c": nn.ConvTranspose1d(4, 4, 1)})
    net["c"].weight = net["a"].weight
    with pytest.raises(ValueError, match=r"^a: Conv1d shares a parameter with c, .*leave it out by layers="):
        glocal.to_attention(net, layers=["a", "b"])
    net["c"].bias = net["b"].bias
    with pytest.raises(ValueError, match=r"^b: Conv1d shares a parameter with c"):
        glocal.to_attention(net, layers="b")


@pytest.mark.parametrize(("kind", "grid"), [(nn.Conv1d, (9,)), (nn.Conv2d, (9, 7))])
@pytest.mark.parametrize("encoding", ["quadratic", "learned"])
def test_what_comes_out_is_laid_out_as_the_convolutions(kind, grid, encoding):
    layer = kind(4, 6, 3, padding=1)
    found = glocal.to_attention(layer, encoding=encoding)
    x = torch.randn(2, 4, *grid)
    given = [x, x[0], x[:1], x[..., 1::2], x.transpose(-1, -2).contiguous().transpose(-1, -2) if len(grid) == 2 else x]
    if len(grid) == 2:
        given.append(x.to(memory_format=torch.channels_last))
    for tokens in given:
        for learning in (True, False):
            with torch.set_grad_enabled(learning):
                assert found(tokens).stride() == layer(tokens).stride()
    assert found(x).view(2, -1).shape[1] == 6 * x[0, 0].numel()


@pytest.mark.parametrize("kind", [nn.Conv2d, Convolution])
def test_autocast_rounds_what_comes_out_as_convolutions_do(kind):
    layer = kind(4, kernel_size=3) if kind is Convolution else kind(4, 4, 3)
    x = torch.randn(2, 6, 6, 4) if kind is Convolution else torch.randn(2, 4, 6, 6)
    found = glocal.to_attention(layer)
    for impl in ("auto", "reference"):
        (found if kind is Convolution else found.mixer).impl = impl
        with torch.autocast("cpu", torch.bfloat16):
            assert found(x).dtype == layer(x).dtype == torch.bfloat16
        assert relative(found(x), layer(x)) < 1e-5


def test_shapes_may_be_asked_for_without_memory():
    found = glocal.to_attention(nn.Conv2d(4, 6, 3, stride=2, device="meta"))
    assert found(torch.empty(2, 4, 9, 8, device="meta")).shape == (2, 6, 4, 3)


@pytest.mark.parametrize("convert", [glocal.to_attention, glocal.to_convolution])
@pytest.mark.parametrize("given", [5, None, "resnet18", [nn.Conv2d(3, 3, 1)]])
def test_what_is_no_module_is_refused(convert, given):
    with pytest.raises(ValueError, match=rf"^\w+: a {type(given).__name__}, must be a torch.nn.Module"):
        convert(given)


@pytest.mark.parametrize("layers", ["1", "", [], ["*", "1"]])
def test_of_one_layer_none_are_chosen(layers):
    with pytest.raises(ValueError, match=r"^layers: .*, this Conv2d is one layer; leave layers out$"):
        glocal.to_attention(nn.Conv2d(3, 3, 1), layers=layers)
    glocal.to_attention(nn.Conv2d(3, 3, 1), layers=["*"])


def test_parts_of_other_operators_are_theirs():
    net = nn.Sequential(glocal.build("LargeKernelConv()", 8), glocal.build("Convolution()", 8))
    found = glocal.to_attention(net)
    assert repr(found[0]) == repr(net[0]) and isinstance(found[1], PaddedQuadraticAttention)
    x = torch.randn(1, 6, 6, 8)
    assert relative(found(x), net(x)) < 1e-5


class Standardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def forwarded(layer):
    layer.forward = lambda x: layer._conv_forward(2 * x, layer.weight, layer.bias)
    return layer


class Named(nn.Conv2d):
    """A name, and nothing else."""


@pytest.mark.parametrize(
    ("part", "words"),
    [
        (lambda: nn.ConvTranspose2d(3, 3, 2), "ConvTranspose2d is transposed"),
        (lambda: nn.Conv3d(3, 3, 2), "Conv3d is no convolution of sequences or images"),
        (lambda: nn.LazyConv2d(3, 2), "LazyConv2d is lazy and has no weights yet"),
        (lambda: Standardised(3, 3, 2), "Standardised computes in a way of its own"),
        (lambda: timm.layers.StdConv2d(3, 3, 2), "StdConv2d computes in a way of its own"),
        (lambda: timm.layers.Conv2dSame(3, 3, 2), "Conv2dSame computes in a way of its own"),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(3, 3, 2)), "ParametrizedConv2d is parametrized"),
        (lambda: forwarded(nn.Conv2d(3, 3, 2)), "Conv2d computes in a way of its own"),
        (lambda: nn.Conv2d(3, 3, 2, dtype=torch.complex64), "has weights of torch.complex64"),
        (lambda: glocal.build("DepthwiseConv(causal=True, rank=1)", 3), "DepthwiseConv is causal"),
        (lambda: glocal.build("DepthwiseConv(num_groups=2)", 4), "DepthwiseConv shares kernels between channels"),
        (lambda: glocal.build("DepthwiseConv(kernel_size=(3, 4))", 3), "DepthwiseConv has an even kernel"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(part, words):
    with pytest.raises(ValueError, match=words) as error:
        glocal.to_attention(part())
    assert "layers=" not in str(error.value)  # a layer alone cannot be left out
    net = nn.Sequential(nn.Conv2d(3, 3, 1), part())
    with pytest.raises(ValueError, match=f"^1: {'Conv2d' if words[:3] == 'has' else words.split()[0]} .*leave it out"):
        glocal.to_attention(net)
    assert type(glocal.to_attention(net, layers="0")[1]) is type(net[1])


@pytest.mark.parametrize("kind", [nn.Conv2d, Convolution])
@pytest.mark.parametrize("when", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_are_not_lost(kind, when):
    conv = kind(3, kernel_size=1) if kind is Convolution else kind(3, 3, 1)
    getattr(conv, f"register_{when}_hook")(lambda *_: None)
    with pytest.raises(ValueError, match="has hooks"):
        glocal.to_attention(conv)


def test_subclasses_that_compute_as_their_class_does_are_converted():
    lazy = nn.LazyConv2d(4, 3)
    x = torch.randn(2, 3, 6, 6)
    lazy(x)
    for layer in (lazy, Named(3, 4, 3)):
        assert relative(glocal.to_attention(layer)(x), layer(x)) < 1e-5


@pytest.mark.parametrize(("arguments", "words"), [({"encoding": "linear"}, "encoding"), ({"alpha": -1}, "alpha")])
def test_wrong_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=f"^{words}: "):
        glocal.to_attention(nn.Conv2d(3, 3, 1), **arguments)
