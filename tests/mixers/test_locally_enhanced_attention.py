"""LocallyEnhancedAttention against the released layer written out densely, image by image and offset by offset."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import glocal

from .locally_enhanced_loop import (
    CASES,
    CLASSIFICATION,
    DETECTION,
    DIM,
    by_hand,
    moved,
    outputs,
    padded,
    spec_of,
    written_out,
)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("arguments", "grid"), CASES)
def test_is_the_layer_written_out(build, check, tokens, arguments, grid, training):
    mixer = build(spec_of(**arguments), DIM).train(training)
    check(mixer, by_hand(mixer), tokens(2, *grid, DIM))


@pytest.mark.parametrize("arguments", [CLASSIFICATION, DETECTION])
def test_one_token(build, check, tokens, arguments):
    mixer = build(spec_of(**arguments), DIM).train()
    check(mixer, by_hand(mixer), tokens(3, 1, 1, DIM))
    with pytest.raises(ValueError, match="one value per channel in training"):
        mixer(tokens(1, 1, 1, DIM))


@pytest.mark.parametrize("arguments", [CLASSIFICATION, DETECTION, CASES[2][0], *(CASES[i][0] for i in (5, 6, 8))])
@pytest.mark.parametrize("training", [False, True])
def test_images_of_several_sizes(build, tokens, arguments, training):
    """Padded in one batch: as if each stood alone, but for the statistics of training, which are those of all."""
    mixer = build(spec_of(**arguments), DIM).train(training)
    images = [tokens(*grid, DIM) for grid in ((3, 4), (2, 3), (1, 4))]
    x, valid = padded(images)
    seen = {}
    expected = outputs(mixer, images, seen)
    buffers = moved(mixer, seen) if training else {k: v.clone() for k, v in mixer.named_buffers()}
    x.requires_grad_()
    found = mixer(x, valid=valid)
    ours = [found[b, : y.shape[0], : y.shape[1]] for b, y in enumerate(expected)]
    for one, other in zip(ours, expected, strict=True):
        assert_close(one, other)
    for name, buffer in mixer.named_buffers():
        assert_close(buffer, buffers[name], msg=lambda text, name=name: f"{name}: {text}")
    upstream = [torch.randn_like(y) for y in expected]
    parameters = list(mixer.parameters())
    for one, other in zip(
        torch.autograd.grad(ours, parameters, upstream),
        torch.autograd.grad(expected, parameters, upstream),
        strict=True,
    ):
        assert_close(one, other, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("arguments", [CLASSIFICATION, DETECTION, CASES[2][0]])
def test_padding_leaves_images_alone(build, check_padding, arguments):
    check_padding(build(spec_of(**arguments), DIM), [(3, 2), (2, 4)], DIM)


@pytest.mark.parametrize("arguments", [CLASSIFICATION, DETECTION])
def test_holes_are_refused(build, tokens, arguments):
    valid = torch.ones(2, 3, 4, dtype=torch.bool)
    valid[1, 1, 1] = False
    with pytest.raises(ValueError, match="no rectangle anchored at the origin"):
        build(spec_of(**arguments), DIM)(tokens(2, 3, 4, DIM), valid=valid)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("arguments", "grid"), [CASES[0], CASES[1], CASES[3], CASES[4], CASES[8]])
def test_terms_and_weights_are_those_of_the_layer(build, tokens, arguments, grid, training):
    mixer = build(spec_of(**arguments), DIM).train(training)
    x, before, draws = tokens(2, *grid, DIM), mixer.state_dict(), torch.get_rng_state()
    before = {k: v.clone() for k, v in before.items()}
    terms, weights = mixer.terms(x), mixer.weights(x)
    *expected, softmax = (torch.stack(part) for part in written_out(mixer, list(x)))
    for name, value in zip(("unary", "binary", "gate"), expected, strict=True):
        assert_close(terms[name], value)
    assert_close(weights.weights, softmax)
    queries = torch.tensor([7, 0, 7])
    some = mixer.weights(x, queries=queries)
    assert_close(some.weights, softmax[:, :, queries])
    assert_close(some.query_positions, weights.source_positions[queries])
    assert weights.out_grid == weights.source_grid == grid
    assert_close(terms["unary"] + terms["gate"] * terms["binary"], mixer.mix(x))
    assert torch.equal(torch.get_rng_state(), draws)
    for name, value in mixer.state_dict().items():
        assert torch.equal(value, before[name]), name


def test_attention_alone_has_one_term(build, tokens):
    mixer, x = build(spec_of(**CLASSIFICATION, unary=None), DIM), tokens(2, 3, 4, DIM)
    _, expected, _, softmax = written_out(mixer, list(x))
    terms = mixer.terms(x)
    assert list(terms) == ["binary"] and not hasattr(mixer, "x_transform")
    assert_close(terms["binary"], torch.stack(expected))
    assert_close(mixer.weights(x).weights, torch.stack(softmax))
    with torch.no_grad(), glocal.inspect(mixer) as seen:
        mixer(x)
    (call,) = seen
    assert call.shares() == {} and call.rebuild_error() < 1e-9


def test_terms_of_a_padded_batch_are_those_of_each_image(build, tokens):
    mixer = build(spec_of(**CLASSIFICATION), DIM)
    images = [tokens(3, 4, DIM), tokens(2, 3, DIM)]
    x, valid = padded(images)
    terms = mixer.terms(x, valid=valid)
    for b, image in enumerate(images):
        for name, value in mixer.terms(image[None]).items():
            assert_close(terms[name][b, : image.shape[0], : image.shape[1]], value[0])


@pytest.mark.parametrize("arguments", [CLASSIFICATION, DETECTION])
def test_the_gate_goes_from_the_convolution_to_the_plain_sum(build, tokens, arguments):
    mixer, x = build(spec_of(**arguments), DIM), tokens(2, 3, 4, DIM)
    terms = mixer.terms(x)
    with torch.no_grad():
        mixer.projection[1].weight.zero_()
        for bias, expected in ((-1e4, terms["unary"]), (1e4, terms["unary"] + terms["binary"])):
            mixer.projection[1].bias.fill_(bias)
            assert_close(mixer(x), expected)


@pytest.mark.parametrize("arguments", [CLASSIFICATION, DETECTION])
def test_an_untrained_gate_is_half_open(arguments):
    mixer = glocal.build(spec_of(**arguments), 64)
    gate = mixer.terms(torch.randn(8, 7, 7, 64))["gate"]
    assert gate.min() > 0 and gate.max() < 1
    assert abs(gate.mean().item() - 0.5) < 0.02 and gate.std() > 0.1


def test_a_deformable_convolution_starts_as_a_plain_one():
    mixers = [glocal.build(spec_of(grid_size=4, unary=kind), 16).eval() for kind in ("deformable", "convolution")]
    state = mixers[0].state_dict()
    assert not any(state.pop(f"x_transform.0.conv_offset.{part}").any() for part in ("weight", "bias"))
    mixers[1].load_state_dict(state)
    x = torch.randn(1, 4, 5, 16)
    assert_close(mixers[0](x), mixers[1](x))


@pytest.mark.parametrize(
    ("dim", "position", "grid_size", "expected"),
    [
        (256, "classification", 14, 495_600),
        (512, "classification", 14, 1_925_040),
        (1024, "classification", 14, 7_585_584),
        (256, "detection", 64, 474_112),
        (512, "detection", 64, 1_882_080),
        (1024, "detection", 64, 7_499_680),
    ],
)
def test_parameters_of_the_released_models(dim, position, grid_size, expected):
    with torch.device("meta"):
        mixer = glocal.build(f"LocallyEnhancedAttention(grid_size={grid_size}, position={position!r})", dim)
    assert sum(p.numel() for p in mixer.parameters()) == expected


def test_cost_is_that_of_the_docstring():
    n, c, g = 35, DIM, 2
    layers = n * c * c * (6 + 9 / g)
    classification, detection, alone = (
        glocal.build(spec_of((5, 7), **more), c) for more in ({}, {"position": "detection"}, {"unary": None})
    )
    assert classification.macs((5, 7)) == layers + 3.5 * n * n * c
    assert detection.macs((5, 7)) == layers + 1.5 * n * n * c + n * (5 + 7 - 1) * c
    assert alone.macs((5, 7)) == 2 * n * c * c + 3.5 * n * n * c


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"num_groups": 3}, "num_groups: 3 does not divide half of 16"),
        ({"num_groups": 16}, "num_groups: 16 does not divide half of 16"),
        ({"position": "both"}, "position: 'both', must be"),
        ({"unary": "3x3"}, "unary: '3x3', must be 'convolution' or 'deformable'"),
        ({"stride": 0}, "stride: 0"),
        ({"grid_size": (3, 4, 5)}, "grid_size"),
    ],
)
def test_bad_arguments_are_refused(arguments, words):
    with pytest.raises(ValueError, match=words):
        glocal.build(spec_of(**{"grid_size": 4, **arguments}), DIM)


def test_synchronised_norm_of_the_maps_is_refused_in_training(build, tokens):
    mixer, x = build(spec_of(**CLASSIFICATION), DIM), tokens(2, 3, 4, DIM)
    expected = mixer(x)
    norm = nn.SyncBatchNorm(6).double()
    norm.load_state_dict(mixer.bn_similarity.state_dict())
    mixer.bn_similarity = norm.eval()
    assert_close(mixer(x), expected)
    with pytest.raises(ValueError, match="LocallyEnhancedAttention: bn_similarity is a SyncBatchNorm"):
        mixer.train()(x)


# planted by scripts/mutate
FAULTS = {
    "mixers/locally_enhanced_attention.py": (
        (
            "keys' vectors are those of the offset from query to source",
            "self.order = self.length = self.seen = None",
            "self.order = self.length = self.seen = None\n        relative = relative.flip(1)",
        ),
        (
            "keys take the table of queries in training's statistics",
            "maps.sequence_sums(self.k, self.key_table, self.length)",
            "maps.sequence_sums(self.k, self.query_table, self.length)",
        ),
        (
            "the outputs of queries stay in reverse order",
            "mixed = mixed.flip(2).transpose(1, 2).flatten(2)",
            "mixed = mixed.transpose(1, 2).flatten(2)",
        ),
        (
            "the two sums of a channel lie apart",
            "return torch.stack([weights @ v, at_places.to(v.dtype)], -1)",
            "return torch.stack([weights @ v, at_places.to(v.dtype)], -2)",
        ),
        (
            "a padded image's raster is as wide as the batch's",
            "self.length, qkv = size, pick(qkv, self.order)",
            "self.order = torch.arange(count).expand(len(qkv), -1)\n            self.length = size",
        ),
        (
            "padding is a key of the raster",
            "(torch.arange(count, device=qkv.device) < size[:, None])[:, None, None]",
            "(torch.arange(count, device=qkv.device) >= 0).expand(len(size), -1)[:, None, None]",
        ),
        (
            "padding is a key of the axial form",
            "None if valid is None else valid.flatten(1)[:, None, None]\n        self.q",
            "None\n        self.q",
        ),
        (
            "rows and columns of the axial form change places",
            "height[..., None] + width[..., None, :]",
            "height[..., None, :] + width[..., None]",
        ),
        (
            "axial offsets count from the source to the query",
            "entry = torch.arange(n, device=qkv.device) - places[:, axis, None] + n - 1",
            "entry = places[:, axis, None] - torch.arange(n, device=qkv.device) + n - 1",
        ),
        (
            "padding counts in the maps' statistics",
            "qkv = qkv if valid is None else qkv.masked_fill",
            "qkv = qkv if True else qkv.masked_fill",
        ),
        ("the maps' statistics count images, not pairs", "attention.q.shape[2] ** 2", "attention.q.shape[2]"),
        (
            "running variances of the maps are biased",
            "unbiased = variance.detach() * count / (count - 1).clamp(min=1)",
            "unbiased = variance.detach()",
        ),
        (
            "no gradient flows through the maps' variance",
            "return norm.weight * (variance + norm.eps).rsqrt() + nothing",
            "return norm.weight * (variance.detach() + norm.eps).rsqrt() + nothing",
        ),
        ("looking moves the statistics of the maps", "            if update:\n", "            if True:\n"),
        ("the gate has no ReLU in front", "torch.cat([unary, binary], -1).relu()", "torch.cat([unary, binary], -1)"),
        (
            "the gate stands at the convolution",
            'terms["unary"] + terms["gate"] * terms["binary"]',
            'terms["gate"] * terms["unary"] + terms["binary"]',
        ),
        ("a stride averages padding", "mean / torch.where(share > 0, share, 1)", "mean"),
        (
            "the convolution reads what stands in the padding",
            "x = x if valid is None else x.masked_fill(~valid[..., None], 0)\n        attention",
            "attention",
        ),
        (
            "a deformable convolution of the second version",
            "groups=num_groups, modulated=False, bias=False",
            "groups=num_groups, bias=False",
        ),
        (
            "attention alone is a gated sum",
            'out = terms["binary"] if self.unary is None',
            'out = terms["binary"].sigmoid() * terms["binary"] if self.unary is None',
        ),
        (
            "looked-at weights have no positions of keys",
            "self.k * key, self.key_table",
            "0 * self.k * key, self.key_table",
        ),
    ),
    "positions/relative.py": (
        ("tables are resized to the grid's own middle", "(2 * entry + 1) * entries - new", "2 * entry * entries"),
        ("an image's table is that of the batch's size", "- within + lengths", "- within + lengths.max()"),
    ),
}
