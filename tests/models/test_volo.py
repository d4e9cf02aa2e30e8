"""VOLO against timm's with the same weights, its published sizes, and its weights under timm's names."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import glocal
from glocal.analysis import cost
from glocal.models.keys.volo import from_timm, to_timm

SMALL = {"dims": (16, 24), "num_heads": (2, 3), "depths": (2, 1, 2, 1), "stem_dim": 8, "num_classes": 5}

FAULTS = {
    "models/volo.py": (
        ("outlookers stand at every token", "OutlookAttention(stride=2)", "OutlookAttention"),
        ("outlookers have the other heads", "fine, num_heads=heads[0]", "fine, num_heads=heads[1]"),
        ("queries have biases", "SelfAttention(qkv_bias=False)", "SelfAttention"),
        ("the class token's query has a bias", "ClassAttention(qkv_bias=False)", "ClassAttention"),
        ("the stem has no batch norm", "nn.BatchNorm2d(hidden_dim),", "nn.Identity(),"),
        ("the stem's convolutions keep the pixels", "(in_chans, 7, 2)", "(in_chans, 7, 1)"),
        ("images are not completed", "completed(x, self.patch_size).contig", "x.contig"),
        ("tokens have no place", "return x + resized_positions", "return x + 0 * resized_positions"),
        ("rows are resized to columns", "self.grid_size, grid).unfl", "self.grid_size, grid[::-1]).unfl"),
        ("the class token is not normalised", "self.attn(self.norm1(x), **call)", "self.attn(x, **call)"),
        ("class attention has no MLP", "token = token + self.drop_path2(self.mlp(self.norm2(token)))", "pass"),
        ("the class token takes another's place", "cat([token, x[:, 1:]], 1)", "cat([token, x[:, :-1]], 1)"),
        ("class attention takes columns for rows", "grid=tuple(x.shape[1:3])", "grid=tuple(x.shape[2:0:-1])"),
        ("the score is the class token's alone", "return scores + 0.5 * self", "return scores + 0 * self"),
        ("tokens count in full", "+ 0.5 * self.aux_head", "+ self.aux_head"),
        ("the mean of tokens counts", ".max(1).values", ".mean(1)"),
        ("the class token counts as a token", "self.aux_head(x[:, 1:]).max", "self.aux_head(x).max"),
        ("pooling stays the class token's", 'x[:, 0] if self.global_pool == "token" else x.mean(1)', "x[:, 0]"),
        ("the mean leaves out the class token", "else x.mean(1)", "else x[:, 1:].mean(1)"),
        ("training takes the class token", "self.head(self.pool(x))", "self.head(x[:, 0])"),
        ("a map begins with the class token", "return x[:, 1:].unflatten(", "return x[:, :-1].unflatten("),
        ("a new head leaves that of the tokens", 'classifiers = ("head", "aux_head")', 'classifiers = ("head",)'),
        (
            "features keep class attention",
            'after_stages = ("post_network", "norm", "head", "aux_head")',
            'after_stages = ("norm", "head", "aux_head")',
        ),
        ("fine tokens are said to be coarse", '"reduction": side if i else patch_size', '"reduction": side'),
        ("an odd patch size is cut", 'if positive("patch_size", patch_size) % 2:', "if False:"),
        ("the table of positions is decayed", '{"network.1.downsample.pos_embed", "post', '{"post'),
        ("linear maps begin as PyTorch's", "        start_linear_maps(self)\n", ""),
        ("D4's heads have 32 channels", "depths=(8, 8, 16, 4), num_heads=(12, 16))", "depths=(8, 8, 16, 4))"),
        ("D5's MLPs are as D4's", "num_heads=(12, 16), mlp_ratio=4", "num_heads=(12, 16)"),
        ("D5's stem is as D4's", "stem_dim=128, ", ""),
    ),
    "models/parts.py": (
        ("an image is completed in front", "(0, w * p - x.shape[3], 0,", "(w * p - x.shape[3], 0, 0,"),
        ("coarse tokens always have a norm", "(dim, out_dim, 2, norm=norm)", "(dim, out_dim, 2)"),
    ),
    "models/keys/volo.py": (
        ("values come before keys", 'zip("kv", found', 'zip("vk", found'),
        ("values go out before keys", "torch.cat(parts)", "torch.cat(parts[::-1])"),
        ("groups of blocks are one behind", '("network.3", "network.2"),', '("network.3", "network.4"),'),
        ("files of timm are not known", 'Source("post_network.0.attn.kv.weight"', 'Source("kv.weight"'),
        ("parts of one map share its memory", "= own.clone()", "= own"),
    ),
    "checkpoint.py": (("the release's files are not read", ', ".tar")', ")"),),
}  # fmt: skip


def at_random(model):
    """A model whose every parameter and statistic says something, in double precision and evaluation."""
    generator = torch.Generator().manual_seed(1)
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith("running_var") or (name.endswith("weight") and ("norm" in name or ".conv." in name)):
            noise = 1 + 0.1 * noise.abs() if tensor.dim() == 1 else noise * tensor[0].numel() ** -0.5
        else:
            noise = 0.3 * noise
        tensor.copy_(noise)
    return model.double().eval()


def small(**arguments):
    return glocal.create_model("volo_d1", **{**SMALL, "img_size": (64, 96), **arguments})


def timms(ours, size=(64, 96), **arguments):
    """timm's network with the same weights."""
    volo = pytest.importorskip("timm.models.volo")
    model = volo.VOLO(
        layers=SMALL["depths"], img_size=size, num_classes=ours.num_classes, stem_hidden_dim=8,
        embed_dims=(16, 24, 24, 24), num_heads=(2, 3, 3, 3), **arguments,
    )  # fmt: skip
    state = to_timm(ours.state_dict())
    assert state.keys() == model.state_dict().keys()
    model.load_state_dict(state)
    return model.to(ours.norm.weight.dtype).train(ours.training)


