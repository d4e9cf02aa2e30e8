"""QuadraticAttention against a loop, the paper's quadratic encoding, and torch's convolutions, which it expresses."""

import math
from itertools import product

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import glocal

DIM = 4
ALPHA = 46.0  # spread^2 / 2: what lies a token beside the centre has a weight of e^-46, below float64's rounding

FAULTS = {
    "mixers/quadratic_attention.py": (
        ("the definition sees padding", "position, x, valid, queries", "position, x, None, queries"),
        ("spreads have no gradient", "return self.attention_spreads[", "return self.attention_spreads.detach()["),
        ("spreads start around 0", "nn.Parameter(1 + SPREAD_STD", "nn.Parameter(SPREAD_STD"),
        ("queries are every token", "x, valid, queries, stride=self.stride)", "x, valid, queries)"),
    ),
    ("mixers/_positional.py", "mixers/test_quadratic_attention.py", "mixers/test_gated_positional_attention.py"): (
        ("rows of sources share one mask", "valid[:, None, :, None]", "valid.any(1)[:, None, None, None]"),
        (
            "rows of sources count the same, however much they hold",
            "(rows[:, None] + of_row)",
            "(rows[:, None] + 0 * of_row)",
        ),
        ("a row's sum counts what is not valid", "in_row.logsumexp", "columns[:, None].expand_as(in_row).logsumexp"),
        ("sequences see padding", "None if valid is None else valid[:, None, None])", "None)"),
        (
            "axes change places where everything is valid",
            "separable_sum(rows.softmax(-1), columns.softmax(-1), values)",
            "separable_sum(columns.softmax(-1), rows.softmax(-1), values.transpose(1, 2))",
        ),
        ("what is not valid has a weight", "in_row.softmax(-1)", "columns[:, None].expand_as(in_row).softmax(-1)"),
    ),
    ("mixers/_quadratic.py", "mixers/test_quadratic_attention.py", "mixers/test_generalized_quadratic_attention.py"): (
        (
            "autocast rounds distances",
            "(from_centre[..., None] * spreads).sum(-2)",
            "(from_centre.unsqueeze(-2) @ spreads).squeeze(-2)",
        ),
        (
            "the precision is S^T S",
            "(from_centre[..., None] * spreads).sum(-2)",
            "(from_centre[..., None, :] * spreads).sum(-1)",
        ),
        ("the centre's sign is flipped in the definition", "offset - precise(", "offset + precise("),
        (
            "the centre's sign is flipped on the fast path",
            "stride=self.stride) - centres[",
            "stride=self.stride) + centres[",
        ),
        ("the half is missing in the definition", "-0.5 * scaled.square()", "-scaled.square()"),
        ("the distance is not squared", "scaled.square().sum(-1)", "scaled.abs().sum(-1)"),
        ("the spread is not squared on the fast path", "* from_centre).square())", "* from_centre.square()))"),
        (
            "rows and columns of centres are swapped on the fast path",
            "centres[:, axis, None, None]",
            "centres[:, -1 - axis, None, None]",
        ),
        (
            "rows and columns of spreads are swapped on the fast path",
            "spreads[:, axis, None, None]",
            "spreads[:, -1 - axis, None, None]",
        ),
        (
            "the fast path's queries are the first tokens, not every stride-th",
            "axis_offsets(n, x.device, stride=self.stride)",
            "axis_offsets(n, x.device)[: (n + self.stride - 1) // self.stride]",
        ),
        ("the fast path sees padding", "scores, values, grid, valid", "scores, values, grid, None"),
        (
            "centres have no gradient on the fast path",
            "x.shape[1:-1], precise(self.attention_centers)",
            "x.shape[1:-1], precise(self.attention_centers.detach())",
        ),
        ("the table is read one entry early", "last_query(grid[axis], stride)", "last_query(grid[axis], stride) - 1"),
        ("offsets are query minus source", "return torch.arange(-last", "return -torch.arange(-last"),
        (
            "the definition's queries are the first tokens, not every stride-th",
            "table.device, stride=stride)",
            "table.device)",
        ),
        ("queries go column by column", "in reversed(range(len(grid))):", "in range(len(grid)):"),
    ),
}


def spec_of(num_heads, rank=2, **arguments):
    options = {"num_heads": num_heads, **arguments, "rank": rank}
    return f"QuadraticAttention({', '.join(f'{k}={v}' for k, v in options.items())})"


