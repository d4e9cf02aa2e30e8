"""`import glocal` is cheap, and every public name is there when it is used."""

import ast
import json
import subprocess
import sys
from pathlib import Path

import pytest

import glocal

HEAVY = [
    *["torchvision", "accelerate", "timm", "transformers", "PIL", "yaml", "safetensors"],
    *["rich", "tyro", "jinja2", "sklearn", "scipy", "matplotlib", "torch._dynamo", "torch._inductor"],
]


def in_fresh_process(code):
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def test_import_loads_nothing_heavy():
    loaded = in_fresh_process("import json, sys, glocal; print(json.dumps(sorted(sys.modules)))")
    assert not [name for name in HEAVY if name in loaded]
    assert not [name for name in loaded if name.startswith("glocal.")]


@pytest.mark.parametrize(
    "made", ["glocal.build('DepthwiseConv()', 8)", "glocal.create_model(glocal.list_models()[0], dim=8)"]
)
def test_building_an_operator_or_a_model_needs_only_the_core_dependencies(made):
    loaded = in_fresh_process(f"import json, sys, glocal; {made}; print(json.dumps(sorted(sys.modules)))")
    assert not [name for name in HEAVY if name in loaded and not name.startswith("torch._")]


def test_every_public_name_is_there():
    names = glocal.__all__
    found = in_fresh_process(
        f"import json, glocal; print(json.dumps({{name: repr(getattr(glocal, name)) for name in {names}}}))"
    )
    assert list(found) == names
    assert set(names) <= set(dir(glocal))


def test_type_checkers_see_the_same_names():
    tree = ast.parse(Path(glocal.__file__).read_text(encoding="utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    declared = [alias.name for node in block.body if isinstance(node, ast.ImportFrom) for alias in node.names]
    assert sorted(declared) == sorted(set(glocal.__all__) - {"__version__"})


def test_unknown_name_is_refused():
    with pytest.raises(AttributeError, match=r"module 'glocal' has no attribute 'biuld'; public names: .*build"):
        _ = glocal.biuld
