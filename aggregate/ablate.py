"""python -m aggregate.ablate: many configurations trained in one pass over the features, and what they are worth.

Every option of the aggregators and of training takes a list; all combinations are trained, once a seed. One command is
one folder: finished results, tables, figures. How a pass is shared: aggregate/ablation/grid.py; how results are
compared: aggregate/ablation/compare.py.
"""

import itertools
import os
import shlex
import sys
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from aggregate import train
from aggregate.train import Configuration, configured
from aggregate.training.options import (
    BEFORE_RECIPES,
    Aggregator,
    HeadOptions,
    PlaceOptions,
    ScheduleOptions,
    SplitOptions,
    as_recorded,
    foreign_flags,
    listed,
)
from extract.cli import InputError, progress, run_command

if TYPE_CHECKING:
    from aggregate.training.checkpoint import Checkpoint
    from extract.store import FeatureStore

# Lists here, single values of `aggregate.train`; an empty one is that command's default.
Lists: Any = listed(HeadOptions, ScheduleOptions)
LISTS = ("agg", *(one.name for one in fields(Lists)))


@dataclass(frozen=True, kw_only=True)
class GridOptions(Lists, PlaceOptions):
    """What is tried: all combinations of the listed options."""

    agg: tuple[Aggregator, ...] = ("hgnl",)
    """One or more; options that an aggregator does not have are left out of its combinations."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each combination is trained once a seed."""
    features: str = "feats.zarr"
    """The feature store of `python -m extract`."""
    recipe: Literal["cached", "paper"] = "cached"
    """cached: what works best on a frozen backbone; paper: iQIYI's schedule."""
    at_once: int = 32
    """At most so many models share a pass: their memory, and what is lost when the process is killed."""


@dataclass(frozen=True, kw_only=True)
class Options(GridOptions, SplitOptions):
    """Train all combinations of the listed options on cached features, several at once; run again to resume.

    Where no default is named, an option is the recipe's own.
    """

    out: Path = Path("runs/ablation")
    """The folder of tables, figures and finished results."""
    init: Path | None = None
    """A checkpoint that all start from; classifier rows carry over by class name."""


def main(options: Options) -> int:
    wait_passively()
    from aggregate.ablation.compare import report
    from aggregate.ablation.grid import GridTrainer
    from aggregate.ablation.records import Records
    from aggregate.metrics import csv_of
    from aggregate.training.checkpoint import Checkpoint
    from extract.files import replace_file
    from extract.store import FeatureStore

    options = as_recorded(options, options.out)
    store = FeatureStore.open(options.features)
    init = None if options.init is None else Checkpoint.load(options.init)
    chosen = plan(options, store, init)
    trainer = GridTrainer(store, device=options.device, placement=options.placement, init=init)
    names, seeds = len({one.name for one in chosen.configurations}), len(set(options.seeds))
    shares = len(in_passes(chosen.configurations, at_once=options.at_once))
    size = f"{names} configurations x {seeds} seeds in {shares} passes, {len(chosen.skipped)} skipped"
    print(f"features  {store!r}\nplan      {size}")
    chosen.print_skipped()
    wanted = {(one.name, one.options.seed): one for one in chosen.configurations}
    with Records(options, store, by=("name", "seed"), what="ablation") as records:
        left = [one for key, one in wanted.items() if key not in records.rows]
        passes = in_passes(left, at_once=options.at_once)
        if records.rows:
            print(f"resuming  {options.out}: {len(records.rows)} of {len(wanted)} are done")

        def write_table() -> list[dict[str, Any]]:
            rows = [records.rows[key] for key in wanted if key in records.rows]
            replace_file(options.out / "ablation.csv", csv_of(rows))
            return rows

        for number, share in enumerate(passes, 1):
            words = f"pass {number}/{len(passes)}, {len(share)} models"
            with progress(total=share[0].recipe.epochs * share[0].steps_per_epoch, unit="step", desc=words) as bar:
                for result in trainer.run(share, bar.update):
                    records.add(result.row, result.places)
            print(f"done      {len(write_table())} of {len(wanted)}", flush=True)
        rows, places = write_table(), {key: records.array(key) for key in records.rows}
        print()
        report(options.out, rows, places, [f"{name}: {reason}" for name, reason in chosen.skipped.items()])
        print(_how_to_keep(rows, wanted))
    return 0


