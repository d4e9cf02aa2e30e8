"""What planted faults showed to be untested: see scripts/mutate."""

import dataclasses

import pytest
import torch

import glocal
from glocal import contract, mixers, operator
from glocal.kernels import gathered_scores, gathered_sum, local_sum

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


@pytest.mark.parametrize("then", [False, True])
def test_a_call_is_looked_at_in_its_own_precision(then):
    """Bit for bit the weights of that precision, whether the look is under autocast or not."""
    mixer, x = glocal.build("SelfAttention(num_heads=2)", 8), torch.randn(2, 9, 8)
    with torch.autocast("cpu", torch.bfloat16, enabled=not then):
        expected = mixer.weights(x).weights
        with glocal.inspect(mixer) as seen:
            mixer(x)
    with torch.autocast("cpu", torch.bfloat16, enabled=then):
        assert not torch.equal(mixer.weights(x).weights, expected)
        found = seen["SelfAttention"][0].weights().weights
    assert found.dtype == expected.dtype
    assert torch.equal(found, expected)


@pytest.mark.parametrize("spec", ["SelfAttention(num_heads=2)", "InhomogeneousDepthwiseConv(num_groups=2)"])
@pytest.mark.parametrize("then", [False, True])
def test_a_call_in_inference_mode_is_looked_at_in_inference_mode(spec, then):
    """Its tensors can be part of no graph; those of any other call can, whatever the mode of the look."""
    mixer, x = glocal.build(spec, 8).eval(), torch.randn(2, 4, 4, 8)
    expected = mixer.weights(x).weights
    with torch.inference_mode(not then), glocal.inspect(mixer) as seen:
        mixer(x.clone())
    with torch.inference_mode(then):
        found = seen.calls[0].weights().weights
    torch.testing.assert_close(found, expected)
    assert found.is_inference() != then
    assert found.requires_grad == then


def test_a_later_call_in_training_does_not_hide_an_earlier_one():
    """It moves the batch norm's statistics, on which weights in training do not depend."""
    mixer = glocal.build("InhomogeneousDepthwiseConv(kernel_size=3, num_groups=2)", 8).train()
    first, second = torch.randn(2, 2, 4, 4, 8)
    expected = mixer.weights(first).weights
    with glocal.inspect(mixer) as seen:
        mixer(first)
        mixer(second)
    torch.testing.assert_close(seen.calls[0].weights().weights, expected)


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
    if isinstance(mixer, glocal.TokenModule):
        return  # no weights
    grid = (21,) if mixer.rank == 1 else (9, 8)  # at least seven outputs, whatever the stride
    x, queries = torch.randn(2, *grid, 32), torch.tensor([6, 1, 3, 1])
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


@pytest.mark.parametrize("infinite", [float("inf"), float("nan")])
def test_an_empty_slot_of_a_kernel_takes_nothing_from_what_is_infinite(infinite):
    """Neither from the other factor of the slot nor from a source that is read in its stead."""
    index = torch.tensor([[[0, -1], [2, 1], [-1, 1]]])
    full = (index >= 0).unsqueeze(2)  # [1, N, G, K]
    some, sources = torch.randn(1, 3, 1, 4), torch.randn(1, 3, 1, 4)
    weights = torch.randn(1, 3, 1, 2).masked_fill(~full, infinite)

    unread = some.clone()
    unread[:, 2] = infinite  # of its slots one is empty
    assert gathered_scores(unread, sources, index)[0, 2, 0, 0] == 0
    assert gathered_scores(unread, sources, index)[0, :2].isfinite().all()

    picked = sources[0, index[0].clamp(min=0), 0]  # [N, K, D]
    expected = (weights[0, :, 0].masked_fill(index[0] < 0, 0)[..., None] * picked).sum(1)
    torch.testing.assert_close(gathered_sum(weights, sources, index)[0, :, 0], expected)
    sources[:, 0] = infinite  # read by the first query only
    torch.testing.assert_close(gathered_sum(weights, sources, index)[0, 1:, 0], expected[1:])

    spread = torch.zeros(3, 4)
    for query, slot in full[0, :, 0].nonzero().tolist():
        spread[index[0, query, slot]] += weights[0, query, 0, slot] * some[0, query, 0]
    torch.testing.assert_close(torch.ops.glocal.gathered_scatter(weights, some, index, 3)[0, :, 0], spread)


