"""InhomogeneousDepthwiseConv (I-D-DW) against the definition: a kernel for each position and group."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import glocal

SMALL = "InhomogeneousDepthwiseConv(kernel_size=3, num_groups=4, reduction=2)"


def hidden_of(mixer, x):
    return x @ mixer.conv1.weight.T + mixer.conv1.bias


def weights_of(mixer, x, valid=None):
    """Predicted linearly from the centre token; batch norm over the valid tokens. [B, N, G * taps]."""
    hidden, bn = hidden_of(mixer, x), mixer.bn
    mean, var = bn.running_mean, bn.running_var
    if bn.training:
        seen = hidden.flatten(0, -2) if valid is None else hidden[valid]
        mean = seen.mean(0)
        var = ((seen - mean) ** 2).mean(0)
    hidden = ((hidden - mean) / (var + 1e-5).sqrt() * bn.weight + bn.bias).relu()
    return (hidden @ mixer.conv2.weight.T + mixer.conv2.bias).flatten(1, -2)


def oracle_of(mixer, kernel_size, num_groups):
    """Position by position, tap by tap."""

    def oracle(x, valid=None):
        batch, *grid, dim = x.shape
        weights = weights_of(mixer, x, valid).unflatten(-1, (num_groups, -1))
        if valid is not None:
            x = x * valid.unsqueeze(-1)
        rows = []
        for n, centre in enumerate(product(*map(range, grid))):
            row = torch.zeros(batch, dim, dtype=x.dtype)
            for tap, offset in enumerate(product(range(kernel_size), repeat=len(grid))):
                place = [c + o - kernel_size // 2 for c, o in zip(centre, offset, strict=True)]
                if all(0 <= p < length for p, length in zip(place, grid, strict=True)):
                    token = x[(slice(None), *place)].view(batch, num_groups, -1)
                    row = row + (weights[:, n, :, tap, None] * token).flatten(1)
            rows.append(row)
        return torch.stack(rows, 1).view(x.shape)

    return oracle


CASES = [  # spec, kernel size, groups, channels, grid
    (SMALL, 3, 4, 8, (4, 5)),
    ("InhomogeneousDepthwiseConv(kernel_size=5, num_groups=2)", 5, 2, 8, (3, 6)),
    ("InhomogeneousDepthwiseConv(kernel_size=3)", 3, 32, 32, (3, 2)),
    ("InhomogeneousDepthwiseConv(kernel_size=7, num_groups=1)", 7, 1, 4, (1, 3)),
    ("InhomogeneousDepthwiseConv(kernel_size=5, num_groups=4, rank=1)", 5, 4, 8, (9,)),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("spec", "kernel_size", "groups", "dim", "grid"), CASES)
def test_is_one_kernel_for_each_position_and_group(
    build, check, tokens, spec, kernel_size, groups, dim, grid, training
):
    mixer = build(spec, dim).train(training)
    check(mixer, oracle_of(mixer, kernel_size, groups), tokens(2, *grid, dim))


@pytest.mark.parametrize("training", [False, True])
def test_is_the_published_unfold(build, check, tokens, training):
    mixer = build("InhomogeneousDepthwiseConv(num_groups=4)", 8).train(training)

    def oracle(x):
        taps = F.unfold(x.movedim(-1, 1), 7, padding=3).view(2, 4, 2, 49, -1)
        weights = weights_of(mixer, x).mT.view(2, 4, 1, 49, -1)
        return (taps * weights).sum(3).flatten(1, 2).mT.view(x.shape)

    check(mixer, oracle, tokens(2, 5, 9, 8))


def test_batch_norm_sees_valid_tokens_only(build, check, tokens):
    mixer = build(SMALL, 8).train()
    x, valid = tokens(3, 4, 5, 8), torch.rand(3, 4, 5) < 0.6
    full, real = oracle_of(mixer, 3, 4), valid.unsqueeze(-1)

    class RealTokens(nn.Module):
        """Only real tokens' outputs are defined: the rest is dropped on both sides."""

        def __init__(self):
            super().__init__()
            self.mixer, self.impl = mixer, "auto"

        def forward(self, x, valid):
            self.mixer.impl = self.impl
            return self.mixer(x, valid=valid) * real

    check(RealTokens(), lambda x, valid: full(x, valid) * real, x, valid=valid)


@pytest.mark.parametrize("extents", [[(4, 3), (2, 5)], [(1, 1), (3, 4)]])
def test_padding_leaves_images_alone(build, check_padding, extents):
    check_padding(build(SMALL, 8), extents, 8)


