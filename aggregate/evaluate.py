"""python -m aggregate.evaluate: a checkpoint and a feature store in, metrics and a scores file out."""

import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from aggregate.training.options import PlaceOptions, VideoOptions
from extract.cli import InputError, progress, run_command

if TYPE_CHECKING:
    import numpy as np

    from aggregate.scores import Scores
    from aggregate.training.checkpoint import Checkpoint
    from extract.store import FeatureStore


@dataclass(frozen=True)
class Options(VideoOptions, PlaceOptions):
    """Test a trained model with 3 and with 25 segments (Table 3's two columns), print metrics, write scores."""

    checkpoint: Path
    """A best.pt of aggregate.train or aggregate.finetune."""
    features: str = "feats.zarr"
    """The feature store; made with the backbone the checkpoint was trained on."""
    videos: Path | None = None
    """In the place of features: videos, as for python -m extract, through the backbone it records; StNet's only way."""
    weights: Path | None = None
    """With --videos: the backbone's weights, where the checkpoint records a file of one's own (SHA-256 is checked)."""
    split: str = "val"
    """Which split, or `all`."""
    by: Literal["row", "video"] = "row"
    """Of a store of windows or spans: a score each, or one a video, their mean."""
    segments: tuple[int, ...] = (3, 25)
    """How many frames of a video the model sees; more than are stored are answered with all."""
    out: Path | None = None
    """The scores file (HDF5) for `python -m ensemble`."""
    batch_size: int = 256
    crops: Literal[1, 3, 10] = 1
    """With --videos: views of each frame (a store has its own)."""
    micro_batch: int = 8
    """With --videos: how many go through the network at once."""


def main(options: Options) -> int:
    from aggregate.training.checkpoint import Checkpoint

    checkpoint = Checkpoint.load(options.checkpoint)
    if options.videos is not None:
        several = scores_of_videos(checkpoint, options.videos, options)
    else:
        several = scores_of_features(checkpoint, options)
    return report(several, options)


def scores_of_features(checkpoint: "Checkpoint", options: Options) -> "list[Scores]":
    """Scores from a feature store, one for each number of segments."""
    from aggregate.data.features import StoredFeatures
    from aggregate.training.checkpoint import rows_for_classes
    from aggregate.training.sources import logits_of, possible_segments
    from extract.device import choose_device
    from extract.store import FeatureStore

    store = FeatureStore.open(options.features)
    checkpoint.check_features(store.provenance, store.dim, options.features)
    rows = split_rows(store, options.split)
    labels = rows_for_classes(store.labels[rows], list(store.classes), checkpoint.classes, options.features)
    device = choose_device(options.device)
    print(f"{options.checkpoint}: {describe(checkpoint)}\n{len(rows):,} videos of split {options.split!r} on {device}")
    wanted = possible_segments(options.segments, store)
    features = StoredFeatures(store, rows, device=device, placement=options.placement)  # read once for all of them
    models = [checkpoint.model().to(device)]
    several = []
    for segments in wanted:
        (crops,) = logits_of(models, features, segments=segments, batch_size=options.batch_size)
        several.append(_scores(crops, store.ids[rows].tolist(), labels, checkpoint, options, segments))
    return several


