"""The picture of connections: a line where a weight is not zero, from its input to its output, coloured by weight."""

import re
import xml.etree.ElementTree as ET

import pytest

from glocal.report.connections import Connections, connections_chart

FAULTS = {
    "report/connections.py": (
        ("lines start beside their output", "(left, height(i, inputs), right", "(left, height(o, inputs), right"),
        ("negative weights are not drawn", "if abs(weight) > _EQUAL * largest:", "if weight > _EQUAL * largest:"),
        ("every line is opaque", "(1 - _FAINTEST) * abs(weight) / largest", "(1 - _FAINTEST)"),
        ("equal weights are told apart", "weight - different[-1] > _EQUAL * largest", "True"),
        ("panels lie on each other", "left = i * (_SPAN", "left = 0 * (_SPAN"),
    ),
}  # fmt: skip

CONVOLUTION = [[2, 3, 0, 0], [-1, 2, 3, 0], [0, -1, 2, 3], [0, 0, -1, 2]]


def drawn(*panels):
    return ET.fromstring(connections_chart("<what & how>", panels))


def lines_of(svg):
    """(output, input, weight) as the browser shows it -> the line."""
    found = {}
    for group in svg.iter("g"):
        said = re.fullmatch(r"output (\d+) from input (\d+): (\S+)", group.find("title").text)
        found[int(said[1]), int(said[2])] = (float(said[3]), group.find("line"))
    return found


def test_lines_lead_from_inputs_to_outputs_where_a_weight_is_not_zero():
    svg = drawn(Connections("positions", [[0, 0.5, 0], [1.0, -0.25, 0]]))
    found = lines_of(svg)
    assert {at: weight for at, (weight, _) in found.items()} == {(0, 1): 0.5, (1, 0): 1.0, (1, 1): -0.25}
    nodes = [(float(c.get("cx")), float(c.get("cy"))) for c in svg.iter("circle")]
    inputs, outputs = nodes[:3], nodes[3:]
    assert len(outputs) == 2 and inputs[0][0] < outputs[0][0]
    for (o, i), (_, line) in found.items():
        assert (float(line.get("x1")), float(line.get("y1"))) == inputs[i]
        assert (float(line.get("x2")), float(line.get("y2"))) == outputs[o]
    opacity = [float(found[at][1].get("stroke-opacity")) for at in ((1, 1), (0, 1), (1, 0))]
    assert opacity == sorted(opacity) and opacity[0] < opacity[1] < opacity[2] == 1


def test_one_weight_has_one_colour():
    found = lines_of(drawn(Connections("positions", CONVOLUTION)))
    colours = {}
    for weight, line in found.values():
        colours.setdefault(weight, set()).add(line.get("class"))
    assert len(found) == 10 and all(len(each) == 1 for each in colours.values())
    assert len(set.union(*colours.values())) == 3


def test_too_many_weights_have_one_colour():
    found = lines_of(drawn(Connections("positions", [[i + 10 * o + 1 for i in range(3)] for o in range(3)])))
    assert len(found) == 9 and len({line.get("class") for _, line in found.values()}) == 1


def test_panels_lie_beside_each_other_and_inside_the_frame():
    svg = drawn(Connections("positions", CONVOLUTION), Connections("channels", [[1, 0], [0, 1]]))
    _, _, width, height = map(float, svg.get("viewBox").split())
    xs = [float(c.get("cx")) for c in svg.iter("circle")]
    ys = [float(c.get("cy")) for c in svg.iter("circle")]
    assert max(xs[:8]) < min(xs[8:]) and min(xs) >= 4 and max(xs) <= width - 4
    assert min(ys) >= 4 and max(ys) <= height - 4
    assert svg.get("aria-label") == "<what & how>"
    assert [t.text for t in svg.iter("text") if t.get("class") == "strong"] == ["positions", "channels"]


def test_nothing_connected_is_drawn_without_lines():
    svg = drawn(Connections("channels", [[0, 0], [0, 0]]))
    assert not lines_of(svg) and len(list(svg.iter("circle"))) == 4


@pytest.mark.parametrize("weights", [[], [[]], [[1, 2], [1]], [[float("nan")]]])
def test_what_cannot_be_drawn_is_refused(weights):
    with pytest.raises(ValueError, match="weights: of 'positions', must be rows of one length"):
        Connections("positions", weights)
