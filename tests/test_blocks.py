"""Blocks against timm's MbConvBlock with copied weights, and against the formulas written out."""

import copy

import pytest
import torch
from torch import nn

import glocal
from glocal.blocks import Block, DropPath, MBConv, Mlp, Pool, Shortcut, SqueezeExcite
from glocal.mixer import TokenMixer


def perturbed(module):
    """The module in float64 with every parameter and running statistic away from its initial value."""
    module = module.double()
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.rand_like(tensor) + 0.5 if "running_var" in name else torch.randn_like(tensor) * 0.3)
    return module


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("dim, out_dim, stride", [(32, 32, 1), (32, 64, 2), (32, 32, 2)])
@pytest.mark.parametrize("stride_in, stride_mode", [("expand", "1x1"), ("depthwise", "dw")])
@pytest.mark.parametrize("pool", ["max", "avg"])
def test_mbconv_equals_timm(dim, out_dim, stride, stride_in, stride_mode, pool, training):
    maxxvit = pytest.importorskip("timm.models.maxxvit")
    config = maxxvit.MaxxVitConvCfg(stride_mode=stride_mode, pool_type=f"{pool}2", norm_eps=1e-3)
    theirs = perturbed(maxxvit.MbConvBlock(dim, out_dim, stride=stride, cfg=config)).train(training)
    ours = MBConv(dim, out_dim, stride=stride, stride_in=stride_in, pool=pool).double().train(training)
    state = theirs.state_dict()
    if "shortcut.expand.weight" in state:  # a 1x1 convolution there, a linear map here
        state["shortcut.expand.weight"] = state["shortcut.expand.weight"].flatten(1)
    ours.load_state_dict(state)
    x = torch.randn(3, dim, 8, 6, dtype=torch.float64)
    torch.testing.assert_close(ours(x.movedim(1, -1)).movedim(-1, 1), theirs(x))
    torch.testing.assert_close(dict(ours.named_buffers()), dict(theirs.named_buffers()))


def test_mbconv_as_the_paper_states_it():
    block = MBConv(32, 48, stride=2)
    assert block.conv1_1x1.weight.shape == (192, 32, 1, 1)  # 4 x the output width
    assert block.se.fc1.weight.shape == (12, 192, 1, 1)  # 0.25 x the output width
    assert block.conv1_1x1.stride == (2, 2) and block.conv2_kxk.stride == 1
    assert block.shortcut.pool.kind == "max"
    biased = {name for name, m in block.named_modules() if isinstance(m, nn.Conv2d) and m.bias is not None}
    assert biased == {"se.fc1", "se.fc2", "conv3_1x1"} and block.conv2_kxk.bias is None
    norms = [m for m in block.modules() if isinstance(m, nn.BatchNorm2d)]
    assert len(norms) == 3 and all((m.eps, m.momentum) == (1e-3, 0.1) for m in norms)


def test_inspect_sees_the_depthwise_convolution_of_mbconv():
    assert any(isinstance(m, TokenMixer) for m in MBConv(32).modules())


