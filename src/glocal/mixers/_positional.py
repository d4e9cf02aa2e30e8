"""What the positional attentions share: heads that see every channel, and weights that are a product over the axes.

Shape letters: B batch, S grid, C channels, G heads, N queries, M sources; n queries and m sources along one axis.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import positive
from glocal.mixer import TokenMixer
from glocal.mixers._attention import masked_softmax


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


def offsets(x: Tensor, queries: Tensor | None, *, stride: int = 1) -> Tensor:
    """Source minus query in tokens of x [B, *S, C]: [N, M, rank]."""
    source = grid_positions(x.shape[1:-1], device=x.device)
    query = stride * grid_positions([(n + stride - 1) // stride for n in x.shape[1:-1]], device=x.device)
    return source - (query if queries is None else query[queries])[:, None]


def axis_offsets(length: int, device: torch.device, *, stride: int = 1) -> Tensor:
    """Source minus query along one axis: [n, m]."""
    return torch.arange(length, device=device) - torch.arange(0, length, stride, device=device)[:, None]


def precise(parameter: Tensor) -> Tensor:
    """At least float32: a squared distance in bfloat16 would be off by whole units."""
    return parameter.to(torch.promote_types(parameter.dtype, torch.float32))


def mix_by_axes(scores: Sequence[Tensor], values: Tensor, grid: Sequence[int], valid: Tensor | None) -> Tensor:
    """The sum of weights times values where scores are a sum over the axes; A is never formed.

    The softmax of a sum over axes is the product of a softmax along each, exactly and borders included, as long
    as the sources are all pairs of some rows and some columns.

    Args:
        scores: [G, n, m] for each axis.
        values: [B, M, 1, C].
        grid: lengths m.
        valid: bool [B, *S] without a sentence from `no_product`.

    Returns:
        [B, *n, G*C].
    """
    seen = [None] * len(grid) if valid is None else [along[:, None, None] for along in along_axes(valid)]
    maps = [masked_softmax(s[None], mask).to(values.dtype) for s, mask in zip(scores, seen, strict=True)]
    mixed = values.reshape(values.shape[0], *grid, values.shape[-1])
    if len(maps) == 1:
        return torch.einsum("bgjl,blc->bjgc", maps[0], mixed).flatten(-2)
    by_column = torch.einsum("bgjl,bklc->bgkjc", maps[1], mixed)
    return torch.einsum("bgik,bgkjc->bijgc", maps[0], by_column).flatten(-2)


def along_axes(valid: Tensor) -> list[Tensor]:
    """[B, *S] -> [B, m] for each axis: where any token is real."""
    if valid.dim() == 2:
        return [valid]
    return [valid.any(2), valid.any(1)]


def no_product(valid: Tensor | None) -> str | None:
    """Why the real tokens are not all pairs of some rows and some columns, as in a rectangle; None if they are."""
    if valid is None or valid.dim() == 2:
        return None
    if torch.compiler.is_compiling() or valid.is_meta:
        return "whether the real tokens of valid fill a rectangle cannot be asked while compiling"
    rows, columns = along_axes(valid)
    if torch.equal(rows[:, :, None] & columns[:, None], valid):
        return None
    return "the real tokens of valid fill no rectangle, so the weights are no product over rows and columns"