def by_loop(mixer, places, stride=1):
    """Query by query and head by head, with the score as the paper writes it."""

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
                    scores = []
                    for key in seen:
                        apart = [(k - q - c) ** 2 for k, q, c in zip(key, query, centre, strict=True)]
                        scores.append(-(spread**2) / 2 * sum(apart))
                    shares = torch.stack(scores).softmax(0)
                    heads.append(sum(share * x[(b, *key)] for share, key in zip(shares, seen, strict=True)))
                rows.append(torch.cat(heads))
            images.append(torch.stack(rows) @ mixer.value.weight.T + mixer.value.bias)
        return torch.stack(images).view(batch, *(-(-n // stride) for n in grid), -1)

    return oracle


SIZES = [((3, 4), 1), ((5, 2), 1), ((1, 4), 1), ((5, 4), 2), ((3, 7), 3), ((6,), 1), ((7,), 2), ((1,), 1)]


@pytest.mark.parametrize(("grid", "stride"), SIZES)
def test_is_the_loop(build, check, tokens, places, grid, stride):
    mixer = build(spec_of(2, len(grid), stride=stride, out_dim=3), DIM)
    check(mixer, by_loop(mixer, places, stride), tokens(2, *grid, DIM))


@pytest.mark.parametrize(("grid", "stride"), [((3, 4), 1), ((5, 4), 2), ((5,), 2)])
def test_any_valid_tokens_are_taken(build, check, tokens, places, grid, stride):
    mixer = build(spec_of(2, len(grid), stride=stride), DIM)
    valid = torch.rand(3, *grid) < 0.5
    valid[0] = False
    valid[1, 0] = valid[1, 2] = False  # rows without any, and between them some
    valid[1, 1] = valid[2, 0] = True
    if len(grid) == 2:
        valid[2, 0, 1] = False  # no rectangle
    check(mixer, by_loop(mixer, places, stride), tokens(3, *grid, DIM), valid=valid)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_valid_sources_far_from_the_centre_keep_their_weights(dtype, build, tokens):
    """e^-alpha of the distance is 0 in both types; what matters is who of the far sources is nearest."""
    mixer = build(spec_of(1), DIM).to(dtype)
    with torch.no_grad():
        mixer.attention_centers.copy_(torch.tensor([[9.0, 9.0]]))
        mixer.attention_spreads.fill_(math.sqrt(2 * ALPHA))
        x = tokens(1, 12, 12, DIM).to(dtype)
        valid = torch.zeros(1, 12, 12, dtype=torch.bool)
        valid[0, 0, 0] = valid[0, 1, 3] = valid[0, 2, 2] = True
        mixer.impl = "fast"
        out = mixer(x, valid=valid)[0, 0, 0]  # (2, 2) is at 98, (1, 3) at 100, (0, 0) at 162 from (9, 9)
    assert_close(out, mixer.value(x[0, 2, 2]))


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("extents", [[(4, 3), (2, 5)], [(1, 1), (3, 4)], [(4,), (7,)]])
def test_padding_leaves_images_alone(build, check_padding, extents, stride):
    check_padding(build(spec_of(2, len(extents[0]), stride=stride), DIM), extents, DIM)


def test_the_fast_path_compiles_with_any_mask(build, tokens):
    mixer = build(spec_of(2), DIM)
    mixer.impl = "fast"
    x, valid = tokens(2, 3, 4, DIM), torch.rand(2, 3, 4) < 0.5
    compiled = torch.compile(mixer, backend="eager", fullgraph=True)
    assert_close(compiled(x, valid=valid), mixer.reference(x, valid=valid))


@pytest.mark.parametrize("grid", [(4, 5), (3, 3)])
def test_is_the_papers_quadratic_encoding(build, check, tokens, grid):
    """Equation 9: v = -alpha (1, -2 D1, -2 D2), r = (|d|^2, d1, d2); the constant falls out of the softmax."""
    mixer = build(spec_of(3), DIM)

    def oracle(x):
        d1 = torch.arange(grid[0]) - torch.arange(grid[0])[:, None]
        d2 = torch.arange(grid[1]) - torch.arange(grid[1])[:, None]
        d1, d2 = (d.double() for d in torch.broadcast_tensors(d1[:, None, :, None], d2[None, :, None]))
        r = torch.stack([d1**2 + d2**2, d1, d2], -1)  # [query row, column, key row, column, 3]
        alpha, centre = mixer.attention_spreads**2 / 2, mixer.attention_centers
        v = -alpha[:, None] * torch.stack([torch.ones(3), -2 * centre[:, 0], -2 * centre[:, 1]], -1)
        weights = (r @ v.T).flatten(2, 3).softmax(2)
        mixed = torch.einsum("ijmh,bmc->bijhc", weights, x.flatten(1, 2))
        return mixer.value(mixed.flatten(-2))

    check(mixer, oracle, tokens(2, *grid, DIM))


def as_convolution(build, weight, bias, dilation=1, stride=1):
    """One head on each offset of the kernel [out, in, *kernel]; `value` holds the kernel's matrices."""
    out, dim, *kernel = weight.shape
    mixer = build(spec_of(math.prod(kernel), len(kernel), out_dim=out, stride=stride), dim)
    centres = product(*([dilation * (k - size // 2) for k in range(size)] for size in kernel))
    with torch.no_grad():
        mixer.attention_centers.copy_(torch.tensor(list(centres)))
        mixer.attention_spreads.fill_(math.sqrt(2 * ALPHA))
        mixer.value.weight.copy_(weight.flatten(2).transpose(1, 2).flatten(1))
        mixer.value.bias.copy_(bias)
    return mixer


CONVOLUTIONS = [  # kernel, dilation, stride
    ((1, 1), 1, 1),
    ((3, 3), 1, 1),
    ((5, 5), 1, 1),
    ((3, 5), 1, 1),
    ((3, 3), 2, 1),
    ((3, 3), 1, 2),
    ((5,), 1, 1),
    ((3,), 2, 2),
]


@pytest.mark.parametrize("impl", ["reference", "fast"])
@pytest.mark.parametrize(("kernel", "dilation", "stride"), CONVOLUTIONS)
def test_is_a_convolution(build, tokens, kernel, dilation, stride, impl):
    """Inside, and everywhere once the input is padded with zeros and the output cropped."""
    rank, grid = len(kernel), (11, 12)[: len(kernel)]
    weight, bias = torch.randn(6, DIM, *kernel, dtype=torch.float64), torch.randn(6, dtype=torch.float64)
    mixer = as_convolution(build, weight, bias, dilation, stride)
    mixer.impl = impl
    x = tokens(2, *grid, DIM)
    reach = [dilation * (k // 2) for k in kernel]
    convolve = (F.conv1d, F.conv2d)[rank - 1]
    same = convolve(x.movedim(-1, 1), weight, bias, stride, reach, dilation).movedim(1, -1)

    with torch.no_grad():
        got = mixer(x)
        first, last = (
            [-(-p // stride) for p in reach],
            [(n - 1 - p) // stride for n, p in zip(grid, reach, strict=True)],
        )
        inside = (slice(None), *(slice(f, end + 1) for f, end in zip(first, last, strict=True)))
        assert got.shape == same.shape and got[inside].numel()
        assert (got - same)[inside].abs().max() < 1e-10
        if max(reach):
            assert (got - same).abs().max() > 0.1  # at the border a softmax has no zeros to read

        front = [f * stride for f in first]  # so that the first query stays one
        sides = [n for pair in zip(front, reach, strict=True) for n in reversed(pair)]
        out = mixer(F.pad(x, [0, 0, *reversed(sides)]))
        crop = (slice(None), *(slice(f, f + n) for f, n in zip(first, same.shape[1:-1], strict=True)))
        assert (out[crop] - same).abs().max() < 1e-10


@pytest.mark.parametrize("impl", ["reference", "fast"])
@pytest.mark.parametrize("grid", [(4, 5), (6,)])
def test_no_spread_is_the_mean_of_everything(build, tokens, grid, impl):
    mixer = build(spec_of(2, len(grid)), DIM)
    mixer.impl = impl
    with torch.no_grad():
        mixer.attention_spreads.zero_()
    x = tokens(2, *grid, DIM)
    expected = mixer.value(x.flatten(1, -2).mean(1).repeat(1, 2))
    assert_close(mixer(x), expected.view(2, *[1] * len(grid), DIM).expand_as(x))
    n = math.prod(grid)
    assert_close(mixer.weights(x).weights, torch.full((1, 2, n, n), 1 / n, dtype=torch.float64))


def test_weights_know_nothing_of_the_input(build, tokens):
    mixer = build(spec_of(3), 16)
    one, other = (mixer.weights(x).weights for x in (tokens(2, 8, 8, 16), tokens(5, 8, 8, 16)))
    assert one.shape == (1, 3, 64, 64) and torch.equal(one, other)
    assert_close(one.sum(-1), torch.ones(1, 3, 64, dtype=torch.float64))


def test_positions_are_in_tokens_of_the_output(build, tokens):
    found = build(spec_of(1, stride=2), DIM).weights(tokens(1, 3, 5, DIM))
    assert found.query_positions.tolist() == [[i, j] for i in range(2) for j in range(3)]
    assert found.source_positions.tolist() == [[i / 2, j / 2] for i in range(3) for j in range(5)]


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_bfloat16_does_not_round_distances(tokens, impl):
    """Where every source is far from the centre, scores are large and their differences small."""
    mixer = glocal.build(spec_of(1, 1), DIM).bfloat16()
    mixer.impl = impl
    with torch.no_grad():
        mixer.attention_centers.fill_(30.25)
        mixer.attention_spreads.fill_(0.3)
        x = tokens(2, 40, DIM).bfloat16()
        exact = glocal.build(spec_of(1, 1), DIM).double()
        exact.load_state_dict(mixer.state_dict())
        expected = exact(x.double())
        assert (mixer(x).double() - expected).abs().max() < 0.01 * expected.abs().max()
        assert_close(mixer.weights(x).weights.double(), exact.weights(x.double()).weights, rtol=1e-5, atol=1e-7)


def test_map_is_symmetric_about_its_centre(build, tokens):
    mixer = build(spec_of(1), DIM)
    with torch.no_grad():
        mixer.attention_centers.copy_(torch.tensor([[1.0, -2.0]]))
    of_query = mixer.weights(tokens(1, 7, 9, DIM)).weights.view(7, 9, 7, 9)[2, 6]  # looks at (3, 4), the middle
    assert of_query.argmax() == 3 * 9 + 4
    assert_close(of_query, of_query.flip(0, 1))
    square = of_query[:, 1:8]
    assert_close(square, square.T)  # isotropic: a quarter turn changes nothing
    assert_close(square, square.rot90())


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_moves_with_the_input_away_from_borders(build, tokens, impl):
    """A weight d tokens from the centre is at most exp(-alpha d^2): cut off is what lies beyond the border."""
    mixer = build(spec_of(4), DIM)
    mixer.impl = impl
    alpha, margin = 2.0, 6
    with torch.no_grad():
        mixer.attention_centers.copy_(torch.tensor([[0.0, 0.0], [1.0, -1.0], [0.5, 1.5], [-1.7, 0.3]]))
        mixer.attention_spreads.fill_(math.sqrt(2 * alpha))
        x = tokens(1, 18, 20, DIM)
        moved = mixer(x.roll((2, 3), (1, 2)))
        apart = (moved - mixer(x).roll((2, 3), (1, 2)))[:, margin + 2 : -margin, margin + 3 : -margin]
    cut_off = margin - 1.7  # tokens from the farthest centre to the nearest border
    assert apart.abs().max() < 1e3 * math.exp(-alpha * cut_off**2) + 1e-13


@pytest.mark.parametrize("masked", [False, True])
def test_fast_path_never_forms_the_matrix(build, tokens, largest, masked):
    mixer = build(spec_of(2), DIM)
    x, n = tokens(1, 20, 24, DIM), 20 * 24
    call = {"valid": torch.rand(1, 20, 24) < 0.5} if masked else {}
    entries = {}
    for mixer.impl in ("fast", "reference"):
        with largest() as found, torch.no_grad():
            mixer(x, **call)
        entries[mixer.impl] = found.entries
    assert entries["fast"] <= 2 * n * (24 if masked else DIM) and entries["reference"] >= 2 * n * n


def test_parameters():
    mixer = glocal.build("QuadraticAttention()", 400)
    shapes = {k: tuple(v.shape) for k, v in mixer.named_parameters()}
    assert shapes == {
        "attention_centers": (9, 2),
        "attention_spreads": (9,),
        "value.weight": (400, 3600),
        "value.bias": (400,),
    }
    count = {k: sum(p.numel() for n, p in mixer.named_parameters() if n.startswith(k)) for k in ("value", "attention")}
    assert count == {"value": 1_440_400, "attention": 27}


def test_initial_centres_and_spreads():
    torch.manual_seed(0)
    mixer = glocal.build("QuadraticAttention(num_heads=4096)", 1)
    assert mixer.attention_centers.std().item() == pytest.approx(2, rel=0.03)
    assert mixer.attention_spreads.mean().item() == pytest.approx(1, abs=1e-3)
    assert mixer.attention_spreads.std().item() == pytest.approx(0.01, rel=0.05)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="num_heads: 0"):
        glocal.build("QuadraticAttention(num_heads=0)", 4)
    with pytest.raises(ValueError, match="stride: -1"):
        glocal.build("QuadraticAttention(stride=-1)", 4)
