"""Weights and scores stored in a byte each come back, alone and together."""

import numpy as np
import pytest
import torch

from glocal.analysis.codes import coded_scores, coded_weights, table_of

from .stored_maps import assert_near, score_row


@pytest.mark.parametrize("spread", [0.02, 0.5, 3.0, 12.0])
@pytest.mark.parametrize("position", [None, 0.1, 4.0, 60.0, 2000.0])
def test_both_terms_and_their_sum_come_back(spread, position):
    """A sharp position among flat content and the other way round: each alone, and together, by torch's softmax."""
    torch.manual_seed(1)
    content = spread * torch.randn(2, 6, 150, dtype=torch.float64)
    seen = torch.rand(1, 6, 150) < 0.9
    other = None if position is None else position * torch.randn(2, 6, 150, dtype=torch.float64)
    table = None if other is None else table_of(other)
    rows = coded_scores(content, None if table is None else table.decoded(), seen, seen)
    for head in range(2):
        for query in range(6):
            term, second, scales = score_row(rows, table, head, query)
            mask = seen[0, query].numpy()
            assert (np.isnan(term) == ~mask).all()
            assert_near(np.exp(term - scales[2])[mask], content[head, query][seen[0, query]].softmax(-1).numpy())
            span = np.ptp(content[head, query].numpy()[mask])
            assert np.abs(term - content[head, query].numpy())[mask].max() <= 1.02 * span / 128
            if other is None:
                continue
            total = (content + other)[head, query][seen[0, query]].softmax(-1).numpy()
            assert_near(np.exp(term + second - scales[4])[mask], total)
            alone = other[head, query][seen[0, query]].softmax(-1).numpy()
            assert_near(np.exp(second - scales[5])[mask], alone)


def test_a_fine_table_is_stored_in_half_the_room():
    narrow, wide = (table_of(width * torch.rand(2, 3, 40)) for width in (50.0, 500.0))
    assert (narrow.codes.dtype, wide.codes.dtype) == (np.uint16, np.float32)


def test_rows_without_anything_seen_and_rows_of_equals():
    seen = torch.tensor([[[True], [False]]])
    rows = coded_scores(torch.ones(1, 2, 4), None, seen, seen)
    assert rows.codes.tolist() == [[[0] * 4, [255] * 4]]
    assert slots_of_one(rows, 0) == pytest.approx([0.25] * 4, abs=1e-3)
    assert np.isfinite(rows.scales).all()


def slots_of_one(rows, query):
    term, _, scales = score_row(rows, None, 0, query)
    return np.exp(term - scales[2]).tolist()


def test_weights_of_either_sign():
    weights = torch.tensor([[[0.5, -2.0, 1.0, 0.0]]])
    rows = coded_weights(weights, True)
    assert (rows.codes[0, 0].tolist(), rows.scales.item()) == ([160, 1, 192, 128], pytest.approx(2 / 127))
    assert coded_weights(torch.zeros(1, 1, 3), True).codes.tolist() == [[[128] * 3]]
    assert coded_weights(torch.tensor([[[0.0, 1.0, 4.0]]]), False).codes.tolist() == [[[0, 64, 255]]]


# planted by scripts/mutate
FAULTS = {
    ("analysis/codes.py", "test_codes.py", "test_maps.py"): (
        ("steps near the top are twice as wide", "STEP = 1.5 / 128", "STEP = 3 / 128"),
        ("steps further down are a tenth of the range", "PARTS = 64 ", "PARTS = 10 "),
        ("what is left out of the softmax is stored as any other", ".round(), EMPTY)", ".round(), 0)"),
        (
            "the sum's highest is not looked at",
            "bound = torch.minimum(highest, highest_sum - other)",
            "bound = highest",
        ),
        ("a wide table is stored in 16 bits", "if float(step.max()) > FINE:", "if False:"),
        ("weights below zero are cut off", "+ (128 if signed else 0)", "+ (0 if signed else 0)"),
        ("the denominator counts what is not seen", "found = t.masked_fill(~seen, -torch.inf)", "found = t"),
        (
            "denominators are those of what is shown",
            "[highest, _denominator(t, over)]",
            "[highest, _denominator(t, seen)]",
        ),
        ("scales are rounded down", "/ unit).ceil() * unit", "/ unit).floor() * unit"),
    ),
}
