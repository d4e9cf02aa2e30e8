"""Neighborhood attention against dense softmax attention under masks made by loops, compiled and eager."""

import importlib
import math

import hypothesis
import pytest
import torch
from hypothesis import strategies as st

from glocal.kernels import compiled, neighborhood_attention

from .neighborhoods import NAMES, agrees, dense, inputs, with_gradients

module = importlib.import_module("glocal.kernels.neighborhood_attention")
EXAMPLES = 40


def without_compiler(*args, **sizes):
    raise compiled.Unavailable("as if there were no compiler")


SHAPES = [  # grid, kernel size, dilation
    ((9, 11), 3, 1),
    ((7, 10), (3, 5), 1),
    ((8, 9), (5, 3), 2),
    ((7, 8), 3, 3),
    ((4, 3), (7, 5), 1),
    ((1, 1), 3, 1),
    ((1, 9), 5, 2),
    ((9, 1), 3, 1),
    ((6, 20), 7, 1),
    ((3, 4), 1, 2),
    ((23,), 9, 1),
    ((21,), 5, 3),
    ((1,), 3, 1),
    ((4,), 11, 2),
]


@pytest.mark.parametrize("border", ["masked", "shifted"])
@pytest.mark.parametrize(("grid", "kernel", "dilation"), SHAPES)
def test_is_dense_attention_under_a_mask(path, grid, kernel, dilation, border):
    agrees(inputs(grid, kernel), kernel_size=kernel, dilation=dilation, border=border, scale=0.3)


@pytest.mark.parametrize("border", ["masked", "shifted"])
@pytest.mark.parametrize(("grid", "kernel", "dilation"), [SHAPES[1], SHAPES[2], SHAPES[11]])
def test_without_a_bias(path, grid, kernel, dilation, border):
    agrees(inputs(grid, kernel, bias=False), kernel_size=kernel, dilation=dilation, border=border, scale=0.3)


@pytest.mark.parametrize(("grid", "kernel", "dilation"), [*SHAPES[1:], ((7, 9), (2, 4), 1), ((19,), 4, 2)])
def test_causal_is_dense_attention_under_a_mask(path, grid, kernel, dilation):
    agrees(inputs(grid, kernel), kernel_size=kernel, dilation=dilation, causal=True, scale=0.3)


@pytest.mark.parametrize(("past", "kernel", "dilation"), [(1, 3, 1), (4, 3, 2), (9, 4, 3), (2, 9, 1)])
@pytest.mark.parametrize("length", [1, 6])
def test_tokens_of_the_past_are_seen(path, length, past, kernel, dilation):
    tensors = inputs((length,), kernel, past=past)
    agrees(tensors, kernel_size=kernel, dilation=dilation, causal=True)
    agrees(tensors, kernel_size=kernel, dilation=dilation, causal=True, valid=torch.rand(2, length + past) < 0.6)


@pytest.mark.parametrize("border", ["masked", "shifted"])
@pytest.mark.parametrize(("dim", "value_dim"), [(1, 1), (8, 24), (20, 3), (33, 72), (130, 17)])
def test_heads_of_any_width(path, dim, value_dim, border):
    tensors = inputs((5, 11), 3, dim=dim, value_dim=value_dim, heads=2)
    agrees(tensors, kernel_size=3, border=border, scale=dim**-0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("border", "dilation"), [("masked", 1), ("shifted", 1), ("masked", 2), ("shifted", 2)])
