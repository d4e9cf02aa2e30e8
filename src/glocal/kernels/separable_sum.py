"""Sums over a grid with weights that are a product of one along each axis, without forming the product.

Three functions that are each other's derivatives, to any order: the sums, their transpose, and the inner products
that are the gradient of the weights along one axis. Two matrix products each in plain PyTorch, on a GPU one launch of
Triton (triton/separable_sum.py). Registered with torch.library, so that they are opaque to torch.compile and
torch.export.

Shape letters: B batch, K x L grid of sources, I x J of queries, G heads, C channels of each.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from glocal.kernels import gpu
from glocal.kernels.compiled import tangents_wanted


def separable_sum(rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """y[b, i, j, g] = sum over k, l of rows[g, i, k] * columns[g, j, l] * values[b, k, l, g].

    Args:
        rows: [G, I, K], rounded to the type of the values, as columns are.
        columns: [G, J, L].
        values: [B, K, L, G, C], or [B, K, L, 1, C] for all heads.

    Returns:
        [B, I, J, G, C], in the type of the values, or autocast's.

    Cost: B*G*C*(K*L*J + K*J*I) multiply-adds, backward three times as many. Memory: B*K*J*G*C numbers between the two
    products, that are kept for backward; on a GPU none, and up to 1024 * (I*K + J*L) in backward, more with many heads.

    Raises:
        ValueError: shapes that do not fit.
    """
    if not rows.dim() == columns.dim() == 3:
        raise ValueError(
            f"rows and columns: have shapes {tuple(rows.shape)} and {tuple(columns.shape)}, need [G, I, K] and "
            "[G, J, L]"
        )
    heads = len(rows)
    expected = (rows.shape[2], columns.shape[2])
    if len(columns) != heads or values.dim() != 5 or values.shape[3] not in (1, heads):
        raise ValueError(
            f"values: have shape {tuple(values.shape)}, rows {tuple(rows.shape)} and columns {tuple(columns.shape)} "
            f"need [B, {rows.shape[2]}, {columns.shape[2]}, {heads} or 1, C]"
        )
    if values.shape[1:3] != expected:
        raise ValueError(f"values: are a grid of {tuple(values.shape[1:3])}, the weights are for one of {expected}")
    if not gpu.takes(values) or tangents_wanted():
        return plain(rows, columns, values)
    device = values.device.type
    if torch.is_autocast_enabled(device):  # of which matrix products would be
        values = values.to(torch.get_autocast_dtype(device))
    return _separable_sum(rows, columns, values)


def plain(rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    """The same by two matrix products."""
    by_row = torch.einsum("gjl,bklgc->bkjgc", columns.to(values.dtype), values)
    return torch.einsum("gik,bkjgc->bijgc", rows.to(values.dtype), by_row)


@torch.library.custom_op("glocal::separable_sum", mutates_args=())
def _separable_sum(rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    if not gpu.takes(values):
        return plain(rows, columns, values).contiguous()
    from glocal.kernels.triton import separable_sum as kernels

    out = _like(values, rows.shape[1], columns.shape[1], len(rows))
    kernels.separable_sum(rows, columns, values, out)
    return out


@torch.library.custom_op("glocal::separable_sum_transposed", mutates_args=())
def _transposed(rows: Tensor, columns: Tensor, above: Tensor, shared: bool) -> Tensor:
    """What each source is given back, [B, K, L, G, C]; shared: by all heads, [B, K, L, 1, C]."""
    if not gpu.takes(above):
        found = plain(rows.mT, columns.mT, above)
        return (found.sum(3, keepdim=True) if shared else found).contiguous()
    from glocal.kernels.triton import separable_sum as kernels

    out = _like(above, rows.shape[2], columns.shape[2], 1 if shared else len(rows))
    kernels.separable_sum(rows.mT, columns.mT, above, out)
    return out


@torch.library.custom_op("glocal::separable_sum_products", mutates_args=())
def _products(columns: Tensor, values: Tensor, above: Tensor) -> Tensor:
    """[G, I, K]: sum over b, j, c of above[b, i, j, g] * (sum over l of columns[g, j, l] * values[b, k, l, g])."""
    if gpu.takes(values):
        from glocal.kernels.triton import separable_sum as kernels

        return kernels.separable_sum_products(columns, values, above).to(columns.dtype)
    by_row = torch.einsum("gjl,bklgc->bkjgc", columns.to(values.dtype), values)
    return torch.einsum("bijgc,bkjgc->gik", above, by_row).contiguous().to(columns.dtype)


def _like(tensor: Tensor, height: int, width: int, heads: int) -> Tensor:
    return tensor.new_empty(tensor.shape[0], height, width, heads, tensor.shape[4])


@_separable_sum.register_fake
def _(rows: Tensor, columns: Tensor, values: Tensor) -> Tensor:
    return _like(values, rows.shape[1], columns.shape[1], rows.shape[0])


@_transposed.register_fake
def _(rows: Tensor, columns: Tensor, above: Tensor, shared: bool) -> Tensor:
    return _like(above, rows.shape[2], columns.shape[2], 1 if shared else rows.shape[0])


@_products.register_fake
def _(columns: Tensor, values: Tensor, above: Tensor) -> Tensor:
    return columns.new_empty(columns.shape[0], above.shape[1], values.shape[1])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:3])


def _weights(
    needed: tuple[bool, ...], rows: Tensor, columns: Tensor, values: Tensor, above: Tensor
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of rows and of columns, which are rows of the image turned."""
    return (
        _products(columns, values, above).to(rows.dtype) if needed[0] else None,
        _products(rows, values.transpose(1, 2), above.transpose(1, 2)).to(columns.dtype) if needed[1] else None,
    )


