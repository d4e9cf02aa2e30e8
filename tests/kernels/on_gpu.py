"""Triton's kernels where there is no GPU: run by its interpreter, and compiled for GPUs that are not there.

The interpreter must be chosen before triton is imported, by TRITON_INTERPRET=1, and it changes torch.compile in the
same process. So without a GPU the tests that run kernels do so only under that variable; test_interpreter.py starts
them, in a process of their own.
"""

import importlib.util
import os
import re
import subprocess
import tempfile
from pathlib import Path

import pytest
import torch

from glocal.kernels import gpu

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
INSTALLED = importlib.util.find_spec("triton") is not None
DEVICE = "cuda" if torch.cuda.is_available() and not INTERPRETED else "cpu"
RUN = pytest.mark.skipif(
    not INSTALLED or (DEVICE == "cpu" and not INTERPRETED),
    reason="needs triton and a GPU, or TRITON_INTERPRET=1" if INSTALLED else "triton is not installed",
)
COMPILE = pytest.mark.skipif(
    not INSTALLED or INTERPRETED, reason="triton is not installed" if not INSTALLED else "is interpreted, not compiled"
)
ASKED = os.environ.get("GLOCAL_WIDE") == "1"
WIDE = pytest.mark.skipif(
    not ASKED and DEVICE == "cpu", reason="takes minutes without a GPU; GLOCAL_WIDE=1 asks for it"
)
WIDE_COMPILE = pytest.mark.skipif(not ASKED, reason="takes minutes; GLOCAL_WIDE=1 asks for it")
TARGETS = [80, 90]
SHORT = [torch.float32, torch.bfloat16, torch.float16]
MOST_SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a block may have
SPILLED = 256  # bytes of a thread; Triton 3.9 spills 176 where 3.6 spills 88


@pytest.fixture
def kernels_run(monkeypatch):
    """Calls go to the kernels, wherever the tensors are, in their first configuration."""
    from glocal.kernels.triton import tuning

    monkeypatch.setattr(gpu, "DEVICES", ("cuda", "cpu"))
    monkeypatch.setattr(tuning, "WANTED", False)
    if not INTERPRETED:
        return
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def with_lengths(tensor, scope):
        """Triton 3.6 does not know how NumPy 2.4 turns an array of one number into that number."""
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    monkeypatch.setattr(interpreter, "_patch_lang_tensor", with_lengths)
    builder = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store

    def as_bool(mask):
        """Triton 3.9 has masks of integers, which its own loads refuse."""
        return interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)

    dot = builder.create_dot

    def exact(operand):
        """bfloat16 is held as integers, of which the interpreter's product is that of integers."""
        if operand.dtype.scalar.name != "bf16":
            return operand
        wide = (operand.data.astype("uint32") << 16).view("float32")
        return interpreter.TensorHandle(wide, interpreter.tl.float32)

    monkeypatch.setattr(builder, "create_dot", lambda b, x, y, *rest: dot(b, exact(x), exact(y), *rest))
    monkeypatch.setattr(builder, "create_masked_load", lambda b, p, mask, *rest: load(b, p, as_bool(mask), *rest))
    monkeypatch.setattr(
        builder, "create_masked_store", lambda b, p, value, mask, *rest: store(b, p, value, as_bool(mask), *rest)
    )


def take(number, monkeypatch):
    """Of every list of configurations that with this number, or the last."""
    from glocal.kernels.triton import tuning

    monkeypatch.setattr(tuning, "_choice", lambda _, __, configurations, *___: min(number, len(configurations) - 1))


def compiled(monkeypatch, target, call):
    """What the kernels of a call become for GPUs of this generation: (name, bytes shared, registers, bytes spilled).

    The call is ours, up to the launch, which is left out: what it returns was never written.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver, jit

    class Driver:
        """Of a GPU that is not there; kernels are kept by the number of the device."""

        def get_current_device(self):
            return target

        def get_current_stream(self, device):
            return 0

        def get_current_target(self):
            return GPUTarget("cuda", target, 32)

    found, run = [], jit.JITFunction.run

    def build(kernel, *arguments, grid, warmup, **options):
        made = run(kernel, *arguments, grid=grid, warmup=True, **options)
        found.append((kernel.fn.__name__, made.metadata.shared, *resources(made.asm["cubin"])))

    with monkeypatch.context() as patch:
        patch.setattr(driver, "_active", Driver())
        patch.setattr(jit.JITFunction, "run", build)
        patch.setattr(gpu, "DEVICES", ("cuda", "cpu"))
        call()
    return found


def fits(found, target, record_property):
    """Blocks may have so much memory, and next to nothing lies outside of registers."""
    for i, (name, shared, registers, spilled) in enumerate(found):
        record_property(f"{i} {name}", f"{shared} bytes shared, {registers} registers, {spilled} bytes spilled")
    return all(shared <= MOST_SHARED[target] and spilled <= SPILLED for _, shared, _, spilled in found)


def resources(cubin):
    tool = Path(importlib.util.find_spec("triton").origin).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        text = subprocess.run([tool, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    return registers, stack
