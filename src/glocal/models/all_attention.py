"""The all-attention model: tokens of 2 x 2 pixels and layers of attention to places, no convolution.

B images, C channels, H W pixels, h w tokens, p pixels along a side of a token, D channels of a token.
"""

from collections.abc import Sequence
from functools import partial

from torch import Tensor, nn

from glocal.arguments import per_axis, positive, rate
from glocal.blocks import DropPath, Mlp
from glocal.models.classifier import Classifier, drop_path_rates, linear_or_none, mlp_width
from glocal.spec import build


class SpaceToDepth(nn.Module):
    """The p x p pixels of a token side by side, and a linear map: [B, C, H, W] -> [B, ceil(H/p), ceil(W/p), dim].

    A token holds (row, column, channel) of its pixels, the channel counting fastest. What the last row and column of
    tokens lack of an image that p does not divide is zero.
    """

    def __init__(self, in_chans: int, dim: int, patch_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.proj = nn.Linear(in_chans * patch_size**2, dim)

    def forward(self, x: Tensor) -> Tensor:
        p = self.patch_size
        h, w = ((n + p - 1) // p for n in x.shape[2:])  # said in sizes that torch.export can follow
        x = nn.functional.pad(x, (0, w * p - x.shape[3], 0, h * p - x.shape[2]))
        x = x.unflatten(3, (w, p)).unflatten(2, (h, p))  # [B, C, h, p, w, p]
        return self.proj(x.permute(0, 2, 4, 3, 5, 1).flatten(3))


class PostNormBlock(nn.Module):
    """Post-norm block: Norm(x + Drop(Proj(Attn(x)))), then Norm(x + Drop(MLP(x))).

    Args:
        dim: channels of a token.
        attn: a mixer [B, *S, dim] -> [B, *S, dim].
        mlp_ratio: hidden width of the MLP over dim.
        drop: dropout of both branches.
        drop_path: probability that both are skipped for an image in training.

    Shape: [B, *S, dim] -> [B, *S, dim].

    Source: Devlin et al., BERT, NAACL 2019, arXiv 1810.04805: LN with eps 1e-12, exact GELU.
    """

    def __init__(self, dim: int, attn: nn.Module, *, mlp_ratio: float, drop: float = 0, drop_path: float = 0) -> None:
        super().__init__()
        self.attn = attn
        self.proj = nn.Linear(dim, dim)
        self.norm1 = nn.LayerNorm(dim, eps=1e-12)
        self.mlp = Mlp(dim, round(dim * mlp_ratio))
        self.norm2 = nn.LayerNorm(dim, eps=1e-12)
        self.drop = nn.Dropout(drop)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm1(x + self.drop_path(self.drop(self.proj(self.attn(x)))))
        return self.norm2(x + self.drop_path(self.drop(self.mlp(x))))


class AllAttention(Classifier):
    """The all-attention network: images [B, in_chans, H, W] -> scores [B, num_classes] by attention to places alone.

    Nothing but the mixer knows where a token stands; the head takes the mean over all tokens.

    Args:
        mixer: spec of the mixer of every layer, such as "QuadraticAttention"; a model's name fills it in.
        num_classes: number of scores; 0: none, the mean over all tokens instead.
        in_chans: channels of an image.
        img_size: pixels a side, or (height, width), that tables of learned offsets are made for; the quadratic
            mixers have none.
        patch_size: pixels along a side of a token.
        dim: channels of a token.
        depth: layers.
        num_heads: heads of a layer, each of which sees all channels.
        mlp_ratio: hidden width of the MLPs over dim; 1.28 makes 512 of 400.
        drop_rate: dropout after the attention and after the MLP of a layer.
        drop_path_rate: stochastic depth of the last layer; it grows linearly from 0 in the first.

    Shape:
        Any H and W: zeros complete the tokens of the lower and right border. Quadratic mixers have no size of their
        own; in a larger image than `img_size` the learned ones take offsets beyond their tables for the last in them.

    Cost: for each of `depth` layers of N tokens N*dim*(dim*(num_heads + 1) + 2*hidden) multiply-adds beside what
    mixing takes: num_heads*dim*N*N, or for mixers whose weights are a product over the axes num_heads*dim*N*(h + w),
    which are linear in N in memory, too. With 32 x 32 pixels and isotropic heads 4,503,556,000 by the definition.

    Raises:
        ValueError: sizes below 1, a rate outside 0 <= rate < 1; at run time, an input that is no batch of images.

    Source: Cordonnier, Loukas, Jaggi, On the Relationship between Self-Attention and Convolutional Layers, ICLR 2020,
    arXiv 1911.03584, section 4; sizes from the released code (epfml/attention-cnn, runs/ and models/).
    Differs from the paper: no dropout on the attention weights, which the released training has at 0.1: one mask for
    all images, which no product over the axes can hold. Any grid; the released code ends at 50 x 50 tokens, 16 x 16
    with learned offsets.
    """

    after_stages = ("head",)

    def __init__(
        self,
        mixer: str,
        /,
        *,
        num_classes: int = 10,
        in_chans: int = 3,
        img_size: int | Sequence[int] = 32,
        patch_size: int = 2,
        dim: int = 400,
        depth: int = 6,
        num_heads: int = 9,
        mlp_ratio: float = 1.28,
        drop_rate: float = 0.1,
        drop_path_rate: float = 0,
    ) -> None:
        super().__init__(in_chans=in_chans, num_classes=num_classes, num_features=positive("dim", dim))
        mlp_width(dim, mlp_ratio)
        rate("drop_rate", drop_rate)
        grid = tuple(-(-n // positive("patch_size", patch_size)) for n in per_axis("img_size", img_size, 2))
        self.patch_embed = SpaceToDepth(in_chans, dim, patch_size)
        self.blocks = nn.ModuleList(
            PostNormBlock(
                dim,
                build(mixer, dim, num_heads=num_heads, grid_size=grid, clip_offsets=True),
                mlp_ratio=mlp_ratio,
                drop=drop_rate,
                drop_path=drop_path,
            )
            for drop_path in drop_path_rates(drop_path_rate, [positive("depth", depth)])
        )
        for i in range(depth):
            self.feature_info.append({"num_chs": dim, "reduction": patch_size, "module": f"blocks.{i}"})
        self.head = linear_or_none(dim, num_classes)

    def stem(self, x: Tensor) -> Tensor:
        return self.patch_embed(x)

    def stages(self) -> Sequence[nn.Module]:
        return list(self.blocks)


# The names are those of the mixers; the runs of the released code call the second one "quadratic-generalized".
MODELS = {
    "all_attention_quadratic": partial(AllAttention, "QuadraticAttention"),
    "all_attention_generalized": partial(AllAttention, "GeneralizedQuadraticAttention"),
    "all_attention_learned": partial(AllAttention, "LearnedRelativeAttention"),
    # the released layer has biases of keys, which change nothing but the number of parameters
    "all_attention_learned_content": partial(AllAttention, "LearnedRelativeAttention(content=True, key_bias=True)"),
}
