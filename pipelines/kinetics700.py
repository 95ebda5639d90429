"""python -m pipelines.kinetics700: all of the iQIYI system from a folder of Kinetics-700.

    manifest -> features -> [K600 features -> its TSN ->] TSN -> HG-NL, control, NL [, StNet] -> scores of val and test
             -> weights searched on val -> submission of test -> report and a table beside the paper's

Every step is skipped where it is done, so the same command resumes; `--skip` leaves steps out,
`--dry-run` shows the plan with what it will cost on this machine.
"""

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from timeit import timeit
from typing import TYPE_CHECKING, Any, Literal

from extract import InputError
from extract.cli import first_few, run_command
from extract.commands import command_of
from extract.cores import available_cores
from pipelines.steps import fuse, scores_file, step

if TYPE_CHECKING:
    from extract.backbone.frozen import Backbone
    from extract.listing.videos import Listing

# Tables 3 and 4 of the paper: top-1 on Kinetics-700 val with 3 and 25 segments; average error of
# the ensemble on test.
PAPER = {"tsn": (57.38, 61.83), "hgnl": (57.713, 62.12), "stnet": (55.7, None)}
PAPER_TEST_ERROR = 0.28444
AGGREGATORS = ("tsn", "hgnl", "nl")
VIDEOS_MEASURED = 8
CORES = available_cores()


@dataclass(frozen=True)
class Options:
    """The whole recipe of the paper on a folder of Kinetics-700; run it again to resume."""

    root: Path
    """Kinetics-700: <split>/<class>/<clip> or any other layout python -m extract takes."""
    workdir: Path = Path("runs/k700")
    pretrain: Path | None = None
    """Kinetics-600, likewise: its TSN is trained first and starts the others, by class name."""
    labels: str = "auto"
    """auto, kinetics700, or a file of lines."""
    backbone: str = "legacy_seresnext101_32x4d"
    weights: str = "pretrained"
    frames: int = 25
    epochs: int | None = None
    """In the place of the paper's, for a trial; likewise the batch size."""
    batch_size: int | None = None
    stnet: bool = False
    """Also fine-tune StNet end to end; it needs GPUs."""
    g1: int = 16
    g2: int = 8
    skip: tuple[Literal["extract", "tsn", "hgnl", "nl", "stnet", "ensemble", "report"], ...] = ()
    """Steps to leave out."""
    dry_run: bool = False
    """Print the plan with sizes and times, measured shortly on this machine, and end."""
    workers: int | None = None
    """Backbones side by side in extraction and StNet (default: one a GPU)."""
    address: str | None = None
    """A Ray cluster for extraction and StNet."""
    decode_workers: int | None = None
    max_failed: float = 0.05
    """Fraction of failed videos up to which extraction counts as good."""


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
        _name_leaks(listings)
    if not {"train", "val"} <= {
        video.split for video in listings["k700"].videos if video.label >= 0
    }:
        known = ", ".join(map(repr, listings["k700"].splits))
        raise InputError(
            f"--root {options.root}: the recipe needs labeled videos of train and of val, found {known}"
        )
    if "stnet" in _wanted(options) and options.backbone.startswith("tf_efficientnet"):
        raise InputError(
            f"--stnet: {options.backbone} has no four stages; give a ResNet-like --backbone"
        )
    if options.dry_run:
        _plan(options, listings)
    else:
        _run(options, listings["k700"].splits)
    return 0


def _name_leaks(listings: "dict[str, Listing]") -> None:
    """What is trained on in the one and tested on in the other."""
    from extract.listing.videos import shared_youtube_ids

    trained = [video for video in listings["k600"].videos if video.split != "test"]
    for split in ("val", "test"):
        both = shared_youtube_ids(
            trained, [video for video in listings["k700"].videos if video.split == split]
        )
        named = f": {first_few(both, 10)}" if both else ""
        print(
            f"youtube ids in Kinetics-600's training and Kinetics-700's {split}: {len(both):,}{named}"
        )


# -- the plan ------------------------------------------------------------------------------------------------------


