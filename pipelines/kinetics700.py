"""python -m pipelines.kinetics700: all of the iQIYI system from a folder of Kinetics-700.

    manifest -> features -> [K600 features -> its TSN ->] TSN -> HG-NL, control, NL [, StNet] -> scores of val and test
             -> weights searched on val -> submission of test -> report and a table beside the paper's

Every step is skipped where it is done, so the same command resumes; `--skip` leaves steps out, `--dry-run` shows the
plan with what it will cost on this machine.
"""

import csv
import io
import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from extract.cli import InputError, RunError, run_command
from extract.files import replace_file

if TYPE_CHECKING:
    from extract.listing.videos import Listing

STEPS = ("extract", "tsn", "hgnl", "nl", "stnet", "ensemble", "report")
# Tables 3 and 4 of the paper: top-1 on Kinetics-700 val with 3 and 25 segments; average error of the ensemble on test.
PAPER = {"tsn": (57.38, 61.83), "hgnl": (57.713, 62.12), "stnet": (55.7, None)}
PAPER_TEST_ERROR = 0.28444
VIDEOS_MEASURED = 8


@dataclass(frozen=True)
class Options:
    """The whole recipe of the paper on a folder of Kinetics-700; run it again to resume."""

    root: Path
    """Kinetics-700: <split>/<class>/<clip> or any other layout python -m extract takes, or its CSV."""
    workdir: Path = Path("runs/k700")
    clips: Path | None = None
    """With a CSV as --root: the folder its clips lie in."""
    pretrain: Path | None = None
    """Kinetics-600, likewise: its TSN is trained first and starts the others, by class name."""
    labels: str = "auto"
    """auto, kinetics700, or a file of lines."""
    backbone: str = "legacy_seresnext101_32x4d"
    weights: str = "pretrained"
    frames: int = 25
    augment_passes: int = 0
    """Further views of each video for training; each costs as much as the first."""
    recipe: Literal["paper", "cached"] = "paper"
    epochs: int | None = None
    """In the place of the recipe's, for a trial."""
    batch_size: int | None = None
    stnet: bool = False
    """Also fine-tune StNet end to end; it needs GPUs."""
    g1: int = 16
    g2: int = 8
    skip: tuple[Literal["extract", "tsn", "hgnl", "nl", "stnet", "ensemble", "report"], ...] = ()
    """Steps to leave out."""
    dry_run: bool = False
    """Print the plan with sizes and times, measured shortly on this machine, and end."""
    limit: int | None = None
    """For a trial: only so many labelled videos of each listing, spread evenly over it."""
    workers: int | None = None
    address: str | None = None
    """A Ray cluster for extraction and StNet."""
    decode_workers: int | None = None
    block_size: int = 64
    device: str = "auto"
    max_failed: float = 0.05
    seed: int = 0


def main(options: Options) -> int:
    from extract.listing.videos import list_videos

    listing = list_videos(options.root, labels=options.labels, root=options.clips)
    listings = {"k700": listing}
    print(listing.report())
    if options.pretrain is not None:
        listings["k600"] = list_videos(options.pretrain)
        print(listings["k600"].report())
        _name_leaks(listings)
    _check(options, listing)
    if options.dry_run:
        _plan(options, listings)
        return 0
    options.workdir.mkdir(parents=True, exist_ok=True)
    _Recipe(options, listings).run()
    return 0


def _name_leaks(listings: "dict[str, Listing]") -> None:
    """What is trained on in the one and tested on in the other."""
    from extract.listing.videos import shared_youtube_ids

    trained = [video for video in listings["k600"].videos if video.split != "test"]
    for split in ("val", "test"):
        tested = [video for video in listings["k700"].videos if video.split == split]
        both = shared_youtube_ids(trained, tested)
        named = f": {', '.join(both[:10])}{', ...' if len(both) > 10 else ''}" if both else ""
        print(f"youtube ids in Kinetics-600's training and Kinetics-700's {split}: {len(both):,}{named}")


def _check(options: Options, listing: "Listing") -> None:
    splits = {video.split for video in listing.videos if video.label >= 0}
    if not {"train", "val"} <= splits:
        known = ", ".join(repr(split) for split in listing.splits)
        raise InputError(f"--root {options.root}: the recipe needs labelled videos of train and of val, found {known}")
    if "stnet" not in options.skip and options.stnet and options.backbone.startswith("tf_efficientnet"):
        raise InputError(f"--stnet: {options.backbone} has no four stages; give a ResNet-like --backbone")


# -- the plan ------------------------------------------------------------------------------------------------------


