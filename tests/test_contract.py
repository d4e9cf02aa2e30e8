"""Every example of every operator keeps the contract."""

import pytest

from glocal import contract, mixers
from glocal.spec import available

CASES = [(spec, check, grid) for spec in contract.examples() for check, grid in contract.cases(spec)]


@pytest.mark.parametrize(
    ("spec", "check", "grid"), CASES, ids=[f"{c.__name__}-{s}-{'x'.join(map(str, g))}" for s, c, g in CASES]
)
def test_contract(spec, check, grid):
    outcome = contract.run(spec, check, grid)
    assert outcome.state != "broken", outcome.sentence
    assert outcome.state == "kept" or any(words in outcome.sentence for words in REFUSALS), outcome.sentence


# what operators may refuse, in which words; anything else that is refused is a gap
REFUSALS = (
    "not causal",
    "no softmax",
    "more than a softmax",
    "mask_padding=False lets padding be seen",
    "GeneralizedQuadraticAttention: has no fast path",
    "an ordinary module",
    "the released code lets padding be seen",
    "GatedMixture: a mixture before the softmax has its definition only",
)


@pytest.mark.parametrize("name", available())
def test_every_operator_has_examples(name):
    """A class without any would keep any contract; so would one whose examples fit no grid."""
    specs = getattr(mixers, name).examples
    assert specs
    for spec in specs:
        assert any(contract.fits(spec, grid) for grid in contract.GRIDS), spec
