"""Kernels with and without their compiled code."""

import pytest

from glocal.kernels import compiled


@pytest.fixture
def eager(monkeypatch):
    """As on a machine without a compiler."""

    def load(*args, **sizes):
        raise compiled.Unavailable("no C compiler was found")

    monkeypatch.setattr(compiled, "load", load)
