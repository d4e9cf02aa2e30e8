"""Checks of arguments: one sentence that names the argument, what was given and what is allowed."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

CALL = ("source", "grid", "valid", "pos_embed", "source_pos_embed", "queries", "cache")

# Of constructors.


def positive(name: str, value: int) -> int:
    """`value` if it is a positive whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: {value!r}, must be a positive whole number")
    return value


def flag(name: str, value: bool) -> bool:
    """`value` if it is True or False; text such as 'False' would count as true."""
    if not isinstance(value, bool):
        raise ValueError(f"{name}: {value!r}, must be True or False")
    return value


def rate(name: str, value: float) -> float:
    """`value` if it is a share that may be dropped: 0 <= value < 1."""
    if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < 1:
        raise ValueError(f"{name}: {value!r}, must be a number, at least 0 and less than 1")
    return value


def per_axis(name: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """One positive number for each axis of the grid, from one for all or one for each."""
    if not isinstance(value, int | list | tuple) or isinstance(value, bool):
        raise ValueError(f"{name}: {value!r}, must be a whole number, or one for each axis")
    sizes = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(sizes) != rank:
        raise ValueError(
            f"{name}: {value!r} has {len(sizes)} entries, rank is {rank}; give one number or one for each axis"
        )
    return tuple(positive(name, size) for size in sizes)


def every_axis(name: str, value: Sequence[int]) -> tuple[int, ...]:
    """The lengths of a grid, which say its rank too."""
    if isinstance(value, int):
        raise ValueError(
            f"{name}: {value}, must name every axis, as in ({value}, {value}) for images or ({value},) for sequences"
        )
    if not isinstance(value, list | tuple) or not value:
        raise ValueError(f"{name}: {value!r}, must name every axis, as in (14, 14) for images or (196,) for sequences")
    return per_axis(name, value, len(value))


def one_of(name: str, value: str, allowed: Sequence[str]) -> str:
    """`value` if it is one of the words allowed."""
    if value not in allowed:
        raise ValueError(f"{name}: {value!r}, must be {' or '.join(map(repr, allowed))}")
    return value


def odd_kernel(name: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """`per_axis` for kernels that need a centre."""
    sizes = per_axis(name, value, rank)
    if any(size % 2 == 0 for size in sizes):
        raise ValueError(f"{name}: {value!r}, must be odd, so that a window has a centre; try {sizes[0] | 1}")
    return sizes


def shift(value: int, window: Sequence[int]) -> int:
    """`value` if 0 <= value < every window length."""
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < min(window):
        raise ValueError(
            f"shift_size: {value!r}, must be a whole number, 0 or more and smaller than the window, {min(window)}"
        )
    return value


def resolve_heads(dim: int, num_heads: int | None, head_dim: int | None) -> int:
    """The number of heads from either argument; heads of 32 channels where neither is given."""
    if num_heads is not None and head_dim is not None and num_heads * head_dim != dim:
        raise ValueError(
            f"num_heads: {num_heads} heads of head_dim {head_dim} make {num_heads * head_dim}, not {dim}; give one"
        )
    if num_heads is None:
        size = positive("head_dim", 32 if head_dim is None else head_dim)
        if dim % size:
            said = (
                "head_dim" if head_dim is not None else "num_heads: neither it nor head_dim is given, and the default"
            )
            raise ValueError(f"{said}: {size} does not divide {dim} channels; give num_heads, or a head_dim that does")
        return dim // size
    positive("num_heads", num_heads)
    if dim % num_heads:
        raise ValueError(f"num_heads: {num_heads} does not divide {dim} channels")
    return num_heads


# Of calls; `mixer` is the operator's name.


def given(**call: Any) -> dict[str, Any]:
    """The arguments of a call that were given."""
    for name in call:
        if name not in CALL:
            raise TypeError(f"a token mixer has no call argument {name!r}; it has {', '.join(CALL)}")
    return {name: value for name, value in call.items() if value is not None}


def check_tokens(mixer: str, name: str, tokens: Tensor, dim: int, width: str = "dim") -> None:
    """Tokens [B, *grid, dim], at least one in every image."""
    if not isinstance(tokens, Tensor) or not tokens.is_floating_point():
        given = f"has dtype {tokens.dtype}" if isinstance(tokens, Tensor) else f"is a {type(tokens).__name__}"
        raise ValueError(f"{mixer}: {name} {given}, needs a torch.Tensor of floating-point numbers, [B, *grid, {dim}]")
    if tokens.dim() < 3:
        raise ValueError(f"{mixer}: {name} has shape {tuple(tokens.shape)}, needs [B, *grid, {dim}]")
    if tokens.shape[-1] != dim:
        raise ValueError(f"{mixer}: {name} has {tokens.shape[-1]} channels, {width} is {dim}; channels come last")
    if any(n == 0 for n in tokens.shape[1:-1]):
        raise ValueError(f"{mixer}: {name} has shape {tuple(tokens.shape)}: no tokens; give at least one")


def check_valid(mixer: str, valid: Tensor, tokens: tuple[int, ...]) -> Tensor:
    """bool [B, *S] or flat [B, M] -> [B, *S], for tokens [B, *S]."""
    flat = (tokens[0], math.prod(tokens[1:]))
    if valid.dtype != torch.bool or tuple(valid.shape) not in (tokens, flat):
        raise ValueError(
            f"{mixer}: valid has shape {tuple(valid.shape)} and dtype {valid.dtype}; "
            f"needs {tokens} and torch.bool, True at real tokens"
        )
    return valid.reshape(tokens)


def check_positions(mixer: str, name: str, positions: Tensor, tokens: Tensor) -> Tensor:
    """[B, *S, C], [1, *S, C] or [*S, C] for tokens [B, *S, C] -> four axes or as many as the tokens have."""
    positions = positions[None] if positions.dim() == tokens.dim() - 1 else positions
    if tuple(positions.shape) not in (tuple(tokens.shape), (1, *tokens.shape[1:])):
        raise ValueError(f"{mixer}: {name} has shape {tuple(positions.shape)}, the tokens have {tuple(tokens.shape)}")
    return positions


def check_queries(mixer: str, queries: Tensor) -> None:
    """int64 [Q]."""
    if queries.dim() != 1 or queries.dtype != torch.int64:
        raise ValueError(
            f"{mixer}: queries has shape {tuple(queries.shape)} and dtype {queries.dtype}; needs int64 [Q], positions "
            "in the flattened output (of a mask: mask.flatten().nonzero()[:, 0])"
        )


def finite_outside(tokens: Tensor, valid: Tensor) -> Tensor:
    """Tokens with 0 for what is infinite or NaN where not valid: no mask stops it from reaching real tokens."""
    return tokens.masked_fill(~valid[..., None] & ~tokens.isfinite(), 0)


def extents(valid: Tensor) -> Tensor:
    """[B, *S] -> [B, rank]: each image's own size.

    Raises:
        ValueError: some image's real tokens are no rectangle anchored at the origin.
    """
    rank = valid.dim() - 1
    lengths = []
    for axis in range(rank):
        others = tuple(a + 1 for a in range(rank) if a != axis)
        lengths.append((valid.any(dim=others) if others else valid).sum(-1))
    size = torch.stack(lengths, -1)
    inside = torch.ones_like(valid)
    for axis, n in enumerate(valid.shape[1:]):
        shape = [1] * (rank + 1)
        shape[axis + 1] = n
        along = torch.arange(n, device=valid.device).view(shape)
        inside = inside & (along < size[:, axis].view(-1, *[1] * rank))
    if not torch.compiler.is_compiling() and not valid.is_meta and not torch.equal(inside, valid):
        raise ValueError(
            "valid: the real tokens of an image are no rectangle anchored at the origin; this operator's geometry "
            "depends on each image's size, so pad images at their ends only"
        )
    return size
