"""python -m aggregate.train: a feature store in, a trained classifier and a comparison with plain
averaging out."""

import sys
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from aggregate.ablation.processes import prepare_environment
from aggregate.training.configurations import Configuration, configured
from aggregate.training.configurations import TrainOptions as Options
from aggregate.training.options import HeadOptions
from extract import InputError
from extract.cli import run_command
from extract.commands import command_line

if TYPE_CHECKING:
    import numpy as np
    import torch

    from aggregate.training.learner import Learner
    from aggregate.training.run import Run
    from extract.store import FeatureStore


def main(options: Options) -> int:
    prepare_environment()
    from extract.durable import locked

    with locked(options.folder):
        run = prepare(options)
        run.train()
        run.report()
    print(f"Next: {_next_command(options, run)}")
    return 0


def _next_command(options: Options, run: "Run") -> str:
    """Test the model on the videos that validated it, by the name of their split if they have
    one."""
    import numpy as np

    testing: Any = run.source.testing
    whole = np.array_equal(testing.rows, np.flatnonzero(testing.store.splits == options.val_split))
    split = options.val_split if whole else "held-out"
    test = {"checkpoint": run.out / "best.pt", "features": options.features, "split": split}
    return command_line("aggregate.evaluate", **test, out=f"{run.out}.h5")


def prepare(options: Options) -> "Run":
    """The run that `options` ask for, at the epoch where its folder stands."""
    from aggregate.data.features import StoredFeatures
    from aggregate.data.joined import open_features
    from aggregate.training.manifest import (
        choose_or_continue,
        record,
        refuse_other_data,
        videos_csv,
    )
    from aggregate.training.run import Run, open_folder
    from aggregate.training.sources import possible_segments, with_possible_frames
    from extract.device import choose_device

    out = options.folder
    store = open_features(options.features)
    options = with_possible_frames(options, store)
    device = choose_device(options.device)
    last = open_folder(out, options)
    chosen = choose_or_continue(store, options, options.seed, out, last)
    if last is not None and last.data is not None and options.precision == "auto":
        # `auto` depends on the device: a run that goes on keeps what it was begun with.
        begun = replace(options, precision=last.data["recipe"]["precision"])
    else:
        begun = options
    configuration = configured(options.agg, begun, videos=len(chosen.train))
    training = StoredFeatures(
        store, chosen.train, device=device, placement=options.placement, training=True
    )
    testing = StoredFeatures(store, chosen.validate, device=device, placement=options.placement)
    print(
        f"features  {store!r}\nvideos    {chosen.description}\n"
        f"training  {training.words}; {len(training.views)} views; on {device}\n"
        f"recipe    {options.recipe}: {configuration.recipe}"
    )
    if options.init is not None and not options.init.is_file():
        raise InputError(f"--init {options.init}: there is no checkpoint {options.init}")
    data = record(store, chosen, init=options.init, recipe=configuration.recipe)
    if last is not None:
        refuse_other_data(out, last, store, store.provenance, data)
    learners, references = _learners_and_baselines(configuration, store, device, training.labels)
    module: Any = learners[0].model.aggregator
    if hasattr(module, "differences"):
        print(
            f"head      {options.agg} as in the paper{''.join(f'; {one}' for one in module.differences())}"
        )
    source = configuration.source(training, testing)
    common = {
        "classes": list(store.classes),
        "features": store.provenance,
        "frames": options.frames,
        "data": data,
    }
    segments = possible_segments((options.frames, store.frames_per_video), store)
    run = Run(
        out, options, learners, source, common=common, segments=segments, references=references
    )
    run.videos_csv = videos_csv(store, chosen)
    run.resume(last)
    return run


def _learners_and_baselines(
    configuration: Configuration,
    store: "FeatureStore",
    device: "torch.device",
    labels: "np.ndarray",
) -> "tuple[list[Learner], dict[str, torch.nn.Module]]":
    """The learner asked for, beside it the mean-pool baseline and the control, on the same batches;
    and the TSN of --init as it is, which then is the baseline."""
    from aggregate.training.checkpoint import Checkpoint

    options = configuration.options
    init = None if options.init is None else Checkpoint.load(options.init)
    if init is not None:
        init.check_features(store.provenance, store.dim, store.path)
    elif options.recipe == "paper" and options.agg in ("nl", "hgnl"):
        print(
            "note      the paper starts its 8 epochs from a trained TSN; without --init this starts fresh"
        )
    learners = [configuration.learner(store, device, labels=labels, init=init)]
    references: dict[str, torch.nn.Module] = {}
    defaults: dict[str, Any] = {
        one.name: one.default for one in fields(HeadOptions) if one.name != "frames"
    }
    tsn = replace(options, agg="tsn", **defaults)
    from_tsn = init is not None and init.options["name"] == "tsn"
    if options.agg != "tsn":
        if init is not None and from_tsn and init.classes == list(store.classes):
            print(f"baseline  the TSN of {options.init}, as it is")
            references["tsn (as it was)"] = init.model().to(device)
        else:
            baseline = replace(configuration, name="tsn (baseline)", options=tsn)
            learners.append(baseline.learner(store, device, labels=labels, file="baseline.pt"))
    if options.control:
        if not from_tsn:
            raise InputError(
                "--control trains the TSN of --init for as many more epochs; give --init tsn.pt"
            )
        control = replace(configuration, name="tsn (control)", options=tsn)
        learners.append(control.learner(store, device, labels=labels, init=init, file="control.pt"))
    return learners, references


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m aggregate.train"))
