"""Rules for the names of `keras.applications`, and its preprocessing."""

import re
from collections.abc import Iterable

import numpy as np

from kvision.convert.mapping import TensorMap, same_layout_map, tensor_maps
from kvision.data.preprocessing import Preprocessing
from kvision.weights.archive import WeightsError

LEAVES = {name: name for name in ("kernel", "bias", "gamma", "beta", "moving_mean", "moving_variance")}

# For each family, a pattern of our networks' names and the rules from our layers to Keras's.
FAMILIES: dict[str, tuple[tuple[str, str], ...]] = {
    r"vgg(16|19)": (
        (r"stage(\d)_(\d)_conv", "block{1}_conv{2}"),
        (r"head_(\d)_dense", "fc{1}"),
        (r"logits", "predictions"),
    ),
    r"resnet(50|101|152)_keras": (
        (r"stem_(conv|bn)", "conv1_{1}"),
        (r"stage(\d)_block(\d+)_shortcut_(conv|bn)", "conv{1+1}_block{2}_0_{3}"),
        (r"stage(\d)_block(\d+)_(\d)_(conv|bn)", "conv{1+1}_block{2}_{3}_{4}"),
        (r"logits", "predictions"),
    ),
    r"densenet(121|169|201)_keras": (
        (r"stem_(conv|bn)", "conv1_{1}"),
        (r"stage(\d)_block(\d+)_(\d)_conv", "conv{1+1}_block{2}_{3}_conv"),
        (r"stage(\d)_block(\d+)_(\d)_bn", "conv{1+1}_block{2}_{3-1}_bn"),
        (r"stage(\d)_transition_(conv|bn)", "pool{1+1}_{2}"),
        (r"final_bn", "bn"),
        (r"logits", "predictions"),
    ),
    r"mobilenet_v2_keras": (
        (r"stem_conv", "Conv1"),
        (r"stem_bn", "bn_Conv1"),
        (r"stage1_block1_(depthwise|project)_conv", "expanded_conv_{1}"),
        (r"stage1_block1_(depthwise|project)_bn", "expanded_conv_{1}_BN"),
        *(
            (rf"stage{i}_block(\d+)_(expand|depthwise|project)_{ours}", f"block_{{1+{n}}}_{{2}}{theirs}")
            for i, n in ((2, 0), (3, 2), (4, 5), (5, 12))
            for ours, theirs in (("conv", ""), ("bn", "_BN"))
        ),
        (r"final_conv", "Conv_1"),
        (r"final_bn", "Conv_1_bn"),
        (r"logits", "predictions"),
    ),
}
# Keras's constructors.
CONSTRUCTORS = {
    "vgg16": "VGG16",
    "vgg19": "VGG19",
    "resnet50_keras": "ResNet50",
    "resnet101_keras": "ResNet101",
    "resnet152_keras": "ResNet152",
    "inception_v3_keras": "InceptionV3",
    "densenet121_keras": "DenseNet121",
    "densenet169_keras": "DenseNet169",
    "densenet201_keras": "DenseNet201",
    "mobilenet_v2_keras": "MobileNetV2",
}


def find(model) -> dict[str, TensorMap]:
    """Map every variable of a network to its array in Keras's file, by "layer/variable".

    Raises:
        WeightsError: `keras.applications` has no such network.
    """
    if model.name == "inception_v3_keras":
        return _in_order(tensor_maps(model, _inception_v3(model), LEAVES, same_layout_map, "/"))
    for pattern, rules in FAMILIES.items():
        if re.fullmatch(pattern, model.name):
            return tensor_maps(model, rules, LEAVES, same_layout_map, "/")
    raise WeightsError(f"keras.applications has no {model.name} with known names")


def _inception_v3(model) -> list[tuple[str, str]]:
    """Return the rules of Inception v3, whose layers Keras numbers in the order of our sorted names."""
    rules = [(r"logits", "predictions")]
    for suffix, theirs in (("_conv", "conv2d"), ("_bn", "batch_normalization")):
        ours = sorted(layer.name for layer in model.layers if layer.name.endswith(suffix))
        rules += [(name, numbered(theirs, i)) for i, name in enumerate(ours)]
    return rules


