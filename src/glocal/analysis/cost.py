"""What a model costs: multiply-adds of one forward pass, and parameters.

torch.utils.flop_counter does the counting. By itself it counts what happens to run: attention that goes through a
fused encoder kernel is missing, and a local operator that runs as shifts and sums costs nothing. Here a model is
counted by what it computes, whatever path it would take.
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

_aten = torch.ops.aten


def _of_elements(index: int) -> Any:
    """Formula of a product with a vector: one multiply-add for every element of this argument."""
    return lambda *shapes, out_shape=None, **_: 2 * shapes[index].numel()


def _recurrent(tokens: torch.Size, weights: list[torch.Size]) -> int:
    """Every weight matrix meets every token once."""
    return 2 * tokens[:-1].numel() * sum(w.numel() for w in weights if len(w) == 2)


# Products that the counter has no formula for.
_MISSING = {
    _aten.mv: _of_elements(0),
    _aten.dot: _of_elements(0),
    _aten.addmv: _of_elements(1),
    _aten.mkldnn_rnn_layer: lambda x, *weights, out_shape=None, **_: _recurrent(x, list(weights[:2])),
    _aten._cudnn_rnn: lambda x, weights, *_, out_shape=None, **__: _recurrent(x, weights),
}


def macs(model: nn.Module, *inputs: Any) -> int:
    """Multiply-adds of one forward pass on one sample, in evaluation.

    Matrix products, convolutions and both products of attention count; sums, norms, activations and the pooling
    of ordinary modules do not. A token mixer of ours counts as its definition does, which is the cost that it
    documents, whichever path runs. Nothing is computed where shapes are enough: a copy of the model runs on the
    meta device, and only one that needs values there runs on its own device.

    Args:
        model: Any module. Its parameters, statistics, mode and device, and the random state, stay as they are.
        inputs: The arguments of its forward pass. The first axis of every tensor is the batch; its first sample
            is used.

    Returns:
        Multiply-adds (a multiply-add is two of what is called FLOPs).

    Raises:
        Exception: What the model itself raises on these inputs, or on being copied.

    Cost: A copy of the model, and a forward pass on shapes (about 60 ms for a network of four blocks).
    """
    with suppress(Exception):  # where values decide what runs, or a tensor that is no buffer stayed behind
        return _counted(
            copy.deepcopy(model).to("meta"),
            [torch.empty_like(x[:1], device="meta") if isinstance(x, Tensor) else x for x in inputs],
        )
    devices = {p.device.index for p in model.parameters() if p.device.type == "cuda"}
    with torch.random.fork_rng(sorted(devices)):
        return _counted(copy.deepcopy(model), [x[:1] if isinstance(x, Tensor) else x for x in inputs])


def params(model: nn.Module) -> int:
    """Number of parameters, frozen ones included; shared ones count once."""
    return sum(p.numel() for p in model.parameters())


def _counted(model: nn.Module, inputs: list[Any]) -> int:
    for module in model.eval().modules():
        if hasattr(module, "impl") and hasattr(module, "reference"):  # a token mixer
            module.impl = "reference"  # type: ignore[assignment]
    with torch.no_grad(), _composed(), FlopCounterMode(display=False, custom_mapping=_MISSING) as counter:
        model(*inputs)
    return counter.get_total_flops() // 2


@contextmanager
def _composed() -> Iterator[None]:
    """torch's attention and encoder layers compose their parts, which the counter sees."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)
