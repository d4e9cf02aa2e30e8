"""LESA: a convolution for the local term, attention for the context, and a gate between them."""

import math
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation, grid_positions
from glocal.arguments import extents, given, one_of, per_axis, positive
from glocal.mixers import _position_maps as maps
from glocal.mixers._attention import masked_softmax
from glocal.mixers._grid import pick
from glocal.mixers._library import back, images, out_lengths
from glocal.mixers._norm import BatchNorm, normalise
from glocal.mixers.deformable_conv import DeformableConv
from glocal.operator import TokenModule


class LocallyEnhancedAttention(TokenModule):
    """Unary term and gated binary term: y = U + w * B, w = sigmoid(F([U, B])) for each position and channel.

    U is a grouped 3x3 convolution and a 1x1 one. B is attention over all tokens, the query's own included, that adds
    learned vectors for positions to queries, keys and values: s_ij = q_i.k_j + q_i.r^q_ij + k_j.r^k_ji and
    B_i = sum_j A_ij (v_j + r^v_ij), each of the three terms, and of the two, with a batch norm of its own before the
    sum; there is no 1/sqrt(D). Values depend on the offset, so this is no weighted sum of one value for each token;
    `weights` and `terms` show its parts.

    Args:
        dim: channels C.
        grid_size: the grid that the position tables are made for, one length for both axes or each.
        num_groups: groups G of the attention (values have C / G channels, queries and keys half of them) and of the
            3x3 convolution; with one group there is no 1x1 convolution.
        position: "classification": vectors for the difference of two places in the raster, one table for all groups.
            The offset (0, 1) is then that from a row's end to the next row's start. "detection": queries only, a
            vector for the rows' difference plus one for the columns'.
        unary: the 3x3 convolution of U: "convolution", or "deformable", the first version of `DeformableConv`, as in
            the released detection models. None: y = B, the self-attention that the paper compares with.
        stride: the output is averaged over stride x stride tokens; the attention runs before that.

    Shape:
        x [B, H, W, C] -> [B, ceil(H / stride), ceil(W / stride), C]; windows at the end average what is there.
        Classification: `relative` [2*C/G, 2*N - 1], N = prod(grid_size), rows for queries (C/2G), keys (C/2G) and
        values (C/G), entry query - source + N - 1 (keys: source - query). Detection: `rel_height`, `rel_width`
        [2*S - 1, C/2G], entry source - query + S - 1. At another size tables are resized linearly; with `valid` at
        each image's own. `qkv_transform` has q, k, v of the first group first.

    Cost: N*C^2*(6 + 9/G) multiply-adds (2*N*C^2 without U), and 3.5*N^2*C for the attention (detection: 1.5*N^2*C
    + N*(H + W - 1)*C); the terms with positions are computed as products with whole tables, 4*N^2*C for 2*N^2*C.
    Above ENTRIES scores (_position_maps.py) they are formed in chunks of queries, again in the backward pass, so that
    tensor memory grows with N; a compiled or exported program forms all N^2. In training, statistics of the maps are
    found without forming them, in float64, from N*(C/2G)^2 numbers (classification).

    Raises:
        ValueError: groups that do not divide half the channels; `valid` that is no rectangle anchored at the origin;
            one token in all in training; SyncBatchNorm for the maps in training.

    Source: Yang et al., Locally Enhanced Self-Attention: Combining Self-Attention and Convolution as Local and Context
    Terms, arXiv 2107.05637; all details from the released code (LESA_classification, lib/models/LESA.py).
    Differs from the paper: the binary term includes the token itself, as the released code does, which has one square
    size only.
    """

    examples = (
        "LocallyEnhancedAttention(grid_size=8)",
        "LocallyEnhancedAttention(grid_size=(4, 6), num_groups=4, stride=2)",
        "LocallyEnhancedAttention(grid_size=(8, 7), num_groups=4, position='detection')",
        "LocallyEnhancedAttention(grid_size=4, num_groups=1, position='detection', stride=3)",
        "LocallyEnhancedAttention(grid_size=8, unary=None)",
    )

    def __init__(
        self,
        dim: int,
        *,
        grid_size: int | Sequence[int],
        num_groups: int = 8,
        position: Literal["classification", "detection"] = "classification",
        unary: Literal["convolution", "deformable"] | None = "convolution",
        stride: int = 1,
    ) -> None:
        super().__init__(dim, rank=2)
        self.grid_size, self.num_groups = grid_size, positive("num_groups", num_groups)
        self.stride = positive("stride", stride)
        self.position = one_of("position", position, ("classification", "detection"))
        self.unary = unary if unary is None else one_of("unary", unary, ("convolution", "deformable"))
        if dim % (2 * num_groups):
            raise ValueError(f"num_groups: {num_groups} does not divide half of {dim} channels; give one that does")
        value_dim = dim // num_groups
        key_dim = value_dim // 2
        self._parts = (key_dim, key_dim, value_dim)
        sides = per_axis("grid_size", grid_size, 2)

        self.qkv_transform = nn.Linear(dim, 2 * dim, bias=False)
        self.bn_qkv = BatchNorm(2 * dim)
        if position == "classification":
            self.relative = nn.Parameter(torch.randn(sum(self._parts), 2 * math.prod(sides) - 1) * value_dim**-0.5)
        else:
            self.rel_height = nn.Parameter(torch.randn(2 * sides[0] - 1, key_dim) * key_dim**-0.5)
            self.rel_width = nn.Parameter(torch.randn(2 * sides[1] - 1, key_dim) * key_dim**-0.5)
        maps_of_group, values_of_channel = (3, 2) if position == "classification" else (2, 1)
        self.bn_similarity = BatchNorm(maps_of_group * num_groups)
        self.bn_output = BatchNorm(values_of_channel * dim)

        nn.init.normal_(self.qkv_transform.weight, std=dim**-0.5)
        if unary is None:
            return

        # the numbers in parameters' names are those of the released code
        self.x_transform = nn.Sequential(
            nn.Conv2d(dim, dim, 3, padding=1, groups=num_groups, bias=False)
            if unary == "convolution"
            else DeformableConv(dim, groups=num_groups, modulated=False, bias=False)  # type: ignore[abstract]
        )
        if num_groups > 1:
            self.x_transform.append(nn.Linear(dim, dim, bias=False))
        self.bn_x = BatchNorm(dim)
        self.reasoning = nn.Sequential(nn.ReLU(), nn.Linear(2 * dim, dim, bias=False), BatchNorm(dim), nn.ReLU())
        self.projection = nn.Sequential(nn.Linear(dim, dim, bias=False), BatchNorm(dim))
        for part in (*self.x_transform, self.reasoning[1], self.projection[0]):
            nn.init.kaiming_normal_(part.weight, mode="fan_out", nonlinearity="relu")

    def mix(self, x: Tensor, *, valid: Tensor | None = None, update_statistics: bool = False) -> Tensor:
        terms = self._terms(x, valid, update_statistics)
        out = terms["binary"] if self.unary is None else terms["unary"] + terms["gate"] * terms["binary"]
        return out if self.stride == 1 else self._averaged(out, valid)

    def terms(self, x: Tensor, *, valid: Tensor | None = None) -> dict[str, Tensor]:
        """The parts of y = U + w * B, before any stride, without changing any state.

        Returns:
            "unary" U, "binary" B, both through their batch norms, and "gate" w: [B, H, W, C] each; B alone if
            there is no U.
        """
        x, call = self._bind(x, given(valid=valid))
        return self._terms(x, call.get("valid"), False)

    def weights(self, x: Tensor, *, queries: Tensor | None = None) -> Aggregation:
        """The binary term's softmax, [B, G, N, N] or [B, G, Q, N], without changing any state.

        They multiply values that depend on the offset too, v_j + r^v_ij before their batch norm.

        Args:
            x: [B, H, W, C].
            queries: int64 [Q], positions in the flattened grid; only these rows are computed.
        """
        x, call = self._bind(x, given(queries=queries))
        grid = tuple(x.shape[1:-1])
        count, places = math.prod(grid), grid_positions(grid, device=x.device)
        attention, scale = self._attention(x, None, False)
        chosen = torch.arange(count, device=x.device) if queries is None else call["queries"]
        shown = attention.weights(chosen, scale)
        out_grid = grid if queries is None else (len(queries),)
        return Aggregation(shown, None, count, places[chosen], places, out_grid, grid)

    def out_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        return out_lengths(grid, self.stride)

    def _terms(self, x: Tensor, valid: Tensor | None, update: bool) -> dict[str, Tensor]:
        x = x if valid is None else x.masked_fill(~valid[..., None], 0)
        attention, scale = self._attention(x, valid, update)
        values = normalise(self.bn_output, attention.binary(scale).unflatten(1, x.shape[1:-1]), valid, update=update)
        binary = values.unflatten(-1, (self.dim, -1)).sum(-1)
        if self.unary is None:
            return {"binary": binary}
        local = self.x_transform[0]
        unary = local(x) if self.unary == "deformable" else back(local(images(x)), 2)
        for pointwise in self.x_transform[1:]:
            unary = pointwise(unary)
        unary = normalise(self.bn_x, unary, valid, update=update)
        gate = self.reasoning[1](torch.cat([unary, binary], -1).relu())
        gate = normalise(self.reasoning[2], gate, valid, update=update).relu()
        gate = normalise(self.projection[1], self.projection[0](gate), valid, update=update).sigmoid()
        return {"unary": unary, "binary": binary, "gate": gate}

    def _attention(self, x: Tensor, valid: Tensor | None, update: bool) -> tuple["_Raster | _Axial", Tensor]:
        """Queries, keys, values and tables; what each map is multiplied by, [maps, 1, G, 1, 1]."""
        qkv = normalise(self.bn_qkv, self.qkv_transform(x), valid, update=update).flatten(1, 2)
        qkv = qkv if valid is None else qkv.masked_fill(~valid.flatten(1)[..., None], 0)
        attention: _Raster | _Axial
        if self.position == "classification":
            attention = _Raster(qkv, self.num_groups, self._parts, self.relative, valid)
        else:
            tables = (self.rel_height, self.rel_width)
            attention = _Axial(qkv, self.num_groups, self._parts, tables, x.shape[1:-1], valid)
        scale = self._map_scale(attention, valid, update).to(qkv.dtype)
        return attention, scale.view(-1, 1, self.num_groups, 1, 1)

    def _map_scale(self, attention: "_Raster | _Axial", valid: Tensor | None, update: bool) -> Tensor:
        """What the batch norm multiplies each map by, [maps * G].

        What it adds is the same for all sources, and the softmax takes it away again.
        """
        norm = self.bn_similarity
        # the true gradient of what has no effect, so that none is missing
        nothing = 0 * norm.bias
        if not norm.training or not len(attention.q):
            variance = norm.running_var
        elif not isinstance(norm, BatchNorm):
            raise ValueError(
                f"LocallyEnhancedAttention: bn_similarity is a {type(norm).__name__}, which needs all N x N scores at "
                "once in training; leave BatchNorm in place there, or call eval()"
            )
        else:
            totals, squares = (torch.cat(sums) for sums in zip(*attention.sums(), strict=True))
            if valid is None:
                count = totals.new_full((), len(attention.q)) * attention.q.shape[2] ** 2
            else:
                count = valid.flatten(1).sum(1).double().square().sum()
            mean = totals / count.clamp(min=1)
            variance = (squares / count.clamp(min=1) - mean.square()).clamp(min=0)
            if update:
                unbiased = variance.detach() * count / (count - 1).clamp(min=1)
                norm.move(mean, unbiased, None if valid is None else count > 1)
        assert variance is not None
        return norm.weight * (variance + norm.eps).rsqrt() + nothing

    def _averaged(self, out: Tensor, valid: Tensor | None) -> Tensor:
        """Means over stride x stride tokens; at the end, and with `valid`, of those that are there."""
        grid = out.shape[1:-1]
        there = out.new_ones(1, *grid, 1) if valid is None else valid[..., None].to(out.dtype)
        more = [m * self.stride - n for n, m in zip(grid, self.out_grid(grid), strict=True)]
        ends = (0, more[1], 0, more[0])
        mean, share = (
            nn.functional.avg_pool2d(nn.functional.pad(images(t), ends), self.stride) for t in (out * there, there)
        )
        return back(mean / torch.where(share > 0, share, 1), 2)


