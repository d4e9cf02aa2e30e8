"""Heads whose weights are a product of one softmax along each axis, or a single one: mixed without forming them.

Shape letters: B batch, H W grid, m l queries along its axes, C channels, O output channels, K heads, g groups of c
channels that make o, P positions of a flattened image.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

_WIDE = 64  # channels from which a matrix product is worth its call


class Heads(NamedTuple):
    """K heads, by what they share."""

    rows: Tensor  # [I, m, H]
    columns: Tensor  # [J, l, W]
    row: list[int]  # of each head
    column: list[int]  # of each head
    value: Tensor  # [K, g, c, o]


def mix_by_axes(image: Tensor, heads: Heads, *, strided: bool) -> Tensor:
    """sum over heads of rows x image x columns, times the head's value: [B, H, W, C] -> [B, m, l, O].

    Along the columns first, once for each set of weights. Then, where that is less, heads with the same rows are added
    before these mix them: not with a stride, which leaves fewer queries to compute values for.
    """
    batch, height, width, dim = image.shape
    rows, columns, row, column, value = heads
    out_dim, wide = value.shape[1] * value.shape[3], columns.shape[1]
    across = image.permute(2, 1, 0, 3).reshape(width, height * batch * dim)
    mixed = (columns.flatten(0, 1) @ across).view(len(columns), wide * height * batch, dim)
    if strided or out_dim * len(rows) > dim * len(row):
        mixed = (
            mixed.view(len(columns), wide, height, batch * dim)
            .transpose(1, 2)
            .reshape(len(columns), height, wide * batch * dim)
        )
        mixed = torch.bmm(_chosen(rows, row), _chosen(mixed, column))
        return _valued(mixed.view(len(row), rows.shape[1], wide, batch, dim), value)
    sums: list[Tensor | None] = [None] * len(rows)
    for head, (i, j) in enumerate(zip(row, column, strict=True)):
        sums[i] = _added(sums[i], mixed[j], value[head])
    del mixed
    down = [s.view(wide, height, batch * out_dim).transpose(0, 1) for s in sums if s is not None]
    out = rows.transpose(0, 1).flatten(1) @ torch.stack(down).view(len(rows) * height, wide * batch * out_dim)
    return out.view(rows.shape[1], wide, batch, out_dim).permute(2, 0, 1, 3).contiguous()


def sum_of_taps(
    padded: Tensor, taps: Sequence[tuple[int, int]], value: Tensor, stride: Sequence[int], out: Sequence[int]
) -> Tensor:
    """Heads that read one place each: sum over heads of padded[stride * query + tap], times the head's value.

    In an image laid out row after row a tap is a step of the same length for every query, so that no copy is made for
    it: the queries between, which wrap around, are computed too and left out. Of a stride, each phase is laid out.

    Args:
        padded: [B, H, W, C], with its padding.
        taps: of each head, row and column in `padded` that the first query reads.
        value: [K, g, c, o].
        stride: between queries, in rows and columns.
        out: queries [m, l].

    Returns:
        [B, m, l, O].
    """
    batch, dim = padded.shape[0], padded.shape[3]
    beyond = [-n % s for n, s in zip(padded.shape[1:3], stride, strict=True)]
    if any(beyond):
        padded = torch.nn.functional.pad(padded, (0, 0, 0, beyond[1], 0, beyond[0]))
    height, width = (n // s for n, s in zip(padded.shape[1:3], stride, strict=True))
    phases: dict[tuple[int, int], Tensor] = {}
    steps = []
    for down, right in taps:
        phase = (down % stride[0], right % stride[1])
        if phase not in phases:
            phases[phase] = padded[:, phase[0] :: stride[0], phase[1] :: stride[1]].reshape(-1, dim)
        steps.append((phase, (down // stride[0]) * width + right // stride[1]))
    rows = batch * height * width - max(step for _, step in steps)
    read = [phases[phase].narrow(0, step, rows) for phase, step in steps]
    groups, wide = value.shape[1:3]
    several = 1 if groups == dim else max(1, _WIDE // wide)  # taps of few channels are laid side by side
    total: Tensor | None = None
    for first in range(0, len(read), several):
        own = read[first : first + several]
        if len(own) == 1:
            total = _added(total, own[0], value[first])
            continue
        beside = torch.cat([t.view(rows, groups, wide) for t in own], 2).flatten(1)
        total = _added(total, beside, value[first : first + several].transpose(0, 1).flatten(1, 2))
    assert total is not None
    total = torch.nn.functional.pad(total, (0, 0, 0, batch * height * width - rows))
    return total.view(batch, height, width, -1)[:, : out[0], : out[1]].contiguous()


def _added(total: Tensor | None, tokens: Tensor, value: Tensor) -> Tensor:
    """total + tokens [P, g*c] times value [g, c, o]: [P, g*o]; in place where no gradients are recorded."""
    groups, wide, out = value.shape
    in_place = total is not None and not torch.is_grad_enabled()
    if groups == 1:
        if total is None:
            return tokens @ value[0]
        return total.addmm_(tokens, value[0]) if in_place else torch.addmm(total, tokens, value[0])
    if wide == out == 1:
        factor = value.flatten()
        if total is None:
            return tokens * factor
        return total.addcmul_(tokens, factor) if in_place else torch.addcmul(total, tokens, factor)
    more = (
        torch.bmm(tokens.unflatten(1, (groups, wide)).transpose(0, 1), value).transpose(0, 1).reshape(-1, groups * out)
    )
    return more if total is None else total.add_(more) if in_place else total + more


def _valued(mixed: Tensor, value: Tensor) -> Tensor:
    """Heads [K, m, l, B, C] times their values [K, g, c, o], summed: [B, m, l, O]."""
    heads, groups, wide, out = value.shape
    mixed = mixed.permute(3, 1, 2, 0, 4)
    shape = mixed.shape[:3]
    if groups == 1:
        return (mixed.reshape(-1, heads * wide) @ value.reshape(heads * wide, out)).view(*shape, out)
    return torch.einsum("bmlkgc,kgco->bmlgo", mixed.unflatten(-1, (groups, wide)), value).flatten(3)


def _chosen(parts: Tensor, which: list[int]) -> Tensor:
    """parts[which]; the tensor itself where that is all in order."""
    return parts if which == list(range(len(parts))) else parts[which]
