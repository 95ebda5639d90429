"""Training: learners, recipes, checkpoints, and several models in one pass."""
