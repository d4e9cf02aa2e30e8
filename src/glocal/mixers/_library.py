"""Convolutions of the library on channels-last tokens, and depthwise ones by what is fastest.

In 2-D `movedim` gives the convolution a channels-last view without a copy. In 1-D it goes through a
[B, C, 1, T] view: conv1d on the moved view was measured 30 times slower.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from glocal.kernels import local_sum


def conv(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: int,
    padding: Sequence[int],
    dilation: int,
    groups: int,
) -> Tensor:
    """[B, *S, C] tokens, [C_out, C / groups, *kernel] weight -> [B, *S_out, C_out]."""
    if all(n == 1 for n in tokens.shape[1:-1]):
        # one output whatever the stride; with one, oneDNN's bfloat16 weight gradient of a single token holds
        # uninitialised memory (seen with torch 2.15)
        stride = 1
    if len(padding) == 1:
        out = nn.functional.conv2d(
            images(tokens), weight.unsqueeze(2), bias, (1, stride), (0, *padding), (1, dilation), groups
        )
    else:
        out = nn.functional.conv2d(images(tokens), weight, bias, stride, tuple(padding), dilation, groups)
    return back(out, len(padding))


def depthwise(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    stride: int = 1,
    dilation: int = 1,
    causal: bool = False,
    past: int = 0,
) -> Tensor:
    """[B, *S, C] tokens, [G, 1, *kernel] weight -> [B, *S_out, C], centred, or causal behind `past` tokens.

    Each of the G kernels is shared by C / G consecutive channels. Even ones have the shorter side in front.
    """
    kernel, groups, dim = weight.shape[2:], weight.shape[0], tokens.shape[-1]
    if stride > 1:
        padding = [dilation * (k // 2) for k in kernel]
        if any(k % 2 == 0 for k in kernel):  # the library knows one number for both sides
            ends = [n for k in reversed(kernel) for n in (dilation * ((k - 1) // 2), dilation * (k // 2))]
            tokens, padding = nn.functional.pad(tokens, (0, 0, *ends)), [0] * len(kernel)
        own = weight if groups == dim else weight.repeat_interleave(dim // groups, 0)
        return conv(tokens, own, bias, stride=stride, padding=padding, dilation=dilation, groups=dim)
    shared = weight.reshape(1, *[1] * len(kernel), groups, -1)
    left = [k - 1 if causal else (k - 1) // 2 for k in kernel]
    return local_sum(tokens, shared, dilation, kernel_size=kernel, left=left, past=past, bias=bias)


def images(tokens: Tensor) -> Tensor:
    """[B, *S, C] -> [B, C, H, W], H = 1 for sequences; a view."""
    return (tokens.unsqueeze(1) if tokens.dim() == 3 else tokens).movedim(-1, 1)


def back(out: Tensor, rank: int) -> Tensor:
    """[B, C, H, W] -> [B, *S, C]; a view."""
    tokens = out.movedim(1, -1)
    return tokens.squeeze(1) if rank == 1 else tokens


def out_lengths(grid: Sequence[int], stride: int) -> tuple[int, ...]:
    """ceil(n / stride) for every axis."""
    return tuple((n + stride - 1) // stride for n in grid)


def tap_norms(weight: Tensor, groups: int) -> Tensor:
    """Of a kernel [C_out, C / groups, *taps], the norm of a group's weights at each tap: [groups, K]."""
    return weight.detach().double().flatten(2).unflatten(0, (groups, -1)).square().sum((1, 2)).sqrt()
