"""Report section about audits: near-duplicates next to each other, and doubtful labels."""

from extract import InputError, Record
from extract.store import FeatureStore
from pipelines.report.find import Contents
from pipelines.report.gallery import middle_frame

SHOWN = 10  # pairs, and labels


def audits(contents: Contents) -> list[Record]:
    """The first SHOWN pairs and labels of each audit, with frames if the videos can be found."""
    sections = []
    for name, record in contents.audits.items():
        store = _audited_store(contents, record["features"])
        pairs, labels = (
            [dict(line) for line in record[kind][:SHOWN]] for kind in ("duplicates", "labels")
        )
        for pair in pairs:
            for side in "ab":
                pair[side] = _picture(contents, store, pair[f"id_{side}"])
        for label in labels:
            label["picture"] = _picture(contents, store, label["id"])
        pictures = [pair[side] for pair in pairs for side in "ab"]
        pictures += [label["picture"] for label in labels]
        sections.append(
            record
            | {
                "name": name,
                "pairs": pairs,
                "doubtful": labels,
                "pictured": any(pictures),
                "across": sum(line["across"] != "groups" for line in record["duplicates"]),
                "all_pairs": len(record["duplicates"]),
                "all_labels": len(record["labels"]),
            }
        )
    return sections


def _audited_store(contents: Contents, features: str | list[str]) -> FeatureStore | None:
    """The audited store, or the first of several joined ones; None if it cannot be found."""
    try:
        return contents.store_named(features if isinstance(features, str) else features[0])[1]
    except InputError:
        return None


def _picture(contents: Contents, store: FeatureStore | None, video_id: str) -> bytes | None:
    if store is None or not contents.videos:
        return None
    rows = (store.usable & (store.ids == video_id)).nonzero()[0]
    return middle_frame(store, int(rows[0]), contents.videos) if len(rows) else None
