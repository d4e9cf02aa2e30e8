"""Dynamic convolution: every token predicts the kernel that it is the centre of."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from glocal.aggregation import Aggregation
from glocal.arguments import flag, odd_kernel, positive, rate, resolve_heads
from glocal.kernels import local_sum
from glocal.mixer import Cache, TokenMixer
from glocal.mixers._grid import kernel_index, places_behind


class DynamicConv(TokenMixer):
    """Convolution with a kernel for each position and head, predicted from that token: A = softmax(W v_i).

    Weights: [B, heads, N, K], K taps, rows sum to 1 with the taps outside the grid, which count as zero. Dynamic per
    position, shared by the channels of a head; local.

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
        x [B, *S, C] -> [B, *S, C], any S; zeros outside. `weight_linear` [heads * K, C], head by head, taps in raster
        order; `linear1` [2C, C], values and then gates; `linear2` [C, C]. With `cache` (causal, rank 1) x follows the
        tokens that were seen, of which the last kernel_size - 1 values are kept.

    Cost: N*K*C*(1 + heads) multiply-adds, and N*C*5*C for the projections: the definition makes the values twice,
    for the kernels and for the sum; the fast path once.

    Raises:
        ValueError: an even kernel with a centre; heads that do not divide dim.

    Source: Wu et al., Pay Less Attention with Lightweight and Dynamic Convolutions, ICLR 2019, arXiv 1901.10430,
    sections 3 and 4.
    Differs from the paper: images too; weight_dropout starts at 0. The released code (fairseq) has the convolution
    alone in its module DynamicConv1d, as here without `projection`; `linear1`, gate and `linear2` belong to its layer,
    which starts both by Xavier's rule with biases at 0, here as nn.Linear does, and calls `weight_linear`
    `conv.weight_linear`. Its biases of kernels and sums, its projection without a gate and its softmax over the taps
    inside the grid alone (renorm_padding) are not here.
    """

    examples = (
        "DynamicConv(num_heads=4)",
        "DynamicConv(kernel_size=5, num_heads=2, projection=True)",
        "DynamicConv(kernel_size=7, num_heads=8, rank=1)",
        "DynamicConv(kernel_size=4, num_heads=4, causal=True, projection=True, rank=1)",
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
        self.weight_linear = nn.Linear(dim, self.num_heads * kernel_size**rank, bias=False)
        self.linear1 = nn.Linear(dim, 2 * dim) if projection else nn.Identity()
        self.linear2 = nn.Linear(dim, dim) if projection else nn.Identity()

    def values(self, source: Tensor) -> Tensor:
        v = source.flatten(1, -2)
        if self.projection:
            v = nn.functional.glu(self.linear1(v))
        return v.unflatten(-1, (self.num_heads, -1))

    def scores(self, x: Tensor) -> dict[str, Tensor]:
        return {"content": self._logits(self.values(x)).transpose(1, 2)}

    def weights(self, x: Tensor, *, cache: Cache | None = None, update_statistics: bool = False) -> Aggregation:
        grid, rank = tuple(x.shape[1:-1]), x.dim() - 2
        (content,) = self._scores(x).values()
        source_grid, places, source_places = places_behind(x, cache, kept := self._kept(cache))
        index = kernel_index(source_grid, [self.kernel_size] * rank, left=[self._left] * rank, device=x.device)[kept:]
        return Aggregation(
            self._taps(content.transpose(1, 2), update_statistics).transpose(1, 2),
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
        kept, grid = self._kept(cache), x.shape[1:-1]
        kernels = self._taps(self._logits(values[:, kept:]), update_statistics).unflatten(1, grid)
        values = values.reshape(x.shape) if cache is None else values.flatten(2)
        return self.linear2(local_sum(values, kernels, left=self._left, past=kept))

    def macs(self, grid: Sequence[int]) -> int:
        taps = self.kernel_size ** len(grid)
        each = taps * self.dim * self.num_heads + (taps * self.dim if taps > 1 else 0)
        return math.prod(grid) * (each + (5 * self.dim**2 if self.projection else 0))

    @property
    def remembers(self) -> int:
        return self.kernel_size - 1

    @property
    def _left(self) -> int:
        """Taps in front of the query."""
        return self.kernel_size - 1 if self.causal else self.kernel_size // 2

    def _logits(self, values: Tensor) -> Tensor:
        """[B, N, heads, D] -> [B, N, heads, K]: each token's kernels before the softmax."""
        return self.weight_linear(values.flatten(2)).unflatten(-1, (self.num_heads, -1))

    def _taps(self, logits: Tensor, training: bool) -> Tensor:
        return nn.functional.dropout(logits.softmax(-1), self.weight_dropout, training)
