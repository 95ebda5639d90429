"""python -m pipelines.kinetics700: the whole iQIYI system from a folder of Kinetics-700.

    list -> features -> [K600 features -> its TSN ->] TSN -> HG-NL, control, NL [, StNet]
         -> scores of val and test -> weights searched on val -> submission of test
         -> report, and a table next to the paper's

Finished steps are skipped, so the same command resumes. `--skip` leaves steps out, and `--dry-run`
shows the plan with its cost on this machine.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from timeit import repeat
from typing import TYPE_CHECKING, Any, Literal

from extract import InputError
from extract.cli import first_few, run_as_script, text_table
from extract.commands import command_of
from extract.cores import available_cores
from extract.durable import read_record
from pipelines.steps import fuse, run_command_step

if TYPE_CHECKING:
    from extract.backbone.frozen import Backbone
    from extract.listing.videos import Listing

# Tables 3 and 4 of the paper: top-1 % on Kinetics-700 val with 3 and 25 segments, and the average
# error of the ensemble on test.
PAPER = {"tsn": (57.38, 61.83), "hgnl": (57.713, 62.12), "stnet": (55.7, None)}
PAPER_TEST_ERROR = 0.28444
AGGREGATORS = ("tsn", "hgnl", "nl")
VIDEOS_MEASURED = 8
CORES = available_cores()


@dataclass(frozen=True)
class Options:
    """The whole recipe of the paper on a folder of Kinetics-700; run it again to resume."""

    root: Path
    """Kinetics-700: <split>/<class>/<clip>, or any other layout that python -m extract reads."""
    workdir: Path = Path("runs/k700")
    pretrain: Path | None = None
    """Kinetics-600, in any of these layouts. A TSN is trained on it first, and the other models
    start from that TSN; classifier rows are matched by class name."""
    labels: str = "auto"
    """auto, kinetics700, or a file with one label per line."""
    backbone: str = "legacy_seresnext101_32x4d"
    weights: str = "pretrained"
    frames: int = 25
    epochs: int | None = None
    """Instead of the paper's, for a trial."""
    batch_size: int | None = None
    """Instead of the paper's, for a trial."""
    stnet: bool = False
    """Also fine-tune StNet end to end; it needs GPUs."""
    g1: int = 16
    g2: int = 8
    skip: tuple[Literal["extract", "tsn", "hgnl", "nl", "stnet", "ensemble", "report"], ...] = ()
    """Steps to leave out."""
    dry_run: bool = False
    """Only print the plan, with sizes and times from a short measurement on this machine."""
    workers: int | None = None
    """Number of backbones in parallel, in extraction and StNet (default: one per GPU)."""
    address: str | None = None
    """A Ray cluster for extraction and StNet."""
    decode_workers: int | None = None
    max_failed: float = 0.05
    """Fraction of failed videos up to which extraction succeeds."""


def main(options: Options) -> int:
    from extract.decode.transform import is_clip_wise
    from extract.listing.videos import list_videos

    if is_clip_wise(options.backbone):
        raise InputError(
            f"--backbone {options.backbone}: the recipe takes a backbone that sees single frames"
        )
    listings = {"k700": list_videos(options.root, labels=options.labels)}
    print(listings["k700"].report())
    if options.pretrain is not None:
        listings["k600"] = list_videos(options.pretrain)
        print(listings["k600"].report())
        _print_leaks(listings)
    labeled_splits = {video.split for video in listings["k700"].videos if video.label >= 0}
    if not {"train", "val"} <= labeled_splits:
        raise InputError(
            f"--root {options.root}: the recipe needs labeled videos of train and of val, "
            f"found {', '.join(map(repr, listings['k700'].splits))}"
        )
    if "stnet" in _steps(options) and options.backbone.startswith("tf_efficientnet"):
        raise InputError(
            f"--stnet: {options.backbone} has no four stages; give a ResNet-like --backbone"
        )
    if options.dry_run:
        _print_plan(options, listings)
    else:
        _run(options, listings["k700"].splits)
    return 0


def _print_leaks(listings: "dict[str, Listing]") -> None:
    """Print the videos that Kinetics-600 trains on and Kinetics-700 tests on."""
    from extract.listing.videos import shared_youtube_ids

    trained = [video for video in listings["k600"].videos if video.split != "test"]
    for split in ("val", "test"):
        tested = [video for video in listings["k700"].videos if video.split == split]
        shared = shared_youtube_ids(trained, tested)
        print(
            f"youtube ids in Kinetics-600's training and Kinetics-700's {split}: {len(shared):,}"
            + (f": {first_few(shared, 10)}" if shared else "")
        )


# -- the plan ------------------------------------------------------------------------------------


