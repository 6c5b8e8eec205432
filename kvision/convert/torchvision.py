"""Rules for torchvision's names, and its preprocessing. https://github.com/pytorch/vision, models/*.py."""

import re

import numpy as np

from kvision.convert.mapping import TensorMap, tensor_maps, torch_map
from kvision.data.preprocessing import Preprocessing
from kvision.weights.archive import WeightsError

LEAVES = {
    "kernel": "weight",
    "bias": "bias",
    "gamma": "weight",
    "beta": "bias",
    "moving_mean": "running_mean",
    "moving_variance": "running_var",
}
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet's pixels, from 0 to 1
HALF = (0.5, 0.5, 0.5)
LATER = ("mnasnet0_75", "mnasnet1_3")  # trained by torchvision's later recipe, which resizes images to 232 pixels


def _vgg(convolutions: tuple[int, ...], step: int) -> tuple[tuple[str, str], ...]:
    """Return the rules of a VGG by convolutions per stage, of `step` modules each; a pooling ends each stage."""
    rules, index = [], 0
    for i, count in enumerate(convolutions, start=1):
        for j in range(1, count + 1):
            rules += [(f"stage{i}_{j}_conv", f"features.{index}"), (f"stage{i}_{j}_bn", f"features.{index + 1}")]
            index += step
        index += 1
    return (*rules, ("head_1_dense", "classifier.0"), ("head_2_dense", "classifier.3"), ("logits", "classifier.6"))


# The modules of Inception v3: our name, torchvision's, and the names of their branches.
_FIVE = ("branch1x1", "branch5x5_{1}", "branch3x3dbl_{1}", "branch_pool")
_SEVEN = ("branch1x1", "branch7x7_{1}", "branch7x7dbl_{1}", "branch_pool")
_SPREAD = ("branch1x1", "branch3x3_{1}", "branch3x3dbl_{1}", "branch_pool")
INCEPTION_V3 = {
    **{f"stage3_{ours}": (f"Mixed_5{theirs}", _FIVE) for ours, theirs in zip("abc", "bcd", strict=True)},
    "stage4_a": ("Mixed_6a", ("branch3x3", "branch3x3dbl_{1}")),
    **{f"stage4_{letter}": (f"Mixed_6{letter}", _SEVEN) for letter in "bcde"},
    "stage5_a": ("Mixed_7a", ("branch3x3_{1}", "branch7x7x3_{1}")),
    **{f"stage5_{letter}": (f"Mixed_7{letter}", _SPREAD) for letter in "bc"},
}

