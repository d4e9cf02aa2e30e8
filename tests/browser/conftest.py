"""A real browser for pages that hold script: Debian's Chromium, driven by Playwright, with the network cut off."""

import shutil
from pathlib import Path

import pytest
import torch

import glocal
from glocal.analysis.maps import maps
from glocal.report.explorer import Picture, explorer

from .explorer_in_browser import GRID, IMAGES, Net, png

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
QUIET += ["--disable-sync"]


@pytest.fixture(scope="session")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("no Chromium on this machine")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=program, args=QUIET)
        yield started
        started.close()


@pytest.fixture
def complaints():
    """What pages said on the console, threw or asked of the network."""
    return []


@pytest.fixture
def open_page(browser, tmp_path, complaints):
    """open_page(html, **options of the context) shows a page; afterwards there must be no complaints."""
    contexts = []

    def show(html, **options):
        context = browser.new_context(offline=True, **options)
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda said: said.type in ("error", "warning") and complaints.append(said.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on(
            "request", lambda asked: asked.url.startswith(("file:", "data:", "blob:")) or complaints.append(asked.url)
        )
        file = Path(tmp_path, f"page{len(contexts)}.html")
        file.write_text(html, "utf-8")
        page.goto(file.as_uri())
        return page

    yield show
    for context in contexts:
        context.close()
    assert not complaints


@pytest.fixture(scope="module")
def calls():
    """Of every layer of the explorer's network."""
    torch.manual_seed(0)
    with torch.no_grad(), glocal.inspect(Net().eval()) as seen:
        seen._model(torch.randn(IMAGES, *GRID, 24))
    return list(seen)


@pytest.fixture(scope="module")
def html(calls):
    """The explorer's page of these calls."""
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


@pytest.fixture
def page(open_page, html):
    """The explorer's page on a wide screen."""
    page = open_page(html, viewport={"width": 1200, "height": 900})
    page.evaluate("explorer.ready")
    return page


@pytest.fixture
def lesson(open_page):
    """The page of the lesson on a wide screen, standing still."""
    from glocal.report.lesson import lesson_page

    return open_page(lesson_page(), reduced_motion="reduce", viewport={"width": 1200, "height": 900})
