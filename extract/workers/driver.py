"""The driver of an extraction: assign the missing blocks to workers, and commit their results.

Only the driver writes the per-video arrays. To resume is to do the blocks that have a pending row.
"""

import contextlib
import os
import signal
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from extract import InputError
from extract.cli import check_ranges
from extract.commands import command_line, first_training
from extract.cores import available_cores
from extract.decode import VideoError
from extract.decode.container import check_file
from extract.device import count_gpus
from extract.listing.pictures import refuse_needless_rate, require_frame_rate
from extract.listing.videos import Listing, Video, list_videos
from extract.listing.windows import cut_windows, file_lengths, lengths_path, resolve_windowing
from extract.options import Options
from extract.store import (
    FAILED,
    PENDING,
    FeatureStore,
    NoStoreError,
    RunLog,
    StoreLock,
    is_remote,
    lock_store,
    real_path,
)
from extract.store.summary import check_space, human_bytes, status_table
from extract.workers.blocks import BackboneInfo, Block
from extract.workers.calibration import choose_sample
from extract.workers.changed import SeenTimes
from extract.workers.decoder import code_version
from extract.workers.progress import shown_progress, time_breakdown
from extract.workers.ray_pool import RayActorPool
from extract.workers.reconcile import columns_of, reconcile
from extract.workers.settings import check_provenance, continue_options
from extract.workers.worker import Worker


def extract(options: Options) -> int:
    """Extract features of `options.videos` into `options.out`; returns the exit status.

    0: done, 3: finished but too many videos failed. Raises InputError and RunError.
    """
    check_ranges(options)
    if options.window is not None or options.stride is None:  # otherwise the store has the window
        resolve_windowing(options)
    if threading.current_thread() is threading.main_thread():
        # SIGTERM stops a run like Ctrl-C does. Committed blocks stay.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    listing = list_videos(
        options.videos, root=options.root, labels=options.labels, picture_folders=True
    )
    print(listing.report())
    refuse_needless_rate(listing.source, listing.picture_folders, options.frame_rate)
    out = real_path(options.out)
    _refuse_foreign_folder(out)
    if out != options.out:
        print(f"store     {options.out} is a link to {out}")
    with lock_store(out) as lock:
        return _extract(replace(options, out=out), listing, lock)


def _extract(options: Options, listing: Listing, lock: StoreLock) -> int:
    store = None
    with contextlib.suppress(NoStoreError):
        store = FeatureStore.open(options.out, writable=True)
    settings = (
        continue_options(options, store) if store else resolve_windowing(options).with_defaults()
    )
    require_frame_rate(listing.source, listing.picture_folders, settings.frame_rate)
    videos = _choose_videos(settings, listing)
    log, nonce = RunLog(settings.out), uuid.uuid4().hex
    log.write(
        "start",
        process=os.getpid(),
        host=socket.gethostname(),
        nonce=nonce,
        options=_as_recorded(settings),
    )
    pool = worker_pool(settings, store, videos)
    try:
        info = pool.describe()
        if store is None:
            store = FeatureStore.create(
                settings.out,
                **columns_of(videos),
                classes=listing.classes,
                views=info.provenance["views"],
                frames=info.frames,
                dim=info.dim,
                block_size=settings.block_size,
                provenance=info.provenance,
            )
        else:
            check_provenance(store, info.provenance)
            lock.ensure_held()
            reconcile(settings, store, listing, videos)
        if settings.retry_failed:
            ids = {video.id for video in videos}  # a row without a video would stay pending
            has_video = np.array([row_id in ids for row_id in store.ids], bool)
            store.set_status(np.flatnonzero((store.status == FAILED) & has_video), PENDING)
        blocks = _blocks(store, videos)
        to_do = sum(len(block.rows) for block in blocks)
        _print_plan(store, info, to_do, len(blocks))
        if not is_remote(settings.out):
            check_space(Path(settings.out), to_do * store.video_bytes)
        if blocks:
            pool.check(nonce, _first_readable_video(blocks), code_version())
            _run(pool, info.frames_per_video, store, blocks, lock, log)
    finally:
        pool.close()
    store.clean_up()  # files of workers that were lost, or of a run that was killed
    print(status_table(store))
    return _exit_status(settings, store)


def _exit_status(options: Options, store: FeatureStore) -> int:
    failed, listed = int((store.status == FAILED).sum()), int(store.listed.sum())
    if failed > options.max_failed * listed:
        allowed = f"--max-failed {options.max_failed:g} allows"
        print(f"{failed} of {listed} videos failed, more than {allowed}")
        print(f"Next: {command_line('extract.status', options.out)}")
        print("--retry-failed tries them again")
        return 3
    print(f"Next: {_next_command(store, options.out)}")
    return 0


def _next_command(store: FeatureStore, path: str) -> str:
    """Train if the store has classes, else export the features for other tools."""
    if len(np.unique(store.labels[store.labels >= 0])) < 2:
        return command_line("extract.export", path, to=f"{Path(path).stem}.h5")
    return first_training(path)


# -- before the run --------------------------------------------------------------------------------


