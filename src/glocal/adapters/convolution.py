"""torch's own convolutions, of any model: seen as this library's are."""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glocal.adapters.foreign import Foreign, NotSeen, seen_as
from glocal.aggregation import Aggregation, grid_positions
from glocal.mixer import TokenMixer
from glocal.mixers._grid import join
from glocal.mixers._library import tap_norms
from glocal.mixers._padded import sides_of, sources_of
from glocal.operator import Operator


def found(model: nn.Module, prefix: str = "") -> Iterator[tuple[str, Foreign | NotSeen]]:
    """Every Conv1d and Conv2d that reads beyond its own token, outside operators of ours.

    Left out is what no two queries share a source of: 1x1 kernels, and strides as long as the kernel, which cut
    patches.
    """
    seen = set()
    for name, part in model.named_modules():
        if isinstance(part, Operator):
            seen.add(name)
        inside = any(name == each or name.startswith(f"{each}." if each else "") for each in seen)
        if inside or not isinstance(part, nn.Conv1d | nn.Conv2d):
            continue
        if any(
            s < d * (k - 1) + 1 and k > 1 for k, s, d in zip(part.kernel_size, part.stride, part.dilation, strict=True)
        ):
            yield name or type(part).__name__, seen_as(_of_convolution, part)


def _of_convolution(layer: Any) -> Foreign | NotSeen:
    kind = nn.Conv1d if isinstance(layer, nn.Conv1d) else nn.Conv2d
    own = type(layer).forward is not kind.forward or type(layer)._conv_forward is not kind._conv_forward
    if own or "forward" in vars(layer):
        return NotSeen("computes in a way of its own, not as torch's convolutions do")
    mixer = SeenConvolution(layer)  # type: ignore[abstract]  # `weights` is its `_weights`

    def call(x: Tensor, kept: dict[str, Any]) -> dict[str, Any] | str:
        if x.dim() != len(layer.kernel_size) + 2:
            return f"was called with {tuple(x.shape)}, which is no batch"
        return {"x": x.movedim(1, -1)}

    return Foreign(mixer, layer, call, lambda out, call: out.movedim(1, -1).clone())  # a ReLU in place often follows


class SeenConvolution(TokenMixer):
    """A convolution of torch's as the weighted sum that it is; it holds the layer and its own parameters.

    With as many groups as channels each output channel is a head, and its kernel the weights, as of `DepthwiseConv`:
    [1, C_out, 1, K]. Else every tap is a head that reads one place with weight 1, as of `Convolution`: [1, K, N, 1],
    and what it learned is in `project`; `kernel_norms` say how much that is.
    """

    def __init__(self, layer: Any) -> None:
        super().__init__(layer.in_channels, rank=len(layer.kernel_size))
        self.layer, self.out_dim = layer, layer.out_channels
        reach = [d * (k - 1) for k, d in zip(layer.kernel_size, layer.dilation, strict=True)]
        self._sides = sides_of(layer.padding, reach, layer.stride)
        self._reach = reach
        self._depthwise = layer.groups == layer.in_channels

    def __repr__(self) -> str:
        return repr(self.layer)

    def values(self, source: Tensor) -> Tensor:
        tokens = source.flatten(1, -2)
        if not self._depthwise:
            return tokens.unsqueeze(2)
        return tokens.repeat_interleave(self.out_dim // self.dim, -1).unsqueeze(-1)

    def weights(self, x: Tensor) -> Aggregation:  # type: ignore[override]
        layer, grid = self.layer, tuple(x.shape[1:-1])
        out, axes = self.out_grid(grid), []
        for axis, (n, m) in enumerate(zip(grid, out, strict=True)):
            taps = torch.arange(layer.kernel_size[axis], device=x.device) * layer.dilation[axis] - self._sides[axis][0]
            place = torch.arange(m, device=x.device)[:, None] * layer.stride[axis] + taps
            axes.append(sources_of(place, place.new_full((), n), layer.padding_mode))
        index = join(axes, grid)
        each = (
            layer.weight.detach().flatten(1)[None, :, None] if self._depthwise else x.new_ones(1, index.shape[1], 1, 1)
        )
        return Aggregation(
            each,
            index[None, None] if self._depthwise else index.T[None, :, :, None],
            math.prod(grid),
            grid_positions(out, device=x.device),
            grid_positions(grid, stride=layer.stride, device=x.device),
            out,
            grid,
        )

    def project(self, mixed: Tensor) -> Tensor:
        layer = self.layer
        if not self._depthwise:
            weight = layer.weight.flatten(2).unflatten(0, (layer.groups, -1))  # [groups, out, C / groups, K]
            mixed = mixed.unflatten(-1, (weight.shape[-1], layer.groups, -1))
            mixed = torch.einsum("bnkgc,gock->bngo", mixed, weight).flatten(2)
        return mixed if layer.bias is None else mixed + layer.bias

    def kernel_norms(self) -> Tensor | None:
        """The norm of a group's weights at each tap, [groups, K]; None where heads are channels."""
        return None if self._depthwise else tap_norms(self.layer.weight, self.layer.groups)

    def out_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        lengths = zip(grid, self._sides, self._reach, self.layer.stride, strict=True)
        return tuple((n + sum(sides) - reach - 1) // stride + 1 for n, sides, reach, stride in lengths)
