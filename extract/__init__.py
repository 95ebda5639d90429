"""Videos -> frozen-backbone features on disk (`python -m extract`)."""
