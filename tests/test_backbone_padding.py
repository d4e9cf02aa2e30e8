"""Padded batches through whole networks: every image and signal as if it were alone."""

import pytest
import torch

import glocal
from glocal import contract
from glocal.backbone import parse_layout

from .backbones import NO_ENTRIES, backbone, entry, random

PADDED = [
    "C-LSTM(bidirectional=True)-T-T",
    "C-GRU()-C-DepthwiseConv(kernel_size=5)",
    "NeighborhoodAttention(kernel_size=3)-AveragePooling(kernel_size=3)-WindowAttention(window_size=4)-MaxPooling()",
]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"conv": {"stride_in": "depthwise", "pool": "avg"}},
        {"conv": {"stride_in": "pool", "se_early": True, "pre_activation": True}},
        {"skip": False},
    ],
)
@pytest.mark.parametrize("layout", PADDED)
def test_padding_leaves_signals_alone_through_the_whole_network(layout, options):
    """Scores and features of every signal, forward and backward, as if it were alone."""
    strides = (2, 2, 1, 2)[: len(parse_layout(layout))]
    net = backbone(layout, img_size=(40,), in_chans=2, strides=strides, dims=(32, 64, 64, 64), **options)
    net = random(net).eval()
    lengths = (40, 23, 9, 1)
    x, valid = torch.randn(4, 2, 40, dtype=torch.float64), torch.arange(40) < torch.tensor(lengths)[:, None]
    padded = x.masked_fill(~valid[:, None], torch.nan)
    scores, features = net(padded, valid), net.features(padded, valid)
    weights = list(net.parameters())
    upstream = torch.randn_like(scores)
    alone = torch.cat([net(x[b : b + 1, :, :n]) for b, n in enumerate(lengths)])
    torch.testing.assert_close(scores, alone, rtol=1e-9, atol=1e-10)
    for b, n in enumerate(lengths):
        for found, expected, info in zip(features, net.features(x[b : b + 1, :, :n]), net.feature_info, strict=True):
            real = valid[b, :: info["reduction"]]
            assert real.sum() == expected.shape[1]
            torch.testing.assert_close(found[b, : expected.shape[1]], expected[0], rtol=1e-9, atol=1e-10)
    got, wanted = (torch.autograd.grad(y, weights, upstream) for y in (scores, alone))
    for one, other in zip(got, wanted, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("operator", glocal.available())
def test_every_operator_takes_padded_signals_or_says_so(operator):
    specs = [spec for spec in getattr(glocal.mixers, operator).examples if contract.fits(spec, (50,))]
    if operator in NO_ENTRIES or not specs:
        return
    net = random(backbone(f"C-{entry(operator)}-C", img_size=(50,), dims=(32, 64, 64), strides=(1, 2, 1))).eval()
    x, valid = torch.randn(2, 1, 50, dtype=torch.float64), torch.arange(50) < torch.tensor([50, 27])[:, None]
    try:
        scores = net(x.masked_fill(~valid[:, None], torch.nan), valid)
    except ValueError as error:
        assert str(error).startswith(f"{operator}: ") and "padding" in str(error)
        return
    alone = torch.cat([net(x[:1]), net(x[1:, :, :27])])
    torch.testing.assert_close(scores, alone, rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("pool", ["max", "avg"])
def test_padding_leaves_images_alone_through_the_whole_network(pool):
    net = backbone("C-NeighborhoodAttention(kernel_size=3)-T", img_size=24, strides=(2, 1, 2), conv={"pool": pool})
    net = random(net).eval()
    x, valid = torch.randn(3, 1, 24, 20, dtype=torch.float64), torch.zeros(3, 24, 20, dtype=torch.bool)
    sizes = ((24, 20), (13, 20), (7, 5))
    for b, (rows, columns) in enumerate(sizes):
        valid[b, :rows, :columns] = True
    scores = net(torch.where(valid[:, None], x, torch.inf), valid)
    for b, (rows, columns) in enumerate(sizes):
        torch.testing.assert_close(scores[b], net(x[b : b + 1, :, :rows, :columns])[0], rtol=1e-9, atol=1e-10)


def test_padding_does_not_count_in_training():
    """What lies in the padding, and how much of it there is, changes no score and no statistic."""
    found = []
    x, valid = torch.randn(4, 2, 40, dtype=torch.float64), torch.arange(40) < torch.tensor([30, 23, 9, 17])[:, None]
    for end, filled in ((40, 100.0), (40, torch.nan), (30, 0.0), (33, -1.0)):
        torch.manual_seed(0)
        net = random(backbone(PADDED[1], img_size=(40,), in_chans=2, strides=(2, 1, 2, 1))).train()
        padded = x.masked_fill(~valid[:, None], filled)
        scores = net(padded[..., :end], valid[:, :end])
        found.append([scores.detach(), *[b.clone() for b in net.buffers()]])
    for other in found[1:]:
        for one, same in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, same, rtol=1e-9, atol=1e-10)


def test_without_padding_valid_changes_nothing_in_training():
    x, found = torch.randn(4, 2, 40, dtype=torch.float64), []
    for valid in (None, torch.ones(4, 40, dtype=torch.bool)):
        torch.manual_seed(0)
        net = random(backbone(PADDED[1], img_size=(40,), in_chans=2)).train()
        scores = net(x, valid)
        grads = torch.autograd.grad(scores.square().sum(), list(net.parameters()))
        found.append([scores, *grads, *net.buffers()])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


def test_a_network_with_padding_compiles_and_exports():
    """In one graph; the program then runs at another length."""
    net = backbone("C-DepthwiseConv-SelfAttention", img_size=(32,), strides=(2, 1, 2)).eval()
    x, valid = torch.randn(2, 1, 32), torch.arange(32) < torch.tensor([32, 13])[:, None]
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, valid), net(x, valid))
    torch.testing.assert_close(compiled(x), net(x))
    axes = {"x": {2: torch.export.Dim.DYNAMIC}, "valid": {1: torch.export.Dim.DYNAMIC}}
    program = torch.export.export(net, (x, valid), dynamic_shapes=axes).module()
    torch.testing.assert_close(program(x[..., :21], valid[:, :21]), net(x[..., :21], valid[:, :21]))


def test_valid_has_the_shape_of_the_samples():
    net = backbone("C-T", img_size=(24,))
    with pytest.raises(ValueError, match=r"Backbone: valid has shape \(2, 12\).*needs \(2, 24\)"):
        net(torch.randn(2, 1, 24), torch.ones(2, 12, dtype=torch.bool))
    holes = torch.ones(2, 24, dtype=torch.bool)
    holes[1, 4:8] = False
    with pytest.raises(ValueError, match="LSTM: valid has padding before a real token"):
        backbone("LSTM(bidirectional=True)", img_size=(24,))(torch.randn(2, 1, 24), holes)


# planted by scripts/mutate
FAULTS = {
    ("backbone.py", "test_backbone_padding.py"): (
        (
            "a stage is not told of padding",
            "x, valid = block(x, valid), _real_after",
            "x, valid = block(x, None), _real_after",
        ),
        (
            "the stem's second convolution reads what the first made of padding",
            "x = x if valid is None else x.masked_fill(~valid.view(len(x), 1, *x.shape[2:]), 0)",
            "x = x",
        ),
        ("the head's mean counts padding", "self.norm(mean_of(x, valid))", "self.norm(mean_of(x, None))"),
    ),
}
