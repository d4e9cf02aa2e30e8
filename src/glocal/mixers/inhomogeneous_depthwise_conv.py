"""I-D-DW: depthwise convolution whose kernels are predicted at every position."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import odd_kernel, positive
from glocal.kernels import local_sum
from glocal.mixer import TokenMixer
from glocal.mixers._grid import centre_padding, kernel_index
from glocal.mixers._norm import BatchNorm, normalise


class InhomogeneousDepthwiseConv(TokenMixer):
    """Inhomogeneous dynamic depthwise convolution (I-D-DW): a kernel for each position, predicted from it.

    Weights: [B, num_groups, N, K], K taps. Dynamic per position, shared by the channels of a group.

    Args:
        dim: channels C.
        kernel_size: odd, the same for all axes.
        num_groups: groups of consecutive channels with a kernel each; 32 in every published stage.
        reduction: the hidden layer of the prediction has C / reduction channels.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *S, C]; zeros outside.

    Cost: N*(K*C + C*(C + num_groups*K) / reduction) multiply-adds.

    Raises:
        ValueError: even kernels; groups or a reduction that do not divide dim.

    Source: Han et al., On the Connection between Local Attention and Dynamic Depth-wise Convolution, ICLR 2022,
    arXiv 2106.04263, section 3; definition from the released code (models/idynamic.py).
    Differs from the paper: nothing. Kernels are not normalised and there is no output bias.
    """

    examples = (
        "InhomogeneousDepthwiseConv(kernel_size=3, num_groups=8)",
        "InhomogeneousDepthwiseConv(kernel_size=5, reduction=2)",
        "InhomogeneousDepthwiseConv(kernel_size=3, num_groups=4, rank=1)",
    )

    def __init__(
        self, dim: int, *, kernel_size: int = 7, num_groups: int = 32, reduction: int = 4, rank: int = 2
    ) -> None:
        super().__init__(dim, rank=rank)
        self.kernel_size, self.num_groups = kernel_size, positive("num_groups", num_groups)
        self.reduction = positive("reduction", reduction)
        self._kernel = odd_kernel("kernel_size", positive("kernel_size", kernel_size), rank)
        if dim % num_groups:
            raise ValueError(f"num_groups: {num_groups} does not divide dim {dim}; give one that does")
        if dim % reduction:
            raise ValueError(f"reduction: {reduction} does not divide dim {dim}; give one that does")
        self.conv1 = nn.Linear(dim, dim // reduction)
        self.bn = BatchNorm(dim // reduction)
        self.conv2 = nn.Linear(dim // reduction, num_groups * math.prod(self._kernel))

    def values(self, source: Tensor) -> Tensor:
        return source.flatten(1, -2).unflatten(-1, (self.num_groups, -1))

    def kernels(self, x: Tensor, valid: Tensor | None, *, update: bool) -> Tensor:
        """[B, *S, G, K]: the kernels of each position."""
        hidden = normalise(self.bn, self.conv1(x), valid, update=update).relu()
        return self.conv2(hidden).unflatten(-1, (self.num_groups, -1))

    def weights(self, x: Tensor, *, valid: Tensor | None = None, update_statistics: bool = False) -> Aggregation:
        grid = x.shape[1:-1]
        index = kernel_index(grid, self._kernel, left=centre_padding(self._kernel), device=x.device)
        positions = grid_positions(grid, device=x.device)
        kernels = self.kernels(x, valid, update=update_statistics).flatten(1, -3).transpose(1, 2)
        return Aggregation(kernels, index[None, None], math.prod(grid), positions, positions, tuple(grid), tuple(grid))

    def fast(
        self, x: Tensor, values: Tensor, *, valid: Tensor | None = None, update_statistics: bool = False
    ) -> Tensor:
        return local_sum(values.reshape(x.shape), self.kernels(x, valid, update=update_statistics))

    def macs(self, grid: Sequence[int]) -> int:
        taps, hidden = math.prod(self._kernel), self.dim // self.reduction
        return math.prod(grid) * (taps * self.dim + hidden * (self.dim + self.num_groups * taps))
