"""What cross-validation says: scores files, results.json, and the tables of the terminal."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from aggregate.ablation.compare import over_seeds
from aggregate.ablation.folds import Fold
from aggregate.metrics import (
    Interval,
    bootstrap,
    bootstrap_by_class,
    challenge_errors,
    describe_units,
    independent_units,
    ranks,
    text_table,
)
from aggregate.scores import Scores, group_keys, save_scores
from extract.durable import replace_file
from extract.store import FeatureStore

if TYPE_CHECKING:
    from aggregate.ablation.records import Records

SCHEMA = "hgnl-crossval/1"


class Outcomes(NamedTuple):
    """What one aggregator predicted for N videos with some number of segments, by each of S seeds
    or draws."""

    label_ranks: np.ndarray  # int [S, N]: the rank of the true label, C for a video that failed
    predicted: np.ndarray  # int [S, N]: the class that ranks first, C for a video that failed
    tested: np.ndarray  # bool [S, N]


def report(
    store: FeatureStore,
    rows: np.ndarray,
    options: Any,
    segments: Mapping[str, Sequence[int]],
    folds: Sequence[Fold],
    records: "Records",
) -> None:
    """Write AGG.h5 and results.json, print the tables; segments: what each head was tested with."""
    labels, classes = store.labels[rows], len(store.classes)
    seeds, aggs = list(dict.fromkeys(fold.seed for fold in folds)), list(dict.fromkeys(options.agg))
    groups = group_keys(store.ids, store.groups)[rows]
    baseline = "tsn" if "tsn" in aggs else aggs[0]
    how: dict[str, Any] = {"seeds": seeds}
    if options.shots is not None:
        how = {"shots": options.shots, "draws": len(seeds)}
    outcomes: dict[str, list[Outcomes]] = {}  # for each of its `segments`
    for agg in aggs:
        source = {"model": agg, "folds": options.folds, "features": store.provenance} | how
        outcomes[agg], means = _collect(store, rows, segments[agg], folds, records, agg)
        seen = outcomes[agg][0].tested.any(axis=0)
        ids = store.ids[rows][seen].tolist()
        of_seen = {"labels": labels[seen], "source": source, "groups": groups[seen]}
        scores = [
            Scores(ids, store.classes, mean[seen], segments=count, **of_seen)
            for count, mean in zip(segments[agg], means, strict=True)
        ]
        save_scores(options.out / f"{agg}.h5", scores)
    heads: list[dict[str, Any]] = []
    for agg in aggs:
        # A baseline that sees order has one number only, which all others are compared with.
        beside = dict(zip(segments[baseline], outcomes[baseline], strict=True))
        measured = {}
        for count, ours in zip(segments[agg], outcomes[agg], strict=True):
            theirs = None if agg == baseline else beside.get(count, outcomes[baseline][0])
            measured[str(count)] = measures(ours, theirs, labels, classes, groups)
        chosen = [records.rows[fold.seed, fold.name, agg] for fold in folds]
        head = {"name": agg, "scores": f"{agg}.h5", "segments": measured, "chosen": chosen}
        heads.append(head | as_reported(chosen))
    tested = outcomes[baseline][0].tested.any(axis=0)
    videos, units = int(tested.sum()), int(independent_units(groups[tested]).max()) + 1
    results = {
        "schema": SCHEMA,
        "features": options.features,
        "provenance": store.provenance,
        "videos": videos,
        "classes": classes,
        "resampled": describe_units(units, videos),
        "by": options.folds,
        "shots": options.shots,
        "folds": list(dict.fromkeys(fold.name for fold in folds)),
        "seeds": seeds,
        "baseline": baseline,
        "heads": heads,
    }
    replace_file(options.out / "results.json", json.dumps(results, indent=1) + "\n")
    files = ", ".join(str(options.out / one["scores"]) for one in heads)
    print(
        f"\n{table(results)}\n\nscores of every video by models that never saw it (their mean): {files}"
    )


def _collect(
    store: FeatureStore,
    rows: np.ndarray,
    segments: Sequence[int],
    folds: Sequence[Fold],
    records: "Records",
    agg: str,
) -> tuple[list[Outcomes], np.ndarray]:
    """The outcomes for each of `segments`, and the mean logits float32 [segments, N, C] of the
    seeds that tested a video."""
    labels, classes = store.labels[rows], len(store.classes)
    sums = np.zeros((len(segments), len(rows), classes), np.float32)
    places, predicted, tested = [], [], []
    for seed in dict.fromkeys(fold.seed for fold in folds):
        logits = np.full(sums.shape, np.nan, np.float32)
        seen = np.zeros(len(rows), bool)
        for fold in (one for one in folds if one.seed == seed):
            at = np.searchsorted(rows, fold.test)
            recorded: Any = records.array((seed, fold.name, agg))
            # Earlier versions tested heads that see order with all frames too.
            logits[:, at], seen[at] = recorded[: len(segments)], True
        sums[:, seen] += logits[:, seen]
        failed = np.isnan(logits).any(axis=2)
        places.append([ranks(one, labels) for one in logits])
        predicted.append(np.where(failed, classes, logits.argmax(axis=2)))
        tested.append(seen)
    counts = np.maximum(np.sum(tested, axis=0), 1).astype(np.float32)
    several = [
        Outcomes(
            np.stack([by_seed[place] for by_seed in places]),
            np.stack([by_seed[place] for by_seed in predicted]),
            np.stack(tested),
        )
        for place in range(len(segments))
    ]
    return several, sums / counts[:, None]


def measures(
    ours: Outcomes, baseline: Outcomes | None, labels: np.ndarray, classes: int, groups: np.ndarray
) -> dict[str, Any]:
    """Means over seeds (or draws) with bootstrap intervals over `groups` [N]; of top-1 and macro F1
    also Student's interval over seeds, and of top-1 the difference to the `baseline`'s, paired over
    videos."""
    first = ours.label_ranks == 0
    outcomes = {
        "top1": first,
        "top5": ours.label_ranks < min(5, classes),
        "average_error": challenge_errors(ours.label_ranks, classes),
    }
    measured = {
        name: asdict(_over_videos(values, ours.tested, groups)) for name, values in outcomes.items()
    }
    by_class = bootstrap_by_class(ours.predicted, labels, classes, ours.tested, groups)
    measured |= {name: asdict(interval) for name, (interval, _) in by_class.items()}
    by_seed = {
        "top1": [float(right[seen].mean()) for right, seen in zip(first, ours.tested, strict=True)]
    }
    by_seed["macro_f1"] = by_class["macro_f1"][1]
    over = {
        name: asdict(over_seeds(values)) if len(values) > 1 else None
        for name, values in by_seed.items()
    }
    gained = None if baseline is None else first.astype(float) - (baseline.label_ranks == 0)
    difference = None if gained is None else asdict(_over_videos(gained, ours.tested, groups))
    return measured | {
        "by_seed": by_seed["top1"],
        "over_seeds": over["top1"],
        "macro_f1_over_seeds": over["macro_f1"],
        "difference": difference,
    }


def _over_videos(values: np.ndarray, tested: np.ndarray, groups: np.ndarray) -> Interval:
    """The mean of `values` [S, N] over what was tested, with the bootstrap interval over groups of
    videos."""
    if tested.all():
        return bootstrap(values.mean(axis=0), groups)
    units = np.broadcast_to(independent_units(groups), tested.shape)
    return bootstrap(values[tested], units[tested])


def as_reported(chosen: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The best candidate by its top-1 on the tested videos themselves, as papers report grids;
    nothing without a grid.

    A candidate that diverged in a fold does not count.
    """
    counts = [row.get("as_reported", {}) for row in chosen]
    names = set(counts[0]).intersection(*counts)
    if not names:
        return {}
    right = {name: sum(one[name] for one in counts) for name in sorted(names)}
    best = max(right, key=right.__getitem__)
    top1 = right[best] / sum(row["videos"] for row in chosen)
    return {"as_reported": {"options": best, "top1": top1, "candidates": len(right)}}


