"""Attention with a bias for each offset, by blocks, against a loop over queries, with every gradient."""

import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from glocal.kernels import biased_attention

FILE = sys.modules["glocal.kernels.biased_attention"]
CUTS = ("WHOLE", "FORWARD_BLOCK", "BACKWARD_BLOCK")


def by_loop(q, k, v, table, grid, valid=None):
    """Query by query: its offsets to all sources, their entries, softmax, sum."""
    images, tables = [], table if table.dim() == len(grid) + 2 else table.expand(len(q), *table.shape)
    places = torch.cartesian_prod(*map(torch.arange, grid)).view(-1, len(grid))
    for b in range(len(q)):
        rows = []
        seen = torch.ones(len(places), dtype=torch.bool) if valid is None else valid[b]
        for i, place in enumerate(places):
            entry = place - places[seen] + torch.tensor(grid) - 1
            bias = tables[b][(slice(None), *entry.unbind(1))]  # [G, M]
            scores = torch.einsum("gd,mgd->gm", q[b, i], k[b, seen]) + bias
            rows.append(torch.einsum("gm,mgd->gd", scores.softmax(-1), v[b, seen]))
        images.append(torch.stack(rows))
    return torch.stack(images)


def tensors(batch, grid, heads=2, dim=3, out=3, own=False, dtype=torch.float64):
    n = torch.Size(grid).numel()
    made = [torch.randn(batch, n, heads, d, dtype=torch.float64) for d in (dim, dim, out)]
    made.append(torch.randn(*((batch,) if own else ()), heads, *(2 * m - 1 for m in grid), dtype=torch.float64))
    return [t.to(dtype).requires_grad_() for t in made]


@pytest.fixture(params=["whole", "one block", "many blocks", "single rows"])
def cut(request, monkeypatch):
    """The ways a call may be cut; small sizes would all go one way."""
    sizes = {"whole": {}, "one block": {}, "many blocks": {"FORWARD_BLOCK": 1200, "BACKWARD_BLOCK": 2500}}
    for name, size in sizes.get(request.param, dict.fromkeys(CUTS, 1)).items():
        monkeypatch.setattr(FILE, name, size)
    if request.param != "whole":
        monkeypatch.setattr(FILE, "WHOLE", -1)
    return request.param


def check(found, expected, inputs, **tolerance):
    upstream = torch.randn_like(expected)
    torch.testing.assert_close(found, expected, **tolerance)
    pairs = (torch.autograd.grad(out, inputs, upstream) for out in (found, expected))
    for name, one, other in zip(["q", "k", "v", "table"], *pairs, strict=True):
        torch.testing.assert_close(one, other, msg=lambda m, name=name: f"gradient of {name}: {m}", **tolerance)


GRIDS = [(3, 4), (4, 3), (5, 5), (1, 6), (6, 1), (1, 1), (7,), (1,)]


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("own", [False, True])
def test_is_the_loop(cut, grid, own):
    inputs = tensors(3, grid, own=own)
    check(biased_attention(*inputs, grid), by_loop(*inputs, grid), inputs)
    with torch.no_grad():
        torch.testing.assert_close(biased_attention(*inputs, grid), by_loop(*inputs, grid))


@pytest.mark.parametrize("own", [False, True])
def test_sources_that_are_not_seen_take_no_part(cut, own):
    grid = (3, 4)
    inputs = tensors(3, grid, own=own)
    valid = torch.rand(3, 12) < 0.5
    valid[:, 0] = True
    check(biased_attention(*inputs, grid, valid=valid), by_loop(*inputs, grid, valid), inputs)


def test_an_image_that_sees_nothing_gets_zeros_and_no_gradient(cut):
    grid = (2, 3)
    inputs = tensors(2, grid)
    valid = torch.ones(2, 6, dtype=torch.bool)
    valid[1] = False
    out = biased_attention(*inputs, grid, valid=valid)
    assert (out[1] == 0).all() and (out[0] != 0).all()
    grads = torch.autograd.grad(out, inputs, torch.randn_like(out))
    assert all((g[1] == 0).all() for g in grads[:3]) and all(g.isfinite().all() for g in grads)
    alone = biased_attention(*(t[:1] for t in inputs[:3]), inputs[3], grid)
    torch.testing.assert_close(out[:1], alone)


