"""Deformable convolution: every tap of the kernel moves to where the image says."""

import importlib
import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import flag, odd_kernel, positive
from glocal.mixer import TokenMixer, Unsupported
from glocal.mixers._grid import centre_padding
from glocal.mixers._library import back, conv, images, out_lengths


class DeformableConv(TokenMixer):
    """Deformable convolution: a convolution whose taps are moved, and weighted, by what a second one predicts.

    Weights: [B, O*K, N, 4], one head for each of K taps in each of O offset groups; 4 corners around the place where
    the tap reads between tokens, with an index of their own [B, O*K, N, 4]. Dynamic per position, shared by the
    channels of an offset group; not bounded by a window. What the convolution itself learns sits in `project`.

    Args:
        dim: channels C of x.
        kernel_size: odd, for both axes or each.
        out_dim: output channels; dim by default.
        stride, dilation: for both axes.
        groups: channels are mixed within groups only; dim: depthwise.
        offset_groups: O, groups of consecutive channels that move apart from each other.
        modulated: every tap is also multiplied by a sigmoid, one for each output (version 2). False: version 1.
        bias: added to the output.

    Shape:
        x [B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), out_dim]; zeros outside, kernel centred, as
        torchvision.ops.DeformConv2d has it, with its `weight` [out_dim, C / groups, *kernel] and `bias` [out_dim].
        `conv_offset` [2*O*K or 3*O*K, C, *kernel] with bias: for each offset group and tap, in raster order, its move
        down and to the right, in tokens; then, if modulated, O*K logits of the mask. It starts at zero.

    Cost: N*K*(4*C + C*out_dim / groups + (3*O*K or 2*O*K)*C) multiply-adds, N outputs.

    Raises:
        ValueError: even kernels; groups that do not divide both channel counts; offset groups that do not divide C.

    Source: Dai et al., Deformable Convolutional Networks, ICCV 2017, arXiv 1703.06211, section 2.1; modulated: Zhu
    et al., Deformable ConvNets v2: More Deformable, Better Results, CVPR 2019, arXiv 1811.11168, section 3.
    Differs from the paper: nothing in the definition; offset groups are the released code's. The slower learning rate
    of the offsets is the optimizer's matter. The fast path is torchvision's, where it is installed.
    """

    examples = (
        "DeformableConv()",
        "DeformableConv(kernel_size=(3, 5), out_dim=48, stride=2, groups=4, modulated=False)",
        "DeformableConv(kernel_size=3, dilation=2, groups=32, offset_groups=4, bias=False)",
    )

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int | Sequence[int] = 3,
        out_dim: int | None = None,
        stride: int = 1,
        dilation: int = 1,
        groups: int = 1,
        offset_groups: int = 1,
        modulated: bool = True,
        bias: bool = True,
    ) -> None:
        super().__init__(dim, rank=2)
        self.kernel_size, self.out_dim = kernel_size, dim if out_dim is None else positive("out_dim", out_dim)
        self.stride, self.dilation = positive("stride", stride), positive("dilation", dilation)
        self.groups, self.modulated = positive("groups", groups), flag("modulated", modulated)
        self.offset_groups = positive("offset_groups", offset_groups)
        kernel = self._kernel = odd_kernel("kernel_size", kernel_size, 2)
        self._left = centre_padding(kernel, dilation)
        if dim % groups or self.out_dim % groups:
            raise ValueError(f"groups: {groups} must divide dim {dim} and out_dim {self.out_dim}")
        if dim % offset_groups:
            raise ValueError(f"offset_groups: {offset_groups} must divide dim {dim}")
        of_torch = nn.Conv2d(dim, self.out_dim, kernel, groups=groups, bias=flag("bias", bias))  # type: ignore[arg-type]
        self.weight, self.bias = of_torch.weight, of_torch.bias
        moves = offset_groups * math.prod(kernel) * (3 if modulated else 2)
        self.conv_offset = nn.Conv2d(dim, moves, kernel, stride, self._left, dilation)  # type: ignore[arg-type]
        nn.init.zeros_(self.conv_offset.weight)
        nn.init.zeros_(self.conv_offset.bias)  # type: ignore[arg-type]

    def values(self, source: Tensor) -> Tensor:
        source = source.flatten(1, -2).unflatten(-1, (self.offset_groups, -1))
        # one group is read by every tap; of several, each has taps of its own
        return source if self.offset_groups == 1 else source.repeat_interleave(math.prod(self._kernel), 2)

    def offsets(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """[B, *S_out, 2*O*K] the moves of each tap, down and right, and [B, *S_out, O*K] its factor."""
        if valid is not None:
            x = x.masked_fill(~valid[..., None], 0)
        found = conv(
            x,
            self.conv_offset.weight,
            self.conv_offset.bias,
            stride=self.stride,
            padding=self._left,
            dilation=self.dilation,
            groups=1,
        )
        taps = self.offset_groups * math.prod(self._kernel)
        return found[..., : 2 * taps], found[..., 2 * taps :].sigmoid() if self.modulated else None

    def weights(self, x: Tensor, *, valid: Tensor | None = None) -> Aggregation:
        grid, out = tuple(x.shape[1:-1]), self.out_grid(x.shape[1:-1])
        moves, factor = self.offsets(x, valid)
        # whole positions do not fit into 16 bits
        moves = moves.to(torch.promote_types(moves.dtype, torch.float32)).unflatten(-1, (-1, 2))  # [B, H, W, O*K, 2]
        low, high = [], []
        for axis, (length, place) in enumerate(zip(grid, self._places(x, moves.dtype), strict=True)):
            at = place + moves[..., axis]
            floor = at.detach().floor()
            low.append((floor, 1 - (at - floor), length))
            high.append((floor + 1, at - floor, length))
        weights, index = [], []
        for row in (low[0], high[0]):
            for column in (low[1], high[1]):
                inside = (row[0] >= 0) & (row[0] < row[2]) & (column[0] >= 0) & (column[0] < column[2])
                token = torch.where(inside, row[0], 0).long() * column[2] + torch.where(inside, column[0], 0).long()
                index.append(torch.where(inside, token, -1))
                weights.append(row[1] * column[1])
        corners = torch.stack(weights, -1)  # [B, H, W, O*K, 4]
        if factor is not None:
            corners = corners * factor[..., None]
        return Aggregation(
            corners.to(x.dtype).flatten(1, 2).transpose(1, 2),
            torch.stack(index, -1).flatten(1, 2).transpose(1, 2),
            math.prod(grid),
            grid_positions(out, device=x.device),
            grid_positions(grid, stride=self.stride, device=x.device),
            out,
            grid,
        )

    def project(self, mixed: Tensor) -> Tensor:
        weight = self.weight.flatten(2).unflatten(0, (self.groups, -1))  # [groups, out, C / groups, K]
        taps = math.prod(self._kernel)
        mixed = mixed.unflatten(-1, (self.offset_groups, taps, -1)).transpose(2, 3)  # [B, N, K, O, C / O]
        mixed = mixed.flatten(3).unflatten(-1, (self.groups, -1))
        out = torch.einsum("bnkgc,gock->bngo", mixed, weight).flatten(2)
        return out if self.bias is None else out + self.bias

    def fast(self, x: Tensor, values: Tensor, *, valid: Tensor | None = None) -> Tensor:
        # the library wants one dtype for all, and has no bfloat16 on a CPU
        wide = torch.promote_types(values.dtype, torch.float32)
        if self.offset_groups > 1:
            values = values[:, :, :: math.prod(self._kernel)]  # every tap's are the same
        tokens = images(values.reshape(x.shape)).to(wide)
        moves, factor = self.offsets(x, valid)
        out = torch.ops.torchvision.deform_conv2d(
            tokens,
            self.weight.to(wide),
            images(moves).to(wide),
            tokens.new_zeros(tokens.shape[0], 1) if factor is None else images(factor).to(wide),
            tokens.new_zeros(self.out_dim) if self.bias is None else self.bias.to(wide),
            *(self.stride, self.stride, *self._left, self.dilation, self.dilation),
            self.groups,
            self.offset_groups,
            factor is not None,
        )
        if not torch.compiler.is_compiling() and out.requires_grad:
            out.register_hook(_no_second_derivative)
        return back(out, 2).to(values.dtype)

    def unsupported(self, x: Tensor) -> str | None:
        if not _has_torchvision():
            return "the fast path is torchvision.ops.deform_conv2d, and torchvision cannot be imported; install it"
        return None

    def out_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        return out_lengths(grid, self.stride)

    def macs(self, grid: Sequence[int]) -> int:
        taps = math.prod(self._kernel)
        predicted = self.offset_groups * taps * (3 if self.modulated else 2)
        each = 4 * self.dim + self.dim * self.out_dim // self.groups + predicted * self.dim
        return math.prod(self.out_grid(grid)) * taps * each

    def _places(self, x: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """[H_out, 1, O*K] and [1, W_out, O*K]: the row and the column of each tap before it moves."""
        rows, columns = (
            torch.arange(0, n, self.stride, device=x.device)[:, None]
            + self.dilation * torch.arange(k, device=x.device)
            - left
            for n, k, left in zip(x.shape[1:-1], self._kernel, self._left, strict=True)
        )
        rows = rows.repeat_interleave(self._kernel[1], -1).repeat(1, self.offset_groups)
        columns = columns.repeat(1, self._kernel[0] * self.offset_groups)
        return rows[:, None].to(dtype), columns[None].to(dtype)


@torch.compiler.assume_constant_result  # the compiler cannot look into an import
def _has_torchvision() -> bool:
    """Whether torchvision's operators are there: an optional dependency, loaded at the first call that can use it."""
    try:
        importlib.import_module("torchvision.ops")
    except ImportError:
        return False
    return hasattr(torch.ops.torchvision, "deform_conv2d")


def _no_second_derivative(grad: Tensor) -> None:
    if torch.is_grad_enabled():  # in a backward pass: create_graph=True
        raise Unsupported(
            "DeformableConv: torchvision's kernel has no second derivative (create_graph=True); set impl='reference' "
            "on the mixer, whose definition has"
        )
