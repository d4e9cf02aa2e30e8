"""Aggregation and aggregate() against triple loops."""

from itertools import product

import pytest
import torch
from torch.testing import assert_close

import glocal

B, G, N, M, K, D = 2, 3, 4, 5, 6, 2


def make(weights, index=None, num_sources=M, num_queries=N):
    """An aggregation of a line of queries from a line of sources."""
    return glocal.Aggregation(
        weights=weights,
        index=index,
        num_sources=num_sources,
        query_positions=torch.arange(num_queries).float().unsqueeze(-1),
        source_positions=torch.arange(num_sources).float().unsqueeze(-1),
        out_grid=(num_queries,),
        source_grid=(num_sources,),
    )


def randn(*shape):
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


def at(tensor, *indices):
    """The entry of a tensor some of whose axes are shared: size 1."""
    return tensor[tuple(i if n > 1 else 0 for i, n in zip(indices, tensor.shape, strict=True))]


def slots(a, b, g, i):
    """(source, weight) of every slot of one row that lies inside the grid."""
    for k in range(a.weights.shape[-1]):
        source = k if a.index is None else int(at(a.index, b, g, i, k))
        if source >= 0:
            yield source, at(a.weights, b, g, i, k)


def loop(a, values, groups=G):
    batch, _, _, dim = values.shape
    images = []
    for b in range(batch):
        rows = []
        for i in range(a.num_queries):
            row = []
            for g in range(groups):
                total = torch.zeros(dim, dtype=torch.float64, requires_grad=True)
                for source, weight in slots(a, b, g, i):
                    total = total + weight * at(values, b, source, g, slice(None) if dim > 1 else 0)
                row.append(total)
            rows.append(torch.cat(row))
        images.append(torch.stack(rows))
    return torch.stack(images)


def loop_dense(a, batch, groups):
    dense = torch.zeros(batch, groups, a.num_queries, a.num_sources, dtype=torch.float64)
    for b, g, i in product(range(batch), range(groups), range(a.num_queries)):
        for source, weight in slots(a, b, g, i):
            dense[b, g, i, source] += weight.detach()
    return dense


def check(a, values, groups=G):
    expected, got = loop(a, values, groups), glocal.aggregate(a, values)
    assert_close(got, expected)
    upstream = torch.randn_like(expected)
    leaves = [a.weights, values]
    wanted = torch.autograd.grad(expected, leaves, upstream, allow_unused=True, materialize_grads=True)
    for grad, want in zip(torch.autograd.grad(got, leaves, upstream), wanted, strict=True):
        assert_close(grad, want)
    batch, groups = (max(a.weights.shape[x], 1 if a.index is None else a.index.shape[x]) for x in (0, 1))
    dense = a.dense()
    assert dense.shape == (batch, groups, a.num_queries, a.num_sources)
    assert_close(dense, loop_dense(a, batch, groups))
    check_coalesced(a, batch, groups)


def check_coalesced(a, batch, groups):
    merged = a.coalesce()
    for b, g, i in product(range(batch), range(groups), range(a.num_queries)):
        expected = {}
        for source, weight in slots(a, b, g, i):
            expected[source] = expected.get(source, 0) + weight
        found = list(slots(merged, b, g, i))
        assert sorted(source for source, _ in found) == sorted(expected), "one slot for each source, none lost"
        for source, weight in found:
            assert_close(weight, expected[source])
    assert (merged.num_sources, merged.num_queries) == (a.num_sources, a.num_queries)
    assert merged.out_grid == a.out_grid


SHARED = list(product([1, B], [1, G], [1, N]))


@pytest.mark.parametrize("shape", SHARED)
def test_dense(shape):
    check(make(randn(*shape, M)), randn(B, M, G, D))


@pytest.mark.parametrize("index_shape", SHARED)
@pytest.mark.parametrize("shape", SHARED)
def test_index_repeated_and_outside_slots(shape, index_shape):
    index = torch.randint(-1, M, (*index_shape, K))
    index.view(-1)[:3] = torch.tensor([2, -1, 2])
    check(make(randn(*shape, K), index), randn(B, M, G, D))


@pytest.mark.parametrize("index_shape", SHARED)
@pytest.mark.parametrize("shape", SHARED)
def test_one_slot_a_row(shape, index_shape):
    """A dense convolution's head: one weight for everything and one source for each query."""
    check(make(randn(*shape, 1), torch.randint(-1, M, (*index_shape, 1))), randn(B, M, G, D))


@pytest.mark.parametrize("shape", SHARED)
def test_one_source(shape):
    check(make(randn(*shape, 1), num_sources=1), randn(B, 1, G, D))


@pytest.mark.parametrize("index_shape", SHARED)
def test_slots_that_share_their_source(index_shape):
    check(make(randn(1, 1, 1, K), torch.randint(-1, M, (*index_shape, 1))), randn(B, M, G, D))


