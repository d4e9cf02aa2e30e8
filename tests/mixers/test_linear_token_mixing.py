"""LinearTokenMixing against torch's linear layer over the transposed tokens."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.testing import assert_close

import glocal

FAULTS = (
    ("the matrix is transposed", "weight[:, place[:, None], place]", "weight[:, place, place[:, None]]"),
    (
        "a smaller grid is numbered by its own length",
        "for n in grid], self._size)[:, 0]",
        "for n in grid], grid)[:, 0]",
    ),
    ("channels of a head are strided", "unflatten(-1, (self.num_heads, -1))", "unflatten(-1, (-1, self.num_heads)).mT"),
    (
        "rows and columns of the grid are exchanged in grid_size",
        'per_axis("grid_size", grid_size, rank)',
        'per_axis("grid_size", grid_size, rank)[::-1]',
    ),
    ("longer grids are let through along the last axis", "if any(n > size", "if all(n > size"),
    ("the matrix gets no gradient", "weight = self.weight if", "weight = self.weight.data if"),
    (
        "every head reads the first matrix",
        '"gnm,bmgd->bngd", self._matrix(x)',
        '"gnm,bmgd->bngd", self._matrix(x)[:1].expand(self.num_heads, -1, -1)',
    ),
)


def by_linear(mixer, grid_size):
    """Tokens beyond a smaller grid are zeros, and what comes out there is dropped."""

    def oracle(x, valid=None):
        _, *grid, dim = x.shape
        if valid is not None:
            x = x * valid.unsqueeze(-1)
        ends = [end for size, n in zip(reversed(grid_size), reversed(grid), strict=True) for end in (0, size - n)]
        full = F.pad(x, (0, 0, *ends))
        matrices = mixer.weight.view(mixer.num_heads, -1, mixer.weight.shape[-1])
        channels = full.flatten(1, -2).mT.split(dim // mixer.num_heads, 1)
        mixed = torch.cat([F.linear(c, m) for c, m in zip(channels, matrices, strict=True)], 1)
        return mixed.mT.view(full.shape)[(slice(None), *(slice(n) for n in grid))]

    return oracle


def spec_of(grid_size, num_heads=1):
    return f"LinearTokenMixing(grid_size={grid_size}, num_heads={num_heads}, rank={len(grid_size)})"


@pytest.mark.parametrize("num_heads", [1, 2, 6])
@pytest.mark.parametrize(
    ("grid_size", "grid"),
    [
        ((3, 5), (3, 5)),
        ((5, 3), (5, 3)),
        ((4, 6), (3, 2)),
        ((4, 6), (1, 6)),
        ((6, 4), (6, 1)),
        ((3, 3), (1, 1)),
        ((7,), (7,)),
        ((8,), (5,)),
    ],
)
def test_is_a_linear_layer_over_positions(build, check, tokens, grid_size, grid, num_heads):
    mixer = build(spec_of(grid_size, num_heads), 6)
    check(mixer, by_linear(mixer, grid_size), tokens(2, *grid, 6))


def test_is_torchs_linear_layer_with_the_same_state(build, check, tokens):
    mixer, layer = build("LinearTokenMixing(grid_size=(3, 5))", 4), nn.Linear(15, 15, bias=False).double()
    layer.load_state_dict(mixer.state_dict())
    x = tokens(2, 3, 5, 4)
    assert_close(mixer(x), layer(x.flatten(1, 2).mT).mT.view(x.shape), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_heads", [1, 3])
def test_invalid_tokens_count_as_zero_anywhere(build, check, tokens, num_heads):
    mixer = build(spec_of((4, 5), num_heads), 6)
    check(mixer, by_linear(mixer, (4, 5)), tokens(2, 4, 3, 6), valid=torch.rand(2, 4, 3) < 0.6)


@pytest.mark.parametrize(("grid_size", "extents"), [((5, 7), [(4, 3), (2, 6)]), ((9,), [(4,), (8,)])])
def test_padding_leaves_images_alone(build, check_padding, grid_size, extents):
    check_padding(build(spec_of(grid_size, 2), 4), extents, 4)


@pytest.mark.parametrize("impl", ["reference", "fast"])
@pytest.mark.parametrize(("grid_size", "grid"), [((4, 6), (5, 6)), ((4, 6), (4, 7)), ((4, 6), (6, 4)), ((7,), (8,))])
def test_a_longer_grid_is_refused(build, tokens, grid_size, grid, impl):
    mixer = build(spec_of(grid_size), 4)
    mixer.impl = impl
    with pytest.raises(ValueError, match="grid_size") as error:
        mixer(tokens(1, *grid, 4))
    assert str(grid) in str(error.value) and str(grid_size) in str(error.value)


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_permuting_tokens_is_permuting_the_matrix(build, tokens, impl):
    mixer, other = (build("LinearTokenMixing(grid_size=12, num_heads=2, rank=1)", 6) for _ in range(2))
    mixer.impl = other.impl = impl
    order = torch.randperm(12)
    with torch.no_grad():
        other.weight.copy_(mixer.weight[:, order][:, :, order])
    x = tokens(2, 12, 6)
    assert_close(other(x[:, order]), mixer(x)[:, order])


def test_parameters():
    def shapes(spec):
        return {k: tuple(v.shape) for k, v in glocal.build(spec, 6).named_parameters()}

    assert shapes("LinearTokenMixing(grid_size=(3, 5))") == {"weight": (15, 15)}
    assert shapes("LinearTokenMixing(grid_size=4, num_heads=2)") == {"weight": (2, 16, 16)}
    with pytest.raises(ValueError, match="num_heads: 4 does not divide 6"):
        glocal.build("LinearTokenMixing(grid_size=4, num_heads=4)", 6)


def test_weights_do_not_depend_on_the_image(build, tokens):
    weights = build("LinearTokenMixing(grid_size=8, num_heads=2)", 16).weights(tokens(2, 8, 8, 16))
    assert weights.weights.shape == (1, 2, 64, 64) and weights.index is None
