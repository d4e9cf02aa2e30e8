"""The pictures of the explorer's page: colours, marks, ellipses, on every screen."""

import base64
import io

import numpy as np
import pytest
from PIL import Image

from .explorer_in_browser import point_at, settled, shown


def pixels(page, layer, head):
    """[tokens, RGBA] of a map's canvas, by way of a PNG file."""
    canvas = page.locator(".layer").nth(layer).locator(".map canvas").nth(head)
    file = base64.b64decode(canvas.evaluate("(c) => c.toDataURL()").partition(",")[2])
    return np.array(Image.open(io.BytesIO(file)).convert("RGBA"), int).reshape(-1, 4)


def test_pictures_are_those_of_the_numbers(page):
    """Darker is more, and on the image less see-through; what is not read has no colour at all."""
    point_at(page, 2, 3)
    for layer in (1, 4):
        values, drawn = shown(page, layer, 0)[1], pixels(page, layer, 0)
        read = ~np.isnan(values)
        assert (drawn[~read, 3] == 0).all() and (drawn[read, 3] == 255).all()
        order = np.argsort(values[read])
        light = drawn[read][:, :3].sum(1)[order]
        assert (np.diff(light) <= 0).all() and light[0] > light[-1]
        assert drawn[np.nanargmax(values)].tolist() == [0x10, 0x1F, 0x5C, 255]
    page.locator("input[name=ground][value=image]").check(force=True)
    settled(page)
    drawn = pixels(page, 1, 0)
    assert (np.diff(drawn[np.argsort(shown(page, 1, 0)[1])][:, 3]) >= 0).all()
    assert page.evaluate("getComputedStyle(document.querySelector('.map')).backgroundImage").startswith("url(")


def test_scale_of_colours(page):
    point_at(page, 2, 3)

    def strongest():
        return [pixels(page, 1, head)[:, :3].sum(1).min() for head in range(2)]

    each = strongest()
    page.locator("input[name=scale][value=layer]").check(force=True)
    settled(page)
    largest = [shown(page, 1, head)[1].max() for head in range(2)]
    shared = strongest()
    assert each[0] == each[1]
    assert shared[int(np.argmax(largest))] == each[0] and shared[int(np.argmin(largest))] > each[0]


def test_the_query_is_marked_where_it_is(page):
    point_at(page, 4, 1)

    def box(layer):
        at = page.locator(".layer").nth(layer).locator(".map .at").first.bounding_box()
        around = page.locator(".layer").nth(layer).locator(".map").first.bounding_box()
        return [
            round((at["x"] - around["x"]) / around["width"], 2), round((at["y"] - around["y"]) / around["height"], 2),
            round(at["width"] / around["width"], 2), round(at["height"] / around["height"], 2),
        ]  # fmt: skip

    assert box(1) == pytest.approx([1 / 6, 4 / 5, 1 / 6, 1 / 5], abs=0.02)
    assert box(5) == pytest.approx([1 / 6, 4 / 6, 1 / 6, 1 / 6], abs=0.02)  # 3 x 3 cells, of which the last hang over


def test_the_slider_moves_the_centres(page, calls):
    centres = calls[2].mixer.attention_centers.detach().numpy()

    def drawn():
        script = "all => all.map((c) => [+c.getAttribute('cy'), +c.getAttribute('cx')])"
        return np.array(page.eval_on_selector_all("#panels circle", script))

    page.wait_for_selector("#panels circle")
    last = drawn()
    unit = float(page.get_attribute("#panels rect", "width"))
    np.testing.assert_allclose(last / unit, centres, atol=0.02)
    assert page.text_content("#epoch-now") == "9"
    page.focus("#epoch")
    page.keyboard.press("ArrowLeft")
    assert page.text_content("#epoch-now") == "4"
    np.testing.assert_allclose(drawn(), last * 4 / 9, atol=0.02)


@pytest.mark.parametrize("angle", [0.0, 0.4, 1.3, 2.5])
def test_an_ellipse_is_long_where_the_head_is_wide(page, angle):
    """Three tokens deep along one direction (row, column) and half a token across: half of the mass is inside."""
    along, across = np.array([np.sin(angle), np.cos(angle)]), np.array([np.cos(angle), -np.sin(angle)])
    precision = np.outer(along, along) / 3**2 + np.outer(across, across) / 0.5**2
    found = page.evaluate("(matrix) => explorer.ellipse(matrix)", precision.tolist())
    rng = np.random.default_rng(0)
    points = rng.normal(size=(4000, 1)) * 3 * along + rng.normal(size=(4000, 1)) * 0.5 * across
    assert found["rx"] / found["ry"] == pytest.approx(6)
    turn = np.deg2rad(found["angle"])
    x = points[:, 1] * np.cos(turn) + points[:, 0] * np.sin(turn)
    y = points[:, 0] * np.cos(turn) - points[:, 1] * np.sin(turn)
    assert ((x / found["rx"]) ** 2 + (y / found["ry"]) ** 2 < 1).mean() == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_it_fits_every_screen(open_page, html, width, scheme):
    page = open_page(html, viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.evaluate("explorer.ready")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".map").first.is_visible()


def test_colours_of_either_sign(page):
    point_at(page, 2, 3)
    values = shown(page, 3, 0)[1]
    for ground, (adds, takes) in {"bare": (2, 0), "image": (2, 0)}.items():  # blue adds, red and green take away
        page.locator(f"input[name=ground][value={ground}]").check(force=True)
        settled(page)
        drawn = pixels(page, 3, 0)
        strong = np.nan_to_num(np.abs(values)) > 0.3 * np.nanmax(np.abs(values))
        for colour, value in zip(drawn[strong], values[strong], strict=True):
            assert (colour[adds] > colour[takes]) == (value > 0)


# planted by scripts/mutate
FAULTS = {
    ("report/explorer_drawing.js", "browser/test_explorer_drawing.py", "browser/test_explorer.py"): (
        (
            "what is not read has the colour of little",
            "if (value !== value) out[j] = 0;",
            "if (value !== value) out[j] = up[0];",
        ),
        (
            "orange adds",
            "(value < 0 ? (overlaid ? less : down) : overlaid ? more : up)",
            "(value > 0 ? (overlaid ? less : down) : overlaid ? more : up)",
        ),
        ("the mark is half a token off", "(place - 0.5 - start) / each + 0.5", "(place - start) / each + 0.5"),
        (
            "centres have rows for columns",
            'cx="${(column * unit).toFixed(2)}" cy="${(row * unit).toFixed(2)}"',
            'cx="${(row * unit).toFixed(2)}" cy="${(column * unit).toFixed(2)}"',
        ),
    ),
}
