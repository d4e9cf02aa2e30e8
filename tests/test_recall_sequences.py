"""The generated sequences are what the probe says they are."""

import pytest
import torch

from glocal.data.recall_sequences import KEYS, PAIRS, VALUES, VOCABULARY, WORDS, recall_sequences


def drawn(count=400, length=20, seed=0, **arguments):
    return recall_sequences(count, length, torch.Generator().manual_seed(seed), **arguments)


@pytest.mark.parametrize(("length", "fewest"), [(5, 4), (20, 4), (20, 1), (33, 2)])
def test_one_question_and_the_pair_that_answers_it(length, fewest):
    found, pairs_seen = drawn(length=length, fewest=fewest), set()
    assert found.tokens.shape == (400, length)
    assert found.tokens.min() >= 0 and found.tokens.max() < VOCABULARY == KEYS * VALUES + KEYS + WORDS
    for tokens, question, answer, distance in zip(*found, strict=True):
        pairs = {place: divmod(int(t), VALUES) for place, t in enumerate(tokens) if t < KEYS * VALUES}
        asked = [place for place, t in enumerate(tokens) if KEYS * VALUES <= t < KEYS * VALUES + KEYS]
        assert asked == [question]
        assert len({key for key, _ in pairs.values()}) == len(pairs)
        pairs_seen.add(len(pairs))
        (place,) = [p for p, (key, _) in pairs.items() if key == tokens[question] - KEYS * VALUES]
        assert pairs[place][1] == answer and distance == abs(place - int(question)) >= 1
    assert pairs_seen == set(range(fewest, PAIRS + 1))


def test_other_pairs_say_nothing_of_the_answer():
    """Values are drawn for each pair: the answer repeats another pair's value as often as chance has it."""
    found = drawn(4000, 12)
    others = torch.where(found.tokens < KEYS * VALUES, found.tokens % VALUES, -1)
    count = (others == found.answer[:, None]).sum(1) - 1  # but for the pair itself
    assert abs(count.float().mean() - (PAIRS - 1) / VALUES) < 0.04
    assert torch.allclose(found.answer.bincount() / 4000, torch.tensor(1 / VALUES), atol=0.025)


def test_distances_and_what_is_free_beside_them_are_uniform():
    found = drawn(9000, 10)
    assert torch.allclose(found.distance.bincount(minlength=10)[1:] / 9000, torch.tensor(1 / 9), atol=0.02)
    near = found.question[found.distance == 1]
    ends = torch.tensor([1, *[2] * 8, 1]) / 18  # one neighbour at an end, two elsewhere
    assert torch.allclose(near.bincount(minlength=10) / len(near), ends, atol=0.04)
    others = (found.tokens < KEYS * VALUES).sum(0) - torch.zeros(10)  # pairs at each place
    assert others.min() > 0.75 * others.max()


def test_same_seed_same_sequences():
    assert all(torch.equal(a, b) for a, b in zip(drawn(), drawn(), strict=True))
    assert not torch.equal(drawn().tokens, drawn(seed=1).tokens)


def test_refuses_what_holds_no_pairs():
    with pytest.raises(ValueError, match="length: 4; it must be at least 5"):
        drawn(length=4)
    for fewest in (0, PAIRS + 1):
        with pytest.raises(ValueError, match=f"fewest: {fewest}; it must be from 1 to 4"):
            drawn(fewest=fewest)


# planted by scripts/mutate
FAULTS = {
    "data/recall_sequences.py": (
        ("the answer is another pair's value", "values[:, 0], distance", "values[:, 1], distance"),
        ("the longest distance is never there", "draw(length - 1, count, 1)", "draw(length - 2, count, 1)"),
        ("the question always stands behind", "shares(1) < 0.5", "shares(1) < 2"),
        ("another pair stands in the question's place", ".scatter(1, ends, 2.0)", ".scatter(1, ends[:, :1], 2.0)"),
        (
            "two pairs may have one key",
            "keys, values = shares(KEYS).argsort(1)[:, :PAIRS]",
            "keys, values = draw(KEYS, count, PAIRS)",
        ),
        (
            "values of a sequence are all different",
            "draw(VALUES, count, PAIRS)",
            "shares(VALUES).argsort(1)[:, :PAIRS]",
        ),
        (
            "the most pairs are never there",
            "draw(PAIRS - fewest + 1, count, 1)",
            "draw(max(PAIRS - fewest, 1), count, 1)",
        ),
    ),
}