def _in_order(found: dict[str, TensorMap]) -> dict[str, TensorMap]:
    """Sort the tensor maps in the order of Keras's layers, which matters in a file read without `by_name`.

    In its last two modules Keras joins the split branches before it joins all, which puts their layers first.
    """
    split = ["branch2_2a", "branch2_2b", "branch3_3a", "branch3_3b"]
    tail = [f"{branch}_conv" for branch in (*split, "branch1_1")] + [f"{branch}_bn" for branch in split]
    tail += ["branch4_1_conv", "branch1_1_bn", "branch4_1_bn"]
    layers = list(dict.fromkeys(key.rpartition("/")[0] for key in found))
    for module in ("stage5_b", "stage5_c"):
        moved = [f"{module}_{name}" for name in tail]
        spots = sorted(layers.index(layer) for layer in moved)
        for spot, layer in zip(spots, moved, strict=True):
            layers[spot] = layer
    rank = {layer: i for i, layer in enumerate(layers)}
    return dict(sorted(found.items(), key=lambda item: rank[item[0].rpartition("/")[0]]))


def numbered(name: str, i: int) -> str:
    """Return Keras's name of the i-th layer of a kind in a new process: conv2d, conv2d_1, ..."""
    return f"{name}_{i}" if i else name


def renumbered(layers: Iterable[str]) -> dict[str, str]:
    """Map numbered layers to their names in a new process; in others, Keras continues the numbers."""
    found = {}
    for kind in ("conv2d", "batch_normalization"):
        matches = [match for layer in set(layers) if (match := re.fullmatch(rf"{kind}(?:_(\d+))?", layer))]
        for i, match in enumerate(sorted(matches, key=lambda match: int(match[1] or 0))):
            found[match[0]] = numbered(kind, i)
    return found


def prepare(name: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays of a file in the form of our network.

    The convolutions of Keras's ResNets have biases, although a batch norm follows each: they are subtracted from its
    mean. The layers of its Inception are numbered from whatever the process had built before: here from the first.
    """
    if name == "inception_v3_keras":
        names = renumbered(key.rpartition("/")[0] for key in arrays)
        split = {key: key.rpartition("/") for key in arrays}
        return {f"{names.get(layer, layer)}/{leaf}": arrays[key] for key, (layer, _, leaf) in split.items()}
    if not re.fullmatch(r"resnet\d+_keras", name):
        return arrays
    arrays = dict(arrays)
    for key in [key for key in arrays if key.endswith("_conv/bias")]:
        mean = key.replace("_conv/bias", "_bn/moving_mean")
        if mean not in arrays:
            raise WeightsError(f"{key} has no {mean} to be fused into")
        arrays[mean] = arrays[mean] - arrays.pop(key)
    return arrays


def buffers(name: str, found: dict[str, TensorMap]) -> dict[str, np.ndarray]:
    """Return the buffers of Keras's file: the biases of the ResNets' convolutions, all 0."""
    if not re.fullmatch(r"resnet\d+_keras", name):
        return {}
    kernels = [target for target in found.values() if target.key.endswith("_conv/kernel")]
    return {target.key.replace("/kernel", "/bias"): np.zeros(target.shape[-1:], np.float32) for target in kernels}


def preprocessing(name: str) -> Preprocessing:
    """Return the preprocessing of Keras's ImageNet weights; Keras itself leaves resizing to the user.

    Raises:
        WeightsError: `keras.applications` has no such network.
    """
    if name not in CONSTRUCTORS:
        raise WeightsError(f"keras.applications has no known {name}")
    if re.fullmatch(r"vgg.*|resnet.*", name):  # Caffe's: BGR minus ImageNet's mean
        mean = (103.939, 116.779, 123.68)
        return Preprocessing(mean=mean, std=(1, 1, 1), scale=1.0, channel_order="bgr", size=(224, 224), crop=0.875)
    if name.startswith("densenet"):
        mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
        return Preprocessing(mean=mean, std=std, size=(224, 224), crop=0.875)
    size = (299, 299) if name == "inception_v3_keras" else (224, 224)
    return Preprocessing(mean=(1, 1, 1), std=(1, 1, 1), scale=1 / 127.5, size=size, crop=0.875)
