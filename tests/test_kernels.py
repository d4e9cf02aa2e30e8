"""Kernels against plain loops, their derivatives, and torch.library's own checks."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from glocal.kernels import gathered_scores, gathered_sum, local_sum

B, N, M, G, D, K = 2, 4, 5, 2, 3, 3
INDEX = torch.tensor([[0, 4, -1], [2, 2, 1], [-1, -1, -1], [3, 0, 4]])
INDICES = (INDEX[None], torch.stack([INDEX, INDEX.flip(0)]))


def random(*shape):
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def slots(index):
    """(image, query, slot, source) for every slot that holds a source."""
    for b, n, t in itertools.product(range(B), range(N), range(K)):
        source = int(index[b % len(index), n, t])
        if source >= 0:
            yield b, n, t, source


@pytest.mark.parametrize("index", INDICES)
def test_gathered_scores_is_the_loop(index):
    q, k = random(B, N, G, D), random(B, M, G, D)
    expected = torch.zeros(B, N, G, K, dtype=torch.float64)
    for b, n, t, source in slots(index):
        expected[b, n, :, t] = (q[b, n] * k[b, source]).sum(-1)
    torch.testing.assert_close(gathered_scores(q, k, index), expected)


@pytest.mark.parametrize("index", INDICES)
def test_gathered_sum_is_the_loop(index):
    w, v = random(B, N, G, K), random(B, M, G, D)
    expected = torch.zeros(B, N, G, D, dtype=torch.float64)
    for b, n, t, source in slots(index):
        expected[b, n] = expected[b, n] + w[b, n, :, t, None] * v[b, source]
    torch.testing.assert_close(gathered_sum(w, v, index), expected)


@pytest.mark.parametrize("index", INDICES)
@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
def test_gathered_derivatives(index, check):
    assert check(lambda q, k: gathered_scores(q, k, index), (random(B, N, G, D), random(B, M, G, D)))
    assert check(lambda w, v: gathered_sum(w, v, index), (random(B, N, G, K), random(B, M, G, D)))


@pytest.mark.parametrize("past", [0, 1, 3, 6])
def test_local_sum_behind_a_past_is_the_end_of_the_whole_one(past):
    """Also where the past is longer than the taps reach, and with kernels that all positions share."""
    x, w = random(B, 7, 4), random(B, 7, 2, 3)
    whole = local_sum(x, w, 2, left=2)
    torch.testing.assert_close(local_sum(x, w[:, past:], 2, left=2, past=past), whole[:, past:])
    shared = local_sum(x, w[:, :1], 2, left=2)
    torch.testing.assert_close(local_sum(x, w[:, :1], 2, left=2, past=past), shared[:, past:])


def test_every_custom_op_passes_opcheck():
    ops = {
        "gathered_scores": (random(B, N, G, D), random(B, M, G, D), INDEX[None]),
        "gathered_sum": (random(B, N, G, K), random(B, M, G, D), INDEX[None]),
        "gathered_scatter": (random(B, N, G, K), random(B, N, G, D), INDEX[None], M),
    }
    registered = {
        name.removeprefix("glocal::") for name in torch._C._dispatch_get_all_op_names() if name.startswith("glocal::")
    }
    assert registered == set(ops)
    for name, arguments in ops.items():
        torch.library.opcheck(getattr(torch.ops.glocal, name).default, arguments)


def test_custom_ops_are_counted():
    with FlopCounterMode(display=False) as counter:
        gathered_scores(random(B, N, G, D), random(B, M, G, D), INDEX[None])
        gathered_sum(random(B, N, G, K), random(B, M, G, D), INDEX[None])
    assert counter.get_total_flops() == 2 * 2 * B * N * G * D * K


def test_gathered_shapes_are_checked():
    with pytest.raises(ValueError, match=r"index: has shape \(1, 3, 3\)"):
        gathered_scores(random(B, N, G, D), random(B, M, G, D), INDEX[None, :3])
    with pytest.raises(ValueError, match="sources"):
        gathered_sum(random(B, N, G, K), random(B + 1, M, G, D), INDEX[None])


@pytest.mark.parametrize(
    ("grid", "w_shape", "dilation"),
    [
        ((5, 4), (2, 5, 4, 2, 9), 1),
        ((5, 4), (1, 1, 1, 4, 9), 2),
        ((3, 6), (2, 1, 1, 1, 25), 1),
        ((7,), (2, 7, 4, 3), 3),
        ((1, 1), (1, 1, 1, 4, 9), 1),
    ],
)
def test_local_sum_is_the_loop(grid, w_shape, dilation):
    channels, rank = 4, len(grid)
    x, w = random(2, *grid, channels), random(*w_shape)
    taps = list(
        itertools.product(
            range(-((round(w_shape[-1] ** (1 / rank))) // 2), round(w_shape[-1] ** (1 / rank)) // 2 + 1), repeat=rank
        )
    )
    full = w.expand(2, *grid, *w_shape[-2:])
    expected = torch.zeros(2, *grid, channels, dtype=torch.float64)
    for b, *at in itertools.product(range(2), *map(range, grid)):
        for tap, offset in enumerate(taps):
            source = tuple(p + dilation * o for p, o in zip(at, offset, strict=True))
            if all(0 <= s < n for s, n in zip(source, grid, strict=True)):
                for c in range(channels):
                    group = c // (channels // w_shape[-2])
                    expected[(b, *at, c)] += full[(b, *at, group, tap)] * x[(b, *source, c)]
    torch.testing.assert_close(local_sum(x, w, dilation), expected)
    assert gradcheck(lambda x, w: local_sum(x, w, dilation), (x, w), fast_mode=True)
    assert gradgradcheck(lambda x, w: local_sum(x, w, dilation), (x, w), fast_mode=True)


@pytest.mark.parametrize(("grid", "kernel", "left"), [((7,), 4, 3), ((7,), 3, 0), ((4, 5), 2, 1), ((3, 2), 3, 2)])
def test_local_sum_with_taps_on_one_side_is_the_centred_one_with_zeros(grid, kernel, left):
    """Zeros around the kernel bring its tap `left` to the middle."""
    rank = len(grid)
    x, w = random(2, *grid, 4), random(2, *grid, 2, kernel**rank)
    half = max(left, kernel - 1 - left)
    ends = (half - left, half - (kernel - 1 - left))
    centred = torch.nn.functional.pad(w.unflatten(-1, (kernel,) * rank), ends * rank).flatten(-rank)
    torch.testing.assert_close(local_sum(x, w, 2, left=left), local_sum(x, centred, 2))


def test_local_sum_refuses_what_does_not_fit():
    with pytest.raises(ValueError, match="left: 3, must be from 0 to 2"):
        local_sum(random(2, 5, 4, 4), random(1, 1, 1, 4, 9), left=3)
    with pytest.raises(ValueError, match="K odd"):
        local_sum(random(2, 5, 4, 4), random(1, 1, 1, 4, 16))
    with pytest.raises(ValueError, match="3 groups do not divide the 4 channels"):
        local_sum(random(2, 5, 4, 4), random(1, 1, 1, 3, 9))


def test_kernels_sum_in_float32():
    """In bfloat16, 256 + 1 is 256 again: a running sum of that width would never leave it."""
    ones = torch.ones(25, dtype=torch.bfloat16)
    terms = torch.cat([256 * ones[:1], ones[1:]])
    first = torch.zeros(1, 1, 25, dtype=torch.int64)
    assert gathered_sum(terms.view(1, 1, 1, 25), ones.view(1, 25, 1, 1), first).item() == 280
    scattered = torch.ops.glocal.gathered_scatter(
        ones.view(1, 25, 1, 1), terms.view(1, 25, 1, 1), first.view(1, 25, 1), 1
    )
    assert scattered.item() == 280
    assert local_sum(ones.view(1, 5, 5, 1), terms.view(1, 1, 1, 1, 25))[0, 2, 2].item() == 280
    assert local_sum(ones.view(1, 5, 5, 1), terms.view(1, 1, 1, 1, 25)).dtype == torch.bfloat16


@pytest.mark.parametrize("infinite", [float("inf"), float("nan")])
def test_an_empty_slot_of_a_kernel_takes_nothing_from_what_is_infinite(infinite):
    """Neither from the other factor of the slot nor from a source that is read in its stead."""
    index = torch.tensor([[[0, -1], [2, 1], [-1, 1]]])
    full = (index >= 0).unsqueeze(2)  # [1, N, G, K]
    some, sources = torch.randn(1, 3, 1, 4), torch.randn(1, 3, 1, 4)
    weights = torch.randn(1, 3, 1, 2).masked_fill(~full, infinite)

    unread = some.clone()
    unread[:, 2] = infinite  # of its slots one is empty
    assert gathered_scores(unread, sources, index)[0, 2, 0, 0] == 0
    assert gathered_scores(unread, sources, index)[0, :2].isfinite().all()

    picked = sources[0, index[0].clamp(min=0), 0]  # [N, K, D]
    expected = (weights[0, :, 0].masked_fill(index[0] < 0, 0)[..., None] * picked).sum(1)
    torch.testing.assert_close(gathered_sum(weights, sources, index)[0, :, 0], expected)
    sources[:, 0] = infinite  # read by the first query only
    torch.testing.assert_close(gathered_sum(weights, sources, index)[0, 1:, 0], expected[1:])

    spread = torch.zeros(3, 4)
    for query, slot in full[0, :, 0].nonzero().tolist():
        spread[index[0, query, slot]] += weights[0, query, 0, slot] * some[0, query, 0]
    torch.testing.assert_close(torch.ops.glocal.gathered_scatter(weights, some, index, 3)[0, :, 0], spread)


# planted by scripts/mutate
FAULTS = {
    "kernels/gathered.py": (
        (
            "the score of an infinite query with an empty slot is NaN",
            "torch.where(inside, (q.to(wide) * picked.to(wide)).sum(-1), 0)",
            "(q.to(wide) * picked.to(wide)).sum(-1)",
        ),
        (
            "an infinite weight of an empty slot makes the sum NaN",
            "torch.where(inside, w[..., slot].to(wide), 0)[..., None])",
            "w[..., slot].to(wide)[..., None])",
        ),
        (
            "empty slots read the first source, whose NaN the sum takes",
            "sources.new_zeros(1, *sources.shape[2:])",
            "sources[0, :1]",
        ),
        (
            "empty slots are full of the first source",
            "inside = index >= 0",
            "inside, index = index >= -1, index.clamp(min=0)",
        ),
        (
            "the gradient of the weights has the wrong sign",
            "gathered_scores(grad, v, index) if need_w",
            "-gathered_scores(grad, v, index) if need_w",
        ),
        (
            "the gradient of the keys counts empty slots for the first source",
            "out.index_add_(0, rows, ",
            "out.index_add_(0, rows % total, ",
        ),
        (
            "a second derivative, that of the scatter by its vectors, is missing",
            "gathered_sum(w, grad, index) if need_y",
            "torch.zeros_like(y) if need_y",
        ),
        ("images after the first read another image's sources", "(total // max(batch, 1))", "index.shape[1]"),
        (
            "the kernel's cost is half of what it does",
            "    return 2 * q.numel() * index[-1]",
            "    return q.numel() * index[-1]",
        ),
        (
            "sums are taken in bfloat16",
            "    return torch.promote_types(tensor.dtype, torch.float32)",
            "    return tensor.dtype",
        ),
    ),
    "kernels/local_sum.py": (
        (
            "taps are next to each other whatever the dilation",
            "narrow(axis + 1, o * dilation, ",
            "narrow(axis + 1, o, ",
        ),
        ("taps come column by column", "enumerate(offset):", "enumerate(reversed(offset)):"),
        (
            "channels of a group lie apart",
            ".unflatten(-1, (w.shape[-2], -1))",
            ".unflatten(-1, (-1, w.shape[-2])).transpose(-1, -2)",
        ),
        (
            "sums are taken in bfloat16",
            "wide = torch.promote_types(torch.promote_types(x.dtype, w.dtype), torch.float32)",
            "wide = torch.promote_types(x.dtype, w.dtype)",
        ),
    ),
}
