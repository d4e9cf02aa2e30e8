"""Parts of several published networks, under timm's names. Tokens [B, H, W, C], channels last."""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glocal.arguments import positive
from glocal.blocks import DropPath, Mlp
from glocal.models.classifier import (
    Classifier,
    Stage,
    drop_path_rates,
    linear_or_none,
    mlp_width,
    start_linear_maps,
)


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
        # in channels_last memory the output is laid out as tokens
        x = self.proj(completed(x, self.patch_size).contiguous(memory_format=torch.channels_last))
        return self.norm(x.movedim(1, -1))


def completed(x: Tensor, p: int) -> Tensor:
    """Images [B, C, H, W] with zeros at the lower and right border, up to sizes that p divides."""
    h, w = ((n + p - 1) // p for n in x.shape[2:])  # said in sizes that torch.export can follow
    return nn.functional.pad(x, (0, w * p - x.shape[3], 0, h * p - x.shape[2]))


class PatchDownsample(PatchEmbed):
    """`PatchEmbed` of tokens, for p = 2: [B, H, W, dim] -> [B, ceil(H/2), ceil(W/2), out_dim]."""

    def __init__(self, dim: int, out_dim: int, *, norm: bool = True) -> None:
        super().__init__(dim, out_dim, 2, norm=norm)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(-1, 1))


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


class TokenBatchNorm(nn.BatchNorm2d):
    """Batch norm of every channel: [B, H, W, C] -> [B, H, W, C], parameters and buffers of torch.nn.BatchNorm2d."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(-1, 1)).movedim(1, -1)


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


class Pyramid(Classifier):
    """Swin's skeleton: patches, stages of blocks with merged tokens between them, norm, mean, linear map.

    Args:
        block: the stage, the block's number in it and its rate of stochastic depth -> tokens [B, H, W, C] to the same.
        num_classes, in_chans: see `Classifier`.
        patch_size: pixels along a side of a token of the first stage.
        dims: channels of every stage.
        depths: blocks of every stage.
        drop_path_rate: of the last block; it grows linearly from 0 in the first.
        merging: what makes tokens of the next stage, from the channels of both.
    """

    classifiers = ("head.fc",)

    def __init__(
        self,
        block: Callable[[int, int, float], nn.Module],
        *,
        num_classes: int,
        in_chans: int,
        patch_size: int,
        dims: Sequence[int],
        depths: Sequence[int],
        drop_path_rate: float,
        merging: Callable[[int, int], nn.Module] = PatchMerging,
    ) -> None:
        super().__init__(in_chans=in_chans, num_classes=num_classes, num_features=dims[-1])
        self.patch_embed = PatchEmbed(in_chans, dims[0], positive("patch_size", patch_size))
        rates = drop_path_rates(drop_path_rate, depths)
        stages = []
        for i, dim in enumerate(dims):
            blocks = [block(i, j, next(rates)) for j in range(depths[i])]
            stages.append(Stage(merging(dims[i - 1], dim) if i else nn.Identity(), blocks))
            self.feature_info.append({"num_chs": dim, "reduction": patch_size * 2**i, "module": f"layers.{i}"})
        self.layers = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(dims[-1])
        self.head = nn.Sequential(OrderedDict(fc=linear_or_none(dims[-1], num_classes)))
        start_linear_maps(self)

    def stem(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    def stages(self) -> Sequence[nn.Module]:
        return list(self.layers)

    def finish(self, x: Tensor) -> Tensor:
        return self.norm(x)
