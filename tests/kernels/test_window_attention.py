"""Window attention against the dense one: every token to every token, in float64, where a mask lets it."""

import importlib
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from glocal.kernels import window_attention

kernel = importlib.import_module("glocal.kernels.window_attention")

CASES = [  # grid, window, shift, heads, channels of a head
    ((8, 8), (4, 4), 2, 2, 8),
    ((7, 9), (4, 4), 0, 2, 8),
    ((7, 9), (4, 4), 3, 1, 5),
    ((6, 10), (2, 5), 1, 3, 4),
    ((9, 3), (4, 5), 2, 2, 3),
    ((3, 2), (4, 4), 2, 1, 1),
    ((1, 1), (2, 3), 1, 2, 4),
    ((5, 4), (1, 1), 0, 1, 33),
    ((16, 15), (7, 7), 3, 1, 32),
    ((10, 17), (8, 9), 4, 1, 60),
    ((11,), (4,), 0, 2, 4),
    ((11,), (4,), 3, 2, 9),
    ((3,), (5,), 1, 1, 2),
    ((70,), (61,), 30, 1, 8),
]
WHERE = {(g, w, s): f"{'x'.join(map(str, g))}-{'x'.join(map(str, w))}-{s}" for g, w, s, _, _ in CASES}
cases = pytest.mark.parametrize("case", CASES, ids=list(WHERE.values()))
layouts = pytest.mark.parametrize("layout", ["cut", "rolled", "extents"])


def inputs(case, layout="cut", *, batch=2, dtype=torch.float64, table=True, seed=0):
    """qkv, the table, and the arguments that describe them."""
    grid, window, shift, heads, width = case
    random = torch.Generator().manual_seed(seed)
    arguments = {"num_heads": heads, "window_size": window, "shift_size": shift}
    if layout == "rolled":
        arguments["rolled_size"] = grid
        grid = [n if n <= w else math.ceil(n / w) * w for n, w in zip(grid, window, strict=True)]
    if layout == "extents":
        each = [torch.randint(1, n + 1, (batch,), generator=random) for n in grid]
        arguments["extents"] = torch.stack(each, -1)
    qkv = torch.randn(batch, *grid, 3 * heads * width, generator=random, dtype=torch.float64)
    entries = torch.randn(math.prod(2 * w - 1 for w in window), heads, generator=random, dtype=torch.float64)
    qkv = qkv.to(dtype).requires_grad_()
    return qkv, entries.to(dtype).requires_grad_() if table else None, arguments


