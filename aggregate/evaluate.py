"""python -m aggregate.evaluate: test a checkpoint on features or videos, and write its scores."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aggregate.training.options import DeviceOptions, VideoOptions
from extract import InputError, Record, RunError
from extract.cli import first_few, progress, run_as_script
from extract.commands import command_line
from extract.cores import available_cores

if TYPE_CHECKING:
    import numpy as np

    from aggregate.endtoend import FrameModel
    from aggregate.models import VideoClassifier
    from aggregate.scores import Scores
    from aggregate.training.checkpoint import Checkpoint
    from aggregate.training.splits import ListedVideos
    from extract.listing.videos import Video
    from extract.store import FeatureStore
    from extract.workers.rows import DecodedRow

MAX_PRINTED = 5  # number of failed videos that are printed


@dataclass(frozen=True)
class Options(VideoOptions, DeviceOptions):
    """Test a trained model with 3 and with 25 segments (Table 3's two columns), print metrics,
    write scores."""

    checkpoint: Path
    """A best.pt of aggregate.train or aggregate.finetune."""
    features: str | tuple[str, ...] = "feats.zarr"
    """The feature store, or several; made with the backbones the checkpoint was trained on."""
    videos: Path | None = None
    """Videos instead of features, as for python -m extract; the checkpoint's backbone runs on them.
    StNet needs this."""
    weights: Path | None = None
    """With --videos: the backbone's weights, if the checkpoint records a file of your own (its
    SHA-256 is checked)."""
    split: str = "val"
    """Which split; `held-out` for the videos that training validated on, `all` for all videos."""
    by: Literal["row", "video"] = "row"
    """For a store of windows or spans: a score for each row, or the mean for each video."""
    segments: tuple[int, ...] = ()
    """Frames per video that the model sees (default: 3 and 25; if it sees their order, as many as
    in training)."""
    out: Path | None = None
    """The scores file (HDF5) for `python -m ensemble`."""
    batch_size: int = 256
    crops: Literal[1, 3, 10] = 1
    """With --videos: views of each frame (a store has its own)."""
    micro_batch: int = 8
    """With --videos: how many go through the network at once."""


def main(options: Options) -> int:
    from aggregate.scores import Scores, group_keys
    from aggregate.training.checkpoint import Checkpoint, rows_for_classes
    from aggregate.training.splits import ListedVideos
    from extract.device import choose_device

    checkpoint = Checkpoint.load(options.checkpoint)
    if not options.segments:
        options = replace(options, segments=checkpoint.usual_segments((3, 25)))
    model: Any = None
    if options.videos is not None:
        from aggregate.endtoend import model_from_record  # not needed for features

        model = model_from_record(checkpoint, options.weights)
    videos = open_videos(options)
    if not isinstance(videos, ListedVideos):
        checkpoint.check_features(videos.provenance, videos.dim, videos.path)
        model = checkpoint.model()
    rows = rows_to_score(checkpoint, videos, options.split)
    labels = rows_for_classes(
        videos.labels[rows], list(videos.classes), checkpoint.classes, str(videos.path)
    )
    device = choose_device(options.device)
    print(f"{options.checkpoint}: {describe(checkpoint)}")
    print(f"{len(rows):,} videos of split {options.split!r} on {device}")
    source = _source(checkpoint, videos, rows, options)
    model = model.to(device)
    if isinstance(videos, ListedVideos):
        chosen = [videos.videos[row] for row in rows]
        crops_by_segments = _logits_of_videos(checkpoint, model, chosen, options)
    else:
        crops_by_segments = _logits_of_features(model, videos, rows, options)
    groups = group_keys(videos.ids, videos.groups)[rows]
    by_segments = [
        Scores(
            videos.ids[rows].tolist(),
            checkpoint.classes,
            crops.mean(axis=1),  # before softmax
            labels,
            source,
            segments,
            crops if crops.shape[1] > 1 else None,
            groups,
        )
        for segments, crops in crops_by_segments
    ]
    if options.by == "video":
        by_segments = [scores.by_video() for scores in by_segments]
    _report(by_segments, options.out)
    return 0


def open_videos(options: Options) -> "FeatureStore | ListedVideos":
    """Open the store of --features, or list the videos of --videos."""
    from aggregate.data.joined import open_features
    from aggregate.training.splits import ListedVideos
    from extract.listing.videos import list_videos

    if options.videos is None:
        return open_features(options.features)
    return ListedVideos(list_videos(options.videos, labels=options.labels, root=options.root))


def rows_to_score(
    checkpoint: "Checkpoint", videos: "FeatureStore | ListedVideos", split: str
) -> "np.ndarray":
    """Rows of a split, of all splits ("all"), or those that training validated on ("held-out")."""
    import numpy as np

    from aggregate.training.manifest import validated_rows

    splits = np.asarray(videos.splits)
    if split == "held-out" and split not in splits:
        rows = validated_rows(checkpoint, videos)
    else:
        rows = np.flatnonzero((splits == split) | (split == "all"))
    rows = rows[videos.listed[rows]]
    if not len(rows):
        names = ", ".join(map(repr, sorted(set(splits.tolist()))))
        raise InputError(
            f"{videos.path} has no video in split {split!r}; it has {names}; "
            "`--split held-out` takes those that training validated on, `--split all` all videos"
        )
    return rows


def _source(
    checkpoint: "Checkpoint",
    videos: "FeatureStore | ListedVideos",
    rows: "np.ndarray",
    options: Options,
) -> Record:
    """The record of the scores' origin. Prints notes on videos that training has used."""
    from aggregate.training.manifest import trained_on

    source = {
        "model": checkpoint.options["name"],
        "options": checkpoint.options,
        "checkpoint": options.checkpoint.name,
        "features": checkpoint.features,
        "split": options.split,
        "inputs": inputs_of(videos, options),
    }
    count, changed = trained_on(checkpoint, videos, rows)
    if changed:
        print(
            f"note: the label, split or group of {len(changed):,} of these videos has changed "
            f"since the model was trained ({first_few(changed)}); scored with the current ones"
        )
    if count is not None:
        source["trained_on"] = count
    if count:
        print(
            f"NOT A RESULT: the model was trained on {count:,} of these {len(rows):,} videos; "
            "--split held-out scores those that it was not trained on"
        )
    return source


