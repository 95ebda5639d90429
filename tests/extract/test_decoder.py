"""A remote decoder without Ray: it gives the same frames as local decoding, and a node that differs
is named."""

import numpy as np
import pytest

from extract import RunError
from extract.decode.jobs import Plan, decode_job
from extract.decode.transform import Preprocessing
from extract.options import Options
from extract.workers.decoder import Decoder, code_version

PLAN = Plan(3, 1, 0, Preprocessing(32, 36, "bilinear", (0.5,) * 3, (0.5,) * 3), 0, "pyav")


def test_the_same_frames_as_here_and_no_byte_more(demo_clips, tmp_path):
    clip = str(min((demo_clips / "exercise_mini").rglob("*.mp4")))
    job = (clip, [("a.mp4", None)], PLAN)
    decoder = Decoder(Options(tmp_path, "feats.zarr"), decode_job, PLAN, 1)
    try:
        decoder.check(clip, code_version())
        done = decoder.decode(job)
        (prepared,) = done.result
        assert done.failure == ""
        assert done.cpu_seconds > 0
        expected = np.zeros(PLAN.slot_bytes, np.uint8)
        (here,) = decode_job(job, expected)
        np.testing.assert_array_equal(done.buffer, expected[: PLAN.row_bytes])
        np.testing.assert_array_equal(prepared.indices, here.indices)
        gone = decoder.decode((str(tmp_path / "b.mp4"), [("b.mp4", None)], PLAN))
        assert "does not exist" in (gone.failure or gone.result[0].reason)
        with pytest.raises(
            RunError, match=r"has hgnl-video \S+ \(sources \w+\), the driver 0\.0\.9"
        ):
            decoder.check(clip, "0.0.9")
        with pytest.raises(RunError, match=r"cannot read the videos: .*b\.mp4"):
            decoder.check(str(tmp_path / "b.mp4"), code_version())
    finally:
        decoder._pool.close()
