"""The faults that scripts/mutate plants: each breaks one promise, and a test has to notice.

They stand in the tests that notice them, as the literal `FAULTS`: what breaks, a text that stands once in the source
file, and what replaces it. A tuple of these is for the source file that the test has its name from. A dict is for
several: its keys are their paths in the package, or (path, *tests) where other tests notice than those beside it.
"""

import ast
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
# What holds for many operators: tried where an operator's own tests and its contract notice nothing.
_ACROSS = tuple(
    f"tests/test_{what}.py" for what in ("geometry", "arguments", "operator", "mixer", "norm", "projection")
)


@dataclass(frozen=True)
class Fault:
    """One change of the code for the worse."""

    file: str
    old: str  # occurs exactly once in the file
    new: str
    breaks: str
    tests: tuple[str, ...]  # arguments of pytest, tried in this order until one fails

    def __str__(self) -> str:
        return f"{self.file.removeprefix('src/glocal/')}: {self.breaks}"


def _in_tests() -> Iterator[Fault]:
    for test in sorted((ROOT / "tests").rglob("test_*.py")):
        found = next((ast.literal_eval(n.value) for n in _assignments(test) if "FAULTS" in _names(n)), {})
        relative = test.relative_to(ROOT / "tests")
        own = str(relative.with_name(relative.name.removeprefix("test_")))
        for key, faults in (found if isinstance(found, dict) else {own: found}).items():
            file, *others = (key,) if isinstance(key, str) else key
            source, tests = _place(file), tuple(f"tests/{each}" for each in others or [relative])
            if relative.parent.name == "mixers":
                tests += (*_contract(source), *_ACROSS)
            yield from (Fault(source, old, new, breaks, tests) for breaks, old, new in faults)


def _place(file: str) -> str:
    """Where a file of the package is; its folder may be left out, or joined to its name as in report_page.py."""
    package = ROOT / "src" / "glocal"
    places = [package / file, package / file.replace("_", "/", 1), *package.rglob(Path(file).name)]
    return str(next(place for place in places if place.is_file()).relative_to(ROOT))


def _contract(source: str) -> tuple[str, ...]:
    """The contract of the operators that a file defines."""
    classes = [n.name for n in ast.parse((ROOT / source).read_text("utf-8")).body if isinstance(n, ast.ClassDef)]
    return (f"tests/test_contract.py -k={shlex.quote(' or '.join(f'-{c}' for c in classes))}",)


def _assignments(file: Path) -> Iterator[ast.Assign]:
    return (node for node in ast.parse(file.read_text("utf-8")).body if isinstance(node, ast.Assign))


def _names(node: ast.Assign) -> list[str]:
    return [target.id for target in node.targets if isinstance(target, ast.Name)]


FAULTS: tuple[Fault, ...] = tuple(_in_tests())
