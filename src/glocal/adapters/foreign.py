"""What an adapter gives: a mixer of ours that stands for somebody else's module, and where its calls are seen.

Shape letters: B images, H W grid, C channels, P class and register tokens, K tokens of a window.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from glocal.mixer import TokenMixer

PADS_FIRST = (
    "pads the grid {grid} to a multiple of the window {window} before it moves its windows, where WindowAttention "
    "moves first, as timm does; another image size needs no padding"
)


@dataclass(frozen=True)
class NotSeen:
    """A module of a known kind that no operator of ours stands for; `why` is a sentence."""

    why: str


@dataclass
class Foreign:
    """How to see a module as a token mixer.

    Args:
        mixer: An operator of ours that holds the module's own parameters, not copies.
        module: Whose call is seen.
        call: The mixer's arguments, of the module's first argument and `kept`; a sentence where a call cannot be seen.
        output: The module's output as that of the mixer, of that output and the mixer's arguments.
        watched: Further modules whose output is needed, by the name under which `kept` has the newest.
    """

    mixer: TokenMixer
    module: nn.Module
    call: Callable[[Tensor, dict[str, Any]], dict[str, Any] | str]
    output: Callable[[Any, dict[str, Any]], Tensor]
    watched: dict[str, nn.Module] = field(default_factory=dict)
    kept: dict[str, Any] = field(default_factory=dict)


def seen_as(make: Callable[..., Foreign | NotSeen], *parts: Any) -> Foreign | NotSeen:
    """What `make` says of these parts; a sentence where another version of the library has built them otherwise."""
    try:
        return make(*parts)
    except (AttributeError, TypeError, ValueError) as error:
        return NotSeen(f"is built otherwise than this library knows it ({error})")


class Joined(nn.Module):
    """Projections that are one after the other what ours has as one: [..., C] to all of their outputs."""

    def __init__(self, *parts: nn.Module) -> None:
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([part(x) for part in self.parts], -1)


def on_grid(tokens: Tensor, kept: dict[str, Any]) -> dict[str, Any] | str:
    """A call on [B, P + H*W, C], of which the newest map `kept["grid"]` [B, C, H, W] tells the grid."""
    patches = kept.get("grid")
    if patches is None:
        return "was called before the patches were made, and nothing else tells its grid"
    grid = tuple(patches.shape[2:])
    prefix = tokens.shape[1] - grid[0] * grid[1]
    if tokens.dim() != 3 or prefix < 0:
        return f"was called with {tuple(tokens.shape)}, no longer a token for each of the {grid[0]} x {grid[1]} patches"
    return {"x": tokens, "grid": grid}


def of_windows(windows: Tensor, size: tuple[int, int], shift: tuple[int, int], grid: tuple[int, int]) -> Tensor:
    """Windows [B * n, K, C] of a grid that was rolled back by `shift` and padded at its ends: [B, H, W, C]."""
    rows, columns = (-(-n // w) for n, w in zip(grid, size, strict=True))
    tokens = windows.view(-1, rows, columns, *size, windows.shape[-1]).transpose(2, 3)
    tokens = tokens.reshape(tokens.shape[0], rows * size[0], columns * size[1], -1)[:, : grid[0], : grid[1]]
    return tokens.roll(shift, (1, 2))
