"""Peak memory of a computation: tensors that live at the same time."""

import weakref
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")


def peak_memory(run: Callable[[], T], device: torch.device) -> tuple[T, int]:
    """What `run()` returns, and the most bytes of tensors it made that lived at once, above the start.

    On a GPU the allocator's own count. On a CPU, which keeps none, every operator's results are watched until they
    are freed; what a library takes for itself inside an operator is not in it, and views count once.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        result = run()
        torch.cuda.synchronize(device)
        return result, torch.cuda.max_memory_allocated(device) - before
    with _Watch() as watch:
        result = run()
    return result, watch.peak


class _Watch(TorchDispatchMode):
    """Adds up the storages that operators make, until each is freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for given in tree_leaves((args, kwargs)):  # was there before, whoever made it
            if isinstance(given, torch.Tensor):
                self._seen.add(given.untyped_storage())
        out = function(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, torch.Tensor) and (storage := made.untyped_storage()) not in self._seen:
                self._seen.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, storage.nbytes())
        return out

    def _freed(self, nbytes: int) -> None:
        self.live -= nbytes
