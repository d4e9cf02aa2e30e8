"""Attention whose heads sit on the taps of a kernel, back into a convolution."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glocal.conversion.attention import ConvolutionAsAttention, check_module, replaced
from glocal.mixers import Convolution, DepthwiseConv, GatedPaddedAttention
from glocal.mixers._grid import centre_padding
from glocal.mixers._padded import PaddedAttention, kernel_of_heads
from glocal.mixers.padded_quadratic_attention import positive_number

KINDS = (ConvolutionAsAttention, GatedPaddedAttention, PaddedAttention)
_BEYOND = 64  # places on either side of the kernel among which a head's weights are looked at


def to_convolution(attention: nn.Module, *, tolerance: float = 1e-4) -> nn.Module:
    """`to_attention` taken back: of a layer the convolution it is, of a network a new network.

    Heads may have changed places among the taps of the kernel; those that share one are added.

    Args:
        attention: a `ConvolutionAsAttention`, a padded attention, gated or not, or a network that holds some; stays
            as it is.
        tolerance: the largest share of its weight that a head may give to other places than its tap, or
            take by content.

    Returns:
        A Conv1d or Conv2d of torch, of a mixer a `Convolution` or `DepthwiseConv` of ours; or the network with these in
        their places. Right after `to_attention` the weights are the convolution's own, bit by bit.

    Raises:
        ValueError: heads that do not sit on a tap: which, where they are, and by how much they miss it; heads whose
            gate is open: which, and how far; a mixer that ours are none of, such as one with an even kernel; nothing to
            convert; parameters on the meta device.
    """
    positive_number("tolerance", tolerance)
    check_module("attention", attention)
    if isinstance(attention, KINDS):
        found: dict[str, nn.Module] = {"": attention}
    else:
        named = [(n, p) for n, p in attention.named_modules(remove_duplicate=False) if isinstance(p, KINDS)]
        inner = {f"{n}.{held}" for n, _ in named for held in ("mixer", "mixer.position", "position")}
        found = {n: p for n, p in named if n not in inner}
    if not found:
        raise ValueError(f"attention: this {type(attention).__name__} holds none that to_attention made")
    taps, said = {}, []
    for name, part in found.items():
        if _mixer(part).value.is_meta:
            raise ValueError(
                f"{name or 'attention'}: is on the meta device, where no head sits anywhere; give its parameters "
                "memory (to_empty) and values first"
            )
        taps[name], missed = _taps(_mixer(part), tolerance)
        missed += _open(part, tolerance)
        said += [f"{name}: {each}" if name else each for each in missed]
    if said:
        more = f" (and {len(said) - 3} more heads)" if len(said) > 3 else ""
        raise ValueError(
            f"{'; '.join(said[:3])}{more}; the largest share off a tap that is let pass is tolerance, {tolerance:g}"
        )
    if "" in found:
        return _convolution(found[""], taps[""]).train(attention.training)
    return replaced(attention, set(found), lambda name, part: _convolution(part, taps[name]))


def _mixer(part: nn.Module) -> PaddedAttention:
    """The attention to places, without what a gate lets in."""
    mixer: Any = part.mixer if isinstance(part, ConvolutionAsAttention) else part
    return mixer.position if isinstance(mixer, GatedPaddedAttention) else mixer


@torch.no_grad()
def _open(part: nn.Module, tolerance: float) -> list[str]:
    """In words which heads take more than that by content."""
    mixer = part.mixer if isinstance(part, ConvolutionAsAttention) else part
    if not isinstance(mixer, GatedPaddedAttention):
        return []
    shares = mixer.gates().tolist()
    return [
        f"head {head} takes {share:.2g} of its weight by content (its gate is open, {gate:.3g})"
        for head, (share, gate) in enumerate(zip(shares, mixer.gate.tolist(), strict=True))
        if not share <= tolerance
    ]


@torch.no_grad()
def _taps(mixer: PaddedAttention, tolerance: float) -> tuple[list[int], list[str]]:
    """The tap of each head, and in words which heads miss theirs."""
    nearest, kept = [], torch.ones(mixer.num_heads, dtype=torch.float64)
    for axis, (front, reach) in enumerate(zip(mixer._sides, mixer._reach, strict=True)):
        offset = torch.arange(-front[0] - _BEYOND, reach - front[0] + _BEYOND + 1, device=mixer.value.device)
        most, where = mixer._scores_along(axis, offset, slice(None)).cpu().double().softmax(-1).max(-1)
        nearest.append(offset.cpu()[where])
        kept = kept * most
    places = [tuple(place) for place in torch.stack(nearest, 1).tolist()]
    order = {tuple(int(d) for d in tap): i for i, tap in enumerate(mixer.taps().tolist())}
    found, said = [], []
    for head, (place, share) in enumerate(zip(places, (1 - kept).tolist(), strict=True)):
        found.append(order.get(place, -1))
        if place not in order:
            said.append(f"head {head} sits at {place}, which is no tap of the kernel")
        elif not share <= tolerance:
            said.append(
                f"head {head} gives {share:.2g} of its weight to places beside its tap {place}{_at(mixer, head)}"
            )
    return found, said


def _at(mixer: Any, head: int) -> str:
    if not hasattr(mixer, "centers"):
        return ""
    centre = ", ".join(f"{c:.3g}" for c in mixer.centers[head].tolist())
    spread = ", ".join(f"{s:.3g}" for s in mixer.spreads[head].flatten().tolist())
    return f" (centre {centre}; spread {spread})"


@torch.no_grad()
def _convolution(part: nn.Module, taps: Sequence[int]) -> nn.Module:
    mixer: Any = _mixer(part)
    at_tap = torch.zeros_like(mixer.value).index_add_(0, torch.tensor(taps, device=mixer.value.device), mixer.value)
    weight = kernel_of_heads(at_tap, mixer._kernel)
    made = _of_torch(mixer, weight) if isinstance(part, ConvolutionAsAttention) else _of_ours(mixer)
    made = made.to(device=weight.device, dtype=weight.dtype)
    made.weight.copy_(weight)
    made.weight.requires_grad_(mixer.value.requires_grad)
    if mixer.bias is not None:
        made.bias.copy_(mixer.bias)
        made.bias.requires_grad_(mixer.bias.requires_grad)
    return made


def _of_torch(mixer: Any, weight: Tensor) -> Any:
    layer: type[Any] = nn.Conv1d if mixer.rank == 1 else nn.Conv2d
    return layer(
        mixer.dim, mixer.out_dim, mixer._kernel, mixer.stride, mixer.padding, mixer.dilation, mixer.groups,
        mixer.bias is not None, mixer.padding_mode, device=weight.device, dtype=weight.dtype,
    )  # fmt: skip


def _of_ours(mixer: Any) -> Any:
    stride, dilation = set(mixer._strides), set(mixer._dilations)
    sides = tuple((p, p) for p in centre_padding(mixer._kernel, mixer._dilations[0]))
    odd = all(k % 2 for k in mixer._kernel)
    if not odd or len(stride) + len(dilation) > 2 or mixer._sides != sides or mixer.padding_mode != "zeros":
        raise ValueError(
            f"{mixer!r}: no convolution of ours; they have odd kernels with zeros around them, and the same stride and "
            "dilation along all axes"
        )
    given: dict[str, Any] = {
        "stride": stride.pop(),
        "dilation": dilation.pop(),
        "bias": mixer.bias is not None,
        "rank": mixer.rank,
    }
    if mixer.groups == mixer.dim == mixer.out_dim:
        depthwise: Any = DepthwiseConv
        return depthwise(mixer.dim, kernel_size=mixer._kernel, **given)
    dense: Any = Convolution
    return dense(mixer.dim, kernel_size=mixer._kernel, out_dim=mixer.out_dim, groups=mixer.groups, **given)
