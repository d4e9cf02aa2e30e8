"""Neighborhood attention by its definition: dense softmax attention under masks made by loops."""

import itertools

import torch

from glocal.kernels import neighborhood_attention

NAMES = ("output", "gradient of q", "gradient of k", "gradient of v", "gradient of bias")


def axis_sources(i, length, kernel, dilation, causal, border):
    """The coordinates that coordinate i attends to along one axis."""
    if causal:
        reach = [i - t * dilation for t in reversed(range(kernel))]
    elif border == "masked":
        reach = [i + (t - kernel // 2) * dilation for t in range(kernel)]
    else:  # moved inward among the positions that are a multiple of the dilation away
        reach = list(range(i % dilation, length, dilation))
        start = min(max(reach.index(i) - kernel // 2, 0), max(len(reach) - kernel, 0))
        return reach[start : start + kernel]
    return [p for p in reach if 0 <= p < length]


def dense(
    q, k, v, bias=None, *, kernel_size, dilation=1, causal=False, border="masked", scale=1.0, valid=None, extents=None
):
    """All pairs of tokens, and which of them may see each other. Queries behind an image's extent give 0."""
    grid, sources = q.shape[1:-2], k.shape[1:-2]
    kernel = [kernel_size] * len(grid) if isinstance(kernel_size, int) else kernel_size
    past = sources[0] - grid[0]
    places = {place: m for m, place in enumerate(itertools.product(*map(range, sources)))}
    queries = [place for place in places if place[0] >= past]
    seen = torch.zeros(len(q), len(queries), len(places), dtype=torch.bool)
    entry = torch.zeros(len(grid), len(queries), len(places), dtype=torch.int64)
    for b, (n, place) in itertools.product(range(len(q)), enumerate(queries)):
        lengths = sources if extents is None else extents[b].tolist()
        if any(p >= length for p, length in zip(place, lengths, strict=True)):
            continue
        axes = [
            axis_sources(p, *each, dilation, causal, border) for p, *each in zip(place, lengths, kernel, strict=True)
        ]
        for source in itertools.product(*axes):
            m = places[source]
            seen[b, n, m] = valid is None or valid[(b, *source)]
            if b == 0 or extents is not None:
                offset = [(s - p) // dilation + w - 1 for s, p, w in zip(source, place, kernel, strict=True)]
                entry[:, n, m] = torch.tensor(offset)
    q, k, v = (t.flatten(1, -3) for t in (q, k, v))
    scores = scale * torch.einsum("bngd,bmgd->bgnm", q, k)
    if bias is not None:
        scores = scores + bias[(slice(None), *entry)].to(scores.dtype)
    scores = scores.masked_fill(~seen[:, None], torch.finfo(scores.dtype).min)
    weights = scores.softmax(-1) * seen[:, None]
    return torch.einsum("bgnm,bmge->bnge", weights, v).unflatten(1, grid)


def inputs(grid, kernel, *, batch=2, heads=3, dim=12, value_dim=None, past=0, bias=True, dtype=torch.float64):
    kernel = [kernel] * len(grid) if isinstance(kernel, int) else kernel
    sources = (grid[0] + past, *grid[1:])
    q = torch.randn(batch, *grid, heads, dim, dtype=dtype)
    k = torch.randn(batch, *sources, heads, dim, dtype=dtype)
    v = torch.randn(batch, *sources, heads, value_dim or dim, dtype=dtype)
    table = torch.randn(heads, *(2 * n - 1 for n in kernel), dtype=torch.promote_types(dtype, torch.float32))
    return q, k, v, table if bias else None


def with_gradients(function, tensors, upstream, **options):
    leaves = [t if t is None else t.detach().clone().requires_grad_() for t in tensors]
    out = function(*leaves, **options)
    return out, *torch.autograd.grad(out, [t for t in leaves if t is not None], upstream.to(out.dtype))


def agrees(tensors, *, rtol=1e-9, atol=1e-10, **options):
    """Output and gradients are those of the dense attention; what is behind an extent is not looked at."""
    expected = dense(*tensors, **options)
    upstream = torch.randn(expected.shape, dtype=torch.float64)
    inside = torch.ones(expected.shape[:-2], dtype=torch.bool)
    if options.get("extents") is not None:
        for b, place in itertools.product(range(len(inside)), itertools.product(*map(range, inside.shape[1:]))):
            inside[(b, *place)] = all(p < n for p, n in zip(place, options["extents"][b].tolist(), strict=True))
    upstream = upstream * inside[..., None, None]
    expected = with_gradients(dense, tensors, upstream, **options)
    found = with_gradients(neighborhood_attention, tensors, upstream, **options)
    for name, got, want in zip(NAMES, found, expected, strict=False):
        if name == "output":
            got, want = got * inside[..., None, None], want * inside[..., None, None]
        assert got.dtype == want.dtype and got.shape == want.shape
        torch.testing.assert_close(got, want, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{name}: {text}")
