"""Scores -> fused scores -> submission (`python -m ensemble`)."""

import sys
from importlib.util import find_spec
from pathlib import Path

# `python -m` searches the working folder first: a user's own aggregate.py there is another module.
ROOT = Path(__file__).parents[1]
if getattr(find_spec("aggregate"), "origin", None) != str(ROOT / "aggregate/__init__.py"):
    sys.path.insert(0, str(ROOT))

import aggregate  # noqa: E402, F401  # in turn checks the packages above it
