"""WindowAttention against timm's Swin block (wrapping shift) and against a loop (shift without wrapping)."""

import pytest
import torch
from timm.models.swin_transformer import SwinTransformerBlock
from torch import nn
from torch.func import functional_call
from torch.nn import functional as F

import glocal
from glocal.aggregation import aggregate

HEADS, DIM = 2, 8


def spec_of(window, shift=0, **arguments):
    options = {"window_size": window, "num_heads": HEADS, "shift_size": shift, **arguments}
    return f"WindowAttention({', '.join(f'{k}={v}' for k, v in options.items())})"


def by_timm(mixer, grid, window, shift):
    """timm's block without its norms, MLP and residuals. Its table is made for the window cut to the grid."""
    qkv_bias = mixer.qkv.bias is not None
    block = SwinTransformerBlock(DIM, grid, HEADS, window_size=window, shift_size=shift, qkv_bias=qkv_bias)

    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.block = block.double()

        def forward(self, x):
            return self.block._attn(x)

    used = {name: parameter for name, parameter in mixer.named_parameters() if not name.startswith("relative")}
    offsets = [slice(window - n, window + n - 1) for n in block.window_size]
    table = mixer.relative_position_bias_table.view(2 * window - 1, 2 * window - 1, HEADS)[tuple(offsets)]
    used["relative_position_bias_table"] = table.reshape(-1, HEADS)
    used = {f"block.attn.{name}": value for name, value in used.items()}
    return lambda x: functional_call(Attention(), used, (x,))


SIZES = [  # grid, window, shift
    ((8, 8), 4, 0),
    ((8, 8), 4, 2),
    ((4, 8), 2, 1),
    ((6, 9), 3, 1),
    ((6, 9), 3, 2),
    ((7, 9), 4, 0),
    ((7, 9), 4, 2),
    ((9, 6), 4, 3),
    ((10, 5), 4, 1),
    ((5, 7), 3, 1),
    ((4, 9), 4, 2),
    ((9, 3), 4, 2),
    ((3, 2), 4, 2),
    ((1, 5), 2, 1),
    ((1, 1), 3, 1),
]


@pytest.mark.parametrize(("grid", "window", "shift"), SIZES)
def test_unmasked_padding_is_timm(build, check, tokens, grid, window, shift):
    mixer = build(spec_of(window, shift, mask_padding=False), DIM)
    check(mixer, by_timm(mixer, grid, window, shift), tokens(2, *grid, DIM))


def test_without_qkv_bias_is_timm(build, check, tokens):
    mixer = build(spec_of(4, 2, mask_padding=False, qkv_bias=False), DIM)
    check(mixer, by_timm(mixer, (7, 5), 4, 2), tokens(2, 7, 5, DIM))


def test_masked_padding_without_shift_is_timm_at_multiples(build, check, tokens):
    mixer = build(spec_of(3), DIM)
    check(mixer, by_timm(mixer, (6, 9), 3, 0), tokens(2, 6, 9, DIM))


