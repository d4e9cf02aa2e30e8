"""The faults that scripts/mutate plants can be planted: each text stands once in its file, and their tests exist."""

import importlib.util
import re
import sys
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def faults():
    spec = importlib.util.spec_from_file_location("faults", ROOT / "scripts" / "faults.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["faults"] = module  # dataclasses look there
    try:
        spec.loader.exec_module(module)
    finally:
        del sys.modules["faults"]
    return module.FAULTS


def test_every_text_stands_once_in_its_file(faults):
    texts = {fault.file: (ROOT / fault.file).read_text("utf-8") for fault in faults}
    wrong = [
        f"{fault}: {texts[fault.file].count(fault.old)} times"
        for fault in faults
        if texts[fault.file].count(fault.old) != 1
    ]
    assert not wrong
    assert all(fault.old != fault.new for fault in faults)


def test_none_is_overlooked():
    """One list a file, in a file that is read: the literal of another would say nothing."""
    for path in (ROOT / "tests").rglob("*.py"):
        lists = re.findall(r"^FAULTS\b", path.read_text("utf-8"), re.MULTILINE)
        assert len(lists) <= path.name.startswith("test_"), path


def test_no_fault_is_named_twice(faults):
    twice = [name for name, count in Counter(map(str, faults)).items() if count > 1]
    assert not twice


def test_their_tests_exist(faults):
    for fault in faults:
        assert fault.tests and all((ROOT / test.partition(" ")[0]).is_file() for test in fault.tests), fault


def test_every_operator_has_three(faults):
    planted = Counter(fault.file for fault in faults)
    operators = list((ROOT / "src/glocal/mixers").glob("[a-z]*.py"))
    few = [path.name for path in operators if planted[str(path.relative_to(ROOT))] < 3]
    assert len(operators) >= 10 and not few
