"""The pictures of the lesson against its numbers."""

import math

import pytest
import torch

from glocal.report.drawing import DARK, INKS, LIGHT
from glocal.report.lesson import lesson_page
from glocal.report.lesson_words import WORDS

from .lesson_in_browser import by_torch, choose, pixel, rgb, seen, set_alpha


def test_outputs_fill_in_as_the_query_moves_and_are_the_numbers(lesson):
    choose(lesson, kernel="random")
    set_alpha(lesson, 1)
    got = seen(lesson)
    low, high = got["convolved"].min(), got["convolved"].max()
    for name, values in (("convolved", got["convolved"]), ("attended", got["attended"])):
        for r, c in ((0, 0), (2, 7), (10, 3)):
            grey = 255 * ((values[r, c] - low) / (high - low)).clamp(0, 1)
            assert pixel(lesson, name, (c + 0.3) / 11, (r + 0.3) / 11) == pytest.approx([grey.item()] * 3, abs=1)
    assert f"{low:.2f}".replace("-", "−") in lesson.inner_text(".range >> nth=0")

    lesson.evaluate("state.reached = -1")
    lesson.fill("#query", "40")  # row 3, column 7
    assert seen(lesson)["query"].tolist() == [3, 7] and seen(lesson)["reached"] == 40
    assert lesson.get_attribute("#query", "aria-valuetext") == "row 4, column 8"
    ground = rgb(INKS["ground"][0])
    for name in ("convolved", "attended"):
        assert pixel(lesson, name, 0.3 / 11, 3.3 / 11) != ground
        assert pixel(lesson, name, 8.3 / 11, 3.3 / 11) == pixel(lesson, name, 0.3 / 11, 4.3 / 11) == ground
    lesson.click("#all")
    assert pixel(lesson, "attended", 9.3 / 11, 3.3 / 11) != ground


