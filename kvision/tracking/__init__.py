"""Where a run's figures go: a page to read, a bar to watch, and the machine they were measured on.

NumPy and Pillow are all this needs. It knows no model and no backend: what it shows arrives as plain
dictionaries, so that a page can be written again from the files of a finished run.
"""

from kvision.tracking.charts import bar_chart, line_chart, matrix_chart
from kvision.tracking.compare_report import comparison_table, write_compare_report
from kvision.tracking.environment import hardware, peak_memory_bytes, seconds_since_process_start, versions
from kvision.tracking.progress import Progress
from kvision.tracking.report import Mistake, write_report

__all__ = [
    "Mistake",
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
