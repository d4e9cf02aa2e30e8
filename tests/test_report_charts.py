"""The pictures of a report: marks stand where the labels of the axes say, looks differ, nothing leaves its frame."""

import itertools
import math
import re
import xml.etree.ElementTree as ET

import pytest

from glocal.report import accuracy_picture, compare_report
from glocal.report.accuracy import Panel, Row, is_sequence, panel_chart
from glocal.report.confusion import confusion_chart, most_confused
from glocal.report.curves import Line, Measured, interval_chart, line_chart
from glocal.report.drawing import (
    DARK,
    INKS,
    LIGHT,
    Series,
    compact,
    linear_axis,
    log_axis,
    marker,
    path,
    series_of,
    shorten,
    ticks,
)
from glocal.report.scatter import Point, front, scatter_chart
from glocal.report.study import amount, memory, number

from .report_study import LAYOUTS, everything, study

NUMBER = re.compile(r"[−-]?[\d.]+[kMGT]?")
UNITS = {"k": 1e3, "M": 1e6, "G": 1e9, "T": 1e12}


def value_of(label):
    label = label.replace("−", "-")
    return float(label[:-1]) * UNITS[label[-1]] if label[-1] in UNITS else float(label)


def reading(svg, axis, log=False):
    """From pixels to values, by the first and the last label of an axis as they stand in the picture."""
    labels = [t for t in svg.findall("text") if t.text and NUMBER.fullmatch(t.text) and t.get("transform") is None]
    if axis == "y":
        places = sorted((float(t.get("y")) - 4, value_of(t.text)) for t in labels if t.get("text-anchor") == "end")
    else:
        lowest = max(float(t.get("y")) for t in labels)
        places = sorted((float(t.get("x")), value_of(t.text)) for t in labels if float(t.get("y")) == lowest)
    scale, back = (math.log, math.exp) if log else (float, float)
    (p0, v0), (p1, v1) = places[0], places[-1]
    assert p0 != p1
    return lambda pixel: back(scale(v0) + (pixel - p0) / (p1 - p0) * (scale(v1) - scale(v0)))


def discs(group):
    return [(float(c.get("cx")), float(c.get("cy"))) for c in group.iter("circle")]


def test_lines_over_epochs():
    lines = [Line("one", [0.0, 50.0, 100.0], Series(0)), Line("two", [100.0, None, math.nan], Series(1, 1))]
    svg = ET.fromstring(line_chart("title", "percent", lines))
    assert svg.get("aria-label") == "title"
    x, y = reading(svg, "x"), reading(svg, "y")
    one, two = svg.findall("g")
    assert [(x(a), y(b)) for a, b in discs(one)] == [
        pytest.approx(pair, abs=0.1) for pair in ((1, 0), (2, 50), (3, 100))
    ]
    points = [tuple(map(float, p.split(","))) for p in one.find("polyline").get("points").split()]
    assert points == discs(one)
    assert two.find("polyline") is None and len(two.findall("rect")) == 1  # gaps stay gaps
    assert two.find("title").text == "two"
    assert not list(ET.fromstring(line_chart("t", "u", [Line("l", [0.5] * 99, Series(0))])).iter("circle"))


def test_intervals_over_a_size():
    sizes = {100: (50, 45, 55), 1000: (70, 60, 80), 10000: (90, None, None)}
    lines = [Measured("a", [(size, *values) for size, values in sizes.items()], Series(3))]
    svg = ET.fromstring(interval_chart("t", "images", "accuracy", lines, (0, 100)))
    x, y = reading(svg, "x", log=True), reading(svg, "y")
    group = svg.find("g")
    for place, (size, (mean, *_)) in zip(discs(group), sizes.items(), strict=True):
        assert x(place[0]) == pytest.approx(size, rel=0.01) and y(place[1]) == pytest.approx(mean, abs=0.3)
    bars = [(y(float(bar.get("y1"))), y(float(bar.get("y2")))) for bar in group.findall("line")]
    assert bars == [pytest.approx((45, 55), abs=0.3), pytest.approx((60, 80), abs=0.3)]


def panel_rows(svg):
    """Of every row: mean, (low, high) and seeds, read off the axis."""
    x = reading(svg, "x")
    for row in svg.findall("g"):
        [mean] = [r for r in row.findall("rect") if "mean" in r.get("class")]
        band = [r for r in row.findall("rect") if "band" in r.get("class")]
        ends = [(x(float(r.get("x"))), x(float(r.get("x")) + float(r.get("width")))) for r in band]
        yield x(float(mean.get("x")) + 1.5), ends[0] if ends else None, [x(a) for a, _ in discs(row)]


