"""Depthwise convolution of sequences: the time of the operator over that of the same work as a 2-D convolution.

    python benchmarks/sequences.py [--shape 32 512 384] [--kernel-size 7] [--rounds 15]

The shape is batch, length, channels. The yardstick is torch's conv2d on a [B, C, 1, T] view of the tokens, the
library's quick way to do it; beside it nn.Conv1d on the [B, C, T] view. All take channels-last tokens and give them
back. Forward and backward, gradients of tokens and parameters; medians of rounds in which all take turns.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn

import glocal

LIMIT = 1.3  # times the yardstick


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--shape", type=int, nargs=3, default=(32, 512, 384))
    arguments.add_argument("--kernel-size", type=int, default=7)
    arguments.add_argument("--rounds", type=int, default=15)
    given = arguments.parse_args()
    torch.manual_seed(0)
    dim, k = given.shape[-1], given.kernel_size
    device = "cuda" if torch.cuda.is_available() else "cpu"
    x = torch.randn(*given.shape, device=device, requires_grad=True)
    mixer = glocal.build(f"DepthwiseConv(kernel_size={k}, rank=1)", dim).to(device)
    line = nn.Conv1d(dim, dim, k, padding=k // 2, groups=dim).to(device)
    image = nn.Conv2d(dim, dim, (1, k), padding=(0, k // 2), groups=dim).to(device)
    with torch.no_grad():
        line.weight.copy_(mixer.weight)
        line.bias.copy_(mixer.bias)
        image.weight.copy_(mixer.weight.unsqueeze(2))
        image.bias.copy_(mixer.bias)
    calls: dict[str, tuple[nn.Module, Callable[[], Tensor]]] = {
        "DepthwiseConv, rank 1": (mixer, lambda: mixer(x)),
        "conv2d on [B, C, 1, T]": (image, lambda: image(x.movedim(-1, 1).unsqueeze(2)).squeeze(2).movedim(1, -1)),
        "conv1d on [B, C, T]": (line, lambda: line(x.movedim(-1, 1)).movedim(1, -1)),
    }
    upstream = torch.randn_like(x)
    expected, *others = (call() for _, call in calls.values())
    for other in others:
        torch.testing.assert_close(other, expected)
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(given.rounds + 1):
        for name, (module, call) in calls.items():
            start = time.perf_counter()
            torch.autograd.grad(call(), [x, *module.parameters()], upstream)
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(time.perf_counter() - start)
    shape = "x".join(map(str, given.shape))
    print(f"{shape} float32, kernel {k}, forward and backward, {device}; torch {torch.__version__}")
    print(f"{torch.get_num_threads()} threads; median and quartiles of {given.rounds} rounds, ms\n")
    medians = {}
    for name, taken in times.items():
        low, medians[name], high = statistics.quantiles([1e3 * t for t in taken[1:]], n=4)  # the first one warms up
        print(f"{name:<24}{medians[name]:9.1f}  ({low:.1f} to {high:.1f})")
    own, yardstick, _ = medians.values()
    print(f"\nratio {own / yardstick:.2f}; at most {LIMIT} is asked for")
    return int(own / yardstick > LIMIT)


if __name__ == "__main__":
    raise SystemExit(main())