def axis(n, window, shift, size, extent):
    """(what it shares with those it sees, its place) for each of the n tokens of an axis; None outside."""
    if size is None:
        shift = shift if extent > window else 0
        return [((t - shift) // window if extent > window else 0, t) if t < extent else None for t in range(n)]
    if size <= window:
        return [(0, t) for t in range(n)]
    found = [None] * n
    for place in range(n):
        token = (place + shift) % size if place < size else place
        region = 0 if place < n - window else 1 if place < n - shift else 2
        found[token] = ((place // window, region if shift else 0), place)
    return found


def dense(qkv, table, *, num_heads, window_size, shift_size, extents=None, rolled_size=None):
    grid, outs = qkv.shape[1:-1], []
    for b, image in enumerate(qkv):
        axes = []
        for a, (n, window) in enumerate(zip(grid, window_size, strict=True)):
            size = None if rolled_size is None else rolled_size[a]
            axes.append(axis(n, window, shift_size, size, n if extents is None else int(extents[b, a])))
        tokens = list(itertools.product(*axes))
        seen = torch.zeros(len(tokens), len(tokens), dtype=torch.bool)
        entry = torch.zeros(len(tokens), len(tokens), dtype=torch.long)
        for i, query in enumerate(tokens):
            for j, source in enumerate(tokens):
                if None in query or None in source or any(q[0] != s[0] for q, s in zip(query, source, strict=True)):
                    continue
                seen[i, j] = True
                for q, s, window in zip(query, source, window_size, strict=True):
                    entry[i, j] = entry[i, j] * (2 * window - 1) + q[1] - s[1] + window - 1
        q, k, v = image.reshape(len(tokens), 3, num_heads, -1).permute(1, 2, 0, 3)
        scores = q @ k.transpose(1, 2) / math.sqrt(q.shape[-1])
        if table is not None:
            scores = scores + table[entry].movedim(-1, 0)
        weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1) * seen
        outs.append((weights @ v).transpose(0, 1).reshape(*grid, -1))
    out = torch.stack(outs)
    for a, size in enumerate(rolled_size or ()):
        out = out.narrow(a + 1, 0, size)
    return out


def gradients(function, qkv, table, arguments, grad):
    given = [t for t in (qkv, table) if t is not None]
    out = function(qkv, table, **arguments)
    found = torch.autograd.grad(out, given, grad.to(out.dtype), allow_unused=True)
    return [out, *(torch.zeros_like(t) if g is None else g for t, g in zip(given, found, strict=True))]


def same(qkv, table, arguments, **tolerance):
    grad = torch.randn(window_attention(qkv, table, **arguments).shape, dtype=qkv.dtype)
    mine, other = (gradients(f, qkv, table, arguments, grad) for f in (window_attention, dense))
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, **tolerance)


@cases
@layouts
def test_is_the_dense_one(path, case, layout):
    same(*inputs(case, layout))


@layouts
def test_without_a_table_is_the_dense_one(path, layout):
    same(*inputs(CASES[2], layout, table=False))


@pytest.mark.parametrize("layout", ["cut", "extents"])
def test_many_parts_for_one_task(layout):
    """More of them, and more heads, than there are tasks: what a thread keeps from the last part must not stay."""
    qkv, table, arguments = inputs(((26, 17), (4, 4), 1, 9, 3), layout, batch=5)
    grad = torch.randn(5, 26, 17, 27, dtype=torch.float64)
    mine = gradients(window_attention, qkv, table, arguments, grad)
    layout = [arguments.get(name) for name in ("extents", "num_heads", "window_size", "shift_size", "rolled_size")]
    other = gradients(lambda qkv, table, **_: kernel._eager(qkv, table, *layout), qkv, table, arguments, grad)
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", ["cut", "rolled"])
def test_precision(dtype, layout):
    """Within twice the error of plain PyTorch of that width and one rounding."""
    qkv, table, arguments = inputs(CASES[8], layout, dtype=dtype)
    exact = [t.detach().double().requires_grad_() for t in (qkv, table)]
    grad = torch.randn(2, 16, 15, 32).to(dtype)
    truth = gradients(dense, *exact, arguments, grad.double())
    plain, mine = (gradients(f, qkv, table, arguments, grad) for f in (dense, window_attention))
    for a, b, true in zip(mine, plain, truth, strict=True):
        assert a.dtype == dtype
        rounding = torch.finfo(dtype).eps * true.abs().max()
        assert (a - true).abs().max() <= 2 * ((b - true).abs().max() + rounding)


def test_large_scores_do_not_overflow():
    qkv, table, arguments = inputs(CASES[0], dtype=torch.float32)
    out = window_attention(100 * qkv, table, **arguments)
    exact = dense(100 * qkv.double(), table.double(), **arguments)
    torch.testing.assert_close(out.double(), exact, atol=1e-2, rtol=1e-3)


def test_dtypes_are_promoted():
    qkv, table, arguments = inputs(CASES[0], dtype=torch.float32)
    assert window_attention(qkv.bfloat16(), table, **arguments).dtype == torch.float32


def test_any_strides():
    qkv, table, arguments = inputs(CASES[1])
    expected = window_attention(qkv, table, **arguments)
    apart = torch.randn(2, 30, 9, 7, dtype=torch.float64).permute(0, 3, 2, 1)[..., :48]
    assert apart.shape[-1] == 30
    spread = qkv.detach().transpose(1, 2).contiguous().transpose(1, 2)
    assert not spread.is_contiguous()
    torch.testing.assert_close(window_attention(spread, table.detach().T.contiguous().T, **arguments), expected)
    qkv.grad = None
    window_attention(qkv, table, **arguments).sum().backward()  # of an expanded gradient
    assert qkv.grad.isfinite().all()


@layouts
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_threads_change_no_bit(layout, dtype):
    qkv, table, arguments = inputs(((30, 23), (4, 5), 2, 3, 8), layout, batch=3, dtype=dtype)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(gradients(window_attention, qkv, table, arguments, torch.ones(3, 30, 23, 24)))
    finally:
        torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("shape", [(0, 8, 8), (2, 0, 8), (2, 8, 0)])
@pytest.mark.parametrize("rolled", [False, True])
def test_empty(path, shape, rolled):
    _, table, arguments = inputs(CASES[0])
    qkv = torch.randn(*shape, 48, dtype=torch.float64, requires_grad=True)
    out = window_attention(qkv, table, **arguments, rolled_size=shape[1:] if rolled else None)
    assert out.shape == (*shape, 16)
    out.sum().backward()
    assert qkv.grad.shape == qkv.shape and (table.grad == 0).all()


def test_outside_of_an_image_nothing_is_read_or_left(path):
    qkv, table, arguments = inputs(CASES[0])
    arguments["extents"] = torch.tensor([[3, 5], [0, 8]])
    inside = torch.zeros(2, 8, 8, 1, dtype=torch.bool)
    inside[0, :3, :5] = True
    hostile = qkv.detach().masked_fill(~inside, math.nan).requires_grad_()
    out = window_attention(hostile, table, **arguments)
    torch.testing.assert_close(out, dense(qkv, table, **arguments))
    out.sum().backward()
    assert hostile.grad.isfinite().all() and (hostile.grad * ~inside == 0).all() and table.grad.isfinite().all()


def test_a_window_keeps_its_nan_to_itself(one_thread):
    """Also where the next one of the same thread is smaller, and leaves some of its rows as they were."""
    qkv, table, arguments = inputs(CASES[0], dtype=torch.float32)  # in vectors of 8
    with torch.no_grad():
        qkv[0, 1, 2] = math.nan  # its window has 2 x 4 places, the next one 2 x 2
    out = window_attention(qkv, table, **arguments)
    touched = torch.zeros(2, 8, 8, dtype=torch.bool)
    touched[0, :2, 2:6] = True
    assert out[touched].isnan().all() and out[~touched].isfinite().all()
    (grad,) = torch.autograd.grad(out.sum(), qkv)
    assert grad[~touched].isfinite().all()


@layouts
@pytest.mark.parametrize("case", [((3, 5), (2, 3), 1, 2, 2), ((5,), (3,), 1, 1, 3)], ids=["2d", "1d"])
def test_derivatives(path, case, layout):
    qkv, table, arguments = inputs(case, layout, batch=1)
    for check in (gradcheck, gradgradcheck):
        assert check(lambda qkv, table: window_attention(qkv, table, **arguments), (qkv, table), fast_mode=True)
    assert gradcheck(lambda qkv: window_attention(qkv, None, **arguments), (qkv,))


def test_only_what_is_asked_for_has_a_gradient(path):
    qkv, table, arguments = inputs(CASES[0])
    window_attention(qkv.detach(), table, **arguments).sum().backward()
    assert table.grad is not None and qkv.grad is None
    (grad,) = torch.autograd.grad(window_attention(qkv, table.detach(), **arguments).sum(), qkv, create_graph=True)
    assert grad.requires_grad


def test_nothing_but_the_arguments_is_kept():
    qkv, table, arguments = inputs(CASES[0])
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.data_ptr()) or t, lambda t: t):
        window_attention(qkv, table, **arguments)
    assert set(kept) == {qkv.data_ptr(), table.data_ptr()}


