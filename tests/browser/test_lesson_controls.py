"""The controls of the lesson: keys, pointer, sliders and the player."""

import pytest

from glocal.report.lesson import lesson_page

from .lesson_in_browser import assert_is_torch, choose, seen, set_alpha


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


def test_alpha_is_moved_by_keys(lesson):
    lesson.focus("#alpha")
    lesson.keyboard.press("ArrowLeft")
    lower = seen(lesson)["alpha"]
    assert 44 < lower < 46 and lesson.get_attribute("#alpha", "aria-valuetext") == f"α = {lower}"
    lesson.keyboard.press("Home")
    assert seen(lesson)["alpha"] == 0.101 and lesson.inner_text("#alpha-shown") == "α = 0.101"
    lesson.keyboard.press("End")
    assert seen(lesson)["alpha"] == 63.5


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


# planted by scripts/mutate
FAULTS = {
    (
        "report/lesson_controls.js",
        "browser/test_lesson_controls.py",
        "browser/test_lesson.py",
        "browser/test_lesson_maths.py",
        "browser/test_lesson_drawing.py",
    ): (
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
