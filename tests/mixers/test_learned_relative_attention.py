"""LearnedRelativeAttention against a loop over offsets, softmaxes by hand, and torch's attention."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import glocal

DIM, HEADS = 4, 2

FAULTS = (
    (
        "rows and columns of scores are swapped",
        "rows[:, :, None, :, None] + columns[:, None, :, None]",
        "rows[:, None, :, None] + columns[:, :, None, :, None]",
    ),
    ("offsets are query minus source", "axis_offsets(n, x.device) + n - 1]", "axis_offsets(n, x.device).T + n - 1]"),
    ("smaller grids read the table's start", "axis, size, n, x.device)", "axis, n, n, x.device)"),
    (
        "tables change places",
        "[(self.col_embeddings, self.head_keys_col), along_row]",
        "[along_row, (self.col_embeddings, self.head_keys_col)]",
    ),
    ("queries are not scaled", "return q * self.dim**-0.5, k", "return q, k"),
    (
        "scaled as if heads shared the channels",
        "return q * self.dim**-0.5, k",
        "return q * (self.dim / self.num_heads) ** -0.5, k",
    ),
    (
        "the fast path with content sees padding",
        "sources = None if valid is None else valid.flatten(1)",
        "sources = None",
    ),
    (
        "with content the fast path's offsets are query minus source",
        "others[0][:, None]).flip(1, 2)",
        "others[0][:, None])",
    ),
    ("the fast path without content sees padding", "values, x.shape[1:-1], valid)", "values, x.shape[1:-1], None)"),
    ("clipped offsets lie beyond the table", "offset.clamp(1 - size, size - 1)", "offset.clamp(-size, size)"),
    (
        "offsets are clipped one short of the table's end",
        "offset.clamp(1 - size, size - 1)",
        "offset.clamp(2 - size, size - 2)",
    ),
    ("clipped tables are read from their start", "size - 1) + size - 1", "size - 1) + n - 1"),
    ("keys never have a bias", "num_heads * dim, bias=key_bias)", "num_heads * dim, bias=False)"),
    ("a bias of keys that are not there is accepted", "if key_bias and not content:", "if False:"),
    ("the position is lost where there is content", 'scores["content"] = torch', 'scores["position"] = torch'),
)


def spec_of(grid_size=7, rank=2, **arguments):
    options = {"num_heads": HEADS, "grid_size": grid_size, **arguments, "rank": rank}
    return f"LearnedRelativeAttention({', '.join(f'{k}={v}' for k, v in options.items())})"


def by_loop(mixer, places, sizes):
    """One query, one source and one head at a time; `sizes` are the tables', rows first."""

    def clipped(offset, size):
        if not mixer.clip_offsets:
            return offset
        return size - 1 if offset >= size else 1 - size if offset <= -size else offset

    def oracle(x, valid=None):
        batch, *grid, _ = x.shape
        where = places(grid)
        images = []
        for b in range(batch):
            seen = [place for place in where if valid is None or valid[(b, *place)]]
            rows = []
            for query in where:
                heads = []
                for h in range(HEADS):
                    total = torch.zeros(DIM, dtype=x.dtype)
                    weights = []
                    for source in seen:
                        dx = clipped(source[-1] - query[-1], sizes[-1])
                        score = mixer.row_embeddings.weight[dx + sizes[-1] - 1] @ mixer.head_keys_row.weight[h]
                        if len(grid) == 2:
                            dy = clipped(source[0] - query[0], sizes[0])
                            score = (
                                score + mixer.col_embeddings.weight[dy + sizes[0] - 1] @ mixer.head_keys_col.weight[h]
                            )
                        if mixer.content:
                            own = slice(h * DIM, (h + 1) * DIM)
                            q = mixer.query.weight[own] @ x[(b, *query)] + mixer.query.bias[own]
                            k = mixer.key.weight[own] @ x[(b, *source)]
                            k = k + mixer.key.bias[own] if mixer.key_bias else k
                            score = score + q @ k / math.sqrt(DIM)
                        weights.append(score)
                    if seen:
                        shares = torch.stack(weights).softmax(0)
                        total = sum(share * x[(b, *source)] for share, source in zip(shares, seen, strict=True))
                    heads.append(total)
                rows.append(torch.cat(heads))
            images.append(torch.stack(rows) @ mixer.value.weight.T + mixer.value.bias)
        return torch.stack(images).view(x.shape)

    return oracle


SIZES = [  # tables, grid
    ((3, 4), (3, 4)),
    ((5, 4), (2, 3)),
    ((4, 4), (4, 2)),
    ((3, 3), (1, 1)),
    ((6,), (6,)),
    ((7,), (4,)),
]


