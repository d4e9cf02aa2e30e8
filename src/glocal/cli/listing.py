"""`glocal list`: all operators, with what they store and what is measured of them."""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glocal.cli.graph import print_graph, write_graph
from glocal.cli.parsing import parse, print_table, said_in_one_line

if TYPE_CHECKING:
    from glocal.analysis.connectivity import Connectivity, Sharing
    from glocal.operator import Operator


@dataclass(frozen=True)
class _Found:
    """An operator by its first example."""

    operator: str
    mixer: "Operator"
    grid: tuple[int, ...]
    weights: tuple[int, ...] | None  # shape of what two images store; None for an ordinary module
    measured: "Sharing"  # a Connectivity where more is asked for than the table


def list_command(name: str, arguments: Sequence[str]) -> int:
    """`glocal list`."""
    from glocal.cli.commands import ListCommand

    command = parse(ListCommand, name, arguments)
    if command is None:
        return 0
    import torch

    torch.set_num_threads(1)  # all matrices are small
    whole = command.json or command.html is not None or command.graph is not None
    found = list(_all(whole))
    if command.html is not None:
        with said_in_one_line(name):
            _write_gallery(command.html, found)
    measured = _in_full(found)
    if command.graph is not None:
        with said_in_one_line(name):
            write_graph(command.graph, measured)
    print(_json(found) if command.json else "", end="")
    if not command.json:
        _print(found)
        if command.graph is not None:
            print_graph(measured)
    for page in (command.html, command.graph):
        if page is not None:
            print(f"page: {page}", file=sys.stderr if command.json else sys.stdout)
    return 0


def _all(whole: bool) -> Iterator[_Found]:
    """Every operator, with all that can be measured of it, or with what the table shows."""
    import torch

    from glocal.analysis.connectivity import connectivity, sharing
    from glocal.mixer import TokenMixer
    from glocal.spec import available

    names = available()
    for i, operator in enumerate(names, 1):
        mixer = example(operator)
        grid = (16,) if mixer.rank == 1 else (8, 8)
        weights = None
        if isinstance(mixer, TokenMixer):
            x = torch.zeros(2, *grid, mixer.dim)
            weights = tuple(mixer.weights(x, **mixer.besides(x)).weights.shape)
        yield _Found(operator, mixer, grid, weights, (connectivity if whole else sharing)(mixer, grid))
        if sys.stderr.isatty():
            print(f"\r{i} of {len(names)} measured" if i < len(names) else f"\r{'':30}\r", end="", file=sys.stderr)


def example(operator: str) -> "Operator":
    """The first example, at 16 channels if it takes as few."""
    import torch

    from glocal import mixers
    from glocal.evidence import DIM
    from glocal.spec import build

    spec = getattr(mixers, operator).examples[0]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # so that a list says the same every time
        try:
            return build(spec, 16).eval()  # type: ignore[return-value]
        except ValueError:
            return build(spec, DIM).eval()  # type: ignore[return-value]


def _in_full(found: Sequence[_Found]) -> "dict[str, Connectivity]":
    """All that can be measured of the operators of which that was asked."""
    from glocal.analysis.connectivity import Connectivity

    return {each.operator: each.measured for each in found if isinstance(each.measured, Connectivity)}


def _json(found: Sequence[_Found]) -> str:
    from glocal.analysis.relations import placed

    boxes = {operator: placed(measured) for operator, measured in _in_full(found).items()}
    rows = [
        {
            "operator": each.operator,
            "spec": repr(each.mixer),
            "dim": each.mixer.dim,
            "grid": each.grid,
            "weights": each.weights,
            **asdict(each.measured),
            "box": None if (box := boxes[each.operator]) is None else box.name,
        }
        for each in found
    ]
    return json.dumps(rows, indent=1) + "\n"


def _print(found: Sequence[_Found]) -> None:
    rows = [("operator", "weights stored", "reads", "channels", "over positions", "over channels", "dynamic")]
    for each in found:
        measured = each.measured
        rows.append(
            (
                each.operator,
                "-" if each.weights is None else "x".join(map(str, each.weights)),
                f"{measured.positions}, {measured.reads} of {measured.num_positions}",
                measured.channels,
                {"yes": "shared", "periodically": "repeated", "no": "own"}[measured.shared_over_positions],
                {"all": "shared", "groups": f"{measured.groups} groups", "no": "own"}[measured.shared_over_channels],
                measured.dynamic + ("" if measured.frozen else " *"),
            )
        )
    print_table(rows)
    print(
        f"\n{len(found)} operators; weights as images x groups x queries x weights of a query; the rest measured from "
        "the\nJacobian of the first example on two images of 8 x 8 tokens (16 for sequences), the weights held still.\n"
        "* an ordinary module, whose whole Jacobian is taken."
    )


def _write_gallery(file: Path, found: Sequence[_Found]) -> None:
    from glocal.analysis.connectivity import connections
    from glocal.report.connections import Connections
    from glocal.report.gallery import Entry, gallery

    entries = []
    for each in found:
        positions, channels = connections(each.mixer, (8,) if each.mixer.rank in (None, 1) else (4, 8))
        summary = (type(each.mixer).__doc__ or "").strip().partition("\n")[0]
        panels = (Connections("positions", positions), Connections("channels", channels))
        entries.append(Entry(each.operator, summary, str(each.measured), panels))
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(gallery(entries), encoding="utf-8")
