"""What a conversion did, layer by layer."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from glocal.conversion.attention import ConvolutionAsAttention, is_convolution
from glocal.conversion.convolution import KINDS, _mixer
from glocal.operator import modes_kept


@dataclass(frozen=True)
class ConvertedLayer:
    """A convolution and the attention in its place.

    Args:
        name: In the network.
        convolution: What it was, in words.
        heads: How many there are.
        params_before: Of the convolution.
        params: Of the attention.
        macs_before: Multiply-adds of the convolution, for one image; heads on places need no more.
        macs: Of the attention with its heads anywhere, for one image.
        error: The largest difference of the outputs for the same input, over the largest entry.
    """

    name: str
    convolution: str
    heads: int
    params_before: int
    params: int
    macs_before: int
    macs: int
    error: float


@dataclass(frozen=True)
class Conversion:
    """A network and its conversion on the same input; printed, a table.

    Args:
        layers: In the order in which they ran.
        params_before: Of the network.
        params: Of the converted one.
        error: Of the outputs: the largest difference, over the largest entry.
    """

    layers: tuple[ConvertedLayer, ...]
    params_before: int
    params: int
    error: float

    def __str__(self) -> str:
        head = ("layer", "convolution", "heads", "parameters", "before", "multiply-adds", "before", "error")
        rows = [head]
        for a in self.layers:
            counts = (a.heads, a.params, a.params_before, a.macs, a.macs_before)
            rows.append((a.name or "-", a.convolution, *(f"{n:,}" for n in counts), f"{a.error:.1e}"))  # type: ignore[arg-type]
        sums = [sum(getattr(a, what) for a in self.layers) for what in ("heads", "macs", "macs_before")]
        total = (sums[0], self.params, self.params_before, *sums[1:])
        rows.append(("network", "", *(f"{n:,}" for n in total), f"{self.error:.1e}"))  # type: ignore[arg-type]
        widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
        lines = []
        for row in rows:
            cells = [
                cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  ".join(cells).rstrip())
        return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


@torch.no_grad()
def compare_conversion(before: nn.Module, after: nn.Module, x: Tensor) -> Conversion:
    """A table of what `to_attention` made of every layer, measured on an input.

    Args:
        before: The network, or a convolution.
        after: What `to_attention` gave for it.
        x: As the network takes it.

    Raises:
        ValueError: `after` holds no attention in the place of a convolution of `before`.
    """
    new = dict(after.named_modules(remove_duplicate=False))
    found: dict[str, ConvertedLayer] = {}
    hooks = []
    for name, part in before.named_modules():
        if is_convolution(part) and isinstance(new.get(name), KINDS):
            hooks.append(part.register_forward_hook(_measure(name, new[name], found), with_kwargs=True))
    try:
        with modes_kept(before), modes_kept(after):
            outputs = [tree_leaves(network.eval()(x)) for network in (before, after)]
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise ValueError(f"after: holds no attention where this {type(before).__name__} has a convolution")
    pairs = [(a, b) for a, b in zip(*outputs, strict=True) if isinstance(a, Tensor)]
    params = [sum(p.numel() for p in network.parameters()) for network in (before, after)]
    return Conversion(tuple(found.values()), params[0], params[1], max(relative_error(b, a) for a, b in pairs))


def relative_error(found: Tensor, expected: Tensor) -> float:
    """The largest difference over the largest entry."""
    if not expected.numel():
        return 0.0
    return ((found - expected).abs().max() / expected.abs().max().clamp(min=torch.finfo(expected.dtype).tiny)).item()


def _measure(name: str, new: nn.Module, found: dict[str, ConvertedLayer]) -> Any:
    def hook(part: Any, given: tuple[Any, ...], named: dict[str, Any], out: Any) -> None:
        (x, *_), mixer = (*given, *named.values()), _mixer(new)
        with modes_kept(new):
            error = relative_error(new.eval()(x), out)
        rank = mixer.rank or 0
        grid = x.shape[-rank:] if isinstance(new, ConvolutionAsAttention) else x.shape[1:-1]
        weight = part.weight
        whole: Any = getattr(new, "mixer", new)
        queries = torch.Size(mixer.out_grid(grid)).numel()
        found[name] = ConvertedLayer(
            name,
            _words(mixer),
            mixer.num_heads,
            sum(p.numel() for p in part.parameters()),
            sum(p.numel() for p in new.parameters()),
            queries * weight.numel(),
            whole.macs_by_axes(grid),
            max(error, found[name].error) if name in found else error,
        )

    return hook


def _words(mixer: Any) -> str:
    """Such as "64 -> 128, 3x3, stride 2"."""
    text = f"{mixer.dim} -> {mixer.out_dim}, {_times(mixer._kernel)}"
    for what, values in (("stride", mixer._strides), ("dilation", mixer._dilations)):
        text += "" if set(values) == {1} else f", {what} {_times(values) if len({*values}) > 1 else values[0]}"
    if mixer.groups > 1:
        text += ", depthwise" if mixer.groups == mixer.dim else f", {mixer.groups} groups"
    return text if mixer.padding_mode == "zeros" else f"{text}, {mixer.padding_mode}"


def _times(values: Sequence[int]) -> str:
    return "x".join(map(str, values))
