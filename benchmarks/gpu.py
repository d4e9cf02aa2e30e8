"""Every operator with kernels for GPUs beside what a user has today, and beside what the device can do at best.

    python benchmarks/gpu.py [CASE ...] [--dtype bfloat16] [--out results.jsonl] [--seconds 540] [--no-compiled]
                             [--processes N]

CASE is a name or a pattern; without any, all with a batch of 128. Each call is timed by events of the device, which is
kept busy until all of the call is queued; over inputs of which there are so many that its cache does not hold them.
Before a case is timed, its result and gradients are compared with those of float64 in plain PyTorch on some of
the images. Percent of the floor: every tensor moved once at the speed of a copy in this process, or every multiply-add
at that of a matrix product of this dtype, whichever takes longer; the floor's time over the operator's. No case is
begun after --seconds. First N processes compile what is to be timed, each a case at a time. JSON lines, one for each
case and pass, are added to --out.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]

import torch  # noqa: E402
from ahead import compile_ahead, every_configuration, spare_cores  # noqa: E402
from cases import CASES, GPU_CASES, OURS, Problem  # noqa: E402
from run import surroundings  # noqa: E402
from timing import PASSES, Call, Floor, bound  # noqa: E402
from torch import Tensor  # noqa: E402

DTYPES = {str(t).removeprefix("torch."): t for t in (torch.bfloat16, torch.float16, torch.float32)}
CACHES = 4  # times the cache, that the inputs of one call are together
MOST_SETS = 8
ERRORS = {torch.float32: 2e-3, torch.bfloat16: 2e-2, torch.float16: 4e-3}  # of a result, relative to its norm
QUEUED = 4_000_000  # cycles, about two milliseconds: longer than a call takes on the host
CHECKED = 2  # images whose results are compared


def elapsed(device: torch.device, run: Callable[[], object]) -> float:
    """Seconds."""
    if device.type == "cpu":  # for trying this file out
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda._sleep(QUEUED)
    first.record()
    run()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def measured_floor(device: torch.device, dtype: torch.dtype, large: bool) -> Floor:
    """The best of some copies and matrix products."""
    source = torch.randn(2**28 if large else 2**20, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    copy = min(elapsed(device, lambda: target.copy_(source)) for _ in range(10))
    side = 8192 if large else 256
    a, b = torch.randn(2, side, side, device=device).to(dtype).unbind(0)
    out = a @ b
    product = min(elapsed(device, lambda: torch.mm(a, b, out=out)) for _ in range(10))
    return Floor(2 * source.nbytes / copy, side**3 / product)


def cache_bytes(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).L2_cache_size if device.type == "cuda" else 0


def gradients(call: Call, tensors: Sequence[Tensor], upstream: Tensor | None = None) -> tuple[list[Tensor], Tensor]:
    """The result and the gradients of a case's tensors, and the gradient of the result."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = call.restore(call.function(*call.prepare(*leaves)))
    upstream = torch.randn(out.shape, device=out.device).to(out.dtype) if upstream is None else upstream
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream)], upstream


def error(problem: Problem, tensors: Sequence[Tensor]) -> float:
    """The largest ||found - exact|| / ||exact|| of the result and the gradients, of the first images."""
    batch = tensors[0].shape[0]
    some = [t[:CHECKED] if t.shape[0] == batch else t for t in tensors]
    found, upstream = gradients(problem.calls[OURS], some)
    exact, _ = gradients(problem.calls[OURS], [t.double() for t in some], upstream.double())
    worst = 0.0
    for a, b in zip(found, exact, strict=True):
        off = ((a.double() - b).norm() / b.norm()).item()
        worst = off if not off <= worst else worst  # NaN stays
    return worst


