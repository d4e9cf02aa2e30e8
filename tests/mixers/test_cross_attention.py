"""CrossAttention against nn.MultiheadAttention with kdim and vdim and the same weights, and a loop beside it."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

import glocal

HEADS, DIM, WIDTH = 2, 8, 6


def spec_of(**arguments):
    arguments = {"num_heads": HEADS, "source_dim": WIDTH, **arguments}
    return f"CrossAttention({', '.join(f'{k}={v}' for k, v in arguments.items())})"


def by_torch(mixer):
    """Positions go to queries and keys, never to values: DETR's rule."""
    width = mixer.source_dim
    theirs = nn.MultiheadAttention(DIM, HEADS, kdim=width, vdim=width, batch_first=True).double()
    names = set(dict(theirs.named_parameters()))

    def weights():
        zeros = torch.zeros(DIM, dtype=torch.float64)
        q, (k, v) = mixer.q, mixer.kv.weight.chunk(2)
        biases = [zeros] * 3 if q.bias is None else [q.bias, *mixer.kv.bias.chunk(2)]
        state = {"in_proj_bias": torch.cat(biases), "out_proj.weight": mixer.proj.weight}
        state["out_proj.bias"] = mixer.proj.bias
        if "in_proj_weight" in names:  # torch keeps one matrix where all widths are equal
            return state | {"in_proj_weight": torch.cat([q.weight, k, v])}
        return state | {"q_proj_weight": q.weight, "k_proj_weight": k, "v_proj_weight": v}

    def oracle(x, source, valid=None, pos_embed=None, source_pos_embed=None):
        query = x if pos_embed is None else x + pos_embed
        key = source if source_pos_embed is None else source + source_pos_embed
        sequences = tuple(t.flatten(1, -2) for t in (query, key, source))
        masks = {"key_padding_mask": None if valid is None else ~valid.flatten(1), "need_weights": False}
        return functional_call(theirs, weights(), sequences, masks)[0].view(x.shape)

    return oracle


@pytest.mark.parametrize(("grid", "source_grid"), [((5,), (9,)), ((3, 2), (2, 5)), ((3, 2), (7,)), ((1,), (2, 3, 2))])
@pytest.mark.parametrize("width", [WIDTH, DIM, 11])
def test_is_torch_attention(build, check, tokens, grid, source_grid, width):
    mixer = build(spec_of(source_dim=width), DIM)
    check(mixer, by_torch(mixer), tokens(2, *grid, DIM), source=tokens(2, *source_grid, width))


def test_without_qkv_bias_is_torch_attention(build, check, tokens):
    mixer = build(spec_of(qkv_bias=False), DIM)
    check(mixer, by_torch(mixer), tokens(2, 5, DIM), source=tokens(2, 3, 4, WIDTH))


@pytest.mark.parametrize("source_grid", [(9,), (3, 4)])
def test_valid_is_torch_key_padding(build, check, tokens, source_grid):
    mixer = build(spec_of(), DIM)
    valid = torch.rand(2, *source_grid) < 0.6
    check(mixer, by_torch(mixer), tokens(2, 5, DIM), source=tokens(2, *source_grid, WIDTH), valid=valid)


def test_positions_are_detrs_in_the_decoder(build, check, tokens):
    mixer = build(spec_of(), DIM)
    call = {"source": tokens(2, 3, 4, WIDTH), "source_pos_embed": tokens(2, 3, 4, WIDTH)}
    check(mixer, by_torch(mixer), tokens(2, 5, DIM), **call)
    check(mixer, by_torch(mixer), tokens(2, 5, DIM), pos_embed=tokens(2, 5, DIM), **call)
    check(mixer, by_torch(mixer), tokens(2, 5, DIM), pos_embed=tokens(2, 5, DIM), source=call["source"])


def by_loop(mixer, attend):
    """Also where torch has no answer: a query that sees nothing, some queries only."""

    def oracle(x, source, valid=None, queries=None):
        q = mixer.q(x.flatten(1, -2)).unflatten(-1, (HEADS, -1))
        k, v = mixer.kv(source.flatten(1, -2)).unflatten(-1, (2, HEADS, -1)).unbind(2)

        def sources(b, i):
            return [j for j in range(k.shape[1]) if valid is None or valid[b].flatten()[j]]

        y = mixer.proj(attend(q, k, v, sources))
        return y.view(x.shape) if queries is None else y[:, queries]

    return oracle