# For each family, a pattern of our networks' names and the rules from our layers to torchvision's modules.
FAMILIES: dict[str, tuple[tuple[str, str], ...]] = {
    # Idelbayev's CIFAR ResNets, https://github.com/akamaster/pytorch_resnet_cifar10
    r"resnet(20|32|44|56|110)": (
        (r"stem_(conv|bn)", "{1}1"),
        (r"stage(\d)_block(\d+)_(\d)_(conv|bn)", "layer{1}.{2-1}.{4}{3}"),
        (r"logits", "linear"),
    ),
    r"alexnet": (
        (r"stage1_1_conv", "features.0"),
        (r"stage2_1_conv", "features.3"),
        (r"stage3_1_conv", "features.6"),
        (r"stage3_2_conv", "features.8"),
        (r"stage3_3_conv", "features.10"),
        (r"head_1_dense", "classifier.1"),
        (r"head_2_dense", "classifier.4"),
        (r"logits", "classifier.6"),
    ),
    **{
        f"vgg{depth}{suffix}": _vgg(convolutions, step)
        for depth, convolutions in (
            (11, (1, 1, 2, 2, 2)),
            (13, (2, 2, 2, 2, 2)),
            (16, (2, 2, 3, 3, 3)),
            (19, (2, 2, 4, 4, 4)),
        )
        for suffix, step in (("", 2), ("_bn", 3))
    },
    r"resnet(18|34|50|101|152)": (
        (r"stem_(conv|bn)", "{1}1"),
        (r"stage(\d)_block(\d+)_(\d)_(conv|bn)", "layer{1}.{2-1}.{4}{3}"),
        (r"stage(\d)_block(\d+)_shortcut_conv", "layer{1}.{2-1}.downsample.0"),
        (r"stage(\d)_block(\d+)_shortcut_bn", "layer{1}.{2-1}.downsample.1"),
        (r"logits", "fc"),
    ),
    **{
        name: (
            (r"stem_conv", "features.0"),
            *((rf"stage{i}_fire(\d)_squeeze_conv", f"features.{{1+{n}}}.squeeze") for i, n in enumerate(offsets, 1)),
            *(
                (rf"stage{i}_fire(\d)_expand(\d)_conv", f"features.{{1+{n}}}.expand{{2}}x{{2}}")
                for i, n in enumerate(offsets, 1)
            ),
            (r"logits", "classifier.1"),
        )
        for name, offsets in (("squeezenet1_0", (2, 6, 11)), ("squeezenet1_1", (2, 5, 8)))
    },
    r"googlenet": (
        (r"stage1_(conv|bn)", "conv1.{1}"),
        (r"stage2_(\d)_(conv|bn)", "conv{1+1}.{2}"),
        (r"stage(\d)_(\w)_branch1_1_(conv|bn)", "inception{1}{2}.branch1.{3}"),
        (r"stage(\d)_(\w)_branch4_1_(conv|bn)", "inception{1}{2}.branch4.1.{3}"),
        (r"stage(\d)_(\w)_branch(\d)_(\d)_(conv|bn)", "inception{1}{2}.branch{3}.{4-1}.{5}"),
        (r"aux(\d)_(conv|bn)", "aux{1}.conv.{2}"),
        (r"aux(\d)_dense", "aux{1}.fc1"),
        (r"aux(\d)_logits", "aux{1}.fc2"),
        (r"logits", "fc"),
    ),
    r"inception_v3": (
        *(
            (rf"{ours}_(conv|bn)", f"{theirs}.{{1}}")
            for ours, theirs in (
                ("stage1_1", "Conv2d_1a_3x3"),
                ("stage1_2", "Conv2d_2a_3x3"),
                ("stage1_3", "Conv2d_2b_3x3"),
                ("stage2_1", "Conv2d_3b_1x1"),
                ("stage2_2", "Conv2d_4a_3x3"),
                ("aux1_1", "AuxLogits.conv0"),
                ("aux1_2", "AuxLogits.conv1"),
            )
        ),
        *(
            (rf"{ours}_branch{i}_(\d[ab]?)_(conv|bn)", f"{theirs}.{branch}.{{2}}")
            for ours, (theirs, branches) in INCEPTION_V3.items()
            for i, branch in enumerate(branches, start=1)
        ),
        (r"aux1_logits", "AuxLogits.fc"),
        (r"logits", "fc"),
    ),
    r"densenet\d+": (
        (r"stem_conv", "features.conv0"),
        (r"stem_bn", "features.norm0"),
        (r"stage(\d)_block(\d+)_(\d)_conv", "features.denseblock{1}.denselayer{2}.conv{3}"),
        (r"stage(\d)_block(\d+)_(\d)_bn", "features.denseblock{1}.denselayer{2}.norm{3}"),
        (r"stage(\d)_transition_conv", "features.transition{1}.conv"),
        (r"stage(\d)_transition_bn", "features.transition{1}.norm"),
        (r"final_bn", "features.norm5"),
        (r"logits", "classifier"),
    ),
    r"mobilenet_v2": (
        (r"stem_conv", "features.0.0"),
        (r"stem_bn", "features.0.1"),
        (r"stage1_block1_depthwise_conv", "features.1.conv.0.0"),
        (r"stage1_block1_depthwise_bn", "features.1.conv.0.1"),
        (r"stage1_block1_project_conv", "features.1.conv.1"),
        (r"stage1_block1_project_bn", "features.1.conv.2"),
        *(
            (rf"stage{i}_block(\d+)_{layer}", f"features.{{1+{n}}}.conv.{place}")
            for i, n in ((2, 1), (3, 3), (4, 6), (5, 13))
            for layer, place in (
                ("expand_conv", "0.0"),
                ("expand_bn", "0.1"),
                ("depthwise_conv", "1.0"),
                ("depthwise_bn", "1.1"),
                ("project_conv", "2"),
                ("project_bn", "3"),
            )
        ),
        (r"final_conv", "features.18.0"),
        (r"final_bn", "features.18.1"),
        (r"logits", "classifier.1"),
    ),
    r"mnasnet\d_\d+": (
        (r"stem_conv", "layers.0"),
        (r"stem_bn", "layers.1"),
        (r"stage1_block1_depthwise_conv", "layers.3"),
        (r"stage1_block1_depthwise_bn", "layers.4"),
        (r"stage1_block1_project_conv", "layers.6"),
        (r"stage1_block1_project_bn", "layers.7"),
        *(
            (rf"stage{i}_block({blocks})_{layer}", f"layers.{stack}.{{1-{first}}}.layers.{place}")
            for i, blocks, stack, first in (
                (2, r"\d", 8, 1),
                (3, r"\d", 9, 1),
                (4, "[1-3]", 10, 1),
                (4, "[45]", 11, 4),
                (5, "[1-4]", 12, 1),
                (5, "5", 13, 5),
            )
            for layer, place in (
                ("expand_conv", 0),
                ("expand_bn", 1),
                ("depthwise_conv", 3),
                ("depthwise_bn", 4),
                ("project_conv", 6),
                ("project_bn", 7),
            )
        ),
        (r"final_conv", "layers.14"),
        (r"final_bn", "layers.15"),
        (r"logits", "classifier.1"),
    ),
}


