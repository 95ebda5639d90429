"""python -m aggregate.ablate: train many configurations in one pass over the features.

Every option of the aggregators and of training takes a list. All combinations are trained, once per
seed. Each command has a folder of its own, with finished results, tables and figures.
aggregate/ablation/grid.py trains the models of a pass, aggregate/ablation/compare.py compares them.
"""

import functools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aggregate.ablation.options import GridOptions
from aggregate.ablation.processes import plan_processes, prepare_environment, run_side_by_side
from aggregate.training.options import SplitOptions, limit_frames
from extract import Record
from extract.cli import progress, run_as_script
from extract.commands import command_of

if TYPE_CHECKING:
    from aggregate.ablation.configurations import Plan
    from aggregate.ablation.records import Records
    from aggregate.training.checkpoint import Checkpoint
    from aggregate.training.configurations import Configuration
    from extract.store import FeatureStore


@dataclass(frozen=True, kw_only=True)
class Options(GridOptions, SplitOptions):
    """Train all combinations of the listed options on cached features, several at once; run again
    to resume.

    Options without a stated default come from the recipe.
    """

    out: Path = Path("runs/ablation")
    """The folder of tables, figures and finished results."""
    init: Path | None = None
    """A checkpoint that all models start from; classifier rows are matched by class name."""


def main(options: Options) -> int:
    prepare_environment()
    import numpy as np
    import torch

    from aggregate.ablation.compare import report
    from aggregate.ablation.configurations import group_into_passes
    from aggregate.ablation.grid import open_trainer, training_cost
    from aggregate.ablation.records import Records
    from aggregate.data.joined import open_features
    from aggregate.scores import group_keys
    from aggregate.training.checkpoint import Checkpoint

    store = open_features(options.features)
    options = limit_frames(options, store)
    init = None if options.init is None else Checkpoint.load(options.init)
    configurations, skipped = plan(options, store, init)
    by_key = {(each.name, each.options.seed): each for each in configurations}
    processes, threads = plan_processes(len(by_key), options.device)
    at_once = max(1, min(options.at_once // processes, -(-len(by_key) // processes)))
    names, seeds = len({name for name, _ in by_key}), len(set(options.seeds))
    passes = len(group_into_passes(configurations, at_once=at_once))
    print(
        f"features  {store!r}\n"
        f"plan      {names} configurations x {seeds} seeds in {passes} passes, {len(skipped)} "
        f"skipped; {processes} passes at a time, {threads} threads each"
    )
    for name, reason in skipped.items():
        print(f"skipped   {name}: {reason}")
    prepare = functools.partial(
        open_trainer,
        options.features,
        device=options.device,
        placement=options.placement,
        processes=processes,
        init=options.init,
    )
    with Records(options, store, by=("name", "seed"), kind="ablation") as records:
        remaining = [each for key, each in by_key.items() if key not in records.rows]
        if records.rows:
            print(f"resuming  {options.out}: {len(records.rows)} of {len(by_key)} are done")
        if init is not None:  # print the weights that each kind of model takes from it
            for each in {each.options.agg: each for each in remaining}.values():
                each.learner(store, torch.device("cpu"), init=init, labels=np.empty(0, int))

        groups = group_into_passes(remaining, at_once=at_once)
        groups.sort(key=lambda group: training_cost(group, store), reverse=True)
        for results in _train_passes(groups, prepare, processes, threads):
            for result in results:
                records.add(result.row, result.label_ranks)
            done = len(_write_table(options.out, by_key, records))
            print(f"done      {done} of {len(by_key)}", flush=True)
        rows = _write_table(options.out, by_key, records)
        ranks_by_run = {key: records.array(key) for key in records.rows}
        print()
        report(options.out, rows, ranks_by_run, group_keys(store.ids, store.groups), skipped)
        print(_retrain_command(rows, by_key))
    return 0


def _train_passes(
    groups: "list[list[Configuration]]", prepare: Any, processes: int, threads: int
) -> Iterator[Any]:
    """Yield the results of each pass as it ends, with a progress bar."""
    from aggregate.ablation.grid import GridTrainer

    with progress(total=sum(group[0].steps for group in groups), unit="step") as bar:
        train_pass: Any = GridTrainer.run
        if processes == 1:  # the bar follows steps; with other processes it follows passes
            train_pass = functools.partial(train_pass, on_step=bar.update)
        finished = run_side_by_side(
            train_pass, groups, prepare=prepare, processes=processes, threads=threads
        )
        for group, results in finished:
            if processes > 1:
                bar.update(group[0].steps)
            yield results


def plan(options: Options, store: "FeatureStore", init: "Checkpoint | None" = None) -> "Plan":
    """All combinations of the listed options, each once per seed. InputError for an empty list, or
    if no combination can be built."""
    from aggregate.ablation.configurations import candidates, check_lists
    from aggregate.training.splits import choose_rows

    check_lists(options, store)
    if init is not None:
        init.check_features(store.provenance, store.dim, store.path)
    one_seed = candidates(options, store, init)
    configurations: dict[Configuration, None] = {}
    for seed in options.seeds:
        videos = len(choose_rows(store, options, seed).train)
        for candidate in one_seed.configurations:
            configurations[candidate.with_seed(seed, videos=videos)] = None
    return one_seed._replace(configurations=list(configurations))


def _write_table(out: Path, keys: Iterable[tuple[str, int]], records: "Records") -> list[Record]:
    """Write the finished rows, in the order of the plan, as ablation.csv."""
    from aggregate.metrics import csv_of
    from extract.durable import replace_file

    rows = [records.rows[key] for key in keys if key in records.rows]
    replace_file(out / "ablation.csv", csv_of(rows))
    return rows


def _retrain_command(rows: list[Record], by_key: "dict[tuple[str, int], Configuration]") -> str:
    """The command that trains the best model again, bit for bit, and keeps its checkpoint."""
    done = [row for row in rows if row["status"] == "done"]
    if not done:
        return "every configuration diverged"
    best = max(done, key=lambda row: row["top1_at_all"])
    command = command_of("aggregate.train", by_key[best["name"], best["seed"]].options)
    return f"the best one's checkpoint: {command}"


if __name__ == "__main__":
    run_as_script()