@pytest.mark.parametrize("content", [False, True])
@pytest.mark.parametrize(("sizes", "grid"), SIZES)
def test_is_the_loop(build, check, tokens, places, sizes, grid, content):
    mixer = build(spec_of(sizes, len(grid), position_dim=3, content=content), DIM)
    check(mixer, by_loop(mixer, places, sizes), tokens(2, *grid, DIM))


@pytest.mark.parametrize("content", [False, True])
@pytest.mark.parametrize(
    ("sizes", "grid"), [((2, 3), (4, 5)), ((1, 2), (3, 2)), ((4, 2), (2, 4)), ((4, 4), (4, 3)), ((2,), (6,))]
)
def test_offsets_beyond_the_tables_count_as_their_last(build, check, tokens, places, sizes, grid, content):
    mixer = build(spec_of(sizes, len(grid), position_dim=3, content=content, clip_offsets=True), DIM)
    check(mixer, by_loop(mixer, places, sizes), tokens(2, *grid, DIM))


def test_a_bias_of_keys_changes_nothing(build, check, tokens, places):
    mixer = build(spec_of((3, 4), content=True, key_bias=True), DIM)
    x = tokens(2, 3, 4, DIM)
    check(mixer, by_loop(mixer, places, (3, 4)), x)
    before = mixer(x)
    with torch.no_grad():
        mixer.key.bias.zero_()
    assert_close(mixer(x), before)
    with pytest.raises(ValueError, match="key_bias: True, without content there are no keys; add content=True"):
        build(spec_of(key_bias=True), DIM)


@pytest.mark.parametrize("content", [False, True])
def test_any_valid_tokens_are_taken(build, check, tokens, places, content):
    mixer = build(spec_of((4, 4), content=content), DIM)
    valid = torch.rand(3, 3, 4) < 0.5
    valid[0] = False
    valid[1, :2, :2] = True
    valid[1, 1, 1] = False  # no rectangle
    check(mixer, by_loop(mixer, places, (4, 4)), tokens(3, 3, 4, DIM), valid=valid)


@pytest.mark.parametrize("content", [False, True])
@pytest.mark.parametrize("extents", [[(4, 3), (2, 5)], [(4,), (6,)]])
def test_padding_leaves_images_alone(build, check_padding, extents, content):
    check_padding(build(spec_of(7, len(extents[0]), content=content), DIM), extents, DIM)


def test_weights_are_a_softmax_over_rows_times_one_over_columns(build, tokens):
    mixer = build(spec_of((5, 6)), DIM)
    weights = mixer.weights(tokens(3, 3, 4, DIM)).weights
    assert weights.shape == (1, HEADS, 12, 12)
    along_row = mixer.row_embeddings.weight @ mixer.head_keys_row.weight.T  # [11, heads]
    along_column = mixer.col_embeddings.weight @ mixer.head_keys_col.weight.T  # [9, heads]
    for i in range(3):
        for j in range(4):
            rows = along_column[4 - i : 7 - i].softmax(0)
            columns = along_row[5 - j : 9 - j].softmax(0)
            expected = torch.einsum("ih,jh->hij", rows, columns).flatten(1)
            assert_close(weights[0, :, i * 4 + j], expected)


def test_is_the_released_layer_on_a_square(build, check, tokens):
    """Its lines, with its one table size and its row embeddings along the last axis; max_position_embeddings is 5."""
    mixer = build(spec_of(5, position_dim=3, content=True), DIM)

    def oracle(x):
        b, w, h, _ = x.shape
        index = torch.arange(5)[None] - torch.arange(5)[:, None] + 4
        row = mixer.head_keys_row(mixer.row_embeddings(index[:w, :w].reshape(-1))).view(1, w, 1, w, HEADS)
        col = mixer.head_keys_col(mixer.col_embeddings(index[:h, :h].reshape(-1))).view(h, 1, h, 1, HEADS)
        q, k = (layer(x).view(b, w, h, HEADS, DIM) for layer in (mixer.query, mixer.key))
        data = torch.einsum("bijhd,bklhd->bijhkl", q, k) / DIM**0.5
        weights = ((row + col).permute(0, 1, 4, 2, 3)[None] + data).flatten(-2).softmax(-1).view(data.shape)
        return mixer.value(torch.einsum("bijhkl,bkld->bijhd", weights, x).reshape(b, w, h, -1))

    check(mixer, oracle, tokens(2, 4, 4, DIM))


