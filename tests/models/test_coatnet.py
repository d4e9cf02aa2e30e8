"""CoAtNet against timm's with each of its knobs, and its published sizes."""

import math

import pytest
import torch
from torch.nn import functional
from torch.testing import assert_close

import glocal
from glocal.analysis import cost
from glocal.models.keys.coatnet import SOURCES, to_timm

maxxvit = pytest.importorskip("timm.models.maxxvit")

DIMS, DEPTHS, STEM, CLASSES = (32, 64, 64, 96), (1, 2, 2, 1), 16, 5
SMALL = {"dims": DIMS, "depths": DEPTHS, "stem_dim": STEM, "num_classes": CLASSES, "img_size": 64}
STRIDES, POOLS = {"depthwise": "dw", "expand": "1x1"}, {"avg": "avg2", "max": "max2"}
KNOBS = [(stride, pool, head) for stride in STRIDES for pool in POOLS for head in (True, False)]

FAULTS = {
    "models/coatnet.py": (
        ("batch norms add 1e-3", "nn.BatchNorm2d: 1e-5", "nn.BatchNorm2d: 1e-3"),
        ("layer norms add 1e-5", "nn.LayerNorm: 1e-6", "nn.LayerNorm: 1e-5"),
        ("every stage is of convolutions", 'if letter == "C":', "if True:"),
        ("tables are made for the grid before the stride", "grid_size=grid,", "grid_size=tuple(2 * n for n in grid),"),
        ("rows and columns change places", "grid_size=grid,", "grid_size=grid[::-1],"),
        ("heads have 32 channels", "head_dim=head_dim, out", "head_dim=32, out"),
        ("strides stand where MBConv's default is", "out_dim, stride_in=stride_in, pool", "out_dim, pool"),
        ("skip paths pool maxima", "stride_in=stride_in, pool=pool,", 'stride_in=stride_in, pool="max",'),
        ("attention pools maxima", "out_dim=out_dim, pool=pool,", 'out_dim=out_dim, pool="max",'),
        ("all blocks of a stage stride", "stride = 1 if j else strides[i]", "stride = strides[i]"),
        ("a hidden head has two norms", "nn.Identity() if hidden_head else norm(dim)", "norm(dim)"),
        ("a hidden head has no norm", 'head["norm"] = norm(dim)', "pass"),
        ("features are not normalised", "return self.norm(x)", "return x"),
        ("the head takes what stages give", "self.head[:2](super().pool(x))", "super().pool(x)"),
        ("number 6 has the 2048 channels that are printed", "384, 768, 1536, 3072)", "384, 768, 1536, 2048)"),
        ("number 5 has heads of 32", '192, "head_dim": 64', '192, "head_dim": 32'),
        ("attention of numbers 6 and 7 strides again", '"strides": (2, 2, 2, 1, 2)', '"strides": (2, 2, 2, 2, 1)'),
        ("names do not say where strides are", '{"stride_in": "expand"}', "{}"),
        ("names do not say which pooling", '{"pool": "max"}', '{"pool": "avg"}'),
    ),
    "models/keys/coatnet.py": (
        ("heads' queries, keys and values stay together", "(heads, 3, -1)", "(3, heads, -1)"),
        ("tables are transposed", ".T.unflatten(1, (side, side))", ".T.unflatten(1, (side, side)).mT"),
        ("a table of any length is read", "if side**2 != len(found[name]):", "if False:"),
        ("heads need not fit", "if len(found[part]) % (3 * heads):", "if False:"),
        ("the last stages have no names", "_STAGES = range(8)", "_STAGES = range(3)"),
        ("biases of projections stay as they are", '("weight", "bias")', '("weight",)'),
        ("linear maps stay convolutions", "found[name] = found[name].flatten(1)\n", "pass\n"),
        ("skip paths stay convolutions", r"|shortcut\.expand", ""),
        ("the norm of attention's first block is elsewhere", "blocks.0.norm1.norm\") for", "blocks.0.norm1\") for"),
    ),
}  # fmt: skip


