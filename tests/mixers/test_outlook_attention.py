"""OutlookAttention against timm and against a loop over windows, at sizes timm takes and at those it does not."""

from itertools import product

import pytest
import torch
from timm.models.volo import OutlookAttention as TimmOutlook
from torch.func import functional_call
from torch.testing import assert_close

import glocal

HEADS, DIM = 2, 8

FAULTS = {
    "mixers/outlook_attention.py": (
        ("the windows are averaged where they overlap", "return self.proj(nn", "return 0.5 * self.proj(nn"),
        ("the scores are not scaled", "(self.attn(mean) * self.scale)", "self.attn(mean)"),
        (
            "the softmax goes over the outputs of a window",
            "logits.flatten(2, 3).transpose(2, 3).softmax(2)",
            "logits.transpose(3, 4).flatten(2, 3).transpose(2, 3).softmax(2)",
        ),
        (
            "with padding it goes over the outputs",
            "return logits.softmax(-1) * there",
            "return logits.softmax(-2) * there",
        ),
        (
            "the definition's goes over the outputs",
            "logits.softmax(-1) * there, window",
            "logits.softmax(-2) * there, window",
        ),
        (
            "a token's place in its window is mirrored",
            "place = token // self.stride - back_by, token % self.stride + back_by * self.stride",
            "place = token // self.stride - back_by, kernel - 1 - token % self.stride - back_by * self.stride",
        ),
        ("the mean counts places outside", "/ count.clamp(min=1)", "/ torch.full_like(count, block.shape[-1])"),
        ("what hangs over the border is left out", "ceil_mode=True", "ceil_mode=False"),
        ("windows begin at the first token", "            (p, (w - 1)", "            (0, (w - 1)"),
        (
            "a window beyond an image's own end still writes",
            "(count > 0).to(logits.dtype)",
            "(count >= 0).to(logits.dtype)",
        ),
        ("padding is averaged in", "tokens.masked_fill(~real[..., None], 0)", "tokens"),
        (
            "the last window is missing",
            "(window < (n + self.stride - 1) // self.stride)",
            "(window < n // self.stride)",
        ),
        ("blocks cut from padding's start are taken", "extents(valid)  #", "pass  #"),
    ),
    "mixers/_overlap.py": (
        ("rows and columns of a window change places", "torch.stack(places, -2)", "torch.stack(places[::-1], -2)"),
        ("a window has one token less", "(n - k) // stride + 1", "(n - k) // stride"),
        ("a token gets its last window alone", "out[under] += places", "out[under] = places"),
        ("windows are side by side", "slice(p, p + stride * (n - 1) + 1, stride)", "slice(p, p + n, 1)"),
        (
            "derivatives of sums are of wider windows",
            "ctx.kernel, ctx.stride = windows.shape[rank + 2 : -1]",
            "ctx.kernel, ctx.stride = windows.shape[rank + 1 : -2]",
        ),
        (
            "derivatives of windows lie side by side",
            "ctx.grid, ctx.stride = tokens.shape[1:-2], stride",
            "ctx.grid, ctx.stride = tokens.shape[1:-2], 1",
        ),
    ),
}


def spec_of(**arguments):
    options = {"num_heads": HEADS, **arguments}
    return f"OutlookAttention({', '.join(f'{k}={v!r}' for k, v in options.items())})"


def by_timm(mixer, kernel_size, stride, padding):
    twin = TimmOutlook(DIM, HEADS, kernel_size, padding, stride, qkv_bias=mixer.v.bias is not None).double()
    return lambda x: functional_call(twin, dict(mixer.named_parameters()), (x,))


