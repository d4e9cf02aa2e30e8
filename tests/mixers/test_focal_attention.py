"""FocalAttention against a loop over queries and sources, WindowAttention where nothing else is seen, and counts."""

import math
from itertools import product

import pytest
import torch
from torch.testing import assert_close

import glocal

HEADS, DIM = 2, 4


def spec_of(window, expand, focal, rank=2, **arguments):
    options = {"window_size": window, "expand_size": expand, "focal_window": focal, "num_heads": HEADS, "rank": rank}
    return f"FocalAttention({', '.join(f'{k}={v}' for k, v in {**options, **arguments}.items())})"


def ring_by_rolling(window, expand):
    """Offsets from a window's first place, as the released code finds them: four rolled maps, cut into windows.

    A map of coordinates is rolled by `expand` towards each corner in turn (up-left, up-right, down-left,
    down-right), and of the window in its middle those places are kept that came from outside.
    """
    axes = [torch.arange(-w, 2 * w) for w in window]
    coordinates = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1)
    ring = []
    for shifts in product((-expand, expand), repeat=len(window)):
        rolled = coordinates.roll(shifts, tuple(range(len(window))))
        middle = rolled[tuple(slice(w, 2 * w) for w in window)].flatten(0, -2).tolist()
        ring += [tuple(p) for p in middle if any(not 0 <= c < w for c, w in zip(p, window, strict=True))]
    return ring