@pytest.mark.parametrize("index_shape", [None, (1, G, N, K), (B, 1, N, K)])
def test_values_offered_to_all_groups(index_shape):
    index = None if index_shape is None else torch.randint(-1, M, index_shape)
    check(make(randn(B, G, N, M if index is None else K), index), randn(B, M, 1, D))


@pytest.mark.parametrize("index_shape", [(1, 1, N, K), (1, G, N, K)])
def test_one_channel_for_each_group(index_shape):
    check(make(randn(1, G, 1, K), torch.randint(-1, M, index_shape)), randn(B, M, G, 1))


def test_all_slots_outside_give_zero():
    a, values = make(randn(B, G, N, K), torch.full((1, 1, N, K), -1)), randn(B, M, G, D)
    check(a, values)
    assert (glocal.aggregate(a, values) == 0).all()


@pytest.mark.parametrize("weights_shape", [(1, 1, 1, K), (B, G, N, K)])
def test_a_slot_outside_takes_nothing_even_from_infinite_weights(weights_shape):
    weights = torch.randn(weights_shape, dtype=torch.float64)
    weights[..., 2] = float("inf")
    index = torch.randint(0, M, (1, 1, N, K))
    index[..., 2] = -1
    values = randn(B, M, G, D)
    a = make(weights, index)
    assert_close(glocal.aggregate(a, values), loop(a, values))
    assert a.dense().isfinite().all()


def test_derivatives():
    index = torch.tensor([[2, -1, 2], [0, 4, 4], [-1, -1, 1], [3, 2, 0]]).view(1, 1, N, 3)
    weights, values = randn(B, G, N, 3), randn(B, M, G, D)

    def mixed(weights, values):
        return glocal.aggregate(make(weights, index), values)

    def dense(weights):
        return make(weights, index).dense(), make(weights, index).coalesce().weights

    assert torch.autograd.gradcheck(mixed, (weights, values))
    assert torch.autograd.gradgradcheck(mixed, (weights, values))
    assert torch.autograd.gradcheck(dense, (weights,))


def test_dense_and_sparse_say_the_same():
    index = torch.randint(-1, M, (B, G, N, K))
    a, values = make(randn(B, G, N, K), index), randn(B, M, G, D)
    assert_close(glocal.aggregate(make(a.dense()), values), glocal.aggregate(a, values))
    assert_close(glocal.aggregate(a.coalesce(), values), glocal.aggregate(a, values))


def parts():
    return [
        make(randn(B, 2, N, 3), torch.randint(-1, M, (1, 1, N, 3))),
        make(randn(1, 1, 1, K), torch.randint(-1, M, (1, 1, N, K))),
        make(randn(1, 2, 1, 1), torch.randint(-1, M, (1, 2, N, 1))),
        make(randn(B, 1, N, M)),
        make(randn(1, 2, 1, 2), torch.randint(-1, M, (B, 1, N, 2))),
    ]


GROUPS = [2, 1, 2, 1, 2]


@pytest.mark.parametrize("chosen", [*product(range(5), repeat=2), (0, 1, 2, 3, 4)])
def test_cat_puts_operators_beside_each_other(chosen):
    all_parts = parts()
    several, groups = [all_parts[i] for i in chosen], [GROUPS[i] for i in chosen]
    joined, values = glocal.cat(several), randn(B, M, sum(groups), D)
    expected = [loop(p, v, g) for p, v, g in zip(several, values.split(groups, 2), groups, strict=True)]
    expected = torch.cat(expected, -1)
    got = glocal.aggregate(joined, values)
    assert_close(got, expected)
    assert_close(
        joined.dense().expand(B, -1, -1, -1),
        torch.cat([loop_dense(p, B, g) for p, g in zip(several, groups, strict=True)], 1),
    )
    leaves = [values, *{id(p): p.weights for p in several}.values()]
    upstream = torch.randn_like(got)
    wanted = torch.autograd.grad(expected, leaves, upstream, allow_unused=True, materialize_grads=True)
    found = torch.autograd.grad(got, leaves, upstream, allow_unused=True, materialize_grads=True)
    for grad, want in zip(found, wanted, strict=True):
        assert_close(grad, want)


def test_cat_of_one_part_is_that_part():
    a, values = parts()[0], randn(B, M, 2, D)
    assert_close(glocal.aggregate(glocal.cat([a]), values), loop(a, values, 2))


def test_cat_refuses_what_does_not_match():
    with pytest.raises(ValueError, match="queries"):
        glocal.cat([make(randn(1, 1, N, M)), make(randn(1, 1, N + 1, M), num_queries=N + 1)])
    with pytest.raises(ValueError, match="sources"):
        glocal.cat([make(randn(1, 1, N, M)), make(randn(1, 1, N, M + 1), num_sources=M + 1)])
    with pytest.raises(ValueError, match="parts"):
        glocal.cat([])


