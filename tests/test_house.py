"""The rooms of the house, held over the syntax tree: who may know whom, who may name a backend, who sets nothing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.backend_free

ROOT = Path(__file__).parent.parent
FILES = sorted([*ROOT.glob("kvision/**/*.py"), *ROOT.glob("apps/**/*.py")])
BACKENDS = {"jax", "tensorflow", "torch"}

# From the cellar to the roof. A room reads rooms of lower storeys and itself; `kvision` is the package's own __init__.
LAYERS = (
    {"keras_import"},
    {"kvision", "random", "files", "untrusted", "flags"},
    {"safe_pickle", "report", "children"},
    {"data"},
    {"layers"},
    {"models"},
    {"engine"},
    {"zoo", "weights", "tasks"},
    {"convert", "training"},
    {"applications", "memory"},
    {"config"},
    {"run_data", "run_folder"},
    {"experiment", "compare", "parity"},
    {"__main__"},
    {"apps"},
)
LAYER = {room: storey for storey, rooms in enumerate(LAYERS) for room in rooms}
# Each file of these rooms stands for itself.
ISOLATED = {"models", "apps"}
WITH_KERAS = {"kvision.data.device", "kvision.data.mixing"}  # they are about tensors
WITHOUT_KERAS = {"data", "report", "random", "flags", "keras_import", "files", "untrusted", "safe_pickle"}


def room_of(module: str) -> str:
    """The room of a module's dotted name: `kvision.data.cifar` is in `data`, `apps.mnist` in `apps`."""
    parts = module.split(".")
    return "apps" if parts[0] == "apps" else parts[1] if len(parts) > 1 else "kvision"


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(tree: ast.AST):
    """(dotted name, whether inside a function) of every import but those for type checkers alone; `from a import b` is
    both `a.b` and, in doubt, `a`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            node.body = []
    inside = {
        child
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.walk(node)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((alias.name, node in inside) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((f"{'.' * node.level}{node.module or ''}.{alias.name}", node in inside) for alias in node.names)


def bad_imports(source: str, module: str) -> list[str]:
    """What is wrong with the imports of a module of that name."""
    room, faults = room_of(module), []
    for name, late in imports(ast.parse(source)):
        first = name.split(".")[0]
        if name.startswith("."):
            faults.append(f"relative import {name}")
        if first in BACKENDS and room != "engine":
            faults.append(f"names the backend {first}")
        if first == "keras" and room in WITHOUT_KERAS and module not in WITH_KERAS and not (late and room == "random"):
            faults.append("imports keras")
        if first not in ("kvision", "apps"):
            continue
        other = room_of(name)
        if other not in LAYER:  # a name of the package's __init__: `from kvision import __version__`
            other = "kvision"
        same = other == room
        if same and room in ISOLATED and name != "kvision.models.Paper" and not f"{name}.".startswith(f"{module}."):
            faults.append(f"{name}: files of {room} do not know each other")
        if not same and LAYER[other] >= LAYER[room]:
            faults.append(f"{name}: {room} does not look up to {other}")
    return faults


def environment_writes(source: str) -> list[int]:
    """The lines that may change the process's environment."""
    tree = ast.parse(source)

    def is_environment(node):
        return isinstance(node, ast.Attribute) and node.attr == "environ"

    lines = []
    for node in ast.walk(tree):
        targets = getattr(node, "targets", None) or [getattr(node, "target", None)]
        for target in targets:
            if is_environment(target) or (isinstance(target, ast.Subscript) and is_environment(target.value)):
                lines.append(node.lineno)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            changes = {"update", "setdefault", "pop", "popitem", "clear", "__setitem__", "__delitem__"}
            if node.func.attr in {"putenv", "unsetenv"} or (
                node.func.attr in changes and is_environment(node.func.value)
            ):
                lines.append(node.lineno)
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            hidden = {"environ", "putenv", "unsetenv"} & {alias.name for alias in node.names}
            lines += [node.lineno] * bool(hidden)  # under another name the lines above would not see it
    return lines


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_imports_point_down(path):
    assert bad_imports(path.read_text(), module_of(path)) == []


