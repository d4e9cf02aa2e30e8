"""Focal attention: fine near the query's window, coarse further away."""

import math
from collections.abc import Sequence

from torch import Tensor

from glocal.aggregation import Aggregation
from glocal.mixers._attention import mask_bias, masked_softmax, sum_of
from glocal.mixers._focal import FocalWindows
from glocal.mixers._grid import pick


class FocalAttention(FocalWindows):
    """Focal self-attention: a window sees its tokens, a ring of tokens around it and pooled windows, in one softmax.

    A = softmax(q k^T / sqrt(D) + B) over sources of three kinds: the P tokens of the query's window; the tokens up
    to expand_size around it; focal_window windows along each axis, each pooled to one token, the query's own window
    in the middle. A window is pooled by one learned weight for each place, the same for all channels; q, k and v
    are one projection for tokens and pooled tokens alike. What lies outside the grid is not seen.

    Weights: [B, heads, N, K], K = P + ring + focal_window^rank slots: own for each image, head and query; local,
    with pooled sources in front of the grid's.

    Args:
        dim: channels C.
        window_size: places along all axes or each.
        expand_size: how deep the ring is; 0 for none, at most half the window.
        focal_window: pooled windows along each axis, odd; 0 for none.
        num_heads, head_dim: one of them; head_dim 32 where neither is given.
        qkv_bias: whether q, k and v have biases.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *S, C], any S: windows at the end may be filled in part, their missing tokens pool as
        zeros. Padding is a missing token, of any shape; a window without any real token is not seen.
        `pool_layers.0.weight` [1, P]; `relative_position_bias_table` [prod(2*window_size - 1), heads] as
        `WindowAttention`; `relative_position_bias_table_to_neighbors` [1, heads, P, R], R the released code's ring
        of 132 for a window of 7 and a ring of 3, where 12 tokens stand twice: such a token is seen once, with the
        first of its two entries; `relative_position_bias_table_to_windows.0`
        [heads, prod(window_size + focal_window - 1)], row (dy + f//2) * (w + f - 1) + dx + f//2 for place - window.

    Cost: 2*N*C^2 + 2*(N + W)*C^2 + 2*W*P*C + 2*N*K*C multiply-adds, W windows.

    Raises:
        ValueError: a ring deeper than half the window, which would have holes; an even focal_window.

    Source: Yang et al., Focal Self-attention for Local-Global Interactions in Vision Transformers, NeurIPS 2021,
    arXiv 2107.00641, section 3.2 (two focal levels); parameter names from the released code.
    Differs from the paper: grids that are no multiple of the window are defined; there is one level of pooled
    windows, as in all released models. `ReleasedFocalAttention` is what the released code computes: there the ring
    wraps around the image, its double tokens count twice, and missing tokens are seen as zeros.
    """

    examples = (
        "FocalAttention(window_size=4, expand_size=2, focal_window=3, num_heads=4)",
        "FocalAttention(window_size=(5, 3), expand_size=1, focal_window=5, num_heads=2, qkv_bias=False)",
        "FocalAttention(window_size=4, expand_size=0, focal_window=3, num_heads=4)",
        "FocalAttention(window_size=5, expand_size=1, focal_window=0, num_heads=4)",
        "FocalAttention(window_size=5, expand_size=2, focal_window=3, num_heads=4, rank=1)",
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
            ring_once=True,
        )

    def values(self, source: Tensor, *, valid: Tensor | None = None) -> Tensor:
        values = self.heads(self.sources(source, valid), 2)
        return values if valid is None else values.masked_fill(~self.real(valid)[..., None, None], 0)

    def scores(self, x: Tensor, *, valid: Tensor | None = None, queries: Tensor | None = None) -> dict[str, Tensor]:
        index, place = self.rows(self._seen(x, valid), x.shape[1:-1], queries)
        return self.terms(x, self.sources(x, valid), index, place, queries)

    def weights(self, x: Tensor, *, valid: Tensor | None = None, queries: Tensor | None = None) -> Aggregation:
        grid = x.shape[1:-1]
        index, _ = self.rows(self._seen(x, valid), grid, queries)
        weights = masked_softmax(sum_of(self._scores(x, valid=valid, queries=queries)), index[:, None] >= 0)
        return self.aggregation(weights, index, grid, grid, queries)

    def fast(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        seen = self._seen(x, valid)
        return self.by_window(x, self.sources(x, valid), seen, mask_bias(seen >= 0, x.dtype))

    def macs(self, grid: Sequence[int]) -> int:
        return self._macs(math.prod(grid), math.prod(grid), math.prod(self.counts(grid)))

    def _seen(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """[B|1, W, K]: the source of each slot; -1 outside the grid and where nothing is real."""
        table = self.table(x.shape[1:-1], x.device, wrap=False)[None]
        if valid is None:
            return table
        real = pick(self.real(valid), table.clamp(min=0))
        return table.masked_fill(~real, -1)
