"""Rules for TF-Slim's names, and its preprocessing. https://github.com/google-research/tf-slim, nets/*.py."""

import re

import numpy as np

from kvision.convert.mapping import TensorMap, flattened_shape, tensor_maps
from kvision.data.preprocessing import Preprocessing
from kvision.weights.archive import WeightsError

LEAVES = {
    "kernel": "weights",
    "bias": "biases",
    "gamma": "gamma",
    "beta": "beta",
    "moving_mean": "moving_mean",
    "moving_variance": "moving_variance",
}
# Training state in a checkpoint.
TRAINING = r"global_step|.*/(ExponentialMovingAverage|Momentum|RMSProp(_1)?|Adam(_1)?)|.*_power"


def _inception_v1() -> tuple[tuple[str, str], ...]:
    top, rules = "InceptionV1", []
    units = [("stage1", "Conv2d_1a_7x7"), ("stage2_1", "Conv2d_2b_1x1"), ("stage2_2", "Conv2d_2c_3x3")]
    branches = {
        "branch1_1": "Branch_0/Conv2d_0a_1x1",
        "branch2_1": "Branch_1/Conv2d_0a_1x1",
        "branch2_2": "Branch_1/Conv2d_0b_3x3",
        "branch3_1": "Branch_2/Conv2d_0a_1x1",
        "branch3_2": "Branch_2/Conv2d_0b_3x3",
        "branch4_1": "Branch_3/Conv2d_0b_1x1",
    }
    for stage, letters in ((3, "ab"), (4, "abcde"), (5, "ab")):
        for ours, theirs in zip(letters, "bcdef", strict=False):
            for branch, scope in branches.items():
                if (stage, theirs, branch) == (5, "b", "branch3_2"):
                    scope = "Branch_2/Conv2d_0a_3x3"  # TF-Slim's name
                units.append((f"stage{stage}_{ours}_{branch}", f"Mixed_{stage}{theirs}/{scope}"))
    for ours, theirs in units:
        rules += [(f"{ours}_conv", f"{top}/{theirs}"), (f"{ours}_bn", f"{top}/{theirs}/BatchNorm")]
    return (*rules, ("logits", "InceptionV1/Logits/Conv2d_0c_1x1"))


def _inception_v3() -> tuple[tuple[str, str], ...]:
    top, rules = "InceptionV3", []
    units = [("stage1_1", "Conv2d_1a_3x3"), ("stage1_2", "Conv2d_2a_3x3"), ("stage1_3", "Conv2d_2b_3x3")]
    units += [("stage2_1", "Conv2d_3b_1x1"), ("stage2_2", "Conv2d_4a_3x3")]
    units += [("aux1_1", "AuxLogits/Conv2d_1b_1x1"), ("aux1_2", "AuxLogits/Conv2d_2a_5x5")]
    figure5 = ("0a_1x1", "0a_1x1 0b_5x5", "0a_1x1 0b_3x3 0c_3x3", "0b_1x1")
    figure6 = ("0a_1x1", "0a_1x1 0b_1x7 0c_7x1", "0a_1x1 0b_7x1 0c_1x7 0d_7x1 0e_1x7", "0b_1x1")
    figure7 = ("0a_1x1", "0a_1x1 0b_1x3 0b_3x1", "0a_1x1 0b_3x3 0c_1x3 0d_3x1", "0b_1x1")
    modules = {
        "stage3_a": ("5b", figure5),
        "stage3_b": ("5c", ("0a_1x1", "0b_1x1 1_0c_5x5", *figure5[2:])),  # TF-Slim's names
        "stage3_c": ("5d", figure5),
        "stage4_a": ("6a", ("1a_1x1", "0a_1x1 0b_3x3 1a_1x1")),
        **{f"stage4_{letter}": (f"6{letter}", figure6) for letter in "bcde"},
        "stage5_a": ("7a", ("0a_1x1 1a_3x3", "0a_1x1 0b_1x7 0c_7x1 1a_3x3")),
        "stage5_b": ("7b", figure7),
        "stage5_c": ("7c", (figure7[0], figure7[1].replace("0b_3x1", "0c_3x1"), *figure7[2:])),
    }
    for ours, (theirs, branches) in modules.items():
        for i, steps in enumerate(branches):
            scopes = [f"{'Conv_' if step.startswith('1_0c') else 'Conv2d_'}{step}" for step in steps.split()]
            numbers = [str(j) for j in range(1, len(scopes) + 1)]
            if theirs in ("7b", "7c") and i in (1, 2):  # the last two are parallel
                numbers[-2:] = [f"{len(scopes) - 1}a", f"{len(scopes) - 1}b"]
            units += [
                (f"{ours}_branch{i + 1}_{number}", f"Mixed_{theirs}/Branch_{i}/{scope}")
                for number, scope in zip(numbers, scopes, strict=True)
            ]
    for ours, theirs in units:
        rules += [(f"{ours}_conv", f"{top}/{theirs}"), (f"{ours}_bn", f"{top}/{theirs}/BatchNorm")]
    rules += [("logits", f"{top}/Logits/Conv2d_1c_1x1"), ("aux1_logits", f"{top}/AuxLogits/Conv2d_2b_1x1")]
    return tuple(rules)


