"""LinearSpatialReductionAttention against timm's, and a loop over regions where images are padded."""

import pytest
import torch
from timm.models.pvt_v2 import Attention
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

import glocal

HEADS, DIM = 2, 8


def spec_of(**arguments):
    options = {"num_heads": HEADS, **arguments}
    return f"LinearSpatialReductionAttention({', '.join(f'{k}={v}' for k, v in options.items())})"


def by_timm(mixer, qkv_bias=True):
    attention = Attention(DIM, HEADS, linear_attn=True, qkv_bias=qkv_bias).to(mixer.proj.weight.dtype)
    assert {k: v.shape for k, v in attention.named_parameters()} == {k: v.shape for k, v in mixer.named_parameters()}

    def oracle(x):
        return functional_call(attention, dict(mixer.named_parameters()), (x.flatten(1, 2), x.shape[1:3])).view(x.shape)

    return oracle


@pytest.mark.parametrize("grid", [(14, 7), (9, 16), (3, 8), (1, 1)])
@pytest.mark.parametrize("qkv_bias", [True, False])
def test_is_timms_attention(build, check, tokens, grid, qkv_bias):
    mixer = build(spec_of(qkv_bias=qkv_bias), DIM)
    check(mixer, by_timm(mixer, qkv_bias), tokens(2, *grid, DIM))


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_is_timms_attention_in_float32(build, tokens, impl):
    mixer = build(spec_of(), DIM).float()
    mixer.impl = impl
    x = tokens(2, 9, 16, DIM).float()
    assert_close(mixer(x), by_timm(mixer)(x), rtol=1e-5, atol=1e-5)


def by_loop(mixer, attend, pool):
    """Region by region, each image inside its own extent."""

    def regions(n, count):
        return [range(p * n // count, -(-(p + 1) * n // count)) for p in range(count)]

    def oracle(x, valid=None, queries=None):
        grid = x.shape[1:-1]
        images = []
        for b, image in enumerate(x):
            own = grid if valid is None else [int(n.max()) + 1 if n.numel() else 0 for n in valid[b].nonzero().T]
            means = []
            image = image if len(grid) == 2 else image[None]
            own = list(own) if len(grid) == 2 else [1, *own]
            for rows in regions(own[0], pool[0]):
                for columns in regions(own[1], pool[1]):
                    inside = [image[r, c] for r in rows for c in columns]
                    means.append(torch.stack(inside).mean(0) if inside else torch.zeros_like(image[0, 0]))
            images.append(torch.stack(means))
        pooled = torch.stack(images) @ mixer.sr.weight[..., 0, 0].T + mixer.sr.bias
        pooled = nn.functional.layer_norm(pooled, (DIM,), mixer.norm.weight, mixer.norm.bias, 1e-5)
        pooled = pooled * (1 + torch.erf(pooled / 2**0.5)) / 2
        k, v = mixer.kv(pooled).unflatten(-1, (2, HEADS, -1)).unbind(2)
        q = mixer.q(x.flatten(1, -2)).unflatten(-1, (HEADS, -1))
        every = list(range(pool[0] * pool[1]))
        y = mixer.proj(attend(q, k, v, lambda b, i: every if valid is None or valid[b].any() else []))
        return y.view(x.shape) if queries is None else y[:, queries]

    return oracle


@pytest.mark.parametrize(("pool", "grid"), [((3, 2), (5, 4)), ((3, 2), (2, 5)), ((2, 5), (4, 3))])
def test_is_the_loop_at_every_size(build, check, tokens, attend, pool, grid):
    mixer = build(spec_of(pool_size=pool), DIM)
    check(mixer, by_loop(mixer, attend, pool), tokens(2, *grid, DIM))
    check(mixer, by_loop(mixer, attend, pool), tokens(2, *grid, DIM), fast=False, queries=torch.tensor([7, 0, 7]))


@pytest.mark.parametrize("length", [1, 6, 7])
def test_sequences_are_the_loop(build, check, tokens, attend, length):
    mixer = build(spec_of(pool_size=3, rank=1), DIM)
    check(mixer, by_loop(mixer, attend, (1, 3)), tokens(2, length, DIM))
    valid = torch.arange(length).expand(2, -1) < torch.tensor([[length], [(length + 1) // 2]])
    check(mixer, by_loop(mixer, attend, (1, 3)), tokens(2, length, DIM), valid=valid)


def test_each_image_is_pooled_in_its_own_extent(build, check, tokens, attend):
    mixer = build(spec_of(pool_size=(3, 2)), DIM)
    valid = torch.zeros(4, 5, 7, dtype=torch.bool)
    for b, (rows, columns) in enumerate([(5, 7), (4, 3), (1, 1), (0, 0)]):
        valid[b, :rows, :columns] = True
    check(mixer, by_loop(mixer, attend, (3, 2)), tokens(4, 5, 7, DIM), valid=valid)


def test_holes_are_refused(build, tokens):
    mixer = build(spec_of(), DIM)
    valid = torch.ones(2, 5, 7, dtype=torch.bool)
    valid[1, 2, 2] = False
    with pytest.raises(ValueError, match="no rectangle anchored at the origin"):
        mixer(tokens(2, 5, 7, DIM), valid=valid)


@pytest.mark.parametrize("extents", [[(4, 3), (2, 5)], [(1, 1), (9, 8)]])
def test_padding_leaves_images_alone(build, check_padding, extents):
    check_padding(build(spec_of(), DIM), extents, DIM)


def test_sources_stand_at_the_middle_of_their_share(build, tokens):
    weights = build(spec_of(pool_size=(2, 3)), DIM).weights(tokens(2, 4, 9, DIM))
    expected = [[0.5, 1.0], [0.5, 4.0], [0.5, 7.0], [2.5, 1.0], [2.5, 4.0], [2.5, 7.0]]
    assert_close(weights.source_positions, torch.tensor(expected))
    assert weights.source_grid == (2, 3)
    assert weights.weights.shape == (2, HEADS, 36, 6)


@pytest.mark.parametrize("arguments", [{"pool_size": 0}, {"pool_size": (7, 7, 7)}])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match="pool_size"):
        glocal.build(spec_of(**arguments), DIM)


# planted by scripts/mutate
FAULTS = (
    (
        "images are pooled as if padding were theirs",
        "start = (region * extent[:, None]) // count",
        "start = (region * n) // count + 0 * extent[:, None]",
    ),
    (
        "a region ends a token too early",
        "end = ((region + 1) * extent[:, None] + count - 1) // count",
        "end = ((region + 1) * extent[:, None]) // count",
    ),
    (
        "there is no GELU",
        "return nn.functional.gelu(self.norm(self.sr(pooled).flatten(2).mT))",
        "return self.norm(self.sr(pooled).flatten(2).mT)",
    ),
    (
        "GELU comes before the norm",
        "nn.functional.gelu(self.norm(self.sr(pooled).flatten(2).mT))",
        "self.norm(nn.functional.gelu(self.sr(pooled).flatten(2).mT))",
    ),
    (
        "an image of padding alone is seen",
        "valid.flatten(1).any(1, keepdim=True)",
        "torch.ones_like(valid.flatten(1)[:, :1])",
    ),
    (
        "sources stand as if regions were shares of the other axis",
        "return [n / p for n, p in zip(grid, self._pool, strict=True)]",
        "return [n / p for n, p in zip(grid[::-1], self._pool, strict=True)]",
    ),
    ("the cost leaves out the 1x1 convolution", "return pooled * self.dim**2", "return 0"),
)
