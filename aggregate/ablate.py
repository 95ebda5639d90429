"""python -m aggregate.ablate: many configurations trained in one pass over the features, and what
they are worth.

Every option of the aggregators and of training takes a list; all combinations are trained, once a
seed. One command is one folder: finished results, tables, figures. How a pass is shared:
aggregate/ablation/grid.py; how results are compared: aggregate/ablation/compare.py.
"""

import functools
import sys
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from aggregate.ablation.configurations import GridOptions, Plan, candidates, in_passes
from aggregate.ablation.processes import plan_processes, prepare_environment, run_side_by_side
from aggregate.training.configurations import Configuration, configured
from aggregate.training.options import SplitOptions
from extract.cli import progress, run_command
from extract.commands import command_of

if TYPE_CHECKING:
    from aggregate.ablation.records import Records
    from aggregate.training.checkpoint import Checkpoint
    from extract.store import FeatureStore


@dataclass(frozen=True, kw_only=True)
class Options(GridOptions, SplitOptions):
    """Train all combinations of the listed options on cached features, several at once; run again
    to resume.

    Where no default is named, an option is the recipe's own.
    """

    out: Path = Path("runs/ablation")
    """The folder of tables, figures and finished results."""
    init: Path | None = None
    """A checkpoint that all start from; classifier rows carry over by class name."""


def main(options: Options) -> int:
    prepare_environment()
    from aggregate.ablation.compare import report
    from aggregate.ablation.grid import GridTrainer, open_trainer, training_cost
    from aggregate.ablation.records import Records
    from aggregate.data.joined import open_features
    from aggregate.scores import group_keys
    from aggregate.training.checkpoint import Checkpoint
    from aggregate.training.sources import with_possible_frames

    store = open_features(options.features)
    options = with_possible_frames(options, store)
    init = None if options.init is None else Checkpoint.load(options.init)
    chosen = plan(options, store, init)
    processes, threads = plan_processes(len(chosen.configurations), options.device)
    at_once = max(1, min(options.at_once // processes, -(-len(chosen.configurations) // processes)))
    names, seeds = len({one.name for one in chosen.configurations}), len(set(options.seeds))
    passes = len(in_passes(chosen.configurations, at_once=at_once))
    size = (
        f"{names} configurations x {seeds} seeds in {passes} passes, {len(chosen.skipped)} skipped"
    )
    print(
        f"features  {store!r}\nplan      {size}; {processes} passes at a time, {threads} threads each"
    )
    chosen.print_skipped()
    wanted = {(one.name, one.options.seed): one for one in chosen.configurations}
    prepare = functools.partial(
        open_trainer,
        options.features,
        device=options.device,
        placement=options.placement,
        processes=processes,
        init=options.init,
    )
    with Records(options, store, by=("name", "seed"), kind="ablation") as records:
        left = [one for key, one in wanted.items() if key not in records.rows]
        if records.rows:
            print(f"resuming  {options.out}: {len(records.rows)} of {len(wanted)} are done")
        if init is not None and processes > 1 and left:
            GridTrainer(store, device="cpu", init=init).log_init(left)

        shares = in_passes(left, at_once=at_once)
        shares.sort(key=lambda share: training_cost(share, store), reverse=True)
        for results in _train_passes(shares, prepare, processes, threads):
            for result in results:
                records.add(result.row, result.label_ranks)
            done = len(_write_table(options.out, wanted, records))
            print(f"done      {done} of {len(wanted)}", flush=True)
        rows = _write_table(options.out, wanted, records)
        places = {key: records.array(key) for key in records.rows}
        groups = group_keys(store.ids, store.groups)
        skipped = [f"{name}: {reason}" for name, reason in chosen.skipped.items()]
        print()
        report(options.out, rows, places, groups, skipped)
        print(_how_to_keep(rows, wanted))
    return 0


def _train_passes(
    passes: list[list["Configuration"]], prepare: Any, processes: int, threads: int
) -> Iterator[Any]:
    """The results of each pass as it ends, with a progress bar."""
    from aggregate.ablation.grid import GridTrainer

    steps = [share[0].recipe.epochs * share[0].steps_per_epoch for share in passes]
    with progress(total=sum(steps), unit="step") as bar:
        train_pass: Any = GridTrainer.run
        if processes == 1:  # each step is shown; other processes only say what they finished
            train_pass = functools.partial(train_pass, on_step=bar.update)
        finished = run_side_by_side(
            train_pass, passes, prepare=prepare, processes=processes, threads=threads
        )
        for share, results in finished:
            if processes > 1:
                bar.update(share[0].recipe.epochs * share[0].steps_per_epoch)
            yield results


# -- the plan ----------------------------------------------------------------------------------------------------------


def plan(options: Options, store: "FeatureStore", init: "Checkpoint | None" = None) -> Plan:
    """All combinations of the listed options, each once a seed. InputError if none is left, or a
    list is empty."""
    from aggregate.training.splits import choose_rows

    if init is not None:
        init.check_features(store.provenance, store.dim, store.path)
    found = candidates(options, store, init)
    every: dict[Configuration, None] = {}
    for seed in options.seeds:
        rows, _, _ = choose_rows(store, options, seed)
        for one in found.configurations:
            every[configured(one.name, replace(one.options, seed=seed), videos=len(rows))] = None
    return found._replace(configurations=list(every))


def _write_table(
    out: Path, wanted: Iterable[tuple[str, int]], records: "Records"
) -> list[dict[str, Any]]:
    """Write the rows that are done, in the order of the plan, as ablation.csv."""
    from aggregate.metrics import csv_of
    from extract.durable import replace_file

    rows = [records.rows[key] for key in wanted if key in records.rows]
    replace_file(out / "ablation.csv", csv_of(rows))
    return rows


def _how_to_keep(rows: list[dict[str, Any]], trained: dict[tuple[str, int], Configuration]) -> str:
    """The command that trains the best model again, to the bit, and keeps its checkpoint."""
    done = [row for row in rows if row["status"] == "done"]
    if not done:
        return "every configuration diverged"
    best = max(done, key=lambda row: row["top1_at_all"])
    return f"the best one's checkpoint: {command_of('aggregate.train', trained[best['name'], best['seed']].options)}"


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m aggregate.ablate"))
