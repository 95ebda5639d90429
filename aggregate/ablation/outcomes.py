"""The results of cross-validation: scores files, results.json, and the tables in the terminal."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any, NamedTuple

import numpy as np

from aggregate.ablation.compare import over_seeds
from aggregate.ablation.folds import Fold
from aggregate.ablation.records import Records
from aggregate.metrics import (
    Interval,
    bootstrap,
    bootstrap_by_class,
    challenge_errors,
    describe_units,
    independent_units,
    ranks,
)
from aggregate.scores import Scores, group_keys, save_scores
from extract import Record
from extract.cli import text_table
from extract.durable import write_record
from extract.store import FeatureStore

SCHEMA = "hgnl-crossval/1"


class Outcomes(NamedTuple):
    """Predictions of one aggregator for N videos with one number of segments, for S seeds or draws.

    A video that failed has rank C and class C, where C is the number of classes.
    """

    label_ranks: np.ndarray  # int [S, N]: ranks of the true label
    predicted: np.ndarray  # int [S, N]: the class that ranks first
    tested: np.ndarray  # bool [S, N]


def report(
    store: FeatureStore,
    rows: np.ndarray,
    options: Any,
    segments: Mapping[str, Sequence[int]],
    folds: Sequence[Fold],
    records: Records,
) -> None:
    """Write AGG.h5 and results.json, and print the tables. `segments` are those that each head was
    tested with."""
    labels, groups = store.labels[rows], group_keys(store.ids, store.groups)[rows]
    seeds = list(dict.fromkeys(fold.seed for fold in folds))
    protocol: Record = {"seeds": seeds}
    if options.shots is not None:
        protocol = {"shots": options.shots, "draws": len(seeds)}
    outcomes: dict[str, dict[int, Outcomes]] = {}  # keys: aggregator, number of segments
    for agg in dict.fromkeys(options.agg):
        outcomes[agg], means = _collect(store, rows, segments[agg], folds, records, agg)
        source = {"model": agg, "folds": options.folds, "features": store.provenance} | protocol
        seen = outcomes[agg][segments[agg][0]].tested.any(axis=0)
        ids = store.ids[rows[seen]].tolist()
        scores = [
            Scores(
                ids,
                store.classes,
                mean[seen],
                labels=labels[seen],
                source=source,
                segments=count,
                groups=groups[seen],
            )
            for count, mean in zip(segments[agg], means, strict=True)
        ]
        save_scores(options.out / f"{agg}.h5", scores)
    results = _results(store, labels, groups, options, folds, records, outcomes)
    write_record(options.out / "results.json", results)
    files = ", ".join(str(options.out / head["scores"]) for head in results["heads"])
    print(
        f"\n{table(results)}\n\n"
        f"scores of every video by models that never saw it (their mean): {files}"
    )


def _results(
    store: FeatureStore,
    labels: np.ndarray,
    groups: np.ndarray,
    options: Any,
    folds: Sequence[Fold],
    records: Records,
    outcomes: dict[str, dict[int, Outcomes]],
) -> Record:
    """The content of results.json."""
    classes = len(store.classes)
    baseline = "tsn" if "tsn" in outcomes else next(iter(outcomes))
    # A baseline that sees order has one number of segments, at which all others are compared.
    first = next(iter(outcomes[baseline].values()))
    heads: list[Record] = []
    for agg, by_segments in outcomes.items():
        measured = {}
        for count, ours in by_segments.items():
            theirs = None if agg == baseline else outcomes[baseline].get(count, first)
            measured[str(count)] = measures(ours, theirs, labels, classes, groups)
        chosen = [records.rows[fold.seed, fold.name, agg] for fold in folds]
        head = {"name": agg, "scores": f"{agg}.h5", "segments": measured, "chosen": chosen}
        heads.append(head | as_reported(chosen))
    tested = first.tested.any(axis=0)
    videos, units = int(tested.sum()), int(independent_units(groups[tested]).max()) + 1
    return {
        "schema": SCHEMA,
        "features": options.features,
        "provenance": store.provenance,
        "videos": videos,
        "classes": classes,
        "resampled": describe_units(units, videos),
        "by": options.folds,
        "shots": options.shots,
        "folds": list(dict.fromkeys(fold.name for fold in folds)),
        "seeds": list(dict.fromkeys(fold.seed for fold in folds)),
        "baseline": baseline,
        "heads": heads,
    }


def _collect(
    store: FeatureStore,
    rows: np.ndarray,
    segments: Sequence[int],
    folds: Sequence[Fold],
    records: Records,
    agg: str,
) -> tuple[dict[int, Outcomes], np.ndarray]:
    """The outcomes by number of segments, and mean logits float32 [segments, N, C] over the seeds
    that tested a video."""
    labels, classes = store.labels[rows], len(store.classes)
    sums = np.zeros((len(segments), len(rows), classes), np.float32)
    by_seed: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    for seed in dict.fromkeys(fold.seed for fold in folds):
        logits = np.full(sums.shape, np.nan, np.float32)
        tested = np.zeros(len(rows), bool)
        for fold in folds:
            if fold.seed == seed:
                videos = np.searchsorted(rows, fold.test)
                recorded: Any = records.array((seed, fold.name, agg))
                # Earlier versions also tested heads that see order with all frames.
                logits[:, videos], tested[videos] = recorded[: len(segments)], True
        sums[:, tested] += logits[:, tested]
        failed = np.isnan(logits).any(axis=2)
        predicted = np.where(failed, classes, logits.argmax(axis=2))
        label_ranks = np.stack([ranks(each, labels) for each in logits])
        by_seed.append((label_ranks, predicted, tested))
    all_ranks, predictions, seen = (np.stack(arrays) for arrays in zip(*by_seed, strict=True))
    outcomes = {
        count: Outcomes(all_ranks[:, number], predictions[:, number], seen)
        for number, count in enumerate(segments)
    }
    counts = np.maximum(seen.sum(axis=0), 1).astype(np.float32)
    return outcomes, sums / counts[:, None]


def measures(
    ours: Outcomes, baseline: Outcomes | None, labels: np.ndarray, classes: int, groups: np.ndarray
) -> Record:
    """Means over seeds (or draws) with bootstrap intervals over `groups` [N].

    Top-1 and macro F1 also have Student's interval over seeds. Top-1 also has its difference to
    that of the `baseline`, paired over videos.
    """

    def over_videos(values: np.ndarray) -> dict[str, float]:
        return asdict(_over_videos(values, ours.tested, groups))

    correct = ours.label_ranks == 0
    by_class = bootstrap_by_class(ours.predicted, labels, classes, ours.tested, groups)
    by_seed = {
        "top1": [float(row[seen].mean()) for row, seen in zip(correct, ours.tested, strict=True)],
        "macro_f1": by_class["macro_f1"][1],
    }
    seeds = {
        name: asdict(over_seeds(values)) if len(values) > 1 else None
        for name, values in by_seed.items()
    }
    difference = None
    if baseline is not None:
        difference = over_videos(correct.astype(float) - (baseline.label_ranks == 0))
    return {
        "top1": over_videos(correct),
        "top5": over_videos(ours.label_ranks < min(5, classes)),
        "average_error": over_videos(challenge_errors(ours.label_ranks, classes)),
        **{name: asdict(interval) for name, (interval, _) in by_class.items()},
        "by_seed": by_seed["top1"],
        "over_seeds": seeds["top1"],
        "macro_f1_over_seeds": seeds["macro_f1"],
        "difference": difference,
    }


def _over_videos(values: np.ndarray, tested: np.ndarray, groups: np.ndarray) -> Interval:
    """The mean of the tested `values` [S, N], with its bootstrap interval over groups of videos."""
    if tested.all():
        return bootstrap(values.mean(axis=0), groups)
    units = np.broadcast_to(independent_units(groups), tested.shape)
    return bootstrap(values[tested], units[tested])


def as_reported(chosen: Sequence[Record]) -> Record:
    """The candidate with the best top-1 on the tested videos themselves, as papers report grids.

    Empty without a grid. A candidate that diverged in a fold does not count.
    """
    counts = [row.get("as_reported", {}) for row in chosen]
    names = set(counts[0]).intersection(*counts)
    if not names:
        return {}
    correct = {name: sum(count[name] for count in counts) for name in sorted(names)}
    best = max(correct, key=correct.__getitem__)
    top1 = correct[best] / sum(row["videos"] for row in chosen)
    return {"as_reported": {"options": best, "top1": top1, "candidates": len(correct)}}


def table(results: Record) -> str:
    """The tables for the terminal: percent, differences in points."""
    unit = "seeds" if results["shots"] is None else "draws"
    overall = {
        "top-1 %": "top1",
        f"over {unit}": "over_seeds",
        "top-5 %": "top5",
        "average error %": "average_error",
        f"top-1 - {results['baseline']}'s": "difference",
    }
    by_class = {
        "mean class %": "mean_class",
        "macro F1 %": "macro_f1",
        f"over {unit}": "macro_f1_over_seeds",
    }
    parts = []
    for columns in (overall, by_class):
        rows = [["", "segments", *columns]]
        for head in results["heads"]:
            for count, measured in head["segments"].items():
                cells = [_cell(measured, name) for name in columns.values()]
                rows.append([head["name"], count, *cells])
        parts.append(text_table(rows))
    notes = [
        f"Means over {len(results['seeds'])} {unit} with 95 % intervals over "
        f"{results['resampled']} (bootstrap; differences paired), and over {unit} (Student's t).",
        "The epoch and the options were chosen inside each training part.",
    ]
    for head in results["heads"]:
        if best := head.get("as_reported"):
            all_segments = head["segments"][max(head["segments"], key=int)]
            notes.append(
                f"{head['name']}, as papers report a grid: {100 * best['top1']:.2f} % top-1 with "
                f"{best['options']}, the best of {best['candidates']} on the tested videos "
                "themselves, so too high; chosen inside the training part: "
                f"{_cell(all_segments, 'top1')}"
            )
        stopped = sum(not row.get("converged", True) for row in head["chosen"])
        if stopped:
            notes.append(
                f"{head['name']}: {stopped} of {len(head['chosen'])} fits ended at the solver's "
                "last iteration"
            )
    return "\n\n".join([*parts, "\n".join(notes)])


def _cell(measured: Record, name: str) -> str:
    interval = measured[name]
    if interval is None:
        return ""
    return format(Interval(**interval), "+" if name == "difference" else "")
