"""What is installed and what is published as source: nothing is missing, nothing is in anybody's way."""

import ast
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.backend_free

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
BUILD = "import sys; from setuptools import build_meta; print(getattr(build_meta, sys.argv[1])(sys.argv[2]))"
# Tests that read files beside them while they are collected; collecting all takes a minute.
SOME = [f"tests/test_{name}.py" for name in ("zoo", "shipped", "torchvision", "slim", "packaging", "benchmarks")]
# The names under which packages are imported, where they are others.
IMPORTED = {"pillow": "PIL", "scikit-learn": "sklearn", "tensorflow-cpu": "tensorflow"}


def requirements() -> dict[str, str]:
    """What the library and its backends ask for: {package: lowest version}."""
    groups = [PROJECT["dependencies"], *PROJECT["optional-dependencies"].values()]
    found = {}
    for words in (word for group in groups for word in group):
        if match := re.match(r"([A-Za-z0-9_-]+)(?:\[\w+\])?>=([\d.]+)", words):
            found.setdefault(match[1], match[2])
    return found


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The names in the wheel, and the folder of the unpacked source distribution."""
    setuptools = pytest.importorskip("setuptools")
    if int(setuptools.__version__.split(".")[0]) < 77:
        pytest.skip(f"setuptools {setuptools.__version__} is older than what pyproject.toml asks for to build")
    folder = tmp_path_factory.mktemp("packaging")
    leave = shutil.ignore_patterns("__pycache__", "*.pyc")
    for name in ("apps", "benchmarks", "docs", "kvision", "tests", "weights"):
        shutil.copytree(ROOT / name, folder / "clone" / name, ignore=leave)
    for path in ROOT.glob("*.*"):
        if path.is_file():
            shutil.copy(path, folder / "clone")
    shutil.copy(ROOT / "LICENSE", folder / "clone")
    names = {}
    for kind in ("build_sdist", "build_wheel"):
        words = [sys.executable, "-c", BUILD, kind, str(folder)]
        done = subprocess.run(words, cwd=folder / "clone", capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        names[kind] = folder / done.stdout.split()[-1]
    with tarfile.open(names["build_sdist"]) as archive:
        archive.extractall(folder, filter="data")
    with zipfile.ZipFile(names["build_wheel"]) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    return members, folder / names["build_sdist"].name.removesuffix(".tar.gz")


def test_the_wheel_installs_one_package(built):
    members, _ = built
    tops = {name.split("/")[0] for name in members}
    assert {top for top in tops if ".dist-info" not in top and ".data" not in top} == {"kvision"}
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("kvision/**/*.py")}
    sources |= {f"kvision/{path.relative_to(ROOT)}" for path in ROOT.glob("apps/*.py")}
    assert sources | {"kvision/py.typed"} <= members.keys()
    assert [name for name in members if name.endswith("share/kvision/weights/softmax.mnist.npz")]


def test_the_wheel_says_whose_it_is(built):
    members, _ = built
    (text,) = [data.decode() for name, data in members.items() if name.endswith(".dist-info/METADATA")]
    for line in ("Author: The kvision authors", "Classifier: Typing :: Typed", "License-Expression: Apache-2.0"):
        assert f"\n{line}\n" in text
    assert {"Requires-Dist: h5py>=3.11", "Requires-Dist: ml_dtypes>=0.5.1"} <= set(text.splitlines())


def test_the_sources_hold_their_tests(built):
    _, folder = built
    done = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode == 0:
        own = (".ci/", ".gitignore")
        missing = [name for name in done.stdout.splitlines() if not name.startswith(own)]
        missing = [name for name in missing if (ROOT / name).exists() and not (folder / name).exists()]
        assert missing == []
    words = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *SOME]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]


def test_what_is_imported_is_declared():
    declared = {IMPORTED.get(name, name) for name in requirements()} | {"kvision", "apps", "jaxlib"}
    for path in [*ROOT.glob("kvision/**/*.py"), *ROOT.glob("apps/*.py")]:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and not node.level else []
            tops = {name.split(".")[0] for name in names} - sys.stdlib_module_names
            assert tops <= declared, f"{path.relative_to(ROOT)} imports {tops - declared}"


def test_the_lowest_versions_are_the_bounds():
    """What `tox -e lowest-torch` installs is what pyproject.toml allows."""
    lines = (ROOT / "constraints-lowest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    asked = requirements()
    needed = ("keras", "numpy", "pillow", "h5py", "ml_dtypes", "jax", "tensorflow-cpu", "torch", "pytest")
    for name in needed:
        bound = asked[name].split(".")
        assert pinned[name].split(".")[: len(bound)] == bound, name
