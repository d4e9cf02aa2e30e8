"""Global attention with a bias for each offset, block by block of queries: never N x N of anything.

The bias of a block is laid out from the table, used and forgotten; backward makes it again. Plain PyTorch on any
device, on a GPU Triton (triton/attention.py). Registered with torch.library, so that it is opaque to torch.compile and
torch.export.

Shape letters: B batch, T B or 1, N = H*W queries and sources (W = 1 for sequences), G heads, D channels of a head.
Sources are taken in reverse: then the bias of query (a, b) and source (y, x) is the table's entry (a + y, b + x),
and all biases are views of it.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from glocal.kernels import gpu
from glocal.kernels.compiled import tangents_wanted

FORWARD_BLOCK = 4 * 2**20  # bytes of biases at a time, more where one row of queries has more
BACKWARD_BLOCK = 2 * 2**20  # bytes of weights at a time; there are three such tensors
WHOLE = 4 * 2**20  # weights in all, up to which the plain formula, which keeps them for backward, was measured faster


def biased_attention(
    q: Tensor, k: Tensor, v: Tensor, table: Tensor, grid: Sequence[int], *, valid: Tensor | None = None
) -> Tensor:
    """y_i = sum over j of softmax_j(<q_i, k_j> + table[i - j]) v_j on a grid, i, j its places in raster order.

    Args:
        q, k: [B, N, G, D], q already scaled.
        v: [B, N, G, D'].
        table: [G, *(2*S - 1)] or, for each image, [B, G, *(2*S - 1)]: entry query - source + S - 1 along each axis.
        grid: S, one or two axes, N places.
        valid: bool [B, N], True at sources that are seen; a query of an image without any gets 0.

    Returns:
        [B, N, G, D'], in the common type of q, k and v, or autocast's, to which the biases are rounded as well.

    Cost: 2*B*G*N^2*D multiply-adds, backward 5*B*G*N^2*D. Memory: 4 MiB of biases, or those of one row of queries;
    backward copies of its tensors, up to three blocks of 2 MiB and W tables. On a GPU no biases, but backward, where
    the table has a gradient, about 256*G*N numbers, B times as many with a table for each image, and up to 32 MiB. That
    gradient is added up in a fixed order. Second derivatives go through the plain formula, which holds N x N weights.

    Raises:
        ValueError: shapes that do not fit, naming both.
    """
    if len(grid) not in (1, 2):
        raise ValueError(f"grid: {tuple(grid)} has {len(grid)} axes, must have 1 or 2")
    if table.dim() - len(grid) not in (1, 2):
        raise ValueError(
            f"table: has shape {tuple(table.shape)}, needs [G, *(2*S - 1)] or [B, G, *(2*S - 1)] for grid {tuple(grid)}"
        )
    table = table if table.dim() - len(grid) == 2 else table[None]
    table = table if len(grid) == 2 else table[..., None]
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    device = q.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)  # here, since the library's turns a finite mask into -inf
    q, k, v = (t.to(dtype) for t in (q, k, v))
    attend = plain if tangents_wanted() else _biased_attention
    if not torch.compiler.is_compiling() and attend is not plain:  # nothing asked of lengths that are symbols
        _check(q, k, v, table, grid, valid)
        if not gpu.takes(q) and q.shape[0] * q.shape[2] * q.shape[1] ** 2 <= WHOLE:
            differentiated = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, table))
            attend = plain if differentiated else _at_once
    out = attend(q, k, v, table, valid)
    return out if valid is None else torch.where(valid.any(1)[:, None, None, None], out, 0)


def _exactly(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function without autocast, which would choose the types of its products."""

    @wraps(function)
    def call(q: Tensor, *others: Tensor | None) -> Any:
        if q.device.type == "meta":  # has no autocast
            return function(q, *others)
        with torch.autocast(q.device.type, enabled=False):
            return function(q, *others)

    return call


@torch.library.custom_op("glocal::biased_attention", mutates_args=())
@_exactly
def _biased_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor, valid: Tensor | None) -> Tensor:
    height, width = _grid(table)
    _check(q, k, v, table, (height, width), valid)
    if _on_gpu(q, v):
        return _by_triton(q, k, v, table, valid)[0]
    batch, places = q.shape[:2]
    windows, valid = _windows(table.to(q.dtype)), None if valid is None else valid.flip(1)
    of_each = len(windows) > 1 or valid is not None  # otherwise one block of biases is for all images
    k, v = k.flip(1), v.flip(1)
    each = places * width * q.shape[2] * q.element_size()  # bytes of the biases of a row of queries
    out = q.new_empty(*q.shape[:3], v.shape[-1])
    for images, rows in _blocks(batch if of_each else min(batch, 1), height, each, FORWARD_BLOCK):
        taken, some = images if of_each else slice(None), slice(rows.start * width, rows.stop * width)
        bias = _bias(windows, images, rows, None if valid is None else valid[taken])
        out[taken, some] = _attend(q[taken, some], k[taken], v[taken], bias)
    return out


@torch.library.custom_op("glocal::biased_attention_backward", mutates_args=())
@_exactly
def _backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and the table, each block's weights computed again in float32 or wider."""
    if _on_gpu(q, v):
        return _backward_by_triton(grad, q, k, v, table, valid)
    batch, places, heads = q.shape[:3]
    height, width = _grid(table)
    dtypes, wide = (q.dtype, k.dtype, v.dtype, table.dtype), torch.promote_types(q.dtype, torch.float32)
    valid = None if valid is None else valid.flip(1)
    q, grad, k, v = (t.to(wide).permute(2, 0, 1, 3).contiguous() for t in (q, grad, k.flip(1), v.flip(1)))
    dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
    windows = _windows(table.to(dtypes[0]).to(wide))
    # [T, G, W, 2H - 1, W]: a source's row is joined to the query's at once, its column at the end
    gathered = table.new_zeros(len(table), heads, width, 2 * height - 1, width, dtype=wide)
    each = places * width * heads * q.element_size()
    own, total = len(table) > 1, None
    for images, rows in _blocks(batch, height, each, BACKWARD_BLOCK):
        some, count = slice(rows.start * width, rows.stop * width), images.stop - images.start
        bias = windows[images if own else slice(None), :, rows].transpose(0, 1)
        scores = k.new_empty(heads, count, *bias.shape[2:]).copy_(bias).view(heads, count, -1, places)
        if valid is not None:
            scores.masked_fill_(~valid[images, None], torch.finfo(wide).min)
        queries, above = (t[:, images, some].flatten(0, 1) for t in (q, grad))
        keys, values = (t[:, images].flatten(0, 1) for t in (k, v))
        weights = torch.softmax(scores.flatten(0, 1).baddbmm_(queries, keys.mT), -1)
        dv[:, images] += (weights.mT @ above).unflatten(0, (heads, -1))
        inner = torch.bmm(above, values.mT)
        inner = torch.ops.aten._softmax_backward_data(inner, weights, -1, wide)
        dq[:, images, some] = (inner @ keys).unflatten(0, (heads, -1))
        dk[:, images] += (inner.mT @ queries).unflatten(0, (heads, -1))
        inner = inner.view(heads, count, -1, width, height, width).transpose(0, 1)
        if own:
            _join(gathered[images], inner, rows)
            continue
        inner = inner.sum(0, keepdim=True) if count > 1 else inner
        total = inner if total is None else total.add_(inner)
        if images.stop == batch:
            _join(gathered, total, rows)
            total = None
    entries = table.new_zeros(table.shape, dtype=wide)
    for column in range(width):
        entries[..., column : column + width] += gathered[:, :, column]
    found = (*(t.permute(1, 2, 0, 3) for t in (dq, dk.flip(2), dv.flip(2))), entries)
    return tuple(t.contiguous().to(dtype) for t, dtype in zip(found, dtypes, strict=True))  # type: ignore[return-value]


def _on_gpu(q: Tensor, v: Tensor) -> bool:
    return gpu.takes(q) and max(q.shape[-1], v.shape[-1]) <= gpu.WIDEST


def _by_triton(q: Tensor, k: Tensor, v: Tensor, table: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """On a GPU: the output, and the logarithms of the softmaxes' divisors."""
    from glocal.kernels.triton import attention_calls as calls

    out = q.new_empty(*q.shape[:3], v.shape[-1])
    layout = calls.whole(_grid(table), q.shape[2], len(table))
    return out, calls.forward(layout, q, k, v, table.to(q.dtype), valid, None, 1.0, out)


def _backward_by_triton(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    from glocal.kernels.triton import attention_calls as calls

    found = [t.new_empty(t.shape) for t in (q, k, v)]
    layout = calls.whole(_grid(table), q.shape[2], len(table))
    entries = calls.backward(
        layout, grad.to(q.dtype), q, k, v, table.to(q.dtype), valid, None, 1.0, found, of_each=len(table) != 1
    )
    assert entries is not None
    return found[0], found[1], found[2], entries.to(table.dtype).view(table.shape)


def _join(gathered: Tensor, biases: Tensor, rows: slice) -> None:
    """Adds gradients of the biases of some rows of queries, [T, G, rows, W, H, W], where they belong."""
    for i, row in enumerate(range(rows.start, rows.stop)):
        gathered[..., row : row + biases.shape[-2], :] += biases[:, :, i]


@_exactly
def plain(q: Tensor, k: Tensor, v: Tensor, table: Tensor, valid: Tensor | None) -> Tensor:
    """The same by N x N weights; differentiable any number of times."""
    wide = torch.promote_types(q.dtype, torch.float32)
    bias = _windows(table.to(q.dtype).to(wide)).flatten(4).flatten(2, 3).flip(3)
    scores = q.to(wide).transpose(1, 2) @ k.to(wide).permute(0, 2, 3, 1) + bias
    return (_masked(scores, valid).softmax(-1) @ v.to(wide).transpose(1, 2)).transpose(1, 2).to(q.dtype)


@_exactly
def _at_once(q: Tensor, k: Tensor, v: Tensor, table: Tensor, valid: Tensor | None) -> Tensor:
    """The library's attention with all biases; not to be differentiated."""
    bias = _windows(table.to(q.dtype)).flatten(4).flatten(2, 3).flip(3)
    return _attend(q, k, v, _masked(bias, valid))


def _attend(q: Tensor, k: Tensor, v: Tensor, bias: Tensor) -> Tensor:
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    attend = torch.nn.functional.scaled_dot_product_attention
    return attend(q, k, v, attn_mask=bias, scale=1.0).transpose(1, 2)


def _masked(scores: Tensor, valid: Tensor | None) -> Tensor:
    """The lowest finite number where a source is not seen: a row of -inf would be NaN."""
    return scores if valid is None else scores.masked_fill(~valid[:, None, None], torch.finfo(scores.dtype).min)


def _grid(table: Tensor) -> tuple[int, int]:
    return (table.shape[2] + 1) // 2, (table.shape[3] + 1) // 2


def _windows(table: Tensor) -> Tensor:
    """[T, G, H, W, H, W]: the biases of all queries and sources, these in reverse; views of the table."""
    height, width = _grid(table)
    return table.unfold(2, height, 1).unfold(3, width, 1)


def _bias(windows: Tensor, images: slice, rows: slice, valid: Tensor | None) -> Tensor:
    """[T or B, G, n, N]: the biases of some rows of queries, for images that may have each its own."""
    bias = windows[images if len(windows) > 1 else slice(None), :, rows]
    return _masked(bias.flatten(4).flatten(2, 3), valid)


def _blocks(batch: int, height: int, each: int, limit: int) -> Iterator[tuple[slice, slice]]:
    """Images and rows of queries of blocks with up to `limit` bytes, at `each` for a row; one row at least.

    All images of some rows come one after the other.
    """
    rows = min(max(limit // max(each, 1), 1), height)
    images = max(limit // max(each * height, 1), 1)
    for row in range(0, height, rows):
        for first in range(0, batch, images):
            yield slice(first, min(first + images, batch)), slice(row, min(row + rows, height))


def _check(q: Tensor, k: Tensor, v: Tensor, table: Tensor, grid: Sequence[int], valid: Tensor | None) -> None:
    if k.shape != q.shape or v.shape[:3] != q.shape[:3]:
        raise ValueError(f"k and v: have shapes {tuple(k.shape)} and {tuple(v.shape)}, q has {tuple(q.shape)}")
    batch, places, heads = q.shape[:3]
    if math.prod(grid) != places:
        raise ValueError(f"grid: {tuple(grid)} has {math.prod(grid)} places, q {tuple(q.shape)} has {places}")
    sides = [2 * n - 1 for n in (*grid, 1)[:2]]
    if len(table) not in (1, batch) or list(table.shape[1:]) != [heads, *sides]:
        raise ValueError(
            f"table: has shape {tuple(table.shape)} with images and two axes, needs {batch} or 1 images, {heads} heads "
            f"and {' x '.join(map(str, sides))} offsets for grid {tuple(grid)}"
        )
    if valid is not None and valid.shape != (batch, places):
        raise ValueError(f"valid: has shape {tuple(valid.shape)}, needs {(batch, places)}")


@_biased_attention.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, table: Tensor, valid: Tensor | None) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[-1])


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, table: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    q, k, v, table = (t.new_empty(t.shape) for t in (q, k, v, table))
    return q, k, v, table


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, v, table, valid = ctx.saved_tensors
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
        wanted = [t for t, needed in zip((q, k, v, table), ctx.needs_input_grad, strict=False) if needed]
        found = iter(torch.autograd.grad(plain(q, k, v, table, valid), wanted, grad, create_graph=True))
        return (*(next(found) if needed else None for needed in ctx.needs_input_grad[:4]), None)
    return (*_backward(grad, q, k, v, table, valid), None)


_biased_attention.register_autograd(_gradients, setup_context=_save)


@register_flop_formula(torch.ops.glocal.biased_attention)
def _flops(q: torch.Size, k: torch.Size, v: torch.Size, *args: Any, **kwargs: Any) -> int:
    batch, places, heads, width = q
    return 2 * batch * heads * places**2 * (width + v[-1])


@register_flop_formula(torch.ops.glocal.biased_attention_backward)
def _backward_flops(grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *args: Any, **kwargs: Any) -> int:
    batch, places, heads, width = q
    return 2 * batch * heads * places**2 * (3 * width + 2 * v[-1])
