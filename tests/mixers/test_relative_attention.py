"""RelativeAttention against timm's CoAtNet attention at its own size and against a loop at every size."""

import math
from functools import partial

import pytest
import torch
from timm.layers import RelPosBias, RelPosBiasTf
from timm.models.maxxvit import Attention2d, AttentionCl
from torch.func import functional_call
from torch.nn import functional as F

import glocal

HEADS, DIM = 2, 8


def spec_of(grid_size, **arguments):
    options = {"grid_size": grid_size, "num_heads": HEADS, **arguments}
    return f"RelativeAttention({', '.join(f'{k}={v}' for k, v in options.items())})"


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (5, 2), (1, 4)])
def test_is_timms_attention_of_the_tensorflow_weights(build, check, tokens, grid):
    """RelPosBiasTf counts from the query to the source, glocal and the paper from the source to the query."""
    mixer = build(spec_of(grid), DIM)
    bias = partial(RelPosBiasTf, window_size=grid)
    attention = Attention2d(DIM, dim_head=4, head_first=False, rel_pos_cls=bias).double()

    def oracle(x):
        weights = {k: v[..., None, None] if "weight" in k else v for k, v in mixer.named_parameters()}
        table = weights.pop("relative_position_bias_table")
        weights["rel_pos.relative_position_bias_table"] = table.flip(1, 2)
        return functional_call(attention, weights, x.movedim(-1, 1)).movedim(1, -1)

    check(mixer, oracle, tokens(2, *grid, DIM))


@pytest.mark.parametrize(("grid", "arguments"), [((4, 4), {}), ((3, 5), {}), ((3, 5), {"out_dim": 16, "num_heads": 4})])
def test_is_timms_channels_last_attention(build, check, tokens, grid, arguments):
    mixer = build(spec_of(grid, **arguments), DIM)
    bias = partial(RelPosBias, window_size=grid)
    out_dim = arguments.get("out_dim", DIM)
    attention = AttentionCl(DIM, out_dim, dim_head=4, head_first=False, rel_pos_cls=bias).double()

    def oracle(x):
        weights = dict(mixer.named_parameters())
        table = weights.pop("relative_position_bias_table")
        weights["rel_pos.relative_position_bias_table"] = table.flatten(1).T
        return functional_call(attention, weights, x)

    check(mixer, oracle, tokens(2, *grid, DIM))


@pytest.mark.parametrize(("grid", "out_dim"), [((4, 4), 24), ((3, 5), 12), ((2, 3), DIM)])
def test_is_timms_attention_that_widens_in_its_last_map(build, check, tokens, grid, out_dim):
    mixer = build(spec_of(grid, out_dim=out_dim, inner_dim=DIM), DIM)
    attention = Attention2d(
        DIM,
        out_dim,
        dim_head=4,
        expand_first=False,
        head_first=False,
        rel_pos_cls=partial(RelPosBias, window_size=grid),
    ).double()

    def oracle(x):
        weights = {k: v[..., None, None] if "weight" in k else v for k, v in mixer.named_parameters()}
        table = weights.pop("relative_position_bias_table")
        weights["rel_pos.relative_position_bias_table"] = table.flatten(1).T
        return functional_call(attention, weights, x.movedim(-1, 1)).movedim(1, -1)

    check(mixer, oracle, tokens(2, *grid, DIM))
    assert mixer.macs(grid) == (n := grid[0] * grid[1]) * (3 * DIM * DIM + DIM * out_dim) + 2 * n * n * DIM
    again = glocal.build(repr(mixer), DIM)
    assert {k: p.shape for k, p in again.named_parameters()} == {k: p.shape for k, p in mixer.named_parameters()}


@pytest.mark.parametrize("size", [(3, 4), (5, 2)])
def test_positions_from_an_mlp_are_a_table(build, check, tokens, size):
    """What a padded batch and other sizes get is checked against attention with the table written out."""
    mixer = build(spec_of((3, 4), position_mlp=7), DIM)
    other = build(spec_of(size), DIM)

    def oracle(x):
        weights = dict(mixer.named_parameters())
        first, second = (
            (weights.pop(f"relative_position_mlp.{part}.weight"), weights.pop(f"relative_position_mlp.{part}.bias"))
            for part in ("fc1", "fc2")
        )
        rows = []
        for dy in range(1 - size[0], size[0]):
            for dx in range(1 - size[1], size[1]):
                place = [math.copysign(math.log(1 + abs(d)), d) for d in (dy, dx)]
                hidden = (first[0] @ torch.tensor(place, dtype=torch.float64) + first[1]).relu()
                rows.append(second[0] @ hidden + second[1])
        table = torch.stack(rows, 1).unflatten(1, [2 * n - 1 for n in size])
        return functional_call(other, {**weights, "relative_position_bias_table": table}, x)

    check(mixer, oracle, tokens(2, *size, DIM))
    assert "position_mlp=7" in repr(mixer) and mixer.relative_position_bias_table is None
    valid = torch.zeros(1, *size, dtype=torch.bool)
    valid[:, :2, :2] = True
    x = tokens(1, *size, DIM)
    padded = mixer(x, valid=valid)[:, :2, :2]
    torch.testing.assert_close(padded, mixer(x[:, :2, :2]))


