"""The commands about operators."""

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from glocal.cli.parsing import UserError, parse, said_in_one_line

if TYPE_CHECKING:
    from torch import Tensor

    from glocal.contract import Outcome
    from glocal.mixer import TokenMixer


def check_operator_command(name: str, arguments: Sequence[str]) -> int:
    """`glocal check-operator`; exit code 1 where a promise is broken."""
    from glocal.cli.commands import CheckOperatorCommand

    command = parse(CheckOperatorCommand, name, arguments)
    if command is None:
        return 0
    import torch

    from glocal import contract
    from glocal.evidence import DIM
    from glocal.operator import Operator
    from glocal.spec import build

    with said_in_one_line(name):
        mixer = build(command.operator, DIM)
        if not isinstance(mixer, Operator):
            raise UserError(
                f"{command.operator}: is a {type(mixer).__name__}, no operator; derive its class from "
                "glocal.TokenMixer, or from glocal.TokenModule if its output is no weighted sum"
            )
    torch.set_num_threads(1)  # all grids are small
    cases = list(contract.cases(command.operator))
    outcomes = [contract.run(command.operator, check, grid) for check, grid in cases]
    if command.json:
        print(json.dumps([vars(outcome) for outcome in outcomes], indent=1))
    else:
        print(_report(command.operator, cases, outcomes))
    return int(any(outcome.state == "broken" for outcome in outcomes))


def _report(spec: str, cases: Sequence[tuple[Any, tuple[int, ...]]], outcomes: Sequence["Outcome"]) -> str:
    """The outcome of every check in words: what is promised, and on which grids it is kept or not."""
    promises = {check.__name__: (check.__doc__ or "").strip().partition("\n")[0] for check, _ in cases}
    lines = []
    for name, promise in promises.items():
        own = [outcome for outcome in outcomes if outcome.check == name]
        lines.append(f"{_verdict(own):<8}{name.replace('_', ' ')}: {promise}")
        for sentence in dict.fromkeys(outcome.sentence for outcome in own if outcome.state != "kept"):
            grids = ", ".join(_grid(outcome.grid) for outcome in own if outcome.sentence == sentence)
            lines.append(f"{'':<8}  on {grids}: {sentence}")
    broken = {outcome.check for outcome in outcomes if outcome.state == "broken"}
    last = f"{len(broken)} of {len(promises)} promises broken" if broken else f"keeps all {len(promises)} promises"
    return "\n".join([*lines, "", f"{spec}: {last} ({len(outcomes)} checks, {_grids(outcomes)})"])


def _verdict(outcomes: Sequence["Outcome"]) -> str:
    states = {outcome.state for outcome in outcomes}
    return "BROKEN" if "broken" in states else "says" if "refused" in states else "kept"


def _grid(grid: Sequence[int]) -> str:
    return "x".join(map(str, grid))


def _grids(outcomes: Sequence["Outcome"]) -> str:
    return "grids " + ", ".join(dict.fromkeys(_grid(outcome.grid) for outcome in outcomes))


def explain_path_command(name: str, arguments: Sequence[str]) -> int:
    """`glocal explain-path`."""
    from glocal.cli.commands import ExplainPathCommand

    command = parse(ExplainPathCommand, name, arguments)
    if command is None:
        return 0
    import math

    import torch

    from glocal.mixer import TokenMixer
    from glocal.spec import build

    if len(command.shape) < 3 or min(command.shape) < 1:
        shape = " ".join(map(str, command.shape))
        raise UserError(f"--shape: {shape}; give batch, lengths and channels, such as 1 56 56 64")
    _, *grid, dim = command.shape
    dtype = getattr(torch, command.dtype)
    with said_in_one_line(name):
        mixer = build(command.operator, dim, rank=len(grid)).to(dtype).train(command.training)
        if not isinstance(mixer, TokenMixer):
            print(f"{mixer!r}: an ordinary module: there is one way to compute it")
            return 0
        mixer.impl = command.impl
        try:
            x = torch.zeros(*command.shape, dtype=dtype)
        except RuntimeError:
            size = math.prod(command.shape) * dtype.itemsize / 2**30
            raise UserError(f"--shape: {_grid(command.shape)} takes {size:,.0f} GiB, more than there is") from None
        reason = mixer.unsupported(x, **mixer.besides(x))
        kernels = _kernels(mixer, x[:1]) if reason is None and command.impl != "reference" else []
        x = x.to("meta")  # shapes are all that is asked for
        found = mixer.to("meta").eval().weights(x, **mixer.besides(x))
        macs = mixer.macs(grid)
    stored = tuple(found.weights.shape)
    dense = (stored[0], found.num_groups, found.num_queries, found.num_sources)
    size = dtype.itemsize / 2**20
    print(f"{mixer!r} on {tuple(command.shape)}, {command.dtype}\n")
    print(f"path     {_path(command.impl, type(mixer).__name__, reason)}")
    for kernel in kernels:
        print(f"kernel   {kernel}")
    print(f"stored   weights {stored}, {math.prod(stored) * size:,.2f} MiB")
    print(f"dense    weights {dense}, {math.prod(dense) * size:,.2f} MiB; never made unless asked for")
    print(f"cost     {macs:,} multiply-adds of the definition, for one image")
    return 0


def _path(impl: str, name: str, reason: str | None) -> str:
    why_not = "" if reason is None else f"; {name}: {reason}"
    if impl == "reference":
        return "the definition, as asked" + (why_not or "; the fast one could run")
    if reason is None:
        return "the fast one: the weights are not formed"
    return ("the definition" if impl == "auto" else "none, the call is refused") + why_not


def _kernels(mixer: "TokenMixer", x: "Tensor") -> list[str]:
    """The kernels of ours that a call for one image runs, and how: made, since only then it shows what compiles."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from glocal.kernels import compiled

    seen: dict[str, None] = {}

    class Record(TorchDispatchMode):
        def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if function.namespace == "glocal":
                seen[function._schema.name.partition("::")[2]] = None
            return function(*args, **(kwargs or {}))

    learns = mixer.training
    with torch.set_grad_enabled(learns), Record():
        mixer.eval()(x, **mixer.besides(x))  # a single image has no statistics of its own to train with
    mixer.train(learns)
    return [f"{name}: {compiled.how(name)}" for name in seen]
