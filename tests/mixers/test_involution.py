"""Involution against the released definition (average pooling, 1x1 convolutions, unfold) and against a loop."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import glocal

FAULTS = (
    (
        "kernels are laid out tap by group",
        "unflatten(-1, (self._groups, -1))\n\n    def weights",
        "unflatten(-1, (-1, self._groups)).mT\n\n    def weights",
    ),
    (
        "channels of a group are strided",
        "source.flatten(1, -2).unflatten(-1, (self._groups, -1))",
        "source.flatten(1, -2).unflatten(-1, (-1, self._groups)).mT",
    ),
    ("the ReLU is missing", "real, update=update).relu()", "real, update=update)"),
    (
        "means of cells at the border count what lies outside",
        "seen.sum(-1, keepdim=True).clamp(min=1)",
        "cells.shape[-1]",
    ),
    (
        "means of cells count padding",
        "seen = cells >= 0 if real is None else pick_or_zero(real, cells)",
        "seen = cells >= 0",
    ),
    ("cells are centred on their first token", "left=[0] * rank", "left=centre_padding([self.stride] * rank)"),
    ("batch norm sees padding", 'self.conv1["conv"](tokens), real, update', 'self.conv1["conv"](tokens), None, update'),
    (
        "looking moves the statistics",
        "kernels = self.kernels(x, valid, update=update_statistics)\n        return Aggregation",
        "kernels = self.kernels(x, valid, update=True)\n        return Aggregation",
    ),
    (
        "the fast path leaves the statistics",
        "kernels = self.kernels(x, valid, update=update_statistics)\n        if",
        "kernels = self.kernels(x, valid, update=False)\n        if",
    ),
    ("the hidden layer has a bias", "nn.Linear(dim, hidden, bias=False)", "nn.Linear(dim, hidden)"),
)

SMALL = "Involution(kernel_size=3, group_channels=2, reduction_ratio=2)"
CASES = [  # kernel size, channels of a group, stride, channels, grid; a reduction of 2
    (3, 2, 1, 8, (4, 5)),
    (5, 4, 1, 8, (3, 6)),
    (3, 2, 2, 4, (4, 6)),
    (5, 1, 2, 4, (6, 2)),
    (7, 4, 3, 4, (3, 6)),
    (3, 2, 2, 4, (5, 7)),
    (5, 2, 3, 4, (7, 2)),
    (3, 4, 1, 8, (9,)),
    (3, 1, 2, 4, (9,)),
]


def spec_of(kernel_size, group_channels, stride, rank):
    options = f"kernel_size={kernel_size}, group_channels={group_channels}, stride={stride}, rank={rank}"
    return f"Involution({options}, reduction_ratio=2)"


def generated(mixer, pooled, real=None):
    """Kernels [..., G * K] from the pooled tokens; batch norm over the real ones."""
    hidden, bn = pooled @ mixer.conv1["conv"].weight.T, mixer.conv1["bn"]
    mean, var = bn.running_mean, bn.running_var
    if bn.training:
        seen = hidden.flatten(0, -2) if real is None else hidden[real]
        mean = seen.mean(0)
        var = ((seen - mean) ** 2).mean(0)
    hidden = ((hidden - mean) / (var + 1e-5).sqrt() * bn.weight + bn.bias).relu()
    return hidden @ mixer.conv2["conv"].weight.T + mixer.conv2["conv"].bias


def by_loop(mixer, kernel_size, group_channels, stride):
    """Output by output, tap by tap; a cell that reaches over the border is averaged over what it holds."""

    def oracle(x, valid=None):
        batch, *grid, dim = x.shape
        real = torch.ones(batch, *grid, dtype=torch.bool) if valid is None else valid
        x = x * real.unsqueeze(-1)
        outs = list(product(*[range(-(-n // stride)) for n in grid]))
        cells, some = [], []
        for out in outs:
            cell = (slice(None), *(slice(o * stride, (o + 1) * stride) for o in out))
            count = real[cell].flatten(1).sum(1)
            cells.append(x[cell].flatten(1, -2).sum(1) / count.clamp(min=1).unsqueeze(-1))
            some.append(count > 0)
        weights = generated(mixer, torch.stack(cells, 1), torch.stack(some, 1))
        weights = weights.view(batch, len(outs), dim // group_channels, kernel_size ** len(grid))
        rows = []
        for n, out in enumerate(outs):
            row = torch.zeros(batch, dim, dtype=x.dtype)
            for tap, offset in enumerate(product(range(kernel_size), repeat=len(grid))):
                place = [o * stride + k - kernel_size // 2 for o, k in zip(out, offset, strict=True)]
                if all(0 <= p < length for p, length in zip(place, grid, strict=True)):
                    token = x[(slice(None), *place)].view(batch, -1, group_channels)
                    row = row + (weights[:, n, :, tap, None] * token).flatten(1)
            rows.append(row)
        return torch.stack(rows, 1).view(batch, *[-(-n // stride) for n in grid], dim)

    return oracle


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("kernel_size", "group_channels", "stride", "dim", "grid"), CASES)
def test_is_the_loop(build, check, tokens, kernel_size, group_channels, stride, dim, grid, training):
    mixer = build(spec_of(kernel_size, group_channels, stride, len(grid)), dim).train(training)
    check(mixer, by_loop(mixer, kernel_size, group_channels, stride), tokens(2, *grid, dim))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("kernel_size", "group_channels", "stride", "dim", "grid"), [c for c in CASES if c[4] in ((4, 5), (4, 6), (3, 6))]
)
def test_is_the_released_code(build, check, tokens, kernel_size, group_channels, stride, dim, grid, training):
    mixer = build(spec_of(kernel_size, group_channels, stride, 2), dim).train(training)
    groups = dim // group_channels

    def oracle(x):
        x, bn = x.movedim(-1, 1), mixer.conv1["bn"]
        pooled = x if stride == 1 else F.avg_pool2d(x, stride, stride)
        hidden = F.conv2d(pooled, mixer.conv1["conv"].weight[:, :, None, None])
        statistics = (None, None) if training else (bn.running_mean, bn.running_var)
        hidden = F.batch_norm(hidden, *statistics, bn.weight, bn.bias, training=training, eps=1e-5).relu()
        kernels = F.conv2d(hidden, mixer.conv2["conv"].weight[:, :, None, None], mixer.conv2["conv"].bias)
        batch, _, height, width = kernels.shape
        taps = F.unfold(x, kernel_size, padding=kernel_size // 2, stride=stride)
        taps = taps.view(batch, groups, group_channels, kernel_size**2, height, width)
        kernels = kernels.view(batch, groups, 1, kernel_size**2, height, width)
        return (kernels * taps).sum(3).view(batch, dim, height, width).movedim(1, -1)

    check(mixer, oracle, tokens(2, *grid, dim))


@pytest.mark.parametrize(("stride", "grid"), [(1, (4, 5)), (2, (5, 6)), (3, (11,))])
def test_cells_and_statistics_are_of_valid_tokens(build, check, tokens, stride, grid):
    mixer = build(spec_of(3, 2, stride, len(grid)), 4).train()
    x, valid = tokens(3, *grid, 4), torch.rand(3, *grid) < 0.6
    valid[0] = False
    oracle = by_loop(mixer, 3, 2, stride)
    real = valid if stride == 1 else torch.ones(3, *[-(-n // stride) for n in grid], dtype=torch.bool)

    class RealTokens(nn.Module):
        """Without stride only real tokens' outputs are defined: the rest is dropped on both sides."""

        def __init__(self):
            super().__init__()
            self.mixer, self.impl = mixer, "auto"

        def forward(self, x, valid):
            self.mixer.impl = self.impl
            return self.mixer(x, valid=valid) * real.unsqueeze(-1)

    check(RealTokens(), lambda x, valid: oracle(x, valid) * real.unsqueeze(-1), x, valid=valid)


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("extents", [[(4, 3), (2, 5)], [(1, 1), (3, 4)], [(7,), (3,)]])
def test_padding_leaves_images_alone(build, check_padding, extents, stride):
    check_padding(build(spec_of(3, 2, stride, len(extents[0])), 4), extents, 4)


