"""What spatial-reduction attentions share: queries of all tokens, keys and values of fewer, pooled ones.

Shape letters: B batch, S grid, N tokens, C channels, G heads, D channels per head, M pooled tokens.
"""

import math
from abc import abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import flag, resolve_heads
from glocal.mixer import TokenMixer
from glocal.mixers._attention import masked_softmax, part_of, sdpa_where


class ReducedAttention(TokenMixer):
    """Abstract: projections `q`, `kv` and `proj`, named as in timm; a subclass says how the map is reduced."""

    takes_positions = True

    def __init__(self, dim: int, *, num_heads: int | None, head_dim: int | None, qkv_bias: bool, rank: int) -> None:
        super().__init__(dim, rank=rank)
        self.num_heads = resolve_heads(dim, num_heads, head_dim)
        self.qkv_bias = flag("qkv_bias", qkv_bias)
        self.scale = (dim // self.num_heads) ** -0.5
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.kv = nn.Linear(dim, 2 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    @abstractmethod
    def reduced(self, x: Tensor, valid: Tensor | None) -> Tensor:
        """The map that keys and values are made of: [B, *S, C] -> [B, M, C]."""

    @abstractmethod
    def seen(self, valid: Tensor) -> Tensor:
        """Which pooled tokens hold a real one: [B, *S] -> [B, M]."""

    @abstractmethod
    def source_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        """The grid of the pooled tokens."""

    @abstractmethod
    def steps(self, grid: Sequence[int]) -> list[float]:
        """Tokens from one pooled token to the next, along each axis."""

    def values(self, source: Tensor, *, valid: Tensor | None = None) -> Tensor:
        values = self._half(self.reduced(source, valid), 1)
        return values if valid is None else values.masked_fill(~self.seen(valid)[..., None, None], 0)

    def scores(self, x: Tensor, *, valid: Tensor | None = None, queries: Tensor | None = None) -> dict[str, Tensor]:
        tokens = x.flatten(1, -2)
        q = self._queries(tokens if queries is None else tokens[:, queries])
        return {"content": torch.einsum("bngd,bmgd->bgnm", q, self._half(self.reduced(x, valid), 0))}

    def project(self, mixed: Tensor) -> Tensor:
        return self.proj(mixed)

    def fast(self, x: Tensor, *, valid: Tensor | None = None) -> Tensor:
        # the map is reduced once here, for keys and values; the definition does it for each
        keys_and_values = self.kv(self.reduced(x, valid)).unflatten(-1, (2, self.num_heads, -1))
        q, (k, v) = self._queries(x.flatten(1, -2)), keys_and_values.unbind(2)
        return self.proj(sdpa_where(None if valid is None else self.seen(valid)[:, None, None], q, k, v))

    def macs(self, grid: Sequence[int]) -> int:
        n, m, c = math.prod(grid), math.prod(self.source_grid(grid)), self.dim
        return 2 * n * c * c + 2 * m * c * c + 2 * n * m * c + 2 * self._reduction_macs(m)

    @abstractmethod
    def _reduction_macs(self, pooled: int) -> int: ...

    def _aggregation_of(self, x: Tensor, valid: Tensor | None, queries: Tensor | None) -> Aggregation:
        grid = tuple(x.shape[1:-1])
        sources, steps = self.source_grid(grid), self.steps(grid)
        (content,) = self._scores(x, valid=valid, queries=queries).values()
        places = grid_positions(grid, device=x.device)
        # cell 0 has its centre at (step - 1) / 2
        source_places = grid_positions(
            sources, stride=[1 / s for s in steps], offset=[(1 / s - 1) / 2 for s in steps], device=x.device
        )
        return Aggregation(
            masked_softmax(content, None if valid is None else self.seen(valid)[:, None, None]),
            None,
            math.prod(sources),
            places if queries is None else places[queries],
            source_places,
            grid if queries is None else (len(queries),),
            sources,
        )

    def _queries(self, tokens: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, G, D], scaled."""
        return self.q(tokens).unflatten(-1, (self.num_heads, -1)) * self.scale

    def _half(self, pooled: Tensor, part: int) -> Tensor:
        """Keys (part 0) or values (1) of pooled tokens: [B, M, C] -> [B, M, G, D]."""
        return part_of(self.kv, pooled, part, self.dim).unflatten(-1, (self.num_heads, -1))
