"""The probe `recall` for sequences: an answer that stands at a known distance from its question.

A sequence holds a few pair tokens, each of a key and a value, one question token that repeats the key of one of the
pairs, and words that mean nothing. The answer is the value of the pair with that key. Which pair it is can only be
known by comparing contents, and how far it is away is written down.
"""

from typing import NamedTuple

import torch
from torch import Tensor

KEYS = 8
VALUES = 8  # the classes; drawn anew for each pair, so that other pairs say nothing of the answer
PAIRS = 4  # at most, with different keys
WORDS = 16  # that mean nothing
VOCABULARY = KEYS * VALUES + KEYS + WORDS  # pairs (key * VALUES + value), questions, words


class Sequences(NamedTuple):
    """N sequences of T tokens.

    Args:
        tokens: int64 [N, T], numbers below VOCABULARY.
        question: int64 [N], where the question stands.
        answer: int64 [N], the value of the pair with its key.
        distance: int64 [N], tokens between that pair and the question, 1 for a neighbour.
    """

    tokens: Tensor
    question: Tensor
    answer: Tensor
    distance: Tensor


def recall_sequences(count: int, length: int, generator: torch.Generator, *, fewest: int = PAIRS) -> Sequences:
    """Draws sequences; places are uniform over the sequence, so near pairs are more frequent than far ones.

    Args:
        count: Number of sequences N.
        length: Tokens T of each, more than PAIRS.
        generator: Where the random numbers come from.
        fewest: Pairs that each has at least, of at most PAIRS.

    Returns:
        The sequences. Chance is 1 / VALUES whatever is known of other pairs.

    Raises:
        ValueError: A length that does not hold the pairs and a question, or fewer than one pair.
    """
    if length <= PAIRS:
        raise ValueError(f"length: {length}; it must be at least {PAIRS + 1}, for {PAIRS} pairs and a question")
    if not 1 <= fewest <= PAIRS:
        raise ValueError(f"fewest: {fewest}; it must be from 1 to {PAIRS}")

    def draw(below: int, *shape: int) -> Tensor:
        return torch.randint(below, shape, generator=generator)

    def shuffled(of: int) -> Tensor:
        return torch.rand(count, of, generator=generator).argsort(1)

    places = shuffled(length)[:, : PAIRS + 1]
    keys, values = shuffled(KEYS)[:, :PAIRS], draw(VALUES, count, PAIRS)
    tokens = KEYS * VALUES + KEYS + draw(WORDS, count, length)
    there = torch.arange(PAIRS) < fewest + draw(PAIRS - fewest + 1, count, 1)
    pairs = torch.where(there, keys * VALUES + values, tokens.gather(1, places[:, :PAIRS]))
    tokens.scatter_(1, places[:, :PAIRS], pairs)
    question = places[:, PAIRS]
    tokens.scatter_(1, question[:, None], KEYS * VALUES + keys[:, :1])
    return Sequences(tokens, question, values[:, 0], (question - places[:, 0]).abs())
