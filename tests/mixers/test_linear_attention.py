"""LinearAttention against loops, the recurrence of the paper and timm's linear attention."""

import pytest
import torch
from timm.models.efficientvit_mit import LiteMLA
from torch.nn import functional as F
from torch.testing import assert_close

import glocal

HEADS, DIM = 2, 8

FAULTS = (
    ("queries are scaled", "self.scale = 1.0", "pass"),
    ("padding is read", "return q, k if valid is None else k.masked_fill", "return q, k if True else k.masked_fill"),
    ("rows are not normalised", "weights = products / _or_one(products.sum(-1, keepdim=True))", "weights = products"),
    ("the sum runs over queries", "products.sum(-1, keepdim=True)", "products.sum(-2, keepdim=True)"),
    ("a causal query reads the token after it", "(order <= rows[:, None])", "(order <= rows[:, None] + 1)"),
    ("a chunk does not read itself", 'bcmge->bcnge", within, v)', 'bcmge->bcnge", 0 * within, v)'),
    ("a chunk reads its own state too", "states[:, :-1].cumsum(1)], 1)", "states[:, :-1].cumsum(1)], 1) + states"),
    ("a chunk reads the last one only", "states[:, :-1].cumsum(1)", "states[:, :-1]"),
    ("the feature map is elu without the 1", "torch.where(t > 0, t + 1, ", "torch.where(t > 0, t, "),
    ("positions reach keys only", "self.heads(add_position(x, pos_embed), 0)", "self.heads(x, 0)"),
    ("autocast takes the sums to float16", "torch.autocast(device.type, enabled=False)", "nullcontext()"),
    ("features are in float16 where the tokens are", "t.to(torch.promote_types(t.dtype, torch.float32))", "t"),
    ("running sums count the past once only", "sums if past is None else past + sums", "sums"),
    (
        "the past is not read by the fast path",
        "            if past is not None:\n                both",
        "            if False:\n                both",
    ),
    ("the past's means are its sums", "means = past[..., :-1] / _or_one(past[..., -1:])", "means = past[..., :-1]"),
    (
        "heads and features of the past are exchanged",
        "means.permute(0, 2, 1, 3)",
        "means.flatten(1, 2).unflatten(1, (means.shape[2], -1))",
    ),
    ("a cache has positions of its own", "places = source_places = places + len(cache)", "pass"),
    ("a row of zeros is divided by zero", "torch.where(sums == 0, 1, sums)", "sums"),
)


def spec_of(**arguments):
    shown = {"num_heads": HEADS, **arguments}
    return f"LinearAttention({', '.join(f'{k}={v!r}' for k, v in shown.items())})"


def feature(t, name):
    return F.elu(t) + 1 if name == "elu+1" else t.relu()


def split(mixer, x, source=None, pos_embed=None, source_pos_embed=None, heads=HEADS, name="elu+1"):
    """Features of queries and keys, and values, [B, N, heads, D] each."""
    if source is None:
        source, source_pos_embed = x, pos_embed
    at = x if pos_embed is None else x + pos_embed
    source_at = source if source_pos_embed is None else source + source_pos_embed
    rows = mixer.qkv.weight.chunk(3)
    biases = [None] * 3 if mixer.qkv.bias is None else mixer.qkv.bias.chunk(3)
    parts = [F.linear(t.flatten(1, -2), rows[i], biases[i]) for i, t in enumerate((at, source_at, source))]
    q, k, v = (t.unflatten(-1, (heads, -1)) for t in parts)
    return feature(q, name), feature(k, name), v


def by_loop(mixer, heads=HEADS, name="elu+1", causal=False):
    """One query of one head at a time: products of features with every source, divided by their sum."""

    def oracle(x, valid=None, queries=None, grid=None, **call):
        q, k, v = split(mixer, x, heads=heads, name=name, **call)
        rows = []
        for i in range(q.shape[1]):
            row = []
            for h in range(heads):
                seen = torch.ones(k.shape[:2], dtype=torch.bool) if valid is None else valid.flatten(1)
                seen = seen & (torch.arange(k.shape[1]) <= i) if causal else seen
                products = (k[:, :, h] * q[:, None, i, h]).sum(-1) * seen
                total = products.sum(-1, keepdim=True)
                shares = torch.where(total > 0, products / total.clamp(min=1e-30), 0)
                row.append((shares[..., None] * v[:, :, h]).sum(1))
            rows.append(torch.cat(row, -1))
        y = mixer.proj(torch.stack(rows, 1))
        return y.view(*x.shape[:-1], -1) if queries is None else y[:, queries]

    return oracle


@pytest.mark.parametrize("grid", [(7,), (3, 4), (1, 1), (2, 3, 2)])
@pytest.mark.parametrize("causal", [False, True])
def test_is_a_product_of_features_on_any_grid(build, check, tokens, grid, causal):
    mixer = build(spec_of(causal=causal), DIM)
    check(mixer, by_loop(mixer, causal=causal), tokens(2, *grid, DIM))


