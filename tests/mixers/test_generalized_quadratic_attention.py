"""GeneralizedQuadraticAttention against a loop, the normal density of torch.distributions, and QuadraticAttention."""

import math
from itertools import product

import pytest
import torch
from torch.distributions import MultivariateNormal
from torch.testing import assert_close

import glocal

DIM = 4

# what the contract may hear
REFUSES = ("GeneralizedQuadraticAttention: a spread that is not diagonal",)

FAULTS = (
    ("padding is seen", "position, x, valid, queries", "position, x, None, queries"),
    ("spreads have no gradient", "spreads = self.attention_spreads\n", "spreads = self.attention_spreads.detach()\n"),
    ("axis-aligned spreads do not start around 1", "torch.ones(rank) if", "torch.zeros(rank) if"),
    ("axis-aligned spreads are one for both axes", "return spreads if", "return spreads.mean(1, True) if"),
    ("every head takes the fast path", "if self.axis_aligned or self.rank == 1:", "if True:"),
    ("no head takes the fast path", "if self.axis_aligned or self.rank == 1:", "if False:"),
    ("queries are every token", "x, valid, queries, stride=self.stride)", "x, valid, queries)"),
)


def spec_of(num_heads, rank=2, **arguments):
    options = {"num_heads": num_heads, **arguments, "rank": rank}
    return f"GeneralizedQuadraticAttention({', '.join(f'{k}={v}' for k, v in options.items())})"


