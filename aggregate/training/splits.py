"""Which videos are trained on and which validate, by split, group and label."""

import numpy as np

from aggregate.training.options import SplitOptions
from extract.cli import InputError, examples
from extract.listing.videos import Listing
from extract.store import FAILED, FeatureStore


class ListedVideos:
    """The videos of a listing with a feature store's columns."""

    def __init__(self, listing: Listing) -> None:
        self.path, self.classes = listing.source, listing.classes
        self.labels = np.array([video.label for video in listing.videos])
        self.splits = np.array([video.split for video in listing.videos])
        self.groups = np.array([video.group for video in listing.videos])
        self.status = np.ones(len(listing.videos), "i1")


def choose_rows(
    store: FeatureStore | ListedVideos, options: SplitOptions, seed: int
) -> tuple[np.ndarray, np.ndarray, str]:
    """Rows to train on (with features and label) and to validate on (with a label), and that in words.

    InputError where one or the other are none, or a class has none to train on.
    """
    labelled = store.labels >= 0
    splits = store.splits
    if options.val_groups:
        unknown = sorted(set(options.val_groups) - set(store.groups.tolist()))
        if unknown:
            known = ", ".join(sorted(set(store.groups.tolist()))[:20])
            raise InputError(f"--val-groups {unknown[0]}: {store.path} has no such group; it has {known}")
        val = np.isin(store.groups, options.val_groups)
        train, words = ~val, f"validation on group {', '.join(options.val_groups)}"
    else:
        val = splits == options.val_split
        train = splits == options.train_split
        words = f"split {options.train_split!r} to train, {options.val_split!r} to validate"
        if not train.any():
            if options.train_split != "train":
                known = ", ".join(repr(name) for name in sorted(set(splits.tolist())))
                raise InputError(f"--train-split {options.train_split}: {store.path} has no such split; it has {known}")
            train = ~val & (splits != "test")
            words = f"no split named 'train': all but {options.val_split!r} and 'test' to train"
        if not (val & labelled).any():
            val = hold_out(store, np.flatnonzero(train & labelled), options.val_fraction, seed)
            train &= ~val
            how = "whole groups" if len(set(store.groups[train | val].tolist())) > 1 else "by class"
            words = f"NO SPLIT {options.val_split!r}: {options.val_fraction:.0%} held out of the others, {how}"
    rows = np.flatnonzero(train & labelled & (store.status != FAILED))
    val_rows = np.flatnonzero(val & labelled)
    for name, chosen in (("train", rows), ("validate", val_rows)):
        if not len(chosen):
            raise InputError(f"{store.path} has no labelled video to {name} on ({words})")
    check_classes(store, rows, allow_missing=options.allow_missing_classes)
    failed = int((train & labelled).sum()) - len(rows)
    unlabelled = int(((train | val) & ~labelled).sum())
    counts = f"{len(rows):,} to train, {len(val_rows):,} to validate"
    return rows, val_rows, f"{counts} ({words}); left out: {failed:,} failed, {unlabelled:,} without a label"


def hold_out(
    store: FeatureStore | ListedVideos, rows: np.ndarray, fraction: float, seed: int, *, allow_missing: bool = False
) -> np.ndarray:
    """Choose about `fraction` of each class of `rows` for validation: bool [N].

    Whole groups where the store knows several, added in random order while they bring the classes nearer to
    `fraction`; else videos. A class keeps at least one video to train on, unless that is not asked for.
    """
    if not 0 < fraction < 1:
        raise InputError(f"--val-fraction {fraction:g}: expected a fraction between 0 and 1")
    rng = np.random.default_rng(seed)
    classes = len(store.classes)
    labels, groups = store.labels[rows], store.groups[rows]
    names = np.unique(groups)
    # Without groups each video is one of its own.
    unit = np.searchsorted(names, groups) if len(names) > 1 else np.arange(len(rows))
    total = np.bincount(labels, minlength=classes)
    wanted, held = fraction * total, np.zeros(classes)
    members = np.split(np.argsort(unit, kind="stable"), np.bincount(unit).cumsum()[:-1])
    chosen = np.zeros(len(store.labels), bool)
    for number in rng.permutation(len(members)).tolist():
        places = members[number]
        counts = np.bincount(labels[places], minlength=classes)
        present = counts > 0
        after = held + counts
        gain = np.abs(held - wanted)[present].sum() - np.abs(after - wanted)[present].sum()
        if gain > 0 and (allow_missing or (after[present] < total[present]).all()):
            held = after
            chosen[rows[places]] = True
    return chosen


def check_classes(store: FeatureStore | ListedVideos, rows: np.ndarray, *, allow_missing: bool) -> None:
    """InputError for a class that has no video among `rows`, unless that is allowed."""
    counts = np.bincount(store.labels[rows], minlength=len(store.classes))
    empty = [store.classes[place] for place in np.flatnonzero(counts == 0)]
    if empty and not allow_missing:
        words = f"{len(empty)} of {len(store.classes)} classes have no video to train on: {examples(empty, 5)}"
        raise InputError(f"{words}; extract some, or pass --allow-missing-classes")