@pytest.mark.parametrize(
    ("arguments", "heads"),
    [
        ({"feature_map": "relu"}, HEADS),
        ({"feature_map": "relu", "causal": True, "num_heads": 1}, 1),  # rows of zeros among the first
        ({"qkv_bias": False, "num_heads": 3, "out_dim": 12}, 3),
        ({"num_heads": None, "head_dim": 2}, 4),
    ],
)
def test_features_width_and_heads(build, check, tokens, arguments, heads):
    mixer = build(spec_of(**arguments), DIM)
    oracle = by_loop(mixer, heads, arguments.get("feature_map", "elu+1"), arguments.get("causal", False))
    check(mixer, oracle, tokens(2, 3, 4, DIM))


@pytest.mark.parametrize("length", [1, 63, 64, 65, 150])
def test_causal_is_the_recurrence_of_the_paper(build, check, tokens, length):
    """A state s += f(k) v^T and a normaliser z += f(k), read by f(q) after each token: a recurrent network."""
    mixer = build(spec_of(causal=True), DIM)

    def recurrent(x):
        q, k, v = split(mixer, x)
        s, z, rows = 0, 0, []
        for i in range(x.shape[1]):
            s = s + k[:, i, :, :, None] * v[:, i, :, None]
            z = z + k[:, i]
            rows.append((q[:, i, :, None] @ s)[..., 0, :] / (q[:, i] * z).sum(-1, keepdim=True))
        return mixer.proj(torch.stack(rows, 1).flatten(2))

    check(mixer, recurrent, tokens(1, length, DIM))


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_is_timms_linear_attention(build, tokens, impl):
    """EfficientViT's, without its convolutions of several scales; it computes in float32."""
    mixer = build(spec_of(feature_map="relu"), DIM)
    mixer.impl = impl
    theirs = LiteMLA(
        DIM, DIM, heads=HEADS, dim=DIM // HEADS, use_bias=True, norm_layer=(None, None), scales=(), eps=1e-9
    ).double()
    with torch.no_grad():
        for part in ("weight", "bias"):
            rows = getattr(mixer.qkv, part).unflatten(0, (3, HEADS, -1)).transpose(0, 1).flatten(0, 2)  # head by head
            own = getattr(theirs.qkv.conv, part)
            own.copy_(rows.view_as(own))
            own = getattr(theirs.proj.conv, part)
            own.copy_(getattr(mixer.proj, part).view_as(own))
    x = tokens(2, 5, 3, DIM)
    assert_close(mixer(x), theirs(x.movedim(-1, 1)).movedim(1, -1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("causal", [False, True])
def test_valid_leaves_padding_out_of_the_sum_and_the_normaliser(build, check, tokens, causal):
    mixer = build(spec_of(causal=causal), DIM)
    valid = torch.tensor([[False, False, True, True, False, True], [True] * 6, [False] * 6])
    x = tokens(3, 6, DIM)
    check(mixer, by_loop(mixer, causal=causal), x, valid=valid)
    for mixer.impl in ("reference", "fast"):
        assert_close(mixer(x, valid=valid)[2], mixer.proj.bias.expand(6, DIM))


@pytest.mark.parametrize("masked", [False, True])
def test_cross_and_positions(build, check, tokens, masked):
    mixer = build(spec_of(), DIM)
    valid = (torch.rand(2, 3, 4) < 0.6) if masked else None
    source, positions = tokens(2, 3, 4, DIM), tokens(2, 3, 4, DIM)
    call = {"source": source, "source_pos_embed": positions, "valid": valid}
    check(mixer, by_loop(mixer), tokens(2, 5, DIM), pos_embed=tokens(2, 5, DIM), **call)
    check(mixer, by_loop(mixer), tokens(2, 5, DIM), **call)
    check(mixer, by_loop(mixer), tokens(2, 3, 4, DIM), pos_embed=positions, valid=valid)


def test_class_tokens_are_tokens_in_front(build, check, tokens):
    mixer = build(spec_of(), DIM)
    x = tokens(2, 7, DIM)
    check(mixer, by_loop(mixer), x, grid=(2, 3))
    positions = mixer.weights(x, grid=(2, 3)).query_positions
    assert positions[0].isnan().all() and positions[-1].tolist() == [1, 2]


@pytest.mark.parametrize("causal", [False, True])
def test_some_queries_are_rows_of_all(build, check, tokens, causal):
    mixer = build(spec_of(causal=causal), DIM)
    call = {"queries": torch.tensor([5, 0, 3, 5]), "valid": torch.rand(2, 7) < 0.6}
    check(mixer, by_loop(mixer, causal=causal), tokens(2, 7, DIM), fast=False, **call)


@pytest.mark.parametrize(("extents", "causal"), [([(4, 3), (2, 5)], False), ([(6,), (2,)], True)])
def test_padding_leaves_images_alone(build, check_padding, extents, causal):
    check_padding(build(spec_of(causal=causal), DIM), extents, DIM)


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_features_of_very_negative_channels_are_small_and_not_zero(build, impl):
    """elu(x) + 1, computed so, is 0 in float32 from -17 on: such a query would read nothing."""
    mixer = build(spec_of(qkv_bias=True), DIM).float()
    mixer.impl = impl
    with torch.no_grad():
        mixer.qkv.bias[:DIM] = -30
    x = torch.randn(1, 5, DIM)
    assert_close(mixer(x).double(), mixer.double().reference(x.double()), rtol=1e-4, atol=1e-4)
    q = mixer.qkv(x.double())[..., :DIM]
    assert (q < -20).all()
    assert_close(mixer.weights(x.double()).weights.sum(-1), torch.ones(1, HEADS, 5, dtype=torch.float64))


@pytest.mark.parametrize("impl", ["reference", "fast"])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("pure", [False, True])
def test_sums_over_many_tokens_do_not_overflow_float16(build, impl, causal, pure):
    """Nor does autocast bring them back to it."""
    mixer = build(spec_of(causal=causal), DIM).float()
    mixer.impl = impl
    with torch.no_grad():
        mixer.qkv.weight.copy_(torch.eye(DIM).repeat(3, 1))
        mixer.qkv.bias.zero_()
        x = 8 * torch.rand(1, 2000, DIM)  # q k is about 64 * DIM / HEADS, 2000 times more than 65504
        expected = mixer.double().reference(x.double())
        mixer = mixer.half() if pure else mixer.float()
        with torch.autocast("cpu", torch.float16, enabled=not pure):
            found = mixer(x.half() if pure else x).double()
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()


@pytest.mark.parametrize("causal", [False, True])
def test_the_fast_path_costs_less_than_the_weights(build, causal):
    """Sixteen times the tokens, sixteen times the multiply-adds: it is linear."""
    from torch.utils.flop_counter import FlopCounterMode

    mixer = build(spec_of(causal=causal), DIM)
    mixer.impl = "fast"
    found = []
    for n in (64, 1024):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            mixer(torch.randn(1, n, DIM, dtype=torch.float64))
        found.append(counter.get_total_flops() // 2)
    head = DIM // HEADS
    within = 64 * (DIM + HEADS * (head + 1)) if causal else 0
    # one channel more in every head: the normaliser
    assert found == [n * (4 * DIM * DIM + 2 * DIM * (head + 1) + within) for n in (64, 1024)]


def test_weights_are_of_the_rank_of_a_head(build, tokens):
    weights = build(spec_of(), 16).weights(tokens(2, 8, 8, 16)).weights
    assert weights.shape == (2, HEADS, 64, 64) and (weights >= 0).all()
    assert (torch.linalg.matrix_rank(weights) == 16 // HEADS).all()


@pytest.mark.parametrize("name", ["elu+1", "relu"])
def test_a_cache_holds_sums_and_no_tokens(build, tokens, name):
    """D x (D + 1) numbers a head, however long the past; as sources in front they are means, so rows still sum to 1."""
    mixer = build(spec_of(causal=True, feature_map=name), DIM)
    x = tokens(2, 9, DIM)
    expected = by_loop(mixer, name=name, causal=True)(x)[:, 7:]
    for mixer.impl in ("reference", "fast"):
        cache = glocal.Cache()
        for start in (0, 3):
            mixer(x[:, start : (3, 7)[start > 0]], cache=cache)
            assert cache.recall("sums", 2).shape == (2, HEADS, 4, 5) and cache.recall("values", 2) is None
        looked = mixer.weights(x[:, 7:], cache=cache)
        assert looked.weights.shape == (2, HEADS, 2, 4 + 2) and (looked.weights >= 0).all()
        assert looked.source_positions.isnan().flatten().tolist() == [True] * 4 + [False] * 2
        assert looked.source_positions[4:].tolist() == looked.query_positions.tolist() == [[7], [8]]
        sums = looked.weights.sum(-1)
        assert_close(sums, (sums > 0).double())
        assert_close(mixer(x[:, 7:], cache=cache), expected)


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_sums_of_a_long_past_do_not_overflow_float16(build, impl):
    mixer = build(spec_of(causal=True), DIM)
    mixer.impl = impl
    x = 100 * torch.randn(1, 1500, DIM).half()
    half, cache = mixer.half(), glocal.Cache()
    half(x[:, :-1], cache=cache)
    sums = cache.recall("sums", 1)
    assert sums.dtype == torch.float32 and sums.max() > torch.finfo(torch.half).max
    found = half(x[:, -1:], cache=cache).double()
    expected = mixer.double().reference(x.double(), queries=torch.tensor([1499]))
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()


def test_parameters():
    mixer = glocal.build("LinearAttention(out_dim=96, qkv_bias=False)", 64)
    assert {k: tuple(v.shape) for k, v in mixer.named_parameters()} == {
        "qkv.weight": (288, 64),
        "proj.weight": (96, 96),
        "proj.bias": (96,),
    }


def test_wrong_arguments_are_refused(build, tokens):
    with pytest.raises(ValueError, match=r"feature_map: 'exp', must be 'elu\+1' or 'relu'"):
        glocal.build("LinearAttention(feature_map='exp')", 64)
    mixer = build(spec_of(causal=True), DIM)
    for mixer.impl in ("reference", "fast"):
        with pytest.raises(ValueError, match="source was given, causal=True"):
            mixer(tokens(2, 4, DIM), tokens(2, 5, DIM))
