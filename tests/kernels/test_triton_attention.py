"""The GPU's attention against dense softmax in float64."""

import itertools
import math

import pytest
import torch

from glocal.kernels import biased_attention, neighborhood_attention, window_attention

from .attention_cases import agree, neighborhood_case, nothing_else, whole_case, window_case  # noqa: F401
from .on_gpu import (
    COMPILE,
    DEVICE,
    RUN,
    SHORT,
    TARGETS,
    WIDE,
    WIDE_COMPILE,
    compiled,
    fits,
    take,
)

FAULTS = {
    "kernels/triton/attention.py": [
        ("neighborhoods are not moved inward at the end", "tl.minimum(first, limit - K), 0)", "first, 0)"),
        ("causal neighbors begin one too late", "first = member - (K - 1)", "first = member - (K - 2)"),
        ("a roll goes the other way", "(slot + back) % size", "(slot + size - back) % size"),
        ("what a roll brought together is not kept apart", "moved = at >= n - back + side", "moved = at >= n + side"),
        ("shifted windows are not shifted", "tl.where(end > K, (K - shift) % K, 0)", "tl.where(end > K, 0, 0)"),
        (
            "queries after the past are taken from the last on",
            "        token_w = token_w - past\n",
            "        token_w = tl.where(token_w >= past, n_w - 1 - token_w, -1)\n",
        ),
        ("sources that are not valid are seen", "if HAS_VALID:", "if HAS_VALID and False:"),
        ("the sum is not carried over", "total = total * kept[:, None] + tl.dot(w", "total = total + tl.dot(w"),
        ("who sees sources at the border is forgotten", "tl.where(begin < K, 0, begin - K // 2)", "begin - K // 2"),
        (
            "windows lie as far apart along both axes",
            "window % tiles_w * side_w\n",
            "window % tiles_w * side_h\n",
        ),
        ("a source that nobody sees counts", 'return tl.where(seen, scores, float("-inf"))', "return scores"),
    ],
    (
        "kernels/triton/attention_calls.py",
        "kernels/test_triton_attention.py",
        "kernels/test_triton_attention_backward.py",
    ): [
        ("each image's table is the first's", "rows * row * heads if tables > 1 else 0", "0"),
        ("a window more has no program", "n // window + (self.shift > 0)", "n // window"),
        ("of a table's gradient the first part is all", "pairs.sum(0, keepdim=True)", "pairs[:1]"),
        ("every image is a part", "max(count * programs // PROGRAMS, 1)", "1"),
        ("programs have images with other tables", "heads, tiles[0] if of_each else 0)", "heads)"),
        ("windows are taken by tiles", "way = _at_once if layout.at_once(q, v) else _by_tiles", "way = _by_tiles"),
        ("tiles of narrow grids are square", "height = max(min(height, rows), block // row)", "height = height"),
    ],
    "kernels/neighborhood_attention.py": [
        (
            "what lies behind an image's end has any gradient",
            "grads = [t.zero_() for t in grads]",
            "grads = [t.fill_(1) for t in grads]",
        ),
    ],
}


# Neighborhoods

NEIGHBORHOODS = {
    "image": {"grid": (5, 9), "kernel": (3, 5)},
    "image, shifted": {"grid": (5, 9), "kernel": (5, 3), "border": "shifted"},
    "image, shifted, dilated": {"grid": (6, 5), "kernel": (3, 3), "border": "shifted", "dilation": 2, "heads": 1},
    "image, dilated, valid": {"grid": (5, 4), "kernel": (3, 3), "dilation": 2, "valid": True},
    "image, extents": {"grid": (3, 4), "kernel": (3, 3), "border": "shifted", "extents": [[3, 4], [2, 3]], "batch": 2},
    "image, causal": {"grid": (5, 4), "kernel": (2, 3), "causal": True, "biased": False},
    "image, smaller than the kernel": {"grid": (2, 3), "kernel": (5, 5), "border": "shifted"},
    "sequence": {"grid": (70,), "kernel": (5,), "heads": 1},
    "sequence, causal, past": {"grid": (9,), "kernel": (4,), "causal": True, "dilation": 2, "past": 5, "batch": 2},
    "sequence, shifted": {"grid": (40,), "kernel": (7,), "border": "shifted", "dilation": 3, "heads": 1},
}