def test_parameters():
    shapes = {k: tuple(v.shape) for k, v in glocal.build("InhomogeneousDepthwiseConv()", 64).named_parameters()}
    assert shapes == {
        "conv1.weight": (16, 64),
        "conv1.bias": (16,),
        "bn.weight": (16,),
        "bn.bias": (16,),
        "conv2.weight": (32 * 49, 16),
        "conv2.bias": (32 * 49,),
    }


@pytest.mark.parametrize("impl", ["reference", "fast"])
@pytest.mark.parametrize("momentum", [0.1, 0.3, None])  # None: the cumulative mean, as SWA's update_bn asks for
@pytest.mark.parametrize("padded", [False, True])
def test_forward_moves_statistics_once_as_batch_norm_does(build, tokens, impl, momentum, padded):
    mixer = build(SMALL, 8).train()
    mixer.impl, mixer.bn.momentum = impl, momentum
    x = tokens(2, 3, 5, 8)
    valid = torch.rand(2, 3, 5) < 0.6 if padded else None
    hidden = hidden_of(mixer, x)
    twin = nn.BatchNorm1d(4, momentum=momentum).double()
    twin.load_state_dict(mixer.bn.state_dict())
    twin(hidden[valid] if padded else hidden.flatten(0, -2))
    mixer(x, valid=valid)
    for name, buffer in twin.named_buffers():
        assert_close(dict(mixer.bn.named_buffers())[name], buffer, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("training", [False, True])
def test_looking_at_weights_changes_nothing(build, tokens, training):
    mixer = build(SMALL, 8).train(training)
    x = tokens(2, 4, 5, 8)
    before, random = {k: v.clone() for k, v in mixer.state_dict().items()}, torch.get_rng_state()
    weights = mixer.weights(x)
    assert torch.equal(torch.get_rng_state(), random)
    for name, value in mixer.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert mixer.training == training and mixer.bn.training == training
    rebuilt = mixer.project(glocal.aggregate(weights, mixer.values(x)))
    assert_close(rebuilt.view(x.shape), mixer(x))


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_training_refuses_statistics_of_one_value(build, tokens, impl):
    """As nn.BatchNorm does, and before anything has moved."""
    mixer = build(SMALL, 8).train()
    mixer.impl = impl
    before = {k: v.clone() for k, v in mixer.state_dict().items()}
    with pytest.raises(ValueError, match="training"):
        mixer(tokens(1, 1, 1, 8))
    for name, value in mixer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_evaluation_moves_no_statistics(build, tokens):
    mixer = build(SMALL, 8)
    before = {k: v.clone() for k, v in mixer.state_dict().items()}
    mixer(tokens(2, 4, 5, 8))
    for name, value in mixer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("impl", ["reference", "fast"])
@pytest.mark.parametrize("groups", [2, 8])
def test_constant_kernel_is_depthwise_convolution_shared_by_groups(build, tokens, impl, groups):
    mixer = build(f"InhomogeneousDepthwiseConv(kernel_size=5, num_groups={groups})", 8)
    plain = build("DepthwiseConv(kernel_size=5, bias=False)", 8)
    mixer.impl = impl
    kernels = torch.randn(groups, 25, dtype=torch.float64)
    with torch.no_grad():
        mixer.conv2.weight.zero_()
        mixer.conv2.bias.copy_(kernels.flatten())
        plain.weight.copy_(kernels.repeat_interleave(8 // groups, 0).view(8, 1, 5, 5))
    x = tokens(2, 6, 7, 8)
    assert_close(mixer(x), plain(x))


def test_weights_are_shared_by_the_channels_of_a_group(build, tokens):
    weights = build("InhomogeneousDepthwiseConv(kernel_size=3, num_groups=4)", 16).weights(tokens(2, 8, 8, 16))
    assert weights.weights.shape == (2, 4, 64, 9)


# planted by scripts/mutate
FAULTS = (
    (
        "predicted kernels are read tap by tap, not group by group",
        "self.conv2(hidden).unflatten(-1, (self.num_groups, -1))",
        "self.conv2(hidden).unflatten(-1, (-1, self.num_groups)).transpose(-1, -2)",
    ),
    (
        "channels of a group lie apart in the values",
        "source.flatten(1, -2).unflatten(-1, (self.num_groups, -1))",
        "source.flatten(1, -2).unflatten(-1, (-1, self.num_groups)).transpose(-1, -2)",
    ),
    (
        "the batch norm's statistics count padding",
        "normalise(self.bn, self.conv1(x), valid, update=update)",
        "normalise(self.bn, self.conv1(x), None, update=update)",
    ),
    (
        "the definition gives positions the kernels of the transposed grid",
        "update=update_statistics).flatten(1, -3).transpose(1, 2)",
        "update=update_statistics).transpose(1, -3).flatten(1, -3).transpose(1, 2)",
    ),
    ("the prediction has no ReLU", "update=update).relu()", "update=update)"),
)