def test_the_main_picture_is_drawn_to_scale():
    rows = [Row("C-C", 50.0, 40.0, 60.0, [45.0, 55.0], Series(0)), Row("T-T", 97.0, 90.0, 104.0, [97.0], Series(7))]
    rows.append(Row("C-T", 70.0, None, None, [70.0], Series(4)))
    svg = ET.fromstring(panel_chart(Panel("t", "", rows, linear_axis("%", [40, 104], (0, 100)))))
    read = list(panel_rows(svg))
    for row, (mean, band, seeds) in zip(rows, read, strict=True):
        assert mean == pytest.approx(row.mean, abs=0.3)
        assert seeds == pytest.approx(row.seeds, abs=0.3)
        assert band is None if row.low is None else band == pytest.approx((row.low, min(row.high, 100)), abs=0.3)


def test_the_picture_of_a_study_shows_its_numbers():
    results = study()
    svg = ET.fromstring(accuracy_picture(results).replace(' xmlns="http://www.w3.org/2000/svg"', ""))
    shown = [row for panel in svg.findall("g") for row in panel_rows(panel)]
    for one, (mean, band, seeds) in zip(results["candidates"], shown, strict=True):
        accuracy = one["test_accuracy"]
        assert mean == pytest.approx(accuracy["mean"], abs=0.2)
        assert band == pytest.approx((accuracy["low"], min(100, accuracy["high"])), abs=0.2)
        assert seeds == pytest.approx(accuracy["per_seed"], abs=0.2)
    words = [t.text for t in svg.iter("text")]
    assert [f"{c['test_accuracy']['mean']:.1f}" for c in results["candidates"]] == [
        w for w in words if re.fullmatch(r"\d+\.\d", w)
    ]
    assert {"recall", "texture", "no winner can be named", "winner: C-C-C-C"} <= set(words)


def test_the_picture_stands_alone():
    text = accuracy_picture(everything())
    assert text.startswith('<svg xmlns="http://www.w3.org/2000/svg"') and "var(" not in text and "url(" not in text
    assert "%" in text and text.count("://") == 1
    svg = ET.fromstring(text)
    width, height = (float(svg.get(side)) for side in ("width", "height"))
    assert svg.get("viewBox") == f"0 0 {width:g} {height:g}"
    titles = [t.text for t in svg.iter("{http://www.w3.org/2000/svg}text")]
    assert len(re.findall(r'class="f\d mean"', text)) == 10  # five layouts on two data sets, nothing else
    assert "recall, all of the training images" in titles and not any(t.startswith("recall, 5 %") for t in titles)


def test_candidates_look_the_same_in_every_picture():
    text = compare_report(study())
    looks = {}
    for group, name in re.findall(rf"(<g><title>({'|'.join(LAYOUTS)})[,: ].*?</g>)", text):
        looks.setdefault(name, set()).update(re.findall(r'class="[sf](\d)', group))
    assert looks == {name: {str(i)} for name, i in zip(LAYOUTS, (0, 2, 4, 5, 7), strict=True)}


def test_looks_differ():
    for count in (1, 2, 3, 5, 8, 24, 32):
        series = [series_of(i, count) for i in range(count)]
        assert len(set(series)) == count
        assert len({(str(path([(0, 0)], s)), str(marker(0, 0, s, 3))) for s in series}) == count
        if count <= len(LIGHT):
            assert series == sorted(series, key=lambda s: s.colour)  # from cool to warm
    assert "dash" not in path([], Series(0)) and "dash" in path([], Series(0, 1))


@pytest.mark.parametrize("colours, ground", [(LIGHT, 0), (DARK, 1)], ids=["light", "dark"])
def test_colours_stand_out_from_the_ground(colours, ground):
    def luminance(colour):
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return sum(w * c for w, c in zip((0.2126, 0.7152, 0.0722), linear, strict=True))

    def contrast(a, b):
        high, low = sorted((luminance(a), luminance(b)), reverse=True)
        return (high + 0.05) / (low + 0.05)

    below = INKS["ground"][ground]
    assert min(contrast(colour, below) for colour in colours) >= 3  # WCAG 1.4.11, for graphics
    assert contrast(INKS["ink"][ground], below) >= 7 and contrast(INKS["faint"][ground], below) >= 4.5  # 1.4.3


def test_only_layouts_of_growing_attention_are_a_sequence():
    assert is_sequence(LAYOUTS) and is_sequence(("C-C", "C-T", "T-T"))
    for names in (LAYOUTS[::-1], LAYOUTS[:2], ("C-C", "T-C", "C-T"), ("C", "T", "Involution(kernel_size=7)")):
        assert not is_sequence(names), names


@pytest.mark.parametrize("more", [True, False])
def test_the_front_is_what_nothing_beats(more):
    values = [(1, 5), (2, 9), (3, 9), (3, 4), (4, 2), (0.5, 5), (2, 9)]
    points = [Point(str(i), x, y, Series(0)) for i, (x, y) in enumerate(values)]
    # by hand: with low x good (0.5, 5) and both (2, 9); with high x good (3, 9) and (4, 2)
    expected = {"2", "4"} if more else {"5", "1", "6"}
    found = front(points, more_is_better=more)
    assert {point.label for point in found} == expected
    assert [point.x for point in found] == sorted(point.x for point in found)