@RUN
@pytest.mark.parametrize("case", NEIGHBORHOODS)
@pytest.mark.usefixtures("kernels_run")
def test_neighborhoods(case):
    agree(*neighborhood_case(**NEIGHBORHOODS[case]), torch.float32)


# Windows

WINDOWS = {
    "image": {"grid": (5, 4), "window": (3, 3)},
    "image, shifted": {"grid": (7, 5), "window": (4, 3), "shift": 2, "heads": 1},
    "image, smaller": {"grid": (3, 5), "window": (4, 4), "shift": 1},
    "image, extents": {"grid": (4, 5), "window": (3, 3), "shift": 1, "extents": [[4, 5], [2, 4]], "batch": 2},
    "image, rolled": {"grid": (6, 4), "window": (3, 2), "shift": 1, "rolled": (5, 3), "heads": 1},
    "image, rolled, not padded": {"grid": (6, 4), "window": (3, 2), "shift": 1, "rolled": (6, 4), "heads": 1},
    "large window": {"grid": (9, 9), "window": (9, 8), "shift": 3, "heads": 1},
    "sequence, no bias": {"grid": (11,), "window": (4,), "shift": 1, "biased": False, "batch": 2},
}


@RUN
@pytest.mark.parametrize("case", WINDOWS)
@pytest.mark.usefixtures("kernels_run")
def test_windows(case):
    agree(*window_case(**WINDOWS[case]), torch.float32)


# Whole grids

WHOLE = {
    "image": {"grid": (5, 7)},
    "image, valid": {"grid": (3, 4), "valid": True},
    "image, tables of each": {"grid": (3, 4), "of_each": True},
    "sequence": {"grid": (37,), "heads": 1, "batch": 1},
}


@RUN
@pytest.mark.parametrize("case", WHOLE)
@pytest.mark.usefixtures("kernels_run")
def test_whole_grids(case):
    agree(*whole_case(**WHOLE[case]), torch.float32)


# All of them

EACH = {
    "neighborhood": lambda: neighborhood_case((5, 4), (3, 3), border="shifted", dim=20),
    "window": lambda: window_case((5, 4), (3, 3), 1, dim=8),
    "whole grid": lambda: whole_case((3, 5), batch=1),
}


@RUN
@pytest.mark.parametrize("dtype", SHORT[1:])
@pytest.mark.parametrize("kind", EACH)
@pytest.mark.usefixtures("kernels_run")
def test_short_types(kind, dtype):
    agree(*EACH[kind](), dtype)


@RUN
@pytest.mark.parametrize("kind", EACH)
@pytest.mark.usefixtures("kernels_run")
def test_gradients_are_the_same_each_time(kind):
    run, _, tensors = EACH[kind]()
    tensors = [t.to(DEVICE).requires_grad_() for t in tensors]
    y = run(*tensors)
    first, second = (torch.autograd.grad(y, tensors, y.detach(), retain_graph=True) for _ in range(2))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


TILES = {
    "neighborhood": lambda: neighborhood_case((9, 8), (3, 5), border="shifted", heads=1),
    "window": lambda: window_case((9, 7), (7, 6), 3, dim=40, heads=1),
    "whole grid": lambda: whole_case((6, 7), dim=40, heads=1, batch=1),
}


@RUN
@pytest.mark.parametrize("kind", TILES)
@pytest.mark.usefixtures("kernels_run")
def test_with_smaller_tiles(kind, monkeypatch):
    """Which the last configuration has."""
    take(9, monkeypatch)
    agree(*TILES[kind](), torch.float32)


LARGER = {
    "neighborhood": lambda: neighborhood_case((20, 19), (7, 7), border="shifted", dim=32, value=32, heads=1),
    "neighborhood, dilated": lambda: neighborhood_case((19, 22), (5, 5), dilation=3, dim=16, value=48, heads=1),
    "window": lambda: window_case((15, 17), (7, 7), 3, dim=32),
    "window of 100": lambda: window_case((13, 11), (10, 10), 5, dim=20, heads=1),
    "whole grid": lambda: whole_case((13, 9), dim=70, value=90, heads=1),
}


