"""python -m aggregate.train: train a head on stored features and compare it with averaging."""

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from aggregate.ablation.processes import prepare_environment
from aggregate.training.options import HEAD_FLAGS, HeadOptions, clip_segments, limit_frames
from aggregate.training.options import TrainOptions as Options
from extract import InputError
from extract.cli import run_as_script
from extract.commands import command_line

if TYPE_CHECKING:
    import numpy as np
    import torch

    from aggregate.training.checkpoint import Checkpoint
    from aggregate.training.configurations import Configuration
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
    """The command that tests the model on its validation videos."""
    import numpy as np

    testing: Any = run.source.testing
    whole = np.array_equal(testing.rows, np.flatnonzero(testing.store.splits == options.val_split))
    split = options.val_split if whole else "held-out"
    test = {"checkpoint": run.out / "best.pt", "features": options.features, "split": split}
    return command_line("aggregate.evaluate", **test, out=f"{run.out}.h5")


def prepare(options: Options) -> "Run":
    """The run of `options`, resumed if its folder holds one."""
    from aggregate.data.features import StoredFeatures
    from aggregate.data.joined import open_features
    from aggregate.training.checkpoint import Checkpoint
    from aggregate.training.configurations import configured
    from aggregate.training.manifest import choose_or_continue
    from aggregate.training.run import Run, open_folder
    from aggregate.training.sources import CachedFeatures
    from extract.device import choose_device

    store = open_features(options.features)
    options = limit_frames(options, store)
    device = choose_device(options.device)
    last = open_folder(options)
    chosen = choose_or_continue(store, options, last)
    precision = options.precision
    if last is not None and last.data is not None and precision == "auto":
        # `auto` depends on the device: a run that is resumed keeps its precision.
        precision = last.data["recipe"]["precision"]
    configuration = configured(
        options.agg, replace(options, precision=precision), videos=len(chosen.train)
    )
    execution: Any = {"device": device, "placement": options.placement}
    training = StoredFeatures(store, chosen.train, training=True, **execution)
    testing = StoredFeatures(store, chosen.validate, **execution)
    print(
        f"features  {store!r}\nvideos    {chosen.description}\n"
        f"training  {training.placement_note}; {len(training.views)} views; on {device}\n"
        f"recipe    {options.recipe}: {configuration.recipe}"
    )
    init = None if options.init is None else Checkpoint.load(options.init)
    learners, baselines = _learners_and_baselines(
        configuration, init, store, device, training.labels
    )
    module: Any = learners[0].model.aggregator
    if hasattr(module, "differences"):
        differences = "; ".join(module.differences())
        but = f", but {differences}" if differences else ""
        print(f"head      {options.agg} as in the paper{but}")
    source = CachedFeatures(training, testing, options.frames)
    segments = clip_segments((options.frames, store.frames_per_video), store)
    return Run(
        options,
        learners,
        source,
        store,
        chosen,
        store.provenance,
        last,
        segments=segments,
        baselines=baselines,
    )


def _learners_and_baselines(
    configuration: "Configuration",
    init: "Checkpoint | None",
    store: "FeatureStore",
    device: "torch.device",
    labels: "np.ndarray",
) -> "tuple[list[Learner], dict[str, torch.nn.Module]]":
    """The learner of `configuration` with its baseline and control, and finished models to compare.

    All learners train on the same batches. If --init is a TSN, it is the baseline, without more
    training.
    """
    options = configuration.options
    if init is not None:
        init.check_features(store.provenance, store.dim, store.path)
    elif options.recipe == "paper" and options.agg in ("nl", "hgnl"):
        print(
            "note      the paper starts its 8 epochs from a trained TSN; "
            "without --init this starts from random weights"
        )
    learners = [configuration.learner(store, device, labels=labels, init=init)]
    baselines: dict[str, torch.nn.Module] = {}
    defaults: Any = {flag: getattr(HeadOptions, flag) for flag in HEAD_FLAGS}
    tsn = replace(options, agg="tsn", **defaults)
    from_tsn = init is not None and init.options["name"] == "tsn"
    if options.agg != "tsn":
        if init is not None and from_tsn and init.classes == list(store.classes):
            print(f"baseline  the TSN of {options.init}, without more training")
            baselines["tsn (as it was)"] = init.model().to(device)
        else:
            baseline = replace(configuration, name="tsn (baseline)", options=tsn)
            learners.append(baseline.learner(store, device, labels=labels, file="baseline.pt"))
    if options.control:
        if not from_tsn:
            raise InputError(
                "--control continues the TSN of --init for as many epochs; give --init tsn.pt"
            )
        control = replace(configuration, name="tsn (control)", options=tsn)
        learners.append(control.learner(store, device, labels=labels, init=init, file="control.pt"))
    return learners, baselines


if __name__ == "__main__":
    run_as_script()
