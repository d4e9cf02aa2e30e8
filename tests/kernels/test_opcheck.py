"""Every operation that the kernels register passes torch.library's own checks: here, or in the tests of its file."""

import re
from pathlib import Path

import pytest
import torch

import glocal.kernels  # noqa: F401

DOUBLE = {"dtype": torch.float64, "requires_grad": True}
INDEX = torch.tensor([[[0, 4, -1], [2, 2, 1], [-1, -1, -1], [3, 0, 4]]])
SIZES = ([3, 3], 1, [-1, -1], [5, 4])  # kernel, dilation, offset, grid


def arguments():
    """Of each operation, those of several calls."""
    tokens, shared = torch.randn(2, 5, 4, 6, **DOUBLE), torch.randn(1, 1, 1, 6, 9, **DOUBLE)
    own, bias = torch.randn(2, 5, 4, 3, 9, **DOUBLE), torch.randn(6, **DOUBLE)
    heads = [torch.randn(2, 6, 2, 4, **DOUBLE) for _ in range(3)]
    table, valid = torch.randn(2, 2, 3, 5, dtype=torch.float64), torch.tensor([[True] * 6, [True] * 3 + [False] * 3])
    rows, columns = torch.randn(3, 2, 5, **DOUBLE), torch.randn(3, 7, 4, **DOUBLE)
    values, above = torch.randn(2, 5, 4, 1, 6, **DOUBLE), torch.randn(2, 2, 7, 3, 6, **DOUBLE)
    each = torch.randn(2, 5, 4, 3, 6, **DOUBLE)
    return {
        "gathered_scores": [(torch.randn(2, 4, 2, 3, **DOUBLE), torch.randn(2, 5, 2, 3, **DOUBLE), INDEX)],
        "gathered_sum": [(torch.randn(2, 4, 2, 3, **DOUBLE), torch.randn(2, 5, 2, 3, **DOUBLE), INDEX)],
        "gathered_scatter": [(torch.randn(2, 4, 2, 3, **DOUBLE), torch.randn(2, 4, 2, 3, **DOUBLE), INDEX, 5)],
        "separable_sum": [(rows, columns, values), (rows, columns, each)],
        "separable_sum_transposed": [(rows, columns, above, True), (rows, columns, above, False)],
        "separable_sum_products": [(columns, values, above), (columns, each, above)],
        "local_sum": [(tokens, shared, bias, *SIZES), (tokens, own, None, *SIZES), (tokens, own, bias, *SIZES)],
        "local_sum_transposed": [(tokens, shared, *SIZES), (tokens, own, *SIZES)],
        "local_sum_products": [(tokens, tokens, *SIZES[:3], shared.shape), (tokens, tokens, *SIZES[:3], own.shape)],
        "biased_attention": [(*heads, table[:1], None), (*heads, table, valid)],
        "biased_attention_backward": [
            (heads[0].detach(), *(t.detach() for t in (*heads, some)), seen)
            for some, seen in ((table[:1], None), (table, valid))
        ],
    }


def test_every_operation_is_checked():
    registered = torch._C._dispatch_get_all_op_names()
    elsewhere = {
        name
        for test in Path(__file__).parent.glob("test_*_attention*.py")
        for name in re.findall(r"torch\.ops\.glocal\.(\w+)", test.read_text("utf-8"))
    }
    names = {name.removeprefix("glocal::") for name in registered if name.startswith("glocal::")}
    assert names == set(arguments()) | elsewhere


@pytest.mark.parametrize("name", arguments())
def test_opcheck(name):
    for call in arguments()[name]:
        torch.library.opcheck(getattr(torch.ops.glocal, name).default, call)
