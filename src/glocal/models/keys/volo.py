"""VOLO's weights as sail-sg/volo (models/volo.py) and timm save them: under the same names."""

from collections.abc import Mapping

import torch
from torch import Tensor

from glocal.models.keys import Source, renamed

_TIMM = (  # theirs, ours; there the table stands by itself, and what makes tokens coarse between two groups of blocks
    ("pos_embed", "network.1.downsample.pos_embed"),
    ("cls_token", "post_network.cls_token"),
    ("patch_embed", "patch_embed"),
    ("network.0", "network.0"),
    ("network.1", "network.1.downsample"),
    ("network.2", "network.1.blocks"),
    ("network.3", "network.2"),
    ("network.4", "network.3"),
    ("post_network", "post_network"),
    ("norm", "norm"),
    ("head", "head"),
    ("aux_head", "aux_head"),
)


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names; keys and values of class attention become maps of their own.

    Raises:
        ValueError: a name that neither timm's network nor the released one has.
    """
    found = renamed(state, _TIMM)
    for name in [name for name in found if ".attn.kv." in name]:
        for part, own in zip("kv", found.pop(name).chunk(2), strict=True):
            found[name.replace(".kv.", f".{part}.")] = own.clone()
    return found


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under timm's names, which are those of the release."""
    found = dict(state)
    for name in [name for name in found if ".attn.k." in name]:
        parts = [found.pop(name), found.pop(name.replace(".k.", ".v."))]
        found[name.replace(".k.", ".kv.")] = torch.cat(parts)
    return renamed(found, [(ours, theirs) for theirs, ours in _TIMM])


SOURCES = {"timm": Source("post_network.0.attn.kv.weight", from_timm, to_timm)}
