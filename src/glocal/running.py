"""Runs side by side: worker processes that train.

On a CPU independent runs are faster side by side, one thread each, than one after the other with all threads; and
with one thread a result does not depend on the number of cores.
"""

import ctypes
import errno
import hashlib
import math
import multiprocessing
import os
import shutil
import signal
import tempfile
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, NoReturn, cast

import torch

from glocal.checkpoint import CheckpointError
from glocal.config import RunConfig
from glocal.data import ImageData
from glocal.progress import Progress
from glocal.runs import EpochResult, RunResult
from glocal.training import NotFinite, train

_SECONDS_BETWEEN_MESSAGES = 0.25


class RunFailed(RuntimeError):
    """A run could not be finished; the message says which one, and why."""


@dataclass(frozen=True)
class Job:
    """A run to do.

    Args:
        label: What people are told it is.
        config: The run.
        folder: Where it lives; one that was interrupted there goes on.
        may_diverge: Whether the others go on if its loss becomes infinite.
    """

    label: str
    config: RunConfig
    folder: Path
    may_diverge: bool = False


def run_all(
    jobs: Mapping[int, Job], data: Mapping[str, ImageData], progress: Progress, workers: int | None = None
) -> Iterator[int]:
    """Does all jobs in worker processes and yields their numbers as they finish.

    Args:
        jobs: Under their numbers, started in this order.
        data: Images of every source that the jobs name.
        progress: Told what happens.
        workers: Processes; by default one for every core, on a GPU one.

    Raises:
        RunFailed: A run could not be finished; the other processes are ended.
        OSError: A folder could not be written to, likewise.
    """
    if not jobs:
        return
    if workers is None:
        workers = 1 if torch.cuda.is_available() else _cores()
    # A fresh interpreter each: forking a process that has used threads can hang.
    context = multiprocessing.get_context("spawn")
    waiting = list(jobs.items())
    processes: dict[Connection, Any] = {}
    busy: dict[Connection, int] = {}
    with tempfile.TemporaryDirectory(prefix="glocal-") as folder:
        for source in {job.config.data.source for job in jobs.values()}:
            _save(data[source], _images(folder, source))
        try:
            for _ in range(min(workers, len(jobs))):
                ours, theirs = context.Pipe()
                process = context.Process(target=_work, args=(theirs, folder), daemon=True)
                process.start()
                theirs.close()
                processes[ours] = process
                busy[ours], job = waiting.pop(0)
                ours.send(job)
            while busy:
                for connection in cast(list[Connection], wait(list(busy))):
                    i = busy[connection]
                    try:
                        kind, content = connection.recv()
                    except (EOFError, ConnectionResetError):
                        processes[connection].join()
                        raise RunFailed(
                            f"{jobs[i].label}: the process that trained it ended with code "
                            f"{processes[connection].exitcode}; perhaps there was not enough memory"
                        ) from None
                    if kind == "step":
                        progress.step(i, *content)
                    elif kind == "epoch":
                        progress.epoch(i, content)
                    elif kind == "failed":
                        raise RunFailed(content)
                    elif kind == "disk":
                        raise OSError(*content)
                    else:
                        del busy[connection]
                        if waiting:
                            busy[connection], job = waiting.pop(0)
                            connection.send(job)
                        progress.finish(i, content)
                        yield i
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


def _images(folder: str, source: str) -> Path:
    return Path(folder) / f"{hashlib.sha256(source.encode()).hexdigest()[:16]}.pt"


def _save(data: ImageData, path: Path) -> None:
    fields = {name: getattr(data, name) for name in ImageData.__dataclass_fields__}
    fields["classes"] = list(data.classes)  # weights_only loading takes lists
    try:
        with path.open("wb") as file:
            torch.save(fields, file)
    except RuntimeError as error:  # PyTorch's words for a disk that is full
        raise OSError(errno.ENOSPC, "cannot write the images that the runs share", str(path)) from error


def _load(path: Path) -> ImageData:
    """The images, mapped: one copy in memory, however many processes there are."""
    fields = torch.load(path, mmap=True, weights_only=True)
    return ImageData(**{**fields, "classes": tuple(fields["classes"])})


def _work(connection: Connection, images: str) -> None:
    """A worker: does what it is sent until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the parent ends us
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    keep_freed_memory()
    _end_with(os.getppid(), Path(images))
    data: dict[str, ImageData] = {}
    try:
        while True:
            job = connection.recv()
            source = job.config.data.source
            if source not in data:
                data[source] = _load(_images(images, source))
            connection.send(_outcome(job, data[source], connection))
    except (EOFError, ConnectionError):  # the parent was killed, and this thread saw it before the watching one
        _leave(Path(images))


def _outcome(job: Job, data: ImageData, connection: Connection) -> tuple[str, Any]:
    """Does a job; what is to be said of it."""
    try:
        result = train(job.config, data, job.folder, listener=_Teller(connection))
    except ConnectionError:
        raise
    except NotFinite as error:
        return ("result", math.nan) if job.may_diverge else ("failed", str(error))
    except (ArithmeticError, ValueError) as error:
        return "failed", f"{job.label}: {error}" if isinstance(error, ValueError) else str(error)
    except OSError as error:
        return "disk", (error.errno, error.strerror or str(error), error.filename or str(job.folder))
    except Exception:
        return "failed", f"{job.label}:\n{traceback.format_exc()}"
    return "result", result.test_accuracy


class _Teller:
    """Tells the parent how a run goes on, not too often."""

    def __init__(self, connection: Connection):
        self._connection = connection
        self._last = 0.0

    def step(self, done: int, steps: int) -> None:
        if time.monotonic() - self._last > _SECONDS_BETWEEN_MESSAGES:
            self._last = time.monotonic()
            self._connection.send(("step", (done, steps)))

    def epoch(self, result: EpochResult) -> None:
        self._connection.send(("epoch", result))


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


def keep_freed_memory() -> None:
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
    if not mallopt(m_mmap_threshold, 2**30):
        mallopt(m_mmap_threshold, 32 * 2**20)  # the most that glibc before 2.35 takes
    mallopt(m_trim_threshold, 2**30)


def train_here(config: RunConfig, data: ImageData, folder: Path, *, resume: bool, progress: Progress) -> RunResult:
    """Trains in this process, with all its threads, and writes TensorBoard's files too.

    Raises:
        CheckpointError: The folder holds a run and `resume` is not set, or it is another run.
        ValueError: The folder cannot be used, or see `train`.
    """
    if not resume and (folder / "config.yaml").exists():
        raise CheckpointError(f"--out: {str(folder)!r} holds a run; add --resume to go on with it, or name another")
    others = [path for path in folder.iterdir() if not path.name.endswith(".tmp")] if folder.is_dir() else []
    if others and not (folder / "config.yaml").exists():
        raise ValueError(f"--out: {str(folder)!r} holds something else; name another folder")
    result = train(config, data, folder, listener=_Shown(progress), tensorboard=True)
    progress.finish(0, result.test_accuracy)
    return result


class _Shown:
    """Shows how the only run goes on."""

    def __init__(self, progress: Progress):
        self._progress = progress

    def step(self, done: int, steps: int) -> None:
        self._progress.step(0, done, steps)

    def epoch(self, result: EpochResult) -> None:
        self._progress.epoch(0, result)