def _plan(options: Options, listings: "dict[str, Listing]") -> None:
    """Sizes, and times from a short measurement: some videos decoded, one batch through the
    backbone, some steps."""
    from extract.backbone.frozen import load_backbone
    from extract.store.summary import human_bytes
    from extract.workers.cost import cost

    backbone = load_backbone(options.backbone, weights=options.weights)
    decode, frame = _measured(options, listings["k700"], backbone)
    total = 0.0
    for name, listing in listings.items():
        videos = len(listing.videos)
        computing, decoding = videos * options.frames * frame, videos * decode / CORES
        on_cpu = backbone.device == "cpu"  # there both share the cores
        seconds = computing + decoding if on_cpu else max(computing, decoding)
        print(
            f"extract   {name}: {videos:,} videos, {human_bytes(videos * options.frames * backbone.dim * 2)}, about "
            f"{_duration(seconds)} (backbone {_duration(computing)}, decoding {_duration(decoding)})"
        )
        spread = cost(
            videos, views=1, frames=options.frames, dim=backbone.dim, decode_seconds=decode
        )
        print(f"cluster   {name}: {spread}")
        trained = [
            agg
            for agg in AGGREGATORS
            if agg in _wanted(options) and (name == "k700" or agg == "tsn")
        ]
        total += seconds + sum(
            _plan_training(options, name, listing, agg, backbone.dim) for agg in trained
        )
    if "stnet" in _wanted(options):
        print(
            "stnet     end to end over all training videos, 20 epochs: not estimated, it needs GPUs"
        )
    print(f"in all    about {_duration(total)} on this machine with one worker")
    print(f"Next: {command_of('pipelines.kinetics700', options, dry_run=False)}")


def _measured(options: Options, listing: "Listing", backbone: "Backbone") -> tuple[float, float]:
    """Seconds that a core takes to decode a video, and the backbone to compute a frame."""
    import numpy as np

    from extract.decode import VideoError
    from extract.decode.jobs import Plan, decode_job
    from extract.decode.pool import SubprocessPool

    seconds = []
    plan = Plan(options.frames, 1, 0, backbone.preprocessing)
    with SubprocessPool(decode_job, slot_bytes=plan.slot_bytes, workers=1, timeout=60) as pool:
        for video in listing.videos[:VIDEOS_MEASURED]:
            with pool.submit((video.path, [(video.id, video.span)], plan)).result() as finished:
                if finished.failure or isinstance(finished.result[0], VideoError):
                    continue
                seconds.append(finished.cpu_seconds)
                pictures = finished.buffer[: plan.row_bytes].reshape(-1, *plan.shape[3:])
                batch = pictures[finished.result[0].clips.ravel()[: backbone.batch_size]]
    if not seconds:
        raise InputError(
            f"--root {options.root}: none of its first {VIDEOS_MEASURED} videos decodes"
        )
    frame = _timed(lambda: backbone(batch)) / len(batch)
    decode = float(np.mean(seconds))
    print(
        f"\nbackbone  {backbone.describe()}\nmeasured  decoding {1000 * decode:.0f} CPU ms a video over {len(seconds)} "
        f"videos, {CORES} cores; backbone {1 / frame:,.0f} frames/s"
    )
    return decode, frame


