"""Reports: plain results in, one self-contained HTML file out. No network, no script, all text escaped."""

from glocal.report.comparison import compare_report

__all__ = ["compare_report"]
