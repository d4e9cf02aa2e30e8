"""Attention to places of a padded grid by learned scores of row and column offsets."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation
from glocal.mixers._padded import Chosen, PaddedAttention
from glocal.mixers._positional import precise
from glocal.mixers.padded_quadratic_attention import positive_number


class PaddedLearnedAttention(PaddedAttention):
    """A convolution as attention: heads with a learned score for each offset, in a softmax over grid and padding.

    A = softmax(rows[place - query] + columns[place - query]) over all places of the grid extended by the padding, query
    o at o * stride. It starts with one head on each tap of the kernel, where with a large alpha it is the convolution
    to rounding, borders included; `glocal.to_attention` makes it of one. Weights: [1, K, N, E], E places: static, own
    for each head and query, rows sum to 1. Places of zero padding have the index -1, so rows of `dense()` lose what
    falls outside.

    Args:
        dim: channels C.
        kernel_size: taps along each axis, odd or even, for all axes or each: K heads in all.
        out_dim: channels of the output; dim by default.
        stride, dilation: for all axes or each.
        padding: places in front of and behind each axis, for all or each, or "same".
        groups: values are made within groups of channels only.
        padding_mode: what places of the padding read: "zeros" nothing, "replicate" the nearest source, "reflect"
            the mirrored one, "circular" that of the other end.
        alpha: score of a head's own tap at the start, along each axis; others have 0.
        bias: added to the output.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *S_out, out_dim], S_out as of torch.nn.Conv2d. `tables` holds one for each axis, [K, L + 2]:
        scores of the L offsets that the kernel spans, in order, between those of all before and of all behind.
        `value` [K, groups, C / groups, out_dim / groups].

    Cost: as `PaddedQuadraticAttention`.

    Raises:
        ValueError: groups that do not divide both channel counts; "same" with a stride; a grid smaller than the kernel.

    Source: Cordonnier et al., On the Relationship between Self-Attention and Convolutional Layers, ICLR 2020,
    arXiv 1911.03584, section 4; far offsets share a score as in Shaw et al., NAACL 2018, arXiv 1803.02155, section 3.2.
    Differs from the paper: scores themselves are learned, not embeddings and their keys; the softmax runs over the
    padding too.
    """

    undecayed = ("tables",)
    examples = (
        "PaddedLearnedAttention(padding=1)",
        "PaddedLearnedAttention(kernel_size=(2, 3), out_dim=48, stride=2, padding=1, groups=4, alpha=1.0)",
        "PaddedLearnedAttention(kernel_size=3, dilation=2, padding='same', padding_mode='replicate', rank=1)",
    )

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int | Sequence[int] = 3,
        out_dim: int | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        alpha: float = 6.0,
        bias: bool = True,
        rank: int = 2,
    ) -> None:
        super().__init__(
            dim, kernel_size=kernel_size, out_dim=out_dim, stride=stride, padding=padding, dilation=dilation,
            groups=groups, padding_mode=padding_mode, bias=bias, rank=rank,
        )  # fmt: skip
        self.alpha = positive_number("alpha", alpha)
        taps, self.tables = self.taps().long(), nn.ParameterList()
        for axis, reach in enumerate(self._reach):
            table = torch.zeros(self.num_heads, reach + 3)
            entry = taps[:, axis] - self._lowest(axis)
            self.tables.append(nn.Parameter(table.scatter(1, entry[:, None], float(alpha))))

    def _lowest(self, axis: int) -> int:
        """The offset of a table's first entry, which is that of all lower ones too."""
        return -self._sides[axis][0] - 1

    def weights(self, x: Tensor, *, valid: Tensor | None = None, queries: Tensor | None = None) -> Aggregation:
        return self._over_places(x, valid, queries)

    def _scores_along(self, axis: int, offset: Tensor, heads: Chosen) -> Tensor:
        table = precise(self.tables[axis])[heads]
        return table[:, (offset - self._lowest(axis)).clamp(0, table.shape[1] - 1)]

    def _places(self, axis: int) -> Tensor:
        return self.tables[axis]

    def _taps_along(self, axis: int, dtype: torch.dtype, places: int) -> list[int] | None:
        found, rounding = [], torch.finfo(dtype).eps / 4
        for scores in self.tables[axis].tolist():
            own = max(range(len(scores)), key=scores.__getitem__)
            shares = [math.exp(score - scores[own]) for score in scores]
            # the two ends stand for every place further away
            elsewhere = sum(shares[1:-1]) - 1 + places * (shares[0] + shares[-1])
            if not elsewhere < rounding:
                return None
            found.append(own + self._lowest(axis))
        return found