@pytest.mark.parametrize("impl", ["reference", "fast"])
@pytest.mark.parametrize("stride", [1, 2])
def test_forward_moves_statistics_once_as_batch_norm_does(build, tokens, impl, stride):
    mixer = build(spec_of(3, 2, stride, 2), 8).train()
    mixer.impl, x = impl, tokens(2, 4, 6, 8)
    pooled = F.avg_pool2d(x.movedim(-1, 1), stride).movedim(1, -1)
    twin = nn.BatchNorm1d(4).double()
    twin.load_state_dict(mixer.conv1["bn"].state_dict())
    twin((pooled @ mixer.conv1["conv"].weight.T).flatten(0, 2))
    mixer(x)
    for name, buffer in twin.named_buffers():
        assert_close(
            dict(mixer.conv1["bn"].named_buffers())[name], buffer, msg=lambda text, name=name: f"{name}: {text}"
        )
    before = {k: v.clone() for k, v in mixer.state_dict().items()}
    mixer.weights(x)
    for name, value in mixer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("impl", ["reference", "fast"])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("group_channels", [1, 4])
def test_constant_kernel_is_depthwise_convolution_shared_by_groups(build, tokens, impl, stride, group_channels):
    mixer = build(f"Involution(kernel_size=5, group_channels={group_channels}, stride={stride})", 8)
    plain = build(f"DepthwiseConv(kernel_size=5, stride={stride}, bias=False)", 8)
    mixer.impl = impl
    kernels = torch.randn(8 // group_channels, 25, dtype=torch.float64)
    with torch.no_grad():
        mixer.conv2["conv"].weight.zero_()
        mixer.conv2["conv"].bias.copy_(kernels.flatten())
        plain.weight.copy_(kernels.repeat_interleave(group_channels, 0).view(8, 1, 5, 5))
    x = tokens(2, 6, 7, 8)
    assert_close(mixer(x), plain(x))


def test_without_stride_is_inhomogeneous_depthwise_convolution(build, tokens):
    mixer = build(SMALL, 8)
    other = build("InhomogeneousDepthwiseConv(kernel_size=3, num_groups=4, reduction=2)", 8)
    names = {"conv1.conv": "conv1", "conv1.bn": "bn", "conv2.conv": "conv2"}
    state = {"conv1.bias": torch.zeros(4)}
    for name, value in mixer.state_dict().items():
        module, _, last = name.rpartition(".")
        state[f"{names[module]}.{last}"] = value
    other.load_state_dict(state)
    x = tokens(2, 5, 6, 8)
    assert_close(mixer(x), other(x))


def test_parameters():
    shapes = {k: tuple(v.shape) for k, v in glocal.build("Involution()", 64).named_parameters()}
    assert shapes == {
        "conv1.conv.weight": (16, 64),
        "conv1.bn.weight": (16,),
        "conv1.bn.bias": (16,),
        "conv2.conv.weight": (4 * 49, 16),
        "conv2.conv.bias": (4 * 49,),
    }
    with pytest.raises(ValueError, match="group_channels: 16 does not divide dim 24"):
        glocal.build("Involution()", 24)
    with pytest.raises(ValueError, match="reduction_ratio: 5 does not divide dim 32"):
        glocal.build("Involution(reduction_ratio=5)", 32)


def test_weights_are_shared_by_the_channels_of_a_group(build, tokens):
    mixer = build("Involution(kernel_size=3, group_channels=4)", 16)
    assert mixer.weights(tokens(2, 8, 8, 16)).weights.shape == (2, 4, 64, 9)
    strided = build("Involution(kernel_size=3, group_channels=4, stride=2)", 16).weights(tokens(2, 8, 8, 16))
    assert strided.weights.shape == (2, 4, 16, 9) and strided.num_sources == 64
