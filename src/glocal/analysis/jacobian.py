"""What every output takes from every input, and which inputs decide how much: the Jacobian and what changes it.

Shape letters: B images, N outputs, M inputs (positions of the grids), C channels in, E channels out, G groups.
"""

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation, aggregate
from glocal.mixer import TokenMixer

CHANGED = 1e-7  # relative to the largest weight: what is another weight, in float64
ROWS = 16  # of the Jacobian at a time: few enough that what they need stays in the processor's cache
COLUMNS = 128  # likewise
UNIT = 1024.0  # long beside what is added to every sum, so that its rounding is not seen
AFFINE = 1e-10  # relative: what rounding leaves between sums in two orders
LARGE = 3.0  # standard deviations of a token put in another's place: a maximum over many must notice it


@dataclass(frozen=True)
class Prepared:
    """A copy of an operator, in float64 and with noise on its parameters, and two images of random tokens.

    Attributes:
        operator: the copy.
        x: [2, *S, C].
        held: the weights of both images; None for an ordinary module.
        out_grid: the shape of the outputs.
    """

    operator: nn.Module
    x: Tensor
    held: Aggregation | None
    out_grid: tuple[int, ...]

    @property
    def grid(self) -> tuple[int, ...]:
        """S, the shape of the inputs."""
        return tuple(self.x.shape[1:-1])

    def jacobian(self) -> Tensor:
        """What every output channel takes from every input channel: [2, N, E, M, C].

        The weights of a token mixer are held still: it is d project(aggregate(A, values(x))) / dx.
        """
        if self.held is None:
            found = _rows(self.operator, self.x)
        else:
            columns = _columns(self.operator, self.held, self.x)  # type: ignore[arg-type]
            found = _rows(_held(self.operator, self.held), self.x) if columns is None else columns  # type: ignore[arg-type]
        n, m = math.prod(self.out_grid), math.prod(self.grid)
        return found.view(2, n, found.shape[1] // n, m, self.x.shape[-1])

    def makers(self) -> Tensor:
        """Which tokens the weights of which outputs change with: bool [N, M], true where it is so in either image.

        Each token in turn is replaced by another. An ordinary module has no weights; then it is its Jacobian that
        changes, seen through its product with a random vector.
        """
        made = [self._made(x) for x in self.x]
        return made[0] | made[1]

    def _made(self, x: Tensor) -> Tensor:
        """The same for one image [*S, C]."""
        generator = torch.Generator().manual_seed(1)
        m = math.prod(self.grid)
        other = LARGE * torch.randn(m, x.shape[-1], generator=generator, dtype=x.dtype)
        images = x.flatten(0, -2).expand(m + 1, -1, -1).clone()
        images[torch.arange(m), torch.arange(m)] = other  # the last one stays as it is
        images = images.unflatten(1, self.grid)
        way = torch.randn(x.shape, generator=generator, dtype=x.dtype)
        seen = torch.cat([self._weights(some, way) for some in images.split(ROWS)]).flatten(2)  # [M + 1, N, ...]
        changed = (seen[:-1] - seen[-1:]).abs().amax(2)
        return (changed > CHANGED * seen.abs().max()).T

    def _weights(self, images: Tensor, way: Tensor) -> Tensor:
        """What stands for the weights of each image, [B, N, ...]."""
        if isinstance(self.operator, TokenMixer):
            with torch.no_grad():
                found = self.operator.weights(images, **self.operator.besides(images))
                return found.dense().transpose(1, 2).expand(len(images), -1, -1, -1)
        ways = way.expand_as(images).contiguous()
        moved = torch.autograd.functional.jvp(self.operator, images, ways)[1]
        return moved.flatten(1, -2)


def prepared(operator: nn.Module, grid: Sequence[int] | None = None, *, dim: int | None = None) -> Prepared:
    """What is measured of an operator; arguments and errors as `connectivity`."""
    dim = getattr(operator, "dim", None) if dim is None else dim
    if not isinstance(dim, int):
        raise ValueError(f"dim: {type(operator).__name__} does not say its channels; give dim")
    if grid is None:
        grid = (16,) if getattr(operator, "rank", None) == 1 else (8, 8)
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        operator = copy.deepcopy(operator).cpu().double().eval()
        for parameter in operator.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter)).requires_grad_(False)
        for part in operator.modules():
            if isinstance(part, TokenMixer):
                part.impl = "reference"
        x = torch.randn(2, *grid, dim, dtype=torch.float64)
        held = operator.weights(x, **operator.besides(x)) if isinstance(operator, TokenMixer) else None
        out_grid = tuple(operator(x).shape[1:-1]) if held is None else held.out_grid
    return Prepared(operator, x, held, out_grid)


def jacobian(operator: nn.Module, grid: Sequence[int] | None = None, *, dim: int | None = None) -> Tensor:
    """What every output channel takes from every input channel: [2, N, E, M, C]; arguments as `connectivity`."""
    return prepared(operator, grid, dim=dim).jacobian()


def _held(mixer: TokenMixer, held: Aggregation) -> Callable[[Tensor], Tensor]:
    """The mixer with its weights held at those of each image."""
    one = replace(held, weights=held.dense(), index=None)  # few tokens: quicker than gathering
    return lambda x: mixer.project(aggregate(one, mixer.values(mixer.besides(x).get("source", x))))


@torch.no_grad()
def _columns(mixer: TokenMixer, held: Aggregation, x: Tensor) -> Tensor | None:
    """The Jacobians of independent images, [B, outputs, inputs], from what axes become: forward passes alone.

    None unless that is affine, as what becomes of three other images has to show.
    """
    count, found = x[0].numel(), []
    units = UNIT * torch.eye(count, dtype=x.dtype).view(count, *x.shape[1:])
    others = LARGE * torch.randn(3, *x.shape[1:], generator=torch.Generator().manual_seed(2), dtype=x.dtype)
    for weights in held.dense().split(1):  # one for both where they share the weights
        call = _held(mixer, replace(held, weights=weights, index=None))
        still = call(torch.zeros_like(x[:1])).flatten()
        columns = torch.cat([call(some).flatten(1) - still for some in units.split(COLUMNS)]) / UNIT
        moved = call(others).flatten(1) - still
        if not ((others.flatten(1) @ columns - moved).abs() <= AFFINE * moved.abs().max()).all():
            return None
        found.append(columns.T)
    return torch.stack(found).expand(len(x), -1, -1)


def _rows(call: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """The Jacobians of independent images, [B, outputs, inputs]: one forward pass, and a backward pass for each row."""
    x = x.clone().requires_grad_()
    with torch.enable_grad():
        out = call(x).flatten(1)
    rows = []
    for start in range(0, out.shape[1], ROWS):
        some = torch.arange(start, min(start + ROWS, out.shape[1]))
        picked = out.new_zeros(len(some), *out.shape)
        picked[torch.arange(len(some)), :, some] = 1
        (row,) = torch.autograd.grad(out, x, picked, is_grads_batched=True, retain_graph=True)
        rows.append(row.flatten(2))
    return torch.cat(rows).transpose(0, 1)
