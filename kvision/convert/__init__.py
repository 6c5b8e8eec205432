"""Pretrained weights by name, and conversion to and from other frameworks' formats; see docs/convert.md."""

from kvision.convert.convert import Report, convert, export_arrays, import_arrays
from kvision.convert.info import ModelInfo, markdown_table, model_info
from kvision.convert.pretrained import create_model, find, preprocess, pretrained_weights, published_preprocessing
from kvision.convert.verify import Difference, Verification, diff, verify

__all__ = [
    "Difference",
    "ModelInfo",
    "Report",
    "Verification",
    "convert",
    "create_model",
    "diff",
    "export_arrays",
    "find",
    "import_arrays",
    "markdown_table",
    "model_info",
    "preprocess",
    "pretrained_weights",
    "published_preprocessing",
    "verify",
]
