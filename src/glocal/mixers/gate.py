"""A gate: each channel of each token is scaled by a saliency between 0 and 1."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.arguments import flag
from glocal.operator import TokenModule


class Gate(TokenModule):
    """A learned saliency scales every channel of every token: y = x * sigmoid(W x + b).

    Mixes channels, not tokens: what a network does that learns what matters at each position alone. It has no
    aggregation weights; the gate is dynamic and as local as can be.

    Args:
        dim: channels C.
        bias: whether b is there.
        rank: of the grid; None: any.

    Shape:
        x [B, *S, C] -> [B, *S, C], any S. `gate.weight` [C, C], `gate.bias` [C].

    Cost: N*C^2 multiply-adds; the product with x is not counted.

    Raises:
        ValueError: a bias that is not True or False.

    Source: Miech, Laptev and Sivic, Learnable pooling with Context Gating for video classification, 2017,
    arXiv 1706.06905 (context gating).
    Differs from the paper: there it gates one vector for a whole video; here it gates every token.
    """

    examples = ("Gate()", "Gate(bias=False, rank=1)")

    def __init__(self, dim: int, *, bias: bool = True, rank: int | None = None) -> None:
        super().__init__(dim, rank=rank)
        self.bias = flag("bias", bias)
        self.gate = nn.Linear(dim, dim, bias=bias)

    def mix(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        return x * torch.sigmoid(self.gate(x))  # token by token: `valid` is named because it can do no harm

    def macs(self, grid: Sequence[int]) -> int:
        return math.prod(grid) * self.dim**2
