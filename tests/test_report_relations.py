"""The graph of relations as a picture and as a page, against hand-made boxes and arrows."""

import re
import xml.etree.ElementTree as ET

import pytest

from glocal.report.matrices import Matrix, matrices_chart
from glocal.report.relations import KINDS, Arrow, Box, Pictures, Stray, relations_chart, relations_page, relations_svg
from glocal.report.relations_words import LANGUAGES

FAULTS = {
    "report/relations.py": (
        ("a box without operators looks like the others", '"node" if box.operators else "node empty"', '"node"'),
        ("arrows point beside their box", "_head(x2, end.top, (0, 1)", "_head(x1, end.top - 9, (0, 1)"),
        ("what disagrees is ticked", "'✓ ' if not arrow.against else ''", "'✓ '"),
        ("all pairs are counted as kept", "return self.pairs - len(self.against)", "return self.pairs"),
        ("arrows have one colour", "format(KINDS[kind], path", 'format("s0", path'),
        ("names of operators are left out", "names = box.operators or", "names = [] or"),
    ),
    "report/matrices.py": (
        ("rows and columns are swapped", "left + _SIDE * i, _TOP + _SIDE * o", "left + _SIDE * o, _TOP + _SIDE * i"),
        ("the panels have two scales", "for panel in panels for row", "for panel in panels[1:] for row"),
        ("negative weights are not drawn", "if abs(weight) > _ZERO", "if weight > _ZERO"),
    ),
}  # fmt: skip

NAMES = (
    *("MLP", "Conv.", "Sep. MLP", "LR MLP", "Pyramid / MS Conv.", "Bottleneck", "DW-S Conv.", "ViT"),
    *("Dynamic DW-S Conv.", "Dynamic Local-S MLP", "Local ViT", "PVT"),
)
HAS = {"Conv.": ("First<b>",), "DW-S Conv.": ("Second", "Third"), "Local ViT": ("Fourth",), "PVT": ("Fifth",)}
BOXES = [Box(name, (), {"positions": ("local",), "frozen": (True,)}, HAS.get(name, ())) for name in NAMES]
ARROWS = [
    Arrow("MLP", "LR MLP", "Dim. LR", "low rank", "lower rank over positions", 0, (), {}),
    Arrow("Conv.", "Bottleneck", "Channel LR", "low rank", "lower rank over channels", 0, (), {}),
    Arrow("Conv.", "DW-S Conv.", "Dim. Sep.", "sparse", "separable", 2, (("First<b>", "Third"),), {"made_by": 2}),
    Arrow("ViT", "Local ViT", "Locality Sep.", "sparse", "local", 1, (), {}),
    Arrow("Local ViT", "Dynamic Local-S MLP", "Inhomogeneous Vec. Atten.", "sharing", "only other sharing", 0, (), {}),
]
SQUARE = [[1.0, 0.0], [0.5, -0.25]]
PICTURES = Pictures([("A", SQUARE)], [("B", SQUARE)], [("C", SQUARE)] * 3, [("D", SQUARE, SQUARE)] * 4)


def groups(svg):
    return {group.find("title").text: group for group in svg.iter("g")}


def numbers(text):
    return [float(n) for n in re.findall(r"-?\d+\.?\d*", text)]


@pytest.mark.parametrize("narrow", [False, True])
def test_boxes_do_not_overlap_and_arrows_lead_from_box_to_box(narrow):
    svg = ET.fromstring(relations_chart(BOXES, ARROWS, narrow=narrow))
    width, height = numbers(svg.get("viewBox"))[2:]
    found = {title.split(":")[0]: group for title, group in groups(svg).items()}
    box = {}
    for name in NAMES:
        x, y, w, h = (float(found[name].find("rect").get(key)) for key in ("x", "y", "width", "height"))
        assert x >= 0 and x + w <= width and y >= 0 and y + h <= height
        box[name] = (x, y, x + w, y + h)
        for text in found[name].iter("text"):  # inside, by a letter's usual width
            size = (6.2 if "small" in text.get("class", "") else 7.8) * len(text.text)
            assert size <= w and y < float(text.get("y")) < y + h
    for one in NAMES:
        for other in NAMES:
            a, b = box[one], box[other]
            assert one == other or a[2] < b[0] or b[2] < a[0] or a[3] < b[1] or b[3] < a[1]
    for arrow in ARROWS:
        group = found[f"{arrow.start} to {arrow.end}"]
        line = group.find("path")
        assert line.get("class") == KINDS[arrow.kind]
        assert bool(line.get("stroke-dasharray")) == (arrow.kind in ("low rank", "sharing"))
        point = numbers(group.find("polygon").get("points"))[:2]
        for (x, y), name in ((point, arrow.end), (numbers(line.get("d"))[:2], arrow.start)):
            left, top, right, bottom = box[name]
            assert left - 0.1 <= x <= right + 0.1 and top - 0.1 <= y <= bottom + 0.1


