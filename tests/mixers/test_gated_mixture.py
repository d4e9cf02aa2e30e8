"""GatedMixture against its two operators, each computed from its own formula on the shared values."""

import pytest
import torch
from torch.nn import functional as F
from torch.testing import assert_close

import glocal
from glocal import contract
from glocal.mixer import TokenMixer

DIM = 8
ATTENTION_AND_CONV = "GatedMixture(a=SelfAttention(num_heads=2), b=DepthwiseConv(kernel_size=3))"

# what the contract may hear
REFUSES = ("GatedMixture: a mixture before the softmax has its definition only",)

FAULTS = (
    (
        "the gate is turned round",
        "shares = [(1 - gate) * a.weights, gate * b.weights]",
        "shares = [gate * a.weights, (1 - gate) * b.weights]",
    ),
    (
        "the fast path's gate is turned round",
        "(1 - gate) * sums[0] + gate * sums[1]",
        "gate * sums[0] + (1 - gate) * sums[1]",
    ),
    (
        "heads are dealt out in turn",
        "rows.repeat_interleave(groups // rows.shape[1], 1)",
        "rows.repeat(1, groups // rows.shape[1], 1, 1)",
    ),
    (
        "the gate's channels are dealt out in turn",
        ".repeat_interleave(self.dim // self._groups)",
        ".repeat(self.dim // self._groups)",
    ),
    (
        "the gate gets no gradient",
        "gate = self.gate.sigmoid()[:, None, None]",
        "gate = self.gate.detach().sigmoid()[:, None, None]",
    ),
    ("the scores' gate is turned round", "(1 - gate) * of_a + gate * of_b", "gate * of_a + (1 - gate) * of_b"),
    (
        "padding is not handed on",
        "bound, call = part._bind(x, given(valid=valid, queries=queries))\n        found",
        "bound, call = part._bind(x, given(queries=queries))\n        found",
    ),
    (
        "statistics never move",
        "bound, call, update=update)",
        "bound, call, update=False)",
    ),
    ("unused parameters stay", "if gradient is None:", "if False:"),
    (
        "the caller's operators are taken apart",
        "self.a, self.b = copy.deepcopy(a), copy.deepcopy(b)",
        "self.a, self.b = a, b",
    ),
    ("local weights read a neighbour", "index = index[:, 0].expand(", "index = index[:, 0].roll(1, 1).expand("),
    ("a weight rounded to zero masks", "queries, update_statistics, equal=True)", "queries, update_statistics)"),
    ("values that make weights are taken out", "_reads(part, x) == {0, 1}", "True"),
    ("what is frozen is learned again", ", requires_grad=parameter.requires_grad)", ")"),
    (
        "what was made for inference has no parameters",
        "torch.inference_mode(False), torch.enable_grad()",
        "torch.enable_grad()",
    ),
    ("queries are not those of the scores", "return scores if selected else scores[:, :, queries]", "return scores"),
)


def attention_of(mixer, x, valid=None):
    """softmax(q k^T / sqrt(D)) v of the mixture's values, with the heads of `mixer`."""
    heads, tokens = mixer.num_heads, x.flatten(1, -2)
    q, k = F.linear(tokens, mixer.qkv.weight, mixer.qkv.bias).chunk(2, -1)
    q, k = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k))
    mask = None if valid is None else valid.flatten(1)[:, None, None]

    def mix(v):
        v = v.unflatten(-1, (heads, -1)).transpose(1, 2)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)

    return mix


def by_parts(mixer):
    def oracle(x, valid=None):
        v = mixer.v(x)
        v = v if valid is None else v * valid[..., None]
        of_a = attention_of(mixer.a, x, valid)(v.flatten(1, -2)).view(x.shape)
        convolve = F.conv2d if x.dim() == 4 else F.conv1d
        of_b = convolve(v.movedim(-1, 1), mixer.b.weight, padding=1, groups=DIM).movedim(1, -1)
        gate = 1 / (1 + (-mixer.gate).exp())  # as many heads as channels, since the convolution has
        return mixer.proj((1 - gate) * of_a + gate * of_b)

    return oracle


@pytest.mark.parametrize("grid", [(3, 4), (1, 5), (1, 1), (7,), (1,)])
def test_attention_and_convolution(build, check, tokens, grid):
    mixer = build(ATTENTION_AND_CONV, DIM, rank=len(grid))
    check(mixer, by_parts(mixer), tokens(2, *grid, DIM))


