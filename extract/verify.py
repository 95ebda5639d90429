"""python -m extract.verify feats.zarr [--repair] [--sources]: check all bytes of a store, and
whether its videos have changed."""

import contextlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from extract import InputError
from extract.cli import progress, run_as_script
from extract.commands import command_line

if TYPE_CHECKING:
    from extract.store import FeatureStore

MAX_PRINTED = 20


@dataclass(frozen=True)
class Options:
    """Check every stored byte against its checksum. Exit status 1 if something is damaged, lost or
    replaced."""

    store: Annotated[str, tyro.conf.Positional]
    """The feature store."""
    repair: bool = False
    """Set the blocks of damaged videos back to pending, so that the next extraction does them
    again."""
    sources: bool = False
    """Also read size and both ends of every video, to check that it is still the file that its
    features were made from."""
    root: Path | None = None
    """With --sources: the folder that ids are paths below (default: that of the last extraction,
    from the log)."""


def main(options: Options) -> int:
    from extract.store import FeatureStore, is_remote, lock_store
    from extract.store.damage import damaged_columns

    if is_remote(options.store):
        raise InputError(f"{options.store} is remote; verify a copy of it on a disk")
    FeatureStore.open(options.store, writable=options.repair)  # before the lock makes a file
    with lock_store(options.store) if options.repair else contextlib.nullcontext():
        store = FeatureStore.open(options.store, writable=options.repair)
        if columns := damaged_columns(store):
            _print_first([f"damaged: {line}" for line in columns])
            print("--repair cannot restore these: no extraction makes them from one video alone")
            return 1
        damaged = _check_shards(options, store)
    replaced = _check_sources(options, store) if options.sources else 0
    return 1 if replaced or (damaged and not options.repair) else 0


def _print_first(lines: Sequence[str]) -> None:
    for line in lines[:MAX_PRINTED]:
        print(line)
    if len(lines) > MAX_PRINTED:
        print(f"... and {len(lines) - MAX_PRINTED} more")


def _check_shards(options: Options, store: "FeatureStore") -> int:
    """Number of videos with damaged features, which --repair sets back to pending."""
    import numpy as np

    from extract.store import PENDING
    from extract.store.damage import damaged_rows

    damaged: dict[int, str] = {}
    for block in progress(range(store.num_blocks), unit="shard"):
        damaged |= damaged_rows(store, block)
    _print_first(
        [f"damaged: {store.ids[row]} (row {row}): {damaged[row]}" for row in sorted(damaged)]
    )
    committed = int((store.status != PENDING).sum())
    print(
        f"{committed:,} finished videos in {store.num_blocks:,} blocks checked, "
        f"{len(damaged):,} damaged"
    )
    if damaged and not options.repair:
        print(f"Next: {command_line('extract.verify', options.store, repair=True)}")
    elif damaged:
        blocks = {row // store.block_size for row in damaged}
        store.set_status(np.concatenate([store.block_rows(block) for block in blocks]), PENDING)
        print(f"{len(blocks)} blocks are pending again; run the extraction once more to fill them")
    return len(damaged)


def _check_sources(options: Options, store: "FeatureStore") -> int:
    """Number of files that are missing, or are not those that the features were made from."""
    from extract.sources import file_of, read_source

    root = options.root or _recorded_root(store)
    files = list(map(file_of, store.ids.tolist()))
    recorded = {
        file: (size, digest)
        for file, (size, digest) in zip(files, store.sources.tolist(), strict=True)
        if size >= 0
    }
    lines = []
    for file, (size, digest) in progress(recorded.items(), unit="file"):
        source = read_source(os.path.join(root, file))
        if not source.known:
            lines.append(f"lost: {file} cannot be read below {root}")
        elif source[:2] != (size, digest):
            lines.append(
                f"replaced: {file} has {source.size:,} bytes, {size:,} were recorded; another file"
            )
    _print_first(lines)
    unrecorded = len(set(files)) - len(recorded)
    note = f"; {unrecorded:,} have no record" if unrecorded else ""
    print(f"{len(recorded):,} files below {root} checked, {len(lines):,} lost or replaced{note}")
    return len(lines)


def _recorded_root(store: "FeatureStore") -> Path:
    """The folder that ids are paths below, as recorded by the last extraction."""
    from extract.store import RunLog
    from extract.workers.settings import logged_options

    options = next(iter(logged_options(store)), {})
    if not options.get("videos"):
        raise InputError(
            f"{RunLog.path(store.path)} records no extraction; "
            "give the folder of the videos with --root"
        )
    if options.get("root"):
        return Path(options["root"])
    videos = Path(options["videos"])
    return videos if videos.is_dir() else videos.parent


if __name__ == "__main__":
    run_as_script()
