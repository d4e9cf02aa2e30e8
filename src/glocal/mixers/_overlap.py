"""Windows that overlap: cut out of a grid, and added up where they lie. Each is the derivative of the other.

Shape letters: B batch, S grid, W windows, K places of a window, G heads, D channels per head.
"""

from collections.abc import Iterator, Sequence
from itertools import product
from typing import Any

import torch
from torch import Tensor


def cut(tokens: Tensor, kernel: Sequence[int], stride: int) -> Tensor:
    """[B, *S, G, D] -> [B, *W, G, *K, D], W = (S - K) / stride + 1 along each axis."""
    # a compiled program derives it by itself
    return _cut(tokens, kernel, stride) if torch.compiler.is_compiling() else _Cut.apply(tokens, kernel, stride)


def added(windows: Tensor, grid: Sequence[int], stride: int) -> Tensor:
    """[B, *W, G, *K, D] -> [B, *grid, G, D]: sums over all windows that a token lies in."""
    if torch.compiler.is_compiling():
        return _added(windows, grid, stride)
    return _Added.apply(windows, grid, stride)


class _Cut(torch.autograd.Function):
    """Autograd alone would make zeros of the whole grid for each place of a window."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, kernel: Sequence[int], stride: int) -> Tensor:
        ctx.grid, ctx.stride = tokens.shape[1:-2], stride
        return _cut(tokens, kernel, stride)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return added(grad, ctx.grid, ctx.stride), None, None


class _Added(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, windows: Tensor, grid: Sequence[int], stride: int) -> Tensor:
        rank = len(grid)
        ctx.kernel, ctx.stride = windows.shape[rank + 2 : -1], stride
        return _added(windows, grid, stride)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return cut(grad, ctx.kernel, ctx.stride), None, None


def _cut(tokens: Tensor, kernel: Sequence[int], stride: int) -> Tensor:
    counts = [(n - k) // stride + 1 for n, k in zip(tokens.shape[1:-2], kernel, strict=True)]
    places = [tokens[under] for under in _under(kernel, counts, stride)]
    return torch.stack(places, -2).unflatten(-2, tuple(kernel))


def _added(windows: Tensor, grid: Sequence[int], stride: int) -> Tensor:
    rank = len(grid)
    kernel, counts = windows.shape[rank + 2 : -1], windows.shape[1 : rank + 1]
    out = windows.new_zeros(windows.shape[0], *grid, windows.shape[rank + 1], windows.shape[-1])
    places = windows.flatten(rank + 2, -2)
    for i, under in enumerate(_under(kernel, counts, stride)):
        out[under] += places[..., i, :]
    return out


def _under(kernel: Sequence[int], counts: Sequence[int], stride: int) -> Iterator[tuple[slice, ...]]:
    """The tokens under each place of a window, of all windows."""
    for place in product(*map(range, kernel)):
        yield slice(None), *(slice(p, p + stride * (n - 1) + 1, stride) for p, n in zip(place, counts, strict=True))