def small(**changed):
    """One of our networks with weights that make every part count."""
    torch.manual_seed(0)
    model = glocal.create_model("coatnet_0", **{**SMALL, **changed})
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith("running_mean"):
                tensor.normal_(std=0.3)
            elif name.endswith("bias_table"):
                tensor.normal_()
            elif tensor.dim() > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
            elif tensor.is_floating_point():
                tensor.normal_(std=0.3).add_(1 if name.endswith("weight") else 0)
    return model


def timms(layout="C-C-T-T", stride_in="depthwise", pool="avg", hidden_head=True, img_size=64, dims=DIMS):
    """timm's network of these sizes."""
    config = maxxvit.MaxxVitCfg(
        embed_dim=dims,
        depths=DEPTHS,
        block_type=tuple(layout.split("-")),
        stem_width=STEM,
        head_hidden_size=dims[-1] if hidden_head else None,
        conv_cfg=maxxvit.MaxxVitConvCfg(stride_mode=STRIDES[stride_in], pool_type=POOLS[pool]),
        transformer_cfg=maxxvit.MaxxVitTransformerCfg(pool_type=POOLS[pool]),
    )
    return maxxvit.MaxxVit(config, img_size=img_size, num_classes=CLASSES)


def both(dtype, **knobs):
    """Ours and timm's with the same weights, strictly loaded."""
    ours, theirs = small(**knobs).to(dtype), timms(**knobs).to(dtype)
    theirs.load_state_dict(to_timm(ours.state_dict()), strict=True)
    return ours, theirs


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


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("size", [(64, 64), (96, 64)])
@pytest.mark.parametrize(("stride_in", "pool", "hidden_head"), KNOBS)
def test_is_timms_with_each_knob(stride_in, pool, hidden_head, size, training):
    ours, theirs = both(torch.float64, stride_in=stride_in, pool=pool, hidden_head=hidden_head, img_size=size)
    is_the_same(ours.train(training), theirs.train(training), size)


@pytest.mark.parametrize("layout", ["C-C-C-C", "C-C-C-T", "C-T-T-T", "T-C-T-C"])
def test_is_timms_with_each_layout(layout):
    ours, theirs = both(torch.float64, layout=layout)
    is_the_same(ours.eval(), theirs.eval(), (64, 64))


@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_is_timms_in_single_precision(size):
    ours, theirs = both(torch.float32, img_size=size)
    is_the_same(ours.eval(), theirs.eval(), size)


def test_is_timms_where_width_stays():
    """A stage that is no wider than the one before it pools its skip path, and has no map there."""
    dims = (32, 32, 64, 64)
    ours, theirs = both(torch.float64, dims=dims)
    assert "layers.4.0.shortcut.expand.weight" not in ours.state_dict()
    is_the_same(ours.eval(), theirs.eval(), (64, 64))


def resized(table, sides):
    """A table [G, h, w] by hand, linearly: centres of entries stand at halves, those at the border are repeated."""
    for axis, new in enumerate(sides, start=1):
        old, rows = table.shape[axis], []
        for target in range(new):
            place = min(max((target + 0.5) * old / new - 0.5, 0.0), old - 1.0)
            low = math.floor(place)
            high = min(low + 1, old - 1)
            rows.append(table.select(axis, low) * (1 - place + low) + table.select(axis, high) * (place - low))
        table = torch.stack(rows, axis)
    return table