def inputs_of(videos: "FeatureStore | ListedVideos", options: Options) -> Record:
    """Digests of everything that determines the scores; equal inputs give equal scores."""
    from aggregate.training.manifest import contents_of
    from extract.sources import sha256_of

    return {
        "checkpoint": sha256_of(options.checkpoint),
        "split": options.split,
        "by": options.by,
        "crops": options.crops,
        "segments": list(options.segments),
        "of": contents_of(videos),
    }


def inputs_now(options: Options) -> Record:
    """`source["inputs"]` of the scores that these options would give now."""
    return inputs_of(open_videos(options), options)


def _logits_of_features(
    model: "VideoClassifier", store: "FeatureStore", rows: "np.ndarray", options: Options
) -> "Iterator[tuple[int, np.ndarray]]":
    """For each number of segments its logits [N, crops, C]; NaN for videos that failed."""
    import numpy as np

    from aggregate.data.features import StoredFeatures
    from aggregate.inference import logits_of
    from aggregate.training.options import clip_segments

    numbers = clip_segments(options.segments, store)
    device, size = model.classifier.weight.device, options.batch_size
    features = StoredFeatures(store, rows, device=device, placement=options.placement)
    for segments in numbers:
        [logits] = logits_of([model], features, segments=segments, batch_size=size)
        if np.isnan(logits).all():
            raise RunError(
                f"{options.checkpoint} has no scores that are finite; its weights are damaged"
            )
        yield segments, logits


