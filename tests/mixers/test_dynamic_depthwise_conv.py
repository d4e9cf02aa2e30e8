"""DynamicDepthwiseConv (D-DW) against the definition: one kernel for each image and channel, tap by tap."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import glocal


def hidden_of(mixer, x, valid=None):
    """The mean over each image's own tokens, through conv1: what the batch norm sees, [B, C // r]."""
    pooled = [image.flatten(0, -2) if valid is None else image[valid[b]] for b, image in enumerate(x)]
    return torch.stack([p.mean(0) for p in pooled]) @ mixer.conv1.weight.T


def normalised(hidden, bn):
    mean, var = bn.running_mean, bn.running_var
    if bn.training:
        mean = hidden.mean(0)
        var = ((hidden - mean) ** 2).mean(0)
    return (hidden - mean) / (var + 1e-5).sqrt() * bn.weight + bn.bias


def oracle_of(mixer, kernel_size):
    def oracle(x, valid=None):
        batch, *grid, dim = x.shape
        hidden = normalised(hidden_of(mixer, x, valid), mixer.bn).relu()
        kernels = hidden @ mixer.conv2.weight.T + mixer.conv2.bias
        kernels = kernels.view(batch, dim, kernel_size ** len(grid))  # a channel's taps lie side by side
        if valid is not None:
            x = x * valid.unsqueeze(-1)
        half = kernel_size // 2
        padded = nn.functional.pad(x, (0, 0, *[half] * (2 * len(grid))))
        y = torch.zeros_like(x) + mixer.bias
        for tap, start in enumerate(product(range(kernel_size), repeat=len(grid))):
            window = tuple(slice(s, s + n) for s, n in zip(start, grid, strict=True))
            y = y + kernels[:, :, tap].view(batch, *[1] * len(grid), dim) * padded[(slice(None), *window)]
        return y

    return oracle


CASES = [  # spec, kernel size, grid; 8 channels
    ("DynamicDepthwiseConv()", 7, (6, 5)),
    ("DynamicDepthwiseConv(kernel_size=3, reduction=2)", 3, (5, 7)),
    ("DynamicDepthwiseConv(kernel_size=5)", 5, (2, 3)),
    ("DynamicDepthwiseConv(kernel_size=1)", 1, (1, 4)),
    ("DynamicDepthwiseConv(kernel_size=5, rank=1)", 5, (9,)),
]


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("spec", "kernel_size", "grid"), CASES)
def test_is_one_kernel_for_each_image_and_channel(build, check, tokens, spec, kernel_size, grid, training):
    mixer = build(spec, 8).train(training)
    check(mixer, oracle_of(mixer, kernel_size), tokens(3, *grid, 8))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("spec", "kernel_size", "grid"), [CASES[1], CASES[4]])
def test_pools_valid_tokens_only(build, check, tokens, spec, kernel_size, grid, training):
    mixer = build(spec, 8).train(training)
    valid = torch.rand(3, *grid) < 0.6
    check(mixer, oracle_of(mixer, kernel_size), tokens(3, *grid, 8), valid=valid)


@pytest.mark.parametrize("extents", [[(4, 3), (2, 5)], [(1, 1), (3, 4)]])
def test_padding_leaves_images_alone(build, check_padding, extents):
    check_padding(build("DynamicDepthwiseConv(kernel_size=3)", 8), extents, 8)


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_an_image_without_a_valid_token_is_not_nan(build, tokens, impl):
    mixer = build("DynamicDepthwiseConv(kernel_size=3)", 8)
    mixer.impl = impl
    x, valid = tokens(2, 4, 3, 8), torch.ones(2, 4, 3, dtype=torch.bool)
    valid[1] = False
    y = mixer(x, valid=valid)
    assert_close(y[:1], mixer(x[:1]))
    assert y.isfinite().all()


