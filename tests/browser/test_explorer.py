"""The page of `glocal explore` in a browser: what it shows is what PyTorch computes, whatever is chosen."""

import re

import numpy as np
import pytest
import torch
from torch import nn

import glocal
from glocal.analysis.maps import maps
from glocal.report.explorer import Picture, explorer

from .explorer_in_browser import GRID, IMAGES, assert_shown, expected, png, point_at, settled, shown


def test_hovering_shows_the_weights_of_the_token(page, calls):
    for row, column in ((0, 0), (2, 3), (4, 5)):
        point_at(page, row, column)
        assert f"row {row + 1}, column {column + 1} of 5\u00a0×\u00a06" in page.text_content("#read")
        assert_shown(page, calls, 0, row, column)


def test_arrow_keys_move_the_query_and_focus_is_seen(page, calls):
    point_at(page, 2, 2)
    page.mouse.move(5, 5)
    page.focus("#ground")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for key in ("ArrowRight", "ArrowDown", "ArrowLeft", "ArrowLeft", "ArrowUp", "ArrowUp"):
        page.keyboard.press(key)
    settled(page)
    assert_shown(page, calls, 0, 1, 1)
    page.keyboard.press("End")
    page.keyboard.press("Shift+ArrowDown")
    settled(page)
    assert_shown(page, calls, 0, 4, 5)
    page.keyboard.press("ArrowRight")  # stays inside
    settled(page)
    assert_shown(page, calls, 0, 4, 5)


@pytest.mark.parametrize("terms", ["position", "content"])
def test_each_term_alone(page, calls, terms):
    page.locator(f"input[name=terms][value={terms}]").check(force=True)
    point_at(page, 3, 1)
    assert_shown(page, calls, 0, 3, 1, terms)
    missing = {"position": "content", "content": "places"}[terms]
    number = [call.name for call in calls].index(missing)
    assert f"has no {terms} term" in page.locator(".layer").nth(number).inner_text()


def test_scores_before_the_softmax(page, calls):
    page.locator("input[name=values][value=scores]").check(force=True)
    point_at(page, 1, 4)
    for layer, call in enumerate(calls):
        terms = call.scores()
        if not terms or call.name == "window":
            continue
        query = 1 * 6 + 4 + (call.name == "content")
        should = sum(terms.values()).detach().double()[0, 1, query].numpy()
        _, values = shown(page, layer, 1)
        assert np.abs(values - should).max() <= 1.05 * np.ptp(should) / 128, call.name


def test_another_image_and_the_mean_of_all(page, calls):
    page.locator("#thumbs button").nth(2).click()
    point_at(page, 2, 1)
    assert_shown(page, calls, 2, 2, 1)
    assert "<b>2</b>.png, seen as <i>cat</i>" in page.text_content("#read")
    page.locator("#thumbs button", has_text="mean").click()
    point_at(page, 2, 1)
    for layer, call in enumerate(calls[:2]):
        query = 13 + (call.name == "content")
        should = call.weights().weights[:, 1, query].mean(0).detach().numpy()
        _, values = shown(page, layer, 1)
        assert np.abs(values - should).max() <= should.max() / 128


def test_the_class_token_as_query(page, calls):
    page.locator("#tokens button").click()
    settled(page)
    number, values = shown(page, 0, 2)
    should = expected(calls[0], 0, 2, 0)
    assert number == 0 and np.abs(values - should).max() <= should.max() / 128
    assert shown(page, 1, 0)[1] is None
    assert "has no class token" in page.locator(".layer").nth(1).inner_text()
    point_at(page, 0, 0)
    assert shown(page, 1, 0)[0] == 0


