"""The report: one file that needs nothing else, with everything in it, and nothing of it taken for HTML."""

import copy
import math
import re
import xml.etree.ElementTree as ET
from html.parser import HTMLParser

import pytest

from glocal.report import accuracy_picture, compare_report, results_csv, results_latex

from .report_study import LAYOUTS, PICTURE, candidate, dataset, everything, spread, study, verdict

HOSTILE = """<script>alert("1")</script> & 'Op(a="b")' </title></style>--> {{ 7 * 7 }}"""
SECTIONS = ["answer", "accuracy", "numbers", "capacity", "cost", "learning", "confusions", "hardest", "method"]
MORE = {"data-size", "transfer", "ablations", "widths"}


class Page(HTMLParser):
    """Text, tags and attributes, and whether every tag is closed."""

    void = frozenset({"meta", "img", "br"})

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

    @property
    def sections(self):
        return [value for name, value in self.attributes if name == "id"]

    @property
    def words(self):
        return " ".join("".join(self.text).split())


def pictures(text):
    return [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]


def small(**changed):
    """One layout, one seed, and whatever is changed in it."""
    one = {**candidate("C", "recall", 50.0, seeds=1), **changed}
    return {**study(), "candidates": [one], "verdicts": [], "datasets": [dataset("recall")]}


@pytest.mark.parametrize("results", [study(), everything()], ids=["study", "everything"])
def test_it_needs_nothing_else(results):
    text = compare_report(results)
    page = Page(text)
    assert not {"script", "link", "iframe", "object", "base"} & set(page.tags)
    for name, value in page.attributes:
        assert not name.startswith("on"), name
        if name in ("href", "src"):
            assert value.startswith(("#", "data:image/png;base64,")), value
    assert "://" not in text and "@import" not in text and "url(" not in text
    assert ("name", "viewport") in page.attributes and "prefers-color-scheme: dark" in text
    assert all(picture.get("class") is not None for picture in pictures(text))
    targets = [value[1:] for name, value in page.attributes if name == "href"]
    assert targets == page.sections  # the contents lead somewhere


def test_sections_appear_where_there_is_something():
    assert Page(compare_report(study())).sections == SECTIONS
    page = Page(compare_report(everything()))
    assert set(page.sections) == {*SECTIONS, *MORE}
    assert page.words.count("How it was computed.") == page.words.count("What it does not say.") == len(page.sections)
    bare = small(curves=[], confusion=None, fit=None)
    bare["datasets"][0]["hardest"] = []
    assert Page(compare_report(bare)).sections == ["accuracy", "numbers", "method"]


def test_every_number_is_in_it():
    results = everything()
    words = Page(compare_report(results)).words.replace("−", "-").replace("+", "")
    for verdict_ in results["verdicts"]:
        assert verdict_["sentence"] in words
        for pair in verdict_["pairs"]:
            assert f"{pair['difference']:.2f} [{pair['low']:.2f}, {pair['high']:.2f}]0.0123< 0.00010.0246" in words
    for one in results["candidates"]:
        if one["without"] is not None:
            continue
        accuracy, other = one["test_accuracy"], one["difference_to_best"]
        values = [f"{accuracy['mean']:.1f} [{accuracy['low']:.1f}, {accuracy['high']:.1f}]"]
        values += [" ".join(f"{value:.1f}" for value in accuracy["per_seed"])]
        values += [f"{one['fit'][kind]['mean']:.3f}" for kind in ("train_loss", "gap")]
        if other is not None:
            values += ["{mean:.1f} [{low:.1f}, {high:.1f}]".format(**other)]
        if one["fraction"] == 1:
            values += [f"{one['params']:,}", f"{one['macs'] / 1e6:#.3g}".rstrip(".") + " M"]
            values += [f"{one[kind]:,.0f}" for kind in ("images_per_second", "images_per_second_forward")]
            values += [f"{one['seconds_per_epoch']:.1f}", f"{one['peak_memory'] >> 20} MiB"]
        for value in values:
            assert value in words, (one["name"], value)
    for expected in (
        "-20.25 [-24.50, -16.00]",  # an ablation
        "10 % right, loss 4.26",  # a hard image
        "4,000 training and 1,000 test images of 24 × 28 pixels, grey, 4 classes (class 0, class 1, class 2, class 3). "
        "Images were stretched.",
        "30 of 30 finished",
        "glocal 0.2.0, torch 2.11.0",
        "recall: C-T-T-T has the highest mean on 200 images and on 4,000.",
        "texture, width 0.5: C-C-C-C reaches 85.5 %.",
    ):
        assert expected in words, expected


