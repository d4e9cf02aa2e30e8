"""The GPU's local_sum against sums over gathered sources in float64: every way to share weights, every gradient."""

import itertools
import math
import sys
from typing import NamedTuple

import pytest
import torch

from glocal.kernels import local_sum

from .on_gpu import (
    COMPILE,
    DEVICE,
    RUN,
    SHORT,
    TARGETS,
    WIDE,
    WIDE_COMPILE,
    compiled,
    fits,
    take,
)

FAULTS = {
    "kernels/triton/local_sum.py": [
        ("sources left of a row are read", "(some & (column >= 0) & (column < width))", "(some & (column < width))"),
        ("sources right of a row are read", "(some & (column >= 0) & (column < width))", "(some & (column >= 0))"),
        (
            "sources below the last row are read",
            "seen = some & (row >= 0) & (row < height)\n        for first in range(0, KW //",
            "seen = some & (row >= 0)\n        for first in range(0, KW //",
        ),
        ("runs are numbered over one image only", "return run // runs, row", "return run // runs * 0, row"),
        (
            "outputs of a run lie next to each other whatever the dilation",
            "tl.store(pointer + s * (DILATION * G * D)",
            "tl.store(pointer + s * (G * D)",
        ),
        (
            "runs of a dilation begin where others end",
            "number // DILATION * (RUN * DILATION) + number % DILATION",
            "number * RUN",
        ),
        ("the last taps of a long row are forgotten", "if KW % TAPS:", "if KW < TAPS:"),
        (
            "all but the first taps of a long row are forgotten",
            "range(0, KW // TAPS * TAPS, TAPS)",
            "range(0, TAPS, TAPS)",
        ),
        ("transposed taps are not reversed", "-steps[1] if transposed else steps[1]", "steps[1]"),
        (
            "the transpose takes the weights of the source",
            "(column if TRANSPOSED else out) * W_COLUMN",
            "out * W_COLUMN",
        ),
        (
            "the transpose begins with the weights of the source's row",
            "line = h + offset_h if TRANSPOSED else h",
            "line = h",
        ),
        ("the transpose stays in a row of weights", "weights += w_row * DILATION", "weights += w_row * 0"),
        ("one image's weights serve all", "(image.to(tl.int64) * w_image)", "(image.to(tl.int64) * 0)"),
        ("weights that lie tap by tap are read as if group by group", "(1, groups)", "(taps, 1)"),
        (
            "the last channels of a group are left out",
            "for start in range(0, D, BD)",
            "for start in range(0, D - BD, BD)",
        ),
        ("a part of the runs is counted twice", "begin = part % parts * each", "begin = part % parts * (each - 1)"),
        ("weights of images are sums over all", "part // parts * runs + run", "run"),
        ("the last row of taps is forgotten", "triton.cdiv(heights, down)", "(heights // down)"),
        ("the bias is forgotten", "            value += more", "            value += more * 0"),
    ],
    "kernels/local_sum.py": [
        ("calls on a GPU stay in plain PyTorch", "    if not gpu.takes(x):\n        return None", "    return None"),
    ],
}


