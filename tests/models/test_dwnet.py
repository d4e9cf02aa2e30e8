"""DWNet and the study's variants against the released network, written out from its definition, and published sizes."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

import glocal
from glocal.analysis import cost
from glocal.models.keys.dwnet import from_official, to_official

RELEASED = ("dwnet_tiny", "d_dwnet_tiny", "i_d_dwnet_tiny")
VARIANTS = (
    *("dwnet_tiny_pre_ln", "dwnet_tiny_shared_channels", "local_mlp_tiny", "local_mlp_tiny_shared_positions"),
    *("local_mlp_tiny_post_bn", "local_mlp_tiny_post_bn_unshared"),
)
DIMS, DEPTHS, GROUPS, CLASSES = (8, 16), (1, 2), (4, 4), 3
SMALL = {"dims": DIMS, "depths": DEPTHS, "num_classes": CLASSES}

FAULTS = {
    "models/dwnet.py": (
        (
            "maps of the branch start as those of the MLP",
            "                part.reset_parameters()",
            "                pass",
        ),
        ("there is no norm behind the first map", "bn1=TokenBatchNorm(dim),", "bn1=nn.Identity(),"),
        ("nothing is cut off before the mixer", "act1=nn.ReLU(),", "act1=nn.Identity(),"),
        ("nothing is cut off behind the mixer", "act2=nn.ReLU(),", "act2=nn.GELU(),"),
        ("the first map has a bias", "conv1=nn.Linear(dim, dim, bias=False)", "conv1=nn.Linear(dim, dim)"),
        ("the last map has a bias", "conv2=nn.Linear(dim, dim, bias=False)", "conv2=nn.Linear(dim, dim)"),
        ("the last map has no norm", "bn3=TokenBatchNorm(dim),", "bn3=nn.Identity(),"),
        ("the MLP reads what is not normalised", "self.mlp(self.norm2(x))", "self.mlp(x)"),
        ("there is no first skip path", "x = x + self.drop_path1(self.attn(x))", "x = self.drop_path1(self.attn(x))"),
        ("mixers are never skipped", "self.drop_path1(self.attn(x))", "self.attn(x)"),
        ("MLPs are never skipped", "self.drop_path2(self.mlp(", "(self.mlp("),
        ("there is no map before the mixer", "v=nn.Linear(dim, dim), mixer", "v=nn.Identity(), mixer"),
        ("kernels always have 7 tokens", "dim, kernel_size=kernel_size, **windows", "dim, **windows"),
        ("windows always have 7 tokens", '{"window_size": kernel_size,', '{"window_size": 7,'),
        ("first windows are shifted", "shifted=number % 2 == 1", "shifted=number % 2 == 0"),
        ("no window is shifted", "kernel_size // 2 if shifted else 0", "0"),
        ("mixers have maps of their own, too", '"projection": False', '"projection": True'),
        ("groups are not asked for", "**windows, **groups)", "**windows)"),
        ("groups are dropped in silence", "if groups and not", "if False and not"),
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


# The released network, from its definition


def official_state(name, dims=DIMS, depths=DEPTHS, groups=4, kernel=7):
    """Random weights under the release's names and in its order."""
    shapes = {"patch_embed.proj.weight": (dims[0], 3, 4, 4), "patch_embed.proj.bias": (dims[0],)}

    def norm(name, dim, batch=True):
        shapes.update({f"{name}.weight": (dim,), f"{name}.bias": (dim,)})
        if batch:
            shapes.update({f"{name}.{what}": (dim,) for what in ("running_mean", "running_var")})
            shapes[f"{name}.num_batches_tracked"] = None

    norm("patch_embed.norm", dims[0], batch=False)
    for i, (dim, depth) in enumerate(zip(dims, depths, strict=True)):
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            own, few = f"{block}.attn2conv", dim // 4
            shapes[f"{own}.conv0.weight"] = (dim, dim, 1, 1)
            norm(f"{own}.bn0", dim)
            if name.startswith("dwnet"):
                shapes |= {f"{own}.conv.weight": (dim, 1, kernel, kernel), f"{own}.conv.bias": (dim,)}
            elif name.startswith("d_"):
                shapes |= {f"{own}.conv.bias": (dim,), f"{own}.conv.conv1.weight": (few, dim, 1, 1)}
                norm(f"{own}.conv.bn", few)
                shapes[f"{own}.conv.conv2.weight"] = (dim * kernel**2, few, 1, 1)
                shapes[f"{own}.conv.conv2.bias"] = (dim * kernel**2,)
            else:
                shapes |= {f"{own}.conv.conv1.0.weight": (few, dim, 1, 1), f"{own}.conv.conv1.0.bias": (few,)}
                norm(f"{own}.conv.conv1.1", few)
                shapes[f"{own}.conv.conv2.0.weight"] = (groups * kernel**2, few, 1, 1)
                shapes[f"{own}.conv.conv2.0.bias"] = (groups * kernel**2,)
            norm(f"{own}.bn", dim)
            shapes[f"{own}.conv2.weight"] = (dim, dim, 1, 1)
            norm(f"{own}.bn2", dim)
            for part, (out, width) in {"fc1": (4 * dim, dim), "fc2": (dim, 4 * dim)}.items():
                shapes |= {f"{block}.mlp.{part}.weight": (out, width), f"{block}.mlp.{part}.bias": (out,)}
            norm(f"{block}.bn", dim)
        if i + 1 < len(dims):
            shapes[f"layers.{i}.downsample.reduction.weight"] = (dims[i + 1], 4 * dim)
            norm(f"layers.{i}.downsample.norm", 4 * dim, batch=False)
    norm("norm", dims[-1], batch=False)
    shapes |= {"head.weight": (CLASSES, dims[-1]), "head.bias": (CLASSES,)}
    state = {}
    for key, shape in shapes.items():
        if shape is None:
            state[key] = torch.tensor(3)
            continue
        tensor = torch.randn(shape, dtype=torch.float64)
        if len(shape) > 1:
            tensor /= tensor[0].numel() ** 0.5
        elif key.endswith("running_var"):
            tensor = tensor.square() + 0.5
        else:
            tensor = 0.3 * tensor + ("weight" in key)
        state[key] = tensor
    return state


