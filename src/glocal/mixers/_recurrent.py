"""What the recurrent operators share: torch's own layers, padding by packed sequences, a state in the cache.

Shape letters: B batch, T tokens, C channels, H channels of a state, L layers times directions.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from glocal.arguments import flag, positive
from glocal.mixer import Cache
from glocal.operator import TokenModule


class Recurrent(TokenModule):
    """Abstract: a layer of torch as `rnn`, and a linear map `proj` where its states are not as wide as the output."""

    kind: ClassVar[type[nn.LSTM] | type[nn.GRU]]
    gates: ClassVar[int]  # matrices of H rows that a token meets in each layer
    states: ClassVar[tuple[str, ...]]  # what goes from one token to the next

    exempt: ClassVar[dict[str, str]] = {
        "compiles": "torch.compile(fullgraph=True) does not trace torch's recurrent layers, the graph breaks there",
        "exports": "torch.export writes torch's recurrent layers out for one length",
    }

    def __init__(
        self,
        dim: int,
        *,
        hidden_dim: int | None,
        num_layers: int,
        bidirectional: bool,
        out_dim: int | None,
        bias: bool,
    ) -> None:
        super().__init__(dim, rank=1)
        self.out_dim = dim if out_dim is None else positive("out_dim", out_dim)
        self.num_layers = positive("num_layers", num_layers)
        self.bidirectional, self.bias = flag("bidirectional", bidirectional), flag("bias", bias)
        self.causal = not bidirectional
        directions = 1 + bidirectional
        if hidden_dim is None and self.out_dim % directions:
            raise ValueError(f"out_dim: {self.out_dim} channels cannot be shared by two directions; give hidden_dim")
        self.hidden_dim = hidden_dim
        hidden = self.out_dim // directions if hidden_dim is None else positive("hidden_dim", hidden_dim)
        self.rnn = self.kind(dim, hidden, num_layers, bias=bias, batch_first=True, bidirectional=bidirectional)
        self.proj = nn.Linear(directions * hidden, self.out_dim) if directions * hidden != self.out_dim else None

    def macs(self, grid: Sequence[int]) -> int:
        (tokens,) = grid
        hidden, directions = self.rnn.hidden_size, 1 + self.bidirectional
        each = 0
        for layer in range(self.num_layers):
            width = directions * hidden if layer else self.dim
            each += directions * self.gates * hidden * (width + hidden)
        return tokens * (each + (0 if self.proj is None else directions * hidden * self.out_dim))

    def recur(self, x: Tensor, valid: Tensor | None, cache: Cache | None) -> Tensor:
        """[B, T, C] -> [B, T, out_dim]."""
        if valid is not None:
            _check_prefix(type(self).__name__, valid)
        start = self._start(x, valid, cache)
        if valid is not None and self.bidirectional and len(x):
            # what comes after the end must not be where the way back begins; without a way back nobody reads it
            lengths = valid.sum(1).clamp(min=1)  # a sequence of padding alone gives something finite
            packed = pack_padded_sequence(x, lengths.cpu(), batch_first=True, enforce_sorted=False)
            out, end = self.rnn(packed, start)
            out, _ = pad_packed_sequence(out, batch_first=True, total_length=x.shape[1])
        else:
            out, end = self.rnn(x, start)
        if cache is not None:
            states = dict(zip(self.states, end if isinstance(end, tuple) else (end,), strict=True))
            if valid is not None:
                cache.put("ended", ~valid[:, -1])
            for key, state in states.items():
                cache.put(key, state.transpose(0, 1))
        return out if self.proj is None else self.proj(out)

    def _start(self, x: Tensor, valid: Tensor | None, cache: Cache | None) -> Tensor | tuple[Tensor, ...]:
        """The states [L, B, H] before the first token: zero, or what a cache remembers."""
        ended = None if cache is None else cache.recall("ended", len(x))
        if ended is not None and valid is None and bool(ended.any()):
            raise ValueError(
                f"{type(self).__name__}: valid is not given, a sequence of the cache has ended in padding; give valid, "
                "False for what follows it"
            )
        if ended is not None and valid is not None and bool((ended & valid[:, -x.shape[1] :].any(1)).any()):
            raise ValueError(
                f"{type(self).__name__}: valid is True behind the end of a sequence of the cache; what follows padding "
                "is padding, begin a new cache for a new sequence"
            )
        layers = (1 + self.bidirectional) * self.num_layers
        # like x, not new: transforms of torch.func then see that each sequence has its own
        zero = torch.zeros_like(x[:, :1, :1]).expand(-1, layers, self.rnn.hidden_size)
        past = [None if cache is None else cache.recall(key, len(x)) for key in self.states]
        found = [zero if state is None else state for state in past]
        start = tuple(state.transpose(0, 1).contiguous() for state in found)
        return start if len(start) > 1 else start[0]


def _check_prefix(name: str, valid: Tensor) -> None:
    late = valid[:, 1:] & ~valid[:, :-1]
    if bool(late.any()):
        image, position = late.nonzero()[0].tolist()
        raise ValueError(
            f"{name}: valid has padding before a real token (sequence {image}, token {position + 1}); a sequence "
            "starts at its first token and ends before its padding, as in torch.arange(T) < lengths[:, None]"
        )