@pytest.mark.parametrize(
    ("spec", "reach"),
    [
        ("WindowAttention(window_size=4, num_heads=2)", 4),
        ("WindowAttention(window_size=4, num_heads=2, shift_size=2)", 2),
        ("LocalMLP(window_size=4, num_heads=2, shift_size=2)", 2),
        ("NeighborhoodAttention(kernel_size=3, num_heads=2)", 2),
        ("NeighborhoodAttention(kernel_size=5, num_heads=2, border='shifted', dilation=2)", 10),
    ],
)
@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_nan_stays_where_it_is_seen(spec, reach, impl):
    """Windows of a 6 x 5 grid have empty places, which read no other token, not even to multiply it with zero."""
    mixer, x = glocal.build(spec, 8), torch.randn(2, 6, 5, 8)
    mixer.impl = impl
    x[:, 0, 0] = float("nan")
    seen = torch.zeros(6, 5, dtype=torch.bool)
    seen[:reach, :reach] = True
    if "dilation" in spec:
        seen[1::2] = seen[:, 1::2] = False
    assert torch.equal(mixer(x).isnan().all(-1), seen.expand(2, -1, -1))
    assert torch.equal(mixer(x).isnan().any(-1), seen.expand(2, -1, -1))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("spec", ["SelfAttention(num_heads=2)", "DepthwiseConv(kernel_size=3)"])
def test_a_mask_hides_no_nan_of_real_tokens(spec, impl):
    mixer, x = glocal.build(spec, 8), torch.randn(1, 4, 3, 8)
    mixer.impl = impl
    x[0, 1, 1] = float("nan")
    valid = torch.ones(1, 4, 3, dtype=torch.bool)
    valid[0, 3] = False
    assert mixer(x, valid=valid)[0, 1, 1].isnan().all()


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), 1e30])
def test_padding_of_another_source_may_hold_anything(impl, rubbish):
    mixer, x, source = glocal.build("SelfAttention(num_heads=2)", 8), torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    mixer.impl = impl
    valid = torch.arange(5) < torch.tensor([[5], [2]])
    source = source.masked_fill(~valid[..., None], rubbish)
    out = mixer(x, source, valid=valid)
    torch.testing.assert_close(out[:1], mixer(x[:1], source[:1]))
    torch.testing.assert_close(out[1:], mixer(x[1:], source[1:, :2]))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), list(mixer.parameters())))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("steps", [(4,), (1, 3), (2, 1, 1)])
@pytest.mark.parametrize("real", [[2, 3], [0, 2, 3]])
def test_padding_before_and_behind_a_cache_may_hold_anything(impl, steps, real):
    """`valid` is that of all tokens so far, those that a call brings are its last."""
    mixer, x = glocal.build("SelfAttention(num_heads=2, causal=True)", 8), torch.randn(2, 4, 8)
    mixer.impl = impl
    valid = torch.ones(2, 4, dtype=torch.bool)
    valid[1] = torch.isin(torch.arange(4), torch.tensor(real))
    x = x.masked_fill(~valid[..., None], float("nan"))
    cache, rows = glocal.Cache(), []
    for end, step in zip(torch.tensor(steps).cumsum(0).tolist(), steps, strict=True):
        rows.append(mixer(x[:, end - step : end], valid=valid[:, :end], cache=cache))
    out = torch.cat(rows, 1)
    torch.testing.assert_close(out[:1], mixer(x[:1]))
    torch.testing.assert_close(out[1:, real], mixer(x[1:, real]))


def test_another_layer_may_not_look_into_a_cache():
    first, second = (glocal.build("SelfAttention(num_heads=2, causal=True)", 8) for _ in range(2))
    cache, token = glocal.Cache(), torch.randn(2, 1, 8)
    first(token, cache=cache)
    for look in (second.weights, second.scores):
        with pytest.raises(ValueError, match="another layer"):
            look(token, cache=cache)
    with pytest.raises(ValueError, match="another layer"):
        second(token, cache=cache.copy())
    assert first.weights(token, cache=cache.copy()).num_sources == 2


@pytest.mark.parametrize("look", ["weights", "scores"])
def test_what_was_only_looked_at_is_never_remembered(look):
    """Not even by the next commit, whoever asks for it."""
    mixer, x = glocal.build("SelfAttention(num_heads=2, causal=True)", 8), torch.randn(2, 3, 8)
    cache = glocal.Cache()
    mixer(x[:, :2], cache=cache)
    getattr(mixer, look)(torch.randn(2, 1, 8), cache=cache)
    cache.commit()
    torch.testing.assert_close(mixer(x[:, 2:], cache=cache), mixer(x)[:, 2:])


