"""Runs side by side: what workers give, and how they end."""

import dataclasses
import multiprocessing
import os

import pytest
import torch

from glocal import running, training
from glocal.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from glocal.data import ImageData
from glocal.running import Job


def striped(seed=0, count=24):
    """Three classes told apart by their brightness."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 60, (count + 9, 1, 8, 8), dtype=torch.uint8, generator=generator)
    labels = torch.arange(count + 9) % 3
    images += (60 * labels).byte()[:, None, None, None]
    parts = images[:count], labels[:count], images[count:], labels[count:]
    return ImageData(f"striped {seed}", *parts, ("a", "b", "c"), "idx")


DATA = {"one": striped(0), "two": striped(1, 33)}


def jobs(folder, count=4, epochs=2, **model):
    return {
        i: Job(
            f"run {i}",
            RunConfig(
                DataConfig(("one", "two")[i % 2]),
                ModelConfig(**({"layout": "C-T", "dims": (32, 32)} | model)),
                TrainConfig(epochs=epochs, batch_size=8),
                seed=i,
            ),
            folder / str(i),
        )
        for i in range(count)
    }


class Silent(running.Progress):
    def __init__(self, count, **hooks):
        super().__init__([f"run {i}" for i in range(count)], [1.0] * count, quiet=True)
        self.hooks = hooks

    def epoch(self, i, epoch):
        self.hooks.get("epoch", lambda: None)()


@pytest.fixture
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def test_workers_give_what_one_thread_gives(tmp_path, one_thread):
    planned = jobs(tmp_path / "workers")
    assert sorted(running.run_all(planned, DATA, Silent(4), workers=2)) == [0, 1, 2, 3]
    for i, job in planned.items():
        data = DATA[job.config.data.source]
        found = training.finished(job.folder, job.config, training.identity(data))
        expected = training.train(job.config, data)
        assert [e.train_loss for e in found.epochs] == [e.train_loss for e in expected.epochs], i
    assert not multiprocessing.active_children()


def test_a_worker_that_dies_is_reported(tmp_path):
    progress = Silent(1, epoch=lambda: multiprocessing.active_children()[0].kill())
    with pytest.raises(
        running.RunFailed, match=r"run 0: the process that trained it ended with code -9; perhaps .* memory"
    ):
        list(running.run_all(jobs(tmp_path, 1, epochs=100_000), DATA, progress))
    assert not multiprocessing.active_children()


OPERATORS = """
import torch
from torch import nn

class Broken(nn.Module):
    def __init__(self, dim):
        super().__init__()
    def forward(self, x):
        if self.training:
            raise KeyError("in the operator")
        return x

class Infinite(Broken):
    def forward(self, x):
        return x * torch.inf if self.training else x
"""


@pytest.mark.parametrize(
    "operator, message",
    [
        ("Broken", "(?s)run 0:.*Traceback.*KeyError: 'in the operator'"),
        ("Infinite", "seed 0: the loss is nan at step 1 of"),
    ],
)
def test_a_run_that_fails_says_why(tmp_path, operator, message):
    (tmp_path / "ops.py").write_text(OPERATORS)
    planned = jobs(tmp_path, 1, layout=f"C-'{tmp_path / 'ops.py'}:{operator}'")
    with pytest.raises(running.RunFailed, match=message):
        list(running.run_all(planned, DATA, Silent(1)))


def test_a_folder_that_cannot_be_written_to_is_named(tmp_path):
    (tmp_path / "0").write_text("a file where the run's folder should be")
    with pytest.raises(OSError, match="0") as error:
        list(running.run_all(jobs(tmp_path, 1), DATA, Silent(1)))
    assert error.value.strerror and str(tmp_path / "0") in error.value.filename


def test_an_interrupted_consumer_ends_the_workers(tmp_path):
    everything = running.run_all(jobs(tmp_path), DATA, Silent(4), workers=1)
    next(everything)
    assert multiprocessing.active_children()
    everything.close()
    assert not multiprocessing.active_children()


# In this process


def test_train_here_asks_before_it_goes_on(tmp_path):
    config = jobs(tmp_path, 1)[0].config
    result = running.train_here(config, DATA["one"], tmp_path / "run", resume=False, progress=Silent(1))
    assert list((tmp_path / "run").glob("events.*"))
    with pytest.raises(ValueError, match="holds a run; add --resume to go on with it"):
        running.train_here(config, DATA["one"], tmp_path / "run", resume=False, progress=Silent(1))
    again = running.train_here(config, DATA["one"], tmp_path / "run", resume=True, progress=Silent(1))
    assert again == result
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match=r"'.*mine' holds something else; name another folder"):
        running.train_here(config, DATA["one"], tmp_path / "mine", resume=True, progress=Silent(1))


# Progress


EPOCH = training.EpochResult(1, train_loss=1.5, test_accuracy=51.25, seconds=13.4, images_per_second=10.0)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(capsys, monkeypatch, terminal):
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    with running.Progress(["C-T seed 0", "T-T seed 0", "T seed 0"], [1.0, 1.0, 1.0]) as progress:
        progress.skip(2)
        progress.step(0, 1, 4)
        progress.step(1, 2, 4)
        progress.epoch(0, EPOCH)
        progress.finish(0, 51.25)
        progress.finish(1, 60.0)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "2/3 C-T seed 0: test 51.2 %; about" in captured.err and " left" in captured.err
    assert "3/3 T-T seed 0: test 60.0 %\n" in captured.err
    if not terminal:
        assert "C-T seed 0: epoch 1 in 13 s, test 51.2 %, loss 1.500" in captured.err


def test_nothing_to_do_is_said(capsys):
    with running.Progress(["a", "b"], [1.0, 1.0]) as progress:
        progress.skip(0)
        progress.skip(1)
    assert "all 2 runs were finished before" in capsys.readouterr().err


def test_time_left_counts_costs_and_what_was_there_before(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(running.time, "monotonic", lambda: now[0])
    progress = running.Progress(["a", "b", "c"], [6.0, 2.0, 2.0], quiet=True)
    progress.skip(2)  # was there: says nothing of the speed
    progress.step(0, 51, 100)  # resumed after 50 of 100 steps
    now[0] = 30.0
    progress.step(0, 100, 100)  # 3 units in 30 s; 2 are left
    assert progress._left() == "about 20 s left"


def test_quick_epochs_are_not_all_told(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(running.time, "monotonic", lambda: now[0])
    with running.Progress(["a"], [1.0]) as progress:
        for i in range(100):
            now[0] += 1
            progress.epoch(0, dataclasses.replace(EPOCH, epoch=i + 1, seconds=1.0))
    assert 9 <= capsys.readouterr().err.count("epoch") <= 21


@pytest.mark.parametrize(
    "seconds, text", [(4.4, "4 s"), (89, "89 s"), (90, "2 min"), (3599, "60 min"), (7500, "2 h 5 min")]
)
def test_durations(seconds, text):
    assert running._duration(seconds) == text


def test_cores():
    assert 1 <= running._cores() <= os.cpu_count()
