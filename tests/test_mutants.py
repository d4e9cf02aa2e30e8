"""What planted faults showed to be untested: see scripts/mutate."""

import dataclasses

import pytest
import torch

import glocal
from glocal import contract, mixer, mixers
from glocal.kernels import gathered_sum, local_sum

HOLE = torch.tensor([[True, True, True, True], [True, False, True, True], [True, True, True, True]])


def line(weights, index, num_sources):
    """An aggregation of a line of queries from a line of sources."""
    places = [torch.arange(n).float()[:, None] for n in (weights.shape[2], num_sources)]
    return glocal.Aggregation(weights, index, num_sources, *places, weights.shape[2:3], (num_sources,))


@pytest.mark.parametrize("infinite", [0, 1, -1])
@pytest.mark.parametrize("groups", [1, 2])
def test_a_slot_outside_takes_nothing_from_infinite_values(infinite, groups):
    """Whatever source stands in for -1, it is not read: zero times infinity would be NaN."""
    index = torch.tensor([[-1, 2], [2, -1], [-1, -1]]).expand(1, groups, 3, 2)
    values = torch.randn(1, 4, groups, 3)
    expected = torch.stack([values[:, 2], values[:, 2], torch.zeros(1, groups, 3)], 1).flatten(2)
    values[:, infinite] = float("inf")
    torch.testing.assert_close(glocal.aggregate(line(torch.ones(1, groups, 3, 2), index, 4), values), expected)


def test_an_output_changed_in_place_is_refused():
    mixer = glocal.build("AveragePooling()", 8)
    with glocal.inspect(mixer) as seen:
        mixer(torch.randn(2, 4, 3, 8)).mul_(2)
    with pytest.raises(ValueError, match="AveragePooling: its output was changed in place"):
        seen["AveragePooling"][0].weights()


@pytest.mark.parametrize("then", [False, True])
def test_a_call_is_looked_at_in_its_own_mode_and_the_mixer_stays_in_its(then):
    """Batch norm makes the modes differ."""
    mixer = glocal.build("DynamicDepthwiseConv(kernel_size=3)", 8).train(not then)
    x = torch.randn(3, 4, 5, 8)
    expected = mixer.weights(x).weights
    with glocal.inspect(mixer) as seen:
        mixer(x)
    mixer.train(then)
    (call,) = seen
    if then:  # statistics have not moved since
        assert not torch.allclose(mixer.weights(x).weights, expected)
    torch.testing.assert_close(call.weights().weights, expected)
    assert all(module.training == then for module in mixer.modules())


def test_queries_of_a_call_for_some_queries():
    mixer, x = glocal.build("SelfAttention(num_heads=2)", 8), torch.randn(2, 9, 8)
    with glocal.inspect(mixer) as seen:
        mixer(x, queries=torch.tensor([7, 3, 5]))
    found = seen["SelfAttention"][0].weights(torch.tensor([2, 0]))
    torch.testing.assert_close(found.weights, mixer.weights(x).weights[:, :, [5, 7]])
    assert found.query_positions.tolist() == [[5], [7]]


@pytest.mark.parametrize("spec", contract.examples())
def test_a_subset_of_the_queries_keeps_their_places(spec):
    mixer = glocal.build(spec, 32).eval()
    x, queries = torch.randn(2, *(9, 8)[: mixer.rank or 2], 32), torch.tensor([6, 1, 3, 1])
    some, every = mixer.weights(x, queries=queries), mixer.weights(x)
    torch.testing.assert_close(some.query_positions, every.query_positions[queries])
    torch.testing.assert_close(some.source_positions, every.source_positions)
    assert (some.out_grid, some.source_grid) == ((4,), every.source_grid)


