"""Comparison: several networks on the same data, several seeds each, one answer.

Every run lives in OUT/runs under a name made of its configuration, data and code, so that an interrupted comparison
continues, a repeated one is instant, and more seeds or candidates extend it.
"""

import dataclasses
import hashlib
import json
import math
import re
import time
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

import glocal
from glocal.backbone import parse_layout
from glocal.candidates import Networks, entries
from glocal.checkpoint import CheckpointError, alone_in, check_folder, load_weights, write_text
from glocal.config import CompareConfig, RunConfig
from glocal.data import PROBES, ImageData, load
from glocal.data.splits import fold
from glocal.plain import to_plain
from glocal.plan import TUNED, Cell, Plan, Planned, recipe
from glocal.progress import Progress
from glocal.report import compare_report, results_csv, results_latex
from glocal.running import Job, run_all
from glocal.runs import RunResult, finished, identity
from glocal.summary import Condition, Outcome, Row, device_name, summarise

# What of the package cannot change what a run computes: files, and folders with all that is in them.
NOT_IN_RUNS = {
    *("cli", "__main__.py", "compare.py", "plan.py", "candidates.py", "budget.py", "analysis/cost.py", "running.py"),
    *("progress.py", "config.py", "statistics.py", "summary.py", "report", "recall.py", "inference.py"),
    *("contract", "evidence.py", "inspection.py"),
}
EMBEDDED = (*PROBES, "digits")
SECONDS_BETWEEN_REPORTS = 20
WRITTEN = ("results.json", "results.csv", "results.tex", "report.html")


def check(config: CompareConfig) -> None:
    """Refuses what is wrong whatever the data holds, before the data is read.

    Raises:
        ValueError: A number or a layout makes no sense, or the folder for results is none, or lies in the data.
    """
    if config.folds and config.tune:
        raise ValueError("--tune: validation images of one fold are test images of the others; leave out --folds")
    if config.folds < 0 or config.folds == 1:
        raise ValueError(f"--folds: {config.folds}; it must be at least 2, or 0 for one split")
    for name, values, largest in (("data-fractions", config.data_fractions, 1), ("widths", config.widths, math.inf)):
        for value in values:
            if not 0 < value <= largest or not math.isfinite(value):
                raise ValueError(
                    f"--{name}: {value:g}; it must be above 0" + (" and at most 1" if largest == 1 else "")
                )
    for name in ("data", "seeds", "layouts", "mixers", "models", "widths", "data_fractions", "ablate"):
        values = getattr(config, name)
        twice = next((value for i, value in enumerate(values) if value in values[:i]), None)
        if twice is not None and name != "seeds":
            raise ValueError(f"--{name.replace('_', '-')}: {twice!r} is named twice; name it once")
        if not values and name in ("data", "seeds", "widths", "data_fractions"):
            raise ValueError(f"--{name.replace('_', '-')}: none given")
    for name, values in (("seeds", config.seeds), ("epochs", () if config.epochs is None else (config.epochs,))):
        for value in values:
            if value < 1:
                raise ValueError(f"--{name}: {value}; it must be at least 1")
    if config.precision == "fp16" and not torch.cuda.is_available():
        raise ValueError("--precision: fp16 needs a GPU; on a CPU use bf16")
    if len(config.seeds) not in (1, len(config.data_fractions)):
        raise ValueError(
            f"--seeds: {len(config.seeds)} numbers for {len(config.data_fractions)} data fractions; give one for all, "
            "or one for each"
        )
    entries(config)
    out = config.out
    check_folder(out)
    for source in (*config.data, *([config.then] if config.then else [])):
        if source not in EMBEDDED and out.resolve().is_relative_to(Path(source).resolve()):
            # It would be taken for a class of images the next time.
            raise ValueError(f"--out: {str(out)!r} lies inside the data folder; name one elsewhere")


def prepare_folder(out: Path) -> None:
    """Makes `out` and its `runs`, and refuses what could not be written to, before hours are spent.

    Raises:
        ValueError: `out` cannot be written to, or holds something else.
    """
    existing = out / "results.json"
    if existing.exists() and not isinstance(_read(existing).get("candidates"), list):
        raise ValueError(f"--out: {str(existing)!r} is not a result of glocal compare; name another folder")
    if (out / "config.yaml").exists():
        raise ValueError(f"--out: {str(out)!r} holds a run of glocal train; name another folder")
    foreign = next((name for name in WRITTEN if (out / name).exists() and not existing.exists()), None)
    if foreign is not None:
        raise ValueError(f"--out: {str(out / foreign)!r} would be overwritten; name another folder")
    try:
        (out / "runs").mkdir(parents=True, exist_ok=True)
        write_text(out / "runs" / ".probe", "")
        (out / "runs" / ".probe").unlink(missing_ok=True)
    except OSError as error:
        raise ValueError(
            f"--out: cannot write to {str(out)!r} ({error.strerror}); name a folder of your own"
        ) from error


