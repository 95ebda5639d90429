"""Clips around sampled frames: chosen by time, each frame decoded and handed over once, in limited
memory."""

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest

from extract.decode import Span, VideoError
from extract.decode.jobs import Plan, Prepared, decode_job, remaining_jobs
from extract.decode.transform import Preprocessing, crop_boxes, cut, resize_frame
from extract.sampling import segment_centers

SEE = Preprocessing(32, 40, "bilinear", (0.5,) * 3, (0.5,) * 3)
CLIPS = ["h264_long_gop.mp4", "h264_vfr.mp4", "h264_portrait.mp4", "h264_1frame.mp4"]
SPANS: list[Span | None] = [None, (0.2, 1.1), (0.5, 0.9)]


def plan_of(frames: int = 5, length: int = 6, fps: float = 7.5, **changes) -> Plan:
    return Plan(frames, 1, 0, SEE, clip_length=length, clip_fps=fps, **changes)


def whole_video(path: Path) -> tuple[list[np.ndarray], np.ndarray]:
    """Every frame as the backbone sees it, and its time in seconds, by plain PyAV."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
    times = np.array([float(frame.time - frames[0].time) for frame in frames])
    prepared = []
    for frame in frames:
        resized = resize_frame(frame.to_ndarray(format="rgb24"), SEE)
        [(box, _)] = crop_boxes(*resized.shape[:2], SEE, 1)
        prepared.append(cut(resized[None], box)[0])
    return prepared, times


def shown_at(times: np.ndarray, instant: float, first: int, stop: int) -> int:
    """The last frame of [first, stop) that is shown no later than an instant, or else the first
    one."""
    shown = [number for number in range(first, stop) if times[number] <= instant + 1e-6]
    return shown[-1] if shown else first


def expected_clips(times: np.ndarray, span: Span | None, plan: Plan) -> list[list[int]]:
    inside = [k for k, time in enumerate(times) if span is None or span[0] <= time < span[1]]
    first, stop = inside[0], inside[-1] + 1
    middles = first + segment_centers(len(inside), plan.frames)
    offsets = [(k - (plan.clip_length - 1) // 2) / plan.clip_fps for k in range(plan.clip_length)]
    return [
        [shown_at(times, times[middle] + offset, first, stop) for offset in offsets]
        for middle in middles
    ]


def parts_of(
    path: Path, spans: list, plan: Plan, room: int
) -> Iterator[tuple[str, int, Prepared | VideoError, object]]:
    """All parts of the rows, as a worker gets them from buffers of `room` pictures."""
    jobs = [(str(path), [(str(number), span) for number, span in enumerate(spans)], plan)]
    while jobs:
        job = jobs.pop(0)
        out = np.zeros(room * 32 * 32 * 3, np.uint8)
        results = decode_job(job, out)
        jobs = remaining_jobs(job, results) + jobs
        for (name, _), prepared in zip(job[1], results, strict=True):
            if prepared is not None:
                pictures = (
                    None if isinstance(prepared, VideoError) else prepared.pictures(out, job[2])
                )
                yield name, job[2].first_clip, prepared, pictures


@pytest.mark.parametrize("name", CLIPS)
@pytest.mark.parametrize("room", [1000, 40, 6])
@pytest.mark.parametrize(("length", "fps"), [(6, 7.5), (3, 60.0), (1, 10.0), (4, 0.5)])
def test_clips_are_what_decoding_everything_and_choosing_by_time_gives(
    name, room, length, fps, codec_clips
) -> None:
    path, plan = codec_clips / name, plan_of(length=length, fps=fps)
    frames, times = whole_video(path)
    spans = [
        span for span in SPANS if span is None or ((times >= span[0]) & (times < span[1])).any()
    ]
    seen: dict[str, list[int]] = {str(number): [] for number in range(len(spans))}
    for row, first, prepared, pictures in parts_of(path, spans, plan, room):
        expected = expected_clips(times, spans[int(row)], plan)
        assert len(seen[row]) == first
        assert len(pictures) <= room
        assert len(np.unique(prepared.frame_indices)) == len(
            prepared.frame_indices
        )  # each is handed over once
        for number, clip in enumerate(prepared.clips[0], first):
            assert prepared.frame_indices[clip].tolist() == expected[number]
            for picture, frame in zip(pictures[clip], expected[number], strict=True):
                assert np.array_equal(picture, frames[frame])
            seen[row].append(number)
        middles = [
            clip[(length - 1) // 2] for clip in expected[first : first + prepared.clips.shape[1]]
        ]
        assert prepared.indices[0].tolist() == middles
    assert all(numbers == list(range(plan.frames)) for numbers in seen.values())


def test_the_middle_frame_is_the_one_that_is_sampled_without_clips(codec_clips) -> None:
    path = codec_clips / "h264_long_gop.mp4"
    [(_, _, clips, _)] = parts_of(path, [None], plan_of(), 1000)
    plain = replace(plan_of(), clip_length=1, clip_fps=None)
    [frames] = decode_job((str(path), [("0", None)], plain), np.zeros(plain.slot_bytes, np.uint8))
    assert np.array_equal(clips.indices, frames.indices)
    assert np.array_equal(clips.timestamps, frames.timestamps)


def test_parts_of_a_clip_are_equal_and_have_their_own_middles(codec_clips) -> None:
    [(_, _, prepared, _)] = parts_of(
        codec_clips / "h264_long_gop.mp4", [None], plan_of(length=6), 1000
    )
    positions = prepared.clips[0][:, [0, 2, 4]].ravel()  # 0 1 | 2 3 | 4 5
    assert prepared.middles(3)[0].tolist() == positions.tolist()
    assert prepared.middles(1)[0].tolist() == prepared.clips[0][:, 2].tolist()


def test_augmented_passes_of_clips_do_not_depend_on_the_buffer(codec_clips) -> None:
    plan = replace(plan_of(frames=4, length=3), crops=3, augment_passes=2)
    clips = {}
    for room in (1000, 15):
        views = [[] for _ in range(plan.num_views)]
        for _, _, prepared, pictures in parts_of(
            codec_clips / "h264_long_gop.mp4", [None], plan, room
        ):
            for view, of_view in enumerate(prepared.clips):
                views[view] += [pictures[clip] for clip in of_view]
        clips[room] = np.array(views)
    assert clips[1000].shape == (5, 4, 3, 32, 32, 3)
    assert np.array_equal(clips[1000], clips[15])
    assert not np.array_equal(clips[1000][3], clips[1000][4])  # two random passes


def test_an_unreadable_video_fails_whole(broken_clips) -> None:
    [(_, _, failed, _)] = parts_of(broken_clips / "zero_bytes.mp4", [None], plan_of(), 1000)
    assert isinstance(failed, VideoError)


def test_long_clips_have_a_bounded_buffer() -> None:
    """Without a limit, 128 frames of 224 x 224 around each of 25 instants need 482 MB in each of
    the four slots of each child."""
    see = replace(SEE, size=224, resize=256)
    plan = Plan(25, 1, 0, see, clip_length=128, clip_fps=15.0)
    assert plan.row_bytes > 400e6
    assert plan.slot_bytes == 64 << 20
    assert replace(plan, clip_length=600).slot_bytes == 600 * 224 * 224 * 3  # one clip, at least
