"""Average pooling as a token mixer."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import flag, per_axis, positive
from glocal.mixer import TokenMixer
from glocal.mixers._grid import centre_padding, kernel_index, pick_or_zero
from glocal.mixers._library import back, images, out_lengths


class AveragePooling(TokenMixer):
    """Mean over a window around each position.

    Weights: [1, 1, N, K], one over the number of tokens in the window. Static, shared by all channels, and by all
    positions away from the border. With `valid` [B, 1, N, K]: each image's own tokens count.

    Args:
        dim: channels C.
        kernel_size: for all axes or each; an even one has its centre left of the middle.
        stride: for all axes.
        count_include_pad: divide by the window's size also where part of it lies outside.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *ceil(S / stride), C].

    Cost: N*K*C multiply-adds, N outputs.

    Source: Yu et al., MetaFormer Is Actually What You Need for Vision, CVPR 2022, arXiv 2111.11418, equation 4.
    Differs from the paper: the input is not subtracted; PoolFormer's block does that to undo its skip.
    """

    examples = (
        "AveragePooling()",
        "AveragePooling(kernel_size=(2, 4), stride=2)",
        "AveragePooling(kernel_size=5, count_include_pad=True, rank=1)",
    )

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int | Sequence[int] = 3,
        stride: int = 1,
        count_include_pad: bool = False,
        rank: int = 2,
    ) -> None:
        super().__init__(dim, rank=rank)
        self.kernel_size, self.stride = kernel_size, positive("stride", stride)
        self.count_include_pad = flag("count_include_pad", count_include_pad)
        self._kernel = per_axis("kernel_size", kernel_size, rank)

    def values(self, source: Tensor) -> Tensor:
        return source.flatten(1, -2).unsqueeze(2)

    def weights(self, x: Tensor, *, valid: Tensor | None = None) -> Aggregation:
        grid, out, kernel = x.shape[1:-1], self.out_grid(x.shape[1:-1]), self._kernel
        left = centre_padding(kernel)
        index = kernel_index(grid, kernel, stride=self.stride, left=left, device=x.device)[None]
        if self.count_include_pad:
            weights = x.new_full((1, 1, 1, math.prod(kernel)), 1 / math.prod(kernel))
        else:
            counted = index >= 0 if valid is None else (index >= 0) & pick_or_zero(valid.flatten(1), index)
            weights = counted.to(x.dtype)[:, None] / counted.sum(-1, keepdim=True).clamp(min=1)[:, None]
        return Aggregation(
            weights,
            index[:, None],
            math.prod(grid),
            grid_positions(out, device=x.device),
            grid_positions(
                grid,
                stride=self.stride,
                offset=[(k - 1) / 2 - p for k, p in zip(kernel, left, strict=True)],
                device=x.device,
            ),
            out,
            tuple(grid),
        )

    def fast(self, x: Tensor, values: Tensor, *, valid: Tensor | None = None) -> Tensor:
        mean = self._mean(images(values.reshape(x.shape)))
        if not self.count_include_pad:
            grid = x.shape[1:-1]
            counted = x.new_ones(1, *grid, 1) if valid is None else valid.to(x.dtype)[..., None]
            # the share of the window that counts; 1 where none does, since the mean is zero there
            share = self._mean(images(counted))
            mean = mean / torch.where(share > 0, share, 1)
        return back(mean, len(self._kernel))

    def out_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        return out_lengths(grid, self.stride)

    def macs(self, grid: Sequence[int]) -> int:
        return math.prod(self.out_grid(grid)) * math.prod(self._kernel) * self.dim

    def _mean(self, planes: Tensor) -> Tensor:
        """Mean over windows of [B, C, H, W], zeros outside."""
        kernel = (1, *self._kernel) if self.rank == 1 else self._kernel
        stride = (1, self.stride) if self.rank == 1 else self.stride
        ends = [(p, k - 1 - p) for k, p in zip(kernel, centre_padding(kernel), strict=True)]
        planes = nn.functional.pad(planes, [n for end in reversed(ends) for n in end])
        return nn.functional.avg_pool2d(planes, kernel, stride)