def released(state, images, training, groups=4, kernel=7):
    """Logits of images; in training by the statistics of the batch."""

    def batch_norm(name, x):
        mean, variance = (state[f"{name}.running_{what}"].clone() for what in ("mean", "var"))
        return F.batch_norm(x, mean, variance, state[f"{name}.weight"], state[f"{name}.bias"], training)

    def layer_norm(name, x):
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"])

    def conv(name, x, **more):
        return F.conv2d(x, state[f"{name}.weight"], state.get(f"{name}.bias"), **more)

    def mixed(own, x):
        batch, dim, height, width = x.shape
        if f"{own}.conv.weight" in state:
            return conv(f"{own}.conv", x, groups=dim, padding=kernel // 2)
        if f"{own}.conv.bias" in state:
            hidden = batch_norm(f"{own}.conv.bn", conv(f"{own}.conv.conv1", x.mean((2, 3), keepdim=True)))
            kernels = conv(f"{own}.conv.conv2", hidden.relu()).view(batch * dim, 1, kernel, kernel)
            flat = x.reshape(1, batch * dim, height, width)
            out = F.conv2d(flat, kernels, padding=kernel // 2, groups=batch * dim).view(x.shape)
            return out + state[f"{own}.conv.bias"].view(1, -1, 1, 1)
        hidden = batch_norm(f"{own}.conv.conv1.1", conv(f"{own}.conv.conv1.0", x)).relu()
        kernels = conv(f"{own}.conv.conv2.0", hidden).view(batch, groups, 1, kernel**2, height, width)
        slots = F.unfold(x, kernel, padding=kernel // 2).view(batch, groups, dim // groups, kernel**2, height, width)
        return (kernels * slots).sum(3).view(x.shape)

    x = conv("patch_embed.proj", images, stride=4)
    x = layer_norm("patch_embed.norm", x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    for i, depth in enumerate(DEPTHS):
        for j in range(depth):
            block = f"layers.{i}.blocks.{j}"
            own = f"{block}.attn2conv"
            y = batch_norm(f"{own}.bn0", conv(f"{own}.conv0", x)).relu()
            y = batch_norm(f"{own}.bn", mixed(own, y)).relu()
            x = x + batch_norm(f"{own}.bn2", conv(f"{own}.conv2", y))
            y = batch_norm(f"{block}.bn", x).permute(0, 2, 3, 1)
            y = F.gelu(F.linear(y, state[f"{block}.mlp.fc1.weight"], state[f"{block}.mlp.fc1.bias"]))
            y = F.linear(y, state[f"{block}.mlp.fc2.weight"], state[f"{block}.mlp.fc2.bias"])
            x = x + y.permute(0, 3, 1, 2)
        if i + 1 < len(DEPTHS):
            four = [x[:, :, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
            y = layer_norm(f"layers.{i}.downsample.norm", torch.cat(four, 1).permute(0, 2, 3, 1))
            x = (y @ state[f"layers.{i}.downsample.reduction.weight"].T).permute(0, 3, 1, 2)
    x = layer_norm("norm", x.flatten(2).transpose(1, 2)).mean(1)
    return x @ state["head.weight"].T + state["head.bias"]


def small(name, **more):
    groups = {"num_groups": GROUPS} if name.startswith(("i_d", "local", "dwnet_tiny_shared")) else {}
    return glocal.create_model(name, **{**SMALL, **groups, **more})


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


# Any image


@pytest.mark.parametrize("size", [(200, 312), (224, 160), (97, 131), (448, 448)])
@pytest.mark.parametrize("name", [*RELEASED, *VARIANTS])
def test_any_size(name, size):
    model = small(name, depths=(1, 1), **({"num_groups": DIMS} if "unshared" in name else {})).eval()
    with torch.no_grad():
        maps = model.forward_intermediates(torch.randn(1, 3, *size), intermediates_only=True)
    fine = tuple(-(-side // 4) for side in size)
    assert [tuple(m.shape[2:]) for m in maps] == [fine, tuple(-(-side // 2) for side in fine)]
    assert all(m.isfinite().all() for m in maps)


@pytest.mark.parametrize("name", ["dwnet_tiny", "local_mlp_tiny"])
def test_images_are_completed_by_zeros(name):
    model = small(name).double().eval()
    for height, width in ((33, 22), (1, 1)):
        image = torch.randn(2, 3, height, width, dtype=torch.float64)
        whole = torch.zeros(2, 3, -(-height // 4) * 4, -(-width // 4) * 4, dtype=torch.float64)
        whole[:, :, :height, :width] = image
        assert_close(model(image), model(whole))


def test_convolutions_move_with_the_image():
    """Away from the border; windows do not."""
    image = torch.zeros(1, 3, 160, 160, dtype=torch.float64)
    image[:, :, 64:96, 64:96] = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    for name, moves in (("dwnet_tiny", True), ("i_d_dwnet_tiny", True), ("local_mlp_tiny_post_bn", False)):
        model = small(name, depths=(1, 1)).double().eval()
        one, other = (
            model.forward_intermediates(x, [1], intermediates_only=True)[0]
            for x in (image, image.roll((8, 16), (2, 3)))
        )
        # a border reaches five tokens in, and two more where it was moved
        same = torch.allclose(one.roll((1, 2), (2, 3))[..., 7:-7, 7:-7], other[..., 7:-7, 7:-7], atol=1e-9)
        assert same is moves


# What users of timm know


def test_methods():
    model = small("dwnet_tiny").eval()
    image = torch.randn(2, 3, 24, 16)
    tokens = model.forward_features(image)
    assert tokens.shape == (2, 3, 2, 16)
    assert_close(model.forward_head(tokens, pre_logits=True), tokens.mean((1, 2)))
    assert_close(model(image), model.forward_head(tokens))
    features = small("dwnet_tiny", features_only=True, out_indices=(0,)).eval()
    features.model.load_state_dict(model.state_dict(), strict=False)
    assert_close(features(image)[0], model.forward_intermediates(image, [0])[1][0])
    assert not any(name.startswith(("model.layers.1", "model.norm", "model.head")) for name in features.state_dict())
    model.reset_classifier(0)
    assert_close(model(image), tokens.mean((1, 2)))


def test_first_values():
    """Those of the branch that is convolutions in the release are PyTorch's own, those of the MLP are not."""
    torch.manual_seed(0)
    block = glocal.create_model("d_dwnet_tiny", dims=(96,), depths=(1,)).layers[0].blocks[0]
    for part, chans in ((block.attn.conv1, 96), (block.attn.conv2, 96), (block.attn.mixer.conv2, 24)):
        assert abs(part.weight.std().item() * (3 * chans) ** 0.5 - 1) < 0.05
    assert block.attn.mixer.conv2.bias.any()
    assert abs(block.mlp.fc1.weight.std().item() - 0.02) < 1e-3 and not block.mlp.fc1.bias.any()


@pytest.mark.parametrize("name", ["dwnet_tiny", "local_mlp_tiny"])
def test_blocks_may_be_skipped(name):
    model = small(name, drop_path_rate=0.3, depths=(1, 3))
    blocks = [block for stage in model.layers for block in stage.blocks]
    assert [b.drop_path1.rate for b in blocks] == pytest.approx([0, 0.1, 0.2, 0.3])
    block = small(name, drop_path_rate=0.999).layers[1].blocks[1]
    x = torch.randn(4, 5, 5, 16)
    assert torch.equal(block(x), x) and not torch.equal(block.eval()(x), x)


@pytest.mark.parametrize("name", RELEASED)
def test_checkpoints_change_nothing(name):
    """Gradients, and statistics that have seen the batch once."""
    image, found = torch.randn(3, 3, 24, 16), []
    for checkpointed in (False, True):
        torch.manual_seed(4)
        model = small(name, drop_path_rate=0.5)
        model.set_grad_checkpointing(checkpointed)
        torch.manual_seed(1)
        model(image).square().sum().backward()
        found.append(({name: p.grad for name, p in model.named_parameters()}, dict(model.named_buffers())))
    assert_close(found[0], found[1])
    assert all(int(b) == 1 for name, b in found[1][1].items() if name.endswith("tracked"))


@pytest.mark.parametrize(("name", "groups"), [("i_d_dwnet_tiny", (4,)), ("local_mlp_tiny", (4,))])
def test_compiles(name, groups):
    model = glocal.create_model(name, dims=(8,), depths=(1,), num_groups=groups, num_classes=3).eval()
    image = torch.randn(2, 3, 24, 16)
    assert_close(torch.compile(model, fullgraph=True, backend="aot_eager")(image), model(image))


def test_blocks_can_be_looked_into():
    model = small("i_d_dwnet_tiny")
    before = {name: buffer.clone() for name, buffer in model.eval().named_buffers()}
    with glocal.inspect(model) as seen:
        model(torch.randn(2, 3, 24, 16))
    assert [call.name for call in seen] == [f"layers.{i}.blocks.{j}.attn.mixer" for i, j in ((0, 0), (1, 0), (1, 1))]
    assert all(call.rebuild_error() < 1e-5 for call in seen)
    assert all(torch.equal(buffer, before[name]) for name, buffer in model.named_buffers())


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("d_dwnet_tiny", {"kernel_size": 8}, "^d_dwnet_tiny: .*kernel_size: 8, must be odd"),
        ("dwnet_tiny", {"kernel_size": 0}, "^dwnet_tiny: kernel_size: 0"),
        ("dwnet_tiny", {"num_groups": (3, 6, 12, 25)}, "^dwnet_tiny: .*num_groups: 25 does not divide 768 channels"),
        ("d_dwnet_tiny", {"num_groups": (3, 6, 12, 24)}, "num_groups: 3, was given; DynamicDepthwiseConv has"),
        ("i_d_dwnet_tiny", {"num_groups": (5, 6, 12, 24)}, "num_groups: 5 does not divide dim 96"),
        ("i_d_dwnet_tiny", {"num_groups": (3, 6)}, r"^i_d_dwnet_tiny: num_groups: \(3, 6\), must have one number"),
        ("local_mlp_tiny", {"block": "bn"}, "^local_mlp_tiny: block: 'bn', must be 'post_bn' or 'pre_ln'"),
        ("local_mlp_tiny", {"depths": (2, 2)}, r"^local_mlp_tiny: depths: \(2, 2\), must have"),
        ("dwnet_tiny", {"window_size": 7}, "^dwnet_tiny: has no argument 'window_size'"),
        ("dwnet_tiny", {"img_size": "large"}, "^dwnet_tiny: img_size"),
    ],
)
def test_what_is_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        glocal.create_model(name, **arguments)


def test_a_single_image_in_training():
    with pytest.raises(ValueError, match="one value per channel in training"):
        small("d_dwnet_tiny")(torch.randn(1, 3, 16, 16))
