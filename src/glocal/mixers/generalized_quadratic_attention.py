"""Attention to a place with heads that are wide in one direction and narrow in another."""

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation
from glocal.arguments import flag
from glocal.mixers._positional import softmax_over_sources
from glocal.mixers._quadratic import SPREAD_STD, QuadraticScores


class GeneralizedQuadraticAttention(QuadraticScores):
    """Attention to a place with a precision matrix: A = softmax(-|S^T (source - query - centre)|^2 / 2).

    S S^T is the inverse of a head's covariance, so a head may look along an edge; S = spread * identity is
    `QuadraticAttention`. Weights: [1, heads, N, M]: static, own for each head and query; dense, since the softmax is
    over all tokens.

    Args:
        dim: channels C; every head sees all of them.
        num_heads: heads G.
        axis_aligned: S is diagonal: a head has a width along rows and one along columns, and no direction in between.
        out_dim: channels of the output; dim by default.
        stride: every stride-th token along each axis is a query.
        rank: 2 for images, 1 for sequences, where S is one number.

    Shape:
        x [B, *S, C] -> [B, *ceil(S / stride), out_dim], any S. `attention_centers` [heads, rank], in tokens of x,
        row before column; `attention_spreads` S [heads, rank, rank], if axis_aligned its diagonal [heads, rank];
        `value` maps heads*C channels, head by head, to out_dim.

    Cost: N*M*heads*C + N*heads*C*out_dim multiply-adds. The fast path of axis-aligned heads takes
    heads*C*(H*W*W' + H*H'*W') instead of N*M*heads*C for H' x W' queries: their weights are a softmax over rows times
    a softmax over columns. Any other S ties rows to columns; those heads go through the definition.

    Source: Cordonnier et al., On the Relationship between Self-Attention and Convolutional Layers, ICLR 2020,
    arXiv 1911.03584; the heads that are not isotropic in the released code (models/bert.py).
    Differs from the paper: no dropout on the weights, any grid (the released code ends at 50 x 50), and none of the
    released code's approximation by 7 x 7 kernels, which reads S^T S and gives a head only some of the channels.
    axis_aligned is not in the paper; without it, a state dict of the released layer fits.
    """

    examples = (
        "GeneralizedQuadraticAttention()",
        "GeneralizedQuadraticAttention(num_heads=4, out_dim=48, stride=2)",
        "GeneralizedQuadraticAttention(num_heads=4, axis_aligned=True, out_dim=48, stride=2)",
        "GeneralizedQuadraticAttention(num_heads=3, rank=1)",
        "GeneralizedQuadraticAttention(num_heads=3, axis_aligned=True, stride=2, rank=1)",
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 9,
        axis_aligned: bool = False,
        out_dim: int | None = None,
        stride: int = 1,
        rank: int = 2,
    ) -> None:
        super().__init__(dim, num_heads=num_heads, out_dim=out_dim, stride=stride, rank=rank)
        self.axis_aligned = flag("axis_aligned", axis_aligned)
        middle = torch.ones(rank) if axis_aligned else torch.eye(rank)
        self.attention_spreads = nn.Parameter(middle + SPREAD_STD * torch.randn(num_heads, *middle.shape))

    def _spreads(self) -> Tensor:
        spreads = self.attention_spreads
        return spreads if self.axis_aligned or self.rank == 2 else spreads[..., 0]  # a 1 x 1 matrix is diagonal

    def weights(self, x: Tensor, *, valid: Tensor | None = None, queries: Tensor | None = None) -> Aggregation:
        (position,) = self._scores(x, queries=queries).values()
        return softmax_over_sources(position, x, valid, queries, stride=self.stride)

    def unsupported(self, x: Tensor) -> str | None:
        if self.axis_aligned or self.rank == 1:
            return None
        return (
            "a spread that is not diagonal ties rows to columns, so the weights are no product over the axes; "
            "axis_aligned=True builds heads whose weights are"
        )