def _print_plan(options: Options, listings: "dict[str, Listing]") -> None:
    """Print sizes, and times from measured rates: it decodes a few videos, runs one batch through
    the backbone, and times a few training steps."""
    from extract.backbone.frozen import load_backbone
    from extract.store.summary import human_bytes

    backbone = load_backbone(options.backbone, weights=options.weights)
    seconds_per_video, seconds_per_frame = _measure_rates(options, listings["k700"], backbone)
    total = 0.0
    for name, listing in listings.items():
        num_videos = len(listing.videos)
        num_frames = num_videos * options.frames
        computing, decoding = num_frames * seconds_per_frame, num_videos * seconds_per_video
        elapsed = max(computing, decoding / CORES)
        if backbone.device == "cpu":  # both share the cores
            elapsed = computing + decoding / CORES
        total += elapsed
        print(
            f"extract   {name}: {num_videos:,} videos, {human_bytes(num_frames * backbone.dim * 2)}"
            f", about {_duration(elapsed)} (backbone {_duration(computing)}, "
            f"decoding {decoding / 3600:.3g} CPU-core hours)"
        )
        for agg in AGGREGATORS:
            if agg in _steps(options) and (name == "k700" or agg == "tsn"):
                total += _plan_training(options, name, listing, agg, backbone.dim)
    if "stnet" in _steps(options):
        print("stnet     end to end over all training videos, 20 epochs: no estimate, needs GPUs")
    print(f"in all    about {_duration(total)} on this machine with one worker")
    print(f"Next: {command_of('pipelines.kinetics700', options, dry_run=False)}")


def _measure_rates(
    options: Options, listing: "Listing", backbone: "Backbone"
) -> tuple[float, float]:
    """Seconds that one core takes to decode a video, and the backbone for a frame."""
    import numpy as np

    from extract.decode.jobs import Plan
    from extract.workers.rows import RowDecoder

    plan = Plan(options.frames, 1, 0, backbone.preprocessing)
    with RowDecoder.start(plan, workers=1, timeout=60) as decoder:
        rows = decoder.read(decoder.submit(listing.videos[:VIDEOS_MEASURED], plan))
        cpu_seconds = [row.cpu_seconds for row in rows if row.pictures is not None]
    if not cpu_seconds:
        raise InputError(
            f"--root {options.root}: none of its first {VIDEOS_MEASURED} videos decodes"
        )
    seconds_per_video = float(np.mean(cpu_seconds))
    batch = np.zeros((backbone.batch_size, *backbone.preprocessing.frame_shape), np.uint8)
    seconds_per_frame = min(repeat(lambda: backbone(batch), number=1, repeat=4)) / len(batch)
    print(
        f"\nbackbone  {backbone.describe()}\n"
        f"measured  decoding {1000 * seconds_per_video:.0f} CPU ms per video over "
        f"{len(cpu_seconds)} videos, {CORES} cores; backbone {1 / seconds_per_frame:,.0f} frames/s"
    )
    return seconds_per_video, seconds_per_frame


def _plan_training(options: Options, name: str, listing: "Listing", agg: str, dim: int) -> float:
    """Print and return the seconds of training on stored features, estimated from a few timed steps
    on features of the same shape."""
    import numpy as np
    import torch

    from aggregate.data.features import Batch
    from aggregate.models import build
    from aggregate.training.learner import Learner
    from aggregate.training.recipes import recipe

    num_videos = sum(video.split == "train" for video in listing.videos)
    schedule = recipe("paper", agg, videos=num_videos, **_pick(options, "epochs", "batch_size"))
    groups: Any = _pick(options, "g1", "g2") if agg == "hgnl" else {}
    model = build(agg, dim=dim, num_classes=len(listing.classes), **groups)
    learner = Learner(agg, model, schedule, 1, 0, torch.device("cpu"))
    x = torch.rand(schedule.batch_size, 3, dim).half()
    batch = Batch(x, None, torch.zeros(len(x), dtype=torch.int64), np.zeros(len(x)))
    num_steps = math.ceil(num_videos / schedule.batch_size) * schedule.epochs
    seconds = num_steps * min(repeat(lambda: learner.step(batch, 0, 0), number=1, repeat=4))
    print(f"train     {name} {agg}: {schedule}: about {_duration(seconds)} on this CPU")
    return seconds


def _duration(seconds: float) -> str:
    """`3:12:00`, `2 days, 4:30:00`."""
    return str(timedelta(seconds=max(1, round(seconds))))


# -- the steps -----------------------------------------------------------------------------------


