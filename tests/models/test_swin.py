"""Swin Transformer against timm's, torchvision's and transformers', and its published sizes."""

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

import glocal
from glocal.analysis import cost
from glocal.models.keys.swin import SOURCES

timm = pytest.importorskip("timm")

DIMS, HEADS, DEPTHS, WINDOW, CLASSES = (16, 32, 64), (1, 2, 4), (2, 2, 3), 4, 5
SMALL = {"dims": DIMS, "num_heads": HEADS, "depths": DEPTHS, "window_size": WINDOW, "num_classes": CLASSES}
TINY = {"dims": (8, 16), "num_heads": (2, 2), "depths": (1, 2), "num_classes": 3}

FAULTS = {
    "models/swin.py": (
        ("no window is shifted", "min(window) // 2 if number % 2 else 0", "0"),
        ("first windows are shifted", "min(window) // 2 if number % 2 else 0", "0 if number % 2 else min(window) // 2"),
        ("windows are shifted by one", "min(window) // 2 if number % 2", "1 if number % 2"),
        ("windows always have 7 tokens", 'per_axis("window_size", window_size, 2)', "(7, 7)"),
        ("heads are those of the default", "num_heads=heads[stage],", "num_heads=None,"),
        ("queries always have biases", "qkv_bias=qkv_bias,", "qkv_bias=True,"),
        ("padding is always masked", "mask_padding=mask_padding,", "mask_padding=True,"),
        ("MLPs are always 4 times as wide", "mlp_ratio=mlp_ratio, drop", "mlp_ratio=4, drop"),
        ("the large one has the base one's dims", "dims=(192, 384, 768, 1536)", "dims=(128, 256, 512, 1024)"),
    ),
    "models/parts.py": (
        (
            "height and width are completed for each other",
            "(0, w * p - x.shape[3], 0, h * p - x.shape[2])",
            "(0, h * p - x.shape[2], 0, w * p - x.shape[3])",
        ),
        ("no block is ever skipped", "block(i, j, next(rates))", "block(i, j, 0)"),
        ("features are not normalised", "return self.norm(x)", "return x"),
        ("strides count from 8", "patch_size * 2**i", "patch_size * 2 ** (i + 1)"),
        ("linear maps begin as PyTorch's", "        start_linear_maps(self)\n", ""),
        ("merged tokens follow in rows", "permute(0, 1, 3, 4, 2, 5)", "permute(0, 1, 3, 2, 4, 5)"),
        ("an odd grid is completed in front", "(0, 0, 0, 2 * w - x.shape[2], 0,", "(0, 0, 2 * w - x.shape[2], 0, 0,"),
        ("torch.export cannot follow sizes", "h, w = ((n + p - 1) // p for", "h, w = ((n + -n % p) // p for"),
        ("there is no norm before attention", "self.attn(self.norm1(x), **call)", "self.attn(x, **call)"),
        ("there is no norm before the MLP", "self.mlp(self.norm2(x))", "self.mlp(x)"),
        ("attention is never skipped", "self.drop_path1(self.attn(", "(self.attn("),
        ("the MLP is never skipped", "self.drop_path2(self.mlp(", "(self.mlp("),
        ("tokens have no norm", "return self.norm(x.movedim(1, -1))", "return x.movedim(1, -1)"),
    ),
    "models/keys/swin.py": (
        (
            "merging stays where it was",
            '    *((f"layers.{i}.downsample", f"layers.{i + 1}',
            '    *((f"layers.{i}.downsample", f"layers.{i}',
        ),
        ("queries and keys change places", '("query", "key", "value")', '("key", "query", "value")'),
        ("torchvision's norm is elsewhere", '("features.0.2", "patch', '("features.0.1", "patch'),
        ("torchvision's stages are one behind", 'f"features.{2 * i + 1}.{{j}}"', 'f"features.{2 * i + 3}.{{j}}"'),
        ("no index is written", 'state[name.replace("bias_table", "index")]', "_"),
        ("tables of indices are weights", "relative_position_index|attn_mask", "attn_mask"),
        ("masks are weights", "relative_position_index|attn_mask", "relative_position_index"),
        ("the norms of a block change places", '("layernorm_before", "norm1")', '("layernorm_before", "norm3")'),
        ("a map that is missing is a traceback", "if missing := ", "if not "),
        ("any table is of a square window", "if (2 * side - 1) ** 2 != len(table):", "if False:"),
    ),
    "models/classifier.py": (
        (
            "blocks of a stage are not checkpointed",
            "checkpointed=self.grad_checkpointing)\n        return x\n",
            "checkpointed=False)\n        return x\n",
        ),
        ("stages are checkpointed with their blocks", "isinstance(stage, Blocks | Stage)", "isinstance(stage, Blocks)"),
        ("any number of stages will do", "or len(value) != (count or len(value)) or", "or"),
    ),
}  # fmt: skip


