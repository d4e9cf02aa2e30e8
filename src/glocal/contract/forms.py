"""An operator in other forms is the same: other dtypes, compiled, exported, built again; what it says of itself."""

import torch
from torch import Tensor

from glocal.evidence import DIM, Broken, close, padded, precision, random_mixer, tokens, true, where_taken, with_grads
from glocal.operator import Operator
from glocal.spec import build

EXPORTED_TO = {1: ((9,), (12,), (17,), (40,)), 2: ((9, 16), (12, 12), (17, 10), (20, 28))}


def float32(spec: str, grid: tuple[int, ...]) -> str | None:
    """Output and gradients come in float32, within 1e-5 of the largest entry in float64."""
    precision(spec, grid, torch.float32)
    return None


def float64(spec: str, grid: tuple[int, ...]) -> str | None:
    """Output and gradients come in float64, within 1e-12 of the largest entry."""
    precision(spec, grid, torch.float64)
    return None


def bfloat16(spec: str, grid: tuple[int, ...]) -> str | None:
    """Output and gradients within twice the definition's own bfloat16 error, and one rounding, of float64."""
    precision(spec, grid, torch.bfloat16)
    return None


def autocast(spec: str, grid: tuple[int, ...]) -> str | None:
    """Under autocast to bfloat16 the output stays within 6 % of the largest entry, and every gradient is finite."""
    exact, mixer = random_mixer(spec), random_mixer(spec).float()
    x = tokens(2, *grid)
    with torch.autocast(x.device.type, torch.bfloat16):
        found = with_grads(mixer, mixer, x.float())
    expected = exact.reference(x, **exact.besides(x))
    close("the output under autocast", found["the output"].double(), expected, 0.06)
    for name, value in found.items():  # no closer: where rounding flips a ReLU, the gradient rightly jumps
        true(bool(value.isfinite().all()), f"{name} under autocast is not finite")
    return None


def compiles(spec: str, grid: tuple[int, ...]) -> str | None:
    """torch.compile(fullgraph=True) with aot_eager: a training step, and evaluation, with padding too."""
    mixer, x = random_mixer(spec), tokens(2, *grid)
    torch._dynamo.reset()
    compiled = torch.compile(mixer, backend="aot_eager", fullgraph=True)
    mixer.train()
    expected = with_grads(mixer, mixer, x)
    for name, value in with_grads(mixer, compiled, x).items():
        close(f"{name} of the compiled module", value, expected[name], 1e-6)
    mixer.eval()
    with torch.no_grad():
        also = mixer.besides(x)
        close("the output of the compiled module", compiled(x, **also), mixer(x, **also), 1e-6)
        if call := where_taken(mixer, valid=padded(grid)):
            close("a padded batch in the compiled module", compiled(x, **call), mixer(x, **call), 1e-6)
    torch._dynamo.reset()
    return None


def exports(spec: str, grid: tuple[int, ...]) -> str | None:
    """torch.export with every length dynamic; the program is then run at four other sizes."""
    mixer = random_mixer(spec)
    dynamic = {axis + 1: torch.export.Dim.DYNAMIC for axis in range(len(grid))}
    x = tokens(2, *grid)
    also = mixer.besides(x)
    with torch.no_grad():
        shapes = {"x": dynamic} | dict.fromkeys(also, dynamic)
        program = torch.export.export(mixer, (x,), also, dynamic_shapes=shapes).module()
        for other in EXPORTED_TO[len(grid)]:
            x = tokens(2, *other)
            also = mixer.besides(x)
            close(f"the program exported at {grid}, run at {other}", program(x, **also), mixer(x, **also), 1e-9)
    return None


def state_dict_round_trip(spec: str, grid: tuple[int, ...]) -> str | None:
    """repr builds the same operator, and its state dict carries everything that the output depends on."""
    mixer = random_mixer(spec)
    again = build(repr(mixer), DIM).double().eval()
    true(repr(again) == repr(mixer), f"repr {mixer!r} builds {again!r}")
    again.load_state_dict(mixer.state_dict())
    x = tokens(2, *grid)
    also = mixer.besides(x)
    true(torch.equal(again(x, **also), mixer(x, **also)), "the copy's output differs")
    return None


def wrong_shapes_are_refused(spec: str, grid: tuple[int, ...]) -> str | None:
    """Wrong channels, a wrong rank or another mask raise a ValueError that holds what was given and needed."""
    mixer = random_mixer(spec)
    _refuses(mixer, torch.zeros(2, *grid, DIM - 1), f"{DIM - 1} channels", f"dim is {DIM}")
    _refuses(mixer, torch.zeros(2, DIM), f"(2, {DIM})", f"[B, *grid, {DIM}]")
    if (rank := getattr(mixer, "rank", None)) is not None:
        _refuses(mixer, torch.zeros(2, *[3] * (rank + 1), DIM), f"rank {rank}", f"rank {rank + 1}")
    larger = (2, *[n + 1 for n in grid])
    _refuses(mixer, tokens(2, *grid), f"valid has shape {larger}", str((2, *grid)), valid=torch.ones(larger) > 0)
    return None


def declared_cost(spec: str, grid: tuple[int, ...]) -> str | None:
    """`macs` is what torch.utils.flop_counter counts on the definition."""
    mixer = random_mixer(spec)
    declared, counted = mixer.macs(grid), mixer.counted_macs(grid)
    true(declared == counted, f"declares {declared} multiply-adds, the definition does {counted}")
    return None


def _refuses(mixer: Operator, x: Tensor, *words: str, **call: Tensor) -> None:
    try:
        mixer(x, **mixer.besides(x) | call)
    except ValueError as error:
        missing = [word for word in words if word not in str(error)]
        true(not missing, f"the refusal of shape {tuple(x.shape)} does not hold {' or '.join(missing)}: {error}")
    else:
        raise Broken(f"takes x of shape {tuple(x.shape)} {'and ' + ', '.join(call) if call else ''}without a word")
