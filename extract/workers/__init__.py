"""The driver of an extraction and its workers: one in this process, or Ray actors."""
