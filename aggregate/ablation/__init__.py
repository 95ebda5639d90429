"""Ablation and cross-validation: many configurations trained in shared passes, and compared."""
