"""Learned encodings of places: tables, resized to other grids.

Shape letters: B batch, P tokens in front, S grid, N = prod(S) tokens, C channels.
"""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from glocal.arguments import every_axis, extents, flag, per_axis, positive
from glocal.positions._tokens import Tokens, read, steps, written

TABLE_STD = 0.02  # of the first entries, as in ViT


def resized_positions(
    table: Tensor,
    grid_size: Sequence[int],
    grid: Sequence[int],
    *,
    num_prefix: int = 0,
    mode: Literal["bicubic", "bilinear"] = "bicubic",
    antialias: bool = True,
) -> Tensor:
    """A table of absolute positions for another grid: [1, P + prod(grid_size), C] -> [1, P + prod(grid), C].

    For a model of one's own, or to load a checkpoint of another image size:
    `model.pos_embed.data = resized_positions(checkpoint["pos_embed"], (14, 14), (24, 24), num_prefix=1)`.

    Args:
        table: the entries, raster order, those of class tokens in front.
        grid_size: the grid that the table is made for.
        grid: the one wanted, of the same rank, 1 or 2.
        num_prefix: entries in front, which are kept as they are.
        mode: "bicubic" (ViT, timm) or "bilinear" (SETR).
        antialias: blur where the grid gets smaller, as timm does; PyTorch's default is False.

    Returns:
        The table itself at its own size. Computed in float32 at least, in the table's dtype.

    Raises:
        ValueError: a table that has other entries than grid_size and num_prefix say, or another rank.
    """
    grid_size, grid = tuple(grid_size), tuple(grid)
    if len(grid_size) != len(grid) or len(grid) not in (1, 2):
        raise ValueError(f"grid: {grid}, the table is made for {grid_size}; give as many axes, 1 or 2")
    if table.dim() != 3 or table.shape[1] != num_prefix + math.prod(grid_size):
        raise ValueError(
            f"table: has shape {tuple(table.shape)}, grid_size {grid_size} with {num_prefix} entries in front needs "
            f"[1, {num_prefix + math.prod(grid_size)}, C]"
        )
    if not torch.compiler.is_compiling() and grid == grid_size:  # a compiled program must not depend on sizes
        return table
    in_front, entries = table[:, :num_prefix], table[:, num_prefix:]
    image = entries.to(torch.promote_types(table.dtype, torch.float32)).unflatten(1, ((1, *grid_size)[-2:]))
    new = nn.functional.interpolate(image.movedim(-1, 1), size=(1, *grid)[-2:], mode=mode, antialias=antialias)
    return torch.cat([in_front, new.movedim(1, -1).flatten(1, 2).to(table.dtype)], 1)


class LearnedPositions(nn.Module):
    """ViT's and BERT's learned table: one vector for each place, to be added to tokens or to queries and keys.

    Args:
        dim: channels C.
        grid_size: the grid that the table is made for; its length is the rank, 1 or 2.
        num_prefix: class or register tokens in front, which have entries of their own.
        resize: another grid gets the whole table, resized as timm does (bicubic, antialiased): a place is a share of
            the image. False: it gets the table's first rows and columns: a place is a number, as in BERT and GPT.

    Shape:
        x [B, *S, C] -> [1, *S, C] in x's dtype; with `grid`, x [B, P + prod(grid), C] -> [1, P + prod(grid), C].
        `pos_embed` [1, P + prod(grid_size), C]: timm's name and order, so a ViT's table loads as it is. With resize,
        and `valid`, each image gets the table at its own size, [B, ...]. Without resize, places in a sequence start
        at `offset`, an int or one for each sequence [B], and with `valid` only real tokens count. Padding gets zeros.

    Cost: no multiply-adds; the resize is not counted.

    Raises:
        ValueError: num_prefix and the tokens in front differ; without resize a grid larger than grid_size; an offset
            with resize or in an image; `valid` that is no rectangle at the origin, with resize.

    Source: Dosovitskiy et al., An Image is Worth 16x16 Words (ViT), ICLR 2021, arXiv 2010.11929, sections 3.1 and 3.2;
    Devlin et al., BERT, NAACL 2019, arXiv 1810.04805. Resizing as timm's `resample_abs_pos_embed`.
    Differs from the paper: ViT's released code resizes linearly (scipy zoom, order 1).
    """

    def __init__(self, dim: int, *, grid_size: Sequence[int], num_prefix: int = 0, resize: bool = True) -> None:
        super().__init__()
        self.dim, self.grid_size = positive("dim", dim), every_axis("grid_size", grid_size)
        if not isinstance(num_prefix, int) or num_prefix < 0:
            raise ValueError(f"num_prefix: {num_prefix!r}, must be a whole number, 0 or more")
        self.num_prefix, self.resize = num_prefix, flag("resize", resize)
        table = torch.empty(1, num_prefix + math.prod(self.grid_size), dim)
        self.pos_embed = nn.Parameter(nn.init.trunc_normal_(table, std=TABLE_STD))

    def forward(
        self,
        x: Tensor,
        *,
        grid: Sequence[int] | None = None,
        valid: Tensor | None = None,
        offset: int | Tensor = 0,
    ) -> Tensor:
        tokens = read(self, x, self.dim, len(self.grid_size), grid, valid)
        if tokens.prefix != self.num_prefix:
            raise ValueError(
                f"LearnedPositions: x has {tokens.prefix} tokens in front of its grid, num_prefix is {self.num_prefix}"
            )
        if self.resize:
            if isinstance(offset, Tensor) or offset:
                raise ValueError(
                    "LearnedPositions: offset was given, resize=True makes places shares of a grid; use resize=False"
                )
            encoding = self._resized(tokens)
        else:
            encoding = self._first(tokens, offset, x.device)
        return written(encoding, tokens, x, self.pos_embed[:, : self.num_prefix])

    def extra_repr(self) -> str:
        return f"{self.dim}, grid_size={self.grid_size}, num_prefix={self.num_prefix}, resize={self.resize}"

    def _at(self, size: Sequence[int]) -> Tensor:
        """[1, *size, C]: the whole table at this size."""
        table = self.pos_embed[:, self.num_prefix :]
        return resized_positions(table, self.grid_size, size).unflatten(1, tuple(size))

    def _resized(self, tokens: Tokens) -> Tensor:
        if tokens.valid is None:
            return self._at(tokens.grid)
        sizes = [tuple(max(n, 1) for n in size) for size in extents(tokens.valid).tolist()]
        at = {size: self._at(size) for size in sizes}
        for size, encoding in at.items():
            beyond = [m for n, s in zip(tokens.grid, size, strict=True) for m in (n - s, 0)]
            at[size] = nn.functional.pad(encoding, (0, 0, *reversed(beyond)))
        none = self.pos_embed.new_zeros(0, *tokens.grid, self.dim)  # for an empty batch
        return torch.cat([none, *(at[size] for size in sizes)])

    def _first(self, tokens: Tokens, offset: int | Tensor, device: torch.device) -> Tensor:
        table = self.pos_embed[:, self.num_prefix :].unflatten(1, self.grid_size)
        start = 0 if isinstance(offset, Tensor) else offset
        if len(tokens.grid) == 2 and (isinstance(offset, Tensor) or offset):
            raise ValueError("LearnedPositions: offset was given, x has a grid of rank 2; an order holds in sequences")
        if start < 0:
            raise ValueError(f"LearnedPositions: offset is {start}, the first place of a sequence; give 0 or more")
        for axis, (n, size) in enumerate(zip(tokens.grid, self.grid_size, strict=True)):
            _fits("LearnedPositions", axis, start + n, size)
        if len(tokens.grid) == 2:
            return table[:, : tokens.grid[0], : tokens.grid[1]]
        places = steps(tokens.grid[0], offset, tokens.valid, device)
        if tokens.valid is None:
            return table[0, places]
        return table[0, places.clamp(min=0)].masked_fill(~tokens.valid[..., None], 0)


