"""The graph of Han et al. 2022 against what is measured of the operators that stand on it."""

from collections import Counter

import pytest

from glocal.analysis.connectivity import connectivity
from glocal.analysis.relations import (
    COMPARED,
    EDGES,
    NODES,
    changes,
    fits,
    misfits,
    nearest,
    operators_at,
    placed,
    verdicts,
)
from glocal.cli.listing import example
from glocal.spec import available

FAULTS = {
    "analysis/relations.py": (
        ("one property is enough", "in node.where.items() if", "in [*node.where.items()][:1] if"),
        ("low rank and full are one", '**_ATTENTION, "low_rank_positions": (False,)', "**_ATTENTION"),
        ("modules without weights are compared", '_WEIGHTS = {"frozen": (True,)}', '_WEIGHTS = {"frozen": (0, 1)}'),
        ("who makes the weights does not matter", '("itself", "some of', '("itself", "what it reads", "some of'),
        ("a full layer is what is dense", '**_STATIC, "all_matrices": (True,)}', "**_STATIC}"),
        ("an arrow of the figure is turned", 'Edge("Sep. MLP", "ViT"', 'Edge("ViT", "Sep. MLP"'),
        ("more reading is sparser", "after.num_positions < before.reads", "after.num_positions > before.reads"),
        ("what stays dynamic becomes so", 'before.dynamic == "no" and after.dynamic', "after.dynamic"),
        ("the rank may rise", "* before.num_positions < before.rank", "* before.num_positions > before.rank"),
        ("sharing need not change", "return same and any(", "return same or any("),
        ("pairs that disagree are left out", "if not changes(edge.change", "if False and not changes(edge.change"),
        ("what the edge claims counts as besides", "and name not in _MAY_CHANGE[edge.change]", ""),
    ),
}  # fmt: skip

# as published; figure of relations, read off the released picture
PUBLISHED = """
MLP > Conv.: sparse | MLP > Sep. MLP: sparse | MLP > LR MLP: low rank
Conv. > Pyramid / MS Conv.: low rank | Conv. > Bottleneck: low rank | Conv. > DW-S Conv.: sparse
Sep. MLP > DW-S Conv.: sparse | Sep. MLP > ViT: dynamic | ViT > Local ViT: sparse | ViT > PVT: low rank
DW-S Conv. > Dynamic DW-S Conv.: dynamic | DW-S Conv. > Dynamic Local-S MLP: dynamic
Local ViT > Dynamic Local-S MLP: sharing
"""

# one operator of each kind that the article itself speaks of, and what is known to be nowhere in its figure
KNOWN = {
    "Convolution": "Conv.",
    "LinearTokenMixing": "Sep. MLP",
    "DepthwiseConv": "DW-S Conv.",
    "SelfAttention": "ViT",
    "WindowAttention": "Local ViT",
    "NeighborhoodAttention": "Local ViT",
    "SpatialReductionAttention": "PVT",
    "DynamicDepthwiseConv": "Dynamic DW-S Conv.",
    "DynamicConv": "Dynamic Local-S MLP",
    "InhomogeneousDepthwiseConv": "Dynamic Local-S MLP",
    "Involution": "Dynamic Local-S MLP",
    "LocalMLP": None,  # static, of its own in every window
    "Gate": None,
    "ClassAttention": None,  # one output
    "DeformableConv": None,
    "TokenMLP": None,  # with its nonlinearity
    "QuadraticAttention": None,  # global, static and dense, but of nine matrices
}
NOWHERE = ["MLP", "LR MLP", "Pyramid / MS Conv.", "Bottleneck"]


@pytest.fixture(scope="module")
def found():
    return {name: connectivity(example(name)) for name in available()}


def test_the_figure_is_the_published_one():
    edges = PUBLISHED.replace("\n", "|").split("|")
    expected = sorted(edge.strip() for edge in edges if edge.strip())
    assert sorted(f"{edge.start} > {edge.end}: {edge.kind}" for edge in EDGES) == expected
    assert len(NODES) == 12 and len(EDGES) == 13
    assert {name for edge in EDGES for name in (edge.start, edge.end)} == {node.name for node in NODES}


def test_operators_stand_where_they_are_known_to(found):
    assert {name: node and node.name for name in KNOWN for node in [placed(found[name])]} == KNOWN
    at = operators_at(found)
    assert [name for name, operators in at.items() if not operators] == NOWHERE
    counts = Counter(name for operators in at.values() for name in operators)
    assert set(counts.values()) == {1}
    assert set(counts) == {name for name in found if placed(found[name]) is not None}


