"""The commands that train and use networks, and look at data."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glocal.cli.parsing import UserError, option, parse, print_table, said_in_one_line


def compare_command(name: str, arguments: Sequence[str]) -> int:
    """`glocal compare`."""
    from glocal.config import CompareConfig

    config = parse(CompareConfig, name, arguments)
    if config is None:
        return 0
    from glocal.compare import compare

    kept = f"finished runs are kept in {str(config.out)!r}; the same command continues"
    with said_in_one_line(name, kept, config.out):
        results = compare(config)
    print_comparison(results)
    print(f"\nreport: {config.out / 'report.html'}\nnumbers: {config.out / 'results.json'}, results.csv, results.tex")
    return 0


def train_command(name: str, arguments: Sequence[str]) -> int:
    """`glocal train`."""
    from glocal.cli.commands import TrainCommand
    from glocal.config import RunConfig
    from glocal.plain import from_plain

    default = TrainCommand()
    if (file := option(arguments, "--config")) is not None:
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
    command = parse(TrainCommand, name, arguments, default)
    if command is None:
        return 0
    from glocal.checkpoint import check_folder
    from glocal.data import load
    from glocal.progress import Progress
    from glocal.running import keep_freed_memory, train_here

    kept = f"the last state is kept in {str(command.out)!r}; the same command with --resume continues"
    keep_freed_memory()  # the process is ours
    with said_in_one_line(name, kept, command.out):
        check_folder(command.out)
        data = load(command.run.data.source)
        with Progress([command.run.model.name], [1.0]) as progress:
            result = train_here(command.run, data, command.out, resume=command.resume, progress=progress)
    print(
        f"test accuracy {result.test_accuracy:.2f} %, loss {result.test_loss:.4f}; "
        f"{result.params:,} parameters\nrun: {command.out}"
    )
    return 0


def evaluate_command(name: str, arguments: Sequence[str]) -> int:
    """`glocal evaluate`."""
    from glocal.cli.commands import EvaluateCommand

    command = parse(EvaluateCommand, name, arguments)
    if command is None:
        return 0
    from dataclasses import asdict

    from glocal.data import load
    from glocal.inference import evaluate, load_trained
    from glocal.runs import images_of

    with said_in_one_line(name):
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


def predict_command(name: str, arguments: Sequence[str]) -> int:
    """`glocal predict`."""
    from glocal.cli.commands import PredictCommand

    command = parse(PredictCommand, name, arguments)
    if command is None:
        return 0
    from glocal.inference import image_files, load_trained, predict_files

    with said_in_one_line(name):
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


def recall_command(name: str, arguments: Sequence[str]) -> int:
    """`glocal recall`."""
    from glocal.config import RecallCommand

    command = parse(RecallCommand, name, arguments)
    if command is None:
        return 0
    from glocal.recall import recall_by_distance

    kept = f"finished runs are kept in {str(command.out)!r}; the same command continues"
    with said_in_one_line(name, kept, command.out):
        results = recall_by_distance(command)
    rows = [("operator", "near half, %", "far half, %", "reach")]
    half = results["length"] // 2
    for each in results["operators"]:
        shares = [
            100 * sum(sum(right[part]) for right in each["right"]) / (sum(each["tested"][part]) * results["seeds"])
            for part in (slice(half), slice(half, None))
        ]
        rows.append((each["mixer"], *(f"{share:.1f}" for share in shares), str(each["reach"])))
    print_table(rows)
    print(f"\nreport: {command.out / 'report.html'}\nnumbers: {command.out / 'results.json'}")
    return 0


def check_data_command(name: str, arguments: Sequence[str]) -> int:
    """`glocal check-data`; exit code 1 where something is wrong."""
    from glocal.cli.commands import CheckDataCommand

    command = parse(CheckDataCommand, name, arguments)
    if command is None:
        return 0
    from dataclasses import asdict

    from glocal.data.check import check, describe

    with said_in_one_line(name):
        found = check(command.data)
    print(json.dumps(asdict(found), indent=1) if command.json else describe(found))
    return 0 if found.ok else 1


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