def find_rules(name: str) -> tuple[tuple[str, str], ...]:
    """Return the rules of a network's family.

    Raises:
        WeightsError: torchvision has no such network.
    """
    for pattern, rules in FAMILIES.items():
        if re.fullmatch(pattern, name):
            return rules
    raise WeightsError(f"torchvision has no {name} with known names")


def find(model) -> dict[str, TensorMap]:
    """Map every variable of a network to its array in torchvision's `state_dict`."""
    return tensor_maps(model, find_rules(model.name), LEAVES, torch_map, ".")


def version(name: str) -> int | None:
    """Return the version that torchvision's module requires in the metadata of its `state_dict`; mostly None.

    MNASNet's first version had other filters at its start; a file without a version is rejected.
    """
    return 2 if name.startswith("mnasnet") else None


def counters(found: dict[str, TensorMap]) -> dict[str, np.ndarray]:
    """Return the batch norms' step counters of a `state_dict`, which start at 0."""
    means = (target.key for target in found.values() if target.key.endswith(".running_mean"))
    return {key.replace("running_mean", "num_batches_tracked"): np.array(0, np.int64) for key in means}


def preprocessing(name: str) -> Preprocessing:
    """Return the preprocessing of a network's published weights: channels standardized by mean and deviation.

    For ImageNet the shorter side is resized, to 256 pixels or as in the recipe, and the center is cropped; the CIFAR
    ResNets read whole images. The weights of GoogLeNet and Inception v3 came from TensorFlow: torchvision's
    `transform_input` undoes its standardization and maps pixels to -1 .. 1.

    Raises:
        WeightsError: torchvision has no such network.
    """
    find_rules(name)
    if re.fullmatch(r"resnet(20|32|44|56|110)", name):
        return Preprocessing(mean=MEAN, std=STD, size=(32, 32))
    mean, std = (HALF, HALF) if name in ("googlenet", "inception_v3") else (MEAN, STD)
    size, resized = (299, 342) if name == "inception_v3" else (224, 232 if name in LATER else 256)
    return Preprocessing(mean=mean, std=std, size=(size, size), crop=size / resized)


def prepare(name: str, arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Return the arrays of a `state_dict` without the prefix of `DataParallel`."""
    if arrays and all(key.startswith("module.") for key in arrays):
        return {key.removeprefix("module."): array for key, array in arrays.items()}
    return arrays


def buffers(name: str, found: dict[str, TensorMap]) -> dict[str, np.ndarray]:
    """Return the buffers of a `state_dict`: `counters`."""
    return counters(found)
