"""The page of `glocal explore` in a browser: what it draws is what PyTorch computes, whatever is chosen."""

import base64
import dataclasses
import functools
import io
import re

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

import glocal
from glocal.analysis.maps import maps
from glocal.report.explorer import Picture, explorer

GRID, IMAGES = (5, 6), 3


class Net(nn.Module):
    """One layer of every kind that a page treats differently."""

    def __init__(self):
        super().__init__()
        self.content = glocal.build("SelfAttention(num_heads=3)", 24)
        self.both = glocal.build("RelativeAttention(grid_size=(5, 6), num_heads=2)", 24)
        self.places = glocal.build("QuadraticAttention(num_heads=4)", 24)
        self.conv = glocal.build("DepthwiseConv(kernel_size=3)", 48)
        self.window = glocal.build("WindowAttention(window_size=3, shift_size=1, num_heads=2)", 24)
        self.pooled = glocal.build("SpatialReductionAttention(num_heads=2, sr_ratio=2)", 24)
        self.strided = glocal.build("Convolution(kernel_size=3, stride=2)", 24)
        for parameter in self.parameters():
            parameter.data.add_(0.5 * torch.randn_like(parameter))
        self.own = glocal.build("InhomogeneousDepthwiseConv(kernel_size=3, num_groups=4)", 24)
        with torch.random.fork_rng():
            self.gated = glocal.build("GatedPaddedAttention(padding=1, encoding='learned', head_dim=8)", 24)
            self.mixture = glocal.build("GatedPositionalAttention(num_heads=2)", 24)
            for parameter in (*self.gated.parameters(), *self.mixture.parameters()):
                parameter.data.add_(0.5 * torch.randn_like(parameter))

    def forward(self, x):
        self.content(torch.cat([x.mean((1, 2))[:, None], x.flatten(1, 2)], 1), grid=GRID)
        self.both(x), self.places(x), self.conv(torch.cat([x, -x], -1)), self.window(x), self.pooled(x)
        return self.strided(x), self.own(x), self.gated(x), self.mixture(x)


@pytest.fixture(scope="module")
def calls():
    torch.manual_seed(0)
    with torch.no_grad(), glocal.inspect(Net().eval()) as seen:
        seen._model(torch.randn(IMAGES, *GRID, 24))
    return list(seen)


@pytest.fixture(scope="module")
def html(calls):
    layers, refused = maps(calls)
    assert not refused
    (places,) = (layer for layer in layers if layer.centers is not None)
    precision = places.precision.tolist()
    epochs = [
        {"epoch": n, "layers": {"places": {"centers": (n / 9 * places.centers).tolist(), "precision": precision}}}
        for n in (1, 4, 9)
    ]
    return explorer(
        "a <net> & more",
        [Picture(f"<b>{i}</b>.png", png(i), "seen as <i>cat</i>") for i in range(IMAGES)],
        layers,
        notes=["Random <weights>."],
        refused={"<gone>": "it was <not> rebuilt"},
        epochs=epochs,
    )


def png(seed):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (30, 36, 3), np.uint8)).save(file, "png")
    return file.getvalue()


@pytest.fixture
def page(open_page, html):
    page = open_page(html, viewport={"width": 1200, "height": 900})
    page.evaluate("explorer.ready")
    return page


def settled(page):
    """Waits for what was asked for to be drawn."""
    page.evaluate("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")


def point_at(page, row, column, grid=GRID):
    box = page.locator("#ground").bounding_box()
    page.mouse.move(
        box["x"] + (column + 0.5) / grid[1] * box["width"], box["y"] + (row + 0.5) / grid[0] * box["height"]
    )
    settled(page)


def shown(page, layer, head):
    """The numbers drawn, NaN where nothing is; None if nothing is drawn of the layer."""
    script = "([l, h]) => { const s = explorer.shown(l, h); return [s.query, s.values && s.values.map(String)]; }"
    found = page.evaluate(script, [layer, head])
    return found[0], None if found[1] is None else np.array([float(v.replace("NaN", "nan")) for v in found[1]])


