"""How exactly attention computes a convolution, what sharpness costs, and what it takes: writes docs/conversion.md.

    python benchmarks/conversion.py [--out docs/conversion.md] [--networks] [--times]

Without the flags, tables of layers and of alpha (a minute); --networks adds networks of torchvision and timm with
random weights, --times their times beside the convolutional ones, interleaved, on two threads: for a quiet machine.
"""

import argparse
import itertools
import math
import statistics
import time
import warnings
from pathlib import Path

import torch
from memory import peak_bytes
from torch import nn

import glocal

KERNELS = {
    1: [(1,), (2,), (3,), (5,), (7,)],
    2: [(1, 1), (2, 2), (3, 3), (5, 5), (7, 7), (3, 5)],
}
MODES = ("zeros", "replicate", "reflect", "circular")
HEAD = """# Convolutions as attention, measured

Written by `python benchmarks/conversion.py{flags}`, PyTorch {torch}. An error is the largest difference from the
convolution's output, over its largest entry.
"""


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference over the largest entry."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


def layers_table() -> list[str]:
    """A row for each kernel: the largest error over strides, dilations, groups and paddings."""
    lines = [
        "## One layer\n",
        "8 to 16 channels, 2 inputs of 14 x 13 (14 in 1-D). The largest error over strides 1, 2, 3, dilations 1, 2, "
        "groups 1, 2, 8 (depthwise), padding 0, 1, 3 and 'same', all four padding modes; by a softmax along each axis "
        "(as in training) and by taps (as where gradients of the places are not asked for).\n",
        "| kernel | cases | quadratic, float64 | float32 | learned, float64 | float32 |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    torch.manual_seed(0)
    for rank, kernels in KERNELS.items():
        for kernel in kernels:
            worst, cases = dict.fromkeys(itertools.product(("quadratic", "learned"), (64, 32)), 0.0), 0
            options = itertools.product((1, 2, 3), (1, 2), (1, 2, 8), (0, 1, 3, "same"), MODES)
            for stride, dilation, groups, padding, mode in options:
                if padding == "same" and stride > 1:
                    continue
                kind = (nn.Conv1d, nn.Conv2d)[rank - 1]
                given = (8, 16, kernel, stride, padding, dilation, groups)
                cases += 1
                for encoding, bits in worst:
                    layer = kind(*given, padding_mode=mode, dtype=getattr(torch, f"float{bits}"))
                    x = torch.randn(2, 8, *(14, 13)[:rank], dtype=layer.weight.dtype)
                    attention, expected = glocal.to_attention(layer, encoding=encoding), layer(x)
                    errors = [relative(attention(x), expected), worst[encoding, bits]]
                    with torch.no_grad():
                        errors.append(relative(attention(x), expected))
                    worst[encoding, bits] = max(errors)
            numbers = " | ".join(f"{error:.1e}" for error in worst.values())
            lines.append(f"| {'x'.join(map(str, kernel))} | {cases} | {numbers} |")
    return lines


def alpha_table() -> list[str]:
    """A row for each alpha: what it costs in exactness, and what it leaves of the gradients of centres and spreads."""
    lines = [
        "\n## Alpha\n",
        "A 3x3 layer of 16 channels on 24 x 24 random inputs, quadratic, with random gradients of the output. The "
        "norms of the gradients of centres and spreads are over that of the values'.\n",
        "| alpha | weight beside | error, float64 | float32 | centres, float64 | float32 | spreads, float64 |",
        "|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for alpha in (1, 2, 4, 6, 8, 10, 14, 20, 30, 41):
        row = {}
        for dtype in (torch.float64, torch.float32):
            torch.manual_seed(0)
            layer = nn.Conv2d(16, 16, 3, padding=1).to(dtype)
            x, upstream = (torch.randn(2, 16, 24, 24, dtype=torch.float64).to(dtype) for _ in range(2))
            attention = glocal.to_attention(layer, alpha=alpha)
            out, mixer = attention(x), attention.mixer
            norms = [
                g.norm().item() for g in torch.autograd.grad(out, [mixer.value, mixer.centers, mixer.spreads], upstream)
            ]
            row[dtype] = (relative(out, layer(x)), norms[1] / norms[0], norms[2] / norms[0])
        exact, rounded = row[torch.float64], row[torch.float32]
        numbers = (math.exp(-alpha), exact[0], rounded[0], exact[1], rounded[1], exact[2])
        lines.append(f"| {alpha} | " + " | ".join(f"{n:.1e}" for n in numbers) + " |")
    return lines


def network(name: str) -> nn.Module:
    """With random weights and random batch-norm statistics."""
    import timm
    import torchvision

    torch.manual_seed(0)
    found = getattr(torchvision.models, name)() if hasattr(torchvision.models, name) else timm.create_model(name)
    for part in found.modules():
        if isinstance(part, nn.BatchNorm2d):
            part.running_mean.normal_(std=0.3)
            part.running_var.uniform_(0.5, 1.5)
        if isinstance(getattr(part, "gamma", None), nn.Parameter):  # layer scale, which starts near 0
            part.gamma.data.uniform_(0.2, 1)
    return found.eval()


@torch.no_grad()
def networks_table() -> list[str]:
    """A row for each network and input size."""
    lines = [
        "\n## Networks\n",
        "Random weights and batch-norm statistics; the scores of one image. Taken back: whether `to_convolution` gives "
        "the weights bit by bit.\n",
        "| network | input | layers | heads | parameters | before | error float64 | float32 | taken back |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    for name in ("resnet18", "resnet50", "convnext_tiny.fb_in1k", "mobilenetv3_small_100", "efficientnet_b0"):
        before = network(name)
        for size in ((224, 224), (200, 312)):
            errors = []
            for dtype in (torch.float64, torch.float32):
                before = before.to(dtype)
                attention, x = glocal.to_attention(before), torch.randn(1, 3, *size, dtype=torch.float64).to(dtype)
                errors.append(relative(attention(x), before(x)))
            back = glocal.to_convolution(attention).state_dict()
            same = all(torch.equal(value, back[key]) for key, value in before.state_dict().items())
            mixers = [part.mixer for part in attention.modules() if hasattr(part, "mixer")]
            params = [f"{sum(p.numel() for p in net.parameters()):,}" for net in (attention, before)]
            heads = sum(mixer.num_heads for mixer in mixers)
            lines.append(
                f"| {name} | {size[0]} x {size[1]} | {len(mixers)} | {heads} | {params[0]} | {params[1]} | "
                f"{errors[0]:.1e} | {errors[1]:.1e} | {'yes' if same else 'no'} |"
            )
    return lines


@torch.no_grad()
def times_table(rounds: int) -> list[str]:
    """A row for each network: forward passes in turn with the convolutional network's."""
    torch.set_num_threads(2)
    lines = [
        "\n## Times\n",
        f"Forward, float32, 2 images of 224 x 224, 2 threads, no gradients, in turn, {rounds} rounds; ms, least and "
        "median. Off the grid every centre is moved by up to 0.3 along each axis. Memory: the largest sum of tensors "
        "alive during the call beyond the network and its input, by torch's profiler; MiB, convolution, on the grid, "
        "off it.\n",
        "| network | convolution | channels last | attention on the grid | ratio | off the grid | ratio | memory |",
        "|---|---:|---:|---:|---:|---:|---:|---|",
    ]
    x = torch.randn(2, 3, 224, 224)
    last = x.contiguous(memory_format=torch.channels_last)
    for name in ("resnet18", "resnet50", "convnext_tiny.fb_in1k"):
        before = network(name)
        on, off = glocal.to_attention(before), glocal.to_attention(before)
        for part in off.modules():
            if hasattr(part, "mixer"):
                part.mixer.centers += 0.3 * torch.rand_like(part.mixer.centers)
        nets = [(before, x), (network(name).to(memory_format=torch.channels_last), last), (on, x), (off, x)]
        times: list[list[float]] = [[] for _ in nets]
        for turn in range(rounds + 1):
            for (net, images), own in zip(nets, times, strict=True):
                start = time.perf_counter()
                net(images)
                if turn:
                    own.append(1000 * (time.perf_counter() - start))
        least, median = [min(t) for t in times], [statistics.median(t) for t in times]
        cells = [f"{a:.0f}, {b:.0f}" for a, b in zip(least, median, strict=True)]
        ratio = [f"{a / least[0]:.2f}, {b / median[0]:.2f}" for a, b in zip(least, median, strict=True)]
        held = [peak_bytes(lambda net=net: net(x)) / 2**20 for net in (before, on, off)]
        memory = ", ".join(f"{mib:.0f}" for mib in held)
        lines.append(
            f"| {name} | {cells[0]} | {cells[1]} | {cells[2]} | {ratio[2]} | {cells[3]} | {ratio[3]} | {memory} |"
        )
    return lines


def main() -> None:
    """Writes the page."""
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--out", type=Path, default=Path("docs/conversion.md"))
    arguments.add_argument("--networks", action="store_true")
    arguments.add_argument("--times", action="store_true")
    arguments.add_argument("--rounds", type=int, default=9)
    given = arguments.parse_args()
    warnings.filterwarnings("ignore", message="Using padding='same' with even kernel lengths")
    flags = "".join(f" --{name}" for name in ("networks", "times") if getattr(given, name))
    times = times_table(given.rounds) if given.times else []
    lines = [HEAD.format(flags=flags, torch=torch.__version__.partition("+")[0]), *layers_table(), *alpha_table()]
    lines += networks_table() if given.networks else []
    given.out.write_text("\n".join([*lines, *times]) + "\n", "utf-8")


if __name__ == "__main__":
    main()
