"""The page of connection pictures: every operator with its picture and what was measured of it, in one file."""

import re
import xml.etree.ElementTree as ET

from glocal import cli
from glocal.report.connections import Connections
from glocal.report.gallery import Entry, gallery


def test_the_page_holds_every_operator_and_needs_nothing_else(tmp_path, monkeypatch, capsys):
    few = ("AveragePooling", "Convolution", "SelfAttention")
    monkeypatch.setattr("glocal.spec.available", lambda: few)
    page = tmp_path / "new" / "page.html"
    assert cli.main(["list", "--html", str(page)]) == 0
    assert f"page: {page}" in capsys.readouterr().out
    text = page.read_text("utf-8")
    assert re.findall(r'<figure id="(\w+)">', text) == list(few)
    assert not re.search(r"<script|<link|src=|href=|url\(|@import", text)
    charts = [ET.fromstring(svg) for svg in re.findall(r"<svg.*?</svg>", text, re.DOTALL)]
    assert len(charts) == 3
    lines = [len(list(chart.iter("line"))) for chart in charts]
    # by hand: 8 tokens with 3 neighbours but for the ends; 16 channels each its own, or all with all
    assert lines == [22 + 16, 22 + 16 * 16, 64 + 16]
    assert "local (9 of 64 positions), channels dense, weights shared by all positions" in text


def test_text_is_escaped():
    panel = Connections("positions", [[1.0]])
    text = gallery([Entry("<b>", "a < b & c", "x", (panel,))])
    assert "<b>" not in text.replace("<b>Positions</b>", "").replace("<b>Channels</b>", "")
    assert "a &lt; b &amp; c" in text


def test_a_page_that_cannot_be_written_is_said_in_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("glocal.spec.available", lambda: ("AveragePooling",))
    (tmp_path / "file").write_text("")
    assert cli.main(["list", "--html", str(tmp_path / "file" / "page.html")]) == 2
    err = capsys.readouterr().err
    assert len(err.splitlines()) == 1 and "file" in err