@pytest.mark.parametrize("grid", [(5, 6), (1, 3)])
def test_local_operators_of_any_stride_and_group(build, check, tokens, grid):
    """One weight for all slots, weights for each channel, and slots of their own for each channel."""
    spec = "GatedMixture(a=GatedMixture(a=AveragePooling(stride=2), b=DepthwiseConv(kernel_size=5, stride=2)), b={})"
    mixer = build(spec.format("MaxPooling(stride=2)"), DIM)

    def oracle(x):
        v = mixer.v(x).movedim(-1, 1)
        mean = F.avg_pool2d(v, 3, 2, 1, count_include_pad=False)
        inner = mixer.a.gate.sigmoid()[:, None, None]
        kernel = mixer.a.b.weight
        of_a = (1 - inner) * mean + inner * F.conv2d(v, kernel, stride=2, padding=2, groups=DIM)
        where = F.max_pool2d(x.movedim(-1, 1), 3, 2, 1, return_indices=True)[1]
        of_b = v.flatten(2).gather(2, where.flatten(2)).view(of_a.shape)
        gate = mixer.gate.sigmoid()[:, None, None]
        return mixer.proj(((1 - gate) * of_a + gate * of_b).movedim(1, -1))

    check(mixer, oracle, tokens(2, *grid, DIM))


def test_both_heed_padding(build, check, tokens):
    mixer, valid = build(ATTENTION_AND_CONV, DIM), torch.rand(2, 3, 4) < 0.6
    valid[:, 0, 0] = True
    check(mixer, by_parts(mixer), tokens(2, 3, 4, DIM), valid=valid)


def test_groups_repeat_to_their_common_multiple(build, check, tokens):
    mixer = build("GatedMixture(a=SelfAttention(num_heads=2), b=SelfAttention(num_heads=3))", 12)
    assert mixer.gate.shape == (6,)

    def oracle(x):
        v = mixer.v(x).flatten(1, -2)
        gate = torch.stack([mixer.gate.sigmoid()] * 2, 1).flatten()  # two channels a group
        mixed = (1 - gate) * attention_of(mixer.a, x)(v) + gate * attention_of(mixer.b, x)(v)
        return mixer.proj(mixed).view(x.shape)

    check(mixer, oracle, tokens(2, 3, 4, 12))
    assert mixer.weights(tokens(2, 3, 4, 12)).index is None


PAIRS = [
    ("SelfAttention(num_heads=2)", "DepthwiseConv(kernel_size=3)"),
    ("SelfAttention(num_heads=2)", "NeighborhoodAttention(kernel_size=3, num_heads=4)"),
    ("WindowAttention(window_size=2, num_heads=2)", "AveragePooling()"),
    ("RelativeAttention(grid_size=(3, 4), num_heads=1)", "SelfAttention(num_heads=4)"),
]


