"""Convolutions into attention: the theorem of Cordonnier et al., carried out."""

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.utils.parametrize import is_parametrized

from glocal.arguments import flag, one_of, positive
from glocal.mixers import Convolution, DepthwiseConv, GatedPaddedAttention
from glocal.mixers._grid import centre_padding
from glocal.mixers._padded import PaddedAttention, heads_of_kernel
from glocal.mixers.gated_padded_attention import ENCODINGS
from glocal.mixers.padded_quadratic_attention import positive_number
from glocal.operator import Operator

_HEAD_DIM = 32  # of queries and keys, where none is given


class ConvolutionAsAttention(nn.Module):
    """A padded attention in the place of a convolution: x [B, C, *S] or [C, *S], as the convolution takes it.

    `mixer` is the attention itself, on tokens [B, *S, C]. What comes out is laid out in memory as x is; channels
    last needs no copy.
    """

    def __init__(self, mixer: PaddedAttention | GatedPaddedAttention) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, input: Tensor) -> Tensor:  # as the convolution's is named
        alone = input.dim() == (self.mixer.rank or 0) + 1
        x = input[None] if alone else input
        out = self.mixer(x.movedim(1, -1)).movedim(-1, 1)
        last = x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        out = out if last else out.contiguous()  # networks view what a convolution gives
        return out[0] if alone else out


def exact_alpha(dtype: torch.dtype, encoding: str) -> float:
    """The least alpha whose weights off the tap are all below rounding: e^-alpha < eps / 50; with learned scores, which
    know no distance, summed over hundreds of places."""
    return math.ceil(-math.log(torch.finfo(dtype).eps) + {"quadratic": 4, "learned": 10}[encoding])


def to_attention(
    convolution: nn.Module,
    *,
    encoding: str = "quadratic",
    alpha: float | None = None,
    layers: str | Sequence[str] = "*",
    gated: bool = False,
    head_dim: int | None = None,
) -> nn.Module:
    """The same function as attention: of a convolution a layer in its place, of a network a new network.

    Every tap of a kernel becomes a head, centred on the tap and sharp; its values are the tap's weights. All of it
    trains on: centres and spreads (or score tables) besides the convolution's own weights. Gated, each head can learn
    to attend by content too: it starts as the tap alone, and its gate opens as training asks for it.

    Args:
        convolution: a Conv1d or Conv2d of torch, a `Convolution` or `DepthwiseConv` of ours, or a network that holds
            some; stays as it is. Batch norms are copied as they are. What is inside other operators of ours is theirs.
            Where its weight is frozen, so is where its heads look.
        encoding: "quadratic", a centre and a spread for each head, or "learned", a table of scores for each axis.
        alpha: how sharp: a place beside a head's own gets e^-alpha of its weight. By default what is exact to rounding
            in the layer's dtype, 20 in float32 and 41 in float64 (26 and 47 with learned scores). The gradients of
            centres and spreads are about e^-alpha: smaller ones, 1 to 4, let heads move and give up exactness.
        layers: names of the convolutions to convert, as in `named_modules`; patterns such as "layer1.*" too.
        gated: beside every head attention by content, through a gate that is shut, see `GatedPaddedAttention`. What
            the network gives stays the same; queries and keys start small and random, from PyTorch's random state.
        head_dim: channels of these queries and keys, for each head; 32 by default.

    Returns:
        A `ConvolutionAsAttention`, for ours a mixer; or the network with these in their places.

    Raises:
        ValueError: a transposed, 3-D or lazy convolution, one with a forward, hooks or a parametrization of its own,
            one that shares a parameter with another part, a causal one: named, and may be left out by `layers`; a
            pattern that matches nothing, or any where there is one layer; what is no module.

    Source: Cordonnier et al., On the Relationship between Self-Attention and Convolutional Layers, ICLR 2020,
    arXiv 1911.03584, theorem 1; gates: d'Ascoli et al., ConViT, ICML 2021, arXiv 2103.10697.
    Differs from the paper: borders, strides, groups, any kernel; see `PaddedQuadraticAttention`.
    """
    one_of("encoding", encoding, tuple(ENCODINGS))
    if alpha is not None:
        positive_number("alpha", alpha)
    if head_dim is not None and not flag("gated", gated):
        raise ValueError(f"head_dim: {head_dim}, is that of attention by content; give gated=True too")
    asked = positive("head_dim", _HEAD_DIM if head_dim is None else head_dim) if flag("gated", gated) else None
    make = partial(_attention, encoding=encoding, alpha=alpha, head_dim=asked)
    patterns = [layers] if isinstance(layers, str) else list(layers)
    check_module("convolution", convolution)
    if is_convolution(convolution):
        if patterns != ["*"]:
            raise ValueError(f"layers: {layers!r}, this {type(convolution).__name__} is one layer; leave layers out")
        return _converted("", convolution, make).train(convolution.training)
    found = [name for name, _ in _named(convolution, is_convolution)]
    chosen = {name for name in found if any(fnmatchcase(name, pattern) for pattern in patterns)}
    unmatched = [repr(p) for p in patterns if not any(fnmatchcase(name, p) for name in found)]
    if unmatched or not patterns:
        some = f"it has {', '.join(found[:5])}{', ...' if len(found) > 5 else ''}" if found else "it has none"
        given = ", ".join(unmatched) or layers
        raise ValueError(f"layers: no convolution of this {type(convolution).__name__} matches {given}; {some}")
    _refuse_tied(convolution, chosen)
    return replaced(convolution, chosen, lambda name, part: _converted(name, part, make))


