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
import textwrap
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
    write_digits(tmp_path / "numbers")
    return tmp_path


def mistake(capsys, *arguments):
    """The one line that these arguments give."""
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.endswith("\n") and captured.err.count("\n") == 1, captured
    return captured.err.strip()


COMMANDS = "compare, train, evaluate, predict, explore, recall, convert, check-data, list, check-operator, explain-path"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (
            [],
            f"glocal: name a command: {COMMANDS}; see glocal --help",
        ),
        (["compar"], "glocal: unknown command 'compar'; did you mean 'compare'?"),
        (
            ["zzz"],
            f"glocal: unknown command 'zzz'; valid are {COMMANDS}, --help, --version",
        ),
        (["--verson"], "glocal: unknown option '--verson'; did you mean '--version'?"),
        (["compare", "--seds", "3"], "glocal compare: unknown option '--seds'; did you mean '--seeds'?"),
        (["compare", "--dat=x"], "glocal compare: unknown option '--dat'; did you mean '--data'?"),
        (["compare", "--qqqq"], "unknown option '--qqqq'; valid are --data, --layouts, --mixers, --models, --seeds"),
        (["compare", "recall"], "glocal compare: not expected here: recall; see --help"),
        (["compare", "--seeds"], "glocal compare: --seeds: none given"),
        (["compare", "--seeds", "many"], "glocal compare: --seeds: cannot read 'many'; see --help"),
        (["compare", "--seeds", "1.5"], "--seeds: cannot read '1.5'"),
        (["compare", "--epochs", "few"], "--epochs"),
        (["compare", "--seeds", "-1"], "glocal compare: --seeds: -1; it must be at least 1"),
        (["compare", "--precision", "fp16"], "glocal compare: --precision: fp16 needs a GPU; on a CPU use bf16"),
        (["compare", "--epochs", "0"], "glocal compare: --epochs: 0; it must be at least 1"),
        (["compare", "--data"], "--data: none given"),
        (
            ["compare", "--budget", "watts"],
            "invalid choice 'watts' for argument '--budget'. Expected one of ('macs', 'params')",
        ),
        (["compare", "--tune", "all"], "--tune"),
        (["compare", "--ablate", "skipp"], "--ablate"),
        (["compare", "--data-fractions", "2"], "--data-fractions: 2; it must be above 0 and at most 1"),
        (["compare", "--folds", "1"], "--folds: 1; it must be at least 2, or 0 for one split"),
        (["compare", "--models", "timm:resnet1000"], "timm:resnet1000: timm has no such model; did you mean"),
        (["compare", "--models", "own.py:Net"], "no file 'own.py'"),
        (["compare", "--models", "all_attention_learned(dims=8)"], "has no argument 'dims'; did you mean 'dim'?"),
        (["train", "--data", "numbers", "--model", "all_atention_learned"], "did you mean 'all_attention_learned'?"),
        (["train", "--layout", "C-X"], "layout 'C-X': unknown letter 'X'"),
        (["train", "--lrr", "1"], "glocal train: unknown option '--lrr'; did you mean '--lr'?"),
        (["train", "--lr", "fast"], "glocal train: --lr:"),
        (["train", "--data", "nowhere"], "'nowhere' is neither a probe"),
        (["train", "--data", "numbers", "--weights", "w.safetensors"], "w.safetensors: no such file"),
        (["train", "--data", "numbers", "--weights", "taken.safetensors"], "not a file of weights that can be read"),
        (["train", "--config", "missing.yaml"], "--config: cannot read 'missing.yaml' (No such file or directory)"),
        (["train", "--config", "taken"], "--config: taken: the file: must hold names with values"),
        (["train", "--config", "wrong.yaml"], "--config: wrong.yaml: train.lrr: unknown; did you mean 'train.lr'?"),
        (["train", "--data", "numbers", "--out", "numbers"], "--out: 'numbers' holds something else; name another"),
        (["train", "--data", "numbers", "--epochs", "0"], "epochs: 0; it must be at least 1"),
        (
            ["train", "--data", "numbers", "--batch-size", "-4"],
            "glocal train: --batch-size: -4; it must be at least 1",
        ),
        (["train", "--data", "numbers", "--fold", "3"], "glocal train: --fold: 3; it must be"),
        (["train", "--seed", "-1"], "glocal train: --seed: -1; it must be"),
        (["train", "--img-size", "8"], "glocal train: --img-size: cannot read '8'; it takes INT INT; see --help"),
        (["train", "--data", "numbers", "--out", "taken"], "glocal train: --out: 'taken' is a file; name a folder"),
        (["train", "--data", "numbers", "--out", "taken/run"], "glocal train: --out: 'taken' is a file; name a folder"),
        (["convert", "nowhere", "--out", "taken"], "glocal convert: --out: 'taken' is a file; name a folder"),
        (["recall", "--out", "taken/run"], "glocal recall: --out: 'taken' is a file; name a folder"),
        (["explore", "vit_tiny", "--seed", "-1"], "glocal explore: --seed: -1; it must be 0 or more and below 2**63"),
        (["explore", "vit_tiny", "--seed", f"{2**63}"], "it must be 0 or more and below 2**63"),
        (["explain-path", "SelfAttention", "--shape", "1", "9999999", "9999999", "32"], "x32 takes 11,920,"),
        (["evaluate"], "glocal evaluate: "),
        (["evaluate", "nowhere"], "nowhere: no trained network; give the folder of a run, or its weights.safetensors"),
        (["predict", "nowhere", "x.png"], "nowhere: no trained network"),
        (["predict", "nowhere"], "no images given; name files, or folders of images"),
        (["check-data", "nowhere"], "'nowhere' is neither a probe"),
        (["compare", "--layouts", "C-C-X-T"], "layout 'C-C-X-T': unknown letter 'X'; valid are C"),
        (["compare", "--layouts", "CCTT"], "did you mean 'C-C-T-T'?"),
        (["compare", "--layouts", "C-WindowAtention(window_size=2)"], "did you mean 'WindowAttention'?"),
        (["compare", "--layouts", "C-WindowAttention(windw_size=2)"], "did you mean 'window_size'?"),
        (["compare", "--layouts", "C-WindowAttention(window_size=oops)"], "oops"),
        (["compare", "--layouts", "C-WindowAttention(window_size=2"], "a parenthesis is not closed"),
        (["compare", "--layouts", "C-no/file.py:Op"], "no file 'no/file.py'"),
        (["compare", "--data", "number"], "did you mean 'numbers'?"),
        (["compare", "--data", "recal"], "did you mean the probe 'recall'?"),
        (["compare", "--data", "."], "--out: 'glocal-compare' lies inside the data folder; name one elsewhere"),
        (["compare", "--out", "taken"], "glocal compare: --out: 'taken' is a file; name a folder"),
        (["compare", "--out", "/proc/none"], "--out: cannot write to '/proc/none'"),
    ],
)
def test_a_mistake_is_one_line(data, capsys, arguments, message):
    (data / "taken").write_text("")
    (data / "taken.safetensors").write_text("no weights")
    (data / "wrong.yaml").write_text("train: {lrr: 1}")
    assert message in mistake(capsys, *arguments)