def _plan_training(options: Options, name: str, listing: "Listing", agg: str, dim: int) -> float:
    """Seconds of training on cached features, from some timed steps on features of the true
    shape."""
    import numpy as np
    import torch

    from aggregate.data.features import Batch
    from aggregate.models import build
    from aggregate.training.learner import Learner
    from aggregate.training.recipes import recipe

    train = sum(video.split == "train" for video in listing.videos)
    chosen = recipe(
        "paper", agg, videos=train, epochs=options.epochs, batch_size=options.batch_size
    )
    groups: Any = _same(options, "g1", "g2") if agg == "hgnl" else {}
    model = build(agg, dim=dim, num_classes=len(listing.classes), **groups)
    learner = Learner(agg, model, chosen, 1, 0, torch.device("cpu"))
    x = torch.rand(chosen.batch_size, 3, dim).half()
    batch = Batch(x, None, torch.zeros(len(x), dtype=torch.int64), np.zeros(len(x)))
    seconds = (
        _timed(lambda: learner.step(batch, 0, 0)) * -(-train // chosen.batch_size) * chosen.epochs
    )
    print(f"train     {name} {agg}: {chosen}: about {_duration(seconds)} on this CPU")
    return seconds


def _timed(call: Callable[[], object]) -> float:
    """Seconds of a call, the mean of three after a first one."""
    call()
    return timeit(call, number=3) / 3


def _duration(seconds: float) -> str:
    """`3:12:00`, `2 days, 4:30:00`."""
    return str(timedelta(seconds=max(1, round(seconds))))


# -- the steps -----------------------------------------------------------------------------------------------------


def _run(options: Options, splits: Sequence[str]) -> None:
    """The steps in their order, each in a folder of its own below the work folder."""
    work, wanted = options.workdir, _wanted(options)
    backbone, machine = (
        _same(options, "backbone", "weights"),
        _same(options, "address", "decode_workers"),
    )
    schedule = _same(options, "epochs", "batch_size")
    k700: dict[str, Any] = {"videos": options.root, "labels": options.labels}
    for name, videos in {"k700": k700, "k600": {"videos": options.pretrain}}.items():
        if "extract" in wanted and videos["videos"]:
            more = _same(options, "frames", "workers", "max_failed")
            step(
                "extract.__main__",
                **videos,
                out=f"{work}/{name}.zarr",
                **backbone,
                **machine,
                **more,
            )

    def train(agg: str, out: str, init: Path | None, store: str = "k700") -> None:
        own = {"control": True, **_same(options, "g1", "g2")} if agg == "hgnl" else {}
        files = {"features": f"{work}/{store}.zarr", "out": work / out, "init": init}
        step("aggregate.train", agg=agg, recipe="paper", **files, **schedule, **own)

    if options.pretrain and "tsn" in wanted:
        train("tsn", "k600_tsn", None, store="k600")
    before = {"tsn": work / "k600_tsn" / "best.pt" if options.pretrain else None}
    for agg in AGGREGATORS:
        if agg in wanted:
            train(agg, agg, before.get(agg, work / "tsn" / "best.pt"))
    if "stnet" in wanted:
        more = {"workers": options.workers or 1, **backbone, **machine, **schedule}
        step("aggregate.finetune", model="stnet", **k700, out=work / "stnet", **more)
    tested_on = {name: {"features": f"{work}/k700.zarr"} for name in AGGREGATORS} | {"stnet": k700}
    models = {
        name: source for name, source in tested_on.items() if (work / name / "best.pt").exists()
    }
    if not models:
        raise InputError(f"{work} holds no trained model; leave fewer steps out with --skip")
    if (
        "ensemble" in wanted
    ):  # weights are searched on val, and used for test if they beat equal ones there
        common: dict[str, Any] = {"models": models, "segments": (3, 25)}
        weights = fuse(
            work, split="val", weights="search" if len(models) > 1 else "equal", **common
        )
        last = "test" if "test" in splits else "val"
        fuse(work, split=last, weights=weights, submission=work / "submission.json", **common)
    if "report" in wanted:
        step("pipelines.report.__main__", rundir=work, out=work / "report.html")
    _table(options, list(models))


def _wanted(options: Options) -> set[str]:
    """The steps that are not left out."""
    return {"extract", *AGGREGATORS, *["stnet"] * options.stnet, "ensemble", "report"} - set(
        options.skip
    )


def _same(options: Options, *names: str) -> dict[str, Any]:
    """Options that a step has under the same names."""
    return {name: getattr(options, name) for name in names}


def _table(options: Options, models: Sequence[str]) -> None:
    """Ours beside the paper's."""
    from aggregate.metrics import summarize
    from aggregate.scores import Scores

    print(
        "\nTop-1 % on val, 3 segments / most segments\n  model    ours             the paper (Table 3)"
    )
    for name in models:
        if not (path := scores_file(options.workdir, name, "val")).exists():
            continue
        both: list[Any] = [Scores.load(path, min(3, options.frames)), Scores.load(path)]
        ours = [
            f"{100 * summarize(one.logits, one.labels, one.groups).top1.value:.2f}" for one in both
        ]
        theirs = " / ".join(
            "-" if value is None else f"{value}" for value in PAPER.get(name, ("none", "none"))
        )
        print(f"  {name:<8} {' / '.join(ours)}   {theirs}")
    summary = options.workdir / "fused_test.json"
    if summary.exists() and (table := json.loads(summary.read_text(encoding="utf-8"))["table"]):
        used = json.loads(summary.read_text(encoding="utf-8"))["weights"]
        # The weighting that was submitted, which validation chose before the test was read; never
        # the better of two.
        error = next(
            row["summary"]["average_error"]["value"]
            for row in reversed(table)
            if row["weights"] == used
        )
        chosen = ", ".join(
            f"{name} {weight:.4g}" for name, weight in zip(models, used, strict=True)
        )
        print(
            f"  average error of the ensemble on test: {error:.5f}; the paper {PAPER_TEST_ERROR} (Table 4)"
        )
        print(
            f"  (weights {chosen}, as validation supports; they were decided before the test was read)"
        )
    pretraining = (
        "Kinetics-600 trains the classifier only" if options.pretrain else "no Kinetics-600 stage"
    )
    print(
        f"What differs from the paper: the backbone ({options.backbone}, {options.weights}) is frozen, "
        f"the paper fine-tunes it; {pretraining}; {'StNet end to end' if 'stnet' in models else 'no StNet'}; "
        "copies of Kinetics-700 lose videos with time."
    )


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m pipelines.kinetics700"))
