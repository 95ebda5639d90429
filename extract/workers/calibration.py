"""Choose and decode the frames that an int8 network is calibrated on."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from extract import InputError
from extract.decode.jobs import Plan
from extract.decode.transform import Preprocessing
from extract.listing.videos import Video
from extract.store import FeatureStore
from extract.workers.rows import RowDecoder

if TYPE_CHECKING:
    from extract.backbone.quantized import Calibration

MAX_VIDEOS, MAX_FRAMES = 40, 120
HELD_OUT = 0.2  # of the videos, to measure the error on


@dataclass(frozen=True)
class CalibrationSample:
    """Videos drawn from the first `num_rows` rows of a store. The last ones are held out."""

    videos: tuple[Video, ...]
    num_rows: int
    seed: int

    def decode(
        self, preprocessing: Preprocessing, *, frame_rate: float | None, **settings: Any
    ) -> "Calibration":
        """The frames of the videos that can be read, in the order of the sample.

        settings: of the decoding processes.
        """
        from extract.backbone.quantized import Calibration

        frames_per_video = math.ceil(MAX_FRAMES / len(self.videos))
        plan = Plan(frames_per_video, 1, 0, preprocessing, frame_rate=frame_rate)
        with RowDecoder.start(plan, **settings) as decoder:
            rows = decoder.read(decoder.submit(self.videos, plan))
            pictures = [row.pictures.copy() for row in rows if row.pictures is not None]
        num_held_out = max(1, round(HELD_OUT * len(pictures)))
        nothing = [np.empty((0, *plan.shape[3:]), np.uint8)]
        frames = np.concatenate(nothing + pictures[:-num_held_out])
        held_out = np.concatenate(nothing + pictures[-num_held_out:])
        names = "\n".join(video.id for video in self.videos)
        record = {
            "seed": self.seed,
            "videos": len(self.videos),
            "of": self.num_rows,
            "ids_sha256": hashlib.sha256(names.encode()).hexdigest()[:16],
        }
        return Calibration(frames, held_out, record)


def choose_sample(
    videos: Sequence[Video], store: FeatureStore | None, *, seed: int
) -> CalibrationSample:
    """Draw a sample of the videos; for a store that is continued, the same as before.

    Raises InputError if there are fewer than two videos, or if one of the sample is missing.
    """
    recorded = store.provenance.get("quantization") if store is not None else None
    ids = [video.id for video in videos]
    if store is not None and recorded is not None:
        ids = store.ids[: recorded["of"]].tolist()
    if len(ids) < 2:
        raise InputError(
            f"--precision int8 is calibrated on at least 2 videos, here is {len(ids)}; use bf16 or "
            "fp32"
        )
    by_id = {video.id: video for video in videos}
    order = np.random.default_rng(seed).permutation(len(ids))
    drawn = [ids[row] for row in order[:MAX_VIDEOS]]
    for name in drawn:
        if name not in by_id:
            raise InputError(
                f"{name!r}, which the store's int8 network was calibrated on, is not among --videos"
            )
    return CalibrationSample(tuple(by_id[name] for name in drawn), len(ids), seed)