def test_a_file_that_is_no_image_is_named(data, capsys):
    for name in "ab":
        (data / "images" / name).mkdir(parents=True)
        for i in range(3):
            Image.new("L", (8, 8), i).save(data / "images" / name / f"{i}.png")
    (data / "images" / "b" / "notes.txt").write_text("not an image")
    line = mistake(capsys, "compare", "--data", "images")
    assert "images/b/notes.txt: not an image that can be read; remove or replace it" in line


def test_what_is_kept_is_said_where_it_is(data, capsys):
    """Not of a folder that could not be made."""
    line = mistake(capsys, "train", "--data", "numbers", "--out", "/proc/none")
    assert "No such file" in line and "kept" not in line


@pytest.mark.parametrize(
    "arguments",
    [
        ["explain-path", "own.py:Own()", "--shape", "1", "4", "4", "8"],
        ["train", "--data", "numbers", "--layout", "C-own.py:Own()"],
        ["compare", "--data", "numbers", "--mixers", "own.py:Own()"],
    ],
)
def test_an_error_in_a_users_file_is_one_line(data, capsys, arguments):
    text = """
    import glocal

    class Own(glocal.TokenMixer):
        def __init__(self, dim):
            super().__init__(dim)

        def values(self, source):
            return source.flatten(1, -2).unsqueeze(2)

        def weights(self, x):
            return {}["missing"]
    """
    (data / "own.py").write_text(textwrap.dedent(text))
    assert "own.py, line 12: KeyError: 'missing'" in mistake(capsys, *arguments)