def scores_of_videos(checkpoint: "Checkpoint", videos: Path, options: Options) -> "list[Scores]":
    """Scores from frames through the backbone that the checkpoint holds or records, one for each number of segments."""
    import numpy as np

    from aggregate.data.clips import ClipPlan
    from aggregate.data.frames import VideoFrames, clip_pool
    from aggregate.endtoend import model_from_record
    from aggregate.training.checkpoint import rows_for_classes
    from aggregate.training.sources import predict
    from extract.device import choose_device
    from extract.listing.videos import list_videos

    model = model_from_record(checkpoint, options.weights)
    device = choose_device(options.device)
    model.to(device)
    listing = list_videos(videos, labels=options.labels, root=options.root)
    chosen = [video for video in listing.videos if options.split in ("all", video.split)]
    if not chosen:
        known = ", ".join(repr(split) for split in listing.splits)
        raise InputError(f"{videos} has no video in split {options.split!r}; it has {known}; try --split all")
    theirs = np.array([video.label for video in chosen])
    labels = rows_for_classes(theirs, list(listing.classes), checkpoint.classes, str(videos))
    count = f"{len(chosen):,} videos of split {options.split!r}"
    print(f"{options.checkpoint}: {describe(checkpoint)}\n{count} on {device}")
    cores = options.decode_workers or len(os.sched_getaffinity(0))
    several = []
    for segments in sorted(set(options.segments)):
        plan = ClipPlan(
            segments=segments,
            frames_per_segment=checkpoint.options.get("frames_per_segment", 1),
            preprocessing=model.preprocessing,
            crops=options.crops,
        )
        crops = np.full((len(chosen), options.crops, len(checkpoint.classes)), np.nan, np.float32)
        with clip_pool(plan, workers=cores, timeout=options.video_timeout) as pool:
            frames = VideoFrames(chosen, plan, pool)
            batches = frames.test_batches(batch_size=options.micro_batch)
            total = -(-len(chosen) // options.micro_batch)
            rows, predicted = predict([model], progress(batches, total=total, unit="batch"))
            for place, reason in list(frames.failed.items())[:5]:
                print(f"failed: {chosen[place].id}: {reason}")
        if predicted:
            crops[rows] = predicted[0]
        several.append(_scores(crops, [video.id for video in chosen], labels, checkpoint, options, segments))
    return several


def _scores(
    crops: "np.ndarray",
    ids: list[str],
    labels: "np.ndarray",
    checkpoint: "Checkpoint",
    options: Options,
    segments: int,
) -> "Scores":
    """Logits [N, crops, C] as scores: averaged over crops, before softmax."""
    from aggregate.scores import Scores

    source = {
        "model": checkpoint.options["name"],
        "options": checkpoint.options,
        "checkpoint": options.checkpoint.name,
        "features": checkpoint.features,
        "split": options.split,
    }
    return Scores(
        ids=ids,
        classes=checkpoint.classes,
        logits=crops.mean(axis=1),
        labels=labels,
        source=source,
        segments=segments,
        crops=crops if crops.shape[1] > 1 else None,
    )


def report(several: "Sequence[Scores]", options: Options) -> int:
    """Print the table of metrics and write the scores file."""
    from aggregate.metrics import Summary, summarise
    from aggregate.scores import save_scores

    if options.by == "video":
        several = [scores.by_video() for scores in several]
    labels = several[0].labels
    assert labels is not None
    print(f"{several[0].failed.sum():,} of {len(labels):,} videos failed; they count as errors")
    if (labels >= 0).any():
        print(f"{'segments':>9} {Summary.header()}")
        for scores in several:
            print(f"{scores.segments:>9} {summarise(scores.logits, labels)}")
    else:
        print("no video has a label, so there are scores but no metrics")
    if options.out is not None:
        save_scores(options.out, several)
        print(f"scores: {options.out} ({', '.join(f'logits/{scores.segments}' for scores in several)})")
        print(f"Next: python -m ensemble --scores {options.out} ... --out fused.h5")
    return 0


def split_rows(store: "FeatureStore", split: str) -> "np.ndarray":
    """Rows of a split (`all`: of every one); InputError names the splits there are."""
    import numpy as np

    rows = np.arange(len(store)) if split == "all" else np.flatnonzero(store.splits == split)
    if not len(rows):
        known = ", ".join(repr(name) for name in sorted(set(store.splits.tolist())))
        raise InputError(f"{store.path} has no video in split {split!r}; it has {known}; `--split all` takes every one")
    return rows


def describe(checkpoint: "Checkpoint") -> str:
    """`hgnl (g1=16, g2=8, ...) over 2048 features, 700 classes`."""
    plain = {k: v for k, v in checkpoint.options.items() if k not in ("name", "dim", "num_classes", "dropout")}
    options = ", ".join(f"{name}={value}" for name, value in plain.items())
    return (
        f"{checkpoint.options['name']}{f' ({options})' if options else ''} over {checkpoint.options['dim']} features, "
        f"{len(checkpoint.classes)} classes"
    )


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m aggregate.evaluate"))
