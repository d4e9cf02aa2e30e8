"""Attention over a few sources for each query, one slot after the other: never K copies of anything.

Three functions that are each other's derivatives, to any order: scores <q, k[index]>, sums of w * v[index],
and the scatter that carries gradients back to the sources. Registered with torch.library, so that they are
opaque to torch.compile and torch.export.

Shape letters: B batch, N queries, M sources, G heads, D channels per head, K slots.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from glocal.kernels.compiled import tangents_wanted


def gathered_scores(q: Tensor, k: Tensor, index: Tensor) -> Tensor:
    """s[b, n, g, t] = <q[b, n, g], k[b, index[n, t], g]>; 0 where the index is -1.

    Args:
        q: [B, N, G, D].
        k: [B, M, G, D].
        index: int64 [B or 1, N, K], -1 for an empty slot.

    Returns:
        [B, N, G, K].

    Cost: B*N*K*G*D multiply-adds. Memory: one copy of k at a time.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check(q, k, index)
    if tangents_wanted():
        full = (index >= 0).unsqueeze(2)
        return torch.where(full, torch.einsum("bngd,bnkgd->bngk", q, _picked(k, index)), 0)
    return _scores(q, k, index)


@torch.library.custom_op("glocal::gathered_scores", mutates_args=())
def _scores(q: Tensor, k: Tensor, index: Tensor) -> Tensor:
    out = q.new_empty(*q.shape[:3], index.shape[-1])
    wide = _wide(q)
    k = _with_zero(k)
    for slot, (rows, inside) in enumerate(_slots(index, q.shape[0], len(k) - 1)):
        picked = k.index_select(0, rows).view_as(q)
        out[..., slot] = torch.where(inside, (q.to(wide) * picked.to(wide)).sum(-1), 0)
    return out


def gathered_sum(w: Tensor, v: Tensor, index: Tensor) -> Tensor:
    """y[b, n, g] = sum over t of w[b, n, g, t] * v[b, index[n, t], g]; empty slots count as zero.

    Args:
        w: [B, N, G, K].
        v: [B, M, G, D].
        index: int64 [B or 1, N, K], -1 for an empty slot.

    Returns:
        [B, N, G, D].

    Cost: B*N*K*G*D multiply-adds. Memory: one copy of v at a time.

    Raises:
        ValueError: shapes that do not fit.
    """
    _check(w, v, index)
    if tangents_wanted():
        full = (index >= 0).unsqueeze(2)
        return torch.einsum("bngk,bnkgd->bngd", torch.where(full, w, 0), _picked(v, index))
    return _sum(w, v, index)


@torch.library.custom_op("glocal::gathered_sum", mutates_args=())
def _sum(w: Tensor, v: Tensor, index: Tensor) -> Tensor:
    wide = _wide(w)
    out = torch.zeros(*w.shape[:3], v.shape[-1], dtype=wide, device=w.device)
    width, v = v.shape[-1], _with_zero(v)
    for slot, (rows, inside) in enumerate(_slots(index, w.shape[0], len(v) - 1)):
        picked = v.index_select(0, rows).view(*w.shape[:3], width)
        out.addcmul_(picked.to(wide), torch.where(inside, w[..., slot].to(wide), 0)[..., None])
    return out.to(w.dtype)


@torch.library.custom_op("glocal::gathered_scatter", mutates_args=())
def gathered_scatter(w: Tensor, y: Tensor, index: Tensor, num_sources: int) -> Tensor:
    """z[b, index[n, t], g] += w[b, n, g, t] * y[b, n, g]: the transpose of `gathered_sum`.

    Args:
        w: [B, N, G, K].
        y: [B, N, G, D].
        index: int64 [B or 1, N, K], -1 for an empty slot.
        num_sources: M.

    Returns:
        [B, M, G, D].
    """
    wide = _wide(y)
    total = y.shape[0] * num_sources
    out = torch.zeros(total + 1, *y.shape[2:], dtype=wide, device=y.device)
    for slot, (rows, _) in enumerate(_slots(index, y.shape[0], total)):
        out.index_add_(0, rows, (w[..., slot].to(wide)[..., None] * y.to(wide)).flatten(0, 1))
    return out[:total].view(y.shape[0], num_sources, *y.shape[2:]).to(y.dtype)


