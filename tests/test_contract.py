"""Every example of every operator keeps the contract."""

import ast
from functools import cache
from pathlib import Path

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
    expected = outcome.state == "kept" or outcome.sentence in contract.NOT_APPLICABLE
    assert expected or outcome.sentence.startswith(refused_by(spec.partition("(")[0])), outcome.sentence


@cache
def refused_by(name: str) -> tuple[str, ...]:
    """How the sentences begin in which an operator may refuse something: the literal `REFUSES` of its own test.

    Anything else that is refused is a gap.
    """
    file = Path(__file__).parent / "mixers" / f"test_{getattr(mixers, name).__module__.rpartition('.')[2]}.py"
    for node in ast.parse(file.read_text("utf-8")).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "REFUSES":
            return ast.literal_eval(node.value)
    return ()


@pytest.mark.parametrize("name", available())
def test_every_operator_has_examples(name):
    """A class without any would keep any contract; so would one whose examples fit no grid."""
    specs = getattr(mixers, name).examples
    assert specs
    for spec in specs:
        assert any(contract.fits(spec, grid) for grid in contract.GRIDS), spec
