"""LocallyEnhancedAttention against the released layer written out densely, image by image and offset by offset."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import glocal
from glocal.mixers import _position_maps

DIM = 16


def spec_of(grid_size, **arguments):
    options = {"grid_size": grid_size, "num_groups": 2, **arguments}
    return f"LocallyEnhancedAttention({', '.join(f'{k}={v!r}' for k, v in options.items())})"


def resized(table, n):
    """[L, C] linearly to 2n - 1 entries, by hand: centres at halves, the last entry repeated."""
    old, new, rows = len(table), 2 * n - 1, []
    for target in range(new):
        place = max((target + 0.5) * old / new - 0.5, 0.0)
        low = int(place)
        rows.append((1 - place + low) * table[low] + (place - low) * table[min(low + 1, old - 1)])
    return torch.stack(rows)


def normalised(parts, norm, seen=None):
    """Batch norm of the last axis over all images together, by the statistics that its mode asks for."""
    mean, var = norm.running_mean, norm.running_var
    if norm.training:
        rows = torch.cat([part.reshape(-1, part.shape[-1]) for part in parts])
        mean = rows.sum(0) / len(rows)
        var = (rows - mean).square().sum(0) / len(rows)
        if seen is not None:
            seen[norm] = (mean.detach(), var.detach() * len(rows) / (len(rows) - 1))
    return [(part - mean) / (var + 1e-5).sqrt() * norm.weight + norm.bias for part in parts]


def vectors_for_positions(mixer, height, width):
    """What is added to queries, keys and values: f(i, j) -> three vectors, or one for queries alone."""
    if mixer.position == "classification":
        table, middle = resized(mixer.relative.T, height * width), height * width - 1
        c = DIM // mixer.num_groups // 2
        return lambda i, j: (
            table[middle + i - j, :c],
            table[middle + j - i, c : -2 * c],
            table[middle + i - j, -2 * c :],
        )
    rows, columns = resized(mixer.rel_height, height), resized(mixer.rel_width, width)
    return lambda i, j: (rows[j // width - i // width + height - 1] + columns[j % width - i % width + width - 1],)


def written_out(mixer, images, seen=None):
    """U, B, w (None without U) and the softmax [G, N, N] of each image [H, W, C]."""
    groups, key_dim = mixer.num_groups, DIM // mixer.num_groups // 2
    qkv = normalised([image.flatten(0, 1) @ mixer.qkv_transform.weight.T for image in images], mixer.bn_qkv, seen)
    similarity, added = [], []
    for image, rows in zip(images, qkv, strict=True):
        count = len(rows)
        q, k, _ = rows.view(count, groups, 4 * key_dim).split([key_dim, key_dim, 2 * key_dim], -1)
        at = vectors_for_positions(mixer, *image.shape[:2])
        each = [[at(i, j) for j in range(count)] for i in range(count)]
        maps = [torch.einsum("igc,jgc->ijg", q, k)]
        maps.append(torch.stack([torch.stack([q[i] @ each[i][j][0] for j in range(count)]) for i in range(count)]))
        if mixer.position == "classification":
            maps.append(torch.stack([torch.stack([k[j] @ each[i][j][1] for j in range(count)]) for i in range(count)]))
            added.append(torch.stack([torch.stack([each[i][j][2] for j in range(count)]) for i in range(count)]))
        similarity.append(torch.cat(maps, -1))
    softmax = [
        part.unflatten(-1, (-1, groups)).sum(-2).softmax(1).movedim(-1, 0)
        for part in normalised(similarity, mixer.bn_similarity, seen)
    ]
    stacked = []
    for b, (rows, shares) in enumerate(zip(qkv, softmax, strict=True)):
        v = rows.view(len(rows), groups, 4 * key_dim)[..., 2 * key_dim :]
        sums = [torch.einsum("gij,jgc->igc", shares, v)]
        if added:
            sums.append(torch.einsum("gij,ijc->igc", shares, added[b]))
        stacked.append(torch.stack(sums, -1).flatten(1))  # the two of a channel side by side
    stacked = normalised(stacked, mixer.bn_output, seen)
    binary = [s.view(*image.shape, -1).sum(-1) for s, image in zip(stacked, images, strict=True)]
    if mixer.unary is None:
        return None, binary, None, softmax

    unary = []
    for image in images:
        planes, local = image.movedim(-1, 0)[None], mixer.x_transform[0]
        if mixer.unary == "deformable":
            ops = pytest.importorskip("torchvision").ops
            moves = nn.functional.conv2d(planes, local.conv_offset.weight, local.conv_offset.bias, padding=1)
            planes = ops.deform_conv2d(planes, moves, local.weight, padding=1)  # groups follow from the weight
        else:
            planes = nn.functional.conv2d(planes, local.weight, padding=1, groups=groups)
        planes = planes[0].movedim(0, -1)
        unary.append(planes @ mixer.x_transform[1].weight.T if groups > 1 else planes)
    unary = normalised(unary, mixer.bn_x, seen)

    gate = [torch.cat(both, -1).relu() @ mixer.reasoning[1].weight.T for both in zip(unary, binary, strict=True)]
    gate = [g.relu() @ mixer.projection[0].weight.T for g in normalised(gate, mixer.reasoning[2], seen)]
    gate = [g.sigmoid() for g in normalised(gate, mixer.projection[1], seen)]
    return unary, binary, gate, softmax


def outputs(mixer, images, seen=None):
    unary, binary, gate, _ = written_out(mixer, images, seen)
    found = binary if unary is None else [u + w * b for u, b, w in zip(unary, binary, gate, strict=True)]
    s = mixer.stride
    return [
        torch.stack(
            [
                torch.stack([y[i : i + s, j : j + s].mean((0, 1)) for j in range(0, y.shape[1], s)])
                for i in range(0, y.shape[0], s)
            ]
        )
        for y in found
    ]


def by_hand(mixer):
    return lambda x: torch.stack(outputs(mixer, list(x)))


CASES = [  # arguments, grid
    ({"grid_size": (3, 4)}, (3, 4)),
    ({"grid_size": 3, "num_groups": 4}, (2, 5)),
    ({"grid_size": (2, 3), "num_groups": 1, "stride": 2}, (5, 2)),
    ({"grid_size": (3, 4), "position": "detection"}, (3, 4)),
    ({"grid_size": (4, 2), "position": "detection", "num_groups": 4}, (2, 5)),
    ({"grid_size": 2, "position": "detection", "num_groups": 1, "stride": 2}, (3, 4)),
    ({"grid_size": (3, 4), "unary": None}, (3, 4)),
    ({"grid_size": 3, "position": "detection", "unary": None, "stride": 2}, (2, 5)),
    ({"grid_size": (3, 4), "unary": "deformable", "position": "detection"}, (3, 4)),
]
CLASSIFICATION, DETECTION = {"grid_size": (3, 4)}, {"grid_size": (3, 4), "position": "detection"}


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of three queries (of two images of two groups and twelve tokens), blocks of five keys."""
    monkeypatch.setattr(_position_maps, "ENTRIES", 150)
    monkeypatch.setattr(_position_maps, "BLOCK", 5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("arguments", "grid"), CASES)
