"""The feature store: a Zarr v3 group on disk, read as one strided array."""

from extract.store.damage import NoStoreError
from extract.store.feature_store import FeatureStore
from extract.store.layout import DROPPED, FAILED, OK, PARTIAL, PENDING, STATUS_NAMES, Outcomes
from extract.store.locks import StoreLock, lock_store
from extract.store.objects import is_remote
from extract.store.runs import RunLog, difference, real_path

__all__ = [
    "DROPPED",
    "FAILED",
    "OK",
    "PARTIAL",
    "PENDING",
    "STATUS_NAMES",
    "FeatureStore",
    "NoStoreError",
    "Outcomes",
    "RunLog",
    "StoreLock",
    "difference",
    "is_remote",
    "lock_store",
    "real_path",
]
