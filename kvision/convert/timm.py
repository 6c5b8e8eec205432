"""timm's names for the networks that it has as torchvision does. https://github.com/huggingface/pytorch-image-models.

Its ResNets, DenseNets and Inception v3 have torchvision's names; VGG, MobileNetV2 and MnasNet have their own.
"""

import re

import numpy as np

from kvision.convert import torchvision
from kvision.convert.mapping import TensorMap, flattened, tensor_maps, torch_map
from kvision.data.preprocessing import Preprocessing
from kvision.weights.archive import WeightsError

LEAVES = torchvision.LEAVES


def _blocks(groups: dict[int, tuple[tuple[int, int], ...]], first: int) -> tuple[tuple[str, str], ...]:
    """Inverted residuals: for each of our stages, timm's groups as (number of its own, blocks before it).

    Args:
        first: timm's group of the block without expansion, our stage 1.
    """
    rows = [("stem_conv", "conv_stem"), ("stem_bn", "bn1")]
    for ours, theirs in (("depthwise_conv", "conv_dw"), ("depthwise_bn", "bn1"), ("project_conv", "conv_pw")):
        rows.append((f"stage1_block1_{ours}", f"blocks.{first}.0.{theirs}"))
    rows.append(("stage1_block1_project_bn", f"blocks.{first}.0.bn2"))
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
            rows += [(rf"stage{stage}_block({blocks})_{a}", f"blocks.{group}.{{1-{before + 1}}}.{b}") for a, b in names]
    return (*rows, ("final_conv", "conv_head"), ("final_bn", "bn2"), ("logits", "classifier"))


FAMILIES: dict[str, tuple[tuple[str, str], ...]] = {
    "mobilenet_v2": _blocks({2: ((1, 0),), 3: ((2, 0),), 4: ((3, 0), (4, 4)), 5: ((5, 0), (6, 3))}, 0),
    r"mnasnet\d_\d+": _blocks({2: ((1, 0),), 3: ((2, 0),), 4: ((3, 0), (4, 3)), 5: ((5, 0), (6, 4))}, 0),
    r"(resnet(18|34|50|101|152)|densenet\d+|inception_v3)": (),
}


def find(model) -> dict[str, TensorMap]:
    """The place of every variable of a network in timm's `state_dict`.

    Raises:
        WeightsError: timm has no such network as torchvision has it.
    """
    if re.fullmatch(r"vgg\d+(_bn)?", model.name):
        rows = [row for row in torchvision.rows_of(model.name) if not re.match("head|logits", row[0])]
        rows += [(r"head_(\d)_dense", "pre_logits.fc{1}"), (r"logits", "head.fc")]
        return tensor_maps(model, rows, LEAVES, _vgg_map, ".")
    for pattern, rows in FAMILIES.items():
        if re.fullmatch(pattern, model.name):
            return tensor_maps(model, rows or torchvision.rows_of(model.name), LEAVES, torch_map, ".")
    raise WeightsError(f"timm has no {model.name} that kvision knows the names of")


def _vgg_map(layer, variable: str, shape: tuple[int, ...], key: str) -> TensorMap:
    """The hidden layers of timm's VGG are convolutions over the whole map."""
    place = torch_map(layer, variable, shape, key)
    if variable == "kernel" and key.startswith("pre_logits"):
        height, width, channels = flattened(layer) or (1, 1, shape[0])
        return TensorMap(key, (shape[1], channels, height, width), (3, 2, 0, 1), (height, width, channels, shape[1]))
    return place


prepare, counters = torchvision.prepare, torchvision.counters


def buffers(name: str, found: dict[str, TensorMap]) -> dict[str, np.ndarray]:
    """What a `state_dict` has besides the variables: batch norm's counters."""
    return counters(found)


def preprocessing(name: str) -> Preprocessing:
    """As torchvision's, where nothing else is stated: timm's weights differ among each other."""
    return torchvision.preprocessing(name)