@pytest.mark.parametrize(
    ("kernel_size", "stride", "padding", "grid"),
    [
        *((k, s, k // 2, grid) for k, s, grid in product((3, 5), (1, 2), ((6, 9), (5, 7), (4, 4), (1, 1), (2, 3)))),
        (3, 3, 1, (7, 8)),
        (1, 1, 0, (3, 4)),
        (2, 2, 0, (4, 6)),
        (4, 2, 1, (6, 8)),
        (3, 1, 1, (1, 6)),
    ],
)
@pytest.mark.parametrize("qkv_bias", [False, True])
def test_is_timms(build, check, tokens, kernel_size, stride, padding, grid, qkv_bias):
    mixer = build(spec_of(kernel_size=kernel_size, stride=stride, padding=padding, qkv_bias=qkv_bias), DIM)
    check(mixer, by_timm(mixer, kernel_size, stride, padding), tokens(2, *grid, DIM))


def by_loop(mixer, kernel, stride, left):
    """Window by window: predict, mix, add what falls inside."""

    def oracle(x):
        batch, *grid, dim = x.shape
        places = list(product(*map(range, kernel)))
        v = mixer.v(x)
        images = []
        for b in range(batch):
            out = {}
            for window in product(*(range(-(-n // stride)) for n in grid)):
                block = [range(w * stride, min((w + 1) * stride, n)) for w, n in zip(window, grid, strict=True)]
                mean = torch.stack([x[(b, *token)] for token in product(*block)]).mean(0)
                shares = (mixer.attn(mean) / (dim // HEADS) ** 0.5).view(HEADS, len(places), len(places)).softmax(-1)
                at = [
                    tuple(w * stride - p + o for w, p, o in zip(window, left, place, strict=True)) for place in places
                ]
                inside = [all(0 <= t < n for t, n in zip(token, grid, strict=True)) for token in at]
                for a, query in enumerate(at):
                    if inside[a]:
                        row = sum(
                            shares[:, a, c, None] * v[(b, *at[c])].view(HEADS, -1) for c in range(len(at)) if inside[c]
                        )
                        out[query] = out.get(query, 0) + row
            zero = torch.zeros(HEADS, dim // HEADS, dtype=x.dtype)
            images.append(torch.stack([out.get(t, zero).flatten() for t in product(*map(range, grid))]))
        return mixer.proj(torch.stack(images)).view(x.shape)

    return oracle


@pytest.mark.parametrize(
    ("options", "grid", "kernel", "left"),
    [
        ({}, (3, 4), (3, 3), (1, 1)),
        ({"stride": 2}, (5, 4), (3, 3), (1, 1)),
        ({"kernel_size": (2, 4), "stride": 2}, (5, 3), (2, 4), (0, 1)),
        ({"kernel_size": 2, "stride": 3, "padding": 0}, (7, 5), (2, 2), (0, 0)),  # tokens under no window
        ({"kernel_size": 2, "padding": 0}, (3, 4), (2, 2), (0, 0)),
        ({"kernel_size": 3, "padding": 2, "stride": 2}, (5, 4), (3, 3), (2, 2)),
        ({"kernel_size": 4, "padding": 3}, (1, 2), (4, 4), (3, 3)),  # wider than the grid
        ({"kernel_size": 5, "stride": 2}, (2, 3), (5, 5), (2, 2)),
        ({"kernel_size": 5, "stride": 2, "rank": 1}, (9,), (5,), (2,)),
        ({"kernel_size": 3, "rank": 1}, (1,), (3,), (1,)),
        ({"kernel_size": 3, "stride": 3, "rank": 1}, (8,), (3,), (1,)),
    ],
)
def test_is_the_loop_over_windows(build, check, tokens, options, grid, kernel, left):
    mixer = build(spec_of(**options), DIM)
    check(mixer, by_loop(mixer, kernel, options.get("stride", 1), left), tokens(2, *grid, DIM))


def test_rows_sum_to_the_coverage(build, tokens):
    """VOLO's 28x28 map, 3x3 windows, stride 2: 225 tokens under one window, 390 under two, 169 under four."""
    sums = build(spec_of(stride=2), DIM).weights(tokens(2, 28, 28, DIM)).weights.sum(-1)
    assert_close(sums, sums.round())
    number, pixels = sums.round().unique(return_counts=True)
    assert number.tolist() == [1, 2, 4]
    assert pixels.tolist() == [2 * HEADS * n for n in (225, 390, 169)]


def test_uniform_weights_add_up_and_are_not_averaged(build):
    """Constant values under uniform weights: the coverage times the constant, away from the border."""
    mixer = build(spec_of(stride=2), DIM)
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.zero_()
        mixer.v.weight.copy_(torch.eye(DIM))
        mixer.proj.weight.copy_(torch.eye(DIM))
    x = torch.full((1, 8, 8, DIM), 3.0, dtype=torch.float64)
    for mixer.impl in ("reference", "fast"):
        inner = mixer(x)[0, 2:7, 2:7, 0]
        expected = torch.tensor([1.0, 2, 1, 2, 1], dtype=torch.float64)
        assert_close(inner, 3 * expected[:, None] * expected)


def test_windows_side_by_side_are_a_softmax(build, tokens):
    mixer = build(spec_of(kernel_size=2, stride=2), DIM)
    x = tokens(2, 4, 6, DIM)
    found = mixer.weights(x)
    assert found.weights.shape == (2, HEADS, 24, 4)
    assert_close(mixer.scores(x)["content"].softmax(-1), found.weights)


@pytest.mark.parametrize(
    ("options", "extents"),
    [
        ({}, [(4, 5), (2, 6)]),
        ({"stride": 2}, [(4, 5), (3, 6)]),
        ({"stride": 2, "kernel_size": 5}, [(5, 4), (1, 1)]),
        ({"stride": 3, "kernel_size": 2}, [(5, 4), (7, 2)]),
        ({"stride": 2, "rank": 1}, [(5,), (8,)]),
    ],
)
def test_padding_leaves_images_alone(build, check_padding, options, extents):
    check_padding(build(spec_of(**options), DIM), extents, DIM)


def test_padding_in_front_is_refused_with_a_stride(build, tokens):
    valid = torch.ones(1, 4, 5, dtype=torch.bool)
    valid[:, 0] = False
    with pytest.raises(ValueError, match="rectangle anchored at the origin"):
        build(spec_of(stride=2), DIM)(tokens(1, 4, 5, DIM), valid=valid)


def test_padding_in_front_leaves_an_image_alone_without_a_stride(build, tokens):
    mixer, x = build(spec_of(), DIM), tokens(1, 5, 6, DIM)
    valid = torch.zeros(1, 5, 6, dtype=torch.bool)
    valid[:, 1:, 2:] = True
    for mixer.impl in ("reference", "fast"):
        assert_close(mixer(x, valid=valid)[:, 1:, 2:], mixer(x[:, 1:, 2:]))


def test_parameters():
    shapes = {k: tuple(v.shape) for k, v in glocal.build("OutlookAttention(stride=2)", 64).named_parameters()}
    of_timm = {k: tuple(v.shape) for k, v in TimmOutlook(64, 2, stride=2).named_parameters()}
    assert shapes == of_timm
    line = dict(glocal.build("OutlookAttention(rank=1, qkv_bias=True)", 64).named_parameters())
    assert line["attn.weight"].shape == (2 * 9, 64) and line["v.bias"].shape == (64,)


@pytest.mark.parametrize("padding", [-1, True, 1.0, (1, 1), 3, 9])
def test_a_wrong_padding_is_refused(padding):
    with pytest.raises(ValueError, match="padding: "):
        glocal.build(f"OutlookAttention(padding={padding!r})", 32)
