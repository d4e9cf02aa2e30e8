"""Kernels with and without their compiled code."""

from functools import wraps

import pytest

from glocal.kernels import compiled


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
