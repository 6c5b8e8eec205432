"""Computer vision on Keras 3: one model source, the same run on JAX, TensorFlow and PyTorch, weights that move."""

import importlib

__version__ = "0.1.0"
# Where each name of the library's door lives.
_ROOMS = {
    "create_model": "kvision.zoo",
    "list_models": "kvision.zoo",
    "model_info": "kvision.zoo",
    "preprocess": "kvision.weights",
}
__all__ = ["create_model", "list_models", "model_info", "preprocess"]


def __getattr__(name: str):
    # Loaded when asked for, so that `import kvision` stays light.
    if name in _ROOMS:
        return getattr(importlib.import_module(_ROOMS[name]), name)
    raise AttributeError(f"module 'kvision' has no attribute {name!r}")