class RowColumnPositions(nn.Module):
    """DETR's learned encoding of places in an image: a vector for the column, then one for the row, C/2 channels each.

    Args:
        dim: channels C, even.
        grid_size: rows and columns that the tables are made for, for both or each.
        resize: another grid gets the whole tables, resized; False: their first entries, as in DETR.

    Shape:
        x [B, H, W, C] -> [1, H, W, C] in x's dtype. `row_embed.weight` [grid_size[0], C/2] and `col_embed.weight`
        [grid_size[1], C/2]: the released names. With `grid` (H, W), x [B, P + H*W, C] has class tokens in front,
        which get zeros.

    Cost: no multiply-adds.

    Raises:
        ValueError: an odd dim; without resize a grid larger than grid_size.

    Source: Carion et al., End-to-End Object Detection with Transformers (DETR), ECCV 2020, arXiv 2005.12872, the
    learned variant of the released code, whose 50 entries start uniform in 0 to 1, as here.
    Differs from the paper: a grid larger than the tables is refused in words. Cordonnier et al. (attention-cnn) learn a
    vector for each row and column *offset* and add scores: that is `LearnedRelativeAttention`, of `relative_rows`.
    """

    def __init__(self, dim: int, *, grid_size: int | Sequence[int] = 50, resize: bool = False) -> None:
        super().__init__()
        if positive("dim", dim) % 2:
            raise ValueError(f"dim: {dim} channels cannot be shared by rows and columns; give a multiple of 2")
        self.dim, self.resize = dim, flag("resize", resize)
        self.grid_size = per_axis("grid_size", grid_size, 2)
        self.row_embed, self.col_embed = (nn.Embedding(n, dim // 2) for n in self.grid_size)
        for table in (self.row_embed, self.col_embed):
            nn.init.uniform_(table.weight)

    def forward(self, x: Tensor, *, grid: Sequence[int] | None = None, valid: Tensor | None = None) -> Tensor:
        tokens = read(self, x, self.dim, 2, grid, valid)
        if self.resize and tokens.valid is not None:
            raise ValueError(
                "RowColumnPositions: valid was given, resize=True stretches the tables over the padding too; use "
                "resize=False"
            )
        row, column = (
            self._entries(axis, layer.weight, n)
            for axis, (layer, n) in enumerate(zip((self.row_embed, self.col_embed), tokens.grid, strict=True))
        )
        height, width = tokens.grid
        row, column = row[:, :, None].expand(-1, -1, width, -1), column[:, None].expand(-1, height, -1, -1)
        return written(torch.cat([column, row], -1), tokens, x)

    def extra_repr(self) -> str:
        return f"{self.dim}, grid_size={self.grid_size}, resize={self.resize}"

    def _entries(self, axis: int, table: Tensor, n: int) -> Tensor:
        """[1, n, C/2]."""
        if self.resize:
            return resized_positions(table[None], (self.grid_size[axis],), (n,))
        _fits("RowColumnPositions", axis, n, self.grid_size[axis])
        return table[None, :n]


def _fits(name: str, axis: int, end: int, size: int) -> None:
    if end > size:
        raise ValueError(
            f"{name}: x reaches place {end} along axis {axis} of its grid, the table is made for {size}; build it with "
            "a larger grid_size, or resize=True"
        )
