"""Text to operator: `build("SelfAttention(num_heads=4)", dim)`.

A spec is a class name of `glocal.mixers` with keyword arguments that are literals or further specs. It is parsed,
never evaluated. `repr` of a mixer is its canonical spec.
"""

import ast
import difflib
import hashlib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from glocal import mixers

_USER = "glocal_user_"  # how the modules of users' files are named
_OF_A_FILE = re.compile(r"(?P<path>[^()'\"]+\.py):(?P<call>.*)", re.DOTALL)


def available() -> tuple[str, ...]:
    """Names of all operators: the public classes of `glocal.mixers`."""
    return tuple(sorted(name for name, value in vars(mixers).items() if _is_operator(name, value)))


def build(spec: str | nn.Module, dim: int | None = None, **context: Any) -> nn.Module:
    """Builds an operator, or a whole network of a user's file, from its spec.

    Args:
        spec: "DepthwiseConv(kernel_size=7)", "SelfAttention", "path/to/file.py:Shift(step=2)" for an operator of
            the user's own, or a module, which is returned as it is.
        dim: channels, the constructor's first argument; None for a whole network, whose constructor has none.
        **context: further constructor arguments, such as rank or grid_size; each is used only if the operator has
            that argument and the spec does not give it.

    Raises:
        ValueError: not a spec, an unknown operator or argument (the nearest valid one is named), or values that
            the operator refuses.
    """
    if isinstance(spec, nn.Module):
        return spec
    text = _text(spec).strip()
    if text.endswith((".py", ".py:")):
        path = text.removesuffix(":")
        raise ValueError(f"spec: {text!r} names a file and nothing in it; write it as {path}:Name(argument=value, ...)")
    of_a_file = _OF_A_FILE.fullmatch(text)
    operators = _operators_of(of_a_file["path"]) if of_a_file else {name: getattr(mixers, name) for name in available()}
    node = _parsed(of_a_file["call"] if of_a_file else text, text)
    if of_a_file and (name := _name_and_keywords(node, text)[0]) not in operators:
        own = [each for each in operators if each not in available()]
        raise ValueError(f"spec: {text!r} names an unknown operator {name!r}; {nearest(name, own)}")
    return _build(node, text, dim, operators, context)


def name_and_literals(text: str) -> tuple[str, dict[str, Any]]:
    """What a text such as "coatnet_0(dims=(64, 96), drop_rate=0.1)" names, and its arguments, which are literals.

    Raises:
        ValueError: it cannot be read, or a value is no literal.
    """
    text = _text(text).strip()
    name, keywords = _name_and_keywords(_parsed(text, text), text, "a name")
    return name, {key: _literal(value, text) for key, value in keywords.items()}


def nearest(name: str, valid: Iterable[str]) -> str:
    """The end of an error message: what was probably meant, and what there is."""
    valid = sorted(valid)
    lower = {v.lower(): v for v in valid}
    close = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    meant = f"did you mean {lower[close[0]]!r}? " if close else ""
    return f"{meant}Valid: {', '.join(valid) or 'none'}"


def in_a_users_file(error: BaseException) -> str | None:
    """What an error says and where it left a file that `build` has loaded, in one line; None: it came through none."""
    files = {getattr(module, "__file__", None) for name, module in sys.modules.items() if name.startswith(_USER)}
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename in files:
            return f"{frame.filename}, line {frame.lineno}: {type(error).__name__}: {error}"
    return None


def _text(spec: str) -> str:
    if not isinstance(spec, str):
        raise ValueError(f"spec: {spec!r}, must be text such as 'Name(argument=value, ...)'")
    return spec


def _parsed(call: str, text: str) -> ast.expr:
    try:
        return ast.parse(call, mode="eval").body
    except (SyntaxError, RecursionError) as error:
        error = error if isinstance(error, SyntaxError) else SyntaxError("too deeply nested")
        raise ValueError(
            f"spec: {text!r} cannot be read ({error.msg}); write it as Name(argument=value, ...)"
        ) from None


