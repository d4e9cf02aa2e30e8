"""ResNet: stages of convolution blocks with skip paths, each stage coarser and wider than the one before.

B images, C channels, H W pixels.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glocal.arguments import one_of, per_axis, positive
from glocal.blocks import DropPath
from glocal.models.classifier import Blocks, Classifier, drop_path_rates, linear_or_none, per_stage
from glocal.spec import build

_EXPANSION = {"basic": 1, "bottleneck": 4}  # channels that a block gives, over its stage's own
_STEMS = {"7x7": (7, 2), "3x3": (3, 1)}  # pixels along a side of its kernel, and their stride


class BasicBlock(nn.Module):
    """Two 3x3 convolutions, each with a batch norm: relu(skip + BN(Conv(relu(BN(Conv(x)))))).

    Args:
        dim: channels that come in.
        width: channels between the convolutions.
        out_dim: channels that go out.
        stride: of the first convolution.
        drop_path: probability that the branch is skipped for an image in training.

    Shape: [B, H, W, dim] -> [B, ceil(H / stride), ceil(W / stride), out_dim].
    """

    def __init__(self, dim: int, width: int, out_dim: int, *, stride: int, drop_path: float) -> None:
        super().__init__()
        self.conv1 = build("Convolution", dim, out_dim=width, stride=stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = build("Convolution", width, out_dim=out_dim, bias=False)
        self.bn2 = nn.BatchNorm2d(out_dim)
        self.downsample = _downsample(dim, out_dim, stride)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        branch = F.relu(_normed(self.bn1, self.conv1(x)))
        branch = _normed(self.bn2, self.conv2(branch))
        return F.relu(_skip(self.downsample, x) + self.drop_path(branch))


class Bottleneck(nn.Module):
    """A 3x3 convolution between two 1x1 ones, each with a batch norm, at fewer channels than come in and go out.

    Args:
        dim: channels that come in.
        width: channels of the 3x3 convolution.
        out_dim: channels that go out.
        stride: of the 3x3 convolution.
        drop_path: probability that the branch is skipped for an image in training.
        middle: what stands in the place of the 3x3 convolution, with its stride, and the norm behind it.

    Shape: [B, H, W, dim] -> [B, ceil(H / stride), ceil(W / stride), out_dim].
    """

    def __init__(
        self,
        dim: int,
        width: int,
        out_dim: int,
        *,
        stride: int,
        drop_path: float,
        middle: tuple[nn.Module, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(dim, width, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2, self.bn2 = middle or (
            build("Convolution", width, stride=stride, bias=False),
            nn.BatchNorm2d(width),
        )
        self.conv3 = nn.Conv2d(width, out_dim, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(out_dim)
        self.downsample = _downsample(dim, out_dim, stride)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        branch = F.relu(self.bn1(self.conv1(x.movedim(-1, 1)))).movedim(1, -1)
        branch = F.relu(_normed(self.bn2, self.conv2(branch)))
        branch = self.bn3(self.conv3(branch.movedim(-1, 1))).movedim(1, -1)
        return F.relu(_skip(self.downsample, x) + self.drop_path(branch))


class ResNet(Classifier):
    """ResNet: images [B, in_chans, H, W] -> scores [B, num_classes] by convolutions and skip paths.

    Args:
        middle: for families that are built on this one: the stage, the number in it, the width and the stride of a
            bottleneck -> its `middle`; None where that is a convolution.
        num_classes: number of scores; 0: none, the mean over all tokens instead.
        in_chans: channels of an image.
        img_size: as every model has it; here nothing depends on it.
        block: "basic" or "bottleneck", whose blocks give four times their stage's channels; the name's own.
        depths: blocks of every stage; the name's own.
        dims: channels of every stage; the stem has those of the first.
        strides: of the first block of every stage; 1, then 2 if not given.
        stem: "7x7" with stride 2 and a max pooling, for large images, or "3x3" with neither, for those of 32 pixels.
        width_ratio: channels inside blocks over their stage's: of the bottlenecks' 3x3 convolutions.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.

    Shape:
        Any H and W: the 7x7 stem, twice, and every stage with stride 2 halve the grid, and an odd one loses nothing.

    Cost: at 224 pixels 1.814 G (18), 4.089 G (50), 7.801 G (101), 11.40 G (wide 50) multiply-adds; 555 M for
        `resnet18_cifar` at 32 pixels.

    Raises:
        ValueError: sizes below 1, not one number of dims for each of depths, a rate outside 0 <= rate < 1; at run
            time, an input that is no batch of images.

    Source: He, Zhang, Ren, Sun, Deep Residual Learning for Image Recognition, CVPR 2016, arXiv 1512.03385;
        Zagoruyko, Komodakis, Wide Residual Networks, BMVC 2016, arXiv 1605.07146.
    Differs from the paper: the stride of a bottleneck is that of its 3x3 convolution, not of the first 1x1 one, as in
        the weights of torchvision, timm and transformers.
    """

    classifiers = ("fc",)
    after_stages = ("fc",)

    def __init__(
        self,
        middle: Callable[[int, int, int, int], tuple[nn.Module, nn.Module] | None] | None = None,
        /,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        block: str,
        depths: Sequence[int],
        dims: Sequence[int] = (64, 128, 256, 512),
        strides: Sequence[int] | None = None,
        stem: Literal["7x7", "3x3"] = "7x7",
        width_ratio: float = 1,
        drop_path_rate: float = 0,
    ) -> None:
        per_axis("img_size", img_size, 2)
        depths = per_stage("depths", depths)
        dims = per_stage("dims", dims, len(depths))
        strides = (1, *(2,) * (len(dims) - 1)) if strides is None else per_stage("strides", strides, len(dims))
        expansion = _EXPANSION[one_of("block", block, tuple(_EXPANSION))]
        super().__init__(in_chans=in_chans, num_classes=num_classes, num_features=expansion * dims[-1])
        kernel_size, halving = _STEMS[one_of("stem", stem, tuple(_STEMS))]
        self.conv1 = nn.Conv2d(in_chans, dims[0], kernel_size, stride=halving, padding=kernel_size // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(dims[0])
        rates = drop_path_rates(drop_path_rate, depths)
        dim = dims[0]
        for i, (depth, width) in enumerate(zip(depths, dims, strict=True)):
            blocks: list[nn.Module] = []
            for j in range(depth):
                stride = 1 if j else strides[i]
                inner, out_dim = positive("width_ratio", round(width * width_ratio)), expansion * width
                if block == "basic":
                    blocks.append(BasicBlock(dim, inner, out_dim, stride=stride, drop_path=next(rates)))
                else:
                    own = None if middle is None else middle(i, j, inner, stride)
                    blocks.append(Bottleneck(dim, inner, out_dim, stride=stride, drop_path=next(rates), middle=own))
                dim = out_dim
            self.add_module(f"layer{i + 1}", Blocks(*blocks))
            reduction = halving**2 * math.prod(strides[: i + 1])
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"layer{i + 1}"})
        self.fc = linear_or_none(dim, num_classes)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 4 and "conv_offset" not in name:  # taps start where they are without moves
                nn.init.kaiming_normal_(parameter, mode="fan_out", nonlinearity="relu")

    def stem(self, x: Tensor) -> Tensor:
        # in channels_last memory the output is laid out as tokens
        x = F.relu(self.bn1(self.conv1(x.contiguous(memory_format=torch.channels_last))))
        if self.conv1.stride[0] > 1:
            x = F.max_pool2d(x, 3, stride=2, padding=1)
        return x.movedim(1, -1)

    def stages(self) -> Sequence[nn.Module]:
        return [self.get_submodule(info["module"]) for info in self.feature_info]


def _normed(norm: nn.Module, x: Tensor) -> Tensor:
    """Batch norm of tokens [B, H, W, C]."""
    return norm(x.movedim(-1, 1)).movedim(1, -1)


def _downsample(dim: int, out_dim: int, stride: int) -> nn.Module | None:
    """What makes the skip path as coarse and wide as the branch; None where it is."""
    if stride == 1 and dim == out_dim:
        return None
    return nn.Sequential(nn.Conv2d(dim, out_dim, 1, stride=stride, bias=False), nn.BatchNorm2d(out_dim))


def _skip(downsample: nn.Module | None, x: Tensor) -> Tensor:
    return x if downsample is None else _normed(downsample, x)


MODELS = {
    "resnet18": partial(ResNet, block="basic", depths=(2, 2, 2, 2)),
    "resnet18_cifar": partial(ResNet, block="basic", depths=(2, 2, 2, 2), stem="3x3", num_classes=10, img_size=32),
    "resnet50": partial(ResNet, block="bottleneck", depths=(3, 4, 6, 3)),
    "resnet101": partial(ResNet, block="bottleneck", depths=(3, 4, 23, 3)),
    "wide_resnet50": partial(ResNet, block="bottleneck", depths=(3, 4, 6, 3), width_ratio=2),
    # with as many tokens in the last stage as the networks of models/lesa.py have
    "resnet50_stride16": partial(ResNet, block="bottleneck", depths=(3, 4, 6, 3), strides=(1, 2, 2, 1)),
    "wide_resnet50_stride16": partial(
        ResNet, block="bottleneck", depths=(3, 4, 6, 3), strides=(1, 2, 2, 1), width_ratio=2
    ),
}
