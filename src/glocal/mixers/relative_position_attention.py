"""Transformer-XL's attention: content and relative position, each with the query and with a bias of its own."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation
from glocal.arguments import per_axis
from glocal.mixers._attention import Attention, masked, sdpa, sum_of, table_parameter
from glocal.mixers._positional import softmax_over_sources
from glocal.positions.relative import axis_offsets, relative_rows
from glocal.positions.sinusoidal import sinusoids


class RelativePositionAttention(Attention):
    """Attention with embedded offsets: A = softmax(((q + u) . k + (q + v) . W r[query - source]) / sqrt(D)).

    The four terms: q . k content, q . W r the query's own view of an offset, u . k a bias for content and v . W r one
    for offsets. Weights: [B, heads, N, N]: own for each image, head and query; dense.

    Args:
        dim: channels C.
        num_heads, head_dim: one of them; head_dim 32 where neither is given.
        grid_size: r is learned, in tables for grids up to this, for all axes or each; None: r are sinusoids, any grid.
        qkv_bias: whether q, k and v have biases.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *S, C]. `r_net` maps r [C] to all heads; `r_w_bias` u and `r_r_bias` v, [heads, D]. r joins
        C / rank channels for the offset along each axis, row before column: [sin, cos] of offset / 10000^(2i rank / C),
        or `r_embeddings.<axis>` [2*grid_size - 1, C / rank], entry query - source + grid_size - 1.

    Cost: 4*N*C^2 + 2*N^2*C multiply-adds, and (2n - 1)*C^2 + N*(2n - 1)*C for each axis of n tokens.

    Raises:
        ValueError: heads, axes or sinusoids that do not divide the channels; a grid larger than grid_size.

    Source: Dai et al., Transformer-XL, ACL 2019, arXiv 1901.02860, section 3.3; in two dimensions and with learned r as
    in Cordonnier et al., ICLR 2020, arXiv 1911.03584, section 2.
    Differs from the paper: no memory of earlier segments, no order (every token reads every token), and `proj` has a
    bias. u and v belong to the layer; the released code can share them between layers.
    """

    examples = (
        "RelativePositionAttention(num_heads=4)",
        "RelativePositionAttention(num_heads=2, grid_size=(20, 28), qkv_bias=True)",
        "RelativePositionAttention(num_heads=4, rank=1)",
        "RelativePositionAttention(num_heads=2, grid_size=40, rank=1)",
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        grid_size: int | Sequence[int] | None = None,
        qkv_bias: bool = False,
        rank: int = 2,
    ) -> None:
        super().__init__(dim, num_heads=num_heads, head_dim=head_dim, qkv_bias=qkv_bias, rank=rank)
        self.grid_size = grid_size
        self._sizes = None if grid_size is None else per_axis("grid_size", grid_size, rank)
        parts = rank if self._sizes else 2 * rank
        if dim % parts:
            kind = "axes" if self._sizes else "axes, each with sines and cosines"
            raise ValueError(f"dim: {dim} channels cannot be shared by {rank} {kind}; give a multiple of {parts}")
        self.r_net = nn.Linear(dim, dim, bias=False)
        self.r_w_bias = table_parameter(self.num_heads, dim // self.num_heads)
        self.r_r_bias = table_parameter(self.num_heads, dim // self.num_heads)
        if self._sizes:
            self.r_embeddings = nn.ModuleList(nn.Embedding(2 * n - 1, dim // rank) for n in self._sizes)

    def scores(self, x: Tensor, *, queries: Tensor | None = None) -> dict[str, Tensor]:
        q, k = self.heads(x, 0), self.heads(x, 1)
        q = q if queries is None else q[:, queries]
        content = torch.einsum("bngd,bmgd->bgnm", self._plus(q, self.r_w_bias), k)
        return {"content": content, "position": self._position(x, q, queries)}

    def weights(self, x: Tensor, *, valid: Tensor | None = None, queries: Tensor | None = None) -> Aggregation:
        return softmax_over_sources(sum_of(self._scores(x, queries=queries)), x, valid, queries)

    def fast(self, x: Tensor, values: Tensor, *, valid: Tensor | None = None) -> Tensor:
        q, k = self.heads(x, 0), self.heads(x, 1)
        bias = self._position(x, q, None)
        if valid is not None:
            bias = masked(bias, valid.flatten(1)[:, None, None])
        return self.proj(sdpa(self._plus(q, self.r_w_bias), k, values, bias=bias))

    def macs(self, grid: Sequence[int]) -> int:
        n, offsets = math.prod(grid), sum(2 * length - 1 for length in grid)
        return self._projection_macs(n) + 2 * n * n * self.dim + offsets * self.dim * (self.dim + n)

    def _plus(self, q: Tensor, bias: Tensor) -> Tensor:
        """Queries, which are scaled, with u or v; in their dtype, which under autocast is not that of u and v."""
        return (q + self.scale * bias).to(q.dtype)

    def _position(self, x: Tensor, q: Tensor, queries: Tensor | None) -> Tensor:
        """[B, heads, N, M]: the scores of offsets, found for every query and axis and then laid out on the sources."""
        grid, q = x.shape[1:-1], self._plus(q, self.r_r_bias)
        scores = []
        for axis, n in enumerate(grid):
            known = torch.einsum("bngd,rgd->bgnr", q, self._embedded_offsets(x, axis))
            # offset query - source at entry n - 1 + offset, for the query's place on this axis
            entry = n - 1 - axis_offsets(n, x.device)
            place = torch.arange(math.prod(grid), device=x.device) // math.prod(grid[axis + 1 :]) % n
            entry = entry[place if queries is None else place[queries]]
            scores.append(known.gather(-1, entry.expand(*known.shape[:2], -1, -1)))
        if len(scores) == 1:
            return scores[0]
        rows, columns = scores
        return (rows[..., :, None] + columns[..., None, :]).flatten(-2)

    def _embedded_offsets(self, x: Tensor, axis: int) -> Tensor:
        """[2n - 1, heads, D]: W r for the offsets 1 - n, ..., n - 1 along one axis."""
        n, share = x.shape[axis + 1], self.dim // len(x.shape[1:-1])
        if self._sizes is None:
            dtype = torch.promote_types(x.dtype, torch.float32)  # large angles have no sines in bfloat16
            offset = torch.arange(2 * n - 1, device=x.device).to(dtype) + 1 - n
            r = sinusoids(offset, share, layout="halves").to(x.dtype)
        else:
            rows = relative_rows("RelativePositionAttention", axis, self._sizes[axis], n, x.device)
            r = self.r_embeddings[axis](rows)
        r = nn.functional.pad(r, (axis * share, self.dim - (axis + 1) * share))  # the channels of the other axes
        return self.r_net(r).unflatten(-1, (self.num_heads, -1))