@pytest.mark.parametrize("impl", ["auto", "reference"])
def test_a_hook_may_change_what_goes_into_the_projection(impl):
    mixer, x = glocal.build("SelfAttention(num_heads=2)", 8), torch.randn(2, 5, 8)
    mixer.impl = impl
    expected = mixer(2 * x)
    mixer.qkv.register_forward_pre_hook(lambda module, args: (2 * args[0],))
    torch.testing.assert_close(mixer(x), expected)


@pytest.mark.parametrize(
    ("name", "real"),
    [
        ("DynamicDepthwiseConv", (1, slice(None), slice(None))),  # pools each image: one value
        ("InhomogeneousDepthwiseConv", (1, 2, 0)),
    ],
)
def test_one_real_value_moves_no_statistics(name, real):
    """Its variance says nothing; two values have one."""
    mixer = glocal.build(f"{name}(kernel_size=3, reduction=4)", 32).train()
    valid = torch.zeros(3, 4, 5, dtype=torch.bool)
    valid[real] = True
    assert mixer(torch.randn(3, 4, 5, 32), valid=valid).isfinite().all()
    assert torch.equal(mixer.bn.running_mean, torch.zeros(8))
    assert torch.equal(mixer.bn.running_var, torch.ones(8))
    valid[(2, *real[1:])] = True
    mixer(torch.randn(3, 4, 5, 32), valid=valid)
    assert not torch.allclose(mixer.bn.running_mean, torch.zeros(8))
    assert not torch.allclose(mixer.bn.running_var, torch.ones(8))


def test_num_heads_and_head_dim_must_agree():
    assert repr(glocal.build("SelfAttention(num_heads=4, head_dim=8)", 32)) == "SelfAttention(num_heads=4)"
    with pytest.raises(ValueError, match=r"num_heads: 4 heads of head_dim 4 make 16, not 32"):
        glocal.build("SelfAttention(num_heads=4, head_dim=4)", 32)


@pytest.mark.parametrize("spec", ["SelfAttention(num_heads=2)", "AveragePooling()", "LocalMLP(window_size=2)"])
def test_a_flat_mask_is_that_of_the_grid(spec):
    mixer, x = glocal.build(spec, 32), torch.randn(2, 3, 4, 32)
    valid = torch.ones(2, 3, 4, dtype=torch.bool)
    valid[1, 2:] = valid[1, :, 3:] = False
    torch.testing.assert_close(mixer(x, valid=valid.flatten(1)), mixer(x, valid=valid))


def test_positions_of_a_source_have_its_shape():
    mixer, x, source = glocal.build("SelfAttention(num_heads=2)", 8), torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match=r"source_pos_embed has shape \(2, 3, 8\)"):
        mixer(x, source, source_pos_embed=torch.randn(2, 3, 8))
    positions = torch.randn(5, 8)
    q, k = mixer.qkv(x)[..., :8], mixer.qkv(source + positions)[..., 8:16]
    scores = torch.einsum("bngd,bmgd->bgnm", q.unflatten(-1, (2, 4)), k.unflatten(-1, (2, 4))) / 2
    torch.testing.assert_close(mixer.weights(x, source, source_pos_embed=positions).weights, scores.softmax(-1))


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


def placed(change):
    """AveragePooling with change(places of its sources)."""
    return instead(
        mixers.AveragePooling,
        "_weights",
        lambda real: (
            lambda self, x, **call: dataclasses.replace(
                found := real(self, x, **call), source_positions=change(found.source_positions)
            )
        ),
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
    "wrong_shapes_are_refused": (POOLING, instead(operator, "check_tokens", lambda real: lambda *arguments: None)),
    "state_dict_round_trip": (
        "AveragePooling(kernel_size=5)",
        instead(mixers.AveragePooling, "__repr__", lambda real: lambda self: "AveragePooling()"),
    ),
    "declared_cost": (POOLING, instead(mixers.AveragePooling, "macs", lambda real: lambda self, grid: 1)),
    "compiles": (POOLING, fast(branch)),
    "exports": (POOLING, fast(branch)),
}


ALSO = [  # further ways to break the same promise
    ("padding_changes_nothing", CAUSAL, instead(operator, "finite_outside", lambda real: lambda tokens, valid: tokens)),
    ("positions_are_those_of_the_grid", POOLING, placed(lambda places: places.flip(-1))),
    ("positions_are_those_of_the_grid", POOLING, placed(lambda places: places.flip(0))),
    ("autocast", POOLING, fast(lambda out: out + 0 * (out - out.detach()).abs().sqrt())),  # only the gradient is NaN
]


@pytest.mark.parametrize(("check", "spec", "break_it"), [*((check, *BROKEN[check]) for check in BROKEN), *ALSO])
def test_every_check_of_the_contract_can_fail(check, spec, break_it, monkeypatch):
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
