"""Attention converted back to the convolutions that it was made of; and the table of what was done."""

import re

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import glocal
from glocal.mixers import PaddedLearnedAttention, PaddedQuadraticAttention

from .convolutions import KERNELS, relative

FAULTS = {
    "conversion/convolution.py": (
        ("heads on one tap replace each other", ".index_add_(0,", ".index_copy_(0,"),
        ("heads are taken in their order", "taps[name], missed = _taps(_mixer(part), tolerance)",
         "taps[name], missed = _taps(_mixer(part), tolerance)\n        taps[name] = list(range(len(taps[name])))"),
        ("heads nowhere are looked for", "if _mixer(part).value.is_meta:", "if False:"),
        ("any share passes", "elif not share <= tolerance:", "elif False:"),
        ("only the last axis counts", "kept = kept * most", "kept = most"),
        ("places off the kernel pass", "if place not in order:", "if False:"),
        ("bias is lost", "made.bias.copy_(mixer.bias)", "pass"),
        ("layers in networks become ours", "_of_torch(mixer, weight) if isinstance", "_of_ours(mixer) if isinstance"),
    ),
    "conversion/table.py": (
        ("errors are absolute", " / expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)", ""),
        ("layers are compared on another input", "relative_error(new.eval()(x)", "relative_error(new.eval()(x + 1)"),
        ("the last call of a layer hides the others", "max(error, found[name].error) if name in found else error",
         "error"),
        ("hooks stay", "hook.remove()", "pass"),
        ("multiply-adds are of the input's grid", "mixer.out_grid(grid)).numel()", "grid).numel()"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("encoding", ["quadratic", "learned"])
@pytest.mark.parametrize(("kind", "options"), KERNELS)
def test_a_layer_comes_back_bit_by_bit(kind, options, encoding):
    for mode in ("zeros", "reflect"):
        layer = kind(4, 8, **options, padding_mode=mode).eval()
        back = glocal.to_convolution(glocal.to_attention(layer, encoding=encoding))
        assert repr(back) == repr(layer) and not back.training
        assert all(torch.equal(value, back.state_dict()[name]) for name, value in layer.state_dict().items())


@pytest.mark.parametrize(
    "spec", ["Convolution(kernel_size=(3, 5), groups=2, stride=2)", "DepthwiseConv(dilation=2, bias=False)"]
)
def test_ours_come_back_as_ours(spec):
    mixer = glocal.build(spec, 8)
    found = glocal.to_attention(mixer)
    assert isinstance(found, PaddedQuadraticAttention)
    x = torch.randn(1, 9, 12, 8)
    assert relative(found(x), mixer(x)) < 1e-5
    back = glocal.to_convolution(found)
    assert repr(back) == repr(mixer) and torch.equal(back.weight, mixer.weight)
    with pytest.raises(ValueError, match="no convolution of ours"):
        glocal.to_convolution(glocal.build("PaddedQuadraticAttention(kernel_size=2, alpha=20.0)", 8))


def test_heads_may_change_places():
    layer = nn.Conv2d(4, 6, 3, padding=1, groups=2).double()
    found = glocal.to_attention(layer)
    mixer, x = found.mixer, torch.randn(2, 4, 7, 8, dtype=torch.float64)
    with torch.no_grad():
        order = torch.randperm(9)
        mixer.centers.copy_(mixer.centers[order])
        mixer.centers[2] = mixer.centers[5]  # two on one tap, none on another
        mixer.centers += 1e-4 * torch.randn_like(mixer.centers)
        mixer.spreads[:4] *= 1.5
        back = glocal.to_convolution(found)
        assert relative(back(x), found(x)) < 1e-12
        assert (back.weight.flatten(2).abs().sum((0, 1)) == 0).sum() == 1


def test_heads_off_their_taps_are_named():
    net = nn.Sequential(nn.Conv2d(2, 2, 3, padding=1), nn.Conv1d(2, 2, 5))
    found = glocal.to_attention(net, alpha=8.0)
    with pytest.raises(ValueError, match=r"0: head 0 gives 0.0013 of its weight to places beside its tap \(-1, -1\)"):
        glocal.to_convolution(found)
    assert glocal.to_convolution(found, tolerance=0.002)
    with torch.no_grad():
        found[0].mixer.centers[4, 1] += 0.3
    share = 2 * 2.718281828459045**-8.0  # beside the tap along the other axis
    moved = [2.718281828459045 ** (-8 * (n - 0.3) ** 2) for n in range(-3, 4)]
    expected = 1 - (1 - share) * moved[3] / sum(moved)
    with pytest.raises(ValueError, match=r"tolerance, 0.002") as said:
        glocal.to_convolution(found, tolerance=0.002)
    name, head, given = re.match(r"(\d): head (\d) gives (\S+) of", str(said.value)).groups()
    assert (name, head) == ("0", "4") and float(given) == pytest.approx(expected, rel=0.05)
    assert "(centre 0, 0.3; spread 4)" in str(said.value)
    with torch.no_grad():
        found[0].mixer.centers[4, 1] = 3.0
        found[1].mixer.centers[0] = -1.0
    with pytest.raises(ValueError, match=r"0: head 4 sits at \(0, 3\), which is no tap .*1: head 0 sits at \(-1,\)"):
        glocal.to_convolution(found, tolerance=0.002)
    with pytest.raises(ValueError, match="holds none"):
        glocal.to_convolution(net)


def test_learned_heads_off_their_taps_are_named():
    found = glocal.to_attention(nn.Conv2d(2, 2, 3, padding=1), encoding="learned")
    assert isinstance(found.mixer, PaddedLearnedAttention)
    with torch.no_grad():
        found.mixer.tables[1][3] = 0.0
    with pytest.raises(ValueError, match=r"^head 3 (sits|gives)"):
        glocal.to_convolution(found)


# The table.


def test_the_table_says_what_was_done():
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 8, 5, groups=8, padding=2, bias=False), nn.Conv2d(8, 4, 1)
    )
    found, x = glocal.to_attention(net, alpha=3.0), torch.randn(2, 3, 15, 20)
    report = glocal.compare_conversion(net, found, x)
    assert [(a.name, a.heads) for a in report.layers] == [("0", 9), ("1", 25), ("2", 1)]
    with FlopCounterMode(display=False) as counter:
        net(x[:1])
    assert sum(a.macs_before for a in report.layers) == counter.get_total_flops() // 2
    with torch.no_grad():
        for part in found:
            part.mixer.centers += 0.1 * torch.rand_like(part.mixer.centers)
    with FlopCounterMode(display=False) as counter:
        found(x[:1])
    products = [a.macs for a in report.layers]
    products[1] -= 8 * 10 * 25 * 8  # depthwise values are no matrix products
    assert sum(products) == counter.get_total_flops() // 2
    assert [a.params for a in report.layers] == [224 + 27, 200 + 75, 36 + 3]
    assert report.params_before == 224 + 200 + 36 and report.params == report.params_before + 105
    text = str(report)
    assert "3 -> 8, 3x3, stride 2" in text and "8 -> 8, 5x5, depthwise" in text and len(text.splitlines()) == 6

    moved = glocal.compare_conversion(net, found, x)
    for layer, (conv, attention) in zip(moved.layers, zip(net, found, strict=True), strict=True):
        given = net[: int(layer.name)](x)
        assert layer.error == pytest.approx(relative(attention(given), conv(given)), rel=1e-3) and layer.error > 1e-3
    assert moved.error == pytest.approx(relative(found(x), net(x)), rel=1e-3)
    assert not any(part._forward_hooks for part in net) and net.training
    with pytest.raises(ValueError, match="after: holds no attention where this Sequential has a convolution"):
        glocal.compare_conversion(net, net, x)


def test_a_layer_that_runs_twice_has_its_largest_error():
    conv = nn.Conv2d(2, 2, 3, padding=1)
    net = nn.Sequential(conv, nn.Threshold(100.0, 0.0), conv)  # the second time it sees zeros
    found = glocal.to_attention(net, alpha=3.0)
    with torch.no_grad():
        found[0].mixer.centers += 0.3
    report = glocal.compare_conversion(net, found, torch.randn(1, 2, 9, 9))
    assert [a.name for a in report.layers] == ["0"] and report.layers[0].error > 0.1


def test_a_layer_may_be_called_by_keyword():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Conv2d(2, 2, 3)

        def forward(self, x):
            return self.layer(input=x)

    net = Net()
    (row,) = glocal.compare_conversion(net, glocal.to_attention(net), torch.randn(1, 2, 9, 9)).layers
    assert row.name == "layer" and row.error < 1e-5


def test_the_way_back_needs_to_know_where_heads_sit():
    layer = glocal.to_attention(nn.Conv2d(4, 6, 3, device="meta"))
    with pytest.raises(ValueError, match=r"^attention: is on the meta device, .*\(to_empty\) and values first$"):
        glocal.to_convolution(layer)
    with pytest.raises(ValueError, match=r"^1: is on the meta device"):
        glocal.to_convolution(nn.Sequential(nn.ReLU(), layer))
