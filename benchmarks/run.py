"""Every operator beside what a user has today, and beside what the machine can do at best.

    python benchmarks/run.py [CASE ...] [--dtype float32] [--repeats 3] [--out results.jsonl] [--picture ratios.svg]

CASE is a name or a pattern such as 'static/*' (`--list` names all); `bars` stands for the cases that something is
required of, beside the peers that this names, and says below them what holds. Without any, all are run, which takes an
hour.

Each case is measured in several processes, since the same call may take twice as long in the next one: times are
medians of the processes' medians, with the quartiles of the one in the middle; ratios are taken within a process, and
their median is printed. `--of minimum` takes the shortest instead of the median time of each process, for a machine
that does other work too. Percent of the floor: the floor's time over the operator's; the floor is every tensor moved
once at the speed of a copy beyond the caches, or every multiply-add at that of a float32 matrix product, whichever
takes longer. Processes keep freed memory, as those that train do: otherwise it is a matter of chance which calls pay
for fresh pages. What fits into the caches may well be above 100 %.
"""

import argparse
import dataclasses
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "src")]

import torch  # noqa: E402
from cases import (  # noqa: E402
    BARS,
    CASES,
    FIRST_LIMIT,
    FIRST_SPECS,
    GPU_CASES,
    LATER_LIMIT,
    OURS,
    SMALL,
    SMALL_CASE,
    Bar,
    named,
)
from picture import draw  # noqa: E402
from timing import PASSES, better, bound, interleaved, measured_floor, peak, summary  # noqa: E402

import glocal  # noqa: E402
from glocal.running import keep_freed_memory  # noqa: E402

MIB = 2**20
DTYPES = {str(t).removeprefix("torch."): t for t in (torch.float32, torch.float64, torch.bfloat16, torch.float16)}
Found = dict[str, Any]  # as it goes through JSON


# In a process of its own


def measure(name: str, dtype: torch.dtype, rounds: int, compiled: bool, memory: bool, judged: bool) -> Found:
    """Both passes of a case: {pass: {call: times}}; a call that fails says why instead.

    judged: only what is required of the case.
    """
    torch.manual_seed(0)
    floor = measured_floor()
    problem = CASES[name].make(compiled)
    if judged:
        wanted = {OURS}.union(*(bar.peers for bar in BARS if bar.case == name))
        problem.calls = {peer: call for peer, call in problem.calls.items() if peer in wanted}
    tensors = [t.to(dtype) for t in problem.tensors]
    for call in problem.calls.values():
        call.to(dtype)
    with torch.no_grad():
        ours = problem.calls[OURS]
        output = ours.function(*ours.prepare(*tensors))
    found: Found = {
        "spec": problem.spec,
        "shape": list(problem.shape),
        "threads": torch.get_num_threads(),
        "output_bytes": output.nbytes,
        "yardsticks": [p for p, call in problem.calls.items() if call.yardstick],
        "gradient_bytes": sum(t.nbytes for t in [*tensors, *ours.parameters]),
        "passes": {},
    }
    inputs = found["gradient_bytes"]
    for which in PASSES:
        runs, refused = {}, {}
        for peer, call in problem.calls.items():
            if which != "forward" and call.forward_only:
                continue
            try:
                runs[peer] = bound(call, tensors, which)
                runs[peer]()
            except Exception as error:  # a rival that cannot do this dtype, this size, this machine
                refused[peer] = f"{type(error).__name__}: {error}".splitlines()[0]
                runs.pop(peer, None)
        times = {peer: dataclasses.asdict(summary(each)) for peer, each in interleaved(runs, rounds=rounds).items()}
        if memory:
            for peer, run in runs.items():
                times[peer]["peak_bytes"] = peak(run)
        floor = better(floor, measured_floor())
        found["passes"][which] = {
            "calls": times,
            "refused": refused,
            "floor": floor.seconds(which, inputs, output.nbytes, problem.macs),
        }
    found["bandwidth"], found["rate"] = floor.bandwidth, floor.rate
    return found


def first_call(spec: str) -> float:
    """Seconds of the first forward and backward of an operator in this process."""
    mixer = glocal.build(spec, SMALL[-1])
    x = torch.randn(SMALL, requires_grad=True)
    torch.nn.functional.conv2d(x.movedim(-1, 1), torch.randn(8, SMALL[-1], 3, 3, requires_grad=True)).sum().backward()
    start = time.perf_counter()
    torch.autograd.grad(mixer(x).sum(), [x, *mixer.parameters()])
    return time.perf_counter() - start


