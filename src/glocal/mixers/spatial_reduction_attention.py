"""PVT's spatial-reduction attention."""

import math
from collections.abc import Sequence

from torch import Tensor, nn

from glocal.aggregation import Aggregation
from glocal.arguments import per_axis
from glocal.mixers._library import images, out_lengths
from glocal.mixers._reduced_attention import ReducedAttention


class SpatialReductionAttention(ReducedAttention):
    """Every token reads a coarser map: A = softmax(q k^T / sqrt(D)), k and v of cells of R x R tokens.

    A cell becomes one token by a convolution whose kernel and stride are R, and layer norm. R = 1 has neither and
    is self-attention. Weights: [B, heads, N, M], M = prod(ceil(S / R)): own for each image, head and query; dense.

    Args:
        dim: channels C.
        num_heads, head_dim: one of them; head_dim 32 where neither is given.
        sr_ratio: R, tokens of a cell along all axes or each.
        qkv_bias: whether q, k and v have biases.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *S, C], any S. The last cell of an axis that is no multiple of R is filled up with zeros;
        with `valid` each image's are. `q.weight` [C, C], `kv.weight` [2*C, C], `sr.weight` [C, C, *R]
        ([C, C, 1, R] where rank is 1), `norm`, `proj`.

    Cost: 2*N*C^2 + 2*M*C^2 + 2*N*M*C + 2*M*prod(R)*C^2 multiply-adds; the definition forms cells for keys and for
    values, the fast path once.

    Raises:
        ValueError: heads that do not divide the channels.

    Source: Wang et al., Pyramid Vision Transformer, ICCV 2021, arXiv 2102.12122, section 3.3 (spatial-reduction
    attention); biases and layer norm (eps 1e-5) from the released code (classification/pvt.py).
    Differs from the paper: sizes that are no multiple of R are defined; the released code drops the tokens that
    fill no cell, so that nobody reads them.
    """

    examples = (
        "SpatialReductionAttention(num_heads=4)",
        "SpatialReductionAttention(num_heads=2, sr_ratio=(4, 3), qkv_bias=False)",
        "SpatialReductionAttention(num_heads=4, sr_ratio=1)",
        "SpatialReductionAttention(num_heads=4, sr_ratio=3, rank=1)",
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        sr_ratio: int | Sequence[int] = 2,
        qkv_bias: bool = True,
        rank: int = 2,
    ) -> None:
        super().__init__(dim, num_heads=num_heads, head_dim=head_dim, qkv_bias=qkv_bias, rank=rank)
        self.sr_ratio, self._ratio = sr_ratio, per_axis("sr_ratio", sr_ratio, rank)
        rows, columns = (1,) * (2 - rank) + self._ratio
        some = max(self._ratio) > 1
        self.sr = nn.Conv2d(dim, dim, (rows, columns), stride=(rows, columns)) if some else None
        self.norm = nn.LayerNorm(dim) if some else None

    def weights(self, x: Tensor, *, valid: Tensor | None = None, queries: Tensor | None = None) -> Aggregation:
        return self._aggregation_of(x, valid, queries)

    def reduced(self, x: Tensor, valid: Tensor | None) -> Tensor:
        if self.sr is None:
            return x.flatten(1, -2)
        assert self.norm is not None
        x = x if valid is None else x.masked_fill(~valid[..., None], 0)
        return self.norm(self.sr(images(self._filled_up(x))).flatten(2).mT)

    def seen(self, valid: Tensor) -> Tensor:
        cells = self._filled_up(valid[..., None])[..., 0]
        for axis, r in enumerate(self._ratio, start=1):
            cells = cells.unflatten(axis, (-1, r)).any(axis + 1)
        return cells.flatten(1)

    def source_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        return tuple(out_lengths((n,), r)[0] for n, r in zip(grid, self._ratio, strict=True))

    def steps(self, grid: Sequence[int]) -> list[float]:
        return [float(r) for r in self._ratio]

    def _filled_up(self, tokens: Tensor) -> Tensor:
        """[B, *S, C] with zeros at the ends, up to a multiple of R."""
        grid = tokens.shape[1:-1]
        more = [m * r - n for n, m, r in zip(grid, self.source_grid(grid), self._ratio, strict=True)]
        return nn.functional.pad(tokens, (0, 0, *(m for end in reversed(more) for m in (0, end))))

    def _reduction_macs(self, pooled: int) -> int:
        return 0 if self.sr is None else pooled * math.prod(self._ratio) * self.dim**2
