"""The GPU's separable_sum against sums over pairs of tokens in float64: every gradient, values shared or not."""

from typing import NamedTuple

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import glocal
from glocal.kernels import separable_sum

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
    "kernels/triton/separable_sum.py": [
        ("columns behind the last source are read", "there = (along < alongs)[:, None] & inside", "there = inside"),
        (
            "what is summed along the columns is not turned",
            "tl.permute(tl.reshape(tile, [BA, BD, BC]), [1, 0, 2])",
            "tl.reshape(tile, [BD, BA, BC])",
        ),
        ("all heads have the weights of the first along the rows", "        rows += row_strides[0]\n", ""),
        ("all heads have the weights of the first along the columns", "        columns += column_strides[0]\n", ""),
        ("heads with values of their own read the first's", "        source += strides[3]\n", ""),
        (
            "heads are added up where each is written",
            "            total = tl.zeros([BI, BJ * BC], tl.float32)\n    if",
            "    if",
        ),
        (
            "only the first block of source columns is read",
            "for start in range(0, sources_w, BL)",
            "for start in range(0, BL, BL)",
        ),
        (
            "only the first block of source rows is read",
            "for k in range(0, sources_h, BK)",
            "for k in range(0, BK, BK)",
        ),
        (
            "images all read the first",
            "image = (number // (HEADS // each)).to(tl.int64)",
            "image = (number * 0).to(tl.int64)",
        ),
        (
            "the gradient of the weights forgets the last steps",
            "tl.minimum(part * each + each, steps)",
            "tl.minimum(part * each + each, steps - 1)",
        ),
        ("a tile that does not hold all sources is taken for all", 'whole = blocks["BK"] >= sizes[2] and', "whole ="),
    ],
    ("kernels/separable_sum.py", "kernels/test_triton_separable_sum.py", "kernels/test_opcheck.py"): [
        (
            "the gradient of columns is that of the image as it lies",
            "values.transpose(1, 2), above.transpose(1, 2)",
            "values, above",
        ),
        ("calls on a GPU stay in plain PyTorch", "if not gpu.takes(values) or tangents_wanted()", "if values.numel()"),
        (
            "heads that share a source give it back each by itself",
            "found.sum(3, keepdim=True) if shared else found",
            "found",
        ),
    ],
}


class Case(NamedTuple):
    """Lengths of the axes of queries and of sources; `own`: every head has its own values."""

    queries: tuple[int, int]
    sources: tuple[int, int]
    heads: int
    channels: int
    own: bool = False
    batch: int = 2

    def tensors(self, dtype):
        shapes = [(self.heads, q, s) for q, s in zip(self.queries, self.sources, strict=True)]
        shapes.append((self.batch, *self.sources, self.heads if self.own else 1, self.channels))
        weights = [torch.randn(s, device=DEVICE) for s in shapes]
        return [t.to(dtype).requires_grad_() for t in weights]


def of_pairs(rows, columns, values):
    """Each query's weights of all sources, written out."""
    heads = len(rows)
    pairs = (rows[:, :, None, :, None] * columns[:, None, :, None, :]).flatten(3).flatten(1, 2)  # [G, I*J, K*L]
    values = values.expand(-1, -1, -1, heads, -1).flatten(1, 2)
    out = torch.stack([pairs[g] @ values[:, :, g] for g in range(heads)], 2)
    return out.unflatten(1, (rows.shape[1], columns.shape[1]))


CASES = [
    Case((4, 5), (4, 5), 3, 7),
    Case((3, 2), (6, 4), 2, 20, own=True),
    Case((1, 1), (1, 1), 1, 1),
    Case((1, 6), (1, 11), 2, 16, batch=1),
    Case((17, 3), (2, 18), 2, 17),
    Case((3, 19), (18, 2), 2, 5, own=True, batch=1),
    Case((2, 2), (37, 3), 1, 3, batch=1),
    Case((2, 2), (3, 35), 2, 4, batch=1),
    Case((35, 2), (2, 3), 2, 4, batch=3),
    Case((2, 34), (3, 2), 3, 4, own=True, batch=1),
]
MORE = [
    Case((16, 16), (16, 16), 9, 40),
    Case((33, 34), (35, 36), 2, 70),
    Case((16, 8), (32, 16), 4, 66, own=True),
    Case((7, 40), (7, 40), 1, 130),
    Case((40, 7), (9, 40), 3, 65),
]
NAMES = ("the sum", "rows", "columns", "values")