def test_a_scatter_chart():
    points = [Point("a", 10, 60, Series(0), [(9, 58)]), Point("b", 40, 90, Series(5))]
    axes = log_axis("x", [9, 40]), linear_axis("y", [58, 90])
    svg = ET.fromstring(scatter_chart("t", *axes, points, points[1:]))
    x, y = reading(svg, "x", log=True), reading(svg, "y")
    a, b = svg.findall("g")
    assert [(x(p), y(q)) for p, q in discs(a)] == [pytest.approx(v, rel=0.02) for v in ((9, 58), (10, 60))]
    [ring] = [c for c in svg.findall("circle") if c.get("class") == "front"]
    assert (float(ring.get("cx")), float(ring.get("cy"))) == discs(b)[0]


def test_a_confusion_chart():
    counts = [[8, 2, 0], [0, 0, 0], [5, 0, 5]]
    svg = ET.fromstring(confusion_chart("t", ["a", "b", "c"], counts, Series(6)))
    cells = {cell.find("title").text: cell for cell in svg.findall("rect")}
    assert set(cells) == {"a taken for a: 8 of 10", "a taken for b: 2 of 10", "c taken for a: 5 of 10",
                          "c taken for c: 5 of 10"}  # fmt: skip
    right, wrong, worse, half = cells.values()
    assert (right.get("class"), wrong.get("class")) == ("full", "f6")
    assert float(worse.get("opacity")) > float(wrong.get("opacity"))
    assert float(right.get("opacity")) > float(half.get("opacity"))
    assert right.get("y") == wrong.get("y") and right.get("x") == worse.get("x")  # rows are true classes
    assert float(right.get("y")) < float(worse.get("y")) and float(right.get("x")) < float(wrong.get("x"))
    assert {"80", "20", "50"} <= {t.text for t in svg.findall("text")}


def test_the_most_confused():
    counts = [[9, 1, 3], [3, 0, 2], [0, 7, 1]]
    assert most_confused(counts, 3) == [(2, 1, 7, 8), (0, 2, 3, 13), (1, 0, 3, 5)]
    assert len(most_confused(counts)) == 5 and most_confused([[5]]) == []


@pytest.mark.parametrize(
    "low, high", [(0, 1), (0.031, 0.032), (97, 100), (5, 5), (0, 0), (0, 12345), (1e-7, 3), (-7, 2)]
)
def test_ticks_enclose_the_values(low, high):
    found = ticks(low, high)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 8
    steps = [b - a for a, b in itertools.pairwise(found)]
    assert steps == pytest.approx([steps[0]] * len(steps))


@pytest.mark.parametrize("low, high", [(100, 100), (0, 0), (97.3, 100), (0, 3), (99.99, 100)])
def test_ticks_keep_to_the_limits(low, high):
    found = ticks(low, high, (0, 100))
    assert 0 <= found[0] <= low and high <= found[-1] <= 100


def test_numbers_as_text():
    assert [number(v, 1) for v in (None, math.nan, math.inf, -math.inf, -1.25, -0.01, 1234.5, 3e9)] == [
        "–", "NaN", "∞", "−∞", "−1.2", "0.0", "1,234.5", "3.00e+09",
    ]  # fmt: skip
    assert [number(v, 1, sign=True) for v in (1.0, -1.0, 0.0)] == ["+1.0", "−1.0", "0.0"]
    assert [amount(v) for v in (12_345_678, 100_000_000, 999_999, 950, None)] == [
        "12.3 M", "100 M", "1.00 M", "950", "–",
    ]  # fmt: skip
    assert [memory(v) for v in (180 * 2**20, 3 * 2**29, None)] == ["180 MiB", "1.50 GiB", "–"]
    assert [compact(v) for v in (0.25, 999.6, 4000, 1.5e9)] == ["0.25", "1k", "4k", "1.5G"]
    assert shorten("abcdefghij", 7) == "abc…hij" and shorten("abc", 3) == "abc"


# planted by scripts/mutate
FAULTS = {
    "report/drawing.py": (
        (
            "values of a logarithmic axis are placed linearly",
            "share = math.log(value / self.low) / math.log(self.high / self.low)",
            "share = (value - self.low) / (self.high - self.low)",
        ),
        (
            "an axis of accuracies goes on beyond 100 %",
            "low, high = max(low - room, limits[0]), min(high + room, limits[1])",
            "low, high = low - room, high + room",
        ),
    ),
    "report/accuracy.py": (
        (
            "the band of an interval begins at the mean",
            "start, end = x(row.low), x(row.high)",
            "start, end = x(row.mean), x(row.high)",
        ),
    ),
    "report/scatter.py": (
        (
            "the front prefers slow candidates",
            "sign = 1 if more_is_better else -1",
            "sign = -1 if more_is_better else 1",
        ),
    ),
    "report/confusion.py": (
        (
            "rows and columns of a confusion matrix are exchanged",
            "x, share = gutter + j * cell, count / total",
            "x, y, share = gutter + i * cell, 8 + j * cell, count / total",
        ),
    ),
    "report/study.py": (("ablations stand among the candidates", 'if candidate.get("without") is None:', "if True:"),),
}
