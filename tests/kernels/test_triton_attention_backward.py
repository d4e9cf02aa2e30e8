"""The backward pass of the GPU's attention: runs of windows, parts of the images, pairs of tiles; what it allocates."""

import importlib
import math

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from glocal.kernels import biased_attention, neighborhood_attention, window_attention

from .attention_cases import agree, neighborhood_case, nothing_else, whole_case, window_case  # noqa: F401
from .on_gpu import DEVICE, INSTALLED, RUN, SHORT

FAULTS = {
    "kernels/triton/attention_backward.py": [
        (
            "at once: gradients of queries are not scaled",
            "tl.dot(tl.trans(slope), keys, input_precision=PRECISION) * scale",
            "tl.dot(tl.trans(slope), keys, input_precision=PRECISION)",
        ),
        ("gradients of queries are not scaled", "strides[10], total * scale", "strides[10], total"),
        ("at once: the softmax's own share is left out", "slope - tl.sum(weights * slope, 0)[None, :]", "slope"),
        (
            "the softmax's own share is left out",
            "tl.trans(above), input_precision=PRECISION) - inner[None, :])",
            "tl.trans(above), input_precision=PRECISION))",
        ),
        (
            "at once: weights are not divided",
            "weights = weights / tl.where(divisor > 0, divisor, 1.0)[None, :]",
            "weights = weights",
        ),
        (
            "at once: a query that sees nothing is NaN",
            'tl.where(most == float("-inf"), 0.0, most)[None, :]',
            "most[None, :]",
        ),
        (
            "at once: sources that are not valid are seen",
            "k_seen[:, None] & q_there[None, :], scores",
            "k_there[:, None] & q_there[None, :], scores",
        ),
        (
            "a program has one window",
            "for number in range(part * each, tl.minimum(part * each + each, windows))",
            "for number in range(part * each, part * each + 1)",
        ),
        ("of several windows the last counts", "total += slope\n", "total = slope\n"),
        ("all windows are the first image's", "tl.int64) + number // WINDOWS", "tl.int64) + number * 0"),
        ("windows of an image are all the first", "owned(number % WINDOWS, shape, 0", "owned(number * 0, shape, 0"),
        (
            "at once: the first image's table is all images'",
            "far * table[1] + table[2]\n    both",
            "table[2]\n    both",
        ),
        (
            "the first image's table is all images'",
            "far * table[1] + table[2], table, away_h",
            "table[2], table, away_h",
        ),
        (
            "pairs of the last images are left out",
            "tl.minimum(part * each + each, images)",
            "part * each + tl.minimum(each, 1)",
        ),
        (
            "pairs of tiles in the first row are all",
            "range(0, (tiles_h - tl.abs(tiles_away_h)) * row)",
            "range(0, row)",
        ),
        (
            "a source's tile lies on the query's other side",
            "k_base_h = q_base_h - tiles",
            "k_base_h = q_base_h + tiles",
        ),
        (
            "a tile goes on in the next window",
            "k_lane = tl.where((k_base_h + h < side_h) & (k_base_w + w < side_w), lane, BQ)",
            "k_lane = lane",
        ),
        ("some differences of tiles have no program", "-(number // 2) - 1", "-(number // 2)"),
        ("tiles of one difference have another's entries", "away_w = tiles_away_w * TW + w", "away_w = w"),
        ("entries are mirrored", "- away_w[None, :] + tiles_w * tile_w", "+ away_w[None, :] + tiles_w * tile_w"),
        (
            "lanes of a tile are counted down its columns",
            "from_h % tile_h * tile_w + from_w % tile_w",
            "from_w % tile_w * tile_h + from_h % tile_h",
        ),
        (
            "entries of neighborhoods are mirrored",
            "[:, None] + away_h[None, :] - across[0]",
            "[:, None] - away_h[None, :] - across[0]",
        ),
    ],
}


@pytest.fixture
def calls():
    return pytest.importorskip("glocal.kernels.triton.attention_calls")


@pytest.fixture
def small(calls, monkeypatch):
    """Blocks of 16, of which small grids have several."""
    monkeypatch.setattr(calls, "AT_ONCE", 0)
    monkeypatch.setattr(calls.Layout, "block", lambda *_: 16)