def _logits_of_videos(
    checkpoint: "Checkpoint", model: "FrameModel", videos: "list[Video]", options: Options
) -> "Iterator[tuple[int, np.ndarray]]":
    """`_logits_of_features` for videos, which child processes decode."""
    import numpy as np

    from aggregate.data.frames import VideoFrames
    from aggregate.endtoend import clips_of, plan_of
    from aggregate.inference import predict
    from extract.workers.rows import RowDecoder

    cores = options.decode_workers or available_cores()
    for segments in sorted(set(options.segments)):
        plan = plan_of(checkpoint, segments, options.crops)
        shape = (len(videos), options.crops, len(checkpoint.classes))
        logits = np.full(shape, np.nan, np.float32)
        timeout = options.video_timeout
        with RowDecoder.start(plan, workers=cores, timeout=timeout) as decoder:
            if (clips := clips_of(checkpoint)) is None:
                frames = VideoFrames(videos, plan, decoder)
                batches = frames.test_batches(batch_size=options.micro_batch)
                total = -(-len(videos) // options.micro_batch)
                rows, predicted = predict([model], progress(batches, total=total, unit="batch"))
                if predicted:
                    logits[rows] = predicted[0]
                failed = frames.failed
            else:
                decoded = decoder.read(decoder.submit(videos, plan))
                failed = _fill_from_clips(logits, model, clips.rows, decoded)
        for row, reason in list(failed.items())[:MAX_PRINTED]:
            print(f"failed: {videos[row].id}: {reason}")
        yield segments, logits


def _fill_from_clips(
    logits: "np.ndarray", model: "FrameModel", rows_per_clip: int, decoded: "Iterator[DecodedRow]"
) -> dict[int, str]:
    """Compute `logits` with a clip-wise backbone, one clip at a time; returns failures by row."""
    import numpy as np
    import torch

    from aggregate.data.frames import new_segments
    from aggregate.inference import autocast
    from extract.decode import VideoError

    net, device = model.net.eval(), model.mean.device
    failed = {}
    with torch.inference_mode(), autocast(device, "auto"):
        videos = groupby(decoded, key=attrgetter("id"))
        for row, (_, parts) in enumerate(progress(videos, total=len(logits), unit="video")):
            features, frames = [], []
            for part in parts:
                if isinstance(part.prepared, VideoError):
                    failed[row] = part.prepared.reason
                    continue
                clips, pictures = part.prepared.clips, part.pictures
                frames.append(part.prepared.frame_indices[clips[0]])
                by_view = [
                    torch.cat(
                        [model.clip_features(torch.from_numpy(pictures[clip])) for clip in view]
                    )
                    for view in clips
                ]
                features.append(torch.stack(by_view))
            if row in failed:
                continue
            mask = torch.from_numpy(new_segments(np.concatenate(frames))).to(device)
            mask = mask.repeat_interleave(rows_per_clip).expand(len(logits[row]), -1)
            logits[row] = net(torch.cat(features, dim=1), mask).float().cpu().numpy()
    return failed


def _report(by_segments: "Sequence[Scores]", out: Path | None) -> None:
    """Print the table of metrics and write the scores file."""
    from aggregate.metrics import summarize, summary_table
    from aggregate.scores import save_scores

    failed, labels = by_segments[0].failed, by_segments[0].labels
    assert labels is not None
    print(f"{failed.sum():,} of {len(failed):,} videos failed; they count as errors")
    if (labels >= 0).any():
        rows = [
            ([str(scores.segments)], summarize(scores.logits, labels, scores.groups))
            for scores in by_segments
        ]
        print(summary_table(["segments"], rows))
    else:
        print("no video has a label, so there are scores but no metrics")
    if out is not None:
        save_scores(out, by_segments)
        print(f"scores: {out} ({', '.join(f'logits/{scores.segments}' for scores in by_segments)})")
        if not by_segments[0].source.get("trained_on"):
            page = command_line("pipelines.report", out.parent, out=out.parent / "report.html")
            print(f"Next: {page}")


def describe(checkpoint: "Checkpoint") -> str:
    """`hgnl (g1=16, g2=8, ...) over 2048 features, 700 classes`."""
    common = ("name", "dim", "num_classes", "dropout")
    name, dim = checkpoint.options["name"], checkpoint.options["dim"]
    own = [f"{key}={value}" for key, value in checkpoint.options.items() if key not in common]
    options = f" ({', '.join(own)})" if own else ""
    return f"{name}{options} over {dim} features, {len(checkpoint.classes)} classes"


if __name__ == "__main__":
    run_as_script()
