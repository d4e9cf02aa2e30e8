"""HaloAttention against timm's HaloAttn at its sizes, and against a loop over queries at every size."""

import math

import pytest
import torch
from timm.layers.halo_attn import HaloAttn
from torch import nn
from torch.func import functional_call
from torch.testing import assert_close

import glocal

HEADS, DIM = 2, 16  # timm rounds the channels of keys to a multiple of 8

FAULTS = (
    (
        "the window starts at the block, without its halo in front",
        "[:, None] * block - self.halo_size",
        "[:, None] * block",
    ),
    (
        "the table is read by query minus source",
        "torch.arange(window, device=x.device) - (place % block)[:, None] + window - 1",
        "(place % block)[:, None] - torch.arange(window, device=x.device) + window - 1",
    ),
    (
        "the fast path's table is one row off",
        "torch.arange(window, device=q.device) - place[:, None] + window - 1",
        "torch.arange(window, device=q.device) - place[:, None] + window - 2",
    ),
    (
        "height and width change places",
        '("height_rel", "width_rel")[-len(window) :]',
        '("width_rel", "height_rel")[:len(window)]',
    ),
    (
        "position is scaled as well",
        'torch.einsum("bngd,nkd->bgnk", q, table[entry])',
        'torch.einsum("bngd,nkd->bgnk", q * self.scale, table[entry])',
    ),
    (
        "content is not scaled",
        'torch.einsum("bmpgd,bmkgd->bmgpk", q * self.scale, k)',
        'torch.einsum("bmpgd,bmkgd->bmgpk", q, k)',
    ),
    (
        "keys and values change places",
        "kv.weight.unflatten(0, split)[:, part]",
        "kv.weight.unflatten(0, split)[:, 1 - part]",
    ),
    (
        "all keys come before all values",
        "weight.unflatten(0, split)[:, part]",
        "weight.unflatten(0, (2, self.num_heads, -1))[part]",
    ),
    ("padding is always masked", "seen = index >= 0 if self.mask_padding else None", "seen = index >= 0"),
    (
        "padding is seen",
        "return torch.where((index >= 0) & pick_or_zero(valid.flatten(1), index), index, -1)",
        "return index",
    ),
    (
        "the last block is dropped",
        "torch.arange((n + block - 1) // block, device=device)",
        "torch.arange(max(n // block, 1), device=device)",
    ),
    ("padding in front is taken", "extents(valid)  #", "pass  #"),
    ("projections start as linear layers do", "nn.init.trunc_normal_(layer.weight, std=dim**-0.5)", "pass"),
)


def spec_of(block_size, halo_size, **arguments):
    options = {"block_size": block_size, "halo_size": halo_size, "num_heads": HEADS, **arguments}
    return f"HaloAttention({', '.join(f'{k}={v!r}' for k, v in options.items())})"


def by_timm(mixer, block_size, halo_size):
    twin = HaloAttn(DIM, num_heads=HEADS, block_size=block_size, halo_size=halo_size, qkv_bias=mixer.qkv_bias).double()

    def oracle(x):
        weights = dict(mixer.named_parameters())
        weights = {k: v[..., None, None] if k in ("q.weight", "kv.weight") else v for k, v in weights.items()}
        return functional_call(twin, weights, x.movedim(-1, 1)).movedim(1, -1)

    return oracle


@pytest.mark.parametrize(
    ("block_size", "halo_size", "grid"),
    [(2, 1, (4, 6)), (4, 1, (4, 8)), (3, 2, (6, 3)), (2, 3, (2, 4)), (1, 1, (3, 4)), (2, 0, (4, 2)), (1, 0, (1, 1))],
)
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_is_timms_where_padding_is_seen(build, check, tokens, block_size, halo_size, grid, qkv_bias):
    mixer = build(spec_of(block_size, halo_size, qkv_bias=qkv_bias, mask_padding=False), DIM)
    check(mixer, by_timm(mixer, block_size, halo_size), tokens(2, *grid, DIM))


