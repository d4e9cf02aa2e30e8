"""timm's own CoAtNets against timm, and their published sizes."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

import glocal
from glocal.models.keys.coatnet_rw import SOURCES

maxxvit = pytest.importorskip("timm.models.maxxvit")

NAMES = {
    "coatnet_pico_rw": 10_851_364,
    "coatnet_nano_rw": 15_141_244,
    "coatnet_0_rw": 27_435_562,
    "coatnet_bn_0_rw": 27_435_562,
    "coatnet_1_rw": 41_721_502,
    "coatnet_2_rw": 73_868_400,
    "coatnet_3_rw": 165_173_428,
    "coatnet_rmlp_nano_rw": 15_145_116,
    "coatnet_rmlp_0_rw": 27_446_074,
    "coatnet_rmlp_1_rw2": 41_724_622,
    "coatnet_rmlp_2_rw": 73_881_264,
    "coatnet_rmlp_3_rw": 165_152_788,
}
SMALL = {"dims": (32, 64, 64, 96), "depths": (1, 2, 2, 1), "stem_dims": (8, 16), "num_classes": 5, "img_size": 64}

FAULTS = {
    "models/coatnet_rw.py": (
        ("convolution blocks stride in the depthwise one", '"stride_in": stride_in,', '"stride_in": "depthwise",'),
        ("no activation follows the first norm", 'flag("pre_activation", pre_activation)', "False"),
        ("squeeze-excite stands behind the third norm", 'flag("se_early", se_early)', "False"),
        ("squeeze-excite has SiLU", '"se_activation": se_activation', '"se_activation": "silu"'),
        ("convolution blocks have biases", 'flag("conv_bias", conv_bias)', "True"),
        ("the skip path of attention has a bias", "bias=shortcut_bias", "bias=True"),
        ("convolution blocks have GELU", '"activation": "silu"', '"activation": "gelu"'),
        ("the stem has GELU", "        stem.act = nn.SiLU()\n", ""),
        ("the stem's convolutions have as many channels", "hidden_dim=hidden", "hidden_dim=None"),
        ("blocks widen from what goes out", "inner_dim=4 * dim, se", "inner_dim=4 * out_dim, se"),
        ("attention widens at once", "inner_dim=dim,\n", "inner_dim=out_dim,\n"),
        ("attention blocks keep layer norms", "made.norm1, made.norm2 = make_norm(dim), make_norm(out_dim)", "pass"),
        ("the last norm is a layer norm", "norm=make_norm", "norm=nn.LayerNorm"),
        ("positions have a table", "position_mlp=position_mlp,", "position_mlp=None,"),
        ("branches are not scaled", "layer_scale=layer_scale", "layer_scale=None"),
        ("number 0 strides in a convolution", '(2, 3, 7, 2), stride_in="pool")', "(2, 3, 7, 2))"),
    ),
    "models/coatnet.py": (
        ("batch norms of attention blocks add 1e-5", "TokenBatchNorm: 1e-6", "TokenBatchNorm: 1e-5"),
        ("norms are known by their kind alone", "if type(part) in _EPS:", "if isinstance(part, nn.LayerNorm):"),
    ),
    "blocks.py": (
        ("tokens are not pooled", "if self.down is not None:", "if False:"),
        ("pooling takes maxima", 'self.down = Pool(before, "avg"', 'self.down = Pool(before, "max"'),
        ("the first activation is always there", "self.act(x) if self.pre_activation else x", "self.act(x)"),
        ("activations are always GELU", 'nn.GELU() if activation == "gelu" else nn.SiLU()', "nn.GELU()"),
        ("squeeze-excite always has SiLU", 'nn.SiLU() if activation == "silu" else nn.ReLU()', "nn.SiLU()"),
        ("the last convolution has a bias", "nn.Conv2d(inner, out_dim, 1, bias=bias)", "nn.Conv2d(inner, out_dim, 1)"),
        ("the skip path's map has a bias", "nn.Linear(dim, out_dim, bias=bias)", "nn.Linear(dim, out_dim)"),
        ("squeeze-excite takes its width from what goes out", "if se_dim is None else se_dim", "if True else 0"),
    ),
    "mixers/relative_attention.py": (
        ("offsets are those of a source", "torch.arange(1 - n, n, dtype", "-torch.arange(1 - n, n, dtype"),
        ("offsets count linearly", "places.abs().log1p()", "places.abs()"),
        ("rows and columns change places", "for n in grid]\n            pl", "for n in grid[::-1]]\n            pl"),
        ("MLPs of positions are decayed", '_table", "relative_position_mlp")', '_table",)'),
    ),
    "backbone.py": (
        ("the stem's convolutions have as many channels", "dim if hidden_dim is None else hidden_dim", "dim"),
    ),
}  # fmt: skip


def small(name, dtype=torch.float64):
    """One of our networks with weights that make every part count, and timm's with the same ones, strictly loaded."""
    torch.manual_seed(0)
    ours = glocal.create_model(name, **SMALL).to(dtype)
    with torch.no_grad():
        for key, tensor in [*ours.named_parameters(), *ours.named_buffers()]:
            if key.endswith("running_var"):
                tensor.uniform_(0.5, 1.5)
            elif key.endswith("bias_table"):
                tensor.normal_()
            elif tensor.dim() > 1:
                tensor.normal_(std=tensor[0].numel() ** -0.5)
            elif tensor.is_floating_point() and "running" not in key:
                tensor.normal_(std=0.3).add_(1 if key.endswith("weight") else 0)
    config = replace(
        maxxvit.model_cfgs[name], embed_dim=SMALL["dims"], depths=SMALL["depths"], stem_width=SMALL["stem_dims"]
    )
    theirs = maxxvit.MaxxVit(config, img_size=64, num_classes=5).to(dtype)
    theirs.load_state_dict(SOURCES["timm"].write(ours.state_dict()), strict=True)
    for part in theirs.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0  # in front of position biases, which here nothing drops
        elif hasattr(part, "rel_coords_log"):  # which timm rounds to single precision
            axes = [torch.arange(1 - n, n, dtype=dtype) for n in part.window_size]
            offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
            part.rel_coords_log = offsets.sign() * (1 + offsets.abs()).log()
    return ours, theirs