def _sum_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, columns, values = ctx.saved_tensors
    needed = ctx.needs_input_grad
    back = _transposed(rows, columns, grad, values.shape[3] == 1) if needed[2] else None
    return *_weights(needed, rows, columns, values, grad), back


def _transposed_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    rows, columns, above = ctx.saved_tensors
    needed = ctx.needs_input_grad
    return (
        *_weights(needed, rows, columns, grad, above),
        _separable_sum(rows, columns, grad) if needed[2] else None,
        None,
    )


def _products_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    columns, values, above = ctx.saved_tensors
    needed = ctx.needs_input_grad
    return (
        _weights((False, needed[0]), grad, columns, values, above)[1],
        _transposed(grad, columns, above, values.shape[3] == 1) if needed[1] else None,
        _separable_sum(grad, columns, values) if needed[2] else None,
    )


_separable_sum.register_autograd(_sum_backward, setup_context=_save)
_transposed.register_autograd(_transposed_backward, setup_context=_save)
_products.register_autograd(_products_backward, setup_context=_save)


def _flops(queries: tuple[int, int], sources: tuple[int, int], heads: int, image: torch.Size) -> int:
    """Along the columns, then along the rows."""
    return 2 * image[0] * heads * image[4] * sources[0] * queries[1] * (sources[1] + queries[0])


@register_flop_formula(torch.ops.glocal.separable_sum)
def _sum_flops(rows: torch.Size, columns: torch.Size, values: torch.Size, *args: Any, **kwargs: Any) -> int:
    return _flops((rows[1], columns[1]), (rows[2], columns[2]), rows[0], values)


@register_flop_formula(torch.ops.glocal.separable_sum_transposed)
def _transposed_flops(rows: torch.Size, columns: torch.Size, above: torch.Size, *args: Any, **kwargs: Any) -> int:
    return _flops((rows[2], columns[2]), (rows[1], columns[1]), rows[0], above)


@register_flop_formula(torch.ops.glocal.separable_sum_products)
def _products_flops(columns: torch.Size, values: torch.Size, above: torch.Size, *args: Any, **kwargs: Any) -> int:
    return _flops((above[1], columns[1]), (values[1], columns[2]), columns[0], values)
