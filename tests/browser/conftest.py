"""A real browser for pages that hold script: Debian's Chromium, driven by Playwright, with the network cut off."""

import shutil
from pathlib import Path

import pytest

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


@pytest.fixture
def lesson(open_page):
    """The page of the lesson on a wide screen, standing still."""
    from glocal.report.lesson import lesson_page

    return open_page(lesson_page(), reduced_motion="reduce", viewport={"width": 1200, "height": 900})
