"""CoAtNet's relative attention: content plus a learned bias for each offset."""

import math
from collections import OrderedDict
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import every_axis, extents, flag, positive
from glocal.kernels import biased_attention
from glocal.mixers._attention import (
    Attention,
    mask_bias,
    masked_softmax,
    sdpa,
    sum_of,
    table_parameter,
)
from glocal.positions.relative import relative_bias, resized_bias, resized_bias_of_each


class RelativeAttention(Attention):
    """Global attention with a bias for each offset and head: A = softmax(q k^T / sqrt(D) + P[query - source]).

    A depthwise convolution of unlimited reach, shared by the channels of a head, joined with self-attention
    before the softmax. Weights: [B, heads, N, N]: own for each image, head and query; dense.

    Args:
        dim: channels C.
        grid_size: the grid that the table is made for; its length is the rank.
        num_heads, head_dim: one of them; head_dim 32 where neither is given.
        out_dim: channels of the output; dim by default.
        inner_dim: channels of q, k and v each; out_dim by default.
        qkv_bias: whether q, k and v have biases.
        position_bias: whether P is there; without it this is `SelfAttention`.
        after_softmax: A = softmax(q k^T / sqrt(D)) + P, the paper's "post" variant.
        position_mlp: if given, P is no table, but what an MLP with so many hidden channels makes of
            sign(d)*log(1 + |d|), d the offset along each of two axes, as in timm's "rmlp" networks.

    Shape:
        x [B, *S, C] -> [B, *S, out_dim], any S. `relative_position_bias_table` [heads, *(2*grid_size - 1)], entry
        query - source + grid_size - 1 along each axis; at another size the table is resized linearly to 2*S - 1.

    Cost: N*C*3*inner_dim + 2*N^2*inner_dim + N*inner_dim*out_dim multiply-adds; the resize is not counted.

    Raises:
        ValueError: heads that do not divide the channels.

    Source: Dai et al., CoAtNet, NeurIPS 2021, arXiv 2106.04803, section 2.1 (y_pre and y_post) and appendix A.1.
    The MLP after Liu et al., Swin Transformer V2, CVPR 2022, arXiv 2111.09883, section 3.3.
    Differs from the paper: nothing; the official table is indexed by source - query, which mirrors it. timm drops
    hidden channels of the MLP in training.
    """

    examples = (
        "RelativeAttention(grid_size=(8, 8), num_heads=4)",
        "RelativeAttention(grid_size=(13, 7), num_heads=2, out_dim=48, after_softmax=True)",
        "RelativeAttention(grid_size=(16,), num_heads=4, qkv_bias=False)",
        "RelativeAttention(grid_size=(8, 8), num_heads=4, position_bias=False)",
        "RelativeAttention(grid_size=(8, 8), num_heads=4, inner_dim=64, position_mlp=8)",
    )
    undecayed = ("relative_position_bias_table", "relative_position_mlp")

    def __init__(
        self,
        dim: int,
        *,
        grid_size: Sequence[int],
        num_heads: int | None = None,
        head_dim: int | None = None,
        out_dim: int | None = None,
        inner_dim: int | None = None,
        qkv_bias: bool = True,
        position_bias: bool = True,
        after_softmax: bool = False,
        position_mlp: int | None = None,
    ) -> None:
        grid_size = every_axis("grid_size", grid_size)
        super().__init__(
            dim,
            num_heads=num_heads,
            head_dim=head_dim,
            out_dim=out_dim,
            inner_dim=inner_dim,
            qkv_bias=qkv_bias,
            rank=len(grid_size),
        )
        self.inner_dim = inner_dim
        self.grid_size = grid_size
        self.after_softmax = flag("after_softmax", after_softmax)
        self.position_bias = flag("position_bias", position_bias)
        self.position_mlp, self.relative_position_mlp = position_mlp, None
        sides, table = [2 * n - 1 for n in grid_size], position_bias and position_mlp is None
        self.relative_position_bias_table = table_parameter(self.num_heads, *sides) if table else None
        if position_bias and position_mlp is not None:
            if len(grid_size) != 2:
                raise ValueError(f"position_mlp: {position_mlp}, takes offsets of two axes; grid_size is {grid_size}")
            first, second = (
                nn.Linear(2, positive("position_mlp", position_mlp)),
                nn.Linear(position_mlp, self.num_heads),
            )
            self.relative_position_mlp = nn.Sequential(OrderedDict(fc1=first, act=nn.ReLU(), fc2=second))

    def scores(self, x: Tensor, *, valid: Tensor | None = None, queries: Tensor | None = None) -> dict[str, Tensor]:
        scores = {"content": self._content(x, queries)}
        if self.position_bias and not self.after_softmax:
            scores["position"] = self._bias(x, valid, queries)
        return scores

    def weights(self, x: Tensor, *, valid: Tensor | None = None, queries: Tensor | None = None) -> Aggregation:
        grid = tuple(x.shape[1:-1])
        seen = None if valid is None else valid.flatten(1)[:, None, None]
        weights = masked_softmax(sum_of(self._scores(x, valid=valid, queries=queries)), seen)
        if self.position_bias and self.after_softmax:
            weights = weights + self._bias(x, valid, queries)
            weights = weights if seen is None else weights * seen
        places = grid_positions(grid, device=x.device)
        return Aggregation(
            weights,
            None,
            math.prod(grid),
            places if queries is None else places[queries],
            places,
            grid if queries is None else (len(queries),),
            grid,
        )

    def fast(self, x: Tensor, values: Tensor, *, valid: Tensor | None = None) -> Tensor:
        q, k = self.heads(x, 0), self.heads(x, 1)
        sources = None if valid is None else valid.flatten(1)
        if self.position_bias and not self.after_softmax:
            grid = tuple(x.shape[1:-1])
            return self.proj(biased_attention(q, k, values, self._table(grid, valid), grid, valid=sources).flatten(2))
        mask = None if sources is None else mask_bias(sources[:, None, None], q.dtype)
        mixed = sdpa(q, k, values, bias=mask)
        if self.position_bias:
            position = self._bias(x, valid, None).to(q.dtype)
            mixed = mixed + torch.einsum("bgnm,bmgd->bngd", position, values).flatten(2)
        return self.proj(mixed)

    def macs(self, grid: Sequence[int]) -> int:
        n = math.prod(grid)
        products = self._projection_macs(n) + 2 * n * n * self._inner
        if self.relative_position_mlp is not None and self.position_mlp is not None:
            products += math.prod(2 * m - 1 for m in grid) * self.position_mlp * (2 + self.num_heads)
        return products

    def _content(self, x: Tensor, queries: Tensor | None) -> Tensor:
        q = self.heads(x, 0)
        return torch.einsum("bngd,bmgd->bgnm", q if queries is None else q[:, queries], self.heads(x, 1))

    def _bias(self, x: Tensor, valid: Tensor | None, queries: Tensor | None) -> Tensor:
        """[B|1, heads, N, N]: the table at this size, or at each image's own."""
        grid = tuple(x.shape[1:-1])
        tables = self._table(grid, valid)
        if tables.dim() == 1 + len(grid):
            return relative_bias(tables, grid, queries=queries)[None]
        return relative_bias(tables.flatten(0, 1), grid, queries=queries).unflatten(0, tables.shape[:2])

    def _table(self, grid: Sequence[int], valid: Tensor | None) -> Tensor:
        """[heads, *(2*S - 1)] at this size, or [B, ...] at each image's own."""
        if self.relative_position_mlp is not None:
            like = next(self.relative_position_mlp.parameters())
            offsets = [torch.arange(1 - n, n, dtype=like.dtype, device=like.device) for n in grid]
            places = torch.stack(torch.meshgrid(*offsets, indexing="ij"), -1)
            return self.relative_position_mlp(places.sign() * places.abs().log1p()).movedim(-1, 0)
        assert self.relative_position_bias_table is not None
        if valid is None:
            return resized_bias(self.relative_position_bias_table, grid)
        return resized_bias_of_each(self.relative_position_bias_table, extents(valid), grid)
