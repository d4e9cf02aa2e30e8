"""Which calls Triton takes: those of tensors on a GPU of 2020 or newer, where Triton is installed.

Triton comes with torch where torch is built for GPUs; elsewhere nothing of the folder `triton` is imported.
"""

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

DEVICES = ("cuda",)
TYPES = (torch.float32, torch.bfloat16, torch.float16)
WIDEST = 256  # channels of a head of attention
OLDEST = (8, 0)  # compute capability
FOUND = importlib.util.find_spec("triton") is not None and os.environ.get("GLOCAL_KERNELS") != "eager"


def takes(x: Tensor) -> bool:
    """Whether there is a kernel for tensors such as this one; float64 is left to plain PyTorch."""
    if not FOUND or x.device.type not in DEVICES or x.dtype not in TYPES:
        return False
    # torch.compile does not look into the operations, which ask again when they run
    return torch.compiler.is_compiling() or _recent(x.device)


@cache
def _recent(device: torch.device) -> bool:
    return device.type != "cuda" or torch.version.hip is not None or torch.cuda.get_device_capability(device) >= OLDEST
