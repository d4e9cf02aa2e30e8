"""A learned gate between two operators' weights, on one set of values."""

import copy
import math
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation, aggregate
from glocal.arguments import flag, given
from glocal.kernels import gathered_sum
from glocal.mixer import TokenMixer
from glocal.mixers._attention import Attention, masked_softmax, sum_of
from glocal.operator import modes_kept

# Shape letters: B batch, N queries, M sources, K slots, G groups (heads), D channels per group, C channels.


class GatedMixture(TokenMixer):
    """A = (1 - g) A_a + g A_b: how much of `a` and of `b`, learned for each head, where both mix the same values.

    Weights: [B|1, G, N|1, K_a + K_b] over the sources of both, which may repeat, or [B|1, G, N, M] where both are
    dense; G the least common multiple of both operators' groups; dynamic where one of them is.

    Args:
        dim: channels C.
        a, b: two token mixers of `dim` channels; copied, what the caller holds stays as it is. Only what makes
            their weights is used and learned: their own projections of values and outputs are not parameters of
            the mixture (a joint `qkv` keeps the rows of queries and keys; of any other joint projection, as the
            `kv` of HaloAttention, the rows of values get gradients of zero).
        before_softmax: mixes scores instead, A = softmax((1 - g) S_a + g S_b), for two softmaxes over the same
            sources; a source that either masks stays out.

    Shape:
        x [B, *S, C] -> [B, *S_out, C], S_out that of both. `gate` [G], g = sigmoid(gate), 0 at the start;
        `v` and `proj` C -> C. Values and outputs are those of the mixture alone.

    Cost: that of both operators' weights, 2*C^2 for each token and C for each query and slot; counted. Both
    operators' weights are formed on either path: N*M of them for one that is dense.

    Raises:
        ValueError: no token mixers; operators that differ in channels, rank, output grid or sources; groups whose
            common multiple does not divide the channels; before_softmax where one is not one softmax of its `scores`,
            or reads other sources.

    Source: the gate is that of d'Ascoli et al., ConViT, ICML 2021, arXiv 2103.10697, section 3, between any two
    operators; mixing before or after the softmax: Dai et al., CoAtNet, NeurIPS 2021, arXiv 2106.04803, section 2.1.
    Differs from the paper: no paper has it in this form. The gate starts at one half of each, ConViT's at 0.73.
    """

    examples = (
        "GatedMixture(a=SelfAttention(num_heads=4), b=DepthwiseConv(kernel_size=3))",
        "GatedMixture(a=DynamicDepthwiseConv(kernel_size=3), b=AveragePooling())",
        "GatedMixture(a=RelativeAttention(grid_size=(16,), num_heads=2), b=SelfAttention(num_heads=4, causal=True))",
        "GatedMixture(a=NeighborhoodAttention(kernel_size=3, num_heads=4), "
        "b=NeighborhoodAttention(kernel_size=3, num_heads=2, position_bias=False), before_softmax=True)",
    )

    def __init__(self, dim: int, *, a: nn.Module, b: nn.Module, before_softmax: bool = False) -> None:
        for name, part in (("a", a), ("b", b)):
            if not isinstance(part, TokenMixer):
                raise ValueError(f"{name}: {part!r} is no token mixer; give an operator, as in {name}=SelfAttention")
            if part.dim != dim:
                raise ValueError(f"{name}: built for {part.dim} channels, dim is {dim}; give one of {dim}")
        assert isinstance(a, TokenMixer) and isinstance(b, TokenMixer)
        if a.rank is not None and b.rank is not None and a.rank != b.rank:
            raise ValueError(f"b: built for rank {b.rank}, a for rank {a.rank}; give both the same rank")
        super().__init__(dim, rank=b.rank if a.rank is None else a.rank)
        self.a, self.b = copy.deepcopy(a), copy.deepcopy(b)
        self.before_softmax = flag("before_softmax", before_softmax)
        causal = [bool(getattr(part, "causal", False)) for part in (a, b)]
        self.causal = any(causal) if before_softmax else all(causal)
        groups = [_keep_weights_only(part, (1,) * (self.rank or 1)) for part in (self.a, self.b)]
        self._groups = math.lcm(*groups)
        if dim % self._groups:
            raise ValueError(
                f"b: {groups[1]} groups, a has {groups[0]}; both repeat to {self._groups}, which does not divide {dim} "
                "channels; give other numbers of heads"
            )
        if before_softmax:
            self._refuse_before_softmax()
        self.gate = nn.Parameter(torch.zeros(self._groups))
        self.v = nn.Linear(dim, dim)
        self.proj = nn.Linear(dim, dim)

    def values(self, source: Tensor) -> Tensor:
        return self.v(source.flatten(1, -2)).unflatten(-1, (self._groups, -1))

    def weights(
        self,
        x: Tensor,
        *,
        valid: Tensor | None = None,
        queries: Tensor | None = None,
        update_statistics: bool = False,
    ) -> Aggregation:
        self.out_grid(x.shape[1:-1])  # refuses two strides
        gate = self.gate.sigmoid()[:, None, None]
        parts = (self.a, self.b)
        if self.before_softmax:
            # not from their weights: one that is rounded to zero is no mask, and the other's score may outweigh it
            a, b = (self._repeated(self._of(part, x, valid, queries, update_statistics, equal=True)) for part in parts)
            of_a, of_b = (self._scores_of(part, x, valid, queries) for part in parts)
            seen = (a.weights != 0) & (b.weights != 0)
            return replace(a, weights=masked_softmax((1 - gate) * of_a + gate * of_b, seen))
        a, b = (self._repeated(self._of(part, x, valid, queries, update_statistics)) for part in parts)
        shares = [(1 - gate) * a.weights, gate * b.weights]
        if a.index is None and b.index is None:
            return replace(a, weights=shares[0] + shares[1])
        everywhere = torch.arange(a.num_sources, device=x.device).view(1, 1, 1, -1)
        reads = [everywhere if found.index is None else found.index for found in (a, b)]
        return replace(a, weights=_side_by_side(shares), index=_side_by_side(reads))

    def project(self, mixed: Tensor) -> Tensor:
        return self.proj(mixed)

    def fast(
        self, x: Tensor, values: Tensor, *, valid: Tensor | None = None, update_statistics: bool = False
    ) -> Tensor:
        # each operator's sum with its own groups; neither weights nor slots are repeated
        sums = []
        for part in (self.a, self.b):
            found = self._of(part, x, valid, None, update_statistics)
            sums.append(_sum(found, values.flatten(2).unflatten(-1, (found.num_groups, -1))))
        gate = self.gate.sigmoid().repeat_interleave(self.dim // self._groups)
        return self.proj((1 - gate) * sums[0] + gate * sums[1])

    def unsupported(self, x: Tensor) -> str | None:
        return "a mixture before the softmax has its definition only" if self.before_softmax else None

    def out_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        of_a, of_b = self.a.out_grid(grid), self.b.out_grid(grid)
        if of_a != of_b:
            raise ValueError(
                f"GatedMixture: a gives a grid {tuple(of_a)} for {tuple(grid)}, b gives {tuple(of_b)}; give both the "
                "same stride"
            )
        return of_a

    def _of(
        self,
        part: TokenMixer,
        x: Tensor,
        valid: Tensor | None,
        queries: Tensor | None,
        update: bool,
        *,
        equal: bool = False,
    ) -> Aggregation:
        """An operator's own weights, or those it would have if all scores were equal."""
        bound, call = part._bind(x, given(valid=valid, queries=queries))
        found = TokenMixer._aggregation(_Equal(part) if equal else part, bound, call, update=update)  # type: ignore
        tokens = math.prod(x.shape[1:-1])
        if found.num_sources != tokens:
            raise ValueError(
                f"GatedMixture: {type(part).__name__} reads {found.num_sources} sources, x has {tokens} tokens; only "
                "operators that add no tokens of their own can share values"
            )
        return found

    def _repeated(self, found: Aggregation) -> Aggregation:
        """The same weights for all groups of the mixture."""
        index = None if found.index is None else _repeat(found.index, self._groups)
        return replace(found, weights=_repeat(found.weights, self._groups), index=index)

    def _scores_of(self, part: TokenMixer, x: Tensor, valid: Tensor | None, queries: Tensor | None) -> Tensor:
        bound, call = part._bind(x, given(valid=valid, queries=queries))
        scores = _repeat(sum_of(part._scores(bound, **part._only("_scores", call))), self._groups)
        selected = queries is None or "queries" in part._takes["_scores"] or scores.shape[2] == 1
        return scores if selected else scores[:, :, queries]

    def _refuse_before_softmax(self) -> None:
        """On a grid large enough to tell windows from neighborhoods."""
        found = []
        for name, part in (("a", self.a), ("b", self.b)):
            who = f"{name}: {type(part).__name__}"
            if type(part)._scores is TokenMixer._scores:
                raise ValueError(f"{who} has no scores, which before_softmax=True mixes; use before_softmax=False")
            with modes_kept(part), torch.no_grad():
                part.eval()
                x = _probe(part, (17, 16)[: self.rank or 1])
                found.append(part.weights(x))
                rows = found[-1].weights
                softmax = sum_of(part.scores(x)).expand(rows.shape).masked_fill(rows == 0, -torch.inf).softmax(-1)
                if not x.is_meta and not torch.allclose(softmax, rows, atol=1e-5):
                    raise ValueError(
                        f"{who} has weights that are more than one softmax, so scores alone cannot be mixed; use "
                        "before_softmax=False"
                    )
                equal = _Equal(part)._weights(x).weights
                if not x.is_meta and not torch.allclose(equal, (equal != 0) * equal.amax(-1, keepdim=True)):
                    raise ValueError(
                        f"{who} does not make its weights from what its scores() returns, so what it masks cannot be "
                        "told; let weights() call scores(), or use before_softmax=False"
                    )
        of_a, of_b = (f.index for f in found)
        same = of_a is of_b is None or (
            of_a is not None
            and of_b is not None
            and of_a.shape == of_b.shape
            and (of_a.is_meta or torch.equal(of_a, of_b))
        )
        if not same:
            raise ValueError(
                f"b: {type(self.b).__name__} reads other sources than {type(self.a).__name__}, so their scores cannot "
                "be added; use before_softmax=False"
            )


class _Equal:
    """A mixer seen by its own `weights` as one whose scores are all zero: every source that it may read weighs alike.

    Of weights that are not equal, those that are rounded to zero could not be told from those that are masked.
    """

    def __init__(self, mixer: TokenMixer) -> None:
        self._mixer = mixer

    def __getattr__(self, name: str) -> Any:
        return getattr(self._mixer, name)

    def _weights(self, *args: Any, **call: Any) -> Aggregation:
        return type(self._mixer)._weights(self, *args, **call)  # type: ignore[arg-type]

    def _scores(self, *args: Any, **call: Any) -> dict[str, Tensor]:
        return {name: torch.zeros_like(term) for name, term in self._mixer._scores(*args, **call).items()}

    def scores(self, *args: Any, **call: Any) -> dict[str, Tensor]:
        return {name: torch.zeros_like(term) for name, term in self._mixer.scores(*args, **call).items()}


class _Weights(nn.Module):
    def __init__(self, mixer: TokenMixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Aggregation:
        return self.mixer.weights(x)


def _keep_weights_only(part: TokenMixer, grid: tuple[int, ...]) -> int:
    """Takes parameters that do not make the weights out of `part`; returns the number of groups of its weights.

    They stay as buffers outside the state dict, since an operator's code and its repr may name them.
    """
    x = _probe(part, grid)
    if isinstance(part, Attention) and type(part.qkv) is nn.Linear and _reads(part, x) == {0, 1}:
        rows = part.qkv.out_features // 3 * 2  # those of queries and keys
        part.qkv.out_features = rows
        for name, parameter in list(part.qkv.named_parameters()):
            kept = nn.Parameter(parameter.detach()[:rows].clone(), requires_grad=parameter.requires_grad)
            setattr(part.qkv, name, kept)
    # on copies of its tensors, so that parameters are told apart where they are frozen or were made for inference
    with modes_kept(part), torch.inference_mode(False), torch.enable_grad():
        part.eval()  # no statistics of a single token
        held = {f"mixer.{name}": t.detach().clone() for name, t in (*part.named_parameters(), *part.named_buffers())}
        named = {name: held[f"mixer.{name}"].requires_grad_() for name, _ in part.named_parameters()}
        found = torch.func.functional_call(_Weights(part), held, (_probe(part, grid),))
        used: Iterable[Tensor | None] = [None] * len(named)
        if named and found.weights.requires_grad:
            used = torch.autograd.grad(found.weights.sum(), list(named.values()), allow_unused=True)
    for (name, parameter), gradient in zip(list(part.named_parameters()), used, strict=True):
        if gradient is None:
            path, _, leaf = name.rpartition(".")
            owner = part.get_submodule(path)
            delattr(owner, leaf)
            owner.register_buffer(leaf, parameter.detach(), persistent=False)
    return found.num_groups


def _reads(part: Attention, x: Tensor) -> set[int]:
    """Which of queries (0), keys (1) and values (2) the weights are made of."""
    read = set()

    def heads(tokens: Tensor, of: int) -> Tensor:
        read.add(of)
        return type(part).heads(part, tokens, of)

    part.heads = heads  # type: ignore[method-assign,assignment]
    try:
        with modes_kept(part), torch.no_grad():
            part.eval()
            part.weights(x)
    finally:
        del part.heads
    return read


def _probe(part: TokenMixer, grid: Sequence[int]) -> Tensor:
    """Tokens to look at an operator with, [1, *grid, C]; no random numbers are drawn."""
    like = next(part.parameters(), torch.empty(0))
    count = math.prod(grid) * part.dim
    return torch.arange(count, device=like.device).to(like.dtype).mul(0.7).sin().view(1, *grid, part.dim)


def _repeat(rows: Tensor, groups: int) -> Tensor:
    """[., G', ., .] -> [., G|1, ., .]: each group for the consecutive groups that it is cut into."""
    return rows if rows.shape[1] in (1, groups) else rows.repeat_interleave(groups // rows.shape[1], 1)


def _sum(found: Aggregation, values: Tensor) -> Tensor:
    """`aggregate`, without a copy of the values for each slot where all groups read the same sources."""
    weights, index = found.weights, found.index
    if index is None or index.shape[1] > 1:
        return aggregate(found, values)
    slots = max(weights.shape[-1], index.shape[-1])
    weights = weights.to(values.dtype).transpose(1, 2)  # [B|1, N|1, G, K]
    weights = weights.expand(values.shape[0], found.num_queries, found.num_groups, slots)
    index = index[:, 0].expand(-1, found.num_queries, slots)
    return gathered_sum(weights, values, index).flatten(2)


def _side_by_side(rows: Sequence[Tensor]) -> Tensor:
    shape = torch.broadcast_shapes(*(r.shape[:3] for r in rows))
    return torch.cat([r.expand(*shape, -1) for r in rows], -1)
