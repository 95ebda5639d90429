"""Clips of a long file against one pass over it: `--fps 4`, 16 frames per clip, 10 minutes.

The file holds 10 minutes of H.264 (real pictures, x264's defaults, a key frame every 250 frames). A
window shows 25 instants at 4 per second, and each instant gets a clip of 16 frames at 15 per second
(torchvision's r3d_18). One process does the work of a decode child and a worker: the jobs of
`make_jobs`, further jobs for clips that do not fit into a buffer, and the copy of each clip out of
the buffer.

The contender is one pass in which every frame of a clip is decoded and resized once. The time of
the backbone alone is measured on some clips and multiplied by their number. All times are CPU
seconds of this process. The asserted ratio is that of jobs and backbone to one pass and backbone.

Run: `python -m pytest -s tests/benchmarks/bench_clips.py`
"""

import time
from pathlib import Path

import av
import numpy as np
import pytest

from extract.backbone.frozen import load_backbone
from extract.decode import decode
from extract.decode.jobs import Plan, decode_job, remaining_jobs
from extract.decode.transform import resize_frame
from extract.listing.videos import Video
from extract.listing.windows import window_spans
from extract.workers.rows import make_jobs
from videos import write_repeated, x264_defaults

SECONDS, FPS, FRAMES = 600, 4.0, 25
CLIP = Path(__file__).parents[3] / "shared" / "clips" / "kinetics_like" / "mmaction2_demo.mp4"
CLIPS_MEASURED = 8


def make_file(folder: Path) -> Path:
    clip = x264_defaults(CLIP, folder / "clip.mp4")
    with av.open(str(clip)) as container:
        length = container.duration / av.time_base
    return write_repeated(folder / "long.mp4", clip, round(SECONDS / length))


def cpu_seconds(function, *arguments) -> tuple[float, object]:
    started = time.process_time()
    result = function(*arguments)
    return time.process_time() - started, result


def in_jobs(path: str, spans: list[tuple[float, float]], plan: Plan) -> dict[str, int]:
    counts = {"jobs": 0, "pictures": 0, "distinct": 0, "clips": 0}
    out = np.zeros(plan.slot_bytes, np.uint8)
    videos = [Video(str(number), path, -1, span=span) for number, span in enumerate(spans)]
    jobs = make_jobs(videos, plan)
    shown: set[int] = set()
    while jobs:
        job = jobs.pop(0)
        counts["jobs"] += 1
        results = decode_job(job, out)
        jobs = remaining_jobs(job, results) + jobs
        for prepared in filter(None, results):
            pictures = prepared.pictures(out, plan)
            for clip in prepared.clips[0]:
                pictures[clip].copy()
            shown.update(prepared.frame_indices.tolist())
            counts["pictures"] += len(pictures)
            counts["clips"] += prepared.clips.shape[1]
    return counts | {"distinct": len(shown)}


def one_pass(path: str, wanted: np.ndarray, plan: Plan) -> None:
    see = plan.preprocessing
    decode(path, lambda count: wanted, resize=lambda frame: resize_frame(frame, see)[:1, :1].copy())


def shown_frames(path: str, spans: list[tuple[float, float]], plan: Plan) -> np.ndarray:
    out = np.zeros(plan.slot_bytes, np.uint8)
    frames = [decode_job((path, [("0", span)], plan), out)[0].frame_indices for span in spans]
    return np.unique(np.concatenate(frames))


def test_clips_cost_one_pass_and_the_backbone(tmp_path: Path) -> None:
    if not CLIP.exists():
        pytest.skip(f"needs {CLIP.name}, which is not shipped")
    path = str(make_file(tmp_path))
    backbone = load_backbone("torchvision/r3d_18", weights="random", device="cpu")
    plan = Plan(FRAMES, 1, 0, backbone.preprocessing, **backbone.clip_options)
    with av.open(path) as container:
        spans = window_spans(container.duration / av.time_base, FRAMES / FPS, FRAMES / FPS)
    wanted = shown_frames(path, spans, plan)
    jobs, counts = cpu_seconds(in_jobs, path, spans, plan)
    alone, _ = cpu_seconds(one_pass, path, wanted, plan)
    noise = np.random.default_rng(0).integers(
        0, 256, (CLIPS_MEASURED, *backbone.input_shape), dtype=np.uint8
    )
    backbone(noise)
    few, _ = cpu_seconds(backbone, noise)
    computing = few / CLIPS_MEASURED * counts["clips"]
    ratio = (jobs + computing) / (alone + computing)
    print(f"\n{counts}, {len(wanted)} frames are shown in clips")
    print(
        f"CPU s: jobs {jobs:.1f}, one pass {alone:.1f} ({jobs / alone:.2f}), backbone {computing:.0f}: {ratio:.3f}"
    )
    assert counts["clips"] == FRAMES * len(spans)
    assert counts["pictures"] == counts["distinct"] == len(wanted)
    assert ratio < 1.15
