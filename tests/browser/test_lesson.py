"""The lesson in a browser: its numbers against PyTorch, its pictures against its numbers, its controls."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch.autograd import forward_ad

from glocal.report.drawing import DARK, INKS, LIGHT
from glocal.report.lesson import lesson_page
from glocal.report.lesson_words import CHOICES, WORDS

MODES = {"zeros": "constant", "none": "constant"}  # of torch's padding, where it has another name
BLUR = {1: [1.0], 2: [0.5, 0.5], 3: [0.25, 0.5, 0.25], 5: [0.0625, 0.25, 0.375, 0.25, 0.0625]}
STEP = {2: [-1.0, 1.0], 3: [-1.0, 0.0, 1.0], 5: [-0.5, -1.0, 0.0, 1.0, 0.5]}


@pytest.fixture
def lesson(open_page):
    return open_page(lesson_page(), reduced_motion="reduce", viewport={"width": 1200, "height": 900})


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


def number(text):
    """A number as the page writes it."""
    digits, _, power = text.replace("−", "-").partition(" × 10")
    return float(digits) * 10.0 ** int(power.translate(str.maketrans("⁻⁰¹²³⁴⁵⁶⁷⁸⁹", "-0123456789")) or 0)


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


def test_arrow_keys_move_the_query_and_it_is_said(lesson):
    for canvas in ("window", "look"):
        lesson.evaluate("moveQuery(5, 5)")
        lesson.focus(f"#{canvas}")
        for key in ("ArrowUp", "ArrowUp", "ArrowRight"):
            lesson.keyboard.press(key)
        assert seen(lesson)["query"].tolist() == [3, 6]
        lesson.keyboard.press("Home")
        lesson.keyboard.press("ArrowLeft")
        assert seen(lesson)["query"].tolist() == [0, 0]
        lesson.keyboard.press("End")
        assert seen(lesson)["query"].tolist() == [10, 10]
    lesson.wait_for_function("document.getElementById('spoken').textContent.startsWith('Row 11, column 11:')")
    said = lesson.text_content("#spoken")
    value = seen(lesson)["convolved"][10, 10].item()
    assert f"convolution {value:.4f}, attention {value:.4f}" in said
    assert lesson.get_attribute("#spoken", "role") == "status"


def test_a_press_chooses_a_head(lesson):
    tile = (lesson.evaluate("document.getElementById('heads').clientWidth") - 16) / 3
    for canvas in ("taps", "heads"):
        for head in (0, 5, 6):
            x, y = (head % 3) * (tile + 8), (head // 3) * (tile + 8 + 20)
            for along in (0.1, 0.9):
                lesson.click(f"#{canvas}", position={"x": x + along * tile, "y": y + along * tile})
                assert seen(lesson)["head"] == head


def test_a_smaller_kernel_chooses_its_last_head(lesson):
    lesson.evaluate("state.head = 8; show()")
    choose(lesson, size=2)
    assert seen(lesson)["head"] == 3 and lesson.inner_text("#head-name") == "Head 4, centre (1, 1)"


def test_arrow_keys_choose_a_head(lesson):
    for canvas in ("taps", "heads"):
        lesson.evaluate("state.head = 0; show()")
        lesson.focus(f"#{canvas}")
        for key in ("ArrowDown", "ArrowRight", "ArrowRight", "ArrowRight"):
            lesson.keyboard.press(key)
        assert seen(lesson)["head"] == 5
        assert lesson.inner_text("#head-name") == "Head 6, centre (0, 1)"
        lesson.wait_for_function(
            "document.getElementById('spoken').textContent == 'Head 6, centre (0, 1), weight −0.13'"
        )


def at(page, canvas, row, column, cells):
    box = page.locator(f"#{canvas}").bounding_box()
    return box["x"] + column * box["width"] / cells, box["y"] + row * box["width"] / cells


def drag(page, start, end):
    page.mouse.move(*start)
    page.mouse.down()
    page.mouse.move(*((a + b) / 2 for a, b in zip(start, end, strict=True)))
    page.mouse.move(*end)
    page.mouse.up()


def test_pictures_are_pressed_and_dragged_on(lesson):
    lesson.evaluate("document.querySelector('.stage').scrollIntoView({ block: 'center' })")
    lesson.mouse.click(*at(lesson, "window", 1 + 2.5, 1 + 9.5, 13))
    assert seen(lesson)["query"].tolist() == [2, 9]
    lesson.mouse.click(*at(lesson, "convolved", 4.5, 0.5, 11))
    assert seen(lesson)["query"].tolist() == [4, 0]
    drag(lesson, at(lesson, "window", 1.5, 1.5, 13), at(lesson, "window", 8.5, 12.9, 13))
    assert seen(lesson)["query"].tolist() == [7, 10]
    choose(lesson, stride=2)
    lesson.mouse.click(*at(lesson, "attended", 3.5, 1.5, 6))
    assert seen(lesson)["query"].tolist() == [3, 1]
    lesson.mouse.click(*at(lesson, "window", 1 + 8.5, 1 + 5.5, 13))
    assert seen(lesson)["query"].tolist() == [4, 2]
    lesson.mouse.move(*at(lesson, "window", 2, 2, 13))  # without a press nothing moves
    assert seen(lesson)["query"].tolist() == [4, 2]


def test_a_centre_is_dragged(lesson):
    set_alpha(lesson, 4)
    lesson.evaluate("document.querySelector('.stage').scrollIntoView({ block: 'center' }); moveQuery(5, 5)")
    middle = 1 + 5.5  # of the query's cell, with a border of one
    drag(lesson, at(lesson, "look", middle + 1, middle, 13), at(lesson, "look", middle + 2.5, middle - 1.3, 13))
    got = assert_is_torch(lesson, "zeros")
    assert got["head"] == 7 and got["query"].tolist() == [5, 5]
    assert got["centres"][7].tolist() == pytest.approx([2.5, -1.3], abs=0.03)
    assert "left its cell" in lesson.inner_text("#said")
    assert lesson.input_value("#down") == "2.5"
    # near a whole pixel it snaps
    drag(
        lesson, at(lesson, "look", middle + 2.5, middle - 1.3, 13), at(lesson, "look", middle + 1.07, middle + 0.05, 13)
    )
    assert seen(lesson)["centres"][7].tolist() == [1, 0]
    # beside all rings it is the query that is moved
    drag(lesson, at(lesson, "look", 2.5, 2.5, 13), at(lesson, "look", 3.5, 2.5, 13))
    assert seen(lesson)["query"].tolist() == [2, 1]


def test_play_and_pause(lesson):
    assert not seen(lesson)["playing"]  # less motion is asked for
    assert seen(lesson)["reached"] == 120
    lesson.evaluate("moveQuery(10, 10)")
    assert lesson.inner_text("#play") == "Play"
    lesson.click("#play")  # from the start
    assert lesson.inner_text("#play") == "Pause"
    lesson.wait_for_function("state.query[1] >= 2 && state.query[0] == 0 && state.reached == state.query[1]")
    lesson.click("#play")
    stopped = seen(lesson)["query"].tolist()
    lesson.wait_for_timeout(300)
    assert seen(lesson)["query"].tolist() == stopped and not seen(lesson)["playing"]
    lesson.evaluate("moveQuery(10, 9)")
    lesson.click("#play")
    lesson.wait_for_function("!state.playing")
    assert seen(lesson)["query"].tolist() == [10, 10] and lesson.inner_text("#play") == "Play"
    lesson.click("#play")
    lesson.focus("#window")
    lesson.keyboard.press("ArrowDown")  # whoever moves the query stops it
    assert not seen(lesson)["playing"]


def test_it_plays_by_itself_where_motion_is_welcome(open_page):
    page = open_page(lesson_page())
    page.wait_for_function("state.playing && state.query[1] >= 1")
    assert page.evaluate("state.reached") < 60


def test_things_to_try(lesson):
    said = {"soft": "Not exact", "edgeless": "Wrong at the border", "apart": "left its cell", "exact": "Exact."}
    choose(lesson, kernel="random", size=5)
    for name, words in said.items():
        lesson.click(f"#{name}")
        assert words in lesson.inner_text("#said")
        assert_is_torch(lesson, "none" if name == "edgeless" else "zeros")
    assert seen(lesson)["error"] < 1e-13 and lesson.input_value("#border") == "zeros"
    set_alpha(lesson, 12)
    assert "Nearly exact" in lesson.inner_text("#said")


def test_without_places_outside_the_middle_is_spoken_of_as_it_is(lesson):
    choose(lesson, kernel="random", size=5, dilation=2, border="none")
    for alpha, head, said in ((46, None, "said-none"), (1, None, "said-both"), (46, "[-3.5, -4]", "said-both")):
        set_alpha(lesson, alpha)
        if head:
            lesson.evaluate(f"moveCentre(0, {head})")
        assert lesson.inner_text("#said") == WORDS["en"][said]
        assert (seen(lesson)["errors"][4:7, 4:7].max() < 1e-12) == (said == "said-none")


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


def test_alpha_is_moved_by_keys(lesson):
    lesson.focus("#alpha")
    lesson.keyboard.press("ArrowLeft")
    lower = seen(lesson)["alpha"]
    assert 44 < lower < 46 and lesson.get_attribute("#alpha", "aria-valuetext") == f"α = {lower}"
    lesson.keyboard.press("Home")
    assert seen(lesson)["alpha"] == 0.101 and lesson.inner_text("#alpha-shown") == "α = 0.101"
    lesson.keyboard.press("End")
    assert seen(lesson)["alpha"] == 63.5


def test_counts(lesson):
    choose(lesson, size=5)
    shown = {k: lesson.inner_text(f"#count-{k}") for k in ("heads", "weights", "own-weights", "centres", "alphas")}
    assert shown == {"heads": "25", "weights": "25", "own-weights": "25", "centres": "50", "alphas": "25"}
    convolution = sum(p.numel() for p in torch.nn.Conv2d(64, 64, 5).parameters())
    assert lesson.inner_text("#count-wide") == f"{convolution:,}"
    assert lesson.inner_text("#count-own-wide") == f"{convolution + 3 * 25:,}"
    assert lesson.inner_text("#count-own-reads") == f"{25 * 15 * 15:,}"
    assert lesson.inner_text("#attention-title") == "Attention with 25 heads"
    choose(lesson, size=1)
    assert lesson.inner_text("#attention-title") == "Attention with 1 head"


def test_both_languages(lesson):
    texts = "[...document.querySelectorAll('[data-word]')].map((e) => [e.dataset.word, e.textContent])"
    labels = (
        "[...document.querySelectorAll('[data-label]')].map((e) => [e.dataset.label, e.getAttribute('aria-label')])"
    )
    english = WORDS["en"]
    assert lesson.evaluate("document.documentElement.lang") == "en"
    lesson.click("text=中文")
    lesson.wait_for_function("document.documentElement.lang == 'zh-Hans'")
    for reloaded in (False, True):
        if reloaded:
            lesson.reload()
        chinese = WORDS["zh"]
        shown = lesson.evaluate(texts)
        assert len(shown) > 60 and all(text == chinese[key] for key, text in shown)
        assert all(text == chinese[key] for key, text in lesson.evaluate(labels))
        assert lesson.title() == chinese["title"] and lesson.url.endswith("#zh")
        assert lesson.inner_text("#said") == chinese["said-exact"]
        assert lesson.inner_text("#attention-title") == "9 个头的注意力"
        assert lesson.get_attribute("[data-language=zh]", "aria-current") == "true"
        assert lesson.get_attribute("[data-language=en]", "aria-current") is None
        words = lesson.inner_text("main").replace("softmax", "").replace("exp", "")
        known = ("Cordonnier", "Loukas", "Jaggi", "ICLR", "arXiv", "score")
        left = [
            w for w in words.split("参考")[0].split() if w.isascii() and w.isalpha() and len(w) > 2 and w not in known
        ]
        assert not left
    lesson.click("text=English")
    lesson.wait_for_function("document.documentElement.lang == 'en'")
    assert all(text == english[key] for key, text in lesson.evaluate(texts)) and lesson.url.endswith("#en")


def test_the_readers_own_language_comes_first(open_page):
    page = open_page(lesson_page(), locale="zh-CN", reduced_motion="reduce")
    assert page.inner_text("h1") == WORDS["zh"]["title"]
    page = open_page(lesson_page(), locale="fr-FR", reduced_motion="reduce")
    assert page.inner_text("h1") == WORDS["en"]["title"]


@pytest.mark.parametrize("width", [320, 390, 1200])
def test_nothing_moves_when_another_sentence_is_said(open_page, width):
    page = open_page(lesson_page(), reduced_motion="reduce", viewport={"width": width, "height": 800})
    for language in WORDS:
        page.evaluate(f"location.hash = '{language}'")
        page.wait_for_function(f"document.title == {WORDS[language]['title']!r}")
        tops, said = set(), set()
        for way in (
            "setAlpha(46)",
            "setAlpha(12)",
            "setAlpha(1)",
            "moveCentre(0, [-0.5, -1])",
            "choose({border: 'none'})",
        ):
            page.evaluate(way)
            said.add(page.inner_text("#said"))
            tops.add(page.evaluate("at('look').getBoundingClientRect().top + scrollY"))
        assert len(said) == 5 and len(tops) == 1
        page.evaluate("choose({border: 'zeros'}, true)")


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


def test_everything_that_can_be_used_has_a_name(lesson):
    unnamed = lesson.evaluate(
        "[...document.querySelectorAll('button, select, input, canvas, svg.chart, a')].filter((e) =>"
        " !(e.ariaLabel || e.textContent.trim() || e.closest('label')?.textContent.trim())).map((e) => e.outerHTML)"
    )
    assert not unnamed
    small = lesson.evaluate(
        "[...document.querySelectorAll('button:not([hidden]), select, input')]"
        ".filter((e) => e.offsetHeight < 24).length"
    )
    assert small == 0


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


FAULTS = {
    "report/lesson_maths.js": (
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
    "report/lesson_drawing.js": (
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
    "report/lesson.js": (
        ("the difference said is that of one pixel", "result.error = largest(errors)", "result.error = errors[5][5]"),
        (
            "the sum over heads is the convolution's",
            "signedNumber(attended[row][column], 6)",
            "signedNumber(convolved[row][column], 6)",
        ),
        ("there is room for short sentences only", "Math.max(...heights)}px", "Math.min(...heights)}px"),
        ("the middle is always called exact", 'inMiddle() < 1e-12 ? "said-none"', 'inMiddle() < 9 ? "said-none"'),
        ("the border counts as the middle", "queries[o] + taps[0] >= 0 &&", "queries[o] >= 0 &&"),
        ("the chosen head may be one that is gone", "Math.min(state.head, state.centres.length - 1)", "state.head"),
        ("playing again leaves the output filled", "state.reached = 0;", ""),
        ("it never stops at the end", "return play(false);\n      moveQuery", "return play(true);\n      moveQuery"),
        (
            "all curves are those of the present alpha",
            "state.centres, weights, alpha);\n    return",
            "state.centres, weights, state.alpha);\n    return",
        ),
        ("arrow keys do not say what they changed", "if (!state.playing) announce();", ""),
        ("parameters are counted once for each head", "size ** 2 * 3]", "size ** 2]"),
        (
            "heads leave their cells with the picture",
            "if (again || String(cells()) !== before) state.centres",
            "state.centres",
        ),
    ),
    "report/lesson_controls.js": (
        (
            "the query's slider is set before it is read",
            "Math.floor(asked / result.geometry.out), asked %",
            "Math.floor(target.value / result.geometry.out), asked %",
        ),
        ("a press ignores the stride", "Math.floor(along / state.stride)", "Math.floor(along)"),
        ("low tiles are missed", "/ box.height", "/ box.width"),
        ("a centre is caught from afar", "away[nearest] < 0.6 ? nearest : null", "nearest"),
        ("it plays though less motion is asked for", 'reduce)").matches) {', 'reduce)") === 0) {'),
        ("the address does not choose the language", "Object.hasOwn(WORDS, asked) ? asked", 'asked === "" ? asked'),
        ("colours stay when the scheme changes", "(palette.clear(), show())", "show()"),
        ("a slider moves the other axis", "with(axis, Number(target.value))", "with(1 - axis, Number(target.value))"),
    ),
}
