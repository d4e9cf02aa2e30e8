"""What the lesson says, in both languages, and what follows from a choice."""

import pytest
import torch

from glocal.report.lesson import lesson_page
from glocal.report.lesson_words import WORDS

from .lesson_in_browser import assert_is_torch, choose, seen, set_alpha


def test_a_smaller_kernel_chooses_its_last_head(lesson):
    lesson.evaluate("state.head = 8; show()")
    choose(lesson, size=2)
    assert seen(lesson)["head"] == 3 and lesson.inner_text("#head-name") == "Head 4, centre (1, 1)"


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


# planted by scripts/mutate
FAULTS = {
    (
        "report/lesson.js",
        "browser/test_lesson.py",
        "browser/test_lesson_maths.py",
        "browser/test_lesson_drawing.py",
        "browser/test_lesson_controls.py",
    ): (
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
}
