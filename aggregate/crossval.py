"""python -m aggregate.crossval: compare aggregators on all videos of a store, by cross-validation.

    fold 1   test | train ................ | held out
    fold 2   train .. | test | train ..... | held out

Each video is scored by models that never saw it. The held-out part of the training part of a fold
chooses the epoch and the options; then the model is trained on all of the training part, up to that
epoch, and tested once.

Aggregators and folds are trained in parallel, one process per core: see
aggregate/ablation/processes.py. With the same folds, batches and options, a model equals the one
that `aggregate.train` trains in one thread, bit for bit.
"""

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aggregate.ablation.options import PROBES, FoldOptions, GridOptions, ProbeOptions
from aggregate.ablation.processes import plan_processes, prepare_environment, run_side_by_side
from aggregate.ablation.protocols import PROTOCOLS, Protocol, describe_protocol, protocol_in
from aggregate.training.options import Aggregator, limit_frames
from extract import InputError
from extract.cli import progress, run_as_script
from extract.commands import command_line, spaced

if TYPE_CHECKING:
    from extract.store import FeatureStore


@dataclass(frozen=True, kw_only=True)
class Options(GridOptions, FoldOptions, ProbeOptions):
    """Compare aggregators by cross-validation on cached features; run again to resume.

    If options of training have several values, the best combination is chosen inside the training
    part of each fold, as the epoch is.
    """

    agg: tuple[Aggregator | Literal["logreg", "knn"], ...] = ("hgnl",)  # type: ignore[assignment]
    """One or more; logreg and knn are scikit-learn's, on one vector per video."""
    protocol: Protocol | None = None
    """mveb: logistic regression on 8 videos per class, 10 draws; vjepa2: an attentive probe over a
    grid. It sets the defaults of other options; options that are given take precedence."""
    out: Path = Path("runs/crossval")
    """The folder of AGG.h5 (out-of-fold scores, the mean over seeds), results.json and finished
    folds."""

    @classmethod
    def defaults_for(cls, args: Sequence[str]) -> "Options":
        """The defaults for this command line: those that its --protocol sets."""
        return cls(**PROTOCOLS.get(protocol_in(args) or "", {}))


def main(options: Options) -> int:
    prepare_environment()
    from aggregate.ablation.folds import all_folds, describe_folds, rows_of
    from aggregate.ablation.grid import open_trainer, training_cost
    from aggregate.ablation.leaks import describe_crossing_pairs
    from aggregate.ablation.nested import FoldTask, score_fold
    from aggregate.ablation.outcomes import report
    from aggregate.ablation.records import Records
    from aggregate.data.joined import open_features

    if options.protocol is not None:
        print(f"protocol  {describe_protocol(options.protocol, options)}")
    store = open_features(options.features)
    options = limit_frames(options, store)
    by_agg, skipped = candidates_by_agg(options, store)
    rows = rows_of(store, options)
    choosing = any(agg not in PROBES or len(by_agg[agg]) > 1 for agg in by_agg)
    folds = all_folds(store, options, list(dict.fromkeys(options.seeds)), choosing=choosing)
    processes, threads = plan_processes(len(folds) * len(by_agg), options.device)
    print(f"features  {store!r}\nfolds     {describe_folds(store, folds, options.shots)}")
    if warning := describe_crossing_pairs(store, folds, options.features):
        print(warning, file=sys.stderr)
    for name, reason in skipped.items():
        print(f"skipped   {name}: {reason}")
    names = [candidate.name for candidates in by_agg.values() for candidate in candidates]
    print(f"tried     {', '.join(names)}")
    print(f"training  {processes} at a time, {threads} threads each", flush=True)
    segments = segments_by_agg(by_agg, options, store)
    # The longest first, so that none of them runs alone at the end.
    longest_first = sorted(by_agg, key=lambda agg: training_cost(by_agg[agg], store), reverse=True)
    at_once = max(1, options.at_once // processes)
    tasks = [
        FoldTask(fold, agg, by_agg[agg], segments[agg], at_once, options.vector)
        for agg in longest_first
        for fold in folds
    ]
    prepare = functools.partial(
        open_trainer,
        options.features,
        device=options.device,
        placement=options.placement,
        processes=processes,
        rows=rows,
    )
    with Records(options, store, by=("seed", "fold", "agg"), kind="cross-validation") as records:
        remaining = [
            task for task in tasks if (task.fold.seed, task.fold.name, task.agg) not in records.rows
        ]
        if done := len(tasks) - len(remaining):
            print(f"resuming  {options.out}: {done} of {len(tasks)} results are done")
        results = run_side_by_side(
            score_fold, remaining, prepare=prepare, processes=processes, threads=threads
        )
        for _, (row, logits) in progress(results, unit="result", initial=done, total=len(tasks)):
            records.add(row, logits)
        report(store, rows, options, segments, folds, records)
    print(f"Next: {command_line('pipelines.report', options.out, out=options.out / 'report.html')}")
    return 0


def segments_by_agg(
    by_agg: "dict[str, list[Any]]", options: Options, store: "FeatureStore"
) -> dict[str, list[int]]:
    """The numbers of segments that each aggregator is tested with: as in training, and all.

    An aggregator that sees the order of frames is tested only with as many as in training. With
    several --frames that number differs by fold, so both are shown.
    """
    from aggregate.models import sees_order

    both = sorted({options.frames[0], store.frames_per_video})
    segments = {}
    for agg, candidates in by_agg.items():
        ordered = agg not in PROBES and any(
            sees_order(agg, vars(candidate.options)) for candidate in candidates
        )
        segments[agg] = both[:1] if ordered and len(options.frames) == 1 else both
        if segments[agg] != both:
            print(
                f"tested    {agg} sees the order of frames, so it is tested with {both[0]}, as it "
                "is trained"
            )
    return segments


def candidates_by_agg(
    options: Options, store: "FeatureStore"
) -> "tuple[dict[str, list[Any]], dict[str, str]]":
    """The candidates of each of --agg, and the reason for each that cannot be built, by name.

    InputError for an aggregator without a candidate, and for options that apply to none of --agg.
    """
    from aggregate.ablation.configurations import Plan, candidates, check_lists
    from aggregate.ablation.probes import probe_candidates

    check_lists(options, store)
    if options.shots is not None and options.seeds != Options.seeds:
        raise InputError(
            f"--seeds {spaced(options.seeds)} does not apply to --shots: a draw replaces a seed; "
            "give --repeats"
        )
    heads: Any = tuple(agg for agg in options.agg if agg not in PROBES)
    plan = candidates(replace(options, agg=heads), store) if heads else Plan([], {})
    by_agg: dict[str, list[Any]] = {}
    for agg in options.agg:
        own = [each for each in plan.configurations if each.options.agg == agg]
        by_agg[agg] = probe_candidates(agg, options) if agg in PROBES else own
    for name, reason in plan.skipped.items():
        if not by_agg[head := name.split()[0]]:
            raise InputError(f"--agg {head}: {reason}")
    return by_agg, plan.skipped


if __name__ == "__main__":
    run_as_script()