def sets(tensors: Sequence[Tensor], cache: int) -> int:
    return min(max(-(-CACHES * cache // max(sum(t.nbytes for t in tensors), 1)), 1), MOST_SETS)


def timed(runs: Sequence[Callable[[], object]], device: torch.device, rounds: int) -> list[float]:
    """Seconds of each turn of a call that has several sets of inputs."""
    for run in [*runs, runs[0]]:
        run()
    return [elapsed(device, runs[turn % len(runs)]) for turn in range(rounds)]


def peak(run: Callable[[], object], device: torch.device) -> int | None:
    """Bytes above what was there before the call."""
    if device.type == "cpu":
        return None
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    run()
    return torch.cuda.max_memory_allocated(device) - before


def made(name: str, device: torch.device, dtype: torch.dtype, compiled: bool) -> tuple[Problem, list[Tensor]]:
    """A case and its tensors."""
    torch.manual_seed(0)
    with device:
        problem = CASES[name].make(compiled)
    for call in problem.calls.values():
        call.to(dtype)
    return problem, [t.to(dtype) for t in problem.tensors]


def compile_case(name: str, device: str, dtype: str, compiled: bool) -> None:
    """Once through all that compiles."""
    problem, tensors = made(name, torch.device(device), DTYPES[dtype], compiled)
    for peer, call in problem.calls.items():
        for which in PASSES:
            if peer == OURS:
                every_configuration(bound(call, tensors, which))
            elif "compiled" in peer and not (call.forward_only and which != "forward"):
                bound(call, tensors, which)()


def measure(
    name: str, device: torch.device, dtype: torch.dtype, rounds: int, compiled: bool, floor: Floor
) -> list[dict[str, Any]]:
    """One row for each pass."""
    problem, tensors = made(name, device, dtype, compiled)
    off = error(problem, tensors)
    about = {"case": name, "spec": problem.spec, "shape": list(problem.shape), "dtype": str(dtype), "error": off}
    if not off <= ERRORS[dtype]:
        return [about | {"wrong": f"off by {off:.2e} of its norm"}]
    with torch.no_grad():
        ours = problem.calls[OURS]
        output = ours.function(*ours.prepare(*tensors)).nbytes
    rows, count = [], sets(tensors, cache_bytes(device))
    inputs = sum(t.nbytes for t in [*tensors, *ours.parameters])
    for which in PASSES:
        seconds = floor.seconds(which, inputs, output, problem.macs)
        row: dict[str, Any] = about | {"pass": which, "floor_ms": 1e3 * seconds, "sets": count, "calls": {}}
        row["refused"] = {}
        for peer, call in problem.calls.items():
            if which != "forward" and call.forward_only:
                continue
            try:
                runs = [bound(call, [torch.randn_like(t) for t in tensors], which) for _ in range(count)]
                times = timed(runs, device, rounds)
            except Exception as why:  # no such kernel, not enough memory
                row["refused"][peer] = f"{type(why).__name__}: {why}".splitlines()[0]
                runs = []  # what it held, the next one may need
                continue
            low, median, high = statistics.quantiles(times, n=4, method="inclusive")
            row["calls"][peer] = {"ms": 1e3 * median, "low_ms": 1e3 * low, "high_ms": 1e3 * high}
            row["calls"][peer]["peak_bytes"] = peak(runs[0], device)
            row["calls"][peer]["yardstick"] = call.yardstick
            del runs
        if OURS in row["calls"]:
            mine = row["calls"][OURS]["ms"]
            row["percent_of_floor"] = 100 * row["floor_ms"] / mine
            for one in row["calls"].values():
                one["ratio"] = one["ms"] / mine
        rows.append(row)
    return rows


def show(row: dict[str, Any]) -> None:
    if "wrong" in row:
        print(f"{row['case']}: WRONG, {row['wrong']}", flush=True)
        return
    print(f"{row['case']}, {row['pass']}, floor {row['floor_ms']:.3f} ms, error {row['error']:.1e}")
    for peer, one in row["calls"].items():
        memory = "" if one["peak_bytes"] is None else f"{one['peak_bytes'] / 2**20:9.1f} MiB"
        share = f"{row['percent_of_floor']:5.0f} % of the floor" if peer == OURS else f"{one['ratio']:6.2f} x"
        print(f"  {peer:<30}{one['ms']:9.3f} ms ({one['low_ms']:.3f} to {one['high_ms']:.3f}) {memory} {share}")
    for peer, why in row["refused"].items():
        print(f"  {peer:<30} cannot: {why[:100]}")
    sys.stdout.flush()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--seconds", type=float, default=540)
    parser.add_argument("--no-compiled", action="store_true", help="without the peers that need torch.compile")
    parser.add_argument("--processes", type=int, help="that compile ahead; on a GPU all cores but two, else none")
    parser.add_argument("--out", type=Path, help="JSON lines are added to this file")
    given = parser.parse_args()
    begun, device = time.monotonic(), torch.device(given.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device: there is no GPU here; --device cpu tries the command out, its times mean nothing")
    names = [n for n in CASES if any(fnmatch(n, p) for p in given.cases)] if given.cases else GPU_CASES
    if not names:
        parser.error(f"CASE: none of {' '.join(given.cases)}; there are {', '.join(GPU_CASES)}")
    dtype, compiled = DTYPES[given.dtype], not given.no_compiled
    processes = given.processes if given.processes is not None else spare_cores() if device.type == "cuda" else 0
    if processes:
        work = partial(compile_case, device=given.device, dtype=given.dtype, compiled=compiled)
        compile_ahead(work, names, processes)
        print(f"compiled in {time.monotonic() - begun:.0f} s", flush=True)
    floor = measured_floor(device, dtype, device.type == "cuda")
    about = surroundings() | {"bandwidth_gb_s": floor.bandwidth / 1e9, "matmul_gmac_s": floor.rate / 1e9}
    if device.type == "cuda":
        about |= {"device": torch.cuda.get_device_name(device), "cuda": torch.version.cuda}
    print(json.dumps(about), flush=True)
    wrong = 0
    for i, name in enumerate(names):
        if time.monotonic() - begun > given.seconds:
            print(f"no time is left for {', '.join(names[i:])}")
            break
        for row in measure(name, device, dtype, given.rounds, compiled, floor):
            show(row)
            wrong += "wrong" in row
            if given.out:
                with given.out.open("a") as file:
                    file.write(json.dumps(row | about) + "\n")
        if device.type == "cuda":
            torch.cuda.empty_cache()
    return int(wrong > 0)


if __name__ == "__main__":
    raise SystemExit(main())
