"""Comparison of converted networks with the original ones, where those are installed.

PyTorch, torchvision and `keras.applications` are optional, so they are imported by name.
"""

import importlib
import importlib.util

import numpy as np

from kvision.convert.keras_applications import CONSTRUCTORS, prepare, renumbered
from kvision.weights.archive import WeightsError


def compare_with_reference(model, source: str, arrays: dict[str, np.ndarray]) -> float | None:
    """Compare the logits of `model` with those of the original network with `arrays`, in its own framework.

    Returns:
        The largest difference over the largest logit, on two random images; None if the framework is not installed
        or has no such network.
    """
    import keras

    images = np.random.default_rng(0).standard_normal((2, *model.input_shape[1:]), np.float32)
    expected = {"torchvision": _torchvision, "keras": _keras}.get(source, lambda *_: None)(model, arrays, images)
    if expected is None:
        return None
    logits = model(images, training=False)
    logits = keras.ops.convert_to_numpy(logits[0] if isinstance(logits, list) else logits)
    return float(abs(logits - expected).max() / abs(expected).max())


def _torchvision(model, arrays, images) -> np.ndarray | None:
    if not all(importlib.util.find_spec(name) for name in ("torch", "torchvision")):
        return None
    try:
        torch, networks = (importlib.import_module(name) for name in ("torch", "torchvision.models"))
    except (ImportError, RuntimeError):  # a torchvision built for another PyTorch
        return None
    if not hasattr(networks, model.name) or all(layer.name != "logits" for layer in model.layers):
        return None
    from kvision.convert import torchvision

    arrays = torchvision.prepare(model.name, arrays)
    heads = (
        {"aux_logits": any(key.lower().startswith("aux") for key in arrays)}
        if "aux" in str(torchvision.find_rules(model.name))
        else {}
    )
    if heads:
        heads |= {"init_weights": False, "transform_input": False}
    reference = getattr(networks, model.name)(weights=None, num_classes=model.outputs[0].shape[-1], **heads).eval()
    tensors = {key: torch.from_numpy(np.array(array)) for key, array in arrays.items()}
    try:
        reference.load_state_dict(tensors, strict=True)
    except RuntimeError as error:
        raise WeightsError(f"the arrays do not fit torchvision's {model.name}: {error}") from None
    with torch.inference_mode():
        return reference(torch.from_numpy(images).permute(0, 3, 1, 2).contiguous()).numpy()


def _keras(model, arrays, images) -> np.ndarray | None:
    import keras

    if any(layer.name == "logits" for layer in model.layers):
        options = {"classes": model.outputs[0].shape[-1], "classifier_activation": None}
    else:
        options = {"include_top": False, "pooling": "avg"}
    make = getattr(keras.applications, CONSTRUCTORS[model.name])
    try:
        reference = make(weights=None, input_shape=model.input_shape[1:], **options)
    except ValueError:  # a size that Keras's network does not support
        return None
    names = renumbered(layer.name for layer in reference.layers) if model.name == "inception_v3_keras" else {}
    if names:
        arrays = prepare(model.name, arrays)
    for variable in reference.weights:
        layer, leaf = variable.path.rsplit("/", 1)
        layer = layer.rsplit("/", 1)[-1]
        key = f"{names.get(layer, layer)}/{leaf}"
        if key not in arrays:
            raise WeightsError(f"Keras's {CONSTRUCTORS[model.name]} has a variable {key}, which the file lacks")
        variable.assign(arrays[key])
    return keras.ops.convert_to_numpy(reference(images, training=False))
