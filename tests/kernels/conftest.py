"""Kernels with and without their compiled code."""

import importlib
from functools import wraps

import pytest

from glocal.kernels import compiled

from .on_gpu import kernels_run as kernels_run

ATTENTIONS = [importlib.import_module(f"glocal.kernels.{kind}_attention") for kind in ("neighborhood", "window")]


@pytest.fixture(autouse=True)
def no_silent_failure(monkeypatch):
    """Code of ours that a compiler refuses would run eagerly, and these tests with it: here it is an error."""
    load = compiled._load

    @wraps(load)
    def loaded(*arguments):
        found = load(*arguments)
        assert not (isinstance(found, str) and found.startswith("the C compiler failed")), found
        return found

    monkeypatch.setattr(compiled, "_load", loaded)


@pytest.fixture
def eager(monkeypatch):
    """As on a machine without a compiler."""

    def load(*args, **sizes):
        raise compiled.Unavailable("no C compiler was found")

    monkeypatch.setattr(compiled, "load", load)


@pytest.fixture(params=["compiled", "eager"])
def path(request, monkeypatch):
    """Both versions of attention to neighborhoods and windows."""

    def load(*args, **sizes):
        raise compiled.Unavailable("as if there were no compiler")

    if request.param == "eager":
        for module in ATTENTIONS:
            monkeypatch.setattr(module, "load", load)
    elif compiled.unavailable():
        pytest.skip(compiled.unavailable())
    return request.param
