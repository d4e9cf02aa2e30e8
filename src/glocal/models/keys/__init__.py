"""Names of weights elsewhere, one file for each family, whose `SOURCES` say who else names them, and how."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

_NUMBER = re.compile(r"\\{(\w)\\}")  # {i} as re.escape writes it


class Source(NamedTuple):
    """A library or release with names of its own for a family's weights."""

    marker: str  # a name that every network of the family has there, and none here or in another source
    read: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]  # theirs to ours
    write: Callable[[Mapping[str, Tensor]], dict[str, Tensor]]  # ours to theirs


def renamed(state: Mapping[str, Tensor], pairs: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Tensors under other names, in the same order.

    Args:
        state: tensors by name.
        pairs: names, or their beginnings up to a dot, before and after: ("layer.{i}.dense", "blocks.{i}.proj"), where
            {i}, or another letter, stands for a number. The first that fits counts.

    Raises:
        ValueError: a name that begins like none of them.
    """
    patterns = [(re.compile(_NUMBER.sub(r"(?P<\1>\\d+)", re.escape(old)) + r"(?=\.|$)"), new) for old, new in pairs]
    found = {}
    for name, tensor in state.items():
        fitting = next(((match, new) for pattern, new in patterns if (match := pattern.match(name))), None)
        if fitting is None:
            raise ValueError(f"{name} is not one of this family")
        match, new = fitting
        found[new.format(**match.groupdict()) + name[match.end() :]] = tensor
    return found
