"""docs/models.md has a line for every model, with its size."""

import re
from pathlib import Path

import pytest
import torch

import glocal

PAGE = Path(__file__).parents[1] / "docs" / "models.md"
LINES = dict(re.findall(r"^\| `(\w+)` \| ([\d,]+) \|", PAGE.read_text("utf-8"), re.MULTILINE))


def test_has_every_name():
    assert list(LINES) == glocal.list_models()


@pytest.mark.parametrize("name", LINES)
def test_says_the_parameters(name):
    with torch.device("meta"):
        parameters = sum(p.numel() for p in glocal.create_model(name).parameters())
    assert LINES[name] == f"{parameters:,}"
