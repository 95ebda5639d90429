"""python -m pipelines.report: one HTML page of everything in a run folder."""
