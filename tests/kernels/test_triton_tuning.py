"""Which configuration is taken: with a clock and a device that are not real, and kernels that only say they ran."""

import json
import os
import statistics
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

from glocal.kernels import compiled

triton = pytest.importorskip("triton")
from triton.runtime.errors import OutOfResources  # noqa: E402

from glocal.kernels.triton import tuning  # noqa: E402

FAULTS = {
    "kernels/triton/tuning.py": [
        ("the slowest is taken", "best = min(times", "best = max(times"),
        ("a mean is taken, which one slow run decides", 'return_mode="median"', 'return_mode="mean"'),
        ("nothing is remembered", "                _chosen[key] = found\n    return _chosen[key]", "    return found"),
        ("kinds of calls are one", "key = (kernel.fn, kind, device)", "key = (kernel.fn, device)"),
        ("kinds of calls have one file", "of = repr((kernel.cache_key, kind,", "of = repr((kernel.cache_key,"),
        ("a kernel that was changed keeps its choice", "repr((kernel.cache_key, kind", "repr((kind"),
        ("devices have one file", "torch.cuda.get_device_name(device), ", ""),
        ("a file of other calls is believed", 'if kept["of"] == of else None', "if True else None"),
        (
            "half a file stops the program",
            "(OSError, ValueError, TypeError, KeyError)",
            "(OSError, TypeError, KeyError)",
        ),
        ("a file that is no object stops the program", "ValueError, TypeError, KeyError", "ValueError, KeyError"),
        (
            "a full disk stops the program",
            "    except OSError:\n        if unf",
            "    except KeyError:\n        if unf",
        ),
        ("no file is written", "        os.replace(unfinished, path)\n", "        os.unlink(unfinished)\n"),
        ("what does not compile stops the program", "except (TritonError, RuntimeError)", "except RuntimeError"),
        ("too little memory stops the program", "except (TritonError, RuntimeError)", "except TritonError"),
        ("timed while a graph is captured", "if torch.cuda.is_current_stream_capturing():", "if False:"),
        ("a captured graph's choice stays", "                        return 0", "                        found = 0"),
        ("timed in deterministic mode", "or torch.are_deterministic_algorithms_enabled()", ""),
        ("the variable is ignored", "if not WANTED or", "if"),
        ("the interpreter is timed", "or triton.knobs.runtime.interpret", ""),
        ("timed where there is no GPU", 'device.type != "cuda" or ', ""),
        (
            "threads time the same",
            "            if key not in _chosen:\n                path",
            "            if True:\n                path",
        ),
    ],
}
CHOICES = [{"N": 1}, {"N": 2}, {"N": 3}]
GPU = torch.device("cuda", 0)


class Kernel:
    """Takes so many milliseconds with each configuration, or raises; `times` may be a list for runs in turn."""

    cache_key = "its source"

    def __init__(self, *times):
        self.times, self.ran = times, []

    def fn(self):
        raise NotImplementedError

    def launch(self, choice):
        self.ran.append(choice["N"])
        time = self.times[choice["N"] - 1]
        if isinstance(time, Exception):
            raise time
        return time

    def run(self, kind=("some",), device=GPU, choices=CHOICES):
        """The number of the configuration that was taken, and how many were launched."""
        before = len(self.ran)
        tuning.run(SimpleNamespace(fn=Kernel.fn, cache_key=self.cache_key), kind, choices, self.launch, device)
        return self.ran[-1], len(self.ran) - before


def do_bench(fn, warmup, rep, return_mode="mean"):
    """That of triton.testing, whose clock is what a launch returns."""
    runs = [fn() for _ in range(3)]
    times = [run[i] if isinstance(run, list) else run for i, run in enumerate(runs)]
    return {"mean": statistics.mean, "median": statistics.median}[return_mode](times)


@pytest.fixture(autouse=True)
def fake(monkeypatch, tmp_path):
    monkeypatch.setattr(tuning, "_chosen", {})
    monkeypatch.setattr(tuning, "WANTED", True)
    monkeypatch.setattr(compiled, "folder", lambda: tmp_path)
    monkeypatch.setattr(triton.testing, "do_bench", do_bench)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", False)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def forget():
    """As in a process that begins."""
    tuning._chosen.clear()


def test_the_fastest_is_taken_and_remembered(tmp_path):
    kernel = Kernel(3.0, 1.0, 2.0)
    assert kernel.run() == (2, 3 * 3 + 1)
    assert kernel.run() == (2, 1)
    forget()
    assert kernel.run() == (2, 1)  # from the file
    (file,) = tmp_path.iterdir()
    assert json.loads(file.read_text())["milliseconds"] == 1.0


def test_one_slow_run_decides_nothing():
    assert Kernel([2.0, 2.0, 2.0], [1.0, 1.0, 99.0], [3.0, 3.0, 3.0]).run()[0] == 2


@pytest.mark.parametrize("what", ["kind", "source", "device", "configurations"])
def test_other_calls_are_timed_anew(what, monkeypatch):
    """In memory and on disk."""
    Kernel(3.0, 1.0, 2.0).run()
    other = Kernel(1.0, 2.0, 3.0)
    arguments = {"kind": {"kind": ("other",)}, "configurations": {"choices": CHOICES[:2]}}.get(what, {})
    if what == "kind":
        assert other.run(**arguments) == (1, 10)
        return
    forget()
    if what == "source":
        other.cache_key = "another"
    if what == "device":
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "another")
    assert other.run(**arguments) == (1, 7 if what == "configurations" else 10)


