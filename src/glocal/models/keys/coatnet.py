"""CoAtNet's weights as timm saves them; the authors released none.

There linear maps are 1x1 convolutions, query, key and value of a head follow each other, and tables of biases are flat.
"""

import math
import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from glocal.models.keys import Source, renamed

_LINEAR = re.compile(r".*\.(mixer\.qkv|mixer\.proj|mlp\.fc[12]|shortcut\.expand)\.weight")
_TABLE, _THERE = "mixer.relative_position_bias_table", "attn.rel_pos.relative_position_bias_table"
_MLP, _MLP_THERE = "mixer.relative_position_mlp", "attn.rel_pos.mlp"
_STAGES = range(8)


def _pairs() -> list[tuple[str, str]]:
    """Theirs, ours; the first that fits counts."""
    pairs = [(f"stem.{part}", f"layers.0.{part}") for part in ("conv1", "norm1", "conv2")]
    for i in _STAGES:
        theirs, ours = f"stages.{i}.blocks.{{j}}", f"layers.{i + 1}.{{j}}"
        pairs += [(f"{theirs}.{_THERE}", f"{ours}.{_TABLE}"), (f"{theirs}.{_MLP_THERE}", f"{ours}.{_MLP}")]
        pairs += [(f"{theirs}.attn", f"{ours}.mixer")]
        pairs += [(f"{theirs}.norm1.norm", f"{ours}.norm1"), (theirs, ours)]
    return [*pairs, ("norm", "norm"), ("head", "head")]


def from_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under our names.

    Raises:
        ValueError: a name that timm's network does not have, a table of biases of images that are not square, whose
            sides it does not tell, or of other heads than there are.
    """
    found = renamed(state, _pairs())
    for name in [name for name in found if _LINEAR.fullmatch(name)]:
        found[name] = found[name].flatten(1)
    for name in [name for name in found if name.endswith(_TABLE)]:
        side = math.isqrt(len(found[name]))
        if side**2 != len(found[name]):
            raise ValueError(f"{name}: has {len(found[name])} offsets; only those of square images can be read")
        found[name] = found[name].T.unflatten(1, (side, side)).contiguous()
    for part, heads in _projections(found):
        if len(found[part]) % (3 * heads):
            raise ValueError(f"{part}: has {len(found[part])} channels, which {heads} heads do not divide in three")
        found[part] = found[part].unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    return found


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under timm's names."""
    found = dict(state)
    for name in [name for name in found if _LINEAR.fullmatch(name)]:
        found[name] = found[name][..., None, None]
    for part, heads in _projections(found):
        found[part] = found[part].unflatten(0, (3, heads, -1)).transpose(0, 1).flatten(0, 2)
    for name in [name for name in found if name.endswith(_TABLE)]:
        found[name] = found[name].flatten(1).T.contiguous()
    # the norm of attention's first block stands there beside its pooling
    first = [name.split(".")[1] for name in state if re.fullmatch(r"layers\.\d+\.0\.mixer\.qkv\.weight", name)]
    pairs = [(f"layers.{i}.0.norm1", f"stages.{int(i) - 1}.blocks.0.norm1.norm") for i in first]
    return renamed(found, [*pairs, *((ours, theirs) for theirs, ours in _pairs() if ".norm1.norm" not in theirs)])


def _projections(state: Mapping[str, Tensor]) -> Iterator[tuple[str, int]]:
    """Weights and biases of queries, keys and values, and for how many heads they are: as many as biases have."""
    for name in list(state):
        for biases in (_TABLE, f"{_MLP}.fc2.weight"):
            if name.endswith(biases):
                parts = (f"{name.removesuffix(biases)}mixer.qkv.{kind}" for kind in ("weight", "bias"))
                yield from ((part, len(state[name])) for part in parts if part in state)


SOURCES = {"timm": Source("stem.conv1.weight", from_timm, to_timm)}
