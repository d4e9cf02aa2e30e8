"""Reports: plain results in; one self-contained HTML file, a picture, or tables for other programs out."""

from glocal.report.comparison import accuracy_picture, compare_report
from glocal.report.export import results_csv, results_latex

__all__ = ["accuracy_picture", "compare_report", "results_csv", "results_latex"]
