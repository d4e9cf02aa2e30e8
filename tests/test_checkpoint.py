"""Files are whole whenever a process dies or a disk is full, hold what was put in, and run no code."""

import contextlib
import errno
import json
import os
import pickle
import resource
import signal
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from glocal import checkpoint
from glocal.checkpoint import (
    CheckpointError,
    load_about,
    load_state,
    load_weights,
    save_state,
    save_weights,
    write_text,
)


@contextlib.contextmanager
def largest_file(size):
    """Lets the system refuse to write more into a file, as a full disk does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def all_files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


# Weights


def test_every_kind_of_tensor_comes_back(tmp_path):
    x = torch.randn(4, 6)
    weights = {
        "shared": x,
        "shared too": x,
        "transposed": x.T,
        "with gaps": x[1:3, ::2],
        "expanded": torch.ones(1, 3).expand(5, 3),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "scalar": torch.tensor(1.5),
        "num_batches_tracked": torch.tensor(2**40),
        "bf16": torch.randn(3).bfloat16(),
        "half": x.half(),
        "double": x.double(),
        "bool": torch.tensor([True, False]),
        "empty": torch.empty(0, 3),
        "parameter": torch.nn.Parameter(torch.randn(2)),
    }
    path = tmp_path / "w.safetensors"
    save_weights(path, weights, {"classes": ["é", "b"], "n": [1, 2.5, None]})
    found = load_weights(path)
    assert found.keys() == weights.keys()
    for name, value in weights.items():
        assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
    assert load_about(path) == {"classes": ["é", "b"], "n": [1, 2.5, None]}
    with safe_open(path, "pt") as file:  # as any other program reads it
        assert torch.equal(file.get_tensor("transposed"), x.T)
        assert json.loads(file.metadata()["glocal"])["n"] == [1, 2.5, None]
    assert all_files(tmp_path) == ["w.safetensors"]


def test_a_file_of_another_program_says_nothing_about_itself(tmp_path):
    save_file({"a": torch.ones(2)}, tmp_path / "w.safetensors")
    assert load_about(tmp_path / "w.safetensors") == {}
    assert torch.equal(load_weights(tmp_path / "w.safetensors")["a"], torch.ones(2))


@pytest.mark.parametrize("wrap", [lambda w: w, *(lambda w, k=k: {k: w, "epoch": 3} for k in ("state_dict", "model"))])
@pytest.mark.parametrize("name", ["w.pt", "w.PTH", "w.ckpt"])
def test_tensors_of_a_pytorch_file(tmp_path, wrap, name):
    weights = torch.nn.Linear(2, 3).state_dict()
    torch.save(wrap(weights), tmp_path / name)
    found = load_weights(tmp_path / name)
    assert found.keys() == weights.keys() and all(torch.equal(found[key], weights[key]) for key in weights)


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("ran",)


def damaged(folder):
    """What is no file of weights, under every suffix: its writer and a part of the message."""
    whole = folder / "whole"
    torch.save({"a": torch.randn(999)}, whole)
    save_file({"a": torch.randn(999)}, folder / "st")
    zipped, tensors = whole.read_bytes(), (folder / "st").read_bytes()
    pickled = pickle.dumps(RunsCode(), protocol=2)
    torch.save({"a": RunsCode()}, whole)
    yield from [("cut.pt", zipped[: len(zipped) // 2], "can be read"), ("text.pt", b"hello world", "can be read")]
    yield from [("empty.pt", b"", "can be read"), ("code.pt", whole.read_bytes(), "state_dict() alone")]
    yield from [("code.bin", pickled, "state_dict() alone"), ("cut.safetensors", tensors[:-5], "can be read")]
    yield from [("text.safetensors", b"hello world, hello", "can be read"), ("empty.safetensors", b"", "can be read")]
    torch.save([1, 2], whole)
    yield "list.pt", whole.read_bytes(), "holds no dictionary of tensors"
    torch.save(torch.nn.Linear(1, 1), whole)
    yield "module.pt", whole.read_bytes(), "state_dict() alone"


def test_what_is_no_file_of_weights_is_said_in_one_line_and_not_run(tmp_path, monkeypatch, recwarn):
    monkeypatch.chdir(tmp_path)
    for name, content, message in damaged(tmp_path):
        path = tmp_path / name
        path.write_bytes(content)
        with pytest.raises(CheckpointError) as error:
            load_weights(path)
        said = str(error.value)
        assert said.startswith(f"{path}: ") and message in said and "\n" not in said and "\x1b" not in said
        assert "weights_only" not in said or "TorchScript" in said  # no advice that cannot be followed
        if name.endswith(".safetensors"):
            with pytest.raises(CheckpointError):
                load_about(path)
    assert not (tmp_path / "ran").exists()
    assert not recwarn.list
    pickle.loads(pickle.dumps(RunsCode()))  # what would have happened
    assert (tmp_path / "ran").exists()


def test_paths_that_hold_no_file(tmp_path):
    with pytest.raises(CheckpointError, match=r"no such file; give a file of weights$"):
        load_weights(tmp_path / "none.pt")
    with pytest.raises(CheckpointError, match=r"a folder; name a file in it$"):
        load_weights(tmp_path)


# A full disk


def test_a_full_disk_leaves_what_was_there(tmp_path):
    weights = {"a": torch.randn(50_000)}
    write_text(tmp_path / "text", "old")
    save_weights(tmp_path / "w.safetensors", {"a": torch.ones(1)})
    save_state(tmp_path / "states", 1, {"a": torch.ones(1)}, {"value": 1})
    before = all_files(tmp_path)
    attempts = [
        ("text", lambda path: write_text(path, "new" * 100_000)),
        ("w.safetensors", lambda path: save_weights(path, weights)),
        ("states", lambda path: save_state(path, 2, weights, {"value": 2})),
        ("states", lambda path: save_state(path, 2, {}, {"value": 2, "optimizer": torch.randn(50_000)})),
    ]
    for name, write in attempts:
        path = tmp_path / name
        with largest_file(4096), pytest.raises(OSError) as error:
            write(path)
        assert error.value.errno == errno.EFBIG and error.value.filename == str(path)
        assert all_files(tmp_path) == before
    assert (tmp_path / "text").read_text() == "old"
    assert load_weights(tmp_path / "w.safetensors")["a"] == 1
    assert load_state(tmp_path / "states")[1] == {"value": 1}


def test_a_disk_that_says_late_that_it_is_full(tmp_path, monkeypatch):
    save_state(tmp_path, 1, {"a": torch.ones(1)}, {"value": 1})
    before = all_files(tmp_path)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as error:
        save_state(tmp_path, 2, {"a": torch.ones(1)}, {"value": 2})
    assert error.value.errno == errno.ENOSPC and error.value.filename == str(tmp_path)
    assert all_files(tmp_path) == before and load_state(tmp_path)[1] == {"value": 1}


# Processes that are killed


def killed_after(lines, function):
    """Whether `function`, in a process that is killed after so many lines of our code and shutil's, was killed."""
    child = os.fork()
    if child == 0:
        left = lines

        def trace(frame, event, argument):
            nonlocal left
            if frame.f_code.co_filename not in (checkpoint.__file__, checkpoint.shutil.__file__):
                return None
            left -= event == "line"
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return trace

        sys.settrace(trace)
        try:
            function()
        finally:
            os._exit(0)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # that fork may meet threads