@pytest.mark.parametrize(
    ("spec", "rows", "columns"),
    [
        ("AveragePooling(kernel_size=(3, 5))", (3, 6), (2, 7)),
        ("Convolution(kernel_size=(3, 5))", (3, 6), (2, 7)),
        ("DepthwiseConv(kernel_size=(3, 5))", (3, 6), (2, 7)),
        ("DynamicDepthwiseConv(kernel_size=(3, 5))", (3, 6), (2, 7)),
        ("NeighborhoodAttention(kernel_size=(3, 5), num_heads=2)", (3, 6), (2, 7)),
        ("NeighborhoodAttention(kernel_size=(3, 5), num_heads=2, border='shifted')", (3, 6), (2, 7)),
        ("WindowAttention(window_size=(2, 3), num_heads=2)", (4, 6), (3, 6)),
        ("WindowAttention(window_size=(2, 3), num_heads=2, mask_padding=False)", (4, 6), (3, 6)),
        ("LocalMLP(window_size=(2, 3), num_heads=2)", (4, 6), (3, 6)),
    ],
)
def test_the_first_length_is_that_of_the_rows(spec, rows, columns):
    """What the query at (4, 4) of a 9 x 9 grid reads."""
    found = glocal.build(spec, 8).eval().weights(torch.randn(1, 9, 9, 8))
    seen = found.dense()[..., 4 * 9 + 4, :].ne(0).any(1)
    expected = torch.zeros(1, *found.source_grid, dtype=torch.bool)
    expected[:, slice(*rows), slice(*columns)] = True
    assert torch.equal(seen, expected.flatten(1))


@pytest.mark.parametrize(
    "spec",
    [
        "WindowAttention(window_size=2, num_heads=2, shift_size=1)",
        "LocalMLP(window_size=2, num_heads=2, shift_size=1)",
        "NeighborhoodAttention(kernel_size=3, num_heads=2, border='shifted')",
        "RelativeAttention(grid_size=(3, 4), num_heads=2)",
    ],
)
@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("valid", [HOLE, HOLE.flip(0).roll(1, 1), ~HOLE])
def test_a_geometry_of_each_images_size_refuses_holes(spec, impl, valid):
    mixer = glocal.build(spec, 8)
    mixer.impl = impl
    with pytest.raises(ValueError, match="rectangle"):
        mixer(torch.randn(1, 3, 4, 8), valid=valid[None])


def test_kernels_sum_in_float32():
    """In bfloat16, 256 + 1 is 256 again: a running sum of that width would never leave it."""
    ones = torch.ones(25, dtype=torch.bfloat16)
    terms = torch.cat([256 * ones[:1], ones[1:]])
    first = torch.zeros(1, 1, 25, dtype=torch.int64)
    assert gathered_sum(terms.view(1, 1, 1, 25), ones.view(1, 25, 1, 1), first).item() == 280
    scattered = torch.ops.glocal.gathered_scatter(
        ones.view(1, 25, 1, 1), terms.view(1, 25, 1, 1), first.view(1, 25, 1), 1
    )
    assert scattered.item() == 280
    assert local_sum(ones.view(1, 5, 5, 1), terms.view(1, 1, 1, 1, 25))[0, 2, 2].item() == 280
    assert local_sum(ones.view(1, 5, 5, 1), terms.view(1, 1, 1, 1, 25)).dtype == torch.bfloat16


def instead(owner, name, make):
    """Replaces a method or function by what make(the real one) gives."""
    return lambda patch: patch.setattr(owner, name, make(getattr(owner, name)))


def fast(broken):
    """AveragePooling with broken(its output) as the fast path."""
    return instead(
        mixers.AveragePooling,
        "fast",
        lambda real: lambda self, x, values, **call: broken(real(self, x, values, **call)),
    )


def zeroed(aggregation):
    return dataclasses.replace(aggregation, weights=torch.zeros_like(aggregation.weights))


def all_real(real):
    """A padded batch of which every image is taken for full."""
    return lambda self, tokens, sources, past, valid, device: real(
        self, tokens, sources, past, None if valid is None else torch.ones_like(valid), device
    )


