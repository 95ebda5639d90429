"""python -m aggregate.evaluate: a checkpoint and a feature store in, metrics and a scores file out."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from extract.cli import InputError, RunError, run_command

if TYPE_CHECKING:
    import numpy as np
    import torch
    from torch import nn

    from aggregate.data.features import StoredFeatures
    from aggregate.scores import Scores
    from aggregate.training.checkpoint import Checkpoint
    from extract.store import FeatureStore


class DamagedModelError(RunError):
    """Scores that are no numbers; `place` is the model's, among those asked."""

    def __init__(self, message: str, place: int):
        super().__init__(message)
        self.place = place


@dataclass(frozen=True)
class Options:
    """Test a trained model with 3 and with 25 segments (Table 3's two columns), print metrics, write scores."""

    checkpoint: Path
    """A best.pt of aggregate.train or aggregate.finetune."""
    features: str = "feats.zarr"
    """The feature store; made with the backbone the checkpoint was trained on."""
    videos: Path | None = None
    """In the place of features: videos, as for python -m extract; for fine-tuned checkpoints, and StNet's only way."""
    root: Path | None = None
    """With a CSV as --videos: the folder its videos lie in."""
    labels: str = "auto"
    """With --videos: auto, kinetics700, or a file of lines."""
    split: str = "val"
    """Which split, or `all`."""
    segments: tuple[int, ...] = (3, 25)
    """How many frames of a video the model sees; more than are stored are answered with all."""
    out: Path | None = None
    """The scores file (HDF5) for `python -m ensemble`."""
    batch_size: int = 256
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    placement: Literal["auto", "device", "memory", "mmap"] = "auto"
    """Where features lie while they are read; auto chooses by size."""
    crops: Literal[1, 3, 10] = 1
    """With --videos: views of each frame (a store has its own)."""
    micro_batch: int = 8
    """With --videos: how many go through the network at once."""
    decode_workers: int | None = None
    """With --videos: decoding processes (default: the cores)."""
    video_timeout: float = 60.0
    """With --videos: seconds after which one is given up, plus one for each 10 s of video."""


def main(options: Options) -> int:
    from aggregate.training.checkpoint import Checkpoint

    checkpoint = Checkpoint.load(options.checkpoint)
    if options.videos is not None:
        several = scores_of_videos(checkpoint, options)
    else:
        several = scores_of_features(checkpoint, options)
    return report(several, options)


def scores_of_features(checkpoint: "Checkpoint", options: Options) -> "list[Scores]":
    """Scores from a feature store, one for each number of segments."""
    from aggregate.training.checkpoint import rows_for_classes
    from extract.store import FeatureStore

    store = FeatureStore.open(options.features)
    checkpoint.check_features(store.provenance, store.dim, options.features)
    rows = split_rows(store, options.split)
    labels = rows_for_classes(store.labels[rows], list(store.classes), checkpoint.classes, options.features)
    device = choose_device(options.device)
    print(f"{options.checkpoint}: {describe(checkpoint)}\n{len(rows):,} videos of split {options.split!r} on {device}")

    wanted = possible_segments(options.segments, store)
    features = held_for_test(store, rows, device=device, placement=options.placement)  # read once for all of them
    model = checkpoint.model().to(device)
    several = []
    for segments in wanted:
        crops = logits_of(
            [model], store, rows, segments=segments, batch_size=options.batch_size, device=device, features=features
        )[0]
        several.append(_scores(crops, store.ids[rows].tolist(), labels, checkpoint, options, segments))
    return several


def scores_of_videos(checkpoint: "Checkpoint", options: Options) -> "list[Scores]":
    """Scores from frames through the checkpoint's own backbone, one for each number of segments."""
    import contextlib
    import os

    import numpy as np
    import torch

    from aggregate.data.clips import ClipPlan
    from aggregate.data.frames import VideoFrames
    from aggregate.endtoend import rebuild
    from aggregate.finetune import predict_videos
    from aggregate.training.checkpoint import rows_for_classes
    from extract.listing.videos import list_videos

    model = rebuild(checkpoint)
    device = choose_device(options.device)
    model.to(device)
    assert options.videos is not None
    listing = list_videos(options.videos, labels=options.labels, root=options.root)
    videos = [video for video in listing.videos if options.split in ("all", video.split)]
    if not videos:
        known = ", ".join(repr(split) for split in listing.splits)
        raise InputError(f"{options.videos} has no video in split {options.split!r}; it has {known}; try --split all")
    theirs = np.array([video.label for video in videos])
    labels = rows_for_classes(theirs, list(listing.classes), checkpoint.classes, str(options.videos))
    print(
        f"{options.checkpoint}: {describe(checkpoint)}\n{len(videos):,} videos of split {options.split!r} on {device}"
    )
    half = torch.autocast(device.type, torch.bfloat16) if device.type == "cuda" else contextlib.nullcontext()
    several = []
    for segments in sorted(set(options.segments)):
        plan = ClipPlan(
            segments=segments,
            frames_per_segment=checkpoint.options.get("frames_per_segment", 1),
            preprocessing=model.preprocessing,
            crops=options.crops,
        )
        cores = options.decode_workers or len(os.sched_getaffinity(0))
        with VideoFrames(videos, plan, workers=cores, timeout=options.video_timeout) as frames:
            crops = predict_videos(model, frames, batch_size=options.micro_batch, autocast=lambda: half)
            for place, reason in list(frames.failed.items())[:5]:
                print(f"failed: {videos[place].id}: {reason}")
        several.append(_scores(crops, [video.id for video in videos], labels, checkpoint, options, segments))
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

    return Scores(
        ids=ids,
        classes=checkpoint.classes,
        logits=crops.mean(axis=1),
        labels=labels,
        source=source_of(checkpoint, options),
        segments=segments,
        crops=crops if crops.shape[1] > 1 else None,
    )


