"""python -m pipelines.predict clip.mp4: what a trained model sees in videos, its attention, a
timeline of a long one.

checkpoint -> the backbone it records -> frames in batches, while the next ones are decoded -> features
                                                each window's features -> aggregator, classifier -> top 5
"""

import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Annotated, Any, TextIO

import numpy as np
import tyro

from extract import InputError
from extract.cli import check_ranges, run_command
from extract.durable import replace_file
from pipelines.predictor import WEIGHING, Prediction, Predictor, Window

TOP = 5
EVEN = 1.2  # attention is called even if no frame has more than this many times its even share


@dataclass(frozen=True)
class Options:
    """The five likeliest classes of each video; on request the attention over time, and windows of
    a long video.

    Exit status 3 where a video could not be decoded; the others are answered all the same.
    """

    videos: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """Videos of any length, or folders of them."""
    checkpoint: Path
    """A best.pt of aggregate.train or aggregate.finetune."""
    weights: Path | None = None
    """The backbone's weights, where the checkpoint records a file of one's own (its SHA-256 is
    checked)."""
    segments: int | None = None
    """Frames of a video or window that the model sees (default: 25; if it sees their order, as many
    as in training)."""
    window: float | None = None
    """Seconds: look at the video in windows, for a timeline, as python -m extract --window cuts
    it."""
    stride: float | None = None
    """Seconds from one window to the next (default: the window)."""
    picture: Path | None = None
    """A folder for a PNG of each video: its frames with their weights for each group; with windows,
    the timeline."""
    json: str | None = None
    """A file for all of it as JSON; - is the screen, and then the tables go to the error stream."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    precision: str = "auto"
    """fp32, bf16, fp16, or auto: fp16 on a GPU, on a CPU bf16 if it computes in it, else fp32."""
    video_timeout: float = 60.0
    """Seconds a video may take to decode, and one more for every 10 s that it lasts; then it is
    given up."""


# -- in words and pictures -----------------------------------------------------------------------------------------


def top_classes(
    window: Window, classes: Sequence[str], count: int = TOP
) -> list[tuple[str, float]]:
    """The likeliest classes and their probabilities, the likeliest first."""
    likely = np.exp(
        window.logits.astype(np.float64) - window.logits.max()
    )  # scipy's softmax is 0.2 s of start-up
    scores = likely / likely.sum()
    return [
        (classes[place], float(scores[place]))
        for place in np.argsort(-scores, kind="stable")[:count].tolist()
    ]


def table(prediction: Prediction, classes: Sequence[str], window: float | None = None) -> str:
    """A video in words: its top 5, or its timeline."""
    whole, several = prediction.windows[0], f"{len(prediction.windows)} windows"
    what = (
        f"{several} of {window:g} s"
        if window
        else f"{whole.num_frames:,} frames, {len(whole.indices)} seen"
    )
    lines = [f"{prediction.path}: {prediction.seconds:.1f} s, {what}"]
    if prediction.problem:
        lines.append(f"  only partly readable: {prediction.problem}")
    if window is None:
        return "\n".join(
            lines + [f"  {score:6.1%}  {name}" for name, score in top_classes(whole, classes)]
        )
    for start, end, name, score, count in timeline(prediction, classes):
        joined = f"  ({count} windows)" if count > 1 else ""
        lines.append(f"  {_clock(start):>7} - {_clock(end):>7}  {score:6.1%}  {name}{joined}")
    return "\n".join(lines)


def timeline(
    prediction: Prediction, classes: Sequence[str]
) -> list[tuple[float, float, str, float, int]]:
    """Runs of windows with the same likeliest class: start and end (s), class, mean probability,
    windows.

    Where windows overlap, a run ends where the next one starts.
    """
    best = [(window, *top_classes(window, classes, 1)[0]) for window in prediction.windows]
    runs = [list(run) for _, run in groupby(best, key=lambda one: one[1])]
    starts = [run[0][0].start for run in runs[1:]] + [np.inf]
    return [
        (
            run[0][0].start,
            min(run[-1][0].end, until),
            run[0][1],
            float(np.mean([score for *_, score in run])),
            len(run),
        )
        for run, until in zip(runs, starts, strict=True)
    ]


def as_json(prediction: Prediction, classes: Sequence[str]) -> dict[str, Any]:
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
    common = {
        "video": prediction.path,
        "seconds": round(prediction.seconds, 3),
        "problem": prediction.problem,
    }
    return {**common, "windows": windows}


def _clock(seconds: float) -> str:
    """`1:02:03.4`, hours only where there are any."""
    tenths = round(seconds * 10)
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    return f"{f'{hours}:{minutes:02}' if hours else minutes}:{rest / 10:04.1f}"


def attention_picture(prediction: Prediction, classes: Sequence[str]) -> bytes:
    """PNG: thumbnails over each frame's share of each group's weights (at most as many as a film
    holds)."""
    from aggregate import figures

    whole = prediction.windows[0]
    assert whole.weights is not None
    pictures = list(prediction.crops[figures.evenly(len(whole.indices))])
    moments = [f"{time:.1f} s" for time in whole.times]
    return figures.png(
        figures.film(pictures, whole.weights, moments, picture_title(prediction, classes))
    )


def picture_title(prediction: Prediction, classes: Sequence[str]) -> str:
    """The video, its likeliest classes, the scale of the blue, and whether attention prefers any
    frame."""
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

    return figures.png(
        figures.timeline(
            [run[:4] for run in timeline(prediction, classes)], seconds=prediction.seconds
        )
    )


# -- the command ---------------------------------------------------------------------------------------------------


def main(options: Options) -> int:
    from aggregate.training.checkpoint import Checkpoint
    from extract.decode import VideoError

    _check(options)
    checkpoint = Checkpoint.load(options.checkpoint)
    if options.picture is not None:
        _check_picture(options, checkpoint.options["name"])
    same = ("weights", "device", "precision", "video_timeout")
    screen: TextIO = sys.stderr if options.json == "-" else sys.stdout
    segments = options.segments
    if segments is None:
        (segments,) = checkpoint.usual_segments((25,), partial(print, file=screen))
    paths = videos_of(options.videos)
    predictor = Predictor(
        checkpoint, segments=segments, **{name: getattr(options, name) for name in same}
    )
    print(predictor.words, file=screen)
    answers: list[dict[str, Any]] = []
    failed, names = 0, Counter[str]()
    for path in paths:
        try:
            seen = predictor(path, window=options.window, stride=options.stride)
        except VideoError as error:
            failed += 1
            print(f"failed: {error}", file=sys.stderr)
            answers.append({"video": os.fspath(path), "error": error.reason})
            continue
        print(table(seen, predictor.classes, options.window), file=screen, flush=True)
        answers.append(as_json(seen, predictor.classes))
        if options.picture is not None:
            names[path.stem] += 1
            number = f"-{names[path.stem]}" if names[path.stem] > 1 else ""
            picture = options.picture / f"{path.stem}{number}.png"
            drawn = (
                timeline_picture(seen, predictor.classes)
                if options.window
                else attention_picture(seen, predictor.classes)
            )
            replace_file(picture, drawn)
            print(f"  picture: {picture}", file=screen)
    if options.json is not None:
        whole = {
            "checkpoint": options.checkpoint.name,
            "model": checkpoint.options["name"],
            "videos": answers,
        }
        text = json.dumps(whole, ensure_ascii=False, allow_nan=False, indent=1)
        if options.json == "-":
            print(text)
        else:
            replace_file(options.json, text + "\n")
    if failed:
        print(f"{failed} of {len(paths)} videos could not be decoded", file=sys.stderr)
    return 3 if failed else 0


def videos_of(paths: Sequence[Path]) -> list[Path]:
    """The videos that are given, and those in folders that are given, as extraction finds them."""
    from extract.listing.videos import list_videos

    videos: list[Path] = []
    for path in paths:
        videos += (
            [Path(video.path) for video in list_videos(str(path)).videos]
            if path.is_dir()
            else [path]
        )
    return videos


def _check(options: Options) -> None:
    if not options.videos:
        raise InputError("no video is given")
    check_ranges(options)
    if options.stride is not None and options.window is None:
        raise InputError(
            f"--stride {options.stride:g} is from one window to the next; give --window too"
        )


def _check_picture(options: Options, model: str) -> None:
    """Said before the work: that there is something to draw, with something to draw with."""
    assert options.picture is not None
    if options.window is None and model not in WEIGHING:
        raise InputError(
            f"--picture: {model} has no weight a frame to show, as {', '.join(WEIGHING)} have; "
            "with --window it is a timeline"
        )
    from aggregate import figures  # noqa: F401  # InputError without matplotlib

    options.picture.mkdir(parents=True, exist_ok=True)


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m pipelines.predict"))
