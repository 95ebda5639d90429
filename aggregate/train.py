"""python -m aggregate.train: a feature store in, a trained classifier and a comparison with plain averaging out."""

import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aggregate.ablation.processes import prepare_environment
from aggregate.training.configurations import Configuration, configured
from aggregate.training.configurations import TrainOptions as Options
from aggregate.training.options import HeadOptions
from extract.cli import InputError, run_command
from extract.commands import command_line

if TYPE_CHECKING:
    import torch

    from aggregate.training.learner import Learner
    from aggregate.training.run import Run
    from extract.store import FeatureStore


def main(options: Options) -> int:
    prepare_environment()
    run = prepare(options)
    run.train()
    run.report()
    print(f"Next: {_next_command(options, run)}")
    return 0


def _next_command(options: Options, run: "Run") -> str:
    """Test the model on the validation split; without one, compare by cross-validation."""
    testing: Any = run.source.testing
    if (testing.store.splits[testing.rows] == options.val_split).all():
        test = {"checkpoint": run.out / "best.pt", "features": options.features, "split": options.val_split}
        return command_line("aggregate.evaluate", **test, out=f"{run.out}.h5")
    heads = tuple(dict.fromkeys(("tsn", options.agg)))
    return command_line("aggregate.crossval", agg=heads, features=options.features, out=run.out.parent / "crossval")


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
    last = open_folder(out, options)
    rows, val_rows, words = choose_rows(store, options, options.seed)
    configuration = configured(options.agg, options, videos=len(rows))
    training = StoredFeatures(store, rows, device=device, placement=options.placement, training=True)
    testing = StoredFeatures(store, val_rows, device=device, placement=options.placement)
    print(
        f"features  {store!r}\nvideos    {words}\n"
        f"training  {training.words}; {len(training.views)} views; on {device}\n"
        f"recipe    {options.recipe}: {configuration.recipe}"
    )
    learners, references = _learners_and_baselines(configuration, store, device)
    source = CachedFeatures(training, testing, options.frames, configuration.recipe.batch_size, options.seed)
    common = {"classes": list(store.classes), "features": store.provenance, "frames": options.frames}
    segments = possible_segments((options.frames, store.frames_per_video), store)
    run = Run(out, options, learners, source, common=common, segments=segments, references=references)
    run.resume(last)
    return run


def _learners_and_baselines(
    configuration: Configuration, store: "FeatureStore", device: "torch.device"
) -> "tuple[list[Learner], dict[str, torch.nn.Module]]":
    """The learner asked for, beside it the mean-pool baseline and the control, on the same batches; and the TSN of
    --init as it is, which then is the baseline."""
    from aggregate.training.checkpoint import Checkpoint

    options = configuration.options
    init = None if options.init is None else Checkpoint.load(options.init)
    if init is not None:
        init.check_features(store.provenance, store.dim, str(options.features))
    elif options.recipe == "paper" and options.agg in ("nl", "hgnl"):
        print("note      the paper starts its 8 epochs from a trained TSN; without --init this starts fresh")
    learners = [configuration.learner(store, device, init=init)]
    references: dict[str, torch.nn.Module] = {}
    defaults: dict[str, Any] = {one.name: one.default for one in fields(HeadOptions) if one.name != "frames"}
    tsn = replace(options, agg="tsn", **defaults)
    from_tsn = init is not None and init.options["name"] == "tsn"
    if options.agg != "tsn":
        if init is not None and from_tsn and init.classes == list(store.classes):
            print(f"baseline  the TSN of {options.init}, as it is")
            references["tsn (as it was)"] = init.model().to(device)
        else:
            baseline = replace(configuration, name="tsn (baseline)", options=tsn)
            learners.append(baseline.learner(store, device, file="baseline.pt"))
    if options.control:
        if not from_tsn:
            raise InputError("--control trains the TSN of --init for as many more epochs; give --init tsn.pt")
        control = replace(configuration, name="tsn (control)", options=tsn)
        learners.append(control.learner(store, device, init=init, file="control.pt"))
    return learners, references


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m aggregate.train"))
