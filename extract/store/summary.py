"""A summary of a store as text: counts, failure reasons, size and speed."""

import re
import shutil
from collections import Counter
from pathlib import Path

import numpy as np

from extract import RunError
from extract.cli import text_table
from extract.store.feature_store import FeatureStore
from extract.store.layout import DROPPED, FAILED, OK, PARTIAL, PENDING, STATUS_NAMES
from extract.store.runs import RunLog

MAX_REASONS = 12


def status_table(store: FeatureStore) -> str:
    """Counts by split and status, failure reasons, size, provenance, and the speed in the log."""
    lines = [repr(store), _counts(store)]
    for status in (FAILED, PARTIAL, OK):
        reasons = failure_reasons(store, status)
        if reasons:
            lines.append(f"{STATUS_NAMES[status]}:")
        lines += [f"  {count:>6,}  e.g. {example}" for count, example in reasons[:MAX_REASONS]]
        if len(reasons) > MAX_REASONS:
            lines.append(f"  and {len(reasons) - MAX_REASONS} further reasons")
    record = store.provenance
    if weights := record.get("weights"):
        digest = f" (SHA-256 {weights['sha256'][:12]}...)" if "sha256" in weights else ""
        lines.append(
            f"backbone {record['backbone']}, weights {weights['name']}{digest}, "
            f"{record['precision']}"
        )
    finished = int((store.status != PENDING).sum())
    lines.append(f"size {human_bytes(finished * store.video_bytes)} of features")
    return "\n".join(lines + _throughput(store.path))


def human_bytes(count: float) -> str:
    """`27.8 GB`; powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def check_space(path: Path, needed: int) -> None:
    """RunError if the disk of `path` has less than `needed` bytes free, before any is written."""
    free = shutil.disk_usage(path if path.exists() else path.parent).free
    if needed > free:
        needs = f"needs {human_bytes(needed)} more, its disk has {human_bytes(free)} free"
        raise RunError(f"{path} {needs}; use another one")


def _counts(store: FeatureStore) -> str:
    splits = sorted(set(store.splits.tolist()))
    header = ["split", "videos", *STATUS_NAMES]
    if not store.listed.all():
        header.append("no longer listed")
    rows = [header]
    for split in [*splits, None] if len(splits) > 1 else [None]:
        chosen = store.status if split is None else store.status[store.splits == split]
        counts = np.bincount(np.minimum(chosen, DROPPED), minlength=len(header) - 2)
        name = "all" if split is None else split or "(none)"
        rows.append([name, *(f"{count:,}" for count in (len(chosen), *counts))])
    return text_table(rows)


def failure_reasons(store: FeatureStore, status: int) -> list[tuple[int, str]]:
    """The reasons for a status, most frequent first: how many rows, and one of them with its id.

    Reasons that differ only in numbers are counted together.
    """
    examples: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for row in ((store.status == status) & (store.errors != "")).nonzero()[0]:
        reason = re.sub(r"\d+(\.\d+)?", "#", str(store.errors[row]))
        counts[reason] += 1
        examples.setdefault(reason, f"{store.ids[row]}: {store.errors[row]}")
    return [(count, examples[reason]) for reason, count in counts.most_common()]


def _throughput(path: str) -> list[str]:
    blocks = [record for record in RunLog.records(path) if record["event"] == "block"]
    blocks = [block for block in blocks if {"frames", "videos", "seconds"} <= block.keys()]
    frames = sum(block["frames"] for block in blocks)
    if not frames:  # no block, or all videos failed
        return []
    videos = sum(block["videos"] for block in blocks)
    device = sum(block["seconds"]["device"] for block in blocks)
    decode = sum(block["seconds"]["decode"] for block in blocks)
    return [
        f"measured: backbone {frames / max(device, 1e-9):,.0f} frames/s, decoding "
        f"{1000 * decode / videos:.0f} CPU ms per video ({len(blocks)} blocks in "
        f"{RunLog.path(path)})"
    ]
