"""LESA's weights as Chenglin-Yang/LESA_classification saves them; the backbones of LESA_detection have these names too.

Names are ours; maps of single tokens are convolutions there, and where each offset stands in a table is written down.
"""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from glocal.models.keys import Source

_POINTWISE = re.compile(r".*\.conv2\.(qkv_transform|x_transform\.1|reasoning\.1|projection\.0)\.weight")
_INDEX = ".conv2.flatten_index"  # holds nothing learned


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names."""
    found = {name: tensor for name, tensor in state.items() if not name.endswith(_INDEX)}
    return {name: tensor.flatten(1) if _POINTWISE.fullmatch(name) else tensor for name, tensor in found.items()}


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the release's names.

    Raises:
        ValueError: attention without its local term, which the release does not have.
    """
    found = {}
    for name, tensor in state.items():
        if name.endswith("qkv_transform.weight"):
            layer = name.removesuffix("qkv_transform.weight")
            if f"{layer}x_transform.0.weight" not in state:
                raise ValueError(f"{layer[:-1]}: self-attention alone is not in the release, which has no names for it")
            tensor = tensor[:, :, None]
        elif _POINTWISE.fullmatch(name):
            tensor = tensor[:, :, None, None]
        found[name] = tensor
        if name.endswith(".conv2.relative"):
            count = (tensor.shape[1] + 1) // 2
            place = torch.arange(count, device=tensor.device)
            found[name.replace(".conv2.relative", _INDEX)] = (place[:, None] - place + count - 1).flatten()
    return found


SOURCES = {"official": Source("layer3.1.conv2.flatten_index", from_official, to_official)}
