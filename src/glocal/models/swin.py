"""Swin Transformer: attention in windows, every second block's windows shifted, four stages of ever coarser tokens.

B images, C channels, H W pixels.
"""

from collections.abc import Callable, Sequence
from functools import partial

from torch import nn

from glocal.arguments import per_axis
from glocal.models.classifier import Classifier, per_stage
from glocal.models.parts import PreNormBlock, Pyramid
from glocal.spec import build


class SwinTransformer(Pyramid):
    """Swin Transformer: images [B, in_chans, H, W] -> scores [B, num_classes] by attention in windows.

    Args:
        num_classes: number of scores; 0: none, the mean over all tokens instead.
        in_chans: channels of an image.
        img_size: as every model has it; here nothing depends on it, since a table of biases is made for a window.
        patch_size: pixels along a side of a token of the first stage.
        dims: channels of every stage; a model's name fills them in.
        depths: blocks of every stage.
        num_heads: heads of every stage; heads of 32 channels if not given.
        window_size: tokens along a side of a window, or (height, width); 12 in the published models for 384 pixels.
        mlp_ratio: hidden width of the MLPs over the channels.
        qkv_bias: whether queries, keys and values have biases.
        mask_padding: in windows that the image does not fill, whether the empty places are not seen. False: zero
            tokens take part, and shifted windows wrap around, as in timm at such sizes.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.

    Shape:
        Any H and W: zeros complete tokens at the lower and right border and those that merging takes beyond it. Along
        an axis of no more tokens than the window has, the window is the axis, and not shifted. The paper defines no
        grid that its windows do not divide; 224 pixels have none, nor 384 with windows of 12.

    Cost: N*(12*C^2 + 2*K*C) multiply-adds a block of N tokens with windows of K, and what merging takes. At 224
        pixels 4,490,566,656 (tiny), 8,740,875,264 (small), 15,430,946,816 (base).

    Raises:
        ValueError: as many dims or heads as there are no stages; heads that do not divide their stage's channels; a
            window below 1; at run time, an input that is no batch of images.

    Source: Liu et al., Swin Transformer: Hierarchical Vision Transformer using Shifted Windows, ICCV 2021,
    arXiv 2103.14030; sizes from the released code (microsoft/Swin-Transformer, configs/swin).
    Differs from the paper: other sizes than multiples of the window are defined, see mask_padding; tokens of other
    regions of a shifted window are not seen at all, where the released code takes 100 from their scores.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 4,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] | None = None,
        window_size: int | Sequence[int] = 7,
        mlp_ratio: float = 4,
        qkv_bias: bool = True,
        mask_padding: bool = True,
        drop_path_rate: float = 0,
    ) -> None:
        per_axis("img_size", img_size, 2)
        dims = per_stage("dims", dims)
        depths = per_stage("depths", depths, len(dims))
        heads = (None,) * len(dims) if num_heads is None else per_stage("num_heads", num_heads, len(dims))
        window = per_axis("window_size", window_size, 2)

        def block(stage: int, number: int, drop_path: float) -> nn.Module:
            attention = build(
                "WindowAttention",
                dims[stage],
                window_size=window,
                num_heads=heads[stage],
                shift_size=min(window) // 2 if number % 2 else 0,
                qkv_bias=qkv_bias,
                mask_padding=mask_padding,
            )
            return PreNormBlock(dims[stage], attention, mlp_ratio=mlp_ratio, drop_path=drop_path)

        super().__init__(
            block,
            num_classes=num_classes,
            in_chans=in_chans,
            patch_size=patch_size,
            dims=dims,
            depths=depths,
            drop_path_rate=drop_path_rate,
        )


MODELS: dict[str, Callable[..., Classifier]] = {
    "swin_tiny": SwinTransformer,
    "swin_small": partial(SwinTransformer, depths=(2, 2, 18, 2)),
    "swin_base": partial(SwinTransformer, dims=(128, 256, 512, 1024), depths=(2, 2, 18, 2)),
    "swin_large": partial(SwinTransformer, dims=(192, 384, 768, 1536), depths=(2, 2, 18, 2)),
}
