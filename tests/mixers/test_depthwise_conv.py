"""DepthwiseConv against nn.Conv1d and nn.Conv2d with one group for each channel."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

CASES = [  # arguments, grid; 5 channels
    ({}, (8, 9)),
    ({}, (3, 5)),
    ({"kernel_size": (3, 5)}, (6, 5)),
    ({"kernel_size": (5, 3), "stride": 2, "bias": False}, (6, 7)),
    ({"kernel_size": 3, "stride": 2, "dilation": 3}, (7, 10)),
    ({"kernel_size": 1}, (2, 3)),
    ({"kernel_size": 5, "stride": 3}, (1, 8)),
    ({"rank": 1}, (12,)),
    ({"rank": 1, "kernel_size": 3, "stride": 2, "dilation": 2}, (7,)),
]


def torch_convolution(*, kernel_size=7, stride=1, dilation=1, bias=True, rank=2):
    """Also the state dict's names and shapes: functional_call refuses others."""
    kernel = (kernel_size,) * rank if isinstance(kernel_size, int) else kernel_size
    padding = tuple(dilation * (k - 1) // 2 for k in kernel)
    conv = (nn.Conv1d, nn.Conv2d)[rank - 1]
    return conv(5, 5, kernel, stride, padding, dilation, groups=5, bias=bias).double()


def oracle_of(mixer, conv):
    def oracle(x, valid=None):
        if valid is not None:
            x = x * valid.unsqueeze(-1)
        return functional_call(conv, dict(mixer.named_parameters()), x.movedim(-1, 1)).movedim(1, -1)

    return oracle


def spec_of(arguments):
    return f"DepthwiseConv({', '.join(f'{k}={v}' for k, v in arguments.items())})"


@pytest.mark.parametrize(("arguments", "grid"), CASES)
def test_is_torch_convolution(build, check, tokens, arguments, grid):
    mixer = build(spec_of(arguments), 5)
    conv = torch_convolution(**arguments)
    assert mixer.state_dict().keys() == conv.state_dict().keys()
    check(mixer, oracle_of(mixer, conv), tokens(2, *grid, 5))


@pytest.mark.parametrize(("arguments", "grid"), [CASES[2], CASES[4], CASES[8]])
def test_invalid_tokens_count_as_zero_anywhere(build, check, tokens, arguments, grid):
    mixer = build(spec_of(arguments), 5)
    valid = torch.rand(2, *grid) < 0.6
    check(mixer, oracle_of(mixer, torch_convolution(**arguments)), tokens(2, *grid, 5), valid=valid)


@pytest.mark.parametrize(
    ("arguments", "extents"),
    [
        ({"kernel_size": (3, 5)}, [(4, 3), (2, 5)]),
        ({"kernel_size": 5, "stride": 2}, [(4, 3), (5, 6)]),
        ({"kernel_size": 3, "stride": 2, "dilation": 2}, [(3, 4), (6, 1)]),
        ({"rank": 1, "stride": 3}, [(4,), (8,)]),
    ],
)
def test_padding_leaves_images_alone(build, check_padding, arguments, extents):
    check_padding(build(spec_of(arguments), 5), extents, 5)


def test_weights_are_the_kernel_shared_by_images_and_positions(build, tokens):
    mixer = build("DepthwiseConv(kernel_size=3)", 16)
    weights = mixer.weights(tokens(2, 8, 8, 16)).weights
    assert weights.shape == (1, 16, 1, 9)
    torch.testing.assert_close(weights[0, :, 0], mixer.weight.flatten(1))


# planted by scripts/mutate
FAULTS = (
    (
        "the kernel's axes are exchanged in the definition",
        "self.weight.flatten(1)[None, :, None]",
        "self.weight.transpose(-1, -2).flatten(1)[None, :, None]",
    ),
    (
        "the definition's taps are not dilated",
        "            stride=self.stride,\n            dilation=self.dilation,\n            left=",
        "            stride=self.stride,\n            left=",
    ),
    (
        "the fast path has no bias",
        "            self.weight,\n            self.bias,",
        "            self.weight,\n            None,",
    ),
    (
        "the sources of a strided convolution are placed in their own tokens",
        "grid_positions(grid, stride=self.stride, device=x.device)",
        "grid_positions(grid, device=x.device)",
    ),
)
