"""Training and test batches: cached features, or frames decoded from videos."""
