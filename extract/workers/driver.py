"""The driver of an extraction: which blocks are missing -> workers -> commits -> report.

The driver alone writes the per-video arrays. A restart is the list of blocks with a pending row; a lost worker's
blocks go back to that list.
"""

import contextlib
import math
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

from extract.cli import InputError, check_ranges, progress
from extract.commands import command_line
from extract.cores import available_cores
from extract.decode import VideoError
from extract.decode.opening import check_file
from extract.device import count_gpus
from extract.listing.videos import Listing, Video, list_videos
from extract.listing.windows import cut_windows, lengths_path, settle
from extract.options import Options
from extract.store import FAILED, PENDING, FeatureStore, RunLog, difference, exclusive, is_remote
from extract.store.remote import Lease
from extract.store.summary import check_space, human_bytes, status_table
from extract.workers.actor_pool import RayActorPool
from extract.workers.calibration import choose_sample
from extract.workers.decoder import code_version
from extract.workers.worker import Block, Worker

SECONDS_PER_MOVE = 1.0  # of the progress bar


def extract(options: Options) -> int:
    """Extract features of `options.videos` into `options.out`; returns the exit status (DESIGN: Commands)."""
    check_ranges(options)
    options = settle(options)
    if threading.current_thread() is threading.main_thread():
        # A cluster's or a shell's polite stop ends a run as Ctrl-C does: what is committed stays.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    listing = list_videos(options.videos, root=options.root, labels=options.labels)
    print(listing.report())
    videos: Sequence[Video] = listing.videos[: options.limit]
    if options.window is not None and options.stride is not None:
        _refuse_foreign_folder(options.out)
        cache = None if is_remote(options.out) else lengths_path(options.out)
        windows = cut_windows(videos, options.window, options.stride, timeout=options.video_timeout, cache=cache)
        files, videos = len(videos), windows
        print(f"{len(videos):,} windows of {options.window:g} s, one each {options.stride:g} s, of {files:,} videos")
    _refuse_foreign_folder(options.out)
    with contextlib.closing(Lease(options.out)) if is_remote(options.out) else exclusive(options.out) as hold:
        return _extract(options, listing, videos, hold)


def _extract(options: Options, listing: Listing, videos: Sequence[Video], hold: RunLog | Lease) -> int:
    nonce = uuid.uuid4().hex
    hold.write("start", process=os.getpid(), host=socket.gethostname(), nonce=nonce, options=vars(options))
    store = _open_if_there(options.out)
    pool = _worker_pool(options, store, videos)
    try:
        made = pool.describe()
        if store is None:
            store = FeatureStore.create(
                options.out,
                **_columns(videos),
                classes=listing.classes,
                views=made["provenance"]["views"],
                frames=options.frames,
                dim=made["dim"],
                block_size=options.block_size,
                provenance=made["provenance"],
            )
        else:
            _agree(store, made, listing)
            _add_new(store, videos)
        if options.retry_failed:
            store.set_pending(np.flatnonzero(store.status == FAILED))
        blocks = _blocks(store, videos)
        _announce(options, store, blocks, made)
        if not is_remote(options.out):
            check_space(Path(options.out), sum(len(block.rows) for block in blocks) * store.video_bytes)
        if blocks:
            pool.check(nonce, _readable(blocks), code_version())
            _run(pool, store, blocks, hold)
    finally:
        pool.close()
    store.clean_up()  # after workers that were lost in this run, and after a run that was killed
    print(status_table(store))
    failed = int((store.status == FAILED).sum())
    if failed > options.max_failed * len(store):
        print(f"{failed} of {len(store)} videos failed, more than --max-failed {options.max_failed:g} allows")
        print(f"Next: {command_line('extract.status', options.out)}\n--retry-failed tries them again")
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
    """Before a log is written beside it. A store is not opened yet: another driver may be making it."""
    path = Path(out)
    if not is_remote(out) and path.exists() and not (path / "zarr.json").exists():
        what = "a file" if path.is_file() else "a folder"
        raise InputError(
            f"--out {out} exists and is no feature store but {what}; nothing was touched, give another name"
        )


def _open_if_there(out: str) -> FeatureStore | None:
    try:
        return FeatureStore.open(out, writable=True)
    except InputError as error:
        if "there is nothing" in str(error):
            return None
        raise


def _agree(store: FeatureStore, made: dict[str, Any], listing: Listing) -> None:
    """A store is continued with the settings it was begun with, or not at all."""
    differences = difference(store.provenance, made["provenance"])
    if store.classes != tuple(listing.classes):
        changed = sorted(set(store.classes) ^ set(listing.classes))
        differences.append(f"classes: {len(store.classes)} in the store, {len(listing.classes)} now; {changed[:5]}")
    if differences:
        lines = "\n  ".join(differences)
        raise InputError(f"{store.path} was made with other settings:\n  {lines}\nuse those, or another --out")


