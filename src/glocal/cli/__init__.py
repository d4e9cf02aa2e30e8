"""The command line. A user's mistake is one line on stderr and exit code 2, never a traceback.

Everything is imported where it is used, so that `glocal --help` is quick.
"""

import importlib.util
import sys
from collections.abc import Sequence
from importlib import import_module

from glocal.cli.parsing import CommandFailed, UserError, nearest

# What the commands need besides the core: module and the name pip knows.
_LAB = {
    "accelerate": "accelerate",
    "jinja2": "jinja2",
    "PIL": "pillow",
    "rich": "rich",
    "safetensors": "safetensors",
    "scipy": "scipy",
    "sklearn": "scikit-learn",
    "tensorboard": "tensorboard",
    "torchvision": "torchvision",
    "tyro": "tyro",
    "yaml": "pyyaml",
}

# command: what it does, and where the function is
_COMMANDS = {
    "compare": ("train several networks on the same data and say which is the best, if any is", "runs", "compare"),
    "train": ("train one network", "runs", "train"),
    "evaluate": ("test a trained network", "runs", "evaluate"),
    "predict": ("say what a trained network sees in images", "runs", "predict"),
    "explore": ("write a page that shows what every layer and head of a model reads", "explore", "explore"),
    "recall": ("how far apart two tokens of a sequence may be, for each operator", "runs", "recall"),
    "convert": ("turn convolutions into attention that computes the same, or back", "conversion", "convert"),
    "check-data": ("say what a data set holds, and what is wrong with it", "runs", "check_data"),
    "list": ("all operators: the weights they store, and what they connect and share", "listing", "list"),
    "check-operator": ("whether an operator, yours or ours, keeps its promises", "operators", "check_operator"),
    "explain-path": ("which path an operator takes on a shape, and why not the other", "operators", "explain_path"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns the exit code: 0, 1 (a run failed), 2 (a user's mistake) or 130 (Ctrl-C)."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    name = "glocal"
    try:
        if not arguments:
            raise UserError(f"name a command: {', '.join(_COMMANDS)}; see glocal --help")
        command, *rest = arguments
        if command in ("-h", "--help"):
            print(_help())
            return 0
        if command == "--version":
            import glocal

            print(glocal.__version__)
            return 0
        if command not in _COMMANDS:
            kind = "option" if command.startswith("-") else "command"
            raise UserError(f"unknown {kind} {command!r}; {nearest(command, [*_COMMANDS, '--help', '--version'])}")
        name = f"glocal {command}"
        _require(_LAB)
        _, file, function = _COMMANDS[command]
        return int(getattr(import_module(f"glocal.cli.{file}"), f"{function}_command")(name, rest))
    except UserError as error:
        return _say(name, error, 2)
    except CommandFailed as error:  # may be a traceback from the middle of a run: kept as it is
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        return _say(name, error if str(error) else "interrupted", 130)


def _help() -> str:
    width = max(map(len, _COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (what, *_) in _COMMANDS.items()]
    return "\n".join(
        [
            "usage: glocal COMMAND [OPTIONS]",
            "",
            "Local and global modelling: which mixture of convolution and attention suits your data?",
            "",
            "commands:",
            *lines,
            "",
            "glocal COMMAND --help lists the options of a command; glocal --version prints the version.",
        ]
    )


def _say(name: str, message: object, code: int) -> int:
    """One line on stderr, whatever the message holds."""
    print(f"{name}: {' '.join(str(message).split())}", file=sys.stderr)
    return code


def _require(modules: dict[str, str]) -> None:
    missing = [package for module, package in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed; run: pip install 'glocal[lab]'")