def wait_passively() -> None:
    """Small steps on a busy machine: threads that wait for each other must not spin (14 times the CPU time, measured).

    It counts before torch is loaded.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


# -- the plan ----------------------------------------------------------------------------------------------------------


class Plan(NamedTuple):
    """What to train; and by their names the combinations that cannot be built, with the reason."""

    configurations: list[Configuration]
    skipped: dict[str, str]

    def print_skipped(self) -> None:
        for name, reason in self.skipped.items():
            print(f"skipped   {name}: {reason}")


def in_passes(configurations: Iterable[Configuration], *, at_once: int) -> list[list[Configuration]]:
    """Configurations by the pass that they share: at most `at_once` in each."""
    groups: dict[Hashable, list[Configuration]] = {}
    for one in configurations:
        groups.setdefault(one.shares_batches, []).append(one)
    parts = ((group, -(-len(group) // at_once)) for group in groups.values())
    return [group[start::count] for group, count in parts for start in range(count)]


def plan(options: Options, store: "FeatureStore", init: "Checkpoint | None" = None) -> Plan:
    """All combinations of the listed options, each once a seed. InputError where none is left, or a list is empty."""
    from aggregate.training.splits import choose_rows

    if init is not None:
        init.check_features(store.provenance, store.dim, options.features)
    found = candidates(options, store, init)
    every: dict[Configuration, None] = {}
    for seed in options.seeds:
        rows, _, _ = choose_rows(store, options, seed)
        for one in found.configurations:
            every[configured(one.name, replace(one.options, seed=seed), videos=len(rows))] = None
    return found._replace(configurations=list(every))


def candidates(options: GridOptions, store: "FeatureStore", init: "Checkpoint | None" = None) -> Plan:
    """All combinations of the listed options, of one seed and with all videos."""
    import torch

    for one in fields(options):
        flag, given = f"--{one.name.replace('_', '-')}", getattr(options, one.name)
        if one.name in ("seeds", *LISTS) and one.default and not given:
            raise InputError(f"{flag} needs at least one value")
        if given != one.default and all(one.name in foreign_flags(agg) for agg in options.agg):
            raise InputError(f"{flag} {' '.join(map(str, given))} means nothing to --agg {' '.join(options.agg)}")
    if options.at_once < 1:
        raise InputError(f"--at-once is {options.at_once}; at least 1 model shares a pass")
    for frames in options.frames:
        if not 1 <= frames <= store.frames_per_video:
            raise InputError(f"--frames {frames}: {options.features} holds {store.frames_per_video} frames a video")
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


def _combinations(options: GridOptions) -> list[train.Options]:
    """One `train.Options` a combination, each once, what an aggregator does not have at its default."""
    defaults = {one.name: one.default for one in fields(train.Options)}
    given = {name: getattr(options, name) for name in defaults if hasattr(options, name)}
    kept = {name: value for name, value in given.items() if name not in LISTS} | {"out": None}
    lists = {name: tuple({"true": True, "false": False}.get(v, v) for v in given[name]) or (None,) for name in LISTS}
    # What changes nothing is the same for those that do not have it, so that it is in no name.
    defaults |= {name: value for name, value in BEFORE_RECIPES.items() if value in lists[name]}
    found: dict[train.Options, None] = {}
    for values in itertools.product(*lists.values()):
        chosen: dict[str, Any] = dict(zip(lists, values, strict=True))
        chosen |= {name: defaults[name] for name in foreign_flags(chosen["agg"])}
        found[train.Options(**chosen, **kept)] = None
    return list(found)


def name_of(options: train.Options, varied: Sequence[str]) -> str:
    """`hgnl g1=4 g2=2`: the aggregator and those of the `varied` options that it has."""
    values = {name: getattr(options, name) for name in varied if name not in {"agg"} | foreign_flags(options.agg)}
    words = [f"{k}={str(v).lower() if isinstance(v, bool) else v}" for k, v in values.items()]
    return " ".join([options.agg, *words])


def _how_to_keep(rows: list[dict[str, Any]], trained: dict[tuple[str, int], Configuration]) -> str:
    """The command that trains the best model again, to the bit, and keeps its checkpoint."""
    done = [row for row in rows if row["status"] == "done"]
    if not done:
        return "every configuration diverged"
    best = max(done, key=lambda row: row["top1_at_all"])
    return f"the best one's checkpoint: {command(trained[best['name'], best['seed']].options)}"


def command(options: train.Options) -> str:
    """The `python -m aggregate.train` that these options stand for."""
    words = ["python", "-m", "aggregate.train"]
    for one in fields(options):
        value = getattr(options, one.name)
        if value != one.default:
            flag_alone = value is True and one.default is False
            values = value if isinstance(value, tuple) else () if flag_alone else (value,)
            words += [f"--{one.name.replace('_', '-')}", *map(str, values)]
    return shlex.join(words)


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m aggregate.ablate"))
