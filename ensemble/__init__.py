"""Scores -> fused scores -> submission (`python -m ensemble`)."""
