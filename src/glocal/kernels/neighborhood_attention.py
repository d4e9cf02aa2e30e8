"""Neighborhood attention in one pass: no index tables, and nothing of size N*K that outlives a query.

Compiled C on a CPU (neighborhood_attention*.c), Triton on a GPU (triton/attention.py). Where neither can be had, one
slot after the other by the gathered kernels. All are opaque to torch.compile and torch.export.

Shape letters: B batch, S grid, N queries, M sources, G heads, D channels of a head (E of a value), K neighbors.
"""

import math
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from glocal.kernels import gpu
from glocal.kernels.compiled import Unavailable, call, load, on_huge_pages, tangents_wanted
from glocal.kernels.gathered import gathered_scatter, gathered_scores, gathered_sum

# Queries of a tile, at least and at most. More of them share the margin of keys around it; fewer make more tiles, of
# which every thread should find one.
FORWARD_AREA, BACKWARD_AREA = (512, 512), (512, 1600)
TILES = 32
TILE_WIDTH = 64
BIAS_JOBS = 64  # tables, for each head, that the bias' gradient is summed in


def neighborhood_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None = None,
    *,
    kernel_size: int | Sequence[int],
    dilation: int = 1,
    causal: bool = False,
    border: Literal["masked", "shifted"] = "masked",
    scale: float = 1.0,
    valid: Tensor | None = None,
    extents: Tensor | None = None,
) -> Tensor:
    """y[b, i, g] = sum over the neighbors j of i of softmax_j(scale * <q[b, i, g], k[b, j, g]> + bias) * v[b, j, g].

    Args:
        q: [B, *S, G, D], S = (T,) or (H, W).
        k: [B, *S, G, D]; causal sequences may have P more tokens, which then stand in front of the first query.
        v: [B, *S, G, E], tokens as k.
        bias: [G, 2*K - 1 for each axis], entry (source - query) / dilation + K - 1 along each axis.
        kernel_size: K along all axes or each; odd unless causal.
        dilation: distance between neighbors.
        causal: the neighbors are i and the K - 1 before it, along every axis.
        border: "masked": neighbors centred on i, those outside the grid are not seen. "shifted": moved inward, among
            the tokens with the same place modulo the dilation, until all lie inside; fewer than K are all used.
        valid: bool [B, *S] (of the sources), the others are not seen. A query that sees nothing gets 0.
        extents: int64 [B, len(S)], each image's own size for shifted borders; tokens behind it are not seen.

    Returns:
        [B, *S, G, E], in the common type of q, k and v. Sums are taken in float32 or wider.

    Differentiable in q, k, v and bias, to any order (beyond the first slot by slot). No result depends on the number
    of threads. Memory: the output and [B, N, G] numbers, and in each thread the keys and values of one tile.

    Cost: B*N*G*K*(D + E) multiply-adds, K over both axes.

    Raises:
        ValueError: shapes or options that do not fit, naming them.
    """
    rank = q.dim() - 3
    if rank not in (1, 2):
        raise ValueError(f"q: has shape {tuple(q.shape)}, needs [B, T, G, D] or [B, H, W, G, D]")
    kernel = [kernel_size] * rank if isinstance(kernel_size, int) else list(kernel_size)
    if len(kernel) != rank or any(n < 1 or (n % 2 == 0 and not causal) for n in kernel):
        raise ValueError(f"kernel_size: {kernel_size}, must be one length or {rank}, odd unless causal")
    if dilation < 1:
        raise ValueError(f"dilation: {dilation}, must be 1 or more")
    if border not in ("masked", "shifted") or (causal and border == "shifted"):
        raise ValueError(f"border: {border!r}, must be 'masked' or, unless causal, 'shifted'")
    if extents is not None and border != "shifted":
        raise ValueError("extents: are for shifted borders; masked ones take valid")
    _check_shapes(q, k, v, causal)
    _check_shape("bias", bias, (q.shape[-2], *(2 * n - 1 for n in kernel)))
    _check_shape("valid", valid, k.shape[:-2])
    _check_shape("extents", extents, (q.shape[0], rank))
    dtype = torch.promote_types(torch.promote_types(q.dtype, k.dtype), v.dtype)
    bias = None if bias is None else bias.to(_wide(dtype))
    valid, extents = None if valid is None else valid.bool(), None if extents is None else extents.long()
    if tangents_wanted():
        raise NotImplementedError(
            "neighborhood_attention: torch.func and forward-mode derivatives cannot go through it; the mixer's "
            "definition takes them, impl='reference'"
        )
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    return _forward(q, k, v, bias, valid, extents, kernel, dilation, causal, border == "shifted", scale)[0]


