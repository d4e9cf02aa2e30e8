"""Times of calls that take turns in one process, their peak memory, and what the machine can do at best.

A call and its rivals run interleaved, in an order drawn anew in every round, so that a busy moment meets all of them.
Before it is timed a quick call runs once, so that what ran before it does not decide what is in the caches.
"""

import gc
import random
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from memory import peak_bytes
from torch import Tensor, nn

PASSES = ("forward", "forward+backward")
TURN = 2e-3  # seconds that one timed turn takes at least; quicker calls run several times in it
QUICK = 20e-3  # seconds; such a call runs once, untimed, before its turn


def as_given(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tensors


@dataclass(frozen=True)
class Call:
    """One way to compute something.

    Args:
        function: what is timed: tensors in, a tensor out.
        prepare: the tensors of the case in the form that this way has them in, in a network made for it. Not timed.
        restore: its output in the form of the case. Not timed.
        parameters: what `function` uses besides and has gradients too.
        yardstick: computes something else, with which the time is compared.
        forward_only: has no backward pass.
    """

    function: Callable[..., Tensor]
    prepare: Callable[..., Sequence[Tensor]] = as_given
    restore: Callable[[Tensor], Tensor] = lambda out: out
    parameters: Sequence[Tensor] = ()
    yardstick: bool = False
    forward_only: bool = False

    def to(self, dtype: torch.dtype) -> None:
        """Moves the module that it belongs to, if it does."""
        owner = getattr(self.function, "__self__", self.function)
        if isinstance(owner, nn.Module):
            owner.to(dtype)


def bound(call: Call, tensors: Sequence[Tensor], which: str) -> Callable[[], object]:
    """The call of one pass on tensors of its own. Forward+backward gives the gradients of everything that has one."""
    leaves = [t.detach().clone(memory_format=torch.preserve_format) for t in call.prepare(*tensors)]
    if which == "forward":

        def forward() -> Tensor:
            with torch.no_grad():
                return call.function(*leaves)

        return forward
    leaves = [leaf.requires_grad_(leaf.is_floating_point()) for leaf in leaves]
    wanted = [t for t in [*leaves, *call.parameters] if t.requires_grad]
    out = call.function(*leaves)
    upstream = torch.randn_like(out)  # in the memory layout of the output, as the next layer gives it
    del out
    return lambda: torch.autograd.grad(call.function(*leaves), wanted, upstream)


def interleaved(
    runs: Mapping[str, Callable[[], object]], *, rounds: int = 15, seconds: float = 2.0
) -> dict[str, list[float]]:
    """Seconds of each run, one number for each of its turns.

    Args:
        runs: by name.
        rounds: turns of each; slow ones have fewer, at least three.
        seconds: that the turns of one run may take together.
    """
    order = random.Random(0)
    plan: dict[str, tuple[int, int, bool]] = {}  # calls in a turn, turns, whether one runs before
    for name, run in runs.items():
        run()  # compiles, and takes memory
        took = min(_timed(run, 1) for _ in range(2))
        number = max(1, round(TURN / took))
        quick = took < QUICK
        turns = round(seconds / (took * (number + quick)))
        plan[name] = (number, min(max(turns, 3), rounds), quick)
    times: dict[str, list[float]] = {name: [] for name in runs}
    collecting = gc.isenabled()
    gc.disable()
    try:
        for turn in range(rounds):
            names = list(runs)
            order.shuffle(names)
            for name in names:
                number, turns, quick = plan[name]
                if turn * turns // rounds == (turn + 1) * turns // rounds:
                    continue  # a slow one: its turns are spread over the rounds
                if quick:
                    runs[name]()
                times[name].append(_timed(runs[name], number))
    finally:
        if collecting:
            gc.enable()
    return times


def _timed(run: Callable[[], object], number: int) -> float:
    settle()
    start = time.perf_counter()
    for _ in range(number):
        run()
    settle()
    return (time.perf_counter() - start) / number


def settle() -> None:
    """A GPU, if that is where tensors are made, finishes what it was told to do."""
    if torch.get_default_device().type == "cuda":
        torch.cuda.synchronize()


@dataclass(frozen=True)
class Summary:
    """Of the turns of one call: seconds."""

    median: float
    low: float  # quartiles
    high: float
    minimum: float
    turns: int


def summary(times: Sequence[float]) -> Summary:
    low, _, high = statistics.quantiles(times, n=4, method="inclusive")
    return Summary(statistics.median(times), low, high, min(times), len(times))


def peak(run: Callable[[], object]) -> int:
    """Peak tensor memory of a call above the start, in bytes, as benchmarks/memory.py measures it."""
    run()
    return peak_bytes(run)


def copy_bandwidth(mib: int = 64, times: int = 5) -> float:
    """Bytes a second that torch's copy_ reads and writes, of buffers beyond the caches; the best of some."""
    source = torch.ones(mib * 2**20, dtype=torch.uint8)
    target = torch.empty_like(source)
    target.copy_(source)
    return 2 * source.numel() / min(_timed(lambda: target.copy_(source), 1) for _ in range(times))


def matmul_rate(side: int = 1024, times: int = 5, dtype: torch.dtype = torch.float32) -> float:
    """Multiply-adds a second of a matrix product; the best of some."""
    a, b, out = (torch.randn(side, side).to(dtype) for _ in range(3))
    torch.mm(a, b, out=out)
    return side**3 / min(_timed(lambda: torch.mm(a, b, out=out), 1) for _ in range(times))


@dataclass(frozen=True)
class Floor:
    """What no way to compute a case can be below, in seconds, unless its tensors stay in the caches.

    Args:
        bandwidth: bytes a second.
        rate: multiply-adds a second.
    """

    bandwidth: float
    rate: float

    def seconds(self, which: str, inputs: int, output: int, macs: int) -> float:
        """Every tensor once and every product once; backward reads the inputs and the output's gradient, writes
        the inputs' gradients, and has two products for each one of the forward pass.

        Args:
            which: pass.
            inputs: bytes.
            output: bytes.
            macs: multiply-adds of the forward pass.
        """
        moved, products = inputs + output, macs
        if which != "forward":
            moved, products = moved + 2 * inputs + output, 3 * products
        return max(moved / self.bandwidth, products / self.rate)


def measured_floor() -> Floor:
    return Floor(copy_bandwidth(), matmul_rate())


def better(one: Floor, other: Floor) -> Floor:
    """The lower floor: what the machine did when it was less busy."""
    return Floor(max(one.bandwidth, other.bandwidth), max(one.rate, other.rate))
