"""Attention on a GPU beside dense softmax in float64, with pairs and offsets counted token by token."""

import itertools
import math
import sys

import pytest
import torch

from glocal.kernels import biased_attention, neighborhood_attention, window_attention

from .on_gpu import DEVICE

TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def dense(q, k, v, seen, bias, scale):
    """[B, N, G, D], [B, M, G, D], [B, M, G, E]; seen [B, N, M]; bias [B|1, G, N, M] or None; nothing seen: 0."""
    scores = scale * torch.einsum("bngd,bmgd->bgnm", q, k)
    scores = scores if bias is None else scores + bias
    seen = seen[:, None]
    weights = scores.masked_fill(~seen, torch.finfo(scores.dtype).min).softmax(-1) * seen
    return torch.einsum("bgnm,bmge->bnge", weights, v)


def agree(run, oracle, tensors, dtype):
    """The result and every gradient; a tensor of the list may be None."""
    tensors = [None if t is None else t.to(DEVICE, dtype).requires_grad_() for t in tensors]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    y, expected = run(*tensors), oracle(*exact)
    assert y.dtype == dtype and y.shape == expected.shape
    grad = torch.randn(y.shape).to(DEVICE, dtype)
    found = [y, *torch.autograd.grad(y, [t for t in tensors if t is not None], grad)]
    wanted = [expected, *torch.autograd.grad(expected, [t for t in exact if t is not None], grad.double())]
    for i, (a, b) in enumerate(zip(found, wanted, strict=True)):
        error = (a.double() - b).abs().max()
        assert error <= TOLERANCES[dtype] * b.abs().max().clamp(min=0.1), f"{i}: off by {error} of {b.abs().max()}"


# Neighborhoods


