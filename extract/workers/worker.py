"""Extract blocks of videos: decode, run the backbone, write shards. In this process or a Ray actor.

Three things happen at the same time in a worker: child processes decode ahead (`pool.py`), the main
thread feeds the device with batches of a constant size, which may span two blocks, and another
thread writes the shard of the block before.
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
from extract.cores import available_cores
from extract.decode import VideoError, decoder_version
from extract.decode.jobs import Plan, decode_job
from extract.decode.nvdec import GpuDecoder
from extract.decode.pool import JobResult, SubprocessPool
from extract.decode.transform import Preprocessing, view_names
from extract.device import runs_on_cpu
from extract.options import Options
from extract.store import FAILED, OK, PARTIAL, FeatureStore, Outcomes, RunLog, is_remote
from extract.workers.blocks import BackboneInfo, Block, BlockResult
from extract.workers.calibration import CalibrationSample
from extract.workers.decoder import check_node
from extract.workers.rows import RowDecoder, Submitted, start_pool

if TYPE_CHECKING:
    from extract.backbone.quantized import Calibration


class Worker:
    """A backbone and its decode children. Call `extract`, or `run` per block and `drain`; `close`.

    sample: the videos that an int8 network is calibrated on.
    backbone: used instead of the one that `options` name.
    """

    decode_job = staticmethod(decode_job)

    # Large parts are created at first use: Ray hides errors in an actor's constructor.
    def __init__(
        self,
        options: Options,
        cores: int,
        sample: CalibrationSample | None = None,
        *,
        backbone: Backbone | None = None,
    ):
        self.options = options.with_defaults()
        self.cores = available_cores(cores)  # `cores` is chosen on another machine if Ray runs
        self._sample, self._given_backbone = sample, backbone
        self._views = view_names(self.options.crops, self.options.augment_passes)
        self._pools: list[SubprocessPool] = []
        self._prefetched: dict[int, list[Submitted]] = {}
        # Blocks whose frames are being computed: the number of frames that had been added when
        # their last one was, the features of pictures, and the picture that each frame shows.
        self._computing: deque[tuple[int, np.ndarray, np.ndarray, BlockResult]] = deque()
        self._device_seconds = 0.0  # of the blocks before those
        self._settled = 0
        self._bad_frames = 0  # in consecutive batches whose features are mostly not finite
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="shard-writer")
        self._writing: list[Future[BlockResult]] = []

    @cached_property
    def _backbone(self) -> Backbone:
        if self._given_backbone is not None:
            return self._given_backbone
        options = self.options
        # Batches on a GPU are large. If it knows the frames of a block, it makes them all one size.
        frames_per_block = None
        if not runs_on_cpu(options.device):
            frames_per_block = options.block_size * self.frames_per_video
        return load_backbone(
            options.backbone,
            weights=options.weights,
            device=options.device,
            precision=options.precision,
            form=options.form,
            engine=options.engine,
            seed=options.seed,
            frames=frames_per_block,
            threads=self.cores,
            image_size=options.image_size,
            clip_frames=options.clip_frames,
            clip_fps=options.clip_fps,
            per_clip=options.per_clip,
            processor=options.processor,
            calibrate=self._calibration,
        )

    def _calibration(self, preprocessing: Preprocessing) -> "Calibration":
        assert self._sample is not None
        return self._sample.decode(
            preprocessing,
            frame_rate=self.options.frame_rate,
            workers=self.cores,
            timeout=self.options.video_timeout,
        )

    @property
    def _rows_per_clip(self) -> int:
        return self._backbone.clips.rows if self._backbone.clips else 1

    @cached_property
    def _batches(self) -> Batches:
        return self._backbone.batches(check=self._check_batch)

    def _check_batch(self, features: np.ndarray) -> None:
        """The features of one video may overflow. If those of several do, raise RunError."""
        mostly_bad = (~np.isfinite(features)).any(axis=1).mean() > 0.5
        self._bad_frames = self._bad_frames + len(features) if mostly_bad else 0
        if self._bad_frames > 2 * self.frames_per_video + self._backbone.batch_size:
            self._backbone.check_finite(features)

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
    def _children(self) -> SubprocessPool:
        return self._start_children()

    @cached_property
    def _decoder(self) -> RowDecoder:
        return RowDecoder(
            self._on_gpu(self._children), lambda: self._on_gpu(self._start_children())
        )

    def _on_gpu(self, children: SubprocessPool) -> SubprocessPool:
        """A pool that decodes on the GPU, with `children` for the rest; else `children` itself."""
        name, _, device = self.options.decoder.partition("-")
        if name != "torchcodec":
            return children
        if self._backbone.clips is not None:
            raise InputError(
                f"--decoder {self.options.decoder}: clip-wise backbones are decoded by pyav; "
                "leave it out"
            )
        if self._backbone.device.partition(":")[0] != device:
            raise InputError(
                f"--decoder torchcodec-{device} needs --device {device}; this is "
                f"{self._backbone.device}"
            )
        pool = self._start_children(0)
        timeout = self.options.video_timeout
        decoder = GpuDecoder(children, self.decode_job, self._backbone.device, timeout=timeout)
        pool.add_remote_executor(decoder, concurrency=self.cores)
        return pool

    def _start_children(self, count: int | None = None) -> SubprocessPool:
        if count is None:
            # Every process takes 0.15 s to start.
            count = min(self.options.decode_workers or self.cores, 16 * available_cores())
        pool = start_pool(
            self._plan,
            workers=count,
            timeout=self.options.video_timeout,
            function=self.decode_job,
        )
        self._pools.append(pool)
        return pool

    @cached_property
    def _store(self) -> FeatureStore:
        return FeatureStore.open(self.options.out, writable=True)

    def describe(self) -> BackboneInfo:
        options = self.options
        sampling = {
            "frames": options.frames,
            "method": "segment centers (TSN); augment: random in each segment",
        }
        decoder = decoder_version(options.decoder)
        if options.frame_rate is not None:
            sampling["frame_rate"] = options.frame_rate
            decoder += f", Pillow {importlib.metadata.version('pillow')}"
        if options.window is not None:
            sampling |= {"window": options.window, "stride": options.stride}
        return BackboneInfo(
            provenance={
                **self._backbone.provenance(),
                "sampling": sampling,
                "views": list(self._views),
                "seed": options.seed,
                "decoder": {"name": options.decoder, "version": decoder},
            },
            frames=options.frames * self._rows_per_clip,
            dim=self._backbone.dim // self._rows_per_clip,
            plan=self._plan,
            frames_per_video=self.frames_per_video,
            description=self._backbone.describe(),
        )

    def check(self, nonce: str, video: str, version: str) -> None:
        """Raise RunError, which names the node, unless this worker has the code of the driver and
        sees the store and the videos."""
        worker = f"the worker on {check_node(version, video)}"
        store = self.options.out
        if not is_remote(store):  # a URL is the same everywhere
            if not Path(store).is_dir():
                raise RunError(
                    f"{worker} does not see the store {store}; put it on storage all nodes share"
                )
            if nonce not in [run.get("nonce") for run in RunLog.records(store)]:
                raise RunError(
                    f"{worker} sees another {store} than this run's; put it on shared storage"
                )
        # Load the backbone here: PyTorch's number of threads is that of the thread that sets it,
        # and `add_decoder` is called in another one.
        assert self._backbone
        assert self._decoder

    @property
    def frames_per_video(self) -> int:
        return len(self._views) * self.options.frames

    def settled(self) -> int:
        """The number of frames, or clips, that the backbone has received or never will.

        May be called during `run`.
        """
        return self._settled

    def add_decoder(self, decode: Callable[[Any], JobResult], *, concurrency: int) -> None:
        """Let another node decode too, until `decode` raises. May be called during `run`."""
        self._children.add_remote_executor(decode, concurrency=concurrency)

    def extract(self, blocks: list[Block]) -> Iterator[list[BlockResult]]:
        """Extract all blocks one after the other, in this process."""
        for block, upcoming in zip(blocks, [*blocks[1:], None], strict=True):
            yield self.run(block, upcoming)
        yield self.drain()

    def run(self, block: Block, upcoming: Block | None = None) -> list[BlockResult]:
        """Extract a block while `upcoming` is decoded. Returns the blocks that were written.

        Its last frames may still wait for the first ones of the next block, so that a GPU is not
        idle between blocks.
        """
        submitted = self._prefetched.pop(block.number, None) or self._submit(block)
        if upcoming is not None:
            self._prefetched[upcoming.number] = self._submit(upcoming)
        with self._discard_on_error():
            self._extract(block, submitted)
        written = self._written()
        self._write_computed()
        return written

    def drain(self) -> list[BlockResult]:
        """Wait for the blocks that are being computed or written, and return them."""
        if self._computing:
            with self._discard_on_error():
                self._batches.finish()
            self._write_computed()
        return self._written()

    @contextmanager
    def _discard_on_error(self) -> Iterator[None]:
        """Drop the blocks that are being computed, because `Batches` drops their frames."""
        try:
            yield
        except BaseException:
            self._computing.clear()
            raise

    def _written(self) -> list[BlockResult]:
        writing, self._writing = self._writing, []
        return [future.result() for future in writing]

    def _write_computed(self) -> None:
        """Start to write the blocks whose features are complete."""
        while self._computing and self._computing[0][0] <= self._batches.completed:
            _, features, shown, result = self._computing.popleft()
            features = np.take_along_axis(features, shown[..., None], axis=1)
            features[result.outcome.status == FAILED] = 0  # some may have failed after a few clips
            width = features.shape[-1] // self._rows_per_clip
            features = features.reshape(len(features), len(self._views), -1, width)
            self._fail_not_finite(features, result.outcome)
            result.seconds["device"] = self._batches.seconds - self._device_seconds
            self._device_seconds = self._batches.seconds
            self._writing.append(self._writer.submit(self._write, features, result))

    def _fail_not_finite(self, features: np.ndarray, outcome: Outcomes) -> None:
        bad = ~np.isfinite(features)
        for row in np.flatnonzero(bad.any(axis=(1, 2, 3))).tolist():
            frames = bad[row].any(axis=2)
            reason = (
                f"features of {frames.sum()} of its {frames.size} frames are not finite in float16 "
                f"(computed in {self._backbone.precision})"
            )
            _fail(outcome, row, reason)
            features[row] = 0

    def close(self) -> None:
        """Stop the children. A block in progress is dropped."""
        if "_batches" in self.__dict__:
            self._batches.discard()
        for pool in reversed(self._pools):
            pool.close()
        self._writer.shutdown()

    def _submit(self, block: Block) -> list[Submitted]:
        plan = self._plan
        # Two workers died: do not decode in the process of a third one (see GpuDecoder).
        if block.failures >= 2 and plan.decoder.startswith("torchcodec-"):
            plan = replace(plan, decoder="pyav")
        return self._decoder.submit(block.videos, plan)

    def _extract(self, block: Block, submitted: list[Submitted]) -> None:
        views, parts, count = len(self._views), self._rows_per_clip, len(block.rows)
        features = np.zeros((count, self.frames_per_video, self._backbone.dim), "<f2")
        shown = np.tile(np.arange(self.frames_per_video), (count, 1))
        outcome = Outcomes.failed(np.array(block.rows), "", views, self.options.frames * parts)
        seconds = {"decode": 0.0, "wait": 0.0, "device": 0.0, "write": 0.0}
        computed = 0
        row_of = {video.id: row for row, video in enumerate(block.videos)}
        for decoded in self._decoder.read(submitted):
            row, prepared, first = row_of[decoded.id], decoded.prepared, decoded.first_clip
            seconds["wait"] += decoded.waited
            seconds["decode"] += decoded.cpu_seconds
            outcome.sources[row] = decoded.source
            if isinstance(prepared, VideoError):
                _fail(outcome, row, prepared.reason)
                self._settled += self.frames_per_video - first * views
                continue
            outcome.status[row] = PARTIAL if prepared.problem else OK
            outcome.errors[row] = "; ".join(filter(None, (prepared.problem, prepared.note)))
            outcome.num_frames[row] = prepared.num_frames
            middles = prepared.middles(parts)
            columns = slice(first * parts, first * parts + middles.shape[1])
            outcome.frame_indices[row, :, columns] = prepared.frame_indices[middles]
            outcome.timestamps[row, :, columns] = prepared.frame_times[middles]
            if self._backbone.clips is None:
                shown[row] = prepared.middles().ravel()
                self._batches.add(decoded.pictures, features[row])
                self._settled += self.frames_per_video
                computed += len(decoded.pictures)
            else:
                self._add_clips(decoded.pictures, prepared.clips, features[row], first)
                computed += prepared.clips.shape[0] * prepared.clips.shape[1]
            self._write_computed()
        node = f"{socket.gethostname()}/{os.getpid()}"
        result = BlockResult(block.number, outcome, node, computed, seconds)
        self._computing.append((self._batches.added, features, shown, result))

    def _add_clips(
        self, pictures: Any, clips: np.ndarray, features: np.ndarray, first: int
    ) -> None:
        """Add clips int [V, T, L] of the pictures, which begin at clip `first` of each view."""
        by_view = features.reshape(len(clips), -1, features.shape[-1])
        for view_clips, view_features in zip(clips, by_view, strict=True):
            for number, clip in enumerate(view_clips, first):  # copies one clip at a time
                self._batches.add(pictures[clip][None], view_features[number][None])
                self._settled += 1

    def _write(self, features: np.ndarray, result: BlockResult) -> BlockResult:
        started = time.perf_counter()
        self._store.write_block(result.number, features, result.outcome.rows)
        result.seconds["write"] = time.perf_counter() - started
        return result


def _fail(outcome: Outcomes, row: int, reason: str) -> None:
    """Enter a failure, and erase what was entered for the row before."""
    outcome.status[row], outcome.errors[row], outcome.num_frames[row] = FAILED, reason, 0
    outcome.frame_indices[row], outcome.timestamps[row] = -1, np.nan
