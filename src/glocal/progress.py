"""How far runs are, shown to people."""

import math
import sys
import time
from collections.abc import Sequence
from typing import Any

from glocal.runs import EpochResult

_SECONDS_BETWEEN_LINES = 5  # about epochs, without a terminal


class Progress:
    """How far all runs are: bars with the time left on a terminal, plain lines elsewhere. Writes to stderr.

    Args:
        labels: Name of every run.
        costs: What every run costs, in any unit.
        quiet: Whether to show nothing.
    """

    def __init__(self, labels: Sequence[str], costs: Sequence[float], *, quiet: bool = False):
        from rich.console import Console

        self.labels = labels
        self._costs = costs
        self._console = Console(stderr=True, quiet=quiet)
        self._shares = [0.0] * len(labels)
        self._found: dict[int, float] = {}  # shares that were done before this started
        self._finished = 0
        self._started = time.monotonic()
        self._said = -math.inf
        self._bars: Any = None
        self._tasks: dict[int, Any] = {}

    def __enter__(self) -> "Progress":
        if self._console.is_terminal and not self._console.quiet:
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn

            columns = (
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[said]}", markup=False),
            )
            self._bars = Progress(*columns, console=self._console, transient=True)
            self._all = self._bars.add_task("all runs", total=1.0, said="")
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars is not None:
            self._bars.stop()

    def skip(self, i: int) -> None:
        """Run `i` was finished before."""
        self._shares[i] = self._found[i] = 1.0
        self._finished += 1
        if self._finished == len(self.labels):
            self._say(f"all {self._finished} runs were finished before")

    def step(self, i: int, step: int, steps: int) -> None:
        """Run `i` has done `step` of `steps`."""
        self._found.setdefault(i, (step - 1) / steps)
        self._shares[i] = step / steps
        if self._bars is not None:
            if i not in self._tasks:
                self._tasks[i] = self._bars.add_task(self.labels[i], total=1.0, said="")
            self._bars.update(self._tasks[i], completed=self._shares[i])
            self._bars.update(self._all, completed=self._share(), said=self._left())

    def epoch(self, i: int, epoch: EpochResult) -> None:
        """Run `i` has finished an epoch."""
        tested = "" if epoch.test_accuracy is None else f"test {epoch.test_accuracy:.1f} %, "
        said = f"{tested}loss {epoch.train_loss:.3f}"
        if self._bars is not None:
            if i in self._tasks:
                self._bars.update(self._tasks[i], said=said)
        elif time.monotonic() - self._said > _SECONDS_BETWEEN_LINES:
            self._said = time.monotonic()
            self._say(f"{self.labels[i]}: epoch {epoch.epoch} in {epoch.seconds:.0f} s, {said}")

    def finish(self, i: int, test_accuracy: float) -> None:
        """Run `i` is finished."""
        self._shares[i] = 1.0
        self._finished += 1
        if i in self._tasks:
            self._bars.remove_task(self._tasks.pop(i))
        left = f"; {self._left()}" if self._finished < len(self.labels) else ""
        self._say(f"{self._finished}/{len(self.labels)} {self.labels[i]}: test {test_accuracy:.1f} %{left}")

    def _share(self) -> float:
        return self._cost_of(self._shares) / max(sum(self._costs), 1e-9)

    def _cost_of(self, shares: Sequence[float]) -> float:
        return sum(cost * share for cost, share in zip(self._costs, shares, strict=True))

    def _left(self) -> str:
        found = self._cost_of([self._found.get(i, 0.0) for i in range(len(self.labels))])
        gained = self._cost_of(self._shares) - found
        if gained <= 0:
            return ""
        remaining = sum(self._costs) - found - gained
        return f"about {_duration((time.monotonic() - self._started) * remaining / gained)} left"

    def _say(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)
        if self._bars is None:
            sys.stderr.flush()


def _duration(seconds: float) -> str:
    """Seconds in words: "40 s", "3 min", "2 h 5 min"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