def branch(out):
    return out if out.sum() != 0 else -out


POOLING, CAUSAL = "AveragePooling()", "SelfAttention(num_heads=2, causal=True)"
BROKEN = {  # check -> spec, and what breaks its promise
    "forward_equals_definition": (POOLING, fast(lambda out: out + 1e-6)),
    "empty_batch": (POOLING, fast(lambda out: out + 0 * out[0])),
    "gradient": (POOLING, fast(lambda out: out + 0.1 * out.detach())),
    "double_backward": (
        CAUSAL,
        instead(mixers._attention, "_no_second_derivative", lambda real: lambda grad: None),
    ),
    "dense_says_the_same": (POOLING, instead(glocal.Aggregation, "coalesce", lambda real: zeroed)),
    "positions_are_those_of_the_grid": (
        POOLING,
        instead(
            mixers.AveragePooling,
            "_weights",
            lambda real: (
                lambda self, x, **call: dataclasses.replace(
                    found := real(self, x, **call), query_positions=found.query_positions.flip(-1)
                )
            ),
        ),
    ),
    "scores_make_the_weights": (
        "SelfAttention(num_heads=2)",
        instead(
            mixers.SelfAttention,
            "scores",
            lambda real: lambda self, x: {name: 2 * term for name, term in real(self, x).items()},
        ),
    ),
    "query_subset": (
        POOLING,
        instead(glocal.Aggregation, "select", lambda real: lambda self, queries: real(self, queries.flip(0))),
    ),
    "causal_reads_no_later_token": (
        CAUSAL,
        instead(mixers.SelfAttention, "_seen", lambda real: lambda *arguments: None),
    ),
    "padding_changes_nothing": ("SelfAttention(num_heads=2)", instead(mixers.SelfAttention, "_seen", all_real)),
    "looking_changes_nothing": (
        "DynamicDepthwiseConv(kernel_size=3)",
        instead(
            mixers.DynamicDepthwiseConv,
            "kernels",
            lambda real: lambda self, x, valid, update: real(self, x, valid, update=self.training),
        ),
    ),
    "forced_fast_never_falls_back": (
        POOLING,
        instead(mixers.AveragePooling, "fast", lambda real: lambda self, x, values, **call: self.reference(x, **call)),
    ),
    "float32": (POOLING, fast(lambda out: out * 1.001)),
    "float64": (POOLING, fast(lambda out: out.float().double())),
    "bfloat16": (POOLING, fast(lambda out: out * 1.05)),
    "autocast": (POOLING, fast(lambda out: out * 1.2)),
    "wrong_shapes_are_refused": (POOLING, instead(mixer, "check_tokens", lambda real: lambda *arguments: None)),
    "state_dict_round_trip": (
        "AveragePooling(kernel_size=5)",
        instead(mixers.AveragePooling, "__repr__", lambda real: lambda self: "AveragePooling()"),
    ),
    "declared_cost": (POOLING, instead(mixers.AveragePooling, "macs", lambda real: lambda self, grid: 1)),
    "compiles": (POOLING, fast(branch)),
    "exports": (POOLING, fast(branch)),
}


@pytest.mark.parametrize("check", BROKEN)
def test_every_check_of_the_contract_can_fail(check, monkeypatch):
    spec, break_it = BROKEN[check]
    promise = getattr(contract, check)
    grid = (6,) if "causal" in spec else (4, 3)
    assert contract.run(spec, promise, grid).state == "kept"
    break_it(monkeypatch)
    outcome = contract.run(spec, promise, grid)
    assert (outcome.state, outcome.check) == ("broken", check)
    assert outcome.sentence and not outcome.sentence.startswith(("TypeError", "AssertionError")), (
        "the breaking itself is broken"
    )


def test_every_check_of_the_contract_is_among_them():
    assert set(BROKEN) == {check.__name__ for spec in contract.examples() for check, _ in contract.cases(spec)}