class _Raster:
    """Attention with vectors for the difference of two places in the raster of real tokens."""

    def __init__(self, qkv: Tensor, groups: int, parts: Sequence[int], relative: Tensor, valid: Tensor | None) -> None:
        count = qkv.shape[1]
        self.order = self.length = self.seen = None
        if valid is None:
            size = torch.full((1,), count, device=qkv.device)
        else:
            # real tokens first: an image's raster is then that which it has alone
            size = extents(valid).prod(1)
            self.order = (~valid.flatten(1)).to(torch.uint8).argsort(dim=1, stable=True)
            self.length, qkv = size, pick(qkv, self.order)
            self.seen = (torch.arange(count, device=qkv.device) < size[:, None])[:, None, None]
        self.q, self.k, self.v = _split(qkv, groups, parts)
        table = maps.resized(relative.T, size, count)
        self.query_table, self.key_table, self.value_table = table.split(list(parts), 2)

    def sums(self) -> list[tuple[Tensor, Tensor]]:
        """Of the three maps' entries and of their squares."""
        return [
            maps.content_sums(self.q, self.k),
            maps.sequence_sums(self.q, self.query_table, self.length),
            maps.sequence_sums(self.k, self.key_table, self.length),
        ]

    def binary(self, scale: Tensor) -> Tensor:
        """Both sums of values, before their batch norm: [B, N, 2 * C], side by side for each channel."""
        count, (content, query, key) = self.k.shape[2], scale
        if self.q.is_meta and self.seen is None:  # on shapes alone multiply-adds are counted: those of the definition
            queries = torch.arange(count, device=self.q.device)
            weights = self.weights(queries, scale)
            vectors = self.value_table[0, queries[:, None] - queries + count - 1]
            sums = weights @ self.v, torch.einsum("bgqn,qnc->bgqc", weights, vectors)
            return torch.stack(sums, -1).transpose(1, 2).flatten(2)
        # rows in reverse order, see `banded`
        q, at_q = (self.q * content).flip(2), (self.q * query).flip(2)
        tables = self.query_table.flip(1), self.key_table, self.value_table.flip(1)

        def rows(
            start: int, end: int, q: Tensor, at_q: Tensor, k: Tensor, at_k: Tensor, v: Tensor, *of: Tensor
        ) -> Tensor:
            query_table, key_table, value_table = (table[:, :, start : end + count - 1] for table in of)
            scores = q[:, :, start:end] @ k.mT
            scores = scores + maps.banded(at_q[:, :, start:end], query_table, count)
            scores = scores + maps.banded_columns(at_k, key_table, end - start)
            weights = masked_softmax(scores, self.seen)
            at_places = maps.spread(weights) @ value_table
            return torch.stack([weights @ v, at_places.to(v.dtype)], -1)

        parts = q, at_q, self.k, self.k * key, self.v, *(t[:, None] for t in tables)
        mixed = maps.in_chunks(rows, count, self.q.shape[0] * self.q.shape[1] * count, *parts)
        mixed = mixed.flip(2).transpose(1, 2).flatten(2)
        return mixed if self.order is None else pick(mixed, self.order.argsort(1))

    def weights(self, queries: Tensor, scale: Tensor) -> Tensor:
        """Rows of the softmax, offset by offset; for looking, without padding."""
        content, query, key = scale
        offset = queries[:, None] - torch.arange(self.k.shape[2], device=queries.device)
        middle = self.k.shape[2] - 1
        q = self.q[:, :, queries]
        scores = (q * content) @ self.k.mT
        scores = scores + torch.einsum("bgqc,qnc->bgqn", q * query, self.query_table[0, middle + offset])
        scores = scores + torch.einsum("bgnc,qnc->bgqn", self.k * key, self.key_table[0, middle - offset])
        return scores.softmax(-1)


