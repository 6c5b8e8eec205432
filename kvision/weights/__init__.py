"""Weights as plain `.npz` files that any framework can read; docs/npz.md describes the format."""

from kvision.weights.archive import WeightsError
from kvision.weights.input_channels import adapt_kernel
from kvision.weights.npz import FORMAT_VERSION, inspect, load, named_variables, probe_images, save
from kvision.weights.table import table, write_table

__all__ = [
    "FORMAT_VERSION",
    "WeightsError",
    "adapt_kernel",
    "inspect",
    "load",
    "named_variables",
    "probe_images",
    "save",
    "table",
    "write_table",
]
