"""The commands about operators, as a user calls them: in words, with exit codes, never a traceback."""

import json

import pytest

from glocal import cli
from glocal.kernels import compiled

MINE = """
import torch
from glocal import Aggregation, TokenMixer
from glocal.aggregation import grid_positions

class RowMean(TokenMixer):
    \"\"\"Every token gets the mean of its row.\"\"\"

    def __init__(self, dim):
        super().__init__(dim, rank=2)

    def values(self, source):
        return source.flatten(1, -2).unsqueeze(2)

    def weights(self, x, *, valid=None):
        height, width = x.shape[1:-1]
        rows = torch.arange(height * width).view(height, 1, width).expand(-1, width, -1).flatten(0, 1)
        seen = torch.ones_like(rows[None], dtype=x.dtype) if valid is None else valid.flatten(1)[:, rows].to(x.dtype)
        shares = seen / seen.sum(-1, keepdim=True).clamp(min=1)
        places = grid_positions((height, width))
        grid = (height, width)
        return Aggregation(shares[:, None], rows[None, None], len(places), places, places, grid, grid)

    def fast(self, x, values):
        return x.mean(2, keepdim=True).expand_as(x)
"""

MISTAKES = {
    "transposed grid": ("x.mean(2, keepdim", "x.mean(1, keepdim"),
    "ignored padding": ("seen / seen.sum(-1, keepdim=True).clamp(min=1)", "seen / width"),
    "wrong gradient": ("return x.mean", "x = (x + x.detach()) / 2\n        return x.mean"),
}


@pytest.fixture
def call(tmp_path, capsys):
    def call(*arguments, text=MINE):
        (tmp_path / "mine.py").write_text(text)
        code = cli.main([a.replace("FILE", f"{tmp_path}/mine.py") for a in arguments])
        said = capsys.readouterr()
        assert "Traceback" not in said.err
        return code, said.out, said.err

    return call


def test_a_users_operator_keeps_its_promises(call):
    assert len([line for line in MINE.splitlines() if line.strip()]) <= 20
    code, out, _ = call("check-operator", "FILE:RowMean")
    assert code == 0
    assert "BROKEN" not in out and "keeps all" in out
    lines = {line[8:].partition(":")[0]: line for line in out.splitlines()}
    for kept in ("forward equals definition", "padding changes nothing", "double backward", "compiles", "exports"):
        assert lines[kept].startswith("kept"), lines[kept]
    assert lines["causal reads no later token"].startswith("says")


@pytest.mark.parametrize(
    ("fault", "promise", "grids", "sentence"),
    [
        ("transposed grid", "forward equals definition", "13x7, 8x8", "the output in evaluation differs by "),
        ("ignored padding", "padding changes nothing", "13x7, 8x8", "the padded image differs by "),
        (
            "wrong gradient",
            "forward equals definition",
            "13x7, 8x8, 1x1",
            "the gradient of x in evaluation differs by ",
        ),
    ],
)
def test_a_fault_is_found_and_said(call, fault, promise, grids, sentence):
    old, new = MISTAKES[fault]
    assert MINE.count(old) == 1
    code, out, _ = call("check-operator", "FILE:RowMean", text=MINE.replace(old, new))
    assert code == 1 and "promises broken" in out
    found = out.splitlines()
    start = next(i for i, line in enumerate(found) if line.startswith("BROKEN") and promise in line)
    said = [line.strip() for line in found[start + 1 : start + 4] if line.startswith(" " * 10)]
    on = {grid for line in said for grid in line.removeprefix("on ").partition(":")[0].split(", ")}
    assert on == set(grids.split(", "))
    assert all(sentence in line for line in said), said
    assert "e-" in said[0] or "largest entry" in said[0]  # by how much


