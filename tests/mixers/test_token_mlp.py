"""TokenMLP against timm's Mixer block at its own size, and against a loop over tokens at smaller ones."""

import math

import pytest
import torch
from timm.models.mlp_mixer import MixerBlock
from torch.func import functional_call
from torch.testing import assert_close

import glocal


def by_timm(mixer):
    """The token-mixing half of timm's block, without its norm and residual."""
    block = MixerBlock(mixer.dim, math.prod(mixer.grid_size), mlp_ratio=(mixer.mlp_ratio, 1)).double().mlp_tokens
    return lambda x: (
        functional_call(block, dict(mixer.named_parameters()), (x.flatten(1, -2).transpose(1, 2),))
        .transpose(1, 2)
        .reshape(x.shape)
    )


@pytest.mark.parametrize(("grid", "mlp_ratio"), [((4, 3), 0.5), ((2, 7), 1.7), ((6,), 2), ((1, 1), 0.25)])
def test_at_its_own_size_is_timm(build, check, tokens, grid, mlp_ratio):
    mixer = build(f"TokenMLP(grid_size={grid}, mlp_ratio={mlp_ratio})", 6)
    check(mixer, by_timm(mixer), tokens(2, *grid, 6))


def test_loads_the_state_dict_of_timm(tokens):
    block = MixerBlock(8, 20)
    mixer = glocal.build("TokenMLP(grid_size=(4, 5))", 8)
    mixer.load_state_dict(block.mlp_tokens.state_dict())
    x = torch.randn(2, 20, 8)
    expected = block.mlp_tokens(x.transpose(1, 2)).transpose(1, 2)
    assert_close(mixer(x, grid=(4, 5)), expected)


def by_loop(mixer):
    """y_i = b2_i + sum_h W2_ih gelu(b1_h + sum_j W1_hj x_j) over the tokens that exist, each by its place."""

    def oracle(x, valid=None):
        w1, b1, w2, b2 = mixer.fc1.weight, mixer.fc1.bias, mixer.fc2.weight, mixer.fc2.bias
        here = list(torch.cartesian_prod(*map(torch.arange, x.shape[1:-1])).view(-1, x.dim() - 2).tolist())
        images = []
        for b, image in enumerate(x):
            rows = []
            real = [p for p in here if valid is None or valid[(b, *p)]]
            hidden = [b1[h] + sum(w1[h, place_of(mixer, p)] * image[tuple(p)] for p in real) for h in range(len(b1))]
            hidden = [h * 0.5 * (1 + torch.erf(h / math.sqrt(2))) for h in hidden]
            for p in here:
                i = place_of(mixer, p)
                rows.append(b2[i] + sum(w2[i, h] * unit for h, unit in enumerate(hidden)))
            images.append(torch.stack(rows).view(image.shape))
        return torch.stack(images)

    return oracle


def place_of(mixer, position):
    """Raster order in grid_size, whatever the grid of x."""
    place = 0
    for p, n in zip(position, mixer.grid_size, strict=True):
        place = place * n + p
    return place


@pytest.mark.parametrize(
    ("size", "grid"), [((4, 3), (4, 3)), ((4, 3), (2, 3)), ((4, 5), (4, 2)), ((5, 4), (3, 1)), ((7,), (3,))]
)
def test_a_smaller_grid_is_the_loop_over_its_tokens(build, check, tokens, size, grid):
    mixer = build(f"TokenMLP(grid_size={size})", 4)
    check(mixer, by_loop(mixer), tokens(2, *grid, 4))


def test_a_smaller_grid_is_the_whole_one_with_zero_tokens(build, tokens):
    mixer, x = build("TokenMLP(grid_size=(5, 6))", 4), tokens(2, 3, 4, 4)
    whole = torch.zeros(2, 5, 6, 4, dtype=torch.float64)
    whole[:, :3, :4] = x
    assert_close(mixer(x), mixer(whole)[:, :3, :4])


def test_masked_tokens_are_not_there(build, check, tokens):
    mixer = build("TokenMLP(grid_size=(4, 3))", 4)
    check(mixer, by_loop(mixer), tokens(2, 3, 3, 4), valid=torch.rand(2, 3, 3) < 0.6)


@pytest.mark.parametrize("extents", [[(4, 3), (2, 5)], [(7,), (4,)]])
def test_padding_leaves_images_alone(build, check_padding, extents):
    size = (6, 6) if len(extents[0]) == 2 else (9,)
    check_padding(build(f"TokenMLP(grid_size={size})", 4), extents, 4)


@pytest.mark.parametrize("grid", [(5, 3), (4, 4), (9, 9)])
def test_a_larger_grid_is_refused(build, tokens, grid):
    mixer = build("TokenMLP(grid_size=(4, 3))", 4)
    with pytest.raises(ValueError, match=rf"TokenMLP: x has a grid of \({grid[0]}, {grid[1]}\), .* for \(4, 3\)"):
        mixer(tokens(1, *grid, 4))


def test_arguments():
    shapes = {k: tuple(v.shape) for k, v in glocal.build("TokenMLP(grid_size=(14, 14))", 768).named_parameters()}
    assert shapes == {  # Mixer-B/16
        "fc1.weight": (384, 196),
        "fc1.bias": (384,),
        "fc2.weight": (196, 384),
        "fc2.bias": (196,),
    }
    with pytest.raises(ValueError, match=r"grid_size: 7, must name every axis, as in \(7, 7\)"):
        glocal.build("TokenMLP(grid_size=7)", 8)
    with pytest.raises(ValueError, match=r"mlp_ratio: 0\.1 of 8 channels leaves no hidden unit; give 0\.125 or more"):
        glocal.build("TokenMLP(grid_size=(7, 7), mlp_ratio=0.1)", 8)


# planted by scripts/mutate
FAULTS = (
    ("columns are numbered by the grid of x", "for n in grid], self.grid_size)[:, 0]", "for n in grid], grid)[:, 0]"),
    (
        "a smaller grid starts at its second token",
        "torch.arange(n, device=x.device)",
        "torch.arange(n, device=x.device).roll(1)",
    ),
    (
        "what reads the tokens is that of the first ones in raster order",
        "self.fc1.weight.index_select(1, here)",
        "self.fc1.weight[:, : len(here)]",
    ),
    ("padding takes part", "x = x.masked_fill(~valid[..., None], 0)", "pass"),
    ("a larger grid is taken", "if any(n > size for", "if all(n > size for"),
    ("there is no nonlinearity", "nn.functional.gelu(hidden)", "hidden"),
    (
        "the GELU is its approximation by tanh",
        "nn.functional.gelu(hidden)",
        'nn.functional.gelu(hidden, approximate="tanh")',
    ),
    ("the output has no bias", ", self.fc2.bias[here]", ""),
    ("the cost is that of the whole grid", "2 * math.prod(grid) *", "2 * math.prod(self.grid_size) *"),
)
