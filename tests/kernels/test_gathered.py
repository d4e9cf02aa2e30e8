"""Attention over a few sources against plain loops, and its derivatives."""

import itertools

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.flop_counter import FlopCounterMode

from glocal.kernels import gathered_scores, gathered_sum

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


@pytest.mark.parametrize("index", INDICES)
def test_gathered_tangents(index):
    """Forward-mode derivatives too, alone and of gradients, against differences."""
    check = {"check_forward_ad": True, "check_backward_ad": False}
    assert gradcheck(lambda q, k: gathered_scores(q, k, index), (random(B, N, G, D), random(B, M, G, D)), **check)
    assert gradcheck(lambda w, v: gathered_sum(w, v, index), (random(B, N, G, K), random(B, M, G, D)), **check)

    q, k, w = (t.detach() for t in (random(B, N, G, D), random(B, M, G, D), random(B, N, G, K)))

    def loss(q):
        return gathered_sum(gathered_scores(q, k, index).sin() * w, k, index).square().sum()

    given = q.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(given), given, create_graph=True)
    (expected,) = torch.autograd.grad((first * q.cos()).sum(), given)
    _, found = torch.func.jvp(torch.func.grad(loss), (q,), (q.cos(),))
    torch.testing.assert_close(found, expected)


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
    mapped = torch.func.vmap(gathered_scores, (0, None, None))(unread[None], sources, index)[0]
    torch.testing.assert_close(mapped, gathered_scores(unread, sources, index), equal_nan=True)
    expected = (weights[0, :, 0].masked_fill(index[0] < 0, 0)[..., None] * picked).sum(1)
    torch.testing.assert_close(gathered_sum(weights, sources, index)[0, :, 0], expected)
    mapped = torch.func.vmap(gathered_sum, (0, None, None))(weights[None], sources, index)[0]
    torch.testing.assert_close(mapped, gathered_sum(weights, sources, index))
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
            "_scores(grad, v, index) if need_w",
            "-_scores(grad, v, index) if need_w",
        ),
        (
            "the gradient of the keys counts empty slots for the first source",
            "out.index_add_(0, rows, ",
            "out.index_add_(0, rows % total, ",
        ),
        (
            "a second derivative, that of the scatter by its vectors, is missing",
            "_sum(w, grad, index) if need_y",
            "torch.zeros_like(y) if need_y",
        ),
        (
            "where tangents are wanted an infinite query takes something from an empty slot",
            'torch.where(full, torch.einsum("bngd,bnkgd->bngk", q, _picked(k, index)), 0)',
            'torch.einsum("bngd,bnkgd->bngk", q, _picked(k, index))',
        ),
        (
            "tangents are lost",
            "    if tangents_wanted():\n        full = (index >= 0).unsqueeze(2)\n        return torch.einsum",
            "    if False:\n        full = (index >= 0).unsqueeze(2)\n        return torch.einsum",
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
}