def _refuse_foreign_folder(out: str) -> None:
    """Raise InputError, before a log is written next to the folder.

    A store is not opened yet: another driver may be creating it.
    """
    path = Path(out)
    if not is_remote(out) and path.exists() and not (path / "zarr.json").exists():
        kind = "a file" if path.is_file() else "a folder"
        raise InputError(
            f"--out {out} exists and is not a feature store but {kind}; nothing was touched, give "
            "another name"
        )


def _as_recorded(settings: Any) -> dict[str, Any]:
    """Options for the log, with absolute paths: a later command may run in another folder."""
    paths = {name: getattr(settings, name) for name in ("videos", "root", "weights")}
    return vars(settings) | {
        name: os.path.abspath(path) for name, path in paths.items() if path and os.path.exists(path)
    }


def _choose_videos(options: Options, listing: Listing) -> Sequence[Video]:
    """The videos or windows to extract."""
    videos = listing.videos[: options.limit]
    if options.window is None or options.stride is None:
        return videos
    cache = None if is_remote(options.out) else lengths_path(options.out)
    lengths = file_lengths(
        (video.path for video in videos if video.span is None),
        timeout=options.video_timeout,
        cache=cache,
        frame_rate=options.frame_rate,
    )
    windows = cut_windows(videos, lengths, options.window, options.stride)
    print(
        f"{len(windows):,} windows of {options.window:g} s, one each {options.stride:g} s, of "
        f"{len(videos):,} videos"
    )
    return windows


def _blocks(store: FeatureStore, videos: Sequence[Video]) -> list[Block]:
    """The pending rows of each block. Rows that --limit leaves out stay pending."""
    by_id = {video.id: video for video in videos}
    blocks = []
    for number in store.missing_blocks():
        in_block = store.block_rows(number)
        pending = in_block[store.status[in_block] == PENDING]
        rows = [row for row in pending.tolist() if store.ids[row] in by_id]
        if rows:
            blocks.append(Block(number, tuple(rows), tuple(by_id[store.ids[row]] for row in rows)))
    return blocks


def _print_plan(store: FeatureStore, info: BackboneInfo, to_do: int, num_blocks: int) -> None:
    frames = store.num_views * store.frames_per_video
    beyond = int((store.status == PENDING).sum()) - to_do
    print(
        f"backbone  {info.description}\n"
        f"store     {store.path}: {len(store):,} videos x {store.num_views} views x "
        f"{store.frames_per_video} frames x {store.dim} float16 = "
        f"{human_bytes(len(store) * store.video_bytes)}\n"
        f"to do     {to_do:,} videos ({to_do * frames:,} frames) in {num_blocks:,} blocks, "
        f"{len(store) - to_do - beyond:,} done before"
        + (f", {beyond:,} beyond --limit" if beyond else "")
    )


def _first_readable_video(blocks: list[Block]) -> str:
    """A video that this process can open. Every worker must be able to open it too."""
    for video in (video for block in blocks for video in block.videos):
        if os.path.isdir(video.path):
            return video.path
        with contextlib.suppress(VideoError):
            check_file(video.path)
            return video.path
    return os.devnull  # no video can be opened: each will fail with its own reason


def worker_pool(
    options: Any, store: FeatureStore | None, videos: Sequence[Video]
) -> Worker | RayActorPool:
    """A worker in this process, or several by Ray, which needs 5 to 13 s to start."""
    weights = Path(options.weights)
    options = replace(
        options,
        out=options.out if is_remote(options.out) else str(Path(options.out).resolve()),
        weights=str(weights.resolve()) if weights.is_file() else options.weights,
    )
    sample = None
    if options.precision == "int8":
        sample = choose_sample(videos, store, seed=options.seed)
    if options.address is None:
        num_gpus = count_gpus() if options.device in ("auto", "cuda") else 1
        options = replace(options, workers=options.workers or max(1, num_gpus))
        if options.workers == 1:
            return Worker(options, available_cores(options.threads), sample)
    return RayActorPool(options, sample)


# -- the run ---------------------------------------------------------------------------------------


def _run(
    pool: Worker | RayActorPool,
    frames_per_video: int,
    store: FeatureStore,
    blocks: list[Block],
    lock: StoreLock,
    log: RunLog,
) -> None:
    """Commit blocks as workers return them; print progress, and at the end a time breakdown."""
    started = time.perf_counter()
    totals: Counter[str] = Counter()
    nodes: set[str] = set()
    seen = SeenTimes(store)
    num_videos = sum(len(block.rows) for block in blocks)
    with shown_progress(pool, totals, num_videos, frames_per_video):
        for results in pool.extract(blocks):
            if results:
                lock.ensure_held()
                store.commit(*(result.outcome for result in results))
            for result in results:
                outcome, frames = result.outcome, result.frames
                videos, failed = len(outcome.rows), int((outcome.status == FAILED).sum())
                totals.update(result.seconds, frames=frames, videos=videos, failed=failed)
                nodes.add(result.node)
                seen.note(outcome.rows, outcome.sources)
                log.write(
                    "block",
                    number=result.number,
                    node=result.node,
                    videos=videos,
                    frames=frames,
                    seconds={name: round(value, 4) for name, value in result.seconds.items()},
                )
    wall = time.perf_counter() - started
    seen.save()
    log.write("end", wall=round(wall, 3), frames=totals["frames"])
    print(time_breakdown(totals, wall=wall, workers=len(nodes)))
