"""Attention to a place with heads that are wide in one direction and narrow in another."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation
from glocal.arguments import positive
from glocal.mixers._library import out_lengths
from glocal.mixers._positional import PositionalAttention, offsets, precise, softmax_over_sources

CENTRE_STD = 2.0  # of the initial centres, in tokens
SPREAD_STD = 0.01  # of the initial spreads, around the identity


class GeneralizedQuadraticAttention(PositionalAttention):
    """Attention to a place with a precision matrix: A = softmax(-|S^T (source - query - centre)|^2 / 2).

    S S^T is the inverse of a head's covariance, so a head may look along an edge; S = spread * identity is
    `QuadraticAttention`. Weights: [1, heads, N, M]: static, own for each head and query; dense, since the softmax is
    over all tokens.

    Args:
        dim: channels C; every head sees all of them.
        num_heads: heads G.
        out_dim: channels of the output; dim by default.
        stride: every stride-th token along each axis is a query.
        rank: 2 for images, 1 for sequences, where S is one number.

    Shape:
        x [B, *S, C] -> [B, *ceil(S / stride), out_dim], any S. `attention_centers` [heads, rank], in tokens of x,
        row before column; `attention_spreads` S [heads, rank, rank]; `value` maps heads*C channels, head by head, to
        out_dim.

    Cost: N*M*heads*C + N*heads*C*out_dim multiply-adds. No fast path: a precision matrix that is not diagonal ties
    rows to columns, so the weights are no product over the axes.

    Source: Cordonnier et al., On the Relationship between Self-Attention and Convolutional Layers, ICLR 2020,
    arXiv 1911.03584; the heads that are not isotropic in the released code (models/bert.py).
    Differs from the paper: no dropout on the weights, any grid (the released code ends at 50 x 50), and none of the
    released code's approximation by 7 x 7 kernels, which reads S^T S and gives a head only some of the channels.
    """

    examples = (
        "GeneralizedQuadraticAttention()",
        "GeneralizedQuadraticAttention(num_heads=4, out_dim=48, stride=2)",
        "GeneralizedQuadraticAttention(num_heads=3, rank=1)",
    )

    def __init__(
        self, dim: int, *, num_heads: int = 9, out_dim: int | None = None, stride: int = 1, rank: int = 2
    ) -> None:
        super().__init__(dim, num_heads=num_heads, out_dim=out_dim, rank=rank)
        self.stride = positive("stride", stride)
        self.attention_centers = nn.Parameter(CENTRE_STD * torch.randn(num_heads, rank))
        self.attention_spreads = nn.Parameter(torch.eye(rank) + SPREAD_STD * torch.randn(num_heads, rank, rank))

    def scores(self, x: Tensor, *, queries: Tensor | None = None) -> dict[str, Tensor]:
        offset = offsets(x, queries, stride=self.stride)
        from_centre = offset - precise(self.attention_centers)[:, None, None]  # [heads, N, M, rank]
        # S^T (d - centre) by products and sums: a matrix product would round to bfloat16 under autocast
        spread = precise(self.attention_spreads)[:, None, None]
        along = (from_centre[..., None] * spread).sum(-2)
        return {"position": (-0.5 * along.square().sum(-1))[None]}

    def weights(self, x: Tensor, *, valid: Tensor | None = None, queries: Tensor | None = None) -> Aggregation:
        (position,) = self._scores(x, queries=queries).values()
        return softmax_over_sources(position, x, valid, queries, stride=self.stride)

    def out_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        return out_lengths(grid, self.stride)

    def macs(self, grid: Sequence[int]) -> int:
        return self._mixing_macs(grid)