def agree(case, dtype, allowed):
    given = case.tensors(dtype)
    exact = [t.detach().double().requires_grad_() for t in given]
    out, expected = separable_sum(*given), of_pairs(*exact)
    above = torch.randn(expected.shape, device=DEVICE).to(dtype)
    found = [out, *torch.autograd.grad(out, given, above)]
    right = [expected, *torch.autograd.grad(expected, exact, above.double())]
    for name, a, b in zip(NAMES, found, right, strict=True):
        assert a.shape == b.shape and a.dtype == dtype
        off = ((a.double() - b).norm() / b.norm()).item()
        assert off <= allowed, f"{name}: off by {off:.1e} of its norm"  # NaN is no less


ALLOWED = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2.5e-3}


@RUN
@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.usefixtures("kernels_run")
def test_sums_and_gradients(case):
    agree(case, torch.float32, ALLOWED[torch.float32])


@RUN
@pytest.mark.parametrize("dtype", SHORT[1:], ids=str)
@pytest.mark.usefixtures("kernels_run")
def test_short_types(dtype):
    agree(Case((5, 6), (7, 4), 3, 18), dtype, ALLOWED[dtype])


@RUN
@pytest.mark.parametrize("number", [1, 2, 3])
@pytest.mark.parametrize("case", CASES[-6:-4], ids=str)
@pytest.mark.usefixtures("kernels_run")
def test_every_configuration(case, number, monkeypatch):
    take(number, monkeypatch)
    agree(case, torch.float32, ALLOWED[torch.float32])


@WIDE
@RUN
@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("case", CASES + MORE, ids=str)
@pytest.mark.usefixtures("kernels_run")
def test_wide(case, number, dtype, monkeypatch):
    take(number, monkeypatch)
    agree(case, dtype, ALLOWED[dtype])


@RUN
@pytest.mark.parametrize("case", [CASES[0], CASES[1]], ids=str)
@pytest.mark.usefixtures("kernels_run")
def test_second_derivatives(case):
    """The kernels take derivatives of each other: those of a penalty on the gradients."""
    given = case.tensors(torch.float32)
    exact = [t.detach().double().requires_grad_() for t in given]
    found = []
    for function, tensors in ((separable_sum, given), (of_pairs, exact)):
        out = function(*tensors).square().sum()
        penalty = sum(g.square().sum() for g in torch.autograd.grad(out, tensors, create_graph=True))
        found.append(torch.autograd.grad(penalty, tensors))
    for name, a, b in zip(NAMES[1:], *found, strict=True):
        assert (a.double() - b).norm() <= 1e-5 * b.norm(), name


