"""The numbers of the lesson against PyTorch: convolution, attention, gradient, kernels."""

import math

import pytest
import torch

from glocal.report.lesson_words import CHOICES

from .lesson_in_browser import assert_is_torch, choose, number, seen, set_alpha

BLUR = {1: [1.0], 2: [0.5, 0.5], 3: [0.25, 0.5, 0.25], 5: [0.0625, 0.25, 0.375, 0.25, 0.0625]}
STEP = {2: [-1.0, 1.0], 3: [-1.0, 0.0, 1.0], 5: [-0.5, -1.0, 0.0, 1.0, 0.5]}


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_every_setting_is_torchs(lesson, size):
    choose(lesson, picture="texture", kernel="random", size=size)
    for border, soft in zip(CHOICES["border"], (0.1, 1, 3, 0.5, 8), strict=True):
        choose(lesson, border=border)
        for alpha in (soft, 46):
            set_alpha(lesson, alpha)
            got = assert_is_torch(lesson, border)
            assert got["alpha"] == pytest.approx(alpha, rel=0.02)
        exact = border != "none" or size == 1
        assert (got["error"] < 1e-13) if exact else (got["error"] > 0.05)
        assert got["attended"].abs().max() > 0.05


@pytest.mark.parametrize("size", [2, 3, 5])
def test_stride_and_dilation_are_torchs(lesson, size):
    choose(lesson, picture="digit", kernel="random", size=size)
    ways = [(2, 1), (1, 2), (2, 2)]
    for i, border in enumerate(CHOICES["border"]):
        stride, dilation = ways[(i + size) % 3]
        choose(lesson, stride=stride, dilation=dilation, border=border)
        for alpha in (1.5, 46):
            set_alpha(lesson, alpha)
            got = assert_is_torch(lesson, border, stride, dilation)
        assert got["attended"].shape == (math.ceil(11 / stride),) * 2
        assert border == "none" or got["error"] < 1e-13


def test_a_head_far_outside_takes_the_nearest_pixel(lesson):
    choose(lesson, kernel="random", border="none")
    set_alpha(lesson, 46)
    lesson.evaluate("moveCentre(0, [-6, -5.5])")
    assert_is_torch(lesson, "none")


def test_without_places_outside_only_the_border_is_wrong(lesson):
    choose(lesson, kernel="random", size=5, border="none")
    errors = seen(lesson)["errors"]
    assert errors[2:-2, 2:-2].max() < 1e-13
    errors[2:-2, 2:-2] = 1
    assert (errors > 1e-3).sum() > 0.9 * errors.numel()


