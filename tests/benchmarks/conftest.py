"""Benchmarks use OpenMP as users do: the suite's sleeping threads (tests/conftest.py) halve a
backbone's speed."""

import os

os.environ.pop("OMP_WAIT_POLICY", None)  # before torch is imported