def test_missing_extras_are_named(data, capsys, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in ("tyro", "PIL") else find(name))
    assert mistake(capsys, "compare").endswith("pillow, tyro not installed; run: pip install 'glocal[lab]'")


def test_a_full_disk_is_one_line(data, capsys, monkeypatch):
    def full(path, text):
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr(importlib.import_module("glocal.compare"), "write_text", full)
    line = mistake(capsys, "compare", "--data", "numbers", "--layouts", "C-C-T-T")
    assert "No space left on device" in line


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
        [sys.executable, "-m", "glocal", "compare", "--data", "numbers", "--layouts", "C-C-T-T", *arguments],
        cwd=folder, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        # whoever runs the tests in the background ignores Ctrl-C, and so would this process
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip


def test_the_main_job(data):
    own = "C-C-WindowAttention(window_size=2)-T"
    done = glocal_process(data, "--layouts", "C-C-T-T", own, "--seeds", "1", "--epochs", "1")
    out, err = done.communicate(timeout=300)
    assert done.returncode == 0, err
    lines = out.splitlines()
    assert lines[0] == "numbers: 24 training and 9 test images"
    assert re.split(r"\s{2,}", lines[2])[:3] == ["network", "test accuracy %", "95 % interval"]
    assert [line.split()[0] for line in lines[4:6]] == ["C-C-T-T", own]
    assert lines[7].startswith("No winner: with one seed each nothing can be said")
    assert "report: glocal-compare/report.html" in lines
    results = json.loads((data / "glocal-compare" / "results.json").read_text())
    assert [len(c["test_accuracy"]["per_seed"]) for c in results["candidates"]] == [1, 1]
    assert "2/2" in err and "Traceback" not in err and "Warning" not in err


def test_a_killed_comparison_continues_with_the_same_results(data):
    arguments = ["--seeds", "2", "--epochs", "40"]
    whole = glocal_process(data, *arguments, "--out", "whole")
    assert whole.wait(timeout=300) == 0, whole.stderr.read()
    for with_signal in (signal.SIGKILL, signal.SIGINT):
        cut = glocal_process(data, *arguments, "--out", "cut")
        while "epoch" not in cut.stderr.readline():
            assert cut.poll() is None
        cut.send_signal(with_signal)
        cut.wait(timeout=60)
    last = glocal_process(data, *arguments, "--out", "cut")
    assert last.wait(timeout=300) == 0, last.stderr.read()
    found = [json.loads((data / out / "results.json").read_text()) for out in ("whole", "cut")]
    for keys in (("test_accuracy",), ("train_loss",), ("fit",), ("curves",), ("confusion",)):
        assert [[c[k] for k in keys] for c in found[0]["candidates"]] == [
            [c[k] for k in keys] for c in found[1]["candidates"]
        ]
    names = [sorted(path.name for path in (data / out / "runs").iterdir()) for out in ("whole", "cut")]
    assert names[0] == names[1] and len(names[0]) == 2
    for name in names[0]:
        weights = [(data / out / "runs" / name / "weights.safetensors").read_bytes() for out in ("whole", "cut")]
        assert weights[0] == weights[1]


