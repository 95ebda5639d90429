"""What the report shows of an audit: near-duplicates side by side, and doubtful labels."""

from pathlib import Path
from typing import Any

from extract import InputError
from extract.store import FeatureStore
from pipelines.report.find import Found
from pipelines.report.gallery import middle_frame

SHOWN = 10  # pairs, and labels


def audits(found: Found) -> list[dict[str, Any]]:
    """The first SHOWN pairs and labels of each audit, with frames if the videos are at hand."""
    shown = []
    for name, record in found.audits.items():
        store = _store_of(found, record["features"])
        pairs = [
            line | {side: _picture(found, store, line[f"id_{side}"]) for side in "ab"}
            for line in record["duplicates"][:SHOWN]
        ]
        labels = [
            line | {"picture": _picture(found, store, line["id"])}
            for line in record["labels"][:SHOWN]
        ]
        pictured = any(line["a"] or line["b"] for line in pairs) or any(
            line["picture"] for line in labels
        )
        counts = {
            "across": sum(line["across"] != "groups" for line in record["duplicates"]),
            "all_pairs": len(record["duplicates"]),
            "all_labels": len(record["labels"]),
        }
        shown.append(
            record
            | counts
            | {"name": name, "pairs": pairs, "doubtful": labels, "pictured": pictured}
        )
    return shown


def _store_of(found: Found, features: str | list[str]) -> FeatureStore | None:
    """The store that was audited, the first if several were joined: in the folder by its name, or
    where the audit says; None if it is at neither place."""
    path = Path(features if isinstance(features, str) else features[0])
    for name, store in found.stores.items():
        if Path(name).name == path.name:
            return store
    try:
        return FeatureStore.open(path)
    except InputError:
        return None


def _picture(found: Found, store: FeatureStore | None, video_id: str) -> bytes | None:
    if store is None or not found.videos:
        return None
    rows = (store.ids == video_id).nonzero()[0]
    if not len(rows) or not store.usable[rows[0]]:
        return None
    return middle_frame(store, int(rows[0]), found.videos)
