"""python -m aggregate.crossval: aggregators compared on all videos of a store, each scored by
models that never saw it.

    fold 1   test | train ................ | inner hold-out      of the training part of each fold: chooses the epoch
    fold 2   train .. | test | train ..... | inner hold-out      and the options; then trained again on all of that
    ...                                                          part, so far as the epoch says, and tested once

Aggregators and folds are trained side by side, one process per core
(aggregate/ablation/processes.py). With the same folds, batches and options, a model is what
`aggregate.train` alone makes of them in one thread, bit for bit.
"""

import functools
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aggregate.ablation.configurations import (
    LISTS,
    FoldOptions,
    GridOptions,
    ProbeOptions,
    candidates,
)
from aggregate.ablation.processes import plan_processes, prepare_environment, run_side_by_side
from aggregate.ablation.protocols import PROTOCOLS, Protocol, describe_protocol, protocol_in
from aggregate.training.options import Aggregator
from extract import InputError
from extract.cli import progress, run_command
from extract.commands import command_line

if TYPE_CHECKING:
    from extract.store import FeatureStore


@dataclass(frozen=True, kw_only=True)
class Options(GridOptions, FoldOptions, ProbeOptions):
    """Compare aggregators by cross-validation on cached features; run again to resume.

    Where options of training take several values, the best combination is chosen inside the
    training part of each fold, as the epoch is.
    """

    agg: tuple[Aggregator | Literal["logreg", "knn"], ...] = ("hgnl",)  # type: ignore[assignment]
    """One or more; logreg and knn are scikit-learn's, on one vector per video."""
    protocol: Protocol | None = None
    """mveb: logistic regression on 8 videos per class, 10 draws; vjepa2: an attentive probe over a
    grid. Sets the defaults of other options: one that is given next to it wins."""
    out: Path = Path("runs/crossval")
    """The folder of AGG.h5 (out-of-fold scores, the mean over seeds), results.json and finished
    folds."""

    @classmethod
    def defaults_for(cls, args: Sequence[str]) -> "Options":
        """The defaults that a command line is parsed against: those that its --protocol sets."""
        return cls(**PROTOCOLS.get(protocol_in(args) or "", {}))


def main(options: Options) -> int:
    prepare_environment()
    from aggregate.ablation.folds import all_folds, describe_folds, rows_of
    from aggregate.ablation.grid import open_trainer, training_cost
    from aggregate.ablation.leaks import describe_crossing_pairs
    from aggregate.ablation.nested import FoldTask, score_fold
    from aggregate.ablation.outcomes import report
    from aggregate.ablation.probes import PROBES
    from aggregate.ablation.records import Records
    from aggregate.data.joined import open_features
    from aggregate.training.sources import with_possible_frames

    if options.protocol is not None:
        print(f"protocol  {describe_protocol(options.protocol, options)}")
    store = open_features(options.features)
    options = with_possible_frames(options, store)
    by_agg, skipped = candidates_by_agg(options, store)
    rows = rows_of(store, options)
    choosing = any(agg not in PROBES or len(by_agg[agg]) > 1 for agg in by_agg)
    folds = all_folds(store, options, list(dict.fromkeys(options.seeds)), choosing=choosing)
    processes, threads = plan_processes(len(folds) * len(by_agg), options.device)
    print(f"features  {store!r}\nfolds     {describe_folds(store, folds)}")
    if warning := describe_crossing_pairs(store, folds, options.features):
        print(warning, file=sys.stderr)
    for name, reason in skipped.items():
        print(f"skipped   {name}: {reason}")
    print(f"tried     {', '.join(one.name for several in by_agg.values() for one in several)}")
    print(f"training  {processes} at a time, {threads} threads each", flush=True)
    at_once = max(1, options.at_once // processes)
    segments = segments_by_agg(by_agg, options, store)
    # The longest first, so that none of them is alone at the end.
    longest_first = sorted(by_agg, key=lambda agg: training_cost(by_agg[agg], store), reverse=True)
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
        left = [
            task for task in tasks if (task.fold.seed, task.fold.name, task.agg) not in records.rows
        ]
        if done := len(tasks) - len(left):
            print(f"resuming  {options.out}: {done} of {len(tasks)} results are done")
        results = run_side_by_side(
            score_fold, left, prepare=prepare, processes=processes, threads=threads
        )
        for _, (row, logits) in progress(results, unit="result", initial=done, total=len(tasks)):
            records.add(row, logits)
        report(store, rows, options, segments, folds, records)
    print(f"Next: {command_line('pipelines.report', options.out, out=options.out / 'report.html')}")
    return 0


def segments_by_agg(
    by_agg: "dict[str, list[Any]]", options: Options, store: "FeatureStore"
) -> dict[str, list[int]]:
    """How many frames of a video each aggregator is tested with: as in training, and all.

    If it sees their order, as in training only; with several --frames, that differs by fold, and
    both numbers are shown.
    """
    from aggregate.models import sees_order

    both = sorted({options.frames[0], store.frames_per_video})
    segments = {}
    for agg, tried in by_agg.items():
        ordered = any(
            sees_order(agg, vars(one.options)) for one in tried if hasattr(one, "options")
        )
        segments[agg] = both[:1] if ordered and len(options.frames) == 1 else both
        if segments[agg] != both:
            print(
                f"tested    {agg} sees the order of frames, so it is tested with {both[0]}, as it is "
                "trained"
            )
    return segments


def candidates_by_agg(
    options: Options, store: "FeatureStore"
) -> "tuple[dict[str, list[Any]], dict[str, str]]":
    """What is tried of each of --agg, and of what cannot be built the reason by name.

    InputError for an aggregator of which nothing can be built, and for options that mean nothing to
    any.
    """
    from aggregate.ablation.probes import PROBES, probe_candidates

    aggs = list(dict.fromkeys(options.agg))
    heads: Any = tuple(agg for agg in aggs if agg not in PROBES)
    by_agg: dict[str, list[Any]] = {agg: [] for agg in aggs}
    skipped: dict[str, str] = {}
    if heads:
        tried = candidates(replace(options, agg=heads), store)
        for configuration in tried.configurations:
            by_agg[configuration.options.agg].append(configuration)
        skipped = tried.skipped
    if options.shots is not None and options.seeds != Options.seeds:
        seeds = " ".join(map(str, options.seeds))
        raise InputError(
            f"--seeds {seeds} means nothing to --shots: a draw takes the place of a seed; give --repeats"
        )
    own = {
        "knn": {"k", "vector", "standardize"},
        "logreg": {"C", "vector", "standardize", "epochs", "balance"},
    }
    for one in fields(options):
        value, users = getattr(options, one.name), [agg for agg in own if one.name in own[agg]]
        foreign = (
            one.name in LISTS[1:]
            and not heads
            and not set(users) & set(aggs)
            and one.name != "frames"
        )
        foreign |= one.name in ("C", "k", "vector") and not set(users) & set(aggs)
        if foreign and value != one.default:
            given = " ".join(map(str, value)) if isinstance(value, tuple) else value
            raise InputError(
                f"--{one.name.replace('_', '-')} {given} means nothing to --agg {' '.join(aggs)}"
            )
    for agg in set(aggs) - set(heads):
        by_agg[agg] = probe_candidates(agg, options)
    for name, reason in skipped.items():
        if not by_agg[head := name.split()[0]]:
            raise InputError(f"--agg {head}: {reason}")
    return by_agg, skipped


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m aggregate.crossval"))
