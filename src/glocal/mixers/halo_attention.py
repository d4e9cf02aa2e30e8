"""Halo attention: blocks of queries share the tokens of their block and of a halo around it."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import extents, flag, per_axis, resolve_heads
from glocal.mixer import TokenMixer
from glocal.mixers._attention import masked_softmax, sum_of
from glocal.mixers._grid import Windows, join, masked_windows, pick, pick_or_zero

# Shape letters: B batch, N tokens, Q queries, M blocks, P places of a block, K places of a block with its halo,
# G heads, D channels per head, C channels.


class HaloAttention(TokenMixer):
    """Blocked local attention: A = softmax(q k^T / sqrt(D) + q (r_height + r_width)^T) over a block and its halo.

    Weights: [B, heads, N, K], K = prod(block_size + 2*halo_size): own for each image, head and query; local. The
    queries of a block see the same tokens. There is no output projection: the blocks that use it have one.

    Args:
        dim: channels C.
        block_size: tokens of a block along all axes or each; blocks are cut from the origin.
        halo_size: tokens that are seen around a block, for all axes.
        num_heads, head_dim: one of them; head_dim 32 where neither is given.
        qkv_bias: whether `q` and `kv` have biases.
        mask_padding: places outside the grid are not seen. False: timm's behaviour, where they take part in the
            softmax with a key and a value of zero, in the halo and, at sizes that are no multiple of the block,
            in the last blocks too.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *S, C], any S. `q` C -> C, `kv` C -> 2*C, for each head its keys, then its values;
        `pos_embed.height_rel` (images only) and `pos_embed.width_rel` [2*W - 1, D], W = block_size + 2*halo_size
        of their axis, row source - query + halo_size + W - 1, shared by all heads; the first 2*halo_size rows are
        never read. Where `valid` is given, real tokens are a rectangle at the origin; padding is as what lies outside.

    Cost: 3*N*C^2 + 2*N*K*C + N*sum(W)*C multiply-adds.

    Raises:
        ValueError: heads that do not divide the channels; a negative halo.

    Source: Vaswani et al., Scaling Local Self-Attention for Parameter Efficient Visual Backbones, CVPR 2021,
    arXiv 2103.12731.
    Differs from the paper: names, layout, initial values and the scale, on content and not on position, are timm's
    (HaloAttn), whose 1x1 convolutions are linear layers here; its stride is left out; places outside are masked
    unless mask_padding is False; sizes that are no multiple of the block, which timm refuses, are defined.
    """

    takes_positions = True
    examples = (
        "HaloAttention(block_size=4, halo_size=1, num_heads=4)",
        "HaloAttention(block_size=(2, 3), halo_size=2, num_heads=2, qkv_bias=True)",
        "HaloAttention(block_size=4, halo_size=1, num_heads=4, mask_padding=False)",
        "HaloAttention(block_size=4, halo_size=3, num_heads=4, rank=1)",
    )

    def __init__(
        self,
        dim: int,
        *,
        block_size: int | Sequence[int] = 8,
        halo_size: int = 3,
        num_heads: int | None = None,
        head_dim: int | None = None,
        qkv_bias: bool = False,
        mask_padding: bool = True,
        rank: int = 2,
    ) -> None:
        super().__init__(dim, rank=rank)
        self.num_heads = resolve_heads(dim, num_heads, head_dim)
        if not isinstance(halo_size, int) or isinstance(halo_size, bool) or halo_size < 0:
            raise ValueError(f"halo_size: {halo_size!r}, must be a whole number, 0 or more, for all axes")
        self.block_size, self.halo_size = block_size, halo_size
        self._block = per_axis("block_size", block_size, rank)
        self._window = tuple(b + 2 * halo_size for b in self._block)
        self.qkv_bias, self.mask_padding = flag("qkv_bias", qkv_bias), flag("mask_padding", mask_padding)
        self.scale = (dim // self.num_heads) ** -0.5
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        for layer in (self.q, self.kv):
            nn.init.trunc_normal_(layer.weight, std=dim**-0.5)
        self.pos_embed = _RelativePositions(self._window, dim // self.num_heads)

    def values(self, source: Tensor) -> Tensor:
        return self._keys_or_values(source, 1)

    def scores(self, x: Tensor, *, valid: Tensor | None = None, queries: Tensor | None = None) -> dict[str, Tensor]:
        index, entries = self._rows(x, valid, queries)
        q, k = self._queries(x), self._keys_or_values(x, 0)
        q = q if queries is None else q[:, queries]
        content = torch.einsum("bngd,bnkgd->bgnk", q * self.scale, pick_or_zero(k, index))
        position = None
        for entry, table in zip(entries, self.pos_embed.tables(), strict=True):
            along = torch.einsum("bngd,nkd->bgnk", q, table[entry])
            position = along if position is None else (position[..., None] + along[..., None, :]).flatten(-2)
        assert position is not None
        return {"content": content, "position": position}

    def weights(self, x: Tensor, *, valid: Tensor | None = None, queries: Tensor | None = None) -> Aggregation:
        grid = tuple(x.shape[1:-1])
        index = self._rows(x, valid, queries)[0][:, None]
        # without masking, places outside have a weight as well, for the zeros that an empty slot stands for
        seen = index >= 0 if self.mask_padding else None
        places = grid_positions(grid, device=x.device)
        return Aggregation(
            masked_softmax(sum_of(self._scores(x, valid=valid, queries=queries)), seen),
            index,
            math.prod(grid),
            places if queries is None else places[queries],
            places,
            grid if queries is None else (len(queries),),
            grid,
        )

    def fast(self, x: Tensor, values: Tensor, *, valid: Tensor | None = None) -> Tensor:
        grid = x.shape[1:-1]
        if valid is not None:
            extents(valid)
        blocks = Windows(
            [masked_windows(n, b, 0, None, x.device) for n, b in zip(grid, self._block, strict=True)], grid
        )
        reads = join([self._reads(n, b, x.device) for n, b in zip(grid, self._block, strict=True)], grid)[None]
        reads = _real(reads, valid)  # [B|1, M, K]
        # one copy of the keys and values for each block, not for each query
        q = pick_or_zero(self._queries(x), blocks.sources())  # [B, M, P, G, D]
        k, v = pick_or_zero(self._keys_or_values(x, 0), reads), pick_or_zero(values, reads)
        scores = torch.einsum("bmpgd,bmkgd->bmgpk", q * self.scale, k)
        weights = self._blocked_positions(q) + scores
        weights = masked_softmax(weights, (reads >= 0)[:, :, None, None] if self.mask_padding else None)
        mixed = torch.einsum("bmgpk,bmkgd->bmpgd", weights.to(v.dtype), v).flatten(1, 2)
        block, place = blocks.where()
        return pick(mixed, block * math.prod(self._block) + place).flatten(2)

    def macs(self, grid: Sequence[int]) -> int:
        n, places = math.prod(grid), math.prod(self._window)
        summed = 1 + (places > 1)  # one product is no sum
        return n * self.dim * (3 * self.dim + summed * places + sum(self._window))

    def _queries(self, x: Tensor) -> Tensor:
        """[B, N, G, D], not scaled."""
        return self.q(x.flatten(1, -2)).unflatten(-1, (self.num_heads, -1))

    def _keys_or_values(self, source: Tensor, part: int) -> Tensor:
        """Keys (part 0) or values (1): [B, N, G, D]."""
        source, kv, split = source.flatten(1, -2), self.kv, (self.num_heads, 2, -1)
        if type(kv) is nn.Linear and not kv._forward_hooks and not kv._forward_pre_hooks:
            weight = kv.weight.unflatten(0, split)[:, part].flatten(0, 1)
            bias = None if kv.bias is None else kv.bias.unflatten(0, split)[:, part].flatten()
            return nn.functional.linear(source, weight, bias).unflatten(-1, (self.num_heads, -1))
        return kv(source).unflatten(-1, split)[..., part, :]  # adapted or watched: its own call is what counts

    def _reads(self, n: int, block: int, device: torch.device) -> Tensor:
        """Along one axis: the tokens that each block reads, [ceil(n / block), block + 2*halo_size], -1: none."""
        first = torch.arange((n + block - 1) // block, device=device)[:, None] * block - self.halo_size
        token = first + torch.arange(block + 2 * self.halo_size, device=device)
        return torch.where((token >= 0) & (token < n), token, -1)

    def _rows(self, x: Tensor, valid: Tensor | None, queries: Tensor | None) -> tuple[Tensor, list[Tensor]]:
        """[B|1, Q, K] sources of each query, and for each axis [Q, W] rows of its table."""
        grid = x.shape[1:-1]
        if valid is not None:
            extents(valid)  # blocks are cut from the origin; refuses images that do not start there
        rows = torch.arange(math.prod(grid), device=x.device) if queries is None else queries
        sources, entries, step = None, [], math.prod(grid)
        for n, block, window in zip(grid, self._block, self._window, strict=True):
            step = step // n
            place = rows // step % n
            read = self._reads(n, block, x.device)[place // block]  # [Q, W]
            entries.append(torch.arange(window, device=x.device) - (place % block)[:, None] + window - 1)
            if sources is None:
                sources = read
            else:
                row, column = sources[..., None], read[:, None]
                sources = torch.where((row >= 0) & (column >= 0), row * n + column, -1).flatten(1)
        assert sources is not None
        return _real(sources[None], valid), entries

    def _blocked_positions(self, q: Tensor) -> Tensor:
        """[B, M, G, P, K] for queries [B, M, P, G, D]."""
        q = q.unflatten(2, self._block)
        added = None
        for axis, (block, window, table) in enumerate(
            zip(self._block, self._window, self.pos_embed.tables(), strict=True)
        ):
            place = torch.arange(block, device=q.device)
            entry = torch.arange(window, device=q.device) - place[:, None] + window - 1
            along = torch.einsum("bmp...gd,pkd->bmgp...k", q.movedim(2 + axis, 2), table[entry])
            along = along.movedim(3, 3 + axis)  # [B, M, G, *block, W]
            added = along if added is None else (added[..., None] + along[..., None, :]).flatten(-2)
        assert added is not None
        return added.flatten(3, -2)


class _RelativePositions(nn.Module):
    """A vector for each offset along each axis, as timm names them."""

    def __init__(self, window: Sequence[int], head_dim: int) -> None:
        super().__init__()
        self._names = ("height_rel", "width_rel")[-len(window) :]
        for name, size in zip(self._names, window, strict=True):
            table = nn.init.trunc_normal_(torch.empty(2 * size - 1, head_dim), std=head_dim**-0.5)
            self.register_parameter(name, nn.Parameter(table))

    def tables(self) -> list[Tensor]:
        """One for each axis of the grid."""
        return [getattr(self, name) for name in self._names]


def _real(index: Tensor, valid: Tensor | None) -> Tensor:
    """The index with -1 for what is not valid, [B|1, ...]."""
    if valid is None:
        return index
    return torch.where((index >= 0) & pick_or_zero(valid.flatten(1), index), index, -1)
