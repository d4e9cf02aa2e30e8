"""MultiScaleAttention (MUSE) against loops, unfold, torch's attention, and the paper's parameter counts."""

from itertools import product

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import glocal

FAULTS = (
    ("the gate is not normalised", "self.gate.softmax(0)", "self.gate"),
    ("taps are not normalised", "(self.num_heads, -1)).softmax(-1)", "(self.num_heads, -1))"),
    ("looking drops taps", "_kernels(v, rank, update_statistics)", "_kernels(v, rank, self.training)"),
    ("the fast path drops none", "x.dim() - 2, update_statistics)", "x.dim() - 2, False)"),
    ("a path without the cache's values", 'v if cache is None else cache.join("values", v)', "v"),
    ("convolution reads the first tokens, not the last", "past=kept)", "past=0)[:, : x.shape[1]]"),
    (
        "a small kernel lies at the corner of the large one",
        "around = (front, largest - size - front) * rank",
        "around = (0, largest - size) * rank",
    ),
    ("kernels are predicted from keys", "self._kernels(v, rank,", "self._kernels(self.heads(x, 1), rank,"),
    (
        "the fast path predicts kernels from queries",
        "self._kernels(v[:, kept:], ",
        "self._kernels(self.heads(x, 0), ",
    ),
    (
        "convolution comes first in the projection",
        "torch.cat([attention, convolution.flatten(1, -2)], -1)",
        "torch.cat([convolution.flatten(1, -2), attention], -1)",
    ),
    (
        "attention sees padding",
        "softmax_of_all(scores, x, None, None, valid,",
        "softmax_of_all(scores, x, None, None, None,",
    ),
    ("no gradient reaches the kernels", "taps = linear(v.flatten(2))", "taps = linear(v.flatten(2).detach())"),
    (
        "attention of the fast path has no order",
        "valid, causal=self.causal)\n        kernels",
        "valid, causal=False)\n        kernels",
    ),
)