def neighbors_along(n, extent, kernel, dilation, causal, shifted):
    """Of every token the sources along one axis and their entries."""
    found = []
    for token in range(n):
        if causal:
            sources = [token - dilation * (kernel - 1 - t) for t in range(kernel)]
        else:
            sources = [token + dilation * (t - kernel // 2) for t in range(kernel)]
        if shifted:
            own = list(range(token % dilation, extent, dilation))
            near = min(range(len(own)), key=lambda i: abs(own[i] - token)) if own else 0
            first = max(min(near - kernel // 2, len(own) - kernel), 0)
            sources = own[first : first + kernel]
        places = ((j, (j - token) // dilation + kernel - 1) for j in sources if 0 <= j < extent)
        found.append({j: min(max(place, 0), 2 * kernel - 2) for j, place in places})
    return found


def neighborhood_case(
    grid, kernel, *, past=0, dilation=1, causal=False, border="masked", heads=2, dim=3, value=5, biased=True,
    valid=False, extents=None, batch=1,
):  # fmt: skip
    rank = len(grid)
    keys = (*grid[:-1], grid[-1] + past)
    tensors = [
        torch.randn(batch, *grid, heads, dim),
        torch.randn(batch, *keys, heads, dim),
        torch.randn(batch, *keys, heads, value),
        torch.randn(heads, *[2 * k - 1 for k in kernel]) if biased else None,
    ]
    some = torch.rand(batch, *keys, device=DEVICE) < 0.7 if valid else None
    ends = None if extents is None else torch.tensor(extents, device=DEVICE)
    options = {"kernel_size": kernel, "dilation": dilation, "causal": causal, "border": border, "scale": 0.4}
    shape = [2 * k - 1 for k in kernel]
    seen = torch.zeros(batch, math.prod(grid), math.prod(keys), dtype=torch.bool)
    entry = torch.zeros(batch, math.prod(grid), math.prod(keys), dtype=torch.int64)
    for b in range(batch):
        limits = keys if extents is None else extents[b]
        axes = [
            neighbors_along(n, e, k, dilation, causal, border == "shifted")
            for n, e, k in zip(keys, limits, kernel, strict=True)
        ]
        axes[-1] = axes[-1][past:]
        for i, places in enumerate(itertools.product(*axes)):
            for sources in itertools.product(*(place.items() for place in places)):
                j = e = 0
                for (source, one), n, count in zip(sources, keys, shape, strict=True):
                    j, e = j * n + source, e * count + one
                seen[b, i, j], entry[b, i, j] = True, e
    seen = seen.to(DEVICE) if some is None else seen.to(DEVICE) & some.flatten(1)[:, None]

    inside = torch.ones(batch, *grid, 1, 1, device=DEVICE)  # what queries behind an image's end get is not defined
    for b in range(batch if extents else 0):
        for axis, n in enumerate(extents[b]):
            inside[b].narrow(axis, n, grid[axis] - n).zero_()

    def oracle(q, k, v, bias):
        q, k, v = (t.flatten(1, -3) for t in (q, k, v))
        table = None if bias is None else bias.flatten(1)[:, entry].transpose(0, 1)
        return dense(q, k, v, seen, table, 0.4).unflatten(1, grid) * inside

    def run(q, k, v, bias):
        return neighborhood_attention(q, k, v, bias, valid=some, extents=ends, **options) * inside.to(q.dtype)

    assert rank == len(kernel)
    return run, oracle, tensors


# Windows


def window_along(n, size, window, shift, extent, rolled):
    """Of every token along one axis which group it is in (None: in none), and where it stands."""
    if rolled:
        window, shift = (window, shift) if n > window else (n, 0)
        stands = [(t - shift) % size if t < size else t for t in range(n)]
        return [(p // window, p >= n - shift) for p in stands], stands
    groups = [(t - shift) // window if extent > window else 0 for t in range(n)]
    return [g if t < extent else None for t, g in enumerate(groups)], list(range(n))


def window_case(grid, window, shift=0, *, heads=2, dim=3, rolled=None, extents=None, biased=True, batch=1):
    tensors = [
        torch.randn(batch, *grid, 3 * heads * dim),
        torch.randn(math.prod(2 * w - 1 for w in window), heads) if biased else None,
    ]
    count = math.prod(grid)
    seen = torch.zeros(batch, count, count, dtype=torch.bool)
    entry = torch.zeros(count, count, dtype=torch.int64)
    for b in range(batch):
        axes = [
            window_along(n, rolled and rolled[i], window[i], shift, extents[b][i] if extents else n, rolled)
            for i, n in enumerate(grid)
        ]
        tokens = list(itertools.product(*(range(n) for n in grid)))
        for i, query in enumerate(tokens):
            for j, source in enumerate(tokens):
                groups = [(a[0][x], a[0][y]) for a, x, y in zip(axes, query, source, strict=True)]
                seen[b, i, j] = all(x == y and x is not None for x, y in groups)
                if seen[b, i, j]:
                    place = 0
                    for a, x, y, w in zip(axes, query, source, window, strict=True):
                        place = place * (2 * w - 1) + a[1][x] - a[1][y] + w - 1
                    entry[i, j] = place
    seen, ends = seen.to(DEVICE), None if extents is None else torch.tensor(extents, device=DEVICE)

    def oracle(qkv, table):
        q, k, v = qkv.flatten(1, -2).unflatten(-1, (3, heads, dim)).unbind(2)
        bias = None if table is None else table[entry].movedim(-1, 0)[None]
        out = dense(q, k, v, seen, bias, dim**-0.5).flatten(2).unflatten(1, grid)
        for axis, n in enumerate(rolled or ()):
            out = out.narrow(axis + 1, 0, n)
        return out

    def run(qkv, table):
        return window_attention(
            qkv, table, num_heads=heads, window_size=window, shift_size=shift, extents=ends, rolled_size=rolled
        )

    return run, oracle, tensors


# Whole grids


def whole_case(grid, *, heads=2, dim=3, value=5, of_each=False, valid=False, batch=2):
    count = math.prod(grid)
    tensors = [
        torch.randn(batch, count, heads, dim),
        torch.randn(batch, count, heads, dim),
        torch.randn(batch, count, heads, value),
        torch.randn(*([batch] if of_each else []), heads, *[2 * n - 1 for n in grid]),
    ]
    some = None
    if valid:
        some = torch.rand(batch, count) < 0.7
        some[0] = False
        some = some.to(DEVICE)
    entry = torch.zeros(count, count, dtype=torch.int64)
    tokens = list(itertools.product(*(range(n) for n in grid)))
    for (i, query), (j, source) in itertools.product(enumerate(tokens), enumerate(tokens)):
        place = 0
        for x, y, n in zip(query, source, grid, strict=True):
            place = place * (2 * n - 1) + x - y + n - 1
        entry[i, j] = place

    def oracle(q, k, v, table):
        table = table if of_each else table[None]
        seen = torch.ones(batch, count, count, dtype=torch.bool, device=DEVICE)
        seen = seen if some is None else seen & some[:, None]
        return dense(q, k, v, seen, table.flatten(2)[:, :, entry], 1.0)

    return lambda q, k, v, table: biased_attention(q, k, v, table, grid, valid=some), oracle, tensors


@pytest.fixture(autouse=True)
def nothing_else(request, monkeypatch):
    """Without the kernels there is no result: no other path is taken."""
    if "kernels_run" in request.fixturenames:
        for function, names in (
            (neighborhood_attention, ["_function", "_neighbors"]),
            (window_attention, ["_function", "_eager", "_eager_backward"]),
            (biased_attention, ["plain", "_at_once", "_windows"]),
        ):
            for name in names:
                monkeypatch.setattr(sys.modules[function.__module__], name, None)
