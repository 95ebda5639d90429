"""Which videos are trained on and which validate, by split, group and label."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np

from aggregate.metrics import independent_units
from aggregate.scores import group_keys
from aggregate.training.options import SplitOptions
from extract import InputError
from extract.cli import first_few
from extract.listing.videos import Listing
from extract.sources import read_source
from extract.store import FAILED, FeatureStore


class ListedVideos:
    """The videos of a listing with a feature store's columns."""

    def __init__(self, listing: Listing) -> None:
        self.path, self.classes = listing.source, listing.classes
        self.ids = np.array([video.id for video in listing.videos], object)
        self.labels = np.array([video.label for video in listing.videos])
        self.splits = np.array([video.split for video in listing.videos])
        self.groups = np.array([video.group for video in listing.videos])
        self.status = np.ones(len(listing.videos), "i1")
        self.listed = np.ones(len(listing.videos), bool)
        self.videos, self._digests = listing.videos, dict[str, str]()

    def file_digests(self, rows: np.ndarray) -> list[str]:
        """What tells the files of these rows from others of the same names."""
        paths = [self.videos[row].path for row in rows.tolist()]
        new = list(dict.fromkeys(path for path in paths if path not in self._digests))
        with ThreadPoolExecutor(16) as pool:
            sources = pool.map(read_source, new)
            self._digests |= {
                path: f"{of.size} bytes, {of.digest:x}"
                for path, of in zip(new, sources, strict=True)
            }
        return [self._digests[path] for path in paths]


def choose_rows(
    store: FeatureStore | ListedVideos, options: SplitOptions, seed: int
) -> tuple[np.ndarray, np.ndarray, str]:
    """Rows to train on (with features and label) and to validate on (with a label), and that in
    words.

    InputError where one or the other are none, or a class has none to train on.
    """
    labeled = (store.labels >= 0) & store.listed
    splits, keys = store.splits, group_keys(store.ids, store.groups)
    val, train = splits == options.val_split, splits == options.train_split
    words = f"split {options.train_split!r} to train, {options.val_split!r} to validate"
    if not train.any():
        if options.train_split != "train":
            known = ", ".join(repr(name) for name in sorted(set(splits.tolist())))
            raise InputError(
                f"--train-split {options.train_split}: {store.path} has no such split; it has {known}"
            )
        train = ~val & (splits != "test")
        words = f"no split named 'train': all but {options.val_split!r} and 'test' to train"
    if options.val_groups:
        unknown = sorted(set(options.val_groups) - set(keys.tolist()))
        if unknown:
            known = ", ".join(sorted({*store.groups.tolist()} - {""} or {*keys.tolist()})[:20])
            raise InputError(
                f"--val-groups {unknown[0]}: {store.path} has no such group; it has {known}"
            )
        # Splits are respected: a test video never chooses an epoch, a validation video is never
        # trained on.
        held_out = np.isin(keys, options.val_groups)
        train, val = train & ~held_out, (train | val) & held_out
        words = f"validation on group {', '.join(options.val_groups)}, among the videos to train or validate on"
    elif not (val & labeled).any():
        val = hold_out(store, np.flatnonzero(train & labeled), options.val_fraction, seed)
        train &= ~val
        how = "whole groups" if has_groups(keys[train | val]) else "by class"
        words = f"NO SPLIT {options.val_split!r}: {options.val_fraction:.0%} held out of the others, {how}"
    rows = np.flatnonzero(train & labeled & (store.status != FAILED))
    val_rows = np.flatnonzero(val & labeled)
    for name, chosen in (("train", rows), ("validate", val_rows)):
        if not len(chosen):
            raise InputError(f"{store.path} has no labeled video to {name} on ({words})")
    check_classes(store, rows, allow_missing=options.allow_missing_classes)
    failed = int((train & labeled).sum()) - len(rows)
    unlabeled = int(((train | val) & ~labeled).sum())
    counts = f"{len(rows):,} to train, {len(val_rows):,} to validate"
    return (
        rows,
        val_rows,
        f"{counts} ({words}); left out: {failed:,} failed, {unlabeled:,} without a label",
    )


def hold_out(
    store: FeatureStore | ListedVideos,
    rows: np.ndarray,
    fraction: float,
    seed: int,
    *,
    allow_missing: bool = False,
) -> np.ndarray:
    """Choose about `fraction` of each class of `rows` for validation: bool [N].

    Whole groups (`group_keys`: a video without a group is one of its own) are added in random order
    while they bring the classes nearer to `fraction`. A class keeps at least one video to train on,
    unless `allow_missing`.
    """
    if not 0 < fraction < 1:
        raise InputError(f"--val-fraction {fraction:g}: expected a fraction between 0 and 1")
    rng = np.random.default_rng(seed)
    classes = len(store.classes)
    labels = store.labels[rows]
    unit = independent_units(group_keys(store.ids, store.groups)[rows])
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


def has_groups(keys: np.ndarray) -> bool:
    """Whether these rows are divided by groups: there are several, and one has several rows."""
    return 1 < len(set(keys.tolist())) < len(keys)


def check_classes(
    store: FeatureStore | ListedVideos, rows: np.ndarray, *, allow_missing: bool
) -> None:
    """InputError for a class that has no video among `rows`, unless that is allowed."""
    counts = np.bincount(store.labels[rows], minlength=len(store.classes))
    empty = [store.classes[place] for place in np.flatnonzero(counts == 0)]
    if empty and not allow_missing:
        words = f"{len(empty)} of {len(store.classes)} classes have no video to train on: {first_few(empty, 5)}"
        raise InputError(f"{words}; extract some, or pass --allow-missing-classes")
