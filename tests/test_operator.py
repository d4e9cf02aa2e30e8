"""What every operator is: one call, whatever the tokens, the source and the padding; ordinary modules too."""

import pytest
import torch
from torch import nn

import glocal
from glocal import TokenMixer, contract
from glocal.operator import TokenModule

DIM = contract.DIM
X = torch.randn(2, 5, 4, 8)

FILE = """
import torch
from torch import nn
from glocal import TokenModule, TokenMixer


class Blend(TokenModule):
    def __init__(self, dim, *, share=0.5, rank=None):
        super().__init__(dim, rank=rank)
        self.share = share
        self.proj = nn.Linear(dim, dim)

    def mix(self, x, *, valid=None):
        tokens = x.flatten(1, -2)
        real = torch.ones_like(tokens[..., :1]) if valid is None else valid.flatten(1)[..., None].to(x)
        mean = (tokens * real).sum(1, keepdim=True) / real.sum(1, keepdim=True).clamp(min=1)
        return self.proj(torch.relu(self.share * mean + (1 - self.share) * tokens)).view_as(x)


class Careless(TokenModule):
    def __init__(self, dim):
        super().__init__(dim)

    def mix(self, x):
        return x + x.flatten(1, -2).mean(1).view(len(x), *[1] * (x.dim() - 2), -1)


class Dependent(TokenModule):
    def __init__(self, dim):
        super().__init__(dim)

    def mix(self, x):
        return x * x.abs().amax(0)  # of the whole batch


class Counts(TokenModule):
    def __init__(self, dim):
        super().__init__(dim)
        self.norm = nn.BatchNorm1d(dim)

    def mix(self, x):  # in training its statistics move whoever looks
        return self.norm(x.flatten(0, -2)).view_as(x)


class Shrinks(TokenModule):
    def __init__(self, dim):
        super().__init__(dim, rank=2)

    def out_grid(self, grid):
        return tuple((n + 1) // 2 for n in grid)

    def mix(self, x):
        return x[:, ::2, ::2].contiguous()
"""


@pytest.fixture
def spec(tmp_path):
    (tmp_path / "mine.py").write_text(FILE)
    return lambda call: f"{tmp_path}/mine.py:{call}"


def mixer(spec="SelfAttention(num_heads=2)"):
    return glocal.build(spec, 8).eval()


@pytest.mark.parametrize("call", ["Blend(share=0.25)", "Shrinks()"])
def test_a_module_keeps_the_contract(spec, call):
    said = {"an ordinary module", "no softmax", "not causal", "takes no valid"}
    outcomes = [contract.run(spec(call), check, grid) for check, grid in contract.cases(spec(call))]
    assert len(outcomes) > 30
    for outcome in outcomes:
        assert outcome.state != "broken", outcome
        assert outcome.state == "kept" or any(words in outcome.sentence for words in said), outcome


def test_what_a_module_gets_wrong_is_found(spec):
    found = contract.run(spec("Dependent()"), contract.padding_changes_nothing, (13, 7))
    assert found.state == "refused" and "takes no valid" in found.sentence
    found = contract.run(spec("Counts()"), contract.looking_changes_nothing, (13, 7))
    assert found.state == "broken" and "mix moved the buffer norm." in found.sentence
    careless = glocal.build(spec("Careless()"), 4)
    with pytest.raises(ValueError, match="Careless: takes no valid"):
        careless(torch.randn(2, 5, 4), valid=torch.ones(2, 5, dtype=torch.bool))


def test_calls(spec):
    blend = glocal.build(spec("Blend(share=0.25)"), 4)
    x = torch.randn(2, 3, 5, 4)
    mean = x.mean((1, 2), keepdim=True)
    torch.testing.assert_close(blend(x), blend.proj((0.25 * mean + 0.75 * x).relu()))
    torch.testing.assert_close(blend(x, queries=torch.tensor([7, 0])), blend(x).flatten(1, 2)[:, [7, 0]])
    torch.testing.assert_close(blend(x.flatten(1, 2), grid=(3, 5)), blend(x).flatten(1, 2))
    torch.testing.assert_close(blend.mix(x), blend(x))
    torch.testing.assert_close(blend.reference(x), blend(x))
    assert repr(blend) == spec("Blend(share=0.25)")
    assert blend.macs((3, 5)) == 15 * 4 * 4
    shrinks = glocal.build(spec("Shrinks()"), 4)
    torch.testing.assert_close(shrinks(x.flatten(1, 2), grid=(3, 5)), x[:, ::2, ::2].flatten(1, 2))
    for argument in ("source", "pos_embed"):
        with pytest.raises(ValueError, match=f"Blend: does not take {argument}"):
            blend(x, **{argument: x})


def test_a_module_that_is_written_wrongly_says_so():
    with pytest.raises(TypeError, match=r"Wrong\.mix: speed.* is no argument of a call"):

        class Wrong(TokenModule):
            def mix(self, x, *, speed):
                return x

    class Right(TokenModule):
        def mix(self, x):
            return x

    with pytest.raises(TypeError, match="Right is final"):

        class Derived(Right):
            pass


def test_statistics_move_only_in_a_call():
    class Normed(TokenModule):
        def __init__(self, dim):
            super().__init__(dim)
            self.norm = nn.BatchNorm1d(dim)

        def mix(self, x, *, update_statistics=False):
            self.norm.train(update_statistics)
            return self.norm(x.flatten(0, -2)).view_as(x)

    normed = Normed(4)
    normed.mix(torch.randn(2, 3, 4))
    assert normed.norm.num_batches_tracked == 0
    normed(torch.randn(2, 3, 4))
    assert normed.norm.num_batches_tracked == 1
    normed.eval()(torch.randn(2, 3, 4))
    assert normed.norm.num_batches_tracked == 1


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


