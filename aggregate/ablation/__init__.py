"""Many configurations in one pass over the features, and what their results say."""
