"""Hooks into the import of Keras, so that `import kvision` need not import it.

On that import two things are done. If the backend that Keras selects is not installed and `KERAS_BACKEND` does not name
it, an installed one is selected instead. And the library's layers, initializers and optimizers are registered with
Keras, so that a `.keras` file that uses them loads without further imports.
"""

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from functools import partial
from types import ModuleType

BACKENDS = ("jax", "tensorflow", "torch")

# The classes that a `.keras` file may contain, by module: those decorated by `register_keras_serializable("kvision")`.
SERIALIZABLE = {
    "kvision.layers.conv": ("ConstantPad2D",),
    "kvision.layers.initializers": ("Constant", "Dirac", "VarianceScaling"),
    "kvision.layers.noise": (
        "DropBlock",
        "Dropout",
        "GaussianNoise",
        "ShakeShake",
        "SpatialDropout",
        "StochasticDepth",
    ),
    "kvision.layers.norm": ("BatchStatistics", "LocalResponseNorm", "SynchronizedBatchNorm"),
    "kvision.layers.pooling": ("AdaptiveAveragePooling2D",),
    "kvision.layers.regularizers": ("MaxNorm", "Orthogonal", "Sum"),
    "kvision.models.cifar_resnet": ("PaddedShortcut",),
    "kvision.models.spatial_transformer": ("AffineIdentity", "SpatialTransformer"),
    "kvision.training.averaging": ("EMA", "SWA", "Lookahead"),
    "kvision.training.muon": ("Muon",),
    "kvision.training.optimizers": ("LearningRateMultipliers",),
    "kvision.training.schedules": ("WarmupSchedule",),
    "kvision.tasks.classification": ("CrossEntropy",),
}


class BackendError(ImportError):
    """No backend is installed, or not the one that `KERAS_BACKEND` names."""


def installed(backend: str) -> bool:
    """Return whether a backend is installed, without importing it. A folder of that name without a package does not
    count."""
    spec = importlib.util.find_spec(backend)
    return spec is not None and spec.origin is not None


def choose(default: str) -> str:
    """Return the backend to use if Keras selects `default` (from `KERAS_BACKEND`, `keras.json` or its own default).

    It is `default`, unless that is a missing one of `BACKENDS` and `KERAS_BACKEND` is unset; then it is the first
    installed one of `BACKENDS`.

    Raises:
        BackendError: none is installed, or not the one that `KERAS_BACKEND` names.
    """
    if default not in BACKENDS or installed(default):
        return default
    present = [backend for backend in BACKENDS if installed(backend)]
    if not present:
        raise BackendError(
            "no backend is installed: expected one of jax, tensorflow, torch; install one with "
            "pip install 'kvision-keras[torch]' (or [jax], [tensorflow])"
        )
    if os.environ.get("KERAS_BACKEND"):
        raise BackendError(
            f"KERAS_BACKEND is {default!r}, which is not installed: set it to {' or '.join(present)}, or install it "
            f"with pip install 'kvision-keras[{default}]'"
        )
    return present[0]


def announce(prog: str) -> None:
    """Print a line with the backend to stderr, if `KERAS_BACKEND` is unset and Keras is loaded."""
    if os.environ.get("KERAS_BACKEND") or "keras" not in sys.modules:
        return
    name = sys.modules["keras"].config.backend()
    others = [backend for backend in BACKENDS if backend != name and installed(backend)]
    hint = f"set it to {' or '.join(others)} to choose another" if others else "the only backend that is installed"
    print(f"{prog}: KERAS_BACKEND is not set; running on {name} ({hint})", file=sys.stderr)


def _set_backend(config: ModuleType) -> None:
    """Replace Keras's choice; Keras has no public function for that before the backend is imported."""
    config._BACKEND = choose(config._BACKEND)


def _placeholder(module: str, name: str) -> type:
    """Return a class that stands for another one in Keras's registry until its module is imported and replaces it."""

    def real():
        return getattr(importlib.import_module(module), name)

    def make(cls, *arguments, **options):
        return real()(*arguments, **options)

    def from_config(cls, config, **options):
        return real().from_config(config, **options)

    def get_config(self):  # required by Keras
        raise NotImplementedError

    body = {"__new__": make, "from_config": classmethod(from_config), "get_config": get_config, "__module__": module}
    return type(name, (), body)


def _register(keras: ModuleType) -> None:
    known = keras.saving.get_custom_objects()
    for module, names in SERIALIZABLE.items():
        for name in names:
            known.setdefault(f"kvision>{name}", _placeholder(module, name))


class _Watch:
    """A module finder that observes the import of Keras and finds nothing itself."""

    def __init__(self):
        self.chosen = False

    def find_spec(self, name, path, target=None):
        config = sys.modules.get("keras.src.backend.config")
        # The function `backend` is defined right after Keras has made its choice, and before it imports the backend.
        if not self.chosen and hasattr(config, "backend"):
            self.chosen = True  # set first, because `choose` looks up modules, too
            try:
                _set_backend(config)
            except BackendError:
                self.chosen = False
                raise
        if name != "keras":
            return None
        specs = (finder.find_spec(name, path, target) for finder in sys.meta_path if finder is not self)
        spec = next((spec for spec in specs if spec is not None), None)
        if spec is not None and hasattr(spec.loader, "exec_module"):
            spec.loader.exec_module = partial(self._run, spec.loader.exec_module)
        return spec

    def _run(self, run: Callable[[ModuleType], None], module: ModuleType) -> None:
        run(module)
        _register(module)
        if self in sys.meta_path:
            sys.meta_path.remove(self)


def prepare() -> None:
    """Install the hooks; if Keras is already imported, register the classes now."""
    if "keras" in sys.modules:
        _register(importlib.import_module("keras"))  # waits if another thread is importing it
    else:
        sys.meta_path.insert(0, _Watch())
