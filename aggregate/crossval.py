"""python -m aggregate.crossval: aggregators compared on all videos of a store, each scored by models that never saw it.

    fold 1   test | train ................ | inner hold-out      of the training part of each fold: chooses the epoch
    fold 2   train .. | test | train ..... | inner hold-out      and the options; then trained again on all of that
    ...                                                          part, so far as the epoch says, and tested once

The features are read once for all folds, seeds, aggregators and options that are tried; all that see the same batches
share a pass over them (aggregate/ablation/grid.py). With the same folds, batches and options, a model is what
`aggregate.train` alone makes of them, bit for bit.
"""

import itertools
import json
import math
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aggregate.ablation.configurations import GridOptions, candidates, in_passes, wait_passively
from aggregate.training.configurations import Configuration, configured
from extract.cli import InputError, RunError, progress, run_command

if TYPE_CHECKING:
    import numpy as np

    from aggregate.ablation.grid import GridTrainer
    from aggregate.ablation.records import Records
    from extract.store import FeatureStore

SCHEMA = "hgnl-crossval/1"


@dataclass(frozen=True, kw_only=True)
class Options(GridOptions):
    """Compare aggregators by cross-validation on cached features; run again to resume.

    Where options of training take several values, the best combination is chosen inside the training part of each fold,
    as the epoch is.
    """

    folds: str = "5"
    """How many (classes evenly, groups never split, drawn anew by each seed), or `group`: leave one group out."""
    splits: tuple[str, ...] = ()
    """Only videos of these splits (default: of all)."""
    val_fraction: float = 0.2
    """How much of a fold's training part is held out in it, to choose the epoch and the options."""
    allow_missing_classes: bool = False
    """Train although some classes have no example in a fold."""
    out: Path = Path("runs/crossval")
    """The folder of AGG.h5 (out-of-fold scores, the mean over seeds), results.json and finished folds."""


@dataclass(frozen=True, eq=False)
class Fold:
    """Rows of the store: to test on, to train on, and of these the ones that choose (bool)."""

    name: str
    seed: int
    test: "np.ndarray"
    train: "np.ndarray"
    held_out: "np.ndarray"


def main(options: Options) -> int:
    wait_passively()
    from aggregate.ablation.grid import GridTrainer
    from aggregate.ablation.records import Records
    from extract.store import FeatureStore

    store = FeatureStore.open(options.features)
    tried = candidates(options, store)
    built = {one.options.agg for one in tried.configurations}
    for name, reason in tried.skipped.items():
        if (agg := name.split()[0]) not in built:
            raise InputError(f"--agg {agg}: {reason}")
    rows = rows_of(store, options)
    folds = [fold for seed in dict.fromkeys(options.seeds) for fold in folds_of(store, options, seed)]
    trainer = GridTrainer(store, device=options.device, placement=options.placement)
    print(f"features  {store!r}\nfolds     {_describe(store, folds)}")
    tried.print_skipped()
    print(f"tried     {', '.join(one.name for one in tried.configurations)}", flush=True)
    with Records(options, store, by=("seed", "fold", "agg"), what="cross-validation") as records:
        left = {
            fold: [c for c in tried.configurations if (fold.seed, fold.name, c.options.agg) not in records.rows]
            for fold in folds
        }
        waiting = [fold for fold in folds if left[fold]]
        done = len(folds) - len(waiting)
        if done:
            print(f"resuming  {options.out}: {done} of {len(folds)} folds are done")
        if waiting:
            trainer.hold(rows)
        for fold in progress(waiting, unit="fold", initial=done, total=len(folds)):
            for row, logits in _results(trainer, fold, left[fold], options):
                records.add(row, logits)
        report(store, rows, options, folds, records)
    print(f"Next: python -m pipelines.report {options.out} --out report.html")
    return 0


# -- folds -------------------------------------------------------------------------------------------------------------


def rows_of(store: "FeatureStore", options: Options) -> "np.ndarray":
    """All videos that count: labelled, of the splits asked for; failed ones too, which are tested as errors."""
    import numpy as np

    known = sorted(set(store.splits.tolist()))
    if unknown := [name for name in options.splits if name not in known]:
        raise InputError(f"--splits {unknown[0]}: {store.path} has no such split; it has {', '.join(map(repr, known))}")
    chosen = np.isin(store.splits, options.splits) if options.splits else np.ones(len(store), bool)
    rows = np.flatnonzero(chosen & (store.labels >= 0))
    if not len(rows):
        raise InputError(f"{store.path} has no labelled video in these splits")
    return rows


def folds_of(store: "FeatureStore", options: Options, seed: int) -> list[Fold]:
    """The folds of a seed. InputError for what cannot be divided so, naming the class, the group or the fold."""
    import numpy as np

    from aggregate.training.splits import check_classes, group_keys, has_groups, hold_out

    rows, keys = rows_of(store, options), group_keys(store.ids, store.groups)
    folds = []
    for name, test in _tests(store, options, rows, seed):
        others = np.setdiff1d(rows, test)
        others = others[store.usable[others]]
        missing = options.allow_missing_classes
        held_out = hold_out(store, others, options.val_fraction, seed, allow_missing=missing)[others]
        if has_groups(keys[rows]) and len(set(keys[others])) < 2:
            raise InputError(
                f"fold {name}: all it has to train on is one group, and groups are not split to choose the epoch; "
                "cross-validation over groups needs at least 3"
            )
        if not held_out.any():
            raise InputError(
                f"fold {name}: nothing of its {len(others)} videos to train on can be held out to choose the epoch and "
                "leave every class an example; pass --allow-missing-classes, or another --val-fraction"
            )
        try:
            check_classes(store, others[~held_out], allow_missing=missing)
        except InputError as error:
            raise InputError(f"fold {name}: {error}") from None
        folds.append(Fold(name, seed, test, others, held_out))
    return folds


