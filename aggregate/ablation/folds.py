"""Which videos test, train and choose: folds of a store, drawn anew by each seed, or leave one group out.

fold 1   test | train ................ | held out      the part of `train` that chooses the epoch and the options
fold 2   train .. | test | train ..... | held out
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from aggregate.ablation.configurations import FoldOptions
from aggregate.training.splits import check_classes, group_keys, has_groups, hold_out
from extract.cli import InputError
from extract.store import FeatureStore


@dataclass(frozen=True, eq=False)
class Fold:
    """Rows of the store: to test on, to train on, and of these the ones that choose (bool)."""

    name: str
    seed: int
    test: np.ndarray
    train: np.ndarray
    held_out: np.ndarray


def rows_of(store: FeatureStore, options: FoldOptions) -> np.ndarray:
    """All videos that count: labelled, of the splits asked for; failed ones too, which are tested as errors."""
    known = sorted(set(store.splits.tolist()))
    if unknown := [name for name in options.splits if name not in known]:
        raise InputError(f"--splits {unknown[0]}: {store.path} has no such split; it has {', '.join(map(repr, known))}")
    chosen = np.isin(store.splits, options.splits) if options.splits else np.ones(len(store), bool)
    rows = np.flatnonzero(chosen & (store.labels >= 0))
    if not len(rows):
        raise InputError(f"{store.path} has no labelled video in these splits")
    return rows


def folds_of(store: FeatureStore, options: FoldOptions, seed: int) -> list[Fold]:
    """The folds of a seed. InputError for what cannot be divided so, naming the class, the group or the fold."""
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


def _tests(store: FeatureStore, options: FoldOptions, rows: np.ndarray, seed: int) -> Iterator[tuple[str, np.ndarray]]:
    """Names of the folds, and the rows that each tests."""
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


def describe_folds(store: FeatureStore, folds: list[Fold]) -> str:
    """What is divided how; and the folds that do not test every class, which is no error."""
    every = {label for fold in folds for label in store.labels[fold.test].tolist()}
    lacking = [f"{fold.name} of seed {fold.seed}" for fold in folds if len(set(store.labels[fold.test])) < len(every)]
    words = f"; {len(lacking)} test not every class: {', '.join(lacking[:3])}" if lacking else ""
    videos, seeds = sum(len(fold.test) for fold in folds), len({fold.seed for fold in folds})
    return f"{videos // seeds:,} videos, {len(folds) // seeds} folds x {seeds} seeds, no group split{words}"
