"""Rules for timm's names of networks that equal torchvision's. https://github.com/huggingface/pytorch-image-models.

Its ResNets, DenseNets and Inception v3 have torchvision's names; VGG, MobileNetV2 and MnasNet have their own.
"""

import re

import numpy as np

from kvision.convert import torchvision
from kvision.convert.mapping import TensorMap, flattened_shape, tensor_maps, torch_map
from kvision.data.preprocessing import Preprocessing
from kvision.weights.archive import WeightsError

LEAVES = torchvision.LEAVES


def _blocks(groups: dict[int, tuple[tuple[int, int], ...]], first: int) -> tuple[tuple[str, str], ...]:
    """Return the rules of inverted residuals: for each of our stages, timm's groups as (index, blocks before it).

    Args:
        first: timm's group of the block without expansion, our stage 1.
    """
    rules = [("stem_conv", "conv_stem"), ("stem_bn", "bn1")]
    for ours, theirs in (("depthwise_conv", "conv_dw"), ("depthwise_bn", "bn1"), ("project_conv", "conv_pw")):
        rules.append((f"stage1_block1_{ours}", f"blocks.{first}.0.{theirs}"))
    rules.append(("stage1_block1_project_bn", f"blocks.{first}.0.bn2"))
    names = (
        ("expand_conv", "conv_pw"),
        ("expand_bn", "bn1"),
        ("depthwise_conv", "conv_dw"),
        ("depthwise_bn", "bn2"),
        ("project_conv", "conv_pwl"),
        ("project_bn", "bn3"),
    )
    for stage, parts in groups.items():
        for i, (group, before) in enumerate(parts):
            after = parts[i + 1][1] if i + 1 < len(parts) else 9
            blocks = f"[{before + 1}-{after}]"
            block = f"blocks.{group}.{{1-{before + 1}}}"
            rules += [(rf"stage{stage}_block({blocks})_{ours}", f"{block}.{theirs}") for ours, theirs in names]
    return (*rules, ("final_conv", "conv_head"), ("final_bn", "bn2"), ("logits", "classifier"))


FAMILIES: dict[str, tuple[tuple[str, str], ...]] = {
    "mobilenet_v2": _blocks({2: ((1, 0),), 3: ((2, 0),), 4: ((3, 0), (4, 4)), 5: ((5, 0), (6, 3))}, 0),
    r"mnasnet\d_\d+": _blocks({2: ((1, 0),), 3: ((2, 0),), 4: ((3, 0), (4, 3)), 5: ((5, 0), (6, 4))}, 0),
    r"(resnet(18|34|50|101|152)|densenet\d+|inception_v3)": (),
}


def find(model) -> dict[str, TensorMap]:
    """Map every variable of a network to its array in timm's `state_dict`.

    Raises:
        WeightsError: timm has no network equal to torchvision's.
    """
    if re.fullmatch(r"vgg\d+(_bn)?", model.name):
        rules = [rule for rule in torchvision.find_rules(model.name) if not re.match("head|logits", rule[0])]
        rules += [(r"head_(\d)_dense", "pre_logits.fc{1}"), (r"logits", "head.fc")]
        return tensor_maps(model, rules, LEAVES, _vgg_map, ".")
    for pattern, rules in FAMILIES.items():
        if re.fullmatch(pattern, model.name):
            return tensor_maps(model, rules or torchvision.find_rules(model.name), LEAVES, torch_map, ".")
    raise WeightsError(f"timm has no {model.name} with known names")


def _vgg_map(layer, variable: str, shape: tuple[int, ...], key: str) -> TensorMap:
    """Map a variable of timm's VGG, whose hidden layers are convolutions over the whole map."""
    if variable == "kernel" and key.startswith("pre_logits"):
        height, width, channels = flattened_shape(layer) or (1, 1, shape[0])
        return TensorMap(key, (shape[1], channels, height, width), (3, 2, 0, 1), (height, width, channels, shape[1]))
    return torch_map(layer, variable, shape, key)


prepare, counters = torchvision.prepare, torchvision.counters


def buffers(name: str, found: dict[str, TensorMap]) -> dict[str, np.ndarray]:
    """Return the buffers of a `state_dict`: batch norm's counters."""
    return counters(found)


def preprocessing(name: str) -> Preprocessing:
    """Return torchvision's preprocessing, if nothing else is stated; timm's weights differ from each other."""
    return torchvision.preprocessing(name)
