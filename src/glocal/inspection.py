"""Looking into a model: its token mixers' inputs are kept as it runs, their weights computed on request.

The run keeps its fast paths and its speed, and its outputs are bit for bit the same.
"""

import inspect as signatures
import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from glocal.adapters import Foreign, NotSeen, foreign
from glocal.aggregation import Aggregation, aggregate
from glocal.mixer import Cache, TokenMixer
from glocal.operator import TokenModule, modes_kept

# largest difference, relative to the largest entry, at which a rebuilt output counts as the recorded one
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float16: 0.01}


class Call:
    """One call of a token mixer: what went in and what came out."""

    def __init__(self, name: str, mixer: TokenMixer, call: dict[str, Any], output: Tensor) -> None:
        self.name = name
        self.mixer = mixer
        self.output = output
        self._call = call
        self._modes = [(part, part.training) for part in mixer.modules()]
        device = output.device.type
        self._autocast = (torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        self._versions = _versions(call, output, mixer)

    @property
    def x(self) -> Tensor:
        """The mixer's input [B, *S, C]."""
        return self._call["x"]

    @property
    def query_grid(self) -> tuple[int, ...]:
        """The grid of its queries; where there are class tokens, they stand in front of it."""
        return tuple(self._call.get("grid", self.output.shape[1:-1]))

    @property
    def num_queries(self) -> int:
        """Rows of its weights."""
        return math.prod(self.output.shape[1:-1])

    def shares(self) -> dict[str, Tensor]:
        """Further numbers of each head, [G], by name."""
        return {}

    def kernel_shares(self) -> Tensor | None:
        """Of a convolution whose heads are its taps, each with weight 1: how much of the kernel each tap holds,
        [groups, K], rows sum to 1. None for any other operator.

        By the norm of all weights at the tap (Frobenius, over the group's channels of both kinds).
        """
        mixer: Any = self.mixer
        norms = mixer.kernel_norms() if hasattr(mixer, "kernel_norms") else None
        return None if norms is None else norms / norms.sum(-1, keepdim=True).clamp(min=1e-30)

    def weights(self, queries: Tensor | None = None) -> Aggregation:
        """The aggregation weights of this call, for all queries or some (int64 [Q], in the flattened output).

        Raises:
            ValueError: an input, the output or a parameter was changed since, or the weights do not rebuild the
                recorded output within `TOLERANCE`: then nothing can be said about that call. Padded tokens do not
                count: nobody is promised anything of theirs.
        """
        found, error = self._rebuild(queries)
        dtype, enabled = self._autocast
        tolerance = TOLERANCE.get(dtype if enabled else self.output.dtype, 1e-4)
        if not error <= tolerance:
            raise ValueError(
                f"{self.name}: its weights rebuild the recorded output with a relative error of {error:.1e}, more than "
                f"{tolerance:.0e}, and are not shown; was the module changed, or does it draw random numbers?"
            )
        return found

    def rebuild_error(self, queries: Tensor | None = None) -> float:
        """Largest difference between rebuilt and recorded output, relative to the largest entry."""
        return self._rebuild(queries)[1]

    def _check_unchanged(self) -> None:
        for what, (before, now) in _changed(self._versions, _versions(self._call, self.output, self.mixer)).items():
            raise ValueError(
                f"{self.name}: {what} was changed in place since the call (version {before}, now {now}); "
                "ask for weights before that"
            )

    def _rebuild(self, queries: Tensor | None) -> tuple[Aggregation, float]:
        self._check_unchanged()
        call = self._call_for(queries)
        with self._as_it_was():
            found = self.mixer.weights(**call)
            with torch.no_grad():
                x, bound = self.mixer._bind(call.pop("x"), call)
                rebuilt = self.mixer.project(aggregate(found, self.mixer._values(x, bound)))
        output = self.output.detach().flatten(1, -2)
        output = output if queries is None else output[:, queries]
        if (real := self._real(x, bound)) is not None:
            rebuilt, output = (rows.masked_fill(~real[..., None], 0) for rows in (rebuilt, output))
        return found, _error(rebuilt, output)

    def scores(self, queries: Tensor | None = None) -> dict[str, Tensor]:
        """The named terms before the softmax, each broadcastable to [B, G, N, K]; {} where the weights are none.

        Nothing rebuilds the output from them: ask `weights` too, and compare.
        """
        if getattr(type(self.mixer), "_scores", TokenMixer._scores) is TokenMixer._scores:
            return {}
        call = self._call_for(queries)
        with self._as_it_was():
            found = self.mixer.scores(**call)
        return {name: self._rows_of(term, call, "_scores") for name, term in found.items()}

    def parts(self, queries: Tensor | None = None) -> dict[str, tuple[Tensor, Tensor]]:
        """Share [G] and weights [B|1, G, N, K] of each part by name, where the weights are a mixture; {} if not.

        Nothing rebuilds the output from them: ask `weights` too, and compare.
        """
        if getattr(type(self.mixer), "_parts", TokenMixer._parts) is TokenMixer._parts:
            return {}
        call = self._call_for(queries)
        with self._as_it_was():
            found = self.mixer.parts(**call)
        return {name: (share, self._rows_of(part, call, "_parts")) for name, (share, part) in found.items()}

    def _rows_of(self, term: Tensor, call: dict[str, Any], hook: str) -> Tensor:
        """Those of the queries that the call is for, of what a hook gives that may not have heard of any."""
        given = "queries" not in call or "queries" in self.mixer._takes[hook]
        return term if given or term.shape[2] == 1 else term[:, :, call["queries"]]

    def _call_for(self, queries: Tensor | None) -> dict[str, Any]:
        """The call's arguments, for some of its queries."""
        call = dict(self._call)
        asked = call.get("queries")
        if queries is not None:
            call["queries"] = queries if asked is None else asked[queries]
        return call

    @contextmanager
    def _as_it_was(self) -> Iterator[None]:
        """What surrounded the call: mode, autocast, inference mode."""
        dtype, enabled = self._autocast
        with (
            modes_kept(self.mixer),
            torch.inference_mode(self.output.is_inference()),
            torch.autocast(self.output.device.type, dtype, enabled),
        ):
            for part, training in self._modes:
                part.training = training
            yield

    def _real(self, x: Tensor, bound: dict[str, Any]) -> Tensor | None:
        """Which rows of the output are those of real tokens, [B, N]; None: all, or none is a token's own."""
        valid, tokens = bound.get("valid"), tuple(x.shape[1:-1])
        if valid is None or "source" in bound or self.mixer.out_grid(tokens) != tokens:
            return None
        real = valid.flatten(1)[:, -math.prod(tokens) :]  # those that a cache keeps stand in front
        return real[:, bound["queries"]] if "queries" in bound else real

    def __repr__(self) -> str:
        return f"<call of {self.name}: {self.mixer!r} on {tuple(self.x.shape)}>"


class PartsCall(Call):
    """One call of an operator that adds parts and shows their weights, where values depend on the offset (LESA).

    `weights` are those of its attention. They have to rebuild its sums of values that are those of a token alone, and
    its parts the recorded output: no output follows from the weights without values that depend on the offset.
    """

    @property
    def query_grid(self) -> tuple[int, ...]:
        """The attention's, before any stride."""
        return tuple(self.x.shape[1:-1])

    @property
    def num_queries(self) -> int:
        """Rows of its weights."""
        return math.prod(self.query_grid)

    def shares(self) -> dict[str, Tensor]:
        """ "unary share": mean of 1 / (1 + w) over each head's channels, w the gate of the binary term, if it has one.

        Source: Yang et al., arXiv 2107.05637, where terms count by 1 / (1 + w) and w / (1 + w).
        """
        self._check_unchanged()
        with self._as_it_was(), torch.no_grad():
            gate = self.mixer.terms(**self._call).get("gate")  # type: ignore[operator]
        if gate is None:
            return {}
        share = (1 / (1 + gate)).double().flatten(0, -2).mean(0)
        return {"unary share": share.unflatten(0, (self.mixer.num_groups, -1)).mean(-1)}

    def _rebuild(self, queries: Tensor | None) -> tuple[Aggregation, float]:
        self._check_unchanged()
        valid = self._call.get("valid")
        if valid is not None and not bool(valid.all()):
            raise ValueError(
                f"{self.name}: was called with padding (valid), and {type(self.mixer).__name__} shows its weights "
                "without any; show it images that fill their grid"
            )
        mixer: Any = self.mixer
        with self._as_it_was(), torch.no_grad():
            found = mixer.weights(self.x, queries=queries)
            output = mixer.mix(**self._call)
            attention, scale = mixer._attention(self.x, None, False)
            sums = attention.binary(scale).unflatten(-1, (mixer.dim, -1))[..., 0]
            rebuilt = (found.weights @ attention.v).transpose(1, 2).flatten(2)
        return found, max(_error(output, self.output), _error(rebuilt, sums if queries is None else sums[:, queries]))


class Inspection:
    """Calls recorded while `with inspect(model) as seen:` holds; iterate it, or index it by a module's name.

    `refused` says by name why a module of another library, or a call of one, is not among them.
    """

    def __init__(self, model: nn.Module, *, convolutions: bool = False) -> None:
        self.calls: list[Call] = []
        self.refused: dict[str, str] = {}
        self._model, self._convolutions = model, convolutions
        self._hooks: list[Any] = []
        self._open: dict[int, list[dict[str, Any]]] = {}
        self._canonical: dict[str, str] = {}  # every name of a mixer to the one its calls bear

    def __enter__(self) -> "Inspection":
        first: dict[int, str] = {}
        for name, module in self._model.named_modules(remove_duplicate=False):
            if (
                isinstance(module, torch._dynamo.OptimizedModule)
                or getattr(module, "_compiled_call_impl", None) is not None
            ):
                raise ValueError(
                    f"{name or 'the model'}: is compiled, its inside cannot be seen; inspect it before torch.compile"
                )
            if isinstance(module, TokenMixer) or _shows_parts(module):
                name = name or type(module).__name__
                self._canonical[name] = first.setdefault(id(module), name)
                if self._canonical[name] == name:
                    self._hooks.append(module.register_forward_pre_hook(self._before, with_kwargs=True))
                    self._hooks.append(module.register_forward_hook(self._after(name), with_kwargs=True))
        for name, how in foreign(self._model, convolutions=self._convolutions):
            if isinstance(how, NotSeen):
                self.refused[name] = how.why
            else:
                self._canonical[name] = name
                self._watch(name, how)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
        self._open.clear()
        called = self.calls or self._canonical.keys() & self.refused.keys()  # a call may be refused
        if error is None and self._canonical and not called:
            raise ValueError(
                "inspect: no token mixer was called; run the model inside the block, and not through torch.compile, "
                "where nothing can be seen"
            )

    def __iter__(self) -> Iterator[Call]:
        return iter(self.calls)

    def __len__(self) -> int:
        return len(self.calls)

    def __getitem__(self, name: str) -> list[Call]:
        """All calls of one module, in order: a shared or checkpointed module is called more than once."""
        found = [call for call in self.calls if call.name == self._canonical.get(name, name)]
        if not found:
            names = ", ".join(dict.fromkeys(call.name for call in self.calls)) or "none"
            raise KeyError(f"no call of {name!r}; recorded: {names}")
        return found

    def _watch(self, name: str, how: Foreign) -> None:
        """Records the calls of another library's module as those of the mixer that stands for it."""
        for kept, module in how.watched.items():
            self._hooks.append(module.register_forward_hook(_keep(how.kept, kept)))

        def record(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            first = args[0] if args else next(iter(kwargs.values()))
            call = how.call(first, how.kept)
            if isinstance(call, str):
                self.refused[name] = call
                return
            for part in how.mixer.modules():
                part.training = module.training
            self.calls.append(Call(name, how.mixer, call, how.output(output, call)))

        self._hooks.append(how.module.register_forward_hook(record, with_kwargs=True))

    def _before(self, mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            raise ValueError(f"{type(mixer).__name__}: runs inside a compiled region, where inspect sees nothing")
        bound = signatures.signature(mixer.forward).bind(*args, **kwargs).arguments
        # the call moves its cache on; keep what it held before
        call = {
            name: value.copy() if isinstance(value, Cache) else value
            for name, value in bound.items()
            if value is not None
        }
        self._open.setdefault(id(mixer), []).append(call)

    def _after(self, name: str) -> Any:
        def record(mixer: TokenMixer, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            kind = PartsCall if _shows_parts(mixer) else Call
            self.calls.append(kind(name, mixer, self._open[id(mixer)].pop(), output))

        return record


def _shows_parts(module: nn.Module) -> bool:
    return isinstance(module, TokenModule) and hasattr(module, "terms") and hasattr(module, "weights")


def _keep(kept: dict[str, Any], name: str) -> Any:
    def keep(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        kept[name] = output

    return keep


def inspect(model: nn.Module, *, convolutions: bool = False) -> Inspection:
    """Records the calls of every token mixer in a model, and of the attention of timm, torchvision and transformers.

        with glocal.inspect(model) as seen:
            model(images)
        seen["stages.2.blocks.0.mixer"][0].weights()

    With `convolutions` those of torch too, Conv1d and Conv2d, outside operators of this library: seen as `Convolution`
    and `DepthwiseConv` are, a head for each tap or each channel. Not those that move nothing between tokens: 1x1
    kernels, and strides as long as the kernel, which cut patches.

    Memory: the mixers' inputs and outputs are kept alive until the recording is dropped; nothing is copied.

    Raises:
        ValueError: what is no module; a part of the model is compiled (named), on entering the `with` block.
    """
    if not isinstance(model, nn.Module):
        raise ValueError(f"inspect: a {type(model).__name__}, must be a torch.nn.Module")
    return Inspection(model, convolutions=convolutions)


def _error(rebuilt: Tensor, output: Tensor) -> float:
    """Largest difference, relative to the largest entry; 0 where there is none."""
    if output.numel() == 0:
        return 0.0
    difference = (rebuilt.double() - output.double()).abs().max()
    return float(difference / output.double().abs().max().clamp(min=torch.finfo(output.dtype).tiny))


def _versions(call: dict[str, Any], output: Tensor, mixer: nn.Module) -> dict[str, int]:
    """In-place version counters of all that the weights depend on; tensors made in inference mode have none."""
    tensors = {f"its input {name}": value for name, value in call.items() if isinstance(value, Tensor)}
    tensors["its output"] = output
    tensors |= {f"its parameter {name}": value for name, value in mixer.named_parameters()}
    for path, part in mixer.named_modules():
        if not part.training:  # in training a batch norm's statistics move and do not matter
            owned = part.named_buffers(prefix=path, recurse=False)
            tensors |= {f"its buffer {name}": value for name, value in owned}
    return {name: tensor._version for name, tensor in tensors.items() if not tensor.is_inference()}


def _changed(before: dict[str, int], now: dict[str, int]) -> dict[str, tuple[int, int]]:
    return {name: (version, now[name]) for name, version in before.items() if now.get(name) != version and name in now}
