"""How far apart may two tokens be? Small networks learn `recall` on sequences, and are asked by distance."""

import hashlib
import json
import math
import multiprocessing
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import glocal
from glocal.blocks import Block
from glocal.checkpoint import alone_in, check_folder, write_text
from glocal.config import RecallCommand
from glocal.data.recall_sequences import VALUES, VOCABULARY, recall_sequences
from glocal.progress import Progress
from glocal.report.distances import distances_report
from glocal.spec import build

DIM, DEPTH, MLP_RATIO = 64, 2, 2
BATCH, LEARNING_RATE, WEIGHT_DECAY, WARMUP = 128, 2e-3, 0.01, 0.1  # warm-up: share of the steps
TESTED, TESTED_AT_ONCE = 20_000, 1_000
TEST_SEED = 2**31  # the same test sequences for all, apart from those of every training seed


class SequenceNetwork(nn.Module):
    """An embedding, `DEPTH` blocks around one operator, and scores for one token of the sequence.

    There are no positions: an operator that treats all distances alike needs none here.

    Args:
        spec: The operator, for `DIM` channels and sequences.

    Shape:
        tokens int64 [B, T] and question int64 [B] -> [B, VALUES].

    Raises:
        ValueError: The operator cannot be built, or is one for images.
    """

    def __init__(self, spec: str) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, DIM)
        mixers = [build(spec, DIM) for _ in range(DEPTH)]
        if getattr(mixers[0], "rank", None) == 2:
            raise ValueError(f"{spec}: an operator for images; build it with rank=1 where it takes a rank")
        self.blocks = nn.Sequential(*(Block(DIM, mixer, mlp_ratio=MLP_RATIO) for mixer in mixers))
        self.norm = nn.LayerNorm(DIM)
        self.head = nn.Linear(DIM, VALUES)

    def forward(self, tokens: Tensor, question: Tensor) -> Tensor:
        return self.read(self.embedding(tokens), question)

    def read(self, embedded: Tensor, question: Tensor) -> Tensor:
        """The scores from embedded tokens [B, T, DIM]."""
        mixed = self.blocks(embedded)
        return self.head(self.norm(mixed[torch.arange(len(mixed), device=mixed.device), question]))


@dataclass(frozen=True)
class Run:
    """What one network of one seed is trained on, and all that decides what comes out."""

    mixer: str
    seed: int
    length: int
    steps: int
    version: str


@dataclass(frozen=True)
class Found:
    """What came of it.

    Args:
        right: Test sequences answered rightly, by distance from 1 on.
        tested: Test sequences, by distance from 1 on.
        reach: The largest distance over which the network's output depends on a token at all, by its Jacobian.
        params: Number of parameters.
        seconds: Wall time.
    """

    right: Sequence[int]
    tested: Sequence[int]
    reach: int
    params: int
    seconds: float


def recall_by_distance(config: RecallCommand, *, quiet: bool = False) -> dict[str, Any]:
    """Trains a small network around each operator with each seed, and writes report.html and results.json.

    Args:
        config: Which operators, how long, and where to keep it. Finished runs are not repeated.
        quiet: Whether to show no progress.

    Returns:
        What results.json holds: for each operator accuracies by seed and distance, reach, parameters, seconds.

    Raises:
        ValueError: Something in `config` cannot be used; nothing was trained.
        OSError: A file could not be written; finished runs are kept.
        KeyboardInterrupt: Ctrl-C; likewise.
    """
    version = glocal.__version__
    mixers = _checked(config)
    runs = [Run(mixer, seed, config.length, config.steps, version) for seed in range(config.seeds) for mixer in mixers]
    (config.out / "runs").mkdir(parents=True, exist_ok=True)
    found: dict[Run, Found] = {}
    with alone_in(config.out):
        with Progress([f"{run.mixer}, seed {run.seed}" for run in runs], [1.0] * len(runs), quiet=quiet) as progress:
            for i, run in enumerate(runs):
                if (before := _finished(_file(config.out, run), run)) is not None:
                    found[run] = before
                    progress.skip(i)
            left = [run for run in runs if run not in found]
            if left:
                _train_all(left, config.out, found, progress, runs)
        results = _results(config, {run: found[run] for run in runs}, mixers)
        write_text(config.out / "results.json", json.dumps(results, indent=1))
        write_text(config.out / "report.html", distances_report(results))
    return results