def by_loop(mixer, places, window, expand, focal):
    """Which sources each query sees, and with which bias, one pair at a time; pooled windows come first."""

    def raster(place, sizes):
        row = 0
        for p, size in zip(place, sizes, strict=True):
            row = row * size + p
        return row

    def oracle(x, valid=None):
        batch, *grid, _ = x.shape
        where = places(grid)
        windows = places([math.ceil(n / w) for n, w in zip(grid, window, strict=True)]) if focal else []
        home = [tuple(p // w for p, w in zip(place, window, strict=True)) for place in where]
        inside = [tuple(p % w for p, w in zip(place, window, strict=True)) for place in where]
        ring = ring_by_rolling(window, expand) if expand else []

        def real(b, j):
            return valid is None or bool(valid[(b, *where[j])])

        pooled = []
        for b, home_window in product(range(batch), windows):
            total = mixer.pool_layers[0].bias.expand(DIM)
            for j, token in enumerate(x[b].flatten(0, -2)):
                if home[j] == home_window and real(b, j):
                    total = total + mixer.pool_layers[0].weight[0, raster(inside[j], window)] * token
            pooled.append(total)
        tokens = x.flatten(1, -2)
        if pooled:
            tokens = torch.cat([torch.stack(pooled).view(batch, len(windows), DIM), tokens], 1)
        q, k, v = mixer.qkv(tokens).unflatten(-1, (3, HEADS, -1)).unbind(2)

        def from_window(i, j):
            return tuple(p - h * w for p, h, w in zip(where[j], home[i], window, strict=True))

        def sources(b, i):
            near = []
            for m, other in enumerate(windows):
                close = all(abs(o - h) <= focal // 2 for o, h in zip(other, home[i], strict=True))
                if close and any(home[j] == other and real(b, j) for j in range(len(where))):
                    near.append(m)
            for j in range(len(where)):
                if real(b, j) and all(
                    -expand <= p < w + expand for p, w in zip(from_window(i, j), window, strict=True)
                ):
                    near.append(len(windows) + j)
            return near

        # the three tables one below the other, [rows, heads]
        last_place = [w - 1 for w in window]
        parts = [mixer.relative_position_bias_table]
        if expand:
            parts.append(mixer.relative_position_bias_table_to_neighbors[0].movedim(0, -1).flatten(0, 1))
        if focal:
            parts.append(mixer.relative_position_bias_table_to_windows[0].T)
        table, starts = torch.cat(parts), [0, len(parts[0]), len(parts[0]) + math.prod(window) * len(ring)]

        def row(i, j):
            if j < len(windows):
                apart = [p - (o - h) + focal // 2 for p, o, h in zip(inside[i], windows[j], home[i], strict=True)]
                return starts[2] + raster(apart, [w + focal - 1 for w in window])
            place = from_window(i, j - len(windows))
            if home[j - len(windows)] == home[i]:
                apart = [q - k + last for q, k, last in zip(inside[i], place, last_place, strict=True)]
                return raster(apart, [2 * w - 1 for w in window])
            return starts[1] + raster(inside[i], window) * len(ring) + ring.index(place)

        mixed = []
        for b, i in product(range(batch), range(len(where))):
            near = sources(b, i)
            if not near:
                mixed.append(torch.zeros(DIM, dtype=x.dtype))
                continue
            query = q[b, len(windows) + i]
            scores = (query * k[b, near]).sum(-1) / query.shape[-1] ** 0.5 + table[[row(i, j) for j in near]]
            mixed.append((scores.softmax(0)[..., None] * v[b, near]).sum(0).flatten())
        return mixer.proj(torch.stack(mixed)).view(batch, *grid, -1)

    return oracle


CASES = [  # grid, window, expand, focal
    ((9, 13), (4, 4), 2, 3),
    ((5, 7), (3, 3), 1, 3),
    ((6, 5), (2, 4), 1, 1),
    ((4, 7), (2, 3), 0, 5),
    ((5, 4), (3, 2), 1, 0),
    ((2, 3), (4, 4), 2, 3),
    ((1, 1), (2, 2), 1, 3),
    ((11,), (4,), 2, 3),
    ((10,), (5,), 1, 1),
]


@pytest.mark.parametrize(("grid", "window", "expand", "focal"), CASES)
def test_is_the_loop(build, check, tokens, places, grid, window, expand, focal):
    mixer = build(spec_of(window, expand, focal, len(grid)), DIM)
    oracle = by_loop(mixer, places, window, expand, focal)
    check(mixer, oracle, tokens(2 if math.prod(grid) < 50 else 1, *grid, DIM))


@pytest.mark.parametrize(("grid", "window", "expand", "focal"), [CASES[1], CASES[4], CASES[7]])
def test_masked_tokens_are_not_there(build, check, tokens, places, grid, window, expand, focal):
    mixer = build(spec_of(window, expand, focal, len(grid)), DIM)
    valid = torch.rand(2, *grid) < 0.5
    valid[0][tuple(slice(w, 2 * w) for w in window)] = False  # a window without any
    check(mixer, by_loop(mixer, places, window, expand, focal), tokens(2, *grid, DIM), valid=valid)


@pytest.mark.parametrize("name", ["FocalAttention", "ReleasedFocalAttention"])
def test_windows_are_pooled_once(build, tokens, name):
    mixer, calls = build(spec_of(3, 1, 3).replace("FocalAttention", name), DIM), []
    mixer.pool_layers[0].register_forward_hook(lambda *_: calls.append(1))
    mixer(tokens(2, 5, 7, DIM))
    assert calls == [1]


@pytest.mark.parametrize(
    ("window", "expand", "focal", "extents"),
    [(3, 1, 3, [(4, 5), (2, 6)]), (2, 1, 0, [(5, 3), (2, 2)]), (4, 2, 3, [(9,), (4,)])],
)
def test_padding_leaves_images_alone(build, check_padding, window, expand, focal, extents):
    check_padding(build(spec_of(window, expand, focal, len(extents[0])), DIM), extents, DIM)


@pytest.mark.parametrize(("grid", "window"), [((7, 9), 4), ((6, 6), (3, 2)), ((11,), 4)])
def test_without_ring_and_pooled_windows_is_window_attention(build, check, tokens, grid, window):
    mixer = build(spec_of(window, 0, 0, len(grid)), DIM)
    plain = build(f"WindowAttention(window_size={window}, num_heads={HEADS}, rank={len(grid)})", DIM)
    plain.impl = "reference"

    def oracle(x):
        return torch.func.functional_call(plain, dict(mixer.named_parameters()), (x,))

    check(mixer, oracle, tokens(2, *grid, DIM))


@pytest.mark.parametrize(
    ("focal", "expand", "unique", "released"),
    [(7, 3, 218, 230), (5, 3, 194, 206), (3, 3, 178, 190), (1, 0, 50, 50)],
)
def test_keys_of_the_four_stages(build, tokens, focal, expand, unique, released):
    """Far from the border, for a window of 7; the released code counts some tokens twice."""
    arguments = f"window_size=7, expand_size={expand}, focal_window={focal}, num_heads=1"
    x, query = tokens(1, 63, 63, 1), torch.tensor([31 * 63 + 31])
    for name, slots in (("FocalAttention", unique), ("ReleasedFocalAttention", released)):
        index = build(f"{name}({arguments})", 1).weights(x, queries=query).index
        assert index.shape[-1] == slots and (index >= 0).all()
        assert len(index.unique()) == unique


def test_pooled_windows_stand_at_their_centres(build, tokens):
    found = build(spec_of((4, 3), 1, 3), DIM).weights(tokens(1, 9, 6, DIM))
    assert found.source_positions[:6].tolist() == [[y, x] for y in (1.5, 5.5, 9.5) for x in (1, 4)]
    assert found.source_positions[6:].tolist() == [[y, x] for y in range(9) for x in range(6)]
    assert found.source_grid == (9, 6) and found.num_sources == 60


def test_a_subset_of_queries_gives_those_rows(build, tokens):
    mixer, x, queries = build(spec_of(3, 1, 3), DIM), tokens(2, 5, 7, DIM), torch.tensor([30, 2, 17])
    found, whole = mixer.weights(x, queries=queries), mixer.weights(x)
    assert_close(found.dense(), whole.dense()[:, :, queries])
    assert_close(mixer(x, queries=queries), mixer(x).flatten(1, 2)[:, queries])


def test_parameters():
    """Those of the first stage of Focal-T, whose block holds the pooling and whose attention the rest."""
    mixer = glocal.build("FocalAttention()", 96)
    assert {k: tuple(v.shape) for k, v in mixer.state_dict().items()} == {
        "qkv.weight": (288, 96),
        "qkv.bias": (288,),
        "proj.weight": (96, 96),
        "proj.bias": (96,),
        "relative_position_bias_table": (169, 3),
        "relative_position_bias_table_to_neighbors": (1, 3, 49, 132),
        "relative_position_bias_table_to_windows.0": (3, 169),
        "pool_layers.0.weight": (1, 49),
        "pool_layers.0.bias": (1,),
    }
    assert (mixer.pool_layers[0].weight == 1 / 49).all() and mixer.pool_layers[0].bias == 0
    last = glocal.build("FocalAttention(expand_size=0, focal_window=1)", 768)
    assert last.relative_position_bias_table_to_windows[0].shape == (24, 49)
    assert not any("neighbors" in name for name in last.state_dict())


def test_a_double_entry_of_the_ring_has_no_gradient(build, tokens):
    """12 tokens have two entries for each place, and the second is unused."""
    mixer = build("FocalAttention(focal_window=0, num_heads=1)", 2)
    mixer(tokens(1, 21, 21, 2)).square().sum().backward()
    used = (mixer.relative_position_bias_table_to_neighbors.grad != 0).any(2)[0, 0]
    ring = ring_by_rolling((7, 7), 3)
    assert used.tolist() == [place not in ring[:i] for i, place in enumerate(ring)]
    assert (~used).sum() == 12


def test_cost():
    """117 tokens, 6 windows of 25 places, 25 + 24 + 9 slots; pooling for keys and for values."""
    mixer = glocal.build(spec_of(5, 1, 3), DIM)
    assert mixer.macs((9, 13)) == 2 * 117 * 16 + 2 * (117 + 6) * 16 + 2 * 6 * 25 * 4 + 2 * 117 * 58 * 4


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("expand_size=4", "expand_size: 4, must be a whole number from 0 .* to half the window, 3"),
        ("expand_size=-1", "expand_size: -1, must be"),
        ("expand_size=0.5", "expand_size: 0.5, must be"),
        ("focal_window=4", "focal_window: 4, must be 0 .* or odd"),
        ("focal_window=-1", "focal_window: -1, must be"),
    ],
)
@pytest.mark.parametrize("name", ["FocalAttention", "ReleasedFocalAttention"])
def test_what_has_no_meaning_is_refused(name, arguments, words):
    with pytest.raises(ValueError, match=words):
        glocal.build(f"{name}({arguments}, num_heads=1)", 4)


def test_pooling_averages_at_first():
    """With equal weights a pooled window is the mean of its tokens."""
    mixer = glocal.build(spec_of(2, 0, 1), DIM).double()
    x = torch.randn(1, 2, 4, DIM, dtype=torch.float64)
    v = mixer.qkv.weight[2 * DIM :]
    means = torch.stack([x[0, :, :2].mean((0, 1)), x[0, :, 2:].mean((0, 1))])
    assert_close(mixer.values(x)[0, :2].flatten(1), means @ v.T + mixer.qkv.bias[2 * DIM :])


# planted by scripts/mutate
FAULTS = {
    "mixers/focal_attention.py": (
        ("tokens of the ring count twice", "ring_once=True", "ring_once=False"),
        ("the ring wraps around", "wrap=False", "wrap=True"),
        ("padding is seen by the queries of its window", "return table.masked_fill(~real, -1)", "return table"),
        (
            "padding is pooled into the keys",
            "return self.terms(x, self.sources(x, valid), index",
            "return self.terms(x, self.sources(x, None), index",
        ),
        (
            "padding is pooled into the keys of the fast path",
            "return self.by_window(x, self.sources(x, valid), seen",
            "return self.by_window(x, self.sources(x, None), seen",
        ),
        ("the fast path sees what lies outside", "mask_bias(seen >= 0, x.dtype)", "mask_bias(seen >= -1, x.dtype)"),
        (
            "padding is pooled into the values",
            "self.heads(self.sources(source, valid), 2)",
            "self.heads(self.sources(source, None), 2)",
        ),
        ("the cost has a window for each token", "math.prod(self.counts(grid)))", "math.prod(grid))"),
    ),
    ("mixers/_focal.py", "mixers/test_focal_attention.py", "mixers/test_released_focal_attention.py"): (
        (
            "the fast path pools windows for keys and for values",
            "(pick_or_zero(self.heads(sources, part), table)",
            "(pick_or_zero(self.heads(self.sources(x, None), part), table)",
        ),
    ),
}
