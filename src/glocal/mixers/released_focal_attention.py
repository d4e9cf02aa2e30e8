"""Focal attention as the released code computes it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation
from glocal.mixers._attention import sum_of
from glocal.mixers._focal import FocalWindows

OUTSIDE = -100.0  # added to the score of a pooled window outside the grid: finite, so that a trace of it is left


class ReleasedFocalAttention(FocalWindows):
    """`FocalAttention` with the released code's borders and counts; its weights load, its outputs are the same.

    Differs from `FocalAttention` in four ways. The ring wraps around: a window at the border sees tokens of the
    opposite side. Tokens of the ring that two moves of the window reach count twice in the softmax: 132 slots, not
    120, for a window of 7 and a ring of 3. A pooled window outside the grid takes part as a zero key and a zero
    value with a score of its bias - 100. A grid that is no multiple of the window is continued with zero tokens,
    which are pooled, and seen with the biases of k and v.

    Weights: [B, heads, N, K], K = P + ring + focal_window^rank slots: own for each image, head and query; local but
    for the wrap, with pooled sources in front of the grid's.

    Args:
        dim: channels C.
        window_size: places along all axes or each.
        expand_size: how deep the ring is; 0 for none, at most half the window.
        focal_window: pooled windows along each axis, odd; 0 for none.
        num_heads, head_dim: one of them; head_dim 32 where neither is given.
        qkv_bias: whether q, k and v have biases.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *S, C], any S; parameters as `FocalAttention`. The released block holds `pool_layers`, its
        attention all others.

    Cost: 2*N*C^2 + 2*(M + W)*C^2 + 2*W*P*C + 2*N*K*C multiply-adds, M tokens with the zero ones, W windows.

    Raises:
        ValueError: `valid`, since padding would be seen; a ring deeper than half the window; an even focal_window.

    Source: Yang et al., Focal Self-attention for Local-Global Interactions in Vision Transformers, NeurIPS 2021,
    arXiv 2107.00641; microsoft/Focal-Transformer, classification/focal_transformer.py, pool_method "fc",
    focal_level 2.
    Differs from the released code: nothing at images larger than the window. There an image whose shorter side is
    not longer than the window has no ring, and a window cut to that side: build it so, with expand_size=0. It has
    square windows and no sequences, and projects queries of pooled windows, which nobody reads. Only the table of
    the window and the pooling start as there, at zero and with a normal deviate of 0.02.
    """

    examples = (
        "ReleasedFocalAttention(window_size=4, expand_size=2, focal_window=3, num_heads=4)",
        "ReleasedFocalAttention(window_size=5, expand_size=1, focal_window=5, num_heads=2, qkv_bias=False)",
        "ReleasedFocalAttention(window_size=7, expand_size=0, focal_window=1, num_heads=4)",
        "ReleasedFocalAttention(window_size=4, expand_size=1, focal_window=3, num_heads=4, rank=1)",
    )

    def __init__(
        self,
        dim: int,
        *,
        window_size: int | Sequence[int] = 7,
        expand_size: int = 3,
        focal_window: int = 7,
        num_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = True,
        rank: int = 2,
    ) -> None:
        super().__init__(
            dim,
            window_size=window_size,
            expand_size=expand_size,
            focal_window=focal_window,
            num_heads=num_heads,
            head_dim=head_dim,
            qkv_bias=qkv_bias,
            rank=rank,
            ring_once=False,
        )
        nn.init.zeros_(self.relative_position_bias_table)
        if focal_window:
            nn.init.trunc_normal_(self.pool_layers[0].weight, std=0.02)  # type: ignore[arg-type]

    def values(self, source: Tensor) -> Tensor:
        return self.heads(self.sources(self._padded(source), None), 2)

    def scores(self, x: Tensor, *, queries: Tensor | None = None) -> dict[str, Tensor]:
        index, place = self.rows(self._table(x), x.shape[1:-1], queries)
        terms = self.terms(x, self.sources(self._padded(x), None), index, place, queries)
        return {**terms, "outside": _outside(index, x.dtype)[:, None]}

    def weights(self, x: Tensor, *, valid: Tensor | None = None, queries: Tensor | None = None) -> Aggregation:
        self._refuse(valid)
        grid = x.shape[1:-1]
        index, _ = self.rows(self._table(x), grid, queries)
        weights = sum_of(self._scores(x, queries=queries)).softmax(-1)
        return self.aggregation(weights, index, grid, self._whole(grid), queries)

    def fast(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        self._refuse(valid)
        table = self._table(x)
        return self.by_window(x, self.sources(self._padded(x), None), table, _outside(table, x.dtype))

    def unsupported(self, x: Tensor, *, valid: Tensor | None = None) -> str | None:
        self._refuse(valid)
        return None

    def macs(self, grid: Sequence[int]) -> int:
        return self._macs(math.prod(grid), math.prod(self._whole(grid)), math.prod(self.counts(grid)))

    def _refuse(self, valid: Tensor | None) -> None:
        if valid is not None:
            raise ValueError(
                "ReleasedFocalAttention: valid was given, the released code lets padding be seen; use FocalAttention"
            )

    def _whole(self, grid: Sequence[int]) -> tuple[int, ...]:
        """The grid continued to full windows."""
        return tuple(m * w for m, w in zip(self.counts(grid), self._window, strict=True))

    def _padded(self, x: Tensor) -> Tensor:
        grid = x.shape[1:-1]
        more = [p - n for p, n in zip(self._whole(grid), grid, strict=True)]
        return nn.functional.pad(x, (0, 0, *(m for end in reversed(more) for m in (0, end))))

    def _table(self, x: Tensor) -> Tensor:
        """[1, W, K]: the source of each slot; -1 for pooled windows outside the grid."""
        return self.table(self._whole(x.shape[1:-1]), x.device, wrap=True)[None]


def _outside(index: Tensor, dtype: torch.dtype) -> Tensor:
    return torch.zeros_like(index, dtype=dtype).masked_fill(index < 0, OUTSIDE)
