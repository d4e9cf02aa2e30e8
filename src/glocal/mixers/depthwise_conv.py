"""Depthwise convolution."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import flag, odd_kernel, positive
from glocal.mixer import TokenMixer
from glocal.mixers._grid import centre_padding, kernel_index
from glocal.mixers._library import conv, out_lengths


class DepthwiseConv(TokenMixer):
    """Depthwise convolution: each channel has its own kernel, the same at every position.

    Weights: [1, C, 1, K], K taps. Static, own for each channel, shared by all positions.

    Args:
        dim: channels C.
        kernel_size: odd, for all axes or each.
        stride, dilation: for all axes.
        bias: added to the output.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *ceil(S / stride), C]; zeros outside, kernel centred.
        `weight` [C, 1, *kernel] and `bias` [C] as torch.nn.Conv2d with groups=C has them.

    Cost: N*K*C multiply-adds, N outputs.

    Raises:
        ValueError: even kernels.

    Source: Han et al., On the Connection between Local Attention and Dynamic Depth-wise Convolution, ICLR 2022,
    arXiv 2106.04263, section 2.
    Differs from the paper: nothing; the pointwise convolutions around it belong to the paper's block.
    """

    examples = (
        "DepthwiseConv(kernel_size=3)",
        "DepthwiseConv(kernel_size=(5, 3), stride=2, dilation=2, bias=False)",
        "DepthwiseConv(kernel_size=5, rank=1)",
    )

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int | Sequence[int] = 7,
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
        rank: int = 2,
    ) -> None:
        super().__init__(dim, rank=rank)
        self.kernel_size, self.stride, self.dilation = (
            kernel_size,
            positive("stride", stride),
            positive("dilation", dilation),
        )
        kernel = self._kernel = odd_kernel("kernel_size", kernel_size, rank)
        layer: type[Any] = nn.Conv1d if rank == 1 else nn.Conv2d
        of_torch = layer(dim, dim, kernel, groups=dim, bias=flag("bias", bias))
        self.weight, self.bias = of_torch.weight, of_torch.bias

    def values(self, source: Tensor) -> Tensor:
        return source.flatten(1, -2).unsqueeze(-1)

    def weights(self, x: Tensor) -> Aggregation:
        grid, kernel, out = x.shape[1:-1], self._kernel, self.out_grid(x.shape[1:-1])
        index = kernel_index(
            grid,
            kernel,
            stride=self.stride,
            dilation=self.dilation,
            left=centre_padding(kernel, self.dilation),
            device=x.device,
        )
        return Aggregation(
            self.weight.flatten(1)[None, :, None],
            index[None, None],
            math.prod(grid),
            grid_positions(out, device=x.device),
            grid_positions(grid, stride=self.stride, device=x.device),
            out,
            tuple(grid),
        )

    def project(self, mixed: Tensor) -> Tensor:
        return mixed if self.bias is None else mixed + self.bias

    def fast(self, x: Tensor, values: Tensor) -> Tensor:
        return conv(
            values.reshape(x.shape),
            self.weight,
            self.bias,
            stride=self.stride,
            padding=centre_padding(self._kernel, self.dilation),
            dilation=self.dilation,
            groups=self.dim,
        )

    def out_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        return out_lengths(grid, self.stride)

    def macs(self, grid: Sequence[int]) -> int:
        return math.prod(self.out_grid(grid)) * math.prod(self._kernel) * self.dim