def test_gains_of_transfer_are_differences_of_means():
    results = everything()
    means = {(c["name"], c["after"]): c["test_accuracy"]["mean"] for c in results["candidates"]
             if c["data"] == "texture" and c["width"] == 1}  # fmt: skip
    words = Page(compare_report(results)).words
    for name in LAYOUTS:
        old, new = means[name, None], means[name, "recall"]
        row = f"{name}{old:.1f}{new:.1f}{new - old:+.1f}".replace("-", "−")
        assert row in words.replace(" ", "").replace("-", "−"), row
    gains = {name: means[name, "recall"] - means[name, None] for name in LAYOUTS}
    assert f"{max(gains, key=gains.get)} gains most" in words


def test_an_unfinished_study_says_so():
    results = study()
    assert "Not complete" not in compare_report(results)
    results["runs"] = {"finished": 3, "planned": 30}
    results["candidates"] = [results["candidates"][0], candidate("T-T-T-T", "texture", 70, seeds=1)]
    results["verdicts"] = []
    page = Page(compare_report(results))
    assert "Not complete: 3 of 30 runs are finished." in page.words
    assert "answer" not in page.sections and "accuracy" in page.sections
    results["candidates"] = []
    assert "Not complete" in compare_report(results)


def test_text_is_escaped():
    results = everything()
    for one in results["candidates"]:
        one["name"] = one["name"].replace("C-C-C-C", HOSTILE)
        one["data"] = one["data"].replace("recall", HOSTILE)
    for one in results["datasets"]:
        one["name"] = one["name"].replace("recall", HOSTILE)
        one["classes"][0] = one["hardest"][0]["label"] = one["hardest"][0]["predicted"] = HOSTILE
        one["note"], one["recipe"] = HOSTILE, {HOSTILE: HOSTILE}
    for one in results["verdicts"]:
        one.update(data=one["data"].replace("recall", HOSTILE), sentence=HOSTILE, winner=HOSTILE, best=HOSTILE)
        one["pairs"][0]["name"] = HOSTILE
    for one in results["ablations"]:
        one.update(data=HOSTILE, name=HOSTILE, without=HOSTILE)
    results["device"] = HOSTILE
    text = compare_report(results)
    page = Page(text)
    assert "script" not in page.tags and "<script" not in text
    assert page.words.count(HOSTILE) > 10 and "49" not in re.findall(r"{{.{0,9}}}", text)
    assert pictures(text)
    ET.fromstring(accuracy_picture(results))


def test_a_picture_is_no_address():
    results = study()
    for source in ("https://example.org/x.png", PICTURE + '" onerror="alert(1)', "data:text/html,x", None):
        results["datasets"][0]["hardest"][0]["picture"] = source
        images = [value for name, value in Page(compare_report(results)).attributes if name == "src"]
        assert set(images) == {PICTURE} and len(images) == 7  # of eight examples


def test_the_winner_alone_is_bold():
    text = compare_report(study())
    strong = re.findall(r"<strong>(.*?)</strong>", text)
    best = study()["candidates"][5]["test_accuracy"]
    assert strong == [f"{best['mean']:.1f} [{best['low']:.1f}, {best['high']:.1f}]"]  # texture; recall has no winner
    assert len(re.findall(r'<text[^>]*class="strong"[^>]*>91.3</text>', text)) == 1
    assert not re.findall(r'<text[^>]*class="strong"[^>]*>99.7</text>', text)


def test_candidates_outside_the_budget_are_marked():
    results = study()
    results["candidates"][1]["resized"] = False
    page = Page(compare_report(results))
    assert page.words.count("C-C-C-T †") == 2  # both tables
    assert "† C-C-C-T: could not be resized to the budget." in page.words
    assert "†" not in Page(compare_report(study())).words


def test_learning_rates_appear_where_they_were_tuned():
    assert "learning rate" not in Page(compare_report(study())).words
    results = study()
    results["candidates"][0]["lr"] = 0.00033
    words = Page(compare_report(results)).words
    assert "learning rate" in words and "0.00033" in words


