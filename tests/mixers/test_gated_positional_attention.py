"""GatedPositionalAttention against timm's GPSA on square grids and a loop on all, and as the convolution it can be."""

import math

import pytest
import torch
from timm.models.convit import GPSA
from torch.func import functional_call
from torch.nn import functional as F
from torch.testing import assert_close

import glocal

HEADS, DIM = 2, 8

FAULTS = (
    ("the offset is query minus source", "offset = place - place[:, None]", "offset = place[:, None] - place"),
    ("x and y change places", "zip(grid, reversed(linear), strict=True)", "zip(grid, linear, strict=True)"),
    (
        "the gate is turned round",
        '"content": (1 - gate, content), "position": (gate,',
        '"content": (gate, content), "position": (1 - gate,',
    ),
    (
        "the fast path's gate is turned round",
        "((1 - gate) * content + gate * position).flatten",
        "(gate * content + (1 - gate) * position).flatten",
    ),
    ("queries are not scaled", "return q * self.scale, k", "return q, k"),
    ("queries and keys change places", "q, k = self.qk(", "k, q = self.qk("),
    ("the distance is not squared", "square[:, None, None] * offset.square()", "square[:, None, None] * offset.abs()"),
    (
        "position does not see the mask",
        "masked_softmax(self._position_scores(tuple(x.shape[1:-1]), queries)[None], seen)",
        "masked_softmax(self._position_scores(tuple(x.shape[1:-1]), queries)[None], None)",
    ),
    (
        "the fast path forgets the mask in the content",
        "sdpa(q, k, values, bias=seen)",
        "sdpa(q, k, values)",
    ),
    (
        "the fast path forgets the mask in the position",
        "self._position_tables(grid), values, grid, valid)",
        "self._position_tables(grid), values, grid, None)",
    ),
    (
        "a kernel's heads go row by row",
        "self.pos_proj.weight[:, :-1] = 2 * strength * offsets",
        "self.pos_proj.weight[:, :-1] = 2 * strength * offsets.flip(-1)",
    ),
    ("half the offset", "2 * strength * offsets", "strength * offsets"),
    ("kernels are not centred", "offset=(side - 1) / 2)", "offset=0)"),
    ("even kernels start as a convolution", "or side % 2 == 0:", "or False:"),
    ("values start at random", "self.v.weight.copy_(torch.eye(self.dim))", "pass"),
    (
        "the gate gets no gradient",
        "gate = self.gating_param.sigmoid()\n",
        "gate = self.gating_param.detach().sigmoid()\n",
    ),
)


def spec_of(**arguments):
    options = {"num_heads": HEADS, "locality_strength": None, **arguments}
    return f"GatedPositionalAttention({', '.join(f'{k}={v!r}' for k, v in options.items())})"


def by_timm(mixer):
    twin = GPSA(DIM, HEADS, qkv_bias=mixer.qkv_bias).double()
    return lambda x: functional_call(twin, dict(mixer.named_parameters()), (x.flatten(1, -2),)).view(x.shape)


@pytest.mark.parametrize("side", [1, 2, 4, 5])
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_is_timms_on_square_grids(build, check, tokens, side, qkv_bias):
    mixer = build(spec_of(qkv_bias=qkv_bias), DIM)
    check(mixer, by_timm(mixer), tokens(2, side, side, DIM))


def test_timm_takes_every_square_number_of_tokens_for_a_square(build, tokens):
    """Why the loop is the oracle on other grids."""
    mixer, x = build(spec_of(), DIM), tokens(1, 2, 8, DIM)
    of_timm = by_timm(mixer)(x)
    assert_close(of_timm.view(1, 4, 4, DIM), mixer(x.view(1, 4, 4, DIM)))
    assert (of_timm - mixer(x)).abs().max() > 0.1
    with pytest.raises(RuntimeError):
        by_timm(mixer)(tokens(1, 3, 5, DIM))


