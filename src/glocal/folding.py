"""1x1 convolutions that take in the batch norms around them, or a gate in front: fewer passes over memory.

The result is the same but for rounding, more of it where channels are nearly the same. A linear map gives what has
statistics that follow from the mean and the covariance of what it is given, so that neither norm's own result is ever
stored.
Shape letters: B batch, S grid, C channels, D channels that go out, N tokens.
"""

import torch
from torch import Tensor, nn


def unwatched(*parts: nn.Module) -> bool:
    """Whether nothing hooks into the calls of these modules or replaces them, so that they need not happen."""
    return not any(
        part._forward_hooks or part._forward_pre_hooks or part._backward_hooks or part._backward_pre_hooks
        for part in parts
    ) and not any("forward" in vars(part) for part in parts)  # as accelerate does


def can_join(first: nn.Module, conv: nn.Module, second: nn.Module, x: Tensor) -> bool:
    """Whether `normed_map` may stand for second(conv(first(x))), x [B, *S, C]: PyTorch's own modules, in one mode.

    On a CPU, where it was measured to pay: torch.compile joins passes by itself, and lower precisions, that of a GPU's
    matrix products among them, would round statistics.
    """
    norms, kept = (first, second), x.dtype in (torch.float32, torch.float64) and x.device.type == "cpu"
    if torch.compiler.is_compiling() or not kept or torch.is_autocast_enabled(x.device.type):
        return False
    if type(conv) is not nn.Conv2d or conv.bias is not None or conv.stride != (1, 1) or not unwatched(conv, *norms):
        return False
    if any(
        type(n) is not nn.BatchNorm2d or not n.affine or n.momentum is None or n.running_mean is None for n in norms
    ):
        return False
    if any(not n.track_running_stats or n.num_batches_tracked is None for n in norms):  # set so later on
        return False
    return first.training == second.training and x[..., 0].numel() > 1


def normed_map(first: nn.BatchNorm2d, conv: nn.Conv2d, second: nn.BatchNorm2d, x: Tensor) -> Tensor:
    """second(conv(first(x))) of tokens [B, *S, C] -> [B, *S, D]; in training running statistics move as they would.

    Cost: N*C*D multiply-adds, in training N*C^2 + D*C^2 more.
    """
    tokens, weight = x.reshape(-1, x.shape[-1]), conv.weight.flatten(1)
    if first.training:
        mean = tokens.mean(0)
        tokens = tokens - mean
        covariance = tokens.mT @ tokens / len(tokens)
        variance = covariance.diagonal()
        between = weight * (first.weight * (variance + first.eps).rsqrt())
        out_mean, out_variance = weight @ first.bias, ((between @ covariance) * between).sum(1).clamp(min=0)
        _move(first, mean, variance, len(tokens))
        _move(second, out_mean, out_variance, len(tokens))
        # the second norm takes the first one's bias away: its gradient is 0, and not missing
        shift = second.bias + 0 * out_mean
        weight = between * (second.weight * (out_variance + second.eps).rsqrt())[:, None]
    else:
        (mean, variance), (out_mean, out_variance) = _running(first), _running(second)
        scale, out_scale = (
            norm.weight * (v + norm.eps).rsqrt() for norm, v in ((first, variance), (second, out_variance))
        )
        shift = (weight @ (first.bias - mean * scale) - out_mean) * out_scale + second.bias
        weight = weight * scale * out_scale[:, None]
    return torch.addmm(shift, tokens, weight.mT).view(*x.shape[:-1], -1)


def gated_map(conv: nn.Conv2d, x: Tensor, gate: Tensor) -> Tensor:
    """conv(x * gate) of tokens [B, *S, C] and a gate [B, C] -> [B, *S, D]: every image has its own weights."""
    weight, tokens = conv.weight.flatten(1) * gate[:, None], x.flatten(1, -2)
    out = torch.bmm(tokens, weight.mT) if conv.bias is None else torch.baddbmm(conv.bias, tokens, weight.mT)
    return out.view(*x.shape[:-1], len(conv.weight))


@torch.no_grad()
def _move(norm: nn.BatchNorm2d, mean: Tensor, variance: Tensor, count: int) -> None:
    """Running statistics, one batch on."""
    assert norm.num_batches_tracked is not None and norm.momentum is not None
    norm.num_batches_tracked.add_(1)
    running_mean, running_variance = _running(norm)
    running_mean.lerp_(mean, norm.momentum)
    running_variance.lerp_(variance * (count / (count - 1)), norm.momentum)


def _running(norm: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    assert norm.running_mean is not None and norm.running_var is not None
    return norm.running_mean, norm.running_var
