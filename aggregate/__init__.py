"""Aggregators of frame features: training, evaluation and scores (`python -m aggregate.train`)."""

import sys
from importlib.util import find_spec
from pathlib import Path

# `python -m` searches the working folder first: a user's own extract.py there is another module.
ROOT = Path(__file__).parents[1]
if getattr(find_spec("extract"), "origin", None) != str(ROOT / "extract/__init__.py"):
    sys.path.insert(0, str(ROOT))

import extract  # noqa: E402, F401  # in turn checks the packages above it