def test_train_evaluate_predict(data, capsys):
    train = ["train", "--data", "numbers", "--layout", "C-T", "--dims", "32", "32", "--epochs", "2", "--out", "run"]
    assert cli.main([*train, "--lr", "1e-3"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("test accuracy ") and said.out.endswith("run: run\n")
    assert "add --resume to go on with it" in mistake(capsys, *train, "--lr", "1e-3")
    assert "holds another run (train.lr is 0.001 there, 0.002 here)" in mistake(capsys, *train, "--resume")
    assert cli.main(["train", "--config", "run/config.yaml", "--out", "again", "--seed", "1"]) == 0
    assert "lr: 0.001" in (data / "again" / "config.yaml").read_text()
    assert "seed: 1" in (data / "again" / "config.yaml").read_text()
    capsys.readouterr()

    assert cli.main(["evaluate", "run", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    kept = json.loads((data / "run" / "result.json").read_text())
    assert found["images"] == 9 and found["accuracy"] == pytest.approx(kept["epochs"][-1]["test_accuracy"])
    assert found["loss"] == pytest.approx(kept["test_loss"], rel=1e-5)
    assert cli.main(["evaluate", "run"]) == 0
    assert "9 test images: accuracy" in capsys.readouterr().out
    assert "its 10 classes are not the 3" in mistake(capsys, "evaluate", "run", "--data", "digits")

    (data / "pictures").mkdir()
    for i in range(3):
        Image.new("RGB", (20, 30), (80 * i, 0, 0)).save(data / "pictures" / f"{i}.png")
    assert cli.main(["predict", "run", "pictures", "--json"]) == 0
    predictions = json.loads(capsys.readouterr().out)
    assert [each["path"] for each in predictions] == [f"pictures/{i}.png" for i in range(3)]
    for each in predictions:
        assert sum(each["probabilities"].values()) == pytest.approx(1, abs=1e-5)
        assert each["predicted"] == max(each["probabilities"], key=each["probabilities"].get)
    assert cli.main(["predict", "run", "pictures/0.png"]) == 0
    assert "pictures/0.png" in capsys.readouterr().out
    assert "missing.png: no such file or folder" in mistake(capsys, "predict", "run", "missing.png")


def test_train_starts_from_weights_of_other_data(data, capsys):
    run = ["--layout", "C-T", "--dims", "32", "32", "--epochs", "1"]
    assert cli.main(["train", "--data", "numbers", *run, "--out", "first"]) == 0
    second = ["train", "--data", "digits", *run, "--weights", "first/weights.safetensors", "--out", "second"]
    assert cli.main(second) == 0
    capsys.readouterr()
    other = ["train", "--data", "numbers", "--layout", "T-T", "--weights", "first/weights.safetensors", "--out", "x"]
    assert "first/weights.safetensors: weights of another network" in mistake(capsys, *other)


def test_a_loss_that_is_not_finite_is_one_line(data, capsys):
    assert cli.main(["train", "--data", "numbers", "--lr", "1e30", "--layout", "C-T", "--batch-size", "8"]) == 1
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "learning rate 1e+30; lower the learning rate" in captured.err


def test_check_data(data, capsys):
    assert cli.main(["check-data", "numbers"]) in (0, 1)
    assert "numbers" in capsys.readouterr().out
    for name in "ab":
        (data / "images" / name).mkdir(parents=True)
        for i in range(5):
            Image.fromarray(np.full((8, 8), 30 * i + ord(name), np.uint8)).save(data / "images" / name / f"{i}.png")
    (data / "images" / "b" / "broken.png").write_text("not an image")
    assert cli.main(["check-data", "images", "--json"]) == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"] and "broken.png" in " ".join(found["problems"] + found["unreadable"])


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
    while "epoch" not in process.stderr.readline():
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


# planted by scripts/mutate
FAULTS = {
    ("cli/parsing.py", "test_cli.py -k='mistake or kept or users_file'"): (
        ("what could not be made is kept", "if kept and out is not None and out.is_dir()", "if kept"),
        ("an error in a user's file is a traceback", "if (said := in_a_users_file(error)) is None:", "if True:"),
        ("options have the names of a configuration", 'r"^run(?:', 'r"^ran(?:'),
        ("a wrong number of values is told by types", 'r"no type matching', 'r"no kind matching'),
    ),
    ("checkpoint.py", "test_cli.py -k=mistake"): (
        ("a file in the way is found too late", "if blocked is not None:", "if False:"),
    ),
    ("cli/explore.py", "test_cli.py -k=mistake"): (
        ("any seed is taken", "if not 0 <= command.seed < 2**63:", "if False:"),
    ),
    ("cli/operators.py", "test_cli.py -k=mistake"): (
        ("a shape that does not fit is a traceback", "except RuntimeError:", "except KeyError:"),
    ),
}
