"""DWNet and the study's variants against the released network, written out from its definition, and published sizes."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import glocal
from glocal.analysis import cost
from glocal.models.keys.dwnet import from_official, to_official

from .dwnet_release import DIMS, RELEASED, SMALL, official_state, released, small

FAULTS = {
    "models/dwnet.py": (
        ("there is no norm behind the first map", "bn1=TokenBatchNorm(dim),", "bn1=nn.Identity(),"),
        ("nothing is cut off before the mixer", "act1=nn.ReLU(),", "act1=nn.Identity(),"),
        ("nothing is cut off behind the mixer", "act2=nn.ReLU(),", "act2=nn.GELU(),"),
        ("the first map has a bias", "conv1=nn.Linear(dim, dim, bias=False)", "conv1=nn.Linear(dim, dim)"),
        ("the last map has a bias", "conv2=nn.Linear(dim, dim, bias=False)", "conv2=nn.Linear(dim, dim)"),
        ("the last map has no norm", "bn3=TokenBatchNorm(dim),", "bn3=nn.Identity(),"),
        ("the MLP reads what is not normalised", "self.mlp(self.norm2(x))", "self.mlp(x)"),
        ("there is no first skip path", "x = x + self.drop_path1(self.attn(x))", "x = self.drop_path1(self.attn(x))"),
        ("there is no map before the mixer", "v=nn.Linear(dim, dim), mixer", "v=nn.Identity(), mixer"),
        ("kernels always have 7 tokens", "dim, kernel_size=kernel_size, **windows", "dim, **windows"),
        ("windows always have 7 tokens", '{"window_size": kernel_size,', '{"window_size": 7,'),
        ("first windows are shifted", "shifted=number % 2 == 1", "shifted=number % 2 == 0"),
        ("no window is shifted", "kernel_size // 2 if shifted else 0", "0"),
        ("mixers have maps of their own, too", '"projection": False', '"projection": True'),
        ("groups are not asked for", "**windows, **groups)", "**windows)"),
        ("channels share with others than heads have", "num_groups=(3, 6, 12, 24)", "num_groups=(3, 6, 12, 12)"),
        ("where channels share there is a bias", '"DepthwiseConv(bias=False)"', '"DepthwiseConv"'),
        ("local MLP has the wrong block", '"LocalMLP", **_TINY, block="pre_ln")', '"LocalMLP", **_TINY)'),
    ),
    "models/parts.py": (
        ("batch norm runs over rows", "super().forward(x.movedim(-1, 1)).movedim(1, -1)", "super().forward(x.mT).mT"),
    ),
    "models/keys/dwnet.py": (
        ("merging stays where it was", 'f"layers.{i + 1}.downsample")', 'f"layers.{i}.downsample")'),
        ("the norms of a block change places", '(f"{_THERE}.bn", f"{_HERE}.bn2")', '(f"{_THERE}.bn", f"{_HERE}.bn3")'),
        ("kernels of 1 x 1 stay", r"(mixer\.)?conv[12]", r"(mixer\.)?conv[2]"),
        ("predicted kernels of 1 x 1 stay", r"(mixer\.)?conv[12]", "conv[12]"),
        ("D-DW is written as I-D-DW", 'own = () if "layers.0.blocks.0.attn.mixer.bias" in state else', "own ="),
        ("I-D-DW is not read", "renamed(state, (*_INHOMOGENEOUS, *_ALL))", "renamed(state, _ALL)"),
        ("shared kernels are written as DW's", 'n.endswith("attn.mixer.weight") and', "False and"),
        ("local MLP is written as DW", "and tensor.dim() == 3", "and tensor.dim() == 9"),
    ),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("name", RELEASED)
def test_is_the_released_model(name, impl, training):
    """Logits and every gradient; weights go over by the map of names, gradients come back by it."""
    torch.manual_seed(2)
    state = official_state(name)
    model = small(name).double().train(training)
    for part in model.modules():
        if hasattr(part, "impl"):
            part.impl = impl
    model.load_state_dict(from_official(state))
    ours = torch.randn(3, 3, 24, 40, dtype=torch.float64)
    theirs = ours.clone().requires_grad_()
    ours.requires_grad_()
    leaves = {k: v.requires_grad_() for k, v in state.items() if v.is_floating_point() and "running" not in k}
    expected = released(state, theirs, training)
    upstream = torch.randn_like(expected)
    expected_grads = torch.autograd.grad(expected, [theirs, *leaves.values()], upstream)
    found = model(ours)
    found.backward(upstream)
    assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert_close(ours.grad, expected_grads[0], rtol=1e-8, atol=1e-9)
    buffers = {name: torch.zeros_like(buffer) for name, buffer in model.named_buffers()}
    grads = to_official({k: p.grad for k, p in model.named_parameters()} | buffers)
    for key, grad in zip(leaves, expected_grads[1:], strict=True):
        assert_close(grads[key], grad, rtol=1e-7, atol=1e-8, msg=lambda text, key=key: f"{key}\n{text}")


@pytest.mark.parametrize("name", RELEASED)
def test_weights_go_there_and_back(name, tmp_path):
    state = official_state(name, dims=(4, 8, 16, 32), depths=(1, 1, 11, 1))
    model = small(
        name, dims=(4, 8, 16, 32), depths=(1, 1, 11, 1), **({"num_groups": (4,) * 4} if "i_d" in name else {})
    )
    model.double().load_state_dict(from_official(state))
    back = to_official(model.state_dict())
    assert back.keys() == state.keys() and all(torch.equal(back[key], state[key]) for key in state)
    torch.save({"model": state}, tmp_path / "w.pth")
    loaded = small(
        name, dims=(4, 8, 16, 32), depths=(1, 1, 11, 1), pretrained=tmp_path / "w.pth",
        **({"num_groups": (4,) * 4} if "i_d" in name else {}),
    ).state_dict()  # fmt: skip
    assert all(torch.equal(loaded[key], value.float()) for key, value in model.state_dict().items())
    with pytest.raises(ValueError, match=r"^layers\.0\.blocks\.0\.attn\.qkv\.weight is not one of this family$"):
        from_official({**state, "layers.0.blocks.0.attn.qkv.weight": torch.zeros(1)})


def test_what_the_release_does_not_have():
    for name in ("local_mlp_tiny", "local_mlp_tiny_post_bn"):
        with pytest.raises(ValueError, match=r"^local MLP is not in the release"):
            to_official(small(name).state_dict())
    with pytest.raises(ValueError, match=r"^channels that share a kernel are not in the release$"):
        to_official(small("dwnet_tiny_shared_channels").state_dict())
    with pytest.raises(ValueError, match=r"norm1\.weight is not one of this family$"):
        to_official(small("dwnet_tiny_pre_ln").state_dict())


# The variants of the study


def test_dynamic_kernels_that_do_not_change():
    """D-DW whose kernels come from the biases alone is DW with them; so is I-D-DW of as many groups as channels."""
    torch.manual_seed(0)
    plain = small("dwnet_tiny").double().eval()
    with torch.no_grad():
        for name, bias in plain.named_parameters():
            if name.endswith("mixer.bias"):  # I-D-DW has none
                bias.zero_()
    image = torch.randn(2, 3, 33, 20, dtype=torch.float64)
    state = plain.state_dict()
    for name in ("d_dwnet_tiny", "i_d_dwnet_tiny"):
        other = small(name, **({"num_groups": DIMS} if name[0] == "i" else {})).double().eval()
        predicted = {}
        for key, value in other.state_dict().items():
            if key.endswith("mixer.conv2.bias"):
                predicted[key] = state[key.replace("conv2.bias", "weight")].flatten()
            elif key.endswith("mixer.conv2.weight") or ".mixer." not in key:
                predicted[key] = state.get(key, torch.zeros_like(value))
            else:
                predicted[key] = value
        other.load_state_dict(predicted)
        assert_close(other(image), plain(image), rtol=1e-9, atol=1e-9)


def test_local_mlp_is_attention_with_learned_weights():
    """In Swin's blocks: where attention sees its position bias alone, its softmax is the matrix of each head."""
    torch.manual_seed(1)
    sizes = {"dims": (8, 16), "depths": (1, 2), "num_classes": 3}
    swin = glocal.create_model("swin_tiny", window_size=4, num_heads=(2, 4), **sizes).double().eval()
    other = glocal.create_model("local_mlp_tiny", kernel_size=4, num_groups=(2, 4), **sizes).double().eval()
    state = {}
    for key, value in swin.state_dict().items():
        own = key.rpartition(".attn.")[0] + ".attn."
        if key.endswith("bias_table"):
            table = 2 * torch.randn_like(value)
            value.copy_(table)
            at = [[(q // 4 - s // 4 + 3) * 7 + q % 4 - s % 4 + 3 for s in range(16)] for q in range(16)]
            state[own + "mixer.weight"] = table[torch.tensor(at)].movedim(-1, 0).softmax(-1)
        elif ".attn.qkv." in key:
            dim = len(value) // 3
            value[: 2 * dim] = 0
            state[own + "v." + key.rpartition(".")[2]] = value[2 * dim :]
        else:
            state[key] = value
    other.load_state_dict(state)
    image = torch.randn(2, 3, 64, 32, dtype=torch.float64)
    # the first stage alone, and where no window of the second is shifted: elsewhere softmax is over what is seen
    ours, theirs = (m.forward_intermediates(image, [0], intermediates_only=True)[0] for m in (other, swin))
    assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    image = image[:, :, :32]
    assert_close(other(image), swin(image), rtol=1e-9, atol=1e-9)
    assert [block.attn.mixer.shift_size for block in other.layers[1].blocks] == [0, 2]


@pytest.mark.parametrize(
    ("name", "spec"),
    [
        ("dwnet_tiny(kernel_size=9)", "DepthwiseConv(kernel_size=9)"),
        ("dwnet_tiny(kernel_size=12)", "DepthwiseConv(kernel_size=12)"),
        ("dwnet_tiny_shared_channels(num_groups=(2, 4))", "DepthwiseConv(num_groups=4, bias=False)"),
        (
            "local_mlp_tiny_shared_positions(kernel_size=8, num_groups=(2, 4))",
            "LocalMLP(window_size=8, num_heads=4, shift_size=4, shared_positions=True, projection=False)",
        ),
        ("dwnet_tiny_pre_ln", "DepthwiseConv()"),
        ("d_dwnet_tiny(kernel_size=11)", "DynamicDepthwiseConv(kernel_size=11)"),
        ("i_d_dwnet_tiny(num_groups=(8, 16))", "InhomogeneousDepthwiseConv(num_groups=16)"),
        (
            "local_mlp_tiny(kernel_size=12, num_groups=(2, 4))",
            "LocalMLP(window_size=12, num_heads=4, shift_size=6, projection=False)",
        ),
        (
            "local_mlp_tiny_post_bn_unshared(num_groups=(8, 16))",
            "LocalMLP(num_heads=16, shift_size=3, projection=False)",
        ),
    ],
)
def test_what_a_name_builds(name, spec):
    model = glocal.create_model(name, **SMALL)
    assert repr(model.layers[1].blocks[1].attn.mixer) == spec
    pre_ln = name.startswith(("dwnet_tiny_pre_ln", "local_mlp_tiny(", "local_mlp_tiny_shared"))
    assert isinstance(model.layers[0].blocks[0].norm2, nn.LayerNorm if pre_ln else nn.BatchNorm2d)
    assert model.eval()(torch.randn(2, 3, 30, 41)).shape == (2, 3)


# Published sizes


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("dwnet_tiny", 24_172_744),
        ("d_dwnet_tiny", 51_131_752),
        ("i_d_dwnet_tiny", 26_244_280),
        ("i_d_dwnet_tiny(num_groups=(3, 6, 12, 24))", 25_326_706),
        ("dwnet_base", 74_347_112),
        ("d_dwnet_base", 161_597_928),
        ("i_d_dwnet_base", 80_253_608),
        ("i_d_dwnet_base(num_groups=(4, 8, 16, 32))", 78_189_728),
        ("dwnet_tiny_shared_channels", 23_958_706),
        ("local_mlp_tiny", 24_274_450),
        ("local_mlp_tiny_shared_positions", 24_274_450 - 138 * (49**2 - 13**2)),  # 138 heads in all
        ("local_mlp_base", 74_624_224),
        ("local_mlp_tiny_post_bn", 24_283_282),
        ("local_mlp_tiny_post_bn_unshared", 34_554_760),
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
        ("dwnet_tiny", 3_726_862_848),
        ("d_dwnet_tiny", 3_753_819_648),
        ("i_d_dwnet_tiny", 4_374_133_248),
        pytest.param("dwnet_base", 12_812_261_376, marks=pytest.mark.slow),
        pytest.param("d_dwnet_base", 12_899_506_176, marks=pytest.mark.slow),
        pytest.param("i_d_dwnet_base", 14_340_020_224, marks=pytest.mark.slow),
    ],
)
def test_multiply_adds(name, macs):
    """Linear maps, convolutions and the sums of mixers."""
    with torch.device("meta"):
        assert cost.macs(glocal.create_model(name), torch.zeros(1, 3, 224, 224)) == macs


def test_stages():
    with torch.device("meta"):
        model = glocal.create_model("dwnet_tiny")
        maps = model.forward_intermediates(torch.zeros(1, 3, 224, 224), intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(96, 56, 56), (192, 28, 28), (384, 14, 14), (768, 7, 7)]
    assert model.feature_info.channels() == [96, 192, 384, 768] and model.feature_info.reduction() == [4, 8, 16, 32]