def test_the_report_as_json(call):
    code, out, _ = call("check-operator", "FILE:RowMean", "--json")
    outcomes = json.loads(out)
    assert code == 0 and {"check", "spec", "grid", "state", "sentence"} == set(outcomes[0])
    assert {outcome["state"] for outcome in outcomes} == {"kept", "refused"}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["check-operator", "FILE:RowMena"], "did you mean 'RowMean'?"),
        (["check-operator", "FILE:Plain"], "Plain: is a Plain, no operator; derive its class from glocal.TokenMixer"),
        (["check-operator", "nowhere.py:X"], "no file 'nowhere.py'"),
        (["explain-path", "SelfAttention", "--shape", "1", "32"], "--shape: 1 32; give batch, lengths and channels"),
        (["explain-path", "SelfAttention", "--shape", "1", "4", "4", "33"], "32 does not divide 33 channels"),
        (["explain-path", "SelfAttention", "--impl", "quick"], "quick"),
    ],
)
def test_mistakes_are_one_line(call, arguments, said):
    plain = "\nclass Plain(torch.nn.Linear):\n    def __init__(self, dim):\n        super().__init__(dim, dim)\n"
    code, out, err = call(*arguments, text=MINE + plain)
    assert code == 2 and out == "" and len(err.splitlines()) == 1
    assert said in err


@pytest.mark.parametrize(
    ("arguments", "path"),
    [
        ([], "the fast one: the weights are not formed"),
        (["--impl", "reference"], "the definition, as asked; the fast one could run"),
        (["--shape", "0", "7", "7", "64"], None),
    ],
)
def test_paths_are_explained(call, arguments, path):
    code, out, err = call("explain-path", "DepthwiseConv(kernel_size=3)", *arguments)
    if path is None:
        assert code == 2 and "--shape: 0 7 7 64" in err
        return
    lines = dict(
        line.split(maxsplit=1)
        for line in out.splitlines()
        if line and line.split()[0] in ("path", "stored", "dense", "cost")
    )
    assert code == 0 and lines["path"] == path
    assert lines["stored"] == "weights (1, 64, 1, 9), 0.00 MiB"
    assert lines["dense"].startswith(f"weights (1, 64, 3136, 3136), {64 * 3136**2 * 4 / 2**20:,.2f} MiB")
    assert lines["cost"].startswith(f"{3136 * 9 * 64:,} multiply-adds")


@pytest.fixture
def nothing_found(monkeypatch):
    """As in a process of its own."""
    monkeypatch.setattr(compiled, "_found", {})
    monkeypatch.setattr(compiled, "_locks", {})


@pytest.mark.skipif(compiled.unavailable() is not None, reason=str(compiled.unavailable()))
@pytest.mark.parametrize(
    ("operator", "kernel"),
    [
        ("DepthwiseConv(kernel_size=7)", "local_sum: compiled by"),
        (
            "DepthwiseConv(kernel_size=65)",
            "local_sum: the library's or plain PyTorch",
        ),  # longer than ours are built for
        ("WindowAttention(window_size=4)", "window_attention: compiled by"),
        ("NeighborhoodAttention", "neighborhood_attention: compiled by"),
        ("GatedMixture(a=SelfAttention, b=DepthwiseConv)", "gathered_sum: the library's or plain PyTorch"),
    ],
)
def test_kernels_are_named(call, nothing_found, operator, kernel):
    code, out, _ = call("explain-path", operator, "--shape", "2", "8", "8", "32")
    assert code == 0 and f"\nkernel   {kernel}" in out


def test_the_librarys_convolution_is_no_kernel_of_ours(call, nothing_found):
    code, out, _ = call("explain-path", "DepthwiseConv(kernel_size=3)", "--shape", "1", "8", "8", "32")
    assert code == 0 and "kernel   " not in out


def test_a_missing_compiler_is_named(call, monkeypatch, nothing_found):
    monkeypatch.setattr(compiled, "unavailable", lambda: "no C compiler was found")
    code, out, _ = call("explain-path", "DepthwiseConv", "--shape", "1", "8", "8", "32")
    assert code == 0 and "kernel   local_sum: plain PyTorch, since no C compiler was found" in out.splitlines()
    code, out, _ = call("explain-path", "DepthwiseConv", "--shape", "1", "8", "8", "32", "--impl", "reference")
    assert code == 0 and "kernel   " not in out


