"""Runs side by side: what workers give, and how they end."""

import multiprocessing
import os
import platform
import subprocess
import sys
import textwrap

import pytest
import torch

from glocal import running
from glocal.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from glocal.data import ImageData
from glocal.progress import Progress
from glocal.running import Job
from glocal.runs import finished, identity
from glocal.training import train


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


class Silent(Progress):
    def __init__(self, count, **hooks):
        super().__init__([f"run {i}" for i in range(count)], [1.0] * count, quiet=True)
        self.hooks = hooks

    def epoch(self, i, epoch):
        self.hooks.get("epoch", lambda: None)()


def test_workers_give_what_one_thread_gives(tmp_path, one_thread):
    planned = jobs(tmp_path / "workers")
    assert sorted(running.run_all(planned, DATA, Silent(4), workers=2)) == [0, 1, 2, 3]
    for i, job in planned.items():
        data = DATA[job.config.data.source]
        found = finished(job.folder, job.config, identity(data))
        expected = train(job.config, data)
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


GLIBC = platform.libc_ver()[0] == "glibc" and tuple(map(int, platform.libc_ver()[1].split("."))) >= (2, 35)


@pytest.mark.skipif(not GLIBC, reason="needs glibc 2.35 or newer")
def test_what_is_freed_is_handed_out_again_without_new_pages():
    """40 MiB are more than glibc keeps by itself."""
    script = """
        import resource, torch
        from glocal.running import keep_freed_memory
        def faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(5):
                torch.empty(10 * 2**20).fill_(1)
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
        print(faults())
        keep_freed_memory()
        faults()
        print(faults())
    """
    environment = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
    run = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=environment, capture_output=True, text=True, check=True
    )
    before, after = map(int, run.stdout.split())
    assert after < 100 < before


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


def test_cores():
    assert 1 <= running._cores() <= os.cpu_count()


# planted by scripts/mutate
FAULTS = (
    ("freed memory goes back to the system", "    mallopt(m_trim_threshold, 2**30)\n", ""),
    ("large blocks are mapped anew", "if not mallopt(m_mmap_threshold, 2**30):", "if True:"),
    (
        "a run that failed is passed over",
        "                        raise RunFailed(content)\n",
        "                        continue\n",
    ),
    ("a full disk is told as a failed run", "raise OSError(*content)", "raise RunFailed(content)"),
    ("workers outlive a consumer that stops", "                process.terminate()\n", "                pass\n"),
    (
        "a run of another configuration is continued",
        'if not resume and (folder / "config.yaml").exists():',
        "if False:",
    ),
    ("a folder that holds something else is used", 'if others and not (folder / "config.yaml").exists():', "if False:"),
)
