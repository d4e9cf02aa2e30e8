"""The interface: arguments that are checked once for all operators, the choice of path, the cache."""

import pytest
import torch
from torch import nn

import glocal
from glocal import Cache, TokenMixer, Unsupported

X = torch.randn(2, 5, 4, 8)


def mixer(spec="SelfAttention(num_heads=2)"):
    return glocal.build(spec, 8).eval()


@pytest.mark.parametrize(
    ("spec", "call", "words"),
    [
        ("DepthwiseConv(kernel_size=3)", {"source": X}, ["DepthwiseConv", "source"]),
        ("DepthwiseConv(kernel_size=3)", {"pos_embed": X}, ["DepthwiseConv", "pos_embed"]),
        ("DepthwiseConv(kernel_size=3)", {"cache": Cache()}, ["DepthwiseConv", "cache"]),
        ("SelfAttention(num_heads=2)", {"source": torch.zeros(3, 5, 8)}, ["source", "3 images", "2"]),
        ("SelfAttention(num_heads=2)", {"source": torch.zeros(2, 5, 7)}, ["source", "7", "8"]),
        ("SelfAttention(num_heads=2)", {"valid": torch.ones(2, 5, 4)}, ["valid", "torch.float32", "torch.bool"]),
        ("SelfAttention(num_heads=2)", {"valid": torch.ones(2, 4, 4) > 0}, ["valid", "(2, 4, 4)", "(2, 5, 4)"]),
        ("SelfAttention(num_heads=2)", {"pos_embed": X[..., :3]}, ["pos_embed", "3", "8"]),
        ("SelfAttention(num_heads=2)", {"grid": (5, 4)}, ["grid", "(5, 4)"]),
        ("SelfAttention(num_heads=2)", {"cache": Cache()}, ["cache", "causal"]),
        ("SelfAttention(num_heads=2, causal=True)", {"source": X}, ["source", "causal"]),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense_are_refused(spec, call, words):
    for path in (mixer(spec), mixer(spec).weights, mixer(spec).reference):
        with pytest.raises(ValueError) as raised:
            path(X, **call)
        for word in words:
            assert word in str(raised.value)


def test_an_unknown_call_argument_is_a_type_error():
    with pytest.raises(TypeError, match="mask"):
        mixer().weights(X, mask=None)
    with pytest.raises(TypeError, match="mask"):
        mixer()(X, mask=None)


def test_class_tokens_need_an_operator_that_has_a_place_for_them():
    flat = torch.randn(2, 1 + 20, 8)
    with pytest.raises(ValueError, match="class token"):
        mixer("DepthwiseConv(kernel_size=3)")(flat, grid=(5, 4))
    found = mixer().weights(flat, grid=(5, 4))
    assert found.source_grid == (5, 4)
    assert found.query_positions[0].isnan().all()
    assert found.query_positions[1:].tolist() == [[i, j] for i in range(5) for j in range(4)]


def test_a_flat_grid_without_class_tokens_is_the_grid():
    m = mixer("DepthwiseConv(kernel_size=3)")
    torch.testing.assert_close(m(X.flatten(1, 2), grid=(5, 4)), m(X).flatten(1, 2))
    valid = torch.ones(2, 20, dtype=torch.bool)
    valid[1, 7:] = False
    torch.testing.assert_close(
        m(X.flatten(1, 2), grid=(5, 4), valid=valid), m(X, valid=valid.view(2, 5, 4)).flatten(1, 2)
    )


def test_cross_attention_has_no_places_in_common():
    found = mixer().weights(X, torch.randn(2, 7, 8))
    assert found.dense().shape == (2, 2, 20, 7)
    assert found.query_positions.isnan().all()
    assert found.source_grid == (7,)


def test_a_strided_operator_places_sources_in_tokens_of_the_query_grid():
    found = mixer("DepthwiseConv(kernel_size=3, stride=2)").weights(X)
    assert found.out_grid == (3, 2)
    assert found.query_positions[:3].tolist() == [[0, 0], [0, 1], [1, 0]]
    assert found.source_positions[:6].tolist() == [[0, 0], [0, 0.5], [0, 1], [0, 1.5], [0.5, 0], [0.5, 0.5]]
    pooled = mixer("AveragePooling(kernel_size=2, stride=2)").weights(X)
    assert pooled.source_positions[:2].tolist() == [[-0.25, -0.25], [-0.25, 0.25]]


def test_impl_chooses_the_path():
    m = mixer("DepthwiseConv(kernel_size=3)")
    calls = []
    m.reference = lambda *a, **k: calls.append("reference") or X
    m(X)
    assert calls == []
    m.impl = "reference"
    m(X)
    assert calls == ["reference"]
    m.impl = "fast"
    with pytest.raises(Unsupported, match="DepthwiseConv: the fast path does not take queries"):
        m(X, queries=torch.tensor([0]))
    m.impl = "auto"
    m(X, queries=torch.tensor([0]))
    assert calls == ["reference"] * 2
    assert m.unsupported(X) is None
    assert "queries" in m.unsupported(X, queries=torch.tensor([0]))


class _Mean(TokenMixer):
    """The least that an operator has to say."""

    def values(self, source):
        return source.flatten(1, -2).unsqueeze(2)

    def weights(self, x):
        n, grid = x.shape[1:-1].numel(), tuple(x.shape[1:-1])
        places = glocal.aggregation.grid_positions(grid)
        return glocal.Aggregation(x.new_full((1, 1, 1, n), 1 / n), None, n, places, places, grid, grid)


def test_the_least_operator():
    m = _Mean(8)
    torch.testing.assert_close(m(X), X.mean((1, 2), keepdim=True).expand_as(X))
    torch.testing.assert_close(m(X, queries=torch.tensor([3])), X.mean((1, 2))[:, None])
    assert m.unsupported(X) == "has no fast path"
    assert m.macs((5, 4)) == 20 * 8  # one row of weights, shared by all queries, is summed once
    assert repr(m) == "_Mean()"
    m.impl = "fast"
    with pytest.raises(Unsupported, match="_Mean: has no fast path"):
        m(X)


def test_an_operator_without_weights_cannot_be_built():
    class NoWeights(TokenMixer):
        def values(self, source):
            return source

    with pytest.raises(TypeError, match="abstract"):
        NoWeights(8)


def test_scores_are_the_terms_that_the_softmax_sums():
    m = mixer("WindowAttention(window_size=(5, 4), num_heads=2)")
    terms = m.scores(X)
    assert list(terms) == ["content", "position"]
    torch.testing.assert_close(m.weights(X).weights, (terms["content"] + terms["position"]).softmax(-1))
    with pytest.raises(ValueError, match="DepthwiseConv: has no scores"):
        mixer("DepthwiseConv(kernel_size=3)").scores(X)


def test_a_cache_is_moved_by_calls_and_not_by_looks():
    m, x = mixer("SelfAttention(num_heads=2, causal=True)"), torch.randn(2, 6, 8)
    full, cache = m(x), Cache()
    assert len(cache) == 0
    for step in range(6):
        token = x[:, step : step + 1]
        looked = m.weights(token, cache=cache)
        assert looked.weights.shape == (2, 2, 1, step + 1)
        assert looked.query_positions.tolist() == [[step]]
        assert len(cache) == step
        torch.testing.assert_close(m(token, cache=cache), full[:, step : step + 1])
        assert len(cache) == step + 1


def test_a_whole_network_compiles_in_one_graph():
    net = nn.Sequential(
        mixer("DepthwiseConv(kernel_size=3)"), mixer("NeighborhoodAttention(kernel_size=3, num_heads=2)"), mixer()
    )
    torch._dynamo.reset()
    torch.testing.assert_close(torch.compile(net, backend="aot_eager", fullgraph=True)(X), net(X))


@pytest.mark.parametrize("name", glocal.available())
def test_autocast_keeps_paths_together(name):
    """Under autocast to bfloat16 the fast path runs and stays near the definition in float32."""
    spec = getattr(glocal.mixers, name).examples[0]
    m = glocal.build(spec, 32).eval()
    x = torch.randn(2, 8, 8, 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = m(x)
    expected = m.reference(x)
    assert (out.float() - expected).abs().max() <= 0.05 * expected.abs().max()
