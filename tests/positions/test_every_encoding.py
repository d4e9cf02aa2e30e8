"""What every encoding keeps: short types, compiled and exported programs, devices, states, refusals."""

import copy

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from glocal.positions import (
    LearnedPositions,
    RelativePositionBias,
    RowColumnPositions,
    SinusoidalPositions1d,
    SinusoidalPositions2d,
    resized_bias,
    resized_positions,
    rotary_angles,
    rotate,
    sinusoids,
)

from .tokens import float64

PAIRINGS = ("interleaved", "halves")
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
    (
        "positions/_tokens.py",
        "positions/test_every_encoding.py",
        "positions/test_sinusoidal.py",
        "positions/test_learned.py",
        "positions/test_with_attention.py",
    ): (
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
}
