"""python -m extract.verify feats.zarr [--repair] [--sources]: check every stored byte, and the
videos themselves."""

import contextlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from extract import InputError
from extract.cli import progress, run_command
from extract.commands import command_line

if TYPE_CHECKING:
    from extract.store import FeatureStore

MAX_PRINTED = 20


@dataclass(frozen=True)
class Options:
    """Check every stored byte against its checksum; exit status 1 if something is damaged, lost or
    replaced."""

    store: Annotated[str, tyro.conf.Positional]
    """The feature store."""
    repair: bool = False
    """Set the blocks of damaged videos back to pending, so that the next extraction does them
    again."""
    sources: bool = False
    """Read size and both ends of every video too: is it still the file that its features were made
    from?"""
    root: Path | None = None
    """With --sources: the folder that ids are paths below (default: that of the last extraction,
    from the log)."""


def main(options: Options) -> int:
    from extract.store import is_remote, lock_store
    from extract.store.damage import damaged_columns

    if is_remote(options.store):
        raise InputError(f"{options.store} is remote; verify it where it lies on a disk")
    store = _open(options)
    with lock_store(options.store) if options.repair else contextlib.nullcontext():
        store = _open(options)  # as it is under the lock
        if columns := damaged_columns(store):
            _print_some([f"damaged: {line}" for line in columns])
            print(
                "--repair cannot bring these back, since no extraction makes them from one video alone"
            )
            return 1
        damaged = _check_shards(options, store)
    replaced = _check_sources(options, store) if options.sources else 0
    return 1 if replaced or (damaged and not options.repair) else 0


def _open(options: Options) -> "FeatureStore":
    from extract.store import FeatureStore

    return FeatureStore.open(options.store, writable=options.repair)


def _print_some(lines: Sequence[str]) -> None:
    print("\n".join(lines[:MAX_PRINTED]))
    if len(lines) > MAX_PRINTED:
        print(f"... and {len(lines) - MAX_PRINTED} more")


def _check_shards(options: Options, store: "FeatureStore") -> int:
    """The number of videos whose features are damaged, after repairing them if that is an
    option."""
    import numpy as np

    from extract.store import PENDING

    damaged: dict[int, str] = {}
    for block in progress(range(store.num_blocks), unit="shard"):
        damaged |= store.damaged_rows(block)
    if damaged:
        _print_some(
            [
                f"damaged: {store.ids[row]} (row {row}): {why}"
                for row, why in sorted(damaged.items())
            ]
        )
    committed = int((store.status != PENDING).sum())
    print(
        f"{committed:,} finished videos in {store.num_blocks:,} blocks checked, {len(damaged):,} damaged"
    )
    if damaged and not options.repair:
        print(f"Next: {command_line('extract.verify', options.store, repair=True)}")
    if damaged and options.repair:
        blocks = {row // store.block_size for row in damaged}
        store.set_status(np.concatenate([store.block_rows(block) for block in blocks]), PENDING)
        print(f"{len(blocks)} blocks are pending again; run the extraction once more to fill them")
    return len(damaged)


def _check_sources(options: Options, store: "FeatureStore") -> int:
    """The number of videos that are not the files that their features were made from, or are not
    there any more."""
    from extract.sources import Source, file_of, read_source

    root = options.root or _recorded_root(options.store)
    recorded: dict[str, Source] = {}
    for row_id, (size, digest) in zip(store.ids.tolist(), store.sources.tolist(), strict=True):
        if size >= 0:
            recorded[file_of(row_id)] = Source(size, digest)
    lines = []
    for file, source in progress(recorded.items(), unit="file"):
        now = read_source(os.path.join(root, file))
        if not now.known:
            lines.append(f"lost: {file} cannot be read below {root}")
        elif now[:2] != source[:2]:
            lines.append(
                f"replaced: {file} has {now.size:,} bytes, {source.size:,} were recorded; another file"
            )
    if lines:
        _print_some(lines)
    unknown = len({file_of(row_id) for row_id in store.ids.tolist()}) - len(recorded)
    without = f"; {unknown:,} have no record" if unknown else ""
    print(f"{len(recorded):,} files below {root} checked, {len(lines):,} lost or replaced{without}")
    return len(lines)


def _recorded_root(store: str) -> Path:
    """The folder that ids are paths below, as the last extraction was given it."""
    from extract.store import RunLog

    runs = [run["options"] for run in RunLog.records(store) if isinstance(run.get("options"), dict)]
    if not runs or not runs[-1].get("videos"):
        raise InputError(
            f"{RunLog.path(store)} names no extraction; say with --root where the videos are"
        )
    if runs[-1].get("root"):
        return Path(runs[-1]["root"])
    videos = Path(runs[-1]["videos"])
    return videos if videos.is_dir() else videos.parent


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m extract.verify"))
