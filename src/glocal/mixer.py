"""The interface: tokens in, tokens out, with the aggregation weights as a value on the way.

An operator is written as three methods, `weights`, `values` and `project`, which ARE its definition: plain
PyTorch, any device and dtype, twice differentiable. `fast` is optional: the same result without forming the
weights. `TokenMixer` checks the arguments, picks the path and puts the parts together, once for all operators.

Shape letters: B batch, S grid, C channels, G groups (heads), N queries, M sources, D channels per group.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation, aggregate


class Unsupported(ValueError):
    """A path that was asked for by name cannot run; the message is "<Class>: <why>"."""


class Cache:
    """What a causal operator remembers of earlier tokens, so that a call needs to bring only the new ones.

    `join` never changes what was remembered; `commit`, called once at the end of a forward pass, does. So the
    weights of a call can be asked for again, as often as wanted.
    """

    def __init__(self) -> None:
        self._past: dict[str, Tensor] = {}
        self._joined: dict[str, Tensor] = {}

    def __len__(self) -> int:
        """Tokens remembered."""
        return next((past.shape[1] for past in self._past.values()), 0)

    def join(self, name: str, new: Tensor) -> Tensor:
        """`new` [B, t, ...] behind what is remembered under this name."""
        past = self._past.get(name)
        self._joined[name] = new if past is None else torch.cat([past, new], dim=1)
        return self._joined[name]

    def commit(self) -> None:
        """Remembers what was joined since."""
        self._past.update(self._joined)
        self._joined = {}

    def copy(self) -> "Cache":
        """The same memory now; later commits to either do not touch the other."""
        other = Cache()
        other._past = dict(self._past)
        return other


class TokenMixer(nn.Module, ABC):
    """y_i = project(sum_j A_ij v_j), x [B, *S, C] channels last, S = (T,) or (H, W).

    A subclass is final and defines:

    - `__init__(self, dim, *, ...)`: keeps every argument under its own name; `repr` prints them.
    - `values(source)`: what each token offers, [B, *S, C] -> [B, M, G|1, D].
    - `weights(x, ...)`: how much goes where -> `Aggregation`, differentiable.
    - `project(mixed)`: write back, [B, N, G*D] -> [B, N, C_out]; the identity if left out.
    - `fast(x, values, ...)`: optional, the output [B, ..., C_out] without forming A. `values` are those of
      `values`, already zero where `valid` is False.
    - `unsupported(x, ...)`: optional, a sentence that says why `fast` cannot run here, or None.
    - `out_grid(grid)`, `macs(grid)` where the defaults do not hold.
    - `examples`: specs for dim 32 that tests, benchmarks and galleries build.

    `weights`, `scores`, `fast` and `unsupported` name in their own signature only those call arguments they
    use, out of `source, grid, valid, pos_embed, source_pos_embed, queries, cache` (see `forward`). What an
    operator's `weights` does not name is refused in words, but for three that need nothing of it: `queries`
    (rows are then selected), `valid` (values elsewhere are zero in any case) and `grid` (x is reshaped).
    A call with an argument that `weights` names and `fast` does not runs by the definition. An operator with
    batch norm in its weight path names `update_statistics` too: True in a forward pass, False when somebody
    only looks.
    """

    impl: Literal["auto", "reference", "fast"] = "auto"
    examples: ClassVar[tuple[str, ...]] = ()

    dim: int
    rank: int | None  # of the grid; None: any

    def __init__(self, dim: int, *, rank: int | None = None) -> None:
        super().__init__()
        positive("dim", dim)
        if rank is not None and rank not in (1, 2):
            raise ValueError(f"rank: {rank}, must be 1 (sequences) or 2 (images)")
        self.dim, self.rank = dim, rank

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # What an operator writes as `weights` becomes the hook `_weights`; the name itself stays the checked
        # public call of this class, the same for all operators.
        super().__init_subclass__(**kwargs)
        for name in ("weights", "scores", "unsupported"):
            if name in cls.__dict__:
                setattr(cls, f"_{name}", cls.__dict__[name])
                setattr(cls, name, TokenMixer.__dict__[name])
        cls._takes = {
            name: frozenset(inspect.signature(getattr(cls, name)).parameters) - {"self", "x", "values"}
            for name in ("_weights", "_scores", "_unsupported", "fast")
        }

    _takes: ClassVar[dict[str, frozenset[str]]] = {}

    # What an operator writes.

    @abstractmethod
    def values(self, source: Tensor) -> Tensor:
        """What each token offers: [B, *S, C] -> [B, M, G|1, D]."""

    @abstractmethod
    def _weights(self, *args: Any, **call: Any) -> Aggregation: ...

    def _scores(self, *args: Any, **call: Any) -> dict[str, Tensor]:
        raise ValueError(f"{type(self).__name__}: has no scores, its weights do not come from a softmax")

    def _unsupported(self, *args: Any, **call: Any) -> str | None:
        return None

    def fast(self, *args: Any, **call: Any) -> Tensor:
        """The output without forming A; see the class."""
        raise Unsupported(f"{type(self).__name__}: has no fast path")

    def project(self, mixed: Tensor) -> Tensor:
        """Writes back: [B, N, G*D] -> [B, N, C_out]."""
        return mixed

    def out_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        """The shape of the output's grid for an input grid."""
        return tuple(grid)

    def macs(self, grid: Sequence[int]) -> int:
        """Multiply-adds of the definition for one image; counted on shapes alone unless a class says it."""
        return self.counted_macs(grid)

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
            valid: bool, True at real tokens of the source (x if there is none): [B, *S], flat if x is.
            pos_embed: added to x for queries, and for keys if there is no source; never to values.
            source_pos_embed: added to the source for keys.
            queries: int64 [Q], positions in the flattened output; only these are computed.
            cache: tokens of earlier calls; x holds those that follow. Updated by the call.

        Returns:
            [B, *S_out, C_out]; flat [B, N, C_out] where x is flat, [B, Q, C_out] with `queries`.

        Raises:
            ValueError: an argument of the wrong shape, or one that this operator does not take.
            Unsupported: `impl` is "fast" and the fast path cannot run; says why.
        """
        call = _given(
            source=source, grid=grid, valid=valid, pos_embed=pos_embed, source_pos_embed=source_pos_embed,
            queries=queries, cache=cache,
        )  # fmt: skip
        if self.impl == "reference":
            return self.reference(x, **call)
        reason = self.unsupported(x, **call)
        if reason is not None:
            if self.impl == "fast":
                raise Unsupported(f"{type(self).__name__}: {reason}")
            return self.reference(x, **call)
        shape = self._out_shape(x, call)
        x, call = self._bind(x, call)
        out = self.fast(x, self._values(x, call), **self._only("fast", call, update=True))
        if cache is not None:
            cache.commit()
        return out.reshape(shape)

    def reference(self, x: Tensor, source: Tensor | None = None, **call: Any) -> Tensor:
        """The definition, project(aggregate(weights, values)); arguments and result as `forward`."""
        call = _given(source=source, **call)
        shape = self._out_shape(x, call)
        x, call = self._bind(x, call)
        out = self.project(aggregate(self._aggregation(x, call, update=True), self._values(x, call)))
        if "cache" in call:
            call["cache"].commit()
        return out.reshape(shape)

    def weights(self, x: Tensor, source: Tensor | None = None, **call: Any) -> Aggregation:
        """How much of every source goes into every query; arguments as `forward`. Changes no state."""
        call = _given(source=source, **call)
        x, call = self._bind(x, call)
        return self._aggregation(x, call, update=False)

    def scores(self, x: Tensor, source: Tensor | None = None, **call: Any) -> dict[str, Tensor]:
        """The named terms before the softmax ("content", "position"), each broadcastable to [B, G, N, K]."""
        call = _given(source=source, **call)
        x, call = self._bind(x, call)
        return self._scores(x, **self._only("_scores", call))

    def unsupported(self, x: Tensor, source: Tensor | None = None, **call: Any) -> str | None:
        """Why the fast path cannot run on these arguments, in a sentence; None if it can."""
        if type(self).fast is TokenMixer.fast:
            return "has no fast path"
        x, call = self._bind(x, _given(source=source, **call))
        for name in call:
            # zeroed values are all that `valid` means to an operator whose weights do not name it
            if name not in self._takes["fast"] and (name != "valid" or "valid" in self._takes["_weights"]):
                return f"the fast path does not take {name}, the definition does"
        return self._unsupported(x, **self._only("_unsupported", call))

    def counted_macs(self, grid: Sequence[int]) -> int:
        """Multiply-adds that torch.utils.flop_counter finds in the definition for one image, without computing."""
        from torch.utils.flop_counter import FlopCounterMode

        state = {name: torch.empty_like(t, device="meta") for name, t in self.state_dict(keep_vars=True).items()}
        like = next((t for t in state.values() if t.is_floating_point()), torch.empty(0))
        x = torch.empty(1, *grid, self.dim, device="meta", dtype=like.dtype)
        was_training = self.training
        self.eval()
        try:
            with FlopCounterMode(display=False) as counter:
                torch.func.functional_call(_Definition(self), {f"mixer.{k}": v for k, v in state.items()}, (x,))
        finally:
            self.train(was_training)
        return counter.get_total_flops() // 2  # it counts a multiply-add as two operations

    def __repr__(self) -> str:
        """The canonical spec: `glocal.build(repr(mixer), mixer.dim)` is the same operator."""
        given = []
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            if name in ("self", "dim", "head_dim"):  # head_dim is said by num_heads
                continue
            value = getattr(self, name)
            if isinstance(parameter.default, bool) and not isinstance(value, bool):
                value = value is not None  # `bias` names the argument and the parameter it makes
            value = tuple(value) if isinstance(value, list) else value
            if value != parameter.default and not (name == "out_dim" and value == self.dim):
                given.append(f"{name}={value!r}")
        return f"{type(self).__name__}({', '.join(given)})"

    def _bind(self, x: Tensor, call: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Checks the arguments; reshapes a flat x for operators that know nothing of `grid`."""
        name, takes = type(self).__name__, self._takes["_weights"]
        call = dict(call)
        for argument in call:
            if argument not in takes and argument not in ("valid", "queries", "grid"):
                raise ValueError(f"{name}: does not take {argument}; its weights do not depend on one")
        _check_tokens(name, "x", x, self.dim)
        source = call.get("source")
        if source is not None:
            _check_tokens(name, "source", source, self.dim)
            if source.shape[0] != x.shape[0]:
                raise ValueError(f"{name}: source has {source.shape[0]} images, x has {x.shape[0]}")
        valid, grid = call.get("valid"), call.get("grid")
        if valid is not None:
            tokens = (x if source is None else source).shape[:-1]
            if "cache" in call:
                tokens = (tokens[0], tokens[1] + len(call["cache"]))
            if valid.dtype != torch.bool or valid.shape[0] != tokens[0] or valid[0:1].numel() != math.prod(tokens[1:]):
                raise ValueError(
                    f"{name}: valid has shape {tuple(valid.shape)} and dtype {valid.dtype}; "
                    f"needs {tuple(tokens)} and torch.bool, True at real tokens"
                )
            call["valid"] = valid = valid.reshape(tokens)
        if grid is not None:
            call["grid"] = grid = tuple(grid)
            prefix = x.shape[1] - math.prod(grid)
            if x.dim() != 3 or prefix < 0:
                raise ValueError(
                    f"{name}: x has shape {tuple(x.shape)}, grid {grid} needs [B, P + {math.prod(grid)}, C]"
                )
            if "grid" not in takes:
                if prefix:
                    raise ValueError(f"{name}: {prefix} class tokens in front of grid {grid}; it has no place for any")
                x = x.unflatten(1, grid)
                del call["grid"]
                if valid is not None:
                    call["valid"] = valid.unflatten(1, grid)
        if self.rank is not None and x.dim() - 2 != self.rank:
            raise ValueError(
                f"{name}: built for rank {self.rank}, x has a grid of rank {x.dim() - 2}, {tuple(x.shape[1:-1])}; "
                f"build it with rank={x.dim() - 2}"
            )
        return x, call

    def _only(self, hook: str, call: dict[str, Any], *, update: bool = False) -> dict[str, Any]:
        """The arguments that a hook names."""
        takes = self._takes[hook]
        taken = {name: value for name, value in call.items() if name in takes}
        if "update_statistics" in takes:
            taken["update_statistics"] = update and self.training
        return taken

    def _aggregation(self, x: Tensor, call: dict[str, Any], *, update: bool) -> Aggregation:
        found = self._weights(x, **self._only("_weights", call, update=update))
        queries = call.get("queries")
        return found.select(queries) if queries is not None and "queries" not in self._takes["_weights"] else found

    def _values(self, x: Tensor, call: dict[str, Any]) -> Tensor:
        values = self.values(call.get("source", x))
        if "cache" in call:
            values = call["cache"].join("values", values)
        if "valid" in call:
            values = values.masked_fill(~call["valid"].reshape(*values.shape[:2], 1, 1), 0)
        return values

    def _out_shape(self, x: Tensor, call: dict[str, Any]) -> tuple[int, ...]:
        if "queries" in call:
            return (x.shape[0], len(call["queries"]), self._out_dim)
        if "grid" in call:
            grid = tuple(call["grid"])
            prefix = x.shape[1] - math.prod(grid)
            return (x.shape[0], prefix + math.prod(self.out_grid(grid)), self._out_dim)
        return (x.shape[0], *self.out_grid(x.shape[1:-1]), self._out_dim)

    @property
    def _out_dim(self) -> int:
        return getattr(self, "out_dim", self.dim)


