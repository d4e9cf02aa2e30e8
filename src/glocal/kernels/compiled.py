"""C code of this folder, compiled by the machine's own compiler when it is first called, and kept.

A kernel is one small C file, built for one element type and the sizes at hand (its `-D` definitions), so that a
build takes part of a second. Libraries lie in `$GLOCAL_CACHE`, by default `~/.cache/glocal`, under a hash of their
source, flags and processor. Without a compiler nothing fails: `load` says why, and callers take the eager path.

Environment: `CC` names the compiler (cc, gcc or clang by default), `GLOCAL_CFLAGS` replaces its flags of
optimisation, `GLOCAL_KERNELS=eager` compiles nothing. `GLOCAL_TUNE=0`: see triton/tuning.py.
"""

import ctypes
import hashlib
import mmap
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import threading
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FOLDER = Path(__file__).parent
TYPES = {
    torch.float32: "FLOAT32",
    torch.float64: "FLOAT64",
    torch.bfloat16: "BFLOAT16",
    torch.float16: "FLOAT16",
}
# The first that the compiler accepts. -O2 is half as fast. OpenMP, and its threads, are those that torch has loaded.
TRIES = (
    ("-O3", "-march=native", "-fopenmp"),
    ("-O3", "-mcpu=native", "-fopenmp"),
    ("-O3", "-fopenmp"),
    ("-O3",),
)
ALWAYS = ("-std=gnu11", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-w", "-lm")

HUGE_PAGE = 2**21  # bytes


class Unavailable(RuntimeError):
    """Why a kernel cannot be compiled here."""


def load(source: str, dtype: torch.dtype, **sizes: int) -> ctypes.CDLL:
    """The library of `source`, a C file of this folder, built for elements of `dtype` and the given definitions.

    Raises:
        Unavailable: no compiler, one that fails, or no such element type.
    """
    found = _load(source, dtype, tuple(sorted(sizes.items())))
    if isinstance(found, str):
        raise Unavailable(found)
    return found


@cache
def unavailable() -> str | None:
    """Why no kernel can be compiled here, or None."""
    if os.environ.get("GLOCAL_KERNELS") == "eager":
        return "GLOCAL_KERNELS=eager is set"
    if not _compiler():
        return "no C compiler was found (cc, gcc or clang; CC names another)"
    if shutil.which(_compiler()[0]) is None:
        return f"the C compiler that CC names, {_compiler()[0]}, was not found"
    return None


def how(operation: str) -> str:
    """In words, how an operation of torch.ops.glocal that was called before ran."""
    asked = [found for (source, *_), found in _found.items() if operation.startswith(Path(source).stem)]
    if any(not isinstance(found, str) for found in asked):
        return f"compiled by {_compiler()[0]}"
    return f"plain PyTorch, since {asked[0]}" if asked else "the library's or plain PyTorch"


def tangents_wanted() -> bool:
    """Whether torch.func or forward-mode derivatives are at work, which compiled operations do not know."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0


def call(function: Any, *arguments: Tensor | int | float | None) -> None:
    """Calls a C function: tensors as pointers (None: a null pointer), ints as int64, floats as double.

    The last argument, which is added here, is the number of threads: that of torch. The function returns an int, 0 if
    it had the memory that it needed.
    """
    if function(*[_argument(a) for a in arguments], ctypes.c_int64(torch.get_num_threads())):
        raise MemoryError(f"{function.__name__}: no memory for the work of {torch.get_num_threads()} threads")


def _argument(value: Tensor | int | float | None) -> object:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, int):
        return ctypes.c_int64(value)
    return ctypes.c_double(value) if isinstance(value, float) else ctypes.c_void_p(None)


def on_huge_pages(new: Tensor) -> Tensor:
    """A tensor whose memory is about to be written for the first time; large ones ask for huge pages.

    To be given fresh memory in pages of 4 KiB takes longer than most kernels take for their work.
    """
    if new.nbytes >= HUGE_PAGE and new.device.type == "cpu" and (advise := _advise()) is not None:
        begin = new.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        advise(begin, new.data_ptr() + new.nbytes - begin, mmap.MADV_HUGEPAGE)  # no harm if it is refused
    return new


@cache
def _advise() -> Any | None:
    """The C library's madvise where the system has huge pages for those who ask."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function


def prepare(source: str, dtype: torch.dtype, **sizes: int) -> None:
    """Begins to build a library that will be asked for, beside whatever else is done now."""
    key = (source, dtype, tuple(sorted(sizes.items())))
    if key not in _locks and unavailable() is None:
        threading.Thread(target=_load, args=key, daemon=True).start()


_found: dict[tuple[Any, ...], ctypes.CDLL | str] = {}
_locks: dict[tuple[Any, ...], threading.Lock] = {}
if hasattr(os, "register_at_fork"):  # a child has no thread that would open what was locked
    os.register_at_fork(after_in_child=_locks.clear)


def _load(source: str, dtype: torch.dtype, sizes: tuple[tuple[str, int], ...]) -> ctypes.CDLL | str:
    """The library, or why there is none; either is found out once in a process."""
    key = (source, dtype, sizes)
    if key not in _found:
        with _locks.setdefault(key, threading.Lock()):
            if key not in _found:
                _found[key] = _find(source, dtype, sizes)
                if isinstance(_found[key], str) and unavailable() is None and dtype in TYPES:
                    warnings.warn(f"{source} runs in plain PyTorch, more slowly: {_found[key]}", stacklevel=2)
    return _found[key]


def _find(source: str, dtype: torch.dtype, sizes: tuple[tuple[str, int], ...]) -> ctypes.CDLL | str:
    if why := unavailable():
        return why
    if dtype not in TYPES:
        return f"the compiled kernels have no {dtype}"
    text = b"".join(file.read_bytes() for file in [*sorted(FOLDER.glob("*.h")), FOLDER / source])
    builds = {}
    for flags in _flags():
        build = [*_compiler(), *flags, f"-D{TYPES[dtype]}", *(f"-D{name}={value}" for name, value in sizes)]
        key = hashlib.sha256(text + repr((build, ALWAYS, _processor())).encode()).hexdigest()
        builds[folder() / f"{Path(source).stem}-{key[:32]}.so"] = build
    for path in builds:
        if path.exists():
            return _open(path)
    errors = []
    for path, build in builds.items():
        error = _compile([*build, str(FOLDER / source), *ALWAYS], path)
        if error is None:
            return _open(path)
        errors.append(error)
    return f"the C compiler failed: {errors[0]}"


def _open(path: Path) -> ctypes.CDLL | str:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        return f"a compiled kernel could not be loaded: {error}"


def _compile(command: Sequence[str], path: Path) -> str | None:
    """Builds under a name of its own, then renames: processes that start together do not meet. Returns an error."""
    unfinished = None
    try:
        handle, unfinished = tempfile.mkstemp(suffix=".so", prefix="building-", dir=path.parent)
        os.close(handle)
        done = subprocess.run([*command, "-o", unfinished], capture_output=True, text=True, timeout=300)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
            return lines[0] if lines else f"exit status {done.returncode}"
        os.replace(unfinished, path)
        return None
    except (OSError, subprocess.TimeoutExpired) as error:
        return str(error)
    finally:
        if unfinished is not None:
            Path(unfinished).unlink(missing_ok=True)


@cache
def _compiler() -> tuple[str, ...]:
    if os.environ.get("CC"):
        return tuple(shlex.split(os.environ["CC"]))
    found = next((name for name in ("cc", "gcc", "clang") if shutil.which(name)), None)
    return () if found is None else (found,)


def _flags() -> Sequence[Sequence[str]]:
    chosen = os.environ.get("GLOCAL_CFLAGS")
    return TRIES if chosen is None else [shlex.split(chosen)]


@cache
def folder() -> Path:
    """Where libraries are kept: a folder that nobody else can write to, or one for this process alone."""
    home = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    folder = Path(os.environ.get("GLOCAL_CACHE") or f"{home}/glocal").absolute() / "kernels"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        held = folder.stat()
        ours = not hasattr(os, "getuid") or (held.st_uid == os.getuid() and not held.st_mode & 0o022)
        if ours and os.access(folder, os.W_OK | os.X_OK):
            return folder
    except OSError:
        pass
    return Path(tempfile.mkdtemp(prefix="glocal-kernels-"))


@cache
def _processor() -> str:
    """What -march=native depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n")[0].splitlines()
        return "\n".join(line for line in lines if line.startswith(("flags", "model", "Features", "CPU ")))
    except OSError:
        return f"{platform.machine()} {platform.processor()}"