def test_a_value_is_read_by_pointing_at_it(page, calls):
    point_at(page, 2, 3)
    box = page.locator(".layer").nth(1).locator(".map").nth(1).bounding_box()
    page.mouse.move(box["x"] + box["width"] * 1.5 / 6, box["y"] + box["height"] * 3.5 / 5)
    settled(page)
    said = page.text_content("#read")
    should = expected(calls[1], 0, 1, 15)
    assert "Layer 2, head 2, row 4, column 2" in said
    value = float(re.search(r"column 2: ([\d.e-]+?)(?:distance|$)", said)[1])
    assert value == pytest.approx(should[3 * 6 + 1], abs=should.max() / 100)
    away = np.hypot(*(np.indices(GRID).reshape(2, -1) - np.array([[2], [3]])))
    assert float(re.search(r"distance ([\d.]+) tokens", said)[1]) == pytest.approx((away * should).sum(), abs=0.02)
    assert float(re.search(r"entropy ([\d.]+) bits", said)[1]) == pytest.approx(
        -(should * np.log2(should)).sum(), abs=0.02
    )


def test_a_screen_reader_hears_query_and_distances(page):
    point_at(page, 1, 1)
    page.wait_for_function("document.getElementById('say').textContent.includes('row 2, column 2')")
    said = page.text_content("#say")
    assert re.search(r"Layer 1, mean distance by head: \d\.\d, \d\.\d, \d\.\d\.", said)
    assert page.get_attribute("#say", "aria-live") == "polite"
    label = page.locator(".map canvas").first.get_attribute("aria-label")
    assert re.fullmatch(r"Layer 1, head 1: mean distance \d\.\d tokens", label)


def test_every_switch_can_be_reached_by_keyboard(page):
    reached = set()
    page.focus("#ground")
    for _ in range(14):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.name || document.activeElement.parentElement.id"))
    assert {"terms", "values", "ground", "scale", "measure", "thumbs", "tokens"} <= reached


def test_many_heads_are_shown_on_request(page, calls):
    layer = page.locator(".layer").nth(3)
    assert layer.locator(".map").count() == 12
    layer.locator(".more", has_text="36 more heads").click()
    settled(page)
    assert layer.locator(".map").count() == 48 and layer.locator(".more").count() == 0
    number, values = shown(page, 3, 47)
    should = expected(calls[3], 0, 47, number)
    assert np.abs(np.nan_to_num(values) - should).max() <= np.abs(should).max() / 128


def test_a_layer_too_large_to_store_shows_the_nearest_query(open_page, calls):
    layers, _ = maps(calls[:1], budget=3 * 3 * 31 * 12)  # of 31 queries twelve: the class token, and every second
    assert layers[0].stride == 2
    page = open_page(explorer("some", [Picture(str(i), png(i)) for i in range(IMAGES)], layers))
    page.evaluate("explorer.ready")
    assert "is shown in: content (every 2)" in page.text_content("body")
    for place, nearest in (((0, 0), (1, 1)), ((2, 3), (3, 3)), ((4, 5), (4, 5)), ((4, 2), (4, 3))):
        point_at(page, *place)
        query = 1 + nearest[0] * 6 + nearest[1]
        number, values = shown(page, 0, 2)
        should = expected(calls[0], 0, 2, query)
        assert number == query and np.abs(values - should).max() <= should.max() / 128


def test_what_users_wrote_is_text(page):
    assert page.text_content("h1") == "a <net> & more"
    said = page.text_content("body")
    assert "Random <weights>." in said and "<gone>: it was <not> rebuilt" in said
    assert page.locator("net, gone, weights, main b b").count() == 0


def test_errors_of_rebuilding_are_printed(page, calls):
    worst = max(call.rebuild_error() for call in calls)
    assert f"within {worst:.1e} of the largest entry" in page.text_content("body")
    assert re.search(r"rebuilt to \d\s×\s10⁻[⁰¹²³⁴⁵⁶⁷⁸⁹]+", page.locator(".layer").first.inner_text())


def test_what_is_rebuilt_where_values_depend_on_the_offset_is_said(html):
    mixer = glocal.build("LocallyEnhancedAttention(grid_size=(5, 6), num_groups=2)", 16).eval()
    with torch.no_grad(), glocal.inspect(nn.Sequential(mixer)) as seen:
        seen._model(torch.randn(1, *GRID, 16))
    page = explorer("some", [Picture("0", png(0))], maps(list(seen))[0])
    said = " In 0 values depend on the offset, too: there the weights"
    assert said in page and "values depend on the offset" not in html


