"""What the quadratic attentions share: heads with a centre, whose scores fall with the squared distance from it.

Shape letters: S grid, L offsets along each axis, G heads, N queries, M sources; n queries and m sources along one axis.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.arguments import positive
from glocal.mixers._library import out_lengths
from glocal.mixers._positional import PositionalAttention, mix_by_axes, precise
from glocal.positions.relative import axis_offsets

CENTRE_STD = 2.0  # of the initial centres, in tokens
SPREAD_STD = 0.01  # of the initial spreads, around 1 or the identity


class QuadraticScores(PositionalAttention):
    """Abstract: scores of -|S^T (source - query - centre)|^2 / 2; a subclass says what S is."""

    undecayed = ("attention_centers", "attention_spreads")  # as in the released training

    def __init__(self, dim: int, *, num_heads: int, out_dim: int | None, stride: int, rank: int) -> None:
        super().__init__(dim, num_heads=num_heads, out_dim=out_dim, rank=rank)
        self.stride = positive("stride", stride)
        self.attention_centers = nn.Parameter(CENTRE_STD * torch.randn(num_heads, rank))

    @abstractmethod
    def _spreads(self) -> Tensor:
        """S of each head: its diagonal, [G, rank], if that is all; else [G, rank, rank]."""

    def precision(self) -> Tensor:
        """The inverse covariance S S^T of each head, in tokens of x to the power -2: [G, rank, rank]."""
        spreads = self._spreads()
        if spreads.dim() == 2:
            return torch.diag_embed(spreads.square())
        return spreads @ spreads.mT

    def scores(self, x: Tensor, *, queries: Tensor | None = None) -> dict[str, Tensor]:
        grid = x.shape[1:-1]
        # once for each offset that occurs: pairs of tokens are many more
        axes = [offsets_along(n, self.stride, x.device) for n in grid]
        offset = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)  # [*L, rank]
        ones = [1] * len(grid)
        from_centre = offset - precise(self.attention_centers).view(-1, *ones, len(grid))
        spreads = self._spreads()
        spreads = spreads.view(-1, *ones, *spreads.shape[1:])
        if spreads.dim() == from_centre.dim():
            scaled = from_centre * spreads
        else:  # S^T by products and sums: a matrix product would round to bfloat16 under autocast
            scaled = (from_centre[..., None] * spreads).sum(-2)
        table = -0.5 * scaled.square().sum(-1)
        return {"position": of_pairs(table, grid, self.stride, queries)[None]}

    def fast(self, x: Tensor, values: Tensor, *, valid: Tensor | None = None) -> Tensor:
        grid, centres, spreads = x.shape[1:-1], precise(self.attention_centers), self._spreads()
        scores = []
        for axis, n in enumerate(grid):
            from_centre = axis_offsets(n, x.device, stride=self.stride) - centres[:, axis, None, None]
            scores.append(-0.5 * (spreads[:, axis, None, None] * from_centre).square())
        return self.project(mix_by_axes(scores, values, grid, valid))

    def out_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        return out_lengths(grid, self.stride)

    def macs(self, grid: Sequence[int]) -> int:
        return self._mixing_macs(grid)


def offsets_along(length: int, stride: int, device: torch.device) -> Tensor:
    """Every source minus query along one axis, ascending: [L]."""
    return torch.arange(-last_query(length, stride), length, device=device)


def last_query(length: int, stride: int) -> int:
    """Where the last query stands, in sources: its offset to the first source is the lowest."""
    return (length - 1) // stride * stride


def of_pairs(table: Tensor, grid: Sequence[int], stride: int, queries: Tensor | None) -> Tensor:
    """A table of offsets [G, *L] read for each query and source: [G, N, M], the only tensor of that size."""
    out = out_lengths(grid, stride)
    left = torch.arange(math.prod(out), device=table.device) if queries is None else queries
    entries: list[Tensor] = []
    for axis in reversed(range(len(grid))):
        entry = axis_offsets(grid[axis], table.device, stride=stride) + last_query(grid[axis], stride)  # [n, m]
        shape = [-1 if other == axis else 1 for other in range(len(grid))]
        entries.insert(0, entry[left % out[axis]].unflatten(1, shape))  # the other axes' sources are all read with it
        left = left // out[axis]
    every_head: tuple[slice | Tensor, ...] = (slice(None), *entries)
    return table[every_head].flatten(2)
