"""Which tokens are read: no later ones where there is an order, no padding, and in pieces the same as at once."""

import copy
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from glocal.contract.words import NO_SEQUENCE, NOT_CAUSAL
from glocal.evidence import close, corner, random_mixer, tokens, true
from glocal.inspection import inspect
from glocal.mixer import Cache, TokenMixer
from glocal.operator import Operator


def causal_reads_no_later_token(spec: str, grid: tuple[int, ...]) -> str | None:
    """Weights above the diagonal are zero, and a later token changes no earlier output."""
    mixer = random_mixer(spec)
    if not causal(mixer):
        return NOT_CAUSAL
    x = tokens(2, *grid)
    if isinstance(mixer, TokenMixer):
        above = torch.triu(mixer.weights(x).dense(), diagonal=1)
        true(not above.any(), f"a weight above the diagonal is {above.abs().max():.1e}, not 0")
    changed = x.clone()
    changed.flatten(1, -2)[:, -1] += 1
    after, before = (mixer(t).flatten(1, -2)[:, :-1] for t in (changed, x))
    close("an earlier output after a later token changed", after, before, 0)
    return None


def pieces_equal_the_whole(spec: str, grid: tuple[int, ...]) -> str | None:
    """With a cache a causal operator gives token by token, and in uneven pieces, what it gives at once; so it does
    where tokens are padding, and its weights rebuild every piece.
    """
    mixer = random_mixer(spec)
    if not causal(mixer):
        return NOT_CAUSAL
    x = tokens(2, *grid)
    try:
        mixer(x, cache=Cache())
    except ValueError as error:
        true(type(mixer).__name__ in str(error), f"a cache is refused without the operator's name: {error}")
        return NO_SEQUENCE if len(grid) > 1 else str(error)
    length = grid[0]
    anywhere = torch.ones(2, length, dtype=torch.bool)
    anywhere[1, [0, *range(2, length, 3), length - 1]] = False
    at_the_end = torch.arange(length) < torch.tensor([[length], [length // 2]])
    for path in (mixer, mixer.reference):
        for valid in (None, anywhere, at_the_end):
            try:
                whole = path(x, **({} if valid is None else {"valid": valid}))
            except ValueError as error:
                true(type(mixer).__name__ in str(error), f"padding is refused without the operator's name: {error}")
                continue
            for ends in (range(1, length + 1), sorted({min(n, length) for n in (1, 6, 7, length // 2, length)} - {0})):
                out = torch.cat(_in_pieces(path, x, valid, ends), 1)
                real = slice(None) if valid is None else valid
                close("a sequence in pieces", out[real], whole[real], 1e-10)
    if isinstance(mixer, TokenMixer):
        with inspect(mixer) as seen:
            _in_pieces(mixer, x, None, range(1, length + 1))
        error = max(call.rebuild_error() for call in seen)
        true(error <= 1e-9, f"the weights rebuild a piece with a relative error of {error:.1e}")
    return None


def padding_changes_nothing(spec: str, grid: tuple[int, ...]) -> str | None:
    """Real tokens of a padded batch get what they would get alone, and what stands in the padding is never read."""
    own = tuple((2 * n + 2) // 3 for n in grid)
    valid = torch.zeros(2, *grid, dtype=torch.bool)
    valid[0] = True
    corner(valid[1], own)[...] = True
    mixer = random_mixer(spec)
    x = tokens(2, *grid)

    def call(path: Callable[..., Tensor], tokens: Tensor, valid: Tensor | None = None) -> Tensor:
        """Padding is the source's where there is one: then x itself stays as it is."""
        also = mixer.besides(tokens)
        return path(x if also and valid is not None else tokens, valid=valid, **also)

    try:
        call(mixer, x, valid)
    except ValueError as error:
        true(type(mixer).__name__ in str(error), f"padding is refused without the operator's name: {error}")
        return str(error)
    own_out = mixer.out_grid(own)
    for path in (mixer, mixer.reference):
        nothing = call(path, x, torch.zeros_like(valid))
        true(bool(nothing.isfinite().all()), "queries without any real source come out infinite or NaN")
        padded = call(path, x, valid)
        close("the padded image", corner(padded[1], own_out), call(path, corner(x[1], own)[None])[0], 1e-9)
        close("the image that fills the grid", padded[0], call(path, x[:1])[0], 1e-9)
    mixer.train()
    rubbish = 100 * torch.randn_like(x)
    rubbish[..., 0], rubbish[..., 1] = torch.nan, torch.inf
    noise = torch.where(valid[..., None], x, rubbish)
    start = copy.deepcopy(mixer.state_dict())
    for path in (mixer, mixer.reference):
        seen = []
        for padded in (x, noise):
            mixer.load_state_dict(start)
            padded = padded.clone().requires_grad_()
            out = call(path, padded, valid)
            real = [out[0], corner(out[1], own_out)]
            grads = torch.autograd.grad(real[0].square().sum() + real[1].square().sum(), [padded, *mixer.parameters()])
            buffers = [b.clone().double() for b in mixer.buffers()]
            seen.append([*real, *buffers, grads[0].masked_fill(~valid[..., None], 0), *grads[1:]])
        for one, other in zip(*seen, strict=True):
            close("real tokens, gradients or statistics in training, after the padding changed", one, other, 1e-9)
    return None


def causal(mixer: Operator) -> bool:
    """Whether its tokens have an order, of which it reads the earlier ones only."""
    return bool(getattr(mixer, "causal", False))


def _in_pieces(path: Callable[..., Tensor], x: Tensor, valid: Tensor | None, ends: Sequence[int]) -> list[Tensor]:
    """The outputs of a sequence's pieces, which end at these tokens, from one cache."""
    cache, out, start = Cache(), [], 0
    for end in ends:
        padding = {} if valid is None else {"valid": valid[:, :end]}
        out.append(path(x[:, start:end], cache=cache, **padding))
        start = end
    return out
