"""What tests of the lesson share: choosing, reading what the page computed, and the same by PyTorch."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

MODES = {"zeros": "constant", "none": "constant"}  # of torch's padding, where it has another name


def choose(page, **values):
    for name, value in values.items():
        page.locator(f"#{name}").evaluate(
            "(e, value) => { e.value = value; e.dispatchEvent(new Event('change')) }", str(value)
        )
        assert page.evaluate(f"String(state.{name})") == str(value)


def set_alpha(page, alpha):
    step = str(round(100 * math.log10(alpha / 46)))
    page.locator("#alpha").evaluate("(e, step) => { e.value = step; e.dispatchEvent(new Event('input')) }", step)


def seen(page):
    """What the page computed, as tensors."""
    values = page.evaluate(
        "({picture: result.picture, kernel: result.kernel, convolved: result.convolved, attended: result.attended,"
        " errors: result.errors, error: result.error, gradient: result.gradient, centres: state.centres,"
        " alpha: state.alpha, query: state.query, head: state.head, reached: state.reached, playing: state.playing})"
    )
    return {k: torch.tensor(v, dtype=torch.float64) if isinstance(v, list) else v for k, v in values.items()}


def padding_of(size, dilation):
    """As padding="same" in torch: the odd one goes to the end."""
    total = dilation * (size - 1)
    return total // 2, total - total // 2


def extended(picture, border, before, after):
    return F.pad(picture[None, None], (before, after, before, after), mode=MODES.get(border, border))[0, 0]


def by_torch(page_values, border, stride, dilation):
    """Convolution and attention: every query, head and pixel of the two-dimensional grid written out."""
    picture, kernel, alpha = (page_values[name] for name in ("picture", "kernel", "alpha"))
    before, after = padding_of(len(kernel), dilation)
    whole = extended(picture, border, before, after)
    convolved = F.conv2d(whole[None, None], kernel[None, None], stride=stride, dilation=dilation)[0, 0]
    if border == "none":
        whole, before = picture, 0
    side = torch.arange(len(whole), dtype=torch.float64) - before
    key = torch.cartesian_prod(side, side)
    side = torch.arange(0, len(picture), stride, dtype=torch.float64)
    query = torch.cartesian_prod(side, side)

    def by_heads(centres):
        down, right = (key[:, a] - query[:, a, None] - centres[:, a, None, None] for a in (0, 1))
        maps = torch.softmax(-alpha * (down**2 + right**2), -1)
        return kernel.flatten()[:, None] * (maps @ whole.flatten())

    centres, slopes = page_values["centres"], []
    for axis in (0, 1):  # all heads are moved at once: each part of the output comes from one
        ways = torch.zeros_like(centres)
        ways[:, axis] = 1
        with forward_ad.dual_level():
            parts, slope = forward_ad.unpack_dual(by_heads(forward_ad.make_dual(centres, ways)))
        slopes.append(slope)
    return convolved, parts.sum(0).view_as(convolved), torch.hypot(*slopes).max().item()


def assert_is_torch(page, border, stride=1, dilation=1):
    got = seen(page)
    convolved, attended, gradient = by_torch(got, border, stride, dilation)
    torch.testing.assert_close(got["convolved"], convolved, rtol=0, atol=1e-14)
    torch.testing.assert_close(got["attended"], attended, rtol=0, atol=1e-13)
    torch.testing.assert_close(got["errors"], (attended - convolved).abs(), rtol=0, atol=1e-13)
    assert got["error"] == got["errors"].max()
    assert got["gradient"] == pytest.approx(gradient, rel=1e-9, abs=3e-14)
    return got


def number(text):
    """A number as the page writes it."""
    digits, _, power = text.replace("−", "-").partition(" × 10")
    return float(digits) * 10.0 ** int(power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")) or 0)


def pixel(page, canvas, x, y):
    """The colour at a place of a canvas, in shares of its width; [r, g, b]."""
    return page.evaluate(
        "([id, x, y]) => { const c = document.getElementById(id), w = c.width;"
        " const one = new OffscreenCanvas(1, 1).getContext('2d', { willReadFrequently: true });"
        " one.drawImage(c, -Math.floor(x * w), -Math.floor(y * w));"
        " return [...one.getImageData(0, 0, 1, 1).data].slice(0, 3) }",
        [canvas, x, y],
    )


def rgb(colour):
    return [int(colour[i : i + 2], 16) for i in (1, 3, 5)]