class Case(NamedTuple):
    """A call's shapes; `shared`: which axes of w have size 1, "B" that of images, "S" those of the grid."""

    grid: tuple[int, ...]
    channels: int
    groups: int
    kernel: tuple[int, ...]
    shared: str = ""
    dilation: int = 1
    left: tuple[int, ...] | None = None
    past: int = 0
    bias: bool = False
    batch: int = 2

    def tensors(self, dtype):
        out = [n - self.past for n in self.grid]
        places = [1 if "S" in self.shared or str(i) in self.shared else n for i, n in enumerate(out)]
        shape = [1 if "B" in self.shared else self.batch, *places, self.groups, math.prod(self.kernel)]
        shapes = [(self.batch, *self.grid, self.channels), shape, (self.channels,)][: 3 if self.bias else 2]
        return [torch.randn(*s, device=DEVICE).to(dtype).requires_grad_() for s in shapes]

    def run(self, x, w, bias=None):
        options = {"kernel_size": self.kernel, "left": self.left, "past": self.past, "bias": bias}
        return local_sum(x, w, self.dilation, **options)

    def oracle(self, x, w, bias=None):
        """Every source that a tap sees picked by its index out of x with zeros around it."""
        left = self.left or tuple(k // 2 for k in self.kernel)
        margin = max(self.dilation * k for k in self.kernel)
        padded = torch.nn.functional.pad(x, (0, 0, *[margin, margin] * len(self.grid)))
        out = [n - self.past for n in self.grid]
        wide = w.expand(self.batch, *out, *w.shape[-2:])
        y = 0
        for t, tap in enumerate(itertools.product(*map(range, self.kernel))):
            shifted = padded
            for axis, (n, place, before) in enumerate(zip(out, tap, left, strict=True), 1):
                shifted = shifted.narrow(axis, margin + self.past + self.dilation * (place - before), n)
            y = y + (shifted.unflatten(-1, (self.groups, -1)) * wide[..., t, None]).flatten(-2)
        return y if bias is None else y + bias


CASES = [
    Case((5, 4), 24, 24, (3, 3), "BS", bias=True),
    Case((5, 4), 12, 3, (3, 2), "BS", dilation=2, left=(1, 0), batch=1),
    Case((5, 4), 20, 20, (1, 3), "S"),
    Case((5, 4), 12, 2, (3, 3), dilation=2, batch=1),
    Case((2, 3), 6, 6, (3, 1), bias=True),
    Case((3, 2), 6, 2, (1, 3), "B"),
    Case((3, 2), 6, 2, (3, 1), "0", batch=1),
    Case((3, 2), 70, 1, (1, 3), batch=1),
    Case((1, 6), 4, 4, (1, 11), "BS", batch=1),
    Case((1, 10), 2, 2, (1, 17), "BS", batch=1),
    Case((20,), 64, 4, (4,), left=(3,), batch=1),
    Case((9,), 8, 8, (4,), "BS", left=(3,), past=6, dilation=3, bias=True),
    Case((5,), 4, 2, (3,), past=2, left=(2,)),
    Case((1, 1), 1, 1, (3, 3), "BS", bias=True),
    Case((6, 1), 4, 4, (3, 3), "BS"),
    Case((17, 1), 64, 64, (1, 2), "S", left=(0, 1)),
    Case((1, 7), 4, 2, (3, 3), batch=1),
    Case((2, 3), 4, 4, (7, 5), "S", dilation=2),
    Case((2, 3), 4, 2, (5, 7), batch=1),
]
MORE = [
    Case((9, 7), 24, 3, (5, 3), "BS", dilation=2),
    Case((6, 9), 12, 3, (3, 3), "S", dilation=3),
    Case((5, 4), 8, 2, (3, 3), "B1"),
    Case((4, 5), 9, 3, (2, 4), left=(1, 3)),
    Case((1, 1), 4, 2, (3, 3)),
    Case((37,), 12, 4, (15,), "BS", dilation=2),
    Case((70,), 80, 80, (3,), "BS"),
    Case((20, 40), 100, 100, (7, 7), "BS", bias=True),
    Case((14, 14), 96, 3, (7, 7)),
    Case((13, 17), 65, 5, (5, 5), "S", dilation=2),
    Case((31, 9), 12, 12, (13, 13), "BS", batch=1),
    Case((130,), 64, 4, (31,), left=(30,)),
    Case((3, 4), 8, 8, (11, 11), "BS", bias=True),
    Case((1, 1), 1, 1, (3, 3)),
    Case((1,), 1, 1, (1,)),
    Case((1, 9), 5, 5, (5, 5), "S", dilation=3),
    Case((9, 1), 6, 3, (5, 5), "BS", dilation=3),
    Case((2, 2), 6, 2, (9, 9), dilation=2),
    Case((4,), 6, 2, (63,), "S", left=(62,)),
]
TOLERANCES = {torch.float32: 3e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}


def agree(case, dtype):
    """The result and every gradient, against the oracle in float64: errors relative to the largest entry."""
    ours = case.tensors(dtype)
    exact = [t.detach().double().requires_grad_() for t in ours]
    y, expected = case.run(*ours), case.oracle(*exact)
    grad = torch.randn(y.shape, device=DEVICE).to(dtype)
    assert y.dtype == dtype
    found = [y, *torch.autograd.grad(y, ours, grad)]
    wanted = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    for name, a, b in zip(["y", "x", "w", "bias"], found, wanted, strict=False):
        error = (a.double() - b).abs().max()
        assert error <= TOLERANCES[dtype] * b.abs().max().clamp(min=1e-3), f"{name}: off by {error}"


@pytest.fixture(autouse=True)
def never_the_library(request, monkeypatch):
    if "kernels_run" in request.fixturenames:
        module = sys.modules[local_sum.__module__]
        monkeypatch.setattr(module, "_library_is_faster", lambda *_: False)
        monkeypatch.setattr(module, "_sum_by_taps", None)  # not instead of the kernels
        monkeypatch.setattr(module, "_code", None)


@RUN
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("kernels_run")
def test_is_the_sum_over_taps(case):
    agree(case, torch.float32)


@RUN
@pytest.mark.parametrize("dtype", SHORT[1:])
@pytest.mark.parametrize("case", [CASES[1], CASES[4], CASES[11]], ids=str)
@pytest.mark.usefixtures("kernels_run")
def test_is_the_sum_over_taps_in_short_types(case, dtype):
    agree(case, dtype)


@RUN
@WIDE
@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("case", CASES + MORE, ids=str)
@pytest.mark.usefixtures("kernels_run")
def test_is_the_sum_over_taps_at_more_shapes(case, dtype):
    agree(case, dtype)


@RUN
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("case", [CASES[1], CASES[3]], ids=str)
@pytest.mark.usefixtures("kernels_run")
def test_is_the_sum_in_every_configuration(case, number, monkeypatch):
    take(number, monkeypatch)
    agree(case, torch.float32)


@RUN
@pytest.mark.parametrize("case", [CASES[0], CASES[5]], ids=str)
@pytest.mark.usefixtures("kernels_run")
def test_what_no_tap_sees_is_never_touched(case):
    """Not even multiplied by zero: NaN stays where taps see it."""
    x, w = (t.detach() for t in case.tensors(torch.float32)[:2])
    x[0, 0, 0], x[1, -1, -1] = math.nan, math.inf
    found = case._replace(bias=False).run(x, w)
    known = torch.isfinite(case._replace(bias=False).oracle(x.double(), w.double()))
    assert torch.equal(torch.isfinite(found), known)


@RUN
@pytest.mark.usefixtures("kernels_run")
def test_gradients_are_the_same_each_time():
    case = CASES[5]
    tensors = case.tensors(torch.bfloat16)
    y = case.run(*tensors)
    grad = torch.randn(y.shape, device=DEVICE).to(y.dtype)
    first, second = (torch.autograd.grad(y, tensors, grad, retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@RUN
@pytest.mark.usefixtures("kernels_run")
def test_differentiates_twice():
    x, w = CASES[6].tensors(torch.float32)

    def second(run, x, w):
        (first,) = torch.autograd.grad(run(x, w).square().sum(), x, create_graph=True)
        return torch.autograd.grad(first.square().sum(), [x, w])

    exact = [t.detach().double().requires_grad_() for t in (x, w)]
    for a, b in zip(second(CASES[6].run, x, w), second(CASES[6].oracle, *exact), strict=True):
        assert (a - b).abs().max() <= 1e-5 * b.abs().max()


REAL = {
    "static": Case((28, 28), 96, 96, (7, 7), "BS", bias=True, batch=1),
    "per position": Case((28, 28), 96, 3, (7, 7), batch=1),
    "sequence of one": Case((1,), 1, 1, (1,), batch=1),
}
SOME = [
    ("static", torch.bfloat16, 90),
    ("per position", torch.float16, 80),
    ("per position", torch.float32, 90),
    ("sequence of one", torch.bfloat16, 90),
]
ALL = list(itertools.product(REAL, SHORT, TARGETS))


@COMPILE
@pytest.mark.parametrize(
    ("kind", "dtype", "target"),
    [*SOME, *(pytest.param(*each, marks=WIDE_COMPILE) for each in ALL if each not in SOME)],
)
def test_compiles_for_gpus(kind, dtype, target, monkeypatch, record_property):
    module = sys.modules[local_sum.__module__]
    monkeypatch.setattr(module, "_library_is_faster", lambda *_: False)
    case = REAL[kind]
    tensors = [t.detach().cpu().requires_grad_() for t in case.tensors(dtype)]
    found = compiled(monkeypatch, target, lambda: case.run(*tensors).sum().backward())
    assert {name for name, *_ in found} == {"_sum", "_products" if kind == "per position" else "_products_shared"}
    assert fits(found, target, record_property), found


@COMPILE
@WIDE_COMPILE
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", SHORT[:2])
@pytest.mark.parametrize("kind", REAL)
@pytest.mark.parametrize("number", range(1, 4))
def test_every_configuration_compiles(number, kind, dtype, target, monkeypatch, record_property):
    monkeypatch.setattr(sys.modules[local_sum.__module__], "_library_is_faster", lambda *_: False)
    take(number, monkeypatch)
    tensors = [t.detach().cpu().requires_grad_() for t in REAL[kind].tensors(dtype)]
    found = compiled(monkeypatch, target, lambda: REAL[kind].run(*tensors).sum().backward())
    assert fits(found, target, record_property), found
