"""Blocks: what a stage of a network is made of. Tokens in, tokens out, channels last.

B images, *S the grid (H W or T), C channels. `valid`, bool [B, *S], is True at real tokens: of each image a prefix of
every axis. Real tokens get what they would get without the padding, those of a smaller grid too (`strided`).
"""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from glocal.folding import can_join, gated_map, normed_map, unwatched
from glocal.spec import build


class Pool(nn.Module):
    """Strided pooling of tokens: [B, *S, C] -> [B, *ceil(S / stride), C].

    Windows are stride wide and do not overlap; one that hangs over the border pools the tokens it has, so an odd
    grid loses nothing and every grid, 1 x 1 included, gives the size that a convolution with this stride gives.

    Args:
        stride: Tokens a side of a window.
        kind: "max" or "avg".
    """

    def __init__(self, stride: int, kind: Literal["max", "avg"] = "max"):
        super().__init__()
        if kind not in ("max", "avg"):
            raise ValueError(f"pool is {kind!r}; it must be 'max' or 'avg'")
        if stride < 1:
            raise ValueError(f"stride is {stride}; it must be at least 1")
        self.stride = stride
        self.kind = kind

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Pool [B, H, W, C] or [B, T, C]; a window pools its real tokens."""
        if self.stride == 1:
            return x
        if x.ndim == 3:
            return self._image(x[:, None], None if valid is None else valid[:, None], (1, self.stride))[:, 0]
        return self._image(x, valid, (self.stride, self.stride))

    def _image(self, x: torch.Tensor, valid: torch.Tensor | None, window: tuple[int, int]) -> torch.Tensor:
        """Pool [B, H, W, C] in windows of this size; one without a real token gives 0."""
        if valid is None:
            return self._pool(x, window)
        real = valid[..., None]
        if self.kind == "max":
            some = self._pool(real.to(x.dtype), window)
            return self._pool(x.masked_fill(~real, torch.finfo(x.dtype).min), window) * some
        share = F.avg_pool2d(real.to(x.dtype).movedim(-1, 1), window, ceil_mode=True, count_include_pad=False)
        return self._pool(x.masked_fill(~real, 0), window) / share.movedim(1, -1).clamp(min=1e-6)

    def _pool(self, x: torch.Tensor, window: tuple[int, int]) -> torch.Tensor:
        x = x.movedim(-1, 1)  # a channels_last view, no copy
        if self.kind == "max":
            x = F.max_pool2d(x, window, ceil_mode=True)
        else:
            x = F.avg_pool2d(x, window, ceil_mode=True, count_include_pad=False)
        return x.movedim(1, -1)

    def extra_repr(self) -> str:
        return f"stride={self.stride}, kind={self.kind!r}"


class Shortcut(nn.Module):
    """The skip path where a block changes its grid or width: Proj(Pool(x)), Proj a linear map.

    The projection is left out where the width stays (as in timm). [B, *S, C] -> [B, *ceil(S / stride), out_dim].
    """

    def __init__(self, dim: int, out_dim: int, stride: int, pool: Literal["max", "avg"] = "max", bias: bool = True):
        super().__init__()
        self.pool = Pool(stride, pool)
        self.expand = nn.Linear(dim, out_dim, bias=bias) if dim != out_dim else nn.Identity()

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        return self.expand(self.pool(x, valid))


class DropPath(nn.Module):
    """Stochastic depth: in training a sample's branch is left out with probability `rate`, else divided by 1 - rate.

    The mean over draws is the branch itself. In evaluation, and at rate 0, nothing changes. Has no state.

    Shape: [B, ...] -> [B, ...]; one draw for each of the B samples.

    Raises:
        ValueError: A rate outside 0 <= rate < 1.

    Source: Huang, Sun, Liu, Sedra, Weinberger, "Deep Networks with Stochastic Depth", ECCV 2016, arXiv 1603.09382,
        equation 2. Differs from the paper: one draw a sample, not one a batch, and the scale is applied in training.
    """

    def __init__(self, rate: float):
        super().__init__()
        if not 0 <= rate < 1:
            raise ValueError(f"drop_path is {rate}; it must be at least 0 and less than 1")
        self.rate = rate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.training or self.rate == 0:
            return x
        kept = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
        return x * (kept / (1 - self.rate))

    def extra_repr(self) -> str:
        return f"rate={self.rate}"


class LayerScale(nn.Module):
    """A learned factor for each channel of a branch, `gamma` [C], that starts small: [..., C] -> [..., C].

    Source: Touvron, Cord, Sablayrolles, Synnaeve, Jegou, "Going Deeper with Image Transformers" (CaiT), ICCV 2021,
        arXiv 2103.17239, equation 4.
    """

    def __init__(self, dim: int, init: float):
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), float(init)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.gamma


class Mlp(nn.Module):
    """Two linear maps with GELU between, on every token by itself: [..., C] -> [..., C].

    Cost: 2 * dim * hidden_dim multiply-adds a token.
    """

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.act = nn.GELU()
        self.fc2 = nn.Linear(hidden_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    """Pre-norm block around any token mixer: x + Mixer(Norm(x)), then x + MLP(Norm(x)).

    With a stride or another width, the first line follows CoAtNet: Proj(Pool(x)) + Mixer(Pool(Norm(x))). A mixer
    that cannot change the width is built at `out_dim`; then a linear map `expand` stands before it:
    Proj(Pool(x)) + Mixer(Expand(Pool(Norm(x)))).

    Args:
        dim: Width of the tokens that come in.
        mixer: A built module [B, *S', mixer_dim] -> [B, *S', out_dim] that keeps the grid.
        out_dim: Width of the tokens that go out; `dim` if not given.
        stride: The pooling's stride on every axis; the grid shrinks to ceil(S / stride).
        mixer_dim: Width that the mixer takes: `dim` (it widens by itself) or `out_dim`. Default `dim`.
        mlp_ratio: Hidden width of the MLP over `out_dim`.
        pool: "max" (CoAtNet) or "avg" (timm's CoAtNet).
        drop_path: Rate of `DropPath` in both branches.
        layer_scale: Initial value of `LayerScale` in both branches; None: there is none.
        skip: False leaves out both skip paths, the pooling and widening one too: Mixer(Norm(x)), then MLP(Norm(x)).
            No branch is dropped then, since nothing would be left.
        mlp: False leaves out the second half, with its norm.
        bias: False: the shortcut has none.

    Shape: [B, *S, dim] -> [B, *ceil(S / stride), out_dim]; S = (T,) or (H, W).

    Raises:
        ValueError: A mixer_dim that is neither width; at run time, a mixer that changes the grid or the width.

    Source: Dai, Liu, Le, Tan, "CoAtNet: Marrying Convolution and Attention for All Data Sizes", NeurIPS 2021,
        arXiv 2106.04803, appendix A.1 (pre-norm transformer block, LN eps 1e-5, GELU).
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        out_dim: int | None = None,
        stride: int = 1,
        mixer_dim: int | None = None,
        mlp_ratio: float = 4,
        pool: Literal["max", "avg"] = "max",
        drop_path: float = 0,
        layer_scale: float | None = None,
        skip: bool = True,
        mlp: bool = True,
        bias: bool = True,
    ):
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        mixer_dim = dim if mixer_dim is None else mixer_dim
        if mixer_dim not in (dim, out_dim):
            raise ValueError(f"mixer_dim is {mixer_dim}; it must be dim ({dim}) or out_dim ({out_dim})")
        self.out_dim = out_dim
        self.stride = stride
        self.shortcut = _shortcut(dim, out_dim, stride, pool, bias) if skip else None
        self.norm1: nn.Module = nn.LayerNorm(dim)
        self.pool = Pool(stride, pool) if stride != 1 else nn.Identity()
        self.expand = nn.Linear(dim, mixer_dim) if mixer_dim != dim else nn.Identity()
        self.mixer = mixer
        self.ls1 = _layer_scale(out_dim, layer_scale)
        self.drop_path1 = _drop_path(drop_path, skip)
        self.norm2: nn.Module | None = nn.LayerNorm(out_dim) if mlp else None
        self.mlp = Mlp(out_dim, round(out_dim * mlp_ratio)) if mlp else None
        self.ls2 = _layer_scale(out_dim, layer_scale if mlp else None)
        self.drop_path2 = _drop_path(drop_path, skip)

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """Tokens [B, *S, dim]; `valid` [B, *S] is about them, and the mixer is told which of its own are real."""
        skip = _skip(self.shortcut, x, valid)
        inner = self.norm1(x)
        inner = self.expand(inner if self.stride == 1 else self.pool(inner, valid))
        mixed = self.mixer(inner) if valid is None else self.mixer(inner, valid=strided(valid, self.stride))
        needed = (*inner.shape[:-1], self.out_dim)
        if mixed.shape != needed:  # addition would broadcast a wrong grid of 1 x 1 in silence
            raise ValueError(
                f"the mixer {type(self.mixer).__name__} gave {tuple(mixed.shape)} where the block needs "
                f"{needed}; inside a block a mixer keeps the grid: give the stride to the block"
            )
        x = _joined(skip, self.drop_path1(self.ls1(mixed)))
        if self.mlp is None or self.norm2 is None:
            return x
        return _joined(None if skip is None else x, self.drop_path2(self.ls2(self.mlp(self.norm2(x)))))