def _plan(options: Options, listings: "dict[str, Listing]") -> None:
    """Sizes, and times from a short measurement: some videos decoded, one batch through the backbone, some steps."""
    import numpy as np

    from extract.backbone.model import load_backbone
    from extract.decode import VideoError
    from extract.decode.transform import Plan, prepare, view_names
    from extract.store.summary import human_bytes

    backbone = load_backbone(options.backbone, weights=options.weights, device=options.device, seed=options.seed)
    see, views = backbone.preprocessing, len(view_names(1, options.augment_passes))
    plan = Plan(options.frames, 1, options.augment_passes, see, options.seed, "pyav")
    out = np.zeros((views, options.frames, see.size, see.size, 3), np.uint8)
    seconds, count = 0.0, 0
    for video in listings["k700"].videos[:VIDEOS_MEASURED]:
        started = time.process_time()
        try:
            prepare(video.path, video.id, plan, out)
        except VideoError:
            continue
        seconds, count = seconds + time.process_time() - started, count + 1
    if not count:
        raise InputError(f"--root {options.root}: none of its first {VIDEOS_MEASURED} videos decodes")
    batch = out.reshape(-1, see.size, see.size, 3)[: backbone.batch_size]
    backbone(batch)
    started = time.perf_counter()
    backbone(batch)
    each = (time.perf_counter() - started) / len(batch)
    cores = len(os.sched_getaffinity(0))
    print(f"\nbackbone  {backbone.describe()}")
    print(
        f"measured  decoding {1000 * seconds / count:.0f} CPU ms a video over {count} videos, {cores} cores; backbone "
        f"{1 / each:,.0f} frames/s"
    )
    total_hours = 0.0
    for name, listing in listings.items():
        videos = min(len(listing.videos), options.limit or len(listing.videos))
        device, decode = videos * views * options.frames * each, videos * seconds / count / cores
        on_cpu = backbone.device.type == "cpu"  # there both share the cores
        hours = (device + decode if on_cpu else max(device, decode)) / 3600
        total_hours += hours
        size = videos * views * options.frames * backbone.dim * 2
        print(
            f"extract   {name}: {videos:,} videos, {human_bytes(size)}, about {_duration(hours)} "
            f"(backbone {_duration(device / 3600)}, decoding {_duration(decode / 3600)})"
        )
        total_hours += _plan_training(options, name, listing, videos, backbone.dim)
    if options.stnet and "stnet" not in options.skip:
        print("stnet     end to end over all training videos, 20 epochs: not estimated, it needs GPUs")
    print(f"in all    about {_duration(total_hours)} on this machine with one worker")