@pytest.mark.parametrize(("grid", "kernel", "options"), [((13, 17), 5, {}), ((12, 15), (3, 7), {}), ((40,), 7, {})])
def test_tiles_fit_together(monkeypatch, grid, kernel, options, border, dilation, dtype):
    """Several along both axes, of which the last are smaller; without tiles of any class the sums are in one piece."""
    monkeypatch.setattr(module, "FORWARD_AREA", (15, 15))
    monkeypatch.setattr(module, "BACKWARD_AREA", (21, 21))
    monkeypatch.setattr(module, "TILE_WIDTH", 5)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == torch.float32 else {}
    tensors = inputs(grid, kernel, dtype=dtype)
    agrees(tensors, kernel_size=kernel, dilation=dilation, border=border, scale=0.3, **tolerance)
    if border == "masked":
        agrees(tensors, kernel_size=kernel, dilation=dilation, causal=True, scale=0.3, **tolerance)
    else:
        extents = torch.tensor([[max(1, n - 3) for n in grid], [max(1, n // 2) for n in grid]])
        agrees(tensors, kernel_size=kernel, dilation=dilation, border=border, extents=extents, **tolerance)


def test_a_kernel_so_large_that_a_row_is_taken_in_runs(path):
    tensors = inputs((4, 37), (5, 61), heads=1, batch=1, dim=3)
    agrees(tensors, kernel_size=(5, 61), scale=0.3)
    agrees(tensors, kernel_size=(5, 61), border="shifted", scale=0.3)


@pytest.mark.parametrize("border", ["masked", "shifted"])
@pytest.mark.parametrize(("grid", "kernel", "dilation"), SHAPES[:4] + SHAPES[10:12])
def test_tokens_that_are_not_valid_are_not_seen(path, grid, kernel, dilation, border):
    """Whatever they hold; some queries are left without any source."""
    valid = torch.rand(2, *grid) < 0.3
    q, k, v, bias = inputs(grid, kernel)
    options = {"kernel_size": kernel, "dilation": dilation, "border": border, "valid": valid}
    agrees((q, k, v, bias), **options)
    clean = with_gradients(neighborhood_attention, (q, k, v, bias), torch.ones_like(v), **options)
    k, v = (t.masked_fill(~valid[..., None, None], math.nan) for t in (k, v))
    soiled = with_gradients(neighborhood_attention, (q, k, v, bias), torch.ones_like(v), **options)
    if path == "compiled":
        for got, want in zip(soiled, clean, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(
    ("grid", "kernel", "dilation"), [((6, 9), 3, 1), ((9, 8), (5, 3), 2), ((20,), 5, 3), ((5, 4), 7, 1)]
)
def test_each_image_has_its_own_extent(path, grid, kernel, dilation):
    extents = torch.tensor([[max(1, n // 3) for n in grid], [n - 1 for n in grid], list(grid)])
    tensors = inputs(grid, kernel, batch=3)
    agrees(tensors, kernel_size=kernel, dilation=dilation, border="shifted", extents=extents)


def test_a_query_that_sees_nothing_gets_nothing(path):
    tensors = inputs((5, 6), 3)
    upstream = torch.ones_like(tensors[2])
    options = {"kernel_size": 3, "valid": torch.zeros(2, 5, 6, dtype=torch.bool)}
    for found in with_gradients(neighborhood_attention, tensors, upstream, **options):
        assert not found.any()


def test_what_is_not_finite_reaches_its_neighbors_alone(path):
    q, k, v, bias = inputs((9, 9), 3)
    clean = neighborhood_attention(q, k, v, bias, kernel_size=3)
    k[0, 4, 4], v[0, 4, 4] = math.nan, math.inf
    soiled = neighborhood_attention(q, k, v, bias, kernel_size=3)
    assert soiled[0, 3:6, 3:6].isnan().all()
    clean[0, 3:6, 3:6] = soiled[0, 3:6, 3:6] = 0
    torch.testing.assert_close(soiled, clean)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_scores_of_any_size(path, dtype):
    """The largest is taken off before the exponential; far smaller ones count as 0."""
    q, k, v, _ = inputs((5, 6), 3, dtype=dtype, bias=False)
    out = neighborhood_attention(q, k, v, kernel_size=3, scale=300.0)
    expected = dense(q.double(), k.double(), v.double(), kernel_size=3, scale=300.0)
    torch.testing.assert_close(out.double(), expected, rtol=0.01, atol=0.01)


@pytest.mark.parametrize("options", [{}, {"border": "shifted", "dilation": 2}, {"causal": True}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_error_is_that_of_plain_pytorch(path, dtype, options):
    """Within twice its own and one rounding of float64."""
    tensors = inputs((14, 11), 5, dim=24, dtype=dtype)
    options = {"kernel_size": 5, "scale": 24**-0.5, **options}
    upstream = torch.randn(tensors[2].shape).to(dtype)
    exact = with_gradients(dense, [t.double() for t in tensors], upstream, **options)
    plain = with_gradients(dense, tensors, upstream, **options)
    found = with_gradients(neighborhood_attention, tensors, upstream, **options)
    for name, want, other, got in zip(NAMES, exact, plain, found, strict=True):
        allowed = 2 * (other - want).abs().max() + torch.finfo(dtype).eps * want.abs().max()
        assert (got - want).abs().max() <= allowed, name


def test_different_types_are_promoted(path):
    q, k, v, bias = inputs((4, 5), 3)
    out = neighborhood_attention(q.bfloat16(), k.float(), v.bfloat16(), bias.half(), kernel_size=3)
    assert out.dtype == torch.float32
    expected = neighborhood_attention(
        q.bfloat16().float(), k.float(), v.bfloat16().float(), bias.half().float(), kernel_size=3
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize("border", ["masked", "shifted"])
def test_the_number_of_threads_changes_nothing(border):
    tensors = inputs((40, 45), 7, dtype=torch.float32)
    upstream = torch.randn_like(tensors[2])
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            options = {"kernel_size": 7, "border": border}
            found.append(with_gradients(neighborhood_attention, tensors, upstream, **options))
    finally:
        torch.set_num_threads(before)
    for one, *others in zip(*found, strict=True):
        assert all(torch.equal(one, other) for other in others)


@pytest.mark.parametrize("grid", [(6, 7), (13,)])
def test_any_strides(path, grid):
    *_, bias = inputs(grid, 3, dim=8)
    rank = len(grid)
    joined = torch.randn(2, *grid, 3, 3, 8, dtype=torch.float64).unbind(-3)  # one projection
    heads_first = [torch.randn(2, 3, *grid, 8, dtype=torch.float64).movedim(1, -2) for _ in range(3)]
    last_first = [torch.randn(2, 8, *grid, 3, dtype=torch.float64).movedim(1, -1) for _ in range(3)]
    reversed_axes = [torch.randn(2, *grid[::-1], 3, 8, dtype=torch.float64) for _ in range(3)]
    reversed_axes = [t.permute(0, *range(rank, 0, -1), rank + 1, rank + 2) for t in reversed_axes]
    skipping = [torch.randn(2, *(2 * n for n in grid), 3, 16, dtype=torch.float64) for _ in range(3)]
    skipping = [t[(slice(None), *[slice(None, None, 2)] * rank, slice(None), slice(8))] for t in skipping]
    shared = [torch.randn(1, *grid, 1, 8, dtype=torch.float64).expand(2, *grid, 3, 8) for _ in range(3)]
    for tensors in (joined, heads_first, last_first, reversed_axes, skipping, shared):
        expected = neighborhood_attention(*(t.contiguous() for t in tensors), bias, kernel_size=3)
        torch.testing.assert_close(neighborhood_attention(*tensors, bias, kernel_size=3), expected)
        leaves = [t.detach().requires_grad_() for t in tensors]
        out = neighborhood_attention(*leaves, bias, kernel_size=3)
        for upstream in (torch.ones(()).double().expand(out.shape), tensors[0]):  # of any strides, too
            found = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
            wanted = with_gradients(
                neighborhood_attention, [t.contiguous() for t in tensors] + [bias], upstream.contiguous(), kernel_size=3
            )
            torch.testing.assert_close(found, wanted[1:4])


@pytest.mark.parametrize("shape", [(0, 5, 6, 3, 8), (2, 0, 6, 3, 8), (2, 5, 6, 0, 8), (0, 7, 3, 8)])
def test_nothing_in_nothing_out(path, shape):
    tensors = [torch.randn(shape, dtype=torch.float64) for _ in range(3)]
    bias = torch.randn(shape[-2], *[5] * (len(shape) - 3), dtype=torch.float64)
    found = with_gradients(neighborhood_attention, [*tensors, bias], tensors[0], kernel_size=3)
    assert [t.shape for t in found] == [torch.Size(shape)] * 4 + [bias.shape]
    assert not found[-1].any()


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"q": (2, 4, 8)}, r"q: has shape \(2, 4, 8\)"),
        ({"k": (2, 5, 4, 3, 8)}, r"k: has shape \(2, 5, 4, 3, 8\), does not fit q \(2, 4, 5, 3, 8\)"),
        ({"k": (2, 4, 5, 3, 9)}, "k: has shape"),
        ({"k": (1, 4, 5, 3, 8)}, "k: has shape"),
        ({"v": (2, 4, 5, 1, 8)}, "v: has shape"),
        ({"bias": (3, 5, 4)}, r"bias: has shape \(3, 5, 4\), needs \(3, 5, 5\)"),
        ({"valid": (2, 5, 4)}, r"valid: has shape \(2, 5, 4\), needs \(2, 4, 5\)"),
        ({"extents": (2, 1), "border": "shifted"}, r"extents: has shape \(2, 1\), needs \(2, 2\)"),
        ({"extents": (2, 2)}, "extents: are for shifted borders"),
        ({"kernel_size": 4}, "kernel_size: 4, must be .* odd unless causal"),
        ({"kernel_size": (3, 3, 3)}, "kernel_size"),
        ({"kernel_size": 0, "causal": True}, "kernel_size"),
        ({"dilation": 0}, "dilation: 0"),
        ({"border": "wrapped"}, "border: 'wrapped'"),
        ({"border": "shifted", "causal": True}, "border: 'shifted', must be 'masked'"),
    ],
)
def test_refuses_what_does_not_fit(change, match):
    shapes = {"q": (2, 4, 5, 3, 8), "k": (2, 4, 5, 3, 8), "v": (2, 4, 5, 3, 8)}
    arguments = {"kernel_size": 3, **{name: torch.randn(shape) for name, shape in shapes.items()}}
    change = {name: torch.ones(value) if name in ("q", "k", "v", "bias", "valid", "extents") else value
              for name, value in change.items()}  # fmt: skip
    with pytest.raises(ValueError, match=match):
        neighborhood_attention(**{**arguments, **change})


def test_refuses_a_past_that_is_not_causal():
    q, k, v, _ = inputs((5,), 3, past=2)
    with pytest.raises(ValueError, match="k: has shape"):
        neighborhood_attention(q, k, v, kernel_size=3)
    with pytest.raises(ValueError, match="k: has shape"):
        neighborhood_attention(k, q, q, kernel_size=3, causal=True)


@st.composite
def calls(draw):
    rank = draw(st.integers(1, 2))
    causal = draw(st.booleans())
    border = "masked" if causal else draw(st.sampled_from(["masked", "shifted"]))
    grid = tuple(draw(st.integers(1, 40 if rank == 1 else 12)) for _ in range(rank))
    kernel = tuple(draw(st.integers(1, 9 if rank == 1 else 7)) for _ in range(rank))
    kernel = kernel if causal else tuple(n | 1 for n in kernel)
    past = draw(st.integers(0, 6)) if causal and rank == 1 else 0
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    dim, value_dim = draw(st.sampled_from([(12, 12), (1, 20), (9, 2), (32, 32)]))  # each compiles anew
    bias, masked, sized = draw(st.booleans()), draw(st.booleans()), border == "shifted" and draw(st.booleans())
    areas = draw(st.sampled_from([((512, 512), (512, 1600), 64), ((7, 7), (9, 9), 3), ((30, 30), (20, 20), 6)]))
    dtype = draw(st.sampled_from([torch.float32, torch.float64]))
    torch.manual_seed(draw(st.integers(0, 999)))
    options = {"kernel_size": kernel, "dilation": draw(st.integers(1, 3)), "causal": causal, "border": border}
    options["valid"] = torch.rand(batch, grid[0] + past, *grid[1:]) < 0.7 if masked else None
    options["extents"] = torch.stack([torch.randint(0, n + 1, (batch,)) for n in grid], -1) if sized else None
    sizes = {"batch": batch, "heads": heads, "dim": dim, "value_dim": value_dim}
    return inputs(grid, kernel, past=past, bias=bias, dtype=dtype, **sizes), options, areas


@pytest.mark.skipif(compiled.unavailable() is not None, reason="there is nothing to compare")
@hypothesis.settings(max_examples=EXAMPLES, deadline=None, derandomize=True, database=None)
@hypothesis.given(calls())
def test_compiled_and_eager_agree_on_anything(call):
    """Also on what queries behind an image's extent get."""
    tensors, options, areas = call
    upstream = torch.randn(*tensors[0].shape[:-1], tensors[2].shape[-1], dtype=tensors[0].dtype)
    with pytest.MonkeyPatch.context() as patch:
        for name, area in zip(("FORWARD_AREA", "BACKWARD_AREA", "TILE_WIDTH"), areas, strict=True):
            patch.setattr(module, name, area)
        found = with_gradients(neighborhood_attention, tensors, upstream, scale=0.3, **options)
        patch.setattr(module, "load", without_compiler)
        expected = with_gradients(neighborhood_attention, tensors, upstream, scale=0.3, **options)
    tolerance = 1e-9 if tensors[0].dtype == torch.float64 else 2e-5
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance * max(1.0, want.abs().amax().item()))


# planted by scripts/mutate
FAULTS = {
    (
        "kernels/neighborhoods.h",
        "kernels/test_neighborhood_attention.py",
        "kernels/test_neighborhood_attention_use.py",
    ): (
        (
            "a shifted window stops one token too late",
            "MAX(MIN(i - a->before, a->end - a->kernel), 0)",
            "MAX(MIN(i - a->before, a->end - a->kernel + 1), 0)",
        ),
        (
            "a slot outside the grid counts with a score of 0",
            "line->bias[s] = -INFINITY;",
            "line->bias[s] = 0;",
        ),
        (
            "the bias is that of the row below",
            "entry_y = c->kh - 1 + sy - y,",
            "entry_y = c->kh - 2 + sy - y,",
        ),
        (
            "tokens that are not real are seen",
            "real_token[(i - left) * c->dw] ? 0 : -INFINITY;",
            "real_token[(i - left) * c->dw] ? 0 : 0;",
        ),
        (
            "dilated tokens of a row all start at its first",
            "first = t->col + c->dw * (p->x0 + from);",
            "first = c->dw * (p->x0 + from);",
        ),
    ),
    (
        "kernels/neighborhood_attention.c",
        "kernels/test_neighborhood_attention.py",
        "kernels/test_neighborhood_attention_use.py",
    ): (
        (
            "queries behind a past are those at its beginning",
            "c->dw * (x + j) - c->past, first",
            "c->dw * (x + j), first",
        ),
        (
            "the largest score is not taken off",
            "real top = most[j] == -INFINITY ? 0 : most[j];",
            "real top = most[j] = 0;",
        ),
    ),
    (
        "kernels/neighborhood_attention_backward.c",
        "kernels/test_neighborhood_attention.py",
        "kernels/test_neighborhood_attention_use.py",
    ): (
        (
            "keys get nothing from the queries of the tile above",
            "qy0 = MIN(t->y0, first_seeing(&t->y, t->y0))",
            "qy0 = t->y0",
        ),
        (
            "the softmax's own part of the gradient is left out",
            "v_places + s, DV) - delta);\n    if (s < to) store",
            "v_places + s, DV));\n    if (s < to) store",
        ),
        (
            "the last queries of a row give nothing to the bias",
            "        flush(c, &line, table);\n",
            "",
        ),
        (
            "the gradient of q is not scaled",
            "mix(o, ds, p.k + lead * DK, p.k_places, slots, a->scale);",
            "mix(o, ds, p.k + lead * DK, p.k_places, slots, 1);",
        ),
        (
            "the number of threads changes the sums of the bias' gradient",
            "jobs = MIN(each, c->jobs);",
            "jobs = MIN(each, threads);",
        ),
        (
            "a query of another tile gives to the keys of the row above",
            "from_row = MAX(t->y0 - sy, 0)",
            "from_row = MAX(t->y0 - sy + 1, 0)",
        ),
    ),
    (
        "kernels/neighborhood_attention.py",
        "kernels/test_neighborhood_attention.py",
        "kernels/test_neighborhood_attention_use.py",
    ): (
        (
            "eager: a query that sees nothing is NaN",
            "lse = lse.masked_fill(lse == -math.inf, 0)",
            "lse = lse.clone()",
        ),
        (
            "eager: windows are moved inward by the batch's size",
            "if extents is None else extents[:, axis, None, None]",
            "if True else extents[:, axis, None, None]",
        ),
        (
            "eager: queries are not scaled",
            "rows = q.flatten(1, -3).to(_wide(q.dtype)) * scale",
            "rows = q.flatten(1, -3).to(_wide(q.dtype))",
        ),
        (
            "eager: the entries of queries behind an extent are outside the table",
            ".clamp(0, 2 * length - 2)",
            ".clamp(-1, 2 * length - 1)",
        ),
        (
            "the second derivative forgets which tokens are seen",
            ".softmax(-1) * seen",
            ".softmax(-1) * (seen | ~seen)",
        ),
        (
            "causal and shifted are exchanged",
            "int(causal), int(shifted))",
            "int(shifted), int(causal))",
        ),
        (
            "the gradient's strides are taken for those of the output",
            "for t in (q, k, v, grad)]",
            "for t in (q, k, v, q)]",
        ),
    ),
}
