"""RelativePositionAttention against a loop over its four terms, and against Transformer-XL's released scores."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import glocal

DIM, HEADS = 8, 2
SIZE = DIM // HEADS

FAULTS = (
    ("offsets are source minus query", "n - 1 - axis_offsets(n, x.device)", "n - 1 + axis_offsets(n, x.device)"),
    (
        "v is used for u in the definition",
        'bmgd->bgnm", self._plus(q, self.r_w_bias)',
        'bmgd->bgnm", self._plus(q, self.r_r_bias)',
    ),
    ("u is missing on the fast path", "sdpa(self._plus(q, self.r_w_bias)", "sdpa(q"),
    ("u and v are not scaled", "(q + self.scale * bias)", "(q + bias)"),
    (
        "rows and columns are laid out the wrong way",
        "rows[..., :, None] + columns[..., None, :]",
        "rows[..., None, :] + columns[..., :, None]",
    ),
    ("a query's row is read as its column", "math.prod(grid[axis + 1 :]) % n", "math.prod(grid[:axis]) % n"),
    ("both axes use the same channels", "(axis * share, self.dim - (axis + 1) * share)", "(0, self.dim - share)"),
    ("sines and cosines stand side by side", 'layout="halves")', 'layout="interleaved")'),
    (
        "angles are in the dtype of the tokens",
        "dtype = torch.promote_types(x.dtype, torch.float32)",
        "dtype = x.dtype",
    ),
    ("the sinusoids' offsets are off by one", ".to(dtype) + 1 - n", ".to(dtype) - n"),
    ("smaller grids read the table's start", "self._sizes[axis], n, x.device)", "n, n, x.device)"),
    ("the fast path sees padding", "bias = masked(", "masked("),
    ("the definition sees padding", "queries=queries)), x, valid, queries)", "queries=queries)), x, None, queries)"),
)


def spec_of(rank=2, **arguments):
    options = {"num_heads": HEADS, **arguments, "rank": rank}
    return f"RelativePositionAttention({', '.join(f'{k}={v}' for k, v in options.items())})"


def sinusoid(offset, channels):
    waves = [10000 ** (-i / channels) for i in range(0, channels, 2)]
    return torch.tensor([f(offset * wave) for f in (math.sin, math.cos) for wave in waves], dtype=torch.float64)


def by_loop(mixer, places, sizes=None):
    """The four terms for each pair of tokens; `sizes` are those of the tables."""

    def encoding(offset):
        share = DIM // len(offset)
        if sizes is None:
            return torch.cat([sinusoid(o, share) for o in offset])
        tables = [mixer.r_embeddings[axis].weight for axis in range(len(offset))]
        return torch.cat([t[o + n - 1] for t, o, n in zip(tables, offset, sizes, strict=True)])

    def oracle(x, valid=None):
        batch, *grid, _ = x.shape
        where = places(grid)
        q, k, v = mixer.qkv(x).reshape(batch, len(where), 3, HEADS, SIZE).unbind(2)
        r = {}
        for one in where:
            for other in where:
                offset = tuple(a - b for a, b in zip(one, other, strict=True))
                r[offset] = (mixer.r_net.weight @ encoding(offset)).view(HEADS, SIZE)
        images = []
        for b in range(batch):
            seen = [j for j, place in enumerate(where) if valid is None or valid[(b, *place)]]
            rows = []
            for i, query in enumerate(where):
                scores = []
                for j in seen:
                    far = r[tuple(a - c for a, c in zip(query, where[j], strict=True))]
                    content = (q[b, i] * k[b, j]).sum(-1) + (mixer.r_w_bias * k[b, j]).sum(-1)
                    position = (q[b, i] * far).sum(-1) + (mixer.r_r_bias * far).sum(-1)
                    scores.append((content + position) / SIZE**0.5)
                if not seen:
                    rows.append(torch.zeros(HEADS, SIZE, dtype=x.dtype))
                    continue
                rows.append((torch.stack(scores).softmax(0)[..., None] * v[b, seen]).sum(0))
            images.append(torch.stack(rows).flatten(1))
        return mixer.proj(torch.stack(images)).view(x.shape)

    return oracle


GRIDS = [((3, 4), False), ((4, 2), True), ((1, 3), False), ((6,), False), ((1,), True)]


@pytest.mark.parametrize(("grid", "qkv_bias"), GRIDS)
def test_with_sinusoids_is_the_loop(build, check, tokens, places, grid, qkv_bias):
    mixer = build(spec_of(len(grid), qkv_bias=qkv_bias), DIM)
    check(mixer, by_loop(mixer, places), tokens(2, *grid, DIM))


@pytest.mark.parametrize(("sizes", "grid"), [((3, 4), (3, 4)), ((5, 4), (2, 3)), ((6,), (6,)), ((7,), (4,))])
def test_with_tables_is_the_loop(build, check, tokens, places, sizes, grid):
    mixer = build(spec_of(len(grid), grid_size=sizes), DIM)
    check(mixer, by_loop(mixer, places, sizes), tokens(2, *grid, DIM))


def test_any_valid_tokens_are_taken(build, check, tokens, places):
    mixer = build(spec_of(), DIM)
    valid = torch.rand(3, 3, 4) < 0.5
    valid[0] = False
    check(mixer, by_loop(mixer, places), tokens(3, 3, 4, DIM), valid=valid)


@pytest.mark.parametrize("options", [{}, {"grid_size": 9}])
@pytest.mark.parametrize("extents", [[(4, 3), (2, 5)], [(4,), (7,)]])
def test_padding_leaves_images_alone(build, check_padding, extents, options):
    check_padding(build(spec_of(len(extents[0]), **options), DIM), extents, DIM)


def test_scores_are_the_released_ones_of_earlier_tokens(build, tokens):
    """mem_transformer.py: r of the distances T - 1, ..., 0, moved into place by padding and reshaping."""
    mixer, length = build(spec_of(1), DIM), 6
    x = tokens(2, length, DIM)
    q, k, _ = mixer.qkv(x).view(2, length, 3, HEADS, SIZE).unbind(2)
    distances = torch.arange(length - 1, -1, -1.0, dtype=torch.float64)
    angles = torch.outer(distances, 1 / 10000 ** (torch.arange(0.0, DIM, 2.0, dtype=torch.float64) / DIM))
    r = mixer.r_net(torch.cat([angles.sin(), angles.cos()], -1)).view(length, HEADS, SIZE)
    content = torch.einsum("bind,bjnd->bnij", q + mixer.r_w_bias, k)
    position = torch.einsum("bind,jnd->bnij", q + mixer.r_r_bias, r)
    position = F.pad(position, (1, 0)).view(2, HEADS, length + 1, length)[:, :, 1:].view_as(position)
    earlier = torch.ones(length, length).tril() > 0
    found = mixer.scores(x)
    assert_close(found["content"][..., earlier], content[..., earlier] / SIZE**0.5)
    assert_close(found["position"][..., earlier], position[..., earlier] / SIZE**0.5)


@pytest.mark.parametrize("autocast", [False, True])
def test_sinusoids_of_large_offsets_are_right_in_bfloat16(build, tokens, autocast):
    mixer = build(spec_of(1), DIM)
    x = torch.zeros(1, 400, DIM, dtype=torch.float64)  # what is left is v . W r
    expected = mixer.scores(x)["position"]
    mixer, x = (mixer.float(), x.float()) if autocast else (mixer.bfloat16(), x.bfloat16())
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = mixer.scores(x)["position"].double()
    assert (found - expected).abs().max() < 0.02 * expected.abs().max()


@pytest.mark.parametrize("grid", [(3, 5), (6,)])
def test_without_positions_is_self_attention(build, tokens, grid):
    mixer, plain = build(spec_of(len(grid), qkv_bias=True), DIM), build(f"SelfAttention(num_heads={HEADS})", DIM)
    with torch.no_grad():
        mixer.r_net.weight.zero_()
        mixer.r_w_bias.zero_()
    plain.load_state_dict({k: v for k, v in mixer.state_dict().items() if not k.startswith("r_")})
    x = tokens(2, *grid, DIM)
    for mixer.impl in ("reference", "fast"):
        assert_close(mixer(x), plain(x))


def test_larger_grids_are_refused_by_tables_only(build, tokens):
    mixer = build(spec_of(grid_size=(3, 4)), DIM)
    for mixer.impl in ("reference", "fast"):
        mixer(tokens(1, 3, 4, DIM))
        with pytest.raises(ValueError, match=r"4 tokens along axis 0 .* made for 3; build it with a larger grid_size"):
            mixer(tokens(1, 4, 4, DIM))
        with pytest.raises(ValueError, match=r"5 tokens along axis 1 .* made for 4"):
            mixer(tokens(1, 3, 5, DIM))
    assert build(spec_of(), DIM)(tokens(1, 30, 2, DIM)).shape == (1, 30, 2, DIM)


def test_channels_that_cannot_be_shared_are_refused():
    with pytest.raises(
        ValueError, match=r"dim: 6 channels .* 2 axes, each with sines and cosines; give a multiple of 4"
    ):
        glocal.build("RelativePositionAttention(num_heads=2)", 6)
    glocal.build("RelativePositionAttention(num_heads=2, grid_size=4)", 6)


@pytest.mark.parametrize("autocast", [False, True])
def test_the_librarys_mask_stays_finite_in_float16(build, monkeypatch, autocast):
    """A row of -inf, of an image that is all padding, is NaN in some of its kernels."""
    seen = []
    library = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: seen.append(k["attn_mask"]) or library(*a, **k)
    )
    mixer = build(spec_of(1), DIM)
    with torch.no_grad():
        mixer.r_net.weight.mul_(300)  # scores beside which the mask would overflow
    mixer = mixer.float() if autocast else mixer.half()
    x = torch.randn(2, 5, DIM, dtype=torch.float32 if autocast else torch.float16)
    valid = torch.tensor([[True] * 5, [False] * 5])
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        assert mixer(x, valid=valid).isfinite().all()
    assert len(seen) == 1 and seen[0].dtype == torch.float16 and seen[0].isfinite().all()


def test_parameters():
    def shapes(spec, dim):
        return {k: tuple(v.shape) for k, v in glocal.build(spec, dim).named_parameters()}

    plain = {
        "r_w_bias": (2, 32),
        "r_r_bias": (2, 32),
        "qkv.weight": (192, 64),
        "proj.weight": (64, 64),
        "proj.bias": (64,),
        "r_net.weight": (64, 64),
    }
    assert shapes("RelativePositionAttention()", 64) == plain
    tables = {"r_embeddings.0.weight": (13, 32), "r_embeddings.1.weight": (9, 32)}
    learned = shapes("RelativePositionAttention(grid_size=(7, 5), qkv_bias=True)", 64)
    assert learned == plain | tables | {"qkv.bias": (192,)}