def test_kernels_are_what_they_are_called(lesson):
    for size in (1, 2, 3, 5):
        choose(lesson, size=size)
        blur = torch.outer(torch.tensor(BLUR[size]), torch.tensor(BLUR[size])).double()
        one = torch.zeros_like(blur)
        one[(size - 1) // 2, (size - 1) // 2] = 1
        wanted = {"blur": blur, "sharpen": 2 * one - blur}
        if size > 1:
            wanted["edge"] = torch.outer(torch.tensor(BLUR[size]), torch.tensor(STEP[size])).double()
        wanted["shift"] = torch.zeros_like(blur)
        wanted["shift"][-1, -1] = 1
        for name, kernel in wanted.items():
            choose(lesson, kernel=name)
            torch.testing.assert_close(seen(lesson)["kernel"], kernel, rtol=0, atol=1e-15)
    choose(lesson, kernel="edge")
    lesson.select_option("#size", "1")  # one pixel has no neighbour to compare
    assert lesson.input_value("#kernel") == "blur" and lesson.is_disabled("#kernel option[value=edge]")

    choose(lesson, size=3)
    assert lesson.is_hidden("#another")
    choose(lesson, kernel="random")
    first = seen(lesson)["kernel"]
    lesson.click("#another")
    second = seen(lesson)["kernel"]
    assert (first - second).abs().max() > 0.1 and first.std() > 0.2 and first.abs().max() <= 1


def test_pictures_are_no_two_alike_and_between_black_and_white(lesson):
    pictures = [torch.tensor(p) for p in lesson.evaluate("Object.values(PICTURES)")]
    assert len(pictures) == len(CHOICES["picture"]) == 3
    for i, picture in enumerate(pictures):
        assert picture.shape == (11, 11) and picture.min() >= 0 and picture.max() <= 1 and picture.std() > 0.1
        assert all((picture - other).abs().max() > 0.3 for other in pictures[:i])


def test_a_moved_centre_is_a_softmax_written_by_hand(lesson):
    choose(lesson, kernel="random", border="replicate")
    set_alpha(lesson, 3)
    lesson.click("#taps", position={"x": 150, "y": 20})  # the second tile: head 2
    lesson.fill("#down", "-1.3")
    lesson.fill("#right", "0.45")
    got = assert_is_torch(lesson, "replicate")
    assert got["head"] == 1 and got["centres"][1].tolist() == [-1.3, 0.45]
    assert got["centres"][0].tolist() == [-1, -1] and got["error"] > 0.01
    assert number(lesson.inner_text("#error")) == pytest.approx(got["error"], abs=6e-5)

    # what stands beside the maps, at the query (5, 5)
    row, column = (int(q) for q in got["query"])
    weights = {}
    for r in range(-1, 12):
        for c in range(-1, 12):
            weights[r, c] = math.exp(-got["alpha"] * ((r - row + 1.3) ** 2 + (c - column - 0.45) ** 2))
    total = sum(weights.values())
    clamped = {(r, c): got["picture"][min(max(r, 0), 10), min(max(c, 0), 10)].item() for r, c in weights}
    mean = sum(weights[at] * clamped[at] for at in weights) / total
    assert float(lesson.inner_text("#head-read")) == pytest.approx(mean, abs=6e-5)
    assert float(lesson.inner_text("#head-top").split()[0]) == pytest.approx(
        100 * max(weights.values()) / total, abs=0.06
    )
    assert number(lesson.inner_text("#tap-read")) == pytest.approx(clamped[row - 1, column], abs=6e-5)
    weight = got["kernel"][0, 1].item()
    assert number(lesson.inner_text("#tap-product").split(" × ")[0]) == weight  # of two digits
    assert number(lesson.inner_text("#head-product").split("=")[1]) == pytest.approx(weight * mean, abs=6e-5)
    assert number(lesson.inner_text("#head-sum")) == pytest.approx(got["attended"][row, column].item(), abs=6e-7)
    assert number(lesson.inner_text("#tap-sum")) == pytest.approx(got["convolved"][row, column].item(), abs=6e-7)
    assert "(−1.3, 0.45)" in lesson.inner_text("#head-name") and "(−1, 0)" in lesson.inner_text("#tap-name")

    choose(lesson, picture="digit", border="circular", kernel="blur", stride=2)
    got = assert_is_torch(lesson, "circular", stride=2)
    assert got["centres"][1].tolist() == [-1.3, 0.45]  # the head stays where it was put
    choose(lesson, dilation=2)
    assert seen(lesson)["centres"][1].tolist() == [-2, 0]  # until the cells are elsewhere
    choose(lesson, dilation=1, stride=1)
    lesson.fill("#down", "4")
    assert seen(lesson)["centres"][1].tolist() == [4, 0]
    lesson.click("#restore")
    assert seen(lesson)["centres"][1].tolist() == [-1, 0] and lesson.is_disabled("#restore")


def test_the_gradient_falls_like_exp_of_minus_alpha(lesson):
    choose(lesson, kernel="blur")
    found = {}
    for alpha in (10, 20, 40):
        set_alpha(lesson, alpha)
        got = seen(lesson)
        found[got["alpha"]] = got["gradient"]
        assert number(lesson.inner_text("#gradient")) == pytest.approx(got["gradient"], rel=0.06)
    (a, at_a), (b, at_b), (c, at_c) = found.items()
    assert at_b / at_a == pytest.approx(b / a * math.exp(a - b), rel=0.01)
    assert at_c / at_b == pytest.approx(c / b * math.exp(b - c), rel=0.01)


# planted by scripts/mutate
FAULTS = {
    (
        "report/lesson_maths.js",
        "browser/test_lesson_maths.py",
        "browser/test_lesson.py",
        "browser/test_lesson_drawing.py",
        "browser/test_lesson_controls.py",
    ): (
        ("the odd place of an even kernel is in front", "const before = Math.floor(", "const before = Math.ceil("),
        ("stride moves no query", "(_, o) => o * stride", "(_, o) => o"),
        ("dilation keeps taps together", "t * dilation - before", "t - before"),
        ("reflect repeats the edge", "return place < 0 ? -place :", "return place < 0 ? -place - 1 :"),
        ("heads always see places outside", 'border === "none" ? [0', 'border === "never" ? [0'),
        ("large scores underflow", "Math.exp(score - highest)", "Math.exp(score)"),
        ("weights are not divided by their sum", "raised.map((each) => each / total)", "raised"),
        ("the slope forgets that weights sum to 1", "weight * (from[p] - mean)", "weight * from[p]"),
        ("the gradient is that of a head without its value", "Math.abs(values[head]) * slope", "slope"),
        (
            "rows and columns of centres are swapped",
            "centres.forEach(([down, right], head)",
            "centres.forEach(([right, down], head)",
        ),
        ("the kernel is transposed", "kernel[t][u] * (readAt", "kernel[u][t] * (readAt"),
        (
            "a shown map moves the wrong way",
            "softmaxAlong(places, query[1], centre[1]",
            "softmaxAlong(places, query[1], -centre[1]",
        ),
        ("sharpen takes the whole pixel away", "2 * cell - blur[t][u]", "cell - blur[t][u]"),
    ),
}