def test_positions_from_an_mlp_are_refused_for_sequences():
    with pytest.raises(ValueError, match=r"position_mlp: 4, takes offsets of two axes; grid_size is \(5,\)"):
        glocal.build("RelativeAttention(grid_size=(5,), num_heads=2, position_mlp=4)", DIM)


def resized(table, grid):
    """Bilinear to 2n - 1 entries an axis, by hand: centres of pixels at halves, the border pixel repeated."""
    for axis, n in enumerate(grid, start=1):
        old, new = table.shape[axis], 2 * n - 1
        columns = []
        for target in range(new):
            place = max((target + 0.5) * old / new - 0.5, 0.0)
            low = int(place)
            high = min(low + 1, old - 1)
            share = place - low
            columns.append((1 - share) * table.select(axis, low) + share * table.select(axis, high))
        table = torch.stack(columns, axis)
    return table


def by_loop(mixer, attend, places, after_softmax=False):
    def oracle(x):
        batch, *grid, _ = x.shape
        where = places(grid)
        table = resized(mixer.relative_position_bias_table, grid)

        def bias(i, j):
            offset = [query - source + n - 1 for query, source, n in zip(where[i], where[j], grid, strict=True)]
            return table[(slice(None), *offset)]

        q, k, v = mixer.qkv(x).reshape(batch, len(where), 3, HEADS, -1).unbind(2)
        if not after_softmax:
            mixed = attend(q, k, v, lambda b, i: list(range(len(where))), bias)
        else:
            mixed = attend(q, k, v, lambda b, i: list(range(len(where))))
            added = torch.zeros_like(v).unbind(1)
            for i in range(len(where)):
                row = sum(bias(i, j).unsqueeze(-1) * v[:, j] for j in range(len(where)))
                added = (*added[:i], row, *added[i + 1 :])
            mixed = mixed + torch.stack(added, 1).flatten(2)
        return mixer.proj(mixed).view(batch, *grid, -1)

    return oracle


SIZES = [  # grid the table is made for, grid
    ((3, 4), (3, 4)),
    ((3, 3), (4, 5)),
    ((4, 5), (3, 2)),
    ((2, 5), (5, 2)),
    ((4, 3), (1, 6)),
    ((1, 1), (2, 3)),
    ((5,), (5,)),
    ((4,), (7,)),
    ((6,), (3,)),
    ((1,), (4,)),
]


@pytest.mark.parametrize("after_softmax", [False, True])
@pytest.mark.parametrize(("size", "grid"), SIZES)
def test_is_the_loop_at_every_size(build, check, tokens, attend, places, size, grid, after_softmax):
    mixer = build(spec_of(size, after_softmax=after_softmax), DIM)
    check(mixer, by_loop(mixer, attend, places, after_softmax), tokens(2, *grid, DIM))


def test_without_qkv_bias_is_the_loop(build, check, tokens, attend, places):
    mixer = build(spec_of((3, 4), qkv_bias=False), DIM)
    check(mixer, by_loop(mixer, attend, places), tokens(2, 3, 4, DIM))


@pytest.mark.parametrize("after_softmax", [False, True])
def test_without_position_bias_is_attention_without(build, check, tokens, attend, places, after_softmax):
    mixer = build(spec_of((3, 4), after_softmax=after_softmax, position_bias=False), DIM)
    assert {name for name, _ in mixer.named_parameters()} == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}

    def oracle(x, valid=None):
        q, k, v = mixer.qkv(x).reshape(2, 12, 3, HEADS, -1).unbind(2)
        everywhere = torch.ones(2, 3, 4, dtype=torch.bool) if valid is None else valid
        return mixer.proj(attend(q, k, v, lambda b, i: everywhere[b].flatten().nonzero()[:, 0].tolist())).view(x.shape)

    check(mixer, oracle, tokens(2, 3, 4, DIM))
    check(mixer, oracle, tokens(2, 3, 4, DIM), valid=torch.rand(2, 3, 4) < 0.6)
    assert set(mixer.scores(tokens(1, 3, 4, DIM))) == {"content"}


@pytest.mark.parametrize("after_softmax", [False, True])
@pytest.mark.parametrize("grid", [(3, 4), (5, 2)])
@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_zero_table_is_self_attention(build, tokens, grid, after_softmax, impl):
    mixer = build(spec_of((3, 4), after_softmax=after_softmax), DIM)
    plain = build(f"SelfAttention(num_heads={HEADS})", DIM)
    mixer.impl = impl
    with torch.no_grad():
        mixer.relative_position_bias_table.zero_()
    plain.load_state_dict({k: v for k, v in mixer.state_dict().items() if "table" not in k})
    x = tokens(2, *grid, DIM)
    torch.testing.assert_close(mixer(x), plain(x))


