"""Convolutions converted to attention with gates: the same at the start, no longer once training has opened them."""

import copy
import re
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import glocal
from glocal.analysis.heads import quadratic_heads
from glocal.mixers import Convolution, DepthwiseConv, GatedPaddedAttention

from .convolutions import relative

FAULTS = {
    "conversion/attention.py": (
        ("gates are given to nobody", "asked = positive(", "asked = None and positive("),
        ("the width of queries is passed over", "_HEAD_DIM if head_dim is None else head_dim", "_HEAD_DIM"),
        ("a width without gates is passed over", "if head_dim is not None and not flag(", "if False and not flag("),
        ("one encoding behind gates", "gated(dim, encoding=encoding,", "gated(dim, encoding='quadratic',"),
        ("kernels stay random", "position.value.copy_(heads_of_kernel(weight, groups))", "pass"),
        ("biases stay random", "position.bias.copy_(bias)", "pass"),
    ),
    "conversion/convolution.py": (
        ("open gates pass", "missed += _open(part, tolerance)", "pass"),
        ("gates half open pass", "if not share <= tolerance\n    ]", "if not share <= 0.5\n    ]"),
        ("what is behind gates is converted by itself", '("mixer", "mixer.position", "position")', '("mixer",)'),
    ),
    "conversion/table.py": (
        ("queries and keys are not counted", "sum(p.numel() for p in new.parameters()),",
         "sum(p.numel() for p in mixer.parameters()),"),
        ("the content's multiply-adds are not counted", "whole.macs_by_axes(grid),", "mixer.macs_by_axes(grid),"),
    ),
    "analysis/heads.py": (("heads behind gates have names of their own", "name = around", "pass"),),
}  # fmt: skip

KERNELS = [
    (nn.Conv1d, {"kernel_size": 4, "stride": 3, "padding": 2}),
    (nn.Conv1d, {"kernel_size": 3, "dilation": 4, "padding": "same", "groups": 2}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "groups": 4}),
    (nn.Conv2d, {"kernel_size": (2, 5), "stride": (1, 2), "padding": (0, 3), "dilation": (3, 1)}),
    (nn.Conv2d, {"kernel_size": 3, "stride": 2, "padding": "valid", "bias": False}),
]


@pytest.mark.parametrize("encoding", ["quadratic", "learned"])
@pytest.mark.parametrize("mode", ["zeros", "replicate", "reflect", "circular"])
@pytest.mark.parametrize(("kind", "options"), KERNELS)
def test_a_layer_starts_as_the_convolution(kind, options, mode, encoding):
    for dtype, allowed in ((torch.float64, 1e-14), (torch.float32, 3e-6)):
        layer = kind(4, 8, **options, padding_mode=mode, dtype=dtype)
        found = glocal.to_attention(layer, encoding=encoding, gated=True, head_dim=8)
        assert isinstance(found.mixer, GatedPaddedAttention) and found.mixer.encoding == encoding
        x = torch.randn(2, 4, *((17,) if kind is nn.Conv1d else (11, 13)), dtype=dtype)
        expected = layer(x)
        assert found(x).dtype == dtype and relative(found(x), expected) < allowed
        assert relative(found(x[0]), expected[0]) < allowed
        with torch.no_grad():
            assert relative(found(x), expected) < allowed


def test_parameters_are_queries_keys_and_a_gate_more():
    layer = nn.Conv2d(8, 16, (3, 5), groups=4)
    for given, width in (({}, 32), ({"head_dim": 6}, 6)):
        mixer = glocal.to_attention(layer, gated=True, **given).mixer
        own = sum(p.numel() for p in layer.parameters())
        assert sum(p.numel() for p in mixer.parameters()) == own + 15 * 3 + 15 + 2 * 8 * 15 * width
        assert mixer.head_dim == width and not mixer.gate.any()
        assert mixer.position.centers.tolist() == glocal.to_attention(layer).mixer.centers.tolist()


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(),
        nn.Conv2d(8, 8, 3, stride=2, padding=1, groups=8), nn.ReLU(),
        nn.Conv2d(8, 12, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(12, 4),
    ).double()  # fmt: skip


def test_a_network_starts_as_it_was_and_training_opens_the_gates():
    net, x = small(), torch.randn(16, 3, 12, 10, dtype=torch.float64)
    labels = torch.arange(16) % 4
    found = glocal.to_attention(net, gated=True, head_dim=8)
    for training in (False, True):
        assert relative(found.train(training)(x), net.train(training)(x)) < 1e-9
    gates = [part.mixer.gate for part in found if hasattr(part, "mixer")]
    assert len(gates) == 3 and not any(gate.any() for gate in gates)
    optimizer, losses = torch.optim.Adam(found.parameters(), lr=0.03), []
    for _ in range(11):
        losses.append(F.cross_entropy(found(x), labels))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[10] < losses[0] - 0.05
    for gate in gates:
        assert gate.all() and gate.abs().max() > 0.02  # two steps' worth
    with pytest.raises(
        ValueError, match=r"0: head 0 takes 0\.\d+ of its weight by content \(its gate is open, -?0\.\d+"
    ):
        glocal.to_convolution(found)


