"""The feature store: a Zarr v3 group on disk, read as one strided array."""

from extract.store.feature_store import FeatureStore
from extract.store.rows import FAILED, OK, PARTIAL, PENDING, STATUS_NAMES, Rows
from extract.store.runs import RunLog, difference, exclusive, is_remote

__all__ = [
    "FAILED",
    "OK",
    "PARTIAL",
    "PENDING",
    "STATUS_NAMES",
    "FeatureStore",
    "Rows",
    "RunLog",
    "difference",
    "exclusive",
    "is_remote",
]
