"""Sines and cosines of places: no parameters, any length.

Shape letters: B batch, P tokens in front, H W or T grid, C channels.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from glocal.arguments import flag, one_of, positive
from glocal.positions._tokens import read, steps, written

Layout = Literal["interleaved", "halves"]
Frequencies = Literal["vaswani", "fairseq"]

COUNTED_FROM_ZERO = 1e-6  # of a row without real tokens, whose count is 0: DETR divides by the count plus this


def sinusoids(
    places: Tensor,
    dim: int,
    *,
    layout: Layout = "interleaved",
    frequencies: Frequencies = "vaswani",
    temperature: float = 10000.0,
) -> Tensor:
    """Sines and cosines of coordinates, [...] -> [..., dim]: what every sinusoidal encoding is made of.

    Args:
        places: coordinates of any shape, whole or not.
        dim: channels, even.
        layout: "interleaved", sine and cosine of each frequency side by side (Vaswani et al., DETR), or "halves",
            first all sines, then all cosines (tensor2tensor, fairseq, Transformer-XL).
        frequencies: "vaswani", temperature^(-i / (dim/2)) for i = 0, ..., dim/2 - 1; or "fairseq",
            temperature^(-i / (dim/2 - 1)), which ends at exactly 1 / temperature.
        temperature: the longest wavelength over 2 pi.

    Returns:
        [..., dim] in float32, or in float64 for places in float64; large angles have no sines in 16 bits.

    Raises:
        ValueError: an odd dim, or fewer than 4 channels by fairseq's rule, which divides by dim/2 - 1.
    """
    _check(dim, 2, layout, frequencies, temperature)
    half = dim // 2
    dtype = torch.promote_types(places.dtype, torch.float32)
    share = torch.arange(half, device=places.device).to(dtype) / (half if frequencies == "vaswani" else half - 1)
    angle = places[..., None] * temperature**-share
    both = angle.sin(), angle.cos()
    return torch.stack(both, -1).flatten(-2) if layout == "interleaved" else torch.cat(both, -1)


class SinusoidalPositions1d(nn.Module):
    """The Transformer's fixed encoding of places in a sequence, to be added to tokens or to queries and keys.

    Args:
        dim: channels C, even.
        layout: "interleaved" or "halves", see `sinusoids`.
        frequencies: "vaswani" or "fairseq", see `sinusoids`.
        temperature: the longest wavelength over 2 pi.

    Shape:
        x [B, T, C] -> [1, T, C] in x's dtype, computed in float32. Places are `offset`, `offset` + 1, ...: a step of
        decoding names how many tokens came before, an int or one for each sequence [B]. With `valid` [B, T] only real
        tokens count, so a sentence gets the same whichever end is padded, and padding gets zeros: [B, T, C]. With
        `grid` (T,), x [B, P + T, C] has class tokens in front, which get zeros.

    Cost: no multiply-adds; T*C sines.

    Raises:
        ValueError: an odd dim, or fewer than 4 channels by fairseq's rule.

    Source: Vaswani et al., Attention Is All You Need, NeurIPS 2017, arXiv 1706.03762, section 3.5.
    Differs from the paper: nothing by default. fairseq's is layout="halves", frequencies="fairseq", as in
    tensor2tensor, and it calls the first token 2 (the padding symbol's number and one more): offset=2; it pads an odd
    dim with a zero, which is refused here.
    """

    def __init__(
        self,
        dim: int,
        *,
        layout: Layout = "interleaved",
        frequencies: Frequencies = "vaswani",
        temperature: float = 10000.0,
    ) -> None:
        super().__init__()
        _check(dim, 2, layout, frequencies, temperature)
        self.dim, self.layout, self.frequencies, self.temperature = dim, layout, frequencies, temperature

    def forward(
        self,
        x: Tensor,
        *,
        grid: Sequence[int] | None = None,
        valid: Tensor | None = None,
        offset: int | Tensor = 0,
    ) -> Tensor:
        tokens = read(self, x, self.dim, 1, grid, valid)
        places = steps(tokens.grid[0], offset, tokens.valid, x.device).to(_at_least_float32(x))
        encoding = sinusoids(
            places, self.dim, layout=self.layout, frequencies=self.frequencies, temperature=self.temperature
        )
        if tokens.valid is not None:
            encoding = encoding.masked_fill(~tokens.valid[..., None], 0)
        return written(encoding, tokens, x)

    def extra_repr(self) -> str:
        return f"{self.dim}, layout={self.layout!r}, frequencies={self.frequencies!r}, temperature={self.temperature:g}"


class SinusoidalPositions2d(nn.Module):
    """DETR's fixed encoding of places in an image: C/2 channels for the row, then C/2 for the column.

    Args:
        dim: channels C, a multiple of 4.
        normalize: rows and columns are counted in shares of the image, from 0 to `scale`; False: 1, 2, 3, ...
        scale: the last row's and column's number if normalised.
        temperature: the longest wavelength over 2 pi.

    Shape:
        x [B, H, W, C] -> [1, H, W, C] in x's dtype, computed in float32. With `valid` [B, H, W] each pixel counts the
        real ones above it and to its left, itself included, so an image gets the same alone as padded: [B, H, W, C].
        With `grid` (H, W), x [B, P + H*W, C] has class tokens in front, which get zeros.

    Cost: no multiply-adds; (H + W)*C/2 sines, with `valid` B*H*W*C.

    Raises:
        ValueError: channels that are no multiple of 4.

    Source: Carion et al., End-to-End Object Detection with Transformers (DETR), ECCV 2020, arXiv 2005.12872;
    normalisation and mask from the released code (models/position_encoding.py).
    Differs from the paper: nothing; the released class does not normalise unless asked, its models ask.
    """

    def __init__(
        self, dim: int, *, normalize: bool = True, scale: float = 2 * math.pi, temperature: float = 10000.0
    ) -> None:
        super().__init__()
        _check(dim, 4, "interleaved", "vaswani", temperature)
        self.dim, self.normalize = dim, flag("normalize", normalize)
        self.scale, self.temperature = scale, temperature

    def forward(self, x: Tensor, *, grid: Sequence[int] | None = None, valid: Tensor | None = None) -> Tensor:
        tokens = read(self, x, self.dim, 2, grid, valid)
        height, width = tokens.grid
        dtype = _at_least_float32(x)
        if tokens.valid is None:  # all columns count the same, so do all rows
            row = torch.arange(1, height + 1, device=x.device).to(dtype)[None, :, None]
            column = torch.arange(1, width + 1, device=x.device).to(dtype)[None, None]
        else:
            row, column = (tokens.valid.cumsum(axis).to(dtype) for axis in (1, 2))
        if self.normalize:
            row = row / (row[:, -1:] + COUNTED_FROM_ZERO) * self.scale
            column = column / (column[:, :, -1:] + COUNTED_FROM_ZERO) * self.scale
        each = [sinusoids(place, self.dim // 2, temperature=self.temperature) for place in (row, column)]
        return written(torch.cat([e.expand(-1, height, width, -1) for e in each], -1), tokens, x)

    def extra_repr(self) -> str:
        return f"{self.dim}, normalize={self.normalize}, scale={self.scale:g}, temperature={self.temperature:g}"


def _at_least_float32(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _check(dim: int, parts: int, layout: str, frequencies: str, temperature: float) -> None:
    positive("dim", dim)
    if dim % parts:
        kind = "sines and cosines" if parts == 2 else "rows and columns, each with sines and cosines"
        raise ValueError(f"dim: {dim} channels cannot be shared by {kind}; give a multiple of {parts}")
    one_of("layout", layout, ("interleaved", "halves"))
    one_of("frequencies", frequencies, ("vaswani", "fairseq"))
    if frequencies == "fairseq" and dim < 4:
        raise ValueError(f"dim: {dim}, frequencies='fairseq' divides by dim/2 - 1; give at least 4 channels")
    if not temperature > 0:
        raise ValueError(f"temperature: {temperature!r}, must be positive")