def test_an_operator_is_final_and_names_what_it_takes():
    with pytest.raises(TypeError, match="SelfAttention is final"):

        class More(glocal.mixers.SelfAttention):
            pass

    with pytest.raises(TypeError, match="vaild"):

        class Misspelt(TokenMixer):
            def weights(self, x, *, vaild=None):
                return None


def test_every_operator_compiles_by_itself_in_one_process():
    """torch.compile counts recompilations by code object, eight at most."""
    torch._dynamo.reset()
    for spec in contract.examples()[:12]:
        m = glocal.build(spec, 32).eval()
        x = torch.randn(2, *[8] * (m.rank or 2), 32)
        torch.compile(m, backend="eager", fullgraph=True)(x, **m.besides(x))
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


def test_positions_of_a_source_have_its_shape():
    mixer, x, source = glocal.build("SelfAttention(num_heads=2)", 8), torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    with pytest.raises(ValueError, match=r"source_pos_embed has shape \(2, 3, 8\)"):
        mixer(x, source, source_pos_embed=torch.randn(2, 3, 8))
    positions = torch.randn(5, 8)
    q, k = mixer.qkv(x)[..., :8], mixer.qkv(source + positions)[..., 8:16]
    scores = torch.einsum("bngd,bmgd->bgnm", q.unflatten(-1, (2, 4)), k.unflatten(-1, (2, 4))) / 2
    torch.testing.assert_close(mixer.weights(x, source, source_pos_embed=positions).weights, scores.softmax(-1))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("rubbish", [float("nan"), float("inf"), 1e30])
def test_padding_of_another_source_may_hold_anything(impl, rubbish):
    mixer, x, source = glocal.build("SelfAttention(num_heads=2)", 8), torch.randn(2, 3, 8), torch.randn(2, 5, 8)
    mixer.impl = impl
    valid = torch.arange(5) < torch.tensor([[5], [2]])
    source = source.masked_fill(~valid[..., None], rubbish)
    out = mixer(x, source, valid=valid)
    torch.testing.assert_close(out[:1], mixer(x[:1], source[:1]))
    torch.testing.assert_close(out[1:], mixer(x[1:], source[1:, :2]))
    assert all(grad.isfinite().all() for grad in torch.autograd.grad(out.sum(), list(mixer.parameters())))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("steps", [(4,), (1, 3), (2, 1, 1)])
@pytest.mark.parametrize("real", [[2, 3], [0, 2, 3]])
def test_padding_before_and_behind_a_cache_may_hold_anything(impl, steps, real):
    """`valid` is that of all tokens so far, those that a call brings are its last."""
    mixer, x = glocal.build("SelfAttention(num_heads=2, causal=True)", 8), torch.randn(2, 4, 8)
    mixer.impl = impl
    valid = torch.ones(2, 4, dtype=torch.bool)
    valid[1] = torch.isin(torch.arange(4), torch.tensor(real))
    x = x.masked_fill(~valid[..., None], float("nan"))
    cache, rows = glocal.Cache(), []
    for end, step in zip(torch.tensor(steps).cumsum(0).tolist(), steps, strict=True):
        rows.append(mixer(x[:, end - step : end], valid=valid[:, :end], cache=cache))
    out = torch.cat(rows, 1)
    torch.testing.assert_close(out[:1], mixer(x[:1]))
    torch.testing.assert_close(out[1:, real], mixer(x[1:, real]))


# planted by scripts/mutate
FAULTS = {
    "operator.py": (
        (
            "afterwards a frozen batch norm is in the mode of its mixer",
            "        for part, training in modes:\n            part.training = training",
            "        module.train(modes[0][1])",
        ),
        ("an operator can be derived from a final one", "if final is not None:", "if False:"),
        ("all operators share the code object by which torch.compile counts", "        cls.forward = forward\n", ""),
        (
            "the counted cost is in operations, twice the multiply-adds",
            "counter.get_total_flops() // 2",
            "counter.get_total_flops()",
        ),
        (
            "what is infinite or NaN in the padding of a source reaches real tokens",
            'call["source"] = finite_outside(source, valid[:, past:])',
            'call["source"] = source',
        ),
        (
            "with a cache, the padding of new tokens is taken for that of the first",
            "return finite_outside(x, valid[:, past:]), call",
            "return finite_outside(x, valid[:, : valid.shape[1] - past]), call",
        ),
        (
            "positions of the source are measured by x",
            '("source_pos_embed", x if source is None else source)',
            '("source_pos_embed", x)',
        ),
        (
            "class tokens in front are dropped in silence by operators that have no place for them",
            "                if prefix:\n                    raise ValueError(",
            "                x = x[:, prefix:]\n                if prefix < 0:\n                    raise ValueError(",
        ),
    ),
    "arguments.py": (
        (
            "what is infinite or NaN in the padding reaches real tokens",
            "tokens.masked_fill(~valid[..., None] & ~tokens.isfinite(), 0)",
            "tokens",
        ),
    ),
    ("operator.py", "mixers/test_dynamic_depthwise_conv.py"): (
        (
            "looking moves the batch norm's statistics",
            'taken["update_statistics"] = update and self.training',
            'taken["update_statistics"] = self.training',
        ),
        (
            "a forward pass does not move the batch norm's statistics",
            'taken["update_statistics"] = update and self.training',
            'taken["update_statistics"] = False',
        ),
    ),
    "inspection.py": (
        (
            "a frozen batch norm is looked at in the mode of its mixer",
            "            for part, training in self._modes:\n                part.training = training\n",
            "            self.mixer.train(self._modes[0][1])\n",
        ),
    ),
}
