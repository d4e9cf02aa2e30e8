"""Published networks beside timm's with the same weights, in one process, turn by turn: forward and training step.

    python benchmarks/models.py [NAME...] [--batch 8] [--size 224] [--rounds 9] [--device cuda] [--dtype bfloat16]
                                [--compiled] [--processes N] [--out models.jsonl]

timm's stands twice, in contiguous and in channels-last memory; the better of both counts. A training step is forward,
cross entropy and backward, without the optimizer, which is the same for both. A network that timm does not have (DWNet
and its kin) stands beside timm's Swin-T. Of the matrix multiplications alone, at the rate that this machine reached
in the same run, a forward pass needs its multiply-adds and a step three times as many: percent of that floor. For a
quiet machine. First N processes compile what is to be timed, a network each.
"""

import argparse
import json
import statistics
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path

import timm
import torch
from ahead import compile_ahead, every_configuration
from run import surroundings
from timing import interleaved, matmul_rate, settle, summary
from torch import nn

import glocal
from glocal.analysis.cost import macs

PARTNERS = {
    "swin_tiny": "swin_tiny_patch4_window7_224",
    "coatnet_0": "coatnet_0_224",
    "volo_d1": "volo_d1_224",
    "vit_small": "vit_small_patch16_224",
    "resnet50": "resnet50",
}
AT_ONCE = 4  # networks with large batches are in memory while they are compiled ahead
KIN = ("dwnet_tiny", "d_dwnet_tiny", "i_d_dwnet_tiny", "local_mlp_tiny")  # Swin-T with something else for attention


def partner(name: str, ours: nn.Module) -> nn.Module | None:
    """timm's network with the weights of ours; of a network of its own none."""
    if name not in PARTNERS:
        return None
    theirs = timm.create_model(PARTNERS[name])
    keys = import_module(f"glocal.models.keys.{type(ours).__module__.rpartition('.')[2]}")
    state = ours.state_dict()
    theirs.load_state_dict(keys.SOURCES["timm"].write(state) if "timm" in keys.SOURCES else state)
    return theirs


def calls(net: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> dict[str, Callable[[], object]]:
    """By pass; the network is put into the mode of the pass by every call."""
    wanted = [p for p in net.parameters() if p.requires_grad]

    def forward() -> None:
        net.eval()
        with torch.no_grad():
            net(images)
        settle()

    def step() -> None:
        net.train()
        torch.autograd.grad(nn.functional.cross_entropy(net(images).float(), labels), wanted)
        settle()

    return {"forward": forward, "step": step}


def networks(
    name: str, given: argparse.Namespace
) -> tuple[dict[str, tuple[nn.Module, torch.Tensor]], torch.Tensor, int]:
    """Ours and its rivals, each with its images; labels; multiply-adds of a forward pass."""
    torch.manual_seed(0)
    dtype = getattr(torch, given.dtype)
    images = torch.randn(given.batch, 3, given.size, given.size).to(dtype)
    labels = torch.randint(0, 1000, (given.batch,))
    last = images.contiguous(memory_format=torch.channels_last)
    ours = glocal.create_model(name)
    products = given.batch * macs(ours, torch.zeros(1, 3, given.size, given.size))
    theirs = partner(name, ours)
    nets = {"glocal": (ours, images)}
    if theirs is not None:
        again = partner(name, ours)
        assert again is not None
        nets |= {"timm": (theirs, images), "timm, channels last": (again.to(memory_format=torch.channels_last), last)}
    else:
        nets["timm's Swin-T"] = (timm.create_model(PARTNERS["swin_tiny"]), images)
    for net, _ in nets.values():
        net.to(dtype)
    if given.compiled:
        nets |= {f"{who}, compiled": (torch.compile(net), x) for who, (net, x) in list(nets.items())}
    return nets, labels, products


def compile_network(name: str, given: argparse.Namespace) -> None:
    """Once through all that compiles."""
    torch.set_default_device(given.device)
    nets, labels, _ = networks(name, given)
    for who, (net, x) in nets.items():
        for run in calls(net, x, labels).values():
            if who.startswith("glocal"):  # compiled too: the kernels are opaque to the compiler, and choose in the call
                every_configuration(run)
            elif "compiled" in who:
                run()


def measure(name: str, given: argparse.Namespace) -> list[dict[str, object]]:
    """A row for each pass."""
    nets, labels, products = networks(name, given)
    dtype = getattr(torch, given.dtype)
    runs = {who: calls(net, x, labels) for who, (net, x) in nets.items()}
    side = 8192 if given.device == "cuda" else 1024
    rate = matmul_rate(side, dtype=dtype)
    rows = []
    for which in ("forward", "step"):
        times = interleaved({who: run[which] for who, run in runs.items()}, rounds=given.rounds, seconds=given.seconds)
        found = {who: summary(each) for who, each in times.items()}
        rate = max(rate, matmul_rate(side, dtype=dtype))
        floor = products * (1 if which == "forward" else 3) / rate
        rival = min((who for who in found if who != "glocal"), key=lambda who: found[who].median)
        faster = statistics.median(t / o for t, o in zip(times[rival], times["glocal"], strict=False))
        print(f"\n{name}, {which}, {given.batch} x {given.size}, {given.dtype}, {given.device}", flush=True)
        for who, one in found.items():
            print(f"  {who:<30}{1e3 * one.median:9.1f} ms ({1e3 * one.low:.1f} to {1e3 * one.high:.1f})", flush=True)
        ratio = found[rival].median / found["glocal"].median
        share = 100 * floor / found["glocal"].median
        print(
            f"  {ratio:.3f} x faster than {rival} (turn by turn {faster:.3f}), {share:.0f} % of the floor", flush=True
        )
        row: dict[str, object] = {"model": name, "pass": which, "batch": given.batch, "size": given.size}
        row |= {"dtype": given.dtype, "device": given.device, "threads": torch.get_num_threads(), "rival": rival}
        row |= {"ratio": ratio, "ratio_by_turn": faster, "percent_of_floor": share, "matmul_gmac_s": rate / 1e9}
        row["ms"] = {who: [1e3 * t for t in each] for who, each in times.items()}
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", default=[*PARTNERS, *KIN])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--seconds", type=float, default=60, help="that the turns of one network may take together")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--compiled", action="store_true", help="each network also under torch.compile")
    parser.add_argument("--processes", type=int, help="that compile ahead; on a GPU 4, else none")
    parser.add_argument("--out", type=Path, help="JSON lines are added to this file")
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU here, or this PyTorch was built without CUDA")
    processes = given.processes if given.processes is not None else AT_ONCE if given.device == "cuda" else 0
    if processes:
        compile_ahead(partial(compile_network, given=given), given.names, processes)
    torch.set_default_device(given.device)
    about = surroundings()
    if given.device == "cuda":
        about |= {"gpu": torch.cuda.get_device_name(), "cuda": torch.version.cuda}
    for name in given.names:
        for row in measure(name, given):
            if given.out:
                with given.out.open("a") as file:
                    file.write(json.dumps(row | about) + "\n")


if __name__ == "__main__":
    main()