def _tests(
    store: "FeatureStore", options: Options, rows: "np.ndarray", seed: int
) -> "Iterator[tuple[str, np.ndarray]]":
    """Names of the folds, and the rows that each tests."""
    import numpy as np
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    from aggregate.training.splits import group_keys, has_groups

    labels, keys = store.labels[rows], group_keys(store.ids, store.groups)[rows]
    names, groups = np.unique(keys, return_inverse=True)
    if options.folds == "group":
        if not has_groups(keys):
            what = f"are of one group ({names[0]!r})" if len(names) < 2 else "have no group"
            raise InputError(
                f"--folds group: the {len(rows)} videos of {store.path} {what}; "
                "give a number, as in --folds 5, or extract with a CSV that has a column group"
            )
        yield from ((str(name), rows[groups == number]) for number, name in enumerate(names))
        return
    if not options.folds.isdecimal() or int(options.folds) < 2:
        raise InputError(f"--folds {options.folds}: give a number from 2 on, or group")
    count, present = int(options.folds), np.unique(labels)
    sizes = np.bincount(labels, minlength=len(store.classes))[present]
    if sizes.min() < count:
        name = store.classes[present[sizes.argmin()]]
        raise InputError(
            f"--folds {count}: class {name!r} has {sizes.min()} videos, so a fold would be without it; give --folds "
            f"{max(sizes.min(), 2)}, or more videos of it"
        )
    if has_groups(keys) and len(names) < count:
        raise InputError(f"--folds {count}: there are {len(names)} groups, which are not split; give --folds group")
    kind, units = (StratifiedGroupKFold, groups) if has_groups(keys) else (StratifiedKFold, None)
    for number, (_, test) in enumerate(kind(count, shuffle=True, random_state=seed).split(rows, labels, units)):
        yield str(number), rows[test]


def _describe(store: "FeatureStore", folds: list[Fold]) -> str:
    """What is divided how; and the folds that do not test every class, which is no error."""
    every = {label for fold in folds for label in store.labels[fold.test].tolist()}
    lacking = [f"{fold.name} of seed {fold.seed}" for fold in folds if len(set(store.labels[fold.test])) < len(every)]
    words = f"; {len(lacking)} test not every class: {', '.join(lacking[:3])}" if lacking else ""
    videos, seeds = sum(len(fold.test) for fold in folds), len({fold.seed for fold in folds})
    return f"{videos // seeds:,} videos, {len(folds) // seeds} folds x {seeds} seeds, no group split{words}"


# -- a fold ------------------------------------------------------------------------------------------------------------


def _results(
    trainer: "GridTrainer", fold: Fold, tried: list[Configuration], options: Options
) -> "Iterator[tuple[dict[str, Any], np.ndarray]]":
    """Choose, train again and test each aggregator of `tried` in one fold: what is recorded of it, and its logits
    [segments, N, C] of the videos that the fold tests."""
    import numpy as np

    from aggregate.training.loop import fit

    inner, held_out = fold.train[~fold.held_out], fold.train[fold.held_out]
    # Of each aggregator the challenge's error and, among equals, the cross-entropy; the epoch, and the configuration.
    best: dict[str, tuple[tuple[float, float], int, Configuration]] = {}
    several = [configured(one.name, replace(one.options, seed=fold.seed), videos=len(inner)) for one in tried]
    for share in in_passes(several, at_once=options.at_once):
        learners, source = trainer.begin(share, inner, held_out)
        for epoch, *_ in fit(learners, source, strict=False):
            for one, learner in zip(share, learners, strict=True):
                measure = (math.inf, 0.0) if learner.lost else _measure(learner.scores, source.labels)
                if measure < best.get(one.options.agg, ((math.inf, 0.0),))[0]:
                    best[one.options.agg] = (measure, epoch, one)
    if lost := {one.options.agg for one in tried} - best.keys():
        raise RunError(f"fold {fold.name}, seed {fold.seed}: every {lost.pop()} diverged; a smaller --lr may help")
    again = {configured(one.name, one.options, videos=len(fold.train)): (m, epoch) for m, epoch, one in best.values()}
    for share in in_passes(again, at_once=options.at_once):
        learners, source = trainer.begin(share, fold.train, fold.test)
        list(fit(learners, source, until=[again[one][1] + 1 for one in share]))
        models = [learner.model for learner in learners]
        tested = [source.validate(models, count) for count in segments_of(trainer.store, options)]
        for one, *logits in zip(share, *tested, strict=True):
            if np.isnan(logits).all():
                raise RunError(f"fold {fold.name}, seed {fold.seed}: {one.name} diverged; a smaller --lr may help")
            (error, _), epoch = again[one]
            row = {"seed": fold.seed, "fold": fold.name, "agg": one.options.agg, "videos": len(fold.test)}
            yield row | {"options": one.name, "epoch": epoch, "inner_error": error}, np.stack(logits)


def _measure(logits: "np.ndarray", labels: "np.ndarray") -> tuple[float, float]:
    """The challenge's error, and the cross-entropy, of logits [N, C]."""
    from scipy.special import log_softmax

    from aggregate.metrics import challenge_error

    likelihoods = log_softmax(logits.astype(float), axis=1)[range(len(labels)), labels]
    return challenge_error(logits, labels), -float(likelihoods.mean())


# -- results -----------------------------------------------------------------------------------------------------------


def segments_of(store: "FeatureStore", options: Options) -> list[int]:
    """The segments of training, and all."""
    return sorted({options.frames[0], store.frames_per_video})


def report(store: "FeatureStore", rows: "np.ndarray", options: Options, folds: list[Fold], records: "Records") -> None:
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
