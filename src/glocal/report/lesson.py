"""The lesson: a page that shows a convolution and the attention heads that equal it, computed as the reader moves."""

from importlib.resources import files

from markupsafe import Markup

from glocal.report.lesson_words import CHOICES, WORDS
from glocal.report.page import render

# in the order in which they need each other
SCRIPTS = ("lesson_maths.js", "lesson_drawing.js", "lesson.js", "lesson_controls.js")


def lesson_page() -> str:
    """The page as one HTML file that needs nothing else, in English and Chinese; the reader chooses one.

    Source: Cordonnier et al., On the Relationship between Self-Attention and Convolutional Layers, ICLR 2020,
    arXiv 1911.03584, theorem 1 and equation 9.
    Differs from the paper: borders are places of an extended grid; even kernels, stride and dilation are shown, too.
    """
    folder = files("glocal.report")
    script = "\n".join(folder.joinpath(name).read_text("utf-8") for name in SCRIPTS)
    return render("lesson.html", words=WORDS, choices=CHOICES, script=Markup(script))
