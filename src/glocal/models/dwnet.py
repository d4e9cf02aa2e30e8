"""DWNet: Swin's skeleton with convolutions, static or predicted, in the place of attention, and its study's variants.

B images, C channels, H W pixels.
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

from torch import Tensor, nn

from glocal.arguments import one_of, per_axis, positive
from glocal.blocks import DropPath, Mlp
from glocal.models.classifier import Classifier, mlp_width, per_stage
from glocal.models.parts import PreNormBlock, Pyramid, TokenBatchNorm
from glocal.spec import build


class BatchNormBlock(nn.Module):
    """Batch norm behind every map: x + BN(Map(ReLU(BN(Mixer(ReLU(BN(Map(x)))))))), then x + MLP(BN(x)).

    Args:
        dim: channels of a token.
        mixer: a mixer [B, H, W, dim] -> [B, H, W, dim].
        mlp_ratio: hidden width of the MLP over dim.
        drop_path: probability that a branch is skipped for an image in training.

    Shape: [B, H, W, dim] -> [B, H, W, dim].
    """

    def __init__(self, dim: int, mixer: nn.Module, *, mlp_ratio: float = 4, drop_path: float = 0) -> None:
        super().__init__()
        self.attn = nn.Sequential(
            OrderedDict[str, nn.Module](
                conv1=nn.Linear(dim, dim, bias=False),
                bn1=TokenBatchNorm(dim),
                act1=nn.ReLU(),
                mixer=mixer,
                bn2=TokenBatchNorm(dim),
                act2=nn.ReLU(),
                conv2=nn.Linear(dim, dim, bias=False),
                bn3=TokenBatchNorm(dim),
            )
        )
        self.drop_path1 = DropPath(drop_path)
        self.norm2 = TokenBatchNorm(dim)
        self.mlp = Mlp(dim, mlp_width(dim, mlp_ratio))
        self.drop_path2 = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path1(self.attn(x))
        return x + self.drop_path2(self.mlp(self.norm2(x)))


def layer_norm_block(dim: int, mixer: nn.Module, *, mlp_ratio: float = 4, drop_path: float = 0) -> nn.Module:
    """Swin's block with Map(Mixer(Map(x))), both maps with bias, in the place of attention."""
    maps = OrderedDict[str, nn.Module](v=nn.Linear(dim, dim), mixer=mixer, proj=nn.Linear(dim, dim))
    return PreNormBlock(dim, nn.Sequential(maps), mlp_ratio=mlp_ratio, drop_path=drop_path)


