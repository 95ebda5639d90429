"""Features (or frames) -> checkpoints -> scores (`python -m aggregate.train`)."""