def test_parameters():
    shapes = {k: tuple(v.shape) for k, v in glocal.build("DynamicDepthwiseConv()", 8).named_parameters()}
    assert shapes == {
        "conv1.weight": (2, 8),
        "bn.weight": (2,),
        "bn.bias": (2,),
        "conv2.weight": (8 * 49, 2),
        "conv2.bias": (8 * 49,),
        "bias": (8,),
    }
    assert (glocal.build("DynamicDepthwiseConv()", 8).bias == 0).all()


@pytest.mark.parametrize("impl", ["reference", "fast"])
@pytest.mark.parametrize("momentum", [0.1, 0.3, None])  # None: the cumulative mean, as SWA's update_bn asks for
@pytest.mark.parametrize("padded", [False, True])
def test_forward_moves_statistics_once_as_batch_norm_does(build, tokens, impl, momentum, padded):
    mixer = build("DynamicDepthwiseConv(kernel_size=3)", 8).train()
    mixer.impl, mixer.bn.momentum = impl, momentum
    x = tokens(4, 3, 5, 8)
    valid = torch.rand(4, 3, 5) < 0.6 if padded else None
    twin = nn.BatchNorm1d(2, momentum=momentum).double()
    twin.load_state_dict(mixer.bn.state_dict())
    twin(hidden_of(mixer, x, valid))
    mixer(x, valid=valid)
    for name, buffer in twin.named_buffers():
        assert_close(dict(mixer.bn.named_buffers())[name], buffer, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("training", [False, True])
def test_looking_at_weights_changes_nothing(build, tokens, training):
    mixer = build("DynamicDepthwiseConv(kernel_size=3)", 8).train(training)
    x = tokens(3, 4, 5, 8)
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
    mixer = build("DynamicDepthwiseConv(kernel_size=3)", 8).train()
    mixer.impl = impl
    before = {k: v.clone() for k, v in mixer.state_dict().items()}
    with pytest.raises(ValueError, match="training"):
        mixer(tokens(1, 4, 5, 8))
    for name, value in mixer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_evaluation_moves_no_statistics(build, tokens):
    mixer = build("DynamicDepthwiseConv(kernel_size=3)", 8)
    before = {k: v.clone() for k, v in mixer.state_dict().items()}
    mixer(tokens(3, 4, 5, 8))
    for name, value in mixer.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_constant_kernel_is_depthwise_convolution(build, tokens, impl):
    mixer, plain = build("DynamicDepthwiseConv(kernel_size=5)", 8), build("DepthwiseConv(kernel_size=5)", 8)
    mixer.impl = impl
    with torch.no_grad():
        mixer.conv2.weight.zero_()
        mixer.conv2.bias.copy_(plain.weight.flatten())
        mixer.bias.copy_(plain.bias)
    x = tokens(2, 6, 7, 8)
    assert_close(mixer(x), plain(x))


def test_weights_are_shared_by_positions(build, tokens):
    weights = build("DynamicDepthwiseConv(kernel_size=3)", 16).weights(tokens(2, 8, 8, 16))
    assert weights.weights.shape == (2, 16, 1, 9)


# planted by scripts/mutate
FAULTS = (
    (
        "predicted kernels are read tap by tap, not channel by channel",
        "unflatten(-1, (self.dim, -1))",
        "unflatten(-1, (-1, self.dim)).transpose(-1, -2)",
    ),
    ("the prediction divides by all tokens, not the real ones", "/ real.sum(1).clamp(min=1)", "/ real.shape[1]"),
    ("the prediction averages what stands in the padding", ".masked_fill(~real, 0).sum(1)", ".sum(1)"),
    (
        "an image of padding alone counts in the batch norm's statistics",
        "some = None if valid is None else valid.flatten(1).any(1)",
        "some = None",
    ),
    ("the prediction has no ReLU", "update=update).relu()", "update=update)"),
    (
        "the fast path has no bias",
        ", bias=self.bias)",
        ")",
    ),
    ("the cost leaves out the prediction", " + hidden * self.dim * (1 + taps)", ""),
    (
        "the first length of a kernel is taken for that of the columns",
        'self._kernel = odd_kernel("kernel_size", kernel_size, rank)',
        'self._kernel = odd_kernel("kernel_size", kernel_size, rank)[::-1]',
    ),
)
