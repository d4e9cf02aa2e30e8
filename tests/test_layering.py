"""Imports go one way. Every file of the package has a place, and a place may import only what lies below it."""

import ast
import sys
import tomllib
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "src" / "glocal"

# place -> the places right below it; it may also import whatever those may import.
# A place is a file (mixer: mixer.py) or a folder (mixers: every file under mixers/).
# Imports inside functions and under TYPE_CHECKING count. cli and the lazy __init__ may import everything, and from
# __init__ nothing is taken but `__version__` and `__file__`.
BELOW = {
    "aggregation": [],
    "arguments": [],
    "operator": ["arguments"],
    "mixer": ["aggregation", "operator"],
    "positions": ["aggregation", "arguments"],
    "kernels": ["aggregation"],
    "mixers": ["kernels", "mixer", "positions"],
    "spec": ["mixers"],
    "folding": [],
    "blocks": ["folding", "spec"],
    "backbone": ["blocks"],
    "models": ["backbone", "checkpoint"],
    "timm": ["models"],
    "conversion": ["mixers"],
    "adapters": ["mixers"],
    "inspection": ["adapters"],
    "evidence": ["spec"],
    "contract": ["evidence", "spec", "inspection"],
    "analysis": ["inspection"],
    "config": [],
    "plain": [],
    "checkpoint": [],
    "data": [],
    "statistics": [],
    "report": [],
    "tasks": ["models", "conversion", "checkpoint", "config"],
    "runs": ["checkpoint", "config", "data", "plain"],
    "optimizer": ["config", "operator"],
    "training": ["tasks", "analysis", "runs", "optimizer"],
    "progress": ["runs"],
    "inference": ["training"],
    "running": ["training", "progress"],
    "budget": ["backbone", "analysis"],
    "candidates": ["budget", "checkpoint", "tasks", "data", "config"],
    "summary": ["runs", "statistics"],
    "plan": ["candidates", "summary"],
    "compare": ["plan", "running", "report"],
    "recall": ["blocks", "checkpoint", "config", "data", "progress", "report"],
}
TOP = {"cli", "__init__", "__main__"}

# Places that run with the core dependencies alone.
CORE = [
    *[
        "aggregation",
        "arguments",
        "operator",
        "mixer",
        "positions",
        "kernels",
        "mixers",
        "spec",
        "folding",
        "blocks",
        "backbone",
    ],
    *["inspection", "evidence", "contract", "conversion", "__init__"],
]
CORE_DEPENDENCIES = {"torch", "numpy"}
WITH_TORCH = {"triton"}  # comes with torch where it is built for GPUs; imported when a tensor is on one
NAME_IN_PIP = {
    "PIL": "pillow",
    "huggingface_hub": "huggingface-hub",
    "sklearn": "scikit-learn",
    "yaml": "pyyaml",
}  # where it is not the module's name


def reachable(place):
    """`place` and every place that lies below it."""
    found, todo = set(), [place]
    while todo:
        if (here := todo.pop()) not in found:
            found.add(here)
            todo += BELOW[here]
    return found


def read_imports(root):
    """For every file under `root`: {module name: [(line, imported module)]}, without the leading `glocal.`."""
    modules = {}
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts)] = path
    return {name: list(imports_of(name, path, modules)) for name, path in sorted(modules.items())}


def imports_of(name, path, modules):
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    package = ["glocal", *(package.split(".") if package and package != "__init__" else [])]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names if alias.name != "glocal"]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "glocal":
            targets = [f"glocal.{node.attr}"]  # after `import glocal`, it is the use that counts
        elif isinstance(node, ast.ImportFrom):
            source = package[: len(package) - node.level + 1] if node.level else []
            source = ".".join([*source, *([node.module] if node.module else [])])
            targets = [f"{source}.{alias.name}" for alias in node.names]
        else:
            continue
        for target in targets:
            if target in ("glocal.__version__", "glocal.__file__"):
                continue
            if target.split(".")[0] != "glocal":
                yield node.lineno, target
                continue
            # `from glocal.mixer import TokenMixer` and `import glocal.mixer` both mean the file mixer.py.
            inner = target.split(".")[1:]
            while inner and ".".join(inner) not in modules:
                inner.pop()
            yield node.lineno, ".".join(["glocal", *(inner or ["__init__"])])


