"""What the encodings that are added share: the grid of x, tokens in front of it, places that start at an offset."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from glocal.arguments import check_tokens, check_valid


class Tokens(NamedTuple):
    """What x [B, *S, C] or [B, P + prod(S), C] says of its positions."""

    grid: tuple[int, ...]
    prefix: int  # class or register tokens in front
    valid: Tensor | None  # [B, *S], without those in front
    flat: bool  # whether x is [B, P + N, C]


def read(
    encoding: nn.Module, x: Tensor, dim: int, rank: int, grid: Sequence[int] | None, valid: Tensor | None
) -> Tokens:
    """Checks x and its mask, and finds their grid."""
    name = type(encoding).__name__
    check_tokens(name, "x", x, dim)
    shape = tuple(x.shape[1:-1])
    valid = None if valid is None else check_valid(name, valid, tuple(x.shape[:-1]))
    if grid is None:
        found = Tokens(shape, 0, valid, flat=False)
    else:
        grid = tuple(grid)
        prefix = x.shape[1] - math.prod(grid)
        if x.dim() != 3 or prefix < 0:
            raise ValueError(
                f"{name}: x has shape {tuple(x.shape)}, grid {grid} needs [B, P + {math.prod(grid)}, {dim}]"
            )
        valid = None if valid is None else valid[:, prefix:].unflatten(1, grid)
        found = Tokens(grid, prefix, valid, flat=True)
    if len(found.grid) != rank:
        raise ValueError(
            f"{name}: made for grids of rank {rank}, x has {found.grid}; where x is flat, name its grid: grid=(H, W)"
        )
    return found


def written(encoding: Tensor, tokens: Tokens, x: Tensor, in_front: Tensor | None = None) -> Tensor:
    """An encoding [B|1, *S, C] in the shape and dtype of x; `in_front` [1, P, C], zeros if None, before the grid's."""
    if tokens.flat:
        encoding = encoding.flatten(1, -2)
        if in_front is None:
            in_front = encoding.new_zeros(1, tokens.prefix, encoding.shape[-1])
        encoding = torch.cat([in_front.to(encoding.dtype).expand(encoding.shape[0], -1, -1), encoding], 1)
    return encoding.to(x.dtype)


def steps(length: int, offset: int | Tensor, valid: Tensor | None, device: torch.device) -> Tensor:
    """Places in a sequence, [1, T] or [B, T]: offset, offset + 1, ...; with `valid` only real tokens count."""
    start = offset[:, None] if isinstance(offset, Tensor) and offset.dim() else offset
    if valid is not None:
        return valid.cumsum(1) - 1 + start
    return (torch.arange(length, device=device) + start).reshape(-1, length)
