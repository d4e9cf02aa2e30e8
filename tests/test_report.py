"""The report: one file that needs nothing else, with everything in it, and nothing of it taken for HTML."""

import itertools
import math
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from glocal.report import compare_report
from glocal.report.curves import Line, _ticks, line_chart, stroke


def results(names=("C-C", "T-T"), epochs=3, seeds=2, finished=4):
    return {
        "glocal": "0.1.0",
        "torch": "2.11",
        "device": "CPU, one thread a run",
        "data": {
            "name": "my <data> & more", "train_images": 100, "test_images": 20, "classes": ["a", "b"],
            "img_size": [8, 9], "in_chans": 1, "note": "Images were stretched.",
        },
        "recipe": {"epochs": epochs, "lr": 0.002},
        "runs": {"finished": finished, "planned": 4},
        "candidates": [
            {
                "name": name, "data": "my <data> & more", "seeds": list(range(seeds)),
                "test_accuracy": {"mean": 80.0 + i, "per_seed": [79.0 + i, 81.0 + i][:seeds]},
                "train_loss": {"mean": 0.5, "per_seed": [0.5] * seeds},
                "params": 12345, "images_per_second": 1234.5, "seconds_per_epoch": 6.7,
                "curves": [
                    {"seed": s, "train_loss": [1.0 / (e + 1) for e in range(epochs)],
                     "test_accuracy": [70.0 + e for e in range(epochs)]}
                    for s in range(seeds)
                ],
            }
            for i, name in enumerate(names)
        ],
    }  # fmt: skip


class Page(HTMLParser):
    """Text, tags and attributes, and whether every tag is closed."""

    void = frozenset({"meta", "line", "circle", "polyline"})

    def __init__(self, text):
        super().__init__()
        self.tags, self.attributes, self.text, self.open = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def test_it_needs_nothing_else():
    text = compare_report(results())
    page = Page(text)
    assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
    assert not {"href", "src", "onclick"} & {name for name, _ in page.attributes}
    assert "://" not in text and "@import" not in text
    assert ("name", "viewport") in page.attributes and "prefers-color-scheme: dark" in text


def test_everything_is_in_it():
    text = " ".join("".join(Page(compare_report(results())).text).split())
    numbers = ("12,345", "1,234", "80.0 82.0", "6.7")
    for expected in ("my <data> & more", *numbers, "20 test images of 8 x 9 pixels, grey, 2 classes. Images were"):
        assert expected in text, expected
    assert "Not complete" not in text
    assert "3 of 4 runs are finished" in "".join(Page(compare_report(results(finished=3))).text)


def test_text_is_escaped():
    page = Page(compare_report(results(names=("<script>alert(1)</script>", 'Op(a="b")&'))))
    assert "script" not in page.tags
    assert any("<script>alert(1)</script>" in text for text in page.text)


@pytest.mark.parametrize("epochs, seeds, names", [(1, 1, ("C",)), (40, 2, [f"L{i}" for i in range(11)]), (2, 1, ())])
def test_other_sizes(epochs, seeds, names):
    Page(compare_report(results(names=names, epochs=epochs, seeds=seeds)))


def test_a_chart_is_drawn_to_scale():
    lines = [Line("one", [0.0, 50.0, 100.0], 0), Line("two", [100.0, None, math.nan], 9)]
    svg = ET.fromstring(line_chart("title", "percent", lines))
    assert svg.get("aria-label") == "title"
    one, two = svg.findall("g")
    points = [tuple(map(float, p.split(","))) for p in one.find("polyline").get("points").split()]
    (x0, y0), (x1, y1), (x2, y2) = points
    assert x0 < x1 < x2 and x1 - x0 == pytest.approx(x2 - x1)
    assert y0 - y1 == pytest.approx(y1 - y2) and y0 > y2  # larger values stand higher
    ticks = {t.text: float(t.get("y")) - 4 for t in svg.findall("text") if t.get("text-anchor") == "end"}
    assert ticks["0"] == pytest.approx(y0, abs=0.1) and ticks["100"] == pytest.approx(y2, abs=0.1)
    assert two.find("polyline") is None and len(two.findall("circle")) == 1  # gaps stay gaps
    assert two.find("title").text == "two"


def test_the_ninth_line_has_other_dashes():
    assert "dash" not in stroke(0) and "dash" in stroke(8) and "var(--c0)" in stroke(8)
    assert len({str(stroke(i)) for i in range(32)}) == 32


@pytest.mark.parametrize("low, high", [(0, 1), (0.031, 0.032), (97, 100), (5, 5), (0, 12345), (1e-7, 3)])
def test_ticks_enclose_the_values(low, high):
    ticks = _ticks(low, high)
    assert ticks[0] <= low and ticks[-1] >= high and 2 <= len(ticks) <= 8
    steps = [b - a for a, b in itertools.pairwise(ticks)]
    assert steps == pytest.approx([steps[0]] * len(steps))