# planted by scripts/mutate
FAULTS = {
    ("report/explorer_numbers.js", "browser/test_explorer.py", "browser/test_explorer_drawing.py"): (
        ("steps near the top are narrower", "const STEP = 1.5 / 128", "const STEP = 1.2 / 128"),
        (
            "heads read one another's rows",
            "(Math.min(head, heads - 1) * queries + Math.min(query, queries - 1))",
            "(Math.min(query, queries - 1) * heads + Math.min(head, heads - 1))",
        ),
        ("the sum is not looked at", "(two ? Math.min(highest, sum - other) : highest)", "highest"),
        ("the denominator is that of the sum", "first && second ? 4 : first ? 2 : 5", "two ? 4 : 2"),
        ("shares change places", "both ? content :", "both ? 1 - content :"),
        ("a part is shown by its share", ": +(state.terms === layer.terms[1])", ": 1 - content"),
        ("signed codes count from zero", "? 128 : 0;", "? 0 : 0;"),
        ("the mean is a sum", "value / (scores ? seen[j] : images)", "value"),
        ("class tokens shift the query", "row: prefix + i * across + j,", "row: i * across + j,"),
        ("rows and columns of the query change places", "prefix + r * width + c", "prefix + c * width + r"),
        ("distances forget the step of pooled sources", "origin[0] + step[0] * r - at[0]", "origin[0] + r - 2 * at[0]"),
        ("entropy is in nats", "bits -= size * Math.log2(size)", "bits -= size * Math.log(size)"),
        ("ellipses are turned the other way", "Math.atan2(-2 * b, a - c)", "Math.atan2(2 * b, a - c)"),
        (
            "ellipses are turned a quarter",
            "rx: MASS / Math.sqrt(small), ry: MASS / Math.sqrt(large)",
            "rx: MASS / Math.sqrt(large), ry: MASS / Math.sqrt(small)",
        ),
    ),
    "report/explorer_controls.js": (
        ("arrow keys move two tokens", "const far = event.shiftKey ? 4 : 1;", "const far = event.shiftKey ? 4 : 2;"),
        (
            "names are read as HTML",
            'byId("read").replaceChildren(...parts);',
            'byId("read").innerHTML = parts.map((p) => p.outerHTML ?? p).join("");',
        ),
        ("the live region says nothing", 'byId("say").textContent =', "const nothing ="),
    ),
    ("report/explorer.js", "browser/test_explorer.py", "browser/test_explorer_drawing.py"): (
        (
            "a map's own largest weight sets the colour of all",
            'if (state.scale === "all" && !own.scores) high = most;',
            "",
        ),
        ("layers do not share a scale", 'state.scale === "map" ? own.ranges[head]', "true ? own.ranges[head]"),
    ),
    "report/explorer.py": (
        ("a script is left out", '"explorer_drawing.js", "explorer_controls.js"', '"explorer_controls.js"'),
        ("text may end the element that holds it", 'text.replace("<", "\\\\u003c")', "text"),
        (
            "long indices are cut",
            "values.astype(np.int16) if values.max(initial=0) < 2**15 else values",
            "values.astype(np.int8)",
        ),
        (
            "blocks are not compressed",
            "p.compress(content) + p.flush() for p in packed), key=len",
            "content for p in packed), key=len",
        ),
        ("the worst error is the best", "worst=max(layer.error", "worst=min(layer.error"),
        ("what is missing is not said", "refused=refused or {},", "refused={},"),
        (
            "all layers count as rebuilt by their weights alone",
            'for layer in layers if "unary share" in layer.shares]',
            "for layer in ()]",
        ),
        ("none does", 'for layer in layers if "unary share" in layer.shares]', "for layer in layers]"),
        ("sampling is not said", "if layer.stride > 1],", "if layer.stride > 99],"),
    ),
}
