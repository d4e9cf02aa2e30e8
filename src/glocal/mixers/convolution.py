"""Dense convolution, seen as heads that each read one offset."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import flag, odd_kernel, positive
from glocal.mixer import TokenMixer
from glocal.mixers._grid import centre_padding, kernel_index
from glocal.mixers._library import conv, out_lengths, tap_norms


class Convolution(TokenMixer):
    """Dense convolution: one head for each tap, A moves by the tap's offset, `project` mixes channels and taps.

    Weights: [1, K, 1, 1], all one, with an index of its own for each head [1, K, N, 1]; K taps. Static, shared
    by all positions. What a convolution learns sits in `project`.

    Args:
        dim: channels C of x.
        kernel_size: odd, for all axes or each.
        out_dim: output channels; dim by default.
        stride, dilation: for all axes.
        groups: channels are mixed within groups only.
        bias: added to the output.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *ceil(S / stride), out_dim]; zeros outside, kernel centred.
        `weight` [out_dim, C / groups, *kernel] and `bias` [out_dim] as torch.nn.Conv2d has them.

    Cost: N*K*C*out_dim / groups multiply-adds, N outputs.

    Raises:
        ValueError: even kernels; groups that do not divide both channel counts.

    Source: as K one-offset heads: Cordonnier, Loukas, Jaggi, On the Relationship between Self-Attention and
    Convolutional Layers, ICLR 2020, arXiv 1911.03584, theorem 1.
    Differs from the paper: heads sit exactly on their offset, where the paper's softmax tends to it.
    """

    examples = (
        "Convolution(kernel_size=3)",
        "Convolution(kernel_size=(3, 5), out_dim=48, stride=2, groups=4)",
        "Convolution(kernel_size=3, dilation=2, bias=False, rank=1)",
    )

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int | Sequence[int] = 3,
        out_dim: int | None = None,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        bias: bool = True,
        rank: int = 2,
    ) -> None:
        super().__init__(dim, rank=rank)
        self.kernel_size, self.out_dim = kernel_size, dim if out_dim is None else positive("out_dim", out_dim)
        self.stride, self.dilation = positive("stride", stride), positive("dilation", dilation)
        self.groups = positive("groups", groups)
        kernel = self._kernel = odd_kernel("kernel_size", kernel_size, rank)
        if dim % groups or self.out_dim % groups:
            raise ValueError(f"groups: {groups} must divide dim {dim} and out_dim {self.out_dim}")
        layer: type[Any] = nn.Conv1d if rank == 1 else nn.Conv2d
        of_torch = layer(dim, self.out_dim, kernel, groups=groups, bias=flag("bias", bias))
        self.weight, self.bias = of_torch.weight, of_torch.bias

    def values(self, source: Tensor) -> Tensor:
        return source.flatten(1, -2).unsqueeze(2)  # one group, read by every head

    def weights(self, x: Tensor) -> Aggregation:
        grid, stride, kernel = x.shape[1:-1], self.stride, self._kernel
        index = kernel_index(
            grid,
            kernel,
            stride=stride,
            dilation=self.dilation,
            left=centre_padding(kernel, self.dilation),
            device=x.device,
        )
        out = self.out_grid(grid)
        return Aggregation(
            x.new_ones(1, math.prod(kernel), 1, 1),
            index.T[None, :, :, None],
            math.prod(grid),
            grid_positions(out, device=x.device),
            grid_positions(grid, stride=stride, device=x.device),
            out,
            tuple(grid),
        )

    def project(self, mixed: Tensor) -> Tensor:
        taps = math.prod(self._kernel)
        weight = self.weight.flatten(2).unflatten(0, (self.groups, -1))  # [groups, out, C / groups, K]
        mixed = mixed.unflatten(-1, (taps, self.groups, -1))
        out = torch.einsum("bnkgc,gock->bngo", mixed, weight).flatten(2)
        return out if self.bias is None else out + self.bias

    def fast(self, x: Tensor, values: Tensor) -> Tensor:
        return conv(
            values.reshape(x.shape),
            self.weight,
            self.bias,
            stride=self.stride,
            padding=centre_padding(self._kernel, self.dilation),
            dilation=self.dilation,
            groups=self.groups,
        )

    def kernel_norms(self) -> Tensor:
        """The norm of a group's weights at each tap: [groups, K]."""
        return tap_norms(self.weight, self.groups)

    def out_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        return out_lengths(grid, self.stride)

    def macs(self, grid: Sequence[int]) -> int:
        return math.prod(self.out_grid(grid)) * math.prod(self._kernel) * self.dim * self.out_dim // self.groups
