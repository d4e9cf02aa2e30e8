"""The optimizer that a recipe asks for: what it decays, and its learning rate."""

import math
from typing import Any

import torch
from torch import nn

from glocal.config import TrainConfig
from glocal.operator import no_weight_decay


def rate(step: int, steps: int, warmup: float) -> float:
    """Learning rate of step `step` (from 0) as a share of its peak: a line up, then half a cosine down to 0."""
    rising = max(1, round(warmup * steps))
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def optimizer_of(model: nn.Module, recipe: TrainConfig) -> torch.optim.Optimizer:
    """SGD with momentum 0.9, or AdamW."""
    groups = parameter_groups(model, recipe.weight_decay)
    if recipe.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=recipe.lr, momentum=0.9, fused=True)
    return torch.optim.AdamW(groups, lr=recipe.lr, fused=True)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Parameters with two axes or more are decayed; biases, scales of norms and what the model exempts are not."""
    exempt = no_weight_decay(model)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    decayed = [p for name, p in trained if p.ndim > 1 and name not in exempt]
    free = [p for name, p in trained if p.ndim <= 1 or name in exempt]
    return [{"params": decayed, "weight_decay": weight_decay}, {"params": free, "weight_decay": 0.0}]
