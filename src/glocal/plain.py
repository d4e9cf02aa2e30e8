"""Configurations as plain data and back: nested dicts of numbers, texts and lists, as YAML and JSON hold them."""

import dataclasses
import difflib
import re
import types
import typing
from pathlib import Path
from typing import Any, Literal

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def to_plain(config: Any) -> dict[str, Any]:
    """A configuration as nested dicts of numbers, texts and lists, for YAML and JSON."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(inner) for key, inner in value.items()}
        if isinstance(value, tuple):
            return [plain(inner) for inner in value]
        return str(value) if isinstance(value, Path) else value

    return plain(dataclasses.asdict(config))


def from_plain(kind: type, plain: Any, where: str = "") -> Any:
    """A configuration of `kind` from nested dicts; what is not given keeps its default.

    Two slips of YAML 1.1 are put right where the kind of value is known: `1e-3` is read as text, `no` as false.

    Raises:
        ValueError: A key is unknown (the nearest valid one is named), or a value has the wrong type or makes no sense.
    """
    if not isinstance(plain, dict):
        raise ValueError(f"{where.rstrip('.') or 'the file'}: must hold names with values, such as 'seed: 0'")
    hints = typing.get_type_hints(kind)
    values = {}
    for key, value in plain.items():
        if key not in hints:
            raise ValueError(f"{where}{key}: unknown; {_meant(str(key), hints, where)}")
        values[key] = _typed(hints[key], value, f"{where}{key}")
    try:
        return kind(**values)
    except ValueError as error:
        raise ValueError(f"{where}{error}") from error


def _meant(key: str, hints: dict[str, Any], where: str) -> str:
    """The nearest valid name, here or one level below: `lr` is train.lr."""
    names = {name: name for name in hints}
    for section, hint in hints.items():
        if dataclasses.is_dataclass(hint):
            names = {inner.name: f"{section}.{inner.name}" for inner in dataclasses.fields(hint)} | names
    near = difflib.get_close_matches(key, names, n=1)
    return f"did you mean '{where}{names[near[0]]}'?" if near else f"valid are {', '.join(hints)}"


def _typed(hint: Any, value: Any, where: str) -> Any:
    if dataclasses.is_dataclass(hint) and isinstance(hint, type):
        return from_plain(hint, value, f"{where}.")
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        if value is None and type(None) in inner:
            return None
        return _typed(next(kind for kind in inner if kind is not type(None)), value, where)
    if origin is Literal:
        if value is False and "no" in inner:
            return "no"
        if value not in inner:
            raise ValueError(f"{where}: {value!r}; valid are {', '.join(map(str, inner))}")
        return value
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or (Ellipsis not in inner and len(value) != len(inner)):
            raise ValueError(f"{where}: {value!r} must be a list{'' if Ellipsis in inner else f' of {len(inner)}'}")
        kinds = (inner[0],) * len(value) if Ellipsis in inner else inner
        return tuple(_typed(kind, item, where) for kind, item in zip(kinds, value, strict=True))
    return _single(hint, value, where)


_WORDS = {
    bool: "true or false",
    float: "a number",
    int: "a whole number",
    str: "text; put it in quotes",
    Path: "text; put it in quotes",
}


def _single(hint: type, value: Any, where: str) -> Any:
    if hint is float and isinstance(value, str) and _NUMBER.fullmatch(value):
        return float(value)
    if hint is float and type(value) in (int, float) and abs(value) <= 1e300:
        return float(value)
    if hint is Path and isinstance(value, str):
        return Path(value)
    if type(value) is not hint:
        raise ValueError(f"{where}: {value!r} must be {_WORDS[hint]}")
    return value
