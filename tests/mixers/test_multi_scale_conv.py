"""MultiScaleConv against the sum of its branches by torch's convolutions."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import glocal

FAULTS = (
    (
        "a kernel sits in the corner of the merged one",
        "[(largest - size) // 2] * (2 * len(self._each[0]))",
        "[0, largest - size] * len(self._each[0])",
    ),
    (
        "the merged kernel is cut at the first size",
        "largest = max(self.kernel_sizes)",
        "largest = self.kernel_sizes[0]",
    ),
    (
        "the merged kernel is not dilated",
        "self.bias, stride=self.stride, dilation=self.dilation",
        "self.bias, stride=self.stride",
    ),
    (
        "the definition reads the branches' taps in another order",
        "torch.cat(indices, -1)",
        "torch.cat(indices[::-1], -1)",
    ),
    ("the definition drops the bias", "return mixed if self.bias is None else mixed + self.bias", "return mixed"),
    ("the kernels are averaged", "return total.to(", "return (total / len(self.kernel_sizes)).to("),
    (
        "kernels of the definition are not centred",
        "left=centre_padding(kernel, self.dilation)",
        "left=centre_padding(kernel, 1)",
    ),
)

CASES = [  # arguments, grid; 5 channels
    ({}, (8, 9)),
    ({}, (3, 5)),
    ({"kernel_sizes": (1, 3)}, (6, 5)),
    ({"kernel_sizes": (5,)}, (4, 7)),
    ({"kernel_sizes": (7, 3, 3), "stride": 2, "bias": False}, (6, 7)),
    ({"kernel_sizes": (3, 5), "stride": 2, "dilation": 3}, (7, 10)),
    ({"kernel_sizes": (1, 5), "stride": 3}, (1, 8)),
    ({"kernel_sizes": (3, 1)}, (1, 1)),
    ({"rank": 1}, (12,)),
    ({"rank": 1, "kernel_sizes": (5, 3), "stride": 2, "dilation": 2}, (7,)),
]


def sum_of_branches(mixer, *, kernel_sizes=(3, 5, 7), stride=1, dilation=1, bias=True, rank=2):
    conv = (F.conv1d, F.conv2d)[rank - 1]

    def oracle(x, valid=None):
        x = (x if valid is None else x * valid.unsqueeze(-1)).movedim(-1, 1)
        y = 0
        for kernel, size in zip(mixer.kernels, kernel_sizes, strict=True):
            y = y + conv(x, kernel, None, stride, dilation * (size // 2), dilation, groups=5)
        y = y.movedim(1, -1)
        return y + mixer.bias if bias else y

    return oracle


def spec_of(arguments):
    return f"MultiScaleConv({', '.join(f'{k}={v}' for k, v in arguments.items())})"


@pytest.mark.parametrize(("arguments", "grid"), CASES)
def test_is_the_sum_of_its_branches(build, check, tokens, arguments, grid):
    mixer = build(spec_of(arguments), 5)
    check(mixer, sum_of_branches(mixer, **arguments), tokens(2, *grid, 5))


@pytest.mark.parametrize(("arguments", "grid"), [CASES[2], CASES[5], CASES[9]])
def test_invalid_tokens_count_as_zero_anywhere(build, check, tokens, arguments, grid):
    mixer = build(spec_of(arguments), 5)
    check(mixer, sum_of_branches(mixer, **arguments), tokens(2, *grid, 5), valid=torch.rand(2, *grid) < 0.6)


@pytest.mark.parametrize(
    ("arguments", "extents"),
    [
        ({"kernel_sizes": (3, 5)}, [(4, 3), (2, 5)]),
        ({"kernel_sizes": (1, 5), "stride": 2, "dilation": 2}, [(4, 3), (5, 6)]),
        ({"rank": 1, "stride": 3}, [(4,), (8,)]),
    ],
)
def test_padding_leaves_images_alone(build, check_padding, arguments, extents):
    check_padding(build(spec_of(arguments), 5), extents, 5)


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_is_one_depthwise_convolution_of_the_largest_size(build, tokens, impl):
    mixer = build("MultiScaleConv(kernel_sizes=(3, 7, 1), stride=2)", 4)
    single = build("DepthwiseConv(kernel_size=7, stride=2)", 4)
    mixer.impl = impl
    with torch.no_grad():
        single.weight.copy_(mixer.kernels[1])
        single.weight[:, :, 2:5, 2:5] += mixer.kernels[0]
        single.weight[:, :, 3, 3] += mixer.kernels[2][:, :, 0, 0]
        single.bias.copy_(mixer.bias)
    x = tokens(2, 9, 8, 4)
    assert_close(mixer(x), single(x), rtol=1e-10, atol=1e-10)
    # slots that read one source coalesce to the same weights
    few, same = mixer.weights(x).coalesce(), single.weights(x)
    assert_close(few.dense(), same.dense())
    assert (few.weights != 0).sum(-1).max() == 49


def test_parameters():
    shapes = {k: tuple(v.shape) for k, v in glocal.build("MultiScaleConv(kernel_sizes=(3, 5))", 8).named_parameters()}
    assert shapes == {"kernels.0": (8, 1, 3, 3), "kernels.1": (8, 1, 5, 5), "bias": (8,)}
    assert "bias" not in glocal.build("MultiScaleConv(bias=False)", 8).state_dict()


@pytest.mark.parametrize("sizes", ["()", "(3, 4)", "5", "(3, 0)"])
def test_sizes_are_refused_in_words(sizes):
    with pytest.raises(ValueError, match="kernel_sizes"):
        glocal.build(f"MultiScaleConv(kernel_sizes={sizes})", 8)


def test_weights_are_all_taps_shared_by_images_and_positions(build, tokens):
    weights = build("MultiScaleConv(kernel_sizes=(1, 3))", 16).weights(tokens(2, 8, 8, 16))
    assert weights.weights.shape == (1, 16, 1, 10)
