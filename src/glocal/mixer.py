"""The interface: tokens in, tokens out, with the aggregation weights as a value on the way.

An operator is written as three methods, `weights`, `values` and `project`, which ARE its definition: plain
PyTorch, any device and dtype, twice differentiable. `fast` is optional: the same result without forming the
weights. `TokenMixer` checks the arguments, picks the path and puts the parts together, once for all operators.

Shape letters: B batch, S grid, C channels, G groups (heads), N queries, M sources, D channels per group.
"""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation, aggregate
from glocal.arguments import given
from glocal.operator import Operator


class Unsupported(ValueError):
    """A path that was asked for by name cannot run; the message is "<Class>: <why>"."""


class Cache:
    """What an operator remembers of earlier calls: a causal one of its tokens, one that reads a source of that.

    A call then needs to bring only what is new. One mixer's: give each layer of a network its own. `join` and `put`
    never change what was remembered; `commit`, called once at the end of a forward pass, does.
    """

    def __init__(self) -> None:
        self._past: dict[str, Tensor] = {}
        self._next: dict[str, Tensor] = {}
        self._length = 0
        self._owner: int | None = None

    def __len__(self) -> int:
        """Tokens that calls have brought so far; fewer may be kept."""
        return self._length

    def join(self, name: str, new: Tensor, limit: int | None = None) -> Tensor:
        """`new` [B, t, ...] behind what is remembered under this name, of which the last `limit` tokens are kept."""
        past = self.recall(name, new.shape[0])
        joined = new if past is None else torch.cat([past, new], dim=1) if new.shape[1] else past
        # a copy: a view would keep all of a long beginning in memory
        self._next[name] = joined if limit is None else joined[:, max(joined.shape[1] - limit, 0) :].clone()
        return joined

    def recall(self, name: str, batch: int) -> Tensor | None:
        """What is remembered under this name, of as many sequences as x has; None before the first call."""
        past = self._past.get(name)
        if past is not None and past.shape[0] != batch:
            raise ValueError(f"cache: remembers {past.shape[0]} sequences, x has {batch}")
        return past

    def put(self, name: str, state: Tensor) -> None:
        """To be remembered in place of what is: [B, ...], such as running sums."""
        self._next[name] = state

    def commit(self, tokens: int = 0) -> None:
        """Remembers what was joined or put since, by a call that brought so many tokens."""
        self._past.update(self._next)
        self._next = {}
        self._length += tokens

    def copy(self) -> "Cache":
        """The same memory now; later commits to either do not touch the other."""
        other = Cache()
        other._past, other._length, other._owner = dict(self._past), self._length, self._owner
        return other

    def reorder(self, sequences: Tensor) -> None:
        """Keeps these sequences, int64 [B'], some perhaps more than once: those that a beam search goes on with."""
        self._past = {name: past.index_select(0, sequences) for name, past in self._past.items()}

    def belong_to(self, mixer: nn.Module) -> None:
        """Refuses a second mixer, whose keys and values would mix with those of the first."""
        if self._owner is None:
            self._owner = id(mixer)
        elif self._owner != id(mixer):
            raise ValueError(
                f"cache: holds another layer's tokens; give this {type(mixer).__name__} a Cache of its own"
            )


