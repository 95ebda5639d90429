"""Whole recipes: they walk through all rooms and nobody walks into them."""