@pytest.mark.parametrize("masked", [False, True])
def test_some_queries_are_rows_of_all(build, check, tokens, attend, masked):
    mixer = build(spec_of(), DIM)
    call = {"source": tokens(2, 3, 2, WIDTH), "queries": torch.tensor([5, 0, 3, 5])}
    if masked:
        call["valid"] = torch.rand(2, 3, 2) < 0.6
    check(mixer, by_loop(mixer, attend), tokens(2, 7, DIM), **call)


def test_an_image_without_a_real_source_gives_the_projection_of_zero(build, check, tokens, attend):
    mixer = build(spec_of(), DIM)
    x, source, valid = tokens(3, 4, DIM), tokens(3, 2, 3, WIDTH), torch.ones(3, 2, 3, dtype=torch.bool)
    valid[1] = False
    check(mixer, by_loop(mixer, attend), x, source=source, valid=valid)


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_padding_of_the_source_changes_nothing(build, tokens, impl):
    mixer = build(spec_of(), DIM)
    mixer.impl = impl
    x, source, valid = tokens(2, 5, DIM), tokens(2, 4, 3, WIDTH), torch.zeros(2, 4, 3, dtype=torch.bool)
    valid[0], valid[1, :2, :2] = True, True
    expected = torch.cat([mixer(x[:1], source[:1]), mixer(x[1:], source[1:, :2, :2])])
    source[~valid] = torch.tensor([float("nan"), float("inf"), 1e9, 0, -1e9, 1], dtype=torch.float64)
    assert_close(mixer(x, source, valid=valid), expected)


@pytest.mark.parametrize("impl", ["reference", "fast"])
@pytest.mark.parametrize("masked", [False, True])
def test_decoding_reads_the_source_once(build, tokens, impl, masked):
    mixer = build(spec_of(), DIM)
    mixer.impl = impl
    x, source, positions = tokens(2, 5, DIM), tokens(2, 3, 2, WIDTH), tokens(2, 3, 2, WIDTH)
    valid = (torch.rand(2, 3, 2) < 0.6) if masked else None
    expected = by_torch(mixer)(x, source, valid, source_pos_embed=positions)
    flat = None if valid is None else valid.flatten(1)
    cache = glocal.Cache()
    rows = [mixer(x[:, :1], source, source_pos_embed=positions, valid=valid, cache=cache)]
    weights = mixer.weights(x[:, 1:2], cache=cache, valid=flat)
    assert_close(weights.dense(), mixer.weights(x, source, source_pos_embed=positions, valid=valid).dense()[:, :, 1:2])
    assert weights.source_positions[:, 0].tolist() == list(range(6))
    mixer.kv = nn.Linear(WIDTH, 2 * DIM).double()  # keys and values are not made again
    rows += [mixer(x[:, i : i + 1], cache=cache, valid=flat) for i in range(1, 5)]
    assert_close(torch.cat(rows, 1), expected)
    assert len(cache) == 6


def test_a_source_that_comes_in_parts(build, tokens):
    mixer = build(spec_of(), DIM)
    x, source, cache = tokens(2, 4, DIM), tokens(2, 7, WIDTH), glocal.Cache()
    valid = torch.ones(2, 7, dtype=torch.bool)
    valid[1, :3] = False
    assert_close(mixer(x, source[:, :3], cache=cache), mixer(x, source[:, :3]))
    assert_close(mixer(x, source[:, 3:], cache=cache, valid=valid), mixer(x, source, valid=valid))
    for padding in ({}, {"valid": torch.ones(2, 2, 3, dtype=torch.bool)}):
        with pytest.raises(ValueError, match=r"source has shape \(2, 2, 3, 6\), the cache holds a sequence"):
            mixer(x, tokens(2, 2, 3, WIDTH), cache=cache, **padding)


@pytest.mark.parametrize("impl", ["reference", "fast"])
@pytest.mark.parametrize("shape", [(4,), (2, 4), (6,)])
def test_padding_is_the_sources_where_the_grid_is_that_of_x(build, tokens, impl, shape):
    mixer = build(spec_of(), DIM)
    mixer.impl = impl
    x, positions, source = tokens(2, 6, DIM), tokens(2, 6, DIM), tokens(2, *shape, WIDTH)
    valid = torch.arange(source[0, ..., 0].numel()).view(shape) < torch.tensor([3, 4]).view(2, *[1] * len(shape))
    expected = by_torch(mixer)(x, source, valid, pos_embed=positions)
    assert_close(mixer(x, source, grid=(2, 3), valid=valid, pos_embed=positions), expected)


