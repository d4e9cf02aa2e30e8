"""The three principles, measured, against the table of Han et al. 2022 and modules whose connections are known."""

import dataclasses

import pytest
import torch
from torch import nn

import glocal
from glocal.aggregation import aggregate
from glocal.analysis.connectivity import Connectivity, connections, connectivity, sharing
from glocal.analysis.jacobian import _columns, jacobian, prepared

FAULTS = {
    "analysis/connectivity.py": (
        ("everything is read", "found.abs().amax((0, 2, 4)) > SAME", "found.abs().amax((0, 2, 4)) >= 0"),
        ("borders count", "if bool(both.any()):", "if False:"),
        ("sources move as many steps as outputs, whatever the stride", "move = step * stride", "move = step"),
        ("windows are not looked for", "out_grid[axis] // 2 + 1", "2"),
        ("channels that only P adds are a group", "[: min(found.shape[2], found.shape[4])]", ""),
        ("products of blocks are not compared", "(y @ z - z @ y).abs().max()", "(y @ z - y @ z).abs().max()"),
        ("blocks are compared as they are, with P in them", "y, z = y @ back, z @ back", "y, z = y, z"),
        ("one axis decides what is far", "whole &= last", "whole |= last"),
        ("a single block is no mixing of channels", "if itself:", "if False:"),
        ("the picture is always of the first image", "found[[image, 1 - image]]", "found[[0, 1]]"),
        ("makers in other places are its own token", "(made & ~torch.eye", "(made & torch.eye"),
        ("makers that are not read do not count", "if (made & ~read).any() else", "if False else"),
        ("patterns are those of the weights", "_shared(read.double()[None, :, None, :, None]", "_shared(found"),
    ),
    "analysis/jacobian.py": (
        ("weights are not held still", "operator.weights(x, **operator.besides(x)) if isinstance(operator, TokenMixer) else None", "None"),  # noqa: E501
        ("the second image has the weights of the first", "held.dense(), index", "held.dense()[:1], index"),
        ("columns are of the first image only", "in held.dense().split(1):", "in held.dense()[:1].split(1):"),
        ("what is not affine is taken for it", "if not ((others.flat", "if False and not ((others.flat"),
        ("what is added to every sum stands in columns", ".flatten(1) - still for some", ".flatten(1) for some"),
        ("rows are of the first image only", "(len(some)), :, some] = 1", "(len(some)), 0, some] = 1"),
        ("no token is replaced", "images[torch.arange(m), torch.arange(m)] = other", "pass"),
        ("one image says which tokens make weights", "return made[0] | made[1]", "return made[0] & made[1]"),
        ("outputs and tokens are swapped", "seen.abs().max()).T", "seen.abs().max())"),
    ),
    "analysis/rank.py": (
        ("a rank is never low", "if pivots.min() > PIVOT", "if pivots.min() >= 0 * PIVOT"),
        ("small singular values are none", "max(matrix.shape) * EPS", "1e-3"),
        ("the channels that pass are not counted", " // channel_rank(found)", " // 1"),
        ("only what is written limits channels", "min(_rank_of_many(read), ", "max(0, "),
        ("only what is read limits channels", "(read), _rank_of_many(written))", "(read), 1 << 30)"),
        ("blocks are torn apart", "found.transpose(1, 2).flatten(2)", "found.flatten(2)"),
    ),
}  # fmt: skip