def test_autocast_does_not_round_what_is_given(path):
    qkv, table, arguments = inputs(CASES[2], dtype=torch.float32)
    expected = window_attention(qkv, table, **arguments)
    gradients = torch.autograd.grad(expected.sum(), [qkv, table], retain_graph=True)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(window_attention(qkv, table, **arguments), expected, rtol=1e-6, atol=1e-6)
        again = torch.autograd.grad(expected.sum(), [qkv, table])
    torch.testing.assert_close(again, gradients, rtol=1e-6, atol=1e-6)


@layouts
def test_opcheck(layout):
    qkv, table, arguments = inputs(CASES[2], layout)
    names = ("extents", "num_heads", "window_size", "shift_size", "rolled_size")
    rest = [arguments.get(name) for name in names]
    torch.library.opcheck(torch.ops.glocal.window_attention.default, (qkv, table, *rest))
    torch.library.opcheck(torch.ops.glocal.window_attention.default, (qkv, None, *rest))
    out = window_attention(qkv, table, **arguments).detach()
    backward = torch.ops.glocal.window_attention_backward.default
    torch.library.opcheck(backward, (out, qkv.detach(), table.detach(), *rest))
    torch.library.opcheck(backward, (out, qkv.detach(), None, *rest))


@layouts
def test_compiles_in_one_piece(layout):
    qkv, table, arguments = inputs(CASES[0], layout)
    compiled = torch.compile(window_attention, fullgraph=True, backend="aot_eager")
    grad = torch.ones(2, 8, 8, 16, dtype=torch.float64)
    for a, b in zip(*(gradients(f, qkv, table, arguments, grad) for f in (compiled, window_attention)), strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("rolled", [False, True])
def test_exports_with_any_size(rolled):
    class Windowed(torch.nn.Module):
        def forward(self, qkv):
            size = qkv.shape[1:-1] if rolled else None
            return window_attention(qkv, num_heads=2, window_size=(4, 4), shift_size=1, rolled_size=size)

    height, width = (torch.export.Dim(name, min=2, max=64) for name in "hw")
    dynamic = {1: 4 * height, 2: 4 * width} if rolled else {1: height, 2: width}
    program = torch.export.export(Windowed(), (torch.randn(2, 16, 12, 24),), dynamic_shapes=(dynamic,))
    for grid in ((8, 20), (12, 12)) if rolled else ((9, 5), (3, 13)):
        qkv = torch.randn(2, *grid, 24)
        torch.testing.assert_close(program.module()(qkv), Windowed()(qkv))


def test_cost_is_counted():
    qkv, table, arguments = inputs(CASES[0])
    with FlopCounterMode(display=False) as counter:
        window_attention(qkv, table, **arguments).sum().backward()
    assert counter.get_total_flops() == 2 * (2 + 5) * 2 * 64 * 16 * 16


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": (2, 8, 8, 47)}, r"qkv: has shape \(2, 8, 8, 47\), needs .* multiple of 2 heads"),
        ({"qkv": (2, 48)}, r"qkv: has shape \(2, 48\)"),
        ({"num_heads": 0}, "a multiple of 0 heads"),
        ({"window_size": (4,)}, r"window_size: \(4,\) with shift_size 2 for qkv \(2, 8, 8, 48\), needs 2 lengths"),
        ({"shift_size": 4}, "shift_size 4"),
        ({"num_heads": 4}, r"table: has shape \(49, 2\), needs \(49, 4\) for a window of \(4, 4\)"),
        ({"extents": torch.ones(3, 2)}, r"extents: have shape \(3, 2\), need \(2, 2\)"),
        ({"extents": torch.ones(2, 2), "rolled_size": (8, 8)}, r"no rolled_size, which has \(8, 8\)"),
        ({"rolled_size": (8, 9)}, r"\(2, 8, 8, 48\), rolled_size \(8, 9\) needs its axes filled up"),
    ],
)
def test_what_does_not_fit_is_refused(change, message):
    qkv, table, arguments = inputs(CASES[0])
    if "qkv" in change:
        qkv = torch.randn(change.pop("qkv"))
    with pytest.raises(ValueError, match=message):
        window_attention(qkv, table, **arguments | change)


