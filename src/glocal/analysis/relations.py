"""How operators are related: the graph of Han et al. 2022, with ours placed on it by what is measured of them.

The figure of relations (arXiv 2106.04263, appendix): from a layer that connects everything with everything, each edge
takes something away (sparser, of lower rank) or makes the weights depend on the input. `NODES` and `EDGES` are that
figure; what a node demands (`where`) is our reading of it in terms of `Connectivity`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from glocal.analysis.connectivity import Connectivity

Change = Literal[
    "local", "separable", "dynamic", "lower rank over positions", "lower rank over channels", "only other sharing"
]


@dataclass(frozen=True)
class Node:
    """One kind of operator.

    Args:
        name: In the figure.
        published: What the figure counts to it.
        where: What is measured of such an operator: a field or property of `Connectivity`, and the values it may have.
    """

    name: str
    published: tuple[str, ...]
    where: Mapping[str, tuple[object, ...]]


@dataclass(frozen=True)
class Edge:
    """One step from a kind of operator to another.

    Args:
        start, end: Names of nodes.
        label: In the figure.
        kind: In the figure, by colour and stroke; "sharing" for the edge that it draws without a claim of these.
        change: What it says of the measured properties.
    """

    start: str
    end: str
    label: str
    kind: Literal["sparse", "dynamic", "low rank", "sharing"]
    change: Change


_STATIC = {"dynamic": ("no",)}
# an ordinary module that changes with the input cannot be compared: its weights are not to be told from its values
_WEIGHTS = {"frozen": (True,)}
_ATTENTION = {
    "dynamic": ("per position",), "made_by": ("what it reads",), **_WEIGHTS, "shared_over_channels": ("all", "groups"),
    "keeps_positions": (True,),
}  # fmt: skip
_LOCAL = {"positions": ("local",), "channels": ("separable",)}

NODES = (
    Node("MLP", (), {"positions": ("global",), "channels": ("dense",), **_STATIC, "all_matrices": (True,)}),
    Node("Conv.", (), {
        "positions": ("local",), "channels": ("dense",), "shared_over_positions": ("yes",), **_STATIC,
        "low_rank_positions": (False,), "low_rank_channels": (False,),
    }),
    Node("Sep. MLP", ("MLP-Mixer", "ResMLP"), {"positions": ("global",), "channels": ("separable",), **_STATIC}),
    Node("LR MLP", (), {
        "positions": ("global",), "channels": ("dense",), **_STATIC,
        "low_rank_positions": (True,), "low_rank_channels": (True,),
    }),
    Node("Pyramid / MS Conv.", ("HRNet", "Res2Net"), {
        "positions": ("local",), "channels": ("dense",), **_STATIC, "low_rank_positions": (True,),
    }),
    Node("Bottleneck", ("ResNet",), {
        "positions": ("local",), "channels": ("dense",), "shared_over_positions": ("yes",), **_STATIC,
        "low_rank_channels": (True,),
    }),
    Node("DW-S Conv.", ("Xception", "MobileNet", "EfficientNet", "ShuffleNet", "IGC"), {
        **_LOCAL, "shared_over_positions": ("yes",), **_STATIC,
    }),
    Node("ViT", (), {
        "positions": ("global",), "channels": ("separable",), **_ATTENTION, "low_rank_positions": (False,),
    }),
    Node("Local ViT", ("Swin Transformer",), {**_LOCAL, **_ATTENTION}),
    Node("PVT", (), {
        # nothing is asked of channels: the convolution that pools tokens mixes them
        "positions": ("global",), "dynamic": ("per position",), "made_by": ("what it reads",), **_WEIGHTS,
        "low_rank_positions": (True,),
    }),
    Node("Dynamic DW-S Conv.", (), {
        **_LOCAL, "shared_over_positions": ("yes",), "dynamic": ("per image",), **_WEIGHTS,
    }),
    Node("Dynamic Local-S MLP", ("Dynamic LightConv", "Involution"), {
        **_LOCAL, "dynamic": ("per position",), **_WEIGHTS, "made_by": ("itself", "some of what it reads"),
        "pattern_over_positions": ("yes",),
    }),
)  # fmt: skip

EDGES = (
    Edge("MLP", "Conv.", "Locality Sep.", "sparse", "local"),
    Edge("MLP", "Sep. MLP", "Dim. Sep.", "sparse", "separable"),
    Edge("MLP", "LR MLP", "Dim. LR", "low rank", "lower rank over positions"),
    Edge("Conv.", "Pyramid / MS Conv.", "Spatial LR", "low rank", "lower rank over positions"),
    Edge("Conv.", "Bottleneck", "Channel LR", "low rank", "lower rank over channels"),
    Edge("Conv.", "DW-S Conv.", "Dim. Sep.", "sparse", "separable"),
    Edge("Sep. MLP", "DW-S Conv.", "Locality Sep.", "sparse", "local"),
    Edge("Sep. MLP", "ViT", "Spatial Dynamic", "dynamic", "dynamic"),
    Edge("ViT", "Local ViT", "Locality Sep.", "sparse", "local"),
    Edge("ViT", "PVT", "Spatial LR", "low rank", "lower rank over positions"),
    Edge("DW-S Conv.", "Dynamic DW-S Conv.", "Vec. Atten.", "dynamic", "dynamic"),
    Edge("DW-S Conv.", "Dynamic Local-S MLP", "Inhomogeneous Vec. Atten.", "dynamic", "dynamic"),
    Edge("Local ViT", "Dynamic Local-S MLP", "Inhomogeneous Vec. Atten.", "sharing", "only other sharing"),
)

SHARING = ("shared_over_positions", "pattern_over_positions", "shared_over_channels")
# what an edge may change: kinds, not sizes
COMPARED = ("positions", "channels", *SHARING, "dynamic", "made_by", "low_rank_positions", "low_rank_channels")
_MAY_CHANGE = {
    "local": ("positions",),
    "separable": ("channels", "shared_over_channels"),
    "dynamic": ("dynamic", "made_by"),
    "lower rank over positions": ("low_rank_positions",),
    "lower rank over channels": ("low_rank_channels",),
    "only other sharing": SHARING,
}


@dataclass(frozen=True)
class Verdict:
    """What measurement says of an edge, over all pairs of an operator at its start and one at its end.

    Attributes:
        edge: it.
        pairs: how many there are; 0 where a node has no operator.
        against: the pairs that do not show the change that the edge claims.
        besides: what else changes, and in how many of the pairs: a field or property of `Connectivity`.
    """

    edge: Edge
    pairs: int
    against: tuple[tuple[str, str], ...]
    besides: Mapping[str, int]


def fits(node: Node, found: Connectivity) -> bool:
    """Whether an operator is of a kind, by its measured properties alone."""
    return not misfits(node, found)


def misfits(node: Node, found: Connectivity) -> tuple[str, ...]:
    """The properties that keep an operator from a node."""
    return tuple(name for name, allowed in node.where.items() if getattr(found, name) not in allowed)


def placed(found: Connectivity) -> Node | None:
    """The node that an operator belongs to, if any; no two nodes fit the same."""
    return next((node for node in NODES if fits(node, found)), None)


def nearest(found: Connectivity) -> list[tuple[Node, tuple[str, ...]]]:
    """The nodes that an operator misses by the fewest properties, with these."""
    missed = [(node, misfits(node, found)) for node in NODES]
    fewest = min(len(names) for _, names in missed)
    return [(node, names) for node, names in missed if len(names) == fewest]


def changes(change: Change, before: Connectivity, after: Connectivity) -> bool:
    """Whether a step from an operator to another is what an edge claims."""
    if change == "local":
        share = after.reads / after.num_positions < before.reads / before.num_positions
        return share and before.positions == "global" and after.positions == "local"
    if change == "separable":
        return before.channels == "dense" and after.channels == "separable"
    if change == "dynamic":
        return before.dynamic == "no" and after.dynamic != "no"
    if change == "lower rank over positions":
        return after.rank_positions * before.num_positions < before.rank_positions * after.num_positions
    if change == "lower rank over channels":
        return after.rank_channels * before.num_channels < before.rank_channels * after.num_channels
    kept = ("positions", "channels", "dynamic", "low_rank_positions", "low_rank_channels")
    same = all(getattr(before, name) == getattr(after, name) for name in kept)
    return same and any(getattr(before, name) != getattr(after, name) for name in SHARING)


def verdicts(found: Mapping[str, Connectivity]) -> list[Verdict]:
    """Every edge held to what is measured of the operators, by name, that are at its ends."""
    at = operators_at(found)
    return [_verdict(edge, at[edge.start], at[edge.end], found) for edge in EDGES]


def operators_at(found: Mapping[str, Connectivity]) -> dict[str, list[str]]:
    """The names of the operators at each node, by its name."""
    at: dict[str, list[str]] = {node.name: [] for node in NODES}
    for name, measured in found.items():
        node = placed(measured)
        if node is not None:
            at[node.name].append(name)
    return at


def _verdict(edge: Edge, starts: Sequence[str], ends: Iterable[str], found: Mapping[str, Connectivity]) -> Verdict:
    pairs = [(start, end) for end in ends for start in starts]
    against = tuple(pair for pair in pairs if not changes(edge.change, found[pair[0]], found[pair[1]]))
    besides = {}
    for name in COMPARED:
        count = sum(getattr(found[start], name) != getattr(found[end], name) for start, end in pairs)
        if count and name not in _MAY_CHANGE[edge.change]:
            besides[name] = count
    return Verdict(edge, len(pairs), against, besides)