def by_loop(mixer, places, block, halo):
    def oracle(x):
        batch, *grid, dim = x.shape
        size = dim // HEADS
        q = mixer.q(x)
        kv = mixer.kv(x).unflatten(-1, (HEADS, 2 * size))
        tables = [mixer.pos_embed.width_rel]
        if len(grid) == 2:
            tables = [mixer.pos_embed.height_rel, *tables]
        images = []
        for b in range(batch):
            rows = []
            for query in places(grid):
                first = [p // n * n - halo for p, n in zip(query, block, strict=True)]
                near = [
                    tuple(f + o for f, o in zip(first, place, strict=True))
                    for place in places([n + 2 * halo for n in block])
                ]
                heads = []
                for h in range(HEADS):
                    own = q[(b, *query)][h * size : (h + 1) * size]
                    scores, values = [], []
                    for source in near:
                        inside = all(0 <= s < n for s, n in zip(source, grid, strict=True))
                        if not inside and mixer.mask_padding:
                            continue
                        both = kv[(b, *source)][h] if inside else torch.zeros(2 * size, dtype=x.dtype)
                        r = sum(
                            table[s - p + halo + n + 2 * halo - 1]
                            for table, s, p, n in zip(tables, source, query, block, strict=True)
                        )
                        scores.append(own @ both[:size] / math.sqrt(size) + own @ r)
                        values.append(both[size:])
                    heads.append(torch.stack(scores).softmax(0) @ torch.stack(values))
                rows.append(torch.cat(heads))
            images.append(torch.stack(rows))
        return torch.stack(images).view(x.shape)

    return oracle


@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize(
    ("grid", "block", "halo"),
    [
        ((4, 4), (2, 2), 1),
        ((5, 3), (2, 2), 1),
        ((3, 5), (2, 4), 1),
        ((2, 3), (4, 4), 1),
        ((1, 1), (2, 2), 2),
        ((3, 4), (1, 2), 0),
        ((7,), (3,), 2),
        ((1,), (4,), 1),
    ],
)
def test_is_the_loop(build, check, tokens, places, grid, block, halo, mask_padding):
    mixer = build(spec_of(block, halo, mask_padding=mask_padding, qkv_bias=True, rank=len(grid)), DIM)
    check(mixer, by_loop(mixer, places, block, halo), tokens(2, *grid, DIM))


@pytest.mark.parametrize("mask_padding", [True, False])
@pytest.mark.parametrize(
    ("block", "halo", "options", "extents"),
    [
        (2, 1, {}, [(4, 5), (3, 6)]),
        ((2, 3), 2, {"qkv_bias": True}, [(5, 4), (1, 2)]),
        (3, 2, {"rank": 1}, [(4,), (9,)]),
    ],
)
def test_padding_leaves_images_alone(build, check_padding, block, halo, options, extents, mask_padding):
    check_padding(build(spec_of(block, halo, mask_padding=mask_padding, **options), DIM), extents, DIM)


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_padding_in_front_is_refused(build, tokens, impl):
    mixer = build(spec_of(2, 1), DIM)
    mixer.impl = impl
    valid = torch.ones(1, 4, 5, dtype=torch.bool)
    valid[:, :, 0] = False
    with pytest.raises(ValueError, match="rectangle anchored at the origin"):
        mixer(tokens(1, 4, 5, DIM), valid=valid)


@pytest.mark.parametrize("mask_padding", [True, False])
def test_padding_has_no_weight(build, tokens, mask_padding):
    valid = torch.zeros(1, 4, 5, dtype=torch.bool)
    valid[:, :3, :3] = True
    found = build(spec_of(2, 1, mask_padding=mask_padding), DIM).weights(tokens(1, 4, 5, DIM), valid=valid)
    assert (found.dense()[..., ~valid.flatten()] == 0).all()


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_without_a_halo_and_positions_it_is_window_attention(build, tokens, impl):
    """`proj` of the window attention is the identity, which halo attention has not."""
    mixer, x = build(spec_of(3, 0), DIM), tokens(2, 5, 7, DIM)
    plain = build(f"WindowAttention(window_size=3, num_heads={HEADS}, qkv_bias=False, position_bias=False)", DIM)
    mixer.impl = impl
    with torch.no_grad():
        for table in mixer.pos_embed.parameters():
            table.zero_()
        k, v = mixer.kv.weight.view(HEADS, 2, -1, DIM).unbind(1)
        plain.qkv.weight.copy_(torch.cat([mixer.q.weight, k.reshape(DIM, DIM), v.reshape(DIM, DIM)]))
    plain.proj = nn.Identity()
    assert_close(mixer(x), plain(x))


@pytest.mark.parametrize("impl", ["reference", "fast"])
def test_blocks_of_one_token_are_neighborhood_attention(build, tokens, impl):
    mixer, x = build(spec_of(1, 1), DIM), tokens(2, 4, 5, DIM)
    plain = build(f"NeighborhoodAttention(kernel_size=3, num_heads={HEADS}, qkv_bias=False, position_bias=False)", DIM)
    mixer.impl = impl
    with torch.no_grad():
        for table in mixer.pos_embed.parameters():
            table.zero_()
        k, v = mixer.kv.weight.view(HEADS, 2, -1, DIM).unbind(1)
        plain.qkv.weight.copy_(torch.cat([mixer.q.weight, k.reshape(DIM, DIM), v.reshape(DIM, DIM)]))
    plain.proj = nn.Identity()
    assert_close(mixer(x), plain(x))


def test_the_first_rows_of_the_tables_are_never_read(build, tokens):
    mixer = build(spec_of(2, 3), DIM)
    grads = torch.autograd.grad(mixer(tokens(2, 9, 9, DIM)).square().sum(), mixer.pos_embed.tables())
    for grad in grads:
        assert grad.shape == (15, DIM // HEADS)
        assert (grad[:6] == 0).all() and (grad[6:] != 0).all()


def test_parameters():
    def shapes(module):
        return {k: tuple(v.squeeze().shape) for k, v in module.named_parameters()}

    mixer = glocal.build("HaloAttention(block_size=4, halo_size=2, head_dim=8, qkv_bias=True)", 32)
    assert shapes(mixer) == shapes(HaloAttn(32, num_heads=4, block_size=4, halo_size=2, qkv_bias=True))
    line = glocal.build("HaloAttention(rank=1)", 32)
    assert set(shapes(line)) == {"q.weight", "kv.weight", "pos_embed.width_rel"}


def test_starts_with_timms_deviations():
    torch.manual_seed(0)
    mixer = glocal.build("HaloAttention(block_size=8, halo_size=3, num_heads=2, qkv_bias=True)", 64)
    twin = dict(HaloAttn(64, num_heads=2, qkv_bias=True).named_parameters())
    for name, parameter in mixer.named_parameters():
        if parameter.dim() > 1:  # biases are those of a convolution and of a linear layer: the same
            assert_close(parameter.std(), twin[name].std(), rtol=0.1, atol=0, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("halo_size", [-1, 1.5, True, (1, 1)])
def test_a_wrong_halo_is_refused(halo_size):
    with pytest.raises(ValueError, match="halo_size: "):
        glocal.build(spec_of(2, halo_size), DIM)


def test_a_watched_projection_gives_the_same(build, tokens):
    """As an adapter's would: then the layer itself is called, and not its rows."""
    mixer, x, calls = build(spec_of(2, 1, qkv_bias=True), DIM), tokens(2, 3, 4, DIM), []
    plain = mixer(x)
    mixer.kv.register_forward_hook(lambda *args: calls.append(args))
    assert_close(mixer(x), plain)
    assert calls