@st.composite
def problems(draw):
    rank = draw(st.integers(1, 2))
    window = tuple(draw(st.integers(1, 9 if rank == 2 else 40)) for _ in range(rank))
    grid = tuple(draw(st.integers(1, 20 if rank == 2 else 90)) for _ in range(rank))
    case = (grid, window, draw(st.integers(0, min(window) - 1)), draw(st.integers(1, 4)), draw(st.integers(1, 41)))
    options = {"batch": draw(st.integers(0, 3)), "table": draw(st.booleans()), "seed": draw(st.integers(0, 99))}
    dtype = draw(st.sampled_from([torch.float64, torch.float32]))
    return inputs(case, draw(st.sampled_from(["cut", "rolled", "extents"])), dtype=dtype, **options)


@settings(max_examples=40, deadline=None, database=None, derandomize=True)
@given(problems())
def test_any_problem(problem):
    """Both versions: the compiled one, and plain PyTorch, which the tests above hold to the dense one."""
    qkv, table, arguments = problem
    names = ("extents", "num_heads", "window_size", "shift_size", "rolled_size")
    layout = [arguments.get(name) for name in names]
    grad = torch.randn(window_attention(qkv, table, **arguments).shape)
    mine = gradients(window_attention, qkv, table, arguments, grad)
    other = gradients(lambda qkv, table, **_: kernel._eager(qkv, table, *layout), qkv, table, arguments, grad)
    for a, b in zip(mine, other, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4 if qkv.dtype == torch.float32 else 1e-9, rtol=1e-5)