@RUN
@WIDE
@pytest.mark.parametrize("dtype", SHORT)
@pytest.mark.parametrize("kind", LARGER)
@pytest.mark.usefixtures("kernels_run")
def test_larger_shapes(kind, dtype):
    agree(*LARGER[kind](), dtype)


REAL = {
    "neighborhood": lambda: neighborhood_call((28, 28), 3, (7, 7), "shifted"),
    "window": lambda: window_call((28, 28), 3, (7, 7), 3),
    "window of 100": lambda: window_call((28, 28), 3, (10, 10), 5),
    "whole grid": lambda: whole_call((14, 14), 4),
    "sequence of one": lambda: neighborhood_call((1,), 1, (1,), "masked"),
}
for channels in (64, 128, 256):
    REAL |= {
        f"neighborhood, {channels} channels": lambda n=channels: neighborhood_call((14, 14), 1, (7, 7), "shifted", n),
        f"window, {channels} channels": lambda n=channels: window_call((14, 14), 1, (7, 7), 3, n),
        f"window of 16, {channels} channels": lambda n=channels: window_call((14, 14), 1, (4, 4), 3, n),
        f"whole grid, {channels} channels": lambda n=channels: whole_call((14, 14), 1, n),
    }
SOME = [
    ("neighborhood", torch.bfloat16, 90),
    ("window", torch.float16, 80),
    ("whole grid", torch.float32, 80),
    ("sequence of one", torch.bfloat16, 90),
]
ALL = list(itertools.product(REAL, SHORT, TARGETS))


def neighborhood_call(grid, heads, kernel, border, dim=32):
    shape = (1, *grid, heads, dim)
    options = {"kernel_size": kernel, "border": border}
    tensors = [torch.zeros(shape), torch.zeros(shape), torch.zeros(shape)]
    tensors.append(torch.zeros(heads, *[2 * k - 1 for k in kernel]))
    return lambda q, k, v, bias: neighborhood_attention(q, k, v, bias, **options), tensors


def window_call(grid, heads, window, shift, dim=32):
    tensors = [torch.zeros(1, *grid, 3 * dim * heads), torch.zeros(math.prod(2 * w - 1 for w in window), heads)]
    options = {"num_heads": heads, "window_size": window, "shift_size": shift}
    return lambda qkv, table: window_attention(qkv, table, **options), tensors


def whole_call(grid, heads, dim=32):
    tensors = [torch.zeros(1, math.prod(grid), heads, dim) for _ in range(3)]
    tensors.append(torch.zeros(heads, *[2 * n - 1 for n in grid]))
    return lambda q, k, v, table: biased_attention(q, k, v, table, grid), tensors


@COMPILE
@WIDE_COMPILE
@pytest.mark.parametrize("number", [1, 2, 3, 4])
@pytest.mark.parametrize("kind", ["neighborhood", "window", "window of 100", "whole grid"])
def test_every_configuration_compiles(kind, number, monkeypatch, record_property):
    take(number, monkeypatch)
    run, tensors = REAL[kind]()
    tensors = [t.bfloat16().requires_grad_() for t in tensors]
    found = compiled(monkeypatch, 90, lambda: run(*tensors).sum().backward())
    assert found and fits(found, 90, record_property), found


@COMPILE
@pytest.mark.parametrize(
    ("kind", "dtype", "target"),
    [*SOME, *(pytest.param(*each, marks=WIDE_COMPILE) for each in ALL if each not in SOME)],
)
def test_compiles_for_gpus(kind, dtype, target, monkeypatch, record_property):
    run, tensors = REAL[kind]()
    tensors = [t.to(dtype).requires_grad_() for t in tensors]
    found = compiled(monkeypatch, target, lambda: run(*tensors).sum().backward())
    sums = {"_backward_pairs", "_sum_pairs"}, {"_backward_differences", "_sum_differences"}
    several = [{"_forward", "_backward_queries", "_backward_sources", *names} for names in sums]
    at_once = {"_forward", "_backward_at_once", "_sum_differences"}
    names = {name for name, *_ in found}
    assert names in (several[:1] if kind[0] in "ns" else several[1:] if kind[1] == "h" else [at_once, several[1]])
    assert names == at_once or kind != "window" or dtype == torch.float32
    assert fits(found, target, record_property), found