# positions, channels, shared over positions, over channels, groups, dynamic: columns of the table, at 16 channels
CASES = {
    "Convolution(kernel_size=3)": ("local", "dense", "yes", "no", None, "no"),
    "DepthwiseConv(kernel_size=3)": ("local", "separable", "yes", "no", 16, "no"),
    "DynamicDepthwiseConv(kernel_size=3)": ("local", "separable", "yes", "no", 16, "per image"),
    "InhomogeneousDepthwiseConv(kernel_size=3, num_groups=4)": (
        *("local", "separable", "no", "groups", 4, "per position"),
    ),
    "LocalMLP(window_size=4, num_heads=4)": ("local", "separable", "periodically", "groups", 4, "no"),
    "WindowAttention(window_size=4, num_heads=4)": ("local", "separable", "no", "groups", 4, "per position"),
    "NeighborhoodAttention(kernel_size=3, num_heads=2)": ("local", "separable", "no", "groups", 2, "per position"),
    "SelfAttention(num_heads=4)": ("global", "separable", "no", "groups", 4, "per position"),
    "RelativeAttention(grid_size=(8, 8), num_heads=4)": ("global", "separable", "no", "groups", 4, "per position"),
    "AveragePooling(kernel_size=3)": ("local", "separable", "yes", "all", 1, "no"),
    # of later papers
    "DynamicConv(num_heads=4)": ("local", "separable", "no", "groups", 4, "per position"),
    "LinearAttention(num_heads=4)": ("global", "separable", "no", "groups", 4, "per position"),
    "MultiScaleAttention(num_heads=4)": ("global", "dense", "no", "no", None, "per position"),  # 2C inner channels
    # pointwise; one head; stride; other axes and windows
    "Convolution(kernel_size=1)": ("itself", "dense", "yes", "no", None, "no"),
    "SelfAttention(num_heads=1)": ("global", "separable", "no", "all", 1, "per position"),
    "DepthwiseConv(kernel_size=3, stride=2)": ("local", "separable", "yes", "no", 16, "no"),
    "DepthwiseConv(kernel_size=5, rank=1)": ("local", "separable", "yes", "no", 16, "no"),
    "LocalMLP(window_size=(2, 4), num_heads=2, shift_size=1)": (
        *("local", "separable", "periodically", "groups", 2, "no"),
    ),
    "LocalMLP(window_size=5, num_heads=4, shift_size=2, rank=1)": (
        *("local", "separable", "periodically", "groups", 4, "no"),
    ),
}  # fmt: skip


def found_of(operator, **call):
    found = connectivity(operator, **call)
    return (
        *(found.positions, found.channels, found.shared_over_positions),
        *(found.shared_over_channels, found.groups, found.dynamic),
    )


@pytest.mark.parametrize("spec", CASES)
def test_operators_connect_as_the_table_says(spec):
    assert found_of(glocal.build(spec, 16)) == CASES[spec]


class MixPositions(nn.Module):
    """y = W x over positions, for each channel alike (`own`: by itself): a static matrix."""

    def __init__(self, matrix):
        super().__init__()
        self.matrix = nn.Parameter(matrix)  # [N, N] or [N, N, C]

    def forward(self, x):
        flat = x.flatten(1, -2)
        if self.matrix.dim() == 2:
            return torch.einsum("nm,bmc->bnc", self.matrix, flat).view(x.shape)
        return torch.einsum("nmc,bmc->bnc", self.matrix, flat).view(x.shape)


class Full(nn.Module):
    """Every output from every input: a linear layer over the whole image."""

    def __init__(self, tokens, dim):
        super().__init__()
        self.linear = nn.Linear(tokens * dim, tokens * dim)

    def forward(self, x):
        return self.linear(x.flatten(1)).view(x.shape)


class ChannelsFirst(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x.movedim(-1, 1)).movedim(1, -1)