@pytest.mark.parametrize("path", FILES, ids=module_of)
def test_the_environment_is_left_alone(path):
    assert environment_writes(path.read_text()) == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kvision.layers", "from kvision import zoo"),
        ("kvision.layers", "def f():\n    import kvision.models.vgg"),
        ("kvision.models.vgg", "from kvision.models import mlp"),
        ("kvision.models.vgg", "import kvision.data.cifar, kvision.weights"),
        ("kvision.models.vgg", "from kvision.weights import load"),
        ("kvision.zoo", "from kvision.weights import load"),
        ("kvision.zoo", "def f():\n    from kvision.convert import create_model"),
        ("kvision.tasks.classification", "def f():\n    from kvision.weights import load"),
        ("kvision.training.trainer", "from . import muon"),
        ("kvision.training.trainer", "from kvision.experiment import train"),
        ("kvision.training.trainer", "import jax.numpy as jnp"),
        ("kvision.training.finetune", "def f():\n    from torch import nn"),
        ("apps.mnist", "import tensorflow as tf"),
        ("apps.mnist", "from apps.cifar10 import RECIPES"),
        ("apps.mnist", "from apps import cifar10"),
        ("kvision.data.batches", "from keras import ops"),
        ("kvision.report.page", "def f():\n    import keras"),
        ("kvision.report.page", "from kvision.training.trainer import History"),
        ("kvision", "if TYPE_CHECKING:\n    pass\nelse:\n    from kvision.convert import create_model"),
    ],
)
def test_bad_imports_are_seen(module, source):
    assert len(bad_imports(source, module)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("kvision.convert.verify", "from kvision import zoo\nimport kvision.weights.npz"),
        ("kvision.training.trainer", "import keras\nfrom kvision import engine\nfrom kvision.report import progress"),
        ("kvision.engine.jax", "import jax\nfrom jax import lax"),
        ("kvision.report.page", "from kvision import __version__"),
        ("apps.mnist", "from kvision.experiment import classify"),
        ("kvision", "if TYPE_CHECKING:\n    from kvision.convert import create_model"),
    ],
)
def test_good_imports_pass(module, source):
    assert bad_imports(source, module) == []


@pytest.mark.parametrize(
    "source",
    [
        "os.environ['A'] = 'b'",
        "os.environ |= {}",
        "os.environ = {}",
        "del os.environ['A']",
        "os.environ.setdefault('A', 'b')",
        "def f():\n    os.environ.update(A='b')",
        "os.putenv('A', 'b')",
        "from os import environ",
    ],
)
def test_writes_to_the_environment_are_seen(source):
    assert len(environment_writes(source)) == 1


def test_a_child_environment_is_no_write():
    assert environment_writes("environment = {**os.environ, 'KERAS_BACKEND': 'jax'}\nos.environ.get('A')") == []


def test_files_are_named_for_what_they_know():
    assert not [path for path in FILES if path.stem in {"utils", "util", "common", "helpers", "base", "misc"}]


def test_one_level_of_folders():
    assert {len(path.relative_to(ROOT / "kvision").parts) for path in ROOT.glob("kvision/**/*.py")} == {1, 2}


def test_no_folder_is_named_like_a_backend():
    """A folder `jax` on the import path breaks `import keras` where JAX is absent."""
    assert not {path.name for path in [*ROOT.iterdir(), *(ROOT / "tests").iterdir()] if path.is_dir()} & BACKENDS


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import kvision", {"keras", "numpy", *BACKENDS}),
        ("import kvision.data, kvision.data.batches, kvision.report, kvision.flags", {"keras", *BACKENDS}),
        ("import kvision.zoo, kvision.weights, kvision.convert.cli, kvision.engine", {"keras", *BACKENDS}),
        ("import kvision.compare, kvision.parity, kvision.__main__", {"keras", *BACKENDS}),
    ],
)
def test_import_is_light(statement, absent):
    found = subprocess.run(
        [sys.executable, "-c", f"import sys\n{statement}\nprint(*sys.modules, sep='\\n')"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert absent.isdisjoint(found.stdout.split("\n"))
