"""Swin's weights as microsoft/Swin-Transformer, torchvision and transformers save them; timm's names are ours.

What holds nothing learned is not read; of it, where each offset stands in a table is written, masks are not.
"""

import math
import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from glocal.models.keys import Source, renamed
from glocal.positions.relative import relative_index

_STAGES = range(4)
_BLOCK = "layers.{i}.blocks.{j}"
_CONSTANT = re.compile(r".*\.(relative_position_index|attn_mask)")

_OFFICIAL = (  # theirs, ours; there a stage ends with the merging of its tokens
    ("patch_embed", "patch_embed"),
    *((f"layers.{i}.downsample", f"layers.{i + 1}.downsample") for i in _STAGES),
    (_BLOCK, _BLOCK),
    ("norm", "norm"),
    ("head", "head.fc"),
)


def _torchvision() -> list[tuple[str, str]]:
    pairs = [("features.0.0", "patch_embed.proj"), ("features.0.2", "patch_embed.norm")]
    for i in _STAGES:
        theirs, ours = f"features.{2 * i + 1}.{{j}}", f"layers.{i}.blocks.{{j}}"
        if i:
            pairs.append((f"features.{2 * i}", f"layers.{i}.downsample"))
        pairs += [(f"{theirs}.mlp.0", f"{ours}.mlp.fc1"), (f"{theirs}.mlp.3", f"{ours}.mlp.fc2"), (theirs, ours)]
    return [*pairs, ("norm", "norm"), ("head", "head.fc")]


_TRANSFORMERS = (
    ("swin.embeddings.patch_embeddings.projection", "patch_embed.proj"),
    ("swin.embeddings.norm", "patch_embed.norm"),
    *((f"swin.encoder.layers.{i}.downsample", f"layers.{i + 1}.downsample") for i in _STAGES),
    *(
        (f"swin.encoder.{_BLOCK}.{theirs}", f"{_BLOCK}.{ours}")
        for theirs, ours in (
            ("layernorm_before", "norm1"),
            ("layernorm_after", "norm2"),
            ("attention.output.dense", "attn.proj"),
            ("attention.self", "attn"),
            ("intermediate.dense", "mlp.fc1"),
            ("output.dense", "mlp.fc2"),
        )
    ),
    ("swin.layernorm", "norm"),
    ("classifier", "head.fc"),
)
_PARTS = ("query", "key", "value")  # there linear maps of their own


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names.

    Raises:
        ValueError: a name that the release does not have.
    """
    return renamed(_learned(state), _OFFICIAL)


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the release's names, without the masks of its shifted windows, which depend on the image's size."""
    return _indexed(renamed(state, _back(_OFFICIAL)))


def from_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names.

    Raises:
        ValueError: a name that torchvision's network does not have.
    """
    return renamed(_learned(state), _torchvision())


def to_torchvision(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under torchvision's names."""
    found = _indexed(renamed(state, _back(_torchvision())))
    return {name: tensor.flatten() if _CONSTANT.fullmatch(name) else tensor for name, tensor in found.items()}


def from_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of `SwinForImageClassification` under our names; its three linear maps become one.

    Raises:
        ValueError: a name that transformers' network does not have, or not all three maps.
    """
    found = renamed(_learned(state), _TRANSFORMERS)
    for name in [name for name in found if ".attn.query." in name]:
        parts = [name.replace(".query.", f".{part}.") for part in _PARTS]
        if missing := [part for part in parts if part not in found]:
            raise ValueError(f"{missing[0]} is missing")
        found[name.replace(".query.", ".qkv.")] = torch.cat([found.pop(part) for part in parts])
    return found


def to_transformers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the names of `SwinForImageClassification`."""
    found = dict(state)
    for name in state:
        if ".attn.qkv." in name:
            for part, tensor in zip(_PARTS, found.pop(name).chunk(3), strict=True):
                found[name.replace(".qkv.", f".{part}.")] = tensor.clone()
    return renamed(found, _back(_TRANSFORMERS))


def _learned(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in state.items() if not _CONSTANT.fullmatch(name)}


def _indexed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """With the place of each offset beside every table: [K, K] for windows of K tokens, as long as they are wide."""
    for name, table in list(state.items()):
        if name.endswith(".relative_position_bias_table"):
            side = (math.isqrt(len(table)) + 1) // 2
            if (2 * side - 1) ** 2 != len(table):
                raise ValueError(f"{name}: has {len(table)} offsets; only square windows have names there")
            state[name.replace("bias_table", "index")] = relative_index((side, side))
    return state


def _back(pairs: Sequence[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(ours, theirs) for theirs, ours in pairs]


SOURCES = {
    "official": Source("layers.0.downsample.reduction.weight", from_official, to_official),
    "torchvision": Source("features.0.0.weight", from_torchvision, to_torchvision),
    "transformers": Source("swin.layernorm.weight", from_transformers, to_transformers),
}
