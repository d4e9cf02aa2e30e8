"""DWNet's weights as Atten4Vis/DemystifyLocalViT saves them (models/dwnet.py, models/idynamic.py)."""

import re
from collections.abc import Mapping

from torch import Tensor

from glocal.models.keys import Source, renamed

_BLOCK = "layers.{i}.blocks.{j}"
_THERE, _HERE = f"{_BLOCK}.attn2conv", f"{_BLOCK}.attn"
_INHOMOGENEOUS = (  # theirs, ours: kernels predicted at every position
    (f"{_THERE}.conv.conv1.0", f"{_HERE}.mixer.conv1"),
    (f"{_THERE}.conv.conv1.1", f"{_HERE}.mixer.bn"),
    (f"{_THERE}.conv.conv2.0", f"{_HERE}.mixer.conv2"),
)
_ALL = (
    ("patch_embed", "patch_embed"),
    *((f"layers.{i}.downsample", f"layers.{i + 1}.downsample") for i in range(4)),
    (f"{_THERE}.conv0", f"{_HERE}.conv1"),
    (f"{_THERE}.bn0", f"{_HERE}.bn1"),
    (f"{_THERE}.conv", f"{_HERE}.mixer"),
    (f"{_THERE}.bn", f"{_HERE}.bn2"),
    (f"{_THERE}.conv2", f"{_HERE}.conv2"),
    (f"{_THERE}.bn2", f"{_HERE}.bn3"),
    (f"{_BLOCK}.bn", f"{_BLOCK}.norm2"),
    (f"{_BLOCK}.mlp", f"{_BLOCK}.mlp"),
    ("norm", "norm"),
    ("head", "head.fc"),
)
_POINTWISE = re.compile(r".*\.attn\.(mixer\.)?conv[12]\.weight")  # there convolutions of 1 x 1, here linear maps


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights of DW, D-DW and I-D-DW under our names.

    Raises:
        ValueError: a name that the release does not have.
    """
    found = renamed(state, (*_INHOMOGENEOUS, *_ALL))
    return {name: tensor.flatten(1) if _POINTWISE.fullmatch(name) else tensor for name, tensor in found.items()}


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under the release's names.

    Raises:
        ValueError: a variant that the release does not have.
    """
    if any(name.startswith("layers.0.blocks.0.") and tensor.dim() == 3 for name, tensor in state.items()):
        raise ValueError("local MLP is not in the release, which has no names for its weights")
    if any(n.endswith("attn.mixer.weight") and f"{n.removesuffix('weight')}bias" not in state for n in state):
        raise ValueError("channels that share a kernel are not in the release")
    shaped = {name: t[:, :, None, None] if _POINTWISE.fullmatch(name) else t for name, t in state.items()}
    # only the kernels that are the same at all positions have a bias of the sum
    own = () if "layers.0.blocks.0.attn.mixer.bias" in state else _INHOMOGENEOUS
    return renamed(shaped, [(ours, theirs) for theirs, ours in (*own, *_ALL)])


SOURCES = {"official": Source("layers.0.blocks.0.attn2conv.conv0.weight", from_official, to_official)}