def check_module(name: str, given: nn.Module) -> None:
    """Refuses what is neither a layer nor a network."""
    if not isinstance(given, nn.Module):
        raise ValueError(f"{name}: a {type(given).__name__}, must be a torch.nn.Module: a layer, or a network")


def is_convolution(part: nn.Module) -> bool:
    """Whether a module is a convolution, one that cannot be converted included."""
    return isinstance(part, _ConvNd | Convolution | DepthwiseConv)


def replaced(model: nn.Module, names: set[str], new: Callable[[str, nn.Module], nn.Module]) -> nn.Module:
    """A copy of a network with new modules under some names; one that stands in several places is made once."""
    made: dict[int, nn.Module] = {}
    parts = dict(model.named_modules(remove_duplicate=False))
    for name in names:
        part = parts[name]
        if id(part) not in made:
            made[id(part)] = new(name, part).train(part.training)
    return copy.deepcopy(model, dict(made))


def _named(model: nn.Module, wanted: Callable[[nn.Module], bool], prefix: str = "") -> Iterator[tuple[str, nn.Module]]:
    """Modules of a network that are wanted, with their names; not those inside operators of ours."""
    for name, part in model._modules.items():  # one that stands in two places has both names
        if part is None:
            continue
        if wanted(part):
            yield prefix + name, part
        elif not isinstance(part, Operator):
            yield from _named(part, wanted, f"{prefix}{name}.")


def _converted(name: str, part: nn.Module, make: Callable[[nn.Module], nn.Module]) -> nn.Module:
    if (why := _refusal(part)) is not None:
        if not name:
            raise ValueError(f"{type(part).__name__} {why}")
        raise ValueError(f"{name}: {type(part).__name__} {why}; leave it out by layers=")
    mixer: Any = make(part)
    return mixer if isinstance(part, Operator) else ConvolutionAsAttention(mixer)


def _refuse_tied(model: nn.Module, chosen: set[str]) -> None:
    """Parameters that a convolution shares with another part would be parted: each would go its own way."""
    owners: dict[int, list[tuple[str, nn.Module]]] = {}
    for name, part in model.named_modules():
        for parameter in part.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append((name, part))
    for name in sorted(chosen):
        own = model.get_submodule(name)
        for parameter in own.parameters(recurse=False):
            for other, part in owners[id(parameter)]:
                if part is not own:
                    raise ValueError(
                        f"{name}: {type(own).__name__} shares a parameter with {other}, and attention in its place "
                        "would not; leave it out by layers="
                    )


def _refusal(part: nn.Module) -> str | None:
    """Why a convolution cannot be converted."""
    if isinstance(part, LazyModuleMixin) and part.has_uninitialized_params():
        return "is lazy and has no weights yet: run a batch through it first"
    if part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks:
        return "has hooks, which would be lost: remove them first"
    if is_parametrized(part):
        return "is parametrized, which would be lost: torch.nn.utils.parametrize.remove_parametrizations ends that"
    if "forward" in vars(part):
        return "computes in a way of its own"
    if isinstance(part, Operator):
        if _causal(part):
            return "is causal and remembers what it has seen, which attention to places does not"
        if isinstance(part, DepthwiseConv) and part.weight.shape[0] < part.dim:
            return "shares kernels between channels, which attention in its place would part"
        if any(k % 2 == 0 for k in part.get_parameter("weight").shape[2:]):
            return "has an even kernel, without a centre"
        return None
    if isinstance(part, _ConvTransposeNd):
        return "is transposed: its taps spread a source over queries, no query attends to places"
    if not isinstance(part, nn.Conv1d | nn.Conv2d):
        return "is no convolution of sequences or images"
    kind = nn.Conv1d if isinstance(part, nn.Conv1d) else nn.Conv2d
    if type(part).forward is not kind.forward or type(part)._conv_forward is not kind._conv_forward:
        return "computes in a way of its own"
    if not part.weight.is_floating_point():
        return f"has weights of {part.weight.dtype}"
    return None


def _causal(part: nn.Module) -> bool:
    return bool(getattr(part, "causal", False))


def _attention(
    part: Any, *, encoding: str, alpha: float | None, head_dim: int | None
) -> PaddedAttention | GatedPaddedAttention:
    """The mixer of a convolution of torch's or of ours, which have the same parameters; with a head_dim a gated one."""
    weight, bias = part.weight, part.bias
    rank = weight.dim() - 2
    kernel = tuple(weight.shape[2:])
    groups = weight.shape[0] if isinstance(part, DepthwiseConv) else part.groups
    own = isinstance(part, Operator)
    given: dict[str, Any] = {
        "kernel_size": kernel,
        "out_dim": weight.shape[0],
        "stride": part.stride,
        "padding": centre_padding(kernel, part.dilation) if own else part.padding,
        "dilation": part.dilation,
        "groups": groups,
        "padding_mode": "zeros" if own else part.padding_mode,
        "alpha": exact_alpha(weight.dtype, encoding) if alpha is None else alpha,
        "bias": bias is not None,
        "rank": rank,
    }
    gated: Any = GatedPaddedAttention
    dim = weight.shape[1] * groups
    if head_dim is None:
        mixer = position = ENCODINGS[encoding](dim, **given)
    else:
        mixer = gated(dim, encoding=encoding, head_dim=head_dim, **given)
        position = mixer.position
    mixer = mixer.to(device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        position.value.copy_(heads_of_kernel(weight, groups))
        mixer.requires_grad_(weight.requires_grad)
        if bias is not None:
            position.bias.copy_(bias)
            position.bias.requires_grad_(bias.requires_grad)
    return mixer