def _add_new(store: FeatureStore, videos: Sequence[Video]) -> None:
    known = {name: row for row, name in enumerate(store.ids.tolist())}
    for video in videos:
        row = known.get(video.id)
        if row is not None and store.labels[row] != video.label:
            before, now = (store.classes[x] if x >= 0 else "no class" for x in (store.labels[row], video.label))
            raise InputError(f"{video.id} is {before!r} in {store.path} and {now!r} now; use another --out")
    new = [video for video in videos if video.id not in known]
    if new:
        store.append(**_columns(new))


def _columns(videos: Sequence[Video]) -> dict[str, list[Any]]:
    """What a store holds of its rows from the start."""
    columns = {f"{name}s": [getattr(video, name) for video in videos] for name in ("id", "label", "split", "group")}
    spans = [video.span or (math.nan, math.nan) for video in videos]
    return columns | {"starts": [start for start, _ in spans], "ends": [end for _, end in spans]}


def _blocks(store: FeatureStore, videos: Sequence[Video]) -> list[Block]:
    """The blocks with pending rows, and in them those rows; a pending video that is no longer there is an error."""
    by_id = {video.id: video for video in videos}
    blocks = []
    for number in store.missing_blocks():
        rows = store.block_rows(number)
        rows = rows[store.status[rows] == PENDING]
        names = store.ids[rows].tolist()
        gone = [name for name in names if name not in by_id]
        if gone:
            raise InputError(
                f"{store.path} still waits for {gone[0]!r} (and {len(gone) - 1} more of its block), which --videos "
                "does not hold; give the folder (and --limit) the store was begun with"
            )
        blocks.append(Block(number, tuple(rows.tolist()), tuple(by_id[name] for name in names)))
    return blocks


def _announce(options: Options, store: FeatureStore, blocks: list[Block], made: dict[str, Any]) -> None:
    to_do = sum(len(block.rows) for block in blocks)
    frames = store.num_views * store.frames_per_video
    print(
        f"backbone  {made['words']}\n"
        f"store     {store.path}: {len(store):,} videos x {store.num_views} views x {store.frames_per_video} frames x "
        f"{store.dim} float16 = {human_bytes(len(store) * store.video_bytes)}\n"
        f"to do     {to_do:,} videos ({to_do * frames:,} frames) in {len(blocks):,} blocks, "
        f"{len(store) - to_do:,} done before"
    )


def _readable(blocks: list[Block]) -> str:
    """A video that this process can open; workers that cannot do not see the videos."""
    for video in (video for block in blocks for video in block.videos):
        with contextlib.suppress(VideoError):
            check_file(video.path)  # waits for nothing, as opening a pipe would
            return video.path
    return os.devnull  # not one video can be opened: each will fail with its own reason


def _worker_pool(options: Options, store: FeatureStore | None, videos: Sequence[Video]) -> Worker | RayActorPool:
    """One worker in this process (Ray's start costs 5 to 13 s), or a pool of them, as a `store` was begun."""
    recorded = store.provenance if store else {}
    weights = Path(options.weights)
    options = replace(
        options,
        out=options.out if is_remote(options.out) else str(Path(options.out).resolve()),
        weights=str(weights.resolve()) if weights.is_file() else options.weights,
        precision=recorded.get("precision", "auto") if options.precision == "auto" else options.precision,
        # Stores of before OpenVINO ran backbones, and those of PyTorch, record no engine.
        engine="torch" if options.engine == "auto" and store and "engine" not in recorded else options.engine,
    )
    sample = choose_sample(videos, store, seed=options.seed) if options.precision == "int8" else None
    gpus = count_gpus() if options.device in ("auto", "cuda") else 1
    workers = options.workers or max(1, gpus)
    if options.address is None and workers == 1:
        return Worker(options, available_cores(options.threads), sample)
    return RayActorPool(options if options.address is not None else replace(options, workers=workers), sample)


# -- the run -------------------------------------------------------------------------------------------------------


def _run(pool: Worker | RayActorPool, store: FeatureStore, blocks: list[Block], hold: RunLog | Lease) -> None:
    """Commit blocks as they come; show progress, and at the end where the time went."""
    started = time.perf_counter()
    totals: Counter[str] = Counter()
    nodes: set[str] = set()
    with _shown_progress(pool, totals, sum(len(block.rows) for block in blocks), store):
        for together in pool.extract(blocks):
            if together:
                hold.confirm()
                store.commit(*(done.outcome for done in together))
            for done in together:
                videos, failed = len(done.outcome.rows), int((done.outcome.status == FAILED).sum())
                totals.update(done.seconds, frames=done.frames, videos=videos, failed=failed)
                nodes.add(done.node)
                took = {name: round(value, 4) for name, value in done.seconds.items()}
                of = {"number": done.number, "node": done.node, "videos": videos}
                hold.write("block", **of, frames=done.frames, seconds=took)
    wall = time.perf_counter() - started
    hold.write("end", wall=round(wall, 3), frames=totals["frames"])
    print(_where_time_went(totals, wall=wall, workers=len(nodes)))


@contextlib.contextmanager
def _shown_progress(
    pool: Worker | RayActorPool, totals: Counter[str], videos: int, store: FeatureStore
) -> Iterator[None]:
    """A bar over the frames of all videos to do, moved each second, and not only when a block is done."""
    frames = store.num_views * store.frames_per_video
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
