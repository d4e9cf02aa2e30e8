"""RepLKNet's large-kernel depthwise convolution, with a small kernel beside it while it is trained."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glocal.arguments import odd_kernel, positive
from glocal.mixers._library import depthwise, out_lengths
from glocal.mixers._norm import BatchNorm, normalise
from glocal.mixers.depthwise_conv import DepthwiseConv
from glocal.operator import TokenModule


class LargeKernelConv(TokenModule):
    """A large and a small depthwise convolution, each with a batch norm of its own, summed.

    In evaluation the sum is one depthwise convolution, `merged()`, whose weights can be looked at; in training it
    is none, since each batch norm follows the statistics of its own branch.

    Args:
        dim: channels C.
        kernel_size: of the large kernel; odd, for all axes or each.
        small_kernel: of the small one; odd, no longer than the large one. None: the large one alone.
        stride: for all axes.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *ceil(S / stride), C]; zeros outside, kernels centred.
        `lkb_origin.conv.weight` [C, 1, *kernel_size] and `lkb_origin.bn`; `small_conv.conv.weight`
        [C, 1, *small_kernel] and `small_conv.bn`. Where `valid` is given, padding counts as zero and has no part in
        the statistics.

    Cost: N*(K + k)*C multiply-adds, N outputs, K and k taps; merged, N*K*C.

    Raises:
        ValueError: even kernels; a small kernel longer than the large one; training with one token and one image,
            which have no batch statistics.

    Source: Ding et al., Scaling Up Your Kernels to 31x31, CVPR 2022, arXiv 2203.06717, section 3 (guideline 3,
    re-parameterization); parameter names from the released code (replknet.py).
    Differs from the paper: kernels may differ between axes, and there are sequences. Its 1x1 convolutions and ReLUs
    belong to its block.
    """

    examples = (
        "LargeKernelConv(kernel_size=7, small_kernel=3)",
        "LargeKernelConv(kernel_size=(9, 13), small_kernel=(3, 5), stride=2)",
        "LargeKernelConv(kernel_size=31, small_kernel=None)",
        "LargeKernelConv(kernel_size=27, rank=1)",
    )

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int | Sequence[int] = 31,
        small_kernel: int | Sequence[int] | None = 5,
        stride: int = 1,
        rank: int = 2,
    ) -> None:
        super().__init__(dim, rank=rank)
        self.kernel_size, self.small_kernel, self.stride = kernel_size, small_kernel, positive("stride", stride)
        large = self._large = odd_kernel("kernel_size", kernel_size, rank)
        small = self._small = None if small_kernel is None else odd_kernel("small_kernel", small_kernel, rank)
        if small is not None and any(k > n for k, n in zip(small, large, strict=True)):
            raise ValueError(
                f"small_kernel: {small_kernel!r} is longer than kernel_size {kernel_size!r}; give less, or None"
            )
        self.lkb_origin = _ConvNorm(dim, large)
        self.small_conv = None if small is None else _ConvNorm(dim, small)

    def mix(self, x: Tensor, *, valid: Tensor | None = None, update_statistics: bool = False) -> Tensor:
        if valid is not None:
            x = x.masked_fill(~valid[..., None], 0)
            for axis in range(1, valid.dim()):  # the outputs that stand on real tokens
                steps = torch.arange(0, valid.shape[axis], self.stride, device=x.device)
                valid = valid.index_select(axis, steps)
        out = self.lkb_origin(x, valid, stride=self.stride, update=update_statistics)
        if self.small_conv is not None:
            out = out + self.small_conv(x, valid, stride=self.stride, update=update_statistics)
        return out

    @torch.no_grad()
    def merged(self) -> DepthwiseConv:
        """One depthwise convolution with the same output in evaluation, exactly: a copy, which shares nothing.

        Each batch norm, with its running statistics, goes into its kernel, and the small kernel into the centre of
        the large one.
        """
        weight, bias = self.lkb_origin.merged()
        if self.small_conv is not None:
            small, small_bias = self.small_conv.merged()
            margins = [(n - k) // 2 for n, k in zip(weight.shape[2:], small.shape[2:], strict=True)]
            weight = weight + nn.functional.pad(small, [m for margin in reversed(margins) for m in (margin, margin)])
            bias = bias + small_bias
        assert self.rank is not None
        one = DepthwiseConv(  # type: ignore[abstract]  # its `weights` became the hook that seems to be missing
            self.dim, kernel_size=self.kernel_size, stride=self.stride, rank=self.rank
        )
        one.to(weight).load_state_dict({"weight": weight, "bias": bias})
        return one.train(self.training)

    def out_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        return out_lengths(grid, self.stride)

    def macs(self, grid: Sequence[int]) -> int:
        taps = math.prod(self._large) + (0 if self._small is None else math.prod(self._small))
        return math.prod(self.out_grid(grid)) * taps * self.dim


class _ConvNorm(nn.Module):
    """A depthwise convolution without bias, and a batch norm over all its outputs."""

    def __init__(self, dim: int, kernel: Sequence[int]) -> None:
        super().__init__()
        layer: type[Any] = nn.Conv1d if len(kernel) == 1 else nn.Conv2d
        self.conv = layer(dim, dim, tuple(kernel), groups=dim, bias=False)
        self.bn = BatchNorm(dim)

    def forward(self, x: Tensor, valid: Tensor | None, *, stride: int, update: bool) -> Tensor:
        out = depthwise(x, self.conv.weight, None, stride=stride)
        return normalise(self.bn, out, valid, update=update)

    def merged(self) -> tuple[Tensor, Tensor]:
        """Kernel and bias of the convolution that does both, in evaluation."""
        assert self.bn.running_mean is not None and self.bn.running_var is not None
        scale = self.bn.weight / (self.bn.running_var + self.bn.eps).sqrt()
        weight = self.conv.weight * scale.view(-1, *[1] * (self.conv.weight.dim() - 1))
        return weight, self.bn.bias - self.bn.running_mean * scale