def by_loop(mixer, places):
    def oracle(x, valid=None):
        batch, *grid, dim = x.shape
        where, size = places(grid), dim // HEADS
        tokens = x.flatten(1, -2)
        images = []
        for b in range(batch):
            real = [j for j, place in enumerate(where) if valid is None or valid[(b, *place)]]
            rows = []
            for i, place in enumerate(where):
                heads = []
                for h in range(HEADS):
                    rows_of_h = slice(h * size, (h + 1) * size)
                    key_rows = slice(dim + h * size, dim + (h + 1) * size)
                    query = tokens[b, i] @ mixer.qk.weight[rows_of_h].T
                    u = mixer.pos_proj.weight[h]
                    content, position = [], []
                    for j in real:
                        key = tokens[b, j] @ mixer.qk.weight[key_rows].T
                        content.append(query @ key / math.sqrt(size))
                        offset = [s - q for q, s in zip(place, where[j], strict=True)]
                        r = torch.tensor([*reversed(offset), sum(o * o for o in offset)], dtype=x.dtype)
                        position.append(u @ r + mixer.pos_proj.bias[h])
                    if not real:
                        heads.append(torch.zeros(size, dtype=x.dtype))
                        continue
                    gate = 1 / (1 + (-mixer.gating_param[h]).exp())
                    shares = (1 - gate) * torch.stack(content).softmax(0) + gate * torch.stack(position).softmax(0)
                    heads.append((shares / shares.sum()) @ (tokens[b, real] @ mixer.v.weight[rows_of_h].T))
                rows.append(torch.cat(heads))
            images.append(torch.stack(rows))
        return mixer.proj(torch.stack(images)).view(x.shape)

    return oracle


@pytest.mark.parametrize("grid", [(2, 4), (5, 3), (1, 4), (7,), (1,)])
def test_is_the_loop(build, check, tokens, places, grid):
    mixer = build(spec_of(rank=len(grid)), DIM)
    check(mixer, by_loop(mixer, places), tokens(2, *grid, DIM))


@pytest.mark.parametrize("grid", [(2, 4), (6,)])
def test_takes_any_valid_tokens(build, check, tokens, places, grid):
    mixer = build(spec_of(rank=len(grid)), DIM)
    valid = torch.rand(3, *grid) < 0.5
    valid[2] = False
    check(mixer, by_loop(mixer, places), tokens(3, *grid, DIM), valid=valid)


@pytest.mark.parametrize("masked", [False, True])
def test_fast_path_never_forms_the_positional_weights(build, tokens, largest, masked):
    """Nor those of the content, which is the library's; 1 x 40 x 40 tokens have 2 x 1600 x 1600 weights."""
    mixer, x = build(spec_of(), DIM), tokens(1, 40, 40, DIM)
    call = {"valid": torch.rand(1, 40, 40) < 0.5} if masked else {}
    entries = {}
    for mixer.impl in ("fast", "reference"):
        with largest() as found, torch.no_grad():
            mixer(x, **call)
        entries[mixer.impl] = found.entries
    assert entries["reference"] == HEADS * 1600**2 and entries["fast"] <= HEADS * 1600 * 40


@pytest.mark.parametrize(("options", "extents"), [({}, [(4, 3), (2, 5)]), ({"rank": 1}, [(4,), (7,)])])
def test_padding_leaves_images_alone(build, check_padding, options, extents):
    check_padding(build(spec_of(**options), DIM), extents, DIM)


@pytest.mark.parametrize("heads", [1, 9, 25])
def test_starts_as_timm_does(heads):
    dim = 4 * heads
    mixer = glocal.build(f"GatedPositionalAttention(num_heads={heads}, locality_strength=0.7)", dim)
    twin = GPSA(dim, heads, locality_strength=0.7)
    twin.local_init()
    assert_close(mixer.pos_proj.weight, twin.pos_proj.weight)
    assert_close(mixer.v.weight, torch.eye(dim))
    assert (mixer.gating_param == 1).all()
    plain = glocal.build(f"GatedPositionalAttention(num_heads={heads})", dim)
    assert (plain.gating_param == 1).all() and (plain.v.weight != torch.eye(dim)).any()


@pytest.mark.parametrize("dim", [32, 64, 96, 192, 256, 384, 768])
def test_its_defaults_can_be_built(dim):
    glocal.build("GatedPositionalAttention()", dim)


