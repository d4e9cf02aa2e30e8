"""Arguments, checked once for all operators: what makes no sense is refused in words, what is padded is not read."""

import pytest
import torch

import glocal
from glocal import Cache
from glocal.arguments import every_axis

X = torch.randn(2, 5, 4, 8)


def mixer(spec="SelfAttention(num_heads=2)"):
    return glocal.build(spec, 8).eval()


@pytest.mark.parametrize(
    ("spec", "call", "words"),
    [
        ("DepthwiseConv(kernel_size=3)", {"source": X}, ["DepthwiseConv", "source"]),
        ("DepthwiseConv(kernel_size=3)", {"pos_embed": X}, ["DepthwiseConv", "pos_embed"]),
        ("DepthwiseConv(kernel_size=3)", {"cache": Cache()}, ["DepthwiseConv", "cache"]),
        ("SelfAttention(num_heads=2)", {"source": torch.zeros(3, 5, 8)}, ["source", "3 images", "2"]),
        ("SelfAttention(num_heads=2)", {"source": torch.zeros(2, 5, 7)}, ["source", "7", "8"]),
        ("SelfAttention(num_heads=2)", {"valid": torch.ones(2, 5, 4)}, ["valid", "torch.float32", "torch.bool"]),
        ("SelfAttention(num_heads=2)", {"valid": torch.ones(2, 4, 4) > 0}, ["valid", "(2, 4, 4)", "(2, 5, 4)"]),
        ("SelfAttention(num_heads=2)", {"pos_embed": X[..., :3]}, ["pos_embed", "3", "8"]),
        ("SelfAttention(num_heads=2)", {"grid": (5, 4)}, ["grid", "(5, 4)"]),
        ("SelfAttention(num_heads=2)", {"cache": Cache()}, ["cache", "causal"]),
        ("SelfAttention(num_heads=2, causal=True)", {"source": X}, ["source", "causal"]),
    ],
)  # fmt: skip
def test_arguments_that_make_no_sense_are_refused(spec, call, words):
    m = mixer(spec)
    for path in (m, m.weights, m.reference):
        with pytest.raises(ValueError) as raised:
            path(X, **call)
        for word in words:
            assert word in str(raised.value)


@pytest.mark.parametrize("queries", [torch.ones(20) > 0, torch.zeros(2, 3).long(), torch.zeros(3), torch.tensor(3)])
def test_queries_are_positions(queries):
    for path in (mixer(), mixer().reference, mixer().weights):
        with pytest.raises(ValueError, match="SelfAttention: queries has shape"):
            path(X, queries=queries)


def test_positions_have_the_shape_of_the_tokens():
    m, pos = mixer(), torch.randn(5, 4, 8)
    torch.testing.assert_close(m(X, pos_embed=pos), m(X, pos_embed=pos.expand_as(X)))
    flat = mixer("RelativeAttention(num_heads=2, grid_size=(5, 4))")
    flat_pos = pos.flatten(0, 1)[None]
    out = flat(X.flatten(1, 2), grid=(5, 4), pos_embed=flat_pos)
    torch.testing.assert_close(out, flat(X, pos_embed=pos).flatten(1, 2))
    for wrong in (torch.randn(8), torch.randn(4, 8), torch.randn(4, 5, 8), torch.randn(3, 5, 4, 8)):
        with pytest.raises(ValueError, match="SelfAttention: pos_embed has shape"):
            m(X, pos_embed=wrong)


def test_a_transposed_mask_is_refused():
    with pytest.raises(ValueError, match=r"valid has shape \(2, 4, 5\)"):
        mixer()(X, valid=torch.ones(2, 4, 5, dtype=torch.bool))


def test_a_sequence_without_tokens_is_refused():
    for name in glocal.available():
        for spec in getattr(glocal.mixers, name).examples:
            m = glocal.build(spec, 32)
            with pytest.raises(ValueError, match="no tokens"):
                m(torch.zeros(2, *[0] * (m.rank or 1), 32))


@pytest.mark.parametrize("spec", ["SelfAttention(num_heads=2)", "AveragePooling()", "LocalMLP(window_size=2)"])
def test_a_flat_mask_is_that_of_the_grid(spec):
    mixer, x = glocal.build(spec, 32), torch.randn(2, 3, 4, 32)
    valid = torch.ones(2, 3, 4, dtype=torch.bool)
    valid[1, 2:] = valid[1, :, 3:] = False
    torch.testing.assert_close(mixer(x, valid=valid.flatten(1)), mixer(x, valid=valid))


