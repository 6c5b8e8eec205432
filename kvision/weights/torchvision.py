"""torchvision's names for our networks, and its preprocessing. https://github.com/pytorch/vision, models/*.py."""

import re

import numpy as np

from kvision.data.preprocessing import Preprocessing
from kvision.weights.archive import WeightsError
from kvision.weights.places import Place, places, torch_place

LEAVES = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, from 0 to 1

# For each family, a pattern of our networks' names and the rows from our layers to torchvision's modules.
FAMILIES: dict[str, tuple[tuple[str, str], ...]] = {
    # Idelbayev's CIFAR ResNets, https://github.com/akamaster/pytorch_resnet_cifar10
    r"resnet(20|32|44|56|110)": (
        (r"stem_(conv|bn)", "{1}1"),
        (r"stage(\d)_block(\d+)_(\d)_(conv|bn)", "layer{1}.{2-1}.{4}{3}"),
        (r"logits", "linear"),
    ),
}


def rows_of(name: str) -> tuple[tuple[str, str], ...]:
    """The table of the family that a network belongs to.

    Raises:
        WeightsError: torchvision has no such network.
    """
    for pattern, rows in FAMILIES.items():
        if re.fullmatch(pattern, name):
            return rows
    raise WeightsError(f"torchvision has no {name} that kvision knows the names of")


def find(model) -> dict[str, Place]:
    """The place of every variable of a network in torchvision's `state_dict`."""
    return places(model, rows_of(model.name), LEAVES, torch_place, ".")


def counters(found: dict[str, Place]) -> dict[str, np.ndarray]:
    """What the `state_dict` has besides: the steps that each batch norm has counted, which start from 0."""
    means = (place.key for place in found.values() if place.key.endswith(".running_mean"))
    return {key.replace("running_mean", "num_batches_tracked"): np.array(0, np.int64) for key in means}


def preprocessing(name: str) -> Preprocessing:
    """How images were prepared for the published weights of a network: whitened by channel.

    For ImageNet they are resized and the centre 7/8 is cut out; the CIFAR ResNets read whole images.

    Raises:
        WeightsError: torchvision has no such network.
    """
    rows_of(name)
    if re.fullmatch(r"resnet(20|32|44|56|110)", name):
        return Preprocessing(mean=MEAN, std=STD, size=(32, 32))
    return Preprocessing(mean=MEAN, std=STD, size=(224, 224), crop=0.875)
