"""What the attention operators share: projections named as in timm, heads, the masked softmax.

Shape letters: B batch, N tokens, C channels, G heads, D channels per head, M sources.
"""

import math

import torch
from torch import Tensor, nn

from glocal.aggregation import grid_positions
from glocal.arguments import flag, positive, resolve_heads
from glocal.mixer import TokenMixer, Unsupported


class Attention(TokenMixer):
    """Abstract: one `qkv` projection, one `proj`, and heads between them."""

    takes_positions = True

    def __init__(
        self,
        dim: int,
        *,
        num_heads: int | None,
        head_dim: int | None,
        qkv_bias: bool,
        out_dim: int | None = None,
        inner_dim: int | None = None,
        rank: int | None = None,
    ) -> None:
        super().__init__(dim, rank=rank)
        self.out_dim = dim if out_dim is None else positive("out_dim", out_dim)
        self._inner = self.out_dim if inner_dim is None else positive("inner_dim", inner_dim)
        self.num_heads = resolve_heads(self._inner, num_heads, head_dim)
        self.qkv_bias = flag("qkv_bias", qkv_bias)
        self.scale = (self._inner // self.num_heads) ** -0.5
        self.qkv = nn.Linear(dim, 3 * self._inner, bias=qkv_bias)
        self.proj = nn.Linear(self._inner, self.out_dim)

    def values(self, source: Tensor) -> Tensor:
        return self.heads(source, 2)

    def project(self, mixed: Tensor) -> Tensor:
        return self.proj(mixed)

    def heads(self, tokens: Tensor, part: int) -> Tensor:
        """Queries (part 0, scaled), keys (1) or values (2) of tokens [B, *S, C]: [B, N, G, D]."""
        out = part_of(self.qkv, tokens.flatten(1, -2), part, self._inner).unflatten(-1, (self.num_heads, -1))
        return out * self.scale if part == 0 else out

    def _projection_macs(self, tokens: int) -> int:
        return tokens * self._inner * (3 * self.dim + self.out_dim)


def part_of(projection: nn.Module, tokens: Tensor, part: int, size: int) -> Tensor:
    """One of the parts, `size` channels each, that a linear map of tokens [..., C] gives one after the other."""
    rows = slice(part * size, (part + 1) * size)
    if type(projection) is nn.Linear and not projection._forward_hooks and not projection._forward_pre_hooks:
        bias = None if projection.bias is None else projection.bias[rows]
        return nn.functional.linear(tokens, projection.weight[rows], bias)
    return projection(tokens)[..., rows]  # adapted (LoRA, quantised) or watched: its own call is what counts


def sum_of(scores: dict[str, Tensor]) -> Tensor:
    """The terms before the softmax, added up: the content alone, or content and position."""
    first, *others = scores.values()
    return sum(others, first)


def masked_softmax(scores: Tensor, seen: Tensor | None) -> Tensor:
    """Softmax over the last axis where `seen`; a row that sees nothing is all zero, never NaN."""
    if seen is None:
        return scores.softmax(-1)
    return masked(scores, seen).softmax(-1) * seen


def masked(scores: Tensor, seen: Tensor) -> Tensor:
    """Scores with the lowest finite number where not seen: a row of -inf would be NaN, forward and backward.

    Not a sum with `mask_bias`, which in float16 may well be -inf.
    """
    return scores.masked_fill(~seen, torch.finfo(scores.dtype).min)


def sdpa(q: Tensor, k: Tensor, v: Tensor, *, bias: Tensor | None = None, causal: bool = False) -> Tensor:
    """Library attention on [B, N, G, D] heads with q already scaled: [B, N, G*D].

    `bias` is added to the scores, broadcastable to [B, G, N, M], and is cast to q's dtype: a float32 bias under
    bf16 has been misread in silence by some back ends.
    """
    bias = None if bias is None else bias.to(q.dtype)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=1.0)
    if not torch.compiler.is_compiling() and out.grad_fn is not None and "ScaledDotProduct" in out.grad_fn.name():
        out.register_hook(_no_second_derivative)  # a fused kernel; the composed one differentiates twice
    return out.transpose(1, 2).flatten(2)


def sdpa_where(seen: Tensor | None, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """`sdpa` over the sources that are seen, [B|1, 1, N|1, M] (None: all); a query that sees none gets 0."""
    if seen is None:
        return sdpa(q, k, v)
    mixed = sdpa(q, k, v, bias=mask_bias(seen, q.dtype))
    # the library spreads a row that sees nothing evenly over what it may not see
    return torch.where(seen.any(-1)[:, 0, :, None], mixed, 0)


def _no_second_derivative(grad: Tensor) -> None:
    if torch.is_grad_enabled():  # in a backward pass: create_graph=True
        raise Unsupported(
            "attention: the library's fused kernel has no second derivative (create_graph=True); set impl='reference' "
            "on the mixer, whose definition has"
        )


def mask_bias(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """0 where seen, the lowest finite number elsewhere."""
    return torch.zeros_like(seen, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)


def table_parameter(*shape: int) -> nn.Parameter:
    """A table of biases, truncated normal with deviation 0.02 as in the papers that use one."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(*shape), std=0.02))


def add_position(tokens: Tensor, embedding: Tensor | None) -> Tensor:
    """Tokens with positions added; for queries and keys, never for values."""
    return tokens if embedding is None else tokens + embedding


def geometry_across(
    x: Tensor, source: Tensor, past: int = 0
) -> tuple[tuple[int, ...], tuple[int, ...], Tensor, Tensor]:
    """out_grid, source_grid and the positions of queries and sources, where queries have no place among the sources.

    `past`: sources that a cache remembers; with those of the call they are one sequence.
    """
    grid = tuple(source.shape[1:-1]) if not past else (past + math.prod(source.shape[1:-1]),)
    nowhere = x.new_full((math.prod(x.shape[1:-1]), len(grid)), math.nan, dtype=torch.float32)
    return tuple(x.shape[1:-1]), grid, nowhere, grid_positions(grid, device=x.device)
