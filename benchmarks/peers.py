"""What a user has today for each operator, one function each, and how each wants its tensors.

Tensors of a case are glocal's: tokens x [B, *S, C], taps w [B or 1, *S or 1 each, G, K**rank], heads q, k, v
[B, N, G, D]. A peer has them in the form that suits it (`prepare`), as in a network written around it.
Shape letters: B batch, S grid, H W T its axes, C channels, G groups (heads), K kernel, N tokens, D channels of a head.
"""

import math
from collections.abc import Callable, Sequence
from itertools import product

import torch
from timing import Call
from torch import Tensor, nn
from torch.nn import functional as F

LAST = "conv2d, channels last"
FIRST = "conv2d, NCHW"


def planes(tokens: Tensor) -> Tensor:
    """[B, H, W, C] -> [B, C, H, W] in memory."""
    return tokens.movedim(-1, 1).contiguous()


def tokens_of(out: Tensor) -> Tensor:
    return out.movedim(1, -1)


# Sums with static kernels


def static_convolutions(channels: int, kernel: int) -> dict[str, Call]:
    """The library's depthwise convolution in each memory layout; w [1, 1, 1, C, K * K]."""

    def convolve(x: Tensor, w: Tensor) -> Tensor:
        return F.conv2d(x, w, padding=kernel // 2, groups=channels)

    def taps(w: Tensor) -> Tensor:
        return w.reshape(channels, 1, kernel, kernel)

    return {
        FIRST: Call(convolve, lambda x, w: (planes(x), taps(w)), tokens_of),
        LAST: Call(convolve, lambda x, w: (x.movedim(-1, 1), taps(w)), tokens_of),
    }


def static_yardsticks(channels: int, kernel: int) -> dict[str, Call]:
    """The same beside an operator whose kernels are not static; they have kernels of their own."""
    w = torch.randn(channels, 1, kernel, kernel)

    def prepared(layout: Callable[[Tensor], Tensor]) -> Callable[..., Sequence[Tensor]]:
        return lambda x, _: (layout(x), w.to(x.dtype))

    layouts = {FIRST: planes, LAST: lambda x: x.movedim(-1, 1)}
    return {
        f"static {name}": Call(call.function, prepared(layouts[name]), yardstick=True)
        for name, call in static_convolutions(channels, kernel).items()
    }


# Sums with any kernels


def unfolded(x: Tensor, w: Tensor) -> Tensor:
    """[B, C, H, W] by kernels [B|1, G, K*K, H|1, W|1], as in the released code of involution and of I-D-DW."""
    kernel, (batch, channels, height, width) = math.isqrt(w.shape[2]), x.shape
    columns = F.unfold(x, kernel, padding=kernel // 2)
    columns = columns.view(batch, w.shape[1], channels // w.shape[1], kernel**2, height, width)
    return (w.unsqueeze(2) * columns).sum(3).view(x.shape)


UNFOLD = Call(unfolded, lambda x, w: (planes(x), w.permute(0, 3, 4, 1, 2).contiguous()), tokens_of)


def shifted(x: Tensor, w: Tensor) -> Tensor:
    """A shifted view of the padded tokens times its weight, one tap after the other."""
    rank = x.dim() - 2
    kernel = round(w.shape[-1] ** (1 / rank))
    padded = F.pad(x, (0, 0) + (kernel // 2,) * (2 * rank)).unflatten(-1, (w.shape[-2], -1))
    out = torch.zeros_like(x).unflatten(-1, (w.shape[-2], -1))
    for tap, start in enumerate(product(range(kernel), repeat=rank)):
        view = padded[(slice(None), *(slice(s, s + n) for s, n in zip(start, x.shape[1:-1], strict=True)))]
        out = out + view * w[..., tap, None]
    return out.flatten(-2)


SHIFT = Call(shifted)


def compiled_shift() -> Call:
    return Call(torch.compile(shifted, dynamic=False))


def grouped_convolutions(batch: int, channels: int, kernel: int) -> dict[str, Call]:
    """Kernels of each image by one convolution of B * C groups; w [B, 1, 1, C, K * K]."""

    def convolve(x: Tensor, w: Tensor) -> Tensor:
        out = F.conv2d(x.reshape(1, -1, *x.shape[2:]), w, padding=kernel // 2, groups=batch * channels)
        return out.view(x.shape)

    def taps(w: Tensor) -> Tensor:
        return w.reshape(-1, 1, kernel, kernel)

    return {
        "conv2d of B*C groups, NCHW": Call(convolve, lambda x, w: (planes(x), taps(w)), tokens_of),
        "conv2d of B*C groups, tokens": Call(convolve, lambda x, w: (x.movedim(-1, 1), taps(w)), tokens_of),
    }


# Sums over sequences: x [B, T, C], w [B, T, G, K]


def line_unfolded(x: Tensor, w: Tensor) -> Tensor:
    """Views of K tokens times the kernels, and their sum."""
    kernel, groups = w.shape[-1], w.shape[-2]
    views = F.pad(x, (0, 0, kernel // 2, kernel // 2)).unfold(1, kernel, 1).unflatten(2, (groups, -1))
    return (views * w.unsqueeze(-2)).sum(-1).flatten(2)


def line_products(x: Tensor, w: Tensor) -> Tensor:
    """The same as matrix products, as in fairseq's DynamicConv1d."""
    kernel, groups = w.shape[-1], w.shape[-2]
    views = F.pad(x, (0, 0, kernel // 2, kernel // 2)).unfold(1, kernel, 1).unflatten(2, (groups, -1))
    return (views.flatten(0, 2) @ w.flatten(0, 2).unsqueeze(-1)).view(x.shape)


def line_columns(x: Tensor, w: Tensor) -> Tensor:
    """[B, C, 1, T] by [B, G, K, T], by F.unfold."""
    (batch, channels, _, length), (groups, kernel) = x.shape, w.shape[1:3]
    columns = F.unfold(x, (1, kernel), padding=(0, kernel // 2)).view(batch, groups, channels // groups, kernel, length)
    return (columns * w.unsqueeze(2)).sum(3).view(x.shape)


LINE_UNFOLDS = {
    "unfold, multiply and sum": Call(line_unfolded),
    "unfold, matrix products": Call(line_products),
    "F.unfold": Call(
        line_columns,
        lambda x, w: (planes(x.unsqueeze(1)), w.permute(0, 2, 3, 1).contiguous()),
        lambda out: out.squeeze(2).movedim(1, -1),
    ),
}


# Neighborhood attention: q, k, v [B, N, G, D], q scaled; rpb [G, 2K - 1, 2K - 1], entry source - query + K - 1


def neighborhood_unfolded(grid: Sequence[int], kernel: int) -> Call:
    """Views of all neighbors, einsum, softmax, einsum."""
    inside = F.pad(torch.ones(*grid), (kernel // 2,) * 4).unfold(0, kernel, 1).unfold(1, kernel, 1)
    outside = (inside == 0)[None, :, :, None]

    def views(tokens: Tensor) -> Tensor:
        padded = F.pad(tokens.unflatten(1, grid), (0, 0, 0, 0) + (kernel // 2,) * 4)
        return padded.unfold(1, kernel, 1).unfold(2, kernel, 1)

    def attend(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> Tensor:
        near = slice(kernel // 2, kernel // 2 + kernel)
        scores = torch.einsum("bhwgd,bhwgdij->bhwgij", q.unflatten(1, grid), views(k)) + rpb[:, near, near]
        weights = scores.masked_fill(outside, -torch.inf).flatten(-2).softmax(-1).view_as(scores)
        return torch.einsum("bhwgij,bhwgdij->bhwgd", weights, views(v)).flatten(1, 2)

    return Call(attend)


def neighborhood_masked(grid: Sequence[int], kernel: int) -> Call:
    """Dense library attention with an N x N bias: the table's entry where near, minus infinity elsewhere."""
    place = torch.cartesian_prod(*(torch.arange(n) for n in grid))
    offset = place - place[:, None]  # source - query
    far = (offset.abs() > kernel // 2).any(-1)
    entry = (offset + kernel - 1).clamp(0, 2 * kernel - 2)
    entry = entry[..., 0] * (2 * kernel - 1) + entry[..., 1]

    def attend(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> Tensor:
        bias = rpb.flatten(1)[:, entry].masked_fill(far, -torch.inf)
        return by_head(q, k, v, bias)

    return Call(attend)


def by_head(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None = None) -> Tensor:
    """Library attention on [B, N, G, D]."""
    heads = (t.transpose(1, 2) for t in (q, k, v))
    return F.scaled_dot_product_attention(*heads, attn_mask=bias, scale=1.0).transpose(1, 2)


def dense(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """Attention to everything without a bias."""
    return by_head(q, k, v)


# a yardstick: it computes something else; the table takes no part
DENSE = Call(dense, lambda q, k, v, table: (q, k, v, torch.zeros(1, dtype=torch.int64)), yardstick=True)


def neighborhood_natten(grid: Sequence[int], kernel: int) -> Call:
    """NATTEN's fused attention, which has no bias and moves neighborhoods at the border inward."""
    from natten import na2d

    def attend(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> Tensor:
        return na2d(*(t.unflatten(1, grid) for t in (q, k, v)), kernel_size=kernel, scale=1.0).flatten(1, 2)

    return Call(attend, DENSE.prepare, yardstick=True, forward_only=True)


def neighborhood_flex(grid: Sequence[int], kernel: int) -> Call:
    """FlexAttention, compiled, with a block mask and the bias as a function of the score; no backward on a CPU.

    On the default device, as all that peers hold.
    """
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    width = grid[1]

    def near(b: Tensor, h: Tensor, query: Tensor, source: Tensor) -> Tensor:
        down, right = source // width - query // width, source % width - query % width
        return (down.abs() <= kernel // 2) & (right.abs() <= kernel // 2)

    tokens = math.prod(grid)
    device = torch.get_default_device()
    mask = create_block_mask(near, None, None, tokens, tokens, device=device)

    def attend(q: Tensor, k: Tensor, v: Tensor, rpb: Tensor) -> Tensor:
        def biased(score: Tensor, b: Tensor, h: Tensor, query: Tensor, source: Tensor) -> Tensor:
            down = (source // width - query // width + kernel - 1).clamp(0, 2 * kernel - 2)
            right = (source % width - query % width + kernel - 1).clamp(0, 2 * kernel - 2)
            return score + rpb[h, down, right]

        heads = (t.transpose(1, 2) for t in (q, k, v))
        return flex_attention(*heads, score_mod=biased, block_mask=mask, scale=1.0).transpose(1, 2)

    return Call(torch.compile(attend, dynamic=False), forward_only=device.type == "cpu")


# Global attention with a bias for each offset: table [G, 2H - 1, 2W - 1], entry query - source + n - 1


def relative_masked(grid: Sequence[int]) -> Call:
    """Library attention with the N x N bias that a table of offsets gives, looked up as in Swin and timm."""
    place = torch.cartesian_prod(*(torch.arange(n) for n in grid)).view(-1, len(grid))
    offset = place[:, None] - place + torch.tensor(grid) - 1
    entry = offset[..., 0]
    for axis, n in enumerate(grid[1:], start=1):
        entry = entry * (2 * n - 1) + offset[..., axis]
    return Call(lambda q, k, v, table: by_head(q, k, v, table.flatten(1)[:, entry]))


# Heads whose weights are a product along each axis: x [B, H, W, C], rows [G, H, H], columns [G, W, W]; [B, H, W, G, C]


def by_axes(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """A product along each axis."""
    by_row = torch.einsum("gjl,bklc->bkjgc", columns, x)
    return torch.einsum("gik,bkjgc->bijgc", rows, by_row)


def by_pairs(x: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """One product with the weights of all pairs of tokens, which are the same in all images."""
    pairs = torch.einsum("gik,gjl->ijgkl", rows, columns)
    return (pairs.flatten(0, 2).flatten(1) @ x.flatten(1, 2)).view(*x.shape[:3], len(rows), -1)


def separable(compiled: bool) -> dict[str, Call]:
    calls = {"einsum for each axis": Call(by_axes), "N x N weights": Call(by_pairs)}
    if compiled:
        calls |= {f"{name}, compiled": Call(torch.compile(c.function, dynamic=False)) for name, c in calls.items()}
    return calls


# timm's modules


def timm_window(grid: Sequence[int], channels: int, heads: int, window: int, shift: int, fused: bool) -> nn.Module:
    from timm.models.swin_transformer import SwinTransformerBlock

    block = SwinTransformerBlock(channels, tuple(grid), heads, window_size=window, shift_size=shift)
    block.attn.fused_attn = fused
    return block


def timm_window_core(grid: Sequence[int], channels: int, heads: int, window: int, shift: int, fused: bool) -> Call:
    """timm's window attention but for its two projections: everything from shifting the image to shifting it back.

    timm shifts and cuts the tokens before it projects them. Here the queries, as many channels as the tokens have, are
    shifted and cut in their stead, keys and values come in windows.
    """
    from timm.models.swin_transformer import window_partition, window_reverse

    block = timm_window(grid, channels, heads, window, shift, fused)
    attention, mask, area = block.attn, block.attn_mask, window * window

    def cut(tokens: Tensor) -> Tensor:
        image = torch.roll(tokens, (-shift, -shift), (1, 2)) if shift else tokens
        return window_partition(image, (window, window)).view(-1, area, channels)

    def split(cuts: Tensor) -> Tensor:
        return cuts.unflatten(-1, (heads, -1)).transpose(1, 2)

    def attend(q: Tensor, kv: Tensor, table: Tensor) -> Tensor:
        q, (k, v) = split(cut(q)), (split(t) for t in kv.chunk(2, -1))
        bias = table[attention.relative_position_index.view(-1)].view(area, area, -1)
        bias = bias.permute(2, 0, 1).contiguous().unsqueeze(0)
        seen = None if mask is None else mask.to(q.dtype)
        if fused:
            if seen is not None:
                spread = seen.view(1, -1, 1, area, area).expand(q.shape[0] // len(seen), -1, heads, -1, -1)
                bias = bias + spread.reshape(-1, heads, area, area)
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        else:
            scores = q @ k.transpose(-2, -1) + bias
            if seen is not None:
                scores = scores.view(-1, len(seen), heads, area, area) + seen.unsqueeze(1).unsqueeze(0)
                scores = scores.view(-1, heads, area, area)
            out = scores.softmax(-1) @ v
        out = out.transpose(1, 2).reshape(-1, window, window, channels)
        image = window_reverse(out, (window, window), *grid).contiguous()
        return torch.roll(image, (shift, shift), (1, 2)) if shift else image

    def prepare(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> tuple[Tensor, ...]:
        q, k, v = (t.flatten(2).unflatten(1, tuple(grid)) for t in (q, k, v))
        return q, torch.cat([cut(k), cut(v)], -1), table

    return Call(attend, prepare, lambda out: out.flatten(1, 2).unflatten(-1, (heads, -1)))
