"""What is measured: operators at sizes of real networks and at odd ones, each beside its peers; and the bars.

Names are operator/shape/options, so that patterns choose: `static/*`, `*/8x56x56x96/*`.
"""

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import peers
import torch
from timing import Call
from torch import Tensor, nn

import glocal
from glocal import kernels
from glocal.kernels import local_sum

OURS = "glocal"
FUSED = ("timm", "timm, fused")  # F.scaled_dot_product_attention in timm's module, which does without by default


@dataclass
class Problem:
    """One case, built.

    Args:
        spec: what runs.
        shape: of the tokens.
        tensors: those of the case; floating-point ones have gradients.
        calls: ours, named OURS, and its peers.
        macs: multiply-adds of the forward pass, for the floor.
    """

    spec: str
    shape: Sequence[int]
    tensors: tuple[Tensor, ...]
    calls: dict[str, Call]
    macs: int


@dataclass(frozen=True)
class Case:
    """How to build one: `make(compiled)`, compiled: with the peers that need torch.compile, which takes a minute.

    `environment` is that of the process that measures it.
    """

    make: Callable[[bool], Problem]
    environment: dict[str, str] = field(default_factory=dict)


CASES: dict[str, Case] = {}
V3 = {"GLOCAL_CFLAGS": "-O3 -march=x86-64-v3 -fopenmp"}


def add(name: str, make: Callable[..., Problem], *arguments: object, environment: dict[str, str] | None = None) -> None:
    CASES[name] = Case(lambda compiled: make(*arguments, compiled), environment or {})


def local(x: Tensor, w: Tensor) -> Tensor:
    return local_sum(x, w)


def static(shape: Sequence[int], kernel: int, compiled: bool) -> Problem:
    channels = shape[-1]
    tensors = torch.randn(shape), torch.randn(1, 1, 1, channels, kernel**2)
    calls = {OURS: Call(local), **peers.static_convolutions(channels, kernel)}
    if kernel <= 7:
        calls |= {"unfold": peers.UNFOLD, "shift-and-sum": peers.SHIFT}
    return Problem(f"local_sum, static, K={kernel}", shape, tensors, calls, math.prod(shape) * kernel**2)


def per_position(shape: Sequence[int], kernel: int, groups: int, compiled: bool) -> Problem:
    tensors = torch.randn(shape), torch.randn(*shape[:-1], groups, kernel**2)
    calls = {OURS: Call(local), "unfold": peers.UNFOLD, "shift-and-sum": peers.SHIFT}
    if compiled:
        calls["shift-and-sum, compiled"] = peers.compiled_shift()
    calls |= peers.static_yardsticks(shape[-1], kernel)
    calls["reading the weights"] = Call(lambda w: w.sum(), lambda x, w: (w,), yardstick=True, forward_only=True)
    return Problem(
        f"local_sum, per position, K={kernel}, G={groups}", shape, tensors, calls, math.prod(shape) * kernel**2
    )


def per_image(shape: Sequence[int], kernel: int, compiled: bool) -> Problem:
    batch, channels = shape[0], shape[-1]
    tensors = torch.randn(shape), torch.randn(batch, 1, 1, channels, kernel**2)
    calls = {OURS: Call(local), **peers.grouped_convolutions(batch, channels, kernel)}
    calls |= {"unfold": peers.UNFOLD, "shift-and-sum": peers.SHIFT, **peers.static_yardsticks(channels, kernel)}
    return Problem(f"local_sum, per image, K={kernel}", shape, tensors, calls, math.prod(shape) * kernel**2)


def dynamic_line(shape: Sequence[int], heads: int, kernel: int, compiled: bool) -> Problem:
    tensors = torch.randn(shape), torch.randn(*shape[:-1], heads, kernel).softmax(-1)
    calls = {OURS: Call(local), **peers.LINE_UNFOLDS, "shift-and-sum": peers.SHIFT}
    return Problem(f"local_sum, 1-D, K={kernel}, {heads} heads", shape, tensors, calls, math.prod(shape) * kernel)