# For each family, a pattern of our networks' names and the rules from our layers to TF-Slim's scopes.
FAMILIES: dict[str, tuple[tuple[str, str], ...]] = {
    **{
        f"vgg{depth}": (
            (r"stage(\d)_(\d)_conv", f"vgg_{depth}/conv{{1}}/conv{{1}}_{{2}}"),
            (r"head_(\d)_dense", f"vgg_{depth}/fc{{1+5}}"),
            (r"logits", f"vgg_{depth}/fc8"),
        )
        for depth in (16, 19)
    },
    **{
        f"resnet{depth}_tf_slim": (
            (r"stem_conv", f"resnet_v1_{depth}/conv1"),
            (r"stem_bn", f"resnet_v1_{depth}/conv1/BatchNorm"),
            *(
                (
                    rf"stage(\d)_block(\d+)_{ours}_{kind}",
                    f"resnet_v1_{depth}/block{{1}}/unit_{{2}}/bottleneck_v1/{theirs}{scope}",
                )
                for kind, scope in (("conv", ""), ("bn", "/BatchNorm"))
                for ours, theirs in (("shortcut", "shortcut"), ("1", "conv1"), ("2", "conv2"), ("3", "conv3"))
            ),
            (r"logits", f"resnet_v1_{depth}/logits"),
        )
        for depth in (50, 101, 152)
    },
    "inception_v1_tf_slim": _inception_v1(),
    "inception_v3_keras": _inception_v3(),
}


def _tensor_map(layer, variable: str, shape: tuple[int, ...], key: str) -> TensorMap:
    """Map a variable to the layout of Keras, except for dense layers, which are convolutions over the whole map."""
    if variable == "kernel" and len(shape) == 2:
        maps = flattened_shape(layer) or (1, 1, shape[0])
        return TensorMap(key, (*maps, shape[1]), (0, 1, 2, 3), (*maps, shape[1]))
    return TensorMap(key, shape, tuple(range(len(shape))))


def find(model) -> dict[str, TensorMap]:
    """Map every variable of a network to its array in TF-Slim's checkpoint.

    Raises:
        WeightsError: TF-Slim has no such network.
    """
    for pattern, rules in FAMILIES.items():
        if re.fullmatch(pattern, model.name):
            for layer in model.layers:
                if layer.name == "aux1_2_conv":  # TF-Slim names it by its window, which is smaller for small images
                    window = "x".join(map(str, layer.kernel_size))
                    rules = [(ours, theirs.replace("Conv2d_2a_5x5", f"Conv2d_2a_{window}")) for ours, theirs in rules]
            return tensor_maps(model, rules, LEAVES, _tensor_map, "/")
    raise WeightsError(f"TF-Slim has no {model.name} with known names")


def prepare(name: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays of a checkpoint without training state."""
    return {key: array for key, array in arrays.items() if not re.fullmatch(TRAINING, key)}


def buffers(name: str, found: dict[str, TensorMap]) -> dict[str, np.ndarray]:
    """Return the buffers of a checkpoint: none."""
    return {}


def preprocessing(name: str) -> Preprocessing:
    """Return the preprocessing of TF-Slim's ImageNet weights.

    Raises:
        WeightsError: TF-Slim has no such network.
    """
    if name not in FAMILIES:
        raise WeightsError(f"TF-Slim has no known {name}")
    if name.startswith("inception"):
        size = (299, 299) if name == "inception_v3_keras" else (224, 224)
        return Preprocessing(mean=(1, 1, 1), std=(1, 1, 1), scale=1 / 127.5, size=size, crop=0.875)
    mean = (123.68, 116.78, 103.94)
    return Preprocessing(mean=mean, std=(1, 1, 1), scale=1.0, size=(224, 224), crop=0.875)