def _run(options: Options, splits: Sequence[str]) -> None:
    """Run the steps in order; each has a folder of its own below the work folder."""
    work, steps = options.workdir, _steps(options)
    backbone = _pick(options, "backbone", "weights", "address", "decode_workers")
    schedule = _pick(options, "epochs", "batch_size")
    k700: dict[str, Any] = {"videos": options.root, "labels": options.labels}
    for name, videos in {"k700": k700, "k600": {"videos": options.pretrain}}.items():
        if "extract" in steps and videos["videos"]:
            extraction = backbone | _pick(options, "frames", "workers", "max_failed")
            run_command_step("extract.__main__", **videos, out=f"{work}/{name}.zarr", **extraction)

    def train(agg: str, out: str, init: Path | None, store: str = "k700") -> None:
        extra = {"control": True, **_pick(options, "g1", "g2")} if agg == "hgnl" else {}
        files = {"features": f"{work}/{store}.zarr", "out": work / out, "init": init}
        run_command_step("aggregate.train", agg=agg, recipe="paper", **files, **schedule, **extra)

    if options.pretrain and "tsn" in steps:
        train("tsn", "k600_tsn", None, store="k600")
    for agg in AGGREGATORS:
        if agg in steps:
            init: Path | None = work / "tsn" / "best.pt"
            if agg == "tsn":
                init = work / "k600_tsn" / "best.pt" if options.pretrain else None
            train(agg, agg, init)
    if "stnet" in steps:
        finetuning = {"workers": options.workers or 1, **backbone, **schedule}
        run_command_step(
            "aggregate.finetune", model="stnet", **k700, out=work / "stnet", **finetuning
        )
    sources = {name: {"features": f"{work}/k700.zarr"} for name in AGGREGATORS} | {"stnet": k700}
    models = {
        name: source for name, source in sources.items() if (work / name / "best.pt").exists()
    }
    if not models:
        raise InputError(f"{work} holds no trained model; leave fewer steps out with --skip")
    if "ensemble" in steps:
        common: dict[str, Any] = {"models": models, "segments": (3, 25)}
        # Weights searched on val are used for test if they beat equal ones on val.
        choice = "search" if len(models) > 1 else "equal"
        weights = fuse(work, split="val", weights=choice, **common)
        last = "test" if "test" in splits else "val"
        fuse(work, split=last, weights=weights, submission=work / "submission.json", **common)
    if "report" in steps:
        run_command_step("pipelines.report.__main__", rundir=work, out=work / "report.html")
    _print_results(options, list(models))


def _steps(options: Options) -> set[str]:
    """The steps that are not left out."""
    steps = {"extract", *AGGREGATORS, "ensemble", "report"}
    if options.stnet:
        steps.add("stnet")
    return steps - set(options.skip)


def _pick(options: Options, *names: str) -> dict[str, Any]:
    """Options that a step has under the same names."""
    return {name: getattr(options, name) for name in names}


def _print_results(options: Options, models: Sequence[str]) -> None:
    """A table of our results next to the paper's."""

    rows = [["model", "ours", "the paper (Table 3)"]]
    for name in models:
        file = options.workdir / name / "results.json"
        if not file.exists():
            continue
        results = read_record(file)[name].values()
        ours = " / ".join(f"{100 * measures['top1']['value']:.2f}" for measures in results)
        published = PAPER.get(name, ("none", "none"))
        theirs = " / ".join("-" if top1 is None else f"{top1}" for top1 in published)
        rows.append([name, ours, theirs])
    print(f"\nTop-1 % on val, 3 segments / most segments\n{text_table(rows)}")
    summary = options.workdir / "fused_test.json"
    record = read_record(summary) if summary.exists() else {}
    if record.get("table"):
        # The submitted weights, which validation chose before the test was read.
        error = next(
            row["summary"]["average_error"]["value"]
            for row in reversed(record["table"])
            if row["weights"] == record["weights"]
        )
        pairs = zip(models, record["weights"], strict=True)
        weights = ", ".join(f"{name} {weight:.4g}" for name, weight in pairs)
        print(
            f"  average error of the ensemble on test: {error:.5f}; "
            f"the paper {PAPER_TEST_ERROR} (Table 4)\n"
            f"  (weights {weights}, as validation supports; "
            "they were decided before the test was read)"
        )
    pretraining = (
        "Kinetics-600 trains the classifier only" if options.pretrain else "no Kinetics-600 stage"
    )
    print(
        f"What differs from the paper: the backbone ({options.backbone}, {options.weights}) is "
        f"frozen, the paper fine-tunes it; {pretraining}; "
        f"{'StNet end to end' if 'stnet' in models else 'no StNet'}; "
        "copies of Kinetics-700 lose videos with time."
    )


if __name__ == "__main__":
    run_as_script()