@RUN
@pytest.mark.usefixtures("kernels_run")
def test_any_strides():
    rows, columns, values = (t.detach() for t in Case((4, 5), (6, 7), 2, 8, own=True).tensors(torch.float32))
    expected = of_pairs(*(t.double() for t in (rows, columns, values)))
    apart = values.permute(3, 2, 4, 0, 1).contiguous().permute(3, 4, 1, 0, 2)
    strange = [rows.mT.contiguous().mT, columns.flip(0).contiguous().flip(0), apart]
    assert not any(t.is_contiguous() for t in (strange[0], strange[2]))
    torch.testing.assert_close(separable_sum(*strange).double(), expected, rtol=1e-5, atol=1e-5)
    given = [rows.requires_grad_(), columns.requires_grad_(), values.requires_grad_()]
    ones = torch.autograd.grad(separable_sum(*given).sum(), given)  # an upstream gradient of one number
    exact = [t.detach().double().requires_grad_() for t in given]
    for a, b in zip(ones, torch.autograd.grad(of_pairs(*exact).sum(), exact), strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@RUN
@pytest.mark.parametrize("empty", ["batch", "channels"])
@pytest.mark.usefixtures("kernels_run")
def test_nothing(empty):
    case = Case((2, 3), (3, 2), 2, 0 if empty == "channels" else 4, batch=0 if empty == "batch" else 2)
    given = case.tensors(torch.float32)
    out = separable_sum(*given)
    assert out.shape == (case.batch, 2, 3, 2, case.channels)
    assert all(not g.any() for g in torch.autograd.grad(out.sum(), given))


@RUN
@pytest.mark.usefixtures("kernels_run")
def test_the_operator_calls_it(monkeypatch):
    """And no sum of the heads is made on the way."""
    from glocal.kernels.triton import separable_sum as kernels

    called = []
    original = kernels.separable_sum
    monkeypatch.setattr(kernels, "separable_sum", lambda *given: (called.append(given[3].shape[3]), original(*given)))
    mixer = glocal.build("QuadraticAttention(num_heads=4)", 8).to(DEVICE)
    x = torch.randn(2, 5, 6, 8, device=DEVICE, requires_grad=True)
    mixer(x).sum().backward()
    assert called == [4, 1]  # heads of what is written


@COMPILE
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("number", range(4))
def test_compiled_for_gpus(number, dtype, target, monkeypatch, record_property):
    take(number, monkeypatch)
    case = Case((16, 16), (16, 16), 9, 400, batch=64)
    given = [t.detach().requires_grad_() for t in case.tensors(dtype)]

    def call():
        out = separable_sum(*given)
        torch.autograd.grad(out, given, torch.randn_like(out))

    found = compiled(monkeypatch, target, call)
    assert [name for name, *_ in found] == ["_sum", "_sum", "_products", "_products"]
    assert fits(found, target, record_property)


@WIDE_COMPILE
@COMPILE
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("dtype", SHORT, ids=str)
@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("sides", [(7, 7), (14, 14), (32, 32), (56, 56), (8, 64)], ids=str)
@pytest.mark.parametrize("own", [False, True])
def test_compiled_for_gpus_wide(sides, own, number, dtype, target, monkeypatch, record_property):
    take(number, monkeypatch)
    given = [t.detach().requires_grad_() for t in Case(sides, sides, 4, 48, own=own).tensors(dtype)]
    found = compiled(monkeypatch, target, lambda: torch.autograd.grad(separable_sum(*given).sum(), given))
    assert fits(found, target, record_property)


def test_without_triton_it_is_two_products():
    """On the CPU."""
    given = [t.detach().cpu().double().requires_grad_() for t in Case((4, 5), (6, 3), 3, 7).tensors(torch.float32)]
    torch.testing.assert_close(separable_sum(*given), of_pairs(*given))
    assert torch.autograd.gradcheck(separable_sum, given)


def test_counted_as_two_products():
    """2 for a multiply-add: K*L*J and K*J*I of them for each image, head and channel, and so in backward."""
    rows, columns = torch.randn(3, 4, 6), torch.randn(3, 5, 7)
    values, above = torch.randn(2, 6, 7, 1, 8), torch.randn(2, 4, 5, 3, 8)
    operations = torch.ops.glocal
    for call, pairs in (
        (lambda: operations.separable_sum(rows, columns, values), 6 * 7 * 5 + 6 * 5 * 4),
        (lambda: operations.separable_sum_transposed(rows, columns, above, False), 4 * 5 * 7 + 4 * 7 * 6),
        (lambda: operations.separable_sum_products(columns, values, above), 6 * 7 * 5 + 6 * 5 * 4),
    ):
        with FlopCounterMode(display=False) as counter:
            call()
        assert counter.get_total_flops() == 2 * 2 * 3 * 8 * pairs


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((2, 6, 3, 2, 7), "values: have shape .2, 6, 3, 2, 7., rows .3, 4, 6. and columns .3, 5, 3. need"),
        ((2, 6, 4, 3, 7), "values: are a grid of .6, 4., the weights are for one of .6, 3."),
    ],
)
def test_shapes_that_do_not_fit(shape, message):
    with pytest.raises(ValueError, match=message):
        separable_sum(torch.randn(3, 4, 6), torch.randn(3, 5, 3), torch.randn(shape))


def test_weights_of_one_head_have_its_axis():
    with pytest.raises(ValueError, match=r"rows and columns: have shapes .4, 6. and .3, 5, 3., need"):
        separable_sum(torch.randn(4, 6), torch.randn(3, 5, 3), torch.randn(2, 6, 3, 1, 7))
