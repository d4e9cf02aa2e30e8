"""Neighborhood attention in use: derivatives, what is kept for them, compilation, export, and its cost."""

import importlib

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from glocal.kernels import neighborhood_attention

from .neighborhoods import dense, inputs, with_gradients

module = importlib.import_module("glocal.kernels.neighborhood_attention")

OPTIONS = [
    ((3, 4), {"kernel_size": 3}),
    ((4, 3), {"kernel_size": 3, "border": "shifted", "dilation": 2}),
    ((6,), {"kernel_size": 2, "causal": True, "dilation": 2}),
]


@pytest.mark.parametrize(("grid", "options"), OPTIONS)
def test_derivatives(path, grid, options):
    tensors = [t.requires_grad_() for t in inputs(grid, options["kernel_size"], batch=1, heads=2, dim=3, value_dim=2)]
    function = lambda *t: neighborhood_attention(*t, **options)  # noqa: E731
    assert gradcheck(function, tensors)
    assert gradgradcheck(function, tensors, fast_mode=True)
    assert gradgradcheck(function, tensors[:3], fast_mode=True)


def test_derivatives_where_some_queries_see_nothing(path):
    valid = torch.tensor([[[False, False, False, True]] * 3])
    tensors = [t.requires_grad_() for t in inputs((3, 4), 3, batch=1, heads=1, dim=2)]
    assert gradcheck(lambda *t: neighborhood_attention(*t, kernel_size=3, valid=valid), tensors)
    assert gradgradcheck(lambda *t: neighborhood_attention(*t, kernel_size=3, valid=valid), tensors)


def test_third_derivative_is_the_dense_ones(path):
    def third(function, q, k, v, bias):
        out = function(q, k, v, bias, kernel_size=3)
        for tensor in (q, k, q):
            (out,) = torch.autograd.grad((out**2).sum(), tensor, create_graph=True)
        return out

    tensors = [t.requires_grad_() for t in inputs((3, 4), 3, batch=1, heads=1, dim=2)]
    torch.testing.assert_close(third(neighborhood_attention, *tensors), third(dense, *tensors))


def test_only_what_is_needed_is_saved():
    """The inputs, the output, one number for each query and head."""
    q, k, v, bias = (t.requires_grad_() for t in inputs((8, 9), 3))
    kept = {}
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.setdefault(t.data_ptr(), t), lambda t: t):
        out = neighborhood_attention(q, k, v, bias, kernel_size=3)
    inputs_kept = {t.data_ptr() for t in (q, k, v, bias, out)}
    assert sum(t.numel() for p, t in kept.items() if p not in inputs_kept) == 2 * 8 * 9 * 3


@pytest.mark.parametrize(("grid", "options"), OPTIONS)
def test_ops_pass_opcheck(grid, options):
    bias = "causal" not in options
    q, k, v, table = inputs(grid, options["kernel_size"], heads=2, bias=bias)
    valid = torch.ones(2, *grid, dtype=torch.bool)
    kernel = [options["kernel_size"]] * len(grid)
    shifted = options.get("border") == "shifted"
    extents = torch.tensor([list(grid)] * 2) if shifted else None
    rest = (kernel, options.get("dilation", 1), options.get("causal", False), shifted, 0.5)
    first = tuple(t if t is None else t.requires_grad_() for t in (q, k, v, table))
    torch.library.opcheck(torch.ops.glocal.neighborhood_attention.default, (*first, valid, extents, *rest))
    with torch.no_grad():
        out, lse = torch.ops.glocal.neighborhood_attention(*first, valid, extents, *rest)
    arguments = (torch.randn_like(out), *first, valid, extents, out, lse, *rest)
    torch.library.opcheck(torch.ops.glocal.neighborhood_attention_backward.default, arguments)


@pytest.mark.parametrize("kernel", [(3, 5), (5, 3), (3, 3)])
def test_a_key_that_is_no_number_is_met_by_those_who_see_it(path, kernel):
    """Also in the slots that fill up a vector, which belong to nobody."""
    q, k, v = (torch.randn(1, 9, 9, 1, 8) for _ in range(3))
    k[0, 0, 2] = torch.nan
    met = neighborhood_attention(q, k, v, kernel_size=kernel).isnan().any(-1)[0, ..., 0]
    seeing = torch.zeros(9, 9, dtype=torch.bool)
    seeing[: kernel[0] // 2 + 1, max(2 - kernel[1] // 2, 0) : 3 + kernel[1] // 2] = True
    assert torch.equal(met, seeing)


def test_other_types_of_masks_are_taken_as_they_are_meant():
    q, k, v, bias = inputs((6, 7), 3)
    extents, valid = torch.tensor([[5, 6]] * len(q)), torch.rand(len(q), 6, 7) > 0.4
    call = {"kernel_size": 3, "border": "shifted"}
    expected = neighborhood_attention(q, k, v, bias, extents=extents, **call)
    assert torch.equal(
        neighborhood_attention(q, k, v, bias, extents=extents.int(), **call)[:, :5, :6], expected[:, :5, :6]
    )
    expected = neighborhood_attention(q, k, v, bias, kernel_size=3, valid=valid)
    assert torch.equal(neighborhood_attention(q, k, v, bias, kernel_size=3, valid=valid.long()), expected)


def test_compiles_in_one_graph(path):
    q, k, v, bias = inputs((6, 7), 3)
    function = torch.compile(neighborhood_attention, backend="aot_eager", fullgraph=True)
    options = {"kernel_size": 3, "border": "shifted", "scale": 0.3}
    expected = with_gradients(neighborhood_attention, (q, k, v, bias), v, **options)
    found = with_gradients(function, (q, k, v, bias), v, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_exports_with_any_size(path):
    class Layer(torch.nn.Module):
        def forward(self, q, k, v, bias):
            return neighborhood_attention(q, k, v, bias, kernel_size=3, dilation=2)

    sizes = {0: torch.export.Dim("b"), 1: torch.export.Dim("h"), 2: torch.export.Dim("w")}
    tensors = inputs((6, 7), 3)
    program = torch.export.export(Layer(), tensors, dynamic_shapes=(sizes, sizes, sizes, None)).module()
    for grid in ((6, 7), (3, 11), (20, 2)):
        tensors = inputs(grid, 3, batch=3)
        assert torch.equal(program(*tensors), Layer()(*tensors))


def test_multiply_adds_are_counted():
    q, k, v, bias = (t.requires_grad_() for t in inputs((6, 7), (3, 5), dim=8, value_dim=4))
    pairs = 2 * 6 * 7 * 3 * 15
    with FlopCounterMode(display=False) as counter:
        out = neighborhood_attention(q, k, v, bias, kernel_size=(3, 5))
        assert counter.get_total_flops() == 2 * pairs * (8 + 4)
        out.sum().backward()
    assert counter.get_total_flops() == 2 * pairs * (4 * 8 + 3 * 4)