@pytest.fixture(autouse=True)
def nothing_lies_in_new_memory():
    """But NaN: what is read was written. (A GPU has no fixed order for some of what the oracle does.)"""
    torch.use_deterministic_algorithms(DEVICE == "cpu")
    yield
    torch.use_deterministic_algorithms(False)


# Programs that have several windows, the last of them fewer. The number is that of programs that are asked for.

ODD = {"extents": [[6, 5], [2, 4], [3, 1]], "batch": 3}
RUNS = {
    "windows": (7, lambda: window_case((7, 6), (3, 2), 1, heads=1, batch=3)),
    "windows, extents": (3, lambda: window_case((6, 5), (4, 3), 2, **ODD)),
    "windows, rolled": (4, lambda: window_case((6, 4), (3, 2), 1, rolled=(5, 3), heads=1, batch=3)),
    "windows, no bias": (3, lambda: window_case((5, 4), (2, 3), 1, biased=False)),
    "windows, two sides shorter": (2, lambda: window_case((3, 4), (7, 5), batch=3, heads=1)),
    "windows, heads of 70": (2, lambda: window_case((4, 5), (3, 3), dim=70, heads=1), torch.float16),
    "one window": (4, lambda: window_case((4, 4), (4, 4), 1, batch=5)),
    "one token": (1, lambda: window_case((1, 1), (2, 2), batch=3)),
    "64 tokens": (1, lambda: window_case((10, 8), (8, 8), heads=1), torch.bfloat16),
    "sequences": (5, lambda: window_case((23,), (5,), 2, batch=2)),
    "grids": (3, lambda: whole_case((3, 5), batch=5, heads=1)),
    "grids, valid": (2, lambda: whole_case((2, 5), batch=4, valid=True)),
    "grids, tables of each": (1, lambda: whole_case((5, 3), batch=3, valid=True, of_each=True)),
    "grids of one token": (1, lambda: whole_case((1, 1), batch=3)),
    "grids of a row": (2, lambda: whole_case((13,), batch=3)),
}


@RUN
@pytest.mark.parametrize("case", RUNS)
@pytest.mark.usefixtures("kernels_run")
def test_programs_with_several_windows(case, calls, monkeypatch):
    programs, made, *dtype = RUNS[case]
    monkeypatch.setattr(calls, "PROGRAMS", programs)
    monkeypatch.setattr(calls, "_by_tiles", None)
    agree(*made(), *(dtype or [torch.float32]))


# Grids and windows cut into tiles of 4 x 4, 1 x 16, 16 x 1 or 8 x 2

TILES = {
    "grids": (20, lambda: whole_case((9, 5), heads=1, batch=3)),
    "grids, valid": (1024, lambda: whole_case((5, 7), valid=True, heads=1)),
    "grids, tables of each": (1, lambda: whole_case((3, 7), of_each=True, valid=True, heads=1)),
    "grids of two columns": (1, lambda: whole_case((13, 2), heads=1)),
    "grids of a column": (1024, lambda: whole_case((33, 1), heads=1)),
    "grids of a row": (3, lambda: whole_case((40,), batch=3, heads=1)),
    "windows": (30, lambda: window_case((5, 9), (5, 6), 2, heads=1, batch=2)),
    "windows, extents": (1, lambda: window_case((7, 4), (6, 3), 2, heads=1, extents=[[7, 4], [2, 2]], batch=2)),
    "windows, rolled": (1, lambda: window_case((10, 6), (5, 6), 2, rolled=(7, 6), heads=1)),
    "windows, no bias": (1, lambda: window_case((5, 9), (5, 4), 1, biased=False)),
}


@RUN
@pytest.mark.parametrize("case", TILES)
@pytest.mark.usefixtures("kernels_run", "small")
def test_tiles(case, calls, monkeypatch):
    programs, made = TILES[case]
    monkeypatch.setattr(calls, "PROGRAMS", programs)
    agree(*made(), torch.float32)


@pytest.mark.parametrize(
    ("grid", "tile"), [((9, 5), (4, 4)), ((13, 2), (8, 2)), ((33, 1), (16, 1)), ((1, 40), (1, 16)), ((2, 40), (2, 8))]
)
def test_tiles_are_no_longer_than_the_grid(grid, tile, calls):
    assert calls.whole(grid, 1, 1).tile(16) == tile


