"""Tables of offsets against loops and timm."""

import itertools
import math

import pytest
import timm.layers
import torch
import torch.nn.functional as F
from timm.layers.pos_embed_rel import gen_relative_position_index, resize_rel_pos_bias_table_simple
from torch import nn
from torch.testing import assert_close

import glocal
from glocal.positions import (
    RelativePositionBias,
    relative_bias,
    relative_index,
)
from glocal.positions.relative import axis_offsets, relative_rows

from .tokens import EXACT, float64


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


FAULTS = {
    (
        "positions/relative.py",
        "positions/test_relative.py",
        "positions/test_every_encoding.py",
        "positions/test_with_attention.py",
    ): (
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
}
