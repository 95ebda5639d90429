"""python -m aggregate.crossval: aggregators compared on all videos of a store, each scored by models that never saw it.

    fold 1   test | train ................ | inner hold-out      of the training part of each fold: chooses the epoch
    fold 2   train .. | test | train ..... | inner hold-out      and the options; then trained again on all of that
    ...                                                          part, so far as the epoch says, and tested once

Aggregators and folds are trained side by side, one process per core (aggregate/ablation/processes.py). With the same
folds, batches and options, a model is what `aggregate.train` alone makes of them in one thread, bit for bit.
"""

import functools
import itertools
import json
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aggregate.ablation.configurations import FoldOptions, GridOptions, candidates
from aggregate.ablation.processes import plan_processes, prepare_environment, run_side_by_side
from extract.cli import InputError, progress, run_command
from extract.commands import command_line

if TYPE_CHECKING:
    import numpy as np

    from aggregate.ablation.folds import Fold
    from aggregate.ablation.records import Records
    from extract.store import FeatureStore

SCHEMA = "hgnl-crossval/1"


@dataclass(frozen=True, kw_only=True)
class Options(GridOptions, FoldOptions):
    """Compare aggregators by cross-validation on cached features; run again to resume.

    Where options of training take several values, the best combination is chosen inside the training part of each fold,
    as the epoch is.
    """

    out: Path = Path("runs/crossval")
    """The folder of AGG.h5 (out-of-fold scores, the mean over seeds), results.json and finished folds."""