def with_gradients(model, image, names=dict):
    """Scores, and derivatives of the image and of all parameters by name."""
    x = image.clone().requires_grad_()
    scores = model(x)
    (scores * torch.linspace(-1, 2, scores.numel(), dtype=scores.dtype).view(scores.shape)).sum().backward()
    return scores.detach(), x.grad, names({name: p.grad for name, p in model.named_parameters()})


@pytest.mark.parametrize("training", [False, True])
def test_is_timms_model(training):
    """In training too, where scores of tokens count as in evaluation."""
    ours = at_random(small()).train(training)
    theirs = timms(ours)
    image = torch.randn(3, 3, 64, 96, dtype=torch.float64)
    found, expected = with_gradients(ours, image, to_timm), with_gradients(theirs, image)
    assert_close(found[:2], expected[:2], rtol=1e-9, atol=1e-9)
    assert found[2].keys() == expected[2].keys()
    for name, grad in expected[2].items():
        assert (found[2][name] - grad).abs().max() <= 1e-9 * max(grad.abs().max(), 1), name
    ours.eval()
    theirs.eval()
    assert_close(ours.forward_features(image), theirs.forward_features(image))
    pooled = [model.forward_head(model.forward_features(image), pre_logits=True) for model in (ours, theirs)]
    assert_close(*pooled)
    single = image.float()
    assert_close(ours.float()(single), theirs.float()(single), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("height", "width"), [(64, 96), (97, 131), (96, 64), (40, 72), (60, 90), (33, 31), (8, 16), (5, 3)]
)
def test_other_sizes(height, width):
    """timm's parts, on an image and on fine tokens that are completed by zeros, with positions that PyTorch resizes."""
    ours = at_random(small())
    theirs = timms(ours)
    image = torch.randn(2, 3, height, width, dtype=torch.float64)
    x = theirs.patch_embed(F.pad(image, (0, -width % 8, 0, -height % 8))).permute(0, 2, 3, 1)
    x = theirs.network[0](x)
    x = theirs.network[1](F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2)))
    table = theirs.pos_embed.permute(0, 3, 1, 2)
    if x.shape[1:3] != table.shape[2:]:
        table = F.interpolate(table, x.shape[1:3], mode="bicubic", antialias=True)
    x = x + table.permute(0, 2, 3, 1)
    for group in theirs.network[2:]:
        x = group(x)
    tokens = theirs.norm(theirs.forward_cls(x.flatten(1, 2)))
    assert_close(ours(image), theirs.forward_head(tokens), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("size", [(200, 312), (224, 160), (97, 131), (448, 448)])
def test_sizes_of_photographs(size):
    model = glocal.create_model("volo_d1", **{**SMALL, "depths": (1, 1, 1, 1)}).eval()
    with torch.no_grad():
        maps = model.forward_intermediates(torch.randn(1, 3, *size), norm=True, intermediates_only=True)
    fine = tuple(-(-side // 8) for side in size)
    assert [tuple(m.shape[2:]) for m in maps] == [fine] + 3 * [tuple(-(-side // 2) for side in fine)]
    assert all(m.isfinite().all() for m in maps)


# Weights


def test_weights_go_there_and_back(tmp_path):
    ours = at_random(small()).float()
    state = ours.state_dict()
    there = to_timm(state)
    back = from_timm(there)
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    assert back["post_network.0.attn.k.weight"]._base is None
    torch.save({"state_dict": there}, tmp_path / "d1_224_84.2.pth.tar")  # as the release names and saves them
    read = small(pretrained=tmp_path / "d1_224_84.2.pth.tar").state_dict()
    assert all(torch.equal(read[key], state[key]) for key in state)
    torch.save(state, tmp_path / "ours.pth")
    read = small(pretrained=tmp_path / "ours.pth").state_dict()
    assert all(torch.equal(read[key], state[key]) for key in state)
    with pytest.raises(ValueError, match=r"^stem\.weight is not one of this family$"):
        from_timm({**there, "stem.weight": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"weights of another network: .*pos_embed has shape \(1, 4, 6, 24\)"):
        small(pretrained=tmp_path / "d1_224_84.2.pth.tar", img_size=96)


# Published sizes


@pytest.mark.parametrize(
    ("name", "size", "parameters", "giga"),
    [
        ("volo_d1", 224, 26_632_040, 6.92),
        ("volo_d2", 224, 58_678_336, 14.31),
        ("volo_d3", 224, 86_325_072, 20.73),
        ("volo_d4", 224, 192_961_520, 44.26),
        ("volo_d5", 224, 295_455_584, 72.30),
        ("volo_d1", 384, 26_777_960, 22.68),
        ("volo_d2", 384, 58_872_896, 46.06),
        ("volo_d3", 448, 86_626_128, 96.13),
        ("volo_d4", 448, 193_413_104, 196.84),
        ("volo_d5", 448, 295_907_168, 314.65),
        ("volo_d5", 512, 296_091_488, 424.56),
    ],
)
def test_parameters_and_multiply_adds(name, size, parameters, giga):
    with torch.device("meta"):
        model = glocal.create_model(name, img_size=size)
        macs = cost.macs(model, torch.zeros(1, 3, size, size))
    assert all(p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert macs == pytest.approx(giga * 1e9, rel=0.005)


@pytest.mark.parametrize("name", ["volo_d1", "volo_d2", "volo_d3", "volo_d4", "volo_d5"])
def test_timm_has_the_same_names_and_heads(name):
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        ours, theirs = glocal.create_model(name), timm.create_model(f"{name}_224")
    found = {k: v.shape for k, v in to_timm(ours.state_dict()).items()}
    assert found == {k: v.shape for k, v in theirs.state_dict().items()}
    heads = [m.num_heads for m in ours.modules() if hasattr(m, "num_heads")]
    assert heads == [m.num_heads for m in theirs.modules() if hasattr(m, "num_heads")]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "theirs", "size", "dtype"),
    [
        ("volo_d1", "volo_d1_224", 224, torch.float32),
        ("volo_d1", "volo_d1_384", 384, torch.float64),
        ("volo_d2", "volo_d2_224", 224, torch.float64),
        ("volo_d3", "volo_d3_224", 224, torch.float64),
    ],
)
def test_is_the_published_one(name, theirs, size, dtype):
    timm = pytest.importorskip("timm")
    ours, theirs = glocal.create_model(name, img_size=size), timm.create_model(theirs)
    ours.load_state_dict(from_timm(theirs.state_dict()))
    image = torch.randn(1, 3, size, size, dtype=dtype)
    found, expected = (with_gradients(model.to(dtype).eval(), image)[:2] for model in (ours, theirs))
    bound = 1e-4 if dtype == torch.float32 else 1e-9
    assert (found[0] - expected[0]).abs().max() <= bound * expected[0].abs().max()
    # over all pixels: where rounding turns one of the stem's ReLUs off, the gradient of some jumps
    assert (found[1] - expected[1]).norm() <= 10 * bound * expected[1].norm()


def test_first_values():
    model = glocal.create_model("volo_d1", depths=(1, 1, 1, 1))
    placed = model.network[1].downsample.pos_embed
    for tensor in (placed, model.network[2][0].attn.qkv.weight, model.aux_head.weight):
        assert tensor.std().item() == pytest.approx(0.02, rel=0.03)
    assert model.post_network.cls_token.std().item() == pytest.approx(0.02, rel=0.3)
    assert not model.network[0][0].attn.attn.bias.any()


# What users of timm know


def test_maps_of_groups():
    ours = at_random(small())
    theirs = timms(ours)
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    found, expected = ours.forward_intermediates(image), theirs.forward_intermediates(image)
    assert_close(found, expected)
    last = ours.forward_intermediates(image, [-1], norm=True, intermediates_only=True)
    assert_close(last, theirs.forward_intermediates(image, [-1], norm=True, intermediates_only=True))
    for mine, other in zip(ours.feature_info, theirs.feature_info, strict=True):
        assert (mine["num_chs"], mine["reduction"]) == (other["num_chs"], other["reduction"])
    for indices, gone in (((0,), "network.1"), ((0, 2), "network.3")):
        features = small(features_only=True, out_indices=indices).double().eval()
        kept = features.state_dict()
        assert not any(n.startswith((f"model.{gone}", "model.post", "model.norm", "model.head")) for n in kept)
        features.load_state_dict({f"model.{n}": t for n, t in ours.state_dict().items() if f"model.{n}" in kept})
        assert_close(features(image), [expected[1][i] for i in indices])
        assert features.no_weight_decay() <= dict(features.named_parameters()).keys()


def test_new_heads():
    model = small()
    model.reset_classifier(7)
    image = torch.randn(2, 3, 40, 48)
    assert model(image).shape == (2, 7) and model.aux_head.out_features == 7
    model.reset_classifier(0)
    assert_close(model.eval()(image), model.forward_features(image)[:, 0])
    assert glocal.create_model("volo_d1", **{**SMALL, "num_classes": 0}, in_chans=1)(image[:, :1]).shape == (2, 24)


def test_another_pooling_is_timms():
    """A mean over all tokens, that of the class too."""
    ours = small()
    ours.reset_classifier(5, global_pool="avg")
    ours = at_random(ours)
    theirs = timms(ours)
    theirs.global_pool = "avg"
    image = torch.randn(2, 3, 64, 96, dtype=torch.float64)
    assert_close(ours(image), theirs(image))
    scores, _, _ = ours.train().forward_train(image, box=(0, 0, 0, 0))
    assert_close(scores, ours.head(ours.forward_features(image).mean(1)))


def test_what_decay_leaves_alone():
    left = small().no_weight_decay()
    assert set(to_timm({name: torch.zeros(1) for name in left})) == {"pos_embed", "cls_token"}


def test_layers_can_be_looked_into():
    model = small().eval()
    with glocal.inspect(model) as seen:
        model(torch.randn(1, 3, 40, 90))
    assert len(seen) == 2 + 4 + 2
    assert all(call.rebuild_error() < 1e-5 for call in seen)
    assert seen["post_network.1.attn"][0].weights().source_grid == (3, 6)


@pytest.mark.parametrize("dynamic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_compiles_as_one_graph(dynamic):
    model = small(depths=(1, 1, 1, 1)).eval()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    with torch.no_grad():
        for size in ((64, 96), (41, 90)) if dynamic else ((64, 96),):
            image = torch.randn(2, 3, *size)
            assert_close(compiled(image), model(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dims": (16, 24, 24)}, r"^volo_d1: dims: \(16, 24, 24\), must have one number for each of the 2 stages"),
        ({"depths": (1, 1, 1)}, "^volo_d1: depths: .* of the 4 stages"),
        ({"num_heads": 3}, "^volo_d1: num_heads: 3, must have one"),
        ({"num_heads": (2, 5)}, "^volo_d1: .*num_heads: 5 does not divide 24"),
        ({"patch_size": 7}, "^volo_d1: patch_size: 7, must be even"),
        ({"patch_size": 0}, "^volo_d1: patch_size: 0, must be a positive"),
        ({"stem_dim": 0}, "^volo_d1: stem_dim: 0"),
        ({"post_depth": 0}, "^volo_d1: post_depth: 0"),
        ({"img_size": (32, 32, 32)}, "^volo_d1: img_size: "),
        ({"drop_path_rate": 1}, "^volo_d1: drop_path_rate: 1"),
        ({"mlp_ratio": 0}, "^volo_d1: mlp_ratio: 0"),
        ({"embed_dims": 3}, "^volo_d1: has no argument 'embed_dims'"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        small(**arguments)
    with pytest.raises(ValueError, match=r"this network takes images \[B, 3, H, W\]"):
        small()(torch.zeros(2, 1, 32, 48))
