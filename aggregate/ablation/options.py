"""Option groups of ablation and cross-validation. No torch at import time."""

from dataclasses import dataclass, fields
from typing import Any, Literal

from aggregate.training.options import (
    Aggregator,
    CachedOptions,
    DeviceOptions,
    HeadOptions,
    ScheduleOptions,
    as_lists,
)

# Lists here, single values in `aggregate.train`; an empty list is that command's default.
Lists: Any = as_lists(HeadOptions, ScheduleOptions, CachedOptions)
LISTS = ("agg", *(field.name for field in fields(Lists)))
# The options of probes. All but C, k and vector are options of heads too.
PROBES = {
    "knn": {"agg", "frames", "k", "vector", "standardize"},
    "logreg": {"agg", "frames", "C", "vector", "standardize", "epochs", "balance"},
}


@dataclass(frozen=True, kw_only=True)
class GridOptions(Lists, DeviceOptions):
    """The grid: all combinations of the listed options."""

    agg: tuple[Aggregator, ...] = ("hgnl",)
    """One or more; options that an aggregator does not have are left out of its combinations."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each combination is trained once per seed."""
    features: str | tuple[str, ...] = "feats.zarr"
    """The feature store of `python -m extract`; several are joined by id, and their channels
    concatenated."""
    recipe: Literal["cached", "paper"] = "cached"
    """cached: works best on a frozen backbone; paper: iQIYI's schedule."""
    at_once: int = 32
    """The largest number of models that are trained at the same time. It limits their memory, and
    what is lost if the process is killed."""


@dataclass(frozen=True, kw_only=True)
class FoldOptions:
    """Options that decide which videos are tested, and which are trained on."""

    folds: str = "5"
    """Number of folds, or `group` to leave one group out. Folds divide classes evenly, never split
    a group, and are drawn anew for each seed."""
    splits: tuple[str, ...] = ()
    """Only videos of these splits (default: all splits)."""
    val_fraction: float = 0.2
    """Fraction of a fold's training part that is held out to choose the epoch and the options."""
    allow_missing_classes: bool = False
    """Train although some classes have no example in a fold."""
    shots: int | None = None
    """Few shots instead of folds: train on N videos per class, drawn anew each time, and test on
    all others."""
    repeats: int = 10
    """With --shots: number of draws. A draw replaces a seed."""


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """Options of logreg and knn. One of several values is chosen inside the training part."""

    C: tuple[float, ...] = (1e-3, 1e-2, 0.1, 1.0, 10.0)
    """logreg: the inverse of the penalty. Its --epochs are iterations (1000); --standardize false
    takes raw vectors."""
    k: tuple[int, ...] = (1, 5, 10, 20, 50)
    """knn: the number of neighbors that vote."""
    vector: Literal["mean", "mean-std"] = "mean"
    """logreg, knn: the vector of a video: the mean over its frames, or mean and standard
    deviation."""
