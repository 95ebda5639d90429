"""Lost and damaged chunks of a store's per-video arrays.

Zarr reads a missing chunk as fill values, so a copy that was cut short would look like a store
without splits, and its test videos would be trained on. That is why every chunk is written, and a
missing one counts as damage.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from extract import InputError, RunError
from extract.commands import command_line
from extract.store.layout import PENDING, ROW_ARRAYS, ROWS_PER_CHUNK, chunk_names
from extract.store.objects import names_in, network_errors_as_run_error
from extract.store.shards import ShardError, shard_name


class NoStoreError(InputError):
    """The path of a store does not exist."""


@contextmanager
def open_errors_as_input_error(path: str | Path) -> Iterator[None]:
    """Turn the errors that Zarr raises for something that is not a store into an InputError."""
    try:
        yield
    except (FileNotFoundError, FileExistsError):  # the second for a file instead of a folder
        if Path(str(path)).exists():
            raise InputError(
                f"{path} is not a feature store (not a Zarr group); "
                "give the folder that `extract --out` made"
            ) from None
        create = command_line("extract", videos="FOLDER", out=path)
        raise NoStoreError(
            f"{path} is not a feature store (it does not exist); `{create}` creates one"
        ) from None
    except InputError:
        raise
    except (ValueError, TypeError, KeyError) as error:  # Zarr hardly checks what it reads
        why = f"{type(error).__name__}: {error!s:.80}"
        raise InputError(f"{path}/zarr.json is damaged ({why})") from None


@contextmanager
def damage_as_input_error(path: str, name: str) -> Iterator[None]:
    """Turn the errors that Zarr, NumPy and zstd raise for a damaged array into an InputError."""
    try:
        with network_errors_as_run_error(path):
            yield
    except (InputError, RunError, OSError):
        raise
    except KeyError:
        raise InputError(f"{path} is not complete: its array {name!r} is missing") from None
    except Exception as error:
        why = f"its array {name!r} is damaged ({type(error).__name__}: {error!s:.80})"
        raise InputError(
            f"{path}: {why}; copy the store again, or extract into another folder"
        ) from None


def missing_chunks(store: Any, name: str) -> list[str]:
    """The chunk files that a per-video array has lost."""
    # Rows without a status are pending and never read. `damaged_columns` compares them with shards.
    if name == "status":
        return []
    present = names_in(f"{store.path.rstrip('/')}/{name}")
    missing = [chunk for chunk in chunk_names(name, len(store)) if chunk not in present]
    if not missing or not store.missing_columns or name == "ids":
        return missing
    # Older versions did not write chunks that hold only fill values. In these two arrays every
    # video with features has other values.
    if name not in ("num_frames", "frame_indices"):
        return []
    with_features = set((np.flatnonzero(store.usable) // ROWS_PER_CHUNK).tolist())
    return [chunk for chunk in missing if int(chunk.split(".")[1]) in with_features]


def damaged_columns(store: Any) -> list[str]:
    """The damage to the per-video arrays, one line each; reads all of their bytes."""
    damage = []
    for name in ("views", *ROW_ARRAYS):
        try:
            getattr(store, name)
        except InputError as error:
            damage.append(str(error))
    path = store.path.rstrip("/")
    present, shards = names_in(f"{path}/status"), names_in(f"{path}/features")
    rows = np.arange(len(store))
    for number, chunk in enumerate(chunk_names("status", len(store))):
        chunk_rows = rows[number * ROWS_PER_CHUNK : (number + 1) * ROWS_PER_CHUNK]
        blocks = np.unique(chunk_rows // store.block_size).tolist()
        if chunk not in present and not shards.isdisjoint(map(shard_name, blocks)):
            damage.append(f"{path}: status/{chunk} is missing, although features of its rows exist")
    return damage


def damaged_rows(store: Any, block: int) -> dict[int, str]:
    """Rows of a finished block whose features are damaged, each with the reason.

    Reads the whole shard.
    """
    rows = store.block_rows(block)
    finished = rows[store.status[rows] != PENDING].tolist()
    if not finished:
        return {}
    path = store.shard_path(block)
    try:
        intact = store.layout.intact_videos(path)
    except ShardError as error:
        return dict.fromkeys(finished, str(error))
    first = block * store.block_size
    intact_rows = {first + video for video, is_intact in enumerate(intact) if is_intact}
    reason = f"the checksum in {path.name} does not match"
    return {row: reason for row in finished if row not in intact_rows}
