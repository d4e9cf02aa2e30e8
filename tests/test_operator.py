"""Ordinary modules: the same call, checks, text and cost as a token mixer, and no weights."""

import pytest
import torch
from torch import nn

import glocal
from glocal import contract
from glocal.operator import TokenModule

DIM = contract.DIM

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
