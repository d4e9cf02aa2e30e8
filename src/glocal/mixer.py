"""The interface: tokens in, tokens out, with the aggregation weights as a value on the way.

An operator is written as three methods, `weights`, `values` and `project`, which ARE its definition: plain
PyTorch, any device and dtype, twice differentiable. `fast` is optional: the same result without forming the
weights. `TokenMixer` checks the arguments, picks the path and puts the parts together, once for all operators.

Shape letters: B batch, S grid, C channels, G groups (heads), N queries, M sources, D channels per group.
"""

import inspect
import math
import types
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from glocal.aggregation import Aggregation, aggregate
from glocal.arguments import (
    CALL,
    check_positions,
    check_queries,
    check_tokens,
    check_valid,
    finite_outside,
    given,
    positive,
)


class Unsupported(ValueError):
    """A path that was asked for by name cannot run; the message is "<Class>: <why>"."""


class Cache:
    """What a causal operator remembers of earlier tokens, so that a call needs to bring only the new ones.

    One mixer's: give each layer of a network its own. `join` never changes what was remembered; `commit`, called
    once at the end of a forward pass, does.
    """

    def __init__(self) -> None:
        self._past: dict[str, Tensor] = {}
        self._joined: dict[str, Tensor] = {}
        self._owner: int | None = None

    def __len__(self) -> int:
        """Tokens remembered."""
        return next((past.shape[1] for past in self._past.values()), 0)

    def join(self, name: str, new: Tensor) -> Tensor:
        """`new` [B, t, ...] behind what is remembered under this name."""
        past = self._past.get(name, new[:, :0])
        if past.shape[0] != new.shape[0]:
            raise ValueError(f"cache: remembers {past.shape[0]} sequences, x has {new.shape[0]}")
        self._joined[name] = torch.cat([past, new], dim=1)
        return self._joined[name]

    def commit(self) -> None:
        """Remembers what was joined since."""
        self._past.update(self._joined)
        self._joined = {}

    def copy(self) -> "Cache":
        """The same memory now; later commits to either do not touch the other."""
        other = Cache()
        other._past, other._owner = dict(self._past), self._owner
        return other

    def belong_to(self, mixer: nn.Module) -> None:
        """Refuses a second mixer, whose keys and values would mix with those of the first."""
        if self._owner is None:
            self._owner = id(mixer)
        elif self._owner != id(mixer):
            raise ValueError(
                f"cache: holds another layer's tokens; give this {type(mixer).__name__} a Cache of its own"
            )


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
    defined_in = ""  # "path/to/file.py:" for an operator of a user's file
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
        super().__init_subclass__(**kwargs)
        final = next(
            (base for base in cls.__mro__[1:-1] if base is not TokenMixer and "_weights" in base.__dict__), None
        )
        if final is not None:
            raise TypeError(f"{cls.__name__}: {final.__name__} is final; write an operator, or hold a {final.__name__}")
        # What an operator writes as `weights` becomes the hook `_weights`; the name itself stays the checked
        # public call of this class, the same for all operators.
        for name in ("weights", "scores", "unsupported"):
            if name in cls.__dict__:
                setattr(cls, f"_{name}", cls.__dict__[name])
                setattr(cls, name, TokenMixer.__dict__[name])
        cls._takes = {name: _arguments(cls, name) for name in ("_weights", "_scores", "_unsupported", "fast")}
        # torch.compile counts recompilations by code object: one of its own for each class, or the ninth
        # operator compiled by itself would go over the limit and run eagerly
        code = TokenMixer.forward.__code__.replace(co_qualname=f"{cls.__qualname__}.forward")
        forward = types.FunctionType(code, TokenMixer.forward.__globals__, "forward", TokenMixer.forward.__defaults__)
        forward.__kwdefaults__ = TokenMixer.forward.__kwdefaults__
        forward.__annotations__, forward.__doc__ = TokenMixer.forward.__annotations__, TokenMixer.forward.__doc__
        cls.forward = forward  # type: ignore[method-assign]

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
            valid: bool, True at real tokens of the source (x if there is none): [B, *S], or flat [B, M]. Real
                tokens get what they would get without the padding; what padded ones get is not specified.
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
        out = self.fast(x, self._values(x, call), **self._only("fast", call, update=True))
        if cache is not None:
            cache.commit()
        return out.reshape(shape)

    def reference(self, x: Tensor, source: Tensor | None = None, **call: Any) -> Tensor:
        """The definition, project(aggregate(weights, values)); arguments and result as `forward`."""
        call = given(source=source, **call)
        shape = self._out_shape(x, call)
        x, call = self._bind(x, call)
        out = self.project(aggregate(self._aggregation(x, call, update=True), self._values(x, call)))
        if "cache" in call:
            call["cache"].commit()
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
        return self._scores(x, **self._only("_scores", call))

    def unsupported(self, x: Tensor, source: Tensor | None = None, **call: Any) -> str | None:
        """Why the fast path cannot run on these arguments, in a sentence; None if it can."""
        if type(self).fast is TokenMixer.fast:
            return "has no fast path"
        x, call = self._bind(x, given(source=source, **call))
        for name in call:
            # zeroed values are all that `valid` means to an operator whose weights do not name it
            if name not in self._takes["fast"] and (name != "valid" or "valid" in self._takes["_weights"]):
                return f"the fast path does not take {name}, the definition does"
        if not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active():
            return "transforms of torch.func go through the definition"
        return self._unsupported(x, **self._only("_unsupported", call))

    def counted_macs(self, grid: Sequence[int]) -> int:
        """Multiply-adds that torch.utils.flop_counter finds in the definition for one image, without computing."""
        from torch.utils.flop_counter import FlopCounterMode

        state = {name: torch.empty_like(t, device="meta") for name, t in self.state_dict(keep_vars=True).items()}
        like = next((t for t in state.values() if t.is_floating_point()), torch.empty(0))
        x = torch.empty(1, *grid, self.dim, device="meta", dtype=like.dtype)
        with modes_kept(self), FlopCounterMode(display=False) as counter:
            self.eval()
            torch.func.functional_call(_Definition(self), {f"mixer.{k}": v for k, v in state.items()}, (x,))
        return counter.get_total_flops() // 2  # it counts a multiply-add as two operations

    def __repr__(self) -> str:
        """The canonical spec: `glocal.build(repr(mixer), mixer.dim)` is the same operator."""
        shown = []
        for name, parameter in inspect.signature(type(self).__init__).parameters.items():
            if name in ("self", "dim", "head_dim"):  # head_dim is said by num_heads
                continue
            value = getattr(self, name)
            if isinstance(parameter.default, bool) and not isinstance(value, bool):
                value = value is not None  # `bias` names the argument and the parameter it makes
            value = tuple(value) if isinstance(value, list) else value
            if isinstance(value, tuple) and isinstance(parameter.default, int) and len({*value}) == 1:
                value = value[0]  # 3 and (3, 3) are one kernel
            if value != parameter.default and not (name == "out_dim" and value == self.dim):
                shown.append(f"{name}={value!r}")
        return f"{self.defined_in}{type(self).__name__}({', '.join(shown)})"

    def _bind(self, x: Tensor, call: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Checks the arguments; reshapes a flat x for operators that know nothing of `grid`."""
        name, takes = type(self).__name__, self._takes["_weights"]
        call = dict(call)
        for argument in call:
            if argument not in takes and argument not in ("valid", "queries", "grid"):
                raise ValueError(f"{name}: does not take {argument}; its weights do not depend on one")
        check_tokens(name, "x", x, self.dim)
        source, grid = call.get("source"), call.get("grid")
        if source is not None:
            check_tokens(name, "source", source, self.dim)
            if source.shape[0] != x.shape[0]:
                raise ValueError(f"{name}: source has {source.shape[0]} images, x has {x.shape[0]}")
        if "cache" in call:
            call["cache"].belong_to(self)
        for argument, tokens in (("pos_embed", x), ("source_pos_embed", x if source is None else source)):
            if argument in call:
                call[argument] = check_positions(name, argument, call[argument], tokens)
        if "queries" in call:
            check_queries(name, call["queries"])
        if "valid" in call:
            x, call = self._bind_valid(x, call)
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
                for argument in call.keys() & {"valid", "pos_embed"}:
                    call[argument] = call[argument].unflatten(1, grid)
        if self.rank is not None and x.dim() - 2 != self.rank:
            other = x.dim() - 2
            way_out = (
                f"build it with rank={other}"
                if "rank" in inspect.signature(type(self)).parameters
                else "it has no other"
            )
            raise ValueError(
                f"{name}: built for rank {self.rank}, x has a grid of rank {other}, {tuple(x.shape[1:-1])}; {way_out}"
            )
        return x, call

    def _bind_valid(self, x: Tensor, call: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        source = call.get("source")
        tokens = tuple((x if source is None else source).shape[:-1])
        past = len(call["cache"]) if "cache" in call else 0
        valid = check_valid(type(self).__name__, call["valid"], (tokens[0], tokens[1] + past, *tokens[2:]))
        call["valid"] = valid
        if source is None:
            return finite_outside(x, valid[:, past:]), call
        call["source"] = finite_outside(source, valid)
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


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Training or evaluation of every submodule is afterwards what it was: a frozen batch norm stays frozen."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _looking(call: dict[str, Any]) -> dict[str, Any]:
    """The same call on a copy of the cache, so that nothing is left to commit."""
    return call | {"cache": call["cache"].copy()} if "cache" in call else call


def _arguments(cls: type[TokenMixer], hook: str) -> frozenset[str]:
    """The call arguments that a hook names.

    Raises:
        TypeError: the hook names something else, or takes anything.
    """
    named = {
        name: p for name, p in inspect.signature(getattr(cls, hook)).parameters.items() if name not in ("self", "x")
    }
    if getattr(cls, hook) is getattr(TokenMixer, hook):
        return frozenset()
    known = {*CALL, "update_statistics", *(["values"] if hook == "fast" else [])}
    for name, parameter in named.items():
        if name not in known or parameter.kind in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL):
            raise TypeError(
                f"{cls.__name__}.{hook.lstrip('_')}: {parameter} is no argument of a call; "
                f"name those that it uses, out of {', '.join(CALL)}"
            )
    return frozenset(named) - {"values"}
