"""Computer vision on Keras 3: one model source, the same run on JAX, TensorFlow and PyTorch, weights that move."""

import importlib

__version__ = "0.1.0"
__all__ = ["create_model", "list_models"]


def __getattr__(name: str):
    # Loaded when asked for, so that `import kvision` stays light.
    if name in __all__:
        return getattr(importlib.import_module("kvision.zoo"), name)
    raise AttributeError(f"module 'kvision' has no attribute {name!r}")
