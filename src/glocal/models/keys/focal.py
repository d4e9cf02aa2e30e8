"""Focal Transformer's weights as microsoft/Focal-Transformer (classification/focal_transformer.py) saves them.

There the block holds what pools, and buffers say where each offset stands in a table: they are written, and not read.
"""

import math
import re
from collections.abc import Mapping

import torch
from torch import Tensor

from glocal.models.keys import Source, renamed

_BLOCK = "layers.{i}.blocks.{j}"
_OFFICIAL = (  # theirs, ours; there a stage ends with what makes tokens coarser
    ("patch_embed", "patch_embed"),
    *((f"layers.{i}.downsample", f"layers.{i + 1}.downsample") for i in range(4)),
    (f"{_BLOCK}.pool_layers", f"{_BLOCK}.attn.pool_layers"),
    (_BLOCK, _BLOCK),
    ("norm", "norm"),
    ("head", "head.fc"),
)
_CONSTANT = re.compile(r".*\.attn\.(relative_position_index(_\d+)?|valid_ind_rolled)")


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names.

    Raises:
        ValueError: a name that the release does not have.
    """
    return renamed({name: tensor for name, tensor in state.items() if not _CONSTANT.fullmatch(name)}, _OFFICIAL)


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the release's names, with its buffers."""
    found = renamed(state, [(ours, theirs) for theirs, ours in _OFFICIAL])
    for name in [name for name in found if name.endswith(".attn.relative_position_bias_table")]:
        attention = name.removesuffix("relative_position_bias_table")
        window = (math.isqrt(len(found[name])) + 1) // 2
        found[f"{attention}relative_position_index"] = _rows(window, window)
        ring = found.get(f"{name}_to_neighbors")
        if ring is not None:
            found[f"{attention}valid_ind_rolled"] = _left(window, ring.shape[-1])
        pooled = found.get(f"{name}_to_windows.0")
        if pooled is not None:
            found[f"{attention}relative_position_index_0"] = _rows(window, math.isqrt(pooled.shape[1]) - window + 1)
    return found


def _rows(window: int, sources: int) -> Tensor:
    """[window^2, sources^2]: where the offset of each place from each source stands in a table of all offsets."""
    place, source = (torch.cartesian_prod(torch.arange(n), torch.arange(n)) for n in (window, sources))
    apart = place[:, None] - source + sources - 1
    return apart[..., 0] * (window + sources - 1) + apart[..., 1]


def _left(window: int, count: int) -> Tensor:
    """[count]: of four windows, moved by the ring's depth to each corner, the places that have left the first one."""
    expand = window - math.isqrt(window**2 - count // 4)
    start, end = torch.arange(window) < expand, torch.arange(window) >= window - expand
    moved = [(end, end), (end, start), (start, end), (start, start)]
    return torch.stack([rows[:, None] | columns for rows, columns in moved]).flatten().nonzero()[:, 0]


SOURCES = {"official": Source("layers.0.blocks.0.pool_layers.0.weight", from_official, to_official)}
