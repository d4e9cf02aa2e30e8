"""The all-attention model's weights as epfml/attention-cnn saves them (models/transformer.py, models/bert.py)."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from glocal.models.keys import Source, renamed

_LAYER = "encoder.layer.{i}"
_PAIRS = (  # the release's, ours
    ("features_upscale", "patch_embed.proj"),
    (f"{_LAYER}.attention.self", "blocks.{i}.attn"),
    (f"{_LAYER}.attention.output.dense", "blocks.{i}.proj"),
    (f"{_LAYER}.attention.output.LayerNorm", "blocks.{i}.norm1"),
    (f"{_LAYER}.intermediate.dense", "blocks.{i}.mlp.fc1"),
    (f"{_LAYER}.output.dense", "blocks.{i}.mlp.fc2"),
    (f"{_LAYER}.output.LayerNorm", "blocks.{i}.norm2"),
    ("classifier", "head"),
)
# Buffers that hold nothing learned: a mask of one 1, the offsets of all pairs, where each offset stands in a table.
_CONSTANT = re.compile(r"attention_mask|encoder\.layer\.\d+\.attention\.self\.(R|relative_indices)")


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names; constant buffers are left out.

    Raises:
        ValueError: a name that the release does not have.
    """
    return renamed({name: tensor for name, tensor in state.items() if not _CONSTANT.fullmatch(name)}, _PAIRS)


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the release's names, with the constant buffers that its checkpoints hold.

    The largest, R of the quadratic heads (125 MB a layer), is left out of these, as it is here.

    Raises:
        ValueError: a name that `glocal.models.all_attention` does not have.
    """
    found = renamed(state, [(ours, theirs) for theirs, ours in _PAIRS])
    found["attention_mask"] = torch.tensor(1.0)
    for name, table in list(found.items()):
        if name.endswith(".row_embeddings.weight"):
            size = (len(table) + 1) // 2
            place = torch.arange(size)
            found[name.replace("row_embeddings.weight", "relative_indices")] = place - place[:, None] + size - 1
    return found


SOURCES = {"official": Source("classifier.weight", from_official, to_official)}