def _check_shapes(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> None:
    more = causal and q.dim() == 4  # tokens of the past
    fits = k.dim() == q.dim() and k.shape[0] == q.shape[0] and k.shape[-2:] == q.shape[-2:]
    if not fits or (k.shape[1] < q.shape[1] if more else k.shape[1:-2] != q.shape[1:-2]):
        raise ValueError(f"k: has shape {tuple(k.shape)}, does not fit q {tuple(q.shape)}")
    if v.shape[:-1] != k.shape[:-1]:
        raise ValueError(f"v: has shape {tuple(v.shape)}, does not fit k {tuple(k.shape)}")


def _check_shape(name: str, tensor: Tensor | None, shape: Sequence[int]) -> None:
    if tensor is not None and tensor.shape != torch.Size(shape):
        raise ValueError(f"{name}: has shape {tuple(tensor.shape)}, needs {tuple(shape)}")


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


@torch.library.custom_op("glocal::neighborhood_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    extents: Tensor | None,
    kernel: Sequence[int],
    dilation: int,
    causal: bool,
    shifted: bool,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """The output, and the logarithm of each softmax's divisor, [B, *S, G]."""
    out, lse = _forward_like(q, v)
    if not (q.numel() and v.numel()):
        return out.zero_(), lse.zero_()
    if _on_gpu(q, v):
        from glocal.kernels.triton import attention_calls as calls

        layout = calls.near(k.shape[1:-2], k.shape[-3] - q.shape[-3], kernel, dilation, causal=causal, shifted=shifted)
        flat_q, flat_k, flat_v = (t.flatten(1, -3) for t in (q, k, v))
        lse = calls.forward(layout, flat_q, flat_k, flat_v, *_extras(bias, valid, extents), scale, out)
        return out, lse.view(q.shape[:-1])
    try:
        function = _function("neighborhood_attention", q, v)
    except Unavailable:
        pass
    else:
        q, k, v = (_channels_in_order(t) for t in (q, k, v))
        numbers = _numbers(q, k, v, q, kernel, dilation, causal, shifted, FORWARD_AREA)
        call(function, numbers, q, k, v, *_extras(bias, valid, extents), on_huge_pages(out), lse, float(scale))
        return out, lse
    index, entry = _neighbors(q, k, extents, kernel, dilation, causal, shifted)
    scores = _scores(q, k, bias, valid, index, entry, scale)
    lse = scores.logsumexp(-1)
    lse = lse.masked_fill(lse == -math.inf, 0)
    out = gathered_sum((scores - lse[..., None]).exp(), v.flatten(1, -3), index).to(q.dtype)
    return out.view(*q.shape[:-1], v.shape[-1]), lse.view(q.shape[:-1])


@torch.library.custom_op("glocal::neighborhood_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    valid: Tensor | None,
    extents: Tensor | None,
    out: Tensor,
    lse: Tensor,
    kernel: Sequence[int],
    dilation: int,
    causal: bool,
    shifted: bool,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of q, k, v and bias (empty without one)."""
    found = _backward_like(q, k, v, bias)
    if not (q.numel() and v.numel()):
        return found[0].zero_(), found[1].zero_(), found[2].zero_(), found[3].zero_()
    if _on_gpu(q, v):
        from glocal.kernels.triton import attention_calls as calls

        layout = calls.near(k.shape[1:-2], k.shape[-3] - q.shape[-3], kernel, dilation, causal=causal, shifted=shifted)
        flat_q, flat_k, flat_v, *grads = (t.flatten(1, -3) for t in (q, k, v, *found[:3]))
        extras = _extras(bias, valid, extents)
        if extents is not None:  # of what lies behind an image's end nothing is computed
            grads = [t.zero_() for t in grads]
        entries = calls.backward(layout, grad.to(q.dtype), flat_q, flat_k, flat_v, *extras, scale, grads, (out, lse))
        return *found[:3], found[3] if bias is None or entries is None else entries.view(bias.shape)
    try:
        function = _function("neighborhood_attention_backward", q, v)
    except Unavailable:
        pass
    else:
        q, k, v, grad = (_channels_in_order(t) for t in (q, k, v, grad))
        numbers = _numbers(q, k, v, grad, kernel, dilation, causal, shifted, BACKWARD_AREA)
        extras, saved = _extras(bias, valid, extents), (out.contiguous(), lse.contiguous())
        table = None if bias is None else found[3]
        call(function, numbers, q, k, v, *extras, *saved, grad, *map(on_huge_pages, found[:3]), table, float(scale))
        return found
    index, entry = _neighbors(q, k, extents, kernel, dilation, causal, shifted)
    flat = [t.flatten(1, -3) for t in (grad, q, k, v, out)]
    grad, rows, keys, values, out = flat[0].to(lse.dtype), flat[1].to(lse.dtype) * scale, *flat[2:]
    weights = (_scores(q, k, bias, valid, index, entry, scale) - lse.flatten(1, -2)[..., None]).exp()
    delta = (grad * out).sum(-1, keepdim=True)
    scores = weights * (gathered_scores(grad, values, index) - delta)
    count = keys.shape[1]
    return (
        (gathered_sum(scores, keys, index) * scale).to(q.dtype).view_as(q),
        gathered_scatter(scores, rows, index, count).to(k.dtype).view_as(k),
        gathered_scatter(weights, grad, index, count).to(v.dtype).view_as(v),
        q.new_empty(0, dtype=lse.dtype) if bias is None else _bias_gradient(scores, entry, bias),
    )


def _on_gpu(q: Tensor, v: Tensor) -> bool:
    return gpu.takes(q) and max(q.shape[-1], v.shape[-1]) <= gpu.WIDEST


def _function(operation: str, q: Tensor, v: Tensor) -> Any:
    if q.device.type != "cpu":
        raise Unavailable(f"compiled kernels are for CPUs, not {q.device.type}")
    return getattr(load(f"{operation}.c", q.dtype, DIM=q.shape[-1], VALUE_DIM=v.shape[-1]), operation)


def _numbers(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    grad: Tensor,
    kernel: Sequence[int],
    dilation: int,
    causal: bool,
    shifted: bool,
    area: tuple[int, int],
) -> Tensor:
    """The struct Call of the C file. A sequence is an image of one row."""
    image = q.dim() == 5
    height, heights = (q.shape[1], kernel[0]) if image else (1, 1)
    strides = [t.stride()[:-1] if image else (t.stride(0), 0, *t.stride()[1:-1]) for t in (q, k, v, grad)]
    sizes = (q.shape[0], q.shape[-2], height, k.shape[-3], k.shape[-3] - q.shape[-3])
    options = (heights, kernel[-1], dilation if image else 1, dilation, int(causal), int(shifted))
    tiles = (min(max(q[..., 0].numel() // TILES, area[0]), area[1]), TILE_WIDTH, BIAS_JOBS)
    return torch.tensor([*sizes, *options, *tiles, *(stride for each in strides for stride in each)])


def _extras(
    bias: Tensor | None, valid: Tensor | None, extents: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    if extents is not None and extents.shape[1] == 1:
        extents = torch.cat([torch.ones_like(extents), extents], 1)
    bias, valid, extents = (None if t is None else t.contiguous() for t in (bias, valid, extents))
    return bias, valid, extents


def _channels_in_order(tensor: Tensor) -> Tensor:
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


# The eager path.


def _scores(
    q: Tensor, k: Tensor, bias: Tensor | None, valid: Tensor | None, index: Tensor, entry: Tensor, scale: float
) -> Tensor:
    """[B, N, G, K] in float32 or wider, -inf where a slot is not seen."""
    rows = q.flatten(1, -3).to(_wide(q.dtype)) * scale
    scores = gathered_scores(rows, k.flatten(1, -3), index)
    if bias is not None:
        scores = scores + bias.flatten(1)[:, entry].permute(1, 2, 0, 3)
    seen = index >= 0
    if valid is not None:
        flat = valid.flatten(1).expand(len(q), -1)
        seen = seen & flat.gather(1, index.expand(len(q), -1, -1).clamp(min=0).flatten(1)).view(
            len(q), *index.shape[1:]
        )
    return scores.masked_fill(~seen[:, :, None], -math.inf)


def _neighbors(
    q: Tensor, k: Tensor, extents: Tensor | None, kernel: Sequence[int], dilation: int, causal: bool, shifted: bool
) -> tuple[Tensor, Tensor]:
    """[B|1, N, K] sources of each query, -1 for none, and [B|1, N, K] their entries in the table of the bias."""
    index = entry = torch.zeros(1, 1, 1, dtype=torch.int64, device=q.device)
    for axis, (n, length) in enumerate(zip(k.shape[1:-2], kernel, strict=True)):
        token = torch.arange(n - q.shape[axis + 1], n, device=q.device)[:, None]
        tap = torch.arange(length, device=q.device)
        end = torch.tensor(n, device=q.device) if extents is None else extents[:, axis, None, None]
        member = token // dilation  # among those of its class
        first = member - (length - 1 if causal else length // 2)
        if shifted:
            last = (end - token % dilation + dilation - 1) // dilation - length
            first = torch.minimum(first, last).clamp(min=0)
        source = token % dilation + dilation * (first + tap)
        source = torch.where((source >= 0) & (source < end), source, -1)
        place = (first + tap - member + length - 1).clamp(0, 2 * length - 2)
        source, place = source.view(-1, *source.shape[-2:]), place.view(-1, *place.shape[-2:])
        index = _join(index, source, n).masked_fill(_join(index, source.clamp(max=0), 2) < 0, -1)
        entry = _join(entry, place, 2 * length - 1)
    return index, entry


def _join(rows: Tensor, columns: Tensor, size: int) -> Tensor:
    """[B, N, K] and [B, n, k] to [B, N*n, K*k]; negative where either is."""
    rows, columns = rows[:, :, None, :, None], columns[:, None, :, None, :]
    return torch.where((rows >= 0) & (columns >= 0), rows * size + columns, -1).flatten(3).flatten(1, 2)


def _bias_gradient(scores: Tensor, entry: Tensor, bias: Tensor) -> Tensor:
    grad = bias.new_zeros(math.prod(bias.shape[1:]), len(bias))
    for slot in range(scores.shape[-1]):
        places = entry[:, :, slot].expand(scores.shape[:2])
        grad.index_add_(0, places.flatten(), scores[..., slot].flatten(0, 1).to(grad.dtype))
    return grad.t().reshape(bias.shape)


# What torch.library needs.


def _forward_like(q: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    return q.new_empty(*q.shape[:-1], v.shape[-1]), q.new_empty(q.shape[:-1], dtype=_wide(q.dtype))


def _backward_like(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    table = q.new_empty(0, dtype=_wide(q.dtype)) if bias is None else bias.new_empty(bias.shape)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), table


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return _forward_like(q, v)


@_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    return _backward_like(q, k, v, bias)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*inputs[:6], *output)
    ctx.mark_non_differentiable(output[1])
    ctx.options = inputs[6:]


def _differentiate(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    found = _backward(grad, *ctx.saved_tensors, *ctx.options)
    return *(g if need else None for g, need in zip(found, ctx.needs_input_grad, strict=False)), *[None] * 7


def _save_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs[:7])
    ctx.options = inputs[9:]


def _differentiate_again(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    """The eager formula's own derivative: `out` and `lse` count as functions of the other inputs, not as inputs."""
    grad, q, k, v, bias, valid, extents = ctx.saved_tensors
    kernel, dilation, causal, shifted, scale = ctx.options
    again = torch.is_grad_enabled()
    with torch.enable_grad():
        grad, q, k, v = (_leaf(t) for t in (grad, q, k, v))
        bias = None if bias is None else _leaf(bias)
        leaves = [q, k, v] if bias is None else [q, k, v, bias]
        index, entry = _neighbors(q, k, extents, kernel, dilation, causal, shifted)
        scores = _scores(q, k, bias, valid, index, entry, scale)
        seen = scores > -math.inf
        weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1) * seen
        out = gathered_sum(weights, v.flatten(1, -3), index).to(q.dtype).view(grad.shape)
        first = torch.autograd.grad(out, leaves, grad, create_graph=True)
        leaves, upstream = [grad, *leaves], upstream[: len(leaves)]
        found = torch.autograd.grad(first, leaves, upstream, create_graph=again, materialize_grads=True)
    return *found, *[None] * (14 - len(found))


def _leaf(tensor: Tensor) -> Tensor:
    """The same, on the graph that it is on, as something to differentiate in."""
    tensor = tensor.view_as(tensor)
    return tensor if tensor.requires_grad else tensor.requires_grad_()


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_differentiate_again, setup_context=_save_backward)


@register_flop_formula(torch.ops.glocal.neighborhood_attention)
def _forward_flops(q: torch.Size, k: torch.Size, v: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(q[:-1]) * math.prod(args[3]) * (q[-1] + v[-1])


@register_flop_formula(torch.ops.glocal.neighborhood_attention_backward)
def _backward_flops(grad: torch.Size, q: torch.Size, k: torch.Size, v: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * math.prod(q[:-1]) * math.prod(args[5]) * (3 * q[-1] + 2 * v[-1])