def main(options: Options) -> int:
    prepare_environment()
    from aggregate.ablation.folds import describe_folds, folds_of, rows_of
    from aggregate.ablation.grid import open_trainer, training_cost
    from aggregate.ablation.nested import FoldTask, score_fold
    from aggregate.ablation.records import Records
    from extract.store import FeatureStore

    store = FeatureStore.open(options.features)
    tried = candidates(options, store)
    by_agg = {
        agg: [one for one in tried.configurations if one.options.agg == agg] for agg in dict.fromkeys(options.agg)
    }
    for name, reason in tried.skipped.items():
        if not by_agg[agg := name.split()[0]]:
            raise InputError(f"--agg {agg}: {reason}")
    rows = rows_of(store, options)
    folds = [fold for seed in dict.fromkeys(options.seeds) for fold in folds_of(store, options, seed)]
    processes, threads = plan_processes(len(folds) * len(by_agg), options.device)
    print(f"features  {store!r}\nfolds     {describe_folds(store, folds)}")
    tried.print_skipped()
    print(f"tried     {', '.join(one.name for one in tried.configurations)}")
    print(f"training  {processes} at a time, {threads} threads each", flush=True)
    at_once, segments = max(1, options.at_once // processes), segments_of(store, options)
    # The longest first, so that none of them is alone at the end.
    longest_first = sorted(by_agg, key=lambda agg: training_cost(by_agg[agg], store), reverse=True)
    tasks = [FoldTask(fold, agg, by_agg[agg], segments, at_once) for agg in longest_first for fold in folds]
    prepare = functools.partial(
        open_trainer,
        options.features,
        device=options.device,
        placement=options.placement,
        processes=processes,
        rows=rows,
    )
    with Records(options, store, by=("seed", "fold", "agg"), what="cross-validation") as records:
        left = [task for task in tasks if (task.fold.seed, task.fold.name, task.agg) not in records.rows]
        if done := len(tasks) - len(left):
            print(f"resuming  {options.out}: {done} of {len(tasks)} results are done")
        results = run_side_by_side(score_fold, left, prepare=prepare, processes=processes, threads=threads)
        for _, (row, logits) in progress(results, unit="result", initial=done, total=len(tasks)):
            records.add(row, logits)
        report(store, rows, options, folds, records)
    print(f"Next: {command_line('pipelines.report', options.out, out=options.out / 'report.html')}")
    return 0


# -- results -----------------------------------------------------------------------------------------------------------


def segments_of(store: "FeatureStore", options: Options) -> list[int]:
    """The segments of training, and all."""
    return sorted({options.frames[0], store.frames_per_video})


def report(
    store: "FeatureStore", rows: "np.ndarray", options: Options, folds: "list[Fold]", records: "Records"
) -> None:
    """Write AGG.h5 and results.json; print the table."""
    import numpy as np

    from aggregate.metrics import describe_units, independent_units, ranks
    from aggregate.scores import Scores, group_keys, save_scores
    from extract.files import replace_file

    segments = segments_of(store, options)
    labels, classes, seeds = store.labels[rows], len(store.classes), list(dict.fromkeys(options.seeds))
    aggs, groups = list(dict.fromkeys(options.agg)), group_keys(store.ids, store.groups)[rows]
    baseline = "tsn" if "tsn" in aggs else aggs[0]
    places: dict[str, np.ndarray] = {}  # of each true label: int [segments, seeds, N]
    for agg in aggs:
        logits = np.full((len(seeds), len(segments), len(rows), classes), np.nan, np.float32)
        for fold in folds:
            at = np.searchsorted(rows, fold.test)
            logits[seeds.index(fold.seed)][:, at] = records.array((fold.seed, fold.name, agg))
        source = {"model": agg, "folds": options.folds, "seeds": seeds, "features": store.provenance}
        known = (store.ids[rows].tolist(), store.classes)
        mean = [
            Scores(*known, one, labels, source, n, groups=groups)
            for n, one in zip(segments, logits.mean(axis=0), strict=True)
        ]
        save_scores(options.out / f"{agg}.h5", mean)
        places[agg] = np.array([[ranks(one, labels) for one in by_seed] for by_seed in logits.swapaxes(0, 1)])
    heads: list[dict[str, Any]] = []
    for agg in aggs:
        beside = [None] * len(segments) if agg == baseline else places[baseline]
        measured = {
            str(count): measures(ours, theirs, classes, groups)
            for count, ours, theirs in zip(segments, places[agg], beside, strict=True)
        }
        chosen = [records.rows[fold.seed, fold.name, agg] for fold in folds]
        heads.append({"name": agg, "scores": f"{agg}.h5", "segments": measured, "chosen": chosen})
    results = {"schema": SCHEMA, "features": options.features, "videos": len(rows), "classes": classes}
    names = list(dict.fromkeys(fold.name for fold in folds))
    units = int(independent_units(groups).max()) + 1
    results |= {
        "resampled": describe_units(units, len(rows)),
        "by": options.folds,
        "folds": names,
        "seeds": seeds,
        "baseline": baseline,
        "heads": heads,
    }
    replace_file(options.out / "results.json", json.dumps(results, indent=1) + "\n")
    files = ", ".join(str(options.out / one["scores"]) for one in heads)
    print(f"\n{table(results)}\n\nscores of every video by models that never saw it (their mean over seeds): {files}")


def measures(places: "np.ndarray", baseline: "np.ndarray | None", classes: int, groups: "np.ndarray") -> dict[str, Any]:
    """What `places` [seeds, N] of true labels come to: means over seeds with bootstrap intervals over `groups` [N]; of
    top-1 also Student's interval over seeds, and the difference to the `baseline`'s, paired over videos."""
    from aggregate.ablation.compare import over_seeds
    from aggregate.metrics import bootstrap, challenge_errors

    first, in_five = places == 0, places < min(5, classes)
    by_seed = first.mean(axis=1).tolist()
    over = asdict(over_seeds(by_seed)) if len(by_seed) > 1 else None
    gained = None if baseline is None else first.mean(axis=0) - (baseline == 0).mean(axis=0)
    difference = None if gained is None else asdict(bootstrap(gained, groups))
    errors = challenge_errors(places, classes).mean(axis=0)
    several = {"top1": first.mean(axis=0), "top5": in_five.mean(axis=0), "average_error": errors}
    measured = {name: asdict(bootstrap(values, groups)) for name, values in several.items()}
    return measured | {"by_seed": by_seed, "over_seeds": over, "difference": difference}


def table(results: dict[str, Any]) -> str:
    """The table of the terminal: percent, differences in points."""
    from aggregate.metrics import Interval, text_table

    def cell(interval: dict[str, float] | None, sign: str = "") -> str:
        return "" if interval is None else format(Interval(**interval), sign)

    columns = ("top-1 %", "over seeds", "top-5 %", "average error %", f"top-1 - {results['baseline']}'s")
    lines = [["", "segments", *columns]]
    for one, count in itertools.product(results["heads"], results["heads"][0]["segments"]):
        found = one["segments"][count]
        cells = (cell(found[name]) for name in ("top1", "over_seeds", "top5", "average_error"))
        lines.append([one["name"], count, *cells, cell(found["difference"], "+")])
    return (
        f"{text_table(lines)}\n\n"
        f"Means over {len(results['seeds'])} seed(s) with 95 % intervals over {results['resampled']} (bootstrap; "
        "differences paired), and over seeds (Student's t).\nThe epoch and what else was tried were chosen inside each "
        "fold's training part."
    )


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m aggregate.crossval"))