def _train_all(left: list[Run], out: Path, found: dict[Run, Found], progress: Progress, runs: list[Run]) -> None:
    """Trains what is left, one process a core, and keeps each result as it comes."""
    # not forked: a fork of a process whose threads have computed may hang
    with multiprocessing.get_context("spawn").Pool(min(len(left), os.cpu_count() or 1), _quiet_worker) as pool:
        for run, result in pool.imap_unordered(_trained, left):
            found[run] = result
            write_text(_file(out, run), json.dumps({"run": asdict(run), "found": asdict(result)}))
            progress.finish(runs.index(run), 100 * sum(result.right) / sum(result.tested))


def train(run: Run) -> Found:
    """Trains one network from scratch and asks it; the same result every time on the same machine."""
    start = time.monotonic()
    torch.manual_seed(run.seed)
    draws = torch.Generator().manual_seed(run.seed)
    network = SequenceNetwork(run.mixer).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _rate((step + 1) / run.steps))
    for _ in range(run.steps):
        # sequences of one pair show what an answer is before the keys matter; from there the rest is learned
        batch = recall_sequences(BATCH, run.length, draws, fewest=1)
        loss = nn.functional.cross_entropy(network(batch.tokens, batch.question), batch.answer)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        schedule.step()

    network.eval()
    test = recall_sequences(TESTED, run.length, torch.Generator().manual_seed(TEST_SEED))
    with torch.no_grad():
        chunks = zip(test.tokens.split(TESTED_AT_ONCE), test.question.split(TESTED_AT_ONCE), strict=True)
        right = torch.cat([network(*chunk).argmax(1) for chunk in chunks]) == test.answer
    of_right, of_all = (
        tuple(part.bincount(minlength=run.length)[1:].tolist()) for part in (test.distance[right], test.distance)
    )
    params = sum(p.numel() for p in network.parameters())
    return Found(of_right, of_all, reach_of(network, run.length), params, time.monotonic() - start)


def _rate(done: float) -> float:
    """Factor of the learning rate: up in a line, down in half a cosine."""
    return min(done / WARMUP, 1.0) * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def reach_of(network: SequenceNetwork, length: int) -> int:
    """The largest distance between a question and a token that its scores depend on, at random tokens."""
    tokens = recall_sequences(length, length, torch.Generator().manual_seed(0)).tokens
    question = torch.arange(length)
    embedded = network.embedding(tokens).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(network.read(embedded, question).sum(), embedded)
    depends = gradient.abs().sum(-1) > 0  # [question, token]
    return int(((question[:, None] - question).abs() * depends).max())


def _trained(run: Run) -> tuple[Run, Found]:
    return run, train(run)


def _quiet_worker() -> None:
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it


def _checked(config: RecallCommand) -> tuple[str, ...]:
    existing = config.out / "results.json"
    check_folder(config.out)
    if existing.exists() and "recall" not in existing.read_text("utf-8", errors="replace")[:40]:
        raise ValueError(f"--out: {str(existing)!r} is not a result of glocal recall; name another folder")
    for name, least in (("seeds", 1), ("steps", 10), ("length", 8)):
        if getattr(config, name) < least:
            raise ValueError(f"--{name}: {getattr(config, name)}; it must be at least {least}")
    if not config.mixers:
        raise ValueError("--mixers: none given")
    for mixer in config.mixers:
        if config.mixers.count(mixer) > 1:
            raise ValueError(f"--mixers: {mixer!r} is named twice; name it once")
        network = SequenceNetwork(mixer)
        sequences = recall_sequences(2, config.length, torch.Generator().manual_seed(0))
        try:
            network(sequences.tokens, sequences.question)
        except ValueError as error:
            raise ValueError(f"--mixers: {mixer}: {error}") from error
    return config.mixers


def _file(out: Path, run: Run) -> Path:
    digest = hashlib.sha256(json.dumps(asdict(run)).encode()).hexdigest()[:16]
    return out / "runs" / f"{digest}.json"


def _finished(file: Path, run: Run) -> Found | None:
    """What a run gave before; None where there is nothing, or nothing whole, or of another run."""
    try:
        kept = json.loads(file.read_text("utf-8"))
        result = Found(**kept["found"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return result if kept.get("run") == asdict(run) else None


def _results(config: RecallCommand, found: dict[Run, Found], mixers: tuple[str, ...]) -> dict[str, Any]:
    operators = []
    for mixer in mixers:
        own = [found[run] for run in found if run.mixer == mixer]
        operators.append(
            {
                "mixer": mixer,
                "right": [list(each.right) for each in own],
                "tested": list(own[0].tested),
                "reach": max(each.reach for each in own),
                "params": own[0].params,
                "seconds": [round(each.seconds, 1) for each in own],
            }
        )
    return {
        "kind": "recall",
        "length": config.length,
        "steps": config.steps,
        "seeds": config.seeds,
        "chance": 100 / VALUES,
        "version": glocal.__version__,
        "operators": operators,
    }
