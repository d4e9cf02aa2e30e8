"""What every test needs: the same random numbers each time, one thread per worker, a GPU where it asks for one."""

import os

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers already use every core


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
