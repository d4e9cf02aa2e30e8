"""Neighborhood attention: every query has a window of its own."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from glocal.aggregation import Aggregation
from glocal.arguments import extents, flag, odd_kernel, per_axis, positive
from glocal.kernels import neighborhood_attention
from glocal.mixer import Cache
from glocal.mixers._attention import Attention, masked_softmax, part_of, sum_of, table_parameter
from glocal.mixers._grid import join, pick_or_zero, places_behind, taps


class NeighborhoodAttention(Attention):
    """Attention to the K nearest tokens of each query: A = softmax(q k^T / sqrt(D) + B) over its neighborhood.

    Weights: [B, heads, N, K]: own for each image, head and query; local.

    Args:
        dim: channels C.
        kernel_size: neighbors along all axes or each; odd unless causal.
        num_heads, head_dim: one of them; head_dim 32 where neither is given.
        dilation: distance between neighbors, for all axes.
        causal: neighbors are the query and kernel_size - 1 tokens before it, along every axis.
        border: "masked": neighbors centred on the query, those outside the grid are not seen. "shifted": the
            neighborhood is moved inward so that all of it lies inside; an axis with fewer tokens uses them all.
        qkv_bias: whether q, k and v have biases.
        position_bias: whether B is there; without it only the neighborhood's cut knows of positions.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *S, C], any S. `rpb` [heads, *(2*kernel_size - 1)], entry
        (source - query) / dilation + kernel_size - 1 along each axis. With `cache` (causal, rank 1) x follows the
        tokens that were seen; keys and values of the last dilation * (kernel_size - 1) are kept.

    Cost: 4*N*C^2 + 2*N*K*C multiply-adds.

    Raises:
        ValueError: an even kernel with a centre; shifted borders together with causal.

    Source: Hassani et al., Neighborhood Attention Transformer, CVPR 2023, arXiv 2204.07143; dilation: Hassani and
    Shi, arXiv 2209.15001; causal axes as in NATTEN.
    Differs from the paper: grids smaller than kernel_size * dilation are defined instead of refused.
    """

    examples = (
        "NeighborhoodAttention(kernel_size=3, num_heads=4)",
        "NeighborhoodAttention(kernel_size=(3, 5), num_heads=2, border='shifted')",
        "NeighborhoodAttention(kernel_size=3, num_heads=4, dilation=2, border='shifted', qkv_bias=False)",
        "NeighborhoodAttention(kernel_size=4, num_heads=4, dilation=2, causal=True, rank=1)",
        "NeighborhoodAttention(kernel_size=3, num_heads=4, position_bias=False)",
    )
    undecayed = ("rpb",)

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int | Sequence[int] = 7,
        num_heads: int | None = None,
        head_dim: int | None = None,
        dilation: int = 1,
        causal: bool = False,
        border: Literal["masked", "shifted"] = "masked",
        qkv_bias: bool = True,
        position_bias: bool = True,
        rank: int = 2,
    ) -> None:
        super().__init__(dim, num_heads=num_heads, head_dim=head_dim, qkv_bias=qkv_bias, rank=rank)
        if border not in ("masked", "shifted"):
            raise ValueError(f"border: {border!r}, must be 'masked' or 'shifted'")
        if causal and border == "shifted":
            raise ValueError("border: 'shifted' would show later tokens to a causal query; use 'masked'")
        self.kernel_size, self.dilation = kernel_size, positive("dilation", dilation)
        self.causal, self.border = flag("causal", causal), border
        self._kernel = (per_axis if causal else odd_kernel)("kernel_size", kernel_size, rank)
        self.position_bias = flag("position_bias", position_bias)
        self.rpb = table_parameter(self.num_heads, *(2 * k - 1 for k in self._kernel)) if position_bias else None

    def scores(
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        queries: Tensor | None = None,
        cache: Cache | None = None,
    ) -> dict[str, Tensor]:
        index, bias = self._neighbors(x, valid, queries, self._kept(cache))
        q, k = self.heads(x, 0), self._keys(x, cache)
        q = q if queries is None else q[:, queries]
        content = torch.einsum("bngd,bnkgd->bgnk", q, pick_or_zero(k, index))
        return {"content": content} if bias is None else {"content": content, "position": bias}

    def weights(
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        queries: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Aggregation:
        kept = self._kept(cache)
        index, _ = self._neighbors(x, valid, queries, kept)
        scores = self._scores(x, valid=valid, queries=queries, cache=cache)
        source_grid, places, source_places = places_behind(x, cache, kept)
        return Aggregation(
            masked_softmax(sum_of(scores), _seen(index, valid)[:, None]),
            index[:, None],
            math.prod(source_grid),
            places if queries is None else places[queries],
            source_places,
            tuple(x.shape[1:-1]) if queries is None else (len(queries),),
            source_grid,
        )

    def fast(self, x: Tensor, values: Tensor, *, valid: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        kept = self._kept(cache)
        q = part_of(self.qkv, x.flatten(1, -2), 0, self.out_dim).unflatten(-1, (self.num_heads, -1))
        k = self._keys(x, cache)
        sources = (x.shape[0], *(n + kept for n in x.shape[1:-1]))
        shifted = self.border == "shifted"
        mixed = neighborhood_attention(
            q.reshape(*x.shape[:-1], *q.shape[2:]),
            k.reshape(*sources, *k.shape[2:]),
            values.reshape(*sources, *values.shape[2:]),
            self.rpb,
            kernel_size=self._kernel,
            dilation=self.dilation,
            causal=self.causal,
            border=self.border,
            scale=self.scale,
            valid=None if valid is None or shifted else valid.reshape(sources),
            extents=None if valid is None or not shifted else extents(valid),
        )
        return self.proj(mixed.flatten(-2).flatten(1, -2))

    def macs(self, grid: Sequence[int]) -> int:
        n = math.prod(grid)
        return self._projection_macs(n) + 2 * n * math.prod(self._kernel) * self.dim

    @property
    def remembers(self) -> int | None:
        return self.dilation * (self._kernel[0] - 1) if self.causal else None

    def _keys(self, x: Tensor, cache: Cache | None) -> Tensor:
        k = self.heads(x, 1)
        return k if cache is None else cache.join("keys", k, self.remembers)

    def _neighbors(
        self, x: Tensor, valid: Tensor | None, queries: Tensor | None, kept: int
    ) -> tuple[Tensor, Tensor | None]:
        """[B|1, N, K] sources of each query, and [B|1, heads, N|1, K] the bias of each, if there is one.

        `kept` tokens of earlier calls stand in front of the sources.
        """
        shifted = self.border == "shifted"
        grid = [n + kept for n in x.shape[1:-1]]
        size = extents(valid) if valid is not None and shifted else None
        sources, offsets = [], []
        for axis, (n, kernel) in enumerate(zip(grid, self._kernel, strict=True)):
            if shifted:
                end = n if size is None else size[:, axis, None]
                source, offset = shifted_neighbors(n, kernel, self.dilation, end, x.device)
            else:
                before = kernel - 1 if self.causal else kernel // 2
                source = taps(n, kernel, dilation=self.dilation, left=self.dilation * before, device=x.device)
                offset = (torch.arange(kernel, device=x.device) + kernel - 1 - before)[None]
            sources.append(source)
            offsets.append(offset)
        index, entry = join(sources, grid), join(offsets, [2 * k - 1 for k in self._kernel])
        index, entry = (t if t.dim() == 3 else t[None] for t in (index, entry))
        index = index[:, kept:]
        if queries is not None:
            index = index[:, queries]
            entry = entry[:, queries] if entry.shape[1] > 1 else entry
        return index, None if self.rpb is None else self.rpb.flatten(1)[:, entry].transpose(0, 1)


def shifted_neighbors(
    n: int, kernel: int, dilation: int, end: int | Tensor, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Along one axis of which `end` tokens are real ([B, 1] for each image): sources and entries [..., n, K].

    Tokens i with the same i % dilation form a class; the neighborhood is moved inward within its class.
    """
    token, tap = torch.arange(n, device=device), torch.arange(kernel, device=device)
    rank_in_class, first = token // dilation, token % dilation
    in_class = (end - first + dilation - 1) // dilation
    start = torch.minimum(rank_in_class - kernel // 2, in_class - kernel).clamp(min=0)
    member = start[..., None] + tap
    source = torch.where(member < in_class[..., None], first[:, None] + dilation * member, -1)
    entry = (member - rank_in_class[:, None] + kernel - 1).clamp(0, 2 * kernel - 2)
    return source, entry


def _seen(index: Tensor, valid: Tensor | None) -> Tensor:
    """[B|1, N, K]: slots that hold a real token."""
    inside = index >= 0
    return inside if valid is None else inside & pick_or_zero(valid.flatten(1), index)