def by_loop(mixer, attend, places, window, shift):
    """Windows start at every shift + m * window and hold the grid's own tokens only."""

    def oracle(x, valid=None):
        batch, *grid, _ = x.shape
        where = places(grid)
        shifts = [shift if n > window else 0 for n in grid]
        windows = [tuple((p - s) // window for p, s in zip(place, shifts, strict=True)) for place in where]

        def sources(b, i):
            near = [j for j, w in enumerate(windows) if w == windows[i]]
            return near if valid is None else [j for j in near if valid[(b, *where[j])]]

        def bias(i, j):
            row = 0
            for query, source in zip(where[i], where[j], strict=True):
                row = row * (2 * window - 1) + query - source + window - 1
            return mixer.relative_position_bias_table[row]

        q, k, v = mixer.qkv(x).reshape(batch, len(where), 3, HEADS, -1).unbind(2)
        return mixer.proj(attend(q, k, v, sources, bias if mixer.position_bias else None)).view(batch, *grid, -1)

    return oracle


@pytest.mark.parametrize(
    ("grid", "window", "shift"),
    [s for s in SIZES if s[0] != (8, 8)] + [((4, 4), 2, 1), ((11,), 4, 0), ((11,), 4, 3), ((3,), 4, 1)],
)
def test_masked_padding_is_the_loop(build, check, tokens, attend, places, grid, window, shift):
    mixer = build(spec_of(window, shift, rank=len(grid)), DIM)
    check(mixer, by_loop(mixer, attend, places, window, shift), tokens(2, *grid, DIM))


@pytest.mark.parametrize(("grid", "window", "shift"), [((7, 9), 4, 2), ((11,), 4, 3)])
def test_without_position_bias_is_the_loop_without(build, check, tokens, attend, places, grid, window, shift):
    mixer = build(spec_of(window, shift, position_bias=False, rank=len(grid)), DIM)
    assert {name for name, _ in mixer.named_parameters()} == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    check(mixer, by_loop(mixer, attend, places, window, shift), tokens(2, *grid, DIM))
    assert set(mixer.scores(tokens(1, *grid, DIM))) == {"content"}


@pytest.mark.parametrize("mask_padding", [True, False])
def test_window_as_large_as_the_grid_is_self_attention_with_bias(build, check, tokens, mask_padding):
    mixer = build(spec_of(4, 2, mask_padding=mask_padding), DIM)
    rows = torch.arange(4).repeat_interleave(4)
    columns = torch.arange(4).repeat(4)
    index = (rows[:, None] - rows + 3) * 7 + columns[:, None] - columns + 3

    def oracle(x):
        q, k, v = mixer.qkv(x).view(2, 16, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
        bias = mixer.relative_position_bias_table[index].permute(2, 0, 1)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
        return mixer.proj(mixed.transpose(1, 2).reshape(x.shape))

    check(mixer, oracle, tokens(2, 4, 4, DIM))


@pytest.mark.parametrize(
    ("window", "shift", "extents"),
    [
        (3, 0, [(4, 5), (2, 6)]),
        (3, 1, [(4, 5), (3, 7)]),
        (4, 2, [(5, 4), (2, 6)]),
        (2, 1, [(4, 4), (1, 5)]),
        (4, 3, [(7,), (4,)]),
    ],
)
def test_padding_leaves_images_alone(build, check_padding, window, shift, extents):
    check_padding(build(spec_of(window, shift, rank=len(extents[0])), DIM), extents, DIM)


@pytest.mark.parametrize("grid", [(5, 7), (4, 8), (8,)])
def test_unmasked_padding_refuses_padded_images(build, tokens, grid):
    """It would let real tokens see the padding, on whatever path."""
    mixer = build(spec_of(4, mask_padding=False, rank=len(grid)), DIM)
    x, valid = tokens(2, *grid, DIM), torch.ones(2, *grid, dtype=torch.bool)
    valid[1, 3:] = False
    for mixer.impl in ("auto", "fast", "reference"):
        with pytest.raises(ValueError, match="mask_padding"):
            mixer(x, valid=valid)
    with pytest.raises(ValueError, match="mask_padding"):
        mixer.weights(x, valid=valid)


@pytest.mark.parametrize("mask_padding", [True, False])
def test_positions_are_for_queries_and_keys(build, tokens, mask_padding):
    """On both paths: what is mixed is the tokens without them."""
    mixer = build(spec_of(4, 2, mask_padding=mask_padding), DIM)
    x, positions = tokens(2, 7, 5, DIM), tokens(1, 7, 5, DIM)
    values = mixer.values(x)
    expected = mixer.proj(aggregate(mixer.weights(x + positions), values)).view(x.shape)
    for mixer.impl in ("reference", "fast"):
        torch.testing.assert_close(mixer(x, pos_embed=positions), expected)


def test_parameters():
    def shapes(spec, dim):
        return {k: tuple(v.shape) for k, v in glocal.build(spec, dim).named_parameters()}

    square = {"qkv.weight": (192, 64), "qkv.bias": (192,), "proj.weight": (64, 64), "proj.bias": (64,)}
    assert shapes("WindowAttention()", 64) == {**square, "relative_position_bias_table": (169, 2)}
    flat = shapes("WindowAttention(window_size=4, head_dim=2, qkv_bias=False, rank=1)", 8)
    assert flat == {
        "qkv.weight": (24, 8),
        "proj.weight": (8, 8),
        "proj.bias": (8,),
        "relative_position_bias_table": (7, 4),
    }


def test_weights_hold_one_window_for_each_query(build, tokens):
    weights = build(spec_of(4), 16).weights(tokens(2, 8, 8, 16))
    assert weights.weights.shape == (2, HEADS, 64, 16)


# what the contract may hear
REFUSES = ("WindowAttention: valid was given, mask_padding=False lets padding be seen",)

# planted by scripts/mutate
FAULTS = {
    "mixers/window_attention.py": (
        (
            "the definition sees across regions",
            "seen = windows.together()[window, place]",
            "seen = torch.ones_like(windows.together())[window, place]",
        ),
        (
            "the fast path takes padding for tokens",
            "extents=None if valid is None else extents(valid)",
            "extents=None",
        ),
        (
            "all heads have the first one's bias",
            "[windows.offsets(self._window)].movedim(-1, 0)",
            "[windows.offsets(self._window)][..., :1].movedim(-1, 0)",
        ),
        (
            "the fast path adds positions to the values",
            "enumerate((placed, placed, plain))",
            "enumerate((placed, placed, placed))",
        ),
        (
            "the fast path leaves out positions of the keys",
            "enumerate((placed, placed, plain))",
            "enumerate((placed, plain, plain))",
        ),
        (
            "the fast path rolls where it should cut",
            "rolled_size=None if self.mask_padding else x.shape[1:-1]",
            "rolled_size=x.shape[1:-1]",
        ),
        ("the fast path is not shifted", "shift_size=self.shift_size,", "shift_size=0,"),
        (
            "padding is taken without a word where it would be seen",
            "if valid is not None and not self.mask_padding:",
            "if False:",
        ),
        (
            "the cost leaves out the padded keys and values",
            "math.prod(grid if self.mask_padding else self._padded_grid(grid))",
            "math.prod(grid)",
        ),
        (
            "positions of a subset of the queries are those of the first",
            "places if queries is None else places[queries]",
            "places if queries is None else places[: len(queries)]",
        ),
        (
            "the first length of a window is taken for that of the columns",
            'self._window = per_axis("window_size", window_size, rank)',
            'self._window = per_axis("window_size", window_size, rank)[::-1]',
        ),
    ),
    "mixer.py": (
        (
            "a fast path that adds positions itself gets them twice",
            'self._takes["_weights"] | self._takes[hook]:',
            'self._takes["_weights"]:',
        ),
    ),
    "arguments.py": (
        (
            "real tokens with a hole between them are taken for a rectangle",
            "if not torch.compiler.is_compiling() and not valid.is_meta and not torch.equal(inside, valid):",
            "if False:",
        ),
    ),
}