@RUN
@pytest.mark.parametrize("dtype", SHORT[1:])
@pytest.mark.usefixtures("kernels_run")
def test_a_grid_of_more_tokens_than_a_block(dtype):
    agree(*whole_case((11, 9), heads=1, batch=1), dtype)


@RUN
@pytest.mark.usefixtures("kernels_run")
def test_neighborhoods_in_parts(calls, monkeypatch):
    monkeypatch.setattr(calls, "PROGRAMS", 2)
    agree(*neighborhood_case((3, 4), (3, 3), batch=5, heads=1), torch.float32)


# What is hidden


def hidden_windows(extents, window):
    ends = torch.tensor(extents, device=DEVICE)
    rows, row = torch.arange(6)[:, None], torch.arange(5)
    inside = torch.stack([(rows < h) & (row < w) for h, w in extents])
    tensors = [torch.randn(len(extents), 6, 5, 3 * 3), torch.randn(math.prod(2 * w - 1 for w in window), 1)]
    options = {"num_heads": 1, "window_size": window, "shift_size": 1, "extents": ends}
    return lambda qkv, table: window_attention(qkv, table, **options), tensors, [0], inside


def hidden_sources(of_each=False):
    valid = torch.rand(3, 24) < 0.5
    valid[1] = False
    tensors = [torch.randn(3, 24, 1, n) for n in (3, 3, 4)] + [torch.randn(*[3] * of_each, 1, 11, 7)]
    return lambda *given: biased_attention(*given, (6, 4), valid=valid.to(DEVICE)), tensors, [1, 2], valid


def hidden_neighbors(extents=None):
    valid = torch.rand(2, 5, 6) < 0.5
    ends, options = None, {"valid": valid.to(DEVICE)}
    if extents is not None:
        rows, row = torch.arange(5)[:, None], torch.arange(6)
        valid = torch.stack([(rows < h) & (row < w) for h, w in extents])
        ends = torch.tensor(extents, device=DEVICE)
        options = {"extents": ends, "border": "shifted"}
    tensors = [torch.randn(2, 5, 6, 2, n) for n in (3, 3, 4)] + [torch.randn(2, 5, 5)]
    return lambda *given: neighborhood_attention(*given, kernel_size=3, **options), tensors, [1, 2], valid


HIDDEN = {
    "windows": lambda: hidden_windows(ODD["extents"], (3, 4)),
    "grids": hidden_sources,
    "grids, tables of each": lambda: hidden_sources(of_each=True),
    "neighborhoods": hidden_neighbors,
    "neighborhoods, extents": lambda: hidden_neighbors([[3, 4], [5, 1]]),
}


@RUN
@pytest.mark.parametrize(
    ("kind", "dtype", "tiles"),
    [
        *((kind, torch.float32, False) for kind in HIDDEN),
        ("windows", torch.bfloat16, False),
        ("grids, tables of each", torch.bfloat16, True),
    ],
)
@pytest.mark.usefixtures("kernels_run")
def test_nan_that_is_hidden_reaches_nothing(kind, dtype, tiles, request):
    if tiles:
        request.getfixturevalue("small")
    run, tensors, soiled, seen = HIDDEN[kind]()
    tensors = [t.to(DEVICE, dtype) for t in tensors]
    seen, above, found = seen.to(DEVICE), None, []
    for filling in (0.0, math.nan):
        given = [t.clone() for t in tensors]
        for i in soiled:
            given[i][~seen] = filling
        given = [t.requires_grad_() for t in given]
        y = run(*given)
        above = torch.randn_like(y) if above is None else above
        if kind == "windows":  # outputs that are always zero
            above[~seen] = filling
        found.append([y, *torch.autograd.grad(y, given, above)])
    for clean, dirty in zip(*found, strict=True):
        assert clean.isfinite().all() and torch.equal(clean, dirty)


# Launches and memory, of kernels that do nothing

