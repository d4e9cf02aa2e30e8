"""Learned encodings and their resizing against timm, loops, and transformers' DETR where it is there."""

import itertools
import math

import pytest
import timm.layers
import torch
from torch.testing import assert_close

from glocal.positions import (
    LearnedPositions,
    RelativePositionBias,
    RowColumnPositions,
    resized_bias,
    resized_positions,
)

from .tokens import EXACT, corner_valid, float64

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


FAULTS = {
    (
        "positions/learned.py",
        "positions/test_learned.py",
        "positions/test_every_encoding.py",
        "positions/test_with_attention.py",
    ): (
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
}
