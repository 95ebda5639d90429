"""Videos that this package writes are read back frame by frame."""

import numpy as np
import pytest

from extract.decode import decode, write_video


def shades(count: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Frames of one gray each, different enough to be recognized after coding."""
    return np.repeat(np.linspace(20, 235, count).astype(np.uint8), height * width * 3).reshape(
        count, height, width, 3
    )


def test_what_was_written_is_read_in_order_and_at_its_rate(tmp_path):
    frames = shades(12)
    write_video(tmp_path / "new" / "a.mp4", iter(frames), rate=8)
    read = decode(tmp_path / "new" / "a.mp4", np.arange)
    assert read.num_frames == 12
    assert read.problem == ""
    assert read.frames.shape == frames.shape
    assert np.abs(read.frames.astype(int) - frames).max() <= 6
    np.testing.assert_allclose(read.timestamps, np.arange(12) / 8, atol=1e-4)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.mp4"]


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "got no frame"),
        (shades(2, 31), r"got a frame \(31, 48, 3\)"),
        ([*shades(1), *shades(1, 34)], r"\(34, 48, 3\) after \(32, 48, 3\)"),
    ],
)
def test_frames_that_make_no_video_are_refused_and_leave_nothing(tmp_path, frames, message):
    with pytest.raises(ValueError, match=message):
        write_video(tmp_path / "a.mp4", frames, rate=8)
    assert not list(tmp_path.iterdir())