def test_another_device_of_a_machine_reads_the_file():
    Kernel(3.0, 1.0, 2.0).run()
    assert Kernel(0.0, 1.0, 2.0).run(device=torch.device("cuda", 1)) == (2, 1)


@pytest.mark.parametrize("damage", ["", '{"of": ', "[1]", "{}", "3", "other"])
def test_a_damaged_or_foreign_file_is_replaced(damage, tmp_path):
    kernel = Kernel(3.0, 1.0, 2.0)
    kernel.run()
    (file,) = tmp_path.iterdir()
    good = file.read_text()
    file.write_text(
        json.dumps(json.loads(good) | {"of": "other", "configuration": {"N": 3}}) if damage == "other" else damage
    )
    forget()
    assert kernel.run() == (2, 10)
    assert file.read_text() == good
    file.write_text(json.dumps(json.loads(good) | {"configuration": {"N": 9}}))
    forget()
    assert kernel.run() == (2, 10)


@pytest.mark.parametrize("error", [OutOfResources(300, 200, "shared memory"), RuntimeError("PassManager::run failed")])
def test_what_does_not_fit_is_left_out(error):
    kernel = Kernel(error, 2.0, 1.0)
    assert kernel.run() == (3, 1 + 3 + 3 + 1)


def test_if_none_fits_the_first_says_why(tmp_path):
    errors = [OutOfResources(n, 200, "shared memory") for n in (300, 400, 500)]
    with pytest.raises(OutOfResources, match="300"):
        Kernel(*errors).run()
    assert not list(tmp_path.iterdir())


def test_nothing_is_timed_while_a_graph_is_captured(monkeypatch):
    kernel = Kernel(3.0, 1.0, 2.0)
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert kernel.run() == (1, 1)
    assert kernel.run() == (2, 10)  # afterwards
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert kernel.run() == (2, 1)
        forget()
        assert kernel.run() == (2, 1)


@pytest.mark.parametrize("why", ["deterministic", "variable"])
def test_the_first_is_always_taken_where_bits_count(why, monkeypatch, tmp_path):
    """Even where another is known."""
    kernel = Kernel(3.0, 1.0, 2.0)
    with monkeypatch.context() as patch:
        if why == "variable":
            patch.setattr(tuning, "WANTED", False)
        else:
            patch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
        assert kernel.run() == (1, 1)
        assert not list(tmp_path.iterdir())
    kernel.run()
    if why == "variable":
        monkeypatch.setattr(tuning, "WANTED", False)
    else:
        monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    assert kernel.run() == (1, 1)


@pytest.mark.parametrize("where", ["cpu", "interpreter"])
def test_nothing_is_timed_without_a_gpu(where, monkeypatch):
    if where == "interpreter":
        monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    assert Kernel(3.0, 1.0, 2.0).run(device=torch.device("cpu") if where == "cpu" else GPU) == (1, 1)


def test_without_a_folder_the_choice_is_kept_in_memory(monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "folder", lambda: tmp_path / "nowhere")
    kernel = Kernel(3.0, 1.0, 2.0)
    assert kernel.run() == (2, 10)
    assert kernel.run() == (2, 1)


def test_nothing_unfinished_is_left_behind(monkeypatch, tmp_path):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr(os, "replace", full)
    assert Kernel(3.0, 1.0, 2.0).run() == (2, 10)
    assert not list(tmp_path.iterdir())


def test_threads_wait_for_the_first_to_time(monkeypatch):
    """And take what it found."""
    kernel, begun = Kernel(3.0, 1.0, 2.0), threading.Event()
    timed = []

    def slow(fn, **options):
        timed.append(fn)
        begun.set()
        threading.Event().wait(0.05)
        return do_bench(fn, **options)

    monkeypatch.setattr(triton.testing, "do_bench", slow)
    monkeypatch.setattr(tuning, "_write", lambda *_: None)  # nor is there a file to find it in
    threads = [threading.Thread(target=kernel.run) for _ in range(2)]
    threads[0].start()
    begun.wait()
    threads[1].start()
    for thread in threads:
        thread.join()
    assert len(timed) == 3


CHILD = """
from types import SimpleNamespace
import torch, triton
from glocal.kernels.triton import tuning
def fn(): pass
triton.knobs.runtime.interpret = False
triton.testing.do_bench = None
torch.cuda.get_device_name = lambda device: "a GPU"
torch.cuda.is_current_stream_capturing = lambda: False
kernel = SimpleNamespace(fn=fn, cache_key="its source")
tuning.run(kernel, ("some",), [{"N": 1}, {"N": 2}, {"N": 3}], print, torch.device("cuda", 0))
"""


@pytest.mark.parametrize(("variable", "expected"), [("1", "{'N': 2}"), ("0", "{'N': 1}")])
def test_another_process_takes_the_choice_from_the_disk(variable, expected, monkeypatch, tmp_path):
    monkeypatch.setattr(compiled, "folder", lambda: tmp_path / "kernels")
    (tmp_path / "kernels").mkdir(mode=0o700)
    Kernel(3.0, 1.0, 2.0).run()
    environment = {**os.environ, "GLOCAL_CACHE": str(tmp_path), "GLOCAL_TUNE": variable}
    command = [sys.executable, "-c", CHILD]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == expected, done.stderr