def convolved(v, predictions, gate, sizes, heads, causal=False, valid=None):
    """The gated sum of dynamic convolutions of v [B, *S, C], one tap of one head at a time."""
    batch, *grid, dim = v.shape
    rank, width = len(grid), dim // heads
    shares = gate.exp() / gate.exp().sum()
    y = torch.zeros_like(v)
    for b, *at in product(range(batch), *map(range, grid)):
        row = [torch.zeros(width, dtype=v.dtype) for _ in range(heads)]
        for cell, size in enumerate(sizes):
            logits = (predictions[cell] @ v[(b, *at)]).view(heads, -1)
            taps = logits.exp() / logits.exp().sum(1, keepdim=True)
            for t, offset in enumerate(product(range(size), repeat=rank)):
                place = tuple(a + o - (size - 1 if causal else size // 2) for a, o in zip(at, offset, strict=True))
                if not all(0 <= p < n for p, n in zip(place, grid, strict=True)):
                    continue
                if valid is not None and not valid[(b, *place)]:
                    continue
                for h in range(heads):
                    row[h] = row[h] + shares[cell] * taps[h, t] * v[(b, *place)][h * width : (h + 1) * width]
        y = y.index_put(tuple(torch.tensor([i]) for i in (b, *at)), torch.cat(row)[None])
    return y


def oracle_of(mixer, attend, sizes, heads, causal=False):
    def oracle(x, valid=None, queries=None):
        qkv = x @ mixer.qkv.weight.T + (0 if mixer.qkv.bias is None else mixer.qkv.bias)
        q, k, v = qkv.chunk(3, -1)

        def sources(b, i):
            seen = range(i + 1) if causal else range(k.flatten(1, -2).shape[1])
            return [j for j in seen if valid is None or valid[b].flatten()[j]]

        split = [t.flatten(1, -2).unflatten(-1, (heads, -1)) for t in (q, k, v)]
        predictions = [linear.weight for linear in mixer.weight_linear]
        local = convolved(v, predictions, mixer.gate, sizes, heads, causal, valid).flatten(1, -2)
        y = torch.cat([attend(*split, sources), local], -1) @ mixer.proj.weight.T + mixer.proj.bias
        return y.view(x.shape) if queries is None else y[:, queries]

    return oracle


CASES = [  # arguments, sizes, heads, causal, grid
    ("num_heads=2, kernel_sizes=(3, 5), rank=1", (3, 5), 2, False, (6,)),
    ("num_heads=2, kernel_sizes=(5, 1)", (5, 1), 2, False, (3, 4)),
    ("num_heads=1, kernel_sizes=(3,), qkv_bias=False", (3,), 1, False, (2, 3)),
    ("num_heads=2, kernel_sizes=(2, 3), causal=True, rank=1", (2, 3), 2, True, (6,)),
    ("head_dim=2, kernel_sizes=(2, 3), causal=True", (2, 3), 2, True, (3, 2)),
    ("num_heads=4, rank=1", (3, 15), 4, False, (4,)),
]


@pytest.mark.parametrize(("arguments", "sizes", "heads", "causal", "grid"), CASES)
def test_is_attention_beside_convolution(build, check, tokens, attend, arguments, sizes, heads, causal, grid):
    mixer = build(f"MultiScaleAttention({arguments})", 4)
    check(mixer, oracle_of(mixer, attend, sizes, heads, causal), tokens(2, *grid, 4))


@pytest.mark.parametrize("causal", [False, True])
def test_some_queries_are_rows_of_all(build, check, tokens, attend, causal):
    mixer = build(f"MultiScaleAttention(num_heads=2, kernel_sizes=(1, 3), causal={causal}, rank=1)", 4)
    call = {"queries": torch.tensor([5, 0, 3, 5]), "valid": torch.rand(2, 6) < 0.7}
    oracle = oracle_of(mixer, attend, (1, 3), 2, causal)
    call["valid"][:, call["queries"]] = True  # what a padded query gets is not specified
    check(mixer, oracle, tokens(2, 6, 4), fast=False, **call)


def test_is_unfold_and_torch_attention(build, check, tokens):
    mixer = build("MultiScaleAttention(num_heads=2, kernel_sizes=(3, 7), rank=1)", 8)

    def unfolded(x):
        mixed, _ = F.multi_head_attention_forward(
            *[x.transpose(0, 1)] * 3, 8, 2, mixer.qkv.weight, mixer.qkv.bias, None, None, False, 0.0,
            torch.eye(8, dtype=x.dtype), torch.zeros(8, dtype=x.dtype), need_weights=False,
        )  # fmt: skip
        v = F.linear(x, mixer.qkv.weight[16:], mixer.qkv.bias[16:])
        cells = []
        for size, linear in zip((3, 7), mixer.weight_linear, strict=True):
            taps = (v @ linear.weight.T).unflatten(-1, (2, size)).softmax(-1)  # [B, T, heads, taps]
            near = F.pad(v, (0, 0, size // 2, size // 2)).unfold(1, size, 1).unflatten(2, (2, 4))
            cells.append((near * taps.unsqueeze(-2)).sum(-1).flatten(2))
        local = (torch.stack(cells, -1) * mixer.gate.softmax(0)).sum(-1)
        return F.linear(torch.cat([mixed.transpose(0, 1), local], -1), mixer.proj.weight, mixer.proj.bias)

    check(mixer, unfolded, tokens(2, 9, 8))


@pytest.mark.parametrize("impl", ["reference", "fast"])
@pytest.mark.parametrize("grid", [(7,), (3, 4)])
def test_without_the_half_of_convolution_is_self_attention(build, tokens, impl, grid):
    mixer, plain = (
        build(f"MultiScaleAttention(num_heads=2, rank={len(grid)})", 8),
        build("SelfAttention(num_heads=2)", 8),
    )
    mixer.impl = impl
    with torch.no_grad():
        mixer.proj.weight[:, 8:] = 0
        plain.qkv.load_state_dict(mixer.qkv.state_dict())
        plain.proj.weight.copy_(mixer.proj.weight[:, :8])
        plain.proj.bias.copy_(mixer.proj.bias)
    x = tokens(2, *grid, 8)
    assert_close(mixer(x), plain(x))


def only_convolution(mixer):
    """The output is the convolved half of the joined heads, unprojected."""
    dim = mixer.dim
    with torch.no_grad():
        mixer.proj.weight.copy_(torch.eye(2 * dim)[dim:])
        mixer.proj.bias.zero_()
    return mixer


@pytest.mark.parametrize("impl", ["reference", "fast"])
@pytest.mark.parametrize("grid", [(7,), (3, 4)])
def test_a_kernel_of_one_tap_returns_the_values(build, tokens, impl, grid):
    mixer = only_convolution(build(f"MultiScaleAttention(num_heads=2, kernel_sizes=(1,), rank={len(grid)})", 8))
    mixer.impl = impl
    x = tokens(2, *grid, 8)
    v = F.linear(x, mixer.qkv.weight[16:], mixer.qkv.bias[16:])
    assert_close(mixer(x), v, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_constant_values_are_kept_inside_and_shrink_at_the_border(build, impl):
    mixer = only_convolution(build("MultiScaleAttention(num_heads=2, kernel_sizes=(3, 5), rank=1)", 4))
    mixer.impl = impl
    x = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64).expand(1, 9, 4)
    v = F.linear(x, mixer.qkv.weight[8:], mixer.qkv.bias[8:])
    share = mixer(x) / v
    assert_close(share[:, 2:-2], torch.ones(1, 5, 4, dtype=torch.float64))
    assert (share[:, [0, 1, 7, 8]] < 0.9999).all()


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_the_gate_chooses_among_kernels(build, tokens, impl):
    both = build("MultiScaleAttention(num_heads=2, kernel_sizes=(3, 5))", 8)
    one = build("MultiScaleAttention(num_heads=2, kernel_sizes=(5,))", 8)
    both.impl = one.impl = impl
    one.load_state_dict(
        both.state_dict() | {"gate": torch.zeros(1), "weight_linear.0.weight": both.weight_linear[1].weight},
        strict=False,
    )
    with torch.no_grad():
        both.gate.copy_(torch.tensor([0.0, 60.0]))
    x = tokens(2, 4, 5, 8)
    assert_close(both(x), one(x))


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_the_convolved_half_is_a_gated_sum_of_dynamic_convolutions_of_the_values(build, tokens, impl):
    mixer = only_convolution(build("MultiScaleAttention(num_heads=2, kernel_sizes=(3, 5))", 8))
    mixer.impl = impl
    x = tokens(2, 4, 5, 8)
    v = F.linear(x, mixer.qkv.weight[16:], mixer.qkv.bias[16:])
    expected = 0
    for size, linear, share in zip((3, 5), mixer.weight_linear, mixer.gate.softmax(0), strict=True):
        conv = build(f"DynamicConv(kernel_size={size}, num_heads=2)", 8)
        conv.weight_linear.load_state_dict(linear.state_dict())
        expected = expected + share * conv(v)
    assert_close(mixer(x), expected)


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_convolution_shares_the_value_projection_and_nothing_else(build, tokens, impl):
    mixer = only_convolution(build("MultiScaleAttention(num_heads=2, kernel_sizes=(3, 5))", 8))
    mixer.impl = impl
    (mixer(tokens(2, 3, 4, 8)) ** 2).sum().backward()
    for grad in (mixer.qkv.weight.grad, mixer.qkv.bias.grad):
        assert (grad[:16] == 0).all() and (grad[16:] != 0).all()


@pytest.mark.parametrize("causal", [False, True])
def test_padding_is_not_seen_and_counts_as_zero(build, tokens, attend, causal):
    mixer = build(f"MultiScaleAttention(num_heads=2, kernel_sizes=(1, 3), causal={causal}, rank=1)", 4)
    x = tokens(3, 6, 4)
    valid = torch.tensor([[False, True, True, False, True, True], [True] * 6, [False] * 6])
    expected = oracle_of(mixer, attend, (1, 3), 2, causal)(x, valid)
    for mixer.impl in ("reference", "fast"):
        y = mixer(x, valid=valid)
        assert_close(y[valid], expected[valid])
        assert_close(y[2], mixer.proj.bias.expand(6, 4))  # nothing to read


@pytest.mark.parametrize(
    ("arguments", "extents"),
    [("kernel_sizes=(3, 5)", [(4, 3), (2, 5)]), ("kernel_sizes=(2, 4), causal=True, rank=1", [(6,), (2,)])],
)
def test_padding_leaves_images_alone(build, check_padding, arguments, extents):
    check_padding(build(f"MultiScaleAttention(num_heads=2, {arguments})", 8), extents, 8)


@pytest.mark.parametrize(("dim", "heads", "ffn", "layer"), [(384, 4, 768, 1_358_210), (768, 16, 3072, 7_897_346)])
def test_parameters_of_an_encoder_layer_are_the_published_ones(dim, heads, ffn, layer):
    """With the feed-forward network and the one layer norm of a layer; totals of the released logs, base and big."""
    mixer = glocal.build(f"MultiScaleAttention(num_heads={heads}, rank=1)", dim)
    own = 3 * dim * dim + 3 * dim + dim * heads * (3 + 15) + 2 + 2 * dim * dim + dim
    assert sum(p.numel() for p in mixer.parameters()) == own
    rest = nn.Sequential(nn.Linear(dim, ffn), nn.Linear(ffn, dim), nn.LayerNorm(dim))
    assert own + sum(p.numel() for p in rest.parameters()) == layer


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_is_torch_attention_and_convolution_with_the_bias_split_off(build, tokens, impl, causal):
    """nn.MultiheadAttention with the same weights, projection and bias, and W_C of the gated convolutions' sum."""
    mixer = build(f"MultiScaleAttention(num_heads=2, kernel_sizes=(3, 5), causal={causal}, rank=1)", 8)
    mixer.impl = impl
    attention = nn.MultiheadAttention(8, 2, batch_first=True).double()
    attention.load_state_dict(
        {
            "in_proj_weight": mixer.qkv.weight,
            "in_proj_bias": mixer.qkv.bias,
            "out_proj.weight": mixer.proj.weight[:, :8],
            "out_proj.bias": mixer.proj.bias,
        }
    )
    x, valid = tokens(2, 7, 8), torch.tensor([[True] * 7, [True] * 4 + [False] * 3])
    later = torch.ones(7, 7, dtype=torch.bool).triu(1) if causal else None
    simple, _ = attention(x, x, x, key_padding_mask=~valid, attn_mask=later, need_weights=False)
    v = F.linear(x, mixer.qkv.weight[16:], mixer.qkv.bias[16:])
    local = convolved(v, [p.weight for p in mixer.weight_linear], mixer.gate, (3, 5), 2, causal, valid)
    assert_close(mixer(x, valid=valid)[valid], (simple + local @ mixer.proj.weight[:, 8:].T)[valid])


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_training_drops_taps_after_the_softmax(build, impl):
    """Away from an impulse of the values kernels are uniform; every cell draws by itself, and shares stay shares."""
    mixer = only_convolution(
        build("MultiScaleAttention(num_heads=2, kernel_sizes=(9,), weight_dropout=0.4, rank=1)", 4)
    )
    mixer.impl = impl
    with torch.no_grad():
        mixer.qkv.weight[8:] = torch.eye(4)
        mixer.qkv.bias.zero_()
    x = torch.zeros(4, 21, 4, dtype=torch.float64)
    x[:, 10] = 1
    near = [6, 7, 8, 9, 11, 12, 13, 14]
    assert_close(mixer(x)[:, near], torch.full((4, 8, 4), 1 / 9, dtype=torch.float64))
    mixer.train()
    y = mixer(x)[:, near]
    kept = y > 0
    assert_close(y, kept.double() / (9 * 0.6), rtol=1e-12, atol=0)
    assert_close(y[..., ::2], y[..., 1::2], rtol=0, atol=0)  # channels of one head
    assert 20 < kept[..., ::2].sum() < 60


def test_both_paths_drop_the_same_and_looking_drops_nothing(build, tokens):
    mixer = build("MultiScaleAttention(num_heads=2, kernel_sizes=(3, 5), weight_dropout=0.5, rank=1)", 8)
    x = tokens(2, 9, 8)
    looked = mixer.weights(x).weights
    mixer.train()
    outputs = []
    for mixer.impl in ("reference", "fast"):
        torch.manual_seed(5)
        outputs.append(mixer(x))
    assert_close(*outputs)
    before = torch.get_rng_state()
    assert_close(mixer.weights(x).weights, looked, rtol=0, atol=0)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_a_cache_keeps_one_key_and_one_value_for_both_halves(build, tokens, attend, impl):
    mixer = build("MultiScaleAttention(num_heads=2, kernel_sizes=(2, 3), causal=True, rank=1)", 4)
    mixer.impl = impl
    x, cache = tokens(2, 6, 4), glocal.Cache()
    mixer(x[:, :5], cache=cache)
    assert cache.recall("keys", 2).shape == cache.recall("values", 2).shape == (2, 5, 2, 2)
    assert mixer.weights(x[:, 5:], cache=cache).query_positions.tolist() == [[5]]
    assert_close(mixer(x[:, 5:], cache=cache), oracle_of(mixer, attend, (2, 3), 2, True)(x)[:, 5:])


@pytest.mark.parametrize("autocast", [False, True])
def test_the_librarys_mask_stays_finite_in_float16(build, monkeypatch, autocast):
    """A row of -inf, of an image that is all padding, is NaN in some of its kernels."""
    seen = []
    library = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: seen.append(k["attn_mask"]) or library(*a, **k)
    )
    mixer = build("MultiScaleAttention(num_heads=2, kernel_sizes=(3,), rank=1)", 8)
    mixer = mixer.float() if autocast else mixer.half()
    x = torch.randn(2, 5, 8, dtype=torch.float32 if autocast else torch.float16)
    valid = torch.tensor([[True] * 5, [False] * 5])
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        assert mixer(x, valid=valid).isfinite().all()
    assert len(seen) == 1 and seen[0].dtype == torch.float16 and seen[0].isfinite().all()


def test_parameters():
    mixer = glocal.build("MultiScaleAttention(num_heads=4)", 64)
    assert {k: tuple(v.shape) for k, v in mixer.named_parameters()} == {
        "qkv.weight": (192, 64),
        "qkv.bias": (192,),
        "proj.weight": (64, 128),
        "proj.bias": (64,),
        "weight_linear.0.weight": (4 * 9, 64),
        "weight_linear.1.weight": (4 * 225, 64),
        "gate": (2,),
    }
    assert_close(mixer.gate.softmax(0), torch.tensor([0.5, 0.5]))
    assert repr(mixer) == "MultiScaleAttention(num_heads=4)"


def test_weights_are_heads_of_attention_then_of_convolution(build, tokens):
    weights = build("MultiScaleAttention(num_heads=2, kernel_sizes=(3, 5))", 16).weights(tokens(2, 8, 8, 16))
    assert weights.weights.shape == (2, 4, 64, 64)
    attention, local = weights.weights.chunk(2, 1)
    assert (attention > 0).all()
    far = (weights.query_positions[:, None] - weights.source_positions).abs().amax(-1) > 2
    assert (local[..., far] == 0).all() and (local[..., ~far] > 0).all()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ("kernel_sizes=(3, 4)", "kernel_sizes: 4, must be odd"),
        ("kernel_sizes=()", r"kernel_sizes: \(\), must be one number for each convolution"),
        ("kernel_sizes=7", "kernel_sizes: 7, must be one number for each convolution"),
        ("kernel_sizes=(3, 0), causal=True", "kernel_sizes: 0, must be a positive whole number"),
        ("rank=3", "rank: 3, must be 1"),
        ("weight_dropout=1", "weight_dropout: 1, must be a number, at least 0 and less than 1"),
    ],
)
def test_wrong_arguments_are_refused(arguments, said):
    with pytest.raises(ValueError, match=said):
        glocal.build(
            f"MultiScaleAttention({arguments if 'num_heads' in arguments else 'num_heads=2, ' + arguments})", 8
        )
