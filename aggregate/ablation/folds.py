"""Which videos test, train and choose: folds of a store, leave one group out, or few shots.

fold 1   test | train ................ | held out      the part of `train` that chooses the epoch and the options
fold 2   train .. | test | train ..... | held out
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

from aggregate.ablation.configurations import FoldOptions
from aggregate.metrics import independent_units
from aggregate.training.splits import check_classes, group_keys, has_groups, hold_out
from extract import InputError
from extract.cli import first_few
from extract.store import FeatureStore

DRAW = "draw"  # the name of a fold with --shots; its seed tells one from another


@dataclass(frozen=True, eq=False)
class Fold:
    """Rows of the store: to test on, to train on, and of these the ones that choose (bool)."""

    name: str
    seed: int
    test: np.ndarray
    train: np.ndarray
    held_out: np.ndarray


def rows_of(store: FeatureStore, options: FoldOptions) -> np.ndarray:
    """All videos that count: labeled, of the splits asked for; failed ones too, which are tested
    as errors."""
    known = sorted(set(store.splits.tolist()))
    if unknown := [name for name in options.splits if name not in known]:
        raise InputError(
            f"--splits {unknown[0]}: {store.path} has no such split; it has {', '.join(map(repr, known))}"
        )
    chosen = np.isin(store.splits, options.splits) if options.splits else np.ones(len(store), bool)
    rows = np.flatnonzero(chosen & (store.labels >= 0) & store.listed)
    if not len(rows):
        raise InputError(f"{store.path} has no labeled video in these splits")
    return rows


def all_folds(
    store: FeatureStore, options: FoldOptions, seeds: Sequence[int], *, choosing: bool = True
) -> list[Fold]:
    """The folds of all seeds; with --shots one per draw. If not `choosing`, nothing has to be held
    out."""
    if options.shots is None:
        return [
            fold for seed in seeds for fold in folds_of(store, options, seed, choosing=choosing)
        ]
    for name in ("shots", "repeats"):
        if getattr(options, name) < 1:
            raise InputError(f"--{name} is {getattr(options, name)}; expected a number from 1 on")
    return [_draw(store, options, number, choosing=choosing) for number in range(options.repeats)]


def _draw(store: FeatureStore, options: FoldOptions, number: int, *, choosing: bool) -> Fold:
    """`shots` videos per class to train on, and all others to test, but for those of the same
    groups.

    Groups come in random order, and give videos until each class has enough, so that few groups are
    used up.
    """
    rows = rows_of(store, options)
    units = independent_units(group_keys(store.ids, store.groups)[rows])
    labels, usable = store.labels[rows], store.usable[rows]
    rng = np.random.default_rng((number, 7))
    rank = rng.permutation(units.max() + 1)[units]
    order = np.lexsort((rng.random(len(rows)), rank))
    order = order[usable[order]]
    # The first `shots` of each class in this order.
    by_class = np.argsort(labels[order], kind="stable")
    sizes = np.bincount(labels, usable, minlength=len(store.classes)).astype(int)
    starts = np.repeat(sizes.cumsum() - sizes, sizes)
    taken = np.sort(order[by_class[np.arange(len(order)) - starts < options.shots]])
    short = [store.classes[label] for label in np.unique(labels) if sizes[label] < options.shots]
    if short:
        raise InputError(
            f"--shots {options.shots}: {len(short)} classes have fewer videos that can be used: {first_few(short, 5)}"
        )
    tested = ~np.isin(units, units[taken])
    if not tested.any():
        raise InputError(
            f"--shots {options.shots}, draw {number}: nothing is left to test on, since no group may both train and "
            f"test, and {len(set(units[taken].tolist()))} of {units.max() + 1} groups train; give fewer --shots"
        )
    return _with_held_out(
        store, options, DRAW, number, rows[tested], rows[taken], choosing=choosing
    )


def folds_of(
    store: FeatureStore, options: FoldOptions, seed: int, *, choosing: bool = True
) -> list[Fold]:
    """The folds of a seed. InputError for what cannot be divided so, naming the class, the group or
    the fold."""
    rows = rows_of(store, options)
    folds = []
    for name, test in _tests(store, options, rows, seed):
        others = np.setdiff1d(rows, test)
        others = others[store.usable[others]]
        folds.append(_with_held_out(store, options, name, seed, test, others, choosing=choosing))
    return folds


def _with_held_out(
    store: FeatureStore,
    options: FoldOptions,
    name: str,
    seed: int,
    test: np.ndarray,
    others: np.ndarray,
    *,
    choosing: bool,
) -> Fold:
    """The fold with the part of its training rows `others` that chooses; none if not `choosing`."""
    keys, missing = group_keys(store.ids, store.groups), options.allow_missing_classes
    if choosing:
        held_out = hold_out(store, others, options.val_fraction, seed, allow_missing=missing)[
            others
        ]
        if has_groups(keys[np.concatenate([test, others])]) and len(set(keys[others])) < 2:
            raise InputError(
                f"fold {name}: all it has to train on is one group, and groups are not split to choose the epoch; "
                "cross-validation over groups needs at least 3"
            )
        if not held_out.any():
            raise InputError(
                f"fold {name}: nothing of its {len(others)} videos to train on can be held out to choose the epoch and "
                "leave every class an example; pass --allow-missing-classes, or another --val-fraction"
            )
    else:
        held_out = np.zeros(len(others), bool)
    try:
        check_classes(store, others[~held_out], allow_missing=missing)
    except InputError as error:
        raise InputError(f"fold {name}: {error}") from None
    return Fold(name, seed, test, others, held_out)


def _tests(
    store: FeatureStore, options: FoldOptions, rows: np.ndarray, seed: int
) -> Iterator[tuple[str, np.ndarray]]:
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
        raise InputError(
            f"--folds {count}: there are {len(names)} groups, which are not split; give --folds group"
        )
    kind, units = (StratifiedGroupKFold, groups) if has_groups(keys) else (StratifiedKFold, None)
    for number, (_, test) in enumerate(
        kind(count, shuffle=True, random_state=seed).split(rows, labels, units)
    ):
        yield str(number), rows[test]


def describe_folds(store: FeatureStore, folds: list[Fold]) -> str:
    """What is divided how; and the folds that do not test every class, which is not an error."""
    every = {label for fold in folds for label in store.labels[fold.test].tolist()}
    lacking = [
        f"{fold.name} of seed {fold.seed}"
        for fold in folds
        if len(set(store.labels[fold.test])) < len(every)
    ]
    words = f"; {len(lacking)} test not every class: {', '.join(lacking[:3])}" if lacking else ""
    if folds[0].name == DRAW:
        (shots,) = set(np.bincount(store.labels[folds[0].train]).tolist()) - {0}
        return f"{len(folds)} draws of {shots} videos per class, no group split{words}"
    videos, seeds = sum(len(fold.test) for fold in folds), len({fold.seed for fold in folds})
    return f"{videos // seeds:,} videos, {len(folds) // seeds} folds x {seeds} seeds, no group split{words}"