@pytest.mark.parametrize("step", [2, 1])  # a new step, and one that is there
def test_killed_between_any_two_lines_one_whole_state_is_there(tmp_path, monkeypatch, step):
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # of no use to a process that dies, and slow

    def save(number, value):
        save_state(folder, number, {"a": torch.tensor(value)}, {"value": value})

    found = []
    for lines in range(1000):
        folder = tmp_path / str(lines)
        save(1, 10)
        killed = killed_after(lines, lambda: save(step, 20))
        weights, state = load_state(folder)
        assert weights["a"].item() == state["value"]
        found.append(state["value"])
        save(3, 30)  # the next one clears up
        assert all_files(folder) == ["step-00000003", "step-00000003/state.pt", "step-00000003/weights.safetensors"]
        if not killed:
            break
    assert lines > 20 and set(found) == {10, 20} and found[0] == 10 and found[-1] == 20


@pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")
def test_killed_between_any_two_lines_a_file_is_old_or_new(tmp_path):
    path = tmp_path / "file"
    for lines in range(1000):
        write_text(path, "old")
        killed = killed_after(lines, lambda: write_text(path, "new"))
        assert path.read_text() in ("old", "new")
        write_text(path, "last")
        assert all_files(tmp_path) == ["file"]
        if not killed:
            break
    assert lines > 5


def test_what_a_living_process_writes_is_left_alone(tmp_path):
    other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    theirs = tmp_path / f".file.{other.pid}.tmp"
    theirs.write_text("half")
    write_text(tmp_path / "file", "ours")
    assert theirs.exists()
    other.communicate(b"\n")
    write_text(tmp_path / "file", "ours")
    assert all_files(tmp_path) == ["file"]


# States


def test_the_newest_state_that_can_be_read_counts(tmp_path):
    assert load_state(tmp_path) is None and load_state(tmp_path / "none") is None
    save_state(tmp_path / "old", 9, {"a": torch.tensor(9)}, {"value": 9})
    save_state(tmp_path, 10, {"a": torch.tensor(10)}, {"value": 10})
    (tmp_path / "old" / "step-00000009").rename(tmp_path / "step-00000009")
    assert load_state(tmp_path)[1] == {"value": 10}
    for content in (b"garbage", b"", pickle.dumps(RunsCode())):  # each another error of PyTorch's reader
        (tmp_path / "step-00000010" / "state.pt").write_bytes(content)
        assert load_state(tmp_path)[1] == {"value": 9}
    (tmp_path / "step-00000009" / "weights.safetensors").unlink()
    assert load_state(tmp_path) is None


def test_an_optimizer_goes_on_from_a_state(tmp_path):
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    save_state(
        tmp_path, 1, model.state_dict(), {"optimizer": optimizer.state_dict(), "scaler": None, "list": [{"a": 0.1}]}
    )
    weights, state = load_state(tmp_path)
    other = torch.optim.AdamW(torch.nn.Linear(3, 2).parameters())
    other.load_state_dict(state["optimizer"])
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert state["scaler"] is None and state["list"] == [{"a": 0.1}]
    for ours, theirs in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


# planted by scripts/mutate
FAULTS = (
    ("a file is written in place", "    temporary = _temporary(path)\n    try:", "    temporary = path\n    try:"),
    (
        "a full disk leaves half a file",
        "    except OSError as error:\n        temporary.unlink(missing_ok=True)",
        "    except OSError as error:",
    ),
    (
        "a step that is there is removed before its new state is in place",
        "            final.replace(aside)",
        "            shutil.rmtree(final)",
    ),
    ("files are unpickled", "weights_only=True", "weights_only=False"),
    ("what a killed process left stays", "and not _lives(int(number))", "and False"),
    ("what a living process writes is removed", "and not _lives(int(number))", ""),
    ("a damaged state hides the one before", "            continue", "            return None"),
)