def extreme(value):
    """Every measured number of a study replaced."""
    results = everything()
    for one in results["candidates"]:
        for part in (one["test_accuracy"], one["train_loss"], *one["fit"].values()):
            part["per_seed"] = [value] * 3
            part.update({key: value for key in ("mean", "low", "high") if key in part})
        for key in ("macs", "images_per_second", "images_per_second_forward", "seconds_per_epoch"):
            one[key] = value
        for curve in one["curves"]:
            curve.update(train_loss=[value] * 5, test_accuracy=[value] * 5)
    for one in results["datasets"]:
        for example in one["hardest"]:
            example["loss"] = value
    return results


def many(classes=4, names=24):
    """Many candidates of long names."""
    spec = (
        "'path/to a/very_long_directory/my_operators_{}.py:MyOwnOperator(kernel_size=7, num_heads=8, bias=True)'-C-C-T"
    )
    results = study()
    results["candidates"] = [candidate(spec.format(i), "recall", 40 + 2 * i, i, classes=classes) for i in range(names)]
    results["datasets"] = [dataset("recall", classes)]
    results["verdicts"] = [verdict(results["candidates"])] if names > 1 else []
    return results


def uneven():
    """What an interrupted study may look like: seeds missing, keys of the first version only."""
    results = study()
    del results["datasets"], results["verdicts"], results["ablations"], results["budget"]
    results["candidates"] = [
        candidate("C-C", "recall", 50, seeds=1),
        {"name": "T-T", "data": "recall", "seeds": [], "test_accuracy": {"mean": None, "per_seed": []}, "curves": []},
        {"name": "C-T", "data": "recall", "seeds": [0], "test_accuracy": spread([80.0]), "train_loss": spread([0.5]),
         "params": 5, "images_per_second": 6.0, "seconds_per_epoch": 7.0, "curves": []},
    ]  # fmt: skip
    return results


@pytest.mark.parametrize(
    "results",
    [
        small(),
        uneven(),
        many(),
        many(classes=31, names=2),
        many(classes=1000, names=1),
        *(extreme(value) for value in (100.0, 0.0, math.inf, math.nan, None, 1e300)),
    ],
    ids=["one", "uneven", "24", "31 classes", "1000 classes", "100", "0", "inf", "nan", "none", "huge"],
)
def test_other_studies(results):
    before = copy.deepcopy(results)
    text = compare_report(results)
    page = Page(text)
    for name, value in page.attributes:
        if name in ("x", "y", "cx", "cy", "x1", "x2", "y1", "y2", "points", "width", "height"):
            assert not re.search("nan|inf", value), (name, value)
            assert value == "100%" or all(abs(float(v)) < 2000 for v in re.split("[ ,]", value) if v)
    ET.fromstring(accuracy_picture(results))
    assert results_csv(results) and results_latex(results)
    assert repr(results) == repr(before)  # NaN is not equal to itself


def test_many_classes_become_a_table():
    assert "The ten most frequent confusions" in Page(compare_report(many(classes=31, names=1))).words
    assert "The ten most frequent confusions" not in Page(compare_report(many(classes=30, names=1))).words


def test_an_empty_study_still_is_a_page():
    page = Page(compare_report({"runs": {"finished": 0, "planned": 6}, "candidates": []}))
    assert "Not complete" in page.words and page.sections == ["method"]
    ET.fromstring(accuracy_picture({"candidates": []}))


def test_a_folder_is_called_by_its_last_part():
    results = study()
    for one in (*results["datasets"], *results["candidates"], *results["verdicts"]):
        key = "data" if "data" in one else "name"
        one[key] = {"recall": "/data/of mine/flowers/", "texture": "../birds"}[one[key]]
    page = Page(compare_report(results))
    assert "what suits flowers and birds?" in page.words and "most often" in page.words
    assert page.words.count("/data/of mine/flowers/") == 1  # said once, where the data is described
    text = compare_report({**results, "datasets": [dataset("a/flowers"), dataset("b/flowers")]})
    assert "what suits a/flowers and b/flowers?" in text


# planted by scripts/mutate
FAULTS = {
    "report/drawing.py": (
        (
            "an infinite value is drawn",
            "value is not None and math.isfinite(value) and abs(value) < 1e15",
            "value is not None",
        ),
    ),
    "report/insights.py": (("a picture may be an address", 'r"data:image/png;base64,[A-Za-z0-9+/]+=*"', 'r".*"'),),
    "report/answers.py": (
        (
            "the highest mean is bold without a verdict",
            'winner = at(study.verdict(condition), "winner")\n    reached',
            'winner = at(study.verdict(condition), "best")\n    reached',
        ),
    ),
}
