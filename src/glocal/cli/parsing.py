"""What all commands share: options from a dataclass, errors in one line, tables."""

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn


class UserError(Exception):
    """A mistake of the user; the message is the one line to show."""


class CommandFailed(Exception):
    """Something went wrong that is nobody's mistake in the command; the message says what."""


@contextmanager
def said_in_one_line(name: str, kept: str = "", out: Path | None = None) -> Iterator[None]:
    """Turns what can go wrong in a command into one line, and Ctrl-C into what is kept, if `out` is there by then."""
    from glocal.running import RunFailed

    try:
        yield
    except ValueError as error:
        raise UserError(error) from error
    except (RunFailed, FloatingPointError) as error:
        raise CommandFailed(error) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted{_kept(kept, out)}") from None
    except OSError as error:
        what = f"{error.filename}: {error.strerror or error}" if error.filename else f"{error.strerror or error}"
        raise UserError(f"{what}{_kept(kept, out)}") from error
    except Exception as error:
        from glocal.spec import in_a_users_file

        if (said := in_a_users_file(error)) is None:
            raise
        raise UserError(f"{said}{_kept(kept, out)}") from error


def _kept(kept: str, out: Path | None) -> str:
    return f"; {kept}" if kept and out is not None and out.is_dir() else ""


def parse(config: type, name: str, arguments: Sequence[str], default: Any = None) -> Any:
    """The dataclass `config` filled from the command line; None after --help."""
    import contextlib
    import io

    import tyro

    options = _options(config)
    for argument in arguments:  # tyro's own message for these takes a dozen lines
        given = argument.partition("=")[0]
        if given.startswith("--") and given.replace("_", "-") not in [*options, "--help"]:
            raise UserError(f"unknown option {given!r}; {nearest(given, options)}")
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(
                config,
                prog=name,
                args=list(arguments),
                config=(tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes),
                **({} if default is None else {"default": default}),
            )
    except SystemExit as stop:
        if not stop.code:
            return None
        _complain(complaint.getvalue())


def _options(config: type) -> list[str]:
    """All options of a dataclass and those within it, as they are written."""
    import dataclasses
    import typing

    hints = typing.get_type_hints(config, include_extras=True)
    found = []
    for field in dataclasses.fields(config):
        hint = hints[field.name]
        named = next((extra.name for extra in getattr(hint, "__metadata__", ()) if getattr(extra, "name", None)), None)
        inner = typing.get_type_hints(config)[field.name]
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            found += _options(inner)
        else:
            option = "--" + (named or field.name).replace("_", "-")
            found += [option, f"--no-{option[2:]}"] if inner is bool else [option]
    return found


def option(arguments: Sequence[str], name: str) -> str | None:
    """What follows an option, before the others are read."""
    for i, argument in enumerate(arguments):
        if argument.startswith(f"{name}="):
            return argument.partition("=")[2]
        if argument == name and i + 1 < len(arguments):
            return arguments[i + 1]
    return None


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
    message = re.sub(r"Could not find valid parse for arguments: \[(.*?)\]", r"cannot read \1", message)
    message = re.sub(
        r"no type matching (?:\{None\}\|)?\{?(.*?)\}? could be instantiated from \[(.*?)\]\. .*",
        r"cannot read \2; it takes \1",
        message,
    )
    message = message.replace("Error parsing ", "").replace("Unrecognized options:", "not expected here:")
    # what a part of a configuration refuses comes with the part's name, and with its own
    message = re.sub(r"^run(?:\.\w+)?: (\w+): ", lambda said: f"--{said[1].replace('_', '-')}: ", message)
    raise UserError(f"{message.rstrip('.')}; see --help")


def nearest(given: str, valid: Iterable[str]) -> str:
    """The end of an error message: what was probably meant, or what there is."""
    valid = list(valid)
    near = difflib.get_close_matches(given, valid, n=1, cutoff=0.5)
    return f"did you mean {near[0]!r}?" if near else f"valid are {', '.join(valid)}"


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """A table with a heading, its first column to the left; on a terminal of any width, and in a file."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for i, row in enumerate(rows):
        left = f"{row[0]:<{widths[0]}}"
        print("  ".join([left, *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))]))
        if i == 0:
            print("  ".join("-" * width for width in widths))
