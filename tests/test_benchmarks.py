"""The benchmarks: peers compute what they stand beside, times are times, results can be read again."""

import importlib
import json
import sys
import time
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def bench():
    """Imports files of benchmarks/, which is no package."""
    path, before = list(sys.path), set(sys.modules)
    sys.path.insert(0, str(FOLDER))
    yield importlib.import_module
    sys.path[:] = path
    for name in {file.stem for file in FOLDER.glob("*.py")} - before:
        sys.modules.pop(name, None)


def result_and_gradients(call, tensors):
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out = call.restore(call.function(*call.prepare(*leaves)))
    upstream = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    grads = torch.autograd.grad(out, [*leaves, *call.parameters], upstream)
    return out, grads[: len(leaves)], sorted(g.abs().sum() for g in grads[len(leaves) :])


TINY = (
    "static per-position per-image dynamic-line neighborhood relative separable "
    "window window-module outlook-module muse-module"
)


@pytest.mark.parametrize("name", TINY.split())
def test_every_peer_computes_the_same_and_has_the_same_gradients(bench, name):
    problem = bench("cases").CASES[f"tiny/{name}"].make(False)
    tensors = [t.double() for t in problem.tensors]
    expected = None
    for peer, call in problem.calls.items():
        if call.yardstick:
            continue
        call.to(torch.float64)
        found = result_and_gradients(call, tensors)
        if expected is None:
            assert peer == "glocal"
            expected = found
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9, msg=lambda m, peer=peer: f"{peer}: {m}")
    assert len(problem.calls) > 1 and problem.macs > 0