def _picked(sources: Tensor, index: Tensor) -> Tensor:
    """[B, N, K, G, D], zeros in empty slots: K copies, but of functions that torch differentiates in every way."""
    images = torch.arange(len(sources), device=index.device).view(-1, 1, 1)
    picked = sources[images, index.clamp(min=0)]
    return torch.where((index >= 0)[..., None, None], picked, 0)


def _with_zero(sources: Tensor) -> Tensor:
    """[B, M, G, D] -> [B*M + 1, G, D]; what empty slots read is a row of zeros, whatever the sources hold."""
    return torch.cat([sources.flatten(0, 1), sources.new_zeros(1, *sources.shape[2:])])


def _slots(index: Tensor, batch: int, total: int) -> Iterator[tuple[Tensor, Tensor]]:
    """For each slot: rows of the flattened sources (`total` if empty), and whether it is full [B or 1, N, 1]."""
    inside = index >= 0
    first = torch.arange(batch, device=index.device).view(-1, 1, 1) * (total // max(batch, 1))
    rows = torch.where(inside, index + first, total).movedim(-1, 0).flatten(1)
    yield from zip(rows.unbind(0), inside.unsqueeze(-2).unbind(-1), strict=True)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _check(queries: Tensor, sources: Tensor, index: Tensor) -> None:
    if index.dim() != 3 or index.shape[0] not in (1, queries.shape[0]) or index.shape[1] != queries.shape[1]:
        raise ValueError(
            f"index: has shape {tuple(index.shape)}, needs [{queries.shape[0]} or 1, {queries.shape[1]}, K]"
        )
    if sources.shape[0] != queries.shape[0] or sources.shape[2] != queries.shape[2]:
        raise ValueError(f"sources: have shape {tuple(sources.shape)}, the queries {tuple(queries.shape)}")


@_scores.register_fake
def _(q: Tensor, k: Tensor, index: Tensor) -> Tensor:
    return q.new_empty(*q.shape[:3], index.shape[-1])


@_sum.register_fake
def _(w: Tensor, v: Tensor, index: Tensor) -> Tensor:
    return w.new_empty(*w.shape[:3], v.shape[-1])


@gathered_scatter.register_fake
def _(w: Tensor, y: Tensor, index: Tensor, num_sources: int) -> Tensor:
    return y.new_empty(y.shape[0], num_sources, *y.shape[2:])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _scores_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    q, k, index = ctx.saved_tensors
    need_q, need_k, _ = ctx.needs_input_grad
    return (
        _sum(grad, k, index) if need_q else None,
        gathered_scatter(grad, q, index, k.shape[1]) if need_k else None,
        None,
    )


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    w, v, index = ctx.saved_tensors
    need_w, need_v, _ = ctx.needs_input_grad
    return (
        _scores(grad, v, index) if need_w else None,
        gathered_scatter(w, grad, index, v.shape[1]) if need_v else None,
        None,
    )


def _scatter_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    w, y, index = ctx.saved_tensors
    need_w, need_y = ctx.needs_input_grad[:2]
    return (
        _scores(y, grad, index) if need_w else None,
        _sum(w, grad, index) if need_y else None,
        None,
        None,
    )


_scores.register_autograd(_scores_backward, setup_context=_save)
_sum.register_autograd(_sum_backward, setup_context=_save)
gathered_scatter.register_autograd(_scatter_backward, setup_context=_save)


@register_flop_formula(torch.ops.glocal.gathered_scores)
def _scores_flops(q: torch.Size, k: torch.Size, index: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * q.numel() * index[-1]


@register_flop_formula(torch.ops.glocal.gathered_sum)
def _sum_flops(w: torch.Size, v: torch.Size, index: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * w.numel() * v[-1]


@register_flop_formula(torch.ops.glocal.gathered_scatter)
def _scatter_flops(w: torch.Size, y: torch.Size, *args: Any, **kwargs: Any) -> int:
    return 2 * w.numel() * y[-1]
