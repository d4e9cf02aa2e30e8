"""The wheel holds all that the package needs, and works outside the checkout."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

PROGRAM = """
import importlib.resources, json, sys
sys.path.insert(0, sys.argv[1])
import glocal, torch
y = glocal.build("SelfAttention(num_heads=4)", 32)(torch.zeros(1, 5, 5, 32))
files = importlib.resources.files("glocal")
print(json.dumps({"file": glocal.__file__, "shape": list(y.shape), "typed": (files / "py.typed").is_file()}))
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    offline = ["--no-deps", "--no-index"]
    subprocess.run(
        [*pip, "wheel", *offline, "--no-build-isolation", "--wheel-dir", folder / "dist", ROOT],
        check=True,
        timeout=300,
    )
    [wheel] = (folder / "dist").glob("*.whl")
    subprocess.run([*pip, "install", *offline, "--target", folder / "site", wheel], check=True, timeout=300)
    return folder / "site"


def test_works_outside_the_checkout(installed, tmp_path):
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM, installed], cwd=tmp_path, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    result = json.loads(run.stdout)
    assert result == {"file": str(installed / "glocal" / "__init__.py"), "shape": [1, 5, 5, 32], "typed": True}


def test_holds_every_file_of_the_package(installed):
    def files(folder):
        paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
        return sorted(str(path) for path in paths if "__pycache__" not in path.parts)

    assert files(installed / "glocal") == files(ROOT / "src" / "glocal")


def test_says_its_licence_and_command(installed):
    [info] = installed.glob("glocal-*.dist-info")
    assert "glocal = glocal.cli:main" in (info / "entry_points.txt").read_text()
    assert "Apache License" in (info / "licenses" / "LICENSE").read_text()
    assert "License-Expression: Apache-2.0" in (info / "METADATA").read_text()
