"""Lightweight convolution: a depthwise convolution whose kernels are softmaxed and shared within heads."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation
from glocal.arguments import flag, odd_kernel, positive, rate, resolve_heads
from glocal.kernels import local_sum
from glocal.mixer import Cache, TokenMixer
from glocal.mixers._grid import kernel_index, places_behind


class LightweightConv(TokenMixer):
    """Convolution with one kernel for each head, a softmax over its taps: A = softmax(w), the same at every position.

    Weights: [1, heads, 1, K], K taps, positive, rows sum to 1 with the taps outside the grid, which count as zero.
    Static, shared by positions and by the channels of a head; local.

    Args:
        dim: channels C.
        kernel_size: taps along every axis; odd unless causal.
        num_heads, head_dim: one of them; head_dim 32 where neither is given.
        causal: the taps are the query and kernel_size - 1 tokens before it, along every axis.
        projection: the paper's module around the convolution: values v are a gated linear unit of x, and a linear
            layer follows. Otherwise v is x and the sum is the output.
        weight_dropout: share of the taps that a training forward pass drops after the softmax (DropConnect), each
            by itself; the others grow by 1 / (1 - weight_dropout). The paper's models have 0.1.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *S, C], any S; zeros outside. `weight` [heads, 1, *kernel]; `linear1` [2C, C], values and
        then gates; `linear2` [C, C]. With `cache` (causal, rank 1) x follows the tokens that were seen, of which the
        last kernel_size - 1 values are kept.

    Cost: N*K*C multiply-adds, and N*3*C^2 for the projections.

    Raises:
        ValueError: an even kernel with a centre; heads that do not divide dim.

    Source: Wu et al., Pay Less Attention with Lightweight and Dynamic Convolutions, ICLR 2019, arXiv 1901.10430,
    section 3.
    Differs from the paper: images too; weight_dropout starts at 0. The released code (fairseq) has the convolution
    alone in its module LightweightConv1d, as here without `projection`; `linear1`, gate and `linear2` belong to its
    layer, which starts both by Xavier's rule with biases at 0, here as nn.Linear does. Its bias of the sums, its
    projection without a gate and its kernels without a softmax are not here.
    """

    examples = (
        "LightweightConv(num_heads=4)",
        "LightweightConv(kernel_size=5, num_heads=2, projection=True)",
        "LightweightConv(kernel_size=7, num_heads=8, rank=1)",
        "LightweightConv(kernel_size=4, num_heads=4, causal=True, projection=True, rank=1)",
    )

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int = 3,
        num_heads: int | None = None,
        head_dim: int | None = None,
        causal: bool = False,
        projection: bool = False,
        weight_dropout: float = 0.0,
        rank: int = 2,
    ) -> None:
        super().__init__(dim, rank=rank)
        self.num_heads = resolve_heads(dim, num_heads, head_dim)
        self.causal, self.projection = flag("causal", causal), flag("projection", projection)
        self.kernel_size = positive("kernel_size", kernel_size)
        self.weight_dropout = rate("weight_dropout", weight_dropout)
        if not causal:
            odd_kernel("kernel_size", kernel_size, rank)
        self.weight = nn.Parameter(torch.empty(self.num_heads, 1, *(kernel_size,) * rank))
        nn.init.xavier_uniform_(self.weight)
        self.linear1 = nn.Linear(dim, 2 * dim) if projection else nn.Identity()
        self.linear2 = nn.Linear(dim, dim) if projection else nn.Identity()

    def values(self, source: Tensor) -> Tensor:
        v = source.flatten(1, -2)
        if self.projection:
            v = nn.functional.glu(self.linear1(v))
        return v.unflatten(-1, (self.num_heads, -1))

    def scores(self, x: Tensor) -> dict[str, Tensor]:
        return {"position": self.weight.flatten(1)[None, :, None]}

    def weights(self, x: Tensor, *, cache: Cache | None = None, update_statistics: bool = False) -> Aggregation:
        grid, rank = tuple(x.shape[1:-1]), x.dim() - 2
        (position,) = self._scores(x).values()
        source_grid, places, source_places = places_behind(x, cache, kept := self._kept(cache))
        index = kernel_index(source_grid, [self.kernel_size] * rank, left=[self._left] * rank, device=x.device)[kept:]
        return Aggregation(
            self._taps(position, update_statistics),
            index[None, None],
            math.prod(source_grid),
            places,
            source_places,
            grid,
            source_grid,
        )

    def project(self, mixed: Tensor) -> Tensor:
        return self.linear2(mixed)

    def fast(self, x: Tensor, values: Tensor, *, cache: Cache | None = None, update_statistics: bool = False) -> Tensor:
        taps = self._taps(self.weight.flatten(1), update_statistics)
        tokens = values.reshape(x.shape) if cache is None else values.flatten(2)
        shared = taps.view(1, *[1] * (x.dim() - 2), *taps.shape)
        return self.linear2(local_sum(tokens, shared, left=self._left, past=self._kept(cache)))

    def macs(self, grid: Sequence[int]) -> int:
        taps = self.kernel_size ** len(grid)
        each = (taps * self.dim if taps > 1 else 0) + (3 * self.dim**2 if self.projection else 0)
        return math.prod(grid) * each

    @property
    def remembers(self) -> int:
        return self.kernel_size - 1

    @property
    def _left(self) -> int:
        """Taps in front of the query."""
        return self.kernel_size - 1 if self.causal else self.kernel_size // 2

    def _taps(self, logits: Tensor, training: bool) -> Tensor:
        return nn.functional.dropout(logits.softmax(-1), self.weight_dropout, training)
