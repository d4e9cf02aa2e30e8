"""SelfAttention against nn.MultiheadAttention with the same weights, and a loop where that has no answer."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

import glocal

HEADS, DIM = 2, 8


def spec_of(**arguments):
    return f"SelfAttention({', '.join(f'{k}={v}' for k, v in {'num_heads': HEADS, **arguments}.items())})"


def by_torch(mixer, causal=False):
    """Positions go to queries and keys, never to values: DETR's rule."""
    names = {
        "qkv.weight": "in_proj_weight",
        "qkv.bias": "in_proj_bias",
        "proj.weight": "out_proj.weight",
        "proj.bias": "out_proj.bias",
    }
    torch_attention = nn.MultiheadAttention(DIM, HEADS, batch_first=True).double()
    weights = {names[k]: v for k, v in mixer.named_parameters()}
    if "in_proj_bias" not in weights:
        weights["in_proj_bias"] = torch.zeros(3 * DIM, dtype=torch.float64)

    def oracle(x, source=None, valid=None, pos_embed=None, source_pos_embed=None, grid=None):
        if source is None:
            source, source_pos_embed = x, pos_embed
        query = x if pos_embed is None else x + pos_embed
        key = source if source_pos_embed is None else source + source_pos_embed
        sequences = tuple(t.flatten(1, -2) for t in (query, key, source))
        masks = {"key_padding_mask": None if valid is None else ~valid.flatten(1)}
        if causal:
            n = sequences[0].shape[1]
            masks["attn_mask"] = torch.ones(n, n, dtype=torch.bool).triu(1)
        mixed, _ = functional_call(torch_attention, weights, sequences, {**masks, "need_weights": False})
        return mixed.view(x.shape)

    return oracle


@pytest.mark.parametrize("grid", [(7,), (3, 4), (1, 1), (2, 3, 2)])
def test_is_torch_attention_on_any_grid(build, check, tokens, grid):
    mixer = build(spec_of(), DIM)
    check(mixer, by_torch(mixer), tokens(2, *grid, DIM))


def test_without_qkv_bias_is_torch_attention(build, check, tokens):
    mixer = build(spec_of(qkv_bias=False), DIM)
    check(mixer, by_torch(mixer), tokens(2, 3, 4, DIM))


def test_causal_is_torch_attention(build, check, tokens):
    mixer = build(spec_of(causal=True), DIM)
    check(mixer, by_torch(mixer, causal=True), tokens(2, 7, DIM))


@pytest.mark.parametrize("grid", [(9,), (3, 4)])
def test_valid_is_torch_key_padding(build, check, tokens, grid):
    mixer = build(spec_of(), DIM)
    valid = torch.rand(2, *grid) < 0.6
    check(mixer, by_torch(mixer), tokens(2, *grid, DIM), valid=valid)


@pytest.mark.parametrize(("grid", "source_grid"), [((5,), (8,)), ((3, 2), (2, 5)), ((3, 2), (7,)), ((4,), (2, 3))])
@pytest.mark.parametrize("masked", [False, True])
def test_cross_is_torch_attention(build, check, tokens, grid, source_grid, masked):
    mixer = build(spec_of(), DIM)
    valid = (torch.rand(2, *source_grid) < 0.6) if masked else None
    check(mixer, by_torch(mixer), tokens(2, *grid, DIM), source=tokens(2, *source_grid, DIM), valid=valid)


def test_positions_are_detrs_in_the_encoder(build, check, tokens):
    mixer = build(spec_of(), DIM)
    valid = torch.rand(2, 3, 4) < 0.6
    check(mixer, by_torch(mixer), tokens(2, 3, 4, DIM), pos_embed=tokens(2, 3, 4, DIM))
    check(mixer, by_torch(mixer), tokens(2, 3, 4, DIM), pos_embed=tokens(2, 3, 4, DIM), valid=valid)


def test_positions_are_detrs_in_the_decoder(build, check, tokens):
    mixer = build(spec_of(), DIM)
    source, positions = tokens(2, 3, 4, DIM), tokens(2, 3, 4, DIM)
    queries, valid = tokens(2, 5, DIM), torch.rand(2, 3, 4) < 0.6
    call = {"source": source, "source_pos_embed": positions, "valid": valid}
    check(mixer, by_torch(mixer), tokens(2, 5, DIM), pos_embed=queries, **call)
    check(mixer, by_torch(mixer), tokens(2, 5, DIM), **call)