def _plan_training(options: Options, name: str, listing: "Listing", videos: int, dim: int) -> float:
    """Hours of training on cached features, from a few timed steps on features of the true shape."""
    import numpy as np
    import torch

    from aggregate.data.features import Batch
    from aggregate.models import build
    from aggregate.training.learner import Learner
    from aggregate.training.recipes import recipe

    train = min(sum(video.split == "train" for video in listing.videos), videos)
    hours = 0.0
    for agg in [
        step for step in ("tsn", "hgnl", "nl") if step not in options.skip and (name == "k700" or step == "tsn")
    ]:
        chosen = recipe(options.recipe, agg, videos=train, epochs=options.epochs, batch_size=options.batch_size)
        groups = {"g1": options.g1, "g2": options.g2} if agg == "hgnl" else {}
        model = build(agg, dim=dim, num_classes=len(listing.classes), **groups)
        learner = Learner(agg, model, chosen, 1, 0, torch.device("cpu"))
        x = torch.rand(chosen.batch_size, 3, dim).half()
        batch = Batch(x, None, torch.zeros(len(x), dtype=torch.int64), np.zeros(len(x)))
        learner.step(batch, 0, 0)
        started = time.perf_counter()
        for step in range(3):
            learner.step(batch, 0, step)
        each = (time.perf_counter() - started) / 3
        cost = each * -(-train // chosen.batch_size) * chosen.epochs / 3600
        hours += cost
        print(f"train     {name} {agg}: {chosen}: about {_duration(cost)} on this CPU")
    return hours


def _duration(hours: float) -> str:
    """`3.2 h`, `12 min`, `40 s`, `2.1 days`."""
    for unit, length in (("days", 24.0), ("h", 1.0), ("min", 1 / 60)):
        if hours >= length * 1.5:
            return f"{hours / length:.3g} {unit}"
    return f"{hours * 3600:.2g} s"


@dataclass(frozen=True)
class _Source:
    """Where videos are listed, as python -m extract takes it."""

    videos: Path
    clips: Path | None
    labels: str


def _trial(listing: "Listing", source: _Source, limit: int, folder: Path) -> _Source:
    """A CSV of `limit` labelled videos spread evenly over a listing, with all of its classes."""
    videos = [video for video in listing.videos if video.label >= 0]
    chosen = [videos[place * len(videos) // limit] for place in range(min(limit, len(videos)))]
    root = (source.clips or (source.videos if source.videos.is_dir() else source.videos.parent)).resolve()
    replace_file(folder / "labels.txt", "\n".join(listing.classes) + "\n")
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["path", "label", "split", "group"])
    for video in chosen:
        path = os.path.relpath(os.path.abspath(video.path), root)
        writer.writerow([path, listing.classes[video.label], video.split, video.group])
    replace_file(folder / "videos.csv", text.getvalue())
    return _Source(folder / "videos.csv", root, str(folder / "labels.txt"))


# -- the steps -----------------------------------------------------------------------------------------------------


class _Recipe:
    """The steps in their order, each in a folder of its own below the work folder."""

    def __init__(self, options: Options, listings: "dict[str, Listing]") -> None:
        self.options, self.work = options, options.workdir
        self.listing = listings["k700"]
        self.store = str(self.work / "k700.zarr")
        self.sources = {
            "k700": _Source(options.root, options.clips, options.labels),
            "k600": _Source(options.pretrain or Path(), None, "auto"),
        }
        if options.limit is not None:
            for name, listing in listings.items():
                self.sources[name] = _trial(listing, self.sources[name], options.limit, self.work / f"{name}_trial")

    def run(self) -> None:
        skipped = self.options.skip
        if "extract" not in skipped:
            self._extract("k700", self.store)
        init = self._pretrained() if self.options.pretrain is not None else None
        if "tsn" not in skipped:
            self._train("tsn", init=init)
        tsn = self.work / "tsn" / "best.pt"
        for name in ("hgnl", "nl"):
            if name not in skipped:
                self._train(name, init=tsn, control=name == "hgnl")
        if self.options.stnet and "stnet" not in skipped:
            self._stnet()
        models = [name for name in ("tsn", "hgnl", "nl", "stnet") if (self.work / name / "best.pt").exists()]
        if not models:
            raise InputError(f"{self.work} holds no trained model; leave fewer steps out with --skip")
        if "ensemble" not in skipped:
            self._ensemble(models)
        if "report" not in skipped:
            import pipelines.report.__main__ as report

            _say("report")
            _done(report.main(report.Options(self.work, out=self.work / "report.html")), "the report")
        self._table(models)

    def _extract(self, name: str, out: str) -> None:
        from extract.__main__ import Options as ExtractOptions
        from extract.__main__ import main as extract

        source, options = self.sources[name], self.options
        _say(f"features of {source.videos}")
        chosen = ExtractOptions(
            videos=source.videos,
            out=out,
            root=source.clips,
            labels=source.labels,
            backbone=options.backbone,
            weights=options.weights,
            frames=options.frames,
            augment_passes=options.augment_passes,
            device=options.device,
            workers=options.workers,
            address=options.address,
            decode_workers=options.decode_workers,
            block_size=options.block_size,
            max_failed=options.max_failed,
            seed=options.seed,
        )
        _done(extract(chosen), f"extraction of {source.videos}")

    def _pretrained(self) -> Path:
        """The TSN of Kinetics-600."""
        assert self.options.pretrain is not None
        store = str(self.work / "k600.zarr")
        if "extract" not in self.options.skip:
            self._extract("k600", store)
        if "tsn" not in self.options.skip:
            self._train("tsn", folder="k600_tsn", features=store)
        return self.work / "k600_tsn" / "best.pt"

    def _train(
        self, name: str, *, folder: str = "", features: str = "", init: Path | None = None, control: bool = False
    ) -> None:
        from aggregate import train

        _say(f"training {folder or name}")
        options = self.options
        groups: dict[str, Any] = {"g1": options.g1, "g2": options.g2} if name == "hgnl" else {}
        chosen = train.Options(
            agg=name,  # type: ignore[arg-type]
            features=features or self.store,
            out=self.work / (folder or name),
            init=init,
            recipe=options.recipe,
            epochs=options.epochs,
            batch_size=options.batch_size,
            control=control,
            allow_missing_classes=options.limit is not None,
            device=options.device,
            seed=options.seed,
            **groups,
        )
        _done(train.main(chosen), f"training {name}")

    def _stnet(self) -> None:
        from aggregate import finetune

        _say("StNet end to end")
        source, options = self.sources["k700"], self.options
        chosen = finetune.Options(
            model="stnet",
            videos=source.videos,
            root=source.clips,
            labels=source.labels,
            out=self.work / "stnet",
            backbone=options.backbone,
            weights=options.weights,
            epochs=options.epochs,
            batch_size=options.batch_size,
            device=options.device,
            workers=options.workers or 1,
            address=options.address,
            decode_workers=options.decode_workers,
            allow_missing_classes=options.limit is not None,
            seed=options.seed,
        )
        _done(finetune.main(chosen), "StNet")

    def _ensemble(self, models: Sequence[str]) -> None:
        """Weights searched on val, then used for test (where there is one) and its submission."""
        import ensemble.__main__ as fusion

        listed = self.listing.splits if self.options.limit is None else ("val",)
        splits = [split for split in ("val", "test") if split in listed]
        for split in splits:
            for name in models:
                self._score(name, split)
        _say("ensemble on val")
        several = len(models) > 1
        fused = self.work / "fused_val.h5"
        chosen = fusion.Options(
            scores=tuple(self._scores(name, "val") for name in models),
            out=fused,
            weights="search" if several else "equal",
            submission=None if "test" in splits else self.work / "submission.json",
        )
        _done(fusion.main(chosen), "the ensemble on val")
        if "test" in splits:
            _say("ensemble on test, with the weights of val")
            weights = json.loads(fused.with_suffix(".json").read_text(encoding="utf-8"))["weights"]
            chosen = fusion.Options(
                scores=tuple(self._scores(name, "test") for name in models),
                out=self.work / "fused_test.h5",
                weights=",".join(repr(weight) for weight in weights),
                submission=self.work / "submission.json",
            )
            _done(fusion.main(chosen), "the ensemble on test")

    def _scores(self, name: str, split: str) -> Path:
        return self.work / "scores" / f"{name}_{split}.h5"

    def _score(self, name: str, split: str) -> None:
        from aggregate import evaluate

        checkpoint, out = self.work / name / "best.pt", self._scores(name, split)
        if out.exists() and out.stat().st_mtime > checkpoint.stat().st_mtime:
            return
        _say(f"scores of {name} on {split}")
        of_videos: dict[str, Any] = {}
        if name == "stnet":
            source = self.sources["k700"]
            of_videos = {"videos": source.videos, "root": source.clips, "labels": source.labels}
        asked = evaluate.Options(
            checkpoint, self.store, split=split, segments=(3, 25), out=out, device=self.options.device, **of_videos
        )
        _done(evaluate.main(asked), f"the test of {name}")

    def _table(self, models: Sequence[str]) -> None:
        """Ours beside the paper's."""
        from aggregate.metrics import top_k_error
        from aggregate.scores import Scores

        print("\nTop-1 % on val, 3 segments / most segments\n  model    ours             the paper (Table 3)")
        for name in models:
            path = self._scores(name, "val")
            if not path.exists():
                continue
            ours = []
            for scores in (Scores.load(path, min(3, self.options.frames)), Scores.load(path)):
                assert scores.labels is not None
                known = scores.labels >= 0
                ours.append(100 * (1 - top_k_error(scores.logits[known], scores.labels[known], 1)))
            theirs = " / ".join("-" if value is None else f"{value}" for value in PAPER.get(name, ("none", "none")))
            print(f"  {name:<8} {ours[0]:.2f} / {ours[1]:.2f}   {theirs}")
        summary = self.work / "fused_test.json"
        if summary.exists() and (table := json.loads(summary.read_text(encoding="utf-8"))["table"]):
            error = min(row["summary"]["average_error"]["value"] for row in table if row["name"].startswith("all"))
            print(f"  average error of the ensemble on test: {error:.5f}; the paper {PAPER_TEST_ERROR} (Table 4)")
        pretraining = "Kinetics-600 trains the classifier only" if self.options.pretrain else "no Kinetics-600 stage"
        print(
            f"What differs from the paper: the backbone ({self.options.backbone}, {self.options.weights}) is frozen, "
            f"the paper fine-tunes it; {pretraining}; {'StNet end to end' if 'stnet' in models else 'no StNet'}; "
            "copies of Kinetics-700 lose videos with time."
        )


def _say(what: str) -> None:
    print(f"\n== {what} ==", flush=True)


def _done(status: int | None, what: str) -> None:
    if status:
        raise RunError(f"the recipe ends here: {what} gave exit status {status}; what it said stands above")


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m pipelines.kinetics700"))
