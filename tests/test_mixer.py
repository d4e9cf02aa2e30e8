"""The interface of operators with weights: the choice of path, looks, the cache, what PyTorch does with a module."""

import pytest
import torch
from torch import nn

import glocal
import glocal.mixers
from glocal import Cache, TokenMixer, Unsupported

X = torch.randn(2, 5, 4, 8)


def mixer(spec="SelfAttention(num_heads=2)"):
    return glocal.build(spec, 8).eval()


def test_cross_attention_has_no_places_in_common():
    found = mixer().weights(X, torch.randn(2, 7, 8))
    assert found.dense().shape == (2, 2, 20, 7)
    assert found.query_positions.isnan().all()
    assert found.source_grid == (7,)


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


def test_a_fast_path_may_make_its_own_values():
    class Once(TokenMixer):
        def values(self, source):
            calls.append("values")
            return source.flatten(1, -2).unsqueeze(2)

        weights = _Mean._weights

        def fast(self, x):
            return x.mean((1, 2), keepdim=True).expand_as(x)

    m, calls = Once(8), []
    mean = X.mean((1, 2), keepdim=True).expand_as(X)
    torch.testing.assert_close(m(X), mean)
    assert calls == []
    torch.testing.assert_close(m.reference(X), mean)
    assert calls == ["values"]
    # nobody zeroes its values
    valid = torch.ones(2, 5, 4, dtype=torch.bool)
    valid[:, :, 2:] = False
    assert m.unsupported(X, valid=valid) == "the fast path does not take valid, the definition does"
    torch.testing.assert_close(m(X, valid=valid), (X[:, :, :2].sum((1, 2), keepdim=True) / 20).expand_as(X))


def test_a_fast_path_names_what_it_takes():
    with pytest.raises(TypeError, match=r"Misnamed.fast: v is no argument of a call; .* cache, values"):

        class Misnamed(TokenMixer):
            def fast(self, x, v):
                return x


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
    x = torch.randn(2, *[8] * (m.rank or 2), 32)
    with torch.autocast("cpu", torch.bfloat16):
        out = m(x, **m.besides(x))
    expected = m.reference(x, **m.besides(x))
    assert (out.float() - expected).abs().max() <= 0.05 * expected.abs().max()


def test_a_wrong_impl_is_refused():
    m = mixer()
    m.impl = "Fast"
    with pytest.raises(ValueError, match="'Fast'; it must be 'auto', 'reference' or 'fast'"):
        m(X)


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


@pytest.mark.parametrize("name", glocal.available())
def test_transforms_of_torch_func(name):
    """Per-sample gradients by vmap are those of one sample after the other."""
    m = glocal.build(getattr(glocal.mixers, name).examples[0], 32).double().eval()
    parameters = {name: p.detach() for name, p in m.named_parameters()}
    x = torch.randn(3, *[4] * (m.rank or 2), 32, dtype=torch.float64)

    def loss(x):
        return torch.func.functional_call(m, parameters, (x[None],), m.besides(x[None])).square().sum()

    each = torch.func.vmap(torch.func.grad(loss))(x)
    for one, image in zip(each, x, strict=True):
        image = image.clone().requires_grad_()
        m(image[None], **m.besides(image[None])).square().sum().backward()
        torch.testing.assert_close(one, image.grad)


@pytest.mark.parametrize(
    "spec",
    [
        "DepthwiseConv(kernel_size=7)",
        "LargeKernelConv(kernel_size=7)",
        "InhomogeneousDepthwiseConv(kernel_size=3)",
        "WindowAttention(window_size=3, num_heads=4)",
        "NeighborhoodAttention(kernel_size=3, num_heads=4)",
    ],
)
def test_forward_mode_derivatives(spec):
    """Compiled operations have none: a tangent that is silently lost would be a wrong answer."""
    m = glocal.build(spec, 32).double().eval()
    x, t = torch.randn(2, 1, 5, 6, 32, dtype=torch.float64).unbind(0)
    with torch.no_grad(), torch.autograd.forward_ad.dual_level():
        dual = m(torch.autograd.forward_ad.make_dual(x, t))
        tangent = torch.autograd.forward_ad.unpack_dual(dual).tangent
    step = 1e-5
    with torch.no_grad():
        torch.testing.assert_close(tangent, (m(x + step * t) - m(x - step * t)) / (2 * step), rtol=1e-6, atol=1e-7)


# planted by scripts/mutate
FAULTS = {
    "mixer.py": (
        (
            "asking for weights moves the cache on",
            "        return joined\n",
            "        self._past[name] = self._next[name]\n        return joined\n",
        ),
        (
            "looks join the caller's cache, so that its next commit takes what was only looked at",
            'return call | {"cache": call["cache"].copy()} if "cache" in call else call',
            "return call",
        ),
        ("two layers may share a cache", "elif self._owner != id(mixer):", "elif False:"),
        (
            "another layer may look into a cache",
            "dict(self._past), self._length, self._owner",
            "dict(self._past), self._length, None",
        ),
        (
            "transforms of torch.func go through the fast path",
            "torch._C._are_functorch_transforms_active() or",
            "False or",
        ),
        (
            "the fast path forgets to move the cache on",
            "            cache.commit(self._brought(x, call))",
            "            pass",
        ),
        ("a forced fast path falls back in silence", 'if self.impl == "fast":', 'if self.impl == "never":'),
        (
            "a call with an argument that only the definition takes is answered by the fast path",
            'if name not in self._takes["fast"] and',
            'if name not in self._takes["fast"] and name not in ARGUMENTS and',
        ),
    ),
    ("mixer.py", "mixers/test_convolution.py"): (
        (
            "values of padding are not zeroed",
            'values.masked_fill(~call["valid"].reshape(*values.shape[:2], 1, 1), 0)',
            "values",
        ),
    ),
    ("mixer.py", "mixers/test_self_attention.py"): (
        ("a cache puts new tokens before old ones", "torch.cat([past, new], dim=1)", "torch.cat([new, past], dim=1)"),
        ("the definition forgets to move the cache on", 'call["cache"].commit(self._brought(x, call))', "pass"),
    ),
    ("mixer.py", "test_contract.py -k='declared_cost or shapes_are_refused or query_subset'"): (
        (
            "a subset of the queries gives all rows of the weights",
            'if queries is not None and "queries" not in self._takes["_weights"] else found',
            "if False else found",
        ),
    ),
    ("mixer.py", "test_mixer.py", "test_spec.py"): (
        (
            "a fast path that makes its own values is given padding that nobody zeroes",
            'if "values" in self._takes["fast"] else ()',
            "if True else ()",
        ),
        (
            "values are made for a fast path that makes its own",
            'if "values" in self._takes["fast"] else {}',
            'if self._values(x, call) is not None and "values" in self._takes["fast"] else {}',
        ),
    ),
}