@pytest.mark.parametrize("prefix", [1, 3])
@pytest.mark.parametrize("masked", [False, True])
def test_class_tokens_are_tokens_in_front(build, check, tokens, prefix, masked):
    mixer = build(spec_of(), DIM)
    x = tokens(2, prefix + 6, DIM)
    valid = (torch.rand(2, prefix + 6) < 0.6) if masked else None
    check(mixer, by_torch(mixer), x, grid=(2, 3), valid=valid)
    weights = mixer.weights(x, grid=(2, 3), valid=valid)
    expected = [[float("nan")] * 2] * prefix + [[row, column] for row in range(2) for column in range(3)]
    for positions in (weights.query_positions, weights.source_positions):
        assert_close(positions.double(), torch.tensor(expected, dtype=torch.float64), equal_nan=True)


def by_loop(mixer, attend, causal=False, heads=HEADS):
    """Also where torch has no answer: a query that sees nothing, a width that changes, some queries only."""

    def oracle(x, valid=None, queries=None):
        q, k, v = mixer.qkv(x.flatten(1, -2)).unflatten(-1, (3, heads, -1)).unbind(2)

        def sources(b, i):
            seen = range(i + 1) if causal else range(k.shape[1])
            return [j for j in seen if valid is None or valid[b].flatten()[j]]

        y = mixer.proj(attend(q, k, v, sources))
        return y.view(*x.shape[:-1], -1) if queries is None else y[:, queries]

    return oracle


@pytest.mark.parametrize(
    ("arguments", "heads"),
    [
        ({"num_heads": 3, "out_dim": 12}, 3),
        ({"num_heads": None, "head_dim": 2, "out_dim": 4}, 2),
        ({"num_heads": 1}, 1),
    ],
)
def test_width_and_heads(build, check, tokens, attend, arguments, heads):
    mixer = build(spec_of(**arguments), DIM)
    check(mixer, by_loop(mixer, attend, heads=heads), tokens(2, 3, 4, DIM))


def test_query_without_a_valid_source_gives_the_projection_of_zero(build, check, tokens, attend):
    mixer = build(spec_of(), DIM)
    x, valid = tokens(3, 2, 3, DIM), torch.ones(3, 2, 3, dtype=torch.bool)
    valid[1] = False
    check(mixer, by_loop(mixer, attend), x, valid=valid)
    for mixer.impl in ("reference", "fast"):
        assert_close(mixer(x, valid=valid)[1], mixer.proj.bias.expand(2, 3, DIM))


def test_causal_query_with_only_padding_before_it(build, check, tokens, attend):
    mixer = build(spec_of(causal=True), DIM)
    valid = torch.tensor([[False, False, True, True, False, True], [True] * 6, [False] * 6])
    check(mixer, by_loop(mixer, attend, causal=True), tokens(3, 6, DIM), valid=valid)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_some_queries_are_rows_of_all(build, check, tokens, attend, causal, masked):
    mixer = build(spec_of(causal=causal), DIM)
    valid = (torch.rand(2, 7) < 0.6) if masked else None
    call = {"queries": torch.tensor([5, 0, 3, 5]), "valid": valid}
    check(mixer, by_loop(mixer, attend, causal), tokens(2, 7, DIM), fast=False, **call)


def test_some_queries_of_a_picture_and_of_class_tokens(build, tokens):
    mixer = build(spec_of(), DIM)
    picture, sequence, queries = tokens(2, 3, 4, DIM), tokens(2, 13, DIM), torch.tensor([0, 11, 4])
    assert_close(mixer(picture, queries=queries), mixer(picture).flatten(1, 2)[:, queries])
    some = mixer(sequence, grid=(3, 4), queries=queries)
    assert_close(some, mixer(sequence, grid=(3, 4))[:, queries])


