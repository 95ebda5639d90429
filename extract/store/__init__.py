"""The feature store: a Zarr v3 group on disk, read as one strided array."""

from extract.store.feature_store import FeatureStore
from extract.store.layout import FAILED, OK, PARTIAL, PENDING, STATUS_NAMES, Rows, is_remote
from extract.store.runs import RunLog, difference, exclusive

__all__ = ["FAILED", "OK", "PARTIAL", "PENDING", "STATUS_NAMES", "FeatureStore", "Rows", "RunLog"]
__all__ += ["difference", "exclusive", "is_remote"]
