"""Multiply-adds against formulas by hand, for operators of ours and networks of others."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import glocal
from glocal.analysis.cost import macs, params

N, C = 48, 32  # tokens of a 6 x 8 grid, channels

# What each operator multiplies: projections of every token, then every weight with every channel that it weighs.
BY_HAND = {
    "AveragePooling(kernel_size=3)": N * 9 * C,
    "AveragePooling(kernel_size=3, stride=2)": 3 * 4 * 9 * C,
    "Convolution(kernel_size=3)": N * 9 * C * C,
    "Convolution(kernel_size=(3, 5), out_dim=48, stride=2, groups=4)": 3 * 4 * 15 * C * 48 // 4,
    "DeformableConv(kernel_size=3)": N * 9 * (4 * C + C * C + 27 * C),
    "DeformableConv(stride=2, groups=32, modulated=False)": 3 * 4 * 9 * (4 * C + C + 18 * C),
    "DepthwiseConv(kernel_size=5)": N * 25 * C,
    "DynamicDepthwiseConv(kernel_size=3, reduction=4)": N * 9 * C + C * 8 + 8 * 9 * C,
    "FocalAttention(window_size=2, expand_size=1, focal_window=3)": (  # 12 windows, 4 + 12 + 9 slots
        2 * N * C * C + 2 * (N + 12) * C * C + 2 * 12 * 4 * C + 2 * N * 25 * C
    ),
    "Gate": N * C * C,
    "InhomogeneousDepthwiseConv(kernel_size=3, num_groups=8, reduction=4)": N * (9 * C + C * 8 + 8 * 8 * 9),
    "Involution(kernel_size=3, group_channels=8, stride=2)": 3 * 4 * (9 * C + C * 8 + 8 * 4 * 9),
    "LinearTokenMixing(grid_size=(6, 8))": N * N * C,
    "LargeKernelConv(kernel_size=13, small_kernel=3)": N * (169 + 9) * C,
    "LocalMLP(window_size=2, num_heads=4)": N * 4 * C + 2 * N * C * C,
    "LocalMLP(window_size=2, num_heads=4, projection=False)": N * 4 * C,
    "MaxPooling(kernel_size=3)": 0,
    "MultiScaleConv(kernel_sizes=(3, 5))": N * (9 + 25) * C,
    "NeighborhoodAttention(kernel_size=3)": 4 * N * C * C + 2 * N * 9 * C,
    "RelativeAttention(grid_size=(6, 8))": 4 * N * C * C + 2 * N * N * C,
    "RelativeAttention(grid_size=(6, 8), after_softmax=True)": 4 * N * C * C + 2 * N * N * C,
    "ReleasedFocalAttention(window_size=4, expand_size=1, focal_window=3)": (  # 4 windows, 16 + 28 + 9 slots
        2 * N * C * C + 2 * (64 + 4) * C * C + 2 * 4 * 16 * C + 2 * N * 53 * C
    ),
    "SelfAttention(num_heads=2)": 4 * N * C * C + 2 * N * N * C,
    "SelfAttention(num_heads=2, out_dim=64)": N * (C * 3 * 64 + 64 * 64) + 2 * N * N * 64,
    "TokenMLP(grid_size=(7, 9), mlp_ratio=2)": 2 * N * 64 * C,
    "WindowAttention(window_size=2, shift_size=1)": 4 * N * C * C + 2 * N * 4 * C,
}


@pytest.mark.parametrize("spec", BY_HAND)
def test_every_operator_costs_what_its_formula_says(spec):
    mixer = glocal.build(spec, C)
    assert macs(mixer, torch.randn(1, 6, 8, C)) == mixer.macs((6, 8)) == BY_HAND[spec]


@pytest.mark.parametrize("impl", ["reference", "fast", "auto"])
@pytest.mark.parametrize("spec", ["InhomogeneousDepthwiseConv", "NeighborhoodAttention(kernel_size=3)"])
def test_the_path_does_not_change_the_cost(spec, impl):
    mixer = glocal.build(spec, C)
    mixer.impl = impl
    assert macs(nn.Sequential(mixer), torch.randn(1, 6, 8, C)) == mixer.macs((6, 8))
    assert mixer.impl == impl


@pytest.mark.parametrize(
    "layer, shape, expected",
    [
        (nn.Linear(5, 7), (4, 5), 5 * 7),
        (nn.Linear(5, 7), (4, 3, 5), 3 * 5 * 7),
        (nn.Conv2d(6, 8, 3, stride=2, padding=1, groups=2), (2, 6, 9, 7), 5 * 4 * 9 * 3 * 8),
        (nn.Conv2d(6, 6, 5, groups=6), (2, 6, 9, 7), 5 * 3 * 25 * 6),
        (nn.Conv1d(6, 8, 3), (2, 6, 10), 8 * 3 * 6 * 8),
        (nn.ConvTranspose2d(6, 8, 2, stride=2), (2, 6, 3, 4), 3 * 4 * 4 * 6 * 8),
        (nn.LSTM(8, 16, batch_first=True), (2, 5, 8), 5 * 4 * 16 * (8 + 16)),
        (nn.Sequential(nn.BatchNorm2d(6), nn.GELU(), nn.AvgPool2d(2)), (2, 6, 4, 4), 0),
    ],
)
def test_layers_of_torch(layer, shape, expected):
    assert macs(layer, torch.randn(shape)) == expected


class Of(nn.Module):
    """A module from a function, with modules that it may call."""

    def __init__(self, function, *parts):
        super().__init__()
        self.function, self.parts = function, nn.ModuleList(parts)

    def forward(self, *inputs):
        return self.function(*self.parts, *inputs)


def test_products_with_vectors():
    v = torch.randn(1, 6)
    assert macs(Of(lambda x: torch.ones(4, 6, device=x.device) @ x[0]), v) == 24
    assert macs(Of(lambda x: x[0].dot(x[0])), v) == 6
    assert macs(Of(lambda x: torch.addmv(x.new_ones(4), x.new_ones(4, 6), x[0])), v) == 24


# One attention layer by four routes of torch's; the fused ones hide their products from the counter.
TOKENS, WIDTH = 10, 32
ATTENTION = 4 * TOKENS * WIDTH**2 + 2 * TOKENS**2 * WIDTH


@pytest.mark.parametrize("need_weights", [False, True])
@pytest.mark.parametrize("training", [False, True])
def test_multihead_attention_of_torch(need_weights, training):
    attention = nn.MultiheadAttention(WIDTH, 4, batch_first=True).train(training)
    model = Of(lambda m, x: m(x, x, x, need_weights=need_weights)[0], attention)
    assert macs(model, torch.randn(2, TOKENS, WIDTH)) == ATTENTION


def test_encoder_layer_of_torch_in_one_fused_call():
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True).eval()
    enabled = torch.backends.mha.get_fastpath_enabled()
    assert macs(layer, torch.randn(2, TOKENS, WIDTH)) == ATTENTION + 2 * TOKENS * WIDTH * 64
    assert torch.backends.mha.get_fastpath_enabled() == enabled


def with_values(part, x):
    """Needs to know the numbers, which the meta device does not have."""
    return part(x) if float(x.sum()) < 1e9 else x


@pytest.mark.parametrize(
    "part, expected",
    [
        (nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True), ATTENTION + 2 * TOKENS * WIDTH * 64),
        (nn.LSTM(WIDTH, 16, batch_first=True), TOKENS * 4 * 16 * (WIDTH + 16)),
        (Of(lambda x: F.scaled_dot_product_attention(x, x, x)), 2 * TOKENS**2 * WIDTH),
        (glocal.build("InhomogeneousDepthwiseConv(rank=1)", WIDTH), TOKENS * (7 * WIDTH + 8 * (WIDTH + 32 * 7))),
    ],
)
def test_a_model_that_looks_at_values_is_run(part, expected):
    assert macs(Of(with_values, part), torch.randn(3, TOKENS, WIDTH)) == expected


@pytest.mark.gpu
def test_a_model_that_looks_at_values_is_run_on_its_gpu():
    layer = nn.TransformerEncoderLayer(WIDTH, 4, 64, batch_first=True)
    model = nn.Sequential(Of(with_values, layer), nn.LSTM(WIDTH, 16, batch_first=True)).cuda()
    expected = ATTENTION + 2 * TOKENS * WIDTH * 64 + TOKENS * 4 * 16 * (WIDTH + 16)
    assert macs(model, torch.randn(3, TOKENS, WIDTH, device="cuda")) == expected
    assert all(p.is_cuda for p in model.parameters())


def of_modules(model, *inputs):
    """What counters that look at modules find: hooks on linear layers and convolutions."""
    found = []

    def hook(module, arguments, out):
        each = module.weight.numel() // (module.out_features if isinstance(module, nn.Linear) else module.out_channels)
        found.append(out.numel() * each)

    layers = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]
    handles = [layer.register_forward_hook(hook) for layer in layers]
    model(*inputs)
    for handle in handles:
        handle.remove()
    return sum(found)


def test_vit_tiny_and_the_share_that_hooks_miss():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("vit_tiny_patch16_224").eval()
        image = torch.empty(1, 3, 224, 224)
        tokens, width = 14 * 14 + 1, 192
        products = 12 * 2 * tokens**2 * width
        linear = 12 * tokens * 12 * width**2
        expected = 196 * 3 * 16 * 16 * width + linear + products + width * 1000
        assert macs(model, image) == expected  # 1.25 G; published: 1.26 G (Touvron et al. 2021 give 1.3 G)
        assert expected - of_modules(model, image) == products
    assert 0.14 < products / expected < 0.15


def test_of_attention_on_a_large_grid_hooks_miss_nearly_all():
    with torch.device("meta"):
        model, x = glocal.build("SelfAttention", 64), torch.empty(1, 64, 64, 64)
        found = macs(model, x)
    assert found == 4 * 4096 * 64**2 + 2 * 4096**2 * 64
    assert 0.96 < 2 * 4096**2 * 64 / found < 0.98


def test_resnet_18_by_hand():
    timm = pytest.importorskip("timm")
    with torch.device("meta"):
        model = timm.create_model("resnet18")
        found = macs(model, torch.empty(1, 3, 224, 224))
    expected = 112**2 * 49 * 3 * 64 + 4 * 56**2 * 9 * 64**2
    for side, width in ((28, 128), (14, 256), (7, 512)):
        # first convolution at half the width, three at all of it, and the 1 x 1 shortcut
        expected += side**2 * (9 * width**2 // 2 + 3 * 9 * width**2 + width**2 // 2)
    assert found == expected + 512 * 1000  # 1.81 G; He et al. 2016 give 1.8 G
    assert params(model) == 11_689_512  # torchvision's documentation


def test_backbone_by_hand():
    net = glocal.Backbone("C-C-T-T", in_chans=3, num_classes=10, img_size=32, dims=(32, 64, 64, 128), stem_dim=16)
    expected = 16**2 * 9 * (3 * 16 + 16 * 16)
    # 1 x 1 to 4 times the width, 3 x 3 depthwise, squeeze-excite, 1 x 1 back, shortcut
    expected += 8**2 * (16 * 128 + 9 * 128 + 128 * 32 + 16 * 32) + 2 * 128 * 8
    expected += 4**2 * (32 * 256 + 9 * 256 + 256 * 64 + 32 * 64) + 2 * 256 * 16
    # q, k, v; both products; the projection; the MLP
    expected += 16 * 64 * 3 * 64 + 2 * 16**2 * 64 + 16 * 64**2 + 16 * 8 * 64**2
    expected += 16 * 64 * 3 * 128 + 2 * 16**2 * 128 + 16 * 128**2 + 16 * 8 * 128**2 + 16 * 64 * 128
    expected += 128 * 10
    assert macs(net, torch.randn(4, 3, 32, 32)) == expected


def test_nothing_is_changed():
    net = glocal.Backbone("C-DynamicDepthwiseConv-T", in_chans=1, num_classes=3, img_size=16).train()
    net.stem.norm1.eval()
    model = nn.Sequential(net, Of(lambda x: F.dropout(x, 0.5) if float(x.sum()) < 1e9 else x))  # runs, and draws
    modes = [m.training for m in model.modules()]
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    random = torch.get_rng_state()
    assert macs(model, torch.randn(4, 1, 16, 16, generator=torch.Generator().manual_seed(0))) > 0
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(p.device.type == "cpu" and p.grad is None for p in model.parameters())


def test_an_error_of_the_model_is_the_models():
    with pytest.raises(RuntimeError, match="mat1 and mat2 shapes cannot be multiplied"):
        macs(nn.Linear(5, 7), torch.randn(1, 6))


def test_params_count_shared_ones_once_and_frozen_ones_too():
    shared = nn.Linear(3, 4)
    shared.weight.requires_grad_(False)
    assert params(nn.ModuleList([shared, shared, nn.LayerNorm(5)])) == 16 + 10


# planted by scripts/mutate
FAULTS = (
    (
        "what a fused encoder layer multiplies is missing",
        "mha.set_fastpath_enabled(False)",
        "mha.set_fastpath_enabled(enabled)",
    ),
    ("operators are counted by the path that runs", 'module.impl = "reference"', 'module.impl = "auto"'),
    ("the model is left in evaluation", "_counted(copy.deepcopy(model), [", "_counted(model, ["),
    ("the whole batch counts", "[x[:1] if isinstance(x, Tensor)", "[x if isinstance(x, Tensor)"),
    ("random numbers are drawn", "with torch.random.fork_rng(sorted(devices)):", "if True:"),
)
