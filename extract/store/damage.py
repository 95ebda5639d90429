"""Lost and damaged chunks of a store's per-video arrays.

Zarr reads a chunk that is missing as fill values. So a copy that was cut short would be a store
without splits, whose test videos are trained on. Every chunk is written, and one that is missing is
damage.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from extract import InputError, RunError
from extract.commands import command_line
from extract.store.layout import PENDING, ROW_ARRAYS, ROWS_PER_CHUNK, chunk_names, is_remote
from extract.store.objects import file_system, names_in, network_errors_named
from extract.store.shards import ShardError, damaged_videos, shard_name


class NoStoreError(InputError):
    """There is nothing under the name of a store."""


@contextmanager
def open_errors_named(path: str | Path) -> Iterator[None]:
    """Turn what Zarr raises over something that is not a store into a sentence."""
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
    except (ValueError, TypeError, KeyError) as error:  # Zarr checks little of what it reads
        why = f"{type(error).__name__}: {error!s:.80}"
        raise InputError(f"{path}/zarr.json is damaged ({why})") from None


def missing_chunks(store: Any, name: str) -> list[str]:
    """Files of a per-video array that a copy has lost."""
    # Rows without a status are pending, which nothing reads; `damaged_columns` looks for shards.
    if name == "status":
        return []
    present = names_in(f"{store.path.rstrip('/')}/{name}")
    missing = [chunk for chunk in chunk_names(name, len(store)) if chunk not in present]
    if not missing or not store.missing_columns or name == "ids":
        return missing
    # Older versions wrote no chunk of fill values only; these two hold others for each video with
    # features.
    if name not in ("num_frames", "frame_indices"):
        return []
    with_features = set((np.flatnonzero(store.usable) // ROWS_PER_CHUNK).tolist())
    return [chunk for chunk in missing if int(chunk.split(".")[1]) in with_features]


def blocks_without_shard(path: str, blocks: np.ndarray) -> list[int]:
    """Which of these blocks have lost their shard."""
    if not is_remote(path):
        folder = Path(path) / "features"
        return [block for block in blocks.tolist() if not (folder / shard_name(block)).exists()]
    system, name = file_system(path)
    with network_errors_named(path):
        system.invalidate_cache()
        keys = {block: f"{name}/features/{shard_name(block)}" for block in blocks.tolist()}
        return [block for block, key in keys.items() if not system.exists(key)]


def damaged_columns(store: Any) -> list[str]:
    """What is wrong with the per-video arrays, one line each; reads every stored byte of them."""
    damage = []
    for name in ("views", *ROW_ARRAYS):
        try:
            getattr(store, name)
        except InputError as error:
            damage.append(str(error))
    path = store.path.rstrip("/")
    present, shards = names_in(f"{path}/status"), names_in(f"{path}/features")
    for number, chunk in enumerate(chunk_names("status", len(store))):
        start, stop = number * ROWS_PER_CHUNK, min((number + 1) * ROWS_PER_CHUNK, len(store))
        blocks = range(start // store.block_size, -(-stop // store.block_size))
        if chunk not in present and not shards.isdisjoint(map(shard_name, blocks)):
            damage.append(f"{path}: status/{chunk} is missing, although features of its rows exist")
    return damage


@contextmanager
def damage_named(path: str, name: str) -> Iterator[None]:
    """Turn what a damaged array raises in Zarr, NumPy and zstd into an InputError."""
    try:
        with network_errors_named(path):
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


def damaged_rows(store: Any, block: int) -> dict[int, str]:
    """`FeatureStore.damaged_rows`."""
    rows = store.block_rows(block)
    committed = rows[store.status[rows] != PENDING]
    if not len(committed):
        return {}
    path = store.shard_path(block)
    try:
        places = damaged_videos(path, block_size=store.block_size, video_bytes=store.video_bytes)
    except ShardError as error:
        return {int(row): str(error) for row in committed}
    damaged = np.intersect1d(committed, block * store.block_size + np.array(places, dtype=int))
    return {int(row): f"the checksum in {path.name} does not match" for row in damaged}
