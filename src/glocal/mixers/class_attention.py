"""CaiT's class attention."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import flag, resolve_heads
from glocal.mixer import TokenMixer
from glocal.mixers._attention import masked_softmax, sdpa_where


class ClassAttention(TokenMixer):
    """Class tokens read every token, themselves included: A = softmax(q k^T / sqrt(D)), q of the class tokens alone.

    Weights: [B, heads, P, M]: own for each image, head and class token; dense.

    Args:
        dim: channels C.
        num_heads: heads G. Or
        head_dim: channels D of a head; 32 where neither is given.
        qkv_bias: whether q, k and v have biases.

    Shape:
        x [B, P + prod(S), C] with `grid=S`: P class tokens, then the others -> [B, P, C], the class tokens alone.
        Without `grid` x is a sequence [B, M, C] whose first token is the class token. `q.weight`, `k.weight`,
        `v.weight` and `proj.weight` [C, C].

    Cost: (P + 2*M + P)*C^2 + 2*P*M*C multiply-adds, M tokens, P of them class tokens; `macs` counts one.

    Raises:
        ValueError: heads that do not divide the channels; a grid with no class token in front.

    Source: Touvron, Cord, Sablayrolles, Synnaeve, Jegou, Going Deeper with Image Transformers (CaiT), ICCV 2021,
    arXiv 2103.17239, section 3 (class-attention layers). VOLO (Yuan et al., arXiv 2106.13112) ends with it, too.
    Differs from the paper: any number of class tokens; they read each other. Parameters carry the names of the
    released CaiT, also timm's; VOLO's code has one `kv` of which the first half is `k`, the second `v`.
    """

    examples = (
        "ClassAttention(num_heads=4)",
        "ClassAttention(num_heads=2, qkv_bias=False)",
    )

    def __init__(
        self, dim: int, *, num_heads: int | None = None, head_dim: int | None = None, qkv_bias: bool = True
    ) -> None:
        super().__init__(dim, rank=1)
        self.num_heads = resolve_heads(dim, num_heads, head_dim)
        self.qkv_bias = flag("qkv_bias", qkv_bias)
        self.scale = (dim // self.num_heads) ** -0.5
        self.q = nn.Linear(dim, dim, bias=qkv_bias)
        self.k = nn.Linear(dim, dim, bias=qkv_bias)
        self.v = nn.Linear(dim, dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)

    def values(self, source: Tensor) -> Tensor:
        return self._heads(self.v(source))

    def scores(self, x: Tensor, *, grid: Sequence[int] | None = None) -> dict[str, Tensor]:
        q, k = self._queries_and_keys(x, grid)
        return {"content": torch.einsum("bngd,bmgd->bgnm", q, k)}

    def weights(self, x: Tensor, *, grid: Sequence[int] | None = None, valid: Tensor | None = None) -> Aggregation:
        (content,) = self._scores(x, grid=grid).values()
        queries, sources = content.shape[2:]
        seen = None if valid is None else valid[:, None, None]
        source_grid = (sources,) if grid is None else tuple(grid)
        prefix = 0 if grid is None else queries
        places = grid_positions(source_grid, num_prefix=prefix, device=x.device)
        return Aggregation(
            masked_softmax(content, seen), None, sources, places[:queries], places, (queries,), source_grid
        )

    def fast(
        self, x: Tensor, values: Tensor, *, grid: Sequence[int] | None = None, valid: Tensor | None = None
    ) -> Tensor:
        q, k = self._queries_and_keys(x, grid)
        return self.proj(sdpa_where(None if valid is None else valid[:, None, None], q, k, values))

    def project(self, mixed: Tensor) -> Tensor:
        return self.proj(mixed)

    def out_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        """The one class token of a sequence."""
        return (1,)

    def macs(self, grid: Sequence[int]) -> int:
        n, c = math.prod(grid), self.dim
        return (2 + 2 * n) * c * c + 2 * n * c

    def _axes(self, x: Tensor, call: dict[str, Any]) -> tuple[int, ...]:
        return tuple(x.shape[1:-1])  # flat, whatever the grid behind the class tokens

    def _out_shape(self, x: Tensor, call: dict[str, Any]) -> tuple[int, ...]:
        if "queries" in call or "grid" not in call:
            return super()._out_shape(x, call)
        return (x.shape[0], self._class_tokens(x, call["grid"]), self.dim)

    def _queries_and_keys(self, x: Tensor, grid: Sequence[int] | None) -> tuple[Tensor, Tensor]:
        q = self.q(x[:, : self._class_tokens(x, grid)]) * self.scale
        return self._heads(q), self._heads(self.k(x))

    def _class_tokens(self, x: Tensor, grid: Sequence[int] | None) -> int:
        if grid is None:
            return 1
        prefix = x.shape[1] - math.prod(grid)
        if prefix == 0:
            raise ValueError(
                f"ClassAttention: no class token in front of grid {tuple(grid)}, x has shape {tuple(x.shape)}; "
                f"give [B, P + {math.prod(grid)}, C]"
            )
        return prefix

    def _heads(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.num_heads, -1))
