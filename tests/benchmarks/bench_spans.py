"""Windows of a long file against one pass over it: CPU time of 360 windows of an hour, as a decode
child gets them.

The file holds an hour of H.264 (real pictures, x264's defaults, a key frame every 250 frames), with
25 frames per window of 10 s. The contenders follow each other in one process: one `decode` of all
9,000 frames in one pass; the 360 windows in the jobs of `make_jobs`; the first 36 windows, each as
a job of its own; and plain PyAV, which decodes every frame of these and converts the selected ones
to RGB. The asserted ratio is that of jobs to one pass. Peak memory is that of a separate child.

Run: `python -m pytest -s tests/benchmarks/bench_spans.py`
"""

import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

from extract.decode import decode
from extract.decode.jobs import Plan, decode_job
from extract.decode.transform import Preprocessing, resize_frame
from extract.listing.videos import Video
from extract.listing.windows import window_spans
from extract.sampling import segment_centers
from extract.workers.rows import make_jobs
from videos import write_repeated, x264_defaults

SECONDS, WINDOW, FRAMES = 3600, 10.0, 25
SEE = Preprocessing(224, 256, "bicubic", (0.5,) * 3, (0.5,) * 3)
PLAN = Plan(FRAMES, 1, 0, SEE, 0, "pyav")
CLIP = Path(__file__).parents[3] / "shared" / "clips" / "kinetics_like" / "mmaction2_demo.mp4"


@pytest.fixture(scope="module")
def hour(tmp_path_factory) -> Path:
    if not CLIP.exists():
        pytest.skip(f"needs {CLIP.name}, which is not shipped")
    folder = tmp_path_factory.mktemp("hour")
    clip = x264_defaults(CLIP, folder / "clip.mp4")
    with av.open(str(clip)) as container:
        length = container.duration / av.time_base
    return write_repeated(folder / "hour.mp4", clip, round(SECONDS / length))


def in_jobs(path: str, spans: list[tuple[float, float]], plan: Plan = PLAN) -> int:
    out = np.zeros(plan.slot_bytes, np.uint8)
    jobs = make_jobs([Video("id", path, -1, span=span) for span in spans], plan)
    return sum(len(decode_job(job, out)) for job in jobs)


def one_by_one(path: str, spans: list[tuple[float, float]]) -> int:
    out = np.zeros(PLAN.slot_bytes, np.uint8)
    return sum(len(decode_job((path, [("id", span)], PLAN), out)) for span in spans)


def one_pass(path: str, spans: list[tuple[float, float]]) -> int:
    """All frames of all windows in one `decode`. Each frame is reduced to one number, since 9,000
    would not fit into memory."""

    def sample(count: int) -> np.ndarray:
        times = np.arange(count) * (SECONDS / count)  # at a constant rate
        places = (np.searchsorted(times, span) for span in spans)
        return np.concatenate(
            [first + segment_centers(stop - first, FRAMES) for first, stop in places]
        )

    def shrink(frame: np.ndarray) -> np.ndarray:
        return resize_frame(frame, SEE)[16:240, 16:240][:1, :1].copy()

    return len(decode(path, sample, resize=shrink).frames) // FRAMES


def everything(path: str, spans: list[tuple[float, float]]) -> int:
    taken = 0
    with av.open(path) as container:
        container.streams.video[0].thread_count = 1
        for frame in container.decode(video=0):
            if frame.time >= spans[-1][1]:
                break
            if frame.time >= taken * WINDOW / FRAMES:
                resize_frame(frame.to_ndarray(format="rgb24"), SEE)
                taken += 1
    return round(taken / FRAMES)


def test_windows_of_an_hour_cost_what_one_pass_costs(hour):
    spans = window_spans(SECONDS, WINDOW, WINDOW)
    contenders = {
        "one pass": (one_pass, 360),
        "in jobs": (in_jobs, 360),
        "one by one": (one_by_one, 36),
    }
    seconds = {}
    print(f"\n{len(spans)} windows of {hour.stat().st_size / 1e6:.0f} MB, CPU ms a window:")
    for name, (run, count) in (contenders | {"all decoded": (everything, 36)}).items():
        started = time.process_time()
        assert run(str(hour), spans[:count]) == count
        seconds[name] = (time.process_time() - started) / count
        print(
            f"  {name:<12}{1000 * seconds[name]:8.1f}  {seconds[name] / seconds['one pass']:.2f}",
            flush=True,
        )
    assert seconds["in jobs"] <= 1.3 * seconds["one pass"]


def peak(path: Path, spans: int) -> float:
    """Peak memory (MB) of a separate process for the first windows of a file."""
    program = (
        "import sys; sys.path[:0] = ['tests', 'tests/benchmarks']\n"
        "from bench_spans import in_jobs, WINDOW\n"
        "from extract.listing.windows import window_spans\n"
        "in_jobs(sys.argv[1], window_spans(float(sys.argv[2]) * WINDOW, WINDOW, WINDOW))\n"
        "print(*[line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')])\n"
    )
    run = subprocess.run(
        [sys.executable, "-c", program, str(path), str(spans)], capture_output=True, text=True
    )
    assert not run.returncode, run.stderr
    return int(run.stdout.split()[-1]) / 1024


def test_memory_does_not_grow_with_the_hour(hour, tmp_path):
    short = write_repeated(tmp_path / "short.mp4", hour.parent / "clip.mp4", 18)
    few, many = peak(short, 16), peak(hour, 64)
    print(
        f"\npeak of a decode child: {few:.0f} MB for windows of 3 minutes, {many:.0f} MB for those of an hour"
    )
    assert many < few + 100
