"""python -m extract.verify feats.zarr [--repair]: read every shard and check it against its checksums."""

import contextlib
import sys
from dataclasses import dataclass
from typing import Annotated

import tyro

from extract.cli import InputError, progress, run_command
from extract.commands import command_line

SHOWN = 20


@dataclass(frozen=True)
class Options:
    """Check every stored byte against its checksum; exit status 1 where something is damaged."""

    store: Annotated[str, tyro.conf.Positional]
    """The feature store."""
    repair: bool = False
    """Set the blocks of damaged videos back to pending, so that the next extraction does them again."""


def main(options: Options) -> int:
    import numpy as np

    from extract.store import FeatureStore, exclusive, is_remote

    if is_remote(options.store):
        raise InputError(f"{options.store} is remote; verify it where it lies on a disk")
    store = FeatureStore.open(options.store, writable=options.repair)
    with exclusive(options.store) if options.repair else contextlib.nullcontext():
        damaged: dict[int, str] = {}
        for block in progress(range(store.num_blocks), unit="shard"):
            damaged |= store.damaged_rows(block)
        for row in sorted(damaged)[:SHOWN]:
            print(f"damaged: {store.ids[row]} (row {row}): {damaged[row]}")
        if len(damaged) > SHOWN:
            print(f"... and {len(damaged) - SHOWN} more")
        committed = int((store.status > 0).sum())
        print(f"{committed:,} finished videos in {store.num_blocks:,} blocks checked, {len(damaged):,} damaged")
        if not damaged:
            return 0
        if not options.repair:
            print(f"Next: {command_line('extract.verify', options.store, repair=True)}")
            return 1
        blocks = {row // store.block_size for row in damaged}
        store.set_pending(np.concatenate([store.block_rows(block) for block in blocks]))
        print(f"{len(blocks)} blocks are pending again; run the extraction once more to fill them")
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m extract.verify"))
