"""python -m pipelines.predict clip.mp4: classify videos with a trained model, and show its
attention or a timeline of a long video.

    checkpoint -> its backbone -> frames in batches, while the next are decoded -> features
                               -> for each window: aggregator, classifier -> top 5
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import Annotated, NamedTuple, TextIO

import numpy as np
import tyro

from extract import InputError, Record
from extract.cli import check_ranges, run_as_script
from extract.durable import replace_file
from pipelines.predictor import Prediction, Predictor, Window

TOP = 5
EVEN = 1.2  # attention is called even if no frame has more than this many even shares


@dataclass(frozen=True)
class Options:
    """Print the five likeliest classes of each video; optionally its attention over time, or the
    windows of a long video.

    The exit status is 3 if a video could not be decoded; the others are classified anyway.
    """

    videos: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Videos of any length, or folders of them."""
    checkpoint: Path
    """A best.pt of aggregate.train or aggregate.finetune."""
    weights: Path | None = None
    """The backbone's weights, if the checkpoint records a file of your own (its SHA-256 is
    checked)."""
    segments: int | None = None
    """Frames that the model sees of a video or window (default: 25; as many as in training if it
    sees their order)."""
    window: float | None = None
    """Classify the video in windows of N seconds, for a timeline; windows are those of python -m
    extract --window."""
    stride: float | None = None
    """Seconds from one window to the next (default: the window)."""
    picture: Path | None = None
    """A folder for a PNG of each video, which shows its frames with their weights for each group,
    or with windows the timeline."""
    json: str | None = None
    """A file for all results as JSON. With - they go to standard output, and the tables to standard
    error."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    precision: str = "auto"
    """fp32, bf16, fp16, or auto: fp16 on a GPU; on a CPU bf16 if it computes in it, else fp32."""
    video_timeout: float = 60.0
    """Seconds after which the decoding of a video is given up, plus one second per 2 MB of its
    file."""


# -- text and pictures ---------------------------------------------------------------------------


def top_classes(
    window: Window, classes: Sequence[str], count: int = TOP
) -> list[tuple[str, float]]:
    """The likeliest classes and their probabilities, the likeliest first."""
    # scipy's softmax takes 0.2 s to import.
    exponentials = np.exp(window.logits.astype(np.float64) - window.logits.max())
    scores = exponentials / exponentials.sum()
    best = np.argsort(-scores, kind="stable")[:count].tolist()
    return [(classes[label], float(scores[label])) for label in best]


def table(prediction: Prediction, classes: Sequence[str], window: float | None = None) -> str:
    """A video's top 5, or its timeline, as text."""
    first = prediction.windows[0]
    seen = f"{first.num_frames:,} frames, {len(first.indices)} seen"
    if window is not None:
        seen = f"{len(prediction.windows)} windows of {window:g} s"
    lines = [f"{prediction.path}: {prediction.seconds:.1f} s, {seen}"]
    if prediction.problem:
        lines.append(f"  only partly readable: {prediction.problem}")
    if window is None:
        lines += [f"  {score:6.1%}  {name}" for name, score in top_classes(first, classes)]
        return "\n".join(lines)
    for run in timeline(prediction, classes):
        times = f"{_clock(run.start):>7} - {_clock(run.end):>7}"
        joined = f"  ({run.num_windows} windows)" if run.num_windows > 1 else ""
        lines.append(f"  {times}  {run.score:6.1%}  {run.name}{joined}")
    return "\n".join(lines)


class Run(NamedTuple):
    """Consecutive windows with the same likeliest class, and its mean probability."""

    start: float
    end: float
    name: str
    score: float
    num_windows: int


def timeline(prediction: Prediction, classes: Sequence[str]) -> list[Run]:
    """The runs of windows of a video. If windows overlap, a run ends where the next one starts."""
    best = [(*top_classes(window, classes, 1)[0], window) for window in prediction.windows]
    runs = []
    for name, group in groupby(best, key=lambda named: named[0]):
        _, scores, windows = zip(*group, strict=True)
        score = float(np.mean(scores))
        runs.append(Run(windows[0].start, windows[-1].end, name, score, len(windows)))
    cut = [run._replace(end=min(run.end, after.start)) for run, after in pairwise(runs)]
    return [*cut, runs[-1]]


def as_json(prediction: Prediction, classes: Sequence[str]) -> Record:
    """A video as plain values."""
    windows = [
        {
            "start": round(window.start, 3),
            "end": round(window.end, 3),
            "num_frames": window.num_frames,
            "top": [
                {"label": name, "score": score} for name, score in top_classes(window, classes)
            ],
            "frames": window.indices.tolist(),
            "seconds": [round(float(time), 3) for time in window.times],
            "weights": None if window.weights is None else window.weights.tolist(),
        }
        for window in prediction.windows
    ]
    return {
        "video": prediction.path,
        "seconds": round(prediction.seconds, 3),
        "problem": prediction.problem,
        "windows": windows,
    }


def _clock(seconds: float) -> str:
    """`1:02:03.4`, with hours only if there are any."""
    minutes, tenths = divmod(round(seconds * 10), 600)
    hours, minutes = divmod(minutes, 60)
    return f"{f'{hours}:{minutes:02}' if hours else minutes}:{tenths / 10:04.1f}"


