"""Convolutions of every kind, and how far apart two outputs are."""

from torch import nn

KERNELS = [
    (nn.Conv1d, {"kernel_size": 1}),
    (nn.Conv1d, {"kernel_size": 4, "stride": 3, "padding": 2}),
    (nn.Conv1d, {"kernel_size": 3, "dilation": 4, "padding": "same", "groups": 2}),
    (nn.Conv2d, {"kernel_size": 3, "padding": 1, "groups": 4}),
    (nn.Conv2d, {"kernel_size": (2, 5), "stride": (1, 2), "padding": (0, 3), "dilation": (3, 1)}),
    (nn.Conv2d, {"kernel_size": 7, "stride": 2, "padding": 3, "bias": False}),
    (nn.Conv2d, {"kernel_size": 3, "padding": "valid"}),
]


def relative(found, expected):
    return ((found - expected).abs().max() / expected.abs().max()).item()
