"""CoAtNet as timm built and trained it before the authors' blocks were released; of these there are weights.

B images, C channels, H W pixels.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from torch import nn

from glocal.arguments import flag, one_of
from glocal.backbone import Stem
from glocal.blocks import Block, MBConv
from glocal.models.classifier import Classifier, per_stage
from glocal.models.coatnet import Hybrid
from glocal.models.parts import TokenBatchNorm
from glocal.spec import build


class CoAtNetRw(Hybrid):
    """timm's CoAtNet "rw": images [B, in_chans, H, W] -> scores [B, num_classes], layout C-C-T-T.

    Args:
        num_classes: number of scores; 0: none, the mean over all tokens instead.
        in_chans: channels of an image.
        img_size: pixels a side, or (height, width), that the tables of position biases are made for.
        dims: channels of every stage; a model's name fills them in, and all that follows.
        depths: blocks of every stage.
        stem_dims: channels of the stem's two convolutions.
        stride_in: where convolution blocks stride, "depthwise", or "pool", before their first convolution.
        pre_activation: whether SiLU follows the first norm of convolution blocks.
        se_early: whether squeeze-excite stands in front of the third norm.
        se_activation: of squeeze-excite, "silu" or "relu".
        conv_bias: whether the last 1x1 convolution and the skip path of convolution blocks have biases.
        shortcut_bias: whether the skip path of attention blocks has.
        norm: of attention blocks and in front of the mean, "layer" or "batch".
        layer_scale: first value of factors on the branches of attention blocks; None: there are none.
        position_mlp: hidden channels of the MLPs that stand for tables of position biases; None: there are tables.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.

    Shape:
        Any H and W, as `CoAtNet`.

    Raises:
        ValueError: not four dims or depths, or two channels of the stem, heads of 32 that do not divide a stage's
            channels; at run time, an input that is no batch of images.

    Source: Wightman, PyTorch Image Models (timm), models/maxxvit.py; after Dai et al., CoAtNet, NeurIPS 2021,
        arXiv 2106.04803.
    Differs from the paper: SiLU for GELU in convolution blocks, which widen from the channels that come in; attention
        widens in its output projection; the head has no hidden layer; and what the arguments say.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        dims: Sequence[int],
        depths: Sequence[int],
        stem_dims: Sequence[int] = (32, 64),
        stride_in: Literal["depthwise", "pool"] = "depthwise",
        pre_activation: bool = True,
        se_early: bool = False,
        se_activation: Literal["silu", "relu"] = "silu",
        conv_bias: bool = False,
        shortcut_bias: bool = True,
        norm: Literal["layer", "batch"] = "layer",
        layer_scale: float | None = None,
        position_mlp: int | None = None,
        drop_path_rate: float = 0,
    ) -> None:
        hidden, stem_dim = per_stage("stem_dims", stem_dims, 2)
        one_of("stride_in", stride_in, ("depthwise", "pool"))
        one_of("se_activation", se_activation, ("silu", "relu"))
        make_norm = nn.LayerNorm if one_of("norm", norm, ("layer", "batch")) == "layer" else TokenBatchNorm
        convolution: dict[str, Any] = {
            "stride_in": stride_in,
            "pool": "avg",
            "activation": "silu",
            "pre_activation": flag("pre_activation", pre_activation),
            "se_early": flag("se_early", se_early),
            "se_activation": se_activation,
            "bias": flag("conv_bias", conv_bias),
        }
        flag("shortcut_bias", shortcut_bias)

        def block(letter: str, dim: int, grid: tuple[int, ...], out_dim: int, **place: Any) -> nn.Module:
            if letter == "C":
                return MBConv(dim, out_dim, inner_dim=4 * dim, se_dim=dim, **convolution, **place)
            attention = build(
                "RelativeAttention",
                dim,
                grid_size=grid,
                head_dim=32,
                out_dim=out_dim,
                inner_dim=dim,
                position_mlp=position_mlp,
            )
            made = Block(
                dim, attention, out_dim=out_dim, pool="avg", layer_scale=layer_scale, bias=shortcut_bias, **place
            )
            made.norm1, made.norm2 = make_norm(dim), make_norm(out_dim)
            return made

        stem = Stem(in_chans, stem_dim, hidden_dim=hidden)
        stem.act = nn.SiLU()
        super().__init__(
            stem,
            block,
            num_classes=num_classes,
            in_chans=in_chans,
            img_size=img_size,
            stem_dim=stem_dim,
            reduction=2,
            layout="C-C-T-T",
            dims=dims,
            depths=depths,
            strides=None,
            norm=make_norm,
            hidden_head=False,
            drop_path_rate=drop_path_rate,
        )


_SMALL: dict[str, Any] = {"dims": (64, 128, 256, 512), "pre_activation": False, "conv_bias": True}
_MIDDLE: dict[str, Any] = {"dims": (96, 192, 384, 768), "se_activation": "relu"}
_EARLY: dict[str, Any] = {"se_early": True, "shortcut_bias": False}  # the first to be trained
_LARGE: dict[str, Any] = {"depths": (2, 6, 14, 2), "layer_scale": 1e-6}

MODELS: dict[str, Callable[..., Classifier]] = {
    "coatnet_pico_rw": partial(CoAtNetRw, **_SMALL, depths=(2, 3, 5, 2)),
    "coatnet_nano_rw": partial(CoAtNetRw, **_SMALL, depths=(3, 4, 6, 3), stride_in="pool"),
    "coatnet_0_rw": partial(CoAtNetRw, **_MIDDLE, **_EARLY, depths=(2, 3, 7, 2), stride_in="pool"),
    "coatnet_bn_0_rw": partial(CoAtNetRw, **_MIDDLE, **_EARLY, depths=(2, 3, 7, 2), norm="batch"),
    "coatnet_1_rw": partial(CoAtNetRw, **_MIDDLE, **_EARLY, depths=(2, 6, 14, 2)),
    "coatnet_2_rw": partial(CoAtNetRw, dims=(128, 256, 512, 1024), depths=(2, 6, 14, 2), stem_dims=(64, 128)),
    "coatnet_3_rw": partial(CoAtNetRw, **_LARGE, dims=(192, 384, 768, 1536), stem_dims=(96, 192)),
    "coatnet_rmlp_nano_rw": partial(CoAtNetRw, **_SMALL, depths=(3, 4, 6, 3), position_mlp=384),
    "coatnet_rmlp_0_rw": partial(CoAtNetRw, **_MIDDLE, depths=(2, 3, 7, 2), position_mlp=512),
    "coatnet_rmlp_1_rw2": partial(CoAtNetRw, **_MIDDLE, depths=(2, 6, 14, 2), position_mlp=512),
    "coatnet_rmlp_2_rw": partial(
        CoAtNetRw, **_LARGE, dims=(128, 256, 512, 1024), stem_dims=(64, 128), position_mlp=512
    ),
    "coatnet_rmlp_3_rw": partial(
        CoAtNetRw, **_LARGE, dims=(192, 384, 768, 1536), stem_dims=(96, 192), position_mlp=512
    ),
}