class DWNet(Pyramid):
    """DWNet: images [B, in_chans, H, W] -> scores [B, num_classes] by depthwise convolutions or their like.

    Args:
        mixer: what stands in the place of attention: "DepthwiseConv" (DW), "DynamicDepthwiseConv" (D-DW),
            "InhomogeneousDepthwiseConv" (I-D-DW) or "LocalMLP"; a model's name fills it in.
        num_classes: number of scores; 0: none, the mean over all tokens instead.
        in_chans: channels of an image.
        img_size: as every model has it; here nothing depends on it.
        patch_size: pixels along a side of a token of the first stage.
        dims: channels of every stage; a model's name fills them in.
        depths: blocks of every stage.
        kernel_size: tokens along a side of a kernel, or of a window of local MLP. Of D-DW and I-D-DW it is odd; an even
            one of DW reads one token more below and to the right.
        num_groups: groups of channels with weights of their own, in every stage: of DW one for each channel, of I-D-DW
            32, of local MLP groups of 32 channels if not given; as many groups as channels share nothing.
        block: "post_bn", `BatchNormBlock` (DWNet's), or "pre_ln", Swin's.
        mlp_ratio: hidden width of the MLPs over the channels.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first. The published
            training has 0.2 (tiny) and 0.5 (base).

    Shape:
        Any H and W: zeros complete tokens at the lower and right border and those that merging takes beyond it.
        Kernels see zeros outside; windows of local MLP are shifted by half in every second block, but not
        along an axis of no more tokens than the window has.

    Cost: multiply-adds at 224 pixels: DW 3,726,862,848 (tiny) and 12,812,261,376 (base), D-DW 3,753,819,648 and
        12,899,506,176, I-D-DW 4,374,133,248 and 14,340,020,224.

    Raises:
        ValueError: as many depths or groups as there are no stages; a kernel or groups that the mixer refuses; in
            training, a single image with D-DW.

    Source: Han et al., On the Connection between Local Attention and Dynamic Depth-wise Convolution, ICLR 2022,
    arXiv 2106.04263; sizes and blocks from the released code (Atten4Vis/DemystifyLocalViT, models/dwnet.py).
    Differs from the paper: nothing known in DW, D-DW and I-D-DW. Code of local MLP and of the variants was not
    released: local MLP has Swin's shifted windows, "pre_ln" has a linear map before and behind the mixer, as attention,
    and where channels share a kernel of DW it has no bias, since the published count has none.
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
        kernel_size: int = 7,
        num_groups: Sequence[int] | None = None,
        block: Literal["post_bn", "pre_ln"] = "post_bn",
        mlp_ratio: float = 4,
        drop_path_rate: float = 0,
    ) -> None:
        per_axis("img_size", img_size, 2)
        dims = per_stage("dims", dims)
        depths = per_stage("depths", depths, len(dims))
        positive("kernel_size", kernel_size)
        groups = None if num_groups is None else per_stage("num_groups", num_groups, len(dims))
        one_of("block", block, ("post_bn", "pre_ln"))
        make = BatchNormBlock if block == "post_bn" else layer_norm_block

        def block_of(stage: int, number: int, drop_path: float) -> nn.Module:
            own = None if groups is None else groups[stage]
            placed = _mixer(mixer, dims[stage], kernel_size, own, shifted=number % 2 == 1)
            return make(dims[stage], placed, mlp_ratio=mlp_ratio, drop_path=drop_path)

        super().__init__(
            block_of,
            num_classes=num_classes,
            in_chans=in_chans,
            patch_size=patch_size,
            dims=dims,
            depths=depths,
            drop_path_rate=drop_path_rate,
        )
        # in the release these maps are convolutions, which start as PyTorch has them
        branches = [part.attn for part in self.modules() if isinstance(part, BatchNormBlock)]
        for part in (part for branch in branches for part in branch.modules()):
            if isinstance(part, nn.Linear):
                part.reset_parameters()


def _mixer(spec: str, dim: int, kernel_size: int, num_groups: int | None, *, shifted: bool) -> nn.Module:
    """The mixer of a block: each takes of this what it has."""
    windows = {"window_size": kernel_size, "shift_size": kernel_size // 2 if shifted else 0, "projection": False}
    groups = {} if num_groups is None else {"num_groups": num_groups, "num_heads": num_groups}
    mixer = build(spec, dim, kernel_size=kernel_size, **windows, **groups)
    if groups and not hasattr(mixer, "num_groups") and not hasattr(mixer, "num_heads"):
        raise ValueError(f"num_groups: {num_groups}, was given; {type(mixer).__name__} has weights for every channel")
    return mixer


_TINY: dict[str, Any] = {"dims": (96, 192, 384, 768), "depths": (2, 2, 6, 2)}
_BASE: dict[str, Any] = {"dims": (128, 256, 512, 1024), "depths": (2, 2, 18, 2)}

MODELS: dict[str, Callable[..., Classifier]] = {
    "dwnet_tiny": partial(DWNet, "DepthwiseConv", **_TINY),
    "dwnet_base": partial(DWNet, "DepthwiseConv", **_BASE),
    "dwnet_tiny_pre_ln": partial(DWNet, "DepthwiseConv", **_TINY, block="pre_ln"),
    # groups of 32 channels, as heads of attention have
    "dwnet_tiny_shared_channels": partial(DWNet, "DepthwiseConv(bias=False)", **_TINY, num_groups=(3, 6, 12, 24)),
    "d_dwnet_tiny": partial(DWNet, "DynamicDepthwiseConv", **_TINY),
    "d_dwnet_base": partial(DWNet, "DynamicDepthwiseConv", **_BASE),
    "i_d_dwnet_tiny": partial(DWNet, "InhomogeneousDepthwiseConv", **_TINY),
    "i_d_dwnet_base": partial(DWNet, "InhomogeneousDepthwiseConv", **_BASE),
    # the study compares local MLP with attention in Swin's blocks
    "local_mlp_tiny": partial(DWNet, "LocalMLP", **_TINY, block="pre_ln"),
    "local_mlp_base": partial(DWNet, "LocalMLP", **_BASE, block="pre_ln"),
    "local_mlp_tiny_shared_positions": partial(DWNet, "LocalMLP(shared_positions=True)", **_TINY, block="pre_ln"),
    "local_mlp_tiny_post_bn": partial(DWNet, "LocalMLP", **_TINY),
    "local_mlp_tiny_post_bn_unshared": partial(DWNet, "LocalMLP", **_TINY, num_groups=_TINY["dims"]),
}
