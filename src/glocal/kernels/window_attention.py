"""Self-attention inside windows, plain or shifted, with a bias by offset: windows are read and written in place.

Shape letters: B images, S grid of tokens, C channels, G heads, D channels per head, K places of a window, E entries
of the table.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import register_flop_formula

from glocal.kernels import gpu
from glocal.kernels.compiled import Unavailable, call, load, on_huge_pages, prepare, tangents_wanted


def window_attention(
    qkv: Tensor,
    table: Tensor | None = None,
    *,
    num_heads: int,
    window_size: Sequence[int],
    shift_size: int = 0,
    extents: Tensor | None = None,
    rolled_size: Sequence[int] | None = None,
) -> Tensor:
    """Attention of each token to those in its window: softmax(q k^T / sqrt(D) + bias) v.

    Args:
        qkv: [B, *S, 3*C], queries, keys and values one after the other, heads one after the other in each; one or two
            axes S.
        table: [prod(2*window_size - 1), G], entry query - source + window_size - 1 along each axis, last axis fastest.
        num_heads: G.
        window_size: places along each axis.
        shift_size: windows end at shift_size + m*window_size along axes that are longer than the window; what they
            have beyond the grid is empty.
        extents: int64 [B, rank], each image's own size: windows are cut by it, tokens outside are not read.
        rolled_size: the layout of timm instead, of a grid of this size: rolled by -shift_size, then followed by the
            padding that `qkv` has behind it, up to a multiple of the window (none along an axis that is no longer).
            Padding takes part. In the last window what the roll has brought together is kept apart.

    Returns:
        [B, *S, C], or [B, *rolled_size, C]. Zero outside of `extents`.

    Cost: 2*N*K*C multiply-adds for N tokens, twice and a half of it backward. Memory: what is returned, and in each
    thread 2 K^2 numbers, 5 K^2 backward; nothing but the arguments is kept for the backward pass. Sums are taken in
    float32 or wider.

    Derivatives by qkv and the table; second ones go through plain PyTorch.

    Raises:
        ValueError: shapes that do not fit, naming both.
    """
    _check(qkv, table, num_heads, window_size, shift_size, extents, rolled_size)
    if table is not None and table.dtype != qkv.dtype:
        wide = torch.promote_types(qkv.dtype, table.dtype)
        qkv, table = qkv.to(wide), table.to(wide)
    if (qkv.device.type not in ("cpu", "meta") and not gpu.takes(qkv)) or tangents_wanted():
        return _eager(qkv, table, extents, num_heads, window_size, shift_size, rolled_size)
    learned = torch.is_grad_enabled() and qkv.requires_grad and qkv.device.type == "cpu"
    if learned and not gpu.takes(qkv) and not torch.compiler.is_compiling():
        prepare("window_attention_backward.c", qkv.dtype)  # beside the forward pass, as it takes the compiler longer
    return _forward(qkv, table, extents, num_heads, window_size, shift_size, rolled_size)


def _check(
    qkv: Tensor,
    table: Tensor | None,
    num_heads: int,
    window_size: Sequence[int],
    shift_size: int,
    extents: Tensor | None,
    rolled_size: Sequence[int] | None,
) -> None:
    grid, rank = qkv.shape[1:-1], qkv.dim() - 2
    if rank not in (1, 2) or num_heads < 1 or qkv.shape[-1] % (3 * num_heads):
        raise ValueError(
            f"qkv: has shape {tuple(qkv.shape)}, needs [B, T, 3*C] or [B, H, W, 3*C] with C a multiple of "
            f"{num_heads} heads"
        )
    if len(window_size) != rank or min(window_size) < 1 or not 0 <= shift_size < min(window_size):
        raise ValueError(
            f"window_size: {tuple(window_size)} with shift_size {shift_size} for qkv {tuple(qkv.shape)}, needs {rank} "
            f"lengths that are larger than the shift"
        )
    entries = (math.prod([2 * w - 1 for w in window_size]), num_heads)
    if table is not None and table.shape != entries:
        raise ValueError(f"table: has shape {tuple(table.shape)}, needs {entries} for a window of {tuple(window_size)}")
    if extents is not None and (extents.shape != (qkv.shape[0], rank) or rolled_size is not None):
        raise ValueError(
            f"extents: have shape {tuple(extents.shape)}, need {(qkv.shape[0], rank)} and no rolled_size, which has "
            f"{None if rolled_size is None else tuple(rolled_size)}"
        )
    if rolled_size is not None and (
        len(rolled_size) != rank
        or any(n != (s if s <= w else -(-s // w) * w) for n, s, w in zip(grid, rolled_size, window_size, strict=True))
    ):
        raise ValueError(
            f"qkv: has shape {tuple(qkv.shape)}, rolled_size {tuple(rolled_size)} needs its axes filled up to "
            f"multiples of the window {tuple(window_size)} where they are longer"
        )


@torch.library.custom_op("glocal::window_attention", mutates_args=())
def _forward(
    qkv: Tensor,
    table: Tensor | None,
    extents: Tensor | None,
    num_heads: int,
    window_size: Sequence[int],
    shift_size: int,
    rolled_size: Sequence[int] | None,
) -> Tensor:
    out = _empty(qkv, rolled_size)
    if not out.numel():
        return out
    if gpu.takes(qkv) and _widest(qkv, num_heads) <= gpu.WIDEST:
        return _by_triton(qkv, table, extents, num_heads, window_size, shift_size, rolled_size)[0]
    try:
        function = _function("window_attention", qkv)
    except Unavailable:
        with torch.autocast(qkv.device.type, enabled=False):  # its products would be rounded, its mask be infinite
            return _eager(qkv, table, extents, num_heads, window_size, shift_size, rolled_size).contiguous()
    on_huge_pages(out)
    if extents is not None:
        out.zero_()
    call(
        function,
        qkv.contiguous(),
        None if table is None else table.contiguous(),
        _two_axes(extents),
        _shape(qkv, num_heads, window_size, shift_size, rolled_size),
        out,
    )
    return out


@torch.library.custom_op("glocal::window_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor | None,
    extents: Tensor | None,
    num_heads: int,
    window_size: Sequence[int],
    shift_size: int,
    rolled_size: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """Derivatives by qkv and the table; the second is empty where there is no table."""
    layout = (num_heads, window_size, shift_size, rolled_size)
    qkv_grad = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    table_grad = qkv.new_empty(0) if table is None else torch.empty_like(table, memory_format=torch.contiguous_format)
    if not qkv.numel():
        return qkv_grad, table_grad.zero_()
    if gpu.takes(qkv) and _widest(qkv, num_heads) <= gpu.WIDEST:
        return _backward_by_triton(grad, qkv, table, extents, *layout)
    try:
        function = _function("window_attention_backward", qkv)
    except Unavailable:
        with torch.autocast(qkv.device.type, enabled=False):
            return _eager_backward(grad, qkv, table, extents, *layout)
    on_huge_pages(qkv_grad)
    if extents is not None:
        qkv_grad.zero_()
    call(
        function,
        grad.to(qkv.dtype).contiguous(),
        qkv.contiguous(),
        None if table is None else table.contiguous(),
        _two_axes(extents),
        _shape(qkv, *layout),
        qkv_grad,
        table_grad,
    )
    return qkv_grad, table_grad


def _widest(qkv: Tensor, num_heads: int) -> int:
    return qkv.shape[-1] // (3 * num_heads)


def _by_triton(
    qkv: Tensor,
    table: Tensor | None,
    extents: Tensor | None,
    num_heads: int,
    window_size: Sequence[int],
    shift_size: int,
    rolled_size: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """On a GPU: the output, and the logarithms of the softmaxes' divisors."""
    from glocal.kernels.triton import attention_calls as calls

    layout = calls.windows(qkv.shape[1:-1], rolled_size, window_size, shift_size, num_heads)
    out = _empty(qkv, rolled_size)
    out = out if extents is None else out.zero_()
    q, k, v = _heads(qkv.contiguous(), num_heads)
    extents, scale = _two_axes(extents), q.shape[-1] ** -0.5
    return out, calls.forward(layout, q, k, v, table, None, extents, scale, out)


