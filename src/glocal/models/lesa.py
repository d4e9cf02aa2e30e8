"""LESA-ResNet: a ResNet whose last two stages mix tokens by attention, with a local term of its own or without.

B images, C channels, H W pixels, h w tokens, N = h * w.
"""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from torch import nn

from glocal.arguments import flag, one_of, per_axis
from glocal.models.classifier import Classifier, per_stage
from glocal.models.resnet import ResNet
from glocal.spec import build


class LESAResNet(ResNet):
    """LESA-ResNet: images [B, in_chans, H, W] -> scores [B, num_classes] by convolutions, and attention in late stages.

    The blocks are bottlenecks. In the last two stages attention stands in the place of their 3x3 convolution and its
    norm, but not in the first block of the first of the two.

    Args:
        num_classes: number of scores; 0: none, the mean over all tokens instead.
        in_chans: channels of an image.
        img_size: pixels a side, or (height, width), that tables of positions are made for; a model's name fills it in.
        attention: "lesa", convolution and attention with a gate between them; "self", the attention alone; None:
            convolutions everywhere.
        position: "classification", a table over the flattened raster for queries, keys and values, as released for
            ImageNet; "detection", one for rows and one for columns, for queries only, as released for COCO.
        deformable: whether the 3x3 convolutions of all stages but the first are deformable, those of LESA too.
        num_groups: groups of the attention and of LESA's 3x3 convolutions.
        depths: blocks of every stage.
        dims: channels of every stage; the stem has those of the first.
        strides: of the first block of every stage. LESA averages its output, so that its attention runs before that.
        width_ratio: channels inside blocks over their stage's.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.

    Shape:
        Any H and W; at another size tables of positions are resized linearly, which no released model does. That of
        "classification" is one of offsets in the raster: it is exact at its own number of tokens in a row alone.

    Cost: at 224 pixels 6.178 G (lesa_resnet50), 16.53 G (lesa_wrn50), 5.059 G (sa_resnet50), 12.05 G (sa_wrn50)
        multiply-adds, by the definition of the attention. Scores of N tokens with each other: N = 196 in 8 blocks.

    Raises:
        ValueError: groups that do not divide half of a block's channels; what `ResNet` refuses; in training, a single
            token in all.

    Source: Yang et al., Locally Enhanced Self-Attention: Combining Self-Attention and Convolution as Local and Context
    Terms, arXiv 2107.05637; sizes and places from the released code (LESA_classification, lib/models and config;
    LESA_detection, mmdet/models/backbones and configs/lesa).
    Differs from the paper: it is the released network, whose attention sees the token itself, and whose positions for
    classification are those of the flattened raster; the released code has one square size only. The detection models
    are their backbones with a classifier: what takes their maps is not here. Code of the self-attention and of the
    convolution baselines was not released: they are the same network without the parts in question.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        attention: Literal["lesa", "self"] | None = "lesa",
        position: Literal["classification", "detection"] = "classification",
        deformable: bool = False,
        num_groups: int = 8,
        depths: Sequence[int] = (3, 4, 6, 3),
        dims: Sequence[int] = (64, 128, 256, 512),
        strides: Sequence[int] = (1, 2, 2, 1),
        width_ratio: float = 1,
        drop_path_rate: float = 0,
    ) -> None:
        image = per_axis("img_size", img_size, 2)
        flag("deformable", deformable)
        if attention is not None:
            one_of("attention", attention, ("lesa", "self"))
        one_of("position", position, ("classification", "detection"))
        strides = per_stage("strides", strides)
        unary = None if attention == "self" else "deformable" if deformable else "convolution"

        def middle(stage: int, number: int, width: int, stride: int) -> tuple[nn.Module, nn.Module] | None:
            if attention is not None and (stage, number) > (len(strides) - 2, 0):
                step = 4 * math.prod(strides[: stage + (number > 0)])  # pixels along a side of a token that comes in
                mixer = build(
                    "LocallyEnhancedAttention",
                    width,
                    grid_size=tuple((n + step - 1) // step for n in image),
                    num_groups=num_groups,
                    position=position,
                    unary=unary,
                    stride=stride,
                )
                return mixer, nn.Identity()  # each of its terms has a norm
            if deformable and stage:
                conv = build("DeformableConv", width, stride=stride, modulated=False, bias=False)
                return conv, nn.BatchNorm2d(width)
            return None

        super().__init__(
            middle,
            num_classes=num_classes,
            in_chans=in_chans,
            img_size=img_size,
            block="bottleneck",
            depths=depths,
            dims=dims,
            strides=strides,
            width_ratio=width_ratio,
            drop_path_rate=drop_path_rate,
        )


_WIDE: dict[str, Any] = {"width_ratio": 2}
_DETECTION: dict[str, Any] = {"strides": (1, 2, 2, 2), "position": "detection", "deformable": True}

MODELS: dict[str, Callable[..., Classifier]] = {
    "lesa_resnet50": LESAResNet,
    "lesa_wrn50": partial(LESAResNet, **_WIDE),
    "sa_resnet50": partial(LESAResNet, attention="self"),
    "sa_wrn50": partial(LESAResNet, **_WIDE, attention="self"),
    # sizes of the published detectors, Mask R-CNN and HTC
    "lesa_resnet50_detection": partial(LESAResNet, **_DETECTION, img_size=1024),
    "lesa_wrn50_detection": partial(LESAResNet, **_DETECTION, **_WIDE, img_size=1280),
    "sa_resnet50_detection": partial(LESAResNet, **_DETECTION, attention="self", img_size=1024),
    "sa_wrn50_detection": partial(LESAResNet, **_DETECTION, **_WIDE, attention="self", img_size=1280),
    "deformable_resnet50": partial(LESAResNet, attention=None, deformable=True, strides=(1, 2, 2, 2)),
    "deformable_wrn50": partial(LESAResNet, **_WIDE, attention=None, deformable=True, strides=(1, 2, 2, 2)),
}
