"""python -m aggregate.train: a feature store in, a trained classifier and a comparison with plain averaging out."""

import sys
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aggregate.training.options import (
    Aggregator,
    HeadOptions,
    ScheduleOptions,
    SplitOptions,
    aggregator_options,
    as_recorded,
    changes_of,
)
from extract.cli import InputError, run_command

if TYPE_CHECKING:
    import torch

    from aggregate.training.checkpoint import Checkpoint
    from aggregate.training.learner import Learner
    from aggregate.training.recipes import Recipe
    from aggregate.training.run import Run
    from extract.store import FeatureStore

# Where a run may continue with another value: they say where and how fast, not what.
_FREE_ON_RESUME = ("out", "device", "placement")


@dataclass(frozen=True)
class Options(HeadOptions, ScheduleOptions, SplitOptions):
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
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    placement: Literal["auto", "device", "memory", "mmap"] = "auto"
    """Where features lie while they are read; auto chooses by size."""


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
    from aggregate.training.splits import check_classes, choose_rows
    from extract.device import choose_device
    from extract.store import FeatureStore

    out = options.out or Path("runs") / options.agg
    options = as_recorded(options, out)
    store = FeatureStore.open(options.features)
    device = choose_device(options.device)
    last = open_folder(out, options, free=_FREE_ON_RESUME)
    rows, val_rows, words = choose_rows(store, options, options.seed)
    check_classes(store, rows, allow_missing=options.allow_missing_classes)
    recipe = recipe_of(options, videos=len(rows))
    training = StoredFeatures(store, rows, device=device, placement=options.placement, training=True)
    testing = StoredFeatures(store, val_rows, device=device, placement=options.placement)
    print(
        f"features  {store!r}\nvideos    {words}\n"
        f"training  {training.words}; {len(training.views)} views; on {device}\n"
        f"recipe    {options.recipe}: {recipe}"
    )
    learners, reference = _contestants(options, store, recipe, videos=len(rows), device=device)
    source = CachedFeatures(training, testing, options.frames, recipe.batch_size, options.seed)
    common = {"classes": list(store.classes), "features": store.provenance, "frames": options.frames}
    segments = possible_segments((options.frames, store.frames_per_video), store)
    run = Run(out, options, learners, source, common=common, segments=segments, reference=reference)
    run.resume(last)
    return run


def _contestants(
    options: Options, store: "FeatureStore", recipe: "Recipe", *, videos: int, device: "torch.device"
) -> "tuple[list[Learner], Any]":
    """The learner asked for, beside it the mean-pool baseline and the control, on the same batches; and the TSN of
    --init as it is, which then is the baseline."""
    from aggregate.training.checkpoint import Checkpoint

    init = None if options.init is None else Checkpoint.load(options.init)
    if init is not None:
        init.check_features(store.provenance, store.dim, str(options.features))
    elif options.recipe == "paper" and options.agg in ("nl", "hgnl"):
        print("note      the paper starts its 8 epochs from a trained TSN; without --init this starts fresh")
    common: dict[str, Any] = {"videos": videos, "device": device}
    learners = [make_learner(options, store, recipe, init=init, **common)]
    defaults: dict[str, Any] = {one.name: one.default for one in fields(HeadOptions) if one.name != "frames"}
    tsn = replace(options, agg="tsn", **defaults)
    from_tsn = init is not None and init.options["name"] == "tsn"
    reference = None
    if options.agg != "tsn":
        if init is not None and from_tsn and init.classes == list(store.classes):
            print(f"baseline  the TSN of {options.init}, as it is")
            reference = ("tsn (as it was)", init.model().to(device))
        else:
            learners.append(make_learner(tsn, store, recipe, **common, label="tsn (baseline)", file="baseline.pt"))
    if options.control:
        if not from_tsn:
            raise InputError("--control trains the TSN of --init for as many more epochs; give --init tsn.pt")
        control = make_learner(tsn, store, recipe, init=init, **common, label="tsn (control)", file="control.pt")
        learners.append(control)
    return learners, reference


def recipe_of(options: Options, *, videos: int) -> "Recipe":
    """The recipe that `options` choose and change, for so many videos to train on."""
    from aggregate.training.recipes import recipe

    return recipe(options.recipe, options.agg, videos=videos, **changes_of(options))


def make_learner(
    options: Options,
    store: "FeatureStore",
    recipe: "Recipe",
    *,
    videos: int,
    device: "torch.device",
    init: "Checkpoint | None" = None,
    label: str = "",
    file: str = "best.pt",
    tell: Callable[[str], object] = print,
) -> "Learner":
    """A learner of `options`, started from `init` where there is one; `tell`s what that carried over."""
    import torch

    from aggregate.models import build, carry_over
    from aggregate.training.learner import Learner

    own, label = aggregator_options(options.agg, options, init.options if init else None), label or options.agg
    torch.manual_seed(options.seed)  # a model's start is a function of the seed, whatever stands beside it
    own |= {"dropout": recipe.dropout, "standardise": recipe.standardise}
    model = build(options.agg, dim=store.dim, num_classes=len(store.classes), **own)
    if init is not None:
        carried = carry_over(model, init.state_dict, classes=store.classes, source_classes=init.classes)
        tell(f"{label}: from {options.init}: {carried}")
    steps = -(-videos // recipe.batch_size)
    return Learner(label, model, recipe, steps_per_epoch=steps, seed=options.seed, device=device, file=file)


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m aggregate.train"))
