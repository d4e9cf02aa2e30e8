"""`glocal list --graph`: operators placed on the graph of relations, as text and as a page."""

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from glocal.cli.parsing import print_table

if TYPE_CHECKING:
    from glocal.analysis.connectivity import Connectivity
    from glocal.report.relations import Arrow, Box, Pictures, Stray

DIM, LENGTH = 8, 8  # of the pictures
GLOBAL, DENSE = f"LinearTokenMixing(grid_size={LENGTH}, rank=1)", "Convolution(kernel_size=3, rank=1)"
LOCAL, WINDOWS = "DepthwiseConv(kernel_size=3, rank=1)", "LocalMLP(window_size=4, num_heads=1, rank=1)"
PER_IMAGE, PER_POSITION = (
    "DynamicDepthwiseConv(kernel_size=3, rank=1)",
    "Involution(kernel_size=3, group_channels=8, rank=1)",
)
COMPARED = "SelfAttention(num_heads=1)"


def graph_of(found: Mapping[str, "Connectivity"]) -> tuple[list["Box"], list["Arrow"], list["Stray"]]:
    """What there is to draw, from what is measured of operators by their names."""
    from glocal.analysis.relations import NODES, nearest, operators_at, placed, verdicts
    from glocal.report.relations import Arrow, Box, Stray

    at = operators_at(found)
    boxes = [Box(node.name, node.published, node.where, at[node.name]) for node in NODES]
    arrows = [
        Arrow(
            *(verdict.edge.start, verdict.edge.end, verdict.edge.label, verdict.edge.kind, verdict.edge.change),
            *(verdict.pairs, verdict.against, verdict.besides),
        )
        for verdict in verdicts(found)
    ]
    strays = [
        Stray(
            name,
            [(node.name, {each: getattr(measured, each) for each in missed}) for node, missed in nearest(measured)],
        )
        for name, measured in found.items()
        if placed(measured) is None
    ]
    return boxes, arrows, strays


def write_graph(file: Path, found: Mapping[str, "Connectivity"]) -> None:
    """The page, as one file."""
    from glocal.report.relations import relations_page

    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(relations_page(*graph_of(found), _pictures()), encoding="utf-8")


def print_graph(found: Mapping[str, "Connectivity"]) -> None:
    """The same as two tables."""
    from glocal.report.relations_words import LANGUAGES

    boxes, arrows, _ = graph_of(found)
    words = LANGUAGES[0]
    of = {operator: box.name for box in boxes for operator in box.operators}
    rows = [("operator", "made by", "rank over positions", "over channels", "matrices", "box")]
    for name, each in found.items():
        rows.append(
            (
                name,
                each.made_by,
                f"{each.rank_positions} of {min(each.num_positions, each.num_outputs)}",
                f"{each.rank_channels} of {each.num_channels}",
                str(each.matrices),
                of.get(name, "-"),
            )
        )
    print()
    print_table(rows)
    print(
        "\nmade by: the tokens that the weights of an output change with; matrices: of how many channel matrices the"
        "\nJacobian's blocks are combinations; box: of the graph of Han et al. 2022, arXiv 2106.04263.\n"
    )
    rows = [("step", "claim", "pairs", "what else changes in all pairs")]
    for arrow in arrows:
        always = {name: count for name, count in arrow.besides.items() if count == arrow.pairs}
        rows.append(
            (
                f"{arrow.start} -> {arrow.end}",
                words.claim(arrow.change),
                f"{arrow.kept} of {arrow.pairs}" if arrow.pairs else "-",
                words.subjects(always) or "-",
            )
        )
    print_table(rows)
    for arrow in arrows:
        for start, end in arrow.against:
            print(f"not so: {start} -> {end} ({words.claim(arrow.change)})")


def _pictures() -> "Pictures":
    import torch

    from glocal.analysis.connectivity import connections
    from glocal.report.relations import Pictures
    from glocal.spec import build

    built = {}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)  # its second image shows well what is dynamic
        for spec in (GLOBAL, DENSE, LOCAL, WINDOWS, PER_IMAGE, PER_POSITION, COMPARED):
            built[spec] = build(spec, DIM)

    def named(spec: str, kind: int = 0) -> tuple[str, list[list[float]]]:
        return type(built[spec]).__name__, connections(built[spec], (LENGTH,))[kind]

    return Pictures(
        positions=[named(GLOBAL), named(LOCAL)],
        channels=[named(DENSE, kind=1), named(LOCAL, kind=1)],
        shared=[named(LOCAL), named(WINDOWS), named(GLOBAL)],
        dynamic=[
            (*named(spec), connections(built[spec], (LENGTH,), image=1)[0])
            for spec in (LOCAL, PER_IMAGE, PER_POSITION, COMPARED)
        ],
    )
