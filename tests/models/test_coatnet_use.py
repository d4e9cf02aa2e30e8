"""CoAtNet as users of timm know networks: sizes, maps, methods, first values, and what is refused."""

import pytest
import torch
from torch.testing import assert_close

import glocal
from glocal.blocks import DropPath

TINY = {"dims": (8, 8, 16, 16), "depths": (1, 1, 2, 1), "stem_dim": 8, "head_dim": 8, "num_classes": 3, "img_size": 64}
TABLES = ["layers.3.0.mixer", "layers.3.1.mixer", "layers.4.0.mixer"]

FAULTS = {
    "models/coatnet.py": (
        ("no block is ever skipped", "drop_path=next(rates)", "drop_path=0 * next(rates)"),
        ("weights begin as PyTorch's", "        if parameter.dim() > 1:", "        if False:"),
        ("biases begin as PyTorch's", 'elif name.endswith("bias")', "elif False"),
        ("any letter is attention", 'not {*letters} <= {"C", "T"}', "False"),
        ("strides count from the image", '"reduction": reduction, "module": f"l', '"reduction": 2, "module": f"l'),
        ("a hidden head is linear", "act=nn.Tanh()", "act=nn.Identity()"),
        ("patches are as large as the stem's", 'reduction = positive("patch_size", patch_size)', "reduction = 2"),
        ("the stem's stride is not told", 'reduction, "module": "layers.0"', '1, "module": "layers.0"'),
        ("the last grid is cut off", "-(-n // strides[i]) for n in grid", "n // strides[i] for n in grid"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("stride_in", ["depthwise", "expand"])
@pytest.mark.parametrize("size", [(200, 312), (224, 160), (97, 131), (448, 448), (1, 1), (3, 70)])
def test_any_size(size, stride_in):
    model = glocal.create_model("coatnet_0", **TINY, stride_in=stride_in).eval()
    x, maps = model.forward_intermediates(torch.randn(1, 3, *size))
    grids, grid = [], size
    for _ in range(5):
        grid = tuple(-(-side // 2) for side in grid)
        grids.append(grid)
    assert [tuple(found.shape[1:]) for found in maps] == [
        (channels, *grid) for channels, grid in zip((8, 8, 8, 16, 16), grids, strict=True)
    ]
    assert model.forward_head(x).isfinite().all()


def test_vit_with_relative_positions():
    tiny = {"dims": (16,), "depths": (2,), "stem_dim": 16, "head_dim": 8, "num_classes": 3, "img_size": (32, 48)}
    model = glocal.create_model("vit_rel", **tiny).eval()
    assert model.layers[1][0].mixer.relative_position_bias_table.shape == (2, 3, 5)
    assert list(model.feature_info) == [
        {"num_chs": 16, "reduction": 16, "module": "layers.0"},
        {"num_chs": 16, "reduction": 16, "module": "layers.1"},
    ]
    image = torch.randn(2, 3, 33, 47)
    whole = torch.zeros(2, 3, 48, 48)
    whole[:, :, :33, :47] = image
    assert_close(model(image), model(whole))


def test_options():
    model = glocal.create_model("coatnet_0(patch_size=4, strides=(1, 2, 1, 2), in_chans=1)", **TINY).eval()
    assert model(torch.zeros(2, 1, 9, 7)).shape == (2, 3)
    assert [info["reduction"] for info in model.feature_info] == [4, 4, 8, 8, 16]
    mixer = model.layers[3][0].mixer
    assert repr(mixer) == "RelativeAttention(grid_size=(8, 8), num_heads=2, out_dim=16)" and mixer.dim == 8


def test_two_kinds_at_one_reduction():
    """As in numbers 6 and 7: attention that widens without a stride."""
    sizes = {"dims": (8, 8, 8, 16, 24), "depths": (1,) * 5, "stem_dim": 8, "head_dim": 8, "num_classes": 3}
    model = glocal.create_model("coatnet_6", **sizes, img_size=64).eval()
    assert model.feature_info.reduction() == [2, 4, 8, 16, 16, 32]
    assert model.layers[4][0].mixer.grid_size == (4, 4) and model.layers[5][0].mixer.grid_size == (2, 2)
    assert model(torch.randn(2, 3, 40, 70)).shape == (2, 3)


def test_first_values():
    torch.manual_seed(0)
    model = glocal.create_model("coatnet_0", depths=(1, 1, 1, 1), dims=(64, 64, 64, 64))
    block, attention = model.layers[1][0], model.layers[3][0]
    for weight in (
        block.conv1_1x1.weight,
        block.conv2_kxk.weight,
        attention.mixer.qkv.weight,
        attention.mlp.fc1.weight,
    ):
        assert abs(weight.std().item() - 0.02) < 2e-3
    for bias in (block.conv3_1x1.bias, block.se.fc1.bias, attention.mixer.qkv.bias, model.head.fc.bias):
        assert not bias.any()
    assert block.norm1.weight.eq(1).all() and attention.norm1.weight.eq(1).all()


def test_tables_are_not_decayed():
    model = glocal.create_model("coatnet_0", **TINY)
    assert model.no_weight_decay() == {f"{mixer}.relative_position_bias_table" for mixer in TABLES}


def test_maps_of_stages():
    model = glocal.create_model("coatnet_0", **TINY).eval()
    image = torch.randn(2, 3, 64, 48)
    x, maps = model.forward_intermediates(image)
    assert model.feature_info.channels() == [8, 8, 8, 16, 16] and model.feature_info.reduction() == [2, 4, 8, 16, 32]
    assert_close(x.movedim(-1, 1), maps[-1])  # a hidden head has the norm behind the mean
    assert_close(maps[0].movedim(1, -1), model.layers[0](image))
    features = glocal.create_model("coatnet_0", **TINY, features_only=True, out_indices=(0, 2)).eval()
    kept = {k: v for k, v in model.state_dict().items() if k.startswith(("layers.0", "layers.1", "layers.2"))}
    features.model.load_state_dict(kept, strict=True)
    for found, expected in zip(features(image), (maps[0], maps[2]), strict=True):
        assert_close(found, expected)
    assert features.feature_info.reduction() == [2, 8]


def test_head():
    model = glocal.create_model("coatnet_0", **TINY).eval()
    torch.nn.init.normal_(model.head.norm.bias)
    image = torch.randn(2, 3, 40, 36)
    tokens = model.forward_features(image)
    mean = tokens.mean((1, 2))
    spread = (mean.var(1, unbiased=False, keepdim=True) + 1e-6).sqrt()
    normal = (mean - mean.mean(1, keepdim=True)) / spread * model.head.norm.weight + model.head.norm.bias
    expected = (normal @ model.head.pre_logits.fc.weight.T + model.head.pre_logits.fc.bias).tanh()
    assert_close(model.forward_head(tokens, pre_logits=True), expected)
    assert_close(model(image), expected @ model.head.fc.weight.T)
    model.reset_classifier(7)
    assert model(image).shape == (2, 7) and model.get_classifier() is model.head.fc
    model.reset_classifier(0)
    assert_close(model(image), expected)


def test_blocks_may_be_skipped():
    model = glocal.create_model("coatnet_0", drop_path_rate=0.4, **TINY)
    rates = [part.rate for part in model.modules() if isinstance(part, DropPath)]
    assert_close(torch.tensor(rates), torch.tensor([0.1, 0.2, 0.2, 0.3, 0.3, 0.4, 0.4]))
    image = torch.randn(16, 3, 32, 32)
    torch.manual_seed(0)
    skipped = model.train()(image)
    model = glocal.create_model("coatnet_0", **TINY).train()
    assert not [part for part in model.modules() if isinstance(part, DropPath)]
    assert skipped.isfinite().all()


@pytest.mark.parametrize("drop_path_rate", [0, 0.3])
def test_checkpointing_changes_no_gradient_and_no_statistics(drop_path_rate):
    found, image = [], torch.randn(4, 3, 40, 36, dtype=torch.float64)
    for checkpointed in (False, True):
        torch.manual_seed(0)
        model = glocal.create_model("coatnet_0", drop_path_rate=drop_path_rate, **TINY).double().train()
        model.set_grad_checkpointing(checkpointed)
        calls = []
        for block in (model.layers[1][0], model.layers[3][1]):
            block.norm1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(1)
        model(image).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()} | dict(model.named_buffers()))
        assert len(calls) == (4 if checkpointed else 2)
    assert_close(found[0], found[1])


@pytest.mark.parametrize("training", [False, True])
def test_compiles(training):
    sizes = {**TINY, "layout": "C-T", "dims": (8, 16), "depths": (1, 1)}
    model = glocal.create_model("coatnet_0", **sizes).train(training)
    image = torch.randn(2, 3, 40, 36)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(compiled(image), model(image))


def test_is_exported_for_images_of_whole_tokens():
    """Multiples of the last stage's 32 pixels; of others PyTorch's own pooling asks for each size."""
    model = glocal.create_model("coatnet_0", **{**TINY, "layout": "C-C-C-T", "depths": (1, 1, 1, 1)}).eval()
    height, width = (32 * torch.export.Dim(side, min=2, max=16) for side in ("rows", "columns"))
    program = torch.export.export(model, (torch.randn(2, 3, 96, 64),), dynamic_shapes=({2: height, 3: width},)).module()
    for size in ((64, 64), (64, 160), (128, 96)):
        image = torch.randn(2, 3, *size)
        assert_close(program(image), model(image))


def test_blocks_can_be_looked_into():
    model = glocal.create_model("coatnet_0", **TINY).eval()
    with glocal.inspect(model) as seen:
        model(torch.randn(1, 3, 40, 36))
    assert [call.name for call in seen] == ["layers.1.0.conv2_kxk", "layers.2.0.conv2_kxk", *TABLES]
    assert all(call.rebuild_error() < 1e-5 for call in seen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"layout": "C-C-X-T"}, r"^coatnet_0: layout: 'C-C-X-T', must be letters C \(convolution\) or T"),
        ({"layout": ""}, "^coatnet_0: layout: '', must be letters"),
        ({"layout": ("C", "T")}, r"^coatnet_0: layout: \('C', 'T'\), must be letters"),
        ({"layout": "C-T"}, r"^coatnet_0: dims: \(96, 192, 384, 768\), must have one number for each of the 2 stages"),
        ({"depths": (1, 1)}, r"^coatnet_0: depths: \(1, 1\), must have one number for each of the 4 stages"),
        ({"depths": (1, 1, 0, 1)}, "^coatnet_0: depths: 0, must be a positive"),
        ({"strides": (2, 2)}, r"^coatnet_0: strides: \(2, 2\), must have one number for each of the 4 stages"),
        ({"head_dim": 5}, "^coatnet_0: RelativeAttention: head_dim: 5 does not divide 384"),
        ({"stride_in": "dw"}, "^coatnet_0: stride_in: 'dw', must be 'depthwise' or 'expand'"),
        ({"pool": "mean"}, "^coatnet_0: pool: 'mean', must be 'avg' or 'max'"),
        ({"hidden_head": 1}, "^coatnet_0: hidden_head: 1, must be True or False"),
        ({"stem_dim": 0}, "^coatnet_0: stem_dim: 0"),
        ({"patch_size": 0}, "^coatnet_0: patch_size: 0"),
        ({"img_size": (1, 2, 3)}, "^coatnet_0: img_size"),
        ({"drop_path_rate": 1}, "^coatnet_0: drop_path_rate: 1"),
        ({"num_heads": 3}, "^coatnet_0: has no argument 'num_heads'"),
    ],
)  # fmt: skip
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        glocal.create_model("coatnet_0", **arguments)


def test_what_is_no_image():
    with pytest.raises(ValueError, match=r"this network takes images \[B, 3, H, W\]"):
        glocal.create_model("coatnet_0", **TINY)(torch.zeros(1, 1, 32, 32))