@pytest.mark.parametrize("size", [(128, 96), (32, 64), (64, 224)])
def test_tables_are_resized_linearly(size):
    """At another size it is timm's network of that size with tables that are resized by hand."""
    ours, theirs = small().double().eval(), timms(img_size=size).double().eval()
    state = ours.state_dict()
    for i, reduction in ((3, 16), (4, 32)):
        for j in range(DEPTHS[i - 1]):
            name = f"layers.{i}.{j}.mixer.relative_position_bias_table"
            state[name] = resized(state[name], [2 * n // reduction - 1 for n in size])
    theirs.load_state_dict(to_timm(state), strict=True)
    is_the_same(ours, theirs, size)


def test_resizing_to_the_same_size_changes_nothing():
    table = torch.randn(2, 7, 5)
    assert_close(resized(table, (7, 5)), table)
    linear = functional.interpolate(table[None], (11, 3), mode="bilinear")[0]
    assert_close(resized(table, (11, 3)), linear)


# Published sizes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("coatnet_0", 25_036_820),
        ("coatnet_0(img_size=384)", 25_142_900),
        ("coatnet_0(img_size=512)", 25_269_236),
        ("coatnet_1", 42_225_776),
        ("coatnet_1(img_size=384)", 42_491_696),
        ("coatnet_2", 74_684_744),
        ("coatnet_2(img_size=512)", 75_461_192),
        ("coatnet_3", 166_966_264),
        ("coatnet_3(img_size=512)", 168_130_936),
        ("coatnet_4", 275_425_288),
        ("coatnet_4(img_size=384)", 276_454_408),
        ("coatnet_5", 687_052_952),
        ("coatnet_5(img_size=512)", 688_918_040),
        ("coatnet_5(head_dim=32)", 687_472_008),
        ("coatnet_6(img_size=512)", 1_472_796_208),
        ("coatnet_7(img_size=512)", 2_444_188_024),
        ("coatnet_0_linear_head", 24_446_228),
        ("coatnet_1_linear_head", 41_635_184),
        ("coatnet_2_linear_head", 73_635_144),
        ("coatnet_3_linear_head", 164_605_432),
        ("coatnet_4_1x1_stride_max_pool_linear_head", 273_064_456),
        ("coatnet_5_linear_head", 682_856_600),
        ("coatnet_0_1x1_stride_max_pool", 25_036_820),
    ],
)
def test_parameters(name, parameters):
    with torch.device("meta"):
        model = glocal.create_model(name)
    assert all(p.is_meta for p in [*model.parameters(), *model.buffers()])
    assert sum(p.numel() for p in model.parameters()) == parameters


@pytest.mark.parametrize(
    ("name", "side", "macs"),
    [
        ("coatnet_0", 224, 4.547e9),
        ("coatnet_0_1x1_stride", 224, 4.142e9),
        ("coatnet_1", 224, 8.643e9),
        pytest.param("coatnet_1_1x1_stride", 224, 8.239e9, marks=pytest.mark.slow),
        pytest.param("coatnet_2", 224, 16.427e9, marks=pytest.mark.slow),
        pytest.param("coatnet_2_1x1_stride", 224, 15.502e9, marks=pytest.mark.slow),
        pytest.param("coatnet_3", 224, 36.453e9, marks=pytest.mark.slow),
        pytest.param("coatnet_3_1x1_stride", 224, 34.372e9, marks=pytest.mark.slow),
        pytest.param("coatnet_4", 224, 62.32e9, marks=pytest.mark.slow),
        pytest.param("coatnet_4_1x1_stride", 224, 60.24e9, marks=pytest.mark.slow),
        ("coatnet_0_1x1_stride", 384, 13.05e9),
        pytest.param("coatnet_4_1x1_stride", 384, 186.50e9, marks=pytest.mark.slow),
        pytest.param("coatnet_3_1x1_stride", 512, 198.11e9, marks=pytest.mark.slow),
        pytest.param("coatnet_6", 512, 1510e9, marks=pytest.mark.slow),
    ],
)
def test_multiply_adds(name, side, macs):
    """Linear maps, convolutions and both products of attention."""
    with torch.device("meta"):
        found = cost.macs(glocal.create_model(name), torch.zeros(1, 3, side, side))
    assert abs(found / macs - 1) < 0.0005


@pytest.mark.parametrize(
    ("name", "mixers"),
    [
        ("coatnet_cccc", "C2 C3 C8 C2"),
        ("coatnet_ccct", "C2 C3 C7 T2"),
        ("coatnet_cctt", "C2 C3 T5 T2"),
        ("coatnet_cttt", "C2 T2 T4 T2"),
        ("vit_rel", "T12"),
    ],
)
def test_layouts_of_the_study_cost_the_same(name, mixers):
    with torch.device("meta"):
        model = glocal.create_model(name)
        macs = cost.macs(model, torch.zeros(1, 3, 224, 224))
    kinds = [["C" if hasattr(block, "conv2_kxk") else "T" for block in stage] for stage in model.layers[1:]]
    assert " ".join(f"{kind[0]}{len(kind)}" for kind in kinds) == mixers and all(len({*kind}) == 1 for kind in kinds)
    assert abs(macs / 4.546507776e9 - 1) < 0.02


