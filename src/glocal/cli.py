"""The command line. A user's mistake is one line on stderr and exit code 2, never a traceback.

Everything is imported where it is used, so that `glocal --help` is quick.
"""

import difflib
import importlib.util
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

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


class UserError(Exception):
    """A mistake of the user; the message is the one line to show."""


class CommandFailed(Exception):
    """Something went wrong that is nobody's mistake in the command; the message says what."""


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
        _require(_LAB)
        _, run = _COMMANDS[command]
        return run(name, rest)
    except UserError as error:
        return _say(name, error, 2)
    except CommandFailed as error:  # may be a traceback from the middle of a run: kept as it is
        print(f"{name}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as error:
        return _say(name, error if str(error) else "interrupted", 130)


def _compare(name: str, arguments: Sequence[str]) -> int:
    """`glocal compare`."""
    from glocal.config import CompareConfig

    config = _parse(CompareConfig, name, arguments)
    if config is None:
        return 0
    from glocal.compare import compare

    kept = f"finished runs are kept in {str(config.out)!r}; the same command continues"
    with _said_in_one_line(name, kept):
        results = compare(config)
    print_comparison(results)
    print(f"\nreport: {config.out / 'report.html'}\nnumbers: {config.out / 'results.json'}, results.csv, results.tex")
    return 0


def _train(name: str, arguments: Sequence[str]) -> int:
    """`glocal train`."""
    from glocal.config import RunConfig, TrainCommand, from_plain

    default = TrainCommand()
    if (file := _option(arguments, "--config")) is not None:
        import yaml

        try:
            plain = yaml.safe_load(Path(file).read_text("utf-8"))
            if isinstance(plain, dict):
                plain.pop("images", None)  # that a run's own config.yaml has
            default = TrainCommand(run=from_plain(RunConfig, plain))
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--config: cannot read {file!r} ({getattr(error, 'strerror', error)})") from error
        except (yaml.YAMLError, ValueError) as error:
            raise UserError(f"--config: {file}: {error}") from error
    command = _parse(TrainCommand, name, arguments, default)
    if command is None:
        return 0
    from glocal.data import load
    from glocal.progress import Progress
    from glocal.running import train_here

    kept = f"the last state is kept in {str(command.out)!r}; the same command with --resume continues"
    with _said_in_one_line(name, kept):
        data = load(command.run.data.source)
        with Progress([command.run.model.name], [1.0]) as progress:
            result = train_here(command.run, data, command.out, resume=command.resume, progress=progress)
    print(
        f"test accuracy {result.test_accuracy:.2f} %, loss {result.test_loss:.4f}; "
        f"{result.params:,} parameters\nrun: {command.out}"
    )
    return 0


def _evaluate(name: str, arguments: Sequence[str]) -> int:
    """`glocal evaluate`."""
    from glocal.config import EvaluateCommand

    command = _parse(EvaluateCommand, name, arguments)
    if command is None:
        return 0
    from dataclasses import asdict

    from glocal.data import load
    from glocal.inference import evaluate, load_trained
    from glocal.runs import images_of

    with _said_in_one_line(name):
        trained = load_trained(command.run)
        data = load(command.data or trained.config.data.source)
        if command.data is None:  # in cross-validation, its own part
            data = images_of(trained.config, data)
        found = evaluate(trained, data)
    if command.json:
        print(json.dumps(asdict(found), indent=1))
        return 0
    print(f"{found.images} test images: accuracy {found.accuracy:.2f} %, loss {found.loss:.4f}\n")
    print_table([("class", "accuracy %"), *((each, f"{value:.1f}") for each, value in found.per_class.items())])
    return 0


def _predict(name: str, arguments: Sequence[str]) -> int:
    """`glocal predict`."""
    from glocal.config import PredictCommand

    command = _parse(PredictCommand, name, arguments)
    if command is None:
        return 0
    from glocal.inference import image_files, load_trained, predict_files

    with _said_in_one_line(name):
        if not command.images:
            raise UserError("no images given; name files, or folders of images")
        trained = load_trained(command.run)
        found = list(predict_files(trained, image_files(command.images)))
    if command.json:
        lines = [
            {"path": each.path, "predicted": each.predicted, "probabilities": each.probabilities} for each in found
        ]
        print(json.dumps(lines, indent=1))
        return 0
    rows = [("image", "predicted", "probability %")]
    print_table(
        [*rows, *((each.path, each.predicted, f"{100 * each.probabilities[each.predicted]:.1f}") for each in found)]
    )
    return 0


def _check_data(name: str, arguments: Sequence[str]) -> int:
    """`glocal check-data`; exit code 1 where something is wrong."""
    from glocal.config import CheckDataCommand

    command = _parse(CheckDataCommand, name, arguments)
    if command is None:
        return 0
    from dataclasses import asdict

    from glocal.data.check import check, describe

    with _said_in_one_line(name):
        found = check(command.data)
    print(json.dumps(asdict(found), indent=1) if command.json else describe(found))
    return 0 if found.ok else 1


_COMMANDS: dict[str, tuple[str, Callable[[str, Sequence[str]], int]]] = {
    "compare": ("train several networks on the same data and say which is the best, if any is", _compare),
    "train": ("train one network", _train),
    "evaluate": ("test a trained network", _evaluate),
    "predict": ("say what a trained network sees in images", _predict),
    "check-data": ("say what a data set holds, and what is wrong with it", _check_data),
}


@contextmanager
def _said_in_one_line(name: str, kept: str = "") -> Iterator[None]:
    """Turns what can go wrong in a command into one line, and Ctrl-C into what is kept."""
    from glocal.running import RunFailed

    try:
        yield
    except ValueError as error:
        raise UserError(error) from error
    except (RunFailed, FloatingPointError) as error:
        raise CommandFailed(error) from error
    except KeyboardInterrupt:
        raise KeyboardInterrupt(f"interrupted; {kept}" if kept else "interrupted") from None
    except OSError as error:
        what = f"{error.filename}: {error.strerror or error}" if error.filename else f"{error.strerror or error}"
        raise UserError(f"{what}; {kept}" if kept else what) from error


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


def _parse(config: type, name: str, arguments: Sequence[str], default: Any = None) -> Any:
    """The dataclass `config` filled from the command line; None after --help."""
    import contextlib
    import io

    import tyro

    options = _options(config)
    for argument in arguments:  # tyro's own message for these takes a dozen lines
        given = argument.partition("=")[0]
        if given.startswith("--") and given.replace("_", "-") not in [*options, "--help"]:
            raise UserError(f"unknown option {given!r}; {_nearest(given, options)}")
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


def _option(arguments: Sequence[str], name: str) -> str | None:
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
    message = message.replace("Error parsing ", "").replace("Unrecognized options:", "not expected here:")
    raise UserError(f"{message.rstrip('.')}; see --help")


def print_comparison(results: dict[str, Any]) -> None:
    """The verdicts, and a table for each."""
    for verdict in results["verdicts"]:
        shown = ("data", "fraction", "after", "width")
        own = [c for c in results["candidates"] if all(c[key] == verdict[key] for key in shown)]
        dataset = next(dataset for dataset in results["datasets"] if dataset["name"] == verdict["data"])
        title = f"{verdict['data']}: {dataset['train_images']} training and {dataset['test_images']} test images"
        if verdict["fraction"] != 1:
            title += f", {100 * verdict['fraction']:g} % of the former"
        if verdict["after"]:
            title += f", after {verdict['after']}"
        if verdict["width"] != 1:
            title += f", width {verdict['width']:g}"
        print(f"{title}\n")
        rows = [
            ("network", "test accuracy %", "95 % interval", "every seed", "parameters", "multiply-adds", "images/s")
        ]
        for candidate in own:
            accuracy = candidate["test_accuracy"]
            known = accuracy["low"] is not None
            rows.append(
                (
                    candidate["name"] + (f" without {candidate['without']}" if candidate["without"] else ""),
                    f"{accuracy['mean']:.1f}",
                    f"{accuracy['low']:.1f} to {accuracy['high']:.1f}" if known else "-",
                    " ".join(f"{value:.1f}" for value in accuracy["per_seed"]),
                    f"{candidate['params']:,}",
                    f"{candidate['macs']:,}",
                    f"{candidate['images_per_second']:,.0f}",
                )
            )
        print_table(rows)
        print(f"\n{verdict['sentence']}\n")


def print_table(rows: Sequence[Sequence[str]]) -> None:
    """A table with a heading, its first column to the left; on a terminal of any width, and in a file."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for i, row in enumerate(rows):
        left = f"{row[0]:<{widths[0]}}"
        print("  ".join([left, *(f"{cell:>{width}}" for cell, width in zip(row[1:], widths[1:], strict=True))]))
        if i == 0:
            print("  ".join("-" * width for width in widths))
