"""VOLO: outlookers on fine tokens, transformer blocks on coarse ones, class attention at the end, scores of tokens.

B images, C channels, H W pixels, h w coarse tokens, N = h * w.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from glocal.arguments import per_axis, positive
from glocal.models.classifier import (
    Blocks,
    Classifier,
    Stage,
    drop_path_rates,
    linear_or_none,
    per_stage,
    start_linear_maps,
)
from glocal.models.parts import PatchDownsample, PreNormBlock, completed
from glocal.positions import resized_positions
from glocal.spec import build

Box = tuple[int, int, int, int]  # first row, first column, end of the rows, end of the columns


class ConvolutionStem(nn.Module):
    """Three convolutions at half of the pixels, then tokens of p x p pixels: [B, C, H, W] -> [B, H/p, W/p, dim].

    Zeros complete an image that p does not divide.
    """

    def __init__(self, in_chans: int, hidden_dim: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        parts: list[nn.Module] = []
        for chans, kernel, stride in ((in_chans, 7, 2), (hidden_dim, 3, 1), (hidden_dim, 3, 1)):
            parts += [
                nn.Conv2d(chans, hidden_dim, kernel, stride=stride, padding=kernel // 2, bias=False),
                nn.BatchNorm2d(hidden_dim),
                nn.ReLU(inplace=True),
            ]
        self.conv = nn.Sequential(*parts)
        self.proj = nn.Conv2d(hidden_dim, dim, patch_size // 2, stride=patch_size // 2)

    def forward(self, x: Tensor) -> Tensor:
        # in channels_last memory the output is laid out as tokens
        x = completed(x, self.patch_size).contiguous(memory_format=torch.channels_last)
        return self.proj(self.conv(x)).movedim(1, -1)


class PlacedDownsample(PatchDownsample):
    """2 x 2 tokens to one, and where it stands: [B, H, W, dim] -> [B, ceil(H/2), ceil(W/2), out_dim].

    `pos_embed` [1, *grid_size, out_dim] is resized to other grids (bicubic, antialiased).
    """

    def __init__(self, dim: int, out_dim: int, grid_size: tuple[int, int]) -> None:
        super().__init__(dim, out_dim, norm=False)
        self.grid_size = grid_size
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, *grid_size, out_dim), std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        grid = x.shape[1:3]
        return x + resized_positions(self.pos_embed.flatten(1, 2), self.grid_size, grid).unflatten(1, grid)


class ClassBlock(PreNormBlock):
    """Pre-norm block of the class token, which reads all tokens; [B, 1 + N, C] -> the same with another first one."""

    def forward(self, x: Tensor, **call: Any) -> Tensor:
        token = x[:, :1] + self.drop_path1(self.attn(self.norm1(x), **call))
        token = token + self.drop_path2(self.mlp(self.norm2(token)))
        return torch.cat([token, x[:, 1:]], 1)


class ClassBlocks(Blocks):
    """A class token in front of all tokens, and blocks that change it: [B, h, w, C] -> [B, 1 + N, C]."""

    def __init__(self, dim: int, blocks: Iterable[nn.Module]) -> None:
        super().__init__(*blocks)
        self.cls_token = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=0.02))

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
        tokens = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], 1)
        return super().forward(tokens, grid=tuple(x.shape[1:3]))


class VOLO(Classifier):
    """VOLO: images [B, in_chans, H, W] -> scores [B, num_classes] of the class token and of the tokens themselves.

    A score is the class token's and half of the largest that a token has, in training too; `forward_train` gives
    both apart, to train with labels of tokens.

    Args:
        num_classes: number of scores; 0: none, the class token is returned.
        in_chans: channels of an image.
        img_size: pixels a side, or (height, width), that the table of positions is made for.
        patch_size: pixels along a side of a fine token, even; coarse tokens have twice as many.
        stem_dim: channels of the stem's convolutions.
        dims: channels of the outlookers and of the transformer blocks; a model's name fills them in.
        depths: blocks: outlookers, then three groups of transformer blocks.
        num_heads: heads of the outlookers and of the transformer blocks; heads of 32 channels if not given.
        post_depth: blocks of class attention.
        mlp_ratio: hidden width of the MLPs over the channels.
        drop_path_rate: stochastic depth of the last transformer block; it grows linearly from 0 in the first block,
            but outlookers and class attention are never skipped.

    Shape:
        Any H and W: zeros complete the fine tokens of the lower and right border, and those that a coarse one takes
        beyond it; the table of positions is resized to the tokens there are. `forward_features` gives tokens
        [B, 1 + N, C], that of the class first.

    Cost: multiply-adds at 224 pixels 6.92 G (D1), 14.3 G (D2), 20.7 G (D3), 44.3 G (D4), 72.3 G (D5).

    Raises:
        ValueError: other than two dims or heads and four depths, heads that do not divide the channels, an odd patch
            size; at run time, an input that is no batch of images.

    Source: Yuan, Hou, Jiang, Feng, Yan, VOLO: Vision Outlooker for Visual Recognition, arXiv 2106.13112; sizes, and
        that outlookers are never skipped, from the released code (sail-sg/volo, models/volo.py). Scores of tokens and
        mixed tokens as in Jiang et al., All Tokens Matter (LV-ViT), NeurIPS 2021, arXiv 2104.10858.
    Differs from the paper: images of all sizes are defined. Positions are resized with antialiasing, as timm resizes
        ViT's; the released code resizes them without, to fine-tune at a larger size.
    """

    pools = ("token", "avg")
    classifiers = ("head", "aux_head")
    after_stages = ("post_network", "norm", "head", "aux_head")

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 8,
        stem_dim: int = 64,
        dims: Sequence[int] = (192, 384),
        depths: Sequence[int] = (4, 4, 8, 2),
        num_heads: Sequence[int] | None = None,
        post_depth: int = 2,
        mlp_ratio: float = 3,
        drop_path_rate: float = 0,
    ) -> None:
        fine, dim = per_stage("dims", dims, 2)
        depths = per_stage("depths", depths, 4)
        heads = (None, None) if num_heads is None else per_stage("num_heads", num_heads, 2)
        if positive("patch_size", patch_size) % 2:
            raise ValueError(f"patch_size: {patch_size}, must be even: the stem's convolutions halve the image")
        height, width = per_axis("img_size", img_size, 2)
        super().__init__(in_chans=in_chans, num_classes=num_classes, num_features=dim)
        self.patch_embed = ConvolutionStem(in_chans, positive("stem_dim", stem_dim), fine, patch_size)

        def outlooker() -> nn.Module:
            return PreNormBlock(
                fine, build("OutlookAttention(stride=2)", fine, num_heads=heads[0]), mlp_ratio=mlp_ratio
            )

        def transformer(drop_path: float) -> nn.Module:
            attention = build("SelfAttention(qkv_bias=False)", dim, num_heads=heads[1])
            return PreNormBlock(dim, attention, mlp_ratio=mlp_ratio, drop_path=drop_path)

        def class_block() -> nn.Module:
            attention = build("ClassAttention(qkv_bias=False)", dim, num_heads=heads[1])
            return ClassBlock(dim, attention, mlp_ratio=mlp_ratio)

        rates = list(drop_path_rates(drop_path_rate, depths))
        groups = [[transformer(rates[sum(depths[:i]) + j]) for j in range(depths[i])] for i in (1, 2, 3)]
        side = 2 * patch_size
        placed = PlacedDownsample(fine, dim, (-(-height // side), -(-width // side)))
        self.network = nn.ModuleList(
            [
                Blocks(*(outlooker() for _ in range(depths[0]))),
                Stage(placed, groups[0]),
                *(Blocks(*g) for g in groups[1:]),
            ]
        )
        for i in range(4):
            info = {"num_chs": dim if i else fine, "reduction": side if i else patch_size, "module": f"network.{i}"}
            self.feature_info.append(info)
        self.post_network = ClassBlocks(dim, [class_block() for _ in range(positive("post_depth", post_depth))])
        self.norm = nn.LayerNorm(dim)
        self.head = linear_or_none(dim, num_classes)
        self.aux_head = linear_or_none(dim, num_classes)
        start_linear_maps(self)

    def stem(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    def stages(self) -> Sequence[nn.Module]:
        return list(self.network)

    def finish(self, x: Tensor) -> Tensor:
        return self.norm(self.post_network(x))

    def pool(self, x: Tensor) -> Tensor:
        return x[:, 0] if self.global_pool == "token" else x.mean(1)  # as timm: over the class token too

    def map_of(self, x: Tensor, image: Tensor) -> Tensor:
        """Tokens as a map; of those that class attention has seen, without that of the class."""
        if x.dim() == 4:
            return x
        side = 2 * self.patch_embed.patch_size
        return x[:, 1:].unflatten(1, tuple((n + side - 1) // side for n in image.shape[2:]))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Scores of `forward_features`; with pre_logits what `pool` gives, [B, num_features]."""
        scores = super().forward_head(x, pre_logits)
        if pre_logits or not self.num_classes:
            return scores
        return scores + 0.5 * self.aux_head(x[:, 1:]).max(1).values

    def forward_train(self, x: Tensor, box: Box | None = None) -> tuple[Tensor, Tensor, Box]:
        """What training with labels of tokens takes: images [B, in_chans, H, W] -> class scores, token scores, box.

        Inside the box every image has the tokens of another one, that as far from the end of the batch as it is from
        the start. Token scores [B, N, num_classes] are back with the image that they are of. Class scores
        [B, num_classes] are of both: their target is that of the image, and for a share of the box' area over N that
        of the other.

        Args:
            x: images.
            box: of coarse tokens, (first row, first column, row behind the last, column behind the last); None: drawn
                in training, of an area that is uniform between none and all but for what lies outside; in evaluation
                empty.

        Raises:
            ValueError: a box that is none, or that does not lie on the tokens; no batch of images.
        """
        x = self.stem(self._images(x))
        h, w = ((n + 1) // 2 for n in x.shape[1:3])
        if box is None:
            box = drawn_box(h, w) if self.training else (0, 0, 0, 0)
        if len(box) != 4 or not all(isinstance(n, int) for n in box):
            raise ValueError(f"box: {box}, must be four whole numbers: first row, first column, end, end")
        top, left, bottom, right = box
        if not (0 <= top <= bottom <= h and 0 <= left <= right <= w):
            raise ValueError(f"box: {box}, must be (first row, first column, end, end) on {h} x {w} tokens")
        x = mixed(x, (2 * top, 2 * left, 2 * bottom, 2 * right))
        for stage in self.stages():
            x = self._through(stage, x, {})
        x = self.finish(x)
        tokens = self.aux_head(x[:, 1:]).unflatten(1, (h, w))
        return self.head(self.pool(x)), mixed(tokens, box).flatten(1, 2), box

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone: positions and class token, besides vectors."""
        return super().no_weight_decay() | {"network.1.downsample.pos_embed", "post_network.cls_token"}


def mixed(x: Tensor, box: Box) -> Tensor:
    """[B, h, w, C] with what the batch in reverse has inside the box; twice is the batch itself."""
    top, left, bottom, right = box
    out = x.clone()
    out[:, top:bottom, left:right] = x.flip(0)[:, top:bottom, left:right]
    return out


def drawn_box(h: int, w: int) -> Box:
    """A random box on h x w tokens, cut where it lies outside; draws as timm does."""
    share = torch.distributions.Beta(torch.ones(()), torch.ones(())).sample()
    side = (1 - share).sqrt()
    row, column = (int(torch.randint(n, (1,))) for n in (h, w))
    height, width = int(h * side), int(w * side)
    top, left = max(row - height // 2, 0), max(column - width // 2, 0)
    return top, left, min(row + (height + 1) // 2, h), min(column + (width + 1) // 2, w)


MODELS: dict[str, Callable[..., Classifier]] = {
    "volo_d1": VOLO,
    "volo_d2": partial(VOLO, dims=(256, 512), depths=(6, 4, 10, 4)),
    "volo_d3": partial(VOLO, dims=(256, 512), depths=(8, 8, 16, 4)),
    "volo_d4": partial(VOLO, dims=(384, 768), depths=(8, 8, 16, 4), num_heads=(12, 16)),
    "volo_d5": partial(VOLO, stem_dim=128, dims=(384, 768), depths=(12, 12, 20, 4), num_heads=(12, 16), mlp_ratio=4),
}
