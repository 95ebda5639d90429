"""One block of videos -> one block of features: the same code in this process and in a Ray actor.

Three things run beside each other in a worker: child processes decode ahead (`pool.py`),
this thread feeds the device with batches of a constant size, whose frames may be of two blocks, and
one thread writes the shard of the block before.
"""

import importlib.metadata
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from extract import InputError, RunError
from extract.backbone.batches import Batches
from extract.backbone.frozen import Backbone, load_backbone
from extract.decode import VideoError, decoder_version
from extract.decode.jobs import Plan, decode_job, remaining_jobs
from extract.decode.nvdec import GpuDecoder
from extract.decode.pool import Finished, SubprocessPool
from extract.decode.transform import Preprocessing, view_names
from extract.device import runs_on_cpu
from extract.options import Options
from extract.sources import UNKNOWN, Source
from extract.store import FAILED, OK, PARTIAL, FeatureStore, Outcomes, RunLog, is_remote
from extract.workers.blocks import Block, Done, Submitted, jobs_of
from extract.workers.calibration import CalibrationSample
from extract.workers.decoder import check_node

if TYPE_CHECKING:
    from extract.backbone.quantized import Calibration


class Worker:
    """Holds a backbone and decode children; `extract` blocks, or `run` one after the other,
    `drain`; then `close`."""

    decode_job = staticmethod(decode_job)

    # Everything heavy is made on first use and not here: Ray hides what goes wrong in an actor's
    # constructor.
    def __init__(self, options: Options, cores: int, sample: CalibrationSample | None = None):
        self.options, self.cores = (
            options.with_defaults(),
            cores,
        )  # of `options`, each setting has a value
        self._sample = sample
        self._views = view_names(self.options.crops, self.options.augment_passes)
        self._ahead: dict[int, list[Submitted]] = {}
        # Blocks that are computed: how many frames were added when their last one was, features of
        # pictures, and which of them (positions) each row's views show.
        self._computing: deque[tuple[int, np.ndarray, np.ndarray, Done]] = deque()
        self._computed = 0.0  # seconds of the device, of blocks before those
        self._skipped = 0  # frames that need not be computed: of failed videos, and repeats
        self._bad_frames = 0  # in a row, of batches whose features are mostly not finite
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="shard-writer")
        self._writing: list[Future[Done]] = []

    @cached_property
    def _backbone(self) -> Backbone:
        options = self.options
        # On a GPU batches are large, and a block ends with what is left over: all of its batches
        # are one size.
        together = None
        if not runs_on_cpu(options.device):
            together = options.block_size * options.frames * len(self._views)
        return load_backbone(
            options.backbone,
            weights=options.weights,
            device=options.device,
            precision=options.precision,
            form=options.form,
            engine=options.engine,
            seed=options.seed,
            frames=together,
            threads=self.cores,
            image_size=options.image_size,
            clip_frames=options.clip_frames,
            clip_fps=options.clip_fps,
            per_clip=options.per_clip,
            calibration=self._calibration,
        )

    def _calibration(self, preprocessing: Preprocessing) -> "Calibration":
        assert self._sample is not None
        plan = replace(self._sample.plan(preprocessing), frame_rate=self.options.frame_rate)
        with self._subprocesses(self.cores, plan) as pool:
            return self._sample.decode(pool, plan)

    @property
    def _rows_per_clip(self) -> int:
        return self._backbone.clips.rows if self._backbone.clips else 1

    @cached_property
    def _batches(self) -> Batches:
        return self._backbone.batches(check=self._check_batch)

    def _check_batch(self, features: np.ndarray) -> None:
        """One video's features may overflow; those of several in a row mean that something is wrong
        with all."""
        bad = int((~np.isfinite(features)).any(axis=1).sum())
        self._bad_frames = self._bad_frames + len(features) if bad > len(features) / 2 else 0
        if self._bad_frames > 2 * self.frames_per_video + self._backbone.batch_size:
            raise RunError(self._backbone.not_finite(bad, len(features)))

    @cached_property
    def _plan(self) -> Plan:
        options = self.options
        return Plan(
            frames=options.frames,
            crops=options.crops,
            augment_passes=options.augment_passes,
            preprocessing=self._backbone.preprocessing,
            **self._backbone.clip_options,
            seed=options.seed,
            decoder=options.decoder,
            frame_rate=options.frame_rate,
        )

    @cached_property
    def _pool(self) -> SubprocessPool:
        name, _, device = self.options.decoder.partition("-")
        if name != "torchcodec":
            return self._children
        if self._backbone.clips is not None:
            raise InputError(
                f"--decoder {self.options.decoder}: clip-wise backbones are decoded by pyav; leave it out"
            )
        if self._backbone.device.partition(":")[0] != device:
            raise InputError(
                f"--decoder torchcodec-{device} needs --device {device}; this is {self._backbone.device}"
            )
        pool = self._subprocesses(0, self._plan)
        device, timeout = self._backbone.device, self.options.video_timeout
        pool.help(
            GpuDecoder(self._children, self.decode_job, device, timeout=timeout), at_once=self.cores
        )
        return pool

    @cached_property
    def _children(self) -> SubprocessPool:
        return self._subprocesses(self.options.decode_workers or self.cores, self._plan)

    @cached_property
    def _leftovers(self) -> SubprocessPool:
        """For what had no room in a buffer. Behind the next block's jobs it might wait for slots
        that those fill."""
        return self._subprocesses(self.options.decode_workers or self.cores, self._plan)

    def _subprocesses(self, workers: int, plan: Plan) -> SubprocessPool:
        return SubprocessPool(
            self.decode_job,
            slot_bytes=plan.slot_bytes,
            workers=workers,
            timeout=self.options.video_timeout,
            # On a CPU the backbone computes on the same cores, and its threads wait for each other
            # at every layer: a decoder that takes one of them away for a moment stops both.
            nice=10 if runs_on_cpu(self.options.device) else 0,
        )

    @cached_property
    def _store(self) -> FeatureStore:
        return FeatureStore.open(self.options.out, writable=True)

    def describe(self) -> dict[str, Any]:
        """What the store records of how its features were made, their width, and the device in
        words."""
        options = self.options
        sampling = {
            "frames": options.frames,
            "method": "segment centers (TSN); augment: random in each segment",
        }
        windows = (
            {"window": options.window, "stride": options.stride}
            if options.window is not None
            else {}
        )
        decoder = decoder_version(options.decoder)
        if options.frame_rate is not None:
            sampling["frame_rate"] = options.frame_rate
            decoder += f", Pillow {importlib.metadata.version('pillow')}"
        provenance = {
            **self._backbone.provenance(),
            "sampling": sampling | windows,
            "views": list(self._views),
            "seed": options.seed,
            "decoder": {"name": options.decoder, "version": decoder},
        }
        return {
            "provenance": provenance,
            "frames": options.frames * self._rows_per_clip,
            "dim": self._backbone.dim // self._rows_per_clip,
            "slot_bytes": self._plan.slot_bytes,
            "frames_per_video": self.frames_per_video,
            "words": self._backbone.describe(),
        }

    def check(self, nonce: str, video: str, version: str) -> None:
        """Make sure that this worker has the driver's code and sees the store and videos, or fail
        naming its node."""
        node = check_node(version, video)
        store = self.options.out
        local, who = not is_remote(store), f"the worker on {node}"  # a URL is the same everywhere
        if local and not Path(store).is_dir():
            raise RunError(
                f"{who} does not see the store {store}; put it on storage all nodes share"
            )
        if local and nonce not in [run.get("nonce") for run in RunLog.records(store)]:
            raise RunError(f"{who} sees another {store} than this run's; put it on shared storage")
        # Made here: PyTorch's number of threads holds for the thread that sets it, and `help` comes
        # on another one.
        assert self._backbone
        assert self._pool

    @property
    def frames_per_video(self) -> int:
        return len(self._views) * self.options.frames

    def settled(self) -> int:
        """Frames of videos whose features are there, or will never be, since the start; from any
        thread."""
        batches = self.__dict__.get("_batches")
        return self._skipped + (batches.completed if batches else 0)

    def help(self, decode: Callable[[Any], Finished], *, at_once: int) -> None:
        """Have another node decode too, until `decode` raises. May be called while a block is in
        hand."""
        self._children.help(decode, at_once=at_once)

    def extract(self, blocks: list[Block]) -> Iterator[list[Done]]:
        """All blocks, one after the other, in this process."""
        for block, upcoming in zip(blocks, [*blocks[1:], None], strict=True):
            yield self.run(block, upcoming)
        yield self.drain()

    def run(self, block: Block, upcoming: Block | None = None) -> list[Done]:
        """Extract a block, decode ahead for `upcoming`. Returns blocks written meanwhile.

        Its last frames may still be computed when this returns, with the first of the next block,
        so that a GPU does not run dry between blocks.
        """
        submitted = self._ahead.pop(block.number, None) or self._submit(block)
        if upcoming is not None:
            self._ahead[upcoming.number] = self._submit(upcoming)
        with self._dropped_after_an_error():
            self._extract(block, submitted)
        written = self._written()
        self._write_computed()
        return written

    def drain(self) -> list[Done]:
        """Wait for the blocks that are being computed or written and return them."""
        if self._computing:
            with self._dropped_after_an_error():
                self._batches.finish()
            self._write_computed()
        return self._written()

    @contextmanager
    def _dropped_after_an_error(self) -> Iterator[None]:
        """Of blocks that are being computed: their frames were under way, and `Batches` dropped
        them."""
        try:
            yield
        except BaseException:
            self._computing.clear()
            raise

    def _written(self) -> list[Done]:
        writing, self._writing = self._writing, []
        return [one.result() for one in writing]

    def _write_computed(self) -> None:
        """Begin to write blocks whose features are all there."""
        while self._computing and self._computing[0][0] <= self._batches.completed:
            _, features, shown, done = self._computing.popleft()
            features = np.take_along_axis(features, shown[..., None], axis=1)
            features[done.outcome.status == FAILED] = (
                0  # of a row that failed after its first clips
            )
            width = features.shape[-1] // self._rows_per_clip
            features = features.reshape(len(features), len(self._views), -1, width)
            self._fail_not_finite(features, done.outcome)
            done.seconds["device"] = self._batches.seconds - self._computed
            self._computed = self._batches.seconds
            self._writing.append(self._writer.submit(self._write, features, done))

    def _fail_not_finite(self, features: np.ndarray, outcome: Outcomes) -> None:
        bad = ~np.isfinite(features)
        for place in np.flatnonzero(bad.any(axis=(1, 2, 3))):
            frames = bad[place].any(axis=2)
            outcome.status[place] = FAILED
            outcome.errors[place] = (
                f"features of {frames.sum()} of its {frames.size} frames are not finite in float16 "
                f"(computed in {self._backbone.precision})"
            )
            features[place], outcome.num_frames[place] = 0, 0
            outcome.frame_indices[place], outcome.timestamps[place] = -1, np.nan

    def close(self) -> None:
        """Stop the children; a block in hand is dropped."""
        for pool in ("_pool", "_children", "_leftovers"):
            if pool in self.__dict__:
                self.__dict__[pool].close()
        self._writer.shutdown()

    def _submit(self, block: Block) -> "list[Submitted]":
        plan = self._plan
        # Two workers died over it: what decodes in a worker's own process is not tried a third time
        # (see GpuDecoder).
        if block.deaths >= 2 and self._pool is not self._children:
            plan = replace(plan, decoder="pyav")
        return [
            (places, job, self._pool.submit(job)) for places, job in jobs_of(block.videos, plan)
        ]

    def _extract(self, block: Block, submitted: "list[Submitted]") -> None:
        views, frames, parts = len(self._views), self.options.frames, self._rows_per_clip
        count = len(block.rows)
        features = np.zeros((count, views * frames, self._backbone.dim), "<f2")
        shown = np.tile(np.arange(views * frames), (count, 1))
        outcome = Outcomes(
            rows=np.array(block.rows),
            status=np.full(count, FAILED, "i1"),
            errors=[""] * count,
            num_frames=np.zeros(count, "<i4"),
            frame_indices=np.full((count, views, frames * parts), -1, "<i4"),
            timestamps=np.full((count, views, frames * parts), np.nan, "<f4"),
            sources=[UNKNOWN] * count,
        )
        seconds = {"decode": 0.0, "wait": 0.0, "device": 0.0, "write": 0.0}
        computed = 0
        for place, prepared, source, pictures, first in self._prepared(submitted, seconds):
            outcome.sources[place] = source
            if isinstance(prepared, VideoError):
                outcome.status[place], outcome.errors[place] = FAILED, prepared.reason
                outcome.frame_indices[place], outcome.timestamps[place] = -1, np.nan
                self._skipped += self.frames_per_video - first * views
                continue
            outcome.status[place] = PARTIAL if prepared.problem else OK
            outcome.errors[place] = "; ".join(filter(None, (prepared.problem, prepared.note)))
            outcome.num_frames[place] = prepared.num_frames
            middles = prepared.middles_of(parts)
            rows = slice(first * parts, first * parts + middles.shape[1])
            outcome.frame_indices[place, :, rows] = prepared.frame_indices[middles]
            outcome.timestamps[place, :, rows] = prepared.frame_times[middles]
            if self._backbone.clips is None:
                shown[place] = prepared.middles.ravel()
                self._skipped += self.frames_per_video - len(pictures)
                self._batches.add(pictures, features[place])
                computed += len(pictures)
            else:
                computed += self._add_clips(pictures, prepared.clips, features[place], first)
            self._write_computed()
        done = Done(
            block.number, outcome, f"{socket.gethostname()}/{os.getpid()}", computed, seconds
        )
        self._computing.append((self._batches.added, features, shown, done))

    def _add_clips(self, pictures: Any, clips: np.ndarray, features: np.ndarray, first: int) -> int:
        """Clips int [V, T, L] of pictures, from number `first` of each view on; returns how many
        there are."""
        by_view = features.reshape(len(clips), -1, features.shape[-1])
        for view, of_view in enumerate(clips):
            for number, clip in enumerate(of_view, first):  # one copy of a clip at a time
                self._batches.add(pictures[clip][None], by_view[view, number][None])
        return clips.shape[0] * clips.shape[1]

    def _prepared(
        self, submitted: "list[Submitted]", seconds: dict[str, float]
    ) -> Iterator[tuple[int, Any, Source, Any, int]]:
        """Each row's place, what was decoded of which file, its pictures, and its first clip among
        them.

        The pictures are valid until the next ones are asked for. A row that does not fit into a
        buffer comes in parts.
        """
        waiting = deque(submitted)
        while waiting:
            places, job, future = waiting.popleft()
            path, rows, plan = job
            place_of = dict(zip(rows, places, strict=True))
            started = time.perf_counter()
            finished = future.result()
            seconds["wait"] += time.perf_counter() - started
            seconds["decode"] += finished.cpu_seconds
            if finished.failure and len(rows) > 1:  # each alone, so that one fails and not all
                ended = [
                    ((path, [row], plan), self._pool.alone((path, [row], plan))) for row in rows
                ]
            else:
                ended = [(job, finished)]
            for part, end in ended:
                results = [VideoError(path, end.failure)] if end.failure else end.result
                more = [] if end.failure else remaining_jobs(part, results)
                waiting.extendleft(
                    ([place_of[row] for row in left[1]], left, self._leftovers.submit(left))
                    for left in reversed(more)
                )
                for row, prepared in zip(part[1], results, strict=True):
                    if prepared is not None:
                        pictures = (
                            None
                            if isinstance(prepared, VideoError)
                            else prepared.pictures(end.buffer, plan)
                        )
                        yield place_of[row], prepared, end.source, pictures, plan.first_clip
            finished.release()  # its slot of shared memory is free for another job

    def _write(self, features: np.ndarray, done: Done) -> Done:
        started = time.perf_counter()
        self._store.write_block(done.number, features, done.outcome.rows)
        done.seconds["write"] = time.perf_counter() - started
        return done
