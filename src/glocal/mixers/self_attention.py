"""Global self-attention."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import flag
from glocal.mixer import Cache
from glocal.mixers._attention import Attention, add_position, geometry_across, masked_softmax, sdpa, sdpa_where


class SelfAttention(Attention):
    """Every token reads every token, as much as query and key agree: A = softmax(q k^T / sqrt(D)).

    Weights: [B, heads, N, M]: own for each image, head and query; dense.

    Args:
        dim: channels C of x (and of source).
        num_heads: heads G. Or
        head_dim: channels D of a head; 32 where neither is given.
        out_dim: channels of q, k, v and the output; dim by default.
        qkv_bias: whether q, k and v have biases.
        causal: a token reads itself and those before it in raster order.

    Shape:
        x [B, *S, C] -> [B, *S, out_dim], S of any rank. With `source` [B, *S', C] keys and values come from
        there, by the same `qkv`: what nn.MultiheadAttention and with it DETR's decoder hold. `CrossAttention` is for
        a source that has projections, and perhaps a width, of its own. `pos_embed` and `source_pos_embed` are added
        for queries and keys only. `grid` takes class tokens in front. With `cache` (causal, rank 1) x follows the
        tokens that are remembered.

    Cost: N*C*3*out_dim + 2*N*M*out_dim + N*out_dim^2 multiply-adds.

    Raises:
        ValueError: heads that do not divide the channels; a cache or source where they have no meaning.

    Source: Vaswani et al., Attention Is All You Need, NeurIPS 2017, arXiv 1706.03762, equation 1.
    Differs from the paper: no dropout on the weights; biases in the projections, as all vision models have.
    """

    examples = (
        "SelfAttention(num_heads=4)",
        "SelfAttention(num_heads=2, qkv_bias=False, causal=True)",
        "SelfAttention(num_heads=4, out_dim=48)",
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        out_dim: int | None = None,
        qkv_bias: bool = True,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, num_heads=num_heads, head_dim=head_dim, out_dim=out_dim, qkv_bias=qkv_bias)
        self.causal = flag("causal", causal)

    def scores(
        self,
        x: Tensor,
        source: Tensor | None = None,
        *,
        pos_embed: Tensor | None = None,
        source_pos_embed: Tensor | None = None,
        queries: Tensor | None = None,
        cache: Cache | None = None,
    ) -> dict[str, Tensor]:
        q, k = self._queries_and_keys(x, source, pos_embed, source_pos_embed, cache)
        q = q if queries is None else q[:, queries]
        return {"content": torch.einsum("bngd,bmgd->bgnm", q, k)}

    def weights(
        self,
        x: Tensor,
        source: Tensor | None = None,
        *,
        grid: Sequence[int] | None = None,
        valid: Tensor | None = None,
        pos_embed: Tensor | None = None,
        source_pos_embed: Tensor | None = None,
        queries: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Aggregation:
        (content,) = self._scores(
            x, source, pos_embed=pos_embed, source_pos_embed=source_pos_embed, queries=queries, cache=cache
        ).values()
        return softmax_of_all(content, x, source, grid, valid, queries, cache, causal=self.causal)

    def fast(
        self,
        x: Tensor,
        source: Tensor | None = None,
        *,
        grid: Sequence[int] | None = None,
        valid: Tensor | None = None,
        pos_embed: Tensor | None = None,
        source_pos_embed: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        if source is None and pos_embed is None and source_pos_embed is None and cache is None:
            # one product for all three, forward and backward; a cache would keep all of it for a part
            q, k, v = self.qkv(x.flatten(1, -2)).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
            q = q * self.scale
        else:
            q, k = self._queries_and_keys(x, source, pos_embed, source_pos_embed, cache)
            v = self.values(x if source is None else source)
            v = v if cache is None else cache.join("values", v)
        return self.proj(mixed_from_all(q, k, v, valid, causal=self.causal))

    def macs(self, grid: Sequence[int]) -> int:
        n = math.prod(grid)
        return self._projection_macs(n) + 2 * n * n * self.out_dim

    def _queries_and_keys(
        self,
        x: Tensor,
        source: Tensor | None,
        pos_embed: Tensor | None,
        source_pos_embed: Tensor | None,
        cache: Cache | None,
    ) -> tuple[Tensor, Tensor]:
        if self.causal and source is not None:
            raise ValueError("SelfAttention: source was given, causal=True; an order holds within one sequence only")
        if source is None:
            source_pos_embed = pos_embed if source_pos_embed is None else source_pos_embed
        q = self.heads(add_position(x, pos_embed), 0)
        k = self.heads(add_position(x if source is None else source, source_pos_embed), 1)
        return q, k if cache is None else cache.join("keys", k)


# What attention to all tokens shares, however queries and keys were made.


def softmax_of_all(
    scores: Tensor,
    x: Tensor,
    source: Tensor | None,
    grid: Sequence[int] | None,
    valid: Tensor | None,
    queries: Tensor | None,
    cache: Cache | None,
    *,
    causal: bool,
) -> Aggregation:
    """Scores [B, G, N, M] (Q rows with `queries`) to dense weights with their geometry."""
    past = 0 if cache is None else len(cache)
    tokens, sources = math.prod(x.shape[1:-1]), scores.shape[-1]
    seen = _seen(tokens, sources, past, valid, x.device, causal)
    if seen is not None and queries is not None and seen.shape[2] > 1:
        seen = seen[:, :, queries]
    out_grid, source_grid, places, source_places = geometry(x, source, grid, past)
    if queries is not None:
        places, out_grid = places[queries], (len(queries),)
    return Aggregation(masked_softmax(scores, seen), None, sources, places, source_places, out_grid, source_grid)


def mixed_from_all(q: Tensor, k: Tensor, values: Tensor, valid: Tensor | None, *, causal: bool) -> Tensor:
    """The same by the library: [B, N, G, D] heads, q scaled, to [B, N, G*D]; queries are the last N of the M sources
    where a causal order holds."""
    past = k.shape[1] - q.shape[1] if causal else 0
    if valid is None and not past:
        return sdpa(q, k, values, causal=causal)
    seen = _seen(q.shape[1], k.shape[1], past, valid, q.device, causal)
    return sdpa_where(seen, q, k, values)


def _seen(
    tokens: int, sources: int, past: int, valid: Tensor | None, device: torch.device, causal: bool
) -> Tensor | None:
    """Which sources each query may read, [B|1, 1, N|1, M]; None: all."""
    seen = None if valid is None else valid.flatten(1)[:, None, None]
    if causal:
        order = torch.arange(sources, device=device)
        past_only = (order <= order[:tokens, None] + past)[None, None]
        seen = past_only if seen is None else seen & past_only
    return seen


def geometry(
    x: Tensor, source: Tensor | None, grid: Sequence[int] | None, past: int
) -> tuple[tuple[int, ...], tuple[int, ...], Tensor, Tensor]:
    """out_grid, source_grid and the positions of queries and sources."""
    if source is not None:
        return geometry_across(x, source)
    out_grid = tuple(x.shape[1:-1])
    if grid is not None:
        positions = grid_positions(grid, num_prefix=x.shape[1] - math.prod(grid), device=x.device)
        return out_grid, tuple(grid), positions, positions
    if past:
        positions = grid_positions((past + x.shape[1],), device=x.device)
        return out_grid, (past + x.shape[1],), positions[past:], positions
    positions = grid_positions(out_grid, device=x.device)
    return out_grid, out_grid, positions, positions