def test_values_may_have_other_channels_and_tensors_any_strides(cut):
    grid = (3, 4)
    inputs = tensors(2, grid, dim=3, out=5)
    check(biased_attention(*inputs, grid), by_loop(*inputs, grid), inputs)
    joined = torch.randn(2, 12, 3, 2, 4, dtype=torch.float64, requires_grad=True)
    table = torch.randn(5, 7, 2, dtype=torch.float64, requires_grad=True)
    q, k, v = joined.unbind(2)
    found = biased_attention(q, k, v, table.movedim(-1, 0), grid)
    check(found, by_loop(q, k, v, table.movedim(-1, 0), grid), [joined, joined, joined, table])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_stays_near(cut, dtype):
    """At most twice the error of plain PyTorch in that type, and one rounding."""
    grid = (5, 4)
    exact = tensors(2, grid, dim=8, out=8)
    exact = [t.detach().to(dtype).double().requires_grad_() for t in exact]
    low = [t.detach().to(dtype).requires_grad_() for t in exact]
    upstream = torch.randn_like(exact[0]).to(dtype)

    def results(inputs, function, up):
        out = function(*inputs, grid)
        return [out, *torch.autograd.grad(out, inputs, up)]

    right = results(exact, by_loop, upstream.double())
    plain, found = results(low, by_loop, upstream), results(low, biased_attention, upstream)
    for truth, usual, ours in zip(right, plain, found, strict=True):
        assert ours.dtype == dtype
        allowed = 2 * (usual.double() - truth).abs().max() + torch.finfo(dtype).eps * truth.abs().max()
        assert (ours.double() - truth).abs().max() <= allowed


@pytest.mark.parametrize("inside", [False, True])
def test_autocast_chooses_the_type_and_nothing_else(cut, inside):
    grid = (2, 3)
    q, k, v, table = (t.detach().float().requires_grad_() for t in tensors(2, grid))
    inputs = [q.half(), k.half(), v, table]  # as projections and tokens are
    valid = torch.tensor([[True] * 6, [False] * 6])
    with torch.autocast("cpu", torch.float16):
        out = biased_attention(*inputs, grid, valid=valid)
        assert out.dtype == torch.float16
        with torch.no_grad():
            torch.testing.assert_close(biased_attention(*inputs, grid, valid=valid), out, rtol=1e-2, atol=1e-2)
    expected = by_loop(q[:1], k[:1], v[:1], table, grid)
    torch.testing.assert_close(out[:1].float(), expected, rtol=1e-2, atol=1e-2)
    with torch.autocast("cpu", torch.float16, enabled=inside):
        found = torch.autograd.grad(out, (q, k, v, table), torch.ones_like(out))
    expected = torch.autograd.grad(expected, (q, k, v, table), torch.ones_like(expected))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=2e-2, atol=2e-2)


def test_types_that_differ_are_promoted(cut):
    grid = (2, 3)
    q, k, v, table = tensors(2, grid)
    mixed = [q.detach().bfloat16(), k.detach().float(), v.detach().float(), table.detach().double()]
    mixed = [t.requires_grad_() for t in mixed]
    out = biased_attention(*mixed, grid)
    assert out.dtype == torch.float32
    grads = torch.autograd.grad(out.sum(), mixed)
    assert [g.dtype for g in grads] == [t.dtype for t in mixed]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("valid", [None, torch.ones(0, 6, dtype=torch.bool)])
def test_empty_batch(cut, own, valid):
    grid = (2, 3)
    inputs = tensors(0, grid, own=own)
    out = biased_attention(*inputs, grid, valid=valid)
    assert out.shape == (0, 6, 2, 3)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert (grads[3] == 0).all() and grads[3].shape == inputs[3].shape
    with torch.no_grad():
        assert biased_attention(*inputs, grid, valid=valid).shape == (0, 6, 2, 3)


def test_gradients_of_gradients(cut):
    grid = (2, 2)
    inputs = tensors(2, grid, heads=1, dim=2, out=2)
    valid = torch.tensor([[True] * 4, [True, False, True, False]])
    torch.autograd.gradcheck(lambda *t: biased_attention(*t, grid, valid=valid), inputs)
    torch.autograd.gradgradcheck(lambda *t: biased_attention(*t, grid, valid=valid), inputs)
    q, k, v, table = inputs  # some of them
    torch.autograd.gradgradcheck(lambda q, t: biased_attention(q, k.detach(), v.detach(), t, grid), (q, table))


def test_the_same_bits_every_time_and_with_any_number_of_threads(cut):
    grid = (9, 7)
    inputs = tensors(3, grid, heads=3, dim=16, out=16, dtype=torch.float32)
    upstream = torch.randn(3, 63, 3, 16)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            out = biased_attention(*inputs, grid)
            results.append([out, *torch.autograd.grad(out, inputs, upstream)])
    finally:
        torch.set_num_threads(before)
    for other in results[2:]:
        assert all(torch.equal(one, two) for one, two in zip(results[1], other, strict=True))


