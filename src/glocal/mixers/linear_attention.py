"""Linear attention: a product of features in place of the softmax, so that A need never be formed."""

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import torch
from torch import Tensor

from glocal.aggregation import Aggregation
from glocal.arguments import flag
from glocal.mixer import Cache
from glocal.mixers._attention import Attention, add_position
from glocal.mixers._grid import pick_or_zero
from glocal.mixers.self_attention import geometry

CHUNK = 64  # queries of a causal sum that are taken together; the memory of its states is N / CHUNK * D^2 a head


class LinearAttention(Attention):
    """Every token reads every token, in time linear in their number: A_ij = f(q_i) f(k_j) / sum_j f(q_i) f(k_j).

    Weights: [B, heads, N, M], not negative, rows sum to 1: own for each image, head and query; dense, of rank D at
    most. The fast path never forms them: f(q) (f(k)^T v), products of D x D.

    Args:
        dim: channels C of x (and of source).
        num_heads, head_dim: one of them; head_dim 32 where neither is given.
        feature_map: f, of each channel by itself: "elu+1", x + 1 above 0 and exp(x) below, or "relu".
        out_dim: channels of q, k, v and the output; dim by default.
        qkv_bias: whether q, k and v have biases.
        causal: a token reads itself and those before it in raster order.

    Shape:
        x [B, *S, C] -> [B, *S, out_dim], S of any rank. With `source` [B, *S', C] keys and values come from there.
        `pos_embed` and `source_pos_embed` are added for queries and keys only. `grid` takes class tokens in front.
        A query whose weights are all 0 (nothing valid; features that are all 0) gets 0 before the last projection.
        With `cache` (causal, x [B, t, C]) x follows the tokens that were seen. Of these the sums of f(k) v^T and f(k)
        are kept, D x (D + 1) a head however many they were; what `valid` says of them was taken when they came. In
        the weights they are D sources in front that have no place: for each feature, the mean of values by f(k).

    Cost: (N + 2*M)*C*out_dim + 2*N*M*out_dim + N*out_dim^2 multiply-adds in the definition. The fast path needs
    (N + M)*out_dim*(D + 1) in place of 2*N*M*out_dim; causal, CHUNK*N*out_dim*(2 + 1 / D) more.

    Raises:
        ValueError: another feature map; heads that do not divide the channels; a source where there is an order.

    Source: Katharopoulos et al., Transformers are RNNs: Fast Autoregressive Transformers with Linear Attention,
    ICML 2020, arXiv 2006.16236, sections 3.2 and 3.3. "relu": Cai et al., EfficientViT, ICCV 2023, arXiv 2205.14756.
    Differs from the paper: biases in the projections, as all vision models have; queries are not scaled, as there.
    The released code adds 1e-6 to the sum that divides, here a sum of 0 gives 0.
    """

    examples = (
        "LinearAttention(num_heads=4)",
        "LinearAttention(num_heads=2, feature_map='relu', qkv_bias=False)",
        "LinearAttention(num_heads=4, causal=True)",
        "LinearAttention(num_heads=4, out_dim=48)",
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        feature_map: Literal["elu+1", "relu"] = "elu+1",
        out_dim: int | None = None,
        qkv_bias: bool = True,
        causal: bool = False,
    ) -> None:
        super().__init__(dim, num_heads=num_heads, head_dim=head_dim, out_dim=out_dim, qkv_bias=qkv_bias)
        if feature_map not in ("elu+1", "relu"):
            raise ValueError(f"feature_map: {feature_map!r}, must be 'elu+1' or 'relu'")
        self.feature_map, self.causal = feature_map, flag("causal", causal)
        self.scale = 1.0

    def values(self, source: Tensor, *, valid: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        v = self.heads(source, 2)
        if valid is not None:
            v = v.masked_fill(~valid.flatten(1)[..., None, None], 0)
        past = _recall(cache, v)
        if past is None:
            return v
        means = past[..., :-1] / _or_one(past[..., -1:])
        return torch.cat([means.permute(0, 2, 1, 3).to(v.dtype), v], 1)

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
        q, k = self._features(x, source, valid, pos_embed, source_pos_embed)
        past = _recall(cache, q)
        if cache is not None:
            self._remember(cache, past, k, self.heads(x, 2))
        q = q if queries is None else q[:, queries]
        with _as_given(x.device):
            products = torch.einsum("bngd,bmgd->bgnm", q, k)
        if self.causal:
            order = torch.arange(k.shape[1], device=x.device)
            rows = order if queries is None else queries
            products = products * (order <= rows[:, None])
        out_grid, source_grid, places, source_places = geometry(x, source, grid, 0)
        if cache is not None:
            places = source_places = places + len(cache)
        if past is not None:
            products = torch.cat([q.transpose(1, 2) * past[..., -1].unsqueeze(2), products], -1)
            source_places = torch.cat([places.new_full((past.shape[2], 1), math.nan), places])
        if queries is not None:
            places, out_grid = places[queries], (len(queries),)
        weights = products / _or_one(products.sum(-1, keepdim=True))
        return Aggregation(weights, None, weights.shape[-1], places, source_places, out_grid, source_grid)

    def fast(
        self,
        x: Tensor,
        values: Tensor,
        source: Tensor | None = None,
        *,
        grid: Sequence[int] | None = None,
        valid: Tensor | None = None,
        pos_embed: Tensor | None = None,
        source_pos_embed: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        q, k = self._features(x, source, valid, pos_embed, source_pos_embed)
        past = _recall(cache, q)
        if past is not None:
            values = values[:, past.shape[2] :]  # the sums themselves are at hand
        v = _with_one(values, k.dtype)
        with _as_given(x.device):
            if self.causal:
                both = _causal_sum(q, k, v, CHUNK if cache is None else min(CHUNK, q.shape[1]))
            else:
                both = torch.einsum("bngd,bgde->bnge", q, _states(k, v))
            if past is not None:
                both = both + torch.einsum("bngd,bgde->bnge", q, past)
        if cache is not None:
            self._remember(cache, past, k, values)
        mixed = both[..., :-1] / _or_one(both[..., -1:])
        return self.proj(mixed.flatten(2).to(values.dtype))

    @property
    def remembers(self) -> int:
        return 0  # no token by itself

    def _remember(self, cache: Cache, past: Tensor | None, k: Tensor, values: Tensor) -> None:
        """Sums over all tokens so far, [B, G, D, D + 1]."""
        with _as_given(k.device):
            sums = _states(k, _with_one(values, k.dtype))
        cache.put("sums", sums if past is None else past + sums)

    def macs(self, grid: Sequence[int]) -> int:
        n = math.prod(grid)
        return self._projection_macs(n) + 2 * n * n * self.out_dim

    def _features(
        self,
        x: Tensor,
        source: Tensor | None,
        valid: Tensor | None,
        pos_embed: Tensor | None,
        source_pos_embed: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        """f(q) [B, N, G, D] and f(k) [B, M, G, D], which is 0 where not valid; in float32 or wider.

        Sums of them over all tokens would overflow float16.
        """
        if self.causal and source is not None:
            raise ValueError("LinearAttention: source was given, causal=True; an order holds within one sequence only")
        if source is None:
            source_pos_embed = pos_embed if source_pos_embed is None else source_pos_embed
        q = self._feature(self.heads(add_position(x, pos_embed), 0))
        k = self._feature(self.heads(add_position(x if source is None else source, source_pos_embed), 1))
        return q, k if valid is None else k.masked_fill(~valid.flatten(1)[..., None, None], 0)

    def _feature(self, t: Tensor) -> Tensor:
        t = t.to(torch.promote_types(t.dtype, torch.float32))
        if self.feature_map == "relu":
            return t.relu()
        # not elu(t) + 1, which rounds to 0 from t = -17 on in float32, and all of a row with it
        return torch.where(t > 0, t + 1, t.clamp(max=0).exp())


def _as_given(device: torch.device) -> AbstractContextManager[object]:
    """Products in the dtype of their factors, not in that of autocast."""
    if device.type == "meta":
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def _recall(cache: Cache | None, tokens: Tensor) -> Tensor | None:
    return None if cache is None else cache.recall("sums", tokens.shape[0])


def _with_one(values: Tensor, dtype: torch.dtype) -> Tensor:
    """A column of ones beside the values: its sum is what divides."""
    return torch.nn.functional.pad(values.to(dtype), (0, 1), value=1.0)


def _or_one(sums: Tensor) -> Tensor:
    """1 for 0: the features of such a row are 0, and stay so."""
    return torch.where(sums == 0, 1, sums)


def _states(k: Tensor, v: Tensor) -> Tensor:
    """k^T v of every head: [..., M, G, D], [..., M, G, E] -> [..., G, D, E]."""
    return torch.einsum("...mgd,...mge->...gde", k, v)


def _causal_sum(q: Tensor, k: Tensor, v: Tensor, chunk: int) -> Tensor:
    """y_i = q_i sum over j <= i of k_j^T v_j: in chunks, a state of all before it for each, A within it.

    q, k [B, N, G, D], v [B, N, G, E] -> [B, N, G, E].
    """
    n = q.shape[1]
    place = torch.arange((n + chunk - 1) // chunk, device=q.device)[:, None] * chunk + torch.arange(
        chunk, device=q.device
    )
    index = torch.where(place < n, place, -1)[None]
    q, k, v = (pick_or_zero(t, index) for t in (q, k, v))  # [B, chunks, CHUNK, G, .]
    states = _states(k, v)
    before = torch.cat([torch.zeros_like(states[:, :1]), states[:, :-1].cumsum(1)], 1)
    within = torch.einsum("bcngd,bcmgd->bcgnm", q, k).tril()
    y = torch.einsum("bcngd,bcgde->bcnge", q, before) + torch.einsum("bcgnm,bcmge->bcnge", within, v)
    return y.flatten(1, 2)[:, :n]