def child(arguments: Sequence[str], environment: dict[str, str]) -> Any:
    """What this file prints as JSON in a fresh process."""
    command = [sys.executable, str(HERE / "run.py"), *arguments]
    done = subprocess.run(command, env=os.environ | environment, capture_output=True, text=True)
    if done.returncode:
        print("\n".join(done.stderr.splitlines()[-5:]), file=sys.stderr)
        return None
    return json.loads(done.stdout.splitlines()[-1])


# What was found


def combined(name: str, dtype: str, of: str, each: Sequence[Found]) -> Iterator[Found]:
    """One row for each pass, from what every process found."""
    for which in PASSES:
        passes = [found["passes"][which] for found in each]
        calls = {peer: [p["calls"][peer] for p in passes] for peer in passes[0]["calls"]}
        row: Found = {"case": name, "spec": each[0]["spec"], "shape": each[0]["shape"], "dtype": dtype, "pass": which}
        row |= {"of": of, "processes": len(each), "threads": each[0]["threads"], "refused": passes[0]["refused"]}
        row |= {key: each[0][key] for key in ("yardsticks", "output_bytes", "gradient_bytes")}
        row["bandwidth_gb_s"] = round(max(found["bandwidth"] for found in each) / 1e9, 2)
        row["matmul_gmac_s"] = round(max(found["rate"] for found in each) / 1e9, 2)
        row["floor_ms"] = 1e3 * min(p["floor"] for p in passes)
        row["calls"] = {}
        for peer, found in calls.items():
            taken = [f[of] for f in found]
            one = {"time_ms": 1e3 * statistics.median(taken), "processes_ms": [1e3 * t for t in taken]}
            one |= {f"{key}_ms": 1e3 * statistics.median(f[key] for f in found) for key in ("low", "high", "minimum")}
            one["peak_bytes"] = found[0].get("peak_bytes")
            if OURS in calls:  # how many times ours this one takes, within a process
                ratios = [t / f[of] for t, f in zip(taken, calls[OURS], strict=True)]
                one |= {"ratio": statistics.median(ratios), "ratio_low": min(ratios), "ratio_high": max(ratios)}
            row["calls"][peer] = one
        if OURS in calls:
            row["percent_of_floor"] = 100 * row["floor_ms"] / row["calls"][OURS]["time_ms"]
        yield row


def show(row: Found) -> None:
    print(
        f"\n{row['case']}: {row['spec']}, {row['dtype']}, {row['pass']}, {row['threads']} threads, {row['of']}",
        flush=True,
    )
    for peer, one in row["calls"].items():
        memory = "" if one["peak_bytes"] is None else f"{one['peak_bytes'] / MIB:8.1f} MiB"
        against = f"{row['percent_of_floor']:5.0f} % of the floor" if peer == OURS else ""
        if peer != OURS and "ratio" in one:
            against = f"{one['ratio']:7.2f} x glocal's time ({one['ratio_low']:.2f} to {one['ratio_high']:.2f})"
        spread = f"({one['low_ms']:.3f} to {one['high_ms']:.3f})"
        print(f"  {peer:<30}{one['time_ms']:10.3f} ms {spread:<22}{memory}  {against}")
    for peer, why in row["refused"].items():
        print(f"  {peer:<30} cannot: {why}", flush=True)


def judged(bar: Bar, row: Found) -> tuple[bool, str]:
    """Whether what is required holds, and the sentence that says so."""
    calls = row["calls"]
    if OURS not in calls:
        return False, f"glocal cannot: {row['refused'].get(OURS)}"
    if bar.kind == "memory":
        share = (calls[OURS]["peak_bytes"] - row["gradient_bytes"]) / row["output_bytes"]
        return share <= bar.limit, f"{share:.2f} x the output besides gradients, at most {bar.limit:g}"
    there = [peer for peer in bar.peers if peer in calls]
    if not there:
        return False, f"no {' or '.join(bar.peers)} to compare with"
    best = min(there, key=lambda peer: calls[peer]["time_ms"])
    faster = calls[best]["ratio"]
    if bar.kind == "faster":
        return faster >= bar.limit, f"{faster:.2f} x faster than {best}, at least {bar.limit:g}"
    return 1 / faster <= bar.limit, f"{1 / faster:.2f} x the time of {best}, at most {bar.limit:g}"


