"""D-DW: depthwise convolution whose kernels are predicted from the whole image."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import odd_kernel, positive
from glocal.kernels import local_sum
from glocal.mixer import TokenMixer
from glocal.mixers._grid import centre_padding, kernel_index
from glocal.mixers._norm import BatchNorm, normalise


class DynamicDepthwiseConv(TokenMixer):
    """Homogeneous dynamic depthwise convolution (D-DW): one kernel for each image and channel.

    Weights: [B, C, 1, K], K taps. Dynamic per image, own for each channel, shared by all positions.

    Args:
        dim: channels C.
        kernel_size: odd, for all axes or each.
        reduction: the hidden layer of the prediction has C / reduction channels.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *S, C]; zeros outside. Where `valid` is given the prediction averages real tokens.

    Cost: N*K*C + C*(C + K*C) / reduction multiply-adds.

    Raises:
        ValueError: even kernels; a reduction that does not divide dim; training with a single image, whose
            pooled vector has no batch statistics.

    Source: Han et al., On the Connection between Local Attention and Dynamic Depth-wise Convolution, ICLR 2022,
    arXiv 2106.04263, section 3; block definition from the released code (models/dwnet.py).
    Differs from the paper: nothing. Kernels are not normalised, the static bias starts at 0.
    """

    examples = (
        "DynamicDepthwiseConv(kernel_size=3)",
        "DynamicDepthwiseConv(kernel_size=(3, 5), reduction=8)",
        "DynamicDepthwiseConv(kernel_size=5, rank=1)",
    )

    def __init__(self, dim: int, *, kernel_size: int | Sequence[int] = 7, reduction: int = 4, rank: int = 2) -> None:
        super().__init__(dim, rank=rank)
        self.kernel_size, self.reduction = kernel_size, positive("reduction", reduction)
        self._kernel = odd_kernel("kernel_size", kernel_size, rank)
        if dim % reduction:
            raise ValueError(f"reduction: {reduction} does not divide dim {dim}; give one that does")
        hidden = dim // reduction
        self.conv1 = nn.Linear(dim, hidden, bias=False)
        self.bn = BatchNorm(hidden)
        self.conv2 = nn.Linear(hidden, dim * math.prod(self._kernel))
        self.bias = nn.Parameter(torch.zeros(dim))

    def values(self, source: Tensor) -> Tensor:
        return source.flatten(1, -2).unsqueeze(-1)

    def kernels(self, x: Tensor, valid: Tensor | None, *, update: bool) -> Tensor:
        """[B, C, K]: the kernels of each image."""
        if valid is None:
            pooled = x.flatten(1, -2).mean(1)
        else:
            real = valid.flatten(1)[..., None]
            pooled = x.flatten(1, -2).masked_fill(~real, 0).sum(1) / real.sum(1).clamp(min=1)
        some = None if valid is None else valid.flatten(1).any(1)  # an image of padding alone has no say
        hidden = normalise(self.bn, self.conv1(pooled), some, update=update).relu()
        return self.conv2(hidden).unflatten(-1, (self.dim, -1))

    def weights(self, x: Tensor, *, valid: Tensor | None = None, update_statistics: bool = False) -> Aggregation:
        grid = x.shape[1:-1]
        index = kernel_index(grid, self._kernel, left=centre_padding(self._kernel), device=x.device)
        positions = grid_positions(grid, device=x.device)
        kernels = self.kernels(x, valid, update=update_statistics)[:, :, None]
        return Aggregation(kernels, index[None, None], math.prod(grid), positions, positions, tuple(grid), tuple(grid))

    def project(self, mixed: Tensor) -> Tensor:
        return mixed + self.bias

    def fast(
        self, x: Tensor, values: Tensor, *, valid: Tensor | None = None, update_statistics: bool = False
    ) -> Tensor:
        kernels = self.kernels(x, valid, update=update_statistics)
        kernels = kernels.view(x.shape[0], *[1] * (x.dim() - 2), *kernels.shape[1:])
        return local_sum(values.reshape(x.shape), kernels, kernel_size=self._kernel, bias=self.bias)

    def macs(self, grid: Sequence[int]) -> int:
        taps, hidden = math.prod(self._kernel), self.dim // self.reduction
        return math.prod(grid) * taps * self.dim + hidden * self.dim * (1 + taps)
