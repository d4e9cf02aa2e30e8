"""ClassAttention against timm's CaiT and VOLO with the same weights, torch's attention, and a loop over tokens."""

import pytest
import torch
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

HEADS, DIM = 2, 8


def spec_of(**arguments):
    return f"ClassAttention({', '.join(f'{k}={v}' for k, v in {'num_heads': HEADS, **arguments}.items())})"


def by_timm(mixer):
    cait = pytest.importorskip("timm.models.cait")
    theirs = cait.ClassAttn(DIM, num_heads=HEADS, qkv_bias=mixer.qkv_bias).double().eval()
    assert set(dict(theirs.named_parameters())) == set(dict(mixer.named_parameters()))
    return lambda x, grid=None: functional_call(theirs, dict(mixer.named_parameters()), (x,))


def by_timm_volo(mixer):
    volo = pytest.importorskip("timm.models.volo")
    theirs = volo.ClassAttention(DIM, num_heads=HEADS, qkv_bias=mixer.qkv_bias).double().eval()

    def oracle(x, grid=None):
        state = dict(mixer.named_parameters())
        for what in ("weight", "bias") if mixer.qkv_bias else ("weight",):
            state[f"kv.{what}"] = torch.cat([state.pop(f"k.{what}"), state.pop(f"v.{what}")])
        assert set(state) == set(dict(theirs.named_parameters()))
        return functional_call(theirs, state, (x,))

    return oracle


@pytest.mark.parametrize("oracle", [by_timm, by_timm_volo])
@pytest.mark.parametrize("qkv_bias", [True, False])
@pytest.mark.parametrize("grid", [(12,), (3, 4), (1, 1)])
def test_is_timm(build, check, tokens, oracle, qkv_bias, grid):
    mixer = build(spec_of(qkv_bias=qkv_bias), DIM)
    x = tokens(2, 1 + torch.Size(grid).numel(), DIM)
    check(mixer, oracle(mixer), x)
    check(mixer, oracle(mixer), x, grid=grid)


def test_is_timm_in_float32():
    cait, volo = pytest.importorskip("timm.models.cait"), pytest.importorskip("timm.models.volo")
    import glocal

    mixer = glocal.build("ClassAttention(num_heads=4)", 64)
    theirs = cait.ClassAttn(64, num_heads=4, qkv_bias=True)
    theirs.load_state_dict(mixer.state_dict())
    x = torch.randn(3, 50, 64)
    assert_close(mixer(x), theirs(x), rtol=0, atol=1e-6)
    theirs = volo.ClassAttention(64, num_heads=4, qkv_bias=True)
    state = mixer.state_dict()
    for what in ("weight", "bias"):
        state[f"kv.{what}"] = torch.cat([state.pop(f"k.{what}"), state.pop(f"v.{what}")])
    theirs.load_state_dict(state)
    assert_close(mixer(x, grid=(7, 7)), theirs(x), rtol=0, atol=1e-6)


def by_loop(mixer, attend):
    """Any number of class tokens, padding, some queries."""

    def oracle(x, grid=None, valid=None, queries=None):
        prefix = 1 if grid is None else x.shape[1] - torch.Size(grid).numel()
        q, k, v = (linear(x).unflatten(-1, (HEADS, -1)) for linear in (mixer.q, mixer.k, mixer.v))

        def sources(b, i):
            return [j for j in range(x.shape[1]) if valid is None or valid[b, j]]

        y = mixer.proj(attend(q[:, :prefix], k, v, sources))
        return y if queries is None else y[:, queries]

    return oracle


@pytest.mark.parametrize("prefix", [1, 2, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_class_tokens_read_each_other_and_the_rest(build, check, tokens, attend, prefix, masked):
    mixer = build(spec_of(), DIM)
    call = {"grid": (2, 3)}
    if masked:
        call["valid"] = torch.rand(2, prefix + 6) < 0.6
        call["valid"][1] = False
    check(mixer, by_loop(mixer, attend), tokens(2, prefix + 6, DIM), **call)
    call["queries"] = torch.tensor([prefix - 1, 0])
    check(mixer, by_loop(mixer, attend), tokens(2, prefix + 6, DIM), fast=False, **call)


def test_is_torch_attention_with_queries_of_the_class_tokens(build, check, tokens):
    mixer = build(spec_of(), DIM)
    theirs = nn.MultiheadAttention(DIM, HEADS, batch_first=True).double()

    def by_torch(x, grid, valid):
        parts = (mixer.q, mixer.k, mixer.v)
        weights = {
            "in_proj_weight": torch.cat([part.weight for part in parts]),
            "in_proj_bias": torch.cat([part.bias for part in parts]),
            "out_proj.weight": mixer.proj.weight,
            "out_proj.bias": mixer.proj.bias,
        }
        masks = {"key_padding_mask": ~valid, "need_weights": False}
        return functional_call(theirs, weights, (x[:, :3], x, x), masks)[0]

    valid = torch.rand(2, 15) < 0.7
    valid[:, 0] = True
    check(mixer, by_torch, tokens(2, 15, DIM), grid=(3, 4), valid=valid)


@pytest.mark.parametrize("extents", [[(4,), (6,)]])
def test_padding_leaves_images_alone(build, check_padding, extents):
    check_padding(build(spec_of(), DIM), extents, DIM)


def test_places(build, tokens):
    mixer = build(spec_of(), DIM)
    found = mixer.weights(tokens(2, 2 + 6, DIM), grid=(2, 3))
    assert found.dense().shape == (2, HEADS, 2, 8)
    assert (found.out_grid, found.source_grid) == ((2,), (2, 3))
    assert found.query_positions.shape == (2, 2) and found.query_positions.isnan().all()
    assert found.source_positions[:2].isnan().all()
    assert found.source_positions[2:].tolist() == [[i, j] for i in range(2) for j in range(3)]
    sequence = mixer.weights(tokens(2, 7, DIM))
    assert sequence.query_positions.tolist() == [[0]]
    assert sequence.source_positions[:, 0].tolist() == list(range(7))


def test_what_it_refuses(build, tokens):
    mixer = build(spec_of(), DIM)
    for path in (mixer, mixer.reference, mixer.weights):
        with pytest.raises(ValueError, match=r"no class token in front of grid \(2, 3\), .* give \[B, P \+ 6, C\]"):
            path(tokens(2, 6, DIM), grid=(2, 3))
        with pytest.raises(ValueError, match="ClassAttention: built for rank 1, x has a grid of rank 2"):
            path(tokens(2, 2, 3, DIM))
    with pytest.raises(ValueError, match="num_heads: 3 does not divide 8 channels"):
        build("ClassAttention(num_heads=3)", DIM)


# planted by scripts/mutate
FAULTS = (
    ("scores are not scaled", "(x, grid)]) * self.scale", "(x, grid)])"),
    ("values are keys", "return self._heads(self.v(source))", "return self._heads(self.k(source))"),
    ("one class token alone is a query", "        return prefix\n", "        return 1\n"),
    ("padding takes part in the softmax", "masked_softmax(content, seen)", "masked_softmax(content, None)"),
    ("the fast path sees padding", "sdpa_where(None if valid is None else valid[:, None, None]", "sdpa_where(None"),
    ("class tokens stand on the grid", "prefix = 0 if grid is None else queries", "prefix = 0 * queries"),
    ("a grid without class tokens is taken", "if prefix == 0:", "if prefix < 0:"),
    ("heads lie apart", "tokens.unflatten(-1, (self.num_heads, -1))", "tokens.unflatten(-1, (-1, self.num_heads)).mT"),
)
