"""What the contract's checks stand on: operators with random parameters, gradients of everything, error budgets,
padded batches."""

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.autograd.gradcheck import GradcheckError

from glocal.mixer import TokenMixer
from glocal.operator import Operator
from glocal.spec import build

DIM = 32


class Broken(AssertionError):
    """A promise that an operator does not keep; the message says which, where, and by how much."""


def random_mixer(spec: str) -> TokenMixer:
    """The operator in float64 with nothing at zero or one: parameters and statistics are random."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        mixer = build(spec, DIM).double().eval()
        with torch.no_grad():
            for parameter in mixer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
            for name, buffer in mixer.named_buffers():
                if buffer.is_floating_point():
                    buffer.copy_(0.5 + torch.rand_like(buffer)) if name.endswith("var") else buffer.normal_()
    return mixer  # type: ignore[return-value]


def tokens(*shape: int) -> Tensor:
    """The same random tokens [*shape, DIM] for the same shape, float64, on the default device."""
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    drawn = torch.randn(*shape, DIM, generator=generator, dtype=torch.float64, device="cpu")
    return drawn.to(torch.get_default_device())


def with_grads(mixer: Operator, path: Callable[..., Tensor], x: Tensor) -> dict[str, Tensor]:
    """The output of path(x), given what the mixer needs besides, and the gradients of x and of all parameters."""
    x = x.clone().requires_grad_()
    out = path(x, **mixer.besides(x))
    # the same numbers in every dtype
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), device="cpu").bfloat16().to(out)
    named = dict(mixer.named_parameters())
    grads = torch.autograd.grad(out, [x, *named.values()], upstream, allow_unused=True)
    zeros = [torch.zeros_like(p) if g is None else g for g, p in zip(grads, [x, *named.values()], strict=True)]
    return {"the output": out.detach()} | dict(
        zip(["the gradient of x", *(f"the gradient of {n}" for n in named)], zeros, strict=True)
    )


def as_function(
    mixer: Operator, path: Callable[..., Tensor], grid: tuple[int, ...]
) -> tuple[tuple[Tensor, ...], Callable[..., Tensor]]:
    """x and all parameters as inputs of a function, for numerical derivatives."""
    named = dict(mixer.named_parameters())
    method = None if path is mixer else "reference"

    def call(x: Tensor, *parameters: Tensor) -> Tensor:
        state = dict(zip(named, parameters, strict=True))
        with _swapped(mixer, state):
            return (mixer if method is None else getattr(mixer, method))(x, **mixer.besides(x))

    x = tokens(2, *grid).requires_grad_()
    return (x, *(p.detach().clone().requires_grad_() for p in named.values())), call


@contextmanager
def _swapped(mixer: nn.Module, state: dict[str, Tensor]) -> Iterator[None]:
    with torch.nn.utils.stateless._reparametrize_module(mixer, state):
        yield


def numerically(check: Callable[..., bool], call: Callable[..., Tensor], x: tuple[Tensor, ...]) -> None:
    """Runs gradcheck or gradgradcheck in one random direction."""
    torch.manual_seed(0)  # fast_mode probes in a random direction
    try:
        # a GPU adds up what torch scatters in any order
        check(call, x, fast_mode=True, atol=1e-5, nondet_tol=0.0 if x[0].device.type == "cpu" else 1e-9)
    except GradcheckError as error:
        raise Broken(f"{check.__name__} fails: {str(error).splitlines()[0]}") from None


def precision(spec: str, grid: tuple[int, ...], dtype: torch.dtype) -> None:
    """Holds output and gradients in a dtype to their error budget against the definition in float64."""
    exact_mixer = random_mixer(spec)
    mixer = copy.deepcopy(exact_mixer).to(dtype)
    exact_mixer.load_state_dict({k: v.double() if v.is_floating_point() else v for k, v in mixer.state_dict().items()})
    x = tokens(2, *grid).to(dtype)
    exact = with_grads(exact_mixer, exact_mixer.reference, x.double())
    plain, fast = with_grads(mixer, mixer.reference, x), with_grads(mixer, mixer, x)
    most = max(value.abs().max().item() for value in exact.values())
    for name, value in exact.items():
        true(fast[name].dtype == dtype, f"{name} comes in {fast[name].dtype}, not {dtype}")
        largest = value.abs().max().item()
        if largest < 1e-12 * most:  # zero by definition, such as that of scores over equal keys: terms that cancel
            largest = most
        if dtype == torch.bfloat16:
            allowed = 2 * (distance(plain[name], value) + torch.finfo(dtype).eps * largest)
        else:
            allowed = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype] * max(largest, 1e-3)
        error = distance(fast[name], value)
        true(
            error <= allowed,
            f"{name} in {dtype} is off by {error:.1e}; {allowed:.1e} is allowed (largest entry {largest:.1e})",
        )
    return None


def distance(a: Tensor, b: Tensor) -> float:
    """Largest absolute difference; 0 for empty tensors."""
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


def close(what: str, found: Tensor, expected: Tensor, relative: float) -> None:
    """Broken unless shapes agree and no entry differs by more than `relative` of the largest."""
    true(found.shape == expected.shape, f"{what}: shape {tuple(found.shape)}, not {tuple(expected.shape)}")
    if not expected.numel():
        return
    error, largest = distance(found, expected), expected.double().abs().max().item()
    if not error <= relative * max(largest, 1e-3):
        raise Broken(f"{what} differs by {error:.1e} (largest entry {largest:.1e})")


def true(kept: bool, sentence: str) -> None:
    """Broken, with this sentence, unless kept."""
    if not kept:
        raise Broken(sentence)


def corner(image: Tensor, lengths: Sequence[int]) -> Tensor:
    """The part of an image [*S, ...] that starts at the origin, as a view."""
    for axis, length in enumerate(lengths):
        image = image.narrow(axis, 0, length)
    return image


def padded(grid: Sequence[int]) -> Tensor:
    """Two images that do not fill the grid: bool [2, *grid]."""
    valid = torch.zeros(2, *grid, dtype=torch.bool)
    for image, lengths in zip(valid, ([n - 1 for n in grid], [(n + 1) // 2 for n in grid]), strict=True):
        corner(image, lengths)[...] = True
    return valid


def where_taken(mixer: Operator, **call: Tensor) -> dict[str, Tensor]:
    """This part of a call, or nothing where the operator refuses it in words, or it is about another sequence."""
    if mixer.needs_source:
        return {}
    try:
        mixer(tokens(2, *call["valid"].shape[1:]), valid=torch.ones(2, *call["valid"].shape[1:], dtype=torch.bool))
    except ValueError:
        return {}  # `padding_changes_nothing` says which words
    return call