class TokenMixer(Operator):
    """y_i = project(sum_j A_ij v_j), x [B, *S, C] channels last, S = (T,) or (H, W).

    A subclass is final and defines:

    - `__init__(self, dim, *, ...)`: keeps every argument under its own name; `repr` prints them.
    - `values(source)`: what each source offers, [B, *S, C] -> [B, M, G|1, D]. Where sources are not the tokens
      (pooled ones), it names `valid` and zeroes itself what holds no real token; where it names `cache`, it joins
      what is remembered itself.
    - `weights(x, ...)`: how much goes where -> `Aggregation`, differentiable.
    - `scores(x, ...)` or `parts(x, ...)`: optional, the terms of the softmax that makes the weights, or the weights
      that they are a mixture of.
    - `project(mixed)`: write back, [B, N, G*D] -> [B, N, C_out]; the identity if left out.
    - `fast(x, values, ...)`: optional, the output [B, ..., C_out] without forming A. `values` are those of
      `values`, already zero where `valid` is False; `fast(x, ...)` makes them itself, with whatever else it needs.
    - `unsupported(x, ...)`: optional, a sentence that says why `fast` cannot run here, or None.
    - `out_grid(grid)`, `macs(grid)`, `remembers` where the defaults do not hold.
    - `examples`: specs for dim 32 that tests, benchmarks and galleries build.

    `weights`, `scores`, `parts`, `fast` and `unsupported` name in their own signature those call arguments they use,
    out of `source, grid, valid, pos_embed, source_pos_embed, queries, cache` (see `forward`). What an operator's
    `weights` does not name is refused in words, but for three that need nothing of it: `queries` (rows are then
    selected), `valid` (values elsewhere are zero in any case) and `grid` (x is reshaped). Where a class says
    `takes_positions`, since its weights compare tokens, `pos_embed` needs nothing either: `weights`, `scores` and
    `fast` get x with it, `values` x without it (a `fast` that makes the values names it, and gets x without it). A
    call with an argument that `weights` names and `fast` does not runs by the definition. An operator with batch norm
    or dropout in its weight path names `update_statistics` too: True in a forward pass in training, False when
    somebody only looks.
    """

    impl: Literal["auto", "reference", "fast"] = "auto"
    _hooks = ("_weights", "_scores", "_parts", "_unsupported", "fast", "values")

    # What an operator writes.

    @abstractmethod
    def values(self, source: Tensor) -> Tensor:
        """What each source offers: [B, *S, C] -> [B, M, G|1, D]."""

    @abstractmethod
    def _weights(self, *args: Any, **call: Any) -> Aggregation: ...

    def _scores(self, *args: Any, **call: Any) -> dict[str, Tensor]:
        raise ValueError(f"{type(self).__name__}: has no scores, its weights are no softmax of a sum")

    def _parts(self, *args: Any, **call: Any) -> dict[str, tuple[Tensor, Tensor]]:
        raise ValueError(f"{type(self).__name__}: has no parts, its weights are no mixture of others")

    def _unsupported(self, *args: Any, **call: Any) -> str | None:
        return None

    def fast(self, *args: Any, **call: Any) -> Tensor:
        """The output without forming A; see the class."""
        raise Unsupported(f"{type(self).__name__}: has no fast path")

    def project(self, mixed: Tensor) -> Tensor:
        """Writes back: [B, N, G*D] -> [B, N, C_out]."""
        return mixed

    # What is written once.

    def forward(
        self,
        x: Tensor,
        source: Tensor | None = None,
        *,
        grid: Sequence[int] | None = None,
        valid: Tensor | None = None,
        pos_embed: Tensor | None = None,
        source_pos_embed: Tensor | None = None,
        queries: Tensor | None = None,
        cache: Cache | None = None,
    ) -> Tensor:
        """Mixes tokens.

        Args:
            x: [B, *S, C].
            source: [B, *S', C], where values (and keys) come from instead of x.
            grid: x is flat, [B, P + prod(grid), C]: P class or register tokens, then a grid of this shape.
            valid: bool, True at real tokens of the source (x if there is none): [B, *S], or flat [B, M]. Real
                tokens get what they would get without the padding; what padded ones get is not specified.
            pos_embed: added to x for queries, and for keys if there is no source; never to values.
            source_pos_embed: added to the source for keys.
            queries: int64 [Q], positions in the flattened output; only these are computed.
            cache: of causal operators on sequences: what they remember of earlier calls; x [B, t, C] holds the tokens
                that follow, and `valid` is that of all tokens so far. Of operators that need a source: the source
                [B, t, C] follows what is remembered, or is left out, and `valid` is that of all of it. Updated by the
                call.

        Returns:
            [B, *S_out, C_out]; flat [B, N, C_out] where x is flat, [B, Q, C_out] with `queries`.

        Raises:
            ValueError: an argument of the wrong shape, or one that this operator does not take.
            Unsupported: `impl` is "fast" and the fast path cannot run; says why.
        """
        call = given(
            source=source, grid=grid, valid=valid, pos_embed=pos_embed, source_pos_embed=source_pos_embed,
            queries=queries, cache=cache,
        )  # fmt: skip
        if self.impl not in ("auto", "reference", "fast"):
            raise ValueError(f"{type(self).__name__}: impl is {self.impl!r}; it must be 'auto', 'reference' or 'fast'")
        if self.impl == "reference":
            return self.reference(x, **call)
        reason = self.unsupported(x, **call)
        if reason is not None:
            if self.impl == "fast":
                raise Unsupported(f"{type(self).__name__}: {reason}")
            return self.reference(x, **call)
        shape = self._out_shape(x, call)
        x, call = self._bind(x, call)
        values = {"values": self._values(x, call)} if "values" in self._takes["fast"] else {}
        out = self.fast(self._placed(x, call, "fast"), **values, **self._only("fast", call, update=True))
        if cache is not None:
            cache.commit(self._brought(x, call))
        return out.reshape(shape)

    def reference(self, x: Tensor, source: Tensor | None = None, **call: Any) -> Tensor:
        """The definition, project(aggregate(weights, values)); arguments and result as `forward`."""
        call = given(source=source, **call)
        shape = self._out_shape(x, call)
        x, call = self._bind(x, call)
        out = self.project(aggregate(self._aggregation(x, call, update=True), self._values(x, call)))
        if "cache" in call:
            call["cache"].commit(self._brought(x, call))
        return out.reshape(shape)

    def weights(self, x: Tensor, source: Tensor | None = None, **call: Any) -> Aggregation:
        """How much of every source goes into every query; arguments as `forward`. Changes no state."""
        call = _looking(given(source=source, **call))
        x, call = self._bind(x, call)
        return self._aggregation(x, call, update=False)

    def scores(self, x: Tensor, source: Tensor | None = None, **call: Any) -> dict[str, Tensor]:
        """The named terms before the softmax ("content", "position"), each broadcastable to [B, G, N, K]."""
        call = _looking(given(source=source, **call))
        x, call = self._bind(x, call)
        return self._scores(self._placed(x, call), **self._only("_scores", call))

    def parts(self, x: Tensor, source: Tensor | None = None, **call: Any) -> dict[str, tuple[Tensor, Tensor]]:
        """Of weights that are a mixture: by name ("content", "position") the share of each part in every head, [G],
        and its weights, [B|1, G, N, K]. Shares times parts, added up, are the weights."""
        call = _looking(given(source=source, **call))
        x, call = self._bind(x, call)
        return self._parts(self._placed(x, call), **self._only("_parts", call))

    def unsupported(self, x: Tensor, source: Tensor | None = None, **call: Any) -> str | None:
        """Why the fast path cannot run on these arguments, in a sentence; None if it can."""
        if type(self).fast is TokenMixer.fast:
            return "has no fast path"
        x, call = self._bind(x, given(source=source, **call))
        # zeroed values are all that `valid` means to an operator whose weights do not name it; positions are in x
        idle = ("valid", "pos_embed") if "values" in self._takes["fast"] else ()
        for name in call:
            if name not in self._takes["fast"] and not (name in idle and name not in self._takes["_weights"]):
                return f"the fast path does not take {name}, the definition does"
        if not torch.compiler.is_compiling() and (
            torch._C._are_functorch_transforms_active() or torch.autograd.forward_ad._current_level >= 0
        ):
            return "transforms of torch.func and forward-mode derivatives go through the definition"
        return self._unsupported(x, **self._only("_unsupported", call))

    def _aggregation(self, x: Tensor, call: dict[str, Any], *, update: bool) -> Aggregation:
        found = self._weights(self._placed(x, call), **self._only("_weights", call, update=update))
        queries = call.get("queries")
        return found.select(queries) if queries is not None and "queries" not in self._takes["_weights"] else found

    def _placed(self, x: Tensor, call: dict[str, Any], hook: str = "_weights") -> Tensor:
        """x with its positions, which are not for values, unless the operator adds them itself."""
        if "pos_embed" in call and "pos_embed" not in self._takes["_weights"] | self._takes[hook]:
            return x + call["pos_embed"]
        return x

    def _values(self, x: Tensor, call: dict[str, Any]) -> Tensor:
        values = self.values(call.get("source", x), **self._only("values", call))
        if "cache" in call and "cache" not in self._takes["values"]:
            values = call["cache"].join("values", values, self.remembers)
        if "valid" in call and "valid" not in self._takes["values"]:
            values = values.masked_fill(~call["valid"].reshape(*values.shape[:2], 1, 1), 0)
        return values


def _looking(call: dict[str, Any]) -> dict[str, Any]:
    """The same call on a copy of the cache, so that nothing is left to commit."""
    return call | {"cache": call["cache"].copy()} if "cache" in call else call
