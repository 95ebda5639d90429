"""The choice of training and validation videos, by split, group and label."""

from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np

from aggregate.metrics import independent_units
from aggregate.scores import group_keys
from aggregate.training.options import SplitOptions
from extract import InputError
from extract.cli import first_few
from extract.listing.videos import Listing
from extract.sources import read_source
from extract.store import FAILED, FeatureStore


class Chosen(NamedTuple):
    """Rows int [n] to train on and to validate on, and a description of the choice."""

    train: np.ndarray
    validate: np.ndarray
    description: str


class ListedVideos:
    """The videos of a listing, with the columns of a feature store."""

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
        """Size and digest of the file of each row: they identify it among files of equal name."""
        paths = [self.videos[row].path for row in rows.tolist()]
        new = list(dict.fromkeys(path for path in paths if path not in self._digests))
        with ThreadPoolExecutor(16) as pool:
            sources = pool.map(read_source, new)
            self._digests |= {
                path: f"{source.size} bytes, {source.digest:x}"
                for path, source in zip(new, sources, strict=True)
            }
        return [self._digests[path] for path in paths]


Videos = FeatureStore | ListedVideos


def choose_rows(store: Videos, options: SplitOptions, seed: int) -> Chosen:
    """Choose rows to train on, with features and a label, and rows to validate on, with a label.

    InputError if one of them is empty, or if a class has no row to train on.
    """
    labeled = (store.labels >= 0) & store.listed
    splits, keys = store.splits, group_keys(store.ids, store.groups)
    val, train = splits == options.val_split, splits == options.train_split
    summary = f"split {options.train_split!r} to train, {options.val_split!r} to validate"
    if not train.any():
        if options.train_split != "train":
            check_split("--train-split", options.train_split, store)
        train = ~val & (splits != "test")
        summary = f"no split named 'train': all but {options.val_split!r} and 'test' to train"
    if options.val_groups:
        unknown = sorted(set(options.val_groups) - set(keys.tolist()))
        if unknown:
            groups = sorted({*store.groups.tolist()} - {""} or {*keys.tolist()})
            raise InputError(
                f"--val-groups {unknown[0]}: {store.path} has no such group; it has "
                f"{', '.join(groups[:20])}"
            )
        # Splits are respected: a test video never chooses an epoch, a validation video is never
        # trained on.
        held_out = np.isin(keys, options.val_groups)
        train, val = train & ~held_out, (train | val) & held_out
        summary = (
            f"validation on group {', '.join(options.val_groups)}, among the videos to train or "
            "validate on"
        )
    elif not (val & labeled).any():
        val = hold_out(store, np.flatnonzero(train & labeled), options.val_fraction, seed)
        train &= ~val
        unit = "whole groups" if has_groups(keys[train | val]) else "by class"
        summary = (
            f"NO SPLIT {options.val_split!r}: {options.val_fraction:.0%} held out of the others, "
            f"{unit}"
        )
    rows = np.flatnonzero(train & labeled & (store.status != FAILED))
    val_rows = np.flatnonzero(val & labeled)
    for name, chosen in (("train", rows), ("validate", val_rows)):
        if not len(chosen):
            raise InputError(f"{store.path} has no labeled video to {name} on ({summary})")
    check_classes(store, rows, allow_missing=options.allow_missing_classes)
    failed = int((train & labeled).sum()) - len(rows)
    unlabeled = int(((train | val) & ~labeled).sum())
    return Chosen(
        rows,
        val_rows,
        f"{len(rows):,} to train, {len(val_rows):,} to validate ({summary}); "
        f"left out: {failed:,} failed, {unlabeled:,} without a label",
    )


def check_split(flag: str, split: str, store: Videos) -> None:
    """InputError for a split that no video has."""
    splits = sorted(set(store.splits.tolist()))
    if split not in splits:
        raise InputError(
            f"{flag} {split}: {store.path} has no such split; it has {', '.join(map(repr, splits))}"
        )


def hold_out(
    store: Videos,
    rows: np.ndarray,
    fraction: float,
    seed: int,
    *,
    allow_missing: bool = False,
) -> np.ndarray:
    """Choose about `fraction` of each class of `rows` for validation: bool [N], over the store.

    Groups (`group_keys`: a video without a group is a group of its own) are visited in random
    order. A group is chosen as a whole if it brings the classes nearer to `fraction`. A class keeps
    at least one video to train on, unless `allow_missing`.
    """
    if not 0 < fraction < 1:
        raise InputError(f"--val-fraction {fraction:g}: expected a fraction between 0 and 1")
    rng = np.random.default_rng(seed)
    classes = len(store.classes)
    labels = store.labels[rows]
    unit = independent_units(group_keys(store.ids, store.groups)[rows])
    total = np.bincount(labels, minlength=classes)
    target, held = fraction * total, np.zeros(classes)
    members = np.split(np.argsort(unit, kind="stable"), np.bincount(unit).cumsum()[:-1])
    chosen = np.zeros(len(store.labels), bool)
    for number in rng.permutation(len(members)).tolist():
        group = members[number]
        counts = np.bincount(labels[group], minlength=classes)
        present = counts > 0
        after = held + counts
        gain = np.abs(held - target)[present].sum() - np.abs(after - target)[present].sum()
        if gain > 0 and (allow_missing or (after[present] < total[present]).all()):
            held = after
            chosen[rows[group]] = True
    return chosen


def has_groups(keys: np.ndarray) -> bool:
    """Whether `keys` divide rows into groups: several keys, and one of them more than once."""
    return 1 < len(set(keys.tolist())) < len(keys)


def check_classes(store: Videos, rows: np.ndarray, *, allow_missing: bool) -> None:
    """InputError for a class that has no video among `rows`, unless that is allowed."""
    counts = np.bincount(store.labels[rows], minlength=len(store.classes))
    empty = [store.classes[label] for label in np.flatnonzero(counts == 0)]
    if empty and not allow_missing:
        raise InputError(
            f"{len(empty)} of {len(store.classes)} classes have no video to train on: "
            f"{first_few(empty, 5)}; extract some, or pass --allow-missing-classes"
        )
