"""Batches to train and test on: cached features, or frames decoded from videos."""
