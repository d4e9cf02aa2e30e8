"""What the positional attentions share: heads that see every channel, and weights that are a product over the axes.

Shape letters: B batch, S grid, C channels, G heads, N queries, M sources; n queries and m sources along one axis.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import positive
from glocal.kernels import separable_sum
from glocal.mixer import TokenMixer
from glocal.mixers._attention import masked, masked_softmax


class PositionalAttention(TokenMixer):
    """Abstract: every head mixes all C channels, and one layer `value` writes all heads back."""

    def __init__(self, dim: int, *, num_heads: int, out_dim: int | None, rank: int) -> None:
        super().__init__(dim, rank=rank)
        self.num_heads = positive("num_heads", num_heads)
        self.out_dim = dim if out_dim is None else positive("out_dim", out_dim)
        self.value = nn.Linear(num_heads * dim, self.out_dim)

    def values(self, source: Tensor) -> Tensor:
        return source.flatten(1, -2).unsqueeze(2)

    def project(self, mixed: Tensor) -> Tensor:
        return self.value(mixed)

    def _mixing_macs(self, grid: Sequence[int]) -> int:
        queries = math.prod(self.out_grid(grid))
        return queries * self.num_heads * self.dim * (math.prod(grid) + self.out_dim)


def softmax_over_sources(
    scores: Tensor, x: Tensor, valid: Tensor | None, queries: Tensor | None, *, stride: int = 1
) -> Aggregation:
    """[B|1, G, N, M] scores of x [B, *S, C], every `stride`-th token a query, to dense weights with their geometry."""
    grid = tuple(x.shape[1:-1])
    out = tuple((n + stride - 1) // stride for n in grid)
    places = grid_positions(out, device=x.device)
    return Aggregation(
        masked_softmax(scores, None if valid is None else valid.flatten(1)[:, None, None]),
        None,
        math.prod(grid),
        places if queries is None else places[queries],
        grid_positions(grid, stride=stride, device=x.device),
        out if queries is None else (len(queries),),
        grid,
    )


def precise(parameter: Tensor) -> Tensor:
    """At least float32: a squared distance in bfloat16 would be off by whole units."""
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def mix_by_axes(scores: Sequence[Tensor], values: Tensor, grid: Sequence[int], valid: Tensor | None) -> Tensor:
    """The sum of weights times values where scores are a sum over the axes; A is never formed.

    The softmax of a sum over axes is the product of a softmax along each, exactly and borders included. Among any
    valid sources it is one in two steps: within each row of sources, and between the rows by what each sums to.

    Args:
        scores: [G, n, m] for each axis.
        values: [B, M, G|1, C], zero where not valid.
        grid: lengths m.
        valid: bool [B, *S].

    Returns:
        [B, *n, G*C]. Memory: with valid the weights of both steps, at most B*G*M entries for each row and column.
    """
    values = values.unflatten(1, grid)
    if len(scores) == 1:
        along = masked_softmax(scores[0][None], None if valid is None else valid[:, None, None])
        return torch.einsum("bgjl,blgc->bjgc", along.to(values.dtype), values).flatten(-2)
    rows, columns = scores
    if valid is None:
        return separable_sum(rows.softmax(-1), columns.softmax(-1), values).flatten(-2)
    # a row of nothing valid has the lowest sum, hence no weight beside any other; where all are such, values are zero
    in_row = masked(columns[:, None], valid[:, None, :, None])  # [B, G, source rows, n, m]
    by_row = torch.einsum("bgkjl,bklgc->bkgjc", in_row.softmax(-1).to(values.dtype), values)
    of_row = in_row.logsumexp(-1).mT.unsqueeze(-2)  # [B, G, query columns, 1, source rows]
    between = (rows[:, None] + of_row).softmax(-1).to(values.dtype)
    return torch.einsum("bgjik,bkgjc->bijgc", between, by_row).flatten(-2)
