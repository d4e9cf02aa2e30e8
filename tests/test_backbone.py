"""Layouts, sizes and strides of the backbone."""

import re

import pytest
import torch

import glocal
from glocal import contract
from glocal.backbone import Backbone, default_dims, default_strides, parse_layout
from glocal.blocks import Block, DropPath, LayerScale, MBConv

from .backbones import NO_ENTRIES, backbone, entry


@pytest.mark.parametrize(
    "text, entries",
    [
        ("C-C-T-T", ("C", "C", "T", "T")),
        ("T", ("T",)),
        (" C - T ", ("C", "T")),
        (
            "C-WindowAttention(window_size=4, shift_size=-1)-T",
            ("C", "WindowAttention(window_size=4, shift_size=-1)", "T"),
        ),
        ("NeighborhoodAttention(border='shifted-in')-C", ("NeighborhoodAttention(border='shifted-in')", "C")),
        ("C-'my-ops/a.py:Shift(step=(1, 2))'-T", ("C", "my-ops/a.py:Shift(step=(1, 2))", "T")),
        ("ops.py:Shift-C", ("ops.py:Shift", "C")),
    ],
)
def test_parse_layout(text, entries):
    assert parse_layout(text) == entries


@pytest.mark.parametrize(
    "text, message",
    [
        ("C-X-T", "layout 'C-X-T': unknown letter 'X'; valid are C (convolution, MBConv), T (attention, "),
        ("C-t", "unknown letter 't'; did you mean 'T'?"),
        ("C-NeighbourhoodAtention(kernel_size=3)", "'NeighbourhoodAtention'; did you mean 'NeighborhoodAttention'?"),
        ("CCTT", "'CCTT' is no operator; did you mean 'C-C-T-T'?"),
        ("C--T", "an entry is empty; write one for every stage"),
        ("", "an entry is empty"),
        ("C-WindowAttention(window_size=4", "a parenthesis is not closed"),
        ("C-'x.py:A", "the quote ' is not closed"),
    ],
)  # fmt: skip
def test_parse_layout_refuses(text, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        parse_layout(text)


def test_an_unknown_option_names_the_nearest():
    with pytest.raises(ValueError, match=r"no argument 'kernel_sise'; did you mean 'kernel_size'\?"):
        backbone("C-NeighborhoodAttention(kernel_sise=3)")


@pytest.mark.parametrize("entry", ["Convolution(stride=2)", "SelfAttention(out_dim=32)", "AveragePooling(stride=2)"])
def test_an_operator_that_changes_the_grid_or_width_is_refused(entry):
    with pytest.raises(ValueError, match="keeps width and grid; leave out_dim and stride to the stage"):
        backbone(f"C-C-{entry}")


@pytest.mark.parametrize("name", ["dims", "depths", "strides"])
def test_lengths_are_checked(name):
    with pytest.raises(ValueError, match=rf"{name} is \(32, 32\), 2 values; layout 'C-C-T-T' has 4 stages"):
        backbone(**{name: (32, 32)})
    with pytest.raises(ValueError, match=f"{name} is .* every value must be at least 1"):
        backbone(**{name: (32, 32, 0, 32)})


@pytest.mark.parametrize("size", [(24, 24), (25, 17), (40, 8), (1, 1)])
def test_features_agree_with_feature_info(size):
    net = backbone("C-C-NeighborhoodAttention(kernel_size=3)-T", strides=(2, 1, 2, 2), dims=(32, 32, 64, 64)).eval()
    features = net.features(torch.randn(2, 1, *size))
    assert [info["module"] for info in net.feature_info] == [f"stages.{i}" for i in range(4)]
    for feature, info in zip(features, net.feature_info, strict=True):
        assert feature.shape == (2, *(-(-n // info["reduction"]) for n in size), info["num_chs"])
    assert net(torch.randn(2, 1, *size)).shape == (2, 5)


def test_head_and_features_make_the_forward_pass():
    net = backbone("C-T").eval()
    x = torch.randn(2, 1, 24, 24)
    pooled = net.features(x)[-1].mean((1, 2))
    expected = net.head.fc(net.head.norm(pooled))
    torch.testing.assert_close(net(x), expected)


def test_stages_are_what_the_layout_says():
    net = backbone("C-DepthwiseConv(kernel_size=5)-T", depths=(2, 1, 3), dims=(32, 32, 64))
    assert [[type(block) for block in stage] for stage in net.stages] == [[MBConv] * 2, [Block], [Block] * 3]
    assert net.stages[0][0].stride == 2 and net.stages[0][1].stride == 1
    assert [type(block.mixer).__name__ for block in net.stages[2]] == ["RelativeAttention"] * 3
    # CoAtNet's attention widens by itself; every table is made for the grid that its block works on.
    assert [block.mixer.dim for block in net.stages[2]] == [32, 64, 64]
    assert all(block.mixer.grid_size == (6, 6) for block in net.stages[2])


def test_tables_fit_odd_images():
    net = backbone("T-T-T-T", img_size=(28, 30), strides=(2, 1, 1, 2))
    assert [stage[0].mixer.grid_size for stage in net.stages] == [(7, 8), (7, 8), (7, 8), (4, 4)]


@pytest.mark.parametrize("operator", glocal.available())
def test_every_operator_is_an_entry(operator):
    if not any(contract.fits(spec, (8, 8)) for spec in getattr(glocal.mixers, operator).examples):
        with pytest.raises(ValueError, match=f"{operator}: works on grids of rank 1, this network's have rank 2"):
            backbone(f"C-{entry(operator)}-C")
        return
    if operator in NO_ENTRIES:
        with pytest.raises(ValueError, match=f"{operator}: {NO_ENTRIES[operator]}"):
            backbone(f"C-{entry(operator)}-C")
        return
    net = backbone(f"C-{entry(operator)}-C", dims=(32, 64, 64)).train()
    net(torch.randn(4, 1, 24, 24)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


def test_defaults():
    assert default_strides((224, 224), 4) == (2, 2, 2, 2)
    assert len(default_strides((32, 32), 3)) == len(default_dims(3)) == 3
    net = Backbone("C-C-T-T", in_chans=3, num_classes=2, img_size=224)
    assert [info["reduction"] for info in net.feature_info] == [4, 8, 16, 32]


def test_coatnet_0_has_the_published_number_of_parameters():
    # facts/coatnet.md 3.8: 25 036 820 with the hidden head layer D -> D, which this head does not have.
    # timm's and the paper's blocks start with a stem of 64, and depths 2, 3, 5, 2.
    with torch.device("meta"):
        net = Backbone(
            "C-C-T-T", in_chans=3, num_classes=1000, img_size=224,
            dims=(96, 192, 384, 768), depths=(2, 3, 5, 2), stem_dim=64,
        )  # fmt: skip
    assert sum(p.numel() for p in net.parameters()) == 25_036_820 - 768 * 769


def test_mlp_ratio_is_that_of_both_kinds_of_blocks():
    net = backbone("C-T", dims=(32, 64), mlp_ratio=2.5)
    assert net.stages[0][0].conv1_1x1.out_channels == 80
    assert net.stages[1][0].mlp.fc1.out_features == 160
    assert backbone("C-T", mlp_ratio=2, conv={"expand_ratio": 3}).stages[0][0].conv1_1x1.out_channels == 192


def test_drop_path_grows_as_in_timm():
    timm = pytest.importorskip("timm")
    theirs = timm.create_model("vit_tiny_patch16_224", depth=5, drop_path_rate=0.2)
    expected = [getattr(block.drop_path1, "drop_prob", 0) for block in theirs.blocks]
    net = backbone("C-T-DepthwiseConv", depths=(2, 1, 2), drop_path=0.2)
    blocks = [block for stage in net.stages for block in stage]
    for names in ({MBConv: "drop_path", Block: "drop_path1"}, {MBConv: "drop_path", Block: "drop_path2"}):
        rates = [getattr(getattr(block, names[type(block)]), "rate", 0) for block in blocks]
        assert rates == pytest.approx(expected)
    assert not any(isinstance(part, DropPath) for part in backbone("C", drop_path=0.2).modules())
    assert set(net.state_dict()) == set(backbone("C-T-DepthwiseConv", depths=(2, 1, 2)).state_dict())


def test_layer_scale_is_on_every_branch():
    net = backbone("C-T", layer_scale=1e-3)
    scales = {name: part.gamma for name, part in net.named_modules() if isinstance(part, LayerScale)}
    assert set(scales) == {"stages.0.0.ls", "stages.1.0.ls1", "stages.1.0.ls2"}
    assert all(gamma.unique().tolist() == [pytest.approx(1e-3)] for gamma in scales.values())


LAYOUTS_AND_SWITCHES = [
    ("C-C", {"skip"}),
    ("C-DepthwiseConv", {"skip", "mlp"}),
    ("C-SelfAttention", {"skip", "mlp"}),
    ("C-T", {"skip", "mlp", "positions"}),
    ("C-WindowAttention(window_size=4)", {"skip", "mlp", "positions"}),
    ("C-NeighborhoodAttention(kernel_size=3)", {"skip", "mlp", "positions"}),
    ("C-NeighborhoodAttention(kernel_size=3, position_bias=False)", {"skip", "mlp"}),
]


@pytest.mark.parametrize("layout, expected", LAYOUTS_AND_SWITCHES)
def test_a_switch_changes_the_network_where_ablatable_says_so(layout, expected):
    """A network is changed if the weights that both have give other scores."""
    whole = backbone(layout).eval()
    assert set(whole.ablatable) == expected
    with torch.no_grad():
        for parameter in whole.parameters():
            parameter.normal_(std=0.2)
    x = torch.randn(2, 1, 24, 24)
    for switch in ("skip", "mlp", "positions"):
        without = backbone(layout, **{switch: False}).eval()
        assert switch not in without.ablatable
        missing = without.load_state_dict(whole.state_dict(), strict=False).missing_keys
        assert not missing  # a switch takes away and adds nothing
        assert torch.equal(without(x), whole(x)) == (switch not in expected), switch


def test_without_positions_attention_does_not_see_an_order():
    net = backbone("T-T", strides=(1, 1), positions=False).eval()
    tokens = torch.randn(1, 12, 12, 32)  # as the stem gives them
    order = torch.randperm(144)
    shuffled = tokens.flatten(1, 2)[:, order].view_as(tokens)
    for stage in net.stages:
        tokens, shuffled = stage(tokens), stage(shuffled)
    torch.testing.assert_close(shuffled.flatten(1, 2), tokens.flatten(1, 2)[:, order])


def test_a_position_bias_asked_for_and_taken_away_is_refused():
    with pytest.raises(ValueError, match=r"position_bias=True\): asks for a position bias, positions=False takes it"):
        backbone("C-NeighborhoodAttention(kernel_size=3, position_bias=True)", positions=False)


def test_without_skip_paths_no_shortcut_is_left():
    net = backbone("C-T-DepthwiseConv", dims=(32, 64, 96), skip=False)
    assert not [name for name in net.state_dict() if "shortcut" in name]
    assert net(torch.randn(2, 1, 9, 14)).shape == (2, 5)


LINE = "C-NeighborhoodAttention(kernel_size=3)-WindowAttention(window_size=4)-T"


@pytest.mark.parametrize("length", [1, 2, 33, 64, 100])
def test_features_of_signals_agree_with_feature_info(length):
    net = backbone(LINE, img_size=(64,), in_chans=3, strides=(2, 1, 2, 2)).eval()
    x = torch.randn(2, 3, length)
    for feature, info in zip(net.features(x), net.feature_info, strict=True):
        assert feature.shape == (2, -(-length // info["reduction"]), info["num_chs"])
    assert net(x).shape == (2, 5)


@pytest.mark.parametrize("operator", glocal.available())
def test_every_operator_is_an_entry_for_signals(operator):
    layout, images = f"C-{entry(operator)}-C", {"img_size": (50,), "dims": (32, 64, 64)}
    if operator in NO_ENTRIES:
        with pytest.raises(ValueError, match=f"{operator}: {NO_ENTRIES[operator]}"):
            backbone(layout, **images)
        return
    if not any(contract.fits(spec, (50,)) for spec in getattr(glocal.mixers, operator).examples):
        with pytest.raises(ValueError, match=f"{operator}: .*rank"):
            backbone(layout, **images)(torch.randn(4, 1, 50))
        return
    net = backbone(layout, **images).train()
    net(torch.randn(4, 1, 50)).sum().backward()
    assert all(p.grad is not None for p in net.parameters())


@pytest.mark.parametrize("length", [1, 7, 32])
def test_a_signal_is_an_image_one_pixel_high(length):
    layout, strides = "C-DepthwiseConv(kernel_size=3)-SelfAttention", (2, 1, 2)
    line = backbone(layout, img_size=(32,), strides=strides).eval().double()
    image = backbone(layout, img_size=(1, 32), strides=strides).eval().double()
    state = line.state_dict()
    for name, wanted in image.state_dict().items():
        if state[name].shape != wanted.shape:  # kernels of height 1 become the middle row of wider ones
            kernel = state[name] if state[name].ndim == 4 else state[name][:, :, None]
            assert "stem.conv" in name or name.endswith((".conv2_kxk.weight", ".mixer.weight"))
            state[name] = torch.nn.functional.pad(kernel, (0, 0, 1, 1), value=1.0)
    image.load_state_dict(state)
    x = torch.randn(2, 1, length, dtype=torch.float64)
    for ours, theirs in zip(line.features(x), image.features(x[:, :, None]), strict=True):
        torch.testing.assert_close(ours, theirs[:, 0])
    torch.testing.assert_close(line(x), image(x[:, :, None]))


def test_the_wrong_rank_is_refused():
    with pytest.raises(ValueError, match=r"x has shape \(2, 1, 24\); this network takes images \[B, C, H, W\]"):
        backbone()(torch.randn(2, 1, 24))
    with pytest.raises(ValueError, match=r"this network takes signals \[B, C, T\]: see img_size"):
        backbone(img_size=(24,))(torch.randn(2, 1, 24, 24))
    with pytest.raises(ValueError, match=r"img_size is \(4, 4, 4\); it must be \(height, width\) or"):
        backbone(img_size=(4, 4, 4))


RECURRENT = "C-LSTM(bidirectional=True)-T-T"


def test_recurrence_convolution_and_attention_in_one_network():
    net = glocal.Backbone(RECURRENT, in_chans=2, num_classes=5, img_size=64, rank=1)
    scores = net(torch.randn(4, 2, 64))
    scores.sum().backward()
    assert scores.shape == (4, 5) and all(p.grad is not None for p in net.parameters())
    mixers = [type(block.mixer).__name__ for stage in list(net.stages)[1:] for block in stage]
    assert mixers == ["LSTM", "RelativeAttention", "RelativeAttention"]
    assert net.stages[1][0].mixer.rnn.hidden_size == 32


def test_rank_and_img_size_agree():
    assert backbone("T", img_size=24, rank=1)(torch.randn(2, 1, 24)).shape == (2, 5)
    assert backbone("T", img_size=(24,), rank=1).stem.rank == 1
    assert backbone("T", img_size=24, rank=2).stem.rank == backbone("T", img_size=24).stem.rank == 2
    for size in ((24, 24), (24,)):
        with pytest.raises(ValueError, match=r"img_size is .*; it must be \(height, width\) or, for signals"):
            backbone("T", img_size=size, rank=3 - len(size))
    with pytest.raises(ValueError, match="rank is 3; it must be 2"):
        backbone("T", rank=3)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"layout": 5}, "layout 5: must be text"),
        ({"num_classes": -1}, "num_classes: -1, must be a positive whole number"),
        ({"num_classes": 2.5}, "num_classes: 2.5"),
        ({"in_chans": 0}, "in_chans: 0"),
        ({"img_size": "32"}, "img_size is 32; it must be"),
        ({"img_size": (8, 2.5)}, r"img_size is \(8, 2.5\); it must be"),
    ],
)
def test_what_makes_no_network_is_refused(options, words):
    with pytest.raises(ValueError, match=f"^{words}"):
        backbone(**options)


@pytest.mark.parametrize("shape", [(2, 3, 24, 24), (2, 1, 0, 24), (2, 1, 24, 0)])
def test_images_that_are_none_are_refused(shape):
    for call in (backbone("T"), backbone("T").features):
        with pytest.raises(ValueError, match=r"^x has shape .*; this network takes 1 channels of a pixel or more$"):
            call(torch.zeros(shape))


# planted by scripts/mutate
FAULTS = {
    "backbone.py": (
        ("the MLP ratio passes convolution blocks by", '{"expand_ratio": mlp_ratio, "rank"', '{"rank"'),
        (
            "other channels are torch's to refuse",
            "if x.shape[1] != self.in_chans or 0 in",
            "if 0 in",
        ),
        ("sizes may be any numbers", "whole = all(isinstance(n, int) and n >= 1 for n in grid)", "whole = True"),
        ("every block drops at the full rate", '"drop_path": next(rates)}', '"drop_path": drop_path}'),
        ("operators keep their positions", 'context["position_bias"] = False', "pass"),
        (
            "an ablation of positions is said to change convolutions",
            'any(getattr(part, "position_bias", False) for part in self.stages.modules())',
            "bool(blocks)",
        ),
        ("the stem of signals is padded in height", "((1, 3), (0, 1))", "((1, 3), (1, 1))"),
        (
            "an operator that needs a source is taken for an entry",
            'if getattr(mixer, "needs_source", False):',
            "if False:",
        ),
    ),
}
