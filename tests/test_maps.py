"""Weights stored for a page come back: within 1/128 of the largest of their row, for every operator and every term."""

import dataclasses
import types

import numpy as np
import pytest
import torch
from torch import nn

import glocal
from glocal import mixers
from glocal.analysis.maps import _rows, maps
from glocal.mixer import TokenMixer

from .stored_maps import Net, aggregation, assert_near, recorded, row_of


def specs():
    for name in glocal.available():
        if issubclass(getattr(mixers, name), TokenMixer):
            yield from getattr(mixers, name).examples[:2]


@pytest.mark.parametrize("spec", specs())
def test_every_operator_comes_back(spec):
    torch.manual_seed(0)
    mixer = glocal.build(spec, 32).eval()
    for parameter in mixer.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, *((9,) if mixer.rank == 1 else (5, 6)), 32)
    (call,) = recorded(mixer, x)
    (found,), refused = maps([call])
    weights = call.weights()
    if isinstance(mixer, mixers.Convolution):  # taps as one kernel for each group
        norms = mixer.weight.detach().flatten(2).unflatten(0, (mixer.groups, -1)).pow(2).sum((1, 2)).sqrt()
        shares = (norms / norms.sum(1, keepdim=True))[None, :, :, None, None]
        dense = (shares * weights.dense()[:, None]).sum(2)
        weights = dataclasses.replace(weights, weights=dense, index=None)
    expected = weights.dense().detach().double().numpy()
    assert not refused and found.heads == weights.num_groups
    for image in range(2):
        for head in range(min(found.heads, 3)):
            for query in range(0, weights.num_queries, 7):
                row = expected[min(image, len(expected) - 1), min(head, expected.shape[1] - 1), query]
                assert_near(row_of(found, image, head, query), row)


@pytest.mark.parametrize(
    ("spec", "terms"),
    [
        ("SelfAttention(num_heads=4, causal=True)", ("content",)),  # masked
        ("WindowAttention(window_size=4, num_heads=4, shift_size=2)", ("content", "position")),  # empty slots
        ("DynamicConv(num_heads=4)", ("content",)),  # slots outside that have weights
        ("LightweightConv(num_heads=4)", ("position",)),
        ("HaloAttention(block_size=4, halo_size=1, num_heads=4, mask_padding=False)", ("content", "position")),
    ],
)
def test_operators_that_mask_have_terms_all_the_same(spec, terms):
    torch.manual_seed(0)
    mixer = glocal.build(spec, 32).eval()
    ((found,), _) = maps(recorded(mixer, torch.randn(1, 5, 6, 32)))
    assert (found.kind, found.terms) == ("scores", terms)


