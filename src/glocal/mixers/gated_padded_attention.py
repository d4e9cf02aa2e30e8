"""A padded attention, which can be a convolution, and beside it attention by content, let in by a gate."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation
from glocal.arguments import one_of, positive
from glocal.mixer import TokenMixer
from glocal.mixers._attention import masked_softmax, sdpa
from glocal.mixers._grid import pick_or_zero
from glocal.mixers._padded import PaddedAttention
from glocal.mixers.padded_learned_attention import PaddedLearnedAttention
from glocal.mixers.padded_quadratic_attention import PaddedQuadraticAttention

ENCODINGS: dict[str, Any] = {"quadratic": PaddedQuadraticAttention, "learned": PaddedLearnedAttention}

# Shape letters: B batch, S grid, C channels, K heads, D channels of queries and keys, N queries, M sources, E places:
# the grid and its padding.


class GatedPaddedAttention(TokenMixer):
    """A_h = (1 - g_h) P_h + g_h softmax(q_h k_h^T / sqrt(D)): a convolution that can become attention by content.

    P is a padded attention, `position`: heads on the taps of a kernel, sharp ones the convolution itself. g is a gate
    for each head, 0 at the start exactly, so that it starts as P to rounding; `glocal.to_attention(gated=True)` makes
    it of a convolution. Weights: [B, K, N, E], E places: own for each image, head and query, rows sum to 1. They have
    no `scores`: no single softmax makes them; `parts` are the two.

    g = tanh |gate|, from 0 to below 1, with a derivative of 1 where `gate` is 0, to the right. A sigmoid reaches 0
    nowhere, and close to it its derivative vanishes too; a square has none at 0; a clamp has none left once a step has
    gone below 0. Here a step below 0 is reflected: the gate opens a little, and the next gradient turns it back.

    What padding means for the content: a place of zero padding holds nothing to compare with and has no content
    weight; a place that reads a source has that source's key, and counts beside it. A query asks with what stands in
    the middle of its kernel (with the zero vector where that is zero padding): its own token, for kernels with a
    centre, with as much padding in front as the kernel reaches there.

    Args:
        dim: channels C.
        kernel_size: taps along each axis, odd or even, for all axes or each: K heads in all.
        out_dim: channels of the output; dim by default.
        stride, dilation: for all axes or each.
        padding: places in front of and behind each axis, for all or each, or "same".
        groups: values are made within groups of channels only.
        padding_mode: what places of the padding read: "zeros", "replicate", "reflect" or "circular".
        encoding: of the positions, "quadratic" (`PaddedQuadraticAttention`) or "learned" (`PaddedLearnedAttention`).
        alpha: how sharp heads are at the start: see there.
        head_dim: D, of each head.
        bias: added to the output.
        rank: 2 for images, 1 for sequences.

    Shape:
        x [B, *S, C] -> [B, *S_out, out_dim], S_out as of torch.nn.Conv2d. `q`, `k` C -> K*D without biases, small at
        the start; `gate` [K]; `position` has centres and spreads, or tables, and `value` and `bias`. While the gates
        are 0, q and k have no gradients; gates do.

    Cost: that of `position`, with (N + M)*C*K*D for queries and keys and N*M*K*D for scores. The fast path keeps
    positions separable and takes the content from the library's kernel, N*E*K*(max(C, D) + C); on a CPU,
    without gradients and with every gate at 0 it is `position` alone.

    Raises:
        ValueError: groups that do not divide both channel counts; "same" with a stride; a grid smaller than the kernel.

    Source: d'Ascoli et al., ConViT, ICML 2021, arXiv 2103.10697, section 3; for pre-trained convolutions d'Ascoli et
    al., Transformed CNNs, arXiv 2106.05795.
    Differs from the paper: gates start shut, where the paper's start at 0.27 of content and the start is no
    convolution; the share of content is the gate, not that of position; borders, strides, groups, any kernel; values
    of each head see all channels; no biases of q and k.
    """

    takes_positions = True
    examples = (
        "GatedPaddedAttention(padding=1, alpha=0.5)",
        "GatedPaddedAttention(kernel_size=(2, 3), out_dim=48, stride=2, padding=1, groups=4, head_dim=8)",
        "GatedPaddedAttention(padding='same', padding_mode='reflect', encoding='learned', alpha=1.0, head_dim=48)",
        "GatedPaddedAttention(kernel_size=4, padding=2, padding_mode='circular', head_dim=8, bias=False, rank=1)",
    )

    def __init__(
        self,
        dim: int,
        *,
        kernel_size: int | Sequence[int] = 3,
        out_dim: int | None = None,
        stride: int | Sequence[int] = 1,
        padding: int | str | Sequence[int] = 0,
        dilation: int | Sequence[int] = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        encoding: str = "quadratic",
        alpha: float = 4.0,
        head_dim: int = 32,
        bias: bool = True,
        rank: int = 2,
    ) -> None:
        super().__init__(dim, rank=rank)
        self.kernel_size, self.stride, self.dilation, self.padding = kernel_size, stride, dilation, padding
        self.groups, self.padding_mode, self.alpha = groups, padding_mode, alpha
        self.encoding, self.head_dim = one_of("encoding", encoding, tuple(ENCODINGS)), positive("head_dim", head_dim)
        self.position: PaddedAttention = ENCODINGS[encoding](
            dim, kernel_size=kernel_size, out_dim=out_dim, stride=stride, padding=padding, dilation=dilation,
            groups=groups, padding_mode=padding_mode, alpha=alpha, bias=bias, rank=rank,
        )  # fmt: skip
        self.out_dim, self.num_heads = self.position.out_dim, self.position.num_heads
        self.scale = head_dim**-0.5
        self.q = nn.Linear(dim, self.num_heads * head_dim, bias=False)
        self.k = nn.Linear(dim, self.num_heads * head_dim, bias=False)
        for projection in (self.q, self.k):
            nn.init.trunc_normal_(projection.weight, std=0.02)
        self.gate = nn.Parameter(torch.zeros(self.num_heads))

    @property
    def bias(self) -> Tensor | None:
        """Of the output."""
        return self.position.bias

    def gates(self) -> Tensor:
        """The share of content in each head's weights: [K], from 0 to 1."""
        return torch.where(self.gate < 0, -self.gate, self.gate).tanh()  # abs() has no derivative at 0

    # The definition.

    def values(self, source: Tensor) -> Tensor:
        return self.position.values(source)

    def weights(self, x: Tensor, *, valid: Tensor | None = None, queries: Tensor | None = None) -> Aggregation:
        found = self.position._over_places(x, valid, queries)
        (one, content), (other, position) = self._of_both(x, found.weights, valid, queries).values()
        return replace(found, weights=one[:, None, None] * content + other[:, None, None] * position)

    def parts(
        self, x: Tensor, *, valid: Tensor | None = None, queries: Tensor | None = None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        return self._of_both(x, self.position._over_places(x, valid, queries).weights, valid, queries)

    def _of_both(
        self, x: Tensor, position: Tensor, valid: Tensor | None, queries: Tensor | None
    ) -> dict[str, tuple[Tensor, Tensor]]:
        """Shares and weights by position, and by content: [B, K, N, E]."""
        index, seen = self.position.places_read(x, valid)
        seen = index >= 0 if seen is None else seen & (index >= 0)
        scores = torch.einsum("bnkd,bmkd->bknm", self._queries(x, valid, queries), self._keys(x)).to(position.dtype)
        scores = scores.gather(-1, index.clamp(min=0).expand(*scores.shape[:-1], -1))
        share = self.gates().to(position.dtype)
        return {"content": (share, masked_softmax(scores, seen)), "position": (1 - share, position)}

    def _queries(self, x: Tensor, valid: Tensor | None, queries: Tensor | None) -> Tensor:
        """Scaled: [B, N, K, D]."""
        index = self.position.middles(x, valid)
        asking = pick_or_zero(x.flatten(1, -2), index if queries is None else index[:, queries])
        return self.q(asking).unflatten(-1, (self.num_heads, -1)) * self.scale

    def _keys(self, x: Tensor) -> Tensor:
        """[B, M, K, D]."""
        return self.k(x.flatten(1, -2)).unflatten(-1, (self.num_heads, -1))

    def project(self, mixed: Tensor) -> Tensor:
        return self.position.project(mixed)

    # The fast path.

    def fast(self, x: Tensor, values: Tensor) -> Tensor:
        position, share = self.position, self.gates()[:, None, None, None]
        tokens = values.reshape(x.shape)
        if self._shut(x):
            return position.fast(x, values)
        kept = position.mixed(tokens, position.value * (1 - share))
        q, k, v = self._queries(x, None, None), self._keys(x), values.expand(-1, -1, self.num_heads, -1)
        if self.padding_mode != "zeros":
            read = position.places_read(x, None)[0].flatten()
            k, v = k.index_select(1, read), v.index_select(1, read)
        more = self.dim - self.head_dim  # the library's kernel wants one width, else it forms all weights
        q, k, v = (_widened(t, by) for t, by in ((q, more), (k, more), (v, -more)))
        by_content = sdpa(q, k, v).unflatten(-1, (self.num_heads, -1))[..., : self.dim].flatten(2)
        content = position.valued(by_content, position.value * share)
        return position.biased(kept + content.reshape(kept.shape))

    def _shut(self, x: Tensor) -> bool:
        """Whether no content is let in and nobody asks for what the gates would have of it."""
        if torch.compiler.is_compiling() or x.device.type != "cpu":  # elsewhere the host would wait for the answer
            return False
        learning = any(p.requires_grad for p in (self.gate, self.q.weight, self.k.weight))
        return not (learning and torch.is_grad_enabled()) and not self.gate.any()

    # Geometry and cost.

    def out_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        return self.position.out_grid(grid)

    def macs(self, grid: Sequence[int]) -> int:
        return self.position.macs(grid) + self._macs_of_scores(grid)

    def macs_by_axes(self, grid: Sequence[int]) -> int:
        """Multiply-adds for one image where heads sit anywhere: a softmax along each axis, and the content."""
        read = self.num_heads * self.dim * (math.prod(grid) + self.out_dim // self.groups)
        content = math.prod(self.out_grid(grid)) * read
        return self.position.macs_by_axes(grid) + self._macs_of_scores(grid) + content

    def _macs_of_scores(self, grid: Sequence[int]) -> int:
        queries, sources = math.prod(self.out_grid(grid)), math.prod(grid)
        return self.num_heads * self.head_dim * ((queries + sources) * self.dim + queries * sources)


def _widened(tokens: Tensor, more: int) -> Tensor:
    """So many channels more, zero; as it is if that is none."""
    return nn.functional.pad(tokens, (0, more)) if more > 0 else tokens