def test_a_compiler_that_fails_is_named(call, monkeypatch, nothing_found):
    monkeypatch.setattr(compiled, "unavailable", lambda: None)
    monkeypatch.setattr(compiled, "_find", lambda *arguments: "the C compiler failed: no such flag")
    with pytest.warns(UserWarning, match="more slowly: the C compiler failed"):
        code, out, _ = call("explain-path", "DepthwiseConv", "--shape", "1", "8", "8", "32")
    assert code == 0 and "plain PyTorch, since the C compiler failed: no such flag" in out


def test_why_not_the_other_path(call):
    slow = MINE.replace("def fast", "def unused")
    code, out, _ = call("explain-path", "FILE:RowMean", "--shape", "2", "6", "5", "8", text=slow)
    assert code == 0 and "path     the definition; RowMean: has no fast path" in out
    assert "weights (1, 1, 30, 5)" in out
    code, out, _ = call("explain-path", "FILE:RowMean", "--shape", "2", "6", "5", "8", "--impl", "fast", text=slow)
    assert code == 0 and "path     none, the call is refused; RowMean: has no fast path" in out


def test_the_list_is_measured(call, monkeypatch):
    few = ("Convolution", "DepthwiseConv", "SelfAttention", "WindowAttention")
    monkeypatch.setattr("glocal.spec.available", lambda: few)
    with monkeypatch.context() as quick:  # what takes longest is not in the table
        quick.setattr("glocal.analysis.connectivity.connectivity", None)
        code, out, _ = call("list")
    assert code == 0
    rows = {
        line.split("  ")[0]: [cell.strip() for cell in line.split("  ") if cell.strip()] for line in out.splitlines()
    }
    assert rows["Convolution"][1:] == ["1x9x1x1", "local, 9 of 64", "dense", "shared", "own", "no"]
    assert rows["DepthwiseConv"][1:] == ["1x16x1x9", "local, 9 of 64", "separable", "shared", "own", "no"]
    assert rows["SelfAttention"][2:] == ["global, 64 of 64", "separable", "own", "4 groups", "per position"]
    assert rows["WindowAttention"][2:4] == ["local, 16 of 64", "separable"]
    code, out, _ = call("list", "--json")
    found = json.loads(out)
    assert code == 0 and [each["operator"] for each in found] == list(few)
    assert found[1]["weights"] == [1, 16, 1, 9] and found[1]["positions"] == "local" and found[1]["dynamic"] == "no"


def test_the_list_as_a_graph(call, monkeypatch, tmp_path):
    few = (
        *("Convolution", "DepthwiseConv", "DynamicDepthwiseConv", "Gate", "Involution", "LinearTokenMixing"),
        *("LocalMLP", "SelfAttention"),
    )
    monkeypatch.setattr("glocal.spec.available", lambda: few)
    page = tmp_path / "graph.html"
    code, out, _ = call("list", "--graph", str(page))
    assert code == 0 and f"page: {page}" in out
    boxes = {line.split()[0]: line.rstrip() for line in out.splitlines() if line.startswith(few)}  # of the later table
    assert boxes["DepthwiseConv"].endswith("DW-S Conv.") and boxes["Gate"].endswith("-")
    (step,) = [line for line in out.splitlines() if line.startswith("Conv. -> DW-S Conv.")]
    assert "no longer mixes channels" in step and "1 of 1" in step
    (step,) = [line for line in out.splitlines() if line.startswith("ViT -> PVT")]
    assert step.split()[-2:] == ["-", "-"]  # nothing at either end
    text = page.read_text("utf-8")
    assert "LinearTokenMixing" in text and "权重共享" in text
    assert "src=" not in text and "<script" not in text and "<link" not in text
    code, _, said = call("list", "--graph", str(page / "page.html"))
    assert code == 2 and said.count("\n") == 1
