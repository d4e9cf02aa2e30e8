"""Peak memory of every operator, default path and definition, forward and backward, against what it must hold.

    python benchmarks/memory.py [--grid 56 56] [--dim 96]

The yardstick is the input and the weights that the operator must form (as stored, not dense). Peaks are of
tensor memory, by torch's profiler: allocations less frees, beyond what was there before the call.
"""

import argparse
import math

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import glocal
from glocal import mixers

MIB = 2**20
# published sizes where an operator's default is not one already
SPECS = {
    "Convolution": "Convolution(kernel_size=3)",
    "DepthwiseConv": "DepthwiseConv(kernel_size=7)",
    "DynamicDepthwiseConv": "DynamicDepthwiseConv(kernel_size=7)",
    "InhomogeneousDepthwiseConv": "InhomogeneousDepthwiseConv(kernel_size=7, num_groups=3)",
    "LocalMLP": "LocalMLP(window_size=7, shift_size=3)",
    "WindowAttention": "WindowAttention(window_size=7, shift_size=3)",
    "NeighborhoodAttention": "NeighborhoodAttention(kernel_size=7)",
    "SelfAttention": "SelfAttention()",
    "RelativeAttention": "RelativeAttention(grid_size={grid})",
    "AveragePooling": "AveragePooling(kernel_size=3)",
}
MORE = (
    "InhomogeneousDepthwiseConv(kernel_size=7, num_groups=32)",
    "NeighborhoodAttention(kernel_size=7, border='shifted')",
    "WindowAttention(window_size=7, shift_size=3, mask_padding=False)",
)


def peak_bytes(run) -> int:
    """Largest sum of live allocations during a call, in bytes, above the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    live = peak = 0
    for event in sorted(
        (e for e in trace.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def measure(mixer: nn.Module, path: str, x: torch.Tensor) -> int:
    """Peak of one forward and backward, gradients of the input and of all parameters included."""
    call = mixer if path == "default" else mixer.reference
    also = mixer.besides(x.detach())
    upstream = torch.ones_like(call(x, **also))

    def run() -> None:
        torch.autograd.grad(call(x, **also), [x, *mixer.parameters()], upstream)

    run()
    return peak_bytes(run)


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--grid", type=int, nargs=2, default=(56, 56))
    arguments.add_argument("--dim", type=int, default=96)
    given = arguments.parse_args()
    grid = tuple(given.grid)
    torch.manual_seed(0)
    missing = set(glocal.available()) - set(SPECS)
    specs = [*SPECS.values(), *(getattr(mixers, name).examples[0] for name in sorted(missing)), *MORE]
    print(f"1x{'x'.join(map(str, grid))}x{given.dim} float32, forward and backward, MiB; torch {torch.__version__}\n")
    print("| operator | input | weights | default path | ratio | definition | ratio |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for text in specs:
        mixer = glocal.build(text.format(grid=grid), given.dim).eval()
        if mixer.rank == 1 or not isinstance(mixer, glocal.TokenMixer):  # no images, or no weights
            continue
        x = torch.randn(1, *grid, given.dim, requires_grad=True)
        weights = math.prod(mixer.weights(x, **mixer.besides(x)).weights.shape) * 4
        needed = x.numel() * 4 + weights
        default, definition = (measure(mixer, path, x) for path in ("default", "reference"))
        sizes = f"{x.numel() * 4 / MIB:.2f} | {weights / MIB:.2f}"
        peaks = " | ".join(f"{peak / MIB:.1f} | {peak / needed:.1f}" for peak in (default, definition))
        print(f"| `{mixer!r}` | {sizes} | {peaks} |")


if __name__ == "__main__":
    main()
