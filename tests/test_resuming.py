"""Interrupted runs: wherever one is cut off, it goes on exactly, and nothing is lost or told twice."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import glocal
from glocal import checkpoint, training

from .small_run import Stop, StopAt, easy, numbers, run, same, weights

pytestmark = pytest.mark.usefixtures("one_thread")

RECIPES = {
    "plain": {},
    "everything": {
        "ema": 0.9, "mixup": 0.2, "cutmix": 1.0, "randaugment": 1, "crop_padding": 1, "flip": True,
        "class_balanced": True,
    },
    "bf16": {"precision": "bf16"},
}  # fmt: skip


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("stop", [1, 3, 4, 6, 12])
def test_an_interrupted_run_goes_on_exactly(tmp_path, recipe, stop):
    config = run(epochs=3, **RECIPES[recipe])
    whole = training.train(config, easy(), tmp_path / "whole")
    with pytest.raises(Stop):
        training.train(config, easy(), tmp_path / "cut", listener=StopAt(stop), checkpoint_seconds=0)
    state = torch.get_rng_state()
    listener = StopAt(None)
    cut = training.train(config, easy(), tmp_path / "cut", listener=listener)
    assert torch.equal(torch.get_rng_state(), state)
    # the state after an epoch is kept when its test is done, which here it was not
    assert [done for done, _ in listener.steps] == list(range(stop + (stop % 4 != 0), 13))
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))
    assert numbers(cut) == numbers(whole) and cut.peak_memory == whole.peak_memory
    assert (cut.train_loss, cut.test_loss) == (whole.train_loss, whole.test_loss)
    assert not (tmp_path / "cut" / "checkpoints").exists()


def test_stochastic_depth_goes_on_exactly(tmp_path):
    config = run(epochs=2)
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, drop_path=0.5, layer_scale=1e-3))
    training.train(config, easy(), tmp_path / "whole")
    with pytest.raises(Stop):
        training.train(config, easy(), tmp_path / "cut", listener=StopAt(3), checkpoint_seconds=0)
    training.train(config, easy(), tmp_path / "cut")
    assert same(weights(tmp_path / "cut"), weights(tmp_path / "whole"))


def test_metrics_of_steps_that_are_done_again_are_taken_back(tmp_path):
    config = run(epochs=3)
    with pytest.raises(Stop):
        training.train(config, easy(), tmp_path / "run", listener=StopAt(6), checkpoint_seconds=0)
    metrics = tmp_path / "run" / "metrics.jsonl"
    metrics.write_text(metrics.read_text() + '{"step": 7, "loss": 1.0}\n{"step": 8, "los')
    training.train(config, easy(), tmp_path / "run")
    assert [json.loads(line)["step"] for line in metrics.read_text().splitlines()] == [4, 8, 12]


def test_a_full_disk_keeps_the_last_state(tmp_path, monkeypatch):
    config = run(epochs=3)
    whole = training.train(config, easy(), tmp_path / "whole")
    saved = checkpoint.write_whole

    def full(path, content):
        if path.name == "state.pt" and "step-00000004" not in path.parent.name:
            path.write_bytes(b"half of it")
            raise OSError(28, "No space left on device", str(path))
        saved(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "write_whole", full)
        with pytest.raises(OSError, match="No space left"):
            training.train(config, easy(), tmp_path / "run")
    assert [path.name for path in (tmp_path / "run" / "checkpoints").iterdir()] == ["step-00000004"]
    listener = StopAt(None)
    assert numbers(training.train(config, easy(), tmp_path / "run", listener=listener)) == numbers(whole)
    assert listener.steps[0] == (5, 12) and same(weights(tmp_path / "run"), weights(tmp_path / "whole"))


# Forked from one warm process: importing PyTorch twenty times would take a minute.
KILLED = """
import os, random, signal, sys, time, torch
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from small_run import easy, run
from glocal import training
torch.set_num_threads(1)
folder = Path(sys.argv[2])

def go(name):
    training.train(run(epochs=EPOCHS), easy(), folder / name, checkpoint_seconds=0.02)

def forked(name):
    pid = os.fork()
    if pid == 0:
        go(name)
        os._exit(0)
    return pid

EPOCHS = 2
began = time.monotonic()
go("warm")  # and imports what training imports
moments = random.Random(int(sys.argv[3]))
EPOCHS = 70
began = time.monotonic()
go("whole")
usual = time.monotonic() - began
kills = 0
while kills < 20 and not (folder / "killed" / "result.json").exists():
    pid = forked("killed")
    time.sleep(moments.random() * usual / 25)
    os.kill(pid, signal.SIGKILL)
    kills += os.waitpid(pid, 0)[1] == signal.SIGKILL
print(kills)
go("killed")
"""


@pytest.mark.slow
def test_killed_at_twenty_random_moments(tmp_path):
    source = os.pathsep.join([str(Path(glocal.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(Path(__file__).parent), str(tmp_path), "0"],
        env=os.environ | {"PYTHONPATH": source}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 20  # it was not finished before
    assert same(weights(tmp_path / "killed"), weights(tmp_path / "whole"))
    lines = [
        [{k: v for k, v in json.loads(line).items() if "second" not in k} for line in path.read_text().splitlines()]
        for path in (tmp_path / "killed" / "metrics.jsonl", tmp_path / "whole" / "metrics.jsonl")
    ]
    assert lines[0] == lines[1] and len(lines[0]) > 50


# planted by scripts/mutate
FAULTS = {
    "training.py": (
        (
            "a resumed run forgets the optimizer's state",
            '        self.optimizer.load_state_dict(state["optimizer"])\n',
            "",
        ),
        (
            "a resumed run forgets the averaged weights",
            '            self.average.load_state_dict(state["average"])',
            "            pass",
        ),
        ("lines of steps that are done again stay", '"step", self.step)', '"step", self.steps)'),
        (
            "losses of an epoch forget what was before the interruption",
            '"step", "loss_sum", "loss_count", "seconds", "peak_memory"',
            '"step", "seconds", "peak_memory"',
        ),
    ),
}
