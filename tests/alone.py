"""Exits 1 where another backend than the one named is installed: `python tests/alone.py jax`."""

import importlib.util
import sys

others = [name for name in ("jax", "tensorflow", "torch") if name != sys.argv[1] and importlib.util.find_spec(name)]
if others:
    sys.exit(f"this environment should have {sys.argv[1]} alone, and has {', '.join(others)}")
