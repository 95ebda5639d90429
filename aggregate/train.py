"""python -m aggregate.train: a feature store in, a trained classifier and a comparison with plain averaging out."""

import sys
from collections.abc import Callable, Hashable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aggregate.training.options import (
    Aggregator,
    HeadOptions,
    PlaceOptions,
    ScheduleOptions,
    SplitOptions,
    aggregator_options,
    changes_of,
)
from aggregate.training.recipes import Recipe, recipe
from extract.cli import InputError, run_command

if TYPE_CHECKING:
    import torch

    from aggregate.models import VideoClassifier
    from aggregate.training.checkpoint import Checkpoint
    from aggregate.training.learner import Learner
    from aggregate.training.run import Run
    from extract.store import FeatureStore


@dataclass(frozen=True)
class Options(HeadOptions, ScheduleOptions, SplitOptions, PlaceOptions):
    """Train an aggregator and its classifier on cached features; run again to resume."""

    agg: Aggregator
    """tsn is the average, txb StNet's temporal block (which sees the order of frames), attentive V-JEPA's probe."""
    features: str = "feats.zarr"
    """The feature store of `python -m extract`."""
    out: Path | None = None
    """The run folder (default: runs/AGG)."""
    init: Path | None = None
    """A checkpoint to start from; classifier rows carry over by class name."""
    recipe: Literal["cached", "paper"] = "cached"
    """cached: what works best on a frozen backbone; paper: iQIYI's schedule."""
    control: bool = False
    """Also train the TSN of --init for as many more epochs, the control the paper lacks."""
    seed: int = 0


def main(options: Options) -> int:
    run = prepare(options)
    run.train()
    run.report()
    where = f"--features {options.features} --split {options.val_split} --out {run.out}.h5"
    print(f"Next: python -m aggregate.evaluate --checkpoint {run.out / 'best.pt'} {where}")
    return 0


def prepare(options: Options) -> "Run":
    """The run that `options` ask for, at the epoch where its folder stands."""
    from aggregate.data.features import StoredFeatures
    from aggregate.training.run import Run, open_folder
    from aggregate.training.sources import CachedFeatures, possible_segments
    from aggregate.training.splits import choose_rows
    from extract.device import choose_device
    from extract.store import FeatureStore

    out = options.out or Path("runs") / options.agg
    store = FeatureStore.open(options.features)
    device = choose_device(options.device)
    options, last = open_folder(out, options)
    rows, val_rows, words = choose_rows(store, options, options.seed)
    asked = configured(options.agg, options, videos=len(rows))
    training = StoredFeatures(store, rows, device=device, placement=options.placement, training=True)
    testing = StoredFeatures(store, val_rows, device=device, placement=options.placement)
    print(
        f"features  {store!r}\nvideos    {words}\n"
        f"training  {training.words}; {len(training.views)} views; on {device}\n"
        f"recipe    {options.recipe}: {asked.recipe}"
    )
    learners, references = _contestants(asked, store, device)
    source = CachedFeatures(training, testing, options.frames, asked.recipe.batch_size, options.seed)
    common = {"classes": list(store.classes), "features": store.provenance, "frames": options.frames}
    segments = possible_segments((options.frames, store.frames_per_video), store)
    run = Run(out, options, learners, source, common=common, segments=segments, references=references)
    run.resume(last)
    return run


def _contestants(
    asked: "Configuration", store: "FeatureStore", device: "torch.device"
) -> "tuple[list[Learner], dict[str, torch.nn.Module]]":
    """The learner asked for, beside it the mean-pool baseline and the control, on the same batches; and the TSN of
    --init as it is, which then is the baseline."""
    from aggregate.training.checkpoint import Checkpoint

    options = asked.options
    init = None if options.init is None else Checkpoint.load(options.init)
    if init is not None:
        init.check_features(store.provenance, store.dim, str(options.features))
    elif options.recipe == "paper" and options.agg in ("nl", "hgnl"):
        print("note      the paper starts its 8 epochs from a trained TSN; without --init this starts fresh")
    learners = [asked.learner(store, device, init=init)]
    references: dict[str, torch.nn.Module] = {}
    defaults: dict[str, Any] = {one.name: one.default for one in fields(HeadOptions) if one.name != "frames"}
    tsn = replace(options, agg="tsn", **defaults)
    from_tsn = init is not None and init.options["name"] == "tsn"
    if options.agg != "tsn":
        if init is not None and from_tsn and init.classes == list(store.classes):
            print(f"baseline  the TSN of {options.init}, as it is")
            references["tsn (as it was)"] = init.model().to(device)
        else:
            baseline = replace(asked, name="tsn (baseline)", options=tsn)
            learners.append(baseline.learner(store, device, file="baseline.pt"))
    if options.control:
        if not from_tsn:
            raise InputError("--control trains the TSN of --init for as many more epochs; give --init tsn.pt")
        control = replace(asked, name="tsn (control)", options=tsn)
        learners.append(control.learner(store, device, init=init, file="control.pt"))
    return learners, references


@dataclass(frozen=True)
class Configuration:
    """A model to train: what this command would be told of it, and the recipe that follows."""

    name: str
    options: Options
    recipe: Recipe
    videos: int  # to train on

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.videos // self.recipe.batch_size)

    @property
    def shares_batches(self) -> Hashable:
        """What its batches are a function of: configurations where this is equal can share a pass."""
        return self.options.seed, self.options.frames, self.recipe.batch_size, self.recipe.epochs

    def model(self, store: "FeatureStore", init: "Checkpoint | None" = None) -> "VideoClassifier":
        """Untrained, with those options of `init` that give its weights their meaning. InputError as `build`."""
        from aggregate.models import build

        own = aggregator_options(self.options.agg, self.options, init.options if init else None)
        own |= {"dropout": self.recipe.dropout, "standardise": self.recipe.standardise}
        return build(self.options.agg, dim=store.dim, num_classes=len(store.classes), **own)

    def learner(
        self,
        store: "FeatureStore",
        device: "torch.device",
        *,
        init: "Checkpoint | None" = None,
        file: str = "best.pt",
        tell: Callable[[str], object] = print,
    ) -> "Learner":
        """The model with its optimizer, started from `init` where there is one; `tell`s what that carried over."""
        import torch

        from aggregate.models import carry_over
        from aggregate.training.learner import Learner

        torch.manual_seed(self.options.seed)  # a model's start is a function of the seed, whatever stands beside it
        model = self.model(store, init)
        if init is not None:
            carried = carry_over(model, init.state_dict, classes=store.classes, source_classes=init.classes)
            tell(f"{self.options.agg}: from {self.options.init}: {carried}")
        steps, seed = self.steps_per_epoch, self.options.seed
        return Learner(self.name, model, self.recipe, steps_per_epoch=steps, seed=seed, device=device, file=file)


def configured(name: str, options: Options, *, videos: int) -> Configuration:
    """The configuration of `options`, with their recipe for so many videos to train on."""
    changed = recipe(options.recipe, options.agg, videos=videos, **changes_of(options))
    return Configuration(name, options, changed, videos)


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m aggregate.train"))
