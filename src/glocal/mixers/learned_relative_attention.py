"""Attention with learned embeddings of row and column offsets, with or without content."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation
from glocal.arguments import flag, per_axis, positive
from glocal.kernels import biased_attention
from glocal.mixers._attention import sum_of
from glocal.mixers._positional import (
    PositionalAttention,
    mix_by_axes,
    precise,
    softmax_over_sources,
)
from glocal.positions.relative import axis_offsets, relative_rows


class LearnedRelativeAttention(PositionalAttention):
    """Attention by learned offsets: A = softmax(row[dx] . u_row + col[dy] . u_col), and q k^T / sqrt(C) with content.

    dx and dy are source minus query, along a row and along a column. Weights: [1, heads, N, N], static; with content
    [B, heads, N, N], own for each image. Own for each head and query; dense.

    Args:
        dim: channels C; every head sees all of them, as query, key and value.
        num_heads: heads G.
        grid_size: the largest grid, for all axes or each; the tables have 2*grid_size - 1 entries.
        position_dim: channels of an embedding; dim by default.
        content: add the agreement of query and key.
        key_bias: whether `key` has a bias, as in the released layer, where no softmax sees it: it adds the same to all
            scores of a query. Only with content.
        clip_offsets: an offset that lies beyond the tables counts as the last one in them, so that any grid is taken.
        rank: 2 for images, 1 for sequences, which have one row and no `col_embeddings`.

    Shape:
        x [B, *S, C] -> [B, *S, C], S up to grid_size, with clip_offsets any S. `row_embeddings`
        [2*grid_size[-1] - 1, position_dim], entry dx + grid_size[-1] - 1, and `col_embeddings` [2*grid_size[0] - 1,
        position_dim] likewise; `head_keys_row` and `head_keys_col` hold u, [heads, position_dim]. `value` maps heads*C
        channels, head by head, to C; with content `query` and, without a bias unless key_bias, `key` map C channels to
        heads*C.

    Cost: N^2*heads*C + N*heads*C^2 multiply-adds, and (2n - 1)*position_dim*heads for each axis
    of n tokens; with content N^2*heads*C + 2*N*heads*C^2 more. Without content the fast path takes
    N*(H + W)*heads*C instead of N^2*heads*C: the weights are a softmax over rows times a softmax over columns.

    Raises:
        ValueError: a grid larger than grid_size without clip_offsets; key_bias without content.

    Source: Cordonnier et al., On the Relationship between Self-Attention and Convolutional Layers, ICLR 2020,
    arXiv 1911.03584, section 4; layer from the released code (models/bert.py), whose names the parameters have.
    Differs from the paper: content is query times key alone, as in the released code; the paper's term of query times
    offset is in `RelativePositionAttention`. The released code confuses rows and columns where the grid is not
    square and has one grid_size for both. No dropout on the weights. Clipped offsets are those of Shaw et al., NAACL
    2018, arXiv 1803.02155, section 3.2.
    """

    examples = (
        "LearnedRelativeAttention(num_heads=4, grid_size=32)",
        "LearnedRelativeAttention(num_heads=2, grid_size=(20, 28), position_dim=8, content=True)",
        "LearnedRelativeAttention(num_heads=3, grid_size=40, rank=1)",
        "LearnedRelativeAttention(num_heads=2, grid_size=40, content=True, rank=1)",
        "LearnedRelativeAttention(num_heads=2, grid_size=3, content=True, key_bias=True, clip_offsets=True)",
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int = 9,
        grid_size: int | Sequence[int] = 16,
        position_dim: int | None = None,
        content: bool = False,
        key_bias: bool = False,
        clip_offsets: bool = False,
        rank: int = 2,
    ) -> None:
        super().__init__(dim, num_heads=num_heads, out_dim=None, rank=rank)
        self.grid_size = grid_size
        self._sizes = per_axis("grid_size", grid_size, rank)
        self.position_dim = dim if position_dim is None else positive("position_dim", position_dim)
        self.content = flag("content", content)
        self.key_bias = flag("key_bias", key_bias)
        self.clip_offsets = flag("clip_offsets", clip_offsets)
        if key_bias and not content:
            raise ValueError("key_bias: True, without content there are no keys; add content=True, or leave it out")
        self.row_embeddings = nn.Embedding(2 * self._sizes[-1] - 1, self.position_dim)
        self.head_keys_row = nn.Linear(self.position_dim, num_heads, bias=False)
        if rank == 2:
            self.col_embeddings = nn.Embedding(2 * self._sizes[0] - 1, self.position_dim)
            self.head_keys_col = nn.Linear(self.position_dim, num_heads, bias=False)
        if content:
            self.query = nn.Linear(dim, num_heads * dim)
            self.key = nn.Linear(dim, num_heads * dim, bias=key_bias)

    def scores(self, x: Tensor, *, queries: Tensor | None = None) -> dict[str, Tensor]:
        scores = {"position": self._position(x, queries)}
        if self.content:
            q, k = self._queries_and_keys(x)
            scores["content"] = torch.einsum("bngd,bmgd->bgnm", q if queries is None else q[:, queries], k)
        return scores

    def weights(self, x: Tensor, *, valid: Tensor | None = None, queries: Tensor | None = None) -> Aggregation:
        return softmax_over_sources(sum_of(self._scores(x, queries=queries)), x, valid, queries)

    def fast(self, x: Tensor, values: Tensor, *, valid: Tensor | None = None) -> Tensor:
        if not self.content:
            return self.project(mix_by_axes(self._by_axis(x), values, x.shape[1:-1], valid))
        q, k = self._queries_and_keys(x)
        first, *others = (known.T for known in self._known(x))  # [heads, 2n - 1], by source minus query
        table = first.flip(1) if not others else (first[:, :, None] + others[0][:, None]).flip(1, 2)
        sources = None if valid is None else valid.flatten(1)
        values = values.expand(-1, -1, self.num_heads, -1)
        return self.project(biased_attention(q, k, values, table, tuple(x.shape[1:-1]), valid=sources).flatten(2))

    def macs(self, grid: Sequence[int]) -> int:
        n = math.prod(grid)
        tables = sum((2 * length - 1) * self.position_dim * self.num_heads for length in grid)
        content = n * self.num_heads * self.dim * (n + 2 * self.dim) if self.content else 0
        return self._mixing_macs(grid) + tables + content

    def _queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """[B, N, heads, C] each, queries scaled."""
        tokens = x.flatten(1, -2)
        q, k = (layer(tokens).unflatten(-1, (self.num_heads, -1)) for layer in (self.query, self.key))
        return q * self.dim**-0.5, k

    def _position(self, x: Tensor, queries: Tensor | None) -> Tensor:
        """[1, heads, N, N]: the sum of the axes' scores."""
        by_axis = self._by_axis(x)
        if self.rank == 1:
            score = by_axis[0]
        else:
            rows, columns = by_axis
            score = (rows[:, :, None, :, None] + columns[:, None, :, None]).flatten(3).flatten(1, 2)
        return (score if queries is None else score[:, queries])[None]

    def _by_axis(self, x: Tensor) -> list[Tensor]:
        """[heads, n, n] for each axis: the score of each source for each query."""
        known = zip(self._known(x), x.shape[1:-1], strict=True)
        return [score[axis_offsets(n, x.device) + n - 1].movedim(-1, 0) for score, n in known]

    def _known(self, x: Tensor) -> list[Tensor]:
        """[2n - 1, heads] for each axis: the score of each offset, source minus query."""
        along_row = (self.row_embeddings, self.head_keys_row)
        tables = [along_row] if self.rank == 1 else [(self.col_embeddings, self.head_keys_col), along_row]
        scores = []
        for axis, ((embeddings, head_keys), size) in enumerate(zip(tables, self._sizes, strict=True)):
            n = x.shape[axis + 1]
            if self.clip_offsets:
                offset = torch.arange(2 * n - 1, device=x.device) - n + 1
                rows = offset.clamp(1 - size, size - 1) + size - 1
            else:
                rows = relative_rows("LearnedRelativeAttention", axis, size, n, x.device)
            scores.append(precise(head_keys(embeddings(rows))))
        return scores
