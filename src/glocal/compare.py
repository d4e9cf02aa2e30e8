"""Comparison: several layouts on the same data, several seeds each, one table.

Every finished run is kept in OUT/runs under a name made of its configuration, data and code, so that an interrupted
comparison continues, a repeated one is instant, and more seeds or layouts extend it.
"""

import dataclasses
import hashlib
import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import glocal
from glocal.backbone import default_dims, parse_layout
from glocal.config import CompareConfig, ModelConfig, RunConfig, TrainConfig
from glocal.data import PROBES, ImageData, load
from glocal.report import compare_report
from glocal.running import Progress, run_all
from glocal.training import build_model

# Files of the package that cannot change what a run computes.
_NOT_IN_RUNS = {"cli.py", "__main__.py", "compare.py", "running.py", "config.py", "report"}


def recipe(data: ImageData, epochs: int | None) -> TrainConfig:
    """The recipe that all candidates share, by the kind of data.

    Probes are generated and need no augmentation. Real images are shifted by up to a sixteenth of their side at
    random; those of folders are mirrored too, those of idx files are not, because most such sets hold characters.
    """
    if data.kind == "probe":
        return TrainConfig(epochs=5 if epochs is None else epochs, batch_size=32, lr=1e-3)
    return TrainConfig(
        epochs=3 if epochs is None else epochs,
        crop_padding=max(1, min(data.img_size) // 16),
        flip=data.kind == "folder",
    )


def network(layout: str, data: ImageData) -> ModelConfig:
    """The network of a layout: of the default width for real images, half as wide for a probe, which asks less."""
    dims = default_dims(len(parse_layout(layout)))
    return ModelConfig(layout, tuple(dim // 2 for dim in dims) if data.kind == "probe" else dims)


def check(config: CompareConfig) -> None:
    """Refuses what is wrong whatever the data holds, before the data is read.

    Raises:
        ValueError: A number or a layout makes no sense, or the folder for results is none, or lies in the data.
    """
    for name in ("seeds", "epochs"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name}: {value}; it must be at least 1")
    if not config.layouts:
        raise ValueError("--layouts: none given; name at least one, such as C-C-T-T")
    twice = [layout for i, layout in enumerate(config.layouts) if layout in config.layouts[:i]]
    if twice:
        raise ValueError(f"--layouts: {twice[0]!r} is named twice; name every layout once")
    for layout in config.layouts:
        parse_layout(layout)
    out = config.out
    blocked = next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None)
    if blocked is not None:
        raise ValueError(f"--out: {str(blocked)!r} is a file; name a folder")
    if config.data not in PROBES and out.resolve().is_relative_to(Path(config.data).resolve()):
        # It would be taken for a class of images the next time.
        raise ValueError(f"--out: {str(out)!r} lies inside the data folder; name one elsewhere")


def plan(config: CompareConfig, data: ImageData) -> list[RunConfig]:
    """Every run of a comparison: all layouts with the first seed, then with the second, and so on.

    Raises:
        ValueError: A layout cannot be built or run for this data.
    """
    for layout in config.layouts:  # an error must come now, not in the middle: build it and run it once
        with torch.random.fork_rng(), torch.inference_mode():
            build_model(network(layout, data), data).eval()(torch.zeros(1, data.in_chans, *data.img_size))
    return [
        RunConfig(config.data, network(layout, data), recipe(data, config.epochs), seed)
        for seed in range(config.seeds)
        for layout in config.layouts
    ]


def prepare_folder(out: Path) -> None:
    """Makes `out` and its `runs`, and refuses what could not be written to, before hours are spent.

    Raises:
        ValueError: `out` cannot be written to, or holds a results.json that is not ours.
    """
    try:
        (out / "runs").mkdir(parents=True, exist_ok=True)
        _write(out / "runs" / ".probe", "")
        (out / "runs" / ".probe").unlink()
    except OSError as error:
        raise ValueError(
            f"--out: cannot write to {str(out)!r} ({error.strerror}); name a folder of your own"
        ) from error
    existing = out / "results.json"
    if existing.exists() and not isinstance(_read(existing).get("candidates"), list):
        raise ValueError(f"--out: {str(existing)!r} is not a result of glocal compare; name another folder")


def compare(config: CompareConfig, *, workers: int | None = None, quiet: bool = False) -> dict[str, Any]:
    """Trains every layout with every seed and writes `report.html` and `results.json` after each finished run.

    Args:
        config: Data, layouts, seeds, epochs and folder.
        workers: Runs side by side; by default one for every core (on a GPU, one).
        quiet: Whether to show no progress.

    Returns:
        What `results.json` holds. Every candidate has: `name` (the layout), `data`, `test_accuracy` {`mean`,
        `per_seed`} in percent after the last epoch, `train_loss` likewise, `seeds`, `params`,
        `images_per_second` (training images, mean over runs), `seconds_per_epoch` (training and test, mean),
        `curves` [{`seed`, `train_loss`, `test_accuracy`}, each a list over epochs].

    Raises:
        ValueError: Something in `config` cannot be used; nothing was trained.
        RunFailed: A run could not be finished; what is finished is kept.
        KeyboardInterrupt: Ctrl-C; what is finished is kept.
    """
    check(config)
    data = load(config.data)
    runs = plan(config, data)
    prepare_folder(config.out)
    keys = run_keys(runs, data)
    finished = {i: result for i, key in enumerate(keys) if (result := _finished(config.out, key)) is not None}
    results = _publish(config, data, runs, finished)
    todo = [i for i in range(len(runs)) if i not in finished]
    with Progress([_label(run) for run in runs], done=finished, quiet=quiet) as progress:
        for i, result in run_all({i: runs[i] for i in todo}, data, progress, workers):
            finished[i] = result
            content = {"config": dataclasses.asdict(runs[i]), "result": result}
            _write(_run_file(config.out, keys[i]), json.dumps(content, indent=1))
            results = _publish(config, data, runs, finished)
    return results


def run_keys(runs: Sequence[RunConfig], data: ImageData) -> list[str]:
    """One name per run, the same exactly when a repetition would give the same result.

    It covers the configuration, the images themselves, the package's code, a user's file that the layout names,
    PyTorch's version and the kind of device.
    """
    content = hashlib.sha256()
    for tensor in (data.train_images, data.train_labels, data.test_images, data.test_labels):
        content.update(repr(tuple(tensor.shape)).encode() + tensor.contiguous().numpy().tobytes())
    package = Path(glocal.__file__).parent
    for path in sorted(package.rglob("*.py")):
        if path.relative_to(package).parts[0] not in _NOT_IN_RUNS:
            content.update(path.read_bytes())
    content.update(f"{torch.__version__} {torch.cuda.is_available()}".encode())
    keys = []
    for run in runs:
        key = content.copy()
        described = dataclasses.asdict(run)
        del described["data"]  # the images count, not where they lie
        key.update(json.dumps(described, sort_keys=True).encode())
        for file in re.findall(r"[^'\"(]+?\.py(?=:)", run.model.layout):
            key.update(Path(file.removeprefix("-")).read_bytes() if Path(file).is_file() else file.encode())
        keys.append(key.hexdigest()[:16])
    return keys


def summarise(
    config: CompareConfig, data: ImageData, runs: Sequence[RunConfig], finished: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    """What `results.json` holds, from the runs finished so far; a layout without any is left out."""
    candidates = []
    for layout in config.layouts:
        own = [(runs[i].seed, finished[i]) for i in sorted(finished) if runs[i].model.layout == layout]
        if not own:
            continue
        epochs = [epoch for _, result in own for epoch in result["epochs"]]
        candidates.append(
            {
                "name": layout,
                "data": config.data,
                "seeds": [seed for seed, _ in own],
                "test_accuracy": _over_seeds([result["epochs"][-1]["test_accuracy"] for _, result in own]),
                "train_loss": _over_seeds([result["epochs"][-1]["train_loss"] for _, result in own]),
                "params": own[0][1]["params"],
                "images_per_second": _mean([epoch["images_per_second"] for epoch in epochs]),
                "seconds_per_epoch": _mean([epoch["seconds"] for epoch in epochs]),
                "curves": [
                    {
                        "seed": seed,
                        "train_loss": [epoch["train_loss"] for epoch in result["epochs"]],
                        "test_accuracy": [epoch["test_accuracy"] for epoch in result["epochs"]],
                    }
                    for seed, result in own
                ],
            }
        )
    return {
        "glocal": glocal.__version__,
        "torch": torch.__version__,
        "device": device_name(),
        "data": {
            "name": config.data,
            "train_images": len(data.train_labels),
            "test_images": len(data.test_labels),
            "classes": list(data.classes),
            "img_size": list(data.img_size),
            "in_chans": data.in_chans,
            "note": data.note,
        },
        "recipe": dataclasses.asdict(runs[0].train),
        "runs": {"finished": len(finished), "planned": len(runs)},
        "candidates": candidates,
    }


def device_name() -> str:
    """What runs are trained on, in words."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return "CPU, one thread a run"


def _publish(
    config: CompareConfig, data: ImageData, runs: Sequence[RunConfig], finished: dict[int, dict[str, Any]]
) -> dict[str, Any]:
    results = summarise(config, data, runs, finished)
    _write(config.out / "results.json", json.dumps(results, indent=1))
    _write(config.out / "report.html", compare_report(results))
    return results


def _label(run: RunConfig) -> str:
    return f"{run.model.layout} seed {run.seed}"


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _over_seeds(values: list[float]) -> dict[str, Any]:
    return {"mean": _mean(values), "per_seed": values}


def _run_file(out: Path, key: str) -> Path:
    return out / "runs" / f"{key}.json"


def _finished(out: Path, key: str) -> dict[str, Any] | None:
    """The result kept under a run's key; None if there is none or the file is damaged."""
    result = _read(_run_file(out, key)).get("result")
    complete = isinstance(result, dict) and {"epochs", "params"} <= result.keys() and result["epochs"]
    return result if complete else None


def _read(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is no such file or it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _write(path: Path, text: str) -> None:
    """Writes a file whole or not at all: to a temporary name beside it, then renamed."""
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        temporary.write_text(text, encoding="utf-8")
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