@pytest.mark.parametrize("which", range(5))
@pytest.mark.parametrize("queries", [[2], [3, 0], [1, 1, 2, 0, 3], []])
def test_select_takes_rows(which, queries):
    a, groups = parts()[which], GROUPS[which]
    queries = torch.tensor(queries, dtype=torch.int64)
    some, values = a.select(queries), randn(B, M, groups, D)
    assert some.num_queries == len(queries)
    assert_close(glocal.aggregate(some, values), loop(a, values, groups)[:, queries])
    assert_close(some.dense().expand(B, groups, -1, -1), loop_dense(a, B, groups)[:, :, queries])
    assert_close(some.query_positions, a.query_positions[queries])
    assert_close(some.source_positions, a.source_positions)


@pytest.mark.parametrize(("batch", "shape"), [(0, (1, G, N, K)), (0, (0, G, N, K)), (3, (1, 1, 1, K))])
def test_any_number_of_images(batch, shape):
    a = make(torch.randn(shape), torch.randint(-1, M, (1, 1, N, K)))
    assert glocal.aggregate(a, torch.randn(batch, M, G, D)).shape == (batch, N, G * D)


def test_wrong_shapes_are_refused():
    with pytest.raises(ValueError, match=r"weights.*\(1, 1, 4\)"):
        make(torch.randn(1, 1, N))
    with pytest.raises(ValueError, match=r"(?s)3.*5"):
        make(torch.randn(1, 1, N, 3))
    a = make(torch.randn(1, G, N, M))
    with pytest.raises(ValueError, match=r"(?s)4.*5"):
        glocal.aggregate(a, torch.randn(B, 4, G, D))
    with pytest.raises(ValueError, match=r"(?s)2.*3|3.*2"):
        glocal.aggregate(a, torch.randn(B, M, 2, D))


@pytest.mark.parametrize("infinite", [0, 1, -1])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_slot_outside_takes_nothing_from_infinite_values(infinite, groups):
    """Whatever source stands in for -1, it is not read: zero times infinity would be NaN."""
    index = torch.tensor([[-1, 2], [2, -1], [-1, -1]]).expand(1, groups, 3, 2)
    values = torch.randn(1, 4, groups, 3)
    expected = torch.stack([values[:, 2], values[:, 2], torch.zeros(1, groups, 3)], 1).flatten(2)
    values[:, infinite] = float("inf")
    torch.testing.assert_close(glocal.aggregate(make(torch.ones(1, groups, 3, 2), index, 4, 3), values), expected)


# planted by scripts/mutate
FAULTS = (
    (
        "dense() counts slots outside the grid for the first source",
        "index = torch.where(index < 0, outside, index)",
        "index = torch.where(index < 0, 0, index)",
    ),
    (
        "dense() gives sources by queries",
        "scatter_add(-1, index, weights)[..., :outside]",
        "scatter_add(-1, index, weights)[..., :outside].mT",
    ),
    (
        "a slot outside multiplies its weight with zero, which an infinite weight turns to NaN",
        "    weights = torch.where(a.index < 0, 0, weights)\n    index",
        "    index",
    ),
    (
        "a slot outside multiplies the first source with zero, which an infinite value turns to NaN",
        "torch.where(a.index < 0, a.num_sources, a.index)",
        "a.index.clamp(min=0)",
    ),
    (
        "coalesce() keeps one of the weights that a source has, not their sum",
        "torch.zeros_like(weights).scatter_add(-1, slot, weights)",
        "torch.zeros_like(weights).scatter(-1, slot, weights)",
    ),
    (
        "coalesce() sorts the sources and leaves their weights where they were",
        "        weights = weights.gather(-1, order)\n",
        "",
    ),
    (
        "cat() joins the parts from last to first",
        "weights=torch.cat(weights, 1), index=torch.cat(index, 1)",
        "weights=torch.cat(weights[::-1], 1), index=torch.cat(index[::-1], 1)",
    ),
    (
        "cat() fills short rows with the first source, and weights of one",
        "slots, 0.0).expand(batch, -1, -1, -1) for w, _ in written]\n    index = [_pad_slots(i, slots, -1)",
        "slots, 1.0).expand(batch, -1, -1, -1) for w, _ in written]\n    index = [_pad_slots(i, slots, 0)",
    ),
    (
        "select() takes the sources of the query before",
        "index = index[:, :, queries]",
        "index = index[:, :, queries - 1]",
    ),
    (
        "select() says the positions of the first queries",
        "query_positions=self.query_positions[queries]",
        "query_positions=self.query_positions[: len(queries)]",
    ),
    (
        "the output has channels before groups",
        "return mixed.expand(batch, queries, groups, dim).reshape(",
        "return mixed.expand(batch, queries, groups, dim).transpose(2, 3).reshape(",
    ),
)
