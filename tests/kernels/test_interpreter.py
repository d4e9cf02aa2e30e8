"""Without a GPU its kernels run in Triton's interpreter, in a process that was told so from the start."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from .on_gpu import DEVICE, INSTALLED, INTERPRETED


@pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
@pytest.mark.skipif(INTERPRETED or DEVICE == "cuda", reason="the kernels run in this process")
def test_kernels_for_gpus_run_in_the_interpreter():
    here = Path(__file__).parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", "triton", str(here)]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")} | {"TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, cwd=here.parents[1], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout
