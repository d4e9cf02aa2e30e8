"""Runs side by side: worker processes that train, and the progress of all of them in one place.

On a CPU independent runs are faster side by side, one thread each, than one after the other with all threads; and
with one thread a result does not depend on the number of cores.
"""

import ctypes
import multiprocessing
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import asdict
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn, cast

import torch

from glocal.config import RunConfig
from glocal.data import ImageData

_SECONDS_BETWEEN_MESSAGES = 0.25


class RunFailed(RuntimeError):
    """A run could not be finished; the message says which one, and why."""


def run_all(
    runs: dict[int, RunConfig], data: ImageData, progress: "Progress", workers: int | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Trains all runs in worker processes and yields (number, result) as they finish.

    Args:
        runs: Configurations under their numbers, started in this order.
        data: The images of all runs.
        progress: Told what happens.
        workers: Processes; by default one for every core, on a GPU one.

    Raises:
        RunFailed: A run could not be finished; the other processes are ended.
    """
    if not runs:
        return
    if workers is None:
        workers = 1 if torch.cuda.is_available() else _cores()
    # A fresh interpreter each: forking a process that has used threads can hang.
    context = multiprocessing.get_context("spawn")
    waiting = list(runs.items())
    processes: dict[Connection, Any] = {}
    busy: dict[Connection, int] = {}
    with tempfile.TemporaryDirectory(prefix="glocal-") as folder:
        images = Path(folder) / "images.pt"
        _save(data, images)  # mapped into every worker: one copy in memory, however many there are
        try:
            for _ in range(min(workers, len(runs))):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, str(images)), daemon=True)
                process.start()
                theirs.close()
                processes[ours] = process
                busy[ours], run = waiting.pop(0)
                ours.send(run)
            while busy:
                for connection in cast(list[Connection], wait(list(busy))):
                    i = busy[connection]
                    try:
                        kind, content = connection.recv()
                    except (EOFError, ConnectionResetError):
                        processes[connection].join()
                        raise RunFailed(
                            f"{progress.labels[i]}: the process that trained it ended with code "
                            f"{processes[connection].exitcode}; perhaps there was not enough memory"
                        ) from None
                    if kind == "step":
                        progress.step(i, *content)
                    elif kind == "epoch":
                        progress.epoch(i, content)
                    elif kind == "failed":
                        raise RunFailed(content)
                    else:
                        del busy[connection]
                        if waiting:
                            busy[connection], run = waiting.pop(0)
                            connection.send(run)
                        progress.finish(i, content["epochs"][-1]["test_accuracy"])
                        yield i, content
        finally:
            for process in processes.values():
                process.terminate()
            for connection, process in processes.items():
                process.join()
                connection.close()


def _cores() -> int:
    """Cores this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _save(data: ImageData, path: Path) -> None:
    fields = {name: getattr(data, name) for name in ImageData.__dataclass_fields__}
    fields["classes"] = list(data.classes)  # weights_only loading takes lists
    torch.save(fields, path)


def _load(path: str) -> ImageData:
    fields = torch.load(path, mmap=True, weights_only=True)
    return ImageData(**{**fields, "classes": tuple(fields["classes"])})


def _work(connection: Connection, images: str) -> None:
    """A worker: trains what it is sent until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    _keep_freed_memory()
    _end_with(os.getppid(), Path(images).parent)
    from glocal.training import train

    data = _load(images)
    try:
        while True:
            _serve(connection, connection.recv(), data, train)
    except (EOFError, ConnectionError):  # the parent was killed, and this thread saw it before the watching one
        _leave(Path(images).parent)


def _serve(connection: Connection, run: RunConfig, data: ImageData, train: Callable[..., Any]) -> None:
    """Trains one run and sends what comes of it."""
    last = 0.0

    def on_step(step: int, steps: int) -> None:
        nonlocal last
        if time.monotonic() - last > _SECONDS_BETWEEN_MESSAGES:
            last = time.monotonic()
            connection.send(("step", (step, steps)))

    try:
        result = train(run, data, on_step=on_step, on_epoch=lambda epoch: connection.send(("epoch", asdict(epoch))))
    except ConnectionError:
        raise
    except FloatingPointError as error:
        connection.send(("failed", str(error)))
    except Exception:
        connection.send(("failed", f"{run.model.layout} seed {run.seed}:\n{traceback.format_exc()}"))
    else:
        connection.send(("result", asdict(result)))


def _end_with(parent: int, folder: Path) -> None:
    """Ends this process when its parent is gone, however that ended: a killed one leaves no orphans and no images."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        _leave(folder)

    threading.Thread(target=watch, daemon=True).start()


def _leave(folder: Path) -> NoReturn:
    """Removes the images, which the parent cannot do any more, and ends this process."""
    shutil.rmtree(folder, ignore_errors=True)
    os._exit(1)


def _keep_freed_memory() -> None:
    """Tells glibc to keep freed memory for the next tensor (does nothing elsewhere).

    By default it returns blocks of more than some hundred KiB to the system at once, and every activation of every
    step is zeroed and mapped anew by the kernel: measured, a third to a half of the time of an MBConv block of
    8 MiB a tensor on one core.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):
        return
    m_trim_threshold, m_mmap_threshold = -1, -3  # glibc, malloc.h
    mallopt(m_mmap_threshold, 32 * 2**20)  # the largest value it takes
    mallopt(m_trim_threshold, 2**30)


class Progress:
    """How far all runs are: bars with the time left on a terminal, plain lines elsewhere. Writes to stderr.

    Args:
        labels: Name of every run.
        done: Numbers of the runs that were finished before.
        quiet: Whether to show nothing.
    """

    def __init__(self, labels: Sequence[str], *, done: Collection[int] = (), quiet: bool = False):
        from rich.console import Console

        self.labels = labels
        self._console = Console(stderr=True, quiet=quiet)
        self._shares = {i: 0.0 for i in range(len(labels)) if i not in done}
        self._finished = len(labels) - len(self._shares)
        self._started = time.monotonic()
        self._bars: Any = None
        self._tasks: dict[int, Any] = {}

    def __enter__(self) -> "Progress":
        if self._finished:
            self._say(f"{self._finished} of {len(self.labels)} runs were finished before and are not repeated")
        if self._console.is_terminal and self._shares and not self._console.quiet:
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[said]}", markup=False),
            )
            self._bars = Progress(*columns, console=self._console, transient=True)
            self._all = self._bars.add_task("all runs", total=1.0, said="")
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def step(self, i: int, step: int, steps: int) -> None:
        """Run `i` has done `step` of `steps`."""
        self._shares[i] = step / steps
        if self._bars is not None:
            if i not in self._tasks:
                self._tasks[i] = self._bars.add_task(self.labels[i], total=1.0, said="")
            self._bars.update(self._tasks[i], completed=self._shares[i])
            self._bars.update(self._all, completed=self._share(), said=self._left())

    def epoch(self, i: int, epoch: dict[str, float]) -> None:
        """Run `i` has finished an epoch."""
        said = f"test {epoch['test_accuracy']:.1f} %, loss {epoch['train_loss']:.3f}"
        if self._bars is not None:
            if i in self._tasks:
                self._bars.update(self._tasks[i], said=said)
        else:
            self._say(f"{self.labels[i]}: epoch in {epoch['seconds']:.0f} s, {said}")

    def finish(self, i: int, test_accuracy: float) -> None:
        """Run `i` is finished."""
        self._shares[i] = 1.0
        self._finished += 1
        if i in self._tasks:
            self._bars.remove_task(self._tasks.pop(i))
        left = f"; {self._left()}" if self._finished < len(self.labels) else ""
        self._say(f"{self._finished}/{len(self.labels)} {self.labels[i]}: test {test_accuracy:.1f} %{left}")

    def _share(self) -> float:
        return sum(self._shares.values()) / len(self._shares)

    def _left(self) -> str:
        share = self._share()
        if share <= 0:
            return ""
        seconds = (time.monotonic() - self._started) * (1 - share) / share
        return f"about {_duration(seconds)} left"

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        if self._bars is None:
            sys.stderr.flush()


def _duration(seconds: float) -> str:
    """Seconds in words: "40 s", "3 min", "2 h 5 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
