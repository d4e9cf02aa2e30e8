"""Depthwise convolution."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import flag, per_axis, positive
from glocal.mixer import Cache, TokenMixer
from glocal.mixers._grid import centre_padding, kernel_index, places_behind
from glocal.mixers._library import depthwise, out_lengths


class DepthwiseConv(TokenMixer):
    """Depthwise convolution: each channel has its own kernel, the same at every position.

    Weights: [1, G, 1, K], K taps. Static, own for each channel (G = C) or shared in groups, the same at all positions.

    Args:
        dim: channels C.
        kernel_size: for all axes or each. An even one reads one token more behind the query than in front of it.
        stride, dilation: for all axes.
        num_groups: groups G of consecutive channels that share a kernel. None: every channel has its own.
        causal: the taps are the query and kernel_size - 1 tokens before it, `dilation` apart, along every axis.
        bias: added to the output.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *ceil(S / stride), C]; zeros outside, kernel centred unless causal.
        `weight` [G, 1, *kernel] and `bias` [C], as torch.nn.Conv2d with groups=C has them where G = C. With `cache`
        (causal, rank 1) x follows the tokens that were seen, of which the last dilation * (kernel_size - 1) are kept.

    Cost: N*K*C multiply-adds, N outputs.

    Raises:
        ValueError: a dilation of even kernels with a centre; a stride together with causal; groups that do not divide
            the channels.

    Source: Han et al., On the Connection between Local Attention and Dynamic Depth-wise Convolution, ICLR 2022,
    arXiv 2106.04263, section 2.
    Differs from the paper: causal too; the pointwise convolutions around it belong to the paper's block. How its study
    pads even kernels is not known.
    """

    examples = (
        "DepthwiseConv(kernel_size=3)",
        "DepthwiseConv(kernel_size=(5, 3), stride=2, dilation=2, bias=False)",
        "DepthwiseConv(kernel_size=5, rank=1)",
        "DepthwiseConv(kernel_size=4, dilation=2, causal=True, rank=1)",
        "DepthwiseConv(kernel_size=4, num_groups=4)",
    )

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int | Sequence[int] = 7,
        stride: int = 1,
        dilation: int = 1,
        num_groups: int | None = None,
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
        kernel = self._kernel = per_axis("kernel_size", kernel_size, rank)
        if dilation > 1 and not causal and any(k % 2 == 0 for k in kernel):
            raise ValueError(f"kernel_size: {kernel_size!r}, must be odd with dilation {dilation}, to have a centre")
        self.num_groups = num_groups
        groups = dim if num_groups is None else positive("num_groups", num_groups)
        if dim % groups:
            raise ValueError(f"num_groups: {num_groups} does not divide {dim} channels")
        layer: type[Any] = nn.Conv1d if rank == 1 else nn.Conv2d
        of_torch = layer(dim, dim, kernel, groups=dim, bias=flag("bias", bias))
        self.weight, self.bias = of_torch.weight, of_torch.bias
        if groups < dim:
            self.weight = nn.Parameter(of_torch.weight[:groups].detach().clone())

    def values(self, source: Tensor) -> Tensor:
        return source.flatten(1, -2).unflatten(-1, (self.weight.shape[0], -1))

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
        tokens, kept = (values.reshape(x.shape), 0) if cache is None else (values.flatten(2), self._kept(cache))
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