def first_calls(repeats: int) -> Iterator[tuple[bool, str]]:
    """Fresh cache, then the same cache again, each less the time without compiled kernels."""
    for spec in FIRST_SPECS:
        times: dict[str, list[float]] = {"fresh": [], "later": [], "eager": []}
        for _ in range(repeats):
            with tempfile.TemporaryDirectory() as cache:
                for key, more in (("fresh", {}), ("later", {}), ("eager", {"GLOCAL_KERNELS": "eager"})):
                    times[key].append(child(["--first", spec], {"GLOCAL_CACHE": cache, **more}) or math.inf)
        fresh, later, eager = (statistics.median(each) for each in times.values())
        said = f"first call of {spec} on {named(SMALL)}: eager {eager:.3f} s"
        yield fresh - eager <= FIRST_LIMIT, f"{said}, a fresh cache {fresh - eager:+.3f}, at most {FIRST_LIMIT:g}"
        yield later - eager <= LATER_LIMIT, f"{said}, later processes {later - eager:+.3f}, at most {LATER_LIMIT:g}"


def surroundings() -> Found:
    """Where and with what the numbers were taken."""
    try:
        git = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True
        ).stdout
    except OSError:  # a machine without it
        git = ""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        processor = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        processor = platform.processor()
    return {
        "commit": git.strip() or None,
        "machine": f"{platform.machine()}, {processor}, {os.cpu_count()} cores",
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "glocal": glocal.__version__},
    }


def chosen(patterns: Sequence[str]) -> list[str]:
    """The cases meant, in their order; without any all but the tiny ones."""
    required = {bar.case for bar in BARS} | {SMALL_CASE}
    found = []
    for name in CASES:
        whole = not patterns and not name.startswith("tiny/") and name not in GPU_CASES
        if whole or any(fnmatch(name, p) or (p == "bars" and name in required) for p in patterns):
            found.append(name)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE")
    parser.add_argument("--dtype", choices=DTYPES, default="float32")
    parser.add_argument("--repeats", type=int, default=3, help="processes, one after the other")
    parser.add_argument("--rounds", type=int, default=15, help="turns of each call in a process")
    parser.add_argument("--of", choices=("median", "minimum"), default="median")
    parser.add_argument("--compiled", action="store_true", help="peers too that need torch.compile")
    parser.add_argument("--out", type=Path, help="JSON lines are added to this file")
    parser.add_argument("--picture", type=Path, help="SVG of the ratios")
    parser.add_argument("--list", action="store_true", help="names of the cases")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--first", help=argparse.SUPPRESS)
    parser.add_argument("--memory", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--judged", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        keep_freed_memory()
        about = given.child, DTYPES[given.dtype], given.rounds, given.compiled, given.memory, given.judged
        print(json.dumps(measure(*about)))
        return 0
    if given.first:
        print(json.dumps(first_call(given.first)))
        return 0
    names = chosen(given.cases)
    if given.list or not names:
        print("\n".join(CASES))
        return int(not given.list)
    about, rows = surroundings(), []
    for name in names:
        arguments = ["--child", name, "--dtype", given.dtype, "--rounds", str(given.rounds)]
        arguments += ["--compiled"] * given.compiled + ["--judged"] * (given.cases == ["bars"])
        found = [
            child(arguments + ["--memory"] * (i == 0), CASES[name].environment) for i in range(max(given.repeats, 1))
        ]
        if None in found:
            print(f"\n{name}: could not be measured, see above", flush=True)
            continue
        for row in combined(name, given.dtype, given.of, found):
            show(row)
            rows.append(row | about)
            if given.out:
                with given.out.open("a") as file:
                    file.write(json.dumps(rows[-1]) + "\n")
    if given.picture:
        given.picture.write_text(draw(rows))
    return verdict(rows, given.repeats if "bars" in given.cases else 0)


def verdict(rows: Sequence[Found], repeats: int) -> int:
    """Prints what is required of the measured cases; with `repeats`, of first calls too. 1 if anything fails."""
    by_name = {(row["case"], row["pass"]): row for row in rows}
    said = [
        (*judged(bar, by_name[bar.case, bar.which]), f"{bar.case}, {bar.which}: ")
        for bar in BARS
        if (bar.case, bar.which) in by_name
    ]
    print()
    for holds, sentence, where in said:
        print(f"{'pass' if holds else 'FAIL'}  {where}{sentence}", flush=True)
    failed = sum(not holds for holds, *_ in said)
    for holds, sentence in first_calls(repeats) if repeats else ():
        print(f"{'pass' if holds else 'FAIL'}  {sentence}", flush=True)
        failed += not holds
    return int(failed > 0)


if __name__ == "__main__":
    raise SystemExit(main())
