"""Mean distance and entropy of weights, by hand."""

import pytest
import torch

from glocal.analysis.distance import mean_distance
from glocal.analysis.entropy import entropy

from .stored_maps import aggregation


def test_distance_and_entropy_by_hand():
    dense = aggregation(
        [[[[0.5, 0.5, 0.0, 0.0], [0.25, 0.25, 0.25, 0.25], [0.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 0.0]]]]
    )
    assert mean_distance(dense)[0, 0, :3].tolist() == [0.5, 1.0, 1.0]
    assert entropy(dense)[0, 0, :3].tolist() == [1.0, 2.0, 0.0]
    assert mean_distance(dense)[0, 0, 3].isnan() and entropy(dense)[0, 0, 3].isnan()
    # slots that repeat a source, cancel there, or lie outside; the sign does not count
    sparse = aggregation([[[[1.0, -3.0, 1.0, 2.0]]]], [[[[0, 1, 0, -1], [1, 1, 2, 3], [3, 3, 3, 3], [-1, 0, 1, 2]]]])
    assert mean_distance(sparse)[0, 0].tolist() == pytest.approx([3 / 5, (1 + 4) / 5, 1.0, (9 + 2 + 2) / 6])
    shares = torch.tensor([2 / 5, 3 / 5])
    assert entropy(sparse)[0, 0, 0].item() == pytest.approx(-(shares * shares.log2()).sum().item())


# planted by scripts/mutate
FAULTS = {
    ("analysis/distance.py", "test_distance.py"): (
        (
            "signs count",
            "torch.broadcast_tensors(a.weights.abs(), a.index)",
            "torch.broadcast_tensors(a.weights, a.index)",
        ),
        ("repeated slots count one by one", "a = aggregation.coalesce()", "a = aggregation"),
        ("sources without a place are at the query", "size = size * placed", "size = size * 1"),
    ),
    ("analysis/entropy.py", "test_distance.py"): (
        ("entropy is in nats", "torch.log(torch.tensor(2.0, dtype=share.dtype))", "1"),
        ("repeated slots count one by one", "a = aggregation.coalesce()", "a = aggregation"),
    ),
}