@pytest.mark.parametrize("backend", [SDPBackend.MATH, SDPBackend.FLASH_ATTENTION])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_back_end_of_the_library(cut, backend, dtype):
    grid = (5, 4)
    exact = [t.detach().to(dtype).double().requires_grad_() for t in tensors(2, grid, dim=8, out=8)]
    low = [t.detach().to(dtype).requires_grad_() for t in exact]
    valid = torch.rand(2, 20) < 0.7
    with sdpa_kernel(backend):
        for seen in (None, valid):
            tolerance = {"rtol": 3e-2, "atol": 6e-2} if dtype == torch.bfloat16 else {"rtol": 1e-4, "atol": 1e-5}
            with torch.no_grad():
                found = biased_attention(*low, grid, valid=seen)
            torch.testing.assert_close(found.double(), by_loop(*exact, grid, seen), **tolerance)
            grads = torch.autograd.grad(biased_attention(*low, grid, valid=seen).sum(), low)
            truth = torch.autograd.grad(by_loop(*exact, grid, seen).sum(), exact)
            for one, other in zip(grads, truth, strict=True):
                torch.testing.assert_close(one.double(), other, **tolerance)


@pytest.mark.parametrize("own", [False, True])
def test_opcheck(own):
    inputs = [t.float().detach().requires_grad_() for t in tensors(2, (3, 2), own=own)]
    inputs[3] = (inputs[3] if own else inputs[3][None]).detach().requires_grad_()
    valid = torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    for seen in (None, valid):
        torch.library.opcheck(torch.ops.glocal.biased_attention.default, (*inputs, seen))
        out = torch.ops.glocal.biased_attention(*inputs, seen).detach()
        plain = [t.detach() for t in inputs]
        torch.library.opcheck(torch.ops.glocal.biased_attention_backward.default, (out, *plain, seen))


def test_compiles_and_exports():
    grid = (3, 4)
    inputs = [t.float().detach().requires_grad_() for t in tensors(2, grid)]
    compiled = torch.compile(lambda *t: biased_attention(*t, grid), fullgraph=True, backend="aot_eager")
    check(compiled(*inputs), biased_attention(*inputs, grid), inputs)

    class Attend(torch.nn.Module):
        def forward(self, q, table):
            side = [(n + 1) // 2 for n in table.shape[1:]]
            return biased_attention(q, q, q, table, side)

    batch, height = torch.export.Dim("batch"), torch.export.Dim.DYNAMIC
    shapes = ({0: batch, 1: height}, {1: height, 2: height})
    q, _, _, table = inputs
    program = torch.export.export(Attend(), (q.detach(), table.detach()), dynamic_shapes=shapes)
    other = [t.float().detach() for t in tensors(3, (5, 2))]
    expected = biased_attention(other[0], other[0], other[0], other[3], (5, 2))
    torch.testing.assert_close(program.module()(other[0], other[3]), expected)


def test_multiply_adds(monkeypatch):
    monkeypatch.setattr(FILE, "WHOLE", -1)
    inputs = tensors(2, (3, 4), heads=2, dim=3, out=5)
    with FlopCounterMode(display=False) as counter:
        out = biased_attention(*inputs, (3, 4))
    products = 2 * 2 * 12 * 12
    assert counter.get_total_flops() == 2 * products * (3 + 5)
    with FlopCounterMode(display=False) as counter:
        torch.autograd.grad(out.sum(), inputs)
    assert counter.get_total_flops() == 2 * products * (3 * 3 + 2 * 5)


def test_nothing_of_size_n_by_n_is_held(monkeypatch):
    """No tensor is larger than a block, or than what the table's gradient is gathered in: [W, 2H - 1, W]."""
    for name, size in zip(CUTS, (-1, 2**15, 2**15), strict=True):
        monkeypatch.setattr(FILE, name, size)
    inputs = tensors(8, (24, 16), heads=1, dtype=torch.float32)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        out = biased_attention(*inputs, (24, 16))
        torch.autograd.grad(out, inputs, torch.ones_like(out))
    sizes = [e.nbytes() for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert 2**14 < max(sizes) <= 4 * 16 * 47 * 16


def test_biases_are_rounded_to_the_type_of_the_scores_in_both_passes(cut):
    grid = (4, 5)
    q, k, v, table = tensors(2, grid, dim=8, out=8)
    low = [t.detach().bfloat16().requires_grad_() for t in (q, k, v)]
    low.append((50 + table.detach()).float().requires_grad_())  # of which bfloat16 keeps quarters
    exact = [t.detach().bfloat16().double().requires_grad_() for t in low]
    found, expected = biased_attention(*low, grid), by_loop(*exact, grid)
    torch.testing.assert_close(found.double(), expected, rtol=2e-2, atol=2e-2)
    upstream = torch.randn_like(expected).bfloat16()
    pairs = zip(
        torch.autograd.grad(found, low, upstream), torch.autograd.grad(expected, exact, upstream.double()), strict=True
    )
    for one, other in pairs:
        torch.testing.assert_close(one.double(), other, rtol=2e-2, atol=2e-2)


def test_gradients_are_added_up_in_float32(cut):
    """In bfloat16, 256 + 1 is 256 again."""
    q, k, v, table = (torch.zeros_like(t, dtype=torch.bfloat16) for t in tensors(1, (600,), heads=1))
    v.requires_grad_()
    out = biased_attention(q, k, v, table, (600,))
    (found,) = torch.autograd.grad(out, v, torch.full_like(out, 600))
    torch.testing.assert_close(found, torch.full_like(found, 600), rtol=1e-2, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"grid": (2, 2, 3)}, "grid: (2, 2, 3) has 3 axes, must have 1 or 2"),
        ({"table": (3, 5)}, "table: has shape (3, 5), needs [G, *(2*S - 1)] or [B, G, *(2*S - 1)] for grid (2, 3)"),
        ({"grid": (2, 4)}, "grid: (2, 4) has 8 places, q (2, 6, 2, 3) has 6"),
        ({"table": (2, 5, 3)}, "needs 2 or 1 images, 2 heads and 3 x 5 offsets for grid (2, 3)"),
        ({"table": (2, 5, 5)}, "table: has shape (1, 2, 5, 5)"),
        ({"table": (1, 3, 5)}, "table: has shape (1, 1, 3, 5)"),
        ({"table": (3, 2, 3, 5)}, "table: has shape (3, 2, 3, 5)"),
        ({"k": (2, 5, 2, 3)}, "k and v: have shapes (2, 5, 2, 3) and (2, 6, 2, 3), q has (2, 6, 2, 3)"),
        ({"valid": (2, 5)}, "valid: has shape (2, 5), needs (2, 6)"),
    ],
)
def test_what_does_not_fit_is_refused(cut, change, message):
    given = dict(zip("qkv", tensors(2, (2, 3))[:3], strict=True), table=tensors(2, (2, 3))[3], grid=(2, 3), valid=None)
    for name, shape in change.items():
        made = shape if name == "grid" else torch.ones(shape, dtype=torch.bool if name == "valid" else torch.float64)
        given[name] = made
    with pytest.raises(ValueError) as error:
        biased_attention(*(given[name] for name in ("q", "k", "v", "table", "grid")), valid=given["valid"])
    assert message in str(error.value)