def report(several: "Sequence[Scores]", options: Options) -> int:
    """Print the table of metrics and write the scores file."""
    from aggregate.metrics import Summary, summarise
    from aggregate.scores import save_scores

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
    return 0


def split_rows(store: "FeatureStore", split: str) -> "np.ndarray":
    """Rows of a split (`all`: of every one); InputError names the splits there are."""
    import numpy as np

    rows = np.arange(len(store)) if split == "all" else np.flatnonzero(store.splits == split)
    if not len(rows):
        known = ", ".join(repr(name) for name in sorted(set(store.splits.tolist())))
        raise InputError(f"{store.path} has no video in split {split!r}; it has {known}; `--split all` takes every one")
    return rows


def possible_segments(wanted: Sequence[int], store: "FeatureStore") -> list[int]:
    """The numbers asked for, each at most what is stored (said where that changes one)."""
    stored = store.frames_per_video
    if min(wanted, default=0) < 1:
        raise InputError(f"--segments {' '.join(map(str, wanted))}: each must be at least 1")
    if max(wanted) > stored:
        print(f"{store.path} holds {stored} frames a video: {stored} segments in the place of {max(wanted)}")
    return sorted({min(segments, stored) for segments in wanted})


def logits_of(
    models: "Sequence[nn.Module]",
    store: "FeatureStore",
    rows: "np.ndarray",
    *,
    segments: int,
    batch_size: int,
    device: "torch.device | str",
    placement: Literal["auto", "device", "memory", "mmap"] = "auto",
    features: "StoredFeatures | None" = None,
) -> "list[np.ndarray]":
    """Logits of each model over videos `rows`: float32 [N, crops, C], NaN where extraction failed.

    `features`, those of `held_for_test`, are read here where they are not given. Raises RunError naming a video whose
    features are not finite, DamagedModelError for a model whose scores are not.
    """
    import numpy as np

    from aggregate.data.features import evaluation_views, find_non_finite
    from aggregate.training.learner import predict

    if features is None:
        features = held_for_test(store, rows, device=device, placement=placement)
    good = np.isin(rows, features.rows)
    crops = len(evaluation_views(store))
    several = []
    for place, predicted in enumerate(predict(models, features.test_batches(frames=segments, batch_size=batch_size))):
        wrong = ~np.isfinite(predicted).all(axis=(1, 2))
        if wrong.any():
            bad = rows[good][wrong]
            name = find_non_finite(store, bad)
            if name:
                raise RunError(
                    f"{store.path}: the stored features of {name} are not finite; "
                    "`python -m extract.verify` checks them"
                )
            raise DamagedModelError(
                f"scores of {store.ids[bad[0]]} are not finite though its features are; the weights are damaged", place
            )
        logits = np.full((len(rows), crops, predicted.shape[2]), np.nan, np.float32)
        logits[good] = predicted
        several.append(logits)
    return several


def held_for_test(
    store: "FeatureStore",
    rows: "np.ndarray",
    *,
    device: "torch.device | str",
    placement: Literal["auto", "device", "memory", "mmap"] = "auto",
) -> "StoredFeatures":
    """The features of those of `rows` that did not fail in extraction. InputError where all did."""
    from aggregate.data.features import StoredFeatures, usable

    good = usable(store)[rows] | (store.status[rows] == 0)  # a pending one is refused by StoredFeatures
    if not good.any():
        raise InputError(f"{store.path}: all {len(rows)} videos failed in extraction; see `python -m extract.status`")
    return StoredFeatures(store, rows[good], device=device, placement=placement)


def choose_device(name: str) -> "torch.device":
    """`auto` is a GPU where there is one. InputError for a device that is not there: never another one in silence."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise InputError(f"--device {name!r} is not known; give auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise InputError(f"--device {name}: this machine shows {torch.cuda.device_count()} GPUs to PyTorch")
    return device


def describe(checkpoint: "Checkpoint") -> str:
    """`hgnl (g1=16, g2=8, ...) over 2048 features, 700 classes`."""
    plain = {k: v for k, v in checkpoint.options.items() if k not in ("name", "dim", "num_classes", "dropout")}
    options = ", ".join(f"{name}={value}" for name, value in plain.items())
    return (
        f"{checkpoint.options['name']}{f' ({options})' if options else ''} over {checkpoint.options['dim']} features, "
        f"{len(checkpoint.classes)} classes"
    )


def source_of(checkpoint: "Checkpoint", options: Options) -> dict:
    """What a scores file says of where it comes from."""
    return {
        "model": checkpoint.options["name"],
        "options": checkpoint.options,
        "checkpoint": options.checkpoint.name,
        "features": checkpoint.features,
        "split": options.split,
    }


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m aggregate.evaluate"))
