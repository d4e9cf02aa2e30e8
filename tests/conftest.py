"""What every test needs, and what several ask for: the same random numbers each time, one thread, a GPU, a study."""

import json
import os
from pathlib import Path

import pytest
import torch

if "PYTEST_XDIST_WORKER" in os.environ:
    torch.set_num_threads(1)  # the workers already use every core


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def folder(tmp_path):
    """Holds a small data set, `data`."""
    from .small_study import write_digits

    write_digits(tmp_path / "data")
    return tmp_path


@pytest.fixture
def in_process(monkeypatch):
    """Comparisons run without worker processes and in small networks; gives the labels of what was trained."""
    from glocal import compare, training

    trained = []

    def run_all(jobs, data, progress, workers=None):
        for i, job in jobs.items():
            trained.append(job.label)
            training.train(job.config, data[job.config.data.source], job.folder)
            yield i

    monkeypatch.setattr(compare, "run_all", run_all)
    monkeypatch.setattr("glocal.candidates._BASE_DIMS", (32, 32, 32, 32))
    return trained


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a GPU")


def pytest_runtest_logreport(report):
    """With GLOCAL_RESULTS every result is added to that file, a JSON line each, with what tests recorded."""
    path = None if "PYTEST_XDIST_WORKER" in os.environ else os.environ.get("GLOCAL_RESULTS")  # its parent hears all
    if path and (report.when == "call" or report.outcome != "passed"):
        why = str(report.longrepr)[-2000:] if report.outcome != "passed" else None
        result = {"test": report.nodeid, "outcome": report.outcome, "seconds": report.duration, "why": why}
        with Path(path).open("a", encoding="utf-8") as file:
            file.write(json.dumps(result | {"recorded": dict(report.user_properties)}) + "\n")
