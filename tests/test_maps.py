"""Weights stored for a page come back: within 1/128 of the largest of their row, for every operator and every term."""

import dataclasses
import math
import types

import numpy as np
import pytest
import torch
from torch import nn

import glocal
from glocal import mixers
from glocal.aggregation import Aggregation, grid_positions
from glocal.analysis.codes import coded_scores, coded_weights, table_of
from glocal.analysis.distance import mean_distance
from glocal.analysis.entropy import entropy
from glocal.analysis.maps import _rows, maps
from glocal.mixer import TokenMixer

# The page's arithmetic, written again.


def below(code, spread):
    """How far below the highest a code lies: equal steps of the weight near the top, of the score further down."""
    wide = spread / 64
    narrow = min(wide, 1.5 / 128)
    knee = math.log(wide / narrow) if wide > narrow else 0.0
    level = (1 - math.exp(-knee)) / narrow if narrow else 0.0
    return -math.log(max(1 - code * narrow, 1e-9)) if code < level else knee + (code - level) * wide


def at(array, head, query):
    return array[min(head, array.shape[0] - 1), min(query, array.shape[1] - 1)]


def table_row(table, head, query):
    low, step = (float(v) for v in table.scales[min(head, len(table.scales) - 1)])
    row = at(table.codes, head, query)
    return row.astype(float) if row.dtype == np.float32 else low + step * row.astype(float)


def score_row(rows, table, head, query):
    """The coded term, NaN where the softmax does not run, and the other."""
    codes, scales = at(rows.codes, head, query), at(rows.scales, head, query)
    other = np.zeros(len(codes)) if table is None else np.broadcast_to(table_row(table, head, query), len(codes))
    top = [scales[0] if table is None else min(scales[0], scales[3] - p) for p in other]
    term = [math.nan if c == 255 else t - below(int(c), float(scales[1])) for c, t in zip(codes, top, strict=True)]
    return np.array(term), other, scales


def of(entries, image):
    return entries[min(image, len(entries) - 1)] if entries else None


def slots(found, image, head, query, terms="both"):
    """One row as the page has it."""
    rows = of(found.rows, image)
    if found.kind == "mixture":
        share = found.shares["content share"][head]
        share = {"both": share, "content": 1, "position": 0}[terms]
        parts = [at(p.codes, head, query) * at(p.scales, head, query) for p in (rows, of(found.table, image))]
        return share * parts[0] + (1 - share) * parts[1]
    if found.kind != "scores":
        middle = 128 if found.kind == "signed" and rows.codes.dtype == np.uint8 else 0
        return (at(rows.codes, head, query).astype(float) - middle) * at(rows.scales, head, query)
    term, other, scales = score_row(rows, of(found.table, image), head, query)
    if terms == "both":
        return np.nan_to_num(np.exp(term + other - scales[4 if found.table else 2]))
    if terms == found.terms[0]:
        return np.nan_to_num(np.exp(term - scales[2]))
    return np.where(np.isnan(term), 0, np.exp(other - scales[5]))


def row_of(found, image, head, query, terms="both"):
    """[M] of one row."""
    values = slots(found, image, head, query, terms)
    if not found.index:
        return values
    total = np.zeros(found.sources.prefix + math.prod(found.sources.grid))
    index = at(of(found.index, image), head, query)
    for k in range(max(len(values), len(index))):
        if index[min(k, len(index) - 1)] >= 0:
            total[index[min(k, len(index) - 1)]] += values[min(k, len(values) - 1)]
    return total


def assert_near(found, row, of_row=128):
    assert np.abs(found - row).max() <= np.abs(row).max() / of_row + 1e-12


class Net(nn.Module):
    def __init__(self, *parts):
        super().__init__()
        self.parts = nn.ModuleList(parts)

    def forward(self, x):
        for part in self.parts:
            x = part(x, **part.besides(x))
        return x


def recorded(mixer, x):
    with torch.no_grad(), glocal.inspect(mixer) as seen:
        mixer(x, **mixer.besides(x))
    return list(seen)


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


@pytest.mark.parametrize("spread", [0.02, 0.5, 3.0, 12.0])
@pytest.mark.parametrize("position", [None, 0.1, 4.0, 60.0, 2000.0])
def test_both_terms_and_their_sum_come_back(spread, position):
    """A sharp position among flat content and the other way round: each alone, and together, by torch's softmax."""
    torch.manual_seed(1)
    content = spread * torch.randn(2, 6, 150, dtype=torch.float64)
    seen = torch.rand(1, 6, 150) < 0.9
    other = None if position is None else position * torch.randn(2, 6, 150, dtype=torch.float64)
    table = None if other is None else table_of(other)
    rows = coded_scores(content, None if table is None else table.decoded(), seen, seen)
    for head in range(2):
        for query in range(6):
            term, second, scales = score_row(rows, table, head, query)
            mask = seen[0, query].numpy()
            assert (np.isnan(term) == ~mask).all()
            assert_near(np.exp(term - scales[2])[mask], content[head, query][seen[0, query]].softmax(-1).numpy())
            span = np.ptp(content[head, query].numpy()[mask])
            assert np.abs(term - content[head, query].numpy())[mask].max() <= 1.02 * span / 128
            if other is None:
                continue
            total = (content + other)[head, query][seen[0, query]].softmax(-1).numpy()
            assert_near(np.exp(term + second - scales[4])[mask], total)
            alone = other[head, query][seen[0, query]].softmax(-1).numpy()
            assert_near(np.exp(second - scales[5])[mask], alone)


