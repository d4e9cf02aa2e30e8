"""The quadratic encoding against the paper's score."""

import itertools

import pytest
import torch
from torch.testing import assert_close

import glocal
from glocal.positions import (
    grid_offsets,
    quadratic_encoding,
    quadratic_head,
)

from .tokens import EXACT, float64


def test_offsets_are_source_minus_query():
    found = grid_offsets((3, 4))
    places = list(itertools.product(range(3), range(4)))
    for (i, query), (j, source) in itertools.product(enumerate(places), repeat=2):
        assert found[i, j].tolist() == [s - q for q, s in zip(query, source, strict=True)]
    queries = torch.tensor([1, 0])
    strided = grid_offsets((3, 4), stride=2, queries=queries)
    assert_close(strided, found[[2, 0]])


@pytest.mark.parametrize("grid", [(4, 5), (7,)])
def test_the_quadratic_encoding_is_the_papers_score(grid):
    centre, alpha = float64(3, len(grid)), torch.rand(3, dtype=torch.float64)
    offsets = grid_offsets(grid).double()
    scores = torch.einsum("nmp,gp->gnm", quadratic_encoding(offsets), quadratic_head(centre, alpha))
    for g, i, j in itertools.product(range(3), range(offsets.shape[0]), range(offsets.shape[1])):
        d = offsets[i, j]
        expected = -alpha[g] * ((d * d).sum() - 2 * (d * centre[g]).sum())
        assert_close(scores[g, i, j], expected, **EXACT)
    mixer = glocal.build("QuadraticAttention(num_heads=3)", 4, rank=len(grid)).double()
    with torch.no_grad():
        mixer.attention_centers.copy_(centre)
        mixer.attention_spreads.copy_((2 * alpha).sqrt())
    assert_close(mixer.weights(float64(1, *grid, 4)).dense()[0], scores.softmax(-1), **EXACT)


def test_nine_quadratic_heads_read_the_taps_of_a_convolution():
    taps = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=2)), dtype=torch.float64)
    scores = quadratic_encoding(grid_offsets((5, 6)).double()) @ quadratic_head(taps, 46.0).T
    weights = scores.movedim(-1, 0).softmax(-1)
    for (y, x), head in zip(taps.long().tolist(), weights, strict=True):
        query = 2 * 6 + 3
        assert head[query, (2 + y) * 6 + 3 + x] > 1 - 1e-15


FAULTS = {
    (
        "positions/quadratic.py",
        "positions/test_quadratic.py",
        "positions/test_every_encoding.py",
        "positions/test_with_attention.py",
    ): (
        ("a centre is looked at from the other side", "2 * alpha * centre", "-2 * alpha * centre"),
        ("a centre is not doubled", "2 * alpha * centre", "alpha * centre"),
        ("the distance is not squared", "offsets.square().sum(-1, keepdim=True)", "offsets.norm(dim=-1, keepdim=True)"),
        ("a head is drawn to what is far", "-alpha.expand(", "alpha.expand("),
    ),
}
