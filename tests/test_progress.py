"""What people are told while runs go on: bars on a terminal, lines elsewhere, and the time left."""

import dataclasses

import pytest

from glocal import progress as shown
from glocal.progress import Progress
from glocal.runs import EpochResult

EPOCH = EpochResult(1, train_loss=1.5, test_accuracy=51.25, seconds=13.4, images_per_second=10.0)


@pytest.mark.parametrize("terminal", [False, True])
def test_progress(capsys, monkeypatch, terminal):
    monkeypatch.setenv("FORCE_COLOR" if terminal else "NO_COLOR", "1")
    with Progress(["C-T seed 0", "T-T seed 0", "T seed 0"], [1.0, 1.0, 1.0]) as progress:
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
    with Progress(["a", "b"], [1.0, 1.0]) as progress:
        progress.skip(0)
        progress.skip(1)
    assert "all 2 runs were finished before" in capsys.readouterr().err


def test_time_left_counts_costs_and_what_was_there_before(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(shown.time, "monotonic", lambda: now[0])
    progress = Progress(["a", "b", "c"], [6.0, 2.0, 2.0], quiet=True)
    progress.skip(2)  # was there: says nothing of the speed
    progress.step(0, 51, 100)  # resumed after 50 of 100 steps
    now[0] = 30.0
    progress.step(0, 100, 100)  # 3 units in 30 s; 2 are left
    assert progress._left() == "about 20 s left"


def test_quick_epochs_are_not_all_told(capsys, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(shown.time, "monotonic", lambda: now[0])
    with Progress(["a"], [1.0]) as progress:
        for i in range(100):
            now[0] += 1
            progress.epoch(0, dataclasses.replace(EPOCH, epoch=i + 1, seconds=1.0))
    assert 9 <= capsys.readouterr().err.count("epoch") <= 21


@pytest.mark.parametrize(
    "seconds, text", [(4.4, "4 s"), (89, "89 s"), (90, "2 min"), (3599, "60 min"), (7500, "2 h 5 min")]
)
def test_durations(seconds, text):
    assert shown._duration(seconds) == text