def test_a_fine_table_is_stored_in_half_the_room():
    narrow, wide = (table_of(width * torch.rand(2, 3, 40)) for width in (50.0, 500.0))
    assert (narrow.codes.dtype, wide.codes.dtype) == (np.uint16, np.float32)


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


def test_rows_without_anything_seen_and_rows_of_equals():
    seen = torch.tensor([[[True], [False]]])
    rows = coded_scores(torch.ones(1, 2, 4), None, seen, seen)
    assert rows.codes.tolist() == [[[0] * 4, [255] * 4]]
    assert slots_of_one(rows, 0) == pytest.approx([0.25] * 4, abs=1e-3)
    assert np.isfinite(rows.scales).all()


def slots_of_one(rows, query):
    term, _, scales = score_row(rows, None, 0, query)
    return np.exp(term - scales[2]).tolist()


def test_weights_of_either_sign():
    weights = torch.tensor([[[0.5, -2.0, 1.0, 0.0]]])
    rows = coded_weights(weights, True)
    assert (rows.codes[0, 0].tolist(), rows.scales.item()) == ([160, 1, 192, 128], pytest.approx(2 / 127))
    assert coded_weights(torch.zeros(1, 1, 3), True).codes.tolist() == [[[128] * 3]]
    assert coded_weights(torch.tensor([[[0.0, 1.0, 4.0]]]), False).codes.tolist() == [[[0, 64, 255]]]


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


@pytest.mark.parametrize(("position", "stride"), [("classification", 1), ("detection", 2)])
def test_locally_enhanced_attention_shows_its_attention_and_how_much_is_unary(position, stride):
    torch.manual_seed(0)
    spec = f"LocallyEnhancedAttention(grid_size=(4, 5), num_groups=2, position={position!r}, stride={stride})"
    mixer, x = glocal.build(spec, 16).eval(), torch.randn(2, 4, 5, 16)
    calls = recorded(mixer, x)
    assert calls[0].rebuild_error() < 1e-6
    for budget in (10**6, 2 * 2 * 20 * 5):
        ((found,), refused) = maps(calls, budget=budget)
        assert not refused and found.queries.grid == (4, 5) and found.queries.prefix == 0 and found.kind == "weights"
        assert found.stride == (1 if budget == 10**6 else 2)
    ((found,), _) = maps(calls)
    weights = mixer.weights(x).weights.detach().double().numpy()
    assert_near(row_of(found, 1, 1, 7), weights[1, 1, 7])
    gate = mixer.terms(x)["gate"].detach()
    by_hand = [(1 / (1 + gate[..., 8 * g : 8 * g + 8])).mean().item() for g in range(2)]
    assert found.shares["unary share"] == pytest.approx(by_hand, rel=1e-5)
    with torch.no_grad():
        mixer.reasoning[1].weight.mul_(2)
    with pytest.raises(ValueError, match=r"its parameter reasoning\.1\.weight was changed in place"):
        maps(calls)
    with pytest.raises(ValueError, match=r"its parameter reasoning\.1\.weight was changed in place"):
        calls[0].shares()


@pytest.mark.parametrize("position", ["classification", "detection"])
def test_weights_that_are_not_those_of_the_locally_enhanced_sums_are_refused(position, monkeypatch):
    """Running it again gives the same output, whatever its weights are said to be."""
    torch.manual_seed(0)
    spec = f"LocallyEnhancedAttention(grid_size=(4, 5), num_groups=2, position={position!r})"
    mixer, x = glocal.build(spec, 16).eval(), torch.randn(2, 4, 5, 16)
    for parameter in mixer.parameters():
        parameter.data.add_(0.3 * torch.randn_like(parameter))
    calls, real = recorded(mixer, x), mixer.weights
    calls[0].weights(torch.tensor([7, 3]))
    monkeypatch.setattr(
        mixer, "weights", lambda *a, **k: dataclasses.replace(w := real(*a, **k), weights=w.weights.flip(-1))
    )
    for queries in (None, torch.tensor([7, 3])):
        with pytest.raises(ValueError, match="rebuild the recorded output with a relative error"):
            calls[0].weights(queries)
    monkeypatch.undo()
    assert recorded(mixer, x[:0])[0].rebuild_error() == 0
    calls[0].output.data.mul_(1.5)
    with pytest.raises(ValueError, match="rebuild the recorded output with a relative error"):
        calls[0].weights()


