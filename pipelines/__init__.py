"""End-to-end recipes; nothing imports them."""

import sys
from importlib.util import find_spec
from pathlib import Path

# `python -m` searches the working folder first: a user's own ensemble.py there is another module.
ROOT = Path(__file__).parents[1]
if getattr(find_spec("ensemble"), "origin", None) != str(ROOT / "ensemble/__init__.py"):
    sys.path.insert(0, str(ROOT))

import ensemble  # noqa: E402, F401  # in turn checks the packages above it