def place_of(module):
    return module.split(".")[0]


def violations(root):
    """What breaks the rules in the package at `root`: one sentence each."""
    imports = read_imports(root)
    found = []
    for module, targets in imports.items():
        place = place_of(module)
        if place not in BELOW and place not in TOP:
            found.append(f"{module}: has no place yet; add {place!r} to BELOW in tests/test_layering.py")
            continue
        for line, target in targets:
            if target.startswith("glocal."):
                target = target.removeprefix("glocal.")
                if place not in TOP and place_of(target) not in reachable(place):
                    allowed = ", ".join(sorted(reachable(place) - {place})) or "nothing of ours"
                    found.append(f"{module}, line {line}: imports {target}; {place} may import {allowed}")
            elif place in CORE:
                top = target.split(".")[0]
                if top not in CORE_DEPENDENCIES | WITH_TORCH and top not in sys.stdlib_module_names:
                    found.append(f"{module}, line {line}: imports {top}, which is no core dependency")
    graph = {
        module: {target.removeprefix("glocal.") for _, target in targets if target.startswith("glocal.")}
        for module, targets in imports.items()
        if place_of(module) != "__init__"
    }
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        found.append(f"imports go in a circle: {' -> '.join(reversed(error.args[1]))}")
    return found


def test_the_graph_has_no_cycle():
    TopologicalSorter(BELOW).prepare()


def test_imports_go_one_way():
    assert not violations(PACKAGE)


def test_dependencies_are_those_that_are_imported():
    targets = {target for targets in read_imports(PACKAGE).values() for _, target in targets}
    imports = {target.split(".")[0] for target in targets}
    imports |= {"tensorboard" for target in targets if target.startswith("torch.utils.tensorboard")}
    imports -= {*sys.stdlib_module_names, *WITH_TORCH, "glocal"}
    project = tomllib.loads((PACKAGE.parents[1] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    core = {requirement.split(">")[0] for requirement in project["dependencies"]}
    assert core == CORE_DEPENDENCIES
    lab = {requirement.split(">")[0] for requirement in project["optional-dependencies"]["lab"]}
    assert {NAME_IN_PIP.get(name, name) for name in imports} - core == lab


@pytest.mark.parametrize(
    ("file", "line", "complaint"),
    [
        ("aggregation.py", "from glocal.mixer import TokenMixer", "aggregation, line 1: imports mixer;"),
        ("aggregation.py", "def f():\n    import glocal.spec", "aggregation, line 2: imports spec;"),
        ("mixers/foo.py", "from ..spec import build", "mixers.foo, line 1: imports spec;"),
        ("mixers/foo.py", "from glocal import build", "mixers.foo, line 1: imports __init__;"),
        ("data/foo.py", "from glocal import mixers", "data.foo, line 1: imports mixers;"),
        ("mixers/foo.py", "from glocal.mixers import Bar", "imports go in a circle: "),
        ("helpers.py", "", "helpers: has no place yet;"),
        ("mixer.py", "import timm", "mixer, line 1: imports timm, which is no core dependency"),
        ("spec.py", "from .mixers import foo", None),
        ("data/foo.py", "import glocal\nglocal.mixer.x", "data.foo, line 2: imports mixer;"),
        ("data/foo.py", "import glocal\nglocal.build", "data.foo, line 2: imports __init__;"),
        ("data/foo.py", "import glocal\nglocal.__version__", None),
        ("data/foo.py", "from glocal import __version__", None),
        ("cli.py", "import rich\nfrom glocal import compare, mixers", None),
    ],
)
def test_a_planted_import_is_found(tmp_path, file, line, complaint):
    for name in ["aggregation", "mixer", "spec", "compare", "__init__"]:
        (tmp_path / f"{name}.py").touch()
    for name in ["mixers", "data"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    (tmp_path / "mixers" / "foo.py").touch()
    (tmp_path / "mixers" / "__init__.py").write_text("from glocal.mixers.foo import Foo\n")
    assert not violations(tmp_path)

    (tmp_path / file).write_text(line + "\n")
    found = violations(tmp_path)
    assert (len(found) == 1 and complaint in found[0]) if complaint else not found
