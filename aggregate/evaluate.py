"""python -m aggregate.evaluate: a checkpoint and a feature store in, metrics and a scores file
out."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from aggregate.training.options import PlaceOptions, VideoOptions
from extract import InputError, RunError
from extract.cli import first_few, progress, run_command
from extract.commands import command_line
from extract.cores import available_cores

if TYPE_CHECKING:
    import numpy as np

    from aggregate.endtoend import FrameModel
    from aggregate.scores import Scores
    from aggregate.training.checkpoint import Checkpoint
    from aggregate.training.splits import ListedVideos
    from extract.listing.videos import Video
    from extract.store import FeatureStore


@dataclass(frozen=True)
class Options(VideoOptions, PlaceOptions):
    """Test a trained model with 3 and with 25 segments (Table 3's two columns), print metrics,
    write scores."""

    checkpoint: Path
    """A best.pt of aggregate.train or aggregate.finetune."""
    features: str | tuple[str, ...] = "feats.zarr"
    """The feature store, or several; made with the backbones the checkpoint was trained on."""
    videos: Path | None = None
    """In the place of features: videos, as for python -m extract, through the backbone it records;
    StNet's only way."""
    weights: Path | None = None
    """With --videos: the backbone's weights, where the checkpoint records a file of one's own
    (SHA-256 is checked)."""
    split: str = "val"
    """Which split; `held-out` for the very videos that training validated on, `all` for every
    one."""
    by: Literal["row", "video"] = "row"
    """Of a store of windows or spans: a score each, or one a video, their mean."""
    segments: tuple[int, ...] = ()
    """Frames of a video that the model sees (default: 3 and 25; if it sees their order, as many as
    in training)."""
    out: Path | None = None
    """The scores file (HDF5) for `python -m ensemble`."""
    batch_size: int = 256
    crops: Literal[1, 3, 10] = 1
    """With --videos: views of each frame (a store has its own)."""
    micro_batch: int = 8
    """With --videos: how many go through the network at once."""


def main(options: Options) -> int:
    import numpy as np

    from aggregate.scores import Scores
    from aggregate.training.checkpoint import Checkpoint

    checkpoint = Checkpoint.load(options.checkpoint)
    if not options.segments:
        options = replace(options, segments=checkpoint.usual_segments((3, 25)))
    see = see_features if options.videos is None else see_videos
    videos, seen = see(checkpoint, options)
    source = {
        "model": checkpoint.options["name"],
        "options": checkpoint.options,
        "checkpoint": options.checkpoint.name,
    }
    source |= {"features": checkpoint.features, "split": options.split, "inputs": videos.inputs}
    if videos.trained_on is not None:
        source["trained_on"] = videos.trained_on
    if videos.trained_on:
        print(
            f"NOT A RESULT: the model was trained on {videos.trained_on:,} of these {len(videos.ids):,} videos; "
            "--split held-out scores those that it was not trained on"
        )
    several = []
    for segments, crops in seen:
        if options.videos is None and np.isnan(crops).all():
            raise RunError(
                f"{checkpoint.path} has no scores that are finite; its weights are damaged"
            )
        kept = crops if crops.shape[1] > 1 else None
        logits = crops.mean(axis=1)  # before softmax
        several.append(
            Scores(
                videos.ids,
                checkpoint.classes,
                logits,
                videos.labels,
                source,
                segments,
                kept,
                videos.groups,
            )
        )
    report(
        [scores.by_video() for scores in several] if options.by == "video" else several, options.out
    )
    return 0


class Scored(NamedTuple):
    """The N videos to score: ids, labels over the checkpoint's classes, and what each depends on
    (`group_keys`).

    `trained_on` is how many of them the model was trained on, None if the checkpoint does not say.
    `inputs` are digests of what the scores are made of: the same ones give the same scores.
    """

    ids: list[str]
    labels: "np.ndarray"
    groups: "np.ndarray"
    trained_on: int | None
    inputs: dict[str, Any]


# The videos; the numbers of segments, each with logits [N, crops, C], NaN for videos that failed.
Seen = tuple[Scored, "Iterator[tuple[int, np.ndarray]]"]


def see_features(checkpoint: "Checkpoint", options: Options) -> Seen:
    """The checkpoint's logits of features in a store."""
    from aggregate.data.features import StoredFeatures
    from aggregate.data.joined import open_features
    from aggregate.training.sources import logits_of, possible_segments
    from extract.device import choose_device

    store = open_features(options.features)
    checkpoint.check_features(store.provenance, store.dim, store.path)
    rows = rows_to_score(checkpoint, store, options.split)
    rows = rows[store.listed[rows]]
    scored = _scored(checkpoint, store, rows, options)
    device = choose_device(options.device)
    print(
        f"{options.checkpoint}: {describe(checkpoint)}\n{len(rows):,} videos of split {options.split!r} on {device}"
    )
    wanted = possible_segments(options.segments, store)
    features = StoredFeatures(
        store, rows, device=device, placement=options.placement
    )  # read once for all of them
    model, size = checkpoint.model().to(device), options.batch_size
    seen = (
        (number, logits_of([model], features, segments=number, batch_size=size)[0])
        for number in wanted
    )
    return scored, seen


def see_videos(checkpoint: "Checkpoint", options: Options) -> Seen:
    """The checkpoint's logits of frames, through the backbone that it holds or records."""
    from aggregate.endtoend import model_from_record
    from aggregate.training.splits import ListedVideos
    from extract.device import choose_device
    from extract.listing.videos import list_videos

    model = model_from_record(checkpoint, options.weights)
    device = choose_device(options.device)
    model.to(device)
    where = str(options.videos)
    listing = list_videos(where, labels=options.labels, root=options.root)
    listed = ListedVideos(listing)
    rows = rows_to_score(checkpoint, listed, options.split)
    chosen = [listing.videos[row] for row in rows]
    scored = _scored(checkpoint, listed, rows, options)
    count = f"{len(chosen):,} videos of split {options.split!r}"
    print(f"{options.checkpoint}: {describe(checkpoint)}\n{count} on {device}")
    seen = (
        (number, _logits_of_videos(model, chosen, number, options))
        for number in sorted(set(options.segments))
    )
    return scored, seen


def _scored(
    checkpoint: "Checkpoint",
    videos: "FeatureStore | ListedVideos",
    rows: "np.ndarray",
    options: Options,
) -> Scored:
    """What is known of the videos to score. Says of which the label, split or group has changed
    since training."""
    from aggregate.training.checkpoint import rows_for_classes
    from aggregate.training.manifest import trained_on
    from aggregate.training.splits import group_keys

    labels = rows_for_classes(
        videos.labels[rows], list(videos.classes), checkpoint.classes, str(videos.path)
    )
    count, changed = trained_on(checkpoint, videos, rows)
    if changed:
        print(
            f"note: the label, split or group of {len(changed):,} of these videos is another than when the model was "
            f"trained ({first_few(changed)}); scored with what it is now"
        )
    groups = group_keys(videos.ids, videos.groups)[rows]
    return Scored(
        videos.ids[rows].tolist(),
        labels,
        groups,
        count,
        inputs_of(options.checkpoint, videos, options),
    )


def inputs_of(
    checkpoint: "Path", videos: "FeatureStore | ListedVideos", options: Options
) -> dict[str, Any]:
    """Digests of what scores are made of: the checkpoint, what the store or the listing holds, and
    the options."""
    from aggregate.training.manifest import contents_of, sha256_of

    own = {name: getattr(options, name) for name in ("split", "by", "crops")} | {
        "segments": list(options.segments)
    }
    return {"checkpoint": sha256_of(checkpoint), **own, "of": contents_of(videos)}


def _logits_of_videos(
    model: "FrameModel", videos: "list[Video]", segments: int, options: Options
) -> "np.ndarray":
    import numpy as np

    from aggregate.data.frames import VideoFrames, clip_pool
    from aggregate.training.sources import predict
    from extract.decode.jobs import Plan

    net: Any = model.net
    if model.clips is not None:
        return _logits_of_clips(model, videos, segments, options)
    clip_length, micro_batch = net.options.get("frames_per_segment", 1), options.micro_batch
    plan = Plan(segments, options.crops, 0, model.preprocessing, clip_length=clip_length)
    logits = np.full((len(videos), options.crops, net.options["num_classes"]), np.nan, np.float32)
    cores = options.decode_workers or available_cores()
    with clip_pool(plan, workers=cores, timeout=options.video_timeout) as pool:
        frames = VideoFrames(videos, plan, pool)
        batches = frames.test_batches(batch_size=micro_batch)
        total = -(-len(videos) // micro_batch)
        rows, predicted = predict([model], progress(batches, total=total, unit="batch"))
    for place, reason in list(frames.failed.items())[:5]:
        print(f"failed: {videos[place].id}: {reason}")
    if predicted:
        logits[rows] = predicted[0]
    return logits


def _logits_of_clips(
    model: "FrameModel", videos: "list[Video]", segments: int, options: Options
) -> "np.ndarray":
    """The same through a clip-wise backbone: one clip is computed at a time, and a buffer holds a
    few."""
    import numpy as np
    import torch

    from aggregate.data.frames import clip_pool, new_segments, row_parts
    from aggregate.training.sources import autocast
    from extract.decode import VideoError
    from extract.decode.jobs import Plan

    net, clips = model.net.eval(), model.clips
    assert clips is not None
    device = model.mean.device
    plan = Plan(
        segments,
        options.crops,
        0,
        model.preprocessing,
        clip_length=clips.frames,
        clip_fps=clips.fps,
    )
    recorded: Any = net.options
    classes = recorded["num_classes"]
    logits = np.full((len(videos), options.crops, classes), np.nan, np.float32)
    cores, timeout = options.decode_workers or available_cores(), options.video_timeout
    with (
        clip_pool(plan, workers=cores, timeout=timeout) as pool,
        clip_pool(plan, workers=1, timeout=timeout) as leftovers,
        torch.inference_mode(),
        autocast(device, "auto"),
    ):
        jobs: list[Any] = [(video.path, [(video.id, video.span)], plan) for video in videos]
        queued = [(job, pool.submit(job)) for job in jobs]
        for place, (job, future) in enumerate(progress(queued, unit="video")):
            features, frames = [], []
            try:
                for prepared, pictures in row_parts(job, future, leftovers):
                    frames.append(prepared.frame_indices[prepared.clips[0]])
                    by_view = [
                        [model.clip_features(torch.from_numpy(pictures[clip])) for clip in view]
                        for view in prepared.clips
                    ]
                    features.append(torch.stack([torch.cat(view) for view in by_view]))
            except VideoError as error:
                print(f"failed: {videos[place].id}: {error.reason}")
                continue
            mask = torch.from_numpy(new_segments(np.concatenate(frames))).to(device)
            mask = mask.repeat_interleave(clips.rows).expand(options.crops, -1)
            logits[place] = net(torch.cat(features, dim=1), mask).float().cpu().numpy()
    return logits


def report(several: "Sequence[Scores]", out: Path | None) -> None:
    """Print the table of metrics and write the scores file."""
    from aggregate.metrics import Summary, summarize
    from aggregate.scores import save_scores

    labels = several[0].labels
    assert labels is not None
    print(f"{several[0].failed.sum():,} of {len(labels):,} videos failed; they count as errors")
    if (labels >= 0).any():
        print(f"{'segments':>9} {Summary.header()}")
        for scores in several:
            summary = summarize(scores.logits, labels, scores.groups)
            print(f"{scores.segments:>9} {summary}")
        print(f"intervals: 95 %, bootstrap over {summary.resampled()}")
    else:
        print("no video has a label, so there are scores but no metrics")
    if out is not None:
        save_scores(out, several)
        print(f"scores: {out} ({', '.join(f'logits/{scores.segments}' for scores in several)})")
        if not several[0].source.get("trained_on"):
            print(
                f"Next: {command_line('pipelines.report', out.parent, out=out.parent / 'report.html')}"
            )


def inputs_now(options: Options) -> dict[str, Any]:
    """`source["inputs"]` of the scores that these options would make."""
    from aggregate.data.joined import open_features
    from aggregate.training.splits import ListedVideos
    from extract.listing.videos import list_videos

    if options.videos is None:
        return inputs_of(options.checkpoint, open_features(options.features), options)
    listing = list_videos(str(options.videos), labels=options.labels, root=options.root)
    return inputs_of(options.checkpoint, ListedVideos(listing), options)


def rows_to_score(
    checkpoint: "Checkpoint", videos: "FeatureStore | ListedVideos", split: str
) -> "np.ndarray":
    """Rows of a split, or those that validated while the checkpoint was trained ("held-out")."""
    from aggregate.training.manifest import rows_of_role

    if split == "held-out" and split not in videos.splits:
        return rows_of_role(checkpoint, videos, "validate")
    return rows_of_split(videos.splits, split, str(videos.path))


def rows_of_split(splits: "Sequence[str] | np.ndarray", split: str, where: str) -> "np.ndarray":
    """Rows of a split (`all`: of every one); InputError names the splits there are."""
    import numpy as np

    rows = np.flatnonzero((np.array(splits) == split) | (split == "all"))
    if not len(rows):
        known = ", ".join(map(repr, sorted(set(splits))))
        raise InputError(
            f"{where} has no video in split {split!r}; it has {known}; `--split held-out` takes those that training "
            "validated on, `--split all` takes every one"
        )
    return rows


def describe(checkpoint: "Checkpoint") -> str:
    """`hgnl (g1=16, g2=8, ...) over 2048 features, 700 classes`."""
    plain = {
        k: v
        for k, v in checkpoint.options.items()
        if k not in ("name", "dim", "num_classes", "dropout")
    }
    options = ", ".join(f"{name}={value}" for name, value in plain.items())
    return (
        f"{checkpoint.options['name']}{f' ({options})' if options else ''} over {checkpoint.options['dim']} features, "
        f"{len(checkpoint.classes)} classes"
    )


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m aggregate.evaluate"))
