"""The library's names and types as a type checker sees them; and that the names exist when the program runs."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

import kvision

pytestmark = pytest.mark.backend_free

ROOT = Path(__file__).parent.parent
PROGRAMS = Path(__file__).parent / "typing"


def check(name: str, cache: Path) -> subprocess.CompletedProcess:
    pytest.importorskip("mypy")
    words = ["--strict", "--follow-imports=silent", "--cache-dir", str(cache), str(PROGRAMS / name)]
    return subprocess.run([sys.executable, "-m", "mypy", *words], cwd=ROOT, capture_output=True, text=True)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("mypy")


def test_a_client_passes_the_strict_checker(cache):
    done = check("client.py", cache)
    assert done.returncode == 0, done.stdout


def test_the_checker_finds_every_mistake(cache):
    wrong = (PROGRAMS / "wrong.py").read_text().splitlines()
    expected = {i for i, line in enumerate(wrong, 1) if line.startswith("kvision.")}
    done = check("wrong.py", cache)
    assert {int(line) for line in re.findall(r"wrong\.py:(\d+): error", done.stdout)} == expected, done.stdout


def test_every_name_that_is_stated_exists():
    assert set(kvision.__all__) <= set(dir(kvision))
    for name in kvision.__all__:
        assert getattr(kvision, name) is not None
    with pytest.raises(AttributeError, match=r"no attribute 'create_modle'; it has .*create_model"):
        kvision.create_modle  # noqa: B018


def test_modules_load_at_the_first_use():
    program = "import kvision, sys; kvision.weights.save; kvision.data.load; print('keras' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "False", done.stderr
