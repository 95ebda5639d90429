"""The driver of an extraction: which blocks are missing -> workers -> commits -> report.

The driver alone writes the per-video arrays. A restart is the list of blocks with a pending row; a
lost worker's blocks go back to that list.
"""

import contextlib
import os
import signal
import socket
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from extract import InputError
from extract.cli import check_ranges, progress
from extract.commands import command_line
from extract.cores import available_cores
from extract.decode import VideoError
from extract.decode.container import check_file
from extract.device import count_gpus
from extract.listing.pictures import refuse_needless_rate, require_frame_rate
from extract.listing.videos import Listing, Video, list_videos
from extract.listing.windows import cut_windows, lengths_path, resolve_windowing
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
from extract.store.corrections import complete_correction, upgrade
from extract.store.summary import check_space, human_bytes, status_table
from extract.workers.blocks import Block
from extract.workers.calibration import choose_sample
from extract.workers.changed import SeenTimes
from extract.workers.decoder import code_version
from extract.workers.ray_pool import RayActorPool
from extract.workers.reconcile import append_new, columns_of, reconcile
from extract.workers.settings import check_provenance, continue_options
from extract.workers.worker import Worker

SECONDS_PER_MOVE = 1.0  # of the progress bar


def extract(options: Options) -> int:
    """Extract features of `options.videos` into `options.out`; returns the exit status.

    0 done, 3 finished but too many videos failed. Raises InputError and RunError.
    """
    check_ranges(options)
    if options.window is not None or options.stride is None:  # else the store says the window
        resolve_windowing(options)
    if threading.current_thread() is threading.main_thread():
        # A cluster's or a shell's polite stop ends a run as Ctrl-C does: what is committed stays.
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
    store = _open_if_exists(options.out)
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
    pool = _worker_pool(settings, store, videos)
    try:
        made = pool.describe()
        if store is None:
            store = FeatureStore.create(
                settings.out,
                **columns_of(videos),
                classes=listing.classes,
                views=made["provenance"]["views"],
                frames=made["frames"],
                dim=made["dim"],
                block_size=settings.block_size,
                provenance=made["provenance"],
            )
        else:
            check_provenance(store, made["provenance"])
            lock.ensure_held()
            complete_correction(store)
            upgrade(store)
            reconcile(settings, store, listing, videos)
            append_new(store, videos, listing.classes)
        if settings.retry_failed:
            ids = {video.id for video in videos}  # a row without a video would wait for ever
            failed = [
                row
                for row in np.flatnonzero(store.status == FAILED).tolist()
                if store.ids[row] in ids
            ]
            store.set_status(np.array(failed, int), PENDING)
        blocks = _blocks(store, videos)
        _announce(settings, store, blocks, made)
        if not is_remote(settings.out):
            check_space(
                Path(settings.out), sum(len(block.rows) for block in blocks) * store.video_bytes
            )
        if blocks:
            pool.check(nonce, _readable(blocks), code_version())
            _run(pool, store, blocks, lock, log)
    finally:
        pool.close()
    store.clean_up()  # after workers that were lost in this run, and after a run that was killed
    print(status_table(store))
    return _exit_status(settings, store)


def _exit_status(options: Options, store: FeatureStore) -> int:
    failed, listed = int((store.status == FAILED).sum()), int(store.listed.sum())
    if failed > options.max_failed * listed:
        print(
            f"{failed} of {listed} videos failed, more than --max-failed {options.max_failed:g} allows"
        )
        print(
            f"Next: {command_line('extract.status', options.out)}\n--retry-failed tries them again"
        )
        return 3
    print(f"Next: {_next_command(store, options.out)}")
    return 0