@pytest.mark.parametrize(("stride_in", "pool", "hidden_head"), KNOBS)
@pytest.mark.parametrize("size", range(8))
def test_names_say_which(size, stride_in, pool, hidden_head):
    added = {"expand": "_1x1_stride"}.get(stride_in, ""), {"max": "_max_pool"}.get(pool, "")
    name = f"coatnet_{size}{''.join(added)}{'' if hidden_head else '_linear_head'}"
    with torch.device("meta"):
        model = glocal.create_model(name, depths=(1,) * (5 if size > 5 else 4))
    first = model.layers[1][0]
    assert (first.conv1_1x1.stride[0], first.conv2_kxk.stride) == ((1, 2) if stride_in == "depthwise" else (2, 1))
    assert {part.kind for part in model.modules() if hasattr(part, "kind")} == {pool}
    assert ("head.pre_logits.fc.weight" in model.state_dict()) == hidden_head


@pytest.mark.parametrize("number", range(5))
def test_timm_has_the_same_names(number):
    with torch.device("meta"):
        ours = to_timm(glocal.create_model(f"coatnet_{number}").state_dict())
        theirs = maxxvit.MaxxVit(maxxvit.model_cfgs[f"coatnet_{number}"]).state_dict()
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}


# Weights under timm's names


@pytest.mark.parametrize("layout", ["C-C-C-C", "C-C-T-T"])
@pytest.mark.parametrize("hidden_head", [True, False])
def test_weights_go_there_and_back(tmp_path, layout, hidden_head):
    knobs = {"layout": layout, "hidden_head": hidden_head}
    state, theirs = small(**knobs).state_dict(), timms(**knobs)
    theirs.load_state_dict(SOURCES["timm"].write(state), strict=True)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    loaded = glocal.create_model("coatnet_0", tmp_path / "w.pth", **SMALL, **knobs).state_dict()
    assert loaded.keys() == state.keys() and all(torch.equal(loaded[key], state[key]) for key in state)


def test_weights_that_are_not_of_the_family():
    state = to_timm(small(img_size=(64, 96)).state_dict())
    with pytest.raises(
        ValueError, match=r"^layers\.3\.0\.mixer\..*_table: has 77 offsets; only those of square images"
    ):
        SOURCES["timm"].read(state)
    with pytest.raises(ValueError, match=r"^stem\.conv3\.weight is not one of this family$"):
        SOURCES["timm"].read({**state, "stem.conv3.weight": torch.zeros(1)})
    state = to_timm(small().state_dict())
    table = "stages.2.blocks.0.attn.rel_pos.relative_position_bias_table"
    with pytest.raises(ValueError, match=r"qkv\.weight: has 192 channels, which 5 heads do not divide in three$"):
        SOURCES["timm"].read({**state, table: torch.zeros(49, 5)})


# The published network itself


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [(224, 224), (192, 256)])
def test_is_timms_coatnet_0(size, dtype):
    ours = glocal.create_model("coatnet_0", img_size=size).to(dtype).eval()
    theirs = maxxvit.MaxxVit(maxxvit.model_cfgs["coatnet_0"], img_size=size).to(dtype).eval()
    theirs.load_state_dict(to_timm(ours.state_dict()), strict=True)
    is_the_same(ours, theirs, size, batch=1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [1, 2, 3])
def test_is_timms_larger_one(number):
    ours = glocal.create_model(f"coatnet_{number}").eval()
    theirs = maxxvit.MaxxVit(maxxvit.model_cfgs[f"coatnet_{number}"]).eval()
    theirs.load_state_dict(to_timm(ours.state_dict()), strict=True)
    is_the_same(ours, theirs, (224, 224), batch=1)