@pytest.mark.parametrize("make", [MBConv, lambda d, **k: MBConv(d, 24, stride_in="depthwise", pool="avg", **k)])
@pytest.mark.parametrize("grid", [(1, 1), (1, 5), (5, 3), (2, 2)])
def test_mbconv_on_any_grid(make, grid):
    for stride in (1, 2, 3):
        y = make(16, stride=stride)(torch.randn(4, *grid, 16))
        assert y.shape[1:3] == tuple(-(-n // stride) for n in grid)


def test_mbconv_refuses():
    with pytest.raises(ValueError, match="stride_in is 'dw'; it must be 'expand', 'depthwise' or 'pool'"):
        MBConv(8, stride_in="dw")
    with pytest.raises(ValueError, match="activation is 'relu'; it must be 'gelu' or 'silu'"):
        MBConv(8, activation="relu")
    with pytest.raises(ValueError, match="kernel_size is 4; it must be odd"):
        MBConv(8, kernel_size=4)
    with pytest.raises(ValueError, match="pool is 'mean'; it must be 'max' or 'avg'"):
        MBConv(8, stride=2, pool="mean")
    with pytest.raises(ValueError, match="stride is 0; it must be at least 1"):
        Pool(0)


@pytest.mark.parametrize("kind", ["max", "avg"])
@pytest.mark.parametrize("grid", [(4, 4), (5, 3), (1, 1), (7,), (1,)])
def test_pool_is_a_loop_over_windows(kind, grid):
    stride = 2
    x = torch.randn(2, *grid, 3)
    y = Pool(stride, kind)(x)
    image = x if len(grid) == 2 else x[:, None]
    result = y if len(grid) == 2 else y[:, None]
    rows = stride if len(grid) == 2 else 1
    for i in range(result.shape[1]):
        for j in range(result.shape[2]):
            window = image[:, i * rows : (i + 1) * rows, j * stride : (j + 1) * stride]
            expected = window.amax((1, 2)) if kind == "max" else window.mean((1, 2))
            torch.testing.assert_close(result[:, i, j], expected)
    assert y.shape[1:-1] == tuple(-(-n // stride) for n in grid)


def norm(x, module):
    mean, variance = x.mean(-1, keepdim=True), x.var(-1, unbiased=False, keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * module.weight + module.bias


def gelu(x):
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def mlp(x, module):
    return gelu(x @ module.fc1.weight.T + module.fc1.bias) @ module.fc2.weight.T + module.fc2.bias


def pooled(x):  # 2 x 2 maxima of an even grid
    b, h, w, c = x.shape
    return x.reshape(b, h // 2, 2, w // 2, 2, c).amax((2, 4))


def test_block_is_two_pre_norm_residuals():
    block = perturbed(Block(32, glocal.build("SelfAttention(num_heads=2)", 32)))
    x = torch.randn(2, 3, 4, 32, dtype=torch.float64)
    middle = x + block.mixer(norm(x, block.norm1))
    torch.testing.assert_close(block(x), middle + mlp(norm(middle, block.norm2), block.mlp))


def test_block_widens_and_strides_as_coatnet_does():
    block = perturbed(Block(32, glocal.build("SelfAttention(out_dim=64)", 32), out_dim=64, stride=2))
    x = torch.randn(2, 4, 6, 32, dtype=torch.float64)
    skip = pooled(x) @ block.shortcut.expand.weight.T + block.shortcut.expand.bias
    middle = skip + block.mixer(pooled(norm(x, block.norm1)))
    torch.testing.assert_close(block(x), middle + mlp(norm(middle, block.norm2), block.mlp))


def test_block_widens_before_a_mixer_that_cannot():
    block = perturbed(Block(16, glocal.build("DepthwiseConv(kernel_size=3)", 24), out_dim=24, stride=2, mixer_dim=24))
    x = torch.randn(2, 4, 4, 16, dtype=torch.float64)
    skip = pooled(x) @ block.shortcut.expand.weight.T + block.shortcut.expand.bias
    inner = pooled(norm(x, block.norm1)) @ block.expand.weight.T + block.expand.bias
    middle = skip + block.mixer(inner)
    torch.testing.assert_close(block(x), middle + mlp(norm(middle, block.norm2), block.mlp))


def test_block_names_and_defaults():
    block = Block(8, nn.Identity())
    names = {name.rpartition(".")[0] for name, _ in block.named_parameters()}
    assert names == {"norm1", "norm2", "mlp.fc1", "mlp.fc2"}
    assert block.mlp.fc1.out_features == 32
    assert Block(8, nn.Identity(), mlp_ratio=2).mlp.fc1.out_features == 16


def test_block_on_sequences():
    block = Block(8, nn.Linear(8, 12), out_dim=12, stride=2)
    assert block(torch.randn(2, 7, 8)).shape == (2, 4, 12)


def test_block_refuses_a_mixer_that_changes_the_grid():
    block = Block(8, glocal.build("DepthwiseConv(kernel_size=3, stride=2)", 8))
    with pytest.raises(ValueError, match=r"DepthwiseConv gave .* inside a block a mixer keeps the grid"):
        block(torch.randn(1, 2, 2, 8))  # 1 x 1 would broadcast to 2 x 2
    with pytest.raises(ValueError, match=r"mixer_dim is 9; it must be dim \(8\) or out_dim \(12\)"):
        Block(8, nn.Identity(), out_dim=12, mixer_dim=9)


def test_shortcut_keeps_what_keeps_its_width():
    assert not list(Shortcut(8, 8, 2).parameters())
    assert Shortcut(8, 9, 1).expand.bias is not None


def test_parts_keep_their_gradients():
    for part, shape in ((SqueezeExcite(6, 2), (2, 6, 3, 2)), (Mlp(6, 5), (2, 4, 6))):
        part = perturbed(part)
        x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(part, (x,))


def test_squeeze_excite_by_hand():
    part = perturbed(SqueezeExcite(4, 2))
    x = torch.randn(2, 4, 3, 3, dtype=torch.float64)
    hidden = x.mean((2, 3)) @ part.fc1.weight.flatten(1).T + part.fc1.bias
    gate = (hidden * torch.sigmoid(hidden)) @ part.fc2.weight.flatten(1).T + part.fc2.bias
    torch.testing.assert_close(part(x), x * torch.sigmoid(gate)[:, :, None, None])


def test_block_with_layer_scale_is_timms():
    pytest.importorskip("timm")
    from timm.models.vision_transformer import Block as Theirs

    theirs = perturbed(Theirs(32, 2, qkv_bias=True, init_values=0.1))
    ours = Block(32, glocal.build("SelfAttention(num_heads=2)", 32), layer_scale=0.1).double()
    assert ours.ls1.gamma.tolist() == ours.ls2.gamma.tolist() == pytest.approx([0.1] * 32)
    ours.load_state_dict({name.replace("attn.", "mixer."): tensor for name, tensor in theirs.state_dict().items()})
    theirs.norm1.eps = theirs.norm2.eps = 1e-5
    x = torch.randn(2, 7, 32, dtype=torch.float64)
    torch.testing.assert_close(ours(x), theirs(x))


def test_layer_scale_scales_the_branch_of_mbconv_only():
    block = perturbed(MBConv(8, 12, stride=2, layer_scale=0.5))
    assert block.ls.gamma.shape == (12,)
    plain = MBConv(8, 12, stride=2).double()
    plain.load_state_dict({name: tensor for name, tensor in block.state_dict().items() if name != "ls.gamma"})
    x = torch.randn(2, 4, 4, 8, dtype=torch.float64)
    skip = plain.eval().shortcut(x)
    torch.testing.assert_close(block.eval()(x), skip + block.ls.gamma * (plain(x) - skip))


def test_drop_path_drops_samples_and_keeps_the_mean():
    x = torch.ones(20_000, 2, 3, dtype=torch.float64)
    drop = DropPath(0.3)
    y = drop(x)
    assert set(y.unique().tolist()) == {0, 1 / 0.7}
    assert torch.equal(y, y[:, :1, :1].expand_as(y))  # one draw a sample
    assert abs((y[:, 0, 0] == 0).double().mean() - 0.3) < 0.015  # 4.6 standard deviations
    assert torch.equal(drop.eval()(x), x) and torch.equal(DropPath(0)(x), x)
    assert not drop.state_dict()
    with pytest.raises(ValueError, match="drop_path is 1; it must be at least 0 and less than 1"):
        DropPath(1)


@pytest.mark.parametrize(
    "make", [lambda **k: Block(8, nn.Linear(8, 8), **k), lambda **k: Block(8, nn.Linear(8, 8), mlp=False, **k)]
)
def test_a_dropped_branch_leaves_the_skip_path(make):
    block = perturbed(make(drop_path=0.5))
    x = torch.randn(64, 3, 8, dtype=torch.float64)
    y = block(x)
    # every sample is one of the sums of branches that are there twice or not at all
    sums = [x, x + 2 * block.mixer(norm(x, block.norm1))]
    if block.mlp is not None:
        sums += [middle + 2 * mlp(norm(middle, block.norm2), block.mlp) for middle in sums]
    which = [min(range(len(sums)), key=lambda k: (y[b] - sums[k][b]).abs().max()) for b in range(len(x))]
    for b, k in enumerate(which):
        torch.testing.assert_close(y[b], sums[k][b])
    assert set(which) == set(range(len(sums)))  # the two halves are drawn apart


def test_mbconv_drops_its_branch():
    block = perturbed(MBConv(8, drop_path=0.5))
    x = torch.randn(64, 2, 2, 8, dtype=torch.float64)
    y = block(x)
    untouched = [torch.equal(a, b) for a, b in zip(x, y, strict=True)]
    assert 0 < sum(untouched) < 64
    whole = copy.deepcopy(block)
    whole.drop_path = nn.Identity()
    branch = whole(x) - x
    kept = ~torch.tensor(untouched)
    torch.testing.assert_close(y[kept], x[kept] + 2 * branch[kept])


def test_block_without_skip_paths():
    block = perturbed(Block(16, nn.Linear(24, 24), out_dim=24, stride=2, mixer_dim=24, skip=False, drop_path=0.5))
    x = torch.randn(2, 4, 4, 16, dtype=torch.float64)
    inner = pooled(norm(x, block.norm1)) @ block.expand.weight.T + block.expand.bias
    middle = inner @ block.mixer.weight.T + block.mixer.bias
    torch.testing.assert_close(block(x), mlp(norm(middle, block.norm2), block.mlp))
    assert not [name for name in block.state_dict() if name.startswith("shortcut")]


def test_block_without_an_mlp():
    block = perturbed(Block(16, nn.Linear(16, 16), mlp=False, layer_scale=1.0))
    x = torch.randn(2, 4, 4, 16, dtype=torch.float64)
    mixed = norm(x, block.norm1) @ block.mixer.weight.T + block.mixer.bias
    torch.testing.assert_close(block(x), x + block.ls1.gamma * mixed)
    assert {name.partition(".")[0] for name in block.state_dict()} == {"norm1", "mixer", "ls1"}


@pytest.mark.parametrize("out_dim, stride", [(8, 1), (12, 1), (8, 2), (12, 2)])
def test_mbconv_without_a_skip_path(out_dim, stride):
    whole = perturbed(MBConv(8, out_dim, stride=stride)).eval()
    block = MBConv(8, out_dim, stride=stride, skip=False, drop_path=0.5).double()
    block.load_state_dict({n: t for n, t in whole.state_dict().items() if not n.startswith("shortcut")})
    x = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(block.eval()(x), whole(x) - whole.shortcut(x))
    assert not any(isinstance(part, DropPath) for part in block.modules())  # nothing would be left of a sample


@pytest.mark.parametrize("stride_in", ["expand", "depthwise"])
@pytest.mark.parametrize("stride, length", [(1, 9), (2, 9), (2, 8), (3, 1), (2, 1)])
def test_mbconv_on_signals_is_the_middle_row_of_an_image(stride, length, stride_in):
    line = perturbed(MBConv(8, 12, stride=stride, stride_in=stride_in, rank=1)).eval()
    image = perturbed(MBConv(8, 12, stride=stride, stride_in=stride_in)).eval()
    state = line.state_dict()
    # an image one pixel high meets the middle row of the kernel alone
    state["conv2_kxk.weight"] = nn.functional.pad(state["conv2_kxk.weight"][:, :, None], (0, 0, 1, 1), value=3.0)
    image.load_state_dict(state)
    x = torch.randn(2, length, 8, dtype=torch.float64)
    assert line(x).shape == (2, -(-length // stride), 12)
    torch.testing.assert_close(line(x), image(x[:, None])[:, 0])


def test_mbconv_refuses_another_rank():
    with pytest.raises(ValueError, match=r"MBConv: x has shape \(2, 5, 8\); a block of rank 2"):
        MBConv(8)(torch.randn(2, 5, 8))


# planted by scripts/mutate
FAULTS = {
    "blocks.py": (
        ("stochastic depth does not scale what it keeps", "return x * (kept / (1 - self.rate))", "return x * kept"),
        (
            "stochastic depth draws for every token",
            "x.new_empty(x.shape[0], *[1] * (x.ndim - 1))",
            "x.new_empty(*x.shape[:-1], 1)",
        ),
        (
            "without skip paths the MLP keeps its own",
            "_joined(None if skip is None else x, self.drop_path2",
            "_joined(x, self.drop_path2",
        ),
        ("without a skip path samples are dropped whole", "drop if skip and rate > 0 else", "drop if rate > 0 else"),
        (
            "layer scale is applied to the skip path too",
            "x = _joined(skip, self.drop_path1(self.ls1(mixed)))",
            "x = self.ls1(_joined(skip, self.drop_path1(mixed)))",
        ),
        ("squeeze-excite takes the maximum", "        return x.mean(1)\n", "        return x.amax(1)\n"),
    ),
    ("blocks.py", "test_blocks.py", "test_backbone.py"): (
        (
            "batch norm's statistics count padding",
            "if valid is None or not norm.training:",
            "if valid is None or True:",
        ),
        ("the skip path pools padding", "return shortcut(x, valid) if isinstance", "return shortcut(x) if isinstance"),
        (
            "squeeze and excitation counts padding",
            "mean_of(x.movedim(1, -1), valid)[:, :, None, None]",
            "mean_of(x.movedim(1, -1), None)[:, :, None, None]",
        ),
        (
            "the mixer is not told of padding",
            "self.mixer(inner) if valid is None else",
            "self.mixer(inner) if True else",
        ),
        ("a window of padding pools the lowest number", "window) * some", "window)"),
        (
            "what is real after a stride is shifted",
            "slice(None, None, stride),) * (valid.ndim - 1)",
            "slice(stride - 1, None, stride),) * (valid.ndim - 1)",
        ),
    ),
}
