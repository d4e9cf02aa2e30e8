"""Attention to a place: heads with a centre and a spread, whatever the tokens hold."""

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation
from glocal.mixers._positional import softmax_over_sources
from glocal.mixers._quadratic import SPREAD_STD, QuadraticScores


class QuadraticAttention(QuadraticScores):
    """Attention to a place relative to the query: A = softmax(-spread^2 / 2 * |source - query - centre|^2).

    With K*K heads centred on the offsets of a kernel and a large spread it is a K x K convolution.
    Weights: [1, heads, N, M]: static, own for each head and query; dense, since the softmax is over all tokens.

    Args:
        dim: channels C; every head sees all of them.
        num_heads: heads G, K*K for a kernel K x K.
        out_dim: channels of the output; dim by default.
        stride: every stride-th token along each axis is a query.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *ceil(S / stride), out_dim], any S. `attention_centers` [heads, rank], in tokens of x,
        row before column; `attention_spreads` [heads], one over the standard deviation; `value` maps heads*C
        channels, head by head, to out_dim. A dilated kernel has its centres further apart, nothing else.

    Cost: N*M*heads*C + N*heads*C*out_dim multiply-adds. The fast path takes heads*C*(H*W*W' + H*H'*W') instead of
    N*M*heads*C for H' x W' queries: the weights are a softmax over rows times a softmax over columns.

    Source: Cordonnier et al., On the Relationship between Self-Attention and Convolutional Layers, ICLR 2020,
    arXiv 1911.03584, theorem 1 and equation 9; spread^2 / 2 is the paper's alpha.
    Differs from the paper: heads are written back by one layer, as in the released code (models/bert.py), where the
    paper has a value and an output matrix; centres and spreads start as there, normal with deviations 2 around 0 and
    0.01 around 1. No dropout on the weights. Any grid; the released code ends at 50 x 50.
    """

    examples = (
        "QuadraticAttention()",
        "QuadraticAttention(num_heads=4, out_dim=48, stride=2)",
        "QuadraticAttention(num_heads=3, rank=1)",
        "QuadraticAttention(num_heads=2, stride=3, rank=1)",
    )

    def __init__(
        self, dim: int, *, num_heads: int = 9, out_dim: int | None = None, stride: int = 1, rank: int = 2
    ) -> None:
        super().__init__(dim, num_heads=num_heads, out_dim=out_dim, stride=stride, rank=rank)
        self.attention_spreads = nn.Parameter(1 + SPREAD_STD * torch.randn(num_heads))

    def _spreads(self) -> Tensor:
        return self.attention_spreads[:, None].expand_as(self.attention_centers)

    def weights(self, x: Tensor, *, valid: Tensor | None = None, queries: Tensor | None = None) -> Aggregation:
        (position,) = self._scores(x, queries=queries).values()
        return softmax_over_sources(position, x, valid, queries, stride=self.stride)