def test_what_was_measured_is_written():
    svg = ET.fromstring(relations_chart(BOXES, ARROWS))
    said = {title: [text.text for text in group.iter("text")] for title, group in groups(svg).items()}
    assert said["DW-S Conv.: Second, Third"] == ["DW-S Conv.", "Second", "Third"]
    assert said["Conv. to DW-S Conv.: Dim. Sep."] == ["Dim. Sep.", "1 of 2"]
    assert said["ViT to Local ViT: Locality Sep."] == ["Locality Sep.", "✓ 1 of 1"]
    assert said["Conv. to Bottleneck: Channel LR"] == ["Channel LR"]
    looks = {title.split(":")[0]: group.find("rect").get("class") for title, group in groups(svg).items()}
    assert (looks["PVT"], looks["ViT"]) == ("node", "node empty")


def test_the_picture_on_its_own_needs_nothing_else():
    text = relations_svg(BOXES, ARROWS)
    root = ET.fromstring(text)
    assert root.tag == "{http://www.w3.org/2000/svg}svg"
    assert not re.search(r"var\(|url\(|href|@import|<script", text)


def test_the_page_says_everything_in_both_languages_and_needs_nothing_else():
    stray = Stray("Sixth", [("Conv.", {"positions": "global", "frozen": False})])
    text = relations_page(BOXES, ARROWS, [stray], PICTURES)
    assert not re.search(r"<script|<link|src=|href=|url\(|@import", text)
    assert "First<b>" not in text and "First&lt;b&gt;" in text
    parts = {words.language: "" for words in LANGUAGES}
    for language, part in re.findall(
        r'<div lang="(\w+)">(.*?)(?=<div lang=|<div class="graph">|</main>)', text, re.DOTALL
    ):
        parts[language] += part
    for words in LANGUAGES:
        part = parts[words.language]
        assert all(name in part for name in NAMES)
        assert words.claim("separable") in part and words["pairs"].format(1, 2) in part
        assert words.found(stray.nearest[0][1]) in part and "Sixth" in part
        assert words.besides({"made_by": 2}, 2) in part and words["unmeasured"] in part
        # 1 + 1 of lines, 3 + 4 of squares, a key of four
        assert part.count("<svg") == 13
    assert not re.search(r"[一-鿿]", parts["en"])
    assert len(re.findall(r"[一-鿿]", parts["zh"])) > 700
    assert text.count('type="radio"') == 2 and text.count(" checked") == 1
    for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL):
        ET.fromstring(svg)


def test_every_word_is_there_in_both_languages():
    from glocal.analysis.relations import COMPARED, EDGES, NODES

    for words in LANGUAGES:
        for node in NODES:
            assert words.demands(node.where)
        for edge in EDGES:
            assert words.claim(edge.change) and words[edge.kind] and edge.kind in KINDS
        assert words.subjects(COMPARED)


def test_squares_stand_in_rows_of_outputs_on_one_scale():
    half = [[0.5, 0.0], [0.0, 0.0]]
    svg = ET.fromstring(matrices_chart("<both>", [Matrix("one", SQUARE), Matrix("two", half)], sides=("i", "o")))
    full = {}
    for group in svg.iter("g"):
        o, i, weight = re.fullmatch(r"output (\d) from input (\d): (\S+)", group.find("title").text).groups()
        rect = group.find("rect")
        full.setdefault((int(o), int(i), float(weight)), []).append(
            (float(rect.get("x")), float(rect.get("y")), float(rect.get("opacity")))
        )
    (a,), (c,), (d,) = full[0, 0, 1.0], full[1, 0, 0.5], full[1, 1, -0.25]
    assert a[0] == c[0] < d[0] and a[1] < c[1] == d[1] and a[2] == 1.0 > c[2] > d[2]
    ((x, y, opacity),) = full[0, 0, 0.5]
    assert x > d[0] and y == a[1] and opacity == c[2]
    assert len(list(svg.iter("rect"))) == 8 + 4


@pytest.mark.parametrize("weights", [[], [[]], [[1.0], [1.0, 2.0]], [[float("nan")]]])
def test_what_is_no_matrix_is_refused(weights):
    with pytest.raises(ValueError, match="weights: of 'x', must be rows of one length of finite numbers"):
        Matrix("x", weights)
