"""Parts of several published networks, under timm's names. Tokens [B, H, W, C], channels last."""

from typing import Any

import torch
from torch import Tensor, nn

from glocal.blocks import DropPath, Mlp
from glocal.models.classifier import mlp_width


class PatchEmbed(nn.Module):
    """Tokens of p x p pixels, and a norm unless `norm` is False: [B, C, H, W] -> [B, ceil(H/p), ceil(W/p), dim].

    What the last row and column of tokens lack of an image that p does not divide is zero.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int, *, norm: bool = True) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Conv2d(in_chans, dim, patch_size, stride=patch_size)
        self.norm = nn.LayerNorm(dim) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        p = self.patch_size
        h, w = ((n + p - 1) // p for n in x.shape[2:])  # said in sizes that torch.export can follow
        x = nn.functional.pad(x, (0, w * p - x.shape[3], 0, h * p - x.shape[2]))
        # in channels_last memory the output is laid out as tokens
        x = self.proj(x.contiguous(memory_format=torch.channels_last))
        return self.norm(x.movedim(1, -1))


class PatchMerging(nn.Module):
    """2 x 2 tokens side by side, norm, linear map: [B, H, W, dim] -> [B, ceil(H/2), ceil(W/2), out_dim].

    The tokens follow each other as (row, column) = (0, 0), (1, 0), (0, 1), (1, 1); those beyond an odd grid are zero.
    """

    def __init__(self, dim: int, out_dim: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * dim)
        self.reduction = nn.Linear(4 * dim, out_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h, w = ((n + 1) // 2 for n in x.shape[1:3])
        x = nn.functional.pad(x, (0, 0, 0, 2 * w - x.shape[2], 0, 2 * h - x.shape[1]))
        x = x.unflatten(2, (w, 2)).unflatten(1, (h, 2))  # [B, h, row, w, column, C]
        return self.reduction(self.norm(x.permute(0, 1, 3, 4, 2, 5).flatten(3)))


class PreNormBlock(nn.Module):
    """Pre-norm block: x + Attn(Norm(x)), then x + MLP(Norm(x)).

    `glocal.blocks.Block` without what it takes to change grid and width, under the names of published weights.

    Args:
        dim: channels of a token.
        attn: a mixer [B, *S, dim] -> [B, *S, dim].
        mlp_ratio: hidden width of the MLP over dim.
        drop_path: probability that a branch is skipped for an image in training.
        eps: of both norms.

    Shape: [B, *S, dim] -> [B, *S, dim]; further arguments are the mixer's.
    """

    def __init__(
        self, dim: int, attn: nn.Module, *, mlp_ratio: float = 4, drop_path: float = 0, eps: float = 1e-5
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps)
        self.attn = attn
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(dim, eps=eps)
        self.mlp = Mlp(dim, mlp_width(dim, mlp_ratio))
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor, **call: Any) -> Tensor:
        x = x + self.drop_path1(self.attn(self.norm1(x), **call))
        return x + self.drop_path2(self.mlp(self.norm2(x)))