@pytest.mark.parametrize("grid", [(3, 5), (6,)])
def test_without_positions_is_attention_over_all_channels(build, check, tokens, grid):
    mixer = build(spec_of(7, len(grid), content=True), DIM)
    with torch.no_grad():
        mixer.row_embeddings.weight.zero_()
        if len(grid) == 2:
            mixer.col_embeddings.weight.zero_()

    def oracle(x):
        flat = x.flatten(1, -2)
        q, k = (layer(flat).view(2, -1, HEADS, DIM).transpose(1, 2) for layer in (mixer.query, mixer.key))
        mixed = F.scaled_dot_product_attention(q, k, flat[:, None].expand(-1, HEADS, -1, -1))
        return mixer.value(mixed.transpose(1, 2).flatten(2)).view(x.shape)

    x = tokens(2, *grid, DIM)
    for mixer.impl in ("reference", "fast"):
        assert_close(mixer(x), oracle(x))


def test_weights_without_content_know_nothing_of_the_input(build, tokens):
    for content in (False, True):
        mixer = build(spec_of(content=content), DIM)
        one, other = (mixer.weights(tokens(2, 4, 5, DIM)).weights for _ in range(2))
        assert torch.equal(one, other) != content
        assert_close(one.sum(-1), torch.ones(one.shape[:3], dtype=torch.float64))


@pytest.mark.parametrize("content", [False, True])
def test_larger_grids_are_refused(build, tokens, content):
    mixer = build(spec_of((3, 4), content=content), DIM)
    for mixer.impl in ("reference", "fast"):
        mixer(tokens(1, 3, 4, DIM))
        with pytest.raises(ValueError, match=r"4 tokens along axis 0 .* made for 3; build it with a larger grid_size"):
            mixer(tokens(1, 4, 4, DIM))
        with pytest.raises(ValueError, match=r"5 tokens along axis 1 .* made for 4"):
            mixer(tokens(1, 3, 5, DIM))


@pytest.mark.parametrize("autocast", [False, True])
def test_the_librarys_mask_stays_finite_in_float16(build, monkeypatch, autocast):
    """A row of -inf, of an image that is all padding, is NaN in some of its kernels."""
    seen = []
    library = F.scaled_dot_product_attention
    monkeypatch.setattr(
        F, "scaled_dot_product_attention", lambda *a, **k: seen.append(k["attn_mask"]) or library(*a, **k)
    )
    mixer = build(spec_of(7, 1, content=True), DIM)
    with torch.no_grad():
        mixer.head_keys_row.weight.mul_(300)  # scores beside which the mask would overflow
    mixer = mixer.float() if autocast else mixer.half()
    x = torch.randn(2, 5, DIM, dtype=torch.float32 if autocast else torch.float16)
    valid = torch.tensor([[True] * 5, [False] * 5])
    with torch.autocast("cpu", torch.float16, enabled=autocast):
        assert mixer(x, valid=valid).isfinite().all()
        with torch.no_grad():  # where the library runs
            assert mixer(x, valid=valid).isfinite().all()
    assert len(seen) == 1 and seen[0].dtype == torch.float16 and seen[0].isfinite().all()


def test_parameters():
    """The released layer has a bias of keys, too, which no softmax sees."""

    def shapes(spec, dim):
        return {k: tuple(v.shape) for k, v in glocal.build(spec, dim).named_parameters()}

    position = {
        "value.weight": (400, 3600),
        "value.bias": (400,),
        "row_embeddings.weight": (31, 400),
        "head_keys_row.weight": (9, 400),
        "col_embeddings.weight": (31, 400),
        "head_keys_col.weight": (9, 400),
    }
    content = {"query.weight": (3600, 400), "query.bias": (3600,), "key.weight": (3600, 400)}
    assert shapes("LearnedRelativeAttention()", 400) == position
    assert shapes("LearnedRelativeAttention(content=True)", 400) == position | content
    released = position | content | {"key.bias": (3600,)}
    assert shapes("LearnedRelativeAttention(content=True, key_bias=True)", 400) == released
    assert sum(math.prod(s) for s in released.values()) == 4_359_600
    size = sum(math.prod(s) for s in position.values())
    assert size == 1_472_400 and size + sum(math.prod(s) for s in content.values()) == 4_359_600 - 3600
    assert shapes("LearnedRelativeAttention(num_heads=1, grid_size=(3, 5), position_dim=2)", 4) == {
        "value.weight": (4, 4),
        "value.bias": (4,),
        "row_embeddings.weight": (9, 2),
        "head_keys_row.weight": (1, 2),
        "col_embeddings.weight": (5, 2),
        "head_keys_col.weight": (1, 2),
    }
    assert set(shapes("LearnedRelativeAttention(rank=1)", 4)) == {
        "value.weight", "value.bias", "row_embeddings.weight", "head_keys_row.weight",
    }  # fmt: skip