def test_is_the_layer_written_out(build, check, tokens, arguments, grid, training):
    mixer = build(spec_of(**arguments), DIM).train(training)
    check(mixer, by_hand(mixer), tokens(2, *grid, DIM))


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("arguments", "grid"), [CASES[0], CASES[3]])
def test_is_the_layer_in_chunks_of_queries(build, check, tokens, small_chunks, arguments, grid, training):
    mixer = build(spec_of(**arguments), DIM).train(training)
    check(mixer, by_hand(mixer), tokens(2, *grid, DIM))
    with torch.no_grad():
        x = tokens(2, *grid, DIM)
        assert_close(mixer(x), by_hand(mixer)(x))


@pytest.mark.parametrize("arguments", [CLASSIFICATION, DETECTION])
def test_chunks_differentiate_twice(build, tokens, small_chunks, arguments):
    mixer = build(spec_of(**arguments), DIM).train()
    x = tokens(2, 2, 4, DIM).requires_grad_()
    assert torch.autograd.gradgradcheck(mixer.mix, x, fast_mode=True, atol=1e-5)


def test_chunks_are_formed_again_in_the_precision_of_the_forward_pass(tokens, small_chunks):
    """A backward pass runs outside of the autocast region."""
    q, k = (tokens(1, 1, 20, 4).float().requires_grad_() for _ in range(2))
    seen = []

    def rows(start: int, end: int, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        scores = q[:, :, start:end] @ k.mT
        seen.append(scores.dtype)
        return scores

    with torch.autocast("cpu", torch.bfloat16):
        out = _position_maps.in_chunks(rows, 20, 20, q, k)
    out.float().sum().backward()
    assert seen == [torch.bfloat16] * 6  # three chunks, twice


@pytest.mark.parametrize("arguments", [CLASSIFICATION, DETECTION])
def test_shapes_alone_of_many_tokens(small_chunks, arguments):
    mixer = glocal.build(spec_of(**arguments), DIM)
    x = torch.zeros(2, 3, 4, DIM, device="meta", requires_grad=True)
    assert mixer.to("meta")(x).shape == x.shape


@pytest.mark.parametrize("arguments", [CLASSIFICATION, DETECTION])
def test_one_token(build, check, tokens, arguments):
    mixer = build(spec_of(**arguments), DIM).train()
    check(mixer, by_hand(mixer), tokens(3, 1, 1, DIM))
    with pytest.raises(ValueError, match="one value per channel in training"):
        mixer(tokens(1, 1, 1, DIM))


def padded(images):
    grid = [max(image.shape[axis] for image in images) + 1 for axis in range(2)]
    x = 100 * torch.randn(len(images), *grid, DIM, dtype=torch.float64)
    valid = torch.zeros(len(images), *grid, dtype=torch.bool)
    for b, image in enumerate(images):
        x[b, : image.shape[0], : image.shape[1]] = image
        valid[b, : image.shape[0], : image.shape[1]] = True
    return x, valid


def moved(mixer, seen):
    """Running statistics after a call, from those before it and what a call saw."""
    expected = {}
    for name, norm in mixer.named_modules():
        if isinstance(norm, nn.BatchNorm1d):
            for buffer, new in zip(("running_mean", "running_var"), seen[norm], strict=True):
                expected[f"{name}.{buffer}"] = 0.9 * getattr(norm, buffer) + 0.1 * new
            expected[f"{name}.num_batches_tracked"] = norm.num_batches_tracked + 1
    return expected


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


def test_padding_in_chunks_of_queries(build, check_padding, small_chunks):
    check_padding(build(spec_of(**CLASSIFICATION), DIM), [(3, 2), (2, 4)], DIM)


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


def test_running_statistics_are_those_of_the_maps(build, tokens, small_chunks):
    mixer = build(spec_of(**CLASSIFICATION), DIM).train()
    x, seen = tokens(2, 3, 4, DIM), {}
    outputs(mixer, list(x), seen)
    expected = moved(mixer, seen)
    mixer(x)
    for name, buffer in mixer.named_buffers():
        assert_close(buffer, expected[name], msg=lambda text, name=name: f"{name}: {text}")


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


MEASURED = """
import resource, sys, torch, glocal
mixer = glocal.build(f"LocallyEnhancedAttention(grid_size=64, position={sys.argv[1]!r})", 256)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
mixer(torch.randn(1, 4, 4, mixer.dim)).sum().backward()
before = peak()
mixer(torch.randn(1, 64, 64, mixer.dim, requires_grad=True)).square().sum().backward()
print((peak() - before) * 1024)
"""


@pytest.mark.parametrize("position", ["classification", "detection"])
def test_a_training_step_at_64_by_64_tokens_stays_under_a_gigabyte(position):
    """Of resident memory; one N x N map of its 8 groups has 0.54, and a plain layer forms dozens."""
    source = os.pathsep.join([str(Path(glocal.__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, position],
        env=os.environ | {"PYTHONPATH": source}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 1e9


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
            "on shapes alone whole tables are counted",
            "if self.q.is_meta and self.seen is None:",
            "if False:",
        ),
        (
            "looked-at weights have no positions of keys",
            "self.k * key, self.key_table",
            "0 * self.k * key, self.key_table",
        ),
    ),
    "mixers/_position_maps.py": (
        ("shapes alone are formed in chunks", "tensors[0].is_meta or count", "count"),
        ("only the last chunk has a gradient", "total += more", "total.copy_(more)"),
        ("all chunks get the first one's gradient", "grad[:, :, start:end]", "grad[:, :, : end - start]"),
        ("a second derivative takes the first as constant", "again = torch.is_grad_enabled()", "again = False"),
        ("chunks are formed again in full precision", "torch.autocast(**ctx.autocast)", "torch.enable_grad()"),
        (
            "the last chunk is left out",
            "for start in range(0, count, size)]\n    if",
            "for start in range(0, count - size, size)]\n    if",
        ),
    ),
    "positions/relative.py": (
        ("tables are resized to the grid's own middle", "(2 * entry + 1) * entries - new", "2 * entry * entries"),
        ("an image's table is that of the batch's size", "- within + lengths", "- within + lengths.max()"),
    ),
}
