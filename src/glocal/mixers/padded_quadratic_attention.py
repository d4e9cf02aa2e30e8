"""Attention to places of a padded grid by their squared distance from a centre."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation
from glocal.arguments import flag
from glocal.mixers._padded import Chosen, PaddedAttention
from glocal.mixers._positional import precise


class PaddedQuadraticAttention(PaddedAttention):
    """A convolution as attention: heads that look at a centre each, in a softmax over the grid and its padding.

    A = softmax(-spread^2 / 2 * |place - query - centre|^2) over all places of the grid extended by the padding, query
    o at o * stride. It starts with one head on each tap of the kernel, where with a large spread it is the
    convolution to rounding, borders included; `glocal.to_attention` makes it of one. Weights: [1, K, N, E], E places:
    static, own for each head and query, rows sum to 1. Places of zero padding have the index -1, so rows of `dense()`
    lose what falls outside.

    Args:
        dim: channels C.
        kernel_size: taps along each axis, odd or even, for all axes or each: K heads in all.
        out_dim: channels of the output; dim by default.
        stride, dilation: for all axes or each.
        padding: places in front of and behind each axis, for all or each, or "same".
        groups: values are made within groups of channels only.
        padding_mode: what places of the padding read: "zeros" nothing, "replicate" the nearest source, "reflect"
            the mirrored one, "circular" that of the other end.
        alpha: spread^2 / 2 at the start: a place beside a head's own starts with e^-alpha of its weight. At 20 a
            float32 convolution is exact to rounding, and the gradients of centres and spreads are about e^-20.
        axis_spreads: a spread for each axis.
        bias: added to the output.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *S_out, out_dim], S_out as of torch.nn.Conv2d. `centers` [K, rank], in tokens of x, row
        before column; `spreads` [K], or [K, rank] with axis_spreads; `value` [K, groups, C / groups, out_dim / groups].

    Cost: N*K*C*(E + out_dim / groups) multiply-adds. The fast path takes a softmax along each axis, one after the
    other: for H x W sources and H' x W' queries K*C*H*W*W' and K*H*H'*W' times C, or out_dim where that is less, in
    place of N*K*C*E (a sequence has one axis, of T*T' weights). Heads with equal weights along an axis are mixed once,
    and where every head reads one place to rounding only K*C*out_dim / groups for each query are left: both where
    nobody asks for gradients of centres or spreads, which would be lost.

    Raises:
        ValueError: groups that do not divide both channel counts; "same" with a stride; a grid smaller than the kernel.

    Source: Cordonnier et al., On the Relationship between Self-Attention and Convolutional Layers, ICLR 2020,
    arXiv 1911.03584, theorem 1 and equation 9.
    Differs from the paper: the softmax runs over the padding too, which the paper asks of the input; strides, groups,
    even and rectangular kernels; a spread for each axis. Grids shorter than reflecting or wrapping needs are gone
    through more than once.
    """

    undecayed = ("centers", "spreads")
    examples = (
        "PaddedQuadraticAttention(padding=1, alpha=0.5)",
        "PaddedQuadraticAttention(kernel_size=(2, 3), out_dim=48, stride=2, padding=1, groups=4)",
        "PaddedQuadraticAttention(dilation=2, padding='same', groups=32, padding_mode='reflect', axis_spreads=True)",
        "PaddedQuadraticAttention(kernel_size=4, padding=2, padding_mode='circular', bias=False, rank=1)",
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
        alpha: float = 4.0,
        axis_spreads: bool = False,
        bias: bool = True,
        rank: int = 2,
    ) -> None:
        super().__init__(
            dim, kernel_size=kernel_size, out_dim=out_dim, stride=stride, padding=padding, dilation=dilation,
            groups=groups, padding_mode=padding_mode, bias=bias, rank=rank,
        )  # fmt: skip
        self.alpha, self.axis_spreads = positive_number("alpha", alpha), flag("axis_spreads", axis_spreads)
        self.centers = nn.Parameter(self.taps())
        shape = (self.num_heads, rank) if axis_spreads else (self.num_heads,)
        self.spreads = nn.Parameter(torch.full(shape, math.sqrt(2 * alpha)))

    def weights(self, x: Tensor, *, valid: Tensor | None = None, queries: Tensor | None = None) -> Aggregation:
        return self._over_places(x, valid, queries)

    def precision(self) -> Tensor:
        """The inverse covariance of each head, in tokens of x to the power -2: [K, rank, rank]."""
        spreads = self.spreads if self.axis_spreads else self.spreads[:, None].expand_as(self.centers)
        return torch.diag_embed(spreads.square())

    def _scores_along(self, axis: int, offset: Tensor, heads: Chosen) -> Tensor:
        ones = [1] * offset.dim()
        centre, spread = (precise(p[heads]).view(-1, *ones) for p in self._places(axis).unbind(1))
        return -0.5 * (spread * (offset - centre)).square()

    def _places(self, axis: int) -> Tensor:
        return torch.stack([self.centers[:, axis], self.spreads[:, axis] if self.axis_spreads else self.spreads], 1)

    def _taps_along(self, axis: int, dtype: torch.dtype, places: int) -> list[int] | None:
        found, rounding = [], torch.finfo(dtype).eps / 4
        for centre, spread in self._places(axis).tolist():
            if not math.isfinite(centre):
                return None
            nearest = round(centre)
            # of the places beside the nearest one, half with a factor as that on the far side; together below 4 of it
            least = 0.5 * spread**2 * (1 - 2 * abs(centre - nearest))
            if not 4 * math.exp(-max(least, 0.0)) < rounding and places > 1:
                return None
            found.append(nearest)
        return found


def positive_number(name: str, value: float) -> float:
    """`value` if it is a positive finite number."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < math.inf:
        raise ValueError(f"{name}: {value!r}, must be a positive number")
    return value
