"""RotaryAttention against a loop over pairs of tokens and channels, timm's EVA attention, and what it must not know."""

import itertools
import math

import pytest
import torch
from timm.layers.pos_embed_sincos import RotaryEmbeddingCat
from timm.models.eva import EvaAttention
from torch.testing import assert_close

import glocal

HEADS, DIM = 2, 16
SIZE = DIM // HEADS


def spec_of(**arguments):
    return f"RotaryAttention({', '.join(f'{k}={v!r}' for k, v in {'num_heads': HEADS, **arguments}.items())})"


def by_loop(mixer, places, attend, prefix=0, start=0):
    """Turns every head by complex numbers: the channels of a pair times e^(i * place * frequency)."""

    def turned(t, grid, extent):
        """[N, heads, D], one token, head and pair at a time; places are scaled to grid_size for an image this large."""
        rank, half, rows = len(grid), SIZE // 2, list(t[:prefix])
        for place, token in zip(places(grid), t[prefix:], strict=True):
            pairs = []
            for axis, i in itertools.product(range(rank), range(half // rank)):
                at = place[axis] + start
                if mixer.grid_size is not None:
                    at = at / max(extent[axis], 1) * mixer.grid_size[axis]
                angle = at * mixer.temperature ** (-i / (half // rank))
                pair = axis * (half // rank) + i
                a, b = (2 * pair, 2 * pair + 1) if mixer.pairing == "interleaved" else (pair, pair + half)
                pairs.append(
                    (a, b, torch.complex(token[:, a], token[:, b]) * complex(math.cos(angle), math.sin(angle)))
                )
            row = [None] * SIZE
            for a, b, both in pairs:
                row[a], row[b] = both.real, both.imag
            rows.append(torch.stack(row, -1))
        return torch.stack(rows)

    def oracle(x, valid=None, grid=None):
        shape = tuple(x.shape[1:-1]) if grid is None else tuple(grid)
        q, k, v = mixer.qkv(x.flatten(1, -2)).unflatten(-1, (3, HEADS, SIZE)).unbind(2)
        extents = [shape] * len(x)
        if valid is not None:
            lasts = [mask[-math.prod(shape) :].view(shape) if grid else mask for mask in valid]
            extents = [[int(n) + 1 for n in mask.nonzero().amax(0)] if mask.any() else shape for mask in lasts]
        q, k = (torch.stack([turned(t, shape, e) for t, e in zip(each, extents, strict=True)]) for each in (q, k))

        def sources(b, i):
            seen = range(i + 1) if mixer.causal else range(k.shape[1])
            return [j for j in seen if valid is None or valid[b].flatten()[j]]

        return mixer.proj(attend(q, k, v, sources)).view(*x.shape[:-1], -1)

    return oracle


@pytest.mark.parametrize("grid", [(7,), (3, 4), (1, 1)])
@pytest.mark.parametrize("pairing", ["interleaved", "halves"])
@pytest.mark.parametrize("more", [{}, {"causal": True}, {"temperature": 20.0, "qkv_bias": False}])
def test_is_the_loop(build, check, tokens, places, attend, grid, pairing, more):
    mixer = build(spec_of(pairing=pairing, **more), DIM)
    oracle = by_loop(mixer, places, attend) if mixer.qkv_bias else without_bias(mixer, places, attend)
    check(mixer, oracle, tokens(2, *grid, DIM))


def without_bias(mixer, places, attend):
    assert mixer.qkv.bias is None
    return by_loop(mixer, places, attend)


@pytest.mark.parametrize(("reference", "grid"), [((6, 5), (3, 4)), ((2, 2), (3, 4)), ((5,), (7,))])
@pytest.mark.parametrize("masked", [False, True])
def test_places_are_scaled_to_the_grid_it_was_trained_on(build, check, tokens, places, attend, reference, grid, masked):
    mixer = build(spec_of(grid_size=reference), DIM)
    valid = None
    if masked:
        valid = torch.zeros(2, *grid, dtype=torch.bool)
        valid[0] = True
        valid[1][tuple(slice(n - 1) for n in grid)] = True
    check(mixer, by_loop(mixer, places, attend), tokens(2, *grid, DIM), valid=valid)


@pytest.mark.parametrize("reference", [None, (5, 5)])
@pytest.mark.parametrize("masked", [False, True])
def test_class_tokens_are_not_turned(build, check, tokens, places, attend, reference, masked):
    mixer = build(spec_of(grid_size=reference), DIM)
    valid = None
    if masked:
        valid = torch.ones(2, 2 + 6, dtype=torch.bool)
        valid[1, 2 + 3 :] = False
        valid[0, 0] = False
    call = {"grid": (2, 3), "valid": valid}
    check(mixer, by_loop(mixer, places, attend, prefix=2), tokens(2, 2 + 6, DIM), **call)


@pytest.mark.parametrize(("half", "reference"), [(False, None), (True, None), (False, [4, 4])])
def test_is_timms_eva_attention(build, check, tokens, half, reference):
    options = {"qkv_bias": False, "num_prefix_tokens": 1, "scale_norm": False, "rotate_half": half}
    theirs = EvaAttention(DIM, HEADS, **options).double().eval()
    rope = RotaryEmbeddingCat(SIZE, in_pixels=False, feat_shape=None, ref_feat_shape=reference, rotate_half=half)
    pairing = "halves" if half else "interleaved"
    mixer = build(spec_of(pairing=pairing, qkv_bias=False, grid_size=reference and tuple(reference)), DIM)
    weights = dict(mixer.named_parameters())

    x, grid = tokens(2, 1 + 15, DIM), (3, 5)
    expected = torch.func.functional_call(theirs, weights, (x, rope.get_embed(list(grid)).double()), strict=True)
    assert_close(mixer(x, grid=grid), expected, rtol=1e-5, atol=1e-6)  # their angles are in float32


@pytest.mark.parametrize("masked", [False, True])
def test_padding(build, check, check_padding, tokens, places, attend, masked):
    mixer = build(spec_of(), DIM)
    check(mixer, by_loop(mixer, places, attend), tokens(2, 3, 4, DIM), valid=torch.rand(2, 3, 4) < 0.5)
    check_padding(build(spec_of(causal=masked), DIM), [(4, 3), (2, 5)], DIM)
    if not masked:
        check_padding(build(spec_of(grid_size=(4, 4)), DIM), [(4, 3), (2, 5)], DIM)


@pytest.mark.parametrize("pairing", ["interleaved", "halves"])
def test_scores_know_offsets_alone(build, tokens, pairing):
    """A sequence cut out of another, whose tokens are elsewhere, has the same weights but for what is not there."""
    mixer = build(spec_of(pairing=pairing), DIM)
    x = tokens(1, 9, DIM)
    whole, part = mixer.scores(x)["content"], mixer.scores(x[:, 3:8])["content"]
    assert_close(part, whole[:, :, 3:8, 3:8], rtol=1e-9, atol=1e-10)
    same = mixer.scores(x[:, :1].expand(-1, 9, -1))["content"]
    assert_close(same[:, :, 1:, 1:], same[:, :, :-1, :-1], rtol=1e-9, atol=1e-10)
    assert not torch.allclose(same[:, :, 0, 0], same[:, :, 0, 1])


def test_left_padding_moves_nothing(build, tokens):
    mixer = build(spec_of(causal=True), DIM)
    x = tokens(1, 5, DIM)
    valid = torch.tensor([[False, False, True, True, True, True, True]])
    padded = torch.cat([tokens(1, 2, DIM), x], 1)
    assert_close(mixer(padded, valid=valid)[:, 2:], mixer(x), rtol=1e-9, atol=1e-10)


@pytest.mark.parametrize("impl", ["reference", "fast"])
@pytest.mark.parametrize("steps", [[1] * 7, [3, 1, 2, 1], [7]])
def test_decoding_with_a_cache_is_the_causal_pass(build, tokens, places, attend, impl, steps):
    mixer = build(spec_of(causal=True), DIM)
    mixer.impl = impl
    x, cache, rows, start = tokens(2, 7, DIM), glocal.Cache(), [], 0
    for step in steps:
        rows.append(mixer(x[:, start : start + step], cache=cache))
        start += step
    assert_close(torch.cat(rows, 1), by_loop(mixer, places, attend)(x), rtol=1e-9, atol=1e-10)


def test_some_queries_are_rows_of_all(build, tokens):
    mixer = build(spec_of(), DIM)
    x, queries = tokens(2, 3, 4, DIM), torch.tensor([5, 0, 11])
    assert_close(mixer(x, queries=queries), mixer(x).flatten(1, 2)[:, queries], rtol=1e-9, atol=1e-10)
    assert_close(mixer.weights(x, queries=queries).dense(), mixer.weights(x).dense()[:, :, queries])


def test_large_places_in_bfloat16(build, tokens):
    """Angles are in float32: token 2000 is as exact as token 0."""
    mixer = build(spec_of(), DIM)
    x = tokens(1, 2000, DIM)
    expected = mixer.scores(x, queries=torch.tensor([1999]))["content"]
    found = mixer.bfloat16().scores(x.bfloat16(), queries=torch.tensor([1999]))["content"]
    assert (found.double() - expected).abs().max() < 0.05 * expected.abs().max()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"num_heads": 16}, r"head_dim: 1 channels of a head cannot be cut into pairs; give a multiple of 2"),
        ({"num_heads": 8, "grid_size": (4, 4)}, r"head_dim: 2 channels .* rows and for columns; give a multiple of 4"),
        ({"pairing": "half"}, r"pairing: 'half', must be 'interleaved' or 'halves'"),
        ({"temperature": 0.0}, r"temperature: 0.0, must be positive"),
        ({"grid_size": 7}, r"grid_size: 7, must name every axis, as in \(7, 7\)"),
        ({"grid_size": (7,), "causal": True}, r"grid_size: \(7,\), causal=True; .* leave one out"),
    ],
)
def test_bad_arguments_are_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        glocal.build(spec_of(**arguments), DIM)


def test_calls_that_make_no_sense_are_refused(build, tokens):
    x = tokens(2, 3, 4, DIM)
    with pytest.raises(ValueError, match=r"head_dim: 2 channels .* rows and for columns; give a multiple of 4"):
        build(spec_of(num_heads=8), DIM)(x)
    with pytest.raises(ValueError, match="does not take source"):
        build(spec_of(), DIM)(x, x)
    with pytest.raises(ValueError, match=r"RotaryAttention: cache was given; it needs a causal operator"):
        build(spec_of(), DIM)(x[:, 0], cache=glocal.Cache())
    with pytest.raises(ValueError, match=r"built for rank 1, x has a grid of rank 2, \(3, 4\)"):
        build(spec_of(grid_size=(7,)), DIM)(x)
    with pytest.raises(ValueError, match=r"built for rank 1, x has a grid of rank 2, \(3, 4\)"):
        build(spec_of(grid_size=(7,)), DIM)(x.flatten(1, 2), grid=(3, 4))


# planted by scripts/mutate
FAULTS = (
    ("keys are not turned", "for part in (0, 1))", "for part in (0, 1))\n        k = self.heads(x, 1)"),
    ("values are keys on the fast path", "mixed_from_all(q, k, values,", "mixed_from_all(q, k, k,"),
    ("tokens after a cache start at place 0", "offset=0 if cache is None else len(cache),", "offset=0,"),
    ("class tokens are turned, the last tokens are not", "num_prefix=prefix,", "num_prefix=0,"),
    ("padding scales an image's places", "extents=size,", "extents=None,"),
    ("places are never scaled", "grid_size=self.grid_size,", "grid_size=None,"),
    ("the temperature is always 10000", "temperature=self.temperature,", ""),
    ("pairs are always interleaved", "angles, pairing=self.pairing)", "angles)"),
    ("angles are in the dtype of the tokens", "dtype=torch.promote_types(x.dtype, torch.float32),", "dtype=x.dtype,"),
    (
        "the mask of class tokens is read as the grid's",
        "valid.flatten(1)[:, prefix:]",
        "valid.flatten(1)[:, : math.prod(grid)]",
    ),
    ("the fast path sees padding", "mixed_from_all(q, k, values, valid,", "mixed_from_all(q, k, values, None,"),
    (
        "the definition sees padding",
        "softmax_of_all(content, x, None, grid, valid,",
        "softmax_of_all(content, x, None, grid, None,",
    ),
    ("the fast path has no order", "values, valid, causal=self.causal)", "values, valid, causal=False)"),
)
