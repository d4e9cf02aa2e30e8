"""Names of weights elsewhere, one file for each family: `from_official(state)` and `to_official(state)`."""

import re
from collections.abc import Mapping, Sequence

from torch import Tensor


def renamed(state: Mapping[str, Tensor], pairs: Sequence[tuple[str, str]]) -> dict[str, Tensor]:
    """Tensors under other names, in the same order.

    Args:
        state: tensors by name.
        pairs: beginnings of names, before and after, up to a dot: ("layer.{i}.dense", "blocks.{i}.proj"), where {i}
            stands for a number. No beginning fits two names of one network.

    Raises:
        ValueError: a name that begins like none of them.
    """
    patterns = [(re.compile(re.escape(old).replace(r"\{i\}", r"(?P<i>\d+)") + r"(?=\.)"), new) for old, new in pairs]
    found = {}
    for name, tensor in state.items():
        fitting = next(((match, new) for pattern, new in patterns if (match := pattern.match(name))), None)
        if fitting is None:
            raise ValueError(f"{name} is not one of this family")
        match, new = fitting
        found[new.format(**match.groupdict()) + name[match.end() :]] = tensor
    return found
