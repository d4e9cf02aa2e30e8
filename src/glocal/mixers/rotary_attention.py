"""Global self-attention whose queries and keys are turned by their place."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from glocal.aggregation import Aggregation
from glocal.arguments import every_axis, extents, flag, one_of
from glocal.mixer import Cache
from glocal.mixers._attention import Attention
from glocal.mixers.self_attention import mixed_from_all, softmax_of_all
from glocal.positions.rotary import PAIRINGS, Pairing, check_head_dim, rotary_angles, rotate


class RotaryAttention(Attention):
    """Global attention that knows offsets by rotation: A = softmax((R_i q_i)^T R_j k_j / sqrt(D)).

    R_i turns pairs of channels by the place i, so a score depends on query, key and the offset j - i alone.
    Weights: [B, heads, N, N]: own for each image, head and query; dense.

    Args:
        dim: channels C.
        num_heads, head_dim: one of them; head_dim 32 where neither is given.
        out_dim: channels of q, k, v and the output; dim by default.
        qkv_bias: whether q, k and v have biases.
        causal: a token reads itself and those before it in raster order.
        pairing: which channels of a head are a pair: "interleaved", 2i and 2i + 1, or "halves", i and i + D/2.
        temperature: the longest wavelength over 2 pi.
        grid_size: the grid the model was trained on; at other sizes places are scaled to it, as in EVA-02. Its length
            is the rank. None: places are counted, at any rank.

    Shape:
        x [B, *S, C] -> [B, *S, out_dim], S = (T,) or (H, W). In an image the first half of a head's pairs is turned by
        the row, the second by the column (axial). `grid` takes class tokens in front, which are not turned. With
        `cache` (causal, rank 1) x follows the tokens that are remembered, in place too.

    Cost: N*C*3*out_dim + 2*N^2*out_dim + N*out_dim^2 multiply-adds; the rotation, 4*N*out_dim products of single
    numbers, is not counted.

    Raises:
        ValueError: a head_dim that is no multiple of 2, or of 4 in an image; grid_size with causal, or of another rank.

    Source: Su et al., RoFormer: Enhanced Transformer with Rotary Position Embedding, 2021, arXiv 2104.09864, section
    3.2; axial in images as in timm's EVA.
    Differs from the paper: no dropout on the weights; images, class tokens, `grid_size` and the pairing "halves" of
    GPT-NeoX and LLaMA are not in it. The paper's linear attention with rotation is not here.
    """

    examples = (
        "RotaryAttention(num_heads=4)",
        "RotaryAttention(num_heads=2, qkv_bias=False, causal=True, pairing='halves', temperature=100.0)",
        "RotaryAttention(num_heads=4, out_dim=48, grid_size=(8, 8))",
        "RotaryAttention(num_heads=4, grid_size=(16,))",
    )

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None = None,
        head_dim: int | None = None,
        out_dim: int | None = None,
        qkv_bias: bool = True,
        causal: bool = False,
        pairing: Pairing = "interleaved",
        temperature: float = 10000.0,
        grid_size: Sequence[int] | None = None,
    ) -> None:
        sizes = None if grid_size is None else every_axis("grid_size", grid_size)
        rank = None if sizes is None else len(sizes)
        super().__init__(dim, num_heads=num_heads, head_dim=head_dim, out_dim=out_dim, qkv_bias=qkv_bias, rank=rank)
        check_head_dim(self.out_dim // self.num_heads, rank or 1, temperature)
        one_of("pairing", pairing, PAIRINGS)
        self.causal, self.pairing, self.temperature = flag("causal", causal), pairing, temperature
        self.grid_size = sizes
        if causal and grid_size is not None:
            raise ValueError(
                f"grid_size: {self.grid_size}, causal=True; scaled places depend on what follows; leave one out"
            )

    def scores(
        self,
        x: Tensor,
        *,
        grid: Sequence[int] | None = None,
        valid: Tensor | None = None,
        queries: Tensor | None = None,
        cache: Cache | None = None,
    ) -> dict[str, Tensor]:
        q, k = self._queries_and_keys(x, grid, valid, cache)
        q = q if queries is None else q[:, queries]
        return {"content": torch.einsum("bngd,bmgd->bgnm", q, k)}

    def weights(
        self,
        x: Tensor,
        *,
        grid: Sequence[int] | None = None,
        valid: Tensor | None = None,
        queries: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Aggregation:
        (content,) = self._scores(x, grid=grid, valid=valid, queries=queries, cache=cache).values()
        return softmax_of_all(content, x, None, grid, valid, queries, cache, causal=self.causal)

    def fast(
        self,
        x: Tensor,
        values: Tensor,
        *,
        grid: Sequence[int] | None = None,
        valid: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        q, k = self._queries_and_keys(x, grid, valid, cache)
        return self.proj(mixed_from_all(q, k, values, valid, causal=self.causal))

    def macs(self, grid: Sequence[int]) -> int:
        n = math.prod(grid)
        return self._projection_macs(n) + 2 * n * n * self.out_dim

    def _queries_and_keys(
        self, x: Tensor, grid: Sequence[int] | None, valid: Tensor | None, cache: Cache | None
    ) -> tuple[Tensor, Tensor]:
        """[B, N, G, D] each, turned; queries scaled."""
        grid = tuple(x.shape[1:-1] if grid is None else grid)
        prefix = math.prod(x.shape[1:-1]) - math.prod(grid)
        size = None
        if self.grid_size is not None and valid is not None:
            size = extents(valid.flatten(1)[:, prefix:].unflatten(1, grid))
        angles = rotary_angles(
            grid,
            self.out_dim // self.num_heads,
            offset=0 if cache is None else len(cache),
            num_prefix=prefix,
            grid_size=self.grid_size,
            extents=size,
            temperature=self.temperature,
            device=x.device,
            dtype=torch.promote_types(x.dtype, torch.float32),  # large angles have no sines in 16 bits
        ).unsqueeze(-2)
        q, k = (rotate(self.heads(x, part), angles, pairing=self.pairing) for part in (0, 1))
        return q, k if cache is None else cache.join("keys", k)