def _build(
    node: ast.expr, text: str, dim: int | None, operators: dict[str, type], context: dict[str, Any]
) -> nn.Module:
    name, keywords = _name_and_keywords(node, text)
    if name not in operators:
        raise ValueError(f"spec: {text!r} names an unknown operator {name!r}; {nearest(name, operators)}")
    operator = operators[name]
    parameters = [p for p in inspect.signature(operator).parameters if p != "dim"]
    arguments = {key: value for key, value in context.items() if key in parameters}
    if {"num_heads", "head_dim"} & keywords.keys():  # one replaces the other
        arguments = {key: value for key, value in arguments.items() if key not in ("num_heads", "head_dim")}
    for key, value in keywords.items():
        if key not in parameters:
            raise ValueError(f"spec: {text!r}: {name} has no argument {key!r}; {nearest(key, parameters)}")
        if isinstance(value, ast.Name) and value.id not in operators:
            raise ValueError(
                f"spec: {text!r}: {key} is {value.id}, which is no operator; write text in quotes, and True or False "
                f"with a capital; {nearest(value.id, operators)}"
            )
        arguments[key] = _value(value, text, dim, operators, context)
    try:
        return operator(**arguments) if dim is None else operator(dim, **arguments)
    except TypeError as error:
        raise ValueError(f"spec: {text!r} cannot be built: {error}") from error
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _name_and_keywords(node: ast.expr, text: str, what: str = "an operator") -> tuple[str, dict[str, ast.expr]]:
    function = node.func if isinstance(node, ast.Call) else node
    if not isinstance(function, ast.Name):
        raise ValueError(f"spec: {text!r} is not {what}; write it as Name(argument=value, ...)")
    if not isinstance(node, ast.Call):
        return function.id, {}
    if node.args or any(keyword.arg is None for keyword in node.keywords):
        raise ValueError(f"spec: {text!r}: arguments must be named, as in {function.id}(argument=value)")
    named = [str(keyword.arg) for keyword in node.keywords]
    twice = next((name for name in named if named.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"spec: {text!r}: {twice} is given twice")
    return function.id, {str(keyword.arg): keyword.value for keyword in node.keywords}


def _value(node: ast.expr, text: str, dim: int | None, operators: dict[str, type], context: dict[str, Any]) -> Any:
    called = node.func if isinstance(node, ast.Call) else node
    if isinstance(called, ast.Name):
        return _build(node, text, dim, operators, context)
    return _literal(node, text, " or operator")


def _literal(node: ast.expr, text: str, other: str = "") -> Any:
    try:
        return ast.literal_eval(node)
    except (ValueError, TypeError, RecursionError):
        kinds = f"number, text, tuple{other}" if other else "number, text or tuple"
        raise ValueError(f"spec: {text!r}: {ast.unparse(node)!r} is no {kinds}") from None


def _operators_of(path: str) -> dict[str, type]:
    """Operators defined in a user's file, besides our own, which they may nest."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise ValueError(f"spec: no file {path!r}; give the path of a Python file that defines the operator")
    found = _classes_of(file.resolve(), file.stat().st_mtime_ns, path)
    return {name: getattr(mixers, name) for name in available()} | found


@cache
def _classes_of(file: Path, changed_at: int, path: str) -> dict[str, type]:
    """The classes of a file as it was at a time; run once, not once for each operator built."""
    name = f"{_USER}{hashlib.sha256(str(file).encode()).hexdigest()[:12]}"
    module_spec = importlib.util.spec_from_file_location(name, file)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[name] = module  # dataclasses and pickle look there
    try:
        module_spec.loader.exec_module(module)
    except Exception as error:
        line = next(
            (f.lineno for f in reversed(traceback.extract_tb(error.__traceback__)) if f.filename == str(file)), None
        )
        line = error.lineno if isinstance(error, SyntaxError) else line
        where = path if line is None else f"{path}, line {line}"
        raise ValueError(f"{where}: {type(error).__name__}: {error}; the file cannot be loaded") from error
    # abstract ones too: building them says what they lack
    own = {n: v for n, v in vars(module).items() if _is_module(n, v) and v.__module__ == name}
    for operator in own.values():
        operator.defined_in = f"{path}:"
    return own


def _is_module(name: str, value: Any) -> bool:
    return isinstance(value, type) and issubclass(value, nn.Module) and not name.startswith("_")


def _is_operator(name: str, value: Any) -> bool:
    return _is_module(name, value) and not inspect.isabstract(value)
