"""Involution: a kernel for each position, generated from it and shared by the channels of a group."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import odd_kernel, positive
from glocal.kernels import gathered_sum, local_sum
from glocal.mixer import TokenMixer
from glocal.mixers._grid import centre_padding, kernel_index, pick_or_zero
from glocal.mixers._library import out_lengths
from glocal.mixers._norm import BatchNorm, normalise


class Involution(TokenMixer):
    """Involution: kernels are own to each position, generated from it, and shared by the channels of a group.

    Weights: [B, C / group_channels, N, K], K taps. Dynamic per position, shared by the channels of a group; local.

    Args:
        dim: channels C.
        kernel_size: odd, the same for all axes.
        group_channels: consecutive channels that share a kernel.
        reduction_ratio: the hidden layer of the generation has C / reduction_ratio channels.
        stride: for all axes; with one, kernels are generated from means over cells of stride tokens along each axis.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *ceil(S / stride), C]; zeros outside, kernels centred on the first token of a cell. Where
        `valid` is given, means are over real tokens.
        `conv1.conv.weight` [C / r, C], `conv1.bn`, `conv2.conv.weight` [C / group_channels * K, C / r] and
        `conv2.conv.bias`, named as in the released code, whose 1x1 convolutions are linear layers here.

    Cost: N*(K*C + C*(C + C / group_channels * K) / reduction_ratio) multiply-adds, N outputs.

    Raises:
        ValueError: even kernels; group_channels or a reduction_ratio that do not divide dim; training with one real
            value per channel, which has no batch statistics.

    Source: Li et al., Involution: Inverting the Inherence of Convolution for Visual Recognition, CVPR 2021,
    arXiv 2103.06255, section 3; strides, names and sizes from the released code (involution_naive.py).
    Differs from the paper: nothing. The released code fixes 16 channels a group and a reduction of 4, and refuses
    lengths that stride does not divide; here the last, smaller cell is averaged over what it holds.
    `InhomogeneousDepthwiseConv` is the same idea with a bias before the batch norm and without stride.
    """

    examples = (
        "Involution(kernel_size=3)",
        "Involution(kernel_size=5, group_channels=4, reduction_ratio=2, stride=2)",
        "Involution(kernel_size=3, group_channels=8, stride=3, rank=1)",
    )

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int = 7,
        group_channels: int = 16,
        reduction_ratio: int = 4,
        stride: int = 1,
        rank: int = 2,
    ) -> None:
        super().__init__(dim, rank=rank)
        self.kernel_size, self.stride = kernel_size, positive("stride", stride)
        self._kernel = odd_kernel("kernel_size", positive("kernel_size", kernel_size), rank)
        self.group_channels = positive("group_channels", group_channels)
        self.reduction_ratio = positive("reduction_ratio", reduction_ratio)
        for name, value in (("group_channels", group_channels), ("reduction_ratio", reduction_ratio)):
            if dim % value:
                raise ValueError(f"{name}: {value} does not divide dim {dim}; give one that does")
        hidden, self._groups = dim // reduction_ratio, dim // group_channels
        self.conv1 = nn.ModuleDict({"conv": nn.Linear(dim, hidden, bias=False), "bn": BatchNorm(hidden)})
        self.conv2 = nn.ModuleDict({"conv": nn.Linear(hidden, self._groups * math.prod(self._kernel))})

    def values(self, source: Tensor) -> Tensor:
        return source.flatten(1, -2).unflatten(-1, (self._groups, -1))

    def kernels(self, x: Tensor, valid: Tensor | None, *, update: bool) -> Tensor:
        """[B, N, G, K]: the kernels of each position."""
        tokens, real = x.flatten(1, -2), None if valid is None else valid.flatten(1)
        if self.stride > 1:
            rank = len(self._kernel)
            cells = kernel_index(
                x.shape[1:-1], [self.stride] * rank, stride=self.stride, left=[0] * rank, device=x.device
            )[None]
            seen = cells >= 0 if real is None else pick_or_zero(real, cells)
            total = (pick_or_zero(tokens, cells) * seen[..., None]).sum(2)
            tokens, real = total / seen.sum(-1, keepdim=True).clamp(min=1), None if real is None else seen.any(-1)
        hidden = normalise(self.conv1["bn"], self.conv1["conv"](tokens), real, update=update).relu()
        return self.conv2["conv"](hidden).unflatten(-1, (self._groups, -1))

    def weights(self, x: Tensor, *, valid: Tensor | None = None, update_statistics: bool = False) -> Aggregation:
        grid, out = tuple(x.shape[1:-1]), self.out_grid(x.shape[1:-1])
        kernels = self.kernels(x, valid, update=update_statistics)
        return Aggregation(
            kernels.transpose(1, 2),
            self._index(x)[:, None],
            math.prod(grid),
            grid_positions(out, device=x.device),
            grid_positions(grid, stride=self.stride, device=x.device),
            out,
            grid,
        )

    def fast(
        self, x: Tensor, values: Tensor, *, valid: Tensor | None = None, update_statistics: bool = False
    ) -> Tensor:
        kernels = self.kernels(x, valid, update=update_statistics)
        if self.stride == 1:
            return local_sum(values.reshape(x.shape), kernels.unflatten(1, x.shape[1:-1]))
        return gathered_sum(kernels, values, self._index(x)).flatten(2)

    def out_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        return out_lengths(grid, self.stride)

    def macs(self, grid: Sequence[int]) -> int:
        taps, hidden = math.prod(self._kernel), self.dim // self.reduction_ratio
        return math.prod(self.out_grid(grid)) * (taps * self.dim + hidden * (self.dim + self._groups * taps))

    def _index(self, x: Tensor) -> Tensor:
        """[1, N, K]: sources under each kernel."""
        left = centre_padding(self._kernel)
        return kernel_index(x.shape[1:-1], self._kernel, stride=self.stride, left=left, device=x.device)[None]
