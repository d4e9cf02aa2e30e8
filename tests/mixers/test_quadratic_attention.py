"""QuadraticAttention against a loop, the paper's quadratic encoding, and torch's convolutions, which it expresses."""

import math
from itertools import product

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close
from torch.utils._python_dispatch import TorchDispatchMode

import glocal

DIM = 4
ALPHA = 46.0  # spread^2 / 2: what lies a token beside the centre has a weight of e^-46, below float64's rounding

FAULTS = (
    (
        "the centre's sign is flipped in the definition",
        "offset - precise(self.attention_centers)[:, None, None]",
        "offset + precise(self.attention_centers)[:, None, None]",
    ),
    (
        "rows and columns are swapped on the fast path",
        "centres[:, axis, None, None]",
        "centres[:, -1 - axis, None, None]",
    ),
    ("the half is missing", "return -0.5 * precise", "return -precise"),
    ("the spread is not squared", "(self.attention_spreads).square()[", "(self.attention_spreads)["),
    ("the definition sees padding", "position, x, valid, queries", "position, x, None, queries"),
    ("the fast path sees padding", "scores, values, grid, valid", "scores, values, grid, None"),
    (
        "the fast path's queries are the first tokens, not every stride-th",
        "axis_offsets(n, x.device, stride=self.stride)",
        "axis_offsets(n, x.device)[: (n + self.stride - 1) // self.stride]",
    ),
    (
        "the definition measures in tokens of the output",
        "offsets(x, queries, stride=self.stride)",
        "offsets(x, queries, stride=self.stride) / self.stride",
    ),
    ("every mask counts as a rectangle", "return no_product(valid)", "return None"),
    (
        "centres have no gradient on the fast path",
        "x.shape[1:-1], precise(self.attention_centers)",
        "x.shape[1:-1], precise(self.attention_centers.detach())",
    ),
)


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


@pytest.mark.parametrize(("grid", "stride"), [((3, 4), 1), ((5, 4), 2)])
def test_any_valid_tokens_are_taken_by_the_definition(build, check, tokens, places, grid, stride):
    mixer = build(spec_of(2, stride=stride), DIM)
    valid = torch.rand(3, *grid) < 0.5
    valid[0] = False
    valid[1, 0, :2] = valid[1, 1, 1] = True
    valid[1, 1, 0] = False  # no rectangle
    check(mixer, by_loop(mixer, places, stride), tokens(3, *grid, DIM), valid=valid, fast=False)
    assert "no rectangle" in mixer.unsupported(tokens(3, *grid, DIM), valid=valid)


@pytest.mark.parametrize(("grid", "stride"), [((3, 4), 1), ((5, 4), 2), ((5,), 2)])
def test_rows_and_columns_of_valid_tokens_keep_the_fast_path(build, check, tokens, places, grid, stride):
    """Not only rectangles at the origin, nor only connected ones."""
    mixer = build(spec_of(2, len(grid), stride=stride), DIM)
    valid = torch.ones(3, *grid, dtype=torch.bool)
    valid[0, 1] = valid[0, ..., 0] = False
    valid[1, 2:] = False
    valid[2] = False
    check(mixer, by_loop(mixer, places, stride), tokens(3, *grid, DIM), valid=valid)


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("extents", [[(4, 3), (2, 5)], [(1, 1), (3, 4)], [(4,), (7,)]])
def test_padding_leaves_images_alone(build, check_padding, extents, stride):
    check_padding(build(spec_of(2, len(extents[0]), stride=stride), DIM), extents, DIM)


def test_compiled_with_valid_is_the_definition(build, tokens):
    """Whether a mask is a rectangle cannot be asked there, and any mask must come out right."""
    mixer = build(spec_of(2), DIM)
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


class Largest(TorchDispatchMode):
    """The entries of the largest tensor that any operation gives."""

    entries = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, tuple | list) else [out]:
            if torch.is_tensor(tensor):
                self.entries = max(self.entries, tensor.numel())
        return out


def test_fast_path_never_forms_the_matrix(build, tokens):
    mixer = build(spec_of(2), DIM)
    x, n = tokens(1, 20, 24, DIM), 20 * 24
    seen = {}
    for mixer.impl in ("fast", "reference"):
        with Largest() as largest, torch.no_grad():
            mixer(x)
        seen[mixer.impl] = largest.entries
    assert seen["fast"] <= 2 * n * DIM and seen["reference"] >= 2 * n * n


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