def compare(config: CompareConfig, *, workers: int | None = None, quiet: bool = False) -> dict[str, Any]:
    """Trains every candidate with every seed and writes report.html, results.json, results.csv and results.tex.

    Args:
        config: What to compare, on what, and where to keep it.
        workers: Runs side by side; by default one for every core (on a GPU, one).
        quiet: Whether to show no progress.

    Returns:
        What results.json holds; docs/results-json.md says what that is.

    Raises:
        ValueError: Something in `config` cannot be used; nothing was trained.
        RunFailed: A run could not be finished; what is finished is kept.
        OSError: A file could not be written; likewise.
        KeyboardInterrupt: Ctrl-C; likewise.
    """
    check(config)
    sources = dict.fromkeys([*config.data, *([config.then] if config.then else [])])
    study = Study(config, {source: load(source) for source in sources})
    prepare_folder(config.out)
    with alone_in(config.out):
        study.networks.keep()
        return study.run(workers, quiet)


class Study:
    """A comparison: what there is to do, what is done, and what it says.

    Args:
        config: What to compare.
        data: Images of every source.

    Raises:
        ValueError: A candidate cannot be built for the data.
    """

    def __init__(self, config: CompareConfig, data: dict[str, ImageData]):
        self.config, self.data = config, data
        self.environment = _environment(NOT_IN_RUNS)
        self.networks = Networks(config.out / "networks.json", _environment(set()).hexdigest())
        self.plan = Plan(config, data, self.networks)
        self.identities = {source: identity(images) for source, images in data.items()}
        for source in config.data:
            same = [other for other in config.data if self.identities[other] == self.identities[source]]
            if len(same) > 1:
                raise ValueError(f"--data: {same[0]!r} and {same[1]!r} hold the same images; name one of them")
        self.lr: dict[Cell, float] = {}  # what to multiply the recipe's with, chosen on validation images
        self._results: dict[Planned, RunResult] = {}
        self._outcomes: dict[tuple[Planned, ...], Outcome] = {}

    def run(self, workers: int | None, quiet: bool) -> dict[str, Any]:
        """Does what is not done, and writes what is known again and again."""
        planned = [run for phase in self.plan.phases for run in phase]
        costs = [run.cell.network.macs * self._images(run) * run.cell.recipe.epochs for run in planned]
        results: dict[str, Any] = {}
        published = time.monotonic()
        try:
            with Progress([run.label for run in planned], costs, quiet=quiet) as progress:
                first = 0
                for phase in self.plan.phases:
                    jobs, twins = {}, set()
                    for i, run in enumerate(phase, first):
                        if self.result(run) is None:
                            folder = self.folder(run)
                            if folder in twins:  # the same run under another name: a model at another width
                                progress.skip(i)
                                continue
                            twins.add(folder)
                            jobs[i] = Job(run.label, self.config_of(run), folder, may_diverge=run.lr_factor is not None)
                        else:
                            progress.skip(i)
                    first += len(phase)
                    for _ in run_all(jobs, self.data, progress, workers):
                        if time.monotonic() - published > SECONDS_BETWEEN_REPORTS:
                            results, published = self.publish(), time.monotonic()
                    self._choose(phase, done=True)  # a rate that is missing now has diverged
        finally:
            results = self.publish()
        return results

    # What a run is

    def _images(self, run: Planned) -> float:
        return len(self.data[run.cell.condition.data].train_labels) * run.cell.condition.fraction

    def config_of(self, run: Planned) -> RunConfig:
        """The configuration of a run, once all that it depends on is done."""
        cell = run.cell
        factor = self.lr.get(cell, 1.0) if run.lr_factor is None else run.lr_factor
        return RunConfig(
            data=dataclasses.replace(cell.data, fold=run.fold, validation=run.lr_factor is not None),
            model=cell.network.config,
            train=dataclasses.replace(cell.recipe, lr=cell.recipe.lr * factor),
            seed=run.seed,
            weights=None if cell.parent is None else str(self.folder(self._parent(run)) / "weights.safetensors"),
            new_head=cell.parent is not None,
        )

    def _parent(self, run: Planned) -> Planned:
        assert run.cell.parent is not None
        return Planned(run.cell.parent, run.seed, run.fold)

    def folder(self, run: Planned) -> Path:
        """Where a run lives. Its name is the same exactly when a repetition would give the same result.

        It covers the configuration, the images themselves, the package's code, a user's file that the network names,
        PyTorch's version, the device, and the run whose weights it starts from.
        """
        key = self.environment.copy()
        described = to_plain(self.config_of(run))
        del described["data"]["source"], described["weights"]  # where they lie does not count, what they are does
        key.update(json.dumps(described, sort_keys=True).encode())
        key.update(self.identities[run.cell.condition.data].encode())
        config = run.cell.network.config
        if (config.model or "").startswith("timm:"):
            key.update(_version("timm").encode())
        for text in (config.model,) if config.model else parse_layout(config.layout):
            if found := re.match(r"([^()'\"]+\.py):", text.strip()):
                key.update(Path(found[1]).expanduser().read_bytes())
        if run.cell.parent is not None:
            key.update(self.folder(self._parent(run)).name.encode())
        return self.config.out / "runs" / key.hexdigest()[:16]

    # What is done, and what it says

    def result(self, run: Planned) -> RunResult | None:
        """The result of a run, if it is finished."""
        if self._waits(run):
            return None
        if run not in self._results:
            images = self.identities[run.cell.condition.data]
            try:
                found = finished(self.folder(run), self.config_of(run), images)
            except CheckpointError as error:
                folder = self.folder(run)
                raise ValueError(
                    f"{folder}: its config.yaml was changed since; remove that folder, and the run is done again"
                ) from error
            if found is None:
                return None
            self._results[run] = found
        return self._results[run]

    def _waits(self, run: Planned) -> bool:
        """Whether a run's learning rate, or that of the run it starts from, is still to be chosen."""
        if run.cell.parent is not None and self._waits(self._parent(run)):
            return True
        return self.config.tune is not None and run.lr_factor is None and run.cell not in self.lr

    def _choose(self, phase: Sequence[Planned], *, done: bool = False) -> None:
        """Takes for every cell the learning rate with the best validation accuracy; of equals the recipe's own."""
        tried: dict[Cell, list[tuple[float, float, float]]] = {}
        for run in phase:
            if run.lr_factor is not None and (result := self.result(run)) is not None:
                score = (result.test_accuracy, -abs(math.log(run.lr_factor)), run.lr_factor)
                tried.setdefault(run.cell, []).append(score)
        needed = 1 if done else len(TUNED)
        self.lr |= {cell: max(scores)[-1] for cell, scores in tried.items() if len(scores) >= needed}
        for run in phase if done else ():
            if run.lr_factor is not None:
                self.lr.setdefault(run.cell, 1.0)  # all have diverged: the recipe's own will say so

    def publish(self) -> dict[str, Any]:
        """Writes what is known so far, and returns what results.json holds."""
        for phase in self.plan.phases:
            self._choose(phase)
        final = [run for phase in self.plan.phases for run in phase if run.lr_factor is None]
        done = sum(self.result(run) is not None for phase in self.plan.phases for run in phase)
        outcomes: dict[Cell, list[Outcome]] = {}
        for cell in self.plan.cells:
            for seed in range(cell.seeds):
                own = [run for run in final if run.cell == cell and run.seed == seed]
                if (outcome := self._outcome(own)) is not None:
                    outcomes.setdefault(cell, []).append(outcome)
        rows = [
            Row(
                cell.name,
                cell.condition,
                cell.without,
                cell.network.config,
                cell.network.macs,
                cell.network.resized,
                cell.recipe.lr * self.lr.get(cell, 1.0),
                cell.seeds,
                cell.target,
                tuple(outcomes.get(cell, ())),
            )
            for cell in self.plan.cells
        ]
        results = summarise(
            rows,
            self.data,
            self._test_images,
            {source: to_plain(recipe(images, self.config)) for source, images in self.data.items()},
            {"of": self.config.budget, "targets": self.plan.targets},
            {"finished": done, "planned": sum(map(len, self.plan.phases))},
            self.config.folds,
        )
        out = self.config.out
        if done or not (out / "results.json").exists():  # an old report stays until there is something to say
            texts = (json.dumps(results, indent=1), results_csv(results), results_latex(results))
            for name, text in zip(WRITTEN, (*texts, compare_report(results)), strict=True):
                write_text(out / name, text)
        return results

    def _outcome(self, runs: Sequence[Planned]) -> Outcome | None:
        """One seed of a cell, from the runs of all its folds."""
        if tuple(runs) in self._outcomes:
            return self._outcomes[tuple(runs)]
        results = [result for run in runs if (result := self.result(run)) is not None]
        if len(results) < len(runs):
            return None
        found = [load_weights(self.folder(run) / "predictions.safetensors") for run in runs]
        predicted, labels, losses = (
            np.concatenate([predictions[name].numpy() for predictions in found])
            for name in ("predicted", "label", "loss")
        )
        self._outcomes[tuple(runs)] = Outcome(runs[0].seed, tuple(results), predicted, labels, losses)
        return self._outcomes[tuple(runs)]

    def _test_images(self, condition: Condition) -> torch.Tensor:
        images = self.data[condition.data]
        if not self.config.folds:
            return images.test_images
        return torch.cat([fold(images, k, self.config.folds).test_images for k in range(self.config.folds)])


def _environment(without: set[str]) -> Any:
    """The hash of what results depend on: the package's code but for some files, PyTorch and the device."""
    content = hashlib.sha256()
    package = Path(glocal.__file__).parent
    for path in sorted(package.rglob("*.py")):
        place = path.relative_to(package)
        if not without & {place.as_posix(), place.parts[0]}:
            content.update(path.read_bytes())
    versions = " ".join(_version(name) for name in ("numpy", "accelerate", "torchvision", "pillow"))
    content.update(f"{torch.__version__} {versions} {device_name()}".encode())
    return content


def _version(package: str) -> str:
    return f"{package} {metadata.version(package)}"


def _read(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty if there is no such file or it holds something else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