def test_maps_show_what_is_read_with_which_weight(lesson):
    choose(lesson, kernel="sharpen")  # weights: the middle adds, the others subtract
    set_alpha(lesson, 46)
    red, blue, ground = rgb(LIGHT[6]), rgb(LIGHT[1]), rgb(INKS["ground"][0])
    cells = 13  # with a border of one
    tile = (lesson.evaluate("document.getElementById('heads').clientWidth") - 16) / 3
    width, label = 3 * tile + 16, 20

    def in_head(head, row, column):
        """The colour of a place in a head's map."""
        x = (head % 3) * (tile + 8) + (column + 1.5) * tile / cells
        y = (head // 3) * (tile + 8 + label) + 1 + (row + 1.5) * tile / cells
        return pixel(lesson, "heads", x / width, y / width)

    for row, column in ((5, 5), (8, 2), (0, 9)):
        lesson.evaluate(f"state.head = 4; moveQuery({row}, {column})")
        assert in_head(0, row - 1, column - 1) == red
        assert in_head(5, row, column + 1) == red
        assert in_head(7, row + 1, column) == red
        assert in_head(7, row + 2, column) not in (red, blue)
        for canvas in ("window", "look"):  # the places of taps: tinted; on the left the same as on the right
            tinted = pixel(lesson, canvas, (column + 1 + 1.5) / cells, (row + 1 + 0.5) / cells)
            plain = pixel(lesson, canvas, (4.5 + 1) / cells, (9.5 + 1) / cells)
            assert tinted[0] > tinted[2] + 5 and plain[0] == plain[1] == plain[2]
    assert in_head(0, 9, 9) != ground  # the picture, faint

    choose(lesson, border="none")
    lesson.evaluate("moveQuery(0, 0)")
    assert in_head(0, -1, -1) == ground and in_head(8, 1, 1) == red
    # the corner's own head finds nothing outside and takes the corner
    assert lesson.evaluate("attentionMap(result.geometry.places, [0, 0], [-1, -1], 46)[0][0]") == 1

    set_alpha(lesson, 46)
    choose(lesson, border="none", kernel="blur")
    assert pixel(lesson, "map", 0.3 / 11, 10.3 / 11) != ground
    assert pixel(lesson, "map", 7.3 / 11, 5.3 / 11) == ground


def test_the_chart_marks_the_present(lesson):
    choose(lesson, kernel="random")
    lesson.wait_for_timeout(200)  # the curves follow when the hand rests
    lines = lesson.evaluate("curve.map((p) => [p.alpha, p.error, p.gradient])")
    assert len(lines) == 41 and lines[0][0] == 0.1 and lines[-1][0] == pytest.approx(64)
    for alpha, error, gradient in (lines[5], lines[20], lines[30]):
        lesson.evaluate(f"state.alpha = {alpha}; compute()")
        _, attended, slope = by_torch(seen(lesson), "zeros", 1, 1)
        assert error == pytest.approx((attended - seen(lesson)["convolved"]).abs().max().item(), rel=1e-6, abs=1e-13)
        assert gradient == pytest.approx(slope, rel=1e-6)
    places = []
    for alpha in (0.1, 1, 10):
        set_alpha(lesson, alpha)
        now = seen(lesson)
        x = float(lesson.get_attribute("#price .now", "x1"))
        places.append(x)
        for name in ("error", "gradient"):
            assert float(lesson.get_attribute(f"#price circle.{name}", "cx")) == x
            y = float(lesson.get_attribute(f"#price circle.{name}", "cy"))
            assert y == pytest.approx(218 - (218 - 12) * (math.log10(now[name]) + 20) / 22, abs=0.01)
    first, second, third = places  # a factor of ten is the same way everywhere
    assert second - first == pytest.approx(third - second, abs=1.5) and second - first > 100


def test_what_rounds_to_zero_has_no_sign(lesson):
    choose(lesson, kernel="sharpen")
    lesson.evaluate("moveQuery(0, 0)")  # the first head looks outside; its weight is below zero
    assert lesson.inner_text("#head-product") == "−0.0625 × 0.0000 = 0.0000"
    assert lesson.evaluate("[-0.00004, -0.004, 0, -10, 3].map((each) => signedNumber(each, 3))") == [
        "0.000", "−0.004", "0.000", "−10.000", "3.000",
    ]  # fmt: skip


@pytest.mark.parametrize(("border", "alpha"), [("zeros", 0.1), ("zeros", 1), ("none", 0.3)])
def test_bars_are_the_heads_share_of_each_column(lesson, border, alpha):
    choose(lesson, border=border)
    set_alpha(lesson, alpha)
    lesson.evaluate("moveQuery(5, 2); moveCentre(3, [0.3, -1.2])")
    got = seen(lesson)
    side = torch.arange(11 if border == "none" else 13, dtype=torch.float64) - int(border != "none")
    scores = -got["alpha"] * ((side[:, None] - 5.3) ** 2 + (side - 0.8) ** 2)
    shares = torch.softmax(scores.flatten(), 0).view_as(scores).sum(0)
    bars = lesson.evaluate("[...document.querySelectorAll('#bell rect')].map((e) => e.getAttribute('height') / 116)")
    columns = [2 - 1 + i - 4 for i in range(9)]  # of nine bars the middle one is nearest to the centre
    at = {int(place): share for place, share in zip(side, shares.tolist(), strict=True)}
    assert bars == pytest.approx([at.get(column, 0) for column in columns], abs=1e-12)
    assert sum(bar == 0 for bar in bars) == (3 if border == "none" else 2)


@pytest.mark.parametrize("width", [320, 390, 800])
def test_nothing_is_wider_than_a_phone(open_page, width):
    page = open_page(lesson_page(), reduced_motion="reduce", viewport={"width": width, "height": 800})
    choose(page, kernel="random", size=5, dilation=2)
    page.click("#soft")
    for language in WORDS:
        page.evaluate(f"location.hash = '{language}'")
        page.wait_for_function(f"document.title == {WORDS[language]['title']!r}")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        for canvas in ("window", "attended", "heads", "map"):
            box = page.locator(f"#{canvas}").bounding_box()
            assert box["width"] >= 120 and box["x"] >= 0 and box["x"] + box["width"] <= width


def test_dark(open_page):
    page = open_page(lesson_page(), reduced_motion="reduce", color_scheme="dark")
    assert pixel(page, "map", 1.3 / 11, 1.3 / 11) == rgb(INKS["ground"][1])
    page.emulate_media(color_scheme="light")
    page.wait_for_function(f"palette.get('ground') == {INKS['ground'][0]!r}")
    assert pixel(page, "map", 1.3 / 11, 1.3 / 11) == rgb(INKS["ground"][0])
    page.emulate_media(color_scheme="dark")
    page.wait_for_function(f"palette.get('ground') == {INKS['ground'][1]!r}")
    page.click("#edgeless")
    share = math.log10(page.evaluate("result.errors[0][0]") / 1e-16) / 16
    wanted = [share * c + (1 - share) * g for c, g in zip(rgb(DARK[6]), rgb(INKS["ground"][1]), strict=True)]
    assert pixel(page, "map", 0.3 / 11, 0.3 / 11) == pytest.approx(wanted, abs=2)


# planted by scripts/mutate
FAULTS = {
    (
        "report/lesson_drawing.js",
        "browser/test_lesson_drawing.py",
        "browser/test_lesson.py",
        "browser/test_lesson_maths.py",
        "browser/test_lesson_controls.py",
    ): (
        ("one pixel too many is filled in", "> reached) emptyCell", "> reached + 1) emptyCell"),
        ("colours of signs are swapped", 'weight < 0 ? "c6" : "c1"', 'weight < 0 ? "c1" : "c6"'),
        ("outputs are drawn without their scale", "grey((value - low) / (high - low))", "grey(value)"),
        (
            "maps of heads are transposed",
            "row + before, column + before, signed(weight), share",
            "column + before, row + before, signed(weight), share",
        ),
        ("the scale of differences ends early", "Math.log10(error / FLOOR) / 16", "Math.log10(error / FLOOR) / 8"),
        ("both marks of the chart stand on the difference", "y(now[name])", "y(now.error)"),
        (
            "bars are those of a picture without end",
            "weights = softmaxAlong(places, query",
            "weights = softmaxAlong(places.map((p) => 2 * p), query",
        ),
        ("zero has a sign", '.replace(/^−(?=[0.]+$)/, "")', ""),
        ("powers of ten lose their sign", 'replace("-", "−")', 'replace("-", "")'),
    ),
}