@pytest.mark.parametrize("impl", ["auto", "reference"])
@pytest.mark.parametrize("spec", ["SelfAttention(num_heads=2)", "DepthwiseConv(kernel_size=3)"])
def test_a_mask_hides_no_nan_of_real_tokens(spec, impl):
    mixer, x = glocal.build(spec, 8), torch.randn(1, 4, 3, 8)
    mixer.impl = impl
    x[0, 1, 1] = float("nan")
    valid = torch.ones(1, 4, 3, dtype=torch.bool)
    valid[0, 3] = False
    assert mixer(x, valid=valid)[0, 1, 1].isnan().all()


def test_num_heads_and_head_dim_must_agree():
    assert repr(glocal.build("SelfAttention(num_heads=4, head_dim=8)", 32)) == "SelfAttention(num_heads=4)"
    with pytest.raises(ValueError, match=r"num_heads: 4 heads of head_dim 4 make 16, not 32"):
        glocal.build("SelfAttention(num_heads=4, head_dim=4)", 32)


@pytest.mark.parametrize(
    ("x", "words"),
    [
        (None, "x is a NoneType"),
        ([[[1.0] * 8]], "x is a list"),
        (torch.zeros(2, 5, 4, 8).numpy(), "x is a ndarray"),
        (torch.zeros(2, 5, 4, 8).long(), "x has dtype torch.int64"),
        (torch.zeros(2, 5, 4, 8).bool(), "x has dtype torch.bool"),
        (torch.zeros(2, 5, 4, 8, dtype=torch.complex64), "x has dtype torch.complex64"),
    ],
)
def test_what_is_no_tensor_of_numbers_is_refused(x, words):
    m = mixer()
    for path in (m, m.weights):
        with pytest.raises(ValueError, match=f"^[A-Za-z]+: {words}, needs a torch.Tensor of floating-point numbers"):
            path(x)
    with pytest.raises(ValueError, match=r"source has dtype torch\.int64, needs"):
        m(X, source=torch.zeros(2, 5, 8).long())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (7, r"7, must name every axis, as in \(7, 7\) for images or \(7,\) for sequences"),
        (None, "None, must name every axis"),
        (7.5, "7.5, must name every axis"),
        ("7", "'7', must name every axis"),
        ((), r"\(\), must name every axis"),
        ((7, 0), "0, must be a positive whole number"),
        ((7, 1.5), "1.5, must be a positive whole number"),
    ],
)
def test_a_grid_names_every_axis(given, words):
    with pytest.raises(ValueError, match=f"^grid_size: {words}"):
        every_axis("grid_size", given)


@pytest.mark.parametrize("given", [(7, 5), [7, 5], torch.Size((7, 5))])
def test_a_grid_is_a_list_or_a_tuple(given):
    found = every_axis("grid_size", given)
    assert found == (7, 5) and type(found) is tuple


# planted by scripts/mutate
FAULTS = {
    "arguments.py": (
        (
            "a transposed `valid` is taken",
            "or tuple(valid.shape) not in (tokens, flat):",
            "or valid.numel() != math.prod(tokens):",
        ),
        (
            "a flat `valid` is refused where x is none",
            "or tuple(valid.shape) not in (tokens, flat):",
            "or tuple(valid.shape) != tokens:",
        ),
        (
            "whole numbers are tokens",
            "if not isinstance(tokens, Tensor) or not tokens.is_floating_point():",
            "if not isinstance(tokens, Tensor):",
        ),
        ("one number is a grid", "if isinstance(value, int):\n        raise", "if False:\n        raise"),
        (
            "a grid may be anything that has a length",
            "if not isinstance(value, list | tuple) or not value:",
            "if False:",
        ),
        ("a grid may have no axis", "list | tuple) or not value:", "list | tuple):"),
        ("a `valid` of numbers is taken", "if valid.dtype != torch.bool or tuple(", "if tuple("),
        (
            "a NaN of a real token is hidden",
            "tokens.masked_fill(~valid[..., None] & ~tokens.isfinite(), 0)",
            "tokens.masked_fill(~tokens.isfinite(), 0)",
        ),
        (
            "positions of any shape are added",
            "if tuple(positions.shape) not in (tuple(tokens.shape), (1, *tokens.shape[1:])):",
            "if False:",
        ),
        (
            "a mask is taken for queries",
            "if queries.dim() != 1 or queries.dtype != torch.int64:",
            "if queries.dim() != 1:",
        ),
        ("an image without tokens is taken", "if any(n == 0 for n in tokens.shape[1:-1]):", "if False:"),
        (
            "num_heads and head_dim may contradict each other",
            "head_dim is not None and num_heads * head_dim != dim:",
            "head_dim is not None and num_heads * head_dim < 0:",
        ),
    ),
    "operator.py": (
        ("flat positions stay flat on the grid", "call.keys() & about_x", 'call.keys() & (about_x - {"pos_embed"})'),
        (
            "one query without an axis is no sentence",
            'call["queries"].numel(), self._out_dim',
            'len(call["queries"]), self._out_dim',
        ),
    ),
}
