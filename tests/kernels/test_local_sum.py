"""local_sum against a loop over taps and positions: every way to share weights, every gradient, every type."""

import itertools
import math
import os
import sys
from typing import NamedTuple

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.nn import functional
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from glocal.kernels import compiled, local_sum

DOUBLE = torch.float64
TYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


class Case(NamedTuple):
    """Shapes of a call; `shared`: the axes of w that have size 1 ("B" batch, "S" all axes of the grid)."""

    grid: tuple[int, ...]
    channels: int
    groups: int
    kernel: tuple[int, ...]
    shared: str = ""
    dilation: int = 1
    left: tuple[int, ...] | None = None
    past: int = 0
    batch: int = 2
    bias: bool = False

    def tensors(self, dtype=DOUBLE):
        out = [n - self.past for n in self.grid]
        images = 1 if "B" in self.shared else self.batch
        places = [1] * len(out) if "S" in self.shared else out
        x = torch.randn(self.batch, *self.grid, self.channels, dtype=dtype, requires_grad=True)
        w = torch.randn(images, *places, self.groups, math.prod(self.kernel), dtype=dtype, requires_grad=True)
        return [x, w, *([torch.randn(self.channels, dtype=dtype, requires_grad=True)] if self.bias else [])]

    def run(self, x, w, bias=None):
        return local_sum(x, w, self.dilation, kernel_size=self.kernel, left=self.left, past=self.past, bias=bias)

    def oracle(self, x, w, bias=None):
        """Tap by tap, by index: what lies outside is picked somewhere and multiplied by zero."""
        left = self.left or tuple(k // 2 for k in self.kernel)
        out = [n - self.past for n in self.grid]
        each = w.expand(self.batch, *out, *w.shape[-2:]).repeat_interleave(self.channels // self.groups, -2)
        y = torch.zeros(self.batch, *out, self.channels, dtype=x.dtype)
        for number, tap in enumerate(itertools.product(*map(range, self.kernel))):
            picked = x
            for axis, (n, length, t, before) in enumerate(zip(out, self.grid, tap, left, strict=True), 1):
                source = torch.arange(n) + self.past + self.dilation * (t - before)
                inside = ((source >= 0) & (source < length)).to(x.dtype)
                picked = picked.index_select(axis, source.clamp(0, length - 1))
                picked = picked * inside.view(-1, *[1] * (x.dim() - 1 - axis))
            y = y + picked * each[..., number]
        return y if bias is None else y + bias


# Vectors hold 8 floats or 4 doubles: groups narrower, as wide, wider and no multiple of that; rows of taps shorter and
# longer than a vector; grids smaller than the kernel; several tasks for a row and for a column.
CASES = [
    Case((13, 9), 24, 24, (3, 3), "BS", bias=True),
    Case((13, 9), 24, 3, (5, 3), "BS", dilation=2),
    Case((6, 21), 12, 12, (7, 7), "BS"),
    Case((3, 4), 8, 8, (11, 11), "BS", bias=True),
    Case((9, 8), 20, 20, (7, 7), "S", bias=True),
    Case((9, 8), 20, 5, (3, 3), "S", dilation=3),
    Case((13, 9), 96, 3, (7, 7)),
    Case((13, 9), 96, 32, (7, 7)),
    Case((5, 6), 10, 10, (3, 3)),
    Case((5, 6), 14, 2, (3, 11)),
    Case((6, 5), 40, 5, (3, 3), dilation=2),
    Case((6, 5), 24, 2, (3, 3), "B", bias=True),
    Case((6, 5), 12, 6, (5, 5), "B"),
    Case((6, 5), 66, 2, (3, 3), dilation=2),
    Case((6, 5), 6, 2, (3, 3), dilation=2),
    Case((4, 5), 9, 3, (2, 4), left=(1, 3)),
    Case((4, 5), 9, 1, (2, 4), "BS", left=(0, 2), bias=True),
    Case((70,), 16, 4, (15,)),
    Case((9,), 12, 4, (3,), "BS", dilation=2),
    Case((9,), 24, 2, (4,), left=(3,), past=3),
    Case((9,), 8, 8, (4,), "BS", left=(3,), past=6, dilation=3, bias=True),
    Case((1, 1), 4, 2, (3, 3)),
    Case((1,), 4, 4, (5,), "BS"),
    Case((2, 300), 4, 4, (3, 9), "BS"),
    Case((40, 6), 4, 4, (9, 1), "BS"),
    # sequences with groups of whole vectors: 12 and 6, 4 and 2, 2 and 1, and 10 and 5 of them
    Case((70,), 96, 2, (3,)),
    Case((150,), 48, 3, (7,), "B", bias=True),
    Case((9,), 40, 1, (15,)),
    Case((70,), 16, 2, (13,), left=(2,)),
    Case((2,), 16, 2, (5,)),
    Case((21,), 64, 4, (4,), left=(3,), past=3),
    # kernels of three taps for all positions and whole vectors of channels
    Case((6, 37), 8, 2, (3, 3), "BS"),
    Case((5, 70), 72, 72, (3, 2), "S", left=(0, 1), bias=True),
    Case((70,), 16, 4, (3,), "BS", bias=True),
    Case((9,), 8, 8, (2,), "S", left=(1,), past=1),
    Case((2, 1), 136, 136, (2, 3), "BS", left=(1, 1), batch=5),
]


def agree(case, dtype, tolerance, cancels=False):
    """The result and the gradients of everything, against the oracle in float64.

    Errors are relative to the largest entry or, where few entries may cancel, to that of the sums of absolute values.
    """
    ours = case.tensors(dtype)
    exact = [t.detach().double().requires_grad_() for t in ours]
    y, expected = case.run(*ours), case.oracle(*exact)
    grad = torch.randn(y.shape, dtype=DOUBLE).to(dtype)
    assert y.dtype == dtype
    found = [y, *torch.autograd.grad(y, ours, grad)]
    wanted = [expected, *torch.autograd.grad(expected, exact, grad.double())]
    scales = wanted
    if cancels:
        sizes = [t.detach().abs().requires_grad_() for t in exact]
        size = case.oracle(*sizes)
        scales = [size, *torch.autograd.grad(size, sizes, grad.double().abs())]
    for name, a, b, scale in zip(["y", "x", "w", "bias"], found, wanted, scales, strict=False):
        largest = scale.abs().max().item() if scale.numel() else 0
        assert_close(a.double(), b, rtol=0, atol=tolerance * max(largest, 1e-3), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_loop(case):
    agree(case, DOUBLE, 1e-13)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_loop_without_a_compiler(case, eager):
    agree(case, DOUBLE, 1e-13)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_is_the_loop_where_plain_pytorch_is_asked_for(case, monkeypatch):
    """As in exported programs and under torch.func: ordinary convolutions are the library's, padded where they lean."""
    monkeypatch.setattr(compiled, "tangents_wanted", lambda: True)
    agree(case, DOUBLE, 1e-13)


@pytest.mark.parametrize("case", CASES[::3], ids=str)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_is_the_loop_in_short_types(case, dtype, tolerance):
    agree(case, dtype, tolerance)


@pytest.mark.parametrize("case", [c for c in CASES if math.prod(c.grid) < 50 and c.channels <= 24][::2], ids=str)
def test_differentiates_twice(case):
    tensors = case.tensors()
    assert gradcheck(case.run, tensors, fast_mode=True)
    assert gradgradcheck(case.run, tensors, fast_mode=True)


@st.composite
def cases(draw):
    rank = draw(st.sampled_from([1, 2]))
    groups, width = draw(st.sampled_from([(1, 1), (7, 1), (5, 3), (3, 8), (2, 12), (1, 40)]))
    kernel = draw(st.sampled_from([(1, 1), (3, 3), (7, 7), (1, 3), (4, 9)]))[-rank:]
    left = tuple(draw(st.integers(0, k - 1)) for k in kernel)
    past = draw(st.sampled_from([0, 0, 1, 4])) if rank == 1 else 0
    grid = tuple(draw(st.integers(1, 23)) + past for _ in range(rank))
    shared, dilation = draw(st.sampled_from(["BS", "S", "B", ""])), draw(st.sampled_from([1, 2]))
    batch, bias = draw(st.integers(0, 3)), draw(st.booleans())
    return Case(grid, groups * width, groups, kernel, shared, dilation, left, past, batch, bias)


@hypothesis.settings(max_examples=int(os.environ.get("GLOCAL_FUZZ", 30)), deadline=None, derandomize=True)
@hypothesis.given(case=cases(), dtype=st.sampled_from(TYPES))
def test_is_the_loop_for_any_shape(case, dtype):
    tolerance = {torch.float64: 1e-14, torch.float32: 1e-6, torch.bfloat16: 1e-2, torch.float16: 2e-3}[dtype]
    agree(case, dtype, tolerance, cancels=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kernel", [3, 7, 13])
def test_errs_no_more_than_the_library(kernel, dtype):
    """Within twice (the library's error in the same type + one rounding), forward and every gradient."""
    x = torch.randn(2, 16, 15, 24, dtype=DOUBLE).to(dtype)
    w = torch.randn(24, 1, kernel, kernel, dtype=DOUBLE).to(dtype)

    def library(x, w):
        return functional.conv2d(x.movedim(-1, 1), w, padding=kernel // 2, groups=24).movedim(1, -1)

    def ours(x, w):
        return local_sum(x, w.view(1, 1, 1, 24, -1))

    def results(run, dtype):
        tensors = [x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()]
        y = run(*tensors)
        return [y, *torch.autograd.grad(y, tensors, torch.ones_like(y))]

    for exact, own, theirs in zip(results(library, DOUBLE), results(ours, dtype), results(library, dtype), strict=True):
        rounding = torch.finfo(dtype).eps * exact.abs().max()
        assert (own - exact).abs().max() <= 2 * ((theirs - exact).abs().max() + rounding)


@pytest.mark.parametrize("case", [c for c in CASES if math.prod(c.grid) > 50], ids=str)
def test_threads_change_no_bit(case, monkeypatch):
    monkeypatch.setattr(sys.modules[local_sum.__module__], "BY_LIBRARY", 1)  # whose own sums depend on them
    tensors = case.tensors(torch.float32)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = case.run(*tensors)
            gradients = torch.autograd.grad(y, tensors, torch.ones_like(y))
            seen.append([y, *(g for g, t in zip(gradients, tensors, strict=True) if t.dim() > 1)])
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        for a, b in zip(seen[0], other, strict=True):
            assert torch.equal(a, b)


def test_small_kernels_on_images_are_the_librarys():
    """With gradients up to three taps along an axis, without up to five: there it was measured to be faster."""
    for kernel, learned, expected in (
        (3, True, True),
        (3, False, True),
        (5, True, False),
        (5, False, True),
        (7, False, False),
    ):
        x, w = torch.randn(1, 9, 9, 8, requires_grad=learned), torch.randn(1, 1, 1, 8, kernel**2)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            local_sum(x, w)
        assert ("glocal::local_sum" not in {event.name for event in profile.events()}) == expected


def test_sums_in_float32():
    """In bfloat16, 256 + 1 is 256 again: a running sum of that width would never leave it."""
    ones = torch.ones(1, 5, 5, 1, dtype=torch.bfloat16)
    terms = torch.tensor([256.0] + [1.0] * 24, dtype=torch.bfloat16)
    assert local_sum(ones, terms.view(1, 1, 1, 1, 25))[0, 2, 2].item() == 280
    assert local_sum(ones, terms.expand(1, 5, 5, 1, 25))[0, 2, 2].item() == 280


@pytest.mark.parametrize("groups", [1, 4])
def test_what_is_not_finite_stays_where_it_is_read(groups):
    """Lanes of a vector that belong to other taps or to no channel must not spread it."""
    x, w = torch.zeros(1, 1, 30, 4), torch.ones(1, 1, 30, groups, 3)
    x[0, 0, 12] = torch.nan
    y = local_sum(x, w, kernel_size=(1, 3))
    assert y.isnan().any(-1).nonzero()[:, 2].tolist() == [11, 12, 13]
    w[0, 0, 20] = torch.inf
    grad = torch.autograd.grad(local_sum(x.requires_grad_(), w, kernel_size=(1, 3)).sum(), x)[0]
    assert grad.isinf().any(-1).nonzero()[:, 2].tolist() == [19, 20, 21]


def test_any_strides_are_taken():
    case = Case((6, 5), 12, 4, (3, 3))
    x, w = case.tensors()
    other = x.detach().movedim(-1, 1).contiguous().movedim(1, -1)
    expanded = w.detach()[:1, :1, :1].expand_as(w)
    assert not other.is_contiguous() and not expanded.is_contiguous()
    assert_close(case.run(other, expanded), case.oracle(x, expanded))


@pytest.mark.parametrize("shared", ["BS", "S", ""])
def test_an_empty_batch_has_empty_or_zero_gradients(shared):
    case = Case((4, 3), 6, 2, (3, 3), shared, batch=0, bias=True)
    tensors = case.tensors()
    y = case.run(*tensors)
    assert y.shape == (0, 4, 3, 6)
    for tensor, gradient in zip(tensors, torch.autograd.grad(y.sum(), tensors), strict=True):
        assert torch.equal(gradient, torch.zeros_like(tensor))


def test_causal_is_the_whole_kernel_on_the_left():
    x, w = torch.randn(2, 7, 4), torch.randn(2, 7, 2, 4)
    assert torch.equal(local_sum(x, w, 2, causal=True), local_sum(x, w, 2, left=3))


@pytest.mark.parametrize("kernel", [3, 7])
def test_a_backward_pass_under_autocast_keeps_its_type(kernel):
    x, w = torch.randn(1, 6, 6, 8, requires_grad=True), torch.randn(1, 1, 1, 8, kernel**2)
    y = local_sum(x, w)
    expected = torch.autograd.grad(y.sum(), x, retain_graph=True)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.autograd.grad(y.sum(), x)[0], expected)


def test_an_empty_grid_has_an_empty_sum():
    w = torch.randn(1, 1, 1, 8, 9)
    assert local_sum(torch.randn(2, 0, 5, 8), w).shape == (2, 0, 5, 8)
    assert local_sum(torch.randn(2, 3, 3, 8), w, past=3).shape == (2, 0, 0, 8)


def test_types_are_promoted_and_autocast_is_followed():
    x, w = torch.randn(1, 5, 5, 8), torch.randn(1, 1, 1, 8, 49)
    assert local_sum(x, w.bfloat16()).dtype == torch.float32
    assert local_sum(x.double(), w).dtype == DOUBLE
    with torch.autocast("cpu", torch.bfloat16):
        y = local_sum(x.requires_grad_(), w)
        assert y.dtype == torch.bfloat16
        assert local_sum(x.double(), w).dtype == DOUBLE
    y.sum().backward()
    assert x.grad.dtype == torch.float32


def test_compiles_whole():
    case = CASES[6]
    tensors = case.tensors()
    compiled_run = torch.compile(case.run, fullgraph=True, backend="aot_eager")
    y, expected = compiled_run(*tensors), case.run(*tensors)
    assert_close(y, expected)
    for a, b in zip(*(torch.autograd.grad(t.sum(), tensors) for t in (y, expected)), strict=True):
        assert_close(a, b)


class Summing(torch.nn.Module):
    def __init__(self, case):
        super().__init__()
        self.case = case
        self.w = torch.nn.Parameter(torch.randn(1, 1, 1, case.groups, 9))

    def forward(self, x):
        positional = x.unflatten(-1, (self.case.groups, -1)).mean(-1, keepdim=True)
        return local_sum(x, self.w) + local_sum(x, self.w * positional, 2)


@pytest.mark.parametrize("groups", [4, 8])
def test_exported_programs_are_plain_pytorch_for_any_grid(groups):
    module, x = Summing(Case((5, 6), 8, groups, (3, 3))), torch.randn(2, 6, 5, 8)
    height, width = torch.export.Dim("height", min=3), torch.export.Dim("width", min=3)
    program = torch.export.export(module, (x,), dynamic_shapes=({1: height, 2: width},))
    assert "glocal" not in str(program.graph)
    for grid in ((6, 5), (3, 9), (11, 4)):
        x = torch.randn(2, *grid, 8)
        assert_close(program.module()(x), module(x))


def test_counts_its_work():
    x, w = torch.randn(2, 5, 4, 6, requires_grad=True), torch.randn(2, 5, 4, 3, 9, requires_grad=True)
    with FlopCounterMode(display=False) as counter:
        local_sum(x, w).sum().backward()
    assert counter.get_total_flops() == 3 * 2 * 2 * 5 * 4 * 6 * 9


def test_refuses_what_does_not_fit():
    x = torch.randn(2, 5, 4, 4)
    for message, w, more in [
        ("left: (3, 3), must be from 0 to (2, 2)", (1, 1, 1, 4, 9), {"left": 3}),
        ("a kernel of (4, 4) has no middle", (1, 1, 1, 4, 16), {}),
        ("3 groups do not divide the 4 channels", (1, 1, 1, 3, 9), {}),
        ("(1, 1, 4, 9), needs [B, *S, G, K**2]", (1, 1, 4, 9), {}),
        ("needs [B, *S, G, 6]", (1, 1, 1, 4, 9), {"kernel_size": (2, 3)}),
        ("its 3 must be 2 (B of x", (3, 5, 4, 4, 9), {}),
        ("its 4 must be 5 (S of x", (2, 4, 4, 4, 9), {}),
        ("bias: has shape (3,), needs [4]", (1, 1, 1, 4, 9), {"bias": torch.zeros(3)}),
    ]:
        with pytest.raises(ValueError) as refused:
            local_sum(x, torch.randn(*w), **more)
        assert message in str(refused.value)


def test_is_the_library_convolution_where_that_is_faster(monkeypatch):
    """Small kernels in float32 need no compiler at all, and a code of ours is not built for them."""
    monkeypatch.setattr(compiled, "load", lambda *a, **k: pytest.fail("compiled"))
    x, w = torch.randn(2, 6, 5, 8), torch.randn(1, 1, 1, 8, 9)
    expected = functional.conv2d(x.movedim(-1, 1), w.view(8, 1, 3, 3), padding=1, groups=8).movedim(1, -1)
    assert_close(local_sum(x, w), expected)


FAULTS = {
    "kernels/local_sum.c": (
        (
            "the first row of taps is left out",
            "sums[TILE][VECS], const real *panel, int64_t pitch, const weights *of, int64_t first,\n"
            "                     int64_t last) {\n",
            "sums[TILE][VECS], const real *panel, int64_t pitch, const weights *of, int64_t first,\n"
            "                     int64_t last) {\n    first++;\n",
        ),
        (
            "weights of a tile are those of its first position",
            "row + MIN(column + i, columns - 1)",
            "row + MIN(column, columns - 1)",
        ),
        (
            "the bias is added to the first block only",
            "bias ? widened(bias[channel]) : 0",
            "bias && !at.channel ? widened(bias[channel]) : 0",
        ),
        (
            "the last slot is not added",
            "slot < (kernel + 1) * slots; slot++",
            "slot < (kernel + 1) * slots - 1; slot++",
        ),
        ("what is sent starts a column too far", "(j - left) * WIDE;", "(j - left + 1) * WIDE;"),
        ("the gradient of kernels of an image is that of all", "image_stride ? images : 1", "1"),
        (
            "a single position at the end of a row sends nothing",
            "for (int n = 0; n < stop - j; n++)",
            "for (int n = 0; n < stop - j - 1; n++)",
        ),
        ("a dilated row of taps is not dilated", "load(row + (i + k * DILATION) * WIDE", "load(row + (i + k) * WIDE"),
    ),
    "kernels/local_sum_narrow.c": (
        ("lanes beyond the row of taps are added", "whole[d] + first_of(part[d], (vec){0})", "whole[d] + part[d]"),
        ("what lies beyond the row is sent, too", "chunk < CHUNKS - 1 ? more : first_of(more, old)", "more"),
        ("planes are a column off", "planes[m * next + n] = widened", "planes[m * next + n + 1] = widened"),
        (
            "only the first channel of a group counts",
            "for (int d = 0; d < D; d++) sum += of[d]",
            "for (int d = 0; d < 1; d++) sum += of[d]",
        ),
    ),
    "kernels/local_sum_row.c": (
        (
            "what is missing is read",
            "if (!inside && (place < 0 || place >= length)) continue;\n        vec source[VECS]",
            "vec source[VECS]",
        ),
        ("sources gather with the taps of the sum", "KW - 1 - (m - i)]", "m - i]"),
        ("sources gather from a place too far", "-column_offset - (KW - 1)", "-column_offset - KW"),
        ("every group has the weights of the first", "*of = of_image + channel / D * KW", "*of = of_image"),
        (
            "the rest of a tile has no product",
            "narrow(to + i * groups * KW",
            "if (inside || !i) narrow(to + i * groups * KW",
        ),
    ),
    "kernels/local_sum_small.c": (
        ("rows outside are read as the first", "return (line){zeros, 0}", "row = 0"),
        ("kernels of an image are those of the first", "(image_stride ? image : 0) * size", "0"),
        (
            "channels of the second part are left out",
            "MIN(first + PART, channels);",
            "MIN(first + PART, channels) * !first;",
        ),
        (
            "the last slot is not added",
            "slot < (job / groups + 1) * slots; slot++",
            "slot < (job / groups + 1) * slots - 1; slot++",
        ),
        (
            "a group's gradient is that of its first channel",
            "c < (job % groups + 1) * group_channels",
            "c < job % groups * group_channels + 1",
        ),
        ("sums begin without the bias", "sums[i] = load(w + TAPS * LANES)", "sums[i] = (vec){0}"),
    ),
    "kernels/grids.h": (
        (
            "the last piece of a row is left out",
            "c.column_pieces = ceiling(g.columns, MAX(c.columns, 1))",
            "c.column_pieces = MAX(g.columns / MAX(c.columns, 1), 1)",
        ),
        ("taps outside are met", "start >= 0 ? 0 : MIN(ceiling(-start, dilation), taps)", "0"),
    ),
    "kernels/local_sum.py": (
        ("the transposed sum does not turn the kernel", "w.flip(-1)", "w"),
        ("the gradient of shared weights is that of one image", "w.sum_to_size(*shape)", "w[:1].sum_to_size(*shape)"),
        (
            "the compiled code is not told of dilation",
            '{"SHARED": 1, "DILATION": dilation}',
            '{"SHARED": 1, "DILATION": 1}',
        ),
        (
            "the bias has no gradient of its own",
            "grad.flatten(0, -2).sum(0) if need_bias",
            "grad.flatten(0, -2)[0] if need_bias",
        ),
        ("exported programs call ours", "torch.compiler.is_exporting() or ", ""),
        ("sums by taps begin at the first tap inside", "[max(-o, 0) for o in offset]", "[0 for o in offset]"),
    ),
}
