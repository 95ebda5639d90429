"""A store in words: counts, reasons of failures, size and speed."""

import re
import shutil
from collections import Counter
from pathlib import Path

from extract import RunError
from extract.store.feature_store import FeatureStore
from extract.store.layout import DROPPED, FAILED, OK, PARTIAL, PENDING, STATUS_NAMES
from extract.store.runs import RunLog

REASONS_SHOWN = 12


def status_table(store: FeatureStore) -> str:
    """Counts by split and status, reasons of failures, size, provenance, and the speed that the log
    records."""
    lines = [repr(store), _counts(store)]
    for status in (FAILED, PARTIAL, OK):
        if known := reasons(store, status):
            lines.append(f"{STATUS_NAMES[status]}:")
            lines += [f"  {count:>6,}  e.g. {example}" for count, example in known[:REASONS_SHOWN]]
        if len(known) > REASONS_SHOWN:
            lines.append(f"  and {len(known) - REASONS_SHOWN} further reasons")
    record = store.provenance
    weights = record.get("weights", {})
    if weights:
        digest = f" (SHA-256 {weights['sha256'][:12]}...)" if "sha256" in weights else ""
        lines.append(
            f"backbone {record['backbone']}, weights {weights['name']}{digest}, {record['precision']}"
        )
    done = int((store.status != PENDING).sum())
    lines.append(f"size {human_bytes(done * store.video_bytes)} of features")
    speed = _speed(store.path)
    return "\n".join(lines + ([speed] if speed else []))


def human_bytes(count: float) -> str:
    """`27.8 GB`; powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:,.1f} TB"


def check_space(path: Path, needed: int) -> None:
    """RunError where `path` is to hold N bytes more than its disk has: before it is full, and
    not then."""
    free = shutil.disk_usage(path if path.exists() else path.parent).free
    if needed > free:
        needs = f"needs {human_bytes(needed)} more, its disk has {human_bytes(free)} free"
        raise RunError(f"{path} {needs}; use another one")


def _counts(store: FeatureStore) -> str:
    splits = sorted(set(store.splits.tolist()))
    dropped = () if store.listed.all() else ("no longer listed",)
    rows: list[tuple[str, ...]] = [("split", "videos", *STATUS_NAMES, *dropped)]
    for split in [*splits, None] if len(splits) > 1 else [None]:
        chosen = store.status if split is None else store.status[store.splits == split]
        counts = [int((chosen == value).sum()) for value in range(len(STATUS_NAMES))]
        counts += [int((chosen >= DROPPED).sum()) for _ in dropped]
        name = "all" if split is None else split or "(none)"
        rows.append((name, f"{len(chosen):,}", *(f"{count:,}" for count in counts)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
        for row in rows
    )


def reasons(store: FeatureStore, status: int) -> list[tuple[int, str]]:
    """Why rows have a status: how many for like reasons (numbers are left out), and one with its
    id; frequent first."""
    examples: dict[str, str] = {}
    counts: Counter[str] = Counter()
    for row in ((store.status == status) & (store.errors != "")).nonzero()[0]:
        reason = re.sub(r"\d+(\.\d+)?", "#", str(store.errors[row]))
        counts[reason] += 1
        examples.setdefault(reason, f"{store.ids[row]}: {store.errors[row]}")
    return [(count, examples[reason]) for reason, count in counts.most_common()]


def _speed(path: str) -> str:
    blocks = [record for record in RunLog.records(path) if record["event"] == "block"]
    blocks = [block for block in blocks if {"frames", "videos", "seconds"} <= block.keys()]
    if not any(block["frames"] for block in blocks):  # none, or all videos failed
        return ""
    frames, videos = (
        sum(block["frames"] for block in blocks),
        sum(block["videos"] for block in blocks),
    )
    device = sum(block["seconds"]["device"] for block in blocks)
    decode = sum(block["seconds"]["decode"] for block in blocks)
    return (
        f"measured: backbone {frames / max(device, 1e-9):,.0f} frames/s, "
        f"decoding {1000 * decode / videos:.0f} CPU ms a video ({len(blocks)} blocks in {RunLog.path(path)})"
    )
