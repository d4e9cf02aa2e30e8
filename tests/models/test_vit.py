"""ViT against timm, torchvision and transformers with the same weights, and its published sizes."""

import pytest
import torch
from torch.testing import assert_close

import glocal
from glocal.analysis import cost
from glocal.models.keys.vit import from_torchvision, from_transformers, to_torchvision, to_transformers

SMALL = {"dim": 24, "depth": 2, "num_heads": 3, "patch_size": 8, "num_classes": 5, "mlp_ratio": 2}

FAULTS = {
    "models/vit.py": (
        ("norms of blocks have PyTorch's eps", "drop_path=rate, eps=1e-6", "drop_path=rate"),
        ("the last norm has PyTorch's eps", "self.norm = nn.LayerNorm(dim, eps=1e-6)", "self.norm = nn.LayerNorm(dim)"),
        ("the mean's norm has PyTorch's eps", "fc_norm = nn.LayerNorm(dim, eps=1e-6)", "fc_norm = nn.LayerNorm(dim)"),
        (
            "patches have a norm",
            'positive("patch_size", patch_size), norm=False)',
            'positive("patch_size", patch_size))',
        ),
        ("attention does not know the grid", 'return {"grid": self._grid(image.shape[2:])}', "return {}"),
        ("all blocks have the same rate", "drop_path=rate,", "drop_path=drop_path_rate,"),
        ("MLPs are always 4 times as wide", "mlp_ratio=mlp_ratio,", "mlp_ratio=4,"),
        (
            "the class token stands behind the patches",
            "[self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)]",
            "[x.flatten(1, 2), self.cls_token.expand(x.shape[0], -1, -1)]",
        ),
        ("the class token has no position", "], 1) + positions", "], 1) + positions * (positions != positions[:, :1])"),
        ("rows are resized to columns", "x.shape[1:3], num_prefix=1)", "x.shape[1:3][::-1], num_prefix=1)"),
        ("the mean holds the class token", "else x[:, 1:].mean(1))", "else x.mean(1))"),
        (
            "the norm stands before the mean",
            'self.fc_norm(x[:, 0] if self.global_pool == "token" else x[:, 1:].mean(1))',
            'self.fc_norm(x)[:, 0] if self.global_pool == "token" else self.fc_norm(x)[:, 1:].mean(1)',
        ),
        ("the class token has no norm", "self.fc_norm(x[:, 0] if", "x[:, 0] if"),
        ("maps begin with the class token", "x[:, 1:].unflatten(1, self", "x[:, :-1].unflatten(1, self"),
        (
            "patches beyond the border are dropped",
            "(size[0] + p - 1) // p, (size[1] + p - 1) // p",
            "size[0] // p, size[1] // p",
        ),
        ("the table of positions is decayed", '| {"pos_embed", "cls_token"}', '| {"cls_token"}'),
        ("linear maps begin as PyTorch's", "        start_linear_maps(self)\n", ""),
        ("the class token begins large", "std=1e-6", "std=1"),
        ("the small model has heads of 32 channels", "dim=384, num_heads=6", "dim=384, num_heads=12"),
        (
            "any word is a way to pool",
            'one_of("global_pool", global_pool, self.pools)',
            "global_pool",
        ),
        (
            "features keep the mean's norm",
            'after_stages = ("norm", "fc_norm", "head")',
            'after_stages = ("norm", "head")',
        ),
    ),
    "models/parts.py": (
        ("the mixer is told nothing", "self.attn(self.norm1(x), **call)", "self.attn(self.norm1(x))"),
        ("norms have PyTorch's eps", "self.norm1 = nn.LayerNorm(dim, eps=eps)", "self.norm1 = nn.LayerNorm(dim)"),
        (
            "second norms have PyTorch's eps",
            "self.norm2 = nn.LayerNorm(dim, eps=eps)",
            "self.norm2 = nn.LayerNorm(dim)",
        ),
        ("tokens always have a norm", "nn.LayerNorm(dim) if norm else nn.Identity()", "nn.LayerNorm(dim)"),
    ),
    "models/keys/__init__.py": (("a whole name is no beginning", 'r"(?=\\.|$)"', 'r"(?=\\.)"'),),
    "models/keys/vit.py": (
        (
            "torchvision's norms change places",
            'encoder_layer_{i}.ln_1", "blocks.{i}.norm1"',
            'encoder_layer_{i}.ln_1", "blocks.{i}.norm3"',
        ),
        ("keys come before queries", 'for part in "qkv"]', 'for part in "kqv"]'),
        ("keys go out before queries", 'zip("qkv", found', 'zip("kqv", found'),
        (
            "names of transformers 5 are unknown",
            "renamed(state, _TRANSFORMERS + _SINCE_5)",
            "renamed(state, _TRANSFORMERS)",
        ),
        (
            "transformers' second norm is the last one",
            'layer.{i}.layernorm_after", "blocks.{i}.norm2"',
            'layer.{i}.layernorm_after", "norm"',
        ),
        (
            "norms of transformers 5 change places",
            'layers.{i}.layernorm_before", "blocks.{i}.norm1"',
            'layers.{i}.layernorm_before", "blocks.{i}.norm2"',
        ),
        (
            "values of transformers 5 are keys",
            '"vit.layers.{i}.attention.v_proj", "blocks.{i}.attn.v"',
            '"vit.layers.{i}.attention.v_proj", "blocks.{i}.attn.k"',
        ),
        ("files of torchvision are not known", 'Source("class_token"', 'Source("class_tokens"'),
        ("a map that is missing is a traceback", "if missing := ", "if not "),
        ("files of transformers are not known", 'Source("vit.embeddings.cls_token"', 'Source("vit.cls_token"'),
    ),
}