def table(results: dict[str, Any]) -> str:
    """The tables of the terminal: percent, differences in points."""

    def cell(interval: dict[str, float] | None, sign: str = "") -> str:
        return "" if interval is None else format(Interval(**interval), sign)

    unit = "seeds" if results["shots"] is None else "draws"
    columns = (
        "top-1 %",
        f"over {unit}",
        "top-5 %",
        "average error %",
        f"top-1 - {results['baseline']}'s",
    )
    lines = [["", "segments", *columns]]
    by_class = [["", "segments", "mean class %", "macro F1 %", f"over {unit}"]]
    every = [
        (head, count, found)
        for head in results["heads"]
        for count, found in head["segments"].items()
    ]
    for head, count, found in every:
        cells = (cell(found[name]) for name in ("top1", "over_seeds", "top5", "average_error"))
        lines.append([head["name"], count, *cells, cell(found["difference"], "+")])
        cells = (cell(found[name]) for name in ("mean_class", "macro_f1", "macro_f1_over_seeds"))
        by_class.append([head["name"], count, *cells])
    notes = [
        f"Means over {len(results['seeds'])} {unit} with 95 % intervals over {results['resampled']} (bootstrap; "
        f"differences paired), and over {unit} (Student's t).",
        "The epoch and what else was tried were chosen inside each training part.",
    ]
    for head in results["heads"]:
        top1 = head["segments"][max(head["segments"], key=int)]["top1"]
        if best := head.get("as_reported"):
            notes.append(
                f"{head['name']}, as papers report a grid: {100 * best['top1']:.2f} % top-1 with {best['options']}, "
                f"the best of {best['candidates']} on the tested videos themselves, so too high; "
                f"chosen inside the training part: {cell(top1)}"
            )
        stopped = sum(not row.get("converged", True) for row in head["chosen"])
        if stopped:
            notes.append(
                f"{head['name']}: {stopped} of {len(head['chosen'])} fits ended at the solver's last iteration"
            )
    return "\n\n".join([text_table(lines), text_table(by_class), "\n".join(notes)])
