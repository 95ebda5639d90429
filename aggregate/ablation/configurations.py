"""The grid of configurations that lists of options make: combined, named, and grouped by the
batches they share."""

import itertools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from aggregate.training.configurations import Configuration, TrainOptions, configured
from aggregate.training.options import (
    Aggregator,
    CachedOptions,
    HeadOptions,
    PlaceOptions,
    ScheduleOptions,
    foreign_flags,
    listed,
)
from extract import InputError

if TYPE_CHECKING:
    from aggregate.training.checkpoint import Checkpoint
    from extract.store import FeatureStore

# Lists here, single values of `aggregate.train`; an empty one is that command's default.
Lists: Any = listed(HeadOptions, ScheduleOptions, CachedOptions)
LISTS = ("agg", *(one.name for one in fields(Lists)))


@dataclass(frozen=True, kw_only=True)
class GridOptions(Lists, PlaceOptions):
    """What is tried: all combinations of the listed options."""

    agg: tuple[Aggregator, ...] = ("hgnl",)
    """One or more; options that an aggregator does not have are left out of its combinations."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each combination is trained once a seed."""
    features: str | tuple[str, ...] = "feats.zarr"
    """The feature store of `python -m extract`; several are joined by id, their channels side by
    side."""
    recipe: Literal["cached", "paper"] = "cached"
    """cached: what works best on a frozen backbone; paper: iQIYI's schedule."""
    at_once: int = 32
    """At most N models are trained at the same time: their memory, and what is lost when the
    process is killed."""


@dataclass(frozen=True, kw_only=True)
class FoldOptions:
    """Which videos test, and which train."""

    folds: str = "5"
    """How many (classes evenly, groups never split, drawn anew by each seed), or `group`: leave one
    group out."""
    splits: tuple[str, ...] = ()
    """Only videos of these splits (default: of all)."""
    val_fraction: float = 0.2
    """How much of a fold's training part is held out in it, to choose the epoch and the options."""
    allow_missing_classes: bool = False
    """Train although some classes have no example in a fold."""
    shots: int | None = None
    """Instead of folds: train on N videos per class, drawn anew each time, and test on all
    others."""
    repeats: int = 10
    """With --shots: how many draws. A draw takes the place of a seed."""


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """Options of logreg and knn; several values are chosen inside the training part."""

    C: tuple[float, ...] = (1e-3, 1e-2, 0.1, 1.0, 10.0)
    """logreg: the inverse of the penalty. Its --epochs are iterations (1000); --standardize false
    takes raw vectors."""
    k: tuple[int, ...] = (1, 5, 10, 20, 50)
    """knn: how many neighbors vote."""
    vector: Literal["mean", "mean-std"] = "mean"
    """logreg, knn: what a video is, the mean over its frames, or that and their deviation."""


class Plan(NamedTuple):
    """What to train; and by their names the combinations that cannot be built, with the reason."""

    configurations: list[Configuration]
    skipped: dict[str, str]

    def print_skipped(self) -> None:
        for name, reason in self.skipped.items():
            print(f"skipped   {name}: {reason}")


def in_passes(
    configurations: Iterable[Configuration], *, at_once: int
) -> list[list[Configuration]]:
    """Configurations by the pass that they share: at most `at_once` in each."""
    groups: dict[Hashable, list[Configuration]] = {}
    for one in configurations:
        groups.setdefault(one.batch_key, []).append(one)
    parts = ((group, -(-len(group) // at_once)) for group in groups.values())
    return [group[start::count] for group, count in parts for start in range(count)]


def candidates(
    options: GridOptions, store: "FeatureStore", init: "Checkpoint | None" = None
) -> Plan:
    """All combinations of the listed options, of one seed and with all videos."""
    import torch

    for one in fields(options):
        flag, given = f"--{one.name.replace('_', '-')}", getattr(options, one.name)
        if one.name in ("seeds", *LISTS) and one.default and not given:
            raise InputError(f"{flag} needs at least one value")
        if given != one.default and all(one.name in foreign_flags(agg) for agg in options.agg):
            raise InputError(
                f"{flag} {' '.join(map(str, given))} means nothing to --agg {' '.join(options.agg)}"
            )
    if options.at_once < 1:
        raise InputError(f"--at-once is {options.at_once}; at least 1 model shares a pass")
    for frames in options.frames:
        if not 1 <= frames <= store.frames_per_video:
            raise InputError(
                f"--frames {frames}: {store.path} holds {store.frames_per_video} frames per video"
            )
    singles = _combinations(options)
    varied = [name for name in LISTS if len({getattr(one, name) for one in singles}) > 1]
    found = Plan([], {})
    for single in singles:
        made = configured(name_of(single, varied), single, videos=len(store))
        try:
            with torch.device("meta"):
                width = made.model(store).classifier.in_features
            wanted = width if init is None else init.state_dict["classifier.weight"].shape[1]
            if width != wanted:
                raise InputError(f"--init classifies {wanted} features, this model {width}")
            found.configurations.append(made)
        except InputError as error:
            found.skipped[made.name] = str(error)
    if not found.configurations:
        name, reason = next(iter(found.skipped.items()))
        raise InputError(f"no configuration can be built; {name}: {reason}")
    return found


def _combinations(options: GridOptions) -> list[TrainOptions]:
    """One `TrainOptions` a combination, each once, what an aggregator does not have at its
    default."""
    defaults = {one.name: one.default for one in fields(TrainOptions)}
    given = {name: getattr(options, name) for name in defaults if hasattr(options, name)}
    kept = {name: value for name, value in given.items() if name not in LISTS} | {"out": None}
    lists = {
        name: tuple({"true": True, "false": False}.get(v, v) for v in given[name]) or (None,)
        for name in LISTS
    }
    found: dict[TrainOptions, None] = {}
    for values in itertools.product(*lists.values()):
        chosen: dict[str, Any] = dict(zip(lists, values, strict=True))
        chosen |= {name: defaults[name] for name in foreign_flags(chosen["agg"])}
        found[TrainOptions(**chosen, **kept)] = None
    return list(found)


def name_of(options: TrainOptions, varied: Sequence[str]) -> str:
    """`hgnl g1=4 g2=2`: the aggregator and those of the `varied` options that it has."""
    values = {
        name: getattr(options, name)
        for name in varied
        if name not in {"agg"} | foreign_flags(options.agg)
    }
    words = [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in values.items()]
    return " ".join([options.agg, *words])