@functools.cache
def weights_of(call):
    return call.weights()


@functools.cache
def scores_of(call):
    return call.scores()


def expected(call, image, head, query, terms="both"):
    """By torch, from the mixer itself; None where it has no such term."""
    if terms != "both" and (parts := call.parts()):
        dense = dataclasses.replace(weights_of(call), weights=parts[terms][1]).dense().detach().double()
        return dense[min(image, len(dense) - 1), head, query].numpy()
    if terms != "both":
        scores = scores_of(call)
        if not scores:
            terms = "both"
        elif terms not in scores:
            return None
        else:
            term = scores[terms]
            index = weights_of(call).index
            term, seen = torch.broadcast_tensors(term, weights_of(call).weights > 0)
            row = term.masked_fill(~seen, -torch.inf).softmax(-1)
            row = row[min(image, len(row) - 1), head, query].detach().double()
            if index is None:
                return row.numpy()
            index = index[min(image, len(index) - 1), 0, query]
            full = torch.zeros(weights_of(call).num_sources + 1, dtype=torch.float64)
            return full.index_add(0, torch.where(index < 0, len(full) - 1, index), row)[:-1].numpy()
    dense = weights_of(call).dense().detach().double()
    if call.name == "strided":  # its taps, by the norm of what they learned
        norms = call.mixer.weight.detach().double().flatten(2).norm(dim=(0, 1))
        return torch.einsum("k,km->m", norms / norms.sum(), dense[0, :, query]).numpy()
    return dense[min(image, len(dense) - 1), min(head, dense.shape[1] - 1), query].numpy()


def assert_shown(page, calls, image, row, column, terms="both"):
    """All layers show the weights of the token at this place of a 5 x 6 grid."""
    for layer, call in enumerate(calls):
        query = 1 + row * 6 + column if call.name == "content" else row * 6 + column
        if call.name == "strided":
            query = int((row + 0.5) / 5 * 3) * 3 + int((column + 0.5) / 6 * 3)  # a grid of 3 x 3 over the same image
        for head in range(1 if call.name == "strided" else min(weights_of(call).num_groups, 3)):
            number, values = shown(page, layer, head)
            should = expected(call, image, head, query, terms)
            assert (values is None) == (should is None), call.name
            if values is not None:
                assert number == query
                assert np.abs(np.nan_to_num(values) - should).max() <= np.abs(should).max() / 128 + 1e-9, call.name


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


def test_a_screen_reader_hears_query_and_distances(page):
    point_at(page, 1, 1)
    page.wait_for_function("document.getElementById('say').textContent.includes('row 2, column 2')")
    said = page.text_content("#say")
    assert re.search(r"Layer 1, mean distance by head: \d\.\d, \d\.\d, \d\.\d\.", said)
    assert page.get_attribute("#say", "aria-live") == "polite"
    label = page.locator(".map canvas").first.get_attribute("aria-label")
    assert re.fullmatch(r"Layer 1, head 1: mean distance \d\.\d tokens", label)


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


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1200])
def test_it_fits_every_screen(open_page, html, width, scheme):
    page = open_page(html, viewport={"width": width, "height": 800}, color_scheme=scheme)
    page.evaluate("explorer.ready")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator(".map").first.is_visible()


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
    "report/explorer_numbers.js": (
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
    "report/explorer_drawing.js": (
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
    "report/explorer_controls.js": (
        ("arrow keys move two tokens", "const far = event.shiftKey ? 4 : 1;", "const far = event.shiftKey ? 4 : 2;"),
        (
            "names are read as HTML",
            'byId("read").replaceChildren(...parts);',
            'byId("read").innerHTML = parts.map((p) => p.outerHTML ?? p).join("");',
        ),
        ("the live region says nothing", 'byId("say").textContent =', "const nothing ="),
    ),
    "report/explorer.js": (
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
