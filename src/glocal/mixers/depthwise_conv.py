"""Depthwise convolution."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import flag, odd_kernel, per_axis, positive
from glocal.mixer import Cache, TokenMixer
from glocal.mixers._grid import centre_padding, kernel_index, places_behind
from glocal.mixers._library import depthwise, out_lengths


class DepthwiseConv(TokenMixer):
    """Depthwise convolution: each channel has its own kernel, the same at every position.

    Weights: [1, C, 1, K], K taps. Static, own for each channel, shared by all positions.

    Args:
        dim: channels C.
        kernel_size: odd unless causal, for all axes or each.
        stride, dilation: for all axes.
        causal: the taps are the query and kernel_size - 1 tokens before it, `dilation` apart, along every axis.
        bias: added to the output.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *ceil(S / stride), C]; zeros outside, kernel centred unless causal.
        `weight` [C, 1, *kernel] and `bias` [C] as torch.nn.Conv2d with groups=C has them. With `cache` (causal, rank
        1) x follows the tokens that were seen, of which the last dilation * (kernel_size - 1) are kept.

    Cost: N*K*C multiply-adds, N outputs.

    Raises:
        ValueError: even kernels with a centre; a stride together with causal.

    Source: Han et al., On the Connection between Local Attention and Dynamic Depth-wise Convolution, ICLR 2022,
    arXiv 2106.04263, section 2.
    Differs from the paper: causal too; the pointwise convolutions around it belong to the paper's block.
    """

    examples = (
        "DepthwiseConv(kernel_size=3)",
        "DepthwiseConv(kernel_size=(5, 3), stride=2, dilation=2, bias=False)",
        "DepthwiseConv(kernel_size=5, rank=1)",
        "DepthwiseConv(kernel_size=4, dilation=2, causal=True, rank=1)",
    )

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int | Sequence[int] = 7,
        stride: int = 1,
        dilation: int = 1,
        causal: bool = False,
        bias: bool = True,
        rank: int = 2,
    ) -> None:
        super().__init__(dim, rank=rank)
        self.kernel_size, self.stride, self.dilation = (
            kernel_size,
            positive("stride", stride),
            positive("dilation", dilation),
        )
        self.causal = flag("causal", causal)
        if causal and stride > 1:
            raise ValueError(f"stride: {stride}, must be 1 with causal=True, so that each token has an output")
        kernel = self._kernel = (per_axis if causal else odd_kernel)("kernel_size", kernel_size, rank)
        layer: type[Any] = nn.Conv1d if rank == 1 else nn.Conv2d
        of_torch = layer(dim, dim, kernel, groups=dim, bias=flag("bias", bias))
        self.weight, self.bias = of_torch.weight, of_torch.bias

    def values(self, source: Tensor) -> Tensor:
        return source.flatten(1, -2).unsqueeze(-1)

    def weights(self, x: Tensor, *, cache: Cache | None = None) -> Aggregation:
        out = self.out_grid(x.shape[1:-1])
        if self.causal:
            grid, places, source_places = places_behind(x, cache, self._kept(cache))
        else:
            grid = tuple(x.shape[1:-1])
            places = grid_positions(out, device=x.device)
            source_places = grid_positions(grid, stride=self.stride, device=x.device)
        index = kernel_index(
            grid, self._kernel, stride=self.stride, dilation=self.dilation, left=self._left, device=x.device
        )[self._kept(cache) :]
        return Aggregation(
            self.weight.flatten(1)[None, :, None],
            index[None, None],
            math.prod(grid),
            places,
            source_places,
            out,
            grid,
        )

    def project(self, mixed: Tensor) -> Tensor:
        return mixed if self.bias is None else mixed + self.bias

    def fast(self, x: Tensor, values: Tensor, *, cache: Cache | None = None) -> Tensor:
        tokens, kept = (values.reshape(x.shape), 0) if cache is None else (values.squeeze(-1), self._kept(cache))
        return depthwise(
            tokens,
            self.weight,
            self.bias,
            stride=self.stride,
            dilation=self.dilation,
            causal=self.causal,
            past=kept,
        )

    def out_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        return out_lengths(grid, self.stride)

    def macs(self, grid: Sequence[int]) -> int:
        return math.prod(self.out_grid(grid)) * math.prod(self._kernel) * self.dim

    @property
    def remembers(self) -> int:
        return self._left[0]

    @property
    def _left(self) -> tuple[int, ...]:
        """Positions that the taps reach in front of the query, along each axis."""
        if self.causal:
            return tuple(self.dilation * (k - 1) for k in self._kernel)
        return centre_padding(self._kernel, self.dilation)
