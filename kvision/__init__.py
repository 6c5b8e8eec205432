"""Computer vision on Keras 3: one model source, the same run on JAX, TensorFlow and PyTorch, portable weights."""

import importlib
from typing import TYPE_CHECKING

from kvision import keras_import

if TYPE_CHECKING:  # the names that `__getattr__` loads, for type checkers and editors
    from kvision import (
        applications,
        convert,
        data,
        engine,
        layers,
        models,
        parity,
        random,
        report,
        tasks,
        training,
        weights,
        zoo,
    )
    from kvision.convert import create_model, model_info, preprocess
    from kvision.training.keras_fit import fit
    from kvision.zoo import list_models

__version__ = "0.1.0"
__all__ = [
    "__version__",
    "applications",
    "convert",
    "create_model",
    "data",
    "engine",
    "fit",
    "layers",
    "list_models",
    "model_info",
    "models",
    "parity",
    "preprocess",
    "random",
    "report",
    "tasks",
    "training",
    "weights",
    "zoo",
]
# The module of each function; all other names are modules.
_FUNCTIONS = {
    "create_model": "kvision.convert",
    "fit": "kvision.training.keras_fit",
    "list_models": "kvision.zoo",
    "model_info": "kvision.convert",
    "preprocess": "kvision.convert",
}

keras_import.prepare()


def __dir__() -> list[str]:
    return sorted({*__all__, *(name for name in globals() if name.startswith("__"))})


if not TYPE_CHECKING:  # a type checker would accept any name with it

    def __getattr__(name: str):
        # Loaded on first use, so that `import kvision` stays light.
        if name in _FUNCTIONS:
            value = getattr(importlib.import_module(_FUNCTIONS[name]), name)
        elif name in __all__:
            value = importlib.import_module(f"kvision.{name}")
        else:
            raise AttributeError(f"module 'kvision' has no attribute {name!r}; it has {', '.join(__all__)}")
        globals()[name] = value
        return value
