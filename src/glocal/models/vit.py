"""ViT: the patches of an image as tokens, a class token in front of them, blocks of self-attention.

B images, C channels, H W pixels, h w patches, N = h * w, p pixels along a side of a patch.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from glocal.arguments import one_of, per_axis, positive
from glocal.models.classifier import Classifier, drop_path_rates, linear_or_none, start_linear_maps
from glocal.models.parts import PatchEmbed, PreNormBlock
from glocal.positions import resized_positions
from glocal.spec import build


class ViT(Classifier):
    """The Vision Transformer: images [B, in_chans, H, W] -> scores [B, num_classes].

    Args:
        num_classes: number of scores; 0: none, the pooled tokens are returned.
        in_chans: channels of an image.
        img_size: pixels a side, or (height, width), that the table of positions is made for.
        patch_size: pixels along a side of a patch.
        dim: channels of a token; the name's own.
        depth: blocks.
        num_heads: heads of a block.
        mlp_ratio: hidden width of the MLPs over dim.
        global_pool: what the head takes: "token", the class token, as in the paper, or "avg", the mean over the
            patches, the norm behind it, as in MAE.
        drop_path_rate: stochastic depth of the last block; it grows linearly from 0 in the first.

    Shape:
        Any H and W: zeros complete the patches of the lower and right border, and the table of positions is resized
        to the patches there are (bicubic, antialiased). `forward_features` gives tokens [B, 1 + h*w, dim], that of
        the class first.

    Cost: N * dim * in_chans * p^2 for the patches, then for each block, with M = N + 1 tokens,
        M * dim * (4 + 2 * mlp_ratio) * dim + 2 * M * M * dim multiply-adds.

    Raises:
        ValueError: sizes below 1, heads that do not divide the channels, a rate outside 0 <= rate < 1; at run time,
            an input that is no batch of images.

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words, ICLR 2021, arXiv 2010.11929; eps of the norms and the
        first values as in the released code and timm. The small model is that of Touvron et al., DeiT, ICML 2021,
        arXiv 2012.12877, without its second token. "avg" as in He et al., MAE, CVPR 2022, arXiv 2111.06377.
    Differs from the paper: no dropout. The first values of the head are small, not zero. Positions are resized as in
        timm; the released code resizes them linearly.
    """

    pools = ("token", "avg")
    after_stages = ("norm", "fc_norm", "head")

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 224,
        patch_size: int = 16,
        dim: int,
        depth: int = 12,
        num_heads: int,
        mlp_ratio: float = 4,
        global_pool: str = "token",
        drop_path_rate: float = 0,
    ) -> None:
        super().__init__(in_chans=in_chans, num_classes=num_classes, num_features=dim)
        self.global_pool = one_of("global_pool", global_pool, self.pools)
        self.patch_embed = PatchEmbed(in_chans, dim, positive("patch_size", patch_size), norm=False)
        self.grid_size = self._grid(per_axis("img_size", img_size, 2))
        places = 1 + self.grid_size[0] * self.grid_size[1]
        self.cls_token = nn.Parameter(nn.init.normal_(torch.empty(1, 1, dim), std=1e-6))
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(torch.empty(1, places, dim), std=0.02))
        rates = drop_path_rates(drop_path_rate, (positive("depth", depth),))
        self.blocks = nn.ModuleList(
            PreNormBlock(
                dim, build("SelfAttention", dim, num_heads=num_heads), mlp_ratio=mlp_ratio, drop_path=rate, eps=1e-6
            )
            for rate in rates
        )
        self.feature_info.extend(
            {"num_chs": dim, "reduction": patch_size, "module": f"blocks.{i}"} for i in range(depth)
        )
        self.norm = nn.LayerNorm(dim, eps=1e-6) if global_pool == "token" else nn.Identity()
        self.fc_norm = nn.LayerNorm(dim, eps=1e-6) if global_pool == "avg" else nn.Identity()
        self.head = linear_or_none(dim, num_classes)
        start_linear_maps(self)

    def stem(self, x: Tensor) -> Tensor:
        x = self.patch_embed(x)
        positions = resized_positions(self.pos_embed, self.grid_size, x.shape[1:3], num_prefix=1)
        return torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x.flatten(1, 2)], 1) + positions

    def stages(self) -> Sequence[nn.Module]:
        return list(self.blocks)

    def needed(self, image: Tensor) -> dict[str, Any]:
        return {"grid": self._grid(image.shape[2:])}

    def finish(self, x: Tensor) -> Tensor:
        return self.norm(x)

    def pool(self, x: Tensor) -> Tensor:
        return self.fc_norm(x[:, 0] if self.global_pool == "token" else x[:, 1:].mean(1))

    def map_of(self, x: Tensor, image: Tensor) -> Tensor:
        return x[:, 1:].unflatten(1, self._grid(image.shape[2:]))

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters that weight decay leaves alone: positions and class token, besides vectors."""
        return super().no_weight_decay() | {"pos_embed", "cls_token"}

    def _grid(self, size: Sequence[int]) -> tuple[int, int]:
        """Rows and columns of patches of an image (height, width)."""
        p = self.patch_embed.patch_size
        return (size[0] + p - 1) // p, (size[1] + p - 1) // p  # said in sizes that torch.export can follow


MODELS = {
    "vit_tiny": partial(ViT, dim=192, num_heads=3),
    "vit_small": partial(ViT, dim=384, num_heads=6),
    "vit_base": partial(ViT, dim=768, num_heads=12),
    "vit_large": partial(ViT, dim=1024, depth=24, num_heads=16),
}
