"""Reports of runs: HTML pages, progress bars, hardware and package versions.

This package requires only NumPy and Pillow. Its input is plain dictionaries, without models or backends, so that a page
can be written again from the files of a finished run.
"""

from kvision.report.compare_report import comparison_table, write_compare_report
from kvision.report.environment import hardware, peak_memory_bytes, seconds_since_process_start, versions
from kvision.report.progress import Progress
from kvision.report.run_report import MisclassifiedExample, write_report
from kvision.report.svg import bar_chart, line_chart, matrix_chart

__all__ = [
    "MisclassifiedExample",
    "Progress",
    "bar_chart",
    "comparison_table",
    "hardware",
    "line_chart",
    "matrix_chart",
    "peak_memory_bytes",
    "seconds_since_process_start",
    "versions",
    "write_compare_report",
    "write_report",
]
