"""Linear token mixing: one learned matrix over all positions."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import per_axis, positive
from glocal.mixer import TokenMixer
from glocal.mixers._grid import join


class LinearTokenMixing(TokenMixer):
    """A learned matrix over all positions of a grid, for all images alike: the token mixing of ResMLP.

    Weights: [1, heads, N, N]. Static, global, own for each pair of positions, shared by the channels of a head.

    Args:
        dim: channels C.
        grid_size: the largest grid, for all axes or each. A smaller one is taken for the corner at the origin: it
            uses the rows and columns of its own positions, as if the rest were padding.
        num_heads: heads of consecutive channels, with a matrix each; 1: one matrix for all channels.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *S, C], S no longer than grid_size along any axis.
        `weight` [L, L], L = prod(grid_size), output position first, as torch.nn.Linear has it; [heads, L, L] for
        several heads.

    Cost: N*N*C multiply-adds. Memory of the weight: heads*L*L.

    Raises:
        ValueError: heads that do not divide dim; a grid longer than grid_size.

    Source: Touvron et al., ResMLP: Feedforward Networks for Image Classification with Data-Efficient Training,
    IEEE TPAMI 2022, arXiv 2105.03404.
    Differs from the paper: no bias for each position, which is no weighted sum of tokens; heads and grids smaller
    than the table are additions.
    """

    examples = (
        "LinearTokenMixing(grid_size=(20, 28))",
        "LinearTokenMixing(grid_size=(20, 28), num_heads=4)",
        "LinearTokenMixing(grid_size=40, num_heads=2, rank=1)",
    )

    def __init__(self, dim: int, *, grid_size: int | Sequence[int], num_heads: int = 1, rank: int = 2) -> None:
        super().__init__(dim, rank=rank)
        self.grid_size, self.num_heads = grid_size, positive("num_heads", num_heads)
        self._size = per_axis("grid_size", grid_size, rank)
        if dim % num_heads:
            raise ValueError(f"num_heads: {num_heads} does not divide {dim} channels")
        places = math.prod(self._size)
        bound = places**-0.5  # as a linear layer over the positions
        heads = (num_heads,) if num_heads > 1 else ()
        self.weight = nn.Parameter(torch.empty(*heads, places, places).uniform_(-bound, bound))

    def values(self, source: Tensor) -> Tensor:
        return source.flatten(1, -2).unflatten(-1, (self.num_heads, -1))

    def weights(self, x: Tensor) -> Aggregation:
        grid, matrix = tuple(x.shape[1:-1]), self._matrix(x)
        places = grid_positions(grid, device=x.device)
        return Aggregation(matrix[None], None, math.prod(grid), places, places, grid, grid)

    def fast(self, x: Tensor, values: Tensor) -> Tensor:
        # one product for the whole batch, where the definition's matrix is copied for every image
        return torch.einsum("gnm,bmgd->bngd", self._matrix(x).to(values.dtype), values).flatten(2)

    def macs(self, grid: Sequence[int]) -> int:
        return math.prod(grid) ** 2 * self.dim

    def _matrix(self, x: Tensor) -> Tensor:
        """[heads, N, N]: the rows and columns of the positions that x has."""
        grid = x.shape[1:-1]
        if any(n > size for n, size in zip(grid, self._size, strict=True)):
            raise ValueError(
                f"LinearTokenMixing: x has grid {tuple(grid)}, grid_size is {self.grid_size}; the matrix holds no "
                "weights outside: build it with a grid_size as long as the longest grid"
            )
        place = join([torch.arange(n, device=x.device)[:, None] for n in grid], self._size)[:, 0]
        weight = self.weight if self.num_heads > 1 else self.weight[None]
        return weight[:, place[:, None], place]
