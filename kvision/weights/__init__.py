"""Weights as plain `.npz` files that any framework reads: docs/npz.md describes the format in one page."""

from kvision.weights.adapt import adapt_kernel
from kvision.weights.archive import WeightsError
from kvision.weights.convert import Report, convert, export_arrays, import_arrays
from kvision.weights.folder import table, write_table
from kvision.weights.npz import FORMAT_VERSION, inspect, load, named_variables, probe_images, save
from kvision.weights.shipped import find, preprocess, published_preprocessing, shipped
from kvision.weights.verify import Difference, Verification, diff, verify

__all__ = [
    "FORMAT_VERSION",
    "Difference",
    "Report",
    "Verification",
    "WeightsError",
    "adapt_kernel",
    "convert",
    "diff",
    "export_arrays",
    "find",
    "import_arrays",
    "inspect",
    "load",
    "named_variables",
    "preprocess",
    "probe_images",
    "published_preprocessing",
    "save",
    "shipped",
    "table",
    "verify",
    "write_table",
]
