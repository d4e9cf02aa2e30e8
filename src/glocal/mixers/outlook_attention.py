"""Outlook attention: every window predicts how its tokens are mixed, and windows that overlap add up."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import extents, flag, per_axis, positive, resolve_heads
from glocal.mixer import TokenMixer
from glocal.mixers._grid import centre_padding, join, kernel_index, pick_or_zero
from glocal.mixers._library import back, images, out_lengths
from glocal.mixers._overlap import added, cut

# Shape letters: B batch, N tokens, W windows, P places of a window, J windows over a token, G heads.


class OutlookAttention(TokenMixer):
    """Each window's P x P weights come from the mean of its centre alone: softmax(Linear(x)), no q, no k.

    A token collects from all windows that cover it, so its weights sum to their number, its coverage, and not to 1.
    Weights: [B, heads, N, J*P], J windows over a token, P places in each (slots repeat sources): own for each
    image, head and token; local.

    Args:
        dim: channels C.
        kernel_size: places of a window along all axes or each.
        num_heads, head_dim: one of them; head_dim 32 where neither is given.
        stride: tokens from one window to the next, for all axes; weights are predicted from means of stride tokens.
        padding: window w starts at token w * stride - padding, for all axes; smaller than the kernel,
            (kernel_size - 1) // 2 by default.
        qkv_bias: whether `v` has a bias.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *S, C], any S, ceil(S / stride) windows along each axis; zeros outside.
        `v` C -> C, `attn` C -> heads*P*P with a bias, `proj` C -> C. A token under no window gets the bias of `proj`.
        Where `valid` is given, means are over real tokens, and windows with none of them at their centre are
        not there; with a stride, real tokens are a rectangle at the origin.

    Cost: 2*N*C^2 + W*C*heads*P^2 + N*J*P*C multiply-adds, J = prod(ceil(kernel_size / stride)); the fast path's
    last term is W*P^2*C.

    Raises:
        ValueError: heads that do not divide the channels; a padding below zero, or as large as the kernel.

    Source: Yuan et al., VOLO: Vision Outlooker for Visual Recognition, arXiv 2106.13112, section 3.1.
    Differs from the paper: the stride's pooling, the scale (C / heads)^-0.5 and `proj` follow the released code
    (models/volo.py); sizes and paddings at which its unfolding does not give ceil(S / stride) windows are defined
    instead of refused.
    """

    examples = (
        "OutlookAttention(num_heads=4)",
        "OutlookAttention(num_heads=2, stride=2, qkv_bias=True)",
        "OutlookAttention(kernel_size=(2, 4), num_heads=4, stride=3, padding=0)",
        "OutlookAttention(kernel_size=5, num_heads=4, stride=2, rank=1)",
    )

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int | Sequence[int] = 3,
        num_heads: int | None = None,
        head_dim: int | None = None,
        stride: int = 1,
        padding: int | None = None,
        qkv_bias: bool = False,
        rank: int = 2,
    ) -> None:
        super().__init__(dim, rank=rank)
        self.num_heads = resolve_heads(dim, num_heads, head_dim)
        self.kernel_size, self.stride = kernel_size, positive("stride", stride)
        self._kernel = per_axis("kernel_size", kernel_size, rank)
        self.padding, self._left = padding, centre_padding(self._kernel)
        if padding is not None:
            # a window wholly in the padding mixes nothing
            if not isinstance(padding, int) or isinstance(padding, bool) or not 0 <= padding < min(self._kernel):
                raise ValueError(
                    f"padding: {padding!r}, must be a whole number for all axes, 0 or more and smaller than the "
                    f"kernel, {min(self._kernel)}"
                )
            self._left = (padding,) * rank
        self.qkv_bias = flag("qkv_bias", qkv_bias)
        self._places = math.prod(self._kernel)
        self.scale = (dim // self.num_heads) ** -0.5
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.attn = nn.Linear(dim, self.num_heads * self._places**2)
        self.proj = nn.Linear(dim, dim)

    def values(self, source: Tensor) -> Tensor:
        return self.v(source.flatten(1, -2)).unflatten(-1, (self.num_heads, -1))

    def scores(self, x: Tensor, *, valid: Tensor | None = None, queries: Tensor | None = None) -> dict[str, Tensor]:
        logits, _ = self._outlook(x, valid)
        return {"content": self._collect(logits, *self._covering(x.shape[1:-1], queries, x.device))}

    def weights(self, x: Tensor, *, valid: Tensor | None = None, queries: Tensor | None = None) -> Aggregation:
        grid = tuple(x.shape[1:-1])
        logits, there = self._outlook(x, valid)
        window, place = self._covering(grid, queries, x.device)
        reads = kernel_index(grid, self._kernel, stride=self.stride, left=self._left, device=x.device)
        index = torch.where(window[..., None] < 0, -1, reads[window]).flatten(1)  # [N, J*P]
        places = grid_positions(grid, device=x.device)
        return Aggregation(
            self._collect(logits.softmax(-1) * there, window, place),
            index[None, None],
            math.prod(grid),
            places if queries is None else places[queries],
            places,
            grid if queries is None else (len(queries),),
            grid,
        )

    def project(self, mixed: Tensor) -> Tensor:
        return self.proj(mixed)

    def fast(self, x: Tensor, values: Tensor, *, valid: Tensor | None = None) -> Tensor:
        grid, rank = x.shape[1:-1], len(self._kernel)
        # zeros at both ends, so that cutting gives just the windows; fewer than none cut off what no window covers
        ends = [
            (p, (w - 1) * self.stride + k - p - n)
            for n, w, k, p in zip(grid, out_lengths(grid, self.stride), self._kernel, self._left, strict=True)
        ]
        padding = [0, 0, 0, 0, *(end for axis in reversed(ends) for end in axis)]
        padded = nn.functional.pad(values.unflatten(1, grid), padding)
        windows = cut(padded, self._kernel, self.stride)  # [B, *W, G, *K, D]
        shares = self._shares(x, valid).to(values.dtype).flatten(0, 2)
        mixed = torch.bmm(shares, windows.reshape(shares.shape[0], self._places, values.shape[-1])).view(windows.shape)
        out = added(mixed, padded.shape[1 : rank + 1], self.stride)
        return self.proj(nn.functional.pad(out, [-end for end in padding]).flatten(-2))

    def macs(self, grid: Sequence[int]) -> int:
        n, windows = math.prod(grid), math.prod(out_lengths(grid, self.stride))
        slots = self._places * math.prod((k + self.stride - 1) // self.stride for k in self._kernel)
        summed = slots if slots > 1 else 0  # one product is no sum
        return 2 * n * self.dim**2 + windows * self.dim * self.num_heads * self._places**2 + n * summed * self.dim

    def _shares(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """[B, W, G, P, P] weights of each window, without an index table where all tokens are real."""
        if valid is not None:
            logits, there = self._outlook(x, valid)
            return logits.softmax(-1) * there
        mean = x
        if self.stride > 1:  # of a sequence, too: an image of one row, whose windows count what they have
            mean = back(nn.functional.avg_pool2d(images(x), self.stride, ceil_mode=True), len(self._kernel))
        logits = self._logits(mean.flatten(1, -2))
        # over its last axis, of few entries, PyTorch's softmax takes ten times as long
        return logits.flatten(2, 3).transpose(2, 3).softmax(2).transpose(2, 3).unflatten(2, logits.shape[2:4])

    def _logits(self, mean: Tensor) -> Tensor:
        """[B, W, C] -> [B, W, G, P, P] scores."""
        return (self.attn(mean) * self.scale).unflatten(-1, (self.num_heads, self._places, self._places))

    def _outlook(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
        """[B, W, G, P, P] scores of each window, and whether it is there, [B|1, W, 1, 1, 1] of 0 and 1."""
        grid, rank = x.shape[1:-1], len(self._kernel)
        block = kernel_index(grid, (self.stride,) * rank, stride=self.stride, left=(0,) * rank, device=x.device)[None]
        counted = block >= 0  # [1, W, stride ** rank]
        tokens = x.flatten(1, -2)
        if valid is not None:
            if self.stride > 1:
                extents(valid)  # blocks of tokens are cut from the origin; refuses images that do not start there
            real = valid.flatten(1)
            counted, tokens = pick_or_zero(real, block), tokens.masked_fill(~real[..., None], 0)
        count = counted.sum(-1)
        mean = pick_or_zero(tokens, block).sum(2) / count.clamp(min=1)[..., None].to(x.dtype)
        logits = self._logits(mean)
        return logits, (count > 0).to(logits.dtype)[..., None, None, None]

    def _covering(self, grid: Sequence[int], queries: Tensor | None, device: torch.device) -> tuple[Tensor, Tensor]:
        """[N, J] windows over each token, -1: none, and the token's place in each."""
        windows, places = [], []
        for n, kernel, left in zip(grid, self._kernel, self._left, strict=True):
            token = torch.arange(n, device=device)[:, None] + left
            back_by = torch.arange((kernel + self.stride - 1) // self.stride, device=device)
            window, place = token // self.stride - back_by, token % self.stride + back_by * self.stride
            covers = (place < kernel) & (window >= 0) & (window < (n + self.stride - 1) // self.stride)
            windows.append(torch.where(covers, window, -1))
            places.append(torch.where(covers, place, -1))
        window, place = join(windows, out_lengths(grid, self.stride)), join(places, self._kernel)
        return (window, place) if queries is None else (window[queries], place[queries])

    def _collect(self, rows: Tensor, window: Tensor, place: Tensor) -> Tensor:
        """Each token's row of each window over it: [B, W, G, P, P] -> [B, G, N, J*P], zeros for no window."""
        rows = rows.transpose(2, 3).flatten(1, 2)  # [B, W*P, G, P]
        row = torch.where(window < 0, -1, window * self._places + place)
        return pick_or_zero(rows, row[None]).permute(0, 3, 1, 2, 4).flatten(3)
