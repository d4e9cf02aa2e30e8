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
_STAGES = range(8)


def _pairs() -> list[tuple[str, str]]:
    """Theirs, ours; the first that fits counts."""
    pairs = [(f"stem.{part}", f"layers.0.{part}") for part in ("conv1", "norm1", "conv2")]
    for i in _STAGES:
        theirs, ours = f"stages.{i}.blocks.{{j}}", f"layers.{i + 1}.{{j}}"
        pairs += [(f"{theirs}.{_THERE}", f"{ours}.{_TABLE}"), (f"{theirs}.attn", f"{ours}.mixer")]
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
    for name, table, projections in _tables(found):
        side, heads = math.isqrt(len(table)), table.shape[-1]
        if side**2 != len(table):
            raise ValueError(f"{name}: has {len(table)} offsets; only those of square images can be read")
        found[name] = table.T.unflatten(1, (side, side)).contiguous()
        for part in projections:
            if len(found[part]) % (3 * heads):
                raise ValueError(f"{part}: has {len(found[part])} channels, which {heads} heads do not divide in three")
            found[part] = found[part].unflatten(0, (heads, 3, -1)).transpose(0, 1).flatten(0, 2)
    return found


def to_timm(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Weights under timm's names."""
    found = dict(state)
    for name in [name for name in found if _LINEAR.fullmatch(name)]:
        found[name] = found[name][..., None, None]
    for name, table, projections in _tables(found):
        found[name] = table.flatten(1).T.contiguous()
        for part in projections:
            found[part] = found[part].unflatten(0, (3, len(table), -1)).transpose(0, 1).flatten(0, 2)
    # the norm of attention's first block stands there beside its pooling
    first = [name.split(".")[1] for name in state if re.fullmatch(r"layers\.\d+\.0\.mixer\.qkv\.weight", name)]
    pairs = [(f"layers.{i}.0.norm1", f"stages.{int(i) - 1}.blocks.0.norm1.norm") for i in first]
    return renamed(found, [*pairs, *((ours, theirs) for theirs, ours in _pairs() if ".norm1.norm" not in theirs)])


def _tables(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor, list[str]]]:
    """Tables of biases by their names, and those of the projections beside each."""
    for name in [name for name in state if name.endswith(_TABLE)]:
        parts = [f"{name.removesuffix(_TABLE)}mixer.qkv.{kind}" for kind in ("weight", "bias")]
        yield name, state[name], [part for part in parts if part in state]


SOURCES = {"timm": Source("stem.conv1.weight", from_timm, to_timm)}