def test_a_source_is_needed(build, tokens):
    mixer = build(spec_of(), DIM)
    for call in ({}, {"cache": glocal.Cache()}):
        for path in (mixer, mixer.reference, mixer.weights, mixer.scores):
            with pytest.raises(ValueError, match=r"CrossAttention: source is not given; .* \[B, \*S, 6\], not x"):
                path(tokens(2, 5, DIM), **call)
    with pytest.raises(ValueError, match="source has 8 channels, source_dim is 6"):
        mixer(tokens(2, 5, DIM), tokens(2, 5, DIM))
    with pytest.raises(ValueError, match=r"valid has shape \(2, 5\).*needs \(2, 4\)"):
        mixer(tokens(2, 5, DIM), tokens(2, 4, WIDTH), valid=torch.ones(2, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="source_dim: 0, must be a positive whole number"):
        build("CrossAttention(source_dim=0)", 32)


def test_an_adapted_projection_is_called(build, tokens):
    mixer = build(spec_of(), DIM)
    seen = []
    mixer.kv.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    mixer(tokens(2, 5, DIM), tokens(2, 4, WIDTH))
    assert set(seen) == {(2, 4, 2 * DIM)}


def test_places_and_parameters(build, tokens):
    assert repr(build(spec_of(source_dim=DIM), DIM)) == "CrossAttention(num_heads=2)"
    mixer = build(spec_of(qkv_bias=False), DIM)
    assert repr(mixer) == "CrossAttention(num_heads=2, source_dim=6, qkv_bias=False)"
    found = mixer.weights(tokens(2, 3, 2, DIM), tokens(2, 2, 4, WIDTH))
    assert found.dense().shape == (2, HEADS, 6, 8)
    assert (found.out_grid, found.source_grid) == ((3, 2), (2, 4))
    assert found.query_positions.isnan().all()
    assert found.source_positions[5].tolist() == [1, 1]
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "q.weight": (DIM, DIM),
        "kv.weight": (2 * DIM, WIDTH),
        "proj.weight": (DIM, DIM),
        "proj.bias": (DIM,),
    }


# planted by scripts/mutate
FAULTS = {
    "mixers/cross_attention.py": (
        ("scores are not scaled", "tokens[:, queries]) * self.scale", "tokens[:, queries])"),
        ("keys get no positions", "add_position(source, source_pos_embed)", "add_position(source, None)"),
        ("queries get no positions", "add_position(x, pos_embed)", "add_position(x, None)"),
        (
            "padding of the source takes part in the softmax",
            "return None if valid is None else valid.flatten(1)[:, None, None]",
            "return None",
        ),
        (
            "keys are not remembered",
            "return q, k if cache is None else cache.join",
            "return q, cache is None or cache.join",
        ),
        (
            "the values' half of the projection is the keys'",
            "part_of(self.kv, source.flatten(1, -2), 1, self.dim)",
            "part_of(self.kv, source.flatten(1, -2), 0, self.dim)",
        ),
        ("positions of a subset are those of all", "places[queries], (len(queries),)", "places, (len(queries),)"),
    ),
    "operator.py": (
        (
            "a source on a grid follows what is remembered",
            "source is not None and source.dim() != 3",
            "source is not None and source.dim() == 0",
        ),
        (
            "padding of the source is laid out in the grid of x",
            '{"pos_embed", "valid"} if source is None else {"pos_embed"}',
            '{"pos_embed", "valid"}',
        ),
    ),
    "mixers/_attention.py": (
        (
            "queries with another source are placed on its grid",
            "nowhere = x.new_full((math.prod(x.shape[1:-1]), len(grid)), math.nan, dtype=torch.float32)",
            "nowhere = grid_positions(x.shape[1:-1], device=x.device)",
        ),
        (
            "what a cache remembers of another source has no place",
            "grid = tuple(source.shape[1:-1]) if not past else",
            "grid = tuple(source.shape[1:-1]) if True else",
        ),
    ),
}
