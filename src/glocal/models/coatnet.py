"""CoAtNet: stages of convolution blocks, then stages of blocks with relative attention, each coarser than the last.

B images, C channels, H W pixels, h w tokens.
"""

from collections import ChainMap, OrderedDict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from typing import Any, Literal

from torch import Tensor, nn

from glocal.arguments import flag, one_of, per_axis, positive
from glocal.backbone import Stem
from glocal.blocks import Block, MBConv
from glocal.models.classifier import Blocks, Classifier, drop_path_rates, linear_or_none, per_stage
from glocal.models.parts import PatchEmbed, TokenBatchNorm
from glocal.spec import build

_EPS = {nn.BatchNorm2d: 1e-5, nn.LayerNorm: 1e-6, TokenBatchNorm: 1e-6}  # of timm's networks


class Hybrid(Classifier):
    """CoAtNet's skeleton: stem, stages of blocks of which the first is coarser and wider, norm, mean, linear map.

    Args:
        stem: images -> tokens [B, h, w, stem_dim].
        block: a stage's letter, the channels that come in, the grid that goes out, and out_dim, stride and drop_path
            by name -> tokens to tokens.
        num_classes, in_chans, img_size: see `CoAtNet`.
        stem_dim: channels that the stem gives.
        reduction: pixels along a side of the stem's tokens.
        layout, dims, depths, strides, drop_path_rate: see `CoAtNet`.
        norm: the last norm; with a hidden head it stands behind the mean.
        hidden_head: see `CoAtNet`.
    """

    classifiers = ("head.fc",)

    def __init__(
        self,
        stem: nn.Module,
        block: Callable[..., nn.Module],
        *,
        num_classes: int,
        in_chans: int,
        img_size: int | Sequence[int],
        stem_dim: int,
        reduction: int,
        layout: str,
        dims: Sequence[int],
        depths: Sequence[int],
        strides: Sequence[int] | None,
        norm: Callable[[int], nn.Module],
        hidden_head: bool,
        drop_path_rate: float,
    ) -> None:
        letters = _letters(layout)
        dims = per_stage("dims", dims, len(letters))
        depths = per_stage("depths", depths, len(letters))
        strides = (2,) * len(letters) if strides is None else per_stage("strides", strides, len(letters))
        super().__init__(in_chans=in_chans, num_classes=num_classes, num_features=dims[-1])
        grid = tuple(-(-n // reduction) for n in per_axis("img_size", img_size, 2))
        rates = drop_path_rates(drop_path_rate, depths)
        dim, layers = stem_dim, [stem]
        self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": "layers.0"})
        for i, letter in enumerate(letters):
            grid, reduction = tuple(-(-n // strides[i]) for n in grid), reduction * strides[i]
            blocks = []
            for j in range(depths[i]):
                stride = 1 if j else strides[i]
                blocks.append(block(letter, dim, grid, out_dim=dims[i], stride=stride, drop_path=next(rates)))
                dim = dims[i]
            layers.append(Blocks(*blocks))
            self.feature_info.append({"num_chs": dim, "reduction": reduction, "module": f"layers.{i + 1}"})
        self.layers = nn.ModuleList(layers)
        head = {"norm": nn.Identity(), "pre_logits": nn.Identity(), "fc": linear_or_none(dim, num_classes)}
        if flag("hidden_head", hidden_head):
            head["norm"] = norm(dim)
            head["pre_logits"] = nn.Sequential(OrderedDict(fc=nn.Linear(dim, dim), act=nn.Tanh()))
        self.norm = nn.Identity() if hidden_head else norm(dim)
        self.head = nn.Sequential(OrderedDict(head))
        _start(self)

    def stem(self, x: Tensor) -> Tensor:
        """Images as they are: that the stem gives a map, too, makes it the first of the layers."""
        return x

    def stages(self) -> Sequence[nn.Module]:
        return list(self.layers)

    def finish(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def pool(self, x: Tensor) -> Tensor:
        return self.head[:2](super().pool(x))


class CoAtNet(Hybrid):
    """CoAtNet: images [B, in_chans, H, W] -> scores [B, num_classes] by convolution first, relative attention later.

    Args:
        num_classes: number of scores; 0: none, what the head makes of them instead.
        in_chans: channels of an image.
        img_size: pixels a side, or (height, width), that the tables of position biases are made for.
        layout: one letter for each stage, "C" (`MBConv`) or "T" (a block with `RelativeAttention`): "C-C-T-T".
        dims: channels of every stage; a model's name fills them in.
        depths: blocks of every stage; the name's own.
        strides: of the first block of every stage; 2 if not given.
        stem_dim: channels that the first stage is given.
        patch_size: if given, tokens are patches of so many pixels, as in ViT, instead of the stem of two convolutions.
        head_dim: channels of a head of attention.
        stride_in: where convolution blocks stride, "depthwise" or "expand", the first 1x1 convolution, as in most of
            the paper.
        pool: how skip paths and attention are made coarser, "avg", or "max" as in the paper.
        hidden_head: whether the head has a hidden layer, with tanh, without which the paper's numbers of parameters
            do not come out. Without it the norm stands in front of the mean.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.

    Shape:
        Any H and W: an odd grid loses nothing when it is halved, and tables of biases are resized linearly. Maps are
        those of the stem and of every stage.

    Cost: at 224 pixels 4.547 G (0), 8.643 G (1), 16.43 G (2), 36.45 G (3), 62.32 G (4) multiply-adds; strides in the
        first 1x1 convolution: 4.142 G, 8.239 G, 15.50 G, 34.37 G, 60.24 G.

    Raises:
        ValueError: a layout of other letters, as many dims, depths or strides as there are no stages, heads that do
            not divide their stage's channels; at run time, an input that is no batch of images.

    Source: Dai, Liu, Le, Tan, CoAtNet: Marrying Convolution and Attention for All Data Sizes, NeurIPS 2021,
        arXiv 2106.04803, sections 2 and A.1, tables 3, 11 and 12; "C-C-C-C" and the other layouts, section 2.2.
    Differs from the paper: names alone are timm's networks: strides are in the depthwise convolution, as in the
        paper's table 9, pooling takes means, and norms add 1e-5 (batch) and 1e-6 (layer) to variances, where the
        authors' blocks have 1e-3 and 1e-5. The last stage of number 6 has 3072 channels: with the 2048 that are printed
        it would have 1.35 G parameters, not 1.47 G. Of the study of layouts no depths are published: these here have
        multiply-adds within 2 % of each other.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        layout: str = "C-C-T-T",
        dims: Sequence[int] = (96, 192, 384, 768),
        depths: Sequence[int] = (2, 3, 5, 2),
        strides: Sequence[int] | None = None,
        stem_dim: int = 64,
        patch_size: int | None = None,
        head_dim: int = 32,
        stride_in: Literal["depthwise", "expand"] = "depthwise",
        pool: Literal["avg", "max"] = "avg",
        hidden_head: bool = True,
        drop_path_rate: float = 0,
    ) -> None:
        one_of("stride_in", stride_in, ("depthwise", "expand"))
        one_of("pool", pool, ("avg", "max"))
        positive("stem_dim", stem_dim)
        stem: nn.Module
        if patch_size is None:
            stem, reduction = Stem(in_chans, stem_dim), 2
        else:
            reduction = positive("patch_size", patch_size)
            stem = PatchEmbed(in_chans, stem_dim, patch_size, norm=False)

        def block(letter: str, dim: int, grid: tuple[int, ...], out_dim: int, **place: Any) -> nn.Module:
            if letter == "C":
                return MBConv(dim, out_dim, stride_in=stride_in, pool=pool, **place)
            attention = build("RelativeAttention", dim, grid_size=grid, head_dim=head_dim, out_dim=out_dim)
            return Block(dim, attention, out_dim=out_dim, pool=pool, **place)

        super().__init__(
            stem,
            block,
            num_classes=num_classes,
            in_chans=in_chans,
            img_size=img_size,
            stem_dim=stem_dim,
            reduction=reduction,
            layout=layout,
            dims=dims,
            depths=depths,
            strides=strides,
            norm=nn.LayerNorm,
            hidden_head=hidden_head,
            drop_path_rate=drop_path_rate,
        )


def _letters(layout: str) -> tuple[str, ...]:
    """The letters of a layout, "C-C-T-T"."""
    letters = tuple(layout.split("-")) if isinstance(layout, str) else ()
    if not letters or not {*letters} <= {"C", "T"}:
        raise ValueError(
            f"layout: {layout!r}, must be letters C (convolution) or T (attention) with - between them, as in C-C-T-T; "
            "glocal.Backbone takes other operators"
        )
    return letters


def _start(model: nn.Module) -> None:
    """First values as in the authors' blocks: normal with deviation 0.02, biases 0; and timm's eps."""
    for part in model.modules():
        if type(part) in _EPS:
            part.eps = _EPS[type(part)]  # type: ignore[assignment]
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            nn.init.trunc_normal_(parameter, std=0.02)
        elif name.endswith("bias"):
            nn.init.zeros_(parameter)


_SIZES: dict[str, dict[str, Any]] = {
    "coatnet_0": {},
    "coatnet_1": {"depths": (2, 6, 14, 2)},
    "coatnet_2": {"depths": (2, 6, 14, 2), "dims": (128, 256, 512, 1024), "stem_dim": 128},
    "coatnet_3": {"depths": (2, 6, 14, 2), "dims": (192, 384, 768, 1536), "stem_dim": 192},
    "coatnet_4": {"depths": (2, 12, 28, 2), "dims": (192, 384, 768, 1536), "stem_dim": 192},
    "coatnet_5": {"depths": (2, 12, 28, 2), "dims": (256, 512, 1280, 2048), "stem_dim": 192, "head_dim": 64},
}
# In these the third stage has convolutions, and attention at twice their width.
_MIXED: dict[str, Any] = {"layout": "C-C-C-T-T", "depths": (2, 4, 8, 42, 2), "strides": (2, 2, 2, 1, 2)}
_SIZES["coatnet_6"] = {**_MIXED, "dims": (192, 384, 768, 1536, 3072), "stem_dim": 192, "head_dim": 128}
_SIZES["coatnet_7"] = {**_MIXED, "dims": (256, 512, 1024, 2048, 3072), "stem_dim": 192, "head_dim": 128}

# What a name adds, for each of three choices; a name alone is timm's network.
_CHOICES: tuple[dict[str, dict[str, Any]], ...] = (
    {"": {}, "_1x1_stride": {"stride_in": "expand"}},
    {"": {}, "_max_pool": {"pool": "max"}},
    {"": {}, "_linear_head": {"hidden_head": False}},
)


def _variants() -> Iterator[tuple[str, Callable[..., Classifier]]]:
    """Every size with every choice, by its name."""
    for name, size in _SIZES.items():
        for chosen in product(*(choice.items() for choice in _CHOICES)):
            added, arguments = zip(*chosen, strict=True)
            yield name + "".join(added), partial(CoAtNet, **size, **dict(ChainMap(*arguments)))


MODELS: dict[str, Callable[..., Classifier]] = {
    **dict(_variants()),
    # the study of layouts
    "coatnet_cccc": partial(CoAtNet, layout="C-C-C-C", depths=(2, 3, 8, 2)),
    "coatnet_ccct": partial(CoAtNet, layout="C-C-C-T", depths=(2, 3, 7, 2)),
    "coatnet_cctt": CoAtNet,
    "coatnet_cttt": partial(CoAtNet, layout="C-T-T-T", depths=(2, 2, 4, 2)),
    "vit_rel": partial(CoAtNet, layout="T", dims=(384,), depths=(12,), strides=(1,), stem_dim=384, patch_size=16),
}