# planted by scripts/mutate
FAULTS = {
    "kernels/windows.h": (
        ("the last window of a rolled grid is not cut", "else if (end == a->length) end = border;", ";"),
        (
            "windows of small images are shifted",
            "int64_t front = extent <= a->window ? 0 : a->shift;",
            "int64_t front = a->shift;",
        ),
        ("padding wraps around with the tokens", "return a->rolled && place < a->size ?", "return a->rolled ?"),
        ("biases are those of source minus query", "p->entries - 1 - e) * p->heads + *head", "e) * p->heads + *head"),
        ("empty lanes are seen", "to[i * at->row + j] = -INFINITY;", "to[i * at->row + j] = 0;"),
        (
            "biases of the part before are used again",
            "if (side[0] == at->side[0] && side[1] == at->side[1]) return bias;",
            "if (side[0] == at->side[0]) return bias;",
        ),
        (
            "a thread keeps the tables of the heads before",
            "if (!table || w->head == *head) return;",
            "if (!table || w->head >= 0) return;",
        ),
        (
            "rows behind the last keep the part before",
            "memset(to, 0, (at->row - at->n) * p->head_row * sizeof(real));",
            "",
        ),
        (
            "nothing is taken off before the exponential",
            "exp_vec(load(scores + j) - most[i])",
            "exp_vec(load(scores + j))",
        ),
        ("images are cut by the whole grid", "p->extents ? p->extents + 2 * image : whole", "whole"),
    ),
    "kernels/window_attention.c": (
        (
            "queries have no scale",
            "gather(w->q, qkv, token, &w->now, p, 1 / sqrt(width));",
            "gather(w->q, qkv, token, &w->now, p, 1);",
        ),
    ),
    "kernels/window_attention_backward.c": (
        ("the gradient of the queries has no scale", "columns, width, scale);", "columns, width, 1);"),
        (
            "the gradient of the weights leaves out the softmax",
            "(load(grads + j) - means[i]));",
            "load(grads + j));",
        ),
        (
            "the table's gradient leaves out windows that are cut",
            "else if (table) add_to_table(own + i * p.entries, &w.now, &p, w.scores_grad);",
            "",
        ),
        (
            "the table's gradient counts windows of the task before again",
            "memset(w.bias_grad, 0, heads * panel * sizeof(real));",
            "",
        ),
        (
            "the table's gradient is that of the first task",
            "for (int64_t chunk = 0; chunk < p.chunks; chunk++) sum",
            "for (int64_t chunk = 0; chunk < 1; chunk++) sum",
        ),
    ),
    "kernels/window_attention.py": (
        ("without a compiler the shift turns around", "front = (window - shift) % window  #", "front = shift  #"),
        (
            "without a compiler tokens that wrap around are seen",
            "return slot + window * (slot >= n - shift), window, n // window + 1",
            "return slot, window, n // window + 1",
        ),
        ("without a compiler offsets are source minus query", "along[:, None] - along +", "along - along[:, None] +"),
        (
            "without a compiler empty slots are seen",
            "return torch.where(full, bias, torch.finfo(dtype).min)",
            "return bias.expand(len(full), self.count, -1, -1, -1)",
        ),
        ("without a compiler the gradient of the keys has no scale", "scale * slope.mT @ q", "slope.mT @ q"),
        ("tokens outside of an image are left as they were", "        out.zero_()", "        pass"),
        ("gradients outside of an image are left as they were", "        qkv_grad.zero_()", "        pass"),
        (
            "the extents of rows and columns are exchanged",
            "return torch.nn.functional.pad(extents, (2 - extents.shape[1], 0), value=1).contiguous()",
            "return torch.nn.functional.pad(extents, (2 - extents.shape[1], 0), value=1).flip(1).contiguous()",
        ),
        ("the cost of the backward pass is that of four products", "* 5 // 2", "* 4 // 2"),
        (
            "a table of another dtype is read as if it had that of qkv",
            "if table is not None and table.dtype != qkv.dtype:",
            "if False:",
        ),
        (
            "strides are taken for those of a contiguous tensor",
            "function,\n        qkv.contiguous(),\n        None",
            "function,\n        qkv,\n        None",
        ),
    ),
}
