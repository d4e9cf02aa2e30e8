"""The command line. A user's mistake is one line on stderr and exit code 2, never a traceback.

Everything is imported where it is used, so that `glocal --help` is quick.
"""

import difflib
import importlib.util
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NoReturn

# What the commands need besides the core: module and the name pip knows.
_LAB = {"accelerate": "accelerate", "jinja2": "jinja2", "PIL": "pillow", "rich": "rich", "tyro": "tyro"}


class UserError(Exception):
    """A mistake of the user; the message is the one line to show."""


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
            raise UserError(f"unknown {kind} {command!r}; {_nearest(command, [*_COMMANDS, '--help', '--version'])}")
        name = f"glocal {command}"
        _, run = _COMMANDS[command]
        return run(name, rest)
    except UserError as error:
        return _say(name, error, 2)
    except KeyboardInterrupt:
        return _say(name, "interrupted", 130)


def _compare(name: str, arguments: Sequence[str]) -> int:
    """`glocal compare`."""
    _require(_LAB)
    from glocal.config import CompareConfig

    config = _parse(CompareConfig, name, arguments)
    if config is None:
        return 0
    from glocal.compare import compare
    from glocal.running import RunFailed

    try:
        results = compare(config)
    except ValueError as error:
        raise UserError(error) from error
    except RunFailed as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        kept = f"finished runs are kept in {str(config.out)!r}; the same command continues"
        return _say(name, f"interrupted; {kept}", 130)
    except OSError as error:
        what = error.strerror or str(error)
        raise UserError(
            f"{error.filename or config.out}: {what}; finished runs are kept, the same command continues"
        ) from error
    _print_table(results)
    print(f"\nreport: {config.out / 'report.html'}\nnumbers: {config.out / 'results.json'}")
    return 0


_COMMANDS: dict[str, tuple[str, Callable[[str, Sequence[str]], int]]] = {
    "compare": ("train several layouts on the same data and say how they compare", _compare),
}


def _help() -> str:
    width = max(map(len, _COMMANDS))
    lines = [f"  {name:<{width}}  {what}" for name, (what, _) in _COMMANDS.items()]
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


def _nearest(given: str, valid: Iterable[str]) -> str:
    valid = list(valid)
    near = difflib.get_close_matches(given, valid, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"valid are {', '.join(valid)}"


def _require(modules: dict[str, str]) -> None:
    missing = [package for module, package in modules.items() if importlib.util.find_spec(module) is None]
    if missing:
        raise UserError(f"{', '.join(missing)} not installed; run: pip install 'glocal[lab]'")


def _parse(config: type, name: str, arguments: Sequence[str]) -> Any:
    """The dataclass `config` filled from the command line; None after --help."""
    import contextlib
    import dataclasses
    import io

    import tyro

    options = ["--" + field.name.replace("_", "-") for field in dataclasses.fields(config)]
    for argument in arguments:  # tyro's own message for these takes a dozen lines
        given = argument.partition("=")[0]
        if given.startswith("--") and given.replace("_", "-") not in [*options, "--help"]:
            raise UserError(f"unknown option {given!r}; {_nearest(given, options)}")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(config, prog=name, args=list(arguments))
    except SystemExit as stop:
        if not stop.code:
            return None
        _complain(complaint.getvalue())


def _complain(box: str) -> NoReturn:
    """Raises what tyro says in a box of several lines as one line."""
    box = re.sub(r"\x1b\[[0-9;]*m", "", box)
    lines = [line.strip(" │╭╮╰╯─-\n") for line in box.splitlines()]
    lines = [line for line in lines if line]
    text = []
    for line in lines[1:]:  # the first is a title
        if line.startswith(("Argument helptext", "Perhaps you meant", "For full helptext", "Are you missing")):
            break
        text.append(line)
    message = " ".join(text) or " ".join(lines)
    message = re.sub(r"invalid literal for int\(\) with base 10: ('.*')", r"\1 is not a whole number", message)
    message = message.replace("Error parsing ", "").replace("Unrecognized options:", "not expected here:")
    raise UserError(f"{message.rstrip('.')}; see --help")


def _print_table(results: dict[str, Any]) -> None:
    """One line a candidate; on a terminal of any width, and in a file."""
    rows = [("layout", "test accuracy %", "every seed", "parameters", "images/s")]
    for candidate in results["candidates"]:
        accuracy = candidate["test_accuracy"]
        rows.append(
            (
                candidate["name"],
                f"{accuracy['mean']:.1f}",
                " ".join(f"{value:.1f}" for value in accuracy["per_seed"]),
                f"{candidate['params']:,}",
                f"{candidate['images_per_second']:,.0f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    data = results["data"]
    print(f"{data['name']}: {data['train_images']} training and {data['test_images']} test images\n")
    for i, row in enumerate(rows):
        left = f"{row[0]:<{widths[0]}}"
        print("  ".join([left, *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))]))
        if i == 0:
            print("  ".join("-" * width for width in widths))
