"""Rotations against loops and timm's."""

import itertools
import math

import pytest
import torch
from timm.layers.pos_embed_sincos import apply_rot_embed, build_rotary_pos_embed
from torch.testing import assert_close

from glocal.positions import (
    grid_offsets,
    rotary_angles,
    rotate,
)

from .tokens import EXACT, float64

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


FAULTS = {
    (
        "positions/rotary.py",
        "positions/test_rotary.py",
        "positions/test_every_encoding.py",
        "positions/test_with_attention.py",
    ): (
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
