"""One HTML page about a run or about several side by side, made of what they left on disk: `write_report`."""

from opsd.report.page import MAX_SAMPLES, render, write_report
from opsd.report.plot import CHARTS, MAX_POINTS, thinned
from opsd.report.read import RunData, read_run

__all__ = ["CHARTS", "MAX_POINTS", "MAX_SAMPLES", "RunData", "read_run", "render", "thinned", "write_report"]