def test_weights_of_locally_enhanced_attention_on_padding_are_refused():
    mixer, x = glocal.build("LocallyEnhancedAttention(grid_size=4, num_groups=2)", 16).eval(), torch.randn(1, 4, 4, 16)
    valid = torch.ones(1, 4, 4, dtype=torch.bool)
    for last, refused in ((True, False), (False, True)):
        valid[:, 3] = last
        with torch.no_grad(), glocal.inspect(mixer) as seen:
            mixer(x, valid=valid.clone())
        if not refused:
            torch.testing.assert_close(seen.calls[0].weights().weights, mixer.weights(x).weights)
            continue
        with pytest.raises(ValueError, match=r"was called with padding \(valid\), and LocallyEnhancedAttention shows"):
            seen.calls[0].weights()


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


def aggregation(weights, index=None, queries=4):
    places, index = grid_positions((1, 4)), None if index is None else torch.tensor(index)
    return Aggregation(torch.tensor(weights), index, 4, places[:queries], places, (1, queries), (1, 4))


def test_distance_and_entropy_by_hand():
    dense = aggregation(
        [[[[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]]]
    )
    assert mean_distance(dense)[0, 0, :3].tolist() == [0.5, 1.0, 1.0]
    assert entropy(dense)[0, 0, :3].tolist() == [1.0, 2.0, 0.0]
    assert mean_distance(dense)[0, 0, 3].isnan() and entropy(dense)[0, 0, 3].isnan()
    # slots that repeat a source, cancel there, or lie outside; the sign does not count
    sparse = aggregation([[[[1.0, -3.0, 1.0, 2.0]]]], [[[[0, 1, 0, -1], [1, 1, 2, 3], [3, 3, 3, 3], [-1, 0, 1, 2]]]])
    assert mean_distance(sparse)[0, 0].tolist() == pytest.approx([3 / 5, (1 + 4) / 5, 1.0, (9 + 2 + 2) / 6])
    shares = torch.tensor([2 / 5, 3 / 5])
    assert entropy(sparse)[0, 0, 0].item() == pytest.approx(-(shares * shares.log2()).sum().item())


# planted by scripts/mutate
FAULTS = {
    ("analysis/codes.py", "test_maps.py"): (
        ("steps near the top are twice as wide", "STEP = 1.5 / 128", "STEP = 3 / 128"),
        ("steps further down are a tenth of the range", "PARTS = 64 ", "PARTS = 10 "),
        ("what is left out of the softmax is stored as any other", ".round(), EMPTY)", ".round(), 0)"),
        (
            "the sum's highest is not looked at",
            "bound = torch.minimum(highest, highest_sum - other)",
            "bound = highest",
        ),
        ("a wide table is stored in 16 bits", "if float(step.max()) > FINE:", "if False:"),
        ("weights below zero are cut off", "+ (128 if signed else 0)", "+ (0 if signed else 0)"),
        ("the denominator counts what is not seen", "found = t.masked_fill(~seen, -torch.inf)", "found = t"),
        (
            "denominators are those of what is shown",
            "[highest, _denominator(t, over)]",
            "[highest, _denominator(t, seen)]",
        ),
        ("scales are rounded down", "/ unit).ceil() * unit", "/ unit).floor() * unit"),
    ),
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
    ("inspection.py", "test_maps.py"): (
        (
            "nothing ties what is shown to the sums of the run",
            "max(_error(output, self.output), _error(rebuilt, sums if queries is None else sums[:, queries]))",
            "_error(output, self.output)",
        ),
        ("its output may be another", "max(_error(output, self.output), _error(rebuilt,", "max(0, _error(rebuilt,"),
        ("padding is not noticed", "if valid is not None and not bool(valid.all()):", "if False:"),
        ("a share of what is not unary", "share = (1 / (1 + gate))", "share = (gate / (1 + gate))"),
        ("shares of another call", "gate = self.mixer.terms(**self._call)", "gate = self.mixer.terms(2 * self.x)"),
        (
            "shares of what was changed",
            "        self._check_unchanged()\n        with self._as_it_was(), torch.no_grad():\n            gate",
            "        with self._as_it_was(), torch.no_grad():\n            gate",
        ),
        ("strided outputs count as the queries", "math.prod(self.query_grid)", "math.prod(self.output.shape[1:-1])"),
        (
            "parts are taken for weights of the whole",
            "kind = PartsCall if _shows_parts(mixer) else Call",
            "kind = Call",
        ),
    ),
    ("analysis/distance.py", "test_maps.py"): (
        (
            "signs count",
            "torch.broadcast_tensors(a.weights.abs(), a.index)",
            "torch.broadcast_tensors(a.weights, a.index)",
        ),
        ("repeated slots count one by one", "a = aggregation.coalesce()", "a = aggregation"),
        ("sources without a place are at the query", "size = size * placed", "size = size * 1"),
    ),
    ("analysis/entropy.py", "test_maps.py"): (
        ("entropy is in nats", "torch.log(torch.tensor(2.0, dtype=share.dtype))", "1"),
        ("repeated slots count one by one", "a = aggregation.coalesce()", "a = aggregation"),
    ),
}