def is_the_same(ours, theirs, image):
    """Scores and the gradients of images, relative to the largest."""
    bound, found = 1e-4 if image.dtype == torch.float32 else 1e-9, []
    for model in (ours, theirs):
        x = image.clone().requires_grad_()
        scores = model(x)
        upstream = torch.linspace(-1, 1, scores.numel(), dtype=x.dtype).view(scores.shape)
        found.append((scores, *torch.autograd.grad(scores, x, upstream)))
    for one, other in zip(*found, strict=True):
        assert (one - other).abs().max() <= bound * other.abs().max()


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_is_timms(name, training):
    ours, theirs = small(name)
    is_the_same(ours.train(training), theirs.train(training), torch.randn(2, 3, 64, 64, dtype=torch.float64))


@pytest.mark.parametrize("name", ["coatnet_0_rw", "coatnet_bn_0_rw"])
def test_is_timms_in_single_precision(name):
    ours, theirs = small(name, torch.float32)
    is_the_same(ours.train(), theirs.train(), torch.randn(4, 3, 64, 64))


@pytest.mark.parametrize("name", NAMES)
def test_timm_has_the_same_names_and_parameters(name):
    with torch.device("meta"):
        model = glocal.create_model(name)
        theirs = maxxvit.MaxxVit(maxxvit.model_cfgs[name]).state_dict()
    ours = SOURCES["timm"].write(model.state_dict())
    assert {k: v.shape for k, v in ours.items()} == {k: v.shape for k, v in theirs.items()}
    assert sum(p.numel() for p in model.parameters()) == NAMES[name]


