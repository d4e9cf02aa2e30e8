"""What the padded attentions share: a head for each tap of a kernel, and a softmax over the grid and its padding.

Shape letters: B batch, S grid, C channels, K heads, N queries, M sources, E places: the grid and its padding; along one
axis n sources, m queries, e places.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import extents, flag, one_of, per_axis, positive
from glocal.mixer import TokenMixer
from glocal.mixers._attention import masked_softmax
from glocal.mixers._grid import join
from glocal.mixers._separable import Heads, mix_by_axes, sum_of_taps

PADDING_MODES = ("zeros", "replicate", "reflect", "circular")
Chosen = slice | list[int]  # of heads


class PaddedAttention(TokenMixer):
    """Abstract: heads that look at places of a grid extended by padding; a subclass says how they score a place.

    A place of the padding has a weight in the softmax as any other. What is read there a map for each axis says:
    nothing (zeros), or a source (replicate, reflect, circular). So with one head sharply on each tap this is a
    convolution, borders included.
    """

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int | Sequence[int],
        out_dim: int | None,
        stride: int | Sequence[int],
        padding: int | str | Sequence[int],
        dilation: int | Sequence[int],
        groups: int,
        padding_mode: str,
        bias: bool,
        rank: int,
    ) -> None:
        super().__init__(dim, rank=rank)
        self.kernel_size, self.stride, self.dilation, self.padding = kernel_size, stride, dilation, padding
        self.out_dim = dim if out_dim is None else positive("out_dim", out_dim)
        self.groups = positive("groups", groups)
        self.padding_mode = one_of("padding_mode", padding_mode, PADDING_MODES)
        self._kernel = per_axis("kernel_size", kernel_size, rank)
        self._strides, self._dilations = per_axis("stride", stride, rank), per_axis("dilation", dilation, rank)
        self._reach = tuple(d * (k - 1) for d, k in zip(self._dilations, self._kernel, strict=True))
        self._sides = sides_of(padding, self._reach, self._strides)
        self.num_heads = math.prod(self._kernel)
        if dim % groups or self.out_dim % groups:
            raise ValueError(f"groups: {groups} must divide dim {dim} and out_dim {self.out_dim}")
        layer: type[Any] = nn.Conv1d if rank == 1 else nn.Conv2d  # for the start of its weights only
        of_torch = layer(dim, self.out_dim, self._kernel, groups=groups, bias=flag("bias", bias))
        self.value = nn.Parameter(heads_of_kernel(of_torch.weight.detach(), groups))
        self.bias = of_torch.bias

    # What a subclass writes.

    @abstractmethod
    def _scores_along(self, axis: int, offset: Tensor, heads: Chosen) -> Tensor:
        """The part of an axis in the scores of these heads, for int64 offsets, place minus query: [heads, *offset]."""

    @abstractmethod
    def _places(self, axis: int) -> Tensor:
        """The parameters that make the scores along an axis: [K, any]."""

    @abstractmethod
    def _taps_along(self, axis: int, dtype: torch.dtype, places: int) -> list[int] | None:
        """The only offset that each head reads along an axis of so many places, if that is so to rounding in dtype."""

    def taps(self) -> Tensor:
        """Offsets of the kernel's taps from the query, in tokens of x, in order: [K, rank], float32."""
        axes = [
            torch.arange(k) * d - left
            for k, d, (left, _) in zip(self._kernel, self._dilations, self._sides, strict=True)
        ]
        return torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2).float()

    # The definition.

    def values(self, source: Tensor) -> Tensor:
        return source.flatten(1, -2).unsqueeze(2)

    def scores(self, x: Tensor, *, queries: Tensor | None = None) -> dict[str, Tensor]:
        grid = x.shape[1:-1]
        out = self.out_grid(grid)
        left = torch.arange(math.prod(out), device=x.device) if queries is None else queries
        total: Tensor | None = None
        for axis in reversed(range(len(grid))):
            along = self._scores_along(axis, self._offsets(axis, grid[axis], x.device)[left % out[axis]], slice(None))
            left = left // out[axis]
            total = along if total is None else (along[..., :, None] + total[..., None, :]).flatten(-2)
        assert total is not None
        return {"position": total[None]}

    def _over_places(self, x: Tensor, valid: Tensor | None, queries: Tensor | None) -> Aggregation:
        """What a subclass gives as `weights`: the softmax of its scores over the places of each image."""
        grid = tuple(x.shape[1:-1])
        (position,) = self._scores(x, queries=queries).values()
        index, seen = self.places_read(x, valid)
        out = self.out_grid(grid)
        places = grid_positions(out, device=x.device)
        return Aggregation(
            masked_softmax(position, seen),
            index,
            math.prod(grid),
            places if queries is None else places[queries],
            grid_positions(grid, stride=self._strides, device=x.device),
            out if queries is None else (len(queries),),
            grid,
        )

    def places_read(self, x: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Which source each place reads, and which places there are where images are padded: [B|1, 1, 1, E]."""
        grid = tuple(x.shape[1:-1])
        sizes = None if valid is None else extents(valid)
        index, inside = [], []
        for axis, n in enumerate(grid):
            place = self._extended(axis, n, x.device)
            own = place.new_full((1, 1), n) if sizes is None else sizes[:, axis, None]  # each image's length
            index.append(sources_of(place, own, self.padding_mode)[:, None])
            inside.append(torch.where(place < own + self._sides[axis][1], 0, -1)[:, None])
        seen = None if valid is None else join(inside, [1] * len(grid))[:, None] >= 0
        return join(index, grid)[:, None], seen

    def middles(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """Which source each query's kernel has in its middle, -1 for none: [B|1, N]."""
        grid = tuple(x.shape[1:-1])
        sizes = None if valid is None else extents(valid)
        index = []
        for axis, (n, m) in enumerate(zip(grid, self.out_grid(grid), strict=True)):
            first = self._reach[axis] // 2 - self._sides[axis][0]
            place = first + self._strides[axis] * torch.arange(m, device=x.device)
            own = place.new_full((1, 1), n) if sizes is None else sizes[:, axis, None]
            index.append(sources_of(place, own, self.padding_mode)[..., None])
        return join(index, grid)[..., 0]

    def project(self, mixed: Tensor) -> Tensor:
        return self.biased(self.valued(mixed, self.value))

    def valued(self, mixed: Tensor, value: Tensor) -> Tensor:
        """What heads read, [B, N, K*C], times their values: [B, N, out_dim]."""
        mixed = mixed.unflatten(-1, (self.num_heads, self.groups, -1))
        return torch.einsum("bnkgc,kgco->bngo", mixed, value).flatten(2)

    def biased(self, out: Tensor) -> Tensor:
        """[B, ..., out_dim] with the bias."""
        return out if self.bias is None else out + self.bias.to(out.dtype)  # under autocast, as a convolution does

    # The fast path.

    def fast(self, x: Tensor, values: Tensor) -> Tensor:
        return self.biased(self.mixed(values.reshape(x.shape), self.value))

    def mixed(self, tokens: Tensor, value: Tensor) -> Tensor:
        """What heads of these values give for tokens [B, *S, C], without the bias: [B, *S_out, out_dim]."""
        grid = tuple(tokens.shape[1:-1])
        image = tokens.unsqueeze(1) if self.rank == 1 else tokens
        out = self._by_taps(image, grid, value)
        if out is None:
            out = self._by_axes(image, grid, value)
        return out.squeeze(1) if self.rank == 1 else out

    def _by_taps(self, image: Tensor, grid: tuple[int, ...], value: Tensor) -> Tensor | None:
        """Each head as the one place that it reads; None unless that is exact to rounding, gradients included.

        Where a head sits on a place the gradient of its centre is small, not zero, and an optimizer that divides by
        its size follows it all the same: so never where that is asked for.
        """
        if not self._may_look(image) or not image.shape[0]:
            return None
        found = []
        for axis, (n, m) in enumerate(zip(grid, self.out_grid(grid), strict=True)):
            front, behind = self._sides[axis]
            offsets = self._taps_along(axis, image.dtype, n + front + behind)
            last = self._strides[axis] * (m - 1)
            if offsets is None or any(not -front <= offset < n + behind - last for offset in offsets):
                return None
            found.append([offset + front for offset in offsets])
        ones = [] if self.rank == 2 else [1]
        taps = list(zip(*found, strict=True)) if self.rank == 2 else [(0, tap) for tap in found[0]]
        padded = self._padded(image, grid)
        return sum_of_taps(padded, taps, value, (*ones, *self._strides), (*ones, *self.out_grid(grid)))

    def _by_axes(self, image: Tensor, grid: tuple[int, ...], value: Tensor) -> Tensor:
        """A softmax along each axis, one after the other."""
        weights: list[Tensor] = []
        which: list[list[int]] = []
        every = list(range(self.num_heads))
        for axis, n in enumerate(grid):
            heads: Chosen = slice(None)
            own = every
            if self._may_look(image):  # heads with the same weights along an axis are mixed once
                heads, own = _distinct(self._places(axis))
            weights.append(self._axis_weights(axis, n, image, heads))
            which.append(own)
        if self.rank == 1:
            weights, which = [image.new_ones(1, 1, 1), *weights], [[0] * self.num_heads, *which]
        return mix_by_axes(
            image, Heads(weights[0], weights[1], which[0], which[1], value), strided=max(self._strides) > 1
        )

    def _may_look(self, image: Tensor) -> bool:
        """Whether a call may depend on where the heads are: a compiled one is for anywhere, low precisions add in
        float32 inside matrix products only, and gradients of the places are those of every head by itself."""
        if torch.compiler.is_compiling() or image.is_meta:
            return False
        learning = torch.is_grad_enabled() and any(self._places(axis).requires_grad for axis in range(self.rank or 0))
        exact = image.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled(image.device.type)
        return exact and not learning

    def _axis_weights(self, axis: int, n: int, like: Tensor, heads: Chosen) -> Tensor:
        """How much of each source goes into each query along an axis: [heads, m, n]."""
        # in float64: where one weight is near 1, the gradients of scores are small differences of large numbers
        scores = self._scores_along(axis, self._offsets(axis, n, like.device), heads)
        weights = scores.softmax(-1, torch.float32 if like.device.type == "mps" else torch.float64).to(like.dtype)
        if self.padding_mode == "zeros":
            return weights.narrow(-1, self._sides[axis][0], n)
        place = self._extended(axis, n, like.device)
        source = sources_of(place, place.new_full((1,), n), self.padding_mode)
        return weights.new_zeros(*weights.shape[:-1], n).index_add(-1, source, weights)

    def _padded(self, image: Tensor, grid: tuple[int, ...]) -> Tensor:
        """[B, H, W, C] with its padding."""
        if not any(map(sum, self._sides)):
            return image
        if self.padding_mode == "zeros":
            return nn.functional.pad(image, [0, 0, *(p for sides in reversed(self._sides) for p in sides)])
        for axis, n in enumerate(grid):
            place = self._extended(axis, n, image.device)
            source = sources_of(place, place.new_full((1,), n), self.padding_mode)
            image = image.index_select(axis + 3 - len(grid), source)
        return image

    # Geometry and cost.

    def out_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        out = tuple(
            (n + sum(sides) - reach - 1) // stride + 1
            for n, sides, reach, stride in zip(grid, self._sides, self._reach, self._strides, strict=True)
        )
        if not torch.compiler.is_compiling() and min(out) < 1:
            raise ValueError(
                f"{type(self).__name__}: x has a grid of {tuple(grid)}, with its padding smaller than the kernel, "
                f"which reaches over {tuple(r + 1 for r in self._reach)}; give a larger one, or more padding"
            )
        return out

    def macs(self, grid: Sequence[int]) -> int:
        places = math.prod(n + sum(sides) for n, sides in zip(grid, self._sides, strict=True))
        queries = math.prod(self.out_grid(grid))
        return queries * self.num_heads * self.dim * (places + self.out_dim // self.groups)

    def macs_by_axes(self, grid: Sequence[int]) -> int:
        """Multiply-adds for one image where heads sit anywhere, each by itself: a softmax along each axis."""
        out = self.out_grid(grid)
        (height, width), (rows, columns) = ((1, *grid)[-2:], (1, *out)[-2:])
        first = height * width * columns * self.dim
        between = max(self._strides) == 1 and self.out_dim <= self.dim
        pixels = columns * (height if between else rows)
        second = 0 if self.rank == 1 else rows * height * columns * (self.out_dim if between else self.dim)
        return self.num_heads * (first + second + pixels * self.dim * self.out_dim // self.groups)

    def _extended(self, axis: int, n: int, device: torch.device) -> Tensor:
        """Places along an axis, the padding's first: [e]."""
        front, behind = self._sides[axis]
        return torch.arange(n + front + behind, device=device) - front

    def _offsets(self, axis: int, n: int, device: torch.device) -> Tensor:
        """Place minus query along an axis: [m, e]."""
        front, behind = self._sides[axis]
        queries = (n + front + behind - self._reach[axis] - 1) // self._strides[axis] + 1
        query = torch.arange(queries, device=device) * self._strides[axis]
        return self._extended(axis, n, device) - query[:, None]


def heads_of_kernel(weight: Tensor, groups: int) -> Tensor:
    """A convolution's weight [C_out, C / groups, *kernel] as values of heads, [K, groups, C/groups, C_out/groups]."""
    return weight.flatten(2).unflatten(0, (groups, -1)).permute(3, 0, 2, 1).contiguous()


def kernel_of_heads(value: Tensor, kernel: Sequence[int]) -> Tensor:
    """`heads_of_kernel` taken back."""
    return value.permute(1, 3, 2, 0).flatten(0, 1).unflatten(2, tuple(kernel)).contiguous()


def sources_of(place: Tensor, length: Tensor, mode: str) -> Tensor:
    """Which source each place reads, -1 for none: int64 places [e] of axes of these lengths, broadcast."""
    length = length.clamp(min=1)
    if mode == "zeros":
        return torch.where((place >= 0) & (place < length), place, -1)
    if mode == "replicate":
        return torch.minimum(place.clamp(min=0), length - 1)
    if mode == "circular":
        return place % length
    there = place % (2 * length - 2).clamp(min=1)  # reflect: there and back again, the ends once
    return torch.minimum(there, 2 * length - 2 - there)


def sides_of(
    padding: int | str | Sequence[int], reach: Sequence[int], strides: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Places in front of and behind each axis."""
    if padding == "same":
        if max(strides) > 1:
            raise ValueError(f"padding: 'same' with stride {tuple(strides)}; give whole numbers, or stride 1")
        return tuple((r // 2, r - r // 2) for r in reach)
    if padding == "valid":
        return ((0, 0),) * len(reach)
    each = (padding,) * len(reach) if isinstance(padding, int) else padding
    whole = isinstance(each, list | tuple) and all(isinstance(p, int) and not isinstance(p, bool) for p in each)
    if not whole or len(each) != len(reach) or min(each) < 0:  # type: ignore[operator]
        raise ValueError(
            f"padding: {padding!r}, must be a whole number, 0 or more, or one for each of {len(reach)} axes, 'same' or "
            "'valid'"
        )
    return tuple((p, p) for p in each)  # type: ignore[misc]


def _distinct(parameters: Tensor) -> tuple[list[int], list[int]]:
    """The first head with each set of parameters [K, any], and which of these each head is like."""
    first: dict[tuple[float, ...], int] = {}
    like = [first.setdefault(tuple(row), len(first)) for row in parameters.tolist()]
    return [like.index(i) for i in range(len(first))], like
