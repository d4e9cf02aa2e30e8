"""LocalMLP against a loop over windows, queries and sources."""

import pytest
import torch

import glocal


def oracle_of(mixer, window, heads, shift=0, projection=True):
    """A window starts at every shift + m * window; an axis no longer than the window is not shifted."""

    def linear(layer, x):
        return x @ layer.weight.T + layer.bias if projection else x

    def oracle(x, valid=None):
        batch, *grid, dim = x.shape
        values = linear(getattr(mixer, "v", None), x)
        if valid is not None:
            values = values * valid.unsqueeze(-1)
        windows = {}  # window -> (place in the grid, place in the window) of its tokens
        for index in torch.cartesian_prod(*map(torch.arange, grid)).view(-1, len(grid)).tolist():
            shifted = [i - (shift if n > window else 0) for i, n in zip(index, grid, strict=True)]
            inside = 0
            for s in shifted:
                inside = inside * window + s % window
            windows.setdefault(tuple(s // window for s in shifted), []).append((tuple(index), inside))
        mixed = torch.zeros(batch, *grid, heads, dim // heads, dtype=x.dtype)
        for members in windows.values():
            for query, row in members:
                for source, column in members:
                    value = values[(slice(None), *source)].view(batch, heads, -1)
                    part = torch.zeros_like(mixed)
                    entry = (row, column)
                    if mixer.shared_positions:  # both in one window, so that places differ as tokens do
                        entry = tuple(q - s + window - 1 for q, s in zip(query, source, strict=True))
                    weight = mixer.weight[(slice(None), *entry)]
                    part[(slice(None), *query)] = weight[:, None] * value
                    mixed = mixed + part
        return linear(getattr(mixer, "proj", None), mixed.flatten(-2))

    return oracle


CASES = [  # arguments, window, grid; 8 channels in 2 heads
    ({}, 2, (4, 4)),
    ({}, 3, (5, 4)),
    ({}, 3, (2, 7)),
    ({}, 4, (3, 2)),
    ({"shift_size": 1}, 2, (4, 5)),
    ({"shift_size": 1}, 3, (6, 3)),
    ({"shift_size": 2}, 3, (4, 5)),
    ({"shift_size": 2}, 4, (1, 6)),
    ({"projection": False}, 3, (4, 5)),
    ({"projection": False, "shift_size": 1}, 2, (3, 5)),
    ({"rank": 1}, 4, (10,)),
    ({"rank": 1, "shift_size": 2, "projection": False}, 3, (8,)),
    ({"shared_positions": True}, 3, (5, 4)),
    ({"shared_positions": True, "shift_size": 1, "projection": False}, 2, (3, 5)),
    ({"shared_positions": True, "rank": 1}, 4, (10,)),
]


def spec_of(window, arguments):
    return f"LocalMLP(window_size={window}, num_heads=2{''.join(f', {k}={v}' for k, v in arguments.items())})"


@pytest.mark.parametrize(("arguments", "window", "grid"), CASES)
def test_is_a_static_sum_inside_each_window(build, check, tokens, arguments, window, grid):
    mixer = build(spec_of(window, arguments), 8)
    shift, projection = arguments.get("shift_size", 0), arguments.get("projection", True)
    check(mixer, oracle_of(mixer, window, 2, shift, projection), tokens(2, *grid, 8))


@pytest.mark.parametrize(
    ("arguments", "window", "extents"),
    [
        ({}, 3, [(4, 5), (2, 6)]),
        ({"shift_size": 1}, 3, [(4, 5), (3, 7)]),
        ({"shift_size": 2, "projection": False}, 4, [(5, 4), (2, 6)]),
        ({"rank": 1, "shift_size": 1}, 2, [(5,), (2,)]),
        ({"shared_positions": True, "shift_size": 1}, 3, [(4, 5), (3, 7)]),
    ],
)
def test_padding_leaves_images_alone(build, check_padding, arguments, window, extents):
    check_padding(build(spec_of(window, arguments), 8), extents, 8)


def test_parameters():
    def shapes(spec, dim):
        return {k: tuple(v.shape) for k, v in glocal.build(spec, dim).named_parameters()}

    square = {"v.weight": (64, 64), "v.bias": (64,), "proj.weight": (64, 64), "proj.bias": (64,)}
    assert shapes("LocalMLP()", 64) == {"weight": (2, 49, 49), **square}
    assert shapes("LocalMLP(window_size=4, head_dim=2, projection=False)", 8) == {"weight": (4, 16, 16)}
    assert shapes("LocalMLP(window_size=4, num_heads=4, projection=False, rank=1)", 8) == {"weight": (4, 4, 4)}


def test_shared_positions_are_a_convolution_of_each_window(build, tokens):
    """Whose zeros stand around the window; an oblong one."""
    mixer = build("LocalMLP(window_size=(2, 4), num_heads=2, shared_positions=True, projection=False)", 6)
    assert mixer.weight.shape == (2, 3, 7)
    x = tokens(3, 2, 4, 6)
    kernels = mixer.weight.flip(1, 2).repeat_interleave(3, 0)[:, None]
    expected = torch.nn.functional.conv2d(x.movedim(-1, 1), kernels, padding=(1, 3), groups=6).movedim(1, -1)
    torch.testing.assert_close(mixer(x), expected)


def test_weights_do_not_depend_on_the_image(build, tokens):
    weights = build("LocalMLP(window_size=4, num_heads=2)", 16).weights(tokens(2, 8, 8, 16))
    assert weights.weights.shape == (1, 2, 64, 16)


# planted by scripts/mutate
FAULTS = (
    (
        "query and source are exchanged in the definition",
        "self._matrices()[:, place].transpose(0, 1)",
        "self._matrices().mT[:, place].transpose(0, 1)",
    ),
    ("query and source are exchanged in the fast path", '"gqk,bwkgd->bwqgd"', '"gkq,bwkgd->bwqgd"'),
    (
        "empty places of a window hold the first token",
        "v = pick_or_zero(values, sources)",
        "v = pick(values, sources.clamp(min=0))",
    ),
    (
        "windows of a padded image are cut by the batch's size",
        "self.shift_size, valid, x.device)",
        "self.shift_size, None, x.device)",
    ),
    (
        "all heads mix places as the first one does",
        "self._matrices().to(v.dtype), v)",
        "self._matrices()[:1].expand_as(self._matrices()).to(v.dtype), v)",
    ),
    (
        "offsets count from the query to the source",
        "relative_index(self._window, device=self.weight.device)]",
        "relative_index(self._window, device=self.weight.device).mT]",
    ),
    (
        "the first length of a window is taken for that of the columns",
        'self._window = per_axis("window_size", window_size, rank)',
        'self._window = per_axis("window_size", window_size, rank)[::-1]',
    ),
)
