"""MLP-Mixer's token-mixing MLP."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.arguments import every_axis
from glocal.mixers._grid import join
from glocal.operator import TokenModule


class TokenMLP(TokenModule):
    """Token-mixing MLP: every channel, as a vector over the tokens, goes through the same MLP of two layers.

    It has no aggregation weights, since a nonlinearity stands between its two matrices. Both are static, shared by
    all channels, own for each pair of positions, and global.

    Args:
        dim: channels C.
        grid_size: the grid whose tokens the matrices are made for; its length is the rank.
        mlp_ratio: hidden units for one channel, so that the hidden layer has int(mlp_ratio * C).

    Shape:
        x [B, *S, C] -> [B, *S, C], S up to grid_size on every axis. `fc1.weight` [hidden, M], `fc1.bias` [hidden],
        `fc2.weight` [M, hidden], `fc2.bias` [M] for the M tokens of grid_size in raster order. A smaller grid is its
        top left part: the result is that of zero tokens in the missing places. So is padding, of any shape.

    Cost: 2*N*hidden*C multiply-adds.

    Raises:
        ValueError: a grid larger than grid_size, whose further tokens have no weights.

    Source: Tolstikhin et al., MLP-Mixer: An all-MLP Architecture for Vision, NeurIPS 2021, arXiv 2105.01601,
    section 2, equation 1 (first line, without norm and residual).
    Differs from the paper: grids smaller than grid_size are defined.
    """

    examples = (
        "TokenMLP(grid_size=(20, 28))",
        "TokenMLP(grid_size=(40,), mlp_ratio=1.5)",
    )

    def __init__(self, dim: int, *, grid_size: Sequence[int], mlp_ratio: float = 0.5) -> None:
        sizes = every_axis("grid_size", grid_size)
        super().__init__(dim, rank=len(sizes))
        self.grid_size = sizes
        self.mlp_ratio = mlp_ratio
        self._hidden = int(mlp_ratio * dim)
        if self._hidden < 1:
            raise ValueError(
                f"mlp_ratio: {mlp_ratio} of {dim} channels leaves no hidden unit; give {1 / dim:.3g} or more"
            )
        self.fc1 = nn.Linear(math.prod(grid_size), self._hidden)
        self.fc2 = nn.Linear(self._hidden, math.prod(grid_size))

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        grid = tuple(x.shape[1:-1])
        if any(n > size for n, size in zip(grid, self.grid_size, strict=True)):
            raise ValueError(
                f"TokenMLP: x has a grid of {grid}, its matrices are made for {self.grid_size}; build it with the "
                "largest grid_size in use"
            )
        if valid is not None:
            x = x.masked_fill(~valid[..., None], 0)
        # gathered, not sliced: whether a slice is the whole would be a branch on sizes
        here = join([torch.arange(n, device=x.device)[:, None] for n in grid], self.grid_size)[:, 0]
        tokens = x.flatten(1, -2).transpose(1, 2)
        hidden = nn.functional.linear(tokens, self.fc1.weight.index_select(1, here), self.fc1.bias)
        out = nn.functional.linear(
            nn.functional.gelu(hidden), self.fc2.weight.index_select(0, here), self.fc2.bias[here]
        )
        return out.transpose(1, 2).reshape(x.shape)

    def macs(self, grid: Sequence[int]) -> int:
        return 2 * math.prod(grid) * self._hidden * self.dim