def as_convolution(spec, dim):
    """All weight on position, as sharp as can be."""
    mixer = glocal.build(spec, dim).double().eval()
    with torch.no_grad():
        mixer.gating_param.fill_(1e3)
    return mixer


def test_nine_heads_look_at_the_nine_places_of_a_kernel(tokens):
    mixer = as_convolution("GatedPositionalAttention(num_heads=9, locality_strength=40)", 36)
    dense = mixer.weights(tokens(1, 5, 6, 36)).dense()[0].view(9, 5, 6, 5, 6)
    for head in range(9):
        dx, dy = head // 3 - 1, head % 3 - 1
        for y in range(1, 4):
            for x in range(1, 5):
                assert dense[head, y, x, y + dy, x + dx] > 1 - 1e-12
    # at the border the nearest token inside has it all, where a convolution would read a zero
    assert dense[0, 0, 0, 0, 0] > 1 - 1e-12


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_is_a_convolution_away_from_the_border(tokens, impl):
    mixer, x = as_convolution("GatedPositionalAttention(num_heads=9, locality_strength=40)", 18), tokens(2, 5, 6, 18)
    mixer.impl = impl
    kernel = torch.zeros(18, 18, 3, 3, dtype=torch.float64)
    for head in range(9):
        part = slice(2 * head, 2 * head + 2)
        kernel[:, part, head % 3, head // 3] = mixer.proj.weight[:, part]
    expected = F.conv2d(x.movedim(-1, 1), kernel, mixer.proj.bias).movedim(1, -1)
    assert_close(mixer(x)[:, 1:-1, 1:-1], expected)


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_sequences_start_as_a_convolution(tokens, impl):
    mixer = as_convolution("GatedPositionalAttention(num_heads=3, locality_strength=40, rank=1)", 6)
    mixer.impl, x = impl, tokens(2, 7, 6)
    moved = torch.cat([x[:, :-2, :2], x[:, 1:-1, 2:4], x[:, 2:, 4:]], -1)
    assert_close(mixer(x)[:, 1:-1], mixer.proj(moved))


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_with_the_gate_shut_it_is_self_attention(build, tokens, impl):
    mixer, plain = build(spec_of(qkv_bias=True), DIM), build(f"SelfAttention(num_heads={HEADS})", DIM)
    mixer.impl, x = impl, tokens(2, 3, 5, DIM)
    with torch.no_grad():
        mixer.gating_param.fill_(-1e3)
        plain.qkv.weight.copy_(torch.cat([mixer.qk.weight, mixer.v.weight]))
        plain.qkv.bias.copy_(torch.cat([mixer.qk.bias, mixer.v.bias]))
    plain.proj.load_state_dict(mixer.proj.state_dict())
    assert_close(mixer(x), plain(x))


def test_rows_sum_to_one(build, tokens):
    dense = build(spec_of(), DIM).weights(tokens(2, 3, 5, DIM)).dense()
    assert_close(dense.sum(-1), torch.ones_like(dense[..., 0]))


def test_parameters():
    shapes = {k: tuple(v.shape) for k, v in glocal.build(spec_of(qkv_bias=True), DIM).named_parameters()}
    assert shapes == {k: tuple(v.shape) for k, v in GPSA(DIM, HEADS, qkv_bias=True).named_parameters()}


@pytest.mark.parametrize("heads", [2, 3, 4, 6, 8, 12, 16])
def test_other_head_counts_start_plain_or_not_at_all(heads):
    with pytest.raises(ValueError, match=r"num_heads is \d+, it takes 1, 9, 25, .* locality_strength=None"):
        glocal.build(f"GatedPositionalAttention(num_heads={heads}, locality_strength=1.0)", 48)
    line = f"GatedPositionalAttention(num_heads={heads}, locality_strength=1.0, rank=1)"
    if heads % 2:
        glocal.build(line, 48)
    else:
        with pytest.raises(ValueError, match=r"it takes 1, 3, 5, \.\.\."):
            glocal.build(line, 48)


@pytest.mark.parametrize("strength", [0, -1.0, "'much'", True])
def test_a_wrong_strength_is_refused(strength):
    with pytest.raises(ValueError, match="locality_strength"):
        glocal.build(f"GatedPositionalAttention(num_heads=1, locality_strength={strength})", 8)