def by_loop(mixer, places, stride=1):
    """Query by query and head by head, the quadratic form written out."""

    def oracle(x, valid=None):
        batch, *grid, dim = x.shape
        where = places(grid)
        images = []
        for b in range(batch):
            seen = [place for place in where if valid is None or valid[(b, *place)]]
            rows = []
            for query in product(*(range(0, n, stride) for n in grid)):
                heads = []
                for centre, spread in zip(mixer.attention_centers, mixer.attention_spreads, strict=True):
                    if not seen:
                        heads.append(torch.zeros(dim, dtype=x.dtype))
                        continue
                    square = torch.diag(spread) if spread.dim() == 1 else spread
                    precision = square @ square.T
                    apart = [torch.tensor(key).double() - torch.tensor(query) - centre for key in seen]
                    shares = torch.stack([-(d @ precision @ d) / 2 for d in apart]).softmax(0)
                    heads.append(sum(share * x[(b, *key)] for share, key in zip(shares, seen, strict=True)))
                rows.append(torch.cat(heads))
            images.append(torch.stack(rows) @ mixer.value.weight.T + mixer.value.bias)
        return torch.stack(images).view(batch, *(-(-n // stride) for n in grid), -1)

    return oracle


@pytest.mark.parametrize("axis_aligned", [False, True])
@pytest.mark.parametrize(("grid", "stride"), [((3, 4), 1), ((5, 2), 1), ((1, 3), 1), ((5, 4), 2), ((6,), 1), ((7,), 3)])
def test_is_the_loop(build, check, tokens, places, grid, stride, axis_aligned):
    mixer = build(spec_of(2, len(grid), axis_aligned=axis_aligned, stride=stride, out_dim=3), DIM)
    check(mixer, by_loop(mixer, places, stride), tokens(2, *grid, DIM), fast=axis_aligned or len(grid) == 1)


@pytest.mark.parametrize("axis_aligned", [False, True])
@pytest.mark.parametrize("stride", [1, 2])
def test_any_valid_tokens_are_taken(build, check, tokens, places, axis_aligned, stride):
    mixer = build(spec_of(2, axis_aligned=axis_aligned, stride=stride), DIM)
    valid = torch.rand(3, 3, 4) < 0.5
    valid[0] = valid[1, 1] = False
    valid[1, 0, :2] = valid[1, 2, 1:] = True
    check(mixer, by_loop(mixer, places, stride), tokens(3, 3, 4, DIM), valid=valid, fast=axis_aligned)


@pytest.mark.parametrize("rank", [1, 2])
def test_axis_aligned_heads_are_those_of_a_diagonal_matrix(build, tokens, rank):
    """By two softmaxes on one side and one over all tokens on the other, borders included."""
    narrow = build(spec_of(3, rank, axis_aligned=True, stride=2), DIM)
    full = build(spec_of(3, rank, stride=2), DIM)
    state = narrow.state_dict() | {"attention_spreads": torch.diag_embed(narrow.attention_spreads.detach())}
    full.load_state_dict(state)
    narrow.impl, full.impl = "fast", "reference"
    x = tokens(2, *(5, 8)[:rank], DIM)
    assert_close(narrow(x), full(x), rtol=1e-12, atol=1e-13)


def test_spreads_of_rows_and_columns_are_not_confused(build, tokens):
    """A head without a spread along columns looks at a whole row, which the other spread picks."""
    mixer, x = build(spec_of(1, axis_aligned=True), DIM), tokens(1, 5, 6, DIM)
    with torch.no_grad():
        mixer.attention_centers.copy_(torch.tensor([[1.0, 0.0]]))
        mixer.attention_spreads.copy_(torch.tensor([[20.0, 0.0]]))
        for mixer.impl in ("reference", "fast"):
            rows = mixer.value(x.mean(2, keepdim=True)).expand(-1, -1, 6, -1)
            assert_close(mixer(x), rows[:, [1, 2, 3, 4, 4]])


@pytest.mark.parametrize("axis_aligned", [False, True])
def test_memory(tokens, largest, axis_aligned):
    """The definition holds scores and weights; with gradients one more. The fast path holds no [heads, N, N] at all."""
    mixer = glocal.build(f"GeneralizedQuadraticAttention(num_heads=4, axis_aligned={axis_aligned})", DIM)
    x, weights = torch.randn(1, 20, 24, DIM), 4 * 4 * 480**2  # bytes
    mixer.impl = "reference"
    with largest() as found, torch.no_grad():
        mixer(x)
    assert found.peak < 2.2 * weights
    with largest() as found:
        mixer(x).sum().backward()
    assert found.peak < 3.3 * weights
    if axis_aligned:
        mixer.impl = "fast"
        with largest() as found:
            mixer(x).sum().backward()
        assert found.peak < 0.2 * weights


def test_map_is_a_normal_density(build, tokens):
    mixer = build(spec_of(3), DIM)
    weights = mixer.weights(tokens(1, 5, 7, DIM)).weights.view(3, 35, 5, 7)
    rows, columns = torch.meshgrid(torch.arange(5.0), torch.arange(7.0), indexing="ij")
    grid = torch.stack([rows, columns], -1).double()
    for weight, centre, spread in zip(weights, mixer.attention_centers, mixer.attention_spreads, strict=True):
        covariance = (spread @ spread.T).inverse()
        for i in range(35):
            density = MultivariateNormal(grid.flatten(0, 1)[i] + centre, covariance).log_prob(grid)
            assert_close(weight[i].log(), (density - density.logsumexp((0, 1))), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("turn", [0.0, 0.7])
def test_multiple_of_the_identity_is_the_isotropic_one(build, check, tokens, rank, turn):
    """And a multiple of any rotation: S S^T is the same."""
    plain = build(f"QuadraticAttention(num_heads=3, stride=2, rank={rank})", DIM)
    mixer = build(spec_of(3, rank, stride=2), DIM)
    c, s = math.cos(turn), math.sin(turn)
    rotation = torch.tensor([[c, -s], [s, c]] if rank == 2 else [[-1.0]], dtype=torch.float64)
    with torch.no_grad():
        mixer.attention_spreads.copy_(plain.attention_spreads[:, None, None] * rotation)
        mixer.attention_centers.copy_(plain.attention_centers)
        mixer.value.load_state_dict(plain.value.state_dict())
        x = tokens(2, *(5, 4)[:rank], DIM)
        assert_close(mixer(x), plain(x), rtol=1e-10, atol=1e-12)


def test_no_spread_is_the_mean_of_everything(build, tokens):
    mixer = build(spec_of(2), DIM)
    with torch.no_grad():
        mixer.attention_spreads.zero_()
    assert_close(mixer.weights(tokens(1, 4, 5, DIM)).weights, torch.full((1, 2, 20, 20), 1 / 20, dtype=torch.float64))


def test_weights_know_nothing_of_the_input(build, tokens):
    mixer = build(spec_of(3), DIM)
    one, other = (mixer.weights(x).weights for x in (tokens(2, 4, 5, DIM), tokens(3, 4, 5, DIM)))
    assert one.shape == (1, 3, 20, 20) and torch.equal(one, other)
    assert_close(one.sum(-1), torch.ones(1, 3, 20, dtype=torch.float64))


@pytest.mark.parametrize("extents", [[(4, 3), (2, 5)], [(4,), (7,)]])
def test_padding_leaves_images_alone(build, tokens, extents):
    mixer = build(spec_of(2, len(extents[0])), DIM)
    grid = [max(n) + 1 for n in zip(*extents, strict=True)]
    for extent in extents:
        inside = (slice(None), *(slice(n) for n in extent))
        x, valid = 100 * tokens(1, *grid, DIM), torch.zeros(1, *grid, dtype=torch.bool)
        valid[inside] = True
        assert_close(mixer(x, valid=valid)[inside], mixer(x[inside]))


@pytest.mark.parametrize("autocast", [False, True])
def test_bfloat16_does_not_round_distances(autocast):
    """Where every source is far from the centre, scores are large and their differences small."""
    mixer = glocal.build(spec_of(1), DIM)
    with torch.no_grad():
        mixer.attention_centers.fill_(30.25)
        mixer.attention_spreads.copy_(torch.tensor([[0.3, 0.1], [-0.2, 0.4]]))
        mixer = mixer if autocast else mixer.bfloat16()
        exact = glocal.build(spec_of(1), DIM).double()
        exact.load_state_dict(mixer.state_dict())
        x = torch.randn(1, 9, 8, DIM)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found = mixer.weights(x if autocast else x.bfloat16()).weights
    assert_close(found.double(), exact.weights(x.double()).weights, rtol=1e-3, atol=1e-6)


def test_says_when_there_is_no_fast_path(build, tokens):
    said = build(spec_of(2), DIM).unsupported(tokens(1, 3, 4, DIM))
    assert "not diagonal" in said and "axis_aligned=True" in said
    assert build(spec_of(2, axis_aligned=True), DIM).unsupported(tokens(1, 3, 4, DIM)) is None
    assert build(spec_of(2, 1), DIM).unsupported(tokens(1, 3, DIM)) is None


def test_parameters():
    mixer = glocal.build("GeneralizedQuadraticAttention()", 400)
    shapes = {k: tuple(v.shape) for k, v in mixer.named_parameters()}
    assert shapes == {
        "attention_centers": (9, 2),
        "attention_spreads": (9, 2, 2),
        "value.weight": (400, 3600),
        "value.bias": (400,),
    }
    assert sum(p.numel() for p in mixer.parameters()) == 1_440_400 + 54
    narrow = glocal.build("GeneralizedQuadraticAttention(axis_aligned=True)", 400)
    assert narrow.attention_spreads.shape == (9, 2)


def test_initial_spreads_are_about_the_identity():
    torch.manual_seed(0)
    mixer = glocal.build("GeneralizedQuadraticAttention(num_heads=4096)", 1)
    apart = mixer.attention_spreads - torch.eye(2)
    assert apart.mean(0).abs().max() < 1e-3 and apart.std().item() == pytest.approx(0.01, rel=0.05)
    assert mixer.attention_centers.std().item() == pytest.approx(2, rel=0.03)
    mixer = glocal.build("GeneralizedQuadraticAttention(num_heads=4096, axis_aligned=True)", 1)
    apart = mixer.attention_spreads - 1
    assert apart.mean(0).abs().max() < 1e-3 and apart.std().item() == pytest.approx(0.01, rel=0.05)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="axis_aligned: 'yes'"):
        glocal.build("GeneralizedQuadraticAttention(axis_aligned='yes')", 4)