class SqueezeExcite(nn.Module):
    """Channel gate: x * sigmoid(fc2(SiLU(fc1(mean of x over the grid)))), both maps with bias; or ReLU for SiLU.

    Shape: [B, C, H, W] -> [B, C, H, W].

    Source: Hu, Shen, Sun, "Squeeze-and-Excitation Networks", CVPR 2018, arXiv 1709.01507; SiLU as in EfficientNet.
    """

    def __init__(self, dim: int, hidden_dim: int, activation: Literal["silu", "relu"] = "silu"):
        super().__init__()
        self.fc1 = nn.Conv2d(dim, hidden_dim, 1)
        self.act = nn.SiLU() if activation == "silu" else nn.ReLU()
        self.fc2 = nn.Conv2d(hidden_dim, dim, 1)

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        return x * self.gate(x, valid)

    def gate(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        """What every channel is multiplied with, [B, C, 1, 1]."""
        # of tokens, whose gradient is laid out as that of the maps around: a mean over planes would mix two layouts
        gate = mean_of(x.movedim(1, -1), valid)[:, :, None, None]
        return self.fc2(self.act(self.fc1(gate))).sigmoid()


class MBConv(nn.Module):
    """CoAtNet's inverted bottleneck: BN, 1x1 widen, BN, GELU, depthwise, BN, GELU, squeeze-excite, 1x1 back.

    Nothing but the last 1x1 and the shortcut has a bias; no activation follows the pre-norm and no norm the last
    1x1. The widened width and the squeeze width count from `out_dim`, in the widening first block of a stage too.
    Parameters carry timm's names (`MbConvBlock`).

    Args:
        dim: Width of the tokens that come in.
        out_dim: Width of the tokens that go out; `dim` if not given.
        stride: The grid shrinks to ceil(S / stride); the shortcut pools.
        expand_ratio: Inner width over `out_dim`.
        se_ratio: Squeeze width over `out_dim`.
        kernel_size: Of the depthwise convolution; odd.
        stride_in: Which convolution strides: "expand" is the paper's (first 1x1, "it drops three of four
            tokens"), "depthwise" is timm's and the paper's table 9; "pool": none, means of tokens do, before them.
        pool: The shortcut's pooling, "max" (paper) or "avg" (timm).
        drop_path: Rate of `DropPath` in the branch.
        layer_scale: Initial value of `LayerScale` in the branch; None: there is none.
        skip: False leaves out the skip path, the pooling and widening one too, and with it `drop_path`.
        rank: 2 for images, 1 for sequences.
        activation: "gelu" (paper) or "silu".
        pre_activation: True: it follows the pre-norm, too.
        inner_dim: Inner width itself, in place of expand_ratio.
        se_dim: Squeeze width itself, in place of se_ratio.
        se_activation: "silu" or "relu".
        se_early: True: squeeze-excite stands right behind the depthwise convolution.
        bias: False: the last 1x1 and the shortcut have none.

    Shape: [B, *S, dim] -> [B, *ceil(S / stride), out_dim]; S = (H, W), or (T,) with rank 1.

    Source: Dai, Liu, Le, Tan, "CoAtNet", NeurIPS 2021, arXiv 2106.04803, section 2 and appendix A.1; the authors'
        operator code in google-research/maxvit. BN eps 1e-3 as there; its momentum, 0.99 there (0.01 in
        PyTorch's sense), is 0.1 here: in a run of a hundred steps the statistics would be those of the first weights.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int | None = None,
        *,
        stride: int = 1,
        expand_ratio: float = 4,
        se_ratio: float = 0.25,
        kernel_size: int = 3,
        stride_in: Literal["expand", "depthwise", "pool"] = "expand",
        pool: Literal["max", "avg"] = "max",
        drop_path: float = 0,
        layer_scale: float | None = None,
        skip: bool = True,
        rank: int = 2,
        activation: Literal["gelu", "silu"] = "gelu",
        pre_activation: bool = False,
        inner_dim: int | None = None,
        se_dim: int | None = None,
        se_activation: Literal["silu", "relu"] = "silu",
        se_early: bool = False,
        bias: bool = True,
    ):
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        if stride_in not in ("expand", "depthwise", "pool"):
            raise ValueError(f"stride_in is {stride_in!r}; it must be 'expand', 'depthwise' or 'pool'")
        if activation not in ("gelu", "silu"):
            raise ValueError(f"activation is {activation!r}; it must be 'gelu' or 'silu'")
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size is {kernel_size}; it must be odd, so that a token has a centre")
        inner = round(out_dim * expand_ratio) if inner_dim is None else inner_dim
        before, first, second = (stride if stride_in == place else 1 for place in ("pool", "expand", "depthwise"))
        self.out_dim = out_dim
        self.stride, self._strides = stride, (first, second)
        self.rank = rank
        self.act = nn.GELU() if activation == "gelu" else nn.SiLU()
        self.pre_activation = pre_activation
        self.shortcut = _shortcut(dim, out_dim, stride, pool, bias) if skip else None
        self.pre_norm = _batch_norm(dim)
        self.down = Pool(before, "avg") if before > 1 else None
        self.conv1_1x1 = nn.Conv2d(dim, inner, 1, stride=first, bias=False)
        self.norm1 = _batch_norm(inner)
        # A token mixer of ours, so that `inspect` shows what a convolution block reads.
        self.conv2_kxk = build("DepthwiseConv", inner, kernel_size=kernel_size, stride=second, bias=False, rank=rank)
        squeeze = SqueezeExcite(inner, max(1, int(out_dim * se_ratio)) if se_dim is None else se_dim, se_activation)
        self.se_early = squeeze if se_early else None
        self.norm2 = _batch_norm(inner)
        self.se = None if se_early else squeeze
        self.conv3_1x1 = nn.Conv2d(inner, out_dim, 1, bias=bias)
        self.ls = _layer_scale(out_dim, layer_scale)
        self.drop_path = _drop_path(drop_path, skip)

    def forward(self, x: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
        if x.ndim != self.rank + 2:
            raise ValueError(f"MBConv: x has shape {tuple(x.shape)}; a block of rank {self.rank} takes [B, *S, C]")
        skip = _skip(self.shortcut, x, valid)
        x, valid = self._expanded(x, valid)
        x = _planes(self.conv2_kxk(self.act(x), valid=valid))
        valid = strided(valid, self._strides[1])
        real = None if valid is None else valid.view(len(x), *x.shape[2:])
        x = x if self.se_early is None else self.se_early(x, real)
        x = self._projected(self.act(normed(self.norm2, x, valid)), real)
        return _joined(skip, self.drop_path(self.ls(x)))

    def _expanded(self, x: torch.Tensor, valid: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Tokens of the inner width before their activation, and which of them are real."""
        joined = valid is None and self.down is None and not self.pre_activation
        if joined and can_join(self.pre_norm, self.conv1_1x1, self.norm1, x):
            return normed_map(self.pre_norm, self.conv1_1x1, self.norm1, x), None
        x = normed(self.pre_norm, _planes(x), valid)
        x = self.act(x) if self.pre_activation else x
        if self.down is not None:
            x, valid = _planes(self.down(_tokens(x, self.rank), valid)), strided(valid, self.down.stride)
        valid = strided(valid, self._strides[0])
        return _tokens(normed(self.norm1, self.conv1_1x1(x), valid), self.rank), valid

    def _projected(self, x: torch.Tensor, real: torch.Tensor | None) -> torch.Tensor:
        """[B, inner, H, W], gated where the gate stands here -> tokens of the width that goes out."""
        if self.se is None:
            return _tokens(self.conv3_1x1(x), self.rank)
        # weights of every image's own pay where they are smaller than its tokens
        many = not torch.compiler.is_compiling() and math.prod(x.shape[2:]) >= self.out_dim
        plain = type(self.conv3_1x1) is nn.Conv2d and type(self.se) is SqueezeExcite
        if many and plain and unwatched(self.se, self.conv3_1x1):
            return gated_map(self.conv3_1x1, _tokens(x, self.rank), self.se.gate(x, real)[..., 0, 0])
        return _tokens(self.conv3_1x1(self.se(x, real)), self.rank)


def strided(valid: torch.Tensor | None, stride: int) -> torch.Tensor | None:
    """Which tokens are real after a stride: [B, *S] -> [B, *ceil(S / stride)]."""
    if valid is None:
        return None
    return valid[(slice(None), *(slice(None, None, stride),) * (valid.ndim - 1))].contiguous()


def normed(norm: nn.Module, x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """Batch norm of [B, C, H, W]; in training the statistics are those of real tokens, and padding comes out 0."""
    if valid is None or not norm.training:
        return norm(x)
    valid = valid.view(len(x), *x.shape[2:])
    tokens = x.movedim(1, -1)
    real = norm(tokens[valid][..., None, None])[..., 0, 0]
    return torch.zeros_like(tokens, dtype=real.dtype).index_put((valid,), real).movedim(-1, 1)


def mean_of(x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor:
    """The mean over the real tokens of [B, *S, C]: [B, C]; 0 where there is none."""
    x = x.flatten(1, -2)
    if valid is None:
        return x.mean(1)
    real = valid.flatten(1)[..., None]
    return x.masked_fill(~real, 0).sum(1) / real.sum(1).clamp(min=1)


def _skip(shortcut: nn.Module | None, x: torch.Tensor, valid: torch.Tensor | None) -> torch.Tensor | None:
    if shortcut is None:
        return None
    return shortcut(x, valid) if isinstance(shortcut, Shortcut) else shortcut(x)


def _planes(x: torch.Tensor) -> torch.Tensor:
    """[B, *S, C] -> [B, C, H, W], H = 1 for sequences: a channels_last view, which cuDNN and oneDNN take as it is."""
    return (x[:, None] if x.ndim == 3 else x).movedim(-1, 1)


def _tokens(x: torch.Tensor, rank: int) -> torch.Tensor:
    """[B, C, H, W] -> [B, *S, C], a view."""
    x = x.movedim(1, -1)
    return x[:, 0] if rank == 1 else x


def _joined(skip: torch.Tensor | None, branch: torch.Tensor) -> torch.Tensor:
    return branch if skip is None else skip + branch


def _shortcut(dim: int, out_dim: int, stride: int, pool: Literal["max", "avg"], bias: bool = True) -> nn.Module:
    return Shortcut(dim, out_dim, stride, pool, bias) if stride != 1 or dim != out_dim else nn.Identity()


def _layer_scale(dim: int, init: float | None) -> nn.Module:
    return nn.Identity() if init is None else LayerScale(dim, init)


def _drop_path(rate: float, skip: bool) -> nn.Module:
    """Without a skip path nothing would be left of a sample whose branch is dropped."""
    drop = DropPath(rate)
    return drop if skip and rate > 0 else nn.Identity()


def _batch_norm(dim: int) -> nn.BatchNorm2d:
    return nn.BatchNorm2d(dim, eps=1e-3, momentum=0.1)
