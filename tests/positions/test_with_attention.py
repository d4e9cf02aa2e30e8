"""How encodings go with attention: to queries and keys, never to values; class tokens; padding."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

import glocal
from glocal.evidence import DIM, random_mixer
from glocal.positions import (
    LearnedPositions,
    RowColumnPositions,
    SinusoidalPositions1d,
    SinusoidalPositions2d,
)

from .tokens import EXACT, corner_valid, float64


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
    *["GatedPaddedAttention"],
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
    out = mixer.out_grid(grid)
    masked = "mask_padding=False" not in spec and not spec.startswith("Released") and out == grid
    for call in ({}, {"valid": valid}) if masked else ({},):
        real = valid.flatten(1) if call else torch.ones(2, math.prod(out), dtype=torch.bool)
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


FAULTS = {
    ("mixer.py", "positions/test_with_attention.py"): (
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
}
