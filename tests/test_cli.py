"""The command line: what it prints, and that every mistake is one line and exit code 2."""

import importlib
import importlib.util
import json
import os
import re
import signal
import struct
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import glocal
from glocal import cli


def write_digits(folder, train=24, test=9, side=8):
    """A small MNIST-like set of three classes."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    for split, count in (("train", train), ("t10k", test)):
        images = rng.integers(0, 256, (count, side, side)).astype(np.uint8)
        labels = (np.arange(count) % 3).astype(np.uint8)
        for kind, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
            (folder / f"{split}-{kind}-ubyte").write_bytes(header + array.tobytes())


@pytest.fixture
def data(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_digits(tmp_path / "digits")
    return tmp_path


def mistake(capsys, *arguments):
    """The one line that these arguments give."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.endswith("\n") and captured.err.count("\n") == 1, captured
    return captured.err.strip()


@pytest.mark.parametrize(
    "arguments, message",
    [
        ([], "glocal: name a command: compare; see glocal --help"),
        (["compar"], "glocal: unknown command 'compar'; did you mean 'compare'?"),
        (["zzz"], "glocal: unknown command 'zzz'; valid are compare, --help, --version"),
        (["--verson"], "glocal: unknown option '--verson'; did you mean '--version'?"),
        (["compare", "--seds", "3"], "glocal compare: unknown option '--seds'; did you mean '--seeds'?"),
        (["compare", "--dat=x"], "glocal compare: unknown option '--dat'; did you mean '--data'?"),
        (["compare", "--qqqq"], "unknown option '--qqqq'; valid are --data, --layouts, --seeds, --epochs, --out"),
        (["compare", "recall"], "glocal compare: not expected here: recall; see --help"),
        (["compare", "--seeds"], "Missing value for argument '--seeds'"),
        (["compare", "--seeds", "many"], "glocal compare: --seeds: 'many' is not a whole number"),
        (["compare", "--seeds", "1.5"], "--seeds: '1.5' is not a whole number"),
        (["compare", "--epochs", "few"], "--epochs"),
        (["compare", "--seeds", "-1"], "glocal compare: --seeds: -1; it must be at least 1"),
        (["compare", "--epochs", "0"], "glocal compare: --epochs: 0; it must be at least 1"),
        (["compare", "--layouts"], "--layouts: none given; name at least one, such as C-C-T-T"),
        (["compare", "--layouts", "C-C-X-T"], "layout 'C-C-X-T': unknown letter 'X'; valid are C"),
        (["compare", "--layouts", "CCTT"], "did you mean 'C-C-T-T'?"),
        (["compare", "--layouts", "C-WindowAtention(window_size=2)"], "did you mean 'WindowAttention'?"),
        (["compare", "--layouts", "C-WindowAttention(windw_size=2)"], "did you mean 'window_size'?"),
        (["compare", "--layouts", "C-WindowAttention(window_size=oops)"], "oops"),
        (["compare", "--layouts", "C-WindowAttention(window_size=2"], "a parenthesis is not closed"),
        (["compare", "--layouts", "C-no/file.py:Op"], "no file 'no/file.py'"),
        (["compare", "--data", "digit"], "neither a probe (recall) nor a folder; did you mean 'digits'?"),
        (["compare", "--data", "recal"], "did you mean the probe 'recall'?"),
        (["compare", "--data", "."], "--out: 'glocal-compare' lies inside the data folder; name one elsewhere"),
        (["compare", "--out", "taken"], "glocal compare: --out: 'taken' is a file; name a folder"),
        (["compare", "--out", "/proc/none"], "--out: cannot write to '/proc/none'"),
    ],
)
def test_a_mistake_is_one_line(data, capsys, arguments, message):
    (data / "taken").write_text("")
    assert message in mistake(capsys, *arguments)


def test_a_file_that_is_no_image_is_named(data, capsys):
    for name in "ab":
        (data / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (8, 8), i).save(data / "images" / name / f"{i}.png")
    (data / "images" / "b" / "notes.txt").write_text("not an image")
    line = mistake(capsys, "compare", "--data", "images")
    assert "images/b/notes.txt: not an image that can be read; remove or replace it" in line


def test_missing_extras_are_named(data, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("tyro", "PIL") else find(name))
    assert mistake(capsys, "compare").endswith("pillow, tyro not installed; run: pip install 'glocal[lab]'")


def test_a_full_disk_is_one_line(data, capsys, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(importlib.import_module("glocal.compare"), "_publish", lambda *a: full("out/x", ""))
    assert "out/x: No space left on device; finished runs are kept" in mistake(capsys, "compare", "--data", "digits")


def test_help_and_version(capsys):
    assert cli.main(["--help"]) == 0
    assert "compare" in capsys.readouterr().out
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out.strip() == glocal.__version__
    assert cli.main(["compare", "--help"]) == 0
    text = capsys.readouterr().out
    for option in ("--data", "--layouts", "--seeds", "--epochs", "--out"):
        assert option in text


def test_help_imports_nothing_heavy():
    code = "import sys; from glocal.cli import main; main(['--help']); print({'torch', 'tyro'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment(), check=True)
    assert done.stdout.splitlines()[-1] == "set()"


def environment():
    source = str(Path(glocal.__file__).parents[1])
    return os.environ | {"PYTHONPATH": os.pathsep.join([source, os.environ.get("PYTHONPATH", "")]), "NO_COLOR": "1"}


def glocal_process(folder, *arguments):
    return subprocess.Popen(
        [sys.executable, "-m", "glocal", "compare", "--data", "digits", "--layouts", "C-T", *arguments],
        cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_the_main_job(data):
    done = glocal_process(data, "--layouts", "C-T", "C-WindowAttention(window_size=2)", "--seeds", "1", "--epochs", "1")
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    lines = out.splitlines()
    assert lines[0] == "digits: 24 training and 9 test images"
    assert re.split(r"\s{2,}", lines[2]) == ["layout", "test accuracy %", "every seed", "parameters", "images/s"]
    assert [line.split()[0] for line in lines[4:6]] == ["C-T", "C-WindowAttention(window_size=2)"]
    assert "report: glocal-compare/report.html" in lines
    results = json.loads((data / "glocal-compare" / "results.json").read_text())
    assert [len(c["test_accuracy"]["per_seed"]) for c in results["candidates"]] == [1, 1]
    assert "2/2" in err and "Traceback" not in err


def children(pid):
    """Processes with this parent."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if int(stat.read_text().rpartition(")")[2].split()[1]) == pid:
                found.append(int(stat.parent.name))
        except OSError:
            pass
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads /proc")
@pytest.mark.parametrize("with_signal", [signal.SIGINT, signal.SIGKILL])
def test_nothing_is_left_behind(data, monkeypatch, with_signal):
    (data / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(data / "tmp"))
    process = glocal_process(data, "--epochs", "1000000")
    while "epoch in" not in process.stderr.readline():
        assert process.poll() is None
    workers = children(process.pid)
    assert workers
    process.send_signal(with_signal)
    error = process.stderr.read() if with_signal == signal.SIGINT else ""
    process.wait(timeout=60)
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(Path(f"/proc/{worker}").exists() for worker in workers)
    assert not list((data / "tmp").glob("glocal-*"))  # the images that the workers shared
    if with_signal == signal.SIGINT:
        assert process.returncode == 130
        last = error.strip().splitlines()[-1]
        assert (
            last
            == "glocal compare: interrupted; finished runs are kept in 'glocal-compare'; the same command continues"
        )
        assert "Traceback" not in error
