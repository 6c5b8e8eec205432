"""Data sets as arrays: found, downloaded, verified or synthesized. Independent of models and backends."""

from kvision.data.cifar import CIFAR10_CLASSES, CIFAR100_CLASSES
from kvision.data.dataset import DataError, Dataset, DataUnavailable
from kvision.data.folder import read_image_folder
from kvision.data.mnist import FASHION_CLASSES
from kvision.data.npz import read_npz
from kvision.data.preprocessing import as_uint8
from kvision.data.registry import NAMES, keras_cache, load

__all__ = [
    "CIFAR10_CLASSES",
    "CIFAR100_CLASSES",
    "FASHION_CLASSES",
    "NAMES",
    "DataError",
    "DataUnavailable",
    "Dataset",
    "as_uint8",
    "keras_cache",
    "load",
    "read_image_folder",
    "read_npz",
]
