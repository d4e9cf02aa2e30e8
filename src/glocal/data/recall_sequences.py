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
        distance: int64 [N], places from that pair to the question, 1 for a neighbour.
    """

    tokens: Tensor
    question: Tensor
    answer: Tensor
    distance: Tensor


def recall_sequences(count: int, length: int, generator: torch.Generator, *, fewest: int = PAIRS) -> Sequences:
    """Draws sequences; all distances between a question and its pair, up to length - 1, are equally frequent.

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

    def shares(of: int) -> Tensor:
        return torch.rand(count, of, generator=generator)

    distance = 1 + draw(length - 1, count, 1)
    first = (shares(1) * (length - distance)).long()
    ends = torch.cat([first, first + distance], 1)
    ends = torch.where(shares(1) < 0.5, ends, ends.flip(1))  # the pair before the question, or behind it
    others = shares(length).scatter(1, ends, 2.0).argsort(1)[:, : PAIRS - 1]  # 2: after all the shares
    places, question = torch.cat([ends[:, :1], others], 1), ends[:, 1]
    keys, values = shares(KEYS).argsort(1)[:, :PAIRS], draw(VALUES, count, PAIRS)
    tokens = KEYS * VALUES + KEYS + draw(WORDS, count, length)
    there = torch.arange(PAIRS) < fewest + draw(PAIRS - fewest + 1, count, 1)
    tokens.scatter_(1, places, torch.where(there, keys * VALUES + values, tokens.gather(1, places)))
    tokens.scatter_(1, question[:, None], KEYS * VALUES + keys[:, :1])
    return Sequences(tokens, question, values[:, 0], distance[:, 0])
