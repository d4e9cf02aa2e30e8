"""PVT v2's linear spatial-reduction attention."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation
from glocal.arguments import extents, per_axis
from glocal.mixers._library import images
from glocal.mixers._reduced_attention import ReducedAttention


class LinearSpatialReductionAttention(ReducedAttention):
    """Every token reads a map of fixed size: A = softmax(q k^T / sqrt(D)), k and v of averages over P x P regions.

    The regions are those of adaptive average pooling; a 1x1 convolution, layer norm and GELU follow. The cost grows
    linearly with the tokens. Weights: [B, heads, N, M], M = prod(P): own for each image, head and query; dense.

    Args:
        dim: channels C.
        num_heads, head_dim: one of them; head_dim 32 where neither is given.
        pool_size: P, regions along all axes or each.
        qkv_bias: whether q, k and v have biases.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *S, C], any S; region p of P holds tokens floor(p*n/P) to ceil((p+1)*n/P) - 1 of n, so
        that an axis shorter than P is read more than once. With `valid` n is each image's own extent. A region
        stands at the middle of its share of the axis. `q.weight` [C, C], `kv.weight` [2*C, C],
        `sr.weight` [C, C, 1, 1], `norm`, `proj`.

    Cost: 2*N*C^2 + 2*M*C^2 + 2*N*M*C + 2*M*C^2 multiply-adds; the definition forms regions for keys and for values,
    the fast path once; averages are not counted.

    Raises:
        ValueError: heads that do not divide the channels; `valid` that is no rectangle anchored at the origin.

    Source: Wang et al., PVT v2: Improved Baselines with Pyramid Vision Transformer, Computational Visual Media 2022,
    arXiv 2106.13797 (linear SRA); convolution, layer norm (eps 1e-5) and GELU from the released code
    (classification/pvt_v2.py).
    Differs from the paper: nothing.
    """

    examples = (
        "LinearSpatialReductionAttention(num_heads=4)",
        "LinearSpatialReductionAttention(num_heads=2, pool_size=(3, 5), qkv_bias=False)",
        "LinearSpatialReductionAttention(num_heads=4, pool_size=5, rank=1)",
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        pool_size: int | Sequence[int] = 7,
        qkv_bias: bool = True,
        rank: int = 2,
    ) -> None:
        super().__init__(dim, num_heads=num_heads, head_dim=head_dim, qkv_bias=qkv_bias, rank=rank)
        self.pool_size, self._pool = pool_size, per_axis("pool_size", pool_size, rank)
        self.sr = nn.Conv2d(dim, dim, 1)
        self.norm = nn.LayerNorm(dim)

    def weights(self, x: Tensor, *, valid: Tensor | None = None, queries: Tensor | None = None) -> Aggregation:
        return self._aggregation_of(x, valid, queries)

    def reduced(self, x: Tensor, valid: Tensor | None) -> Tensor:
        if valid is None:
            rows, columns = (1,) * (2 - len(self._pool)) + self._pool
            pooled = nn.functional.adaptive_avg_pool2d(images(x), (rows, columns))
        else:
            pooled, size = x, extents(valid)  # no region holds padding
            for axis, (n, p) in enumerate(zip(x.shape[1:-1], self._pool, strict=True)):
                shares = _regions(n, p, size[:, axis], x.dtype)
                pooled = torch.einsum("bpn,bn...->bp...", shares, pooled.movedim(axis + 1, 1)).movedim(1, axis + 1)
            pooled = images(pooled)
        return nn.functional.gelu(self.norm(self.sr(pooled).flatten(2).mT))

    def seen(self, valid: Tensor) -> Tensor:
        return valid.flatten(1).any(1, keepdim=True).expand(-1, math.prod(self._pool))

    def source_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        return self._pool

    def steps(self, grid: Sequence[int]) -> list[float]:
        return [n / p for n, p in zip(grid, self._pool, strict=True)]

    def _reduction_macs(self, pooled: int) -> int:
        return pooled * self.dim**2


def _regions(n: int, count: int, extent: Tensor, dtype: torch.dtype) -> Tensor:
    """[B, count, n]: the share of each token in each region's average, where image b has extent[b] <= n tokens."""
    region = torch.arange(count, device=extent.device)
    start = (region * extent[:, None]) // count
    end = ((region + 1) * extent[:, None] + count - 1) // count
    token = torch.arange(n, device=extent.device)
    inside = (token >= start[..., None]) & (token < end[..., None])
    return inside.to(dtype) / (end - start).clamp(min=1)[..., None]