NAMES = {
    "attention": ["_forward"],
    "attention_backward": [
        "_backward_at_once",
        "_backward_queries",
        "_backward_sources",
        "_backward_pairs",
        "_sum_pairs",
        "_backward_differences",
        "_sum_differences",
    ],
}


class Allocated(TorchDispatchMode):
    """Bytes that were allocated, given back or not."""

    def __init__(self, given):
        super().__init__()
        self.seen, self.bytes = {t.untyped_storage().data_ptr(): t for t in given}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        found = function(*args, **(kwargs or {}))
        for tensor in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in self.seen:
                self.seen[tensor.untyped_storage().data_ptr()] = tensor
                self.bytes += tensor.untyped_storage().nbytes()
        return found


@pytest.fixture
def launched(calls, monkeypatch):
    """Names of kernels and how many programs."""
    found = []

    class Silent:
        def __init__(self, name):
            self.name = name

        def __getitem__(self, programs):
            return lambda *_, **__: found.append((self.name, math.prod(programs)))

    for file, names in NAMES.items():
        for name in names:
            monkeypatch.setattr(importlib.import_module(f"glocal.kernels.triton.{file}"), name, Silent(name))
    return found


def backward(calls, layout, heads, batch, dim, *, table, of_each=False):
    q, k, v, grad = (torch.zeros(batch, math.prod(layout.sources), heads, dim, dtype=torch.bfloat16) for _ in range(4))
    found = [torch.empty_like(t) for t in (q, k, v)]
    given = (layout, grad, q, k, v, table, None, None, 1.0, found)
    with Allocated([grad, q, k, v, *found]) as allocated:
        entries = calls.backward(*given, of_each=of_each)
    return allocated.bytes - entries.numel() * entries.element_size()


@pytest.mark.parametrize(("batch", "of_each"), [(1, False), (9, False), (3, True)])
def test_whole_grids_need_no_numbers_for_each_pair(batch, of_each, calls, launched):
    """Four (times tokens, heads and those of a tile) do, and those of the parts that a GPU is filled with."""
    tokens, heads, dim, block = 40 * 40, 3, 4, 64
    layout = calls.whole((40, 40), heads, batch if of_each else 1)
    table = torch.zeros(batch if of_each else 1, heads, 79, 79)
    used = backward(calls, layout, heads, batch, dim, table=table, of_each=of_each)
    kept = batch * tokens * heads * (2 * dim + 8)  # the output, two numbers of each
    pairs = 4 * 4 * heads * tokens * block
    parts = 0 if batch == 1 or of_each else 4 * 2 * calls.PROGRAMS * block**2
    assert used <= kept + pairs * (batch if of_each else 1) + parts
    assert batch > 1 or 4 * used < 4 * heads * tokens**2
    names = ["_forward", "_backward_queries", "_backward_sources", "_backward_differences", "_sum_differences"]
    assert [name for name, _ in launched] == names


@pytest.mark.parametrize(
    ("heads", "batch", "grid", "window", "block"),
    [(3, 2, (64, 64), (2, 2), 16), (12, 64, (14, 14), (7, 7), 64), (1, 9, (8, 8), (8, 8), 64)],
)
def test_windows_are_read_once_by_enough_programs(heads, batch, grid, window, block, calls, launched):
    layout = calls.windows(grid, None, window, 0, heads)
    table = torch.zeros(math.prod(2 * w - 1 for w in window), heads)
    used = backward(calls, layout, heads, batch, 2, table=table)
    (name, programs), (last, _) = launched
    assert (name, last) == ("_backward_at_once", "_sum_differences")
    all_of_them = batch * heads * math.prod(n // w for n, w in zip(grid, window, strict=True))
    assert min(calls.PROGRAMS, all_of_them) <= programs <= 2 * calls.PROGRAMS + heads
    assert used <= 4 * (programs + heads) * block**2


@pytest.mark.skipif(not INSTALLED, reason="triton is not installed")
def test_every_kernel_is_known(calls):
    for file, names in NAMES.items():
        text = importlib.util.find_spec(f"glocal.kernels.triton.{file}").origin
        with open(text, encoding="utf-8") as lines:
            written = [line for line in lines if line.startswith(("def _forward", "def _backward", "def _sum"))]
        assert sorted(line[4:].partition("(")[0] for line in written) == sorted(names)
