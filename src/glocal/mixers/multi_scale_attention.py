"""MUSE's module: attention and dynamic convolutions side by side on one value projection."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation
from glocal.arguments import flag, odd_kernel, positive, rate
from glocal.kernels import local_sum
from glocal.mixer import Cache
from glocal.mixers._attention import Attention
from glocal.mixers._grid import kernel_index
from glocal.mixers.self_attention import mixed_from_all, softmax_of_all


class MultiScaleAttention(Attention):
    """Heads of attention beside heads of dynamic convolution, all on the same values, joined by one projection.

    A is softmax(q k^T / sqrt(D)) in the first heads; in the others the sum over kernel sizes of a gate times
    softmax(W v_i), the kernels that each value predicts for its own surroundings. Weights: [B, 2*heads, N, N],
    dense: attention, then convolution, which is zero outside its largest kernel. Dynamic per position.

    Args:
        dim: channels C.
        num_heads, head_dim: one of them, heads of attention and as many of convolution; head_dim 32 where neither
            is given.
        kernel_sizes: taps along every axis, one number for each convolution; odd unless causal.
        causal: attention reads the query and what comes before it in raster order, the taps of a convolution are the
            query and kernel_size - 1 tokens before it, along every axis.
        qkv_bias: whether q, k and v have biases.
        weight_dropout: share of the convolutions' taps that a training forward pass drops after the softmax
            (DropConnect), each by itself; the others grow by 1 / (1 - weight_dropout). 0.1 in the released code.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *S, C], any S; zeros outside for the convolutions. `qkv` [3C, C] and `proj` [C, 2C],
        columns of attention first, are the released code's in_proj and out_proj; `weight_linear.<i>`
        [heads * K_i, C], head by head, taps in raster order; `gate` [len(kernel_sizes)], a softmax away from shares
        that sum to 1. With `cache` (causal, rank 1) x follows the tokens that were seen, whose keys and values are
        kept, one value for both halves.

    Cost: 6*N*C^2 + 3*N^2*C + N*C*heads*sum(K_i) multiply-adds; the definition makes the values twice, for the
    kernels and for the sum, and its convolutions dense. The fast path: 5*N*C^2 + 2*N^2*C + N*C*max(K_i) and the
    kernels.

    Raises:
        ValueError: no kernel sizes; an even kernel with a centre; heads that do not divide dim.

    Source: Zhao et al., MUSE: Parallel Multi-Scale Attention for Sequence to Sequence Learning, 2019, arXiv
    1911.09483; kernels as in Wu et al., ICLR 2019, arXiv 1901.10430.
    Differs from the paper: one projection of the joined heads, as in the released code, where the paper's equation
    has one for each kernel; no dropout in attention, and weight_dropout starts at 0; images too, with square kernels.
    Padding is masked in both halves; the released encoder masks it in attention only, and pads on the left, so that
    there the first words of a sentence depend on its batch. The released code starts `proj` with a wider distribution
    than nn.Linear does and biases at 0.
    """

    takes_positions = False  # kernels are made of values, which have no positions
    examples = (
        "MultiScaleAttention(num_heads=4, kernel_sizes=(1, 3))",
        "MultiScaleAttention(num_heads=2, kernel_sizes=(5,), qkv_bias=False)",
        "MultiScaleAttention(num_heads=4, rank=1)",
        "MultiScaleAttention(num_heads=2, kernel_sizes=(2, 5), causal=True, rank=1)",
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        kernel_sizes: Sequence[int] = (3, 15),
        causal: bool = False,
        qkv_bias: bool = True,
        weight_dropout: float = 0.0,
        rank: int = 2,
    ) -> None:
        super().__init__(dim, num_heads=num_heads, head_dim=head_dim, qkv_bias=qkv_bias, rank=rank)
        if not isinstance(kernel_sizes, list | tuple) or not kernel_sizes:
            raise ValueError(f"kernel_sizes: {kernel_sizes!r}, must be one number for each convolution, as in (3, 15)")
        self.causal, self.kernel_sizes = flag("causal", causal), tuple(kernel_sizes)
        self.weight_dropout = rate("weight_dropout", weight_dropout)
        for size in self.kernel_sizes:
            positive("kernel_sizes", size)
            if not causal:
                odd_kernel("kernel_sizes", size, rank)
        self.weight_linear = nn.ModuleList(
            nn.Linear(dim, self.num_heads * size**rank, bias=False) for size in self.kernel_sizes
        )
        self.gate = nn.Parameter(torch.full((len(self.kernel_sizes),), 1 / len(self.kernel_sizes)))
        self.proj = nn.Linear(2 * dim, dim)  # reads attention and convolution, twice the width of `Attention`'s

    def values(self, source: Tensor, *, cache: Cache | None = None) -> Tensor:
        v = self.heads(source, 2)
        v = v if cache is None else cache.join("values", v)
        return torch.cat([v, v], 2)  # for heads of attention, and for heads of convolution

    def weights(
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        queries: Tensor | None = None,
        cache: Cache | None = None,
        update_statistics: bool = False,
    ) -> Aggregation:
        rank, largest = x.dim() - 2, max(self.kernel_sizes)
        q, k, v = (self.heads(x, part) for part in range(3))
        k = k if cache is None else cache.join("keys", k)
        kernels = self._kernels(v, rank, update_statistics)
        if queries is not None:
            q, kernels = q[:, queries], kernels[:, queries]
        scores = torch.einsum("bngd,bmgd->bgnm", q, k)
        attention = softmax_of_all(scores, x, None, None, valid, queries, cache, causal=self.causal)
        left = [self._left(largest)] * rank
        index = kernel_index(attention.source_grid, [largest] * rank, left=left, device=x.device)[self._kept(cache) :]
        index = index if queries is None else index[queries]
        convolution = replace(attention, weights=kernels.transpose(1, 2), index=index[None, None])
        return replace(attention, weights=torch.cat([attention.weights, convolution.dense()], 1))

    def fast(
        self,
        x: Tensor,
        values: Tensor,
        *,
        valid: Tensor | None = None,
        cache: Cache | None = None,
        update_statistics: bool = False,
    ) -> Tensor:
        q, k, v = self.heads(x, 0), self.heads(x, 1), values[:, :, : self.num_heads]
        k, kept = (k, 0) if cache is None else (cache.join("keys", k), self._kept(cache))
        attention = mixed_from_all(q, k, v, valid, causal=self.causal)
        kernels = self._kernels(v[:, kept:], x.dim() - 2, update_statistics).unflatten(1, x.shape[1:-1])
        v = v.reshape(x.shape) if cache is None else v.flatten(2)
        convolution = local_sum(v, kernels, left=self._left(max(self.kernel_sizes)), past=kept)
        return self.proj(torch.cat([attention, convolution.flatten(1, -2)], -1))

    def macs(self, grid: Sequence[int]) -> int:
        n, taps = math.prod(grid), sum(size ** len(grid) for size in self.kernel_sizes)
        return n * self.dim * (6 * self.dim + 3 * n + self.num_heads * taps)

    def _left(self, size: int) -> int:
        """Taps of a kernel in front of the query."""
        return size - 1 if self.causal else size // 2

    def _kernels(self, v: Tensor, rank: int, training: bool) -> Tensor:
        """The gated sum of every token's kernels, at the size of the largest: [B, N, heads, D] -> [B, N, heads, K]."""
        largest, each = max(self.kernel_sizes), []
        for size, linear, share in zip(self.kernel_sizes, self.weight_linear, self.gate.softmax(0), strict=True):
            taps = linear(v.flatten(2)).unflatten(-1, (self.num_heads, -1)).softmax(-1)
            taps = nn.functional.dropout(taps, self.weight_dropout, training) * share
            front = self._left(largest) - self._left(size)
            around = (front, largest - size - front) * rank
            each.append(nn.functional.pad(taps.unflatten(-1, (size,) * rank), around).flatten(-rank))
        return sum(each[1:], each[0])
