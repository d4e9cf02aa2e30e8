"""Focal Transformer: Swin's skeleton with windows that see their surroundings finely and what is further off coarsely.

B images, C channels, H W pixels.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import nn

from glocal.arguments import per_axis, positive
from glocal.models.classifier import Classifier, per_stage
from glocal.models.parts import PatchDownsample, PreNormBlock, Pyramid
from glocal.spec import build


class FocalTransformer(Pyramid):
    """Focal Transformer: images [B, in_chans, H, W] -> scores [B, num_classes] by focal attention.

    Args:
        mixer: "ReleasedFocalAttention", what the released weights are of, or "FocalAttention", what the paper
            describes; a model's name fills it in.
        num_classes: number of scores; 0: none, the mean over all tokens instead.
        in_chans: channels of an image.
        img_size: pixels a side, or (height, width), that the windows are made for: in a stage that has, along one
            side, no more tokens than a window, windows are that long and have no ring.
        patch_size: pixels along a side of a token of the first stage.
        dims: channels of every stage; a model's name fills them in.
        depths: blocks of every stage.
        num_heads: heads of every stage; heads of 32 channels if not given.
        window_size: tokens along a side of a window.
        expand_size: how deep the ring of tokens around a window is; 0 for none, at most half the window.
        focal_windows: pooled windows along each side that a window sees, odd, in every stage.
        mlp_ratio: hidden width of the MLPs over the channels.
        qkv_bias: whether queries, keys and values have biases.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first. The published
            training has 0.2 (tiny), 0.3 (small) and 0.5 (base).

    Shape:
        Any H and W: zeros complete tokens at the lower and right border, those that merging takes beyond it, and
        windows. With the released attention such zeros are seen, and rings go on at the other side of the image; with
        the paper's neither.

    Cost: multiply-adds at 224 pixels 4.95 G (tiny), 9.48 G (small), 16.4 G (base).

    Raises:
        ValueError: as many depths, heads or focal windows as there are no stages; heads that do not divide their
            stage's channels; an even focal window; a ring deeper than half the window; at run time, an input that is
            no batch of images.

    Source: Yang et al., Focal Self-attention for Local-Global Interactions in Vision Transformers, NeurIPS 2021,
    arXiv 2107.00641; sizes from the released code (microsoft/Focal-Transformer, configs).
    Differs from the paper: "ReleasedFocalAttention" as its own page says. With "FocalAttention" pooling starts as the
        mean, which the released code means to and then overwrites.
    """

    def __init__(
        self,
        mixer: str,
        /,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 4,
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] | None = None,
        window_size: int = 7,
        expand_size: int = 3,
        focal_windows: Sequence[int] = (7, 5, 3, 1),
        mlp_ratio: float = 4,
        qkv_bias: bool = True,
        drop_path_rate: float = 0,
    ) -> None:
        dims = per_stage("dims", dims)
        depths = per_stage("depths", depths, len(dims))
        heads = (None,) * len(dims) if num_heads is None else per_stage("num_heads", num_heads, len(dims))
        focal = per_stage("focal_windows", focal_windows, len(dims))
        positive("window_size", window_size)
        shorter = -(-min(per_axis("img_size", img_size, 2)) // positive("patch_size", patch_size))

        def block(stage: int, number: int, drop_path: float) -> nn.Module:
            tokens = -(-shorter // 2**stage)
            attention = build(
                mixer,
                dims[stage],
                window_size=min(window_size, tokens),
                expand_size=expand_size if tokens > window_size else 0,
                focal_window=focal[stage],
                num_heads=heads[stage],
                qkv_bias=qkv_bias,
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
            merging=PatchDownsample,
        )
        if mixer == "FocalAttention":
            for part in self.modules():
                for pooling in getattr(part, "pool_layers", ()):
                    nn.init.constant_(pooling.weight, 1 / pooling.in_features)


_SMALL: dict[str, Any] = {"depths": (2, 2, 18, 2)}
_BASE: dict[str, Any] = {"dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2)}

MODELS: dict[str, Callable[..., Classifier]] = {
    "focal_tiny": partial(FocalTransformer, "ReleasedFocalAttention"),
    "focal_small": partial(FocalTransformer, "ReleasedFocalAttention", **_SMALL),
    "focal_base": partial(FocalTransformer, "ReleasedFocalAttention", **_BASE),
    "focal_tiny_paper": partial(FocalTransformer, "FocalAttention"),
    "focal_small_paper": partial(FocalTransformer, "FocalAttention", **_SMALL),
    "focal_base_paper": partial(FocalTransformer, "FocalAttention", **_BASE),
}
