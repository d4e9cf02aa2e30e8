"""The interface: arguments that are checked once for all operators, the choice of path, the cache."""

import pytest
import torch
from torch import nn

import glocal
import glocal.contract
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
    m = mixer(spec)
    for path in (m, m.weights, m.reference):
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


def test_a_wrong_impl_is_refused():
    m = mixer()
    m.impl = "Fast"
    with pytest.raises(ValueError, match="'Fast'; it must be 'auto', 'reference' or 'fast'"):
        m(X)


@pytest.mark.parametrize("queries", [torch.ones(20) > 0, torch.zeros(2, 3).long(), torch.zeros(3)])
def test_queries_are_positions(queries):
    with pytest.raises(ValueError, match="SelfAttention: queries has shape"):
        mixer().weights(X, queries=queries)


def test_positions_have_the_shape_of_the_tokens():
    m, pos = mixer(), torch.randn(5, 4, 8)
    torch.testing.assert_close(m(X, pos_embed=pos), m(X, pos_embed=pos.expand_as(X)))
    flat = mixer("RelativeAttention(num_heads=2, grid_size=(5, 4))")
    flat_pos = pos.flatten(0, 1)[None]
    out = flat(X.flatten(1, 2), grid=(5, 4), pos_embed=flat_pos)
    torch.testing.assert_close(out, flat(X, pos_embed=pos).flatten(1, 2))
    for wrong in (torch.randn(8), torch.randn(4, 8), torch.randn(4, 5, 8), torch.randn(3, 5, 4, 8)):
        with pytest.raises(ValueError, match="SelfAttention: pos_embed has shape"):
            m(X, pos_embed=wrong)


def test_a_transposed_mask_is_refused():
    with pytest.raises(ValueError, match=r"valid has shape \(2, 4, 5\)"):
        mixer()(X, valid=torch.ones(2, 4, 5, dtype=torch.bool))


def test_a_sequence_without_tokens_is_refused():
    for name in glocal.available():
        for spec in getattr(glocal.mixers, name).examples:
            m = glocal.build(spec, 32)
            with pytest.raises(ValueError, match="no tokens"):
                m(torch.zeros(2, *[0] * (m.rank or 1), 32))


def test_a_cache_belongs_to_one_layer():
    first, second = (mixer("SelfAttention(num_heads=2, causal=True)") for _ in range(2))
    cache = Cache()
    token = torch.randn(2, 1, 8)
    first(token, cache=cache)
    with pytest.raises(ValueError, match="another layer"):
        second(token, cache=cache)
    with pytest.raises(ValueError, match="cache: remembers 2 sequences, x has 1"):
        first(token[:1], cache=cache)
    first.weights(token, cache=cache)
    cache.commit()
    assert len(cache) == 1


def test_an_adapted_projection_is_called():
    """As LoRA, quantisation and hooks on `qkv` need it."""

    class Adapted(nn.Linear):
        def forward(self, tokens):
            return super().forward(tokens) + 1

    m = mixer()
    plain, adapted = m(X), Adapted(8, 24)
    adapted.load_state_dict(m.qkv.state_dict())
    m.qkv = adapted
    shifted = mixer()
    shifted.load_state_dict(m.state_dict())
    with torch.no_grad():
        shifted.qkv.bias += 1
    torch.testing.assert_close(m(X), shifted(X))
    assert not torch.allclose(m(X), plain)
    seen = []
    shifted.qkv.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    torch.testing.assert_close(shifted(X), m(X))
    assert seen


def test_an_operator_is_final_and_names_what_it_takes():
    with pytest.raises(TypeError, match="SelfAttention is final"):

        class More(glocal.mixers.SelfAttention):
            pass

    with pytest.raises(TypeError, match="vaild"):

        class Misspelt(TokenMixer):
            def weights(self, x, *, vaild=None):
                return None


@pytest.mark.parametrize("name", glocal.available())
def test_transforms_of_torch_func(name):
    """Per-sample gradients by vmap are those of one sample after the other."""
    m = glocal.build(getattr(glocal.mixers, name).examples[0], 32).double().eval()
    parameters = {name: p.detach() for name, p in m.named_parameters()}
    x = torch.randn(3, 4, 4, 32, dtype=torch.float64)

    def loss(x):
        return torch.func.functional_call(m, parameters, (x[None],)).square().sum()

    each = torch.func.vmap(torch.func.grad(loss))(x)
    for one, image in zip(each, x, strict=True):
        image = image.clone().requires_grad_()
        m(image[None]).square().sum().backward()
        torch.testing.assert_close(one, image.grad)


def test_every_operator_compiles_by_itself_in_one_process():
    """torch.compile counts recompilations by code object, eight at most."""
    torch._dynamo.reset()
    for spec in glocal.contract.examples()[:12]:
        m = glocal.build(spec, 32).eval()
        x = torch.randn(2, *[8] * (m.rank or 2), 32)
        torch.compile(m, backend="eager", fullgraph=True)(x)
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["DynamicDepthwiseConv", "InhomogeneousDepthwiseConv"])
def test_a_frozen_batch_norm_stays_frozen(name):
    m = glocal.build(f"{name}(kernel_size=3)", 32).train()
    m.bn.eval()
    m.counted_macs((8, 8))
    with glocal.inspect(m) as seen:
        m(torch.randn(2, 8, 8, 32))
    seen.calls[0].weights()
    assert m.training
    assert not m.bn.training


@pytest.mark.parametrize("name", ["DynamicDepthwiseConv", "InhomogeneousDepthwiseConv"])
def test_a_batch_of_padding_alone_moves_no_statistics(name):
    m = glocal.build(f"{name}(kernel_size=3)", 32).train()
    out = m(torch.randn(2, 8, 8, 32), valid=torch.zeros(2, 8, 8, dtype=torch.bool))
    assert out.isfinite().all()
    assert torch.equal(m.bn.running_mean, torch.zeros(8))
    assert torch.equal(m.bn.running_var, torch.ones(8))


@pytest.mark.parametrize("name", ["DynamicDepthwiseConv", "InhomogeneousDepthwiseConv"])
def test_converted_to_synchronised_batch_norm(name):
    m = glocal.build(f"{name}(kernel_size=3)", 32).eval()
    x = torch.randn(2, 8, 8, 32)
    expected = m(x)
    converted = nn.SyncBatchNorm.convert_sync_batchnorm(m)
    assert isinstance(converted.bn, nn.SyncBatchNorm)
    torch.testing.assert_close(converted(x), expected)
    with pytest.raises(ValueError, match="SyncBatchNorm: in training"):
        converted.train().weights(x)