def _next_command(store: FeatureStore, path: str) -> str:
    """What to do with a store: train if it has classes, else hand its features to other tools."""
    if len(np.unique(store.labels[store.labels >= 0])) < 2:
        return command_line("extract.export", path, to=f"{Path(path).stem}.h5")
    folder = "runs/tsn" if not Path("runs/tsn").exists() else f"runs/{Path(path).stem}_tsn"
    return command_line("aggregate.train", agg="tsn", features=path, out=folder)


# -- before the run ------------------------------------------------------------------------------------------------


def _refuse_foreign_folder(out: str) -> None:
    """Before a log is written beside it. A store is not opened yet: another driver may be making
    it."""
    path = Path(out)
    if not is_remote(out) and path.exists() and not (path / "zarr.json").exists():
        kind = "a file" if path.is_file() else "a folder"
        raise InputError(
            f"--out {out} exists and is not a feature store but {kind}; nothing was touched, give another name"
        )


def _open_if_exists(out: str) -> FeatureStore | None:
    try:
        return FeatureStore.open(out, writable=True)
    except NoStoreError:
        return None


def _as_recorded(settings: Any) -> dict[str, Any]:
    """Options for the log, which a later command in another folder may read."""
    paths = {
        name: value
        for name, value in vars(settings).items()
        if value and name in ("videos", "root", "weights")
    }
    return vars(settings) | {
        name: os.path.abspath(path) for name, path in paths.items() if os.path.exists(path)
    }


def _choose_videos(options: Options, listing: Listing) -> Sequence[Video]:
    """The videos or windows to extract."""
    videos = listing.videos[: options.limit]
    if options.window is None or options.stride is None:
        return videos
    cache = None if is_remote(options.out) else lengths_path(options.out)
    windows = cut_windows(
        videos,
        options.window,
        options.stride,
        timeout=options.video_timeout,
        cache=cache,
        frame_rate=options.frame_rate,
    )
    print(
        f"{len(windows):,} windows of {options.window:g} s, one each {options.stride:g} s, of {len(videos):,} videos"
    )
    return windows


def _blocks(store: FeatureStore, videos: Sequence[Video]) -> list[Block]:
    """The blocks with pending rows, and in them those rows; rows that lie beyond --limit stay
    pending."""
    by_id = {video.id: video for video in videos}
    blocks = []
    for number in store.missing_blocks():
        own = store.block_rows(number)
        rows = [
            row for row in own[store.status[own] == PENDING].tolist() if store.ids[row] in by_id
        ]
        if rows:
            blocks.append(Block(number, tuple(rows), tuple(by_id[store.ids[row]] for row in rows)))
    return blocks


def _announce(
    options: Options, store: FeatureStore, blocks: list[Block], made: dict[str, Any]
) -> None:
    to_do = sum(len(block.rows) for block in blocks)
    frames = store.num_views * store.frames_per_video
    beyond = int((store.status == PENDING).sum()) - to_do
    print(
        f"backbone  {made['words']}\n"
        f"store     {store.path}: {len(store):,} videos x {store.num_views} views x {store.frames_per_video} frames x "
        f"{store.dim} float16 = {human_bytes(len(store) * store.video_bytes)}\n"
        f"to do     {to_do:,} videos ({to_do * frames:,} frames) in {len(blocks):,} blocks, "
        f"{len(store) - to_do - beyond:,} done before"
        + (f", {beyond:,} beyond --limit" if beyond else "")
    )


def _readable(blocks: list[Block]) -> str:
    """A video that this process can open; workers that cannot do not see the videos."""
    for video in (video for block in blocks for video in block.videos):
        if os.path.isdir(video.path):
            return video.path
        with contextlib.suppress(VideoError):
            check_file(video.path)  # waits for nothing, as opening a pipe would
            return video.path
    return os.devnull  # not one video can be opened: each will fail with its own reason


