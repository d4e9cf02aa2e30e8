"""Encodings of places against loops from their formulas, timm's functions, and transformers' DETR where it is there."""

import copy
import itertools
import math

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from timm.layers.pos_embed_rel import gen_relative_position_index, resize_rel_pos_bias_table_simple
from timm.layers.pos_embed_sincos import apply_rot_embed, build_rotary_pos_embed
from torch import nn
from torch.testing import assert_close

import glocal
from glocal.evidence import DIM, random_mixer
from glocal.positions import (
    LearnedPositions,
    RelativePositionBias,
    RowColumnPositions,
    SinusoidalPositions1d,
    SinusoidalPositions2d,
    grid_offsets,
    quadratic_encoding,
    quadratic_head,
    relative_bias,
    relative_index,
    resized_bias,
    resized_positions,
    rotary_angles,
    rotate,
    sinusoids,
)
from glocal.positions.relative import axis_offsets, relative_rows

EXACT = {"rtol": 1e-9, "atol": 1e-10}


def float64(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def corner_valid(grid, *extents):
    """Masks of images of these sizes, padded at their ends."""
    valid = torch.zeros(len(extents), *grid, dtype=torch.bool)
    for mask, extent in zip(valid, extents, strict=True):
        mask[tuple(slice(n) for n in extent)] = True
    return valid


# --- sines and cosines --------------------------------------------------------------------------------------------


def by_formula(place, dim, layout="interleaved", frequencies="vaswani", temperature=10000):
    """PE(pos, 2i) = sin(pos / 10000^(2i/d)); fairseq: exp(-i * log(10000) / (d/2 - 1)), sines first."""
    row = []
    for i in range(dim // 2):
        if frequencies == "vaswani":
            angle = place / temperature ** (2 * i / dim)
        else:
            angle = place * math.exp(-i * math.log(temperature) / (dim // 2 - 1))
        row += [math.sin(angle), math.cos(angle)]
    return row if layout == "interleaved" else row[::2] + row[1::2]


LAYOUTS = [("interleaved", "vaswani"), ("halves", "fairseq"), ("halves", "vaswani"), ("interleaved", "fairseq")]


@pytest.mark.parametrize(("layout", "frequencies"), LAYOUTS)
@pytest.mark.parametrize("temperature", [10000, 20])
def test_sinusoids_are_the_formula(layout, frequencies, temperature):
    places = torch.tensor([[0, 1, 2.5], [-3, 700, 1]], dtype=torch.float64)
    found = sinusoids(places, 6, layout=layout, frequencies=frequencies, temperature=temperature)
    expected = [[by_formula(p, 6, layout, frequencies, temperature) for p in row] for row in places.tolist()]
    assert_close(found, torch.tensor(expected, dtype=torch.float64), **EXACT)
    for dtype in (torch.bfloat16, torch.int64):
        few = torch.tensor([3, 200]).to(dtype)
        assert_close(sinusoids(few, 6), sinusoids(few.float(), 6), rtol=0, atol=0)


@pytest.mark.parametrize(("layout", "frequencies"), LAYOUTS)
def test_a_sequence_is_the_formula_from_its_offset_on(layout, frequencies):
    encode = SinusoidalPositions1d(8, layout=layout, frequencies=frequencies)
    found = encode(float64(3, 5, 8), offset=40)
    expected = [by_formula(p, 8, layout, frequencies) for p in range(40, 45)]
    assert_close(found, torch.tensor([expected], dtype=torch.float64), **EXACT)
    each = encode(float64(2, 5, 8), offset=torch.tensor([40, 0]))
    assert_close(each[:1], found, **EXACT)
    assert_close(each[1:], encode(float64(1, 5, 8)), **EXACT)


@pytest.mark.parametrize("name", ["sinusoidal", "learned"])
def test_steps_of_decoding_get_what_the_whole_sequence_gets(name):
    learned = LearnedPositions(8, grid_size=(9,), resize=False).double()
    encode = SinusoidalPositions1d(8) if name == "sinusoidal" else learned
    x = float64(2, 7, 8)
    whole = encode(x)
    steps = [encode(x[:, start:end], offset=start) for start, end in ((0, 3), (3, 4), (4, 7))]
    assert_close(torch.cat(steps, 1), whole, **EXACT)
    assert whole.unique(dim=1).shape[1] == 7


@pytest.mark.parametrize("name", ["sinusoidal", "learned"])
def test_only_real_tokens_count_in_a_sequence(name):
    """fairseq's rule: the number of a token is that of the real ones before it; padding gets zeros."""
    learned = LearnedPositions(8, grid_size=(9,), resize=False).double()
    encode = SinusoidalPositions1d(8) if name == "sinusoidal" else learned
    valid = torch.tensor([[False, False, True, True, True], [True, True, True, False, False], [False] * 5])
    found = encode(float64(3, 5, 8), valid=valid, offset=2)
    alone = encode(float64(1, 3, 8), offset=2)[0]
    assert_close(found[0, 2:], alone, **EXACT)
    assert_close(found[1, :3], alone, **EXACT)
    assert (found[~valid] == 0).all()


def test_fairseq_numbers_words_from_2_on():
    """Its table, padding symbol 1: words are 2, 3, ... whichever end is padded."""
    dim, padding = 6, 1
    tokens = torch.tensor([[1, 1, 5, 7, 9], [5, 7, 9, 4, 1]])
    half = dim // 2
    wave = torch.exp(torch.arange(half).double() * -(math.log(10000) / (half - 1)))
    angle = torch.arange(8).double()[:, None] * wave
    table = torch.cat([angle.sin(), angle.cos()], 1)
    table[padding] = 0
    real = tokens.ne(padding)
    numbers = real.cumsum(1) * real + padding
    encode = SinusoidalPositions1d(dim, layout="halves", frequencies="fairseq")
    assert_close(encode(float64(2, 5, dim), valid=real, offset=2), table[numbers], **EXACT)


def detr_by_loop(valid, dim, normalize, scale, temperature):
    """One pixel at a time: how many real ones there are above and to the left, itself included."""
    images = []
    for mask in valid:
        height, width = mask.shape
        rows = []
        for y, x in itertools.product(range(height), range(width)):
            down, right = int(mask[: y + 1, x].sum()), int(mask[y, : x + 1].sum())
            if normalize:
                down = down / (int(mask[:, x].sum()) + 1e-6) * scale
                right = right / (int(mask[y].sum()) + 1e-6) * scale
            rows.append([by_formula(place, dim // 2, temperature=temperature) for place in (down, right)])
        images.append(torch.tensor(rows, dtype=torch.float64).view(height, width, dim))
    return torch.stack(images)


DETR = [(True, 2 * math.pi, 10000), (True, 1.5, 20), (False, 2 * math.pi, 10000)]


@pytest.mark.parametrize(("normalize", "scale", "temperature"), DETR)
def test_an_image_is_detrs_by_loop(normalize, scale, temperature):
    encode = SinusoidalPositions2d(12, normalize=normalize, scale=scale, temperature=temperature)
    valid = corner_valid((4, 5), (4, 5), (2, 3))
    valid[1, 0, 1] = False  # a hole, and pixels that no rectangle holds
    expected = detr_by_loop(valid, 12, normalize, scale, temperature)
    assert_close(encode(float64(2, 4, 5, 12), valid=valid), expected, **EXACT)
    assert_close(encode(float64(2, 4, 5, 12)), expected[:1], **EXACT)


def test_numbers_of_detrs_released_code():
    """Of a run of it: 256 channels, 4 x 5, normalised."""
    found = SinusoidalPositions2d(256)(torch.zeros(1, 4, 5, 256))
    assert_close(found[0, 0, 0, :4], torch.tensor([1.0, 3.1e-7, 0.97792, 0.20899]), atol=2e-5, rtol=0)
    assert_close(found[0, 0, 0, 128:132], torch.tensor([0.9511, 0.3090, 0.8858, 0.4641]), atol=1e-4, rtol=0)
    assert abs(found.sum().item() - 2495.843) < 1e-2


@pytest.mark.parametrize(("normalize", "scale", "temperature"), DETR)
def test_an_image_is_transformers_detr(normalize, scale, temperature):
    detr = pytest.importorskip("transformers.models.detr.modeling_detr")
    theirs = detr.DetrSinePositionEmbedding(6, temperature, normalize, scale if normalize else None)
    encode = SinusoidalPositions2d(12, normalize=normalize, scale=scale, temperature=temperature)
    x, valid = float64(2, 4, 5, 12), corner_valid((4, 5), (4, 3), (2, 5))
    for mask in (None, valid):
        expected = theirs((2, 12, 4, 5), x.device, x.dtype, mask).movedim(1, -1)
        assert_close(encode(x, valid=mask).expand_as(x), expected, **EXACT)


def test_an_image_gets_the_same_alone_as_padded():
    encode = SinusoidalPositions2d(8)
    valid = corner_valid((5, 6), (3, 6), (5, 2))
    found = encode(float64(2, 5, 6, 8), valid=valid)
    assert_close(found[:1, :3], encode(float64(1, 3, 6, 8)), **EXACT)
    assert_close(found[1:, :, :2], encode(float64(1, 5, 2, 8)), **EXACT)


# --- learned ------------------------------------------------------------------------------------------------------

RESIZED = [((4, 6), (7, 3)), ((4, 6), (8, 12)), ((5, 5), (2, 2)), ((3, 4), (1, 1))]


@pytest.mark.parametrize(("old", "new"), RESIZED)
@pytest.mark.parametrize("prefix", [0, 2])
@pytest.mark.parametrize(("mode", "antialias"), [("bicubic", True), ("bicubic", False), ("bilinear", True)])
def test_a_table_is_resized_as_in_timm(old, new, prefix, mode, antialias):
    table = torch.randn(1, prefix + math.prod(old), 8)
    expected = timm.layers.resample_abs_pos_embed(
        table, list(new), list(old), num_prefix_tokens=prefix, interpolation=mode, antialias=antialias
    )
    found = resized_positions(table, old, new, num_prefix=prefix, mode=mode, antialias=antialias)
    assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("prefix", [0, 1])
def test_learned_positions_are_the_table_of_a_vit(prefix):
    encode = LearnedPositions(8, grid_size=(4, 6), num_prefix=prefix)
    for grid in ((4, 6), (6, 4), (9, 2)):
        x = torch.randn(2, prefix + math.prod(grid), 8)
        expected = timm.layers.resample_abs_pos_embed(encode.pos_embed, list(grid), [4, 6], num_prefix_tokens=prefix)
        assert_close(encode(x, grid=grid), expected, rtol=0, atol=0)
        if not prefix:
            assert_close(encode(x.view(2, *grid, 8)), expected.view(1, *grid, 8), rtol=0, atol=0)


def cubic(table, length):
    """[L, C] to [length, C] by Keys' kernel, a = -0.5, stretched where the table gets shorter: one entry at a time."""
    stretch, rows = max(table.shape[0] / length, 1), []

    def kernel(d):
        d = abs(d)
        if d < 1:
            return 1.5 * d**3 - 2.5 * d**2 + 1
        return -0.5 * d**3 + 2.5 * d**2 - 4 * d + 2 if d < 2 else 0.0

    for i in range(length):
        place = (i + 0.5) * table.shape[0] / length - 0.5
        shares = torch.tensor([kernel((place - j) / stretch) for j in range(table.shape[0])], dtype=torch.float64)
        rows.append(shares / shares.sum() @ table)
    return torch.stack(rows)


@pytest.mark.parametrize("length", [1, 3, 5, 11])
def test_a_sequences_table_is_resized_by_cubics(length):
    table = float64(1, 5, 4)
    assert_close(resized_positions(table, (5,), (length,))[0], cubic(table[0], length), **EXACT)
    encode = RowColumnPositions(8, grid_size=5, resize=True).double()
    found = encode(float64(1, length, 3, 8))
    assert_close(found[0, :, 0, 4:], cubic(encode.row_embed.weight, length), **EXACT)
    assert_close(found[0, 0, :, :4], cubic(encode.col_embed.weight, 3), **EXACT)


def test_at_its_own_size_a_table_stays_what_it_is():
    """In a compiled program too, which may not ask for the size."""
    table = torch.randn(1, 1 + 20, 8)
    same = {"grid_size": (4, 5), "grid": (4, 5), "num_prefix": 1}
    assert resized_positions(table, **same) is table
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: resized_positions(t, **same), backend="aot_eager", fullgraph=True)
    assert_close(compiled(table), table, rtol=0, atol=1e-6)
    bias = torch.randn(3, 7, 9)
    for mode in ("bicubic", "bilinear"):
        assert_close(resized_bias(bias, (4, 5), mode=mode), bias, rtol=0, atol=0)


def test_a_padded_image_gets_the_table_at_its_own_size():
    encode = LearnedPositions(8, grid_size=(4, 4), num_prefix=1).double()
    valid = corner_valid((5, 6), (3, 6), (5, 2), (0, 0))
    flat = torch.cat([torch.ones(3, 1, dtype=torch.bool), valid.flatten(1)], 1)
    found = encode(float64(3, 31, 8), grid=(5, 6), valid=flat)
    on_grid = found[:, 1:].unflatten(1, (5, 6))
    for b, extent in enumerate([(3, 6), (5, 2)]):
        alone = encode(float64(1, 1 + math.prod(extent), 8), grid=extent)
        assert_close(on_grid[b, : extent[0], : extent[1]].flatten(0, 1), alone[0, 1:], **EXACT)
    assert_close(found[:, :1], encode.pos_embed[:, :1].expand(3, -1, -1), **EXACT)
    assert (on_grid[:2][~valid[:2]] == 0).all()
    valid[0, 0, 0] = False
    with pytest.raises(ValueError, match="no rectangle anchored at the origin"):
        encode(float64(3, 31, 8), grid=(5, 6), valid=torch.cat([flat[:, :1], valid.flatten(1)], 1))


def test_rows_of_a_table_without_resizing():
    encode = LearnedPositions(4, grid_size=(3, 5), resize=False).double()
    table = encode.pos_embed.view(3, 5, 4)
    assert_close(encode(float64(2, 2, 3, 4)), table[None, :2, :3], **EXACT)
    words = LearnedPositions(4, grid_size=(6,), num_prefix=1, resize=False).double()
    found = words(float64(2, 1 + 3, 4), grid=(3,), offset=2)
    assert_close(found, words.pos_embed[:, [0, 3, 4, 5]], **EXACT)


def test_rows_and_columns_are_detrs():
    encode = RowColumnPositions(8, grid_size=(4, 6)).double()
    found = encode(float64(2, 3, 5, 8))
    assert found.shape == (1, 3, 5, 8)
    for y, x in itertools.product(range(3), range(5)):
        assert_close(found[0, y, x], torch.cat([encode.col_embed.weight[x], encode.row_embed.weight[y]]), **EXACT)
    assert {k: tuple(v.shape) for k, v in RowColumnPositions(256).state_dict().items()} == {
        "row_embed.weight": (50, 128),
        "col_embed.weight": (50, 128),
    }
    start = RowColumnPositions(256).row_embed.weight
    assert 0 <= start.min() < 0.01 and 0.99 < start.max() <= 1


def test_rows_and_columns_are_transformers_detr():
    detr = pytest.importorskip("transformers.models.detr.modeling_detr")
    theirs, encode = detr.DetrLearnedPositionEmbedding(4), RowColumnPositions(8)
    theirs.row_embeddings.load_state_dict(encode.row_embed.state_dict())
    theirs.column_embeddings.load_state_dict(encode.col_embed.state_dict())
    x = torch.randn(2, 3, 5, 8)
    expected = theirs((2, 8, 3, 5), x.device, x.dtype).movedim(1, -1)
    assert_close(encode(x).expand_as(x), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("encode", "grid"),
    [
        (LearnedPositions(3, grid_size=(3, 4)), (4, 2)),
        (LearnedPositions(3, grid_size=(5,)), (3,)),
        (LearnedPositions(3, grid_size=(5,), resize=False), (4,)),
        (RowColumnPositions(4, grid_size=(3, 4)), (2, 3)),
        (RowColumnPositions(4, grid_size=(3, 4), resize=True), (2, 6)),
        (RelativePositionBias((3, 2), 2), (2, 4)),
        (RelativePositionBias((4,), 2), (3,)),
    ],
    ids=repr,
)
def test_gradients_of_what_is_learned(encode, grid):
    encode = encode.double()

    def call(*parameters):
        named = dict(zip(dict(encode.named_parameters()), parameters, strict=True))
        what = grid if isinstance(encode, RelativePositionBias) else float64(2, *grid, encode.dim)
        return torch.func.functional_call(encode, named, (what,))

    parameters = [torch.randn_like(p).requires_grad_() for p in encode.parameters()]
    assert torch.autograd.gradcheck(call, parameters)
    assert all(p.grad_fn is None for p in parameters)
    grads = torch.autograd.grad(call(*parameters).square().sum(), parameters)
    assert all(g.abs().sum() > 0 for g in grads)


# --- relative -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("grid", [(4, 4), (3, 5), (1, 2), (5,)])
def test_rows_of_a_relative_table(grid):
    found = relative_index(grid)
    if len(grid) == 2:
        assert_close(found, gen_relative_position_index(grid))
    larger = tuple(n + 2 for n in grid)
    strides = [math.prod(2 * m - 1 for m in larger[axis + 1 :]) for axis in range(len(grid))]
    places = list(itertools.product(*map(range, grid)))
    for (i, query), (j, source) in itertools.product(enumerate(places), repeat=2):
        row = sum((q - s + n - 1) * step for q, s, n, step in zip(query, source, larger, strides, strict=True))
        assert relative_index(grid, table_grid=larger)[i, j] == row


def test_rows_of_a_table_of_offsets():
    assert relative_rows("Op", 0, 5, 3, None).tolist() == [2, 3, 4, 5, 6]
    assert relative_rows("Op", 0, 3, 3, None).tolist() == list(range(5))
    with pytest.raises(ValueError, match=r"Op: x has 4 tokens along axis 1 .* made for 3; build it with a larger"):
        relative_rows("Op", 1, 3, 4, None)
    assert axis_offsets(5, None, stride=2).tolist() == [[s - q for s in range(5)] for q in (0, 2, 4)]


@pytest.mark.parametrize(
    ("grid", "compiled"), [((4, 4), False), ((3, 5), False), ((1, 1), False), ((6,), False), ((3, 2), True)]
)
def test_bias_of_scores_by_loop(grid, compiled):
    bias = RelativePositionBias(grid, 2).double()
    torch._dynamo.reset()
    call = torch.compile(bias, backend="aot_eager", fullgraph=True) if compiled else bias
    found = call()
    table = bias.relative_position_bias_table.T.reshape(2, *[2 * n - 1 for n in grid])
    places = list(itertools.product(*map(range, grid)))
    assert found.shape == (2, len(places), len(places))
    for (i, query), (j, source) in itertools.product(enumerate(places), repeat=2):
        entry = tuple(q - s + n - 1 for q, s, n in zip(query, source, grid, strict=True))
        assert_close(found[:, i, j], table[:, *entry])
    queries = torch.arange(len(places) - 1, -1, -2)
    assert_close(relative_bias(table, grid, queries=queries), found[:, queries])


def test_bias_of_scores_is_timms():
    theirs = timm.layers.RelPosBias((3, 4), num_heads=2)
    nn.init.normal_(theirs.relative_position_bias_table)
    ours = RelativePositionBias((3, 4), 2)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_close(ours(), theirs.get_bias()[0])
    for grid in ((6, 5), (2, 2)):
        square = RelativePositionBias((4, 4), 2)
        sides = tuple(2 * n - 1 for n in grid)
        table = resize_rel_pos_bias_table_simple(square.relative_position_bias_table, grid, (math.prod(sides), 2))
        index = gen_relative_position_index(grid)
        assert_close(square(grid), table[index].movedim(-1, 0))


def test_bias_of_scores_goes_with_attention_of_ones_own():
    """The same as the operator that holds such a table."""
    grid, mixer = (3, 4), glocal.build("RelativeAttention(grid_size=(3, 4), num_heads=2)", 8).double()
    bias = RelativePositionBias(grid, 2, mode="bilinear").double()
    nn.init.normal_(bias.relative_position_bias_table)
    with torch.no_grad():
        mixer.relative_position_bias_table.copy_(bias.relative_position_bias_table.T.view(2, 5, 7))
    for grid in ((3, 4), (5, 3)):
        x = float64(2, *grid, 8)
        q, k, v = mixer.qkv(x.flatten(1, 2)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias(grid)).transpose(1, 2).flatten(2)
        assert_close(mixer(x).flatten(1, 2), mixer.proj(y), **EXACT)


# --- quadratic ----------------------------------------------------------------------------------------------------


def test_offsets_are_source_minus_query():
    found = grid_offsets((3, 4))
    places = list(itertools.product(range(3), range(4)))
    for (i, query), (j, source) in itertools.product(enumerate(places), repeat=2):
        assert found[i, j].tolist() == [s - q for q, s in zip(query, source, strict=True)]
    queries = torch.tensor([1, 0])
    strided = grid_offsets((3, 4), stride=2, queries=queries)
    assert_close(strided, found[[2, 0]])


@pytest.mark.parametrize("grid", [(4, 5), (7,)])
def test_the_quadratic_encoding_is_the_papers_score(grid):
    centre, alpha = float64(3, len(grid)), torch.rand(3, dtype=torch.float64)
    offsets = grid_offsets(grid).double()
    scores = torch.einsum("nmp,gp->gnm", quadratic_encoding(offsets), quadratic_head(centre, alpha))
    for g, i, j in itertools.product(range(3), range(offsets.shape[0]), range(offsets.shape[1])):
        d = offsets[i, j]
        expected = -alpha[g] * ((d * d).sum() - 2 * (d * centre[g]).sum())
        assert_close(scores[g, i, j], expected, **EXACT)
    mixer = glocal.build("QuadraticAttention(num_heads=3)", 4, rank=len(grid)).double()
    with torch.no_grad():
        mixer.attention_centers.copy_(centre)
        mixer.attention_spreads.copy_((2 * alpha).sqrt())
    assert_close(mixer.weights(float64(1, *grid, 4)).dense()[0], scores.softmax(-1), **EXACT)


def test_nine_quadratic_heads_read_the_taps_of_a_convolution():
    taps = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=2)), dtype=torch.float64)
    scores = quadratic_encoding(grid_offsets((5, 6)).double()) @ quadratic_head(taps, 46.0).T
    weights = scores.movedim(-1, 0).softmax(-1)
    for (y, x), head in zip(taps.long().tolist(), weights, strict=True):
        query = 2 * 6 + 3
        assert head[query, (2 + y) * 6 + 3 + x] > 1 - 1e-15


# --- rotary -------------------------------------------------------------------------------------------------------

PAIRINGS = ("interleaved", "halves")


def turned_by_loop(vector, angles, pairing):
    """Pair by pair, the 2 x 2 matrix of RoFormer's equation 13."""
    out, half = torch.empty_like(vector), len(vector) // 2
    for i, angle in enumerate(angles):
        a, b = (2 * i, 2 * i + 1) if pairing == "interleaved" else (i, i + half)
        cos, sin = math.cos(angle), math.sin(angle)
        turn = torch.tensor([[cos, -sin], [sin, cos]], dtype=torch.float64)
        out[a], out[b] = (turn @ vector[[a, b]]).unbind()
    return out


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("temperature", [10000.0, 50.0])
def test_rotation_by_loop(pairing, temperature):
    q = float64(2, 3, 5, 8)  # [B, G, N, D]
    angles = rotary_angles((5,), 8, offset=3, temperature=temperature, dtype=torch.float64)
    found = rotate(q, angles, pairing=pairing)
    for b, g, n in itertools.product(range(2), range(3), range(5)):
        by = [(3 + n) * temperature ** (-2 * i / 8) for i in range(4)]
        assert_close(found[b, g, n], turned_by_loop(q[b, g, n], by, pairing), **EXACT)
    assert_close(rotate(q.transpose(1, 2), angles[:, None], pairing=pairing), found.transpose(1, 2), **EXACT)


@pytest.mark.parametrize("pairing", PAIRINGS)
@pytest.mark.parametrize("grid", [(5,), (3, 4)])
def test_products_depend_on_offsets_alone(pairing, grid):
    angles = rotary_angles(grid, 8, dtype=torch.float64)
    q, k = float64(8), float64(8)
    scores = rotate(q.expand(len(angles), 8), angles, pairing=pairing) @ rotate(k, angles, pairing=pairing).T
    by_offset = {}
    for i, j in itertools.product(range(len(angles)), repeat=2):
        offset = tuple(grid_offsets(grid)[i, j].tolist())
        by_offset.setdefault(offset, []).append(scores[i, j].item())
    assert all(max(values) - min(values) < 1e-9 for values in by_offset.values())
    means = [sum(values) / len(values) for values in by_offset.values()]
    assert len(means) == math.prod(2 * n - 1 for n in grid) and len({round(m, 6) for m in means}) == len(means)
    assert_close(rotate(q, angles, pairing=pairing).norm(dim=-1), q.norm().expand(len(angles)), **EXACT)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("reference", [None, [7, 2]])
def test_images_are_turned_as_in_timm(half, reference):
    sin, cos = build_rotary_pos_embed(
        [3, 5], dim=16, in_pixels=False, ref_feat_shape=reference, rotate_half=half, dtype=torch.float64
    )
    q = float64(2, 4, 15, 16)
    expected = apply_rot_embed(q, sin, cos, half=half)
    angles = rotary_angles((3, 5), 16, grid_size=reference)
    found = rotate(q, angles, pairing="halves" if half else "interleaved")
    assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_class_tokens_are_not_turned():
    q = float64(2, 4, 2 + 6, 8)
    angles = rotary_angles((2, 3), 8, num_prefix=2, dtype=torch.float64)
    found = rotate(q, angles)
    assert_close(found[:, :, :2], q[:, :, :2], rtol=0, atol=0)
    alone = rotate(q[:, :, 2:], rotary_angles((2, 3), 8, dtype=torch.float64))
    assert_close(found[:, :, 2:], alone, **EXACT)


def test_angles_of_each_sequence_and_of_each_image():
    each = rotary_angles((4,), 8, offset=torch.tensor([0, 5]))
    assert_close(each, torch.stack([rotary_angles((4,), 8), rotary_angles((4,), 8, offset=5)]))
    extents = torch.tensor([[3, 4], [2, 5]])
    each = rotary_angles((3, 5), 8, grid_size=(6, 6), extents=extents).view(2, 3, 5, 4)
    for image, (height, width) in zip(each, extents.tolist(), strict=True):
        alone = rotary_angles((height, width), 8, grid_size=(6, 6)).view(height, width, 4)
        assert_close(image[:height, :width], alone)


# --- how they go with attention -----------------------------------------------------------------------------------


def test_added_to_queries_and_keys_alone():
    mixer = glocal.build("SelfAttention(num_heads=2)", 8).double()
    x, valid = float64(2, 3, 4, 8), corner_valid((3, 4), (3, 4), (2, 2))
    encode = SinusoidalPositions2d(8)
    with_positions = x + encode(x, valid=valid)
    q, k, _ = mixer.qkv(with_positions.flatten(1, 2)).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
    v = mixer.qkv(x.flatten(1, 2)).unflatten(-1, (3, 2, 4))[:, :, 2].transpose(1, 2)
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=valid.flatten(1)[:, None, None])
    found = mixer(x, pos_embed=encode(x, valid=valid), valid=valid)
    assert_close(found.flatten(1, 2), mixer.proj(expected.transpose(1, 2).flatten(2)), **EXACT)


@pytest.mark.parametrize(
    "encode", [SinusoidalPositions2d(8), LearnedPositions(8, grid_size=(3, 3)), RowColumnPositions(8, grid_size=9)]
)
def test_with_attention_an_image_gets_the_same_alone_as_padded(encode):
    mixer, encode = glocal.build("SelfAttention(num_heads=2)", 8).double(), encode.double()
    valid = corner_valid((5, 6), (3, 6), (5, 2))
    x = float64(2, 5, 6, 8)
    found = mixer(x, pos_embed=encode(x, valid=valid), valid=valid)
    for b, (h, w) in enumerate([(3, 6), (5, 2)]):
        own = x[b : b + 1, :h, :w]
        assert_close(found[b : b + 1, :h, :w], mixer(own, pos_embed=encode(own)), **EXACT)


@pytest.mark.parametrize(
    "encode",
    [
        *[SinusoidalPositions2d(8), RowColumnPositions(8, grid_size=9)],
        *[LearnedPositions(8, grid_size=(6, 6), resize=resize) for resize in (True, False)],
    ],
)
def test_an_empty_batch_has_encodings_that_can_be_added(encode):
    x, valid = torch.zeros(0, 5, 6, 8), torch.ones(0, 5, 6, dtype=torch.bool)
    assert (x + encode(x)).shape == (x + encode(x, valid=valid)).shape == x.shape


COMPARING = {
    *["FocalAttention", "GatedPositionalAttention", "HaloAttention", "LinearAttention", "RelativeAttention"],
    *["LinearSpatialReductionAttention", "NeighborhoodAttention", "ReleasedFocalAttention"],
    *["RelativePositionAttention", "RotaryAttention", "SelfAttention", "SpatialReductionAttention", "WindowAttention"],
}


@pytest.mark.parametrize(
    "spec",
    [
        spec
        for name in glocal.available()
        if not getattr(glocal.mixers, name).needs_source  # tests/mixers/test_cross_attention.py
        for spec in getattr(glocal.mixers, name).examples[: 9 if name in COMPARING else 1]
    ],
)
def test_positions_go_to_the_weights_of_every_attention_and_never_to_values(spec):
    """A is that of x + e, the values are those of x; whose weights compare no tokens refuses an encoding in words."""
    mixer = random_mixer(spec)
    grid = (8,) if mixer.rank == 1 else (5, 7)
    x, e = float64(2, *grid, DIM), float64(1, *grid, DIM)
    if type(mixer).__name__ not in COMPARING:
        with pytest.raises(ValueError, match="does not take pos_embed"):
            mixer(x, pos_embed=e)
        return
    valid = corner_valid(grid, grid, tuple(n - 2 for n in grid))
    masked = "mask_padding=False" not in spec and not spec.startswith("Released")
    for call in ({}, {"valid": valid}) if masked else ({},):
        real = valid.flatten(1) if call else torch.ones(2, math.prod(grid), dtype=torch.bool)
        expected = mixer.project(glocal.aggregate(mixer.weights(x + e, **call), mixer._values(x, call)))
        for mixer.impl in ("reference", "auto"):
            assert_close(mixer(x, pos_embed=e, **call).flatten(1, -2)[real], expected[real], **EXACT)
        assert_close(mixer.weights(x, pos_embed=e, **call).dense(), mixer.weights(x + e, **call).dense(), **EXACT)
    with glocal.inspect(mixer) as seen:
        mixer(x, pos_embed=e)
    assert all(one.rebuild_error() < 1e-9 for one in seen)
    if {"values", "pos_embed"} & set(mixer._takes["fast"]):
        assert mixer.unsupported(x, pos_embed=e) == mixer.unsupported(x)
    else:  # it makes keys and values in one, of the same tokens
        assert mixer.unsupported(x, pos_embed=e) == "the fast path does not take pos_embed, the definition does"
    assert not torch.allclose(mixer(x, pos_embed=e), mixer(x))
    try:
        scores = mixer.scores(x, pos_embed=e)
    except ValueError:
        return
    for name, score in mixer.scores(x + e).items():
        assert_close(scores[name], score, **EXACT)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize(
    ("encode", "grid", "prefix"),
    [
        (SinusoidalPositions1d(8), (5,), 0),
        (SinusoidalPositions2d(8), (3, 4), 0),
        (RowColumnPositions(8), (3, 4), 0),
        (SinusoidalPositions1d(8), (5,), 2),
        (SinusoidalPositions2d(8), (3, 4), 1),
        (RowColumnPositions(8), (3, 4), 1),
        (LearnedPositions(8, grid_size=(2, 2), num_prefix=1), (3, 4), 1),
    ],
)
def test_class_tokens_stand_in_front(encode, grid, prefix, flat):
    if prefix and not flat:
        return
    count = math.prod(grid)
    x = torch.randn(2, prefix + count, 8) if flat else torch.randn(2, *grid, 8)
    found = encode(x, grid=grid) if flat else encode(x)
    assert found.shape == (1, *x.shape[1:])
    if prefix and not isinstance(encode, LearnedPositions):
        assert (found[:, :prefix] == 0).all()
        assert_close(found[:, prefix:], encode(torch.randn(2, *grid, 8)).flatten(1, -2))
        valid = torch.rand(2, prefix + count) < 0.7
        expected = encode(torch.randn(2, *grid, 8), valid=valid[:, prefix:].unflatten(1, grid)).flatten(1, -2)
        assert_close(encode(x, grid=grid, valid=valid)[:, prefix:], expected)
    glocal.build("SelfAttention(num_heads=2)", 8)(x, grid=grid if flat else None, pos_embed=found)


# --- precision, programs, refusals --------------------------------------------------------------------------------

ALL = [
    (SinusoidalPositions1d(8), (300,)),
    (SinusoidalPositions1d(8, layout="halves", frequencies="fairseq"), (300,)),
    (SinusoidalPositions2d(8, normalize=False), (3, 300)),
    (SinusoidalPositions2d(8), (5, 7)),
    (LearnedPositions(8, grid_size=(4, 4)), (5, 7)),
    (LearnedPositions(8, grid_size=(400,), resize=False), (300,)),
    (RowColumnPositions(8), (5, 7)),
    (RowColumnPositions(8, resize=True), (5, 7)),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("encode", "grid"), ALL, ids=repr)
def test_sixteen_bits_cost_one_rounding(encode, grid, dtype):
    """Places and angles are never in 16 bits: the result is the float32 one, rounded once."""
    x = torch.randn(1, *grid, 8)
    exact, found = encode(x), encode(x.to(dtype))
    assert exact.dtype == torch.float32 and found.dtype == dtype
    assert_close(found, exact.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_tables_in_sixteen_bits_are_resized_in_float32(dtype):
    table, bias = torch.randn(1, 1 + 20, 8).to(dtype), torch.randn(3, 7, 9).to(dtype)
    found = resized_positions(table, (4, 5), (7, 3), num_prefix=1)
    expected = resized_positions(table.float(), (4, 5), (7, 3), num_prefix=1)
    assert_close(found, expected.to(dtype), rtol=0, atol=0)
    assert_close(resized_bias(bias, (6, 3)), resized_bias(bias.float(), (6, 3)).to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("pairing", PAIRINGS)
def test_sixteen_bit_rotations_cost_one_rounding(pairing, dtype):
    q = float64(1, 2, 3000, 16).to(dtype)
    exact = rotate(q.double(), rotary_angles((3000,), 16, dtype=torch.float64), pairing=pairing)
    found = rotate(q, rotary_angles((3000,), 16), pairing=pairing)
    assert found.dtype == dtype
    assert_close(found.double(), exact, rtol=torch.finfo(dtype).eps, atol=2e-3)


@pytest.mark.parametrize(("encode", "grid"), ALL, ids=repr)
def test_one_program_for_every_size(encode, grid):
    rank = len(grid)
    dynamic = {axis + 1: torch.export.Dim.DYNAMIC for axis in range(rank)}
    with torch.no_grad():
        program = torch.export.export(encode, (torch.randn(2, *grid, 8),), dynamic_shapes=(dynamic,)).module()
        for other in ((9,), (17,), (40,)) if rank == 1 else ((9, 16), (4, 4), (4, 20)):
            x = torch.randn(2, *other, 8)
            assert_close(program(x), encode(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("encode", "grid", "masked"),
    [
        (SinusoidalPositions1d(8), (5,), True),
        (SinusoidalPositions2d(8), (3, 4), True),
        (LearnedPositions(8, grid_size=(4, 4)), (5, 7), False),
    ],
    ids=repr,
)
def test_no_encoding_breaks_a_compiled_graph(encode, grid, masked):
    torch._dynamo.reset()
    compiled = torch.compile(encode, backend="aot_eager", fullgraph=True)
    x, valid = torch.randn(2, *grid, 8), (torch.rand(2, *grid) < 0.5) if masked else None
    assert_close(compiled(x, valid=valid), encode(x, valid=valid), rtol=1e-5, atol=1e-6)


class Rotated(nn.Module):
    """What a model does with q and k."""

    def __init__(self, reference=None):
        super().__init__()
        self.reference = reference

    def forward(self, q):
        angles = rotary_angles(q.shape[1:-1], q.shape[-1], grid_size=self.reference, device=q.device)
        return rotate(q.flatten(1, -2), angles)


@pytest.mark.parametrize("reference", [None, (8, 8)])
def test_one_rotation_for_every_size(reference):
    dynamic = dict.fromkeys((1, 2), torch.export.Dim.DYNAMIC)
    call = Rotated(reference)
    program = torch.export.export(call, (torch.randn(2, 13, 11, 8),), dynamic_shapes=(dynamic,)).module()
    for grid in ((9, 16), (4, 4)):
        q = torch.randn(2, *grid, 8)
        assert_close(program(q), call(q), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("encode", "grid"), ALL, ids=repr)
def test_all_is_made_on_the_device_of_the_tokens(encode, grid):
    """A meta tensor mixes with no other: one made elsewhere would raise."""
    x = torch.randn(2, *grid, 8, device="meta")
    valid = torch.ones(2, *grid, dtype=torch.bool, device="meta")
    encode = copy.deepcopy(encode).to("meta")
    assert encode(x).device.type == "meta"
    if not getattr(encode, "resize", False):
        assert encode(x, valid=valid).shape[1:] == x.shape[1:]
    bias = RelativePositionBias(grid, 2).to("meta")
    assert bias(tuple(n + 1 for n in grid)).device.type == "meta"
    angles = rotary_angles(grid, 8, grid_size=grid, device="meta")
    assert rotate(x.flatten(1, -2), angles).shape == x.flatten(1, -2).shape


def test_encodings_without_parameters_have_no_state():
    for encode in (SinusoidalPositions1d(8), SinusoidalPositions2d(8)):
        assert not encode.state_dict() and not list(encode.buffers())


X1, X2 = torch.zeros(1, 4, 8), torch.zeros(1, 3, 4, 8)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: sinusoids(X1[0, :, 0], 7), r"dim: 7 channels cannot be shared by sines and cosines; .* multiple of 2"),
        (lambda: SinusoidalPositions1d(7), r"dim: 7 channels .* multiple of 2"),
        (lambda: SinusoidalPositions2d(6), r"dim: 6 channels .* rows and columns, .* multiple of 4"),
        (lambda: SinusoidalPositions1d(2, frequencies="fairseq"), r"dim: 2, .* divides by dim/2 - 1; .* at least 4"),
        (lambda: SinusoidalPositions1d(8, layout="half"), r"layout: 'half', must be 'interleaved' or 'halves'"),
        (lambda: SinusoidalPositions1d(8, temperature=0), r"temperature: 0, must be positive"),
        (lambda: RowColumnPositions(7), r"dim: 7 channels .* rows and columns; give a multiple of 2"),
        (lambda: LearnedPositions(8, grid_size=14), r"grid_size: 14, must name every axis, as in \(14, 14\)"),
        (lambda: LearnedPositions(8, grid_size=(2, 2), num_prefix=-1), r"num_prefix: -1"),
        (lambda: SinusoidalPositions1d(8)(X2), r"made for grids of rank 1, x has \(3, 4\)"),
        (lambda: SinusoidalPositions2d(8)(X1), r"made for grids of rank 2, x has \(4,\); .* grid=\(H, W\)"),
        (lambda: SinusoidalPositions2d(8)(X1, grid=(2, 3)), r"x has shape \(1, 4, 8\), grid \(2, 3\) needs"),
        (lambda: SinusoidalPositions2d(12)(X2), r"x has 8 channels, dim is 12"),
        (lambda: SinusoidalPositions2d(8)(X2, valid=torch.ones(1, 3, 4)), r"valid has shape .* needs .* torch.bool"),
        (lambda: LearnedPositions(8, grid_size=(2, 2), num_prefix=1)(X2), r"has 0 tokens in front .* num_prefix is 1"),
        (lambda: LearnedPositions(8, grid_size=(4,))(X1, offset=1), r"offset was given, resize=True .* resize=False"),
        (lambda: LearnedPositions(8, grid_size=(9, 9), resize=False)(X2, offset=1), r"offset .* rank 2"),
        (lambda: LearnedPositions(8, grid_size=(4,), resize=False)(X1, offset=1), r"reaches place 5 .* made for 4; .*"),
        (lambda: LearnedPositions(8, grid_size=(4,), resize=False)(X1, offset=-1), r"offset is -1, .* give 0 or more"),
        (lambda: LearnedPositions(8, grid_size=(2, 4), resize=False)(X2), r"reaches place 3 along axis 0"),
        (lambda: RowColumnPositions(8, grid_size=(3, 3))(X2), r"reaches place 4 along axis 1 .* larger grid_size"),
        (
            lambda: RowColumnPositions(8, resize=True)(X2, valid=torch.ones(1, 3, 4) > 0),
            r"valid was given, resize=True .* use resize=False",
        ),
        (lambda: resized_positions(X1, (2, 3), (4, 4)), r"table: has shape \(1, 4, 8\), .* needs \[1, 6, C\]"),
        (lambda: resized_positions(X1, (2, 2), (4,)), r"grid: \(4,\), the table is made for \(2, 2\)"),
        (lambda: RelativePositionBias(7, 2), r"grid_size: 7, must name every axis"),
        (lambda: RelativePositionBias((7, 7), 2)((3,)), r"grid \(3,\), the table is made for \(7, 7\)"),
        (lambda: RelativePositionBias((7, 7), 2, mode="linear"), r"mode: 'linear', must be 'bicubic' or 'bilinear'"),
        (lambda: rotary_angles((4,), 7), r"head_dim: 7 channels .* pairs; give a multiple of 2"),
        (lambda: rotary_angles((4, 4), 6), r"head_dim: 6 channels .* rows and for columns; give a multiple of 4"),
        (lambda: rotary_angles((4, 4, 4), 8), r"grid: has 3 axes"),
        (lambda: rotary_angles((4, 4), 8, offset=1), r"offset: was given, the grid has rank 2"),
        (lambda: rotary_angles((4,), 8, offset=1, grid_size=(8,)), r"offset: was given, grid_size scales"),
        (lambda: rotary_angles((4, 4), 8, grid_size=(8,)), r"grid_size: \(8,\), the grid is \(4, 4\); .* as many axes"),
        (lambda: rotary_angles((4,), 8, extents=torch.ones(2, 1)), r"extents: were given without grid_size"),
        (lambda: rotary_angles((4,), 8, temperature=-1.0), r"temperature: -1.0, must be positive"),
        (lambda: rotate(X1, rotary_angles((4,), 6)), r"angles: for 3 pairs, t has 8 channels; they need half as many"),
        (lambda: rotate(X1, rotary_angles((4,), 8), pairing="split"), r"pairing: 'split', must be 'interleaved' or"),
    ],
)
def test_mistakes_are_said_in_words(call, sentence):
    with pytest.raises(ValueError, match=sentence):
        call()


FAULTS = {
    "mixer.py": (
        (
            "positions reach no weights",
            "        found = self._weights(self._placed(x, call),",
            "        found = self._weights(x,",
        ),
        ("positions reach no fast path", 'self.fast(self._placed(x, call, "fast"),', "self.fast(x,"),
        ("positions reach no scores", "self._scores(self._placed(x, call),", "self._scores(x,"),
        (
            "positions reach the values",
            'values = self.values(call.get("source", x),',
            'values = self.values(call.get("source", self._placed(x, call)),',
        ),
        ("positions are added twice", 'not in self._takes["_weights"] | self._takes[hook]:', "not in ():"),
    ),
    "positions/sinusoidal.py": (
        ("every layout is interleaved", 'if layout == "interleaved" else torch.cat(both, -1)', "if True else None"),
        ("cosines come before sines", "both = angle.sin(), angle.cos()", "both = angle.cos(), angle.sin()"),
        ("fairseq's rule is Vaswani's", '(half if frequencies == "vaswani" else half - 1)', "half"),
        ("frequencies rise", "temperature**-share", "temperature**share"),
        (
            "frequencies are in the dtype of the places",
            "torch.arange(half, device=places.device).to(dtype)",
            "torch.arange(half, device=places.device).to(places.dtype)",
        ),
        (
            "places are in the dtype of the tokens",
            "return torch.promote_types(x.dtype, torch.float32)",
            "return x.dtype",
        ),
        ("rows and columns count from 0", "torch.arange(1, height + 1, device", "torch.arange(height, device"),
        ("columns are counted along columns", "for axis in (1, 2))", "for axis in (2, 1))"),
        ("rows are a share of the first", "row / (row[:, -1:] +", "row / (row[:, :1] +"),
        ("columns are a share of the image's rows", "column / (column[:, :, -1:] +", "column / (row[:, -1:] +"),
        ("the column comes before the row", "for place in (row, column)]", "for place in (column, row)]"),
        ("each axis has the frequencies of all channels", "self.dim // 2, temperature=", "self.dim, temperature="),
        ("padding is encoded", "encoding.masked_fill(~tokens.valid[..., None], 0)", "encoding"),
        ("the temperature is not used in images", "self.dim // 2, temperature=self.temperature)", "self.dim // 2)"),
    ),
    "positions/_tokens.py": (
        ("padding counts", "valid.cumsum(1) - 1 + start", "torch.ones_like(valid).cumsum(1) - 1 + start"),
        ("the offset is lost under padding", "return valid.cumsum(1) - 1 + start", "return valid.cumsum(1) - 1"),
        ("the offset is lost", "device=device) + start)", "device=device))"),
        (
            "the mask of class tokens is read as the grid's",
            "valid[:, prefix:].unflatten",
            "valid[:, : math.prod(grid)].unflatten",
        ),
        (
            "class tokens stand at the end",
            "encoding.shape[0], -1, -1), encoding]",
            "encoding.shape[0], -1, -1), encoding][::-1]",
        ),
        ("the result stays in float32", "return encoding.to(x.dtype)", "return encoding"),
    ),
    "positions/learned.py": (
        (
            "class tokens are resized away",
            "return torch.cat([in_front, new.",
            "return torch.cat([in_front[:, :0], new.",
        ),
        ("nothing is blurred", "mode=mode, antialias=antialias)", "mode=mode)"),
        ("an empty batch with padding has nothing to join", "torch.cat([none, *(at", "torch.cat([*(at"),
        ("a place before the first is the table's last", "if start < 0:", "if False:"),
        ("always bicubic", "mode=mode, antialias=antialias)", 'mode="bicubic", antialias=antialias)'),
        (
            "the table is transposed",
            "image.movedim(-1, 1), size",
            "image.movedim(-1, 1).mT.contiguous().view_as(image.movedim(-1, 1)), size",
        ),
        ("tables are resized in 16 bits", "entries.to(torch.promote_types(table.dtype, torch.float32))", "entries"),
        (
            "padded images share a table",
            "at = {size: self._at(size) for size in sizes}",
            "at = {size: self._at(tokens.grid)[:, : size[0], : size[1]] for size in sizes}",
        ),
        ("padding stands before the image", "for m in (n - s, 0)]", "for m in (0, n - s)]"),
        (
            "a table's rows begin at its start whatever the offset",
            "steps(tokens.grid[0], offset, tokens",
            "steps(tokens.grid[0], 0, tokens",
        ),
        ("a sequence may reach past the table", "axis, start + n, size)", "axis, n, size)"),
        ("a learned encoding of padding", ".masked_fill(~tokens.valid[..., None], 0)", ""),
        ("the row comes before the column", "torch.cat([column, row], -1)", "torch.cat([row, column], -1)"),
        (
            "rows and columns do not learn",
            "(table[None], (self.grid_size[axis],), (n,))",
            "(table[None].detach(), (self.grid_size[axis],), (n,))",
        ),
    ),
    "positions/relative.py": (
        ("offsets are query minus source", "return source - (query if", "return (query if"),
        ("a stride is not counted", "query = stride * grid_positions", "query = grid_positions"),
        (
            "an index is of source minus query",
            "entry = place[:, None] - place + size - 1",
            "entry = place - place[:, None] + size - 1",
        ),
        (
            "a row of the table is as long as the window",
            "* (2 * size - 1) + entry[:, None])",
            "* (2 * n - 1) + entry[:, None])",
        ),
        (
            "a bias is resized corner to corner",
            "size=shape, mode=mode)[0]",
            "size=shape, mode=mode, align_corners=True)[0]",
        ),
        ("a bias is always bilinear", "size=shape, mode=mode)[0]", 'size=shape, mode="bilinear")[0]'),
        ("the table is flipped: source minus query", "    table = table.flip(axes)\n", ""),
        (
            "the table's rows come last query first",
            "return table.flip(axes).flatten(1, len(grid)).flatten(2)",
            "return table.flatten(1, len(grid)).flatten(2)",
        ),
        (
            "for a subset of the queries the table is flipped",
            "place[queries, None] - place + ",
            "place - place[queries, None] + ",
        ),
        (
            "a subset of the queries has the first rows",
            "place[queries, None] - place + ",
            "place[: len(queries), None] - place + ",
        ),
        (
            "the compiled bias gives all queries the row of the first",
            "torch.arange(math.prod(grid), device=table.device) if queries",
            "torch.zeros(math.prod(grid), device=table.device).long() if queries",
        ),
        ("the last size of a table is refused", "if length > size:", "if length >= size:"),
        (
            "all heads have the first one's bias",
            "    table = table.flip(axes)\n",
            "    table = table[:1].expand_as(table).flip(axes)\n",
        ),
        (
            "at a subset of the queries all heads have the first one's bias",
            "table.flatten(1)[:, entry",
            "table[:1].expand_as(table).flatten(1)[:, entry",
        ),
    ),
    "positions/quadratic.py": (
        ("a centre is looked at from the other side", "2 * alpha * centre", "-2 * alpha * centre"),
        ("a centre is not doubled", "2 * alpha * centre", "alpha * centre"),
        ("the distance is not squared", "offsets.square().sum(-1, keepdim=True)", "offsets.norm(dim=-1, keepdim=True)"),
        ("a head is drawn to what is far", "-alpha.expand(", "alpha.expand("),
    ),
    "positions/rotary.py": (
        (
            "channels are turned the other way",
            "a * cos - b * sin, a * sin + b * cos",
            "a * cos + b * sin, b * cos - a * sin",
        ),
        ("no rotation: a reflection", "a * cos - b * sin, a * sin + b * cos", "a * cos + b * sin, a * sin - b * cos"),
        (
            "halves are written back interleaved",
            'flatten(-2) if pairing == "interleaved" else torch.cat(turned, -1)',
            "flatten(-2)",
        ),
        (
            "each axis of an image turns as if it had all channels",
            "/ (head_dim // (2 * rank))\n",
            "/ (head_dim // 2)\n",
        ),
        ("an offset is lost", "places = places + offset\n", "pass\n"),
        ("class tokens stand at the end", "(0, 0, num_prefix, 0)", "(0, 0, 0, num_prefix)"),
        ("places are not scaled to the grid", "/ _as_tensor(grid, places) * reference", "* 1"),
        (
            "a padded image is scaled by the batch's size",
            "places / extents.clamp(min=1).to(dtype)[:, None] * reference",
            "places / _as_tensor(grid, places) * reference",
        ),
        ("one axis of training scales both of an image", "len(grid_size) != rank:", "False:"),
        ("sizes of images that scale nothing are taken", "if extents is not None and grid_size is None:", "if False:"),
        ("an odd head is rounded down", "if head_dim % (2 * rank):", "if False:"),
        (
            "rotations are in 16 bits",
            "cos, sin = angles.cos(), angles.sin()",
            "cos, sin = angles.to(t.dtype).cos(), angles.to(t.dtype).sin()",
        ),
    ),
}