# planted by scripts/mutate
FAULTS = {
    "kernels/biased_attention.py": (
        ("sources are not reversed", "k, v = k.flip(1), v.flip(1)", "pass"),
        (
            "offsets are source minus query",
            "dk.flip(2), dv.flip(2))), entries)",
            "dk.flip(2), dv.flip(2))), entries.flip(2, 3))",
        ),
        ("only the last block of queries has a say in the gradient of keys", "dk[:, images] += ", "dk[:, images] = "),
        (
            "images after the first have none in the table's gradient",
            "total = inner if total is None else total.add_(inner)",
            "total = inner if total is None else total",
        ),
        ("gradients of one block of rows are counted again with the next", "            total = None\n", ""),
        (
            "blocks write into the table's own memory",
            "k.new_empty(heads, count, *bias.shape[2:]).copy_(bias).view(",
            "bias.reshape(",
        ),
        (
            "padding has a share of the weights in backward",
            "scores.masked_fill_(~valid[images, None], torch.finfo(wide).min)",
            "pass",
        ),
        (
            "the mask stays in order where sources are reversed",
            "windows, valid = _windows(table.to(q.dtype)), None if valid is None else valid.flip(1)",
            "windows = _windows(table.to(q.dtype))",
        ),
        (
            "a query that sees nothing gets the mean of the padding",
            "return out if valid is None else torch.where(valid.any(1)[:, None, None, None], out, 0)",
            "return out",
        ),
        (
            "each image's own table is the first one's",
            "bias = windows[images if own else slice(None), :, rows].transpose(0, 1)",
            "bias = windows[:1, :, rows].transpose(0, 1)",
        ),
        (
            "biases are rounded in one of the two passes only",
            "windows = _windows(table.to(dtypes[0]).to(wide))",
            "windows = _windows(table.to(wide))",
        ),
        (
            "backward is done in the low precision",
            "torch.promote_types(q.dtype, torch.float32)\n    valid",
            "q.dtype\n    valid",
        ),
        ("all of a batch is one block", "images = max(limit // max(each * height, 1), 1)", "images = batch or 1"),
        (
            "the columns of the table's gradient are not moved",
            "entries[..., column : column + width] += ",
            "entries[..., :width] += ",
        ),
        (
            "autocast chooses the types of single products",
            "with torch.autocast(q.device.type, enabled=False):",
            "if True:",
        ),
        (
            "a finite mask is cast to -inf by autocast",
            "dtype = torch.get_autocast_dtype(device)  # here",
            "pass  # here",
        ),
        (
            "there are no second derivatives",
            "if torch.is_grad_enabled() and not torch.compiler.is_compiling():",
            "if False:",
        ),
    ),
}
