"""Which frames an int8 network is calibrated on: a seeded sample of the videos that are
extracted."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from extract import InputError
from extract.decode import VideoError
from extract.decode.jobs import Plan
from extract.decode.pool import SubprocessPool
from extract.decode.transform import Preprocessing
from extract.listing.videos import Video
from extract.store import FeatureStore

if TYPE_CHECKING:
    from extract.backbone.quantized import Calibration

VIDEOS, HELD_OUT, FRAMES = (
    40,
    0.2,
    120,
)  # at most; the share of videos to measure the error on; in all of them


@dataclass(frozen=True)
class CalibrationSample:
    """Videos drawn from the first `of` rows of a store; the last ones are held out."""

    videos: tuple[Video, ...]
    of: int
    seed: int

    def plan(self, preprocessing: Preprocessing) -> Plan:
        return Plan(-(-FRAMES // len(self.videos)), 1, 0, preprocessing)

    def decode(self, pool: SubprocessPool, plan: Plan) -> "Calibration":
        """The frames of those that can be read, in the order of the sample."""
        from extract.backbone.quantized import Calibration

        jobs = [(video.path, [(video.id, video.span)], plan) for video in self.videos]
        pictures = []
        for future in [pool.submit(job) for job in jobs]:
            with future.result() as finished:
                (prepared,) = finished.result or (VideoError("", finished.failure),)
                if not isinstance(prepared, VideoError):
                    distinct = finished.buffer[: plan.row_bytes].reshape(
                        plan.frames, *plan.shape[3:]
                    )
                    pictures.append(distinct[: len(prepared.frame_indices)].copy())
        held_out = max(1, round(HELD_OUT * len(pictures)))
        nothing = [np.empty((0, *plan.shape[3:]), np.uint8)]
        frames = np.concatenate(nothing + pictures[:-held_out])
        others = np.concatenate(nothing + pictures[-held_out:])
        names = "\n".join(video.id for video in self.videos)
        digest = hashlib.sha256(names.encode()).hexdigest()[:16]
        record = {
            "seed": self.seed,
            "videos": len(self.videos),
            "of": self.of,
            "ids_sha256": digest,
        }
        return Calibration(frames, others, record)


def choose_sample(
    videos: Sequence[Video], store: FeatureStore | None, *, seed: int
) -> CalibrationSample:
    """Drawn anew for a new store, and for one that is continued from the rows that it was drawn
    from.

    Raises InputError for fewer than two videos, and for one that is no longer there.
    """
    recorded = store.provenance.get("quantization") if store is not None else None
    ids = [video.id for video in videos]
    if store is not None and recorded is not None:
        ids = store.ids[: recorded["of"]].tolist()
    if len(ids) < 2:
        raise InputError(
            f"--precision int8 is calibrated on at least 2 videos, here is {len(ids)}; use bf16 or fp32"
        )
    by_id = {video.id: video for video in videos}
    drawn = [ids[row] for row in np.random.default_rng(seed).permutation(len(ids))[:VIDEOS]]
    gone = [name for name in drawn if name not in by_id]
    if gone:
        raise InputError(
            f"{gone[0]!r}, which the store's int8 network was calibrated on, is not among --videos"
        )
    return CalibrationSample(tuple(by_id[name] for name in drawn), len(ids), seed)