@pytest.mark.parametrize("after_softmax", [False, True])
def test_positions_go_to_queries_and_keys_only(build, tokens, attend, after_softmax):
    """The bias is zero here, so that what is left is plain attention."""
    mixer = build(spec_of((3, 4), after_softmax=after_softmax), DIM)
    with torch.no_grad():
        mixer.relative_position_bias_table.zero_()

    def oracle(x, pos_embed):
        q, k, _ = mixer.qkv(x + pos_embed).reshape(2, 12, 3, HEADS, -1).unbind(2)
        v = mixer.qkv(x).reshape(2, 12, 3, HEADS, -1)[:, :, 2]
        return mixer.proj(attend(q, k, v, lambda b, i: list(range(12)))).view(x.shape)

    x, positions = tokens(2, 3, 4, DIM), tokens(2, 3, 4, DIM)
    for mixer.impl in ("reference", "fast"):
        torch.testing.assert_close(mixer(x, pos_embed=positions), oracle(x, positions))


@pytest.mark.parametrize("after_softmax", [False, True])
def test_padding_has_no_weight(build, tokens, after_softmax):
    """Nor may the bias after the softmax give it any."""
    valid = torch.zeros(2, 3, 4, dtype=torch.bool)
    valid[0] = valid[1, :2, :3] = True
    weights = build(spec_of((3, 4), after_softmax=after_softmax), DIM).weights(tokens(2, 3, 4, DIM), valid=valid)
    dense = weights.dense().movedim(-1, 1)  # [B, M, heads, N]
    assert (dense[~valid.flatten(1)] == 0).all()
    assert (dense[valid.flatten(1)] != 0).all()


@pytest.mark.parametrize("after_softmax", [False, True])
@pytest.mark.parametrize("extents", [[(3, 4), (2, 5)], [(4, 5), (1, 2)]])
def test_padding_leaves_images_alone(build, check_padding, extents, after_softmax):
    check_padding(build(spec_of((3, 4), after_softmax=after_softmax), DIM), extents, DIM)


def test_parameters():
    shapes = {
        k: tuple(v.shape)
        for k, v in glocal.build("RelativeAttention(grid_size=(7, 5), out_dim=96)", 64).named_parameters()
    }
    assert shapes == {
        "qkv.weight": (288, 64),
        "qkv.bias": (288,),
        "proj.weight": (96, 96),
        "proj.bias": (96,),
        "relative_position_bias_table": (3, 13, 9),
    }


@pytest.mark.parametrize("autocast", [False, True])
def test_the_librarys_mask_stays_finite_in_float16(build, monkeypatch, autocast):
    """A row of -inf, of an image that is all padding, is NaN in some of its kernels."""
    seen = []
    library = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: seen.append(k["attn_mask"]) or library(*a, **k)
    )
    mixer = build("RelativeAttention(grid_size=(5,), num_heads=2)", 8)
    with torch.no_grad():
        mixer.relative_position_bias_table.fill_(-300)  # beside which the mask would overflow
    mixer = mixer.float() if autocast else mixer.half()
    x = torch.randn(2, 5, 8, dtype=torch.float32 if autocast else torch.float16)
    valid = torch.tensor([[True] * 5, [False] * 5])
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        assert mixer(x, valid=valid).isfinite().all()
        with torch.no_grad():  # where the library runs
            assert mixer(x, valid=valid).isfinite().all()
    assert len(seen) == 1 and seen[0].dtype == torch.float16 and seen[0].isfinite().all()


# planted by scripts/mutate
FAULTS = (
    (
        "without a position bias there is still a table",
        "table_parameter(self.num_heads, *sides) if table else None",
        "table_parameter(self.num_heads, *sides)",
    ),
    (
        "the bias is that of all queries",
        "relative_bias(tables, grid, queries=queries)[None]",
        "relative_bias(tables, grid)[None]",
    ),
    (
        "a padded image gets the table of the batch's size",
        "resized_bias_of_each(self.relative_position_bias_table, extents(valid), grid)",
        "resized_bias_of_each(self.relative_position_bias_table, extents(torch.ones_like(valid)), grid)",
    ),
    (
        "the bias after the softmax gives padding a weight",
        "weights = weights if seen is None else weights * seen",
        "pass",
    ),
    (
        "the products with keys and values cost as many channels as go out",
        "n * n * self._inner",
        "n * n * self.out_dim",
    ),
    ("q, k and v have the channels that go out", "inner_dim=inner_dim,", "inner_dim=None,"),
    ("the fast path lets padding into the softmax", "grid, valid=sources)", "grid)"),
    ("the fast path forgets the bias after the softmax", "mixed = mixed + torch.einsum", "torch.einsum"),
    (
        "positions of a subset of the queries are those of the first",
        "places if queries is None else places[queries]",
        "places if queries is None else places[: len(queries)]",
    ),
)
