"""Which of a few configurations of a kernel is the fastest: timed when such a call first comes, and kept.

A call says what the choice depends on: its type, channels and kernel, the class of its sizes; to this come the
device's name, Triton's version and the kernel's source. The first such call times every configuration on the device,
with a cold cache each time, and remembers the fastest, in memory and as a small file in the folder of compiled kernels
($GLOCAL_CACHE, see compiled.py). Kernels write all of their output and read none of it: to run one again and again
changes nothing.

While a CUDA graph is captured nothing is timed: what is known is taken, or else the first configuration. The first is
always taken where there is no GPU, under torch.use_deterministic_algorithms(True), and with GLOCAL_TUNE=0 in the
environment. For blocks change the order of sums: configurations may differ in the last bits of results, and processes
of one job that time at the same moment may choose differently. Where that matters, let one process run the job's
shapes first, from whose files all that share its cache folder take the same choice, or set GLOCAL_TUNE=0.

triton.autotune is not used: it knows neither captures nor deterministic mode, its keys are the kernel's arguments as
they are, without classes of sizes and without the device's name, and a damaged file of its own stops a program.
"""

import hashlib
import json
import os
import tempfile
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import torch
import triton
import triton.testing
from triton.errors import TritonError

from glocal.kernels import compiled

WANTED = os.environ.get("GLOCAL_TUNE") != "0"
WARM, TIMED = 5, 20  # milliseconds, of each configuration

Configuration = Mapping[str, int]
Result = TypeVar("Result")

_chosen: dict[tuple[Any, ...], int] = {}
_lock = threading.Lock()  # what runs beside a kernel is timed with it


def run(
    kernel: Any,
    kind: tuple[Any, ...],
    configurations: Sequence[Configuration],
    launch: Callable[[Configuration], Result],
    device: torch.device,
) -> Result:
    """What `launch` returns with the configuration that is fastest in calls of this kind.

    Args:
        kernel: of Triton, that is launched.
        kind: all that decides which configuration is the fastest, but for the kernel and the device.
        configurations: of which the first is taken where nothing may be timed.
        launch: launches the kernel with a configuration, any number of times; all its output is written each time.
        device: of the tensors, and the current one.

    Raises:
        Exception: what the first configuration raises, if all do.
    """
    return launch(configurations[_choice(kernel, kind, configurations, launch, device)])


def classes(*sizes: int) -> tuple[int, ...]:
    """Sizes that are tuned as one."""
    return tuple(triton.next_power_of_2(n) for n in sizes)


def _choice(
    kernel: Any, kind: tuple[Any, ...], configurations: Sequence[Configuration], launch: Callable, device: torch.device
) -> int:
    if device.type != "cuda" or triton.knobs.runtime.interpret:
        return 0
    if not WANTED or torch.are_deterministic_algorithms_enabled():
        return 0
    key = (kernel.fn, kind, device)
    if key not in _chosen:
        with _lock:
            if key not in _chosen:
                path, of = _file(kernel, kind, configurations, device)
                found = _read(path, of, configurations)
                if found is None:
                    if torch.cuda.is_current_stream_capturing():
                        return 0
                    found = _fastest(configurations, launch, path, of)
                _chosen[key] = found
    return _chosen[key]


def _fastest(configurations: Sequence[Configuration], launch: Callable, path: Path, of: str) -> int:
    """The number of the fastest, which is kept; of the first, if none could be timed."""
    times = {}
    for i, configuration in enumerate(configurations):
        try:
            times[i] = triton.testing.do_bench(
                lambda chosen=configuration: launch(chosen), warmup=WARM, rep=TIMED, return_mode="median"
            )
        except (TritonError, RuntimeError):  # it does not compile or needs too much memory: that rules out no other
            continue
    if not times:
        return 0
    best = min(times, key=times.__getitem__)
    _write(path, {"of": of, "configuration": dict(configurations[best]), "milliseconds": times[best]})
    return best


def _file(
    kernel: Any, kind: tuple[Any, ...], configurations: Sequence[Configuration], device: torch.device
) -> tuple[Path, str]:
    """Where the choice is kept, and all that it depends on."""
    of = repr((kernel.cache_key, kind, configurations, torch.cuda.get_device_name(device), triton.__version__))
    name = f"{kernel.fn.__name__.strip('_')}-{hashlib.sha256(of.encode()).hexdigest()[:32]}.json"
    return compiled.folder() / name, of


def _read(path: Path, of: str, configurations: Sequence[Configuration]) -> int | None:
    try:
        kept = json.loads(path.read_text())
        return list(configurations).index(kept["configuration"]) if kept["of"] == of else None
    except (OSError, ValueError, TypeError, KeyError):  # none, or none of ours
        return None


def _write(path: Path, kept: dict[str, Any]) -> None:
    """Under a name of its own, then renamed: nobody reads half of it. Without a disk every process times anew."""
    unfinished = None
    try:
        handle, unfinished = tempfile.mkstemp(suffix=".json", prefix="writing-", dir=path.parent)
        with os.fdopen(handle, "w") as file:
            json.dump(kept, file)
        os.replace(unfinished, path)
    except OSError:
        if unfinished is not None:
            Path(unfinished).unlink(missing_ok=True)
