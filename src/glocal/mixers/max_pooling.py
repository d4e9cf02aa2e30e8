"""Max pooling as a token mixer."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import per_axis, positive
from glocal.mixer import TokenMixer
from glocal.mixers._grid import centre_padding, kernel_index, pick_or_zero
from glocal.mixers._library import back, images, out_lengths


class MaxPooling(TokenMixer):
    """Maximum over a window around each position: every channel attends to one source, the largest.

    Weights: [1, 1, 1, 1], a one, with an index [B, C, N, 1] that says where the maximum lies. Dynamic per position
    and channel; local. Of equal maxima the first in raster order counts, as in torch.nn.functional.max_pool2d.

    Args:
        dim: channels C.
        kernel_size: for all axes or each; an even one has its centre left of the middle.
        stride: for all axes.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *ceil(S / stride), C]. What lies outside the grid, or is not `valid`, is never the
        maximum; a window without any token gives 0.

    Cost: no multiply-adds; N*K*C comparisons, N outputs, K tokens in a window.

    Source: Riesenhuber and Poggio, Hierarchical Models of Object Recognition in Cortex, Nature Neuroscience 1999.
    Differs from the paper: it is taken over neighbouring positions only, never over scales.
    """

    examples = ("MaxPooling()", "MaxPooling(kernel_size=(2, 4), stride=2)", "MaxPooling(kernel_size=5, rank=1)")

    def __init__(self, dim: int, *, kernel_size: int | Sequence[int] = 3, stride: int = 1, rank: int = 2) -> None:
        super().__init__(dim, rank=rank)
        self.kernel_size, self.stride = kernel_size, positive("stride", stride)
        self._kernel = per_axis("kernel_size", kernel_size, rank)

    def values(self, source: Tensor) -> Tensor:
        return source.flatten(1, -2).unsqueeze(-1)

    def weights(self, x: Tensor, *, valid: Tensor | None = None) -> Aggregation:
        grid, out, kernel = x.shape[1:-1], self.out_grid(x.shape[1:-1]), self._kernel
        left = centre_padding(kernel)
        index = kernel_index(grid, kernel, stride=self.stride, left=left, device=x.device)[None]  # [1, N, K]
        if valid is not None:
            index = torch.where(pick_or_zero(valid.flatten(1), index), index, -1)
        inside = (index >= 0)[..., None]
        seen = pick_or_zero(x.detach().flatten(1, -2), index).masked_fill(~inside, -torch.inf)  # [B, N, K, C]
        # where all are -inf the largest might be an empty slot: then the first token, if there is any
        largest = torch.where(seen.amax(2) == -torch.inf, inside.byte().argmax(2), seen.argmax(2))
        index = index.expand(x.shape[0], -1, -1).gather(2, largest)  # [B, N, C]
        return Aggregation(
            x.new_ones(1, 1, 1, 1),
            index.transpose(1, 2)[..., None],
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
        tokens = values.reshape(x.shape)
        if valid is None:
            return back(self._largest(images(tokens)), len(self._kernel))
        largest = self._largest(images(tokens.masked_fill(~valid[..., None], -torch.inf)))
        some = self._largest(images(valid[..., None].to(x.dtype)))
        return back(torch.where(some > 0, largest, 0), len(self._kernel))

    def out_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        return out_lengths(grid, self.stride)

    def macs(self, grid: Sequence[int]) -> int:
        return 0

    def _largest(self, planes: Tensor) -> Tensor:
        """Maximum over windows of [B, C, H, W], -inf outside."""
        kernel = (1, *self._kernel) if self.rank == 1 else self._kernel
        stride = (1, self.stride) if self.rank == 1 else self.stride
        before = centre_padding(kernel)
        if any(k % 2 == 0 for k in kernel):  # the library pads both ends alike
            ends = [(p, k - 1 - p) for k, p in zip(kernel, before, strict=True)]
            planes, before = (
                nn.functional.pad(planes, [n for end in reversed(ends) for n in end], value=-torch.inf),
                (0, 0),
            )
        return nn.functional.max_pool2d(planes, kernel, stride, before)
