"""The depthwise family in one function: sums over the taps of a kernel, whose weights are shared in any way.

Three operations that are each other's derivatives, to any order: the sum, its transpose and the inner products that are
its weights' gradient. On a CPU they are C (local_sum.c, local_sum_narrow.c), on a GPU Triton (triton/local_sum.py);
without a compiler, and on other devices, one pass over the input for each tap, in plain PyTorch.

Shape letters: B batch, S grid of sources, N grid of outputs, C channels, G groups of consecutive channels, T taps.
"""

import ctypes
import math
from collections.abc import Iterator, Sequence
from itertools import product
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.flop_counter import register_flop_formula

from glocal.kernels import compiled, gpu

LONGEST = 63  # taps along an axis that the compiled code unrolls
# Up to so many taps sources are read where they are; beyond, it was measured to pay to copy them to panels.
IN_PLACE, IN_PLACE_SHARED = 15, 3
# Up to so many oneDNN's float32 convolution of images was measured to be the faster one, with gradients and without.
BY_LIBRARY, SUM_BY_LIBRARY = 3, 5


def local_sum(
    x: Tensor,
    w: Tensor,
    dilation: int = 1,
    causal: bool = False,
    *,
    kernel_size: Sequence[int] | None = None,
    left: Sequence[int] | int | None = None,
    past: int = 0,
    bias: Tensor | None = None,
) -> Tensor:
    """y[b, i, c] = bias[c] + sum over taps t of w[b, i, g(c), t] * x[b, i + dilation * (t - left), c], zeros outside.

    Args:
        x: [B, *S, C], sequences or images.
        w: [B or 1, *N or 1 each, G, T], taps in raster order; channels c of group g are consecutive, G divides C. An
            axis of size 1 is shared: kernels may be static, per image, or per position.
        dilation: distance between taps.
        causal: the last tap is i itself along every axis, and kernels may be even.
        kernel_size: of every axis; T = K**rank by default.
        left: taps in front of i along every axis or each, in place of causal; by default the middle of odd kernels.
        past: positions at the start of every axis that are read and have no sum of their own: N = S - past, and y
            begins behind them.
        bias: [C], or none.

    Returns:
        [B, *N, C], of the type that all promote to; under autocast, of its type. Sums are taken in float32 or wider.

    Cost: B*N*C*T multiply-adds. Memory: nothing beside the result, on a CPU with a compiler; else a padded copy of x
    and a copy of w. Differentiable to any order. Exported programs hold plain PyTorch, so that they run anywhere.

    Raises:
        ValueError: shapes that do not fit, naming both.
    """
    rank, taps = x.dim() - 2, w.shape[-1]
    kernel = (round(taps ** (1 / rank)),) * rank if kernel_size is None else tuple(kernel_size)
    if rank not in (1, 2) or w.dim() != rank + 3 or len(kernel) != rank or math.prod(kernel) != taps:
        size = f"K**{rank}" if kernel_size is None else f"{math.prod(kernel)}"
        raise ValueError(f"w: has shape {tuple(w.shape)}, needs [B, *S, G, {size}] for x {tuple(x.shape)}, [B, *S, C]")
    if left is None:
        if not causal and any(k % 2 == 0 for k in kernel):
            raise ValueError(f"w: a kernel of {kernel} has no middle; make it odd, or causal, or say how many are left")
        left = tuple(k - 1 if causal else k // 2 for k in kernel)
    else:
        left = (left,) * rank if isinstance(left, int) else tuple(left)
    if any(not 0 <= n < k for n, k in zip(left, kernel, strict=True)):
        raise ValueError(f"left: {left}, must be from 0 to {tuple(k - 1 for k in kernel)}, so that kernels cover i")
    if w.shape[-2] == 0 or x.shape[-1] % w.shape[-2]:
        raise ValueError(f"w: {w.shape[-2]} groups do not divide the {x.shape[-1]} channels of x")
    grid = [n - past for n in x.shape[1:-1]]
    for name, n, given in zip(["B", *["S"] * rank], [x.shape[0], *grid], w.shape, strict=False):
        if given not in (1, n):
            raise ValueError(f"w: has shape {tuple(w.shape)}, its {given} must be {n} ({name} of x, less past) or 1")
    if bias is not None and bias.shape != x.shape[-1:]:
        raise ValueError(f"bias: has shape {tuple(bias.shape)}, needs [{x.shape[-1]}], the channels of x")
    dtype = torch.promote_types(x.dtype, w.dtype)
    dtype = dtype if bias is None else torch.promote_types(dtype, bias.dtype)
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and dtype != torch.float64:
        dtype = torch.get_autocast_dtype(device)
    x, w, bias = x.to(dtype), w.to(dtype), None if bias is None else bias.to(dtype)
    offset = [past - dilation * n for n in left]
    learned = torch.is_grad_enabled() and (x.requires_grad or w.requires_grad)
    longest = BY_LIBRARY if learned else SUM_BY_LIBRARY
    direct = x.numel() > 0 and math.prod(grid) > 0 and _library_is_faster(x, w.shape, kernel, longest)
    if (device in ("cpu", "meta") or gpu.takes(x)) and not direct and not _traced():
        return _sum(x, w, bias, kernel, dilation, offset, grid)
    if _is_convolution(w.shape, x.shape[-1]):
        return _by_library(x, w, bias, kernel, dilation, offset, grid)
    y = _sum_by_taps(x, w, kernel, dilation, offset, grid)  # torch.compile fuses it
    return y if bias is None else y + bias


def _traced() -> bool:
    """Whether plain PyTorch is asked for: by torch.export, and by derivatives that know no other."""
    return torch.compiler.is_exporting() or compiled.tangents_wanted()


# The operations. `offset`: the source of the first tap less the output, along each axis.


@torch.library.custom_op("glocal::local_sum", mutates_args=())
def _sum(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    dilation: int,
    offset: Sequence[int],
    grid: Sequence[int],
) -> Tensor:
    """[B, *S, C], [B or 1, *N or 1 each, G, T] -> [B, *N, C], N = grid."""
    if _library_is_faster(x, w.shape, kernel, SUM_BY_LIBRARY) and x.numel() and math.prod(grid):
        with torch.autocast(x.device.type, enabled=False):  # in a backward pass: the type was chosen before
            return _by_library(x, w, bias, kernel, dilation, offset, grid).contiguous()
    if triton := _triton(x):
        return triton.local_sum(x, w, bias, kernel, dilation, offset, grid)
    code = _code("SUM", x, w, kernel, dilation)
    if code is None:
        y = _sum_by_taps(x, w, kernel, dilation, offset, grid)
        return y if bias is None else y + bias
    y = compiled.on_huge_pages(x.new_empty(x.shape[0], *grid, x.shape[-1]))
    if not _shared(w.shape):
        y = _run(code.local_sum, x, w, y, x.shape, grid, w.shape, offset, None)
        return y if bias is None else y.add_(bias)
    if x.numel() == 0 and bias is not None:
        return y.copy_(bias)
    return _run(code.local_sum, x, w, y, x.shape, grid, w.shape, offset, None if bias is None else bias.contiguous())


@torch.library.custom_op("glocal::local_sum_transposed", mutates_args=())
def _transposed(
    y: Tensor, w: Tensor, kernel: Sequence[int], dilation: int, offset: Sequence[int], grid: Sequence[int]
) -> Tensor:
    """[B, *N, C], [B or 1, *N or 1 each, G, T] -> [B, *S, C], S = grid: what each source is given back."""
    if triton := _triton(y):
        return triton.local_sum_transposed(y, w, kernel, dilation, offset, grid)
    if _shared(w.shape):  # the sum with taps reversed, seen from the sources
        back = [-o - dilation * (k - 1) for o, k in zip(offset, kernel, strict=True)]
        return _sum(y, w.flip(-1), None, kernel, dilation, back, grid)
    code = _code("TRANSPOSED", y, w, kernel, dilation)
    if code is None:
        return _transposed_by_taps(y, w, kernel, dilation, offset, grid)
    x = compiled.on_huge_pages(y.new_empty(y.shape[0], *grid, y.shape[-1]))
    return _run(code.local_sum_transposed, y, w, x, x.shape, y.shape[1:-1], w.shape, offset)


@torch.library.custom_op("glocal::local_sum_products", mutates_args=())
def _products(
    x: Tensor, y: Tensor, kernel: Sequence[int], dilation: int, offset: Sequence[int], shape: Sequence[int]
) -> Tensor:
    """[B, *S, C], [B, *N, C] -> weights of `shape`: inner products over what shares a weight."""
    if triton := _triton(x):
        return triton.local_sum_products(x, y, kernel, dilation, offset, shape)
    w = compiled.on_huge_pages(x.new_empty(shape))
    code = _code("PRODUCTS", x, w, kernel, dilation)
    if code is None:
        return _products_by_taps(x, y, kernel, dilation, offset, shape)
    if _shared(shape):
        return _run(code.local_sum_products, x, y, w, x.shape, y.shape[1:-1], shape, offset)
    w = compiled.on_huge_pages(x.new_empty(*y.shape[:-1], *shape[-2:]))
    _run(code.local_sum_products, x, y, w, x.shape, y.shape[1:-1], shape, offset)
    return w.sum_to_size(*shape)


def _triton(x: Tensor) -> ModuleType | None:
    """The operations on a GPU, if they are for such tensors."""
    if not gpu.takes(x):
        return None
    from glocal.kernels.triton import local_sum as triton

    return triton


def _shared(shape: Sequence[int]) -> bool:
    """Whether weights [B or 1, *N or 1, G, T] are the same at all positions."""
    return all(n == 1 for n in shape[1:-2])


def _code(operation: str, x: Tensor, w: Tensor, kernel: Sequence[int], dilation: int) -> ctypes.CDLL | None:
    """The compiled operation for these types and sizes, if there can be one."""
    if x.device.type != "cpu" or max(kernel) > LONGEST:
        return None
    source, sizes = _source(x, w.shape, kernel, dilation)
    try:
        return compiled.load(source, x.dtype, **{operation: 1}, KH=(1, *kernel)[-2], KW=kernel[-1], **sizes)
    except compiled.Unavailable:
        return None


def _source(x: Tensor, shape: Sequence[int], kernel: Sequence[int], dilation: int) -> tuple[str, dict[str, int]]:
    """The C file for weights of this shape, and what it is built for besides the kernel."""
    lanes, width = 32 // max(x.element_size(), 4), x.shape[-1] // max(shape[-2], 1)
    if _shared(shape):
        if max(kernel) <= IN_PLACE_SHARED and dilation == 1 and x.shape[-1] % lanes == 0:
            return "local_sum_small.c", {}
        return "local_sum.c", {"SHARED": 1, "DILATION": dilation}
    if 0 < width < lanes:
        return "local_sum_narrow.c", {"D": width, "DILATION": dilation}
    if len(kernel) == dilation == 1 and width % lanes == 0 and kernel[0] <= IN_PLACE:
        return "local_sum_row.c", {"D": width}
    return "local_sum.c", {"D": width, "DILATION": dilation}


def _run(
    function: Any,
    first: Tensor,
    second: Tensor,
    result: Tensor,
    x: Sequence[int],
    grid: Sequence[int],
    w: Sequence[int],
    offset: Sequence[int],
    *more: Tensor | None,
) -> Tensor:
    """Calls compiled code for x and w of these shapes and outputs on `grid`; sequences are images of one row."""
    if not (result.numel() and first.numel() and second.numel()):
        return result.zero_()
    axes = list(w) if len(w) == 5 else [w[0], 1, *w[1:]]
    strides = [math.prod(axes[i + 1 :]) if axes[i] > 1 else 0 for i in range(3)]
    planes = [(1, *x[1:-1])[-2:], (1, *grid)[-2:]]
    compiled.call(
        function, first.contiguous(), second.contiguous(), result, *more, x[0], *planes[0], *planes[1],
        x[-1], x[-1] // w[-2], *(0, *offset)[-2:], *strides, math.prod(axes),
    )  # fmt: skip
    return result


def _is_convolution(shape: Sequence[int], channels: int) -> bool:
    """Whether weights of this shape are those of an ordinary depthwise convolution."""
    return _shared(shape) and shape[0] == 1 and shape[-2] == channels


def _library_is_faster(x: Tensor, shape: Sequence[int], kernel: Sequence[int], longest: int) -> bool:
    """Small kernels on images, whose work is memory."""
    small = len(kernel) == 2 and max(kernel) <= longest
    return small and x.dtype == torch.float32 and x.device.type == "cpu" and _is_convolution(shape, x.shape[-1])


def _by_library(
    x: Tensor,
    w: Tensor,
    bias: Tensor | None,
    kernel: Sequence[int],
    dilation: int,
    offset: Sequence[int],
    grid: Sequence[int],
) -> Tensor:
    """An ordinary depthwise convolution, on the channels-last view; sequences are images of one row."""
    margins = _margins(x.shape[1:-1], kernel, dilation, offset, grid)
    front, back = margins[2::2][::-1], margins[3::2][::-1]
    if front == back and all(-o == f for o, f in zip(offset, front, strict=True)):
        padding = front
    else:
        x, padding = functional.pad(x, margins), [0] * len(grid)
        x = _cut(x, [(max(o, 0), x.shape[i + 1] - max(o, 0)) for i, o in enumerate(offset)])
        lengths = [n + dilation * (k - 1) for n, k in zip(grid, kernel, strict=True)]
        x = _cut(x, [(0, n) for n in lengths])
    weight = w.reshape(-1, 1, *(1, *kernel)[-2:])
    images = (x.unsqueeze(1) if len(grid) == 1 else x).movedim(-1, 1)
    y = functional.conv2d(images, weight, bias, 1, (0, *padding)[-2:], dilation, x.shape[-1]).movedim(1, -1)
    return y.squeeze(1) if len(grid) == 1 else y


# In plain PyTorch, a tap at a time.


def _each_tap(
    kernel: Sequence[int], dilation: int, offset: Sequence[int], grid: Sequence[int]
) -> Iterator[list[tuple[int, int]]]:
    """For every tap where it reads in x padded by `_margins`: first cell and length along each axis."""
    front = [max(-o, 0) for o in offset]
    for place in product(*map(range, kernel)):
        yield [(f + o + dilation * p, n) for f, o, p, n in zip(front, offset, place, grid, strict=True)]


def _margins(
    lengths: Sequence[int], kernel: Sequence[int], dilation: int, offset: Sequence[int], grid: Sequence[int]
) -> list[int]:
    """What zeros `pad` puts around channels-last [B, *lengths, C], so that every tap reads inside."""
    margins = [0, 0]
    for n, k, o, out in reversed(list(zip(lengths, kernel, offset, grid, strict=True))):
        margins += [max(-o, 0), max(out + o + dilation * (k - 1) - n, 0)]
    return margins


def _cut(padded: Tensor, where: Sequence[tuple[int, int]]) -> Tensor:
    for axis, (start, length) in enumerate(where):
        padded = padded.narrow(axis + 1, start, length)
    return padded


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _sum_by_taps(
    x: Tensor, w: Tensor, kernel: Sequence[int], dilation: int, offset: Sequence[int], grid: Sequence[int]
) -> Tensor:
    padded = functional.pad(x.to(_wide(x)), _margins(x.shape[1:-1], kernel, dilation, offset, grid))
    padded = padded.unflatten(-1, (w.shape[-2], -1))
    # taps first: each is then read in order, and unbind gives their gradients back in one piece
    each = w.to(_wide(w)).movedim(-1, 0).contiguous().unsqueeze(-1).unbind(0)
    y = None
    for weight, where in zip(each, _each_tap(kernel, dilation, offset, grid), strict=True):
        shifted = _cut(padded, where)
        y = shifted * weight if y is None else torch.addcmul(y, shifted, weight)
    assert y is not None
    return y.flatten(-2).to(x.dtype)


def _transposed_by_taps(
    y: Tensor, w: Tensor, kernel: Sequence[int], dilation: int, offset: Sequence[int], grid: Sequence[int]
) -> Tensor:
    margins = _margins(grid, kernel, dilation, offset, y.shape[1:-1])[2:]
    fronts, backs = margins[::2][::-1], margins[1::2][::-1]
    groups = w.shape[-2]
    lengths = [f + n + b for f, n, b in zip(fronts, grid, backs, strict=True)]
    padded = torch.zeros(y.shape[0], *lengths, groups, y.shape[-1] // groups, dtype=_wide(y), device=y.device)
    y = y.to(_wide(y)).unflatten(-1, (groups, -1))
    for t, where in enumerate(_each_tap(kernel, dilation, offset, y.shape[1:-2])):
        _cut(padded, where).addcmul_(y, w[..., t, None].to(y.dtype))
    return _cut(padded, list(zip(fronts, grid, strict=True))).flatten(-2).to(w.dtype).contiguous()


def _products_by_taps(
    x: Tensor, y: Tensor, kernel: Sequence[int], dilation: int, offset: Sequence[int], shape: Sequence[int]
) -> Tensor:
    grid = y.shape[1:-1]
    padded = functional.pad(x.to(_wide(x)), _margins(x.shape[1:-1], kernel, dilation, offset, grid))
    y, w = y.to(_wide(y)), x.new_empty(shape)
    for t, where in enumerate(_each_tap(kernel, dilation, offset, grid)):
        each = (_cut(padded, where) * y).unflatten(-1, (shape[-2], -1)).sum(-1)
        w[..., t] = each.sum_to_size(*shape[:-1]).to(w.dtype)
    return w


# What torch.library is told.


@_sum.register_fake
def _(x: Tensor, w: Tensor, bias: Any, kernel: Any, dilation: int, offset: Any, grid: Sequence[int]) -> Tensor:
    return x.new_empty(x.shape[0], *grid, x.shape[-1])


@_transposed.register_fake
def _(y: Tensor, w: Tensor, kernel: Any, dilation: int, offset: Any, grid: Sequence[int]) -> Tensor:
    return y.new_empty(y.shape[0], *grid, y.shape[-1])


@_products.register_fake
def _(x: Tensor, y: Tensor, kernel: Any, dilation: int, offset: Any, shape: Sequence[int]) -> Tensor:
    return x.new_empty(shape)


def _save_sum(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.sizes = inputs[3:6]


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.sizes = inputs[2:5]


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, w = ctx.saved_tensors
    need_x, need_w, need_bias = ctx.needs_input_grad[:3]
    return (
        _transposed(grad, w, *ctx.sizes, x.shape[1:-1]) if need_x else None,
        _products(x, grad, *ctx.sizes, w.shape) if need_w else None,
        grad.flatten(0, -2).sum(0) if need_bias else None,
        None, None, None, None,
    )  # fmt: skip


def _transposed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    y, w = ctx.saved_tensors
    need_y, need_w = ctx.needs_input_grad[:2]
    return (
        _sum(grad, w, None, *ctx.sizes, y.shape[1:-1]) if need_y else None,
        _products(grad, y, *ctx.sizes, w.shape) if need_w else None,
        None, None, None, None,
    )  # fmt: skip


def _products_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    x, y = ctx.saved_tensors
    need_x, need_y = ctx.needs_input_grad[:2]
    return (
        _transposed(y, grad, *ctx.sizes, x.shape[1:-1]) if need_x else None,
        _sum(x, grad, None, *ctx.sizes, y.shape[1:-1]) if need_y else None,
        None, None, None, None,
    )  # fmt: skip


_sum.register_autograd(_sum_backward, setup_context=_save_sum)
_transposed.register_autograd(_transposed_backward, setup_context=_save)
_products.register_autograd(_products_backward, setup_context=_save)


@register_flop_formula(torch.ops.glocal.local_sum)
def _sum_flops(
    x: torch.Size, w: torch.Size, bias: Any, kernel: Any, dilation: Any, offset: Any, grid: Any, **named: Any
) -> int:
    return 2 * math.prod(kernel) * x[0] * math.prod(grid) * x[-1]


@register_flop_formula(torch.ops.glocal.local_sum_transposed)
def _transposed_flops(y: torch.Size, w: torch.Size, kernel: Any, *args: Any, **named: Any) -> int:
    return 2 * math.prod(kernel) * math.prod(y)


@register_flop_formula(torch.ops.glocal.local_sum_products)
def _products_flops(x: torch.Size, y: torch.Size, kernel: Any, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(kernel) * math.prod(y)