def core(mixer: nn.Module, grid: Sequence[int], table: str) -> Call:
    """What a mixer's fast path does between its projections: q, k, v [B, N, G, D], q scaled, and a table of biases."""
    mixer.proj = nn.Identity()
    del mixer._parameters[table]

    def attend(q: Tensor, k: Tensor, v: Tensor, entries: Tensor) -> Tensor:
        mixer.heads = lambda tokens, part: (q, k, v)[part]  # in place of the projections
        object.__setattr__(mixer, table, entries)
        tokens = q.detach().flatten(2).unflatten(1, grid)  # fast reads its shape
        return mixer.fast(tokens, v).reshape(v.shape)

    return Call(attend)


def heads_of(shape: Sequence[int], heads: int) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = torch.randn(3, shape[0], math.prod(shape[1:-1]), heads, shape[-1] // heads).unbind(0)
    return q * (shape[-1] // heads) ** -0.5, k.clone(), v.clone()


def attention_core(spec: str, shape: Sequence[int], table: str) -> tuple[tuple[Tensor, ...], Call]:
    mixer = glocal.build(spec, shape[-1])
    tensors = *heads_of(shape, mixer.num_heads), torch.randn_like(getattr(mixer, table))
    return tensors, core(mixer, shape[1:-1], table)


def packed(q: Tensor, k: Tensor, v: Tensor, grid: Sequence[int]) -> Tensor:
    """As one projection gives them: [B, *S, 3*C]."""
    return torch.cat([t.flatten(2) for t in (q, k, v)], -1).unflatten(1, tuple(grid))


def neighborhood(shape: Sequence[int], heads: int, kernel: int, compiled: bool) -> Problem:
    spec, grid = f"NeighborhoodAttention(kernel_size={kernel}, num_heads={heads})", shape[1:-1]
    tensors, ours = attention_core(spec, shape, "rpb")
    if hasattr(kernels, "neighborhood_attention"):  # otherwise what the mixer does without it
        ours = Call(
            lambda q, k, v, table: kernels.neighborhood_attention(q, k, v, table, kernel_size=kernel),
            lambda q, k, v, table: (*(t.unflatten(1, grid) for t in (q, k, v)), table),
            lambda out: out.flatten(1, 2),
        )
    calls = {
        OURS: ours,
        "unfold": peers.neighborhood_unfolded(grid, kernel),
        "SDPA, N x N mask": peers.neighborhood_masked(grid, kernel),
        "SDPA, dense": peers.DENSE,
    }
    with contextlib.suppress(ImportError):
        calls["NATTEN, no bias"] = peers.neighborhood_natten(grid, kernel)
    if compiled:
        calls["FlexAttention, compiled"] = peers.neighborhood_flex(grid, kernel)
    return Problem(f"{spec}, q, k, v given", shape, tensors, calls, 2 * math.prod(shape) * kernel**2)


def relative(shape: Sequence[int], heads: int, compiled: bool) -> Problem:
    grid = tuple(shape[1:-1])
    spec = f"RelativeAttention(grid_size={grid}, num_heads={heads})"
    tensors, ours = attention_core(spec, shape, "relative_position_bias_table")
    calls = {OURS: ours, "SDPA, N x N bias": peers.relative_masked(grid), "SDPA, dense": peers.DENSE}
    return Problem(f"{spec}, q, k, v given", shape, tensors, calls, 2 * math.prod(shape) * math.prod(grid))


def separable(shape: Sequence[int], heads: int, compiled: bool) -> Problem:
    """What quadratic attention does once it has its weights."""
    height, width = shape[1:3]
    weights = (torch.randn(heads, n, n).softmax(-1) for n in (height, width))
    calls = {OURS: Call(lambda x, rows, columns: kernels.separable_sum(rows, columns, x.unsqueeze(3)))}
    macs = heads * math.prod(shape) * (height + width)
    return Problem(
        f"separable_sum, {heads} heads", shape, (torch.randn(shape), *weights), calls | peers.separable(compiled), macs
    )


def window(shape: Sequence[int], heads: int, size: int, shift: int, compiled: bool) -> Problem:
    spec = f"WindowAttention(window_size={size}, num_heads={heads}, shift_size={shift})"
    tensors, ours = attention_core(spec, shape, "relative_position_bias_table")
    if hasattr(kernels, "window_attention"):
        ours = Call(
            lambda qkv, table: kernels.window_attention(
                qkv, table, num_heads=heads, window_size=(size, size), shift_size=shift
            ),
            lambda q, k, v, table: (packed(q * (shape[-1] // heads) ** 0.5, k, v, shape[1:-1]), table),
            lambda out: out.flatten(1, 2).unflatten(-1, (heads, -1)),
        )
    calls = {OURS: ours}
    for name in FUSED:
        calls[name] = peers.timm_window_core(shape[1:-1], shape[-1], heads, size, shift, name != "timm")
    return Problem(f"{spec}, q, k, v given", shape, tensors, calls, 2 * math.prod(shape) * size**2)


def window_module(shape: Sequence[int], heads: int, size: int, shift: int, compiled: bool) -> Problem:
    spec = f"WindowAttention(window_size={size}, num_heads={heads}, shift_size={shift})"
    mixer = glocal.build(spec, shape[-1])
    calls = {OURS: Call(mixer, parameters=tuple(mixer.parameters()))}
    for name in FUSED:
        block = peers.timm_window(shape[1:-1], shape[-1], heads, size, shift, name != "timm")
        block.attn.load_state_dict(mixer.state_dict())
        calls[name] = Call(block._attn, parameters=tuple(block.attn.parameters()))
    return Problem(spec, shape, (torch.randn(shape),), calls, shape[0] * mixer.macs(shape[1:-1]))


def outlook_module(shape: Sequence[int], heads: int, stride: int, compiled: bool) -> Problem:
    from timm.models.volo import OutlookAttention

    spec = f"OutlookAttention(num_heads={heads}, stride={stride})"
    mixer, module = glocal.build(spec, shape[-1]), OutlookAttention(shape[-1], heads, stride=stride)
    module.load_state_dict(mixer.state_dict())
    calls = {name: Call(each, parameters=tuple(each.parameters())) for name, each in ((OURS, mixer), ("timm", module))}
    return Problem(spec, shape, (torch.randn(shape),), calls, shape[0] * mixer.macs(shape[1:-1]))


def module(spec: str, shape: Sequence[int], compiled: bool) -> Problem:
    """A whole operator beside its own definition."""
    mixer = glocal.build(spec, shape[-1])
    parameters = tuple(mixer.parameters())
    calls = {
        OURS: Call(mixer, parameters=parameters),
        "its definition": Call(mixer.reference, parameters=parameters),
    }
    return Problem(spec, shape, (torch.randn(shape),), calls, shape[0] * mixer.macs(shape[1:-1]))


def named(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


FOUR_STAGES = [(8, 56, 56, 96), (8, 28, 28, 192), (8, 14, 14, 384), (8, 7, 7, 768)]  # Swin-T, I-D-DW-T
BIG, SMALL, ODD, TINY = FOUR_STAGES[0], (2, 14, 14, 64), (3, 37, 41, 20), (1, 7, 7, 4)

for shape in FOUR_STAGES:
    add(f"static/{named(shape)}/K7", static, shape, 7)
    add(f"per-position/{named(shape)}/K7,G32", per_position, shape, 7, 32)
    add(f"per-image/{named(shape)}/K7", per_image, shape, 7)
    shift = 3 if shape[1] > 7 else 0
    add(f"window/{named(shape)}/7x7,shift{shift}", window, shape, shape[-1] // 32, 7, shift)
    add(f"window-module/{named(shape)}/7x7,shift{shift}", window_module, shape, shape[-1] // 32, 7, shift)
for kernel in (3, 13, 31):
    add(f"static/{named(BIG)}/K{kernel}", static, BIG, kernel)
add(f"static/{named(BIG)}/K7,x86-64-v3", static, BIG, 7, environment=V3)
add(f"static/{named(SMALL)}/K7", static, SMALL, 7)
add("static/8x28x28x768/K3", static, (8, 28, 28, 768), 3)  # CoAtNet-0's second stage
add(f"static/{named(ODD)}/K5", static, ODD, 5)
add(f"per-position/{named(BIG)}/K7,G3", per_position, BIG, 7, 3)
add(f"per-position/{named(ODD)}/K5,G5", per_position, ODD, 5, 5)
add(f"per-image/{named(ODD)}/K5", per_image, ODD, 5)
for length in (64, 512):  # MUSE base: 384 channels, 4 heads
    for kernel in (3, 15):
        add(f"dynamic-line/32x{length}x384/K{kernel}", dynamic_line, (32, length, 384), 4, kernel)
add("dynamic-line/5x37x20/K5", dynamic_line, (5, 37, 20), 4, 5)
add("neighborhood/2x56x56x96/7x7", neighborhood, (2, 56, 56, 96), 3, 7)
add("neighborhood/8x14x14x256/7x7", neighborhood, (8, 14, 14, 256), 8, 7)  # NAT-T's third stage
add("neighborhood/3x13x17x35/5x5", neighborhood, (3, 13, 17, 35), 5, 5)
add("relative/8x14x14x384", relative, (8, 14, 14, 384), 12)  # CoAtNet-0
add("relative/8x7x7x768", relative, (8, 7, 7, 768), 24)
add("relative/1x28x28x96", relative, (1, 28, 28, 96), 3)
add("relative/1x56x56x96", relative, (1, 56, 56, 96), 3)
add("relative/3x13x9x20", relative, (3, 13, 9, 20), 4)
add("outlook-module/8x28x28x192", outlook_module, (8, 28, 28, 192), 6, 2)  # VOLO-D1
add("muse-module/32x64x384", module, "MultiScaleAttention(num_heads=4, rank=1)", (32, 64, 384))
# On a GPU, with a batch that its cache does not hold; see gpu.py
GPU_CASES = []
for shape in [(128, *stage[1:]) for stage in FOUR_STAGES]:
    shift = 3 if shape[1] > 7 else 0
    for name, make, arguments in (
        ("static", static, (shape, 7)),
        ("per-position", per_position, (shape, 7, 3)),
        ("per-image", per_image, (shape, 7)),
        ("neighborhood", neighborhood, (shape, shape[-1] // 32, 7)),
        ("window", window, (shape, shape[-1] // 32, 7, shift)),
    ):
        GPU_CASES.append(f"{name}/{named(shape)}/K7")
        add(GPU_CASES[-1], make, *arguments)
for shape in ((128, 14, 14, 384), (128, 7, 7, 768)):
    GPU_CASES.append(f"relative/{named(shape)}")
    add(GPU_CASES[-1], relative, shape, shape[-1] // 32)
for shape, heads in (((128, 16, 16, 400), 9), ((32, 32, 32, 400), 9)):  # the all-attention model's grid, and one larger
    GPU_CASES.append(f"separable/{named(shape)}/{heads}")
    add(GPU_CASES[-1], separable, shape, heads)
for name, make, arguments in (  # for the tests of the benchmarks themselves
    ("static", static, (TINY, 3)),
    ("per-position", per_position, (TINY, 3, 2)),
    ("per-image", per_image, ((2, 7, 7, 4), 3)),
    ("dynamic-line", dynamic_line, ((2, 9, 4), 2, 3)),
    ("neighborhood", neighborhood, (TINY, 2, 3)),
    ("relative", relative, (TINY, 2)),
    ("separable", separable, (TINY, 3)),
    ("window", window, ((2, 9, 6, 4), 2, 3, 1)),
    ("window-module", window_module, ((2, 9, 6, 4), 2, 3, 1)),
    ("outlook-module", outlook_module, (TINY, 2, 2)),
    ("muse-module", module, ("MultiScaleAttention(num_heads=2, rank=1)", (2, 9, 4))),
):
    add(f"tiny/{name}", make, *arguments)


@dataclass(frozen=True)
class Bar:
    """What is required of a case: a time beside the best of some peers, or memory beside the output.

    Args:
        case: its name.
        which: pass.
        peers: names; the quickest of them counts.
        limit: "faster": times that it must be faster; "time": share of their time that it may take; "memory": of the
            output, peak memory without gradients.
        kind: see limit.
    """

    case: str
    which: str
    peers: tuple[str, ...]
    limit: float
    kind: str = "faster"


FORWARD, BOTH = "forward", "forward+backward"
LAYOUTS = (peers.FIRST, peers.LAST)
STATIC = tuple(f"static {name}" for name in LAYOUTS)
GROUPED = ("conv2d of B*C groups, NCHW", "conv2d of B*C groups, tokens")
BARS = [
    *(
        Bar(f"static/8x56x56x96/K{kernel}", BOTH, LAYOUTS, faster)
        for kernel, faster in ((3, 1.0), (7, 3.0), (13, 4.5), (31, 12.0))
    ),
    *(Bar(f"static/8x56x56x96/K{kernel}", FORWARD, LAYOUTS, 1.2, "time") for kernel in (3, 7, 13, 31)),
    Bar("static/8x56x56x96/K7,x86-64-v3", BOTH, LAYOUTS, 2.5),
    Bar("per-position/8x56x56x96/K7,G3", FORWARD, STATIC, 2.5, "time"),
    Bar("per-position/8x56x56x96/K7,G3", BOTH, STATIC, 0.75, "time"),
    Bar("per-position/8x56x56x96/K7,G3", FORWARD, ("unfold",), 100),
    Bar("per-position/8x56x56x96/K7,G3", BOTH, ("unfold",), 80),
    Bar("per-position/8x56x56x96/K7,G32", FORWARD, ("reading the weights",), 2.0, "time"),
    Bar("per-image/8x56x56x96/K7", FORWARD, STATIC, 1.6, "time"),
    Bar("per-image/8x56x56x96/K7", BOTH, STATIC, 0.4, "time"),
    Bar("per-image/8x56x56x96/K7", BOTH, GROUPED, 6),
    Bar("neighborhood/2x56x56x96/7x7", FORWARD, ("SDPA, dense",), 20),
    Bar("neighborhood/2x56x56x96/7x7", BOTH, ("SDPA, dense",), 22),
    Bar("neighborhood/2x56x56x96/7x7", BOTH, (), 2.0, "memory"),
    Bar("window/8x56x56x96/7x7,shift3", FORWARD, FUSED, 2.5),
    Bar("window-module/8x56x56x96/7x7,shift3", FORWARD, FUSED, 1.3),
    Bar("window-module/8x56x56x96/7x7,shift3", BOTH, FUSED, 1.25),
    *(
        Bar(f"dynamic-line/32x{length}x384/K{kernel}", BOTH, tuple(peers.LINE_UNFOLDS), faster)
        for length in (64, 512)
        for kernel, faster in ((3, 8), (15, 25))
    ),
]
# first call, in a process and a cache of its own; forward and backward
FIRST_SPECS = (
    "DepthwiseConv(kernel_size=7)",
    "DynamicDepthwiseConv(kernel_size=7)",
    "InhomogeneousDepthwiseConv(kernel_size=7, num_groups=2)",
    "NeighborhoodAttention(kernel_size=7)",
    "WindowAttention(window_size=7, shift_size=3)",
)
FIRST_LIMIT, LATER_LIMIT = 1.0, 0.05  # seconds more than without compiled kernels
# printed beside the bars: the overhead of a call on a small tensor
SMALL_CASE = f"static/{named(SMALL)}/K7"
