"""python -m aggregate.audit: near-duplicate videos across splits, and labels that look wrong."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from aggregate.ablation.leaks import FALSE_ALARMS, PAIR_ALL, mean_features
from extract import InputError, Record
from extract.cli import run_as_script

if TYPE_CHECKING:
    import numpy as np

    from aggregate.duplicates import Pairs
    from aggregate.scores import Scores
    from extract.store import FeatureStore

SCHEMA = "hgnl-audit/1"
MAX_PRINTED = 10  # number of rows of each table that are printed


@dataclass(frozen=True)
class Options:
    """Find near-duplicate videos across splits and groups, and labels that look wrong."""

    features: str | tuple[str, ...] = "feats.zarr"
    """The feature store of `python -m extract`; several are joined by id, and their channels
    concatenated."""
    scores: Path | None = None
    """Scores by models that were not trained on the scored videos, such as cv/tsn.h5 of
    aggregate.crossval: labels that they contradict with confidence are listed."""
    out: Path = Path("runs/audit")
    """The folder for duplicates.csv, labels.csv and audit.json."""
    false_alarms: float = FALSE_ALARMS
    """The expected fraction of videos that get a pair by chance: sets the threshold."""


def main(options: Options) -> None:
    import numpy as np

    from aggregate.data.joined import open_features
    from aggregate.duplicates import near_duplicates
    from aggregate.metrics import csv_of, independent_units
    from aggregate.scores import group_keys
    from extract.durable import replace_file, write_record

    labels = [] if options.scores is None else label_issues(_held_out_scores(options.scores))
    store = open_features(options.features)
    rows = np.flatnonzero(store.usable)
    keys = group_keys(store.ids[rows], store.groups[rows])
    queries, scope = _queries(store.splits[rows])
    pairs = near_duplicates(
        mean_features(store, rows),
        independent_units(keys),
        queries=queries,
        false_alarms=options.false_alarms,
    )
    duplicates = _describe_pairs(store, rows, keys, pairs)
    record = {
        "schema": SCHEMA,
        "features": options.features,
        "scores": None if options.scores is None else str(options.scores),
        "videos": len(rows),
        "scope": scope,
        "threshold": pairs.threshold,
        "duplicates": duplicates,
        "labels": labels,
    }
    replace_file(options.out / "duplicates.csv", csv_of(duplicates))
    replace_file(options.out / "labels.csv", csv_of(labels))
    write_record(options.out / "audit.json", record)
    print(_summary(record, options.out))


def _held_out_scores(path: Path) -> "Scores":
    """Load scores; raise InputError if they have no labels, or are those of training videos."""
    from aggregate.scores import Scores

    scores = Scores.load(path)
    if scores.labels is None or (scores.labels < 0).all():
        raise InputError("--scores: the file has no labels, so there is nothing to check")
    if scores.source.get("trained_on"):
        raise InputError(
            "--scores: these are scores of the videos that the model was trained on, which agree "
            "with their labels; give out-of-fold scores, as aggregate.crossval writes them"
        )
    return scores


def label_issues(scores: "Scores") -> list[Record]:
    """Labels that `scores` contradict with confidence, the clearest first.

    Confident learning (Northcutt et al. 2021): a class is confident about a video if its
    probability reaches the mean over the videos with its label. A label is listed if another class
    is confident and more probable than the label.
    """
    import numpy as np
    from scipy.special import softmax

    assert scores.labels is not None
    rows = np.flatnonzero((scores.labels >= 0) & ~scores.failed)
    labels, probabilities = scores.labels[rows], softmax(scores.logits[rows].astype(float), axis=1)
    num_classes = probabilities.shape[1]
    own = probabilities[np.arange(len(rows)), labels]
    counts = np.bincount(labels, minlength=num_classes)
    bar = np.bincount(labels, own, minlength=num_classes) / np.maximum(counts, 1)
    # A class without an example is never confident.
    confident = np.where((probabilities >= bar) & (counts > 0), probabilities, -1)
    suggested, best = confident.argmax(axis=1), confident.max(axis=1)
    wrong = np.flatnonzero((suggested != labels) & (best > own))
    wrong = wrong[np.argsort(own[wrong] - best[wrong], kind="stable")]
    return [
        {
            "id": scores.ids[rows[index]],
            "label": scores.classes[labels[index]],
            "suggested": scores.classes[suggested[index]],
            "probability_of_label": round(float(own[index]), 4),
            "probability_of_suggested": round(float(best[index]), 4),
        }
        for index in wrong
    ]


def _queries(splits: "np.ndarray") -> tuple["np.ndarray | None", str]:
    """The rows that are compared with all rows (None: all of them), and a description."""
    import numpy as np

    counts = Counter(splits.tolist())
    if len(splits) <= PAIR_ALL or len(counts) < 2:
        return None, "all videos with all others"
    [(largest, _)] = counts.most_common(1)
    chosen = np.flatnonzero(splits != largest)
    return chosen, f"the {len(chosen):,} videos outside split {largest!r} with all others"


def _describe_pairs(
    store: "FeatureStore", rows: "np.ndarray", keys: "np.ndarray", pairs: "Pairs"
) -> list[Record]:
    """One line per pair; pairs across splits come first, since they leak."""
    lines = []
    for pair, similarity, ratio in zip(pairs.rows, pairs.similarity, pairs.ratio, strict=True):
        splits = sorted(set(store.splits[rows[pair]]))
        line = {
            "across": "/".join(splits) if len(splits) > 1 else "groups",
            "similarity": round(float(similarity), 4),
            "ratio": round(float(ratio), 4),
        }
        for name, index in zip("ab", pair, strict=True):
            row = rows[index]
            label = int(store.labels[row])
            line |= {
                f"id_{name}": str(store.ids[row]),
                f"split_{name}": str(store.splits[row]),
                f"group_{name}": str(keys[index]),
                f"label_{name}": store.classes[label] if label >= 0 else "",
            }
        lines.append(line)
    return sorted(lines, key=lambda line: line["across"] == "groups")


def _summary(record: Record, out: Path) -> str:
    duplicates, labels = record["duplicates"], record["labels"]
    across = sum(line["across"] != "groups" for line in duplicates)
    differ = sum(line["label_a"] != line["label_b"] for line in duplicates)
    lines = [
        f"{record['videos']:,} videos, {record['scope']}: {len(duplicates):,} pairs are nearly "
        f"identical (distance below {record['threshold']:.2f} of the usual one), "
        f"{across:,} of them across splits, {differ:,} with different labels"
    ]
    for line in duplicates[:MAX_PRINTED]:
        lines.append(f"  {line['ratio']:.2f}  {line['across']}: {line['id_a']} | {line['id_b']}")
    if record["scores"] is None:
        lines.append(
            "labels    not checked: give --scores, out-of-fold scores of aggregate.crossval"
        )
    else:
        lines.append(
            f"{len(labels):,} labels are contradicted with confidence by {record['scores']}"
        )
    for line in labels[:MAX_PRINTED]:
        lines.append(
            f"  {line['id']}: {line['label']} {line['probability_of_label']:.2f}, "
            f"{line['suggested']} {line['probability_of_suggested']:.2f}"
        )
    lines.append(f"written   {out / 'duplicates.csv'}, {out / 'labels.csv'}, {out / 'audit.json'}")
    return "\n".join(lines)


if __name__ == "__main__":
    run_as_script()