def official(state, name):
    """timm's names for the weights of one of our models, in both directions the same."""
    return state if name == "timm" else SOURCES[name].write(state)


def drawn(model):
    """Weights that make every part count."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if name.endswith("bias_table"):
                p.normal_()
            elif p.dim() > 1:
                p.normal_(std=p[0].numel() ** -0.5)
            else:
                p.normal_(std=0.3).add_(1 if "norm" in name and name.endswith("weight") else 0)
    return model


def partner(name, ours, folder, size=(64, 64)):
    """The same network elsewhere with the same weights, images -> scores; strictly loaded."""
    state = official(ours.state_dict(), name)
    if name == "timm":
        model = timm.models.swin_transformer.SwinTransformer(
            img_size=size, embed_dim=DIMS[0], depths=DEPTHS, num_heads=HEADS, window_size=WINDOW, num_classes=CLASSES
        )
        assert not model.load_state_dict(state, strict=True).missing_keys
    elif name == "torchvision":
        swin = pytest.importorskip("torchvision.models.swin_transformer")
        model = swin.SwinTransformer([4, 4], DIMS[0], list(DEPTHS), list(HEADS), [WINDOW, WINDOW], num_classes=CLASSES)
        model.load_state_dict(state, strict=True)
    else:
        model = of_transformers(
            state,
            folder,
            embed_dim=DIMS[0], depths=list(DEPTHS), num_heads=list(HEADS), window_size=WINDOW, num_labels=CLASSES,
        )  # fmt: skip
    return model.to(next(ours.parameters()).dtype).eval()


def of_transformers(state, folder, **config):
    transformers = pytest.importorskip("transformers")
    transformers.SwinConfig(**config).save_pretrained(folder)
    save_file({name: t.contiguous() for name, t in state.items()}, folder / "model.safetensors")
    model, told = transformers.SwinForImageClassification.from_pretrained(
        folder, output_loading_info=True, dtype=next(iter(state.values())).dtype
    )
    assert not any(told.values())
    return Logits(model)


class Logits(torch.nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(x).logits


def is_the_same(ours, theirs, size, batch=2):
    """Scores and the gradients of images, relative to the largest."""
    dtype = next(ours.parameters()).dtype
    bound = 1e-4 if dtype == torch.float32 else 1e-9
    image = torch.randn(batch, 3, *size, dtype=dtype)
    found = []
    for model in (ours, theirs):
        x = image.clone().requires_grad_()
        scores = model(x)
        upstream = torch.linspace(-1, 1, scores.numel(), dtype=dtype).view(scores.shape)
        found.append((scores, *torch.autograd.grad(scores, x, upstream)))
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= bound * other.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(64, 64), (128, 192)])
@pytest.mark.parametrize("name", ["timm", "torchvision", "transformers"])
def test_is_the_published_network(tmp_path, name, size, dtype):
    ours = drawn(glocal.create_model("swin_tiny", **SMALL)).to(dtype).eval()
    is_the_same(ours, partner(name, ours, tmp_path, size), size)


@pytest.mark.parametrize("size", [(52, 84), (72, 68)])
def test_is_timms_at_other_sizes(tmp_path, size):
    """Zero tokens complete odd grids before merging, and windows, of which they are part."""
    ours = drawn(glocal.create_model("swin_tiny", mask_padding=False, **SMALL)).double().eval()
    theirs = timm.models.swin_transformer.SwinTransformer(
        img_size=size, embed_dim=DIMS[0], depths=DEPTHS, num_heads=HEADS, window_size=WINDOW, num_classes=CLASSES,
        dynamic_img_size=True,
    )  # fmt: skip
    theirs.load_state_dict(ours.state_dict())
    is_the_same(ours, theirs.double().eval(), size)


@pytest.mark.parametrize(("height", "width"), [(49, 33), (3, 5), (1, 1)])
def test_images_are_completed_by_zeros(height, width):
    model = glocal.create_model("swin_tiny", **TINY).double().eval()
    image = torch.randn(2, 3, height, width, dtype=torch.float64)
    whole = torch.zeros(2, 3, -(-height // 4) * 4, -(-width // 4) * 4, dtype=torch.float64)
    whole[:, :, :height, :width] = image
    assert_close(model(image), model(whole))


@pytest.mark.parametrize("size", [(200, 312), (224, 160), (97, 131), (448, 448)])
def test_any_size(size):
    model = glocal.create_model("swin_tiny", **TINY).eval()
    maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
    fine = tuple(-(-side // 4) for side in size)
    assert [tuple(m.shape[2:]) for m in maps] == [fine, tuple(-(-side // 2) for side in fine)]
    assert all(m.isfinite().all() for m in maps)


def test_options():
    model = glocal.create_model("swin_tiny(mlp_ratio=2, qkv_bias=False, patch_size=2)", **TINY, in_chans=1)
    block = model.layers[1].blocks[1]
    assert block.mlp.fc1.out_features == 32 and block.attn.qkv.bias is None
    assert model(torch.zeros(2, 1, 9, 7)).shape == (2, 3)
    assert repr(block.attn) == "WindowAttention(num_heads=2, shift_size=3, qkv_bias=False)"
    assert glocal.create_model("swin_tiny", dims=(64, 96), depths=(1, 1)).layers[1].blocks[0].attn.num_heads == 3


def test_first_values():
    torch.manual_seed(0)
    block = glocal.create_model("swin_tiny", dims=(96,), depths=(1,)).layers[0].blocks[0]
    assert abs(block.attn.qkv.weight.std().item() - 0.02) < 1e-3 and not block.attn.qkv.bias.any()


# Published sizes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("swin_tiny", 28_288_354),
        ("swin_small", 49_606_258),
        ("swin_base", 87_768_224),
        ("swin_base(window_size=12, img_size=384)", 87_903_584),
        ("swin_base(num_classes=21841)", 109_130_249),
        ("swin_large", 196_532_476),
    ],
)
def test_parameters(name, parameters):
    with torch.device("meta"):
        model = glocal.create_model(name)
    assert all(p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "macs"),
    [
        ("swin_tiny", 4_490_566_656),
        pytest.param("swin_small", 8_740_875_264, marks=pytest.mark.slow),
        pytest.param("swin_base", 15_430_946_816, marks=pytest.mark.slow),
    ],
)
def test_multiply_adds(name, macs):
    """Linear maps, convolutions and both products of attention."""
    with torch.device("meta"):
        assert cost.macs(glocal.create_model(name), torch.zeros(1, 3, 224, 224)) == macs


@pytest.mark.slow
def test_multiply_adds_of_large_windows():
    with torch.device("meta"):
        macs = cost.macs(glocal.create_model("swin_base", window_size=12), torch.zeros(1, 3, 384, 384))
    assert abs(macs / 47.08e9 - 1) < 0.005


@pytest.mark.parametrize("name", ["swin_tiny", "swin_small", "swin_base", "swin_large"])
def test_timm_has_the_same_names(name):
    with torch.device("meta"):
        ours = glocal.create_model(name).state_dict()
        theirs = timm.create_model(f"{name}_patch4_window7_224").state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


# Weights under other names


@pytest.mark.parametrize("name", ["official", "torchvision", "transformers"])
def test_weights_go_there_and_back(name, tmp_path):
    state = drawn(glocal.create_model("swin_tiny", **SMALL)).state_dict()
    other = SOURCES[name].write(state)
    back = SOURCES[name].read(other)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    torch.save({"model": other}, tmp_path / "w.pth")
    loaded = glocal.create_model("swin_tiny", tmp_path / "w.pth", **SMALL).state_dict()
    assert all(torch.equal(loaded[key], state[key]) for key in state)
    with pytest.raises(ValueError, match=r"^features_of\.x is not one of this family$"):
        SOURCES[name].read({**other, "features_of.x": torch.zeros(1)})


def test_official_names():
    """timm reads them, the table of indices is that of the release, and its masks are left out."""
    ours = drawn(glocal.create_model("swin_tiny", **SMALL)).state_dict()
    found = SOURCES["official"].write(ours)
    model = timm.models.swin_transformer.SwinTransformer(
        img_size=64, embed_dim=DIMS[0], depths=DEPTHS, num_heads=HEADS, window_size=WINDOW, num_classes=CLASSES
    )
    read = timm.models.swin_transformer.checkpoint_filter_fn(dict(found), model)
    assert read.keys() == ours.keys() and all(torch.equal(read[key], ours[key]) for key in ours)
    assert {"layers.0.downsample.reduction.weight", "head.weight", "layers.2.blocks.2.norm2.bias"} <= found.keys()
    index = found["layers.0.blocks.1.attn.relative_position_index"]
    for query, source in ((0, 0), (0, 15), (5, 2), (15, 0)):
        dy, dx = query // 4 - source // 4, query % 4 - source % 4
        assert index[query, source] == (dy + 3) * 7 + dx + 3
    mask = {"layers.0.blocks.1.attn_mask": torch.zeros(4, 16, 16)}
    assert SOURCES["official"].read(found | mask).keys() == ours.keys()


def test_weights_that_have_no_names_there():
    state = glocal.create_model("swin_tiny", window_size=(4, 7), **TINY).state_dict()
    for name in ("official", "torchvision"):
        with pytest.raises(ValueError, match=r"bias_table: has 91 offsets; only square windows have names there"):
            SOURCES[name].write(state)
    found = SOURCES["transformers"].write(state)
    del found["swin.encoder.layers.1.blocks.0.attention.self.value.bias"]
    with pytest.raises(ValueError, match=r"^layers\.1\.blocks\.0\.attn\.value\.bias is missing$"):
        SOURCES["transformers"].read(found)


def test_transformers_saves_these_names(tmp_path):
    state = SOURCES["transformers"].write(drawn(glocal.create_model("swin_tiny", **SMALL)).state_dict())
    (tmp_path / "one").mkdir()
    model = of_transformers(
        state, tmp_path / "one",
        embed_dim=DIMS[0], depths=list(DEPTHS), num_heads=list(HEADS), window_size=WINDOW, num_labels=CLASSES,
    )  # fmt: skip
    model.model.save_pretrained(tmp_path / "two")
    saved = load_file(tmp_path / "two" / "model.safetensors")
    assert saved.keys() == state.keys() and all(torch.equal(saved[key], state[key]) for key in state)


# What users of timm know


def test_maps_of_stages():
    model = drawn(glocal.create_model("swin_tiny", **SMALL)).eval()
    theirs = timm.models.swin_transformer.SwinTransformer(
        img_size=64, embed_dim=DIMS[0], depths=DEPTHS, num_heads=HEADS, window_size=WINDOW, num_classes=CLASSES
    ).eval()
    theirs.load_state_dict(model.state_dict())
    image = torch.randn(2, 3, 64, 64)
    assert list(model.feature_info) == theirs.feature_info
    for norm in (False, True):
        ours, other = (m.forward_intermediates(image, norm=norm) for m in (model, theirs))
        assert_close(ours[0], other[0], rtol=1e-4, atol=1e-4)
        assert_close(ours[1], other[1], rtol=1e-4, atol=1e-4)
    features = glocal.create_model("swin_tiny", **SMALL, features_only=True, out_indices=(0, 1))
    features.model.load_state_dict({k: v for k, v in model.state_dict().items() if k[:8] not in ("layers.2", "head.fc.")
                                    and not k.startswith("norm")}, strict=True)  # fmt: skip
    assert_close(features.eval()(image), ours[1][:2])
    assert features.feature_info.channels() == [16, 32] and features.feature_info.reduction() == [4, 8]
    tokens = model.forward_features(image)
    assert_close(model.forward_head(tokens, pre_logits=True), tokens.mean((1, 2)))
    model.reset_classifier(7)
    assert model(image).shape == (2, 7) and model.get_classifier() is model.head.fc


def test_tables_are_not_decayed():
    model = glocal.create_model("swin_tiny", **TINY)
    assert model.no_weight_decay() == {n for n, _ in model.named_parameters() if n.endswith("position_bias_table")}
    assert len(model.no_weight_decay()) == 3


def test_blocks_may_be_skipped():
    model = glocal.create_model("swin_tiny", drop_path_rate=0.3, **{**TINY, "depths": (1, 3)})
    blocks = [block for stage in model.layers for block in stage.blocks]
    assert [b.drop_path1.rate for b in blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    assert [b.drop_path2.rate for b in blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    block = glocal.create_model("swin_tiny", drop_path_rate=0.999, **TINY).layers[1].blocks[1]
    x = torch.randn(4, 5, 5, 16)
    assert torch.equal(block(x), x) and not torch.equal(block.eval()(x), x)
    for branch in ("attn", "mlp"):  # each branch is skipped by itself
        drawn(block).train()
        setattr(block, f"drop_path{1 if branch == 'attn' else 2}", torch.nn.Identity())
        assert not torch.equal(block(x), x)
        setattr(block, f"drop_path{1 if branch == 'attn' else 2}", glocal.blocks.DropPath(0.999))


@pytest.mark.parametrize("drop_path_rate", [0, 0.5])
def test_checkpoints_change_nothing(drop_path_rate):
    image, found = torch.randn(3, 3, 40, 36), []
    for checkpointed in (False, True):
        model = drawn(glocal.create_model("swin_tiny", drop_path_rate=drop_path_rate, **TINY)).train()
        model.set_grad_checkpointing(checkpointed)
        calls = []
        for block in (model.layers[0].blocks[0], model.layers[1].blocks[1]):
            block.norm1.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        torch.manual_seed(1)
        model(image).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
        assert len(calls) == (4 if checkpointed else 2)
    assert_close(found[0], found[1])


def test_compiles():
    model = glocal.create_model("swin_tiny", **TINY).eval()
    image = torch.randn(2, 3, 40, 36)
    assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(image), model(image))


def test_is_exported_for_any_image():
    model = glocal.create_model("swin_tiny", **{**TINY, "depths": (1, 1), "window_size": 4}).eval()
    sides = {2: torch.export.Dim("height", min=36, max=512), 3: torch.export.Dim("width", min=36, max=512)}
    program = torch.export.export(model, (torch.randn(2, 3, 50, 46),), dynamic_shapes=(sides,)).module()
    for height, width in ((64, 64), (63, 46), (41, 97)):
        image = torch.randn(2, 3, height, width)
        assert_close(program(image), model(image))


def test_blocks_can_be_looked_into():
    model = glocal.create_model("swin_tiny", **TINY).eval()
    with glocal.inspect(model) as seen:
        model(torch.randn(1, 3, 40, 36))
    assert [call.name for call in seen] == [
        "layers.0.blocks.0.attn",
        "layers.1.blocks.0.attn",
        "layers.1.blocks.1.attn",
    ]
    assert all(call.rebuild_error() < 1e-5 for call in seen)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dims": (8, 16, 32), "depths": (2, 2)}, r"^swin_tiny: depths: \(2, 2\), must have .* of the 3"),
        ({"dims": ()}, r"^swin_tiny: dims: \(\), must have one number for each"),
        ({"dims": 96}, "^swin_tiny: dims: 96, must have one number for each stage"),
        ({"dims": (8, 0), "depths": (1, 1)}, "^swin_tiny: dims: 0, must be a positive"),
        ({"num_heads": (1, 2)}, r"^swin_tiny: num_heads: \(1, 2\), must have one number for each of the 4 stages"),
        ({"num_heads": (5, 6, 12, 24)}, "^swin_tiny: .*num_heads: 5 does not divide 96"),
        ({"window_size": 0}, "^swin_tiny: window_size: 0"),
        ({"patch_size": 0}, "^swin_tiny: patch_size: 0"),
        ({"img_size": (1, 2, 3)}, "^swin_tiny: img_size"),
        ({"drop_path_rate": 1}, "^swin_tiny: drop_path_rate: 1"),
        ({"mlp_ratio": 0}, "^swin_tiny: mlp_ratio: 0, must be a number that makes dim 96"),
        ({"embed_dim": 96}, "^swin_tiny: has no argument 'embed_dim'"),
    ],
)  # fmt: skip
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        glocal.create_model("swin_tiny", **arguments)


def test_what_is_no_image():
    with pytest.raises(ValueError, match=r"this network takes images \[B, 3, H, W\]"):
        glocal.create_model("swin_tiny", **TINY)(torch.zeros(1, 1, 32, 32))


# The published networks themselves


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["timm", "torchvision", "transformers"])
def test_is_the_published_tiny_one(tmp_path, name, dtype):
    ours = glocal.create_model("swin_tiny").to(dtype).eval()
    state = official(ours.state_dict(), name)
    if name == "transformers":
        theirs = of_transformers(state, tmp_path, num_labels=1000)
    else:
        theirs = (
            timm.create_model("swin_tiny_patch4_window7_224")
            if name == "timm"
            else pytest.importorskip("torchvision").models.swin_t()
        )
        theirs.load_state_dict(state, strict=True)
    is_the_same(ours, theirs.to(dtype).eval(), (224, 224), batch=1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "theirs", "size"),
    [
        ("swin_small", "swin_small_patch4_window7_224", 224),
        ("swin_base", "swin_base_patch4_window7_224", 224),
        ("swin_large", "swin_large_patch4_window7_224", 224),
        ("swin_base(window_size=12, img_size=384)", "swin_base_patch4_window12_384", 384),
    ],
)
def test_is_the_published_one(name, theirs, size):
    ours, theirs = glocal.create_model(name).eval(), timm.create_model(theirs).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    is_the_same(ours, theirs, (size, size), batch=1)
