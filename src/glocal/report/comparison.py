"""The report of `glocal compare`."""

from importlib.resources import files
from typing import Any

import jinja2

from glocal.report.curves import Line, line_chart, stroke


def compare_report(results: dict[str, Any]) -> str:
    """The report as one HTML file, from what `results.json` holds."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    template = environment.from_string(files("glocal.report").joinpath("comparison.html").read_text("utf-8"))
    candidates = results["candidates"]
    charts = {
        quantity: line_chart(
            title,
            unit,
            [
                Line(f"{candidate['name']}, seed {curve['seed']}", curve[quantity], i)
                for i, candidate in enumerate(candidates)
                for curve in candidate["curves"]
            ],
        )
        for quantity, title, unit in (
            ("test_accuracy", "Test accuracy after every epoch", "test accuracy, %"),
            ("train_loss", "Training loss in every epoch", "training loss"),
        )
    }
    strokes = [stroke(i) for i in range(len(candidates))]
    best = max((c["test_accuracy"]["mean"] for c in candidates), default=None)
    return template.render(results=results, candidates=candidates, charts=charts, strokes=strokes, best=best)