def test_gates_alone_lower_the_loss():
    """Everything that the convolution has stays as it is."""
    net, x = small().eval(), torch.randn(16, 3, 12, 10, dtype=torch.float64)
    found, target = glocal.to_attention(net, gated=True).requires_grad_(False), torch.randn(16, 4, dtype=torch.float64)
    gates = [part.mixer.gate.requires_grad_() for part in found if hasattr(part, "mixer")]
    losses = []
    for _ in range(10):
        losses.append((found(x) - target).square().mean())
        for gate, grad in zip(gates, torch.autograd.grad(losses[-1], gates), strict=True):
            gate.data -= 0.1 * grad
    assert all(after < before for before, after in pairwise(losses))


@pytest.mark.parametrize("encoding", ["quadratic", "learned"])
def test_is_taken_back_while_gates_are_shut(encoding):
    net = small()
    found = glocal.to_attention(net, gated=True, encoding=encoding)
    back = glocal.to_convolution(found)
    assert repr(back) == repr(net)
    assert all(torch.equal(value, net.state_dict()[key]) for key, value in back.state_dict().items())
    with torch.no_grad():
        found[5].mixer.gate[0] = -0.4
        words = re.escape("5: head 0 takes 0.38 of its weight by content (its gate is open, -0.4); the largest share")
        with pytest.raises(ValueError, match=words):
            glocal.to_convolution(found)
        assert repr(glocal.to_convolution(found, tolerance=0.5)) == repr(net)
        found[5].mixer.gate[0] = 1e-5
        glocal.to_convolution(found)
        if encoding == "quadratic":
            found[3].mixer.position.centers[4, 0] += 0.5
            with pytest.raises(ValueError, match=r"3: head 4 gives 0\.5 of its weight to places beside its tap"):
                glocal.to_convolution(found)


def test_kernels_that_ours_are_none_of_are_taken_back_whole():
    net = nn.Sequential(
        nn.Conv2d(3, 4, 2, padding=1, padding_mode="reflect"), nn.ReLU(), nn.Conv2d(4, 4, (2, 3), (1, 2))
    )
    back = glocal.to_convolution(glocal.to_attention(net, gated=True))
    assert repr(back) == repr(net) and torch.equal(back[2].weight, net[2].weight)


def test_ours_become_ours_and_back():
    for layer in (Convolution(8, kernel_size=3, out_dim=6, stride=2), DepthwiseConv(8, kernel_size=(3, 5))):
        layer.eval()
        found = glocal.to_attention(layer, gated=True)
        assert isinstance(found, GatedPaddedAttention) and not found.training
        x = torch.randn(2, 9, 10, 8)
        assert relative(found(x), layer(x)) < 1e-5
        back = glocal.to_convolution(found)
        assert repr(back) == repr(layer) and torch.equal(back.weight, layer.weight)
        held = glocal.to_convolution(nn.Sequential(found))
        assert repr(held[0]) == repr(layer)


def test_what_is_frozen_stays_so():
    conv = nn.Conv2d(4, 4, 3)
    conv.weight.requires_grad_(False)
    found = glocal.to_attention(conv, gated=True)
    assert [name for name, p in found.named_parameters() if p.requires_grad] == ["mixer.position.bias"]


def test_the_table_counts_all_of_it():
    net, x = small().eval(), torch.randn(2, 3, 12, 10, dtype=torch.float64)
    plain = glocal.compare_conversion(net, glocal.to_attention(net), x)
    found = glocal.compare_conversion(net, glocal.to_attention(net, gated=True, head_dim=4), x)
    assert found.error < 1e-9 and max(row.error for row in found.layers) < 1e-9
    for a, b, (dim, out, queries, sources) in zip(
        plain.layers, found.layers, [(3, 8, 120, 120), (8, 1, 30, 120), (8, 12, 30, 30)], strict=True
    ):
        assert (b.name, b.heads, b.params_before) == (a.name, a.heads, a.params_before)
        assert b.params == a.params + a.heads + 2 * dim * a.heads * 4
        asked = a.heads * 4 * (dim * (queries + sources) + queries * sources)
        assert b.macs == a.macs + asked + queries * a.heads * dim * (sources + out)


def test_heads_have_the_names_of_their_layers():
    found = glocal.to_attention(small(), gated=True)
    told = quadratic_heads(found)
    assert list(told) == ["0.mixer", "3.mixer", "5.mixer"] and len(told["0.mixer"]["centers"]) == 9
    assert list(quadratic_heads(found[0].mixer)) == [""]


def test_copies_and_weights_go_on():
    found = glocal.to_attention(small(), gated=True).eval()
    with torch.no_grad():
        found[0].mixer.gate.fill_(0.2)
    again, x = copy.deepcopy(found), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    fresh = glocal.to_attention(small(), gated=True).eval()
    assert relative(fresh(x), found(x)) > 1e-3
    fresh.load_state_dict(found.state_dict())
    assert torch.equal(again(x), found(x)) and torch.equal(fresh(x), found(x))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"head_dim": 8}, "head_dim: 8, is that of attention by content; give gated=True too"),
        ({"gated": True, "head_dim": 0}, "head_dim: 0, must be a positive whole number"),
        ({"gated": "yes"}, "gated: 'yes', must be True or False"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    with pytest.raises(ValueError, match=words):
        glocal.to_attention(nn.Conv2d(4, 4, 3), **options)
