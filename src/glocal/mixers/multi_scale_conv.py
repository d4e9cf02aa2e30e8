"""Multi-scale depthwise convolution: kernels of several sizes beside each other, summed."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import flag, odd_kernel, positive
from glocal.mixer import TokenMixer
from glocal.mixers._grid import centre_padding, kernel_index
from glocal.mixers._library import depthwise, out_lengths


class MultiScaleConv(TokenMixer):
    """Depthwise kernels of several sizes on all channels, summed: one of the largest size, learned at several scales.

    Weights: [1, C, 1, K], K the taps of all kernels together. Static, own for each channel, shared by all positions.
    Kernels overlap, so slots repeat sources; `coalesce()` gives the one kernel that they add up to.

    Args:
        dim: channels C.
        kernel_sizes: one for each branch, odd, the same for all axes.
        stride, dilation: for all axes and branches.
        bias: added to the output.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *ceil(S / stride), C]; zeros outside, kernels centred.
        `kernels.i` [C, 1, *kernel] is branch i, as torch.nn.Conv2d with groups=C has it; `bias` [C].

    Cost: N*K*C multiply-adds, N outputs; the fast path adds up the kernels first and does those of the largest only.

    Raises:
        ValueError: no kernel, or an even one.

    Source: Ding et al., Scaling Up Your Kernels to 31x31: Revisiting Large Kernel Design in CNNs, CVPR 2022,
    arXiv 2203.06717, section 3: a small kernel beside the large one, merged into it for inference.
    Differs from the paper: any number of kernels; no batch norm in the branches, which would keep them from being
    merged in training. MixConv (Tan and Le, BMVC 2019, arXiv 1907.09595) is another operator: it gives each size
    channels of its own.
    """

    examples = (
        "MultiScaleConv()",
        "MultiScaleConv(kernel_sizes=(1, 5), stride=2, dilation=2, bias=False)",
        "MultiScaleConv(kernel_sizes=(3, 7), rank=1)",
    )

    def __init__(
        self,
        dim: int,
        *,
        kernel_sizes: Sequence[int] = (3, 5, 7),
        stride: int = 1,
        dilation: int = 1,
        bias: bool = True,
        rank: int = 2,
    ) -> None:
        super().__init__(dim, rank=rank)
        if not isinstance(kernel_sizes, list | tuple) or not kernel_sizes:
            raise ValueError(f"kernel_sizes: {kernel_sizes!r}, must be one odd number for each branch, as (3, 7)")
        self.kernel_sizes = tuple(kernel_sizes)
        self.stride, self.dilation = positive("stride", stride), positive("dilation", dilation)
        self._each = [odd_kernel("kernel_sizes", positive("kernel_sizes", size), rank) for size in kernel_sizes]
        layer: type[Any] = nn.Conv1d if rank == 1 else nn.Conv2d
        self.kernels = nn.ParameterList(layer(dim, dim, kernel, groups=dim).weight for kernel in self._each)
        self.bias = nn.Parameter(torch.zeros(dim)) if flag("bias", bias) else None

    def values(self, source: Tensor) -> Tensor:
        return source.flatten(1, -2).unsqueeze(-1)

    def weights(self, x: Tensor) -> Aggregation:
        grid, out = x.shape[1:-1], self.out_grid(x.shape[1:-1])
        indices = [
            kernel_index(
                grid,
                kernel,
                stride=self.stride,
                dilation=self.dilation,
                left=centre_padding(kernel, self.dilation),
                device=x.device,
            )
            for kernel in self._each
        ]
        return Aggregation(
            torch.cat([kernel.flatten(1) for kernel in self.kernels], -1)[None, :, None],
            torch.cat(indices, -1)[None, None],
            math.prod(grid),
            grid_positions(out, device=x.device),
            grid_positions(grid, stride=self.stride, device=x.device),
            out,
            tuple(grid),
        )

    def project(self, mixed: Tensor) -> Tensor:
        return mixed if self.bias is None else mixed + self.bias

    def merged(self) -> Tensor:
        """[C, 1, *kernel]: the one kernel, of the largest size, that does what all branches do together."""
        largest = max(self.kernel_sizes)
        wide = torch.promote_types(self.kernels[0].dtype, torch.float32)
        total = sum(
            nn.functional.pad(kernel.to(wide), [(largest - size) // 2] * (2 * len(self._each[0])))
            for kernel, size in zip(self.kernels, self.kernel_sizes, strict=True)
        )
        assert isinstance(total, Tensor)
        return total.to(self.kernels[0].dtype)

    def fast(self, x: Tensor, values: Tensor) -> Tensor:
        return depthwise(values.reshape(x.shape), self.merged(), self.bias, stride=self.stride, dilation=self.dilation)

    def out_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        return out_lengths(grid, self.stride)

    def macs(self, grid: Sequence[int]) -> int:
        return math.prod(self.out_grid(grid)) * sum(math.prod(kernel) for kernel in self._each) * self.dim