@pytest.mark.parametrize(
    "spec",
    [
        "GatedPositionalAttention(num_heads=2)",
        "GatedPaddedAttention(padding=1, alpha=1.0)",
        "GatedPaddedAttention(padding=1, padding_mode='circular', encoding='learned', head_dim=8)",
    ],
)
@pytest.mark.parametrize("budget", [10**7, 2000])
def test_the_parts_of_a_mixture_come_back_and_so_does_the_whole(spec, budget):
    """Each within 1/128 of its own largest, and the whole of its."""
    torch.manual_seed(0)
    mixer = glocal.build(spec, 32).eval()
    for parameter in mixer.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    x = torch.randn(2, 7, 6, 32)
    ((found,), refused) = maps(recorded(mixer, x), budget=budget)
    assert not refused and (found.kind, found.terms) == ("mixture", ("content", "position"))
    assert (found.stride == 1) == (budget == 10**7)
    rows = [r * 6 + c for r in range(7) for c in range(6)] if found.stride == 1 else None
    if rows is None:
        axes = [[min(i + found.stride // 2, n - 1) for i in range(0, n, found.stride)] for n in (7, 6)]
        rows = [r * 6 + c for r in axes[0] for c in axes[1]]
        assert sum(rows_of.codes.size for rows_of in (*found.rows, *found.table)) <= budget
    whole = mixer.weights(x)
    parts = {name: dataclasses.replace(whole, weights=part) for name, (_, part) in mixer.parts(x).items()}
    for terms, weights in {"both": whole, **parts}.items():
        dense = weights.dense().detach().double().numpy()
        for image, head, at_row in ((0, 0, 0), (1, 1, len(rows) - 1), (0, 1, len(rows) // 2)):
            expected = dense[min(image, len(dense) - 1), head, rows[at_row]]
            assert_near(row_of(found, image, head, at_row, terms), expected)
    share = 1 - mixer.gating_param.sigmoid() if hasattr(mixer, "gating_param") else mixer.gate.abs().tanh()
    assert found.shares["content share"] == pytest.approx(share.tolist(), rel=1e-6)
    assert (found.centers is None) == ("alpha" not in spec)


def test_slots_of_one_source_are_stored_as_one():
    """Each by itself is large, and they take one another away."""
    found = aggregation([[[[1.0, -0.99, 0.004, 0.0], [1.0, 0.0, 0.0, 0.0]]]], [[[[0, 0, 1, -1], [3, 2, 1, 0]]]], 2)
    rows = _rows(types.SimpleNamespace(scores=lambda chosen: {}, parts=lambda chosen: {}), found, None)
    stored = rows[3][0].codes[0, 0].astype(float) * rows[3][0].scales[0, 0]
    assert rows[0] == "weights"  # together nothing is below zero
    index = rows[2].index[0, 0, 0].tolist()
    assert stored[index.index(0)] == pytest.approx(0.01, abs=0.01 / 128)
    assert stored[index.index(1)] == pytest.approx(0.004, abs=0.01 / 128)


def test_static_weights_are_stored_once_and_shared_rows_once():
    net = Net(
        glocal.build("QuadraticAttention(num_heads=4)", 32),
        glocal.build("DepthwiseConv(kernel_size=3)", 32),
        glocal.build("RelativeAttention(grid_size=(5, 6), num_heads=4)", 32),
    )
    with torch.no_grad(), glocal.inspect(net) as seen:
        net(torch.randn(3, 5, 6, 32))
    quadratic, conv, relative = maps(list(seen))[0]
    assert [len(each.rows) for each in (quadratic, conv, relative)] == [1, 1, 3]
    assert conv.rows[0].codes.shape == (32, 1, 9) and conv.index[0].shape == (1, 30, 9)
    assert relative.terms == ("content", "position") and len(relative.table) == 1
    assert quadratic.terms == ("position",) and not quadratic.table
    assert (quadratic.kind, conv.kind) == ("scores", "signed")


def test_class_tokens_stand_in_front():
    mixer = glocal.build("SelfAttention(num_heads=4)", 32)
    with torch.no_grad(), glocal.inspect(mixer) as seen:
        mixer(torch.randn(2, 2 + 12, 32), grid=(3, 4))
    ((found,), _) = maps(list(seen))
    for places in (found.queries, found.sources):
        assert (places.prefix, places.grid) == (2, (3, 4))
    # of the twelve, by hand, from the same weights
    weights = seen["SelfAttention"][0].weights().weights[:, :, 2:, 2:].double()
    where = torch.cartesian_prod(torch.arange(3.0), torch.arange(4.0)).double()
    away = (where[:, None] - where[None]).square().sum(-1).sqrt()
    by_hand = (weights * away).sum(-1) / weights.sum(-1)
    assert found.distance == pytest.approx(by_hand.mean((0, 2)).tolist(), rel=1e-5)
    whole = seen["SelfAttention"][0].weights().weights[:, :, 2:].double()  # of the twelve again, over all fourteen
    bits = -(whole * whole.log2()).sum(-1).mean((0, 2))
    assert found.entropy == pytest.approx(bits.tolist(), rel=1e-5)


def test_pooled_and_strided_sources_have_their_places():
    pooled = maps(
        recorded(glocal.build("SpatialReductionAttention(num_heads=4, sr_ratio=2)", 32), torch.randn(1, 6, 8, 32))
    )
    (found,), _ = pooled
    assert (found.sources.grid, found.sources.origin, found.sources.step) == ((3, 4), (0.5, 0.5), (2.0, 2.0))
    (found,), _ = maps(recorded(glocal.build("Convolution(kernel_size=3, stride=2)", 32), torch.randn(1, 6, 8, 32)))
    assert (found.queries.grid, found.sources.grid, found.sources.step) == ((3, 4), (6, 8), (0.5, 0.5))


def test_large_maps_keep_some_queries():
    mixer, x = glocal.build("SelfAttention(num_heads=2)", 32), torch.randn(2, 9, 8, 32)
    (whole,), _ = maps(recorded(mixer, x))
    (found,), _ = maps(recorded(mixer, x), budget=2 * 2 * 72 * 20)  # 20 of 72 queries may stay
    assert (whole.stride, found.stride) == (1, 2)
    kept = [r * 8 + c for r in (1, 3, 5, 7, 8) for c in (1, 3, 5, 7)]
    assert found.rows[0].codes.shape == (2, len(kept), 72)
    assert (found.rows[1].codes == whole.rows[1].codes[:, kept]).all()
    assert found.queries == whole.queries


def test_small_layers_are_kept_whole_beside_a_large_one():
    net = Net(glocal.build("SelfAttention(num_heads=2)", 32), glocal.build("NeighborhoodAttention(kernel_size=3)", 32))
    with torch.no_grad(), glocal.inspect(net) as seen:
        net(torch.randn(1, 8, 8, 32))
    first, second = maps(list(seen), budget=4000)[0]
    assert first.stride > 1 and second.stride == 1


def test_heads_with_places_show_them():
    torch.manual_seed(0)
    for spec in ("QuadraticAttention(num_heads=2)", "GeneralizedQuadraticAttention(num_heads=2)"):
        mixer = glocal.build(spec, 32)
        (found,), _ = maps(recorded(mixer, torch.randn(1, 4, 4, 32)))
        s = mixer.attention_spreads.detach()
        for head in range(2):
            matrix = s[head] ** 2 * torch.eye(2) if s.dim() == 1 else s[head] @ s[head].T
            np.testing.assert_allclose(found.precision[head], matrix.numpy(), rtol=1e-5)
        np.testing.assert_allclose(found.centers, mixer.attention_centers.detach().numpy())


def test_what_cannot_be_rebuilt_is_named_and_the_rest_shown():
    net = Net(glocal.build("SelfAttention(num_heads=4)", 32), glocal.build("DepthwiseConv(kernel_size=3)", 32))
    calls = []
    with torch.no_grad(), glocal.inspect(net) as seen:
        net(torch.randn(1, 5, 5, 32))
    net.parts[1].dilation = 2
    calls, refused = maps(list(seen))
    assert [each.name for each in calls] == ["parts.0"]
    assert list(refused) == ["parts.1"] and "rebuild the recorded output with a relative error" in refused["parts.1"]
    net.parts[0].impl, net.parts[0].qkv = "auto", nn.Linear(32, 96)
    with pytest.raises(ValueError, match=r"maps: nothing to show; parts\.\d: its weights rebuild"):
        maps(list(seen))


def test_a_module_that_is_called_twice_has_two_maps():
    mixer = glocal.build("AveragePooling()", 32)
    with torch.no_grad(), glocal.inspect(Net(mixer, mixer)) as seen:
        Net(mixer, mixer)(torch.randn(1, 4, 4, 32)), mixer(torch.randn(1, 4, 4, 32))
    assert [each.name for each in maps(list(seen))[0]][:2] == ["parts.0", "parts.0 (2)"]


# planted by scripts/mutate
FAULTS = {
    ("analysis/maps.py", "test_maps.py"): (
        (
            "a mixture's parts change places",
            'for name in ("content", "position")} if {*parts}',
            'for name in ("position", "content")} if {*parts}',
        ),
        ("the share is that of position", '{CONTENT: parts["content"][0]}', '{CONTENT: parts["position"][0]}'),
        ("a mixture takes the room of one", "for each in parts or [one]", "for each in [one]"),
        (
            "a mask is taken for a small weight",
            "seen = (weights > 0) | (total < total.amax(-1, keepdim=True) - 80)",
            "seen = weights > -1",
        ),
        (
            "empty slots are never part of the softmax",
            "for over in (seen & slots, seen):",
            "for over in (seen & slots,):",
        ),
        ("repeated slots are coded one by one", "if bool(twice.any()) else found", "if False else found"),
        (
            "what lies outside sets the scale of a row",
            "weights=torch.where(found.index < 0, 0, found.weights)",
            "weights=found.weights",
        ),
        (
            "rows that queries share are coded",
            "shared = bool((found.weights < 0).any()), found.weights.shape[2] == 1 < found.num_queries",
            "shared = bool((found.weights < 0).any()), False",
        ),
        ("large layers are stored whole", "max(1, math.ceil(math.sqrt(each * count / limit)))", "1"),
        ("small layers give up as much as large ones", "return max(limit, 1.0)", "return budget / len(needs) / 99"),
        ("the first query of a cell is kept, not its middle", "min(i + stride // 2, n - 1)", "min(i, n - 1)"),
        (
            "class tokens count for the mean",
            "counted = slice(places.prefix, None) if math.prod(places.grid) else slice(None)",
            "counted = slice(None)",
        ),
        ("a second call hides the first", 'f"{call.name} ({seen[call.name]})"', "call.name"),
        (
            "the precision of heads is not shown",
            'np.array(found["precision"])',
            '2 * np.array(found["precision"])',
        ),
        (
            "centres are cut to whole tokens",
            'return np.array(found["centers"])',
            'return np.array(found["centers"]).round()',
        ),
        ("pooled sources have the step of the queries", "_pair(step, 1.0)", "(1.0, 1.0)"),
        ("signs are lost", "signed, shared = bool((found.weights < 0).any()),", "signed, shared = False,"),
    ),
}
