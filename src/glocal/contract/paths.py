"""Both ways to compute an operator give the same: values, gradients, no images, numerical derivatives."""

import copy
import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from glocal.contract.words import ONE_PATH
from glocal.evidence import Broken, as_function, close, numerically, random_mixer, tokens, true, where_taken, with_grads
from glocal.mixer import TokenMixer, Unsupported


def forward_equals_definition(spec: str, grid: tuple[int, ...]) -> str | None:
    """Values and every gradient in float64, in training and in evaluation."""
    if not isinstance(random_mixer(spec), TokenMixer):
        return ONE_PATH
    for training in (False, True):
        mixer = random_mixer(spec).train(training)
        x = tokens(2, *grid)
        before = copy.deepcopy(mixer.state_dict())
        out = with_grads(mixer, mixer, x)
        after = copy.deepcopy(mixer.state_dict())
        mixer.load_state_dict(before)
        expected = with_grads(mixer, mixer.reference, x)
        for name, value in expected.items():
            close(f"{name} {'in training' if training else 'in evaluation'}", out[name], value, 1e-9)
        for name, value in mixer.state_dict().items():
            close(f"buffer {name} after a call", after[name], value, 1e-9)
    return None


def empty_batch(spec: str, grid: tuple[int, ...]) -> str | None:
    """No images in, none out, in training and in evaluation, with padding and without, and no state moves."""
    mixer = random_mixer(spec)
    x = tokens(2, *grid)
    expected = (0, *mixer(x, **mixer.besides(x)).shape[1:])
    padding = where_taken(mixer, valid=torch.ones(0, *grid, dtype=torch.bool))
    for training in (False, True):
        mixer.train(training)
        before = copy.deepcopy(mixer.state_dict())
        for path, call in itertools.product(("forward", "reference"), ({}, padding)):
            x = tokens(0, *grid).requires_grad_()
            out = getattr(mixer, path)(x, **mixer.besides(x) | call)
            out.sum().backward()
            true(out.shape == expected, f"an empty batch gives shape {tuple(out.shape)}, not {expected}")
        for name, value in mixer.state_dict().items():
            true(torch.equal(before[name], value), f"an empty batch moves the buffer {name}")
    return None


def gradient(spec: str, grid: tuple[int, ...]) -> str | None:
    """gradcheck of the forward pass, inputs and parameters."""
    mixer = random_mixer(spec)
    x, call = as_function(mixer, mixer, grid)
    numerically(torch.autograd.gradcheck, call, x)
    return None


def double_backward(spec: str, grid: tuple[int, ...]) -> str | None:
    """gradgradcheck of the definition; of the fast path too, unless it says that it has none."""
    mixer = random_mixer(spec)
    x, call = as_function(mixer, mixer.reference, grid)
    numerically(torch.autograd.gradgradcheck, call, x)
    x, call = as_function(mixer, mixer, grid)
    try:
        numerically(torch.autograd.gradgradcheck, call, x)
    except Unsupported as error:
        true("impl='reference'" in str(error), f"the fast path's refusal does not say what to do: {error}")
    return None


def forced_fast_never_falls_back(spec: str, grid: tuple[int, ...]) -> str | None:
    """impl="fast" gives the definition's result without calling it, or raises Unsupported with the operator's name."""
    mixer = random_mixer(spec)
    if not isinstance(mixer, TokenMixer):
        return ONE_PATH
    x = tokens(2, *grid)
    mixer.impl = "fast"
    with _definition_forbidden(mixer):
        try:
            out = mixer(x, **mixer.besides(x))
        except Unsupported as error:
            true(str(error).startswith(f"{type(mixer).__name__}: "), f"the refusal does not name the operator: {error}")
            return str(error)
    close("the forced fast path", out, mixer.reference(x, **mixer.besides(x)), 1e-9)
    return None


@contextmanager
def _definition_forbidden(mixer: TokenMixer) -> Iterator[None]:
    def forbidden(*args: object, **kwargs: object) -> Tensor:
        raise Broken("impl='fast' fell back to the definition")

    for name in ("reference", "weights", "_weights"):
        setattr(mixer, name, forbidden)
    try:
        yield
    finally:
        for name in ("reference", "weights", "_weights"):
            delattr(mixer, name)
