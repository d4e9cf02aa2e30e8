"""Convolution against nn.Conv1d and nn.Conv2d with the same weights."""

import pytest
import torch
from torch import nn
from torch.func import functional_call

CASES = [  # arguments, grid; 4 channels
    ({}, (5, 7)),
    ({"kernel_size": 1, "out_dim": 3}, (4, 5)),
    ({"kernel_size": (3, 5), "out_dim": 6}, (6, 5)),
    ({"kernel_size": (5, 1), "stride": 2}, (6, 7)),
    ({"kernel_size": 3, "stride": 2, "out_dim": 6}, (7, 8)),
    ({"kernel_size": 3, "stride": 3, "dilation": 2}, (8, 7)),
    ({"kernel_size": 5, "dilation": 2}, (5, 3)),
    ({"kernel_size": 7}, (3, 2)),
    ({"kernel_size": 3, "groups": 2, "out_dim": 6, "bias": False}, (5, 4)),
    ({"kernel_size": (3, 5), "groups": 4, "out_dim": 8, "stride": 2, "dilation": 2}, (9, 6)),
    ({"rank": 1}, (9,)),
    ({"rank": 1, "kernel_size": 5, "stride": 2, "dilation": 3, "groups": 2, "out_dim": 6}, (11,)),
    ({"kernel_size": 3, "stride": 2}, (1, 1)),
]


def torch_convolution(*, kernel_size=3, out_dim=4, stride=1, dilation=1, groups=1, bias=True, rank=2):
    """Also the state dict's names and shapes: functional_call refuses others."""
    kernel = (kernel_size,) * rank if isinstance(kernel_size, int) else kernel_size
    padding = tuple(dilation * (k - 1) // 2 for k in kernel)
    conv = (nn.Conv1d, nn.Conv2d)[rank - 1]
    return conv(4, out_dim, kernel, stride, padding, dilation, groups, bias=bias).double()


def oracle_of(mixer, conv):
    def oracle(x, valid=None):
        if valid is not None:
            x = x * valid.unsqueeze(-1)
        return functional_call(conv, dict(mixer.named_parameters()), x.movedim(-1, 1)).movedim(1, -1)

    return oracle


def spec_of(arguments):
    return f"Convolution({', '.join(f'{k}={v}' for k, v in arguments.items())})"


@pytest.mark.parametrize(("arguments", "grid"), CASES)
def test_is_torch_convolution(build, check, tokens, arguments, grid):
    mixer = build(spec_of(arguments), 4)
    conv = torch_convolution(**arguments)
    assert mixer.state_dict().keys() == conv.state_dict().keys()
    check(mixer, oracle_of(mixer, conv), tokens(2, *grid, 4))


@pytest.mark.parametrize(("arguments", "grid"), [CASES[2], CASES[4], CASES[11]])
def test_invalid_tokens_count_as_zero_anywhere(build, check, tokens, arguments, grid):
    mixer = build(spec_of(arguments), 4)
    valid = torch.rand(2, *grid) < 0.6
    check(mixer, oracle_of(mixer, torch_convolution(**arguments)), tokens(2, *grid, 4), valid=valid)


@pytest.mark.parametrize(
    ("arguments", "extents"),
    [
        ({"kernel_size": (3, 5)}, [(4, 3), (2, 5)]),
        ({"stride": 2, "out_dim": 6}, [(4, 3), (5, 6)]),
        ({"stride": 2, "dilation": 2, "groups": 2}, [(3, 4), (6, 1)]),
        ({"rank": 1, "kernel_size": 5, "stride": 3}, [(4,), (8,)]),
    ],
)
def test_padding_leaves_images_alone(build, check_padding, arguments, extents):
    check_padding(build(spec_of(arguments), 4), extents, 4)


def test_weights_are_one_head_for_each_offset(build, tokens):
    weights = build("Convolution(kernel_size=3)", 16).weights(tokens(2, 8, 8, 16))
    assert weights.weights.shape == (1, 9, 1, 1)


# planted by scripts/mutate
FAULTS = (
    ("the heads' offsets are mirrored", "index.T[None, :, :, None]", "index.T.flip(0)[None, :, :, None]"),
    (
        "channels of a convolution group lie apart in the definition",
        "mixed.unflatten(-1, (taps, self.groups, -1))",
        "mixed.unflatten(-1, (taps, -1, self.groups)).transpose(-1, -2)",
    ),
    (
        "a dilated kernel of the definition is not centred",
        "left=centre_padding(kernel, self.dilation)",
        "left=centre_padding(kernel)",
    ),
    (
        "the fast path has no bias",
        "            self.weight,\n            self.bias,",
        "            self.weight,\n            None,",
    ),
    (
        "the cost of a grouped convolution is that of a full one",
        "* self.dim * self.out_dim // self.groups",
        "* self.dim * self.out_dim",
    ),
)