@pytest.mark.parametrize("name", ["coatnet_nano_rw", "coatnet_bn_0_rw", "coatnet_3_rw", "coatnet_rmlp_2_rw"])
def test_weights_are_read_from_a_file(tmp_path, name):
    ours, theirs = small(name)
    torch.save(theirs.state_dict(), tmp_path / "w.pth")
    model = glocal.create_model(name, tmp_path / "w.pth", **SMALL).double().eval()
    image = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    assert_close(model(image), ours.eval()(image), rtol=1e-4, atol=1e-4)  # loaded in single precision


@pytest.mark.parametrize("size", [(200, 312), (97, 131)])
@pytest.mark.parametrize("name", ["coatnet_0_rw", "coatnet_bn_0_rw", "coatnet_rmlp_2_rw"])
def test_any_size(name, size):
    model = glocal.create_model(name, **SMALL).eval()
    maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True, norm=True)
    assert tuple(maps[-1].shape[2:]) == tuple(-(-side // 32) for side in size) and maps[-1].isfinite().all()
    assert model.feature_info.channels() == [16, 32, 64, 64, 96]


@pytest.mark.parametrize("size", [(96, 128), (32, 64)])
def test_position_mlps_know_every_size(size):
    """Made for 64 pixels a side, called at another size, it is timm's network of that size with the same weights."""
    ours, theirs = small("coatnet_rmlp_1_rw2")
    theirs.set_input_size(size)
    for part in theirs.modules():
        if hasattr(part, "rel_coords_log"):
            axes = [torch.arange(1 - n, n, dtype=torch.float64) for n in part.window_size]
            offsets = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
            part.rel_coords_log = offsets.sign() * (1 + offsets.abs()).log()
    is_the_same(ours.eval(), theirs.eval(), torch.randn(2, 3, *size, dtype=torch.float64))


def test_what_is_not_decayed():
    model = glocal.create_model("coatnet_rmlp_1_rw2", **SMALL)
    names = {name for name, _ in model.named_parameters() if "relative_position_mlp" in name}
    assert len(names) == 12 and model.no_weight_decay() == names


def test_one_layer_scale_a_branch_of_attention():
    model = glocal.create_model("coatnet_3_rw", **SMALL)
    scales = [name for name, p in model.named_parameters() if name.endswith("gamma") and p.eq(1e-6).all()]
    assert len(scales) == 6


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stem_dims": (32,)}, r"^coatnet_0_rw: stem_dims: \(32,\), must have one number for each of the 2"),
        ({"stride_in": "expand"}, "^coatnet_0_rw: stride_in: 'expand', must be 'depthwise' or 'pool'"),
        ({"norm": "group"}, "^coatnet_0_rw: norm: 'group', must be 'layer' or 'batch'"),
        ({"se_activation": "gelu"}, "^coatnet_0_rw: se_activation: 'gelu', must be 'silu' or 'relu'"),
        ({"se_early": 1}, "^coatnet_0_rw: se_early: 1, must be True or False"),
        ({"conv_bias": None}, "^coatnet_0_rw: conv_bias: None, must be True or False"),
        ({"position_mlp": 0}, "^coatnet_0_rw: RelativeAttention: position_mlp: 0, must be a positive"),
        ({"dims": (48, 80, 80, 96)}, "^coatnet_0_rw: RelativeAttention: head_dim: 32 does not divide 80"),
    ],
)
def test_what_is_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        glocal.create_model("coatnet_0_rw", **arguments)


@pytest.mark.slow
def test_is_timms_coatnet_0_rw():
    ours = glocal.create_model("coatnet_0_rw").eval()
    theirs = maxxvit.MaxxVit(maxxvit.model_cfgs["coatnet_0_rw"]).eval()
    theirs.load_state_dict(SOURCES["timm"].write(ours.state_dict()), strict=True)
    is_the_same(ours, theirs, torch.randn(1, 3, 224, 224))
