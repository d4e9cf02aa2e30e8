"""Weights and exact training states on disk, each written whole or not at all. Nothing is ever unpickled.

Everything is put together in memory first and written by Python itself: of a full disk safetensors and PyTorch say
what no program can tell from other errors.
"""

import io
import json
import os
import pickle
import shutil
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor

_TORCH_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt", ".tar")
_PATIENCE = 5  # seconds to wait for another process, which may be on its way out
_STEPS = "step-*"  # the folders of a training state


class CheckpointError(ValueError):
    """A file of weights cannot be read, or belongs to something else; the message says which and why."""


def check_folder(out: Path) -> None:
    """Refuses what cannot be a folder, before anything is computed.

    Raises:
        ValueError: `out` is a file, or lies in one.
    """
    blocked = next((path for path in (out, *out.parents) if path.exists() and not path.is_dir()), None)
    if blocked is not None:
        raise ValueError(f"--out: {str(blocked)!r} is a file; name a folder")


@contextmanager
def alone_in(folder: Path) -> Iterator[None]:
    """Keeps other processes that ask the same out of a folder; it is free again however this process ends.

    Does nothing where the system has no such locks.

    Args:
        folder: One that exists.

    Raises:
        CheckpointError: Another process is at work there.
    """
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    lock = os.open(folder, os.O_RDONLY)
    try:
        deadline = time.monotonic() + _PATIENCE
        while True:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"{folder}: another process is at work there; wait for it, or name another folder"
                    ) from None
                time.sleep(0.1)
            except OSError:  # a file system without locks
                break
        yield
    finally:
        os.close(lock)


def write_whole(path: Path, content: bytes | memoryview) -> None:
    """Writes a file beside `path` and renames it, so that at any moment `path` holds all of the old or of the new.

    Raises:
        OSError: It cannot be written, with `path` as its file name; nothing is left of the attempt.
    """
    _remove_leftovers(path)
    temporary = _temporary(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())  # some file systems say only now that they are full
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise OSError(error.errno, error.strerror, str(path)) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_text(path: Path, text: str) -> None:
    """Writes a text file whole or not at all."""
    write_whole(path, text.encode())


def save_weights(path: Path, weights: dict[str, Tensor], about: dict[str, Any] | None = None) -> None:
    """Writes tensors as safetensors, with `about` (JSON) beside them in the file's header."""
    # safetensors refuses tensors that share memory or have gaps in it
    own = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in weights.items()}
    write_whole(path, safetensors.torch.save(own, metadata={"glocal": json.dumps(about or {})}))


def load_weights(path: Path) -> dict[str, Tensor]:
    """Tensors from a safetensors file, or from a PyTorch file (.pt, .pth, .bin, .ckpt), of which only they are read.

    Raises:
        CheckpointError: The file is missing, damaged or of another kind.
    """
    if not path.is_file():
        what = "a folder; name a file in it" if path.is_dir() else "no such file; give a file of weights"
        raise CheckpointError(f"{path}: {what}")
    if path.suffix.lower() not in _TORCH_SUFFIXES:
        try:
            return safetensors.torch.load_file(path)
        except Exception as error:
            raise _unreadable(path, error) from error
    try:
        found = _load_tensors(path)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{path}: no weights, or more than weights, which could run code when read; save model.state_dict() alone"
        ) from error
    except Exception as error:  # PyTorch's reader raises errors of every kind on damaged files
        raise _unreadable(path, error) from error
    for key in ("state_dict", "model", "model_state_dict", "net"):
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            found = found[key]
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise CheckpointError(f"{path}: holds no dictionary of tensors; save model.state_dict()")
    return found


def load_about(path: Path) -> dict[str, Any]:
    """What `save_weights` was told about the weights; empty if the file was written by something else.

    Raises:
        CheckpointError: The file is no safetensors file, or damaged.
    """
    try:
        with safe_open(path, "pt") as file:
            return json.loads((file.metadata() or {}).get("glocal", "{}"))
    except Exception as error:
        raise _unreadable(path, error) from error


def save_state(folder: Path, step: int, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
    """Makes `folder`/step-N with weights and the rest of a training state, and removes the one before.

    The folder appears under its name when it is complete, so that whenever a run is killed the newest is whole.

    Raises:
        OSError: It cannot be written; the one before is kept, and nothing is left of the attempt.
    """
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / f"step-{step:08d}"
    _remove_leftovers(final)
    temporary = _temporary(final)
    try:
        temporary.mkdir()
        save_weights(temporary / "weights.safetensors", weights)
        rest = io.BytesIO()
        torch.save(state, rest)
        write_whole(temporary / "state.pt", rest.getbuffer())
        if final.exists():  # of a folder there is no exchange in one stroke: `load_state` reads this one meanwhile
            aside = final.with_name(f"{final.name}.before")
            shutil.rmtree(aside, ignore_errors=True)
            final.replace(aside)
        temporary.replace(final)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise OSError(error.errno, error.strerror, str(folder)) from error
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    for other in folder.glob(_STEPS):
        if other != final:
            shutil.rmtree(other, ignore_errors=True)


def load_state(folder: Path) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
    """Weights and state of the newest step in a folder; None if it holds none."""
    for path in sorted(folder.glob(_STEPS), reverse=True):
        try:
            return load_weights(path / "weights.safetensors"), _load_tensors(path / "state.pt")
        except Exception:  # damaged from outside; an older one, if there is one, still counts
            continue
    return None


def _load_tensors(path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # guesses at what the file might be; if it cannot be read, an error says so
        return torch.load(path, map_location="cpu", weights_only=True)


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    said = "" if isinstance(error, LookupError | EOFError) else str(error).strip()
    why = f" ({said.splitlines()[0].split('. ')[0]})" if said else ", but damaged or of another kind"
    return CheckpointError(f"{path}: not a file of weights that can be read{why}")


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def _remove_leftovers(path: Path) -> None:
    """Removes what killed processes left on their way to `path`, or to another step; of living ones it stays."""
    name = _STEPS if path.name.startswith("step-") else path.name
    for left in path.parent.glob(f".{name}.*.tmp"):
        number = left.name.split(".")[-2]
        if number.isdigit() and not _lives(int(number)):
            if left.is_dir():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink(missing_ok=True)


def _lives(process: int) -> bool:
    """Whether another process with this number runs; on Windows, where asking would end it, always true."""
    if process == os.getpid():  # in a container numbers come again
        return False
    if os.name == "nt":
        return True
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True
