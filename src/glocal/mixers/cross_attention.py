"""Cross-attention: tokens read another sequence."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation
from glocal.arguments import flag, positive, resolve_heads
from glocal.mixer import Cache, TokenMixer
from glocal.mixers._attention import add_position, geometry_across, masked_softmax, part_of, sdpa_where


class CrossAttention(TokenMixer):
    """Every token reads every token of another sequence: A = softmax(q k^T / sqrt(D)), k and v of the source.

    Weights: [B, heads, N, M]: own for each image, head and query; dense. Queries have no place among the sources.

    Args:
        dim: channels C of x, of q, k, v and of the output.
        num_heads: heads G. Or
        head_dim: channels D of a head; 32 where neither is given.
        source_dim: channels of the source; dim by default.
        qkv_bias: whether q, k and v have biases.

    Shape:
        x [B, *S, C], source [B, *S', source_dim] -> [B, *S, C], S and S' of any rank. `valid` [B, *S'] is about the
        source. `pos_embed` is added for queries, `source_pos_embed` for keys, neither for values. With `cache`
        the source of a call follows those that are remembered, as one sequence; a call without a source reads
        what is remembered. `q.weight` [C, C], `kv.weight` [2*C, source_dim], `proj.weight` [C, C].

    Cost: 2*N*C^2 + 2*M*source_dim*C + 2*N*M*C multiply-adds; `macs(grid)` takes a source as large as x.

    Raises:
        ValueError: heads that do not divide the channels; no source, and none remembered; with a cache, a source
            that is no sequence after another one.

    Source: Vaswani et al., Attention Is All You Need, NeurIPS 2017, arXiv 1706.03762, section 3.2.3
    (encoder-decoder attention). Parameters are named as in timm's attentions with queries of their own.
    Differs from the paper: no dropout on the weights; biases in the projections, as all vision models have.
    """

    needs_source = True
    examples = (
        "CrossAttention(num_heads=4)",
        "CrossAttention(num_heads=2, source_dim=24)",
        "CrossAttention(num_heads=2, source_dim=40, qkv_bias=False)",
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        source_dim: int | None = None,
        qkv_bias: bool = True,
    ) -> None:
        super().__init__(dim)
        self.num_heads = resolve_heads(dim, num_heads, head_dim)
        self.source_dim = dim if source_dim is None else positive("source_dim", source_dim)
        self.qkv_bias = flag("qkv_bias", qkv_bias)
        self.scale = (dim // self.num_heads) ** -0.5
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(self.source_dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def values(self, source: Tensor) -> Tensor:
        return part_of(self.kv, source.flatten(1, -2), 1, self.dim).unflatten(-1, (self.num_heads, -1))

    def scores(
        self,
        x: Tensor,
        source: Tensor,
        *,
        pos_embed: Tensor | None = None,
        source_pos_embed: Tensor | None = None,
        queries: Tensor | None = None,
        cache: Cache | None = None,
    ) -> dict[str, Tensor]:
        q, k = self._queries_and_keys(x, source, pos_embed, source_pos_embed, queries, cache)
        return {"content": torch.einsum("bngd,bmgd->bgnm", q, k)}

    def weights(
        self,
        x: Tensor,
        source: Tensor,
        *,
        valid: Tensor | None = None,
        pos_embed: Tensor | None = None,
        source_pos_embed: Tensor | None = None,
        queries: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Aggregation:
        (content,) = self._scores(
            x, source, pos_embed=pos_embed, source_pos_embed=source_pos_embed, queries=queries, cache=cache
        ).values()
        weights = masked_softmax(content, _seen(valid))
        out_grid, source_grid, places, source_places = geometry_across(x, source, 0 if cache is None else len(cache))
        if queries is not None:
            places, out_grid = places[queries], (len(queries),)
        return Aggregation(weights, None, content.shape[-1], places, source_places, out_grid, source_grid)

    def fast(
        self,
        x: Tensor,
        values: Tensor,
        source: Tensor,
        *,
        valid: Tensor | None = None,
        pos_embed: Tensor | None = None,
        source_pos_embed: Tensor | None = None,
        queries: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        q, k = self._queries_and_keys(x, source, pos_embed, source_pos_embed, queries, cache)
        return self.proj(sdpa_where(_seen(valid), q, k, values))

    def project(self, mixed: Tensor) -> Tensor:
        return self.proj(mixed)

    def macs(self, grid: Sequence[int]) -> int:
        n, c = math.prod(grid), self.dim
        return 2 * n * c * c + 2 * n * self.source_dim * c + 2 * n * n * c

    def _queries_and_keys(
        self,
        x: Tensor,
        source: Tensor,
        pos_embed: Tensor | None,
        source_pos_embed: Tensor | None,
        queries: Tensor | None,
        cache: Cache | None,
    ) -> tuple[Tensor, Tensor]:
        tokens = add_position(x, pos_embed).flatten(1, -2)
        q = self.q(tokens if queries is None else tokens[:, queries]) * self.scale
        k = part_of(self.kv, add_position(source, source_pos_embed).flatten(1, -2), 0, self.dim)
        q, k = (t.unflatten(-1, (self.num_heads, -1)) for t in (q, k))
        return q, k if cache is None else cache.join("keys", k)


def _seen(valid: Tensor | None) -> Tensor | None:
    """[B, *S'] -> [B, 1, 1, M]."""
    return None if valid is None else valid.flatten(1)[:, None, None]