@pytest.mark.parametrize("impl", ["reference", "fast"])
@pytest.mark.parametrize("steps", [[1] * 7, [3, 1, 2, 1], [7]])
def test_decoding_with_a_cache_is_the_causal_pass(build, tokens, impl, steps):
    mixer = build(spec_of(causal=True), DIM)
    mixer.impl = impl
    x, positions = tokens(2, 7, DIM), tokens(2, 7, DIM)
    for pos_embed in (None, positions):
        expected = by_torch(mixer, causal=True)(x, pos_embed=pos_embed)
        cache, rows, start = glocal.Cache(), [], 0
        for step in steps:
            now = slice(start, start + step)
            here = None if pos_embed is None else pos_embed[:, now]
            rows.append(mixer(x[:, now], pos_embed=here, cache=cache))
            start += step
        assert_close(torch.cat(rows, 1), expected)


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_decoding_after_padding_in_front(build, tokens, attend, impl):
    mixer = build(spec_of(causal=True), DIM)
    mixer.impl = impl
    x, valid, cache = tokens(2, 6, DIM), torch.ones(2, 6, dtype=torch.bool), glocal.Cache()
    valid[1, :3] = False
    steps = [(0, 2), (2, 3), (3, 6)]
    rows = [mixer(x[:, start:end], valid=valid[:, :end], cache=cache) for start, end in steps]
    assert_close(torch.cat(rows, 1), by_loop(mixer, attend, causal=True)(x, valid=valid))


def test_looking_at_weights_adds_nothing_to_a_cache(build, tokens):
    mixer = build(spec_of(causal=True), DIM)
    x, cache = tokens(2, 5, DIM), glocal.Cache()
    mixer(x[:, :3], cache=cache)
    for _ in range(2):
        weights = mixer.weights(x[:, 3:], cache=cache)
    assert_close(weights.dense(), mixer.weights(x).dense()[:, :, 3:])
    assert_close(mixer(x[:, 3:], cache=cache), by_torch(mixer, causal=True)(x)[:, 3:])


def test_decoding_two_sentences_keeps_their_caches_apart(build, tokens):
    mixer = build(spec_of(causal=True), DIM)
    sentences, caches = [tokens(1, 4, DIM), tokens(1, 4, DIM)], [glocal.Cache(), glocal.Cache()]
    found = [[], []]
    for t in range(4):
        for s in range(2):
            found[s].append(mixer(sentences[s][:, t : t + 1], cache=caches[s]))
    for s in range(2):
        assert_close(torch.cat(found[s], 1), by_torch(mixer, causal=True)(sentences[s]))


@pytest.mark.parametrize(
    ("extents", "causal"), [([(4, 3), (2, 5)], False), ([(6,), (2,)], False), ([(6,), (2,)], True)]
)
def test_padding_leaves_images_alone(build, check_padding, extents, causal):
    check_padding(build(spec_of(causal=causal), DIM), extents, DIM)


def test_parameters():
    def shapes(spec, dim):
        return {k: tuple(v.shape) for k, v in glocal.build(spec, dim).named_parameters()}

    assert shapes("SelfAttention(out_dim=96, qkv_bias=False)", 64) == {
        "qkv.weight": (288, 64),
        "proj.weight": (96, 96),
        "proj.bias": (96,),
    }


def test_weights_are_one_row_for_each_query(build, tokens):
    weights = build(spec_of(), 16).weights(tokens(2, 8, 8, 16))
    assert weights.weights.shape == (2, HEADS, 64, 64)
    assert_close(weights.dense().sum(-1), torch.ones(2, HEADS, 64, dtype=torch.float64))


# planted by scripts/mutate
FAULTS = {
    "mixers/self_attention.py": (
        (
            "a causal query does not see itself",
            "(order <= order[:tokens, None] + past)",
            "(order < order[:tokens, None] + past)",
        ),
        (
            "new tokens do not see all that a cache remembers",
            "(order <= order[:tokens, None] + past)",
            "(order <= order[:tokens, None])",
        ),
        (
            "padding takes part in the softmax",
            "seen = None if valid is None else valid.flatten(1)[:, None, None]",
            "seen = None if valid is None else torch.ones_like(valid).flatten(1)[:, None, None]",
        ),
        (
            "keys get no positions without a source",
            "source_pos_embed = pos_embed if source_pos_embed is None else source_pos_embed",
            "source_pos_embed = None",
        ),
        (
            "positions of a subset of the queries are those of the first",
            "places[queries], (len(queries),)",
            "places[: len(queries)], (len(queries),)",
        ),
        (
            "tokens after a cache are placed at the start",
            "positions[past:], positions",
            "positions[: x.shape[1]], positions",
        ),
    ),
    "mixers/_attention.py": (
        (
            "the fast path spreads a row that sees nothing evenly",
            "return torch.where(seen.any(-1)[:, 0, :, None], mixed, 0)",
            "return mixed",
        ),
    ),
}