def at_random(model):
    """A model whose every parameter says something, norms and biases too, in double precision and evaluation."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = 0.3 * torch.randn(parameter.shape, generator=generator)
        parameter.data = noise + 1 if "norm" in name and name.endswith("weight") else noise
    return model.double().eval()


def small(**arguments):
    return glocal.create_model("vit_small", **{**SMALL, "img_size": (32, 48), **arguments})


def timms(size=(32, 48), **arguments):
    vision_transformer = pytest.importorskip("timm.models.vision_transformer")
    return vision_transformer.VisionTransformer(
        img_size=size, patch_size=8, embed_dim=24, depth=2, num_heads=3, num_classes=5, mlp_ratio=2, **arguments
    ).double()


def same(ours, theirs, image, names=None):
    """Logits, and gradients of the image and of every parameter (`names`: of ours, under their names)."""
    found, expected = [], []
    for model, results in ((ours, found), (theirs, expected)):
        x = image.clone().requires_grad_()
        scores = model(x)
        scores = getattr(scores, "logits", scores)
        (scores * torch.linspace(-1, 2, scores.numel(), dtype=scores.dtype).view(scores.shape)).sum().backward()
        results += [scores.detach(), x.grad]
    assert_close(found, expected, rtol=1e-9, atol=1e-9)
    if names is not None:
        grads = names({name: p.grad for name, p in ours.named_parameters()})
        wanted = {name: p.grad for name, p in theirs.named_parameters()}
        assert grads.keys() == wanted.keys()
        for name in wanted:
            assert_close(grads[name], wanted[name], rtol=1e-8, atol=1e-9, msg=lambda text, name=name: f"{name}\n{text}")


@pytest.mark.parametrize("global_pool", ["token", "avg"])
def test_is_timms_model(global_pool):
    ours, theirs = at_random(small(global_pool=global_pool)), timms(global_pool=global_pool).eval()
    theirs.load_state_dict(ours.state_dict())
    assert list(theirs.state_dict()) == list(ours.state_dict())
    image = torch.randn(3, 3, 32, 48, dtype=torch.float64)
    same(ours, theirs, image, dict)
    assert_close(ours.forward_features(image), theirs.forward_features(image))
    assert_close(ours.forward_head(ours.forward_features(image), pre_logits=True), theirs.forward_head(
        theirs.forward_features(image), pre_logits=True))  # fmt: skip
    single = image.float()
    assert_close(ours.float()(single), theirs.float()(single), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("height", "width"), [(97, 131), (24, 16), (30, 48), (32, 50), (48, 32), (5, 3)])
def test_other_sizes(height, width):
    """The table resized by PyTorch, the image completed by zeros, in timm's model for that size."""
    ours = at_random(small())
    rows, columns = -(-height // 8), -(-width // 8)
    state = ours.state_dict()
    table = state["pos_embed"][:, 1:].reshape(1, 4, 6, 24).permute(0, 3, 1, 2)
    table = torch.nn.functional.interpolate(table, (rows, columns), mode="bicubic", antialias=True)
    state["pos_embed"] = torch.cat([state["pos_embed"][:, :1], table.permute(0, 2, 3, 1).reshape(1, -1, 24)], 1)
    theirs = timms((8 * rows, 8 * columns)).eval()
    theirs.load_state_dict(state)
    image = torch.randn(2, 3, height, width, dtype=torch.float64)
    whole = torch.zeros(2, 3, 8 * rows, 8 * columns, dtype=torch.float64)
    whole[:, :, :height, :width] = image
    assert_close(ours(image), theirs(whole), rtol=1e-9, atol=1e-9)
    dynamic = timms(dynamic_img_size=True, dynamic_img_pad=True).eval()
    dynamic.load_state_dict(ours.state_dict())
    assert_close(ours.float()(image.float()), dynamic.float()(image.float()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [(200, 312), (224, 160), (97, 131), (448, 448)])
def test_sizes_of_photographs(size):
    model = glocal.create_model("vit_tiny", depth=1, dim=12, num_classes=4).eval()
    with torch.no_grad():
        assert model(torch.randn(1, 3, *size)).isfinite().all()


def test_is_torchvisions_model(tmp_path):
    torchvision = pytest.importorskip("torchvision")
    theirs = at_random(
        torchvision.models.VisionTransformer(
            image_size=32, patch_size=8, num_layers=11, num_heads=3, hidden_dim=24, mlp_dim=48, num_classes=5
        )
    )
    ours = small(img_size=32, depth=11).double().eval()
    ours.load_state_dict(from_torchvision(theirs.state_dict()))
    same(ours, theirs, torch.randn(2, 3, 32, 32, dtype=torch.float64), to_torchvision)
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    read = glocal.create_model("vit_small", tmp_path / "theirs.pth", **{**SMALL, "img_size": 32, "depth": 11})
    assert all(torch.equal(value, ours.state_dict()[name].float()) for name, value in read.state_dict().items())
    back = to_torchvision(ours.state_dict())
    assert back.keys() == theirs.state_dict().keys()
    assert all(torch.equal(back[name], value) for name, value in theirs.state_dict().items())


def test_is_transformers_model(tmp_path):
    """By its file and by its module, whose names differ; at another size of image, too."""
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(
        hidden_size=24, num_hidden_layers=11, num_attention_heads=3, intermediate_size=48, image_size=32, patch_size=8,
        num_labels=5, layer_norm_eps=1e-6,
    )  # fmt: skip
    theirs = at_random(transformers.ViTForImageClassification(config))
    theirs.save_pretrained(tmp_path / "theirs")
    arguments = {**SMALL, "img_size": 32, "depth": 11}
    ours = glocal.create_model("vit_small", tmp_path / "theirs", **arguments).double().eval()
    ours.load_state_dict(from_transformers(theirs.state_dict()))
    read = glocal.create_model("vit_small", tmp_path / "theirs", **arguments)
    assert all(torch.equal(value, ours.state_dict()[name].float()) for name, value in read.state_dict().items())
    same(ours, theirs, torch.randn(2, 3, 32, 32, dtype=torch.float64))

    safetensors = pytest.importorskip("safetensors.torch")
    written = safetensors.load_file(tmp_path / "theirs" / "model.safetensors")
    back = to_transformers(ours.state_dict())
    assert back.keys() == written.keys() and all(torch.equal(back[name], value) for name, value in written.items())
    safetensors.save_file(back, tmp_path / "ours.safetensors")


def test_other_names_are_refused():
    with pytest.raises(ValueError, match=r"^vit.pooler.dense.weight is not one of this family$"):
        from_transformers({"vit.pooler.dense.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"^blocks.3.attn.v.bias is missing$"):
        from_transformers({f"vit.layers.3.attention.{part}_proj.bias": torch.zeros(1) for part in "qk"})
    with pytest.raises(ValueError, match=r"^class_tokens is not one of this family$"):
        from_torchvision({"class_tokens": torch.zeros(1)})
    state = small(global_pool="avg").state_dict()
    for there in (to_torchvision, to_transformers):
        with pytest.raises(ValueError, match=r"^fc_norm.weight is not one of this family$"):
            there(state)


# Published sizes


@pytest.mark.parametrize(
    ("name", "parameters", "giga"),
    [
        ("vit_tiny", 5_717_416, None),
        ("vit_small", 22_050_664, 4.599),
        ("vit_base", 86_567_656, 17.564),
        ("vit_large", 304_326_632, 61.555),
        ("vit_base(img_size=384)", 86_859_496, 55.48),
    ],
)
def test_parameters_and_multiply_adds(name, parameters, giga):
    with torch.device("meta"):
        model = glocal.create_model(name)
        side = 384 if "384" in name else 224
        macs = cost.macs(model, torch.zeros(1, 3, side, side))
    assert all(p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert all(block.attn.num_heads * 64 == model.num_features for block in model.blocks)
    assert giga is None or macs == pytest.approx(giga * 1e9, rel=0.005)
    dim, depth, n = model.num_features, len(model.blocks), (side // 16) ** 2
    assert macs == n * dim * 3 * 256 + depth * ((n + 1) * 12 * dim**2 + 2 * (n + 1) ** 2 * dim) + 1000 * dim


@pytest.mark.slow
@pytest.mark.parametrize("name", ["vit_small", "vit_base", "vit_large"])
def test_full_models_are_timms(name):
    timm = pytest.importorskip("timm")
    ours, theirs = glocal.create_model(name).eval(), timm.create_model(f"{name}_patch16_224").eval()
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        found, expected = ours(image), theirs(image)
    assert (found - expected).abs().max() <= 1e-4 * expected.abs().max()


def test_first_values():
    model = glocal.create_model("vit_tiny", depth=1)
    for tensor in (model.pos_embed, model.blocks[0].attn.qkv.weight, model.blocks[0].mlp.fc2.weight, model.head.weight):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.03)
    assert 0 < model.cls_token.abs().max() < 1e-5 and not model.blocks[0].mlp.fc1.bias.any()


# Methods, training, compilation


def test_maps_of_blocks():
    ours, theirs = at_random(small(depth=2)), timms().eval()
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    assert_close(ours.forward_intermediates(image), theirs.forward_intermediates(image))
    features = glocal.create_model("vit_small", features_only=True, out_indices=[0], img_size=(32, 48), **SMALL)
    features.double().load_state_dict(
        {
            f"model.{name}": value
            for name, value in ours.state_dict().items()
            if f"model.{name}" in features.state_dict()
        }
    )
    assert_close(features(image)[0], theirs.forward_intermediates(image, [0], intermediates_only=True)[0])
    assert features.feature_info == [{"num_chs": 24, "reduction": 8, "module": "blocks.0"}]
    assert [tuple(m.shape) for m in features(torch.randn(2, 3, 33, 17).double())] == [(2, 24, 5, 3)]
    by_mean = glocal.create_model("vit_small", features_only=True, out_indices=[0], global_pool="avg", **SMALL)
    for state in (features.state_dict(), by_mean.state_dict()):
        assert {name.split(".")[1] for name in state} == {"cls_token", "pos_embed", "patch_embed", "blocks"}
        assert not any(name.startswith("model.blocks.1") for name in state)


def test_branches_are_skipped_for_an_image():
    block = at_random(small(drop_path_rate=0.5)).blocks[1].train()
    x = torch.randn(64, 7, 24, dtype=torch.float64)
    out = block(x, grid=(2, 3))
    block.eval()
    attended = {kept: x + kept * 2 * block.attn(block.norm1(x)) for kept in (0, 1)}
    cases = [a + kept * 2 * block.mlp(block.norm2(a)) for a in attended.values() for kept in (0, 1)]
    fits = torch.stack([torch.isclose(out, case).all(-1).all(-1) for case in cases])
    assert (fits.sum(0) == 1).all() and (fits.sum(1) > 4).all()
    rates = [block.drop_path2.rate for block in small(drop_path_rate=0.4, depth=5).blocks]
    assert rates == pytest.approx([0, 0.1, 0.2, 0.3, 0.4])


def test_checkpoints_change_no_gradient():
    image, found = torch.randn(4, 3, 32, 48, dtype=torch.float64), []
    for checkpointed in (False, True):
        model = at_random(small(drop_path_rate=0.5)).train()
        model.set_grad_checkpointing(checkpointed)
        torch.manual_seed(2)
        model(image).square().sum().backward()
        found.append({name: p.grad for name, p in model.named_parameters()})
    assert_close(found[1], found[0])


def test_what_decay_leaves_alone():
    assert small().no_weight_decay() == {"pos_embed", "cls_token"}


def test_a_new_head():
    model = small()
    model.reset_classifier(7)
    assert model(torch.randn(2, 3, 32, 48)).shape == (2, 7)
    model.reset_classifier(0)
    assert model(torch.randn(2, 3, 32, 48)).shape == (2, 24)


@pytest.mark.parametrize("then", ["token", "avg", None])
@pytest.mark.parametrize("built", ["token", "avg"])
def test_another_pooling_is_timms(built, then):
    """The norm stays where it was."""
    ours, theirs = small(global_pool=built).double().eval(), timms(global_pool=built).eval()
    for model in (ours, theirs):
        model.reset_classifier(7, then)
    at_random(ours)
    theirs.load_state_dict(ours.state_dict())
    image = torch.randn(3, 3, 32, 48, dtype=torch.float64)
    assert_close(ours(image), theirs(image))
    assert ours.global_pool == theirs.global_pool


def test_layers_can_be_looked_into():
    """They know that a class token stands in front of the grid."""
    model = small().eval()
    with glocal.inspect(model) as seen:
        model(torch.randn(1, 3, 20, 48))
    assert [call.name for call in seen] == ["blocks.0.attn", "blocks.1.attn"]
    for call in seen:
        found = call.weights()
        assert found.source_grid == (3, 6) and found.source_positions.isnan().all(1).tolist() == [True] + 18 * [False]
        assert call.rebuild_error() < 1e-5


def test_compiles_as_one_graph():
    """For any size, and for training at one: PyTorch cannot compile the derivative of a resize to any size."""
    model = small(depth=1).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=True)
    with torch.no_grad():
        for size in ((32, 48), (33, 23)):
            image = torch.randn(2, 3, *size)
            assert_close(compiled(image), model(image), rtol=1e-4, atol=1e-5)
    image, found = torch.randn(2, 3, 32, 48), []
    for run in (torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=False), model):
        model.zero_grad()
        run(image).square().sum().backward()
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    assert_close(*found, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patch_size": 0}, "^vit_small: patch_size: 0, must be a positive"),
        ({"img_size": (32, 32, 32)}, "^vit_small: img_size: "),
        ({"num_heads": 5}, "^vit_small: .*num_heads: 5 does not divide 24"),
        ({"depth": 0}, "^vit_small: depth: 0"),
        ({"global_pool": "max"}, "^vit_small: global_pool: 'max', must be 'token' or 'avg'"),
        ({"drop_path_rate": 1}, "^vit_small: drop_path_rate: 1"),
        ({"num_class": 3}, "^vit_small: has no argument 'num_class'; did you mean 'num_classes'"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)
    with pytest.raises(ValueError, match=r"this network takes images \[B, 3, H, W\]"):
        small()(torch.zeros(2, 1, 32, 48))
