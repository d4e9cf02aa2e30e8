"""The lesson as a file: both languages whole, text escaped, nothing from elsewhere; browser/ tests what it does."""

import json
import re
from html.parser import HTMLParser
from importlib.resources import files

import pytest

from glocal.report import lesson
from glocal.report.lesson import SCRIPTS, lesson_page
from glocal.report.lesson_words import CHOICES, WORDS

FAULTS = {
    "report/lesson.py": (
        ("a script is left out", '"lesson_drawing.js", "lesson.js"', '"lesson.js"'),
        ("the script is escaped", "script=Markup(script)", "script=script"),
        (
            "controls come before what they use",
            '"lesson.js", "lesson_controls.js"',
            '"lesson_controls.js", "lesson.js"',
        ),
    ),
    "report/lesson_words.py": (
        ("a word is missing in Chinese", '    "weight": "权重",\n', ""),
        ("a value has no place in a sentence", "第 {row} 行，第 {column} 列：卷积", "第 {row} 行：卷积"),
        ("an English word stays in Chinese", '"stride": "步幅"', '"stride": "Stride"'),
        ("a window cannot be chosen", '("1", "2", "3", "5")', '("1", "2", "5")'),
    ),
    "report/lesson.html": (
        ("words can end their script", "{{ words|tojson }}", "{{ words|string|safe }}"),
        ("a label is in one language only", '{{ label("map-label") }}', 'aria-label="Map"'),
        (
            "a heading does not change its language",
            '{{ word("h2", "borders") }}',
            "<h2>What happens at the border</h2>",
        ),
    ),
}


class Page(HTMLParser):
    """Tags with their attributes, and what stands between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.texts, self.open = [], {}, []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.open.append((tag, dict(attributes)))

    def handle_data(self, data):
        if self.open:
            tag, attributes = self.open[-1]
            self.texts.setdefault(attributes.get("id") or attributes.get("data-word") or tag, []).append(data)

    def handle_endtag(self, tag):
        while self.open and self.open.pop()[0] != tag:
            pass


@pytest.fixture(scope="module")
def text():
    return lesson_page()


def test_both_languages_say_the_same_things():
    english, chinese = WORDS["en"], WORDS["zh"]
    assert list(english) == list(chinese)
    for key, said in english.items():
        fields = r"\{(\w+)\}"
        assert sorted(re.findall(fields, said)) == sorted(re.findall(fields, chinese[key])), key
        assert said.strip() == said and chinese[key].strip() == chinese[key] and said and chinese[key]
        assert not re.search(r"[一-鿿]", said)
        if not re.fullmatch(r"size-\d", key):
            assert re.search(r"[一-鿿]", chinese[key]), key


def test_every_word_is_used_and_every_used_word_is_there(text):
    page = Page(text)
    shown = {attributes[k] for _, attributes in page.tags for k in ("data-word", "data-label") if k in attributes}
    script = "".join(files("glocal.report").joinpath(name).read_text("utf-8") for name in SCRIPTS)
    said = set(re.findall(r'say\("([\w-]+)"', script)) | set(re.findall(r'"(said-\w+)"', script))
    said |= {"play", "pause", "attention", "attention-one"}  # chosen between in the script
    assert shown | said | {"name", "noscript"} == set(WORDS["en"])
    for key in said:  # what the script says is filled in there, nothing else
        fields = set(re.findall(r"\{(\w+)\}", WORDS["en"][key]))
        assert all(f"{field}" in script for field in fields)
    assert not {key for key in shown if "{" in WORDS["en"][key]}


def test_every_id_that_the_script_asks_for_is_there_once(text):
    ids = [attributes["id"] for _, attributes in Page(text).tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    script = "".join(files("glocal.report").joinpath(name).read_text("utf-8") for name in SCRIPTS)
    assert set(re.findall(r'\bat\("([\w-]+)"\)', script)) | set(re.findall(r'write\("([\w-]+)"', script)) <= set(ids)
    assert {f"count-{name}" for name in re.findall(r'"count-([\w-]+)"', script)} <= set(ids)


def test_choices_have_names(text):
    options = [attributes["value"] for tag, attributes in Page(text).tags if tag == "option"]
    assert options == [value for values in CHOICES.values() for value in values]
    assert CHOICES["size"] == ("1", "2", "3", "5") and len(CHOICES["border"]) == 5
    for name, values in CHOICES.items():
        for value in values:
            assert (f"{name}-{value}" in WORDS["en"]) or (value.isdecimal() and name in ("stride", "dilation"))


def test_it_needs_nothing_else(text):
    page = Page(text)
    assert not {tag for tag, _ in page.tags} & {"link", "img", "iframe", "object", "base"}
    for tag, attributes in page.tags:
        assert "src" not in attributes and attributes.get("href", "#en") in ("#en", "#zh"), tag
        assert not [name for name in attributes if name.startswith("on")]
    assert not re.search(r"url\(|@import|fetch\(|XMLHttp|WebSocket|innerHTML|localStorage|eval\(", text)
    assert len(text.encode()) < 100_000


def test_scripts_stand_whole_in_their_order(text):
    places = []
    for name in ("lesson_maths.js", "lesson_drawing.js", "lesson.js", "lesson_controls.js"):
        source = files("glocal.report").joinpath(name).read_text("utf-8")
        assert source in text and len(source.splitlines()) < 400 and "</" not in source
        places.append(text.index(source))
    assert places == sorted(places)
    assert json.loads("".join(Page(text).texts["words"])) == WORDS


def test_words_are_escaped(monkeypatch):
    nasty = "</script><b onclick='x'>&\"{}"
    words = {language: dict.fromkeys(said, nasty) for language, said in WORDS.items()}
    monkeypatch.setattr(lesson, "WORDS", words)
    page = Page(lesson_page())
    assert not [attributes for tag, attributes in page.tags if tag == "b" and "onclick" in attributes]
    assert sum(tag == "script" for tag, _ in page.tags) == 2
    assert json.loads("".join(page.texts["words"])) == words
    assert {a["aria-label"] for _, a in page.tags if "data-label" in a} == {nasty}
