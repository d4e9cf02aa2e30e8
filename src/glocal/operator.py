"""What every operator is: tokens in, tokens out, with one call.

`TokenMixer` (mixer.py) is a weighted sum whose weights are a value; `TokenModule`, here, is any other module with
the same call. Both check their arguments, and know their text and their cost, by what is written once in `Operator`.

Shape letters: B batch, S grid, C channels, N queries, M sources.
"""

import inspect
import math
import types
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

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


class Operator(nn.Module, ABC):
    """Abstract: x [B, *S, C] -> [B, *S_out, C_out], channels last, S = (T,) or (H, W).

    What all operators write: `__init__(self, dim, *, ...)`, which keeps every argument under its own name;
    `out_grid(grid)` and `macs(grid)` where the defaults do not hold; `examples`, specs for dim 32 that tests,
    benchmarks and galleries build; and hooks, which name in their own signature those call arguments that they use.
    `undecayed` names the parameters that the operator's published training exempts from weight decay, where the rule
    for biases and scales, one axis, does not find them: tables of position biases, places of heads.
    One that means nothing without a source says so in `needs_source`, and how wide it is in `source_dim`.
    """

    defined_in = ""  # "path/to/file.py:" for an operator of a user's file
    examples: ClassVar[tuple[str, ...]] = ()
    undecayed: ClassVar[tuple[str, ...]] = ()
    needs_source: ClassVar[bool] = False  # a call without one is refused
    exempt: ClassVar[dict[str, str]] = {}  # checks of the contract that cannot run, and why in words

    dim: int
    rank: int | None  # of the grid; None: any
    takes_positions: ClassVar[bool] = False  # its kind adds `pos_embed` for it, see TokenMixer

    _hooks: ClassVar[tuple[str, ...]]  # the methods that take arguments of the call; the first one is the definition
    _takes: ClassVar[dict[str, frozenset[str]]] = {}  # by hook: the arguments that it names

    def __init__(self, dim: int, *, rank: int | None = None) -> None:
        super().__init__()
        positive("dim", dim)
        if rank is not None and rank not in (1, 2):
            raise ValueError(f"rank: {rank}, must be 1 (sequences) or 2 (images)")
        self.dim, self.rank = dim, rank

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_hooks" in cls.__dict__:  # a kind of operator, not one
            return
        definition = cls._hooks[0]
        written = next(base for base in cls.__mro__ if "_hooks" in base.__dict__)
        final = next((base for base in cls.__mro__[1:-1] if base is not written and definition in base.__dict__), None)
        if final is not None:
            raise TypeError(f"{cls.__name__}: {final.__name__} is final; write an operator, or hold a {final.__name__}")
        # What an operator writes as `weights` becomes the hook `_weights`; the name itself stays the checked
        # public call of its kind, the same for all operators.
        for hook in cls._hooks:
            name = hook.removeprefix("_")
            if name != hook and name in cls.__dict__:
                setattr(cls, hook, cls.__dict__[name])
                setattr(cls, name, written.__dict__[name])
        cls._takes = {hook: _arguments(cls, written, hook) for hook in cls._hooks}
        # torch.compile counts recompilations by code object: one of its own for each class, or the ninth
        # operator compiled by itself would go over the limit and run eagerly
        whole = written.__dict__["forward"]
        code = whole.__code__.replace(co_qualname=f"{cls.__qualname__}.forward")
        forward = types.FunctionType(code, whole.__globals__, "forward", whole.__defaults__, whole.__closure__)
        forward.__kwdefaults__, forward.__annotations__ = whole.__kwdefaults__, whole.__annotations__
        forward.__doc__ = whole.__doc__
        cls.forward = forward

    @property
    def remembers(self) -> int | None:
        """With a cache: how many tokens before the new ones are kept, and read; None: all."""
        return None

    @abstractmethod
    def reference(self, x: Tensor, source: Tensor | None = None, **call: Any) -> Tensor:
        """The definition; arguments and result as those of a call."""

    def out_grid(self, grid: Sequence[int]) -> tuple[int, ...]:
        """The shape of the output's grid for an input grid."""
        return tuple(grid)

    def macs(self, grid: Sequence[int]) -> int:
        """Multiply-adds of the definition for one image; counted on shapes alone unless a class says it."""
        return self.counted_macs(grid)

    def besides(self, x: Tensor) -> dict[str, Tensor]:
        """What a call needs besides x, made of x, for whoever has nothing else: the same tokens as the source.

        {} where x is enough. A source of another width has the tokens' channels, over again where it is wider.
        """
        if not self.needs_source:
            return {}
        channels = torch.arange(self._source_dim, device=x.device)
        return {"source": x[..., channels % x.shape[-1]]}

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

    def no_weight_decay(self) -> set[str]:
        """Names of the parameters, own and of parts, that weight decay leaves alone; named as in timm."""
        own = {name for name, _ in self.named_parameters() if name.partition(".")[0] in self.undecayed}
        return own | undecayed_parts(self)

    def __repr__(self) -> str:
        """The canonical spec: `glocal.build(repr(mixer), mixer.dim)` is the same operator."""
        shown = []
        named = inspect.signature(type(self).__init__).parameters
        for name, parameter in named.items():
            if name in ("self", "dim") or (name == "head_dim" and "num_heads" in named):  # which says it
                continue
            value = getattr(self, name)
            if isinstance(parameter.default, bool) and not isinstance(value, bool):
                value = value is not None  # `bias` names the argument and the parameter it makes
            value = tuple(value) if isinstance(value, list) else value
            if isinstance(value, tuple) and isinstance(parameter.default, int) and len({*value}) == 1:
                value = value[0]  # 3 and (3, 3) are one kernel
            if value != parameter.default and not (name in ("out_dim", "source_dim") and value == self.dim):
                shown.append(f"{name}={value!r}")
        return f"{self.defined_in}{type(self).__name__}({', '.join(shown)})"

    def _bind(self, x: Tensor, call: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Checks the arguments; reshapes a flat x for operators that know nothing of `grid`."""
        name, takes = type(self).__name__, self._takes[self._hooks[0]]
        call = dict(call)
        for argument in call:
            written_once = ("valid", "queries", "grid", *(["pos_embed"] if self.takes_positions else []))
            if argument not in takes and argument not in written_once:
                raise ValueError(f"{name}: does not take {argument}; nothing in it depends on one")
        check_tokens(name, "x", x, self.dim)
        source, grid = call.get("source"), call.get("grid")
        if source is not None:
            check_tokens(name, "source", source, self._source_dim, "source_dim" if self.needs_source else "dim")
            if source.shape[0] != x.shape[0]:
                raise ValueError(f"{name}: source has {source.shape[0]} images, x has {x.shape[0]}")
        elif self.needs_source:
            if not len(call.get("cache", ())):
                raise ValueError(
                    f"{name}: source is not given; it reads another sequence [B, *S, {self._source_dim}], not x"
                )
            call["source"] = source = x.new_empty(x.shape[0], 0, self._source_dim)  # all of it is remembered
        if "cache" in call:
            if not self.needs_source:  # which is all that its cache remembers
                if not getattr(self, "causal", False) or x.dim() != 3:
                    raise ValueError(f"{name}: cache was given; it needs a causal operator and x of shape [B, t, C]")
                for other in call.keys() & {"source", "grid"}:
                    raise ValueError(
                        f"{name}: {other} was given with a cache, which holds one sequence of plain tokens"
                    )
            elif len(call["cache"]) and source is not None and source.dim() != 3:
                raise ValueError(
                    f"{name}: source has shape {tuple(source.shape)}, the cache holds a sequence; give [B, t, C] to "
                    "follow it, or none"
                )
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
                about_x = {"pos_embed", "valid"} if source is None else {"pos_embed"}
                for argument in call.keys() & about_x:
                    call[argument] = call[argument].unflatten(1, grid)
        axes = self._axes(x, call)
        if self.rank is not None and len(axes) != self.rank:
            other = len(axes)
            way_out = (
                f"build it with rank={other}"
                if "rank" in inspect.signature(type(self)).parameters
                else "it has no other"
            )
            raise ValueError(f"{name}: built for rank {self.rank}, x has a grid of rank {other}, {axes}; {way_out}")
        return x, call

    def _axes(self, x: Tensor, call: dict[str, Any]) -> tuple[int, ...]:
        """The lengths of which there must be `rank`."""
        return tuple(call["grid"] if "grid" in call else x.shape[1:-1])

    def _bind_valid(self, x: Tensor, call: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        source = call.get("source")
        tokens = tuple((x if source is None else source).shape[:-1])
        past = len(call["cache"]) if "cache" in call else 0
        valid = check_valid(type(self).__name__, call["valid"], (tokens[0], tokens[1] + past, *tokens[2:]))
        call["valid"] = valid[:, past - self._kept(call.get("cache")) :]
        if source is None:
            return finite_outside(x, valid[:, past:]), call
        call["source"] = finite_outside(source, valid[:, past:])
        return x, call

    def _kept(self, cache: Any) -> int:
        """Tokens of earlier calls that are among the sources, in front of the new ones."""
        past = 0 if cache is None else len(cache)
        return past if self.remembers is None else min(past, self.remembers)

    def _out_shape(self, x: Tensor, call: dict[str, Any]) -> tuple[int, ...]:
        if "queries" in call:
            return (x.shape[0], call["queries"].numel(), self._out_dim)
        if "grid" in call:
            grid = tuple(call["grid"])
            prefix = x.shape[1] - math.prod(grid)
            return (x.shape[0], prefix + math.prod(self.out_grid(grid)), self._out_dim)
        return (x.shape[0], *self.out_grid(x.shape[1:-1]), self._out_dim)

    @property
    def _out_dim(self) -> int:
        return getattr(self, "out_dim", self.dim)

    @property
    def _source_dim(self) -> int:
        return getattr(self, "source_dim", self.dim)

    def _brought(self, x: Tensor, call: dict[str, Any]) -> int:
        """Tokens that a call adds to what a cache remembers."""
        return math.prod((call["source"] if self.needs_source else x).shape[1:-1])

    def _only(self, hook: str, call: dict[str, Any], *, update: bool = False) -> dict[str, Any]:
        """The arguments that a hook names."""
        takes = self._takes[hook]
        taken = {name: value for name, value in call.items() if name in takes}
        if "update_statistics" in takes:
            taken["update_statistics"] = update and self.training
        return taken


class TokenModule(Operator):
    """An operator that is no weighted sum of one value for each token: an ordinary module with the same call.

    A subclass is final and defines `mix(x, ...)`, [B, *S, C] -> [B, *S_out, C_out] (or flat), which names those of
    `source, grid, valid, pos_embed, source_pos_embed, cache` that it uses; an operator with batch norm names
    `update_statistics` too. What it does not name is refused in words, but for `grid` (x is then reshaped) and
    `queries` (rows are selected). It has no weights; what mixers it holds can be inspected.
    """

    _hooks = ("_mix",)

    @abstractmethod
    def _mix(self, *args: Any, **call: Any) -> Tensor: ...

    def mix(self, x: Tensor, source: Tensor | None = None, **call: Any) -> Tensor:
        """The output, without changing any state; arguments and result as `forward`."""
        return self._run(x, given(source=source, **call), update=False)

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
        cache: Any = None,
    ) -> Tensor:
        """Mixes tokens; arguments, result and errors as those of `TokenMixer.forward`."""
        call = given(
            source=source, grid=grid, valid=valid, pos_embed=pos_embed, source_pos_embed=source_pos_embed,
            queries=queries, cache=cache,
        )  # fmt: skip
        return self._run(x, call, update=True)

    def reference(self, x: Tensor, source: Tensor | None = None, **call: Any) -> Tensor:
        """The same as `forward`: there is one way to compute it."""
        return self._run(x, given(source=source, **call), update=True)

    def _run(self, x: Tensor, call: dict[str, Any], *, update: bool) -> Tensor:
        shape = self._out_shape(x, call)
        if "cache" in call and not update:
            call = call | {"cache": call["cache"].copy()}  # nothing is left to commit
        x, call = self._bind(x, call)
        if "valid" in call and "valid" not in self._takes["_mix"]:
            raise ValueError(f"{type(self).__name__}: takes no valid: it would mix padding into real tokens")
        out = self._mix(x, **self._only("_mix", call, update=update))
        if "cache" in call and update:
            call["cache"].commit(self._brought(x, call))
        if "queries" in call:
            out = out.flatten(1, -2)[:, call["queries"]]
        return out.reshape(shape)


class _Definition(nn.Module):
    def __init__(self, mixer: Operator) -> None:
        super().__init__()
        self.mixer = mixer

    def forward(self, x: Tensor) -> Tensor:
        return self.mixer.reference(x, **self.mixer.besides(x))


def no_weight_decay(model: nn.Module) -> set[str]:
    """Names of the parameters that weight decay leaves alone: what the model says by its method of this name, as
    operators, `Backbone` and timm's models have one; what its parts say if it has none."""
    own = getattr(model, "no_weight_decay", None)
    return undecayed_parts(model) if own is None else set(own())


def undecayed_parts(model: nn.Module) -> set[str]:
    """`no_weight_decay` of everything inside a model, by the names that the model's parameters have."""
    return {f"{part}.{name}" for part, child in model.named_children() for name in no_weight_decay(child)}


@contextmanager
def modes_kept(module: nn.Module) -> Iterator[None]:
    """Training or evaluation of every submodule is afterwards what it was: a frozen batch norm stays frozen."""
    modes = [(part, part.training) for part in module.modules()]
    try:
        yield
    finally:
        for part, training in modes:
            part.training = training


def _arguments(cls: type[Operator], written: type[Operator], hook: str) -> frozenset[str]:
    """The call arguments that a hook names; `values` too where `fast` does.

    Raises:
        TypeError: the hook names something else, or takes anything.
    """
    if getattr(cls, hook) is getattr(written, hook):
        return frozenset()
    named = dict(list(inspect.signature(getattr(cls, hook)).parameters.items())[2:])  # without self and x
    arguments = (*CALL, "values") if hook == "fast" else CALL
    for name, parameter in named.items():
        if name not in (*arguments, "update_statistics") or parameter.kind in (
            parameter.VAR_KEYWORD,
            parameter.VAR_POSITIONAL,
        ):
            raise TypeError(
                f"{cls.__name__}.{hook.lstrip('_')}: {parameter} is no argument of a call; "
                f"name those that it uses, out of {', '.join(arguments)}"
            )
    return frozenset(named)