class Gate(nn.Module):
    """One number for each image times a static sum over positions."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x) * x.detach().mean(tuple(range(1, x.dim())), keepdim=True)


@pytest.mark.parametrize(
    ("module", "grid", "expected"),
    [
        (nn.Linear(5, 5), (3, 4), ("itself", "dense", "yes", "no", None, "no")),
        (nn.Identity(), (3, 4), ("itself", "separable", "yes", "all", 1, "no")),
        (MixPositions(torch.rand(12, 12)), (3, 4), ("global", "separable", "no", "all", 1, "no")),  # MLP-Mixer's
        (MixPositions(torch.rand(6, 6, 5)), (6,), ("global", "separable", "no", "no", 5, "no")),
        (Full(6, 5), (6,), ("global", "dense", "no", "no", None, "no")),
        (ChannelsFirst(nn.Conv2d(5, 5, 3, padding=1)), (5, 6), ("local", "dense", "yes", "no", None, "no")),
        (ChannelsFirst(nn.Conv2d(5, 5, 3, padding=1, groups=5)), (5, 6), ("local", "separable", "yes", "no", 5, "no")),
        (ChannelsFirst(nn.Conv1d(5, 8, 3, padding=1)), (9,), ("local", "dense", "yes", "no", None, "no")),
        (ChannelsFirst(nn.AvgPool2d(2)), (6, 8), ("local", "separable", "yes", "all", 1, "no")),
        (
            Gate(ChannelsFirst(nn.Conv2d(5, 5, 3, padding=1, groups=5))),
            (5, 6),
            ("local", "separable", "yes", "no", 5, "per image"),
        ),
    ],
)
def test_modules_of_torch_connect_as_they_are_known_to(module, grid, expected):
    assert found_of(module, grid=grid, dim=5) == expected


def after(inner, layer):
    """`layer` on the channels of what an operator gives."""
    return nn.Sequential(inner, layer)


@pytest.mark.parametrize(
    ("module", "grid", "expected"),
    [  # more channels out than in: as many weights as before
        (
            after(glocal.build("DepthwiseConv(kernel_size=3)", 4), nn.Linear(4, 8)),
            (5, 6),
            ("local", "separable", "yes", "no", 4, "no"),
        ),
        (
            after(glocal.build("AveragePooling(kernel_size=3)", 4), nn.Linear(4, 8)),
            (5, 6),
            ("local", "separable", "yes", "all", 1, "no"),
        ),
        (glocal.build("DepthwiseConv(kernel_size=3)", 4), (1, 6), ("local", "separable", "yes", "no", 4, "no")),
        # too short to see a window repeat
        (
            glocal.build("LocalMLP(window_size=5, num_heads=2, rank=1)", 4),
            (6,),
            ("local", "separable", "no", "groups", 2, "no"),
        ),
    ],
)
def test_grids_and_channels_of_other_shapes(module, grid, expected):
    assert found_of(module, grid=grid, dim=4) == expected


class Axes(nn.Module):
    """The mean of a row plus that of a column."""

    def forward(self, x):
        return x.mean(1, keepdim=True) + x.mean(2, keepdim=True)


def test_far_and_few_is_sparse():
    found = connectivity(Axes(), (6, 7), dim=4)
    assert (found.positions, found.reads, found.num_positions) == ("sparse", 12, 42)


def test_the_jacobian_of_a_convolution_is_its_kernel():
    conv = glocal.build("DepthwiseConv(kernel_size=3)", 4)
    before = {k: v.clone() for k, v in conv.state_dict().items()}
    draws = torch.get_rng_state()
    found = jacobian(conv, (5, 6))
    assert found.shape == (2, 30, 4, 30, 4) and torch.equal(found[0], found[1])
    assert all(torch.equal(v, before[k]) for k, v in conv.state_dict().items())  # a copy is measured
    assert torch.equal(torch.get_rng_state(), draws)
    centre = found[0, 2 * 6 + 3].unflatten(1, (5, 6))  # [E, 5, 6, C] of the output at (2, 3)
    same = torch.stack([centre[c, 1:4, 2:5, c] for c in range(4)])
    assert (same - conv.weight[:, 0]).abs().max() < 0.6  # the noise, 0.1 of a normal deviate
    assert same.abs().min() > 0 and (centre != 0).sum() == 4 * 9


def test_the_jacobian_of_attention_holds_its_weights_still():
    """Rows of A sum to 1, so that a constant image is sent to P V x + b: not so with the path through A."""
    mixer = glocal.build("SelfAttention(num_heads=2)", 8)
    found = jacobian(mixer, (5,))
    total = found.sum(3)  # [2, N, E, C]
    assert torch.allclose(total, total[:1, :1].expand_as(total))
    assert not torch.allclose(found[0], found[1])


def test_text_is_one_line():
    assert str(connectivity(glocal.build("LocalMLP(window_size=4, num_heads=4, rank=1)", 16))) == (
        "local (4 of 16 positions), channels separable, weights repeated over positions, "
        "own for each of 4 groups of channels, static"
    )
    assert str(connectivity(nn.Linear(4, 4), (3,), dim=4)) == (
        "itself (1 of 3 positions), channels dense, weights shared by all positions, "
        "own for each pair of channels, static, by the whole Jacobian"
    )


# which tokens make the weights, at most how many, rank over positions and channels, channel matrices; by hand
OTHERS = {
    "DepthwiseConv(kernel_size=3)": ("nothing", 0, 64, 16, 9),  # one matrix for each offset: fewer than channels
    "Convolution(kernel_size=3)": ("nothing", 0, 64, 16, 9),
    "SelfAttention(num_heads=4)": ("what it reads", 64, 64, 16, 4),
    "WindowAttention(window_size=4, num_heads=4)": ("what it reads", 16, 64, 16, 4),
    "NeighborhoodAttention(kernel_size=3, num_heads=2)": ("what it reads", 9, 64, 16, 2),
    "Involution(kernel_size=3, group_channels=8)": ("itself", 1, 64, 16, 2),
    "DynamicDepthwiseConv(kernel_size=3)": ("more than it reads", 64, 64, 16, 9),
    "OutlookAttention(kernel_size=3, num_heads=4)": ("some of what it reads", 9, 64, 16, 4),
    "MaxPooling()": ("more than it reads", 9, None, 16, 16),
    "LinearAttention(num_heads=4)": ("what it reads", 64, 4, 16, 4),  # four numbers between queries and keys
    "SpatialReductionAttention(num_heads=4, sr_ratio=2)": ("what it reads", 64, 15, 16, 256),
}


@pytest.mark.parametrize("spec", OTHERS)
def test_what_makes_the_weights_and_how_much_passes(spec):
    torch.manual_seed(0)
    found = connectivity(glocal.build(spec, 16))
    made_by, makers, positions, channels, matrices = OTHERS[spec]
    assert (found.made_by, found.makers) == (made_by, makers)
    assert found.rank_positions == positions or (positions is None and found.low_rank_positions)
    assert (found.rank_channels, found.matrices) == (channels, matrices)
    assert found.low_rank_positions == (found.rank_positions < 64) and not found.low_rank_channels


@pytest.mark.parametrize(
    ("module", "grid", "ranks"),
    [  # rank over positions and channels, channel matrices
        (Full(6, 5), (6,), (6, 5, 25)),
        (MixPositions(torch.rand(12, 2) @ torch.rand(2, 12)), (3, 4), (12, 5, 1)),  # noise is added to the matrix
        (nn.Sequential(nn.Linear(5, 2), nn.Linear(2, 5)), (6,), (6, 2, 1)),
        (after(glocal.build("DepthwiseConv(kernel_size=3)", 5), nn.Linear(5, 2)), (5, 6), (30, 2, 5)),
        (ChannelsFirst(nn.AvgPool1d(2)), (8,), (4, 5, 1)),
        (Axes(), (6, 7), (12, 5, 1)),
    ],
)
def test_ranks_of_modules_whose_rank_is_known(module, grid, ranks):
    found = connectivity(module, grid, dim=5)
    assert (found.rank_positions, found.rank_channels, found.matrices) == ranks
    assert found.all_matrices == isinstance(module, Full)
    assert found.low_rank_channels == (found.rank_channels < found.num_channels)


@pytest.mark.parametrize(
    ("spec", "pattern"),
    [
        ("NeighborhoodAttention(kernel_size=3, num_heads=2)", "yes"),
        ("Involution(kernel_size=3, group_channels=8)", "yes"),
        ("WindowAttention(window_size=4, num_heads=4)", "periodically"),
        ("SelfAttention(num_heads=4)", "yes"),
    ],
)
def test_what_is_read_has_a_pattern_of_its_own(spec, pattern):
    assert connectivity(glocal.build(spec, 16)).pattern_over_positions == pattern


def test_weights_that_an_ordinary_module_makes_are_found_in_its_jacobian():
    class Gated(nn.Module):
        """A mean of three neighbours times the token to the right."""

        def forward(self, x):
            mean = nn.functional.avg_pool1d(x.movedim(-1, 1), 3, 1, 1).movedim(1, -1)
            return mean.detach() * 0 + mean * x.roll(-1, 1)

    found = connectivity(Gated(), (8,), dim=2)
    # the factor makes the weights of the mean; the mean makes that of the factor: all three and the one to the right
    assert (found.made_by, found.makers) == ("what it reads", 3)


def test_a_module_that_does_not_say_its_channels_is_refused():
    with pytest.raises(ValueError, match="dim: GELU does not say its channels; give dim"):
        connectivity(nn.GELU())
    assert isinstance(connectivity(nn.GELU(), (3,), dim=2), Connectivity)


def test_connections_of_a_picture():
    conv = ChannelsFirst(nn.Conv2d(4, 4, (1, 3), padding=(0, 1), groups=4)).double()
    with torch.no_grad():
        positions, channels = (torch.tensor(t, dtype=torch.float64) for t in connections(conv, (3, 6), dim=4))
    assert positions.shape == (6, 6) and channels.shape == (4, 4)
    near = (torch.arange(6)[:, None] - torch.arange(6)).abs() <= 1
    assert torch.equal(positions > 0, near) and torch.equal(channels > 0, torch.eye(4, dtype=torch.bool))
    for offset in (-1, 0, 1):  # one weight each
        assert torch.allclose(*[positions.diagonal(offset)[i:][:4] for i in (0, 1)])
    along_columns = ChannelsFirst(nn.Conv2d(4, 4, (3, 1), padding=(1, 0)))
    positions = torch.tensor(connections(along_columns, (3, 6), dim=4)[0])
    assert torch.equal(positions > 0, torch.eye(6, dtype=torch.bool))
    positions, channels = connections(glocal.build("SelfAttention(num_heads=2)", 4), dim=4)
    assert len(positions) == 8 and min(map(min, positions)) > 0
    own = torch.tensor(channels).diagonal()  # projections undone: every channel with itself, and a weight for each head
    assert torch.equal(torch.tensor(channels), torch.diag_embed(own)) and own[0] == own[1] != own[2] == own[3]
    dense = torch.tensor(connections(glocal.build("Convolution(kernel_size=3)", 4), (3, 6))[1])
    assert (dense > 0).all()
    alone = torch.tensor(connections(glocal.build("Convolution(kernel_size=1)", 4), (3, 6))[1])
    assert (alone > 0).all()  # one position: nothing tells a projection from the operator


@pytest.mark.parametrize(
    ("spec", "affine"),
    [
        ("SelfAttention(num_heads=2)", True),
        ("Convolution(kernel_size=3, stride=2)", True),
        ("MaxPooling(kernel_size=3)", True),
        ("CrossAttention(num_heads=2)", True),
        ("QuadraticAttention(num_heads=2)", True),
        ("SpatialReductionAttention(num_heads=2, sr_ratio=2)", False),  # norms what it pools
    ],
)
def test_the_jacobian_is_torchs(spec, affine):
    """By forward passes alone where that is enough, else by backward ones: each image with its own weights."""
    run = prepared(glocal.build(spec, 8), (3, 4))
    assert (_columns(run.operator, run.held, run.x) is not None) == affine
    found, dense = run.jacobian(), run.held.dense()
    for image, x in enumerate(run.x):
        own = dataclasses.replace(run.held, weights=dense[min(image, len(dense) - 1)][None], index=None)

        def call(x, own=own):
            return run.operator.project(aggregate(own, run.operator.values(x[None])))[0]

        expected = torch.autograd.functional.jacobian(call, x).flatten(2, 3)
        assert (found[image] - expected).abs().max() <= 1e-14 * expected.abs().max()


def test_what_the_table_shows_is_what_all_shows():
    for spec in ("SelfAttention(num_heads=2)", "LSTM()"):
        operator = glocal.build(spec, 8)
        whole = vars(connectivity(operator, (6,)))
        short = vars(sharing(operator, (6,)))
        assert short == {name: whole[name] for name in short} and len(whole) == len(short) + 9