@pytest.mark.parametrize(("a", "b"), PAIRS)
def test_the_gate_shut_or_open_gives_one_of_them_exactly(build, tokens, a, b):
    mixer, x = build(f"GatedMixture(a={a}, b={b})", DIM), tokens(2, 3, 5, DIM)
    for value, part in ((-1e3, mixer.a), (1e3, mixer.b)):
        with torch.no_grad():
            mixer.gate.fill_(value)
        dense, own = mixer.weights(x).dense(), part.weights(x).dense()
        own = own.repeat_interleave(dense.shape[1] // own.shape[1], 1).expand_as(dense)
        assert torch.equal(dense, own)


@pytest.mark.parametrize("before_softmax", [False, True])
def test_an_operator_gated_with_itself_is_itself(build, tokens, before_softmax):
    part = build("NeighborhoodAttention(kernel_size=3, num_heads=2)", DIM)
    mixer = glocal.mixers.GatedMixture(DIM, a=part, b=part, before_softmax=before_softmax).double()
    x, valid = tokens(2, 4, 5, DIM), torch.ones(2, 4, 5, dtype=torch.bool)
    valid[1, :, 3:] = False
    with torch.no_grad():
        mixer.gate.normal_()
    for call in ({}, {"valid": valid}, {"queries": torch.tensor([7, 0])}):
        assert_close(mixer.weights(x, **call).dense(), part.weights(x, **call).dense())


def test_before_the_softmax_scores_are_mixed(build, check, tokens):
    spec = "GatedMixture(a=SelfAttention(num_heads=2), b=RelativeAttention(grid_size=(3, 4), num_heads=2), {})"
    mixer = build(spec.format("before_softmax=True"), DIM)
    places = [(y, x) for y in range(3) for x in range(4)]

    def oracle(x):
        g = mixer.gate.sigmoid()[:, None, None]
        scores = []
        for part in (mixer.a, mixer.b):
            q, k = part.qkv(x.flatten(1, -2)).unflatten(-1, (2, 2, DIM // 2)).unbind(2)
            scores.append(torch.einsum("bnhd,bmhd->bhnm", q, k) / (DIM // 2) ** 0.5)
        table = mixer.b.relative_position_bias_table
        bias = [table[:, i[0] - j[0] + 2, i[1] - j[1] + 3] for i in places for j in places]
        scores[1] = scores[1] + torch.stack(bias, -1).view(2, 12, 12)
        weights = ((1 - g) * scores[0] + g * scores[1]).softmax(-1)
        v = mixer.v(x.flatten(1, -2)).unflatten(-1, (2, -1))
        return mixer.proj(torch.einsum("bhnm,bmhd->bnhd", weights, v).flatten(2)).view(x.shape)

    check(mixer, oracle, tokens(2, 3, 4, DIM), fast=False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_score_may_outweigh_a_weight_that_is_rounded_to_zero(dtype):
    """Two tables that pull to opposite sides, each so far that its own softmax is one-hot; together they cancel."""
    table = "RelativeAttention(grid_size=(5,), num_heads=1)"
    mixer = glocal.build(f"GatedMixture(a={table}, b={table}, before_softmax=True)", DIM).to(dtype).eval()
    slope = torch.arange(9.0)
    with torch.no_grad():
        for part, sign in ((mixer.a, 1), (mixer.b, -1)):
            part.relative_position_bias_table.copy_((sign * 400 * slope).view_as(part.relative_position_bias_table))
            part.qkv.weight.zero_()
            part.qkv.bias.zero_()
    x = torch.randn(1, 5, DIM).to(dtype)
    for part in (mixer.a, mixer.b):
        assert (part.weights(x).weights == 0).any()
    assert_close(mixer.weights(x).weights, torch.full((1, 1, 5, 5), 0.2, dtype=dtype))


def test_before_the_softmax_one_causal_operator_makes_both_causal(build, tokens):
    spec = "GatedMixture(a=SelfAttention(num_heads=2, causal=True), b=SelfAttention(num_heads=2), before_softmax={})"
    for before_softmax in (False, True):
        mixer = build(spec.format(before_softmax), DIM)
        assert mixer.causal == before_softmax
        assert (mixer.weights(tokens(1, 6, DIM)).dense().triu(1) == 0).all() == before_softmax


def test_before_the_softmax_queries_are_rows(build, tokens):
    """Of operators that do not take queries themselves as well."""
    part = "DynamicConv(kernel_size=3, num_heads=2)"
    mixer, x = build(f"GatedMixture(a={part}, b={part}, before_softmax=True)", DIM), tokens(2, 3, 4, DIM)
    queries = torch.tensor([7, 0])
    assert_close(mixer(x, queries=queries), mixer(x).flatten(1, 2)[:, queries])


@pytest.mark.parametrize(
    ("a", "b", "sentence"),
    [
        ("SelfAttention(num_heads=2)", "DepthwiseConv()", "b: DepthwiseConv has no scores"),
        ("AveragePooling()", "SelfAttention(num_heads=2)", "a: AveragePooling has no scores"),
        ("SelfAttention(num_heads=2)", "NeighborhoodAttention(num_heads=2)", "reads other sources"),
        ("WindowAttention(window_size=3, num_heads=2)", "NeighborhoodAttention(kernel_size=3, num_heads=2)", "other s"),
        (
            "SelfAttention(num_heads=2)",
            "RelativeAttention(grid_size=(3, 4), num_heads=2, after_softmax=True)",
            "b: RelativeAttention has weights that are more than one softmax",
        ),
    ],
)
def test_what_cannot_be_mixed_before_the_softmax_is_refused(a, b, sentence):
    with pytest.raises(ValueError, match=sentence):
        glocal.build(f"GatedMixture(a={a}, b={b}, before_softmax=True)", DIM)


def test_every_parameter_is_used_and_the_callers_operators_stay_whole(build, tokens):
    a, b = build("SelfAttention(num_heads=2)", DIM), build("DepthwiseConv(kernel_size=3)", DIM)
    x = tokens(2, 4, 5, DIM)
    before = a(x), b(x)
    mixer = glocal.mixers.GatedMixture(DIM, a=a, b=b).double()
    assert {name: tuple(p.shape) for name, p in mixer.named_parameters()} == {
        "gate": (DIM,),
        "a.qkv.weight": (2 * DIM, DIM),
        "a.qkv.bias": (2 * DIM,),
        "b.weight": (DIM, 1, 3, 3),
        "v.weight": (DIM, DIM),
        "v.bias": (DIM,),
        "proj.weight": (DIM, DIM),
        "proj.bias": (DIM,),
    }
    assert set(mixer.state_dict()) == {name for name, _ in mixer.named_parameters()}
    assert torch.equal(a(x), before[0]) and torch.equal(b(x), before[1])
    assert_close(mixer.a.weights(x).dense(), a.weights(x).dense())


PARTS = [spec for spec in contract.examples() if isinstance(glocal.build(spec, 32), TokenMixer)]


@pytest.mark.parametrize("spec", PARTS)
def test_every_operator_can_be_a_part(build, tokens, spec):
    """With the gate shut the weights are its own, and every parameter that it keeps makes them."""
    part = build(spec, 32)
    x = tokens(2, *(7, 5)[: part.rank or 2], 32)
    if part.needs_source:
        with pytest.raises(ValueError, match="source is not given"):
            glocal.mixers.GatedMixture(32, a=part, b=part).double()(x)
        return
    own = part.weights(x)
    if 32 % own.num_groups:
        with pytest.raises(ValueError, match="does not divide 32 channels"):
            glocal.mixers.GatedMixture(32, a=part, b=part)
        return
    mixer = glocal.mixers.GatedMixture(32, a=part, b=part).double().eval()
    if own.num_sources != x[0, ..., 0].numel():
        with pytest.raises(ValueError, match="only operators that add no tokens"):
            mixer(x)
        return
    with torch.no_grad():
        mixer.gate.fill_(-1e3)
    dense = own.dense()
    assert torch.equal(mixer.weights(x).dense(), dense.expand_as(mixer.weights(x).dense()))
    weights = mixer.a.weights(x).weights
    if weights.requires_grad:
        used = torch.autograd.grad(weights.sum(), list(mixer.a.parameters()), allow_unused=True)
        assert None not in used
    else:
        assert not list(mixer.a.parameters())


def test_values_that_make_weights_stay(build):
    """MultiScaleAttention's kernels are made of its values."""
    part = "MultiScaleAttention(num_heads=2, kernel_sizes=(3,))"
    mixer = build(f"GatedMixture(a={part}, b=SelfAttention(num_heads=2))", DIM)
    assert mixer.a.qkv.weight.shape == (3 * DIM, DIM) and mixer.b.qkv.weight.shape == (2 * DIM, DIM)


def test_what_is_frozen_stays_frozen(build):
    a, b = build("SelfAttention(num_heads=2)", DIM), build("DepthwiseConv(kernel_size=3)", DIM)
    a.requires_grad_(False)
    mixer = glocal.mixers.GatedMixture(DIM, a=a, b=b)
    learned = {name for name, parameter in mixer.named_parameters() if parameter.requires_grad}
    assert learned == {"gate", "b.weight", "v.weight", "v.bias", "proj.weight", "proj.bias"}
    assert set(mixer.state_dict()) == {*learned, "a.qkv.weight", "a.qkv.bias"}


@pytest.mark.parametrize("context", [torch.inference_mode(), torch.no_grad(), torch.device("meta")])
@pytest.mark.parametrize("before_softmax", [False, True])
def test_where_it_is_built_does_not_change_what_it_holds(context, before_softmax):
    part = "NeighborhoodAttention(kernel_size=3, num_heads=2)"
    spec = f"GatedMixture(a={part}, b={part}, before_softmax={before_softmax})"
    expected = {name: tensor.shape for name, tensor in glocal.build(spec, DIM).state_dict().items()}
    with context:
        mixer = glocal.build(spec, DIM)
    assert {name: tensor.shape for name, tensor in mixer.state_dict().items()} == expected


class Aside(TokenMixer):
    """Its weights are a softmax of its scores, but `weights` does not ask `scores` for them."""

    def __init__(self, dim):
        super().__init__(dim)

    def values(self, source):
        return source.flatten(1, -2).unsqueeze(2)

    def scores(self, x):
        tokens = x.flatten(1, -2)
        return {"content": (tokens @ tokens.mT)[:, None]}

    def weights(self, x):
        tokens = x.flatten(1, -2)
        grid = tuple(x.shape[1:-1])
        places = glocal.aggregation.grid_positions(grid)
        softmax = (tokens @ tokens.mT)[:, None].softmax(-1)
        return glocal.Aggregation(softmax, None, tokens.shape[1], places, places, grid, grid)


def test_weights_that_pass_their_scores_by_are_refused():
    part = Aside(DIM)
    with pytest.raises(ValueError, match="Aside does not make its weights from what its scores"):
        glocal.mixers.GatedMixture(DIM, a=part, b=part, before_softmax=True)


def test_statistics_move_once_in_training(build, tokens):
    mixer = build("GatedMixture(a=DynamicDepthwiseConv(kernel_size=3), b=AveragePooling())", DIM).train()
    for mixer.impl in ("reference", "fast"):
        count = int(mixer.a.bn.num_batches_tracked)
        mixer.weights(tokens(3, 3, 4, DIM))
        assert mixer.a.bn.num_batches_tracked == count
        mixer(tokens(3, 3, 4, DIM))
        assert mixer.a.bn.num_batches_tracked == count + 1


def test_padding_leaves_images_alone(build, check_padding):
    spec = "GatedMixture(a=WindowAttention(window_size=3, num_heads=2, shift_size=1), b=AveragePooling())"
    check_padding(build(spec, DIM), [(4, 5), (2, 6)], DIM)


def test_its_text_builds_it_again():
    text = "GatedMixture(a=SelfAttention(num_heads=2, qkv_bias=False), b=DepthwiseConv(kernel_size=5, bias=False))"
    mixer = glocal.build(text, DIM)
    assert repr(mixer) == text
    assert repr(glocal.build(ATTENTION_AND_CONV, DIM)) == ATTENTION_AND_CONV
    nested = glocal.build(f"GatedMixture(a={text}, b=AveragePooling())", DIM)
    assert repr(glocal.build(repr(nested), DIM)) == repr(nested)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ("a=3, b=SelfAttention(num_heads=2)", "a: 3 is no token mixer"),
        ("a=SelfAttention(num_heads=2), b=AveragePooling(rank=1), before_softmax=1", "before_softmax: 1"),
        ("a=AveragePooling(), b=AveragePooling(rank=1)", "b: built for rank 1, a for rank 2"),
        ("a=Convolution(kernel_size=3), b=SelfAttention(num_heads=2)", "both repeat to 18, which does not divide 8"),
    ],
)
def test_what_does_not_go_together_is_refused(arguments, sentence):
    with pytest.raises(ValueError, match=sentence):
        glocal.build(f"GatedMixture({arguments})", DIM)


def test_what_does_not_fit_at_a_call_is_refused(tokens):
    x = tokens(1, 5, 6, DIM).float()
    strides = glocal.build("GatedMixture(a=AveragePooling(stride=2), b=SelfAttention(num_heads=2))", DIM)
    for call in (strides, strides.weights):
        with pytest.raises(ValueError, match="give both the same stride"):
            call(x)
    padded = "GatedMixture(a=WindowAttention(window_size=4, num_heads=2, mask_padding=False), b=AveragePooling())"
    with pytest.raises(ValueError, match="WindowAttention reads 64 sources, x has 30 tokens"):
        glocal.build(padded, DIM)(x)
    with pytest.raises(ValueError, match="a: built for 4 channels, dim is 8"):
        glocal.mixers.GatedMixture(8, a=glocal.build("AveragePooling()", 4), b=glocal.build("AveragePooling()", 8))