def _backward_by_triton(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor | None,
    extents: Tensor | None,
    num_heads: int,
    window_size: Sequence[int],
    shift_size: int,
    rolled_size: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    from glocal.kernels.triton import attention_calls as calls

    qkv = qkv.contiguous()
    layout = calls.windows(qkv.shape[1:-1], rolled_size, window_size, shift_size, num_heads)
    whole = extents is None and rolled_size is None  # otherwise some queries have no output, and no gradient
    found = torch.empty_like(qkv) if whole else torch.zeros_like(qkv)
    q, k, v = _heads(qkv, num_heads)
    extents, scale = _two_axes(extents), q.shape[-1] ** -0.5
    grads = _heads(found, num_heads)
    entries = calls.backward(layout, grad.to(qkv.dtype), q, k, v, table, None, extents, scale, grads)
    if table is None or entries is None:
        return found, qkv.new_empty(0)
    return found, entries[0].flatten(1).t().to(table.dtype).contiguous()


def _heads(qkv: Tensor, num_heads: int) -> tuple[Tensor, ...]:
    """Views [B, N, G, D] of queries, keys and values."""
    return qkv.flatten(1, -2).unflatten(-1, (3, num_heads, -1)).unbind(2)


def _function(operation: str, qkv: Tensor) -> Any:
    return getattr(load(f"{operation}.c", qkv.dtype), operation)


def _shape(
    qkv: Tensor, num_heads: int, window_size: Sequence[int], shift_size: int, rolled_size: Sequence[int] | None
) -> Tensor:
    """What problem_of reads; a sequence is one row."""
    lengths = qkv.shape[1:-1]
    axes = zip(lengths, lengths if rolled_size is None else rolled_size, window_size, strict=True)
    shape = [qkv.shape[0], num_heads, qkv.shape[-1] // (3 * num_heads), int(rolled_size is not None)]
    shape += [1, 1, 1, 0] * (2 - len(lengths))
    for axis in axes:
        shape += [*axis, shift_size]
    return torch.tensor(shape)


def _two_axes(extents: Tensor | None) -> Tensor | None:
    if extents is None:
        return None
    extents = extents.long().clamp(min=0)
    return torch.nn.functional.pad(extents, (2 - extents.shape[1], 0), value=1).contiguous()


def _empty(qkv: Tensor, rolled_size: Sequence[int] | None) -> Tensor:
    grid = qkv.shape[1:-1] if rolled_size is None else rolled_size
    return qkv.new_empty(qkv.shape[0], *grid, qkv.shape[-1] // 3)


def _eager(
    qkv: Tensor,
    table: Tensor | None,
    extents: Tensor | None,
    num_heads: int,
    window_size: Sequence[int],
    shift_size: int,
    rolled_size: Sequence[int] | None,
) -> Tensor:
    """The same in plain PyTorch."""
    windows = _Windows(qkv, extents, window_size, shift_size, rolled_size)
    q, k, v = windows.sort(qkv).unflatten(-1, (3, num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
    bias = windows.bias(table, num_heads, qkv.dtype).flatten(1, 2)
    q, k, v = (t.flatten(1, 2) for t in (q, k, v))  # [B, windows * G, K, D]
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias)
    out = windows.restore(out.unflatten(1, (-1, num_heads)).transpose(2, 3).flatten(3))
    for axis, size in enumerate(rolled_size or ()):
        out = out.narrow(axis + 1, 0, size)
    return out


def _eager_backward(
    grad: Tensor,
    qkv: Tensor,
    table: Tensor | None,
    extents: Tensor | None,
    num_heads: int,
    window_size: Sequence[int],
    shift_size: int,
    rolled_size: Sequence[int] | None,
) -> tuple[Tensor, Tensor]:
    """Written out: inside of an operation nothing is recorded for autograd."""
    wide = torch.promote_types(qkv.dtype, torch.float32)
    windows = _Windows(qkv, extents, window_size, shift_size, rolled_size)
    q, k, v = windows.sort(qkv).to(wide).unflatten(-1, (3, num_heads, -1)).permute(3, 0, 1, 4, 2, 5)
    more = [n - m for n, m in zip(qkv.shape[1:-1], grad.shape[1:-1], strict=True)]
    grad = torch.nn.functional.pad(grad, (0, 0, *(m for last in reversed(more) for m in (0, last))))
    grad = windows.sort(grad).to(wide).unflatten(-1, (num_heads, -1)).transpose(2, 3)  # [B, windows, G, K, D]
    scale = q.shape[-1] ** -0.5
    weights = (scale * q @ k.mT + windows.bias(table, num_heads, wide)).softmax(-1)
    slope = grad @ v.mT
    slope = weights * (slope - (weights * slope).sum(-1, keepdim=True))
    parts = torch.stack([scale * slope @ k, scale * slope.mT @ q, weights.mT @ grad])
    qkv_grad = windows.restore(parts.permute(1, 2, 4, 0, 3, 5).flatten(3)).to(qkv.dtype)
    if table is None:
        return qkv_grad, qkv.new_empty(0)
    table_grad = torch.zeros(table.shape, dtype=wide, device=table.device)
    by_offset = slope.sum((0, 1)).flatten(1).T.contiguous()
    return qkv_grad, table_grad.index_add_(0, windows.offset.flatten(), by_offset).to(table.dtype)


class _Windows:
    """Where tokens are when they are sorted into windows of K places, some of them empty."""

    def __init__(
        self,
        tokens: Tensor,
        extents: Tensor | None,
        window_size: Sequence[int],
        shift_size: int,
        rolled_size: Sequence[int] | None,
    ) -> None:
        batch, *grid, _ = tokens.shape
        window = place = torch.zeros(1, dtype=torch.int64, device=tokens.device)
        inside = torch.ones(1, dtype=torch.bool, device=tokens.device)
        self.count = self.places = 1
        self.offset = torch.zeros(1, 1, dtype=torch.int64, device=tokens.device)  # [K, K]: entry of the table
        for axis, n in enumerate(grid):
            extent = None if extents is None else extents[:, axis, None]
            size = None if rolled_size is None else rolled_size[axis]
            slot, side, count = _slots(n, window_size[axis], shift_size, extent, size, tokens.device)
            slot = slot.view(-1, *[1] * axis, n, *[1] * (len(grid) - axis - 1))
            window, place, inside = window * count + slot // side, place * side + slot % side, inside & (slot >= 0)
            self.count, self.places = self.count * count, self.places * side
            along = torch.arange(side, device=tokens.device)
            along = along[:, None] - along + window_size[axis] - 1
            self.offset = self.offset[:, None, :, None] * (2 * window_size[axis] - 1) + along[:, None]
            self.offset = self.offset.flatten(2).flatten(0, 1)
        # what has no place goes to one more, behind the last, which nothing reads
        slots = self.count * self.places
        index = torch.where(inside, window * self.places + place, slots).flatten(1)
        self.index = (index + (slots + 1) * torch.arange(batch, device=tokens.device)[:, None]).flatten()
        self._shape, self._shared = tokens.shape[:-1], extents is None

    def sort(self, tokens: Tensor) -> Tensor:
        """[B, *S, C] -> [B, windows, K, C], zero where empty."""
        slots = self.count * self.places
        rows = tokens.new_zeros(len(tokens) * (slots + 1), tokens.shape[-1])
        rows = rows.index_copy(0, self.index, tokens.reshape(-1, tokens.shape[-1]))
        rows = rows.unflatten(0, (len(tokens), slots + 1))[:, :slots]
        return rows.unflatten(1, (self.count, self.places))

    def restore(self, windows: Tensor) -> Tensor:
        """[B, windows, K, C] -> [B, *S, C], zero where a token has no place."""
        rows = torch.nn.functional.pad(windows.flatten(1, 2), (0, 0, 0, 1)).flatten(0, 1)
        return rows.index_select(0, self.index).view(*self._shape, windows.shape[-1])

    def bias(self, table: Tensor | None, num_heads: int, dtype: torch.dtype) -> Tensor:
        """[B or 1, windows, G, K, K], the lowest number where a source is empty."""
        full = self.sort(torch.ones(*self._shape, 1, device=self.index.device)) > 0
        full = (full[:1] if self._shared else full).transpose(2, 3)[:, :, None]
        if table is None:
            bias = torch.zeros((), dtype=dtype, device=full.device).expand(num_heads, *self.offset.shape)
        else:
            bias = table.to(dtype)[self.offset].movedim(-1, 0)
        return torch.where(full, bias, torch.finfo(dtype).min)


def _slots(
    n: int, window: int, shift: int, extent: Tensor | None, size: int | None, device: torch.device
) -> tuple[Tensor, int, int]:
    """Along one axis: the slot of each token, [B or 1, n] (-1: none), slots of a window, windows."""
    token = torch.arange(n, device=device)[None]
    if size is None:
        front = (window - shift) % window  # empty slots in front
        slot = token + (front if n > window else 0)
        if extent is not None:
            slot = torch.where(token < extent, token + front * (extent > window), -1)
        return slot, window, (n + front + window - 1) // window
    window, shift = (window, shift) if n > window else (n, 0)
    slot = torch.where(token < size, (token - shift) % size, token)
    # what the roll has brought to the end gets one more window
    return slot + window * (slot >= n - shift), window, n // window + 1


@_forward.register_fake
def _(qkv: Tensor, table: Tensor | None, extents: Tensor | None, *layout: Any) -> Tensor:
    return _empty(qkv, layout[-1])


@_backward.register_fake
def _(grad: Tensor, qkv: Tensor, table: Tensor | None, *layout: Any) -> tuple[Tensor, Tensor]:
    table_grad = qkv.new_empty(0) if table is None else torch.empty_like(table, memory_format=torch.contiguous_format)
    return torch.empty_like(qkv, memory_format=torch.contiguous_format), table_grad


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    qkv, table, extents, *ctx.layout = inputs
    ctx.save_for_backward(qkv, table, extents)


def _derivatives(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    qkv, table, extents = ctx.saved_tensors
    nothing = (None,) * (1 + len(ctx.layout))
    if torch.is_grad_enabled():  # create_graph=True
        with sdpa_kernel(SDPBackend.MATH):  # the one that has second derivatives
            out = _eager(qkv, table, extents, *ctx.layout)
        wanted = [t for t, needed in zip((qkv, table), ctx.needs_input_grad, strict=False) if needed]
        found = iter(torch.autograd.grad(out, wanted, grad, create_graph=True))
        return *(next(found) if needed else None for needed in ctx.needs_input_grad[:2]), *nothing
    qkv_grad, table_grad = _backward(grad, qkv, table, extents, *ctx.layout)
    return qkv_grad, None if table is None else table_grad, *nothing


_forward.register_autograd(_derivatives, setup_context=_save)


@register_flop_formula(torch.ops.glocal.window_attention)
def _forward_flops(
    qkv: torch.Size, table: Any, extents: Any, num_heads: int, window_size: Any, *args: Any, **kwargs: Any
) -> int:
    """Of full windows: two products."""
    places = math.prod(min(n, w) for n, w in zip(qkv[1:-1], window_size, strict=True))
    return 4 * math.prod(qkv[:-1]) * places * (qkv[-1] // 3)


@register_flop_formula(torch.ops.glocal.window_attention_backward)
def _backward_flops(grad: Any, qkv: torch.Size, *args: Any, **kwargs: Any) -> int:
    """Five products."""
    return _forward_flops(qkv, *args) * 5 // 2