class _Axial:
    """Attention with vectors for the difference of two rows and of two columns, for queries only."""

    def __init__(
        self,
        qkv: Tensor,
        groups: int,
        parts: Sequence[int],
        tables: tuple[Tensor, Tensor],
        grid: Sequence[int],
        valid: Tensor | None,
    ) -> None:
        self.valid, self.seen = valid, None if valid is None else valid.flatten(1)[:, None, None]
        self.q, self.k, self.v = _split(qkv, groups, parts)
        size = torch.tensor([list(grid)], device=qkv.device) if valid is None else extents(valid)
        places = grid_positions(grid, device=qkv.device).long()
        each = []
        for axis, (n, table) in enumerate(zip(grid, tables, strict=True)):
            here = maps.resized(table, size[:, axis], n)
            products = self.q @ here[:, None].mT  # [B, G, N, 2n - 1]
            entry = torch.arange(n, device=qkv.device) - places[:, axis, None] + n - 1
            each.append(products.gather(-1, entry.expand(*products.shape[:2], -1, -1)))
        self.height, self.width = each

    def sums(self) -> list[tuple[Tensor, Tensor]]:
        """Of the two maps' entries and of their squares."""
        return [maps.content_sums(self.q, self.k), maps.axial_sums(self.height, self.width, self.valid)]

    def binary(self, scale: Tensor) -> Tensor:
        """The sum of values, before its batch norm: [B, N, C]."""
        count, (content, query) = self.k.shape[2], scale
        q, height, width = self.q * content, self.height * query, self.width * query

        def rows(start: int, end: int, k: Tensor, v: Tensor, *of_queries: Tensor) -> Tensor:
            return self._softmax(k, *(t[:, :, start:end] for t in of_queries)) @ v

        parts = self.k, self.v, q, height, width
        mixed = maps.in_chunks(rows, count, self.q.shape[0] * self.q.shape[1] * count, *parts)
        return mixed.transpose(1, 2).flatten(2)

    def weights(self, queries: Tensor, scale: Tensor) -> Tensor:
        """Rows of the softmax."""
        content, query = scale
        q, height, width = (t[:, :, queries] for t in (self.q, self.height, self.width))
        return self._softmax(self.k, q * content, height * query, width * query)

    def _softmax(self, k: Tensor, q: Tensor, height: Tensor, width: Tensor) -> Tensor:
        scores = q @ k.mT + (height[..., None] + width[..., None, :]).flatten(-2)
        return masked_softmax(scores, self.seen)


def _split(qkv: Tensor, groups: int, parts: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    """[B, N, 2 * C] -> q, k, v, [B, G, N, channels of each]."""
    q, k, v = qkv.unflatten(-1, (groups, -1)).transpose(1, 2).split(list(parts), -1)
    return q, k, v