def test_no_operator_fits_two_nodes(found):
    for name, measured in found.items():
        assert sum(fits(node, measured) for node in NODES) <= 1, name
        if placed(measured) is None:
            assert all(missed and set(missed) == set(misfits(node, measured)) for node, missed in nearest(measured))


EXPECTED = {  # where both ends have operators
    ("Conv.", "DW-S Conv."): lambda a, b: a.channels == "dense" and b.channels == "separable" and a.reads <= b.reads,
    ("Sep. MLP", "DW-S Conv."): lambda a, b: b.reads < a.reads == a.num_positions,
    ("Sep. MLP", "ViT"): lambda a, b: (a.dynamic, b.dynamic) == ("no", "per position") and a.reads == b.reads,
    ("ViT", "Local ViT"): lambda a, b: b.reads < a.reads == a.num_positions and a.dynamic == b.dynamic,
    ("ViT", "PVT"): lambda a, b: b.rank_positions < a.rank_positions == 64 and a.reads == b.reads == 64,
    ("DW-S Conv.", "Dynamic DW-S Conv."): lambda a, b: (a.dynamic, b.dynamic) == ("no", "per image"),
    ("DW-S Conv.", "Dynamic Local-S MLP"): lambda a, b: (a.dynamic, b.dynamic) == ("no", "per position"),
}


def test_every_edge_between_operators_shows_what_it_claims(found):
    """But for one, that from Local ViT: see below."""
    at, seen = operators_at(found), []
    for verdict in verdicts(found):
        ends = (verdict.edge.start, verdict.edge.end)
        pairs = [(start, end) for start in at[ends[0]] for end in at[ends[1]]]
        assert verdict.pairs == len(pairs)
        if not pairs or verdict.edge.kind == "sharing":
            continue
        seen.append(ends)
        assert all(EXPECTED[ends](found[start], found[end]) for start, end in pairs)
        assert verdict.against == ()
        for start, end in pairs:  # and the way back does not
            assert not changes(verdict.edge.change, found[end], found[start])
    assert sorted(seen) == sorted(EXPECTED)


def test_where_measurement_disagrees_with_the_article(found):
    """The arrow that stands for another sharing only: an attention without windows shares no otherwise."""
    windows, attention = (
        ("HaloAttention", "NeighborhoodAttention", "WindowAttention"),
        ("SelfAttention", "FocalAttention"),
    )
    predicted = ("DynamicConv", "InhomogeneousDepthwiseConv", "Involution", "OutlookAttention")
    pooled = ("LinearAttention", "LinearSpatialReductionAttention", "SpatialReductionAttention")
    some = {name: found[name] for name in (*windows, *attention, *predicted, *pooled)}
    by_ends = {(verdict.edge.start, verdict.edge.end): verdict for verdict in verdicts(some)}
    last = by_ends["Local ViT", "Dynamic Local-S MLP"]
    others = ("DynamicConv", "InhomogeneousDepthwiseConv", "OutlookAttention")
    assert last.pairs == 12
    assert sorted(last.against) == sorted(("NeighborhoodAttention", name) for name in others)
    assert last.besides == {"made_by": 12}  # what changes everywhere is who makes the weights
    for name in ("positions", "channels", "dynamic", "low_rank_positions", "low_rank_channels"):
        assert getattr(found["WindowAttention"], name) == getattr(found["Involution"], name)
    assert found["WindowAttention"].pattern_over_positions == "periodically"
    assert found["Involution"].pattern_over_positions == "yes"
    # pooling by a convolution mixes channels, of which the edge says nothing
    assert by_ends["ViT", "PVT"].besides["channels"] == 4 and by_ends["ViT", "PVT"].pairs == 6
    assert found["SpatialReductionAttention"].channels == "dense" != found["SelfAttention"].channels
    # the article counts MLP-Mixer to the separable MLP; as a whole its token mixing is not static
    assert found["TokenMLP"].dynamic == "per position" and not found["TokenMLP"].frozen


def test_what_changes_besides_is_counted(found):
    names = ("LinearTokenMixing", "AveragePooling", "DepthwiseConv", "LargeKernelConv", "MultiScaleConv")
    some = {name: found[name] for name in names}
    verdict = next(v for v in verdicts(some) if (v.edge.start, v.edge.end) == ("Sep. MLP", "DW-S Conv."))
    # three of the four have a kernel for each channel, one position of AveragePooling's is lost by accident
    assert verdict.besides == {"shared_over_positions": 4, "shared_over_channels": 3, "low_rank_positions": 1}
    assert all(name in COMPARED for v in verdicts(found) for name in v.besides)


def test_a_mean_over_three_loses_rank_on_some_grids_only():
    assert connectivity(example("AveragePooling")).rank_positions == 49
    assert not connectivity(example("AveragePooling"), (9, 9)).low_rank_positions