def test_peers_that_need_compiling_compute_the_same(bench, monkeypatch):
    """As they are written; that compiling keeps it is the compiler's promise."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    for name, peer in (("neighborhood", "FlexAttention, compiled"), ("per-position", "shift-and-sum, compiled")):
        problem = bench("cases").CASES[f"tiny/{name}"].make(True)
        tensors = [t.double() for t in problem.tensors]
        ours, other = (problem.calls[key] for key in ("glocal", peer))
        found = other.restore(other.function(*other.prepare(*tensors)))
        expected = ours.restore(ours.function(*ours.prepare(*tensors)))
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_yardsticks_are_what_they_are_called(bench):
    cases = bench("cases")
    problem = cases.CASES["tiny/per-position"].make(False)
    x, w = problem.tensors
    reading = problem.calls["reading the weights"]
    torch.testing.assert_close(reading.function(*reading.prepare(x, w)), w.sum())
    for name in cases.STATIC:
        call = problem.calls[name]
        assert call.function(*call.prepare(x, w)).shape == (1, 4, 7, 7)
    problem = cases.CASES["tiny/neighborhood"].make(False)
    q, k, v, table = problem.tensors
    dense = problem.calls["SDPA, dense"]
    expected = torch.einsum("bgnm,bmgd->bngd", torch.einsum("bngd,bmgd->bgnm", q, k).softmax(-1), v)
    torch.testing.assert_close(dense.function(*dense.prepare(q, k, v, table)), expected)


def test_each_layout_is_the_one_that_it_is_called(bench):
    problem = bench("cases").CASES["tiny/static"].make(False)
    first, last = (problem.calls[name].prepare(*problem.tensors)[0] for name in bench("cases").LAYOUTS)
    assert first.is_contiguous() and not last.is_contiguous()
    assert last.is_contiguous(memory_format=torch.channels_last)


def test_calls_take_turns_and_the_slow_one_is_slower(bench):
    timing, order = bench("timing"), []

    def waits(name, seconds):
        return lambda: (order.append(name), time.sleep(seconds))

    times = timing.interleaved({"a": waits("a", 0.004), "b": waits("b", 0.012)}, rounds=6)
    a, b = (timing.summary(times[name]) for name in "ab")
    assert a.turns == b.turns == 6
    assert 0.004 <= a.minimum <= a.low <= a.median <= a.high
    assert b.minimum >= 0.012 and b.median > a.median
    assert order[6:] != sorted(order[6:])  # after the warm-up one does not wait for all of the other
    few = timing.interleaved({"slow": waits("slow", 0.03), "quick": lambda: None}, rounds=8, seconds=0.09)
    assert len(few["slow"]) == 3 and len(few["quick"]) == 8
    assert timing.interleaved({"instant": lambda: None}, rounds=3)["instant"][0] < 0.004


def test_backward_gives_every_gradient_and_forward_none(bench):
    timing = bench("timing")
    scale = torch.ones(3, requires_grad=True)
    call = timing.Call(lambda x, index: scale * x[index], parameters=(scale,))
    tensors = torch.randn(5, 3), torch.tensor([1, 2])
    assert len(timing.bound(call, tensors, "forward+backward")()) == 2
    assert not timing.bound(call, tensors, "forward")().requires_grad
    transposed = torch.randn(4, 3, 2).movedim(-1, 0)
    identity = timing.Call(lambda x: x, lambda x: (x,))
    assert timing.bound(identity, (transposed,), "forward")().stride() == transposed.stride()


def test_peak_and_floor(bench):
    timing = bench("timing")
    assert 4 * 2**20 <= timing.peak(lambda: torch.zeros(2**20) + 1) <= 9 * 2**20
    assert 1e8 < timing.copy_bandwidth(8, 2) < 1e13 and 1e7 < timing.matmul_rate(128, 2) < 1e15
    floor = timing.Floor(bandwidth=100.0, rate=10.0)
    assert floor.seconds("forward", 600, 400, 10) == 10  # moving
    assert floor.seconds("forward", 600, 400, 1000) == 100  # multiplying
    assert floor.seconds("forward+backward", 600, 400, 10) == 26
    assert floor.seconds("forward+backward", 600, 400, 1000) == 300


@pytest.fixture
def run(bench, monkeypatch):
    """Runs the command in this process, its children too; gives what it returned."""
    module = bench("run")

    def main(*arguments):
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
        return module.main()

    def child(arguments, environment):
        given = dict(zip(arguments[:6:2], arguments[1:6:2], strict=True))
        flags = {"--memory", "--judged"} & {*arguments}
        assert len(arguments) == 6 + len(flags)
        about = given["--child"], torch.float32, int(given["--rounds"]), False
        found = module.measure(*about, "--memory" in flags, "--judged" in flags)
        return json.loads(json.dumps(found))

    monkeypatch.setattr(module, "child", child)
    monkeypatch.setattr(module, "measured_floor", lambda: bench("timing").Floor(1e10, 1e10))
    return main


def test_results_are_printed_written_and_drawn(bench, run, tmp_path, capsys):
    out, picture = tmp_path / "results.jsonl", tmp_path / "ratios.svg"
    arguments = ("tiny/static", "--repeats", "2", "--rounds", "3", "--out", str(out), "--picture", str(picture))
    assert run(*arguments) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["pass"] for row in rows] == ["forward", "forward+backward"]
    for row in rows:
        assert (row["case"], row["dtype"], row["shape"]) == ("tiny/static", "float32", [1, 7, 7, 4])
        assert row["processes"] == 2 and row["threads"] >= 1 and row["machine"] and row["versions"]["torch"]
        assert set(row["calls"]) == {"glocal", "conv2d, NCHW", "conv2d, channels last", "unfold", "shift-and-sum"}
        for one in row["calls"].values():
            assert len(one["processes_ms"]) == 2 and 0 < one["minimum_ms"] <= one["time_ms"]
            assert one["ratio_low"] <= one["ratio"] <= one["ratio_high"] and one["peak_bytes"] >= row["output_bytes"]
        assert row["calls"]["glocal"]["ratio"] == 1 and row["percent_of_floor"] > 0
    assert "x glocal's time" in capsys.readouterr().out
    drawn = picture.read_text()
    assert drawn.startswith("<svg xmlns") and "tiny/static" in drawn and drawn.count("<title>") == 2


def test_only_what_is_required_is_measured_where_only_that_is_asked_for(bench, run, monkeypatch, tmp_path):
    module = bench("run")
    bar = bench("cases").Bar("tiny/static", "forward", ("unfold",), 0.0)
    monkeypatch.setattr(module, "BARS", [bar])
    monkeypatch.setattr(module, "SMALL_CASE", "tiny/static")
    monkeypatch.setattr(module, "first_calls", lambda repeats: [])
    out = tmp_path / "results.jsonl"
    assert run("bars", "--repeats", "1", "--rounds", "3", "--out", str(out)) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [sorted(row["calls"]) for row in rows] == [["glocal", "unfold"]] * 2


def test_a_rival_that_fails_is_said_in_a_sentence(bench, run, monkeypatch, capsys):
    def fails(x, w):
        raise RuntimeError("not on this machine")

    monkeypatch.setattr(bench("peers"), "SHIFT", bench("timing").Call(fails))
    assert run("tiny/per-image", "--repeats", "1", "--rounds", "3") == 0
    assert "shift-and-sum" in (said := capsys.readouterr().out) and "cannot: RuntimeError: not on this machine" in said


def row_of(ours, *others):
    calls = {"glocal": {"time_ms": ours, "ratio": 1.0, "peak_bytes": 700}}
    calls |= {f"peer {i}": {"time_ms": t, "ratio": t / ours} for i, t in enumerate(others)}
    return {"calls": calls, "output_bytes": 200, "gradient_bytes": 400, "refused": {}}


@pytest.mark.parametrize(
    ("kind", "limit", "others", "holds"),
    [
        ("faster", 3, (7.0, 6.0), True),
        ("faster", 3, (7.0, 5.9), False),  # the quickest peer counts
        ("time", 0.5, (4.0,), True),
        ("time", 0.4, (4.0,), False),
        ("memory", 1.5, (), True),
        ("memory", 1.4, (), False),
        ("faster", 1, (), False),  # nothing to compare with
    ],
)
def test_what_is_required(bench, kind, limit, others, holds):
    bar = bench("cases").Bar("a", "forward", ("peer 0", "peer 1"), limit, kind)
    assert bench("run").judged(bar, row_of(2.0, *others))[0] is holds


def test_every_bar_names_a_case_and_its_peers(bench):
    cases = bench("cases")
    for bar in cases.BARS:
        assert bar.case in cases.CASES and bar.which in bench("timing").PASSES
    assert set(cases.LAYOUTS) <= set(cases.CASES["tiny/static"].make(False).calls)
    assert {*cases.STATIC, "unfold", "reading the weights"} <= set(cases.CASES["tiny/per-position"].make(False).calls)
    assert {*cases.STATIC, *cases.GROUPED} <= set(cases.CASES["tiny/per-image"].make(False).calls)
    assert set(cases.FUSED) <= set(cases.CASES["tiny/window"].make(False).calls)
    assert "SDPA, dense" in cases.CASES["tiny/neighborhood"].make(False).calls
    assert bench("run").chosen(["bars"])[0] == "static/8x56x56x96/K7"
    assert not any(name.startswith("tiny/") for name in bench("run").chosen([]))


def test_what_runs_on_a_gpu_is_compared_and_measured(bench, tmp_path, monkeypatch, capsys):
    """Tried out on the CPU; the times mean nothing there."""
    out = tmp_path / "results.jsonl"
    options = ["--device", "cpu", "--dtype", "float32", "--rounds", "3", "--no-compiled", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "tiny/static", "tiny/window", *options])
    assert bench("gpu").main() == 0
    rows = [json.loads(line) for line in out.read_text("utf-8").splitlines()]
    assert {(row["case"], row["pass"]) for row in rows} == {
        (case, which) for case in ("tiny/static", "tiny/window") for which in ("forward", "forward+backward")
    }
    for row in rows:
        assert row["error"] < 1e-5 and row["bandwidth_gb_s"] > 0
        assert not row["refused"] and all(call["ms"] > 0 for call in row["calls"].values())
        assert row["percent_of_floor"] == pytest.approx(100 * row["floor_ms"] / row["calls"]["glocal"]["ms"])
    assert "% of the floor" in capsys.readouterr().out


def test_what_compiles_is_compiled_ahead_by_other_processes(bench, tmp_path, monkeypatch, capsys):
    options = ["--device", "cpu", "--dtype", "float32", "--rounds", "3", "--no-compiled", "--processes", "2"]
    monkeypatch.setattr(sys, "argv", ["gpu.py", "tiny/static", *options])
    assert bench("gpu").main() == 0
    said = capsys.readouterr().out
    assert "compiled in" in said and "compiled ahead:" not in said


def test_every_configuration_is_compiled_and_none_is_kept(bench, monkeypatch):
    tuning = pytest.importorskip("glocal.kernels.triton.tuning")
    before, taken = tuning._choice, []

    def run():
        taken.append(tuning._choice(None, (), ["a", "b", "c"], None, None))
        if taken[-1] == 1:
            raise RuntimeError("too much memory")

    bench("ahead").every_configuration(run)
    assert set(taken) == {0, 1, 2} and taken[:3] == [0, 1, 2]
    assert tuning._choice is before


def test_a_wrong_kernel_is_not_measured(bench, monkeypatch):
    gpu, timing = bench("gpu"), bench("timing")
    case = gpu.CASES["tiny/static"]
    make = lambda compiled: [p := case.make(compiled), p.calls.update(glocal=spoilt(p.calls["glocal"]))][0]  # noqa: E731

    def spoilt(call):
        return timing.Call(lambda x, w: call.function(x, w) * (1.1 if x.dtype == torch.float32 else 1))

    monkeypatch.setitem(gpu.CASES, "tiny/static", type(case)(make))
    floor = timing.Floor(1e9, 1e9)
    (row,) = gpu.measure("tiny/static", torch.device("cpu"), torch.float32, 3, False, floor)
    assert "off by" in row["wrong"]


def test_networks_beside_timms(bench, monkeypatch, tmp_path, capsys):
    pytest.importorskip("timm")
    out = tmp_path / "models.jsonl"
    small = ["--batch", "2", "--size", "32", "--rounds", "3", "--seconds", "1"]
    monkeypatch.setattr(sys, "argv", ["models.py", "resnet50", *small, "--out", str(out)])
    bench("models").main()
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [(row["model"], row["pass"]) for row in rows] == [("resnet50", "forward"), ("resnet50", "step")]
    for row in rows:
        assert set(row["ms"]) == {"glocal", "timm", "timm, channels last"} and row["rival"] != "glocal"
        assert row["ratio"] > 0 and row["percent_of_floor"] > 0
    assert "x faster than timm" in capsys.readouterr().out
