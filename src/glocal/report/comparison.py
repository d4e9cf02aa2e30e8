"""The report of `glocal compare`, and its main picture on its own."""

from typing import Any

from glocal.report import answers, insights, variations
from glocal.report.accuracy import is_sequence, side_by_side
from glocal.report.drawing import LIGHT, light_inks, style
from glocal.report.page import render, unbroken
from glocal.report.study import Study


def compare_report(results: dict[str, Any]) -> str:
    """The report as one HTML file that needs nothing else, from what `results.json` holds.

    Sections for which the study has nothing are left out; an unfinished study is reported as far as it goes.
    """
    study = Study(results)
    made = [
        make(study)
        for make in (
            answers.verdicts,
            answers.picture,
            answers.tables,
            variations.data_size,
            insights.capacity,
            insights.pareto,
            variations.transfer,
            variations.ablated,
            insights.curves,
            insights.confusions,
            insights.hardest,
            variations.widths,
            insights.method,
        )
    ]
    return render(
        "comparison.html",
        data=[study.label(name) for name in study.datasets],
        runs=results.get("runs") or {"finished": 0, "planned": 0},
        sections=[section for section in made if section is not None],
        unbroken=unbroken,
    )


def accuracy_picture(results: dict[str, Any]) -> str:
    """The report's main picture, a panel for each data set, as the text of an SVG file that stands alone.

    It shows the largest share of the data and the reference width; colours are those of light ground.
    """
    study = Study(results)
    panels = answers.panels(study, study.main())
    key = "bar: mean · band: 95 % interval · dots: seeds"
    if panels and all(is_sequence([row.label for row in panel.rows]) for panel in panels):
        key += " · C: convolution · T: attention over the whole image"
    return side_by_side(
        panels,
        "Test accuracy, from local to global" if "C:" in key else "Test accuracy",
        key,
        style(light_inks(), LIGHT),
    )
