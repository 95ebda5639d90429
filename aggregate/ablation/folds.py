"""Folds of a store: cross-validation, leave one group out, or few shots.

    fold 1   test | train ................ | held out
    fold 2   train .. | test | train ..... | held out

The held-out part of `train` chooses the epoch and the options.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from aggregate.ablation.options import FoldOptions
from aggregate.metrics import independent_units
from aggregate.scores import group_keys
from aggregate.training.splits import check_classes, check_split, has_groups, hold_out
from extract import InputError
from extract.cli import check_ranges, first_few
from extract.store import FeatureStore

DRAW = "draw"  # name of every fold with --shots; the number of the draw is its seed


@dataclass(frozen=True, eq=False)
class Fold:
    """Rows of the store to test on, and rows to train on."""

    name: str
    seed: int
    test: np.ndarray
    train: np.ndarray
    held_out: np.ndarray  # bool: which rows of `train` choose the epoch and the options

    @property
    def inner(self) -> np.ndarray:
        """The rows of `train` that are not held out."""
        return self.train[~self.held_out]

    @property
    def held_out_rows(self) -> np.ndarray:
        return self.train[self.held_out]


def rows_of(store: FeatureStore, options: FoldOptions) -> np.ndarray:
    """The labeled videos of the chosen splits. Failed ones count too: they are tested as errors."""
    for split in options.splits:
        check_split("--splits", split, store)
    chosen = np.isin(store.splits, options.splits) if options.splits else np.ones(len(store), bool)
    rows = np.flatnonzero(chosen & (store.labels >= 0) & store.listed)
    if not len(rows):
        raise InputError(f"{store.path} has no labeled video in these splits")
    return rows


def all_folds(
    store: FeatureStore, options: FoldOptions, seeds: Sequence[int], *, choosing: bool = True
) -> list[Fold]:
    """The folds of all seeds; with --shots one per draw. Nothing is held out unless `choosing`.

    InputError names the class, group or fold that makes the division impossible.
    """
    check_ranges(options)
    rows = rows_of(store, options)
    divisions = []
    if options.shots is not None:
        for number in range(options.repeats):
            divisions.append((DRAW, number, *_draw(store, options.shots, rows, number)))
    else:
        for seed in seeds:
            for name, test in _tests(store, options, rows, seed):
                train = np.setdiff1d(rows, test)
                train = train[store.usable[train]]
                divisions.append((name, seed, test, train))
    return [_with_held_out(store, options, *parts, choosing=choosing) for parts in divisions]


def _draw(
    store: FeatureStore, shots: int, rows: np.ndarray, number: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to test on, and rows to train on: `shots` videos per class, of other groups.

    Videos are taken from one group after another, in random order, until each class has enough. So
    few groups are used for training.
    """
    import pandas as pd

    units = independent_units(group_keys(store.ids, store.groups)[rows])
    labels, usable = store.labels[rows], store.usable[rows]
    rng = np.random.default_rng((number, 7))
    rank = rng.permutation(units.max() + 1)[units]
    order = np.lexsort((rng.random(len(rows)), rank))
    order = order[usable[order]]
    sizes = np.bincount(labels, usable, minlength=len(store.classes))
    short = [store.classes[label] for label in np.unique(labels) if sizes[label] < shots]
    if short:
        raise InputError(
            f"--shots {shots}: {len(short)} classes have fewer usable videos: {first_few(short, 5)}"
        )
    taken = np.sort(pd.Series(order).groupby(labels[order]).head(shots))
    tested = ~np.isin(units, units[taken])
    if not tested.any():
        raise InputError(
            f"--shots {shots}, draw {number}: nothing is left to test on, since no group may both "
            f"train and test, and {len(np.unique(units[taken]))} of {units.max() + 1} groups "
            "train; give fewer --shots"
        )
    return rows[tested], rows[taken]


def _with_held_out(
    store: FeatureStore,
    options: FoldOptions,
    name: str,
    seed: int,
    test: np.ndarray,
    train: np.ndarray,
    *,
    choosing: bool,
) -> Fold:
    """The fold with a part of `train` held out, or none of it if not `choosing`."""
    missing = options.allow_missing_classes
    held_out = np.zeros(len(train), bool)
    if choosing:
        chosen = hold_out(store, train, options.val_fraction, seed, allow_missing=missing)
        held_out = chosen[train]
        keys = group_keys(store.ids, store.groups)
        if has_groups(keys[np.concatenate([test, train])]) and len(set(keys[train])) < 2:
            raise InputError(
                f"fold {name}: all it has to train on is one group, and groups are not split to "
                "choose the epoch; cross-validation over groups needs at least 3"
            )
        if not held_out.any():
            raise InputError(
                f"fold {name}: none of its {len(train)} videos to train on can be held out to "
                "choose the epoch and leave every class an example; pass "
                "--allow-missing-classes, or another --val-fraction"
            )
    fold = Fold(name, seed, test, train, held_out)
    try:
        check_classes(store, fold.inner, allow_missing=missing)
    except InputError as error:
        raise InputError(f"fold {name}: {error}") from None
    return fold


def _tests(
    store: FeatureStore, options: FoldOptions, rows: np.ndarray, seed: int
) -> Iterator[tuple[str, np.ndarray]]:
    """The name of each fold, and the rows that it tests."""
    labels, keys = store.labels[rows], group_keys(store.ids, store.groups)[rows]
    names, groups = np.unique(keys, return_inverse=True)
    if options.folds == "group":
        if not has_groups(keys):
            reason = f"are of one group ({names[0]!r})" if len(names) < 2 else "have no group"
            raise InputError(
                f"--folds group: the {len(rows)} videos of {store.path} {reason}; "
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
            f"--folds {count}: class {name!r} has {sizes.min()} videos, so a fold would be without "
            f"it; give --folds {max(sizes.min(), 2)}, or more videos of it"
        )
    if has_groups(keys) and len(names) < count:
        raise InputError(
            f"--folds {count}: there are {len(names)} groups, which are not split; give --folds "
            "group"
        )
    kind, units = (StratifiedGroupKFold, groups) if has_groups(keys) else (StratifiedKFold, None)
    parts = kind(count, shuffle=True, random_state=seed).split(rows, labels, units)
    for number, (_, test) in enumerate(parts):
        yield str(number), rows[test]


def describe_folds(store: FeatureStore, folds: list[Fold], shots: int | None) -> str:
    """A summary of the folds that names those which do not test every class."""
    classes = {label for fold in folds for label in store.labels[fold.test].tolist()}
    incomplete = [
        f"{fold.name} of seed {fold.seed}"
        for fold in folds
        if len(set(store.labels[fold.test])) < len(classes)
    ]
    note = ""
    if incomplete:
        note = f"; {len(incomplete)} do not test every class: {', '.join(incomplete[:3])}"
    if shots is not None:
        return f"{len(folds)} draws of {shots} videos per class, no group split{note}"
    videos, seeds = sum(len(fold.test) for fold in folds), len({fold.seed for fold in folds})
    return (
        f"{videos // seeds:,} videos, {len(folds) // seeds} folds x {seeds} seeds, no group "
        f"split{note}"
    )