def attention_picture(prediction: Prediction, classes: Sequence[str]) -> bytes:
    """PNG: thumbnails over each frame's share of each group's weights, for at most as many frames
    as a filmstrip holds."""
    from aggregate import figures

    whole = prediction.windows[0]
    assert whole.weights is not None
    pictures = list(prediction.crops[figures.film_indices(len(whole.indices))])
    moments = [f"{time:.1f} s" for time in whole.times]
    title = picture_title(prediction, classes)
    return figures.png(figures.filmstrip(pictures, whole.weights, moments, title))


def picture_title(prediction: Prediction, classes: Sequence[str]) -> str:
    """The title: the video, its likeliest classes, the scale of the blue, and whether attention
    prefers any frame."""
    from aggregate import figures

    whole = prediction.windows[0]
    assert whole.weights is not None
    shares = np.nan_to_num(figures.shares_of(whole.weights))
    even, largest = 1 / shares.shape[-1], shares.max()
    likely = ", ".join(f"{name} {score:.0%}" for name, score in top_classes(whole, classes, 3))
    scale = (
        f"Blue: a frame's share of its group's attention, white 0 %, dark {largest:.1%}; "
        f"an even share is {even:.1%}."
    )
    if largest < EVEN * even:
        scale += " Attention is even: no frame is preferred."
    return f"{Path(prediction.path).name}: {likely}\n{scale}"


def timeline_picture(prediction: Prediction, classes: Sequence[str]) -> bytes:
    """PNG: the likeliest class along the video."""
    from aggregate import figures

    runs = [run[:4] for run in timeline(prediction, classes)]
    return figures.png(figures.timeline(runs, seconds=prediction.seconds))


# -- the command ---------------------------------------------------------------------------------


def main(options: Options) -> int:
    from aggregate.training.checkpoint import Checkpoint
    from extract.decode import VideoError

    _check_options(options)
    checkpoint = Checkpoint.load(options.checkpoint)
    if options.picture is not None:
        _check_picture(options, checkpoint.options["name"])
    screen: TextIO = sys.stderr if options.json == "-" else sys.stdout
    segments = options.segments
    if segments is None:
        (segments,) = checkpoint.usual_segments((25,), partial(print, file=screen))
    paths = videos_of(options.videos)
    predictor = Predictor(
        checkpoint,
        segments=segments,
        weights=options.weights,
        device=options.device,
        precision=options.precision,
        video_timeout=options.video_timeout,
    )
    print(predictor.description, file=screen)
    answers: list[Record] = []
    num_failed, names = 0, Counter[str]()
    for path in paths:
        try:
            prediction = predictor(path, window=options.window, stride=options.stride)
        except VideoError as error:
            num_failed += 1
            print(f"failed: {error}", file=sys.stderr)
            answers.append({"video": os.fspath(path), "error": error.reason})
            continue
        print(table(prediction, predictor.classes, options.window), file=screen, flush=True)
        answers.append(as_json(prediction, predictor.classes))
        if options.picture is not None:
            names[path.stem] += 1
            number = f"-{names[path.stem]}" if names[path.stem] > 1 else ""
            file = options.picture / f"{path.stem}{number}.png"
            draw = timeline_picture if options.window else attention_picture
            replace_file(file, draw(prediction, predictor.classes))
            print(f"  picture: {file}", file=screen)
    if options.json is not None:
        record = {
            "checkpoint": options.checkpoint.name,
            "model": checkpoint.options["name"],
            "videos": answers,
        }
        text = json.dumps(record, ensure_ascii=False, allow_nan=False, indent=1)
        if options.json == "-":
            print(text)
        else:
            replace_file(options.json, text + "\n")
    if num_failed:
        print(f"{num_failed} of {len(paths)} videos could not be decoded", file=sys.stderr)
    return 3 if num_failed else 0


def videos_of(paths: Sequence[Path]) -> list[Path]:
    """The given videos, and those that extraction would find in the given folders."""
    from extract.listing.videos import list_videos

    videos: list[Path] = []
    for path in paths:
        if path.is_dir():
            videos += [Path(video.path) for video in list_videos(str(path)).videos]
        else:
            videos.append(path)
    return videos


def _check_options(options: Options) -> None:
    if not options.videos:
        raise InputError("no video is given")
    check_ranges(options)
    if options.stride is not None and options.window is None:
        raise InputError(
            f"--stride {options.stride:g} is from one window to the next; give --window too"
        )


def _check_picture(options: Options, model: str) -> None:
    """Raise InputError before the work starts if there is nothing to draw, or no matplotlib."""
    from aggregate.models import ATTENTION_AGGREGATORS

    assert options.picture is not None
    if options.window is None and model not in ATTENTION_AGGREGATORS:
        raise InputError(
            f"--picture: {model} has no weight per frame to show, "
            f"as {', '.join(ATTENTION_AGGREGATORS)} have; with --window it is a timeline"
        )
    from aggregate import figures  # noqa: F401  # InputError without matplotlib

    options.picture.mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    run_as_script()