class _Definition(nn.Module):
    def __init__(self, mixer: TokenMixer) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer.reference(x)


ARGUMENTS = ("source", "grid", "valid", "pos_embed", "source_pos_embed", "queries", "cache")


def _given(**call: Any) -> dict[str, Any]:
    """The arguments of a call that were given."""
    for name in call:
        if name not in ARGUMENTS:
            raise TypeError(f"a token mixer has no call argument {name!r}; it has {', '.join(ARGUMENTS)}")
    return {name: value for name, value in call.items() if value is not None}


def _check_tokens(mixer: str, name: str, tokens: Tensor, dim: int) -> None:
    if tokens.dim() < 3:
        raise ValueError(f"{mixer}: {name} has shape {tuple(tokens.shape)}, needs [B, *grid, {dim}]")
    if tokens.shape[-1] != dim:
        raise ValueError(f"{mixer}: {name} has {tokens.shape[-1]} channels, dim is {dim}; channels come last")


def positive(name: str, value: int) -> int:
    """`value` if it is a positive whole number, else a ValueError that names it."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name}: {value!r}, must be a positive whole number")
    return value


def per_axis(name: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """One positive number for each axis of the grid, from one for all or one for each."""
    sizes = (value,) * rank if isinstance(value, int) else tuple(value)
    if len(sizes) != rank:
        raise ValueError(
            f"{name}: {value!r} has {len(sizes)} entries, rank is {rank}; give one number or one for each axis"
        )
    return tuple(positive(name, size) for size in sizes)


def odd_kernel(name: str, value: int | Sequence[int], rank: int) -> tuple[int, ...]:
    """`per_axis` for kernels that need a centre."""
    sizes = per_axis(name, value, rank)
    if any(size % 2 == 0 for size in sizes):
        raise ValueError(f"{name}: {value!r}, must be odd, so that a window has a centre; try {sizes[0] | 1}")
    return sizes


def resolve_heads(dim: int, num_heads: int | None, head_dim: int | None) -> int:
    """The number of heads from either argument; head_dim is 32 where neither is given."""
    if num_heads is not None and head_dim is not None and num_heads * head_dim != dim:
        raise ValueError(
            f"num_heads: {num_heads} heads of head_dim {head_dim} make {num_heads * head_dim}, not {dim}; give one"
        )
    if num_heads is None:
        head_dim = positive("head_dim", 32 if head_dim is None else head_dim)
        if dim % head_dim:
            raise ValueError(
                f"head_dim: {head_dim} does not divide {dim} channels; give num_heads or a head_dim that does"
            )
        return dim // head_dim
    positive("num_heads", num_heads)
    if dim % num_heads:
        raise ValueError(f"num_heads: {num_heads} does not divide {dim} channels")
    return num_heads