def _worker_pool(
    options: Any, store: FeatureStore | None, videos: Sequence[Video]
) -> Worker | RayActorPool:
    """One worker in this process (Ray's start costs 5 to 13 s), or a pool of them."""
    weights = Path(options.weights)
    options = replace(
        options,
        out=options.out if is_remote(options.out) else str(Path(options.out).resolve()),
        weights=str(weights.resolve()) if weights.is_file() else options.weights,
    )
    sample = (
        choose_sample(videos, store, seed=options.seed) if options.precision == "int8" else None
    )
    gpus = count_gpus() if options.device in ("auto", "cuda") else 1
    workers = options.workers or max(1, gpus)
    if options.address is None and workers == 1:
        return Worker(options, available_cores(options.threads), sample)
    return RayActorPool(
        options if options.address is not None else replace(options, workers=workers), sample
    )


# -- the run -------------------------------------------------------------------------------------------------------


def _run(
    pool: Worker | RayActorPool,
    store: FeatureStore,
    blocks: list[Block],
    lock: StoreLock,
    log: RunLog,
) -> None:
    """Commit blocks as they come; show progress, and at the end where the time went."""
    started = time.perf_counter()
    totals: Counter[str] = Counter()
    nodes: set[str] = set()
    seen = SeenTimes(store)
    with _shown_progress(pool, totals, sum(len(block.rows) for block in blocks), store):
        for together in pool.extract(blocks):
            if together:
                lock.ensure_held()
                store.commit(*(done.outcome for done in together))
            for done in together:
                videos, failed = len(done.outcome.rows), int((done.outcome.status == FAILED).sum())
                totals.update(done.seconds, frames=done.frames, videos=videos, failed=failed)
                nodes.add(done.node)
                seen.note(done.outcome.rows, done.outcome.sources)
                took = {name: round(value, 4) for name, value in done.seconds.items()}
                of = {"number": done.number, "node": done.node, "videos": videos}
                log.write("block", **of, frames=done.frames, seconds=took)
    wall = time.perf_counter() - started
    seen.save()
    log.write("end", wall=round(wall, 3), frames=totals["frames"])
    print(_where_time_went(totals, wall=wall, workers=len(nodes)))


@contextlib.contextmanager
def _shown_progress(
    pool: Worker | RayActorPool, totals: Counter[str], videos: int, store: FeatureStore
) -> Iterator[None]:
    """A bar over the frames of all videos to do, moved each second, and not only when a block is
    done."""
    # With several clips per video a row of the store is more than what is sampled.
    sampled = store.provenance.get("sampling", {}).get("frames", store.frames_per_video)
    frames = store.num_views * sampled
    stop = threading.Event()

    def move() -> None:
        settled = max(totals["videos"] * frames, min(pool.settled(), videos * frames))
        done = f"{settled // frames:,.0f} of {videos:,} videos, {totals['failed']:,} failed"
        bar.set_postfix_str(done, refresh=False)
        bar.update(settled - bar.n)  # negative after a worker was lost
        if sys.stderr.isatty():
            bar.refresh()  # also when nothing has come

    def move_each_second() -> None:
        while not stop.wait(SECONDS_PER_MOVE):
            move()

    with progress(total=videos * frames, unit="frame") as bar:
        mover = threading.Thread(target=move_each_second, name="progress", daemon=True)
        mover.start()
        try:
            yield
        finally:
            stop.set()
            mover.join()
            move()


def _where_time_went(totals: Counter[str], *, wall: float, workers: int) -> str:
    if not totals["frames"]:
        return f"no frame was computed in {wall:.1f} s: no video could be read"
    busy = max(wall * workers, 1e-9)
    limit = "decoding" if totals["wait"] > totals["device"] else "the backbone"
    return (
        f"{totals['frames']:,} frames in {wall:.1f} s: {totals['frames'] / wall:.0f} frames/s. Of the workers' time "
        f"the device computed {totals['device'] / busy:.0%} and waited for frames {totals['wait'] / busy:.0%}; "
        f"decoding took {totals['decode']:.1f} CPU s, writing {totals['write']:.1f} s beside it. The limit was {limit}."
    )
