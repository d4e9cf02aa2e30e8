"""ConViT's gated positional self-attention: content and position, each with a softmax of its own, mixed by a gate."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import flag, resolve_heads
from glocal.mixer import TokenMixer
from glocal.mixers._attention import mask_bias, masked_softmax, sdpa
from glocal.mixers._positional import mix_by_axes

# Shape letters: B batch, N tokens, Q queries, G heads, D channels per head, C channels.


class GatedPositionalAttention(TokenMixer):
    """A = (1 - g) softmax(q k^T / sqrt(D)) + g softmax(u . r): attention that can begin as a convolution (GPSA).

    g = sigmoid(gating_param) for each head; r = (dx, dy, dx^2 + dy^2) of source minus query; u a row of
    `pos_proj` for each head. The positional part is a bell around one offset from the query where the weight of
    the squared distance is negative. Weights: [B, heads, N, N]: own for each image, head and query; dense. They
    have no `scores`: no single softmax makes them; `parts` are the two.

    Args:
        dim: channels C.
        num_heads, head_dim: one of them; head_dim 32 where neither is given.
        locality_strength: a start as a convolution, 1 in the paper: head number dx * side + dy (from 0) looks at
            one offset of a kernel with `side` places an axis, as sharply as this says, and values are the tokens
            themselves. It takes 1, 9, 25, ... heads (1, 3, 5, ... for sequences). None: a plain start.
        qkv_bias: whether q, k and v have biases.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *S, C], any S. `qk` C -> 2*C, `v` C -> C, `proj` C -> C, `pos_proj` rank + 1 -> heads,
        last axis first; `gating_param` [heads], 1 at the start. The bias of `pos_proj` cancels in the softmax.

    Cost: 4*N*C^2 + 2*N^2*C multiply-adds. In the fast path the positional part is a product of one softmax for each
    axis, N*sum(S)*C, and its [heads, N, N] weights are never formed.

    Raises:
        ValueError: heads that do not divide the channels; a start as a convolution for a number of heads that is
            no kernel with a centre.

    Source: d'Ascoli et al., ConViT, ICML 2021, arXiv 2103.10697, section 3.
    Differs from the paper: the division by the row sum, which is 1, is left out. The released code also starts even
    kernels (the named models of 4 and 16 heads), whose heads look halfway between tokens and are no convolution, and
    in part numbers of heads that are no square: refused here. Its positions are those of a square grid (sides of
    int(sqrt(N)): other shapes of as many tokens get the square's in silence, other numbers fail); here of any grid.
    """

    takes_positions = True
    examples = (
        "GatedPositionalAttention(num_heads=1, locality_strength=1.0)",
        "GatedPositionalAttention(num_heads=4, qkv_bias=True)",
        "GatedPositionalAttention(num_heads=2, rank=1)",
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        locality_strength: float | None = None,
        qkv_bias: bool = False,
        rank: int = 2,
    ) -> None:
        super().__init__(dim, rank=rank)
        self.num_heads = resolve_heads(dim, num_heads, head_dim)
        self.qkv_bias, self.locality_strength = flag("qkv_bias", qkv_bias), locality_strength
        self.scale = (dim // self.num_heads) ** -0.5
        self.qk = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.pos_proj = nn.Linear(rank + 1, self.num_heads)
        self.gating_param = nn.Parameter(torch.ones(self.num_heads))
        if locality_strength is not None:
            self._start_as_convolution(locality_strength)

    def _start_as_convolution(self, strength: float) -> None:
        rank = self.pos_proj.in_features - 1
        side = round(self.num_heads ** (1 / rank))
        if not isinstance(strength, int | float) or isinstance(strength, bool) or not 0 < strength < math.inf:
            raise ValueError(f"locality_strength: {strength!r}, must be a positive number, or None for a plain start")
        if side**rank != self.num_heads or side % 2 == 0:
            counts = ", ".join(str(n**rank) for n in (1, 3, 5))
            raise ValueError(
                f"locality_strength: {strength} asks for a start as a convolution, one head for each place of a kernel "
                f"with a centre; num_heads is {self.num_heads}, it takes {counts}, ...; give so many heads, or "
                "locality_strength=None for a plain start"
            )
        with torch.no_grad():
            offsets = grid_positions((side,) * rank, offset=(side - 1) / 2)  # of each head, in the order of pos_proj
            self.pos_proj.weight[:, :-1] = 2 * strength * offsets
            self.pos_proj.weight[:, -1] = -strength
            self.v.weight.copy_(torch.eye(self.dim))

    def values(self, source: Tensor) -> Tensor:
        return self.v(source.flatten(1, -2)).unflatten(-1, (self.num_heads, -1))

    def weights(self, x: Tensor, *, valid: Tensor | None = None, queries: Tensor | None = None) -> Aggregation:
        grid = tuple(x.shape[1:-1])
        (one, content), (other, position) = self._of_both(x, valid, queries).values()
        places = grid_positions(grid, device=x.device)
        return Aggregation(
            one[:, None, None] * content + other[:, None, None] * position,
            None,
            math.prod(grid),
            places if queries is None else places[queries],
            places,
            grid if queries is None else (len(queries),),
            grid,
        )

    def parts(
        self, x: Tensor, *, valid: Tensor | None = None, queries: Tensor | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        return self._of_both(x, valid, queries)

    def _of_both(self, x: Tensor, valid: Tensor | None, queries: Tensor | None) -> dict[str, tuple[Tensor, Tensor]]:
        """Shares and weights by content, [B, G, Q, N], and by position, [B|1, G, Q, N]."""
        q, k = self._queries_and_keys(x)
        q = q if queries is None else q[:, queries]
        seen = None if valid is None else valid.flatten(1)[:, None, None]
        content = masked_softmax(torch.einsum("bngd,bmgd->bgnm", q, k), seen)
        position = masked_softmax(self._position_scores(tuple(x.shape[1:-1]), queries)[None], seen)
        gate = self.gating_param.sigmoid()
        return {"content": (1 - gate, content), "position": (gate, position.to(content.dtype))}

    def project(self, mixed: Tensor) -> Tensor:
        return self.proj(mixed)

    def fast(self, x: Tensor, values: Tensor, *, valid: Tensor | None = None) -> Tensor:
        q, k = self._queries_and_keys(x)
        grid = x.shape[1:-1]
        if all(n == 1 for n in grid):
            # a single token reads itself, whatever the scores; the fused kernel's derivatives of q and k would be
            # rounding in place of zero
            content = position = values.flatten(2)
        else:
            seen = None if valid is None else mask_bias(valid.flatten(1)[:, None, None], q.dtype)
            content = sdpa(q, k, values, bias=seen)
            position = mix_by_axes(self._position_tables(grid), values, grid, valid).flatten(1, -2)
        gate = self.gating_param.sigmoid()[:, None]
        content, position = (part.unflatten(-1, (self.num_heads, -1)) for part in (content, position))
        return self.proj(((1 - gate) * content + gate * position).flatten(2))

    def macs(self, grid: Sequence[int]) -> int:
        n = math.prod(grid)
        return 4 * n * self.dim**2 + 2 * n * n * self.dim

    def _queries_and_keys(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries, scaled, and keys: [B, N, G, D] each."""
        q, k = self.qk(x.flatten(1, -2)).unflatten(-1, (2, self.num_heads, -1)).unbind(2)
        return q * self.scale, k

    def _position_tables(self, grid: Sequence[int]) -> list[Tensor]:
        """[G, n, n] for each axis, query by source: what its offset adds to the scores; float32 or wider."""
        wide = torch.promote_types(self.pos_proj.weight.dtype, torch.float32)
        *linear, square = self.pos_proj.weight.to(wide).unbind(1)
        tables = []
        for n, slope in zip(grid, reversed(linear), strict=True):  # x, the last axis, is the first feature
            place = torch.arange(n, device=slope.device, dtype=wide)
            offset = place - place[:, None]
            table = slope[:, None, None] * offset + square[:, None, None] * offset.square()
            # the softmax is the same; the rounding of derivatives is then not multiplied by squared distances
            tables.append(table - table.amax(-1, keepdim=True))
        # the bias cancels in the softmax; only its place in the graph is kept, since distributed training wants a
        # gradient for every parameter, and this one is exactly zero
        tables[0] = tables[0] + 0 * self.pos_proj.bias.to(wide)[:, None, None]
        return tables

    def _position_scores(self, grid: Sequence[int], queries: Tensor | None) -> Tensor:
        """[G, Q, N]."""
        source = torch.arange(math.prod(grid), device=self.pos_proj.weight.device)
        query = source if queries is None else queries
        scores, step = None, math.prod(grid)
        for n, table in zip(grid, self._position_tables(grid), strict=True):
            step = step // n
            part = table[:, query // step % n][:, :, source // step % n]
            scores = part if scores is None else scores + part
        assert scores is not None
        return scores
