"""The depthwise family by shift-and-sum: one pass over the input for each tap, no copy of it.

Plain PyTorch on views of the padded input, so it differentiates twice, exports, and fuses under torch.compile.
"""

from itertools import product

import torch
from torch import Tensor


def local_sum(x: Tensor, w: Tensor, dilation: int = 1, *, left: int | None = None, past: int = 0) -> Tensor:
    """y[b, i, c] = sum over taps t of w[b, i, g(c), t] * x[b, i + dilation * (t - left), c], zeros outside.

    Args:
        x: [B, *S, C].
        w: [B or 1, *N or 1 each, G, K**rank], taps in raster order; channels c of group g are consecutive,
            G divides C. An axis of size 1 is shared: kernels may be static, per image, or per position.
        dilation: distance between taps.
        left: taps in front of i along every axis; by default the middle of K, which must then be odd. K - 1 makes
            a causal sum.
        past: positions at the start of every axis that are read and have no sum of their own: N = S - past, and y
            begins behind them.

    Returns:
        [B, *N, C]. Sums are taken in float32 or wider.

    Cost: B*N*C*K**rank multiply-adds. Memory: one padded copy of x and one copy of w.

    Raises:
        ValueError: shapes that do not fit, naming both.
    """
    rank, taps = x.dim() - 2, w.shape[-1]
    kernel = round(taps ** (1 / rank))
    if w.dim() != rank + 3 or kernel**rank != taps or (left is None and kernel % 2 == 0):
        raise ValueError(
            f"w: has shape {tuple(w.shape)}, needs [B, {'*S, '}G, K**{rank}] with K odd for x {tuple(x.shape)}"
        )
    left = kernel // 2 if left is None else left
    if not 0 <= left < kernel:
        raise ValueError(f"left: {left}, must be from 0 to {kernel - 1}, so that the kernel of {kernel} covers i")
    if x.shape[-1] % w.shape[-2]:
        raise ValueError(f"w: {w.shape[-2]} groups do not divide the {x.shape[-1]} channels of x")
    wide = torch.promote_types(torch.promote_types(x.dtype, w.dtype), torch.float32)
    margins = (dilation * left - past, dilation * (kernel - 1 - left))  # below 0: cut off
    padded = torch.nn.functional.pad(x.to(wide), (0, 0) + margins * rank).unflatten(-1, (w.shape[-2], -1))
    # taps first: each is then read in order, and unbind gives their gradients back in one piece
    each_tap = w.to(wide).movedim(-1, 0).contiguous().unsqueeze(-1).unbind(0)
    out = None
    for weight, offset in zip(each_tap, product(range(kernel), repeat=rank), strict=True):
        shifted = padded
        for axis, o in enumerate(offset):
            shifted = shifted.narrow(axis + 1, o * dilation, x.shape[axis + 1] - past)
        out = shifted * weight if out is None else torch.addcmul(out, shifted, weight)
    assert out is not None
    return out.flatten(-2).to(torch.promote_types(x.dtype, w.dtype))
