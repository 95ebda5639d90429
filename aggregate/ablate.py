"""python -m aggregate.ablate: many configurations trained in one pass over the features, and what they are worth.

Every option of the aggregators and of training takes a list; all combinations are trained, once a seed. One command is
one folder: finished results, tables, figures. How a pass is shared: aggregate/ablation/grid.py; how results are
compared in aggregate/ablation/compare.py.
"""

import fcntl
import hashlib
import io
import itertools
import json
import os
import shlex
import sys
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aggregate import train
from aggregate.training.files import csv_of
from aggregate.training.options import AGGREGATOR_FLAGS, HEAD_FLAGS, SplitOptions, completed, plain
from extract.cli import InputError, RunError, run_command
from extract.files import append, make_folder, replace_file

if TYPE_CHECKING:
    import numpy as np

    from aggregate.ablation.grid import Configuration, Result
    from extract.store import FeatureStore

# Where an ablation may continue with another value: they say where and how fast, not what.
_FREE_ON_RESUME = ("out", "device", "placement", "workers", "address", "at_once")
# Lists here, single values of `aggregate.train`; an empty one is that command's default.
LISTS = (
    *("agg", *HEAD_FLAGS),
    *("frames", "optimizer", "lr", "weight_decay", "epochs", "batch_size", "dropout"),
)


@dataclass(frozen=True)
class Options(SplitOptions):
    """Train all combinations of the listed options on cached features, several at once; run again to resume.

    Where no default is named, an option is the recipe's own.
    """

    agg: tuple[Literal["tsn", "max", "weighted", "nl", "hgnl", "txb", "attentive", "nextvlad"], ...] = ("hgnl",)
    """One or more; options that an aggregator does not have are left out of its combinations."""
    seeds: tuple[int, ...] = (0, 1, 2)
    """Each combination is trained once a seed."""
    features: str = "feats.zarr"
    """The feature store of `python -m extract`."""
    out: Path = Path("runs/ablation")
    """The folder of tables, figures and finished results."""
    init: Path | None = None
    """A checkpoint that all start from; classifier rows carry over by class name."""
    recipe: Literal["cached", "paper"] = "cached"
    """cached: what works best on a frozen backbone; paper: iQIYI's schedule."""
    g1: tuple[int, ...] = (16,)
    """hgnl: groups of W_q and W_k."""
    g2: tuple[int, ...] = (8,)
    """hgnl: groups of W_v, and attention maps; pairs where it does not divide g1 are skipped and listed."""
    m1: tuple[int, ...] = ()
    """hgnl, nl: width of Q and K (default: m/8 for hgnl, m/2 for nl)."""
    shared: tuple[Literal["false", "true"], ...] = ("false",)
    """hgnl: one set of weights for all groups."""
    norm: tuple[Literal["none", "n", "n_over_train"], ...] = ("none",)
    """hgnl: what the ReLU map is divided by."""
    attention: tuple[Literal["relu", "softmax"], ...] = ("relu",)
    """hgnl: softmax is an ablation the paper lacks."""
    scale_init: tuple[float, ...] = (0.0,)
    """hgnl, nl: s before training."""
    scale_scores: tuple[Literal["false", "true"], ...] = ("false",)
    """hgnl, nl: divide scores by the root of their length."""
    depth: tuple[int, ...] = (1,)
    """attentive: layers of attention; those before the query's are self-attention of the frames."""
    heads: tuple[int, ...] = ()
    """attentive: heads of attention (default: about m/64)."""
    frame_time: tuple[Literal["false", "true"], ...] = ("false",)
    """attentive: add each frame's time in the video, so that order is seen."""
    clusters: tuple[int, ...] = (16,)
    """nextvlad: cluster centres; 128 in its paper, on 5 million videos."""
    groups: tuple[int, ...] = (8,)
    """nextvlad: groups of channels, each with an attention of its own."""
    expansion: tuple[int, ...] = (2,)
    """nextvlad: what the width is multiplied by first."""
    frames: tuple[int, ...] = (3,)
    """Segments in training, and in the validation of each epoch."""
    optimizer: tuple[Literal["sgd", "adamw"], ...] = ()
    lr: tuple[float, ...] = ()
    weight_decay: tuple[float, ...] = ()
    epochs: tuple[int, ...] = ()
    batch_size: tuple[int, ...] = ()
    dropout: tuple[float, ...] = ()
    at_once: int = 32
    """At most so many models share a pass: their memory, and what is lost when the process is killed."""
    workers: int | None = None
    """Ray workers, each a pass over its share (default: the GPUs or nodes at --address; without one, this process)."""
    address: str | None = None
    """A Ray cluster, HOST:PORT or auto."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    placement: Literal["auto", "device", "memory", "mmap"] = "auto"
    """Where features lie while they are read; auto chooses by size."""


@dataclass(frozen=True)
class Plan:
    """What to train, and what was left out with its reason."""

    configurations: "list[Configuration]"
    skipped: list[tuple[str, str]] = field(default_factory=list)

    def passes(self, *, at_once: int, done: Collection[str] = (), shares: int = 1) -> "list[list[Configuration]]":
        """Those that are not done, by the pass they share; each pass in `shares` parts of at most `at_once`."""
        groups: dict[tuple[int, int, int, int], list[Configuration]] = {}
        for one in self.configurations:
            if one.key not in done:
                groups.setdefault(one.shares_batches, []).append(one)
        parts = []
        for group in groups.values():
            count = min(len(group), max(shares, -(-len(group) // at_once)))
            parts += [group[start::count] for start in range(count)]
        return parts


def main(options: Options) -> int:
    from aggregate.ablation.compare import report
    from aggregate.ablation.grid import contents_of
    from aggregate.training.learner import choose_device
    from extract.store import FeatureStore

    store = FeatureStore.open(options.features)
    chosen = plan(options, store)
    if not _spread(options):
        choose_device(options.device)  # refused before the folder is touched
    print(f"features  {store!r}\nplan      {_describe(chosen, options)}")
    for name, reason in chosen.skipped:
        print(f"skipped   {name}: {reason}")
    with Records(options, contents_of(store)) as records:
        if records.rows:
            print(f"resuming  {options.out}: {len(records.rows)} of {len(chosen.configurations)} are done")
        try:
            for results in _trained(options, chosen, store, done=records.rows):
                for result in results:
                    records.add(result)
                _write_table(options.out, chosen, records)
                print(f"done      {len(records.rows)} of {len(chosen.configurations)}", flush=True)
        except KeyboardInterrupt:
            print(f"\nstopped; {options.out} holds {len(records.rows)} results, the same command goes on", flush=True)
            raise
        rows = _write_table(options.out, chosen, records)
        places = {(row["name"], row["seed"]): records.places(key) for key, row in records.rows.items()}
    print()
    report(options.out, rows, places, [f"{name}: {reason}" for name, reason in chosen.skipped])
    print(_how_to_keep(rows, chosen))
    return 0


# -- the plan ----------------------------------------------------------------------------------------------------------


def plan(options: Options, store: "FeatureStore") -> Plan:
    """All combinations of the listed options, each once a seed. InputError where none is left, or a list is empty."""
    from aggregate.ablation.grid import Configuration
    from aggregate.training.checkpoint import Checkpoint
    from aggregate.training.splits import check_classes, choose_rows

    for one in fields(Options):
        if one.name in ("seeds", *LISTS) and one.default and not getattr(options, one.name):
            raise InputError(f"--{one.name.replace('_', '-')} needs at least one value")
    if options.at_once < 1:
        raise InputError(f"--at-once is {options.at_once}; at least 1 model shares a pass")
    if options.workers is not None and options.workers < 1:
        raise InputError(f"--workers is {options.workers}; at least 1 does the work")
    width = None  # of the features that the classifier of --init takes
    if options.init is not None:
        init = Checkpoint.load(options.init)
        init.check_features(store.provenance, store.dim, options.features)
        width = init.state_dict["classifier.weight"].shape[1]
    _check_meaning(options)
    for frames in options.frames:
        if not 1 <= frames <= store.frames_per_video:
            raise InputError(f"--frames {frames}: {options.features} holds {store.frames_per_video} frames a video")
    singles = _combinations(options)
    varied = [name for name in LISTS if len({getattr(one, name) for one in singles}) > 1]
    configurations: dict[str, Configuration] = {}
    skipped: dict[str, str] = {}
    videos = {}
    for seed in options.seeds:
        rows, _, _ = choose_rows(store, options, seed)
        check_classes(store, rows, allow_missing=options.allow_missing_classes)
        videos[seed] = len(rows)
    for seed, single in itertools.product(options.seeds, singles):
        name = name_of(single, varied)
        if name in skipped:
            continue
        wanted = replace(single, seed=seed)
        made = Configuration(name, wanted, train.recipe_of(wanted, videos=videos[seed]))
        try:
            model = made.build(store)
            if width not in (None, model.classifier.in_features):
                raise InputError(f"--init classifies {width} features, this model {model.classifier.in_features}")
        except InputError as error:
            skipped[name] = str(error)
            continue
        configurations.setdefault(made.key, made)
    if not configurations:
        name, reason = next(iter(skipped.items()))
        raise InputError(f"no configuration can be built; {name}: {reason}")
    return Plan(list(configurations.values()), list(skipped.items()))


def _combinations(options: Options) -> list[train.Options]:
    """One `train.Options` a combination, each once, what an aggregator does not have at its default."""
    shared = {one.name: getattr(options, one.name) for one in fields(Options) if one.name not in ("agg", "seeds")}
    kept: dict[str, Any] = {name: shared[name] for name in shared if name not in LISTS and hasattr(train.Options, name)}
    kept |= {"out": None}
    lists = [tuple({"true": True, "false": False}.get(v, v) for v in shared[name]) or (None,) for name in LISTS[1:]]
    defaults = {one.name: one.default for one in fields(train.Options)}
    found: dict[train.Options, None] = {}
    for agg, *values in itertools.product(options.agg, *lists):
        foreign = set(HEAD_FLAGS) - set(AGGREGATOR_FLAGS.get(agg, ()))
        own: dict[str, Any] = {k: defaults[k] if k in foreign else v for k, v in zip(LISTS[1:], values, strict=True)}
        found[train.Options(agg=agg, **own, **kept)] = None
    return list(found)


def _check_meaning(options: Options) -> None:
    """InputError for a list that none of the aggregators chosen has."""
    defaults = {one.name: one.default for one in fields(Options)}
    for flag in HEAD_FLAGS:
        given = getattr(options, flag)
        if given != defaults[flag] and not any(flag in AGGREGATOR_FLAGS.get(agg, ()) for agg in options.agg):
            text = f"--{flag.replace('_', '-')} {' '.join(map(str, given))}"
            raise InputError(f"{text} means nothing to --agg {' '.join(options.agg)}")


def name_of(options: train.Options, varied: Sequence[str]) -> str:
    """`hgnl g1=4 g2=2`: the aggregator and those of the `varied` options that it has."""
    foreign = set(HEAD_FLAGS) - set(AGGREGATOR_FLAGS.get(options.agg, ()))
    words = [f"{name}={_text(getattr(options, name))}" for name in varied if name != "agg" and name not in foreign]
    return " ".join([options.agg, *words])


def _text(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)  # all digits: names tell values apart


def _describe(chosen: Plan, options: Options) -> str:
    passes = len(chosen.passes(at_once=options.at_once))
    names = len({one.name for one in chosen.configurations})
    return f"{names} configurations x {len(set(options.seeds))} seeds in {passes} passes, {len(chosen.skipped)} skipped"


def _how_to_keep(rows: list[dict[str, Any]], chosen: Plan) -> str:
    """The command that trains the best model again, to the bit, and keeps its checkpoint."""
    done = [row for row in rows if row["status"] == "done"]
    if not done:
        return "every configuration diverged"
    best = max(done, key=lambda row: row["top1_at_all"])
    one = next(c for c in chosen.configurations if (c.name, c.options.seed) == (best["name"], best["seed"]))
    return f"the best one's checkpoint: {command(one.options)}"


def command(options: train.Options) -> str:
    """The `python -m aggregate.train` that these options stand for."""
    words = ["python", "-m", "aggregate.train"]
    for one in fields(options):
        value = getattr(options, one.name)
        if value == one.default:
            continue
        words.append(f"--{one.name.replace('_', '-')}")
        if value is not True:
            words += [str(v) for v in value] if isinstance(value, tuple) else [str(value)]
    return shlex.join(words)


# -- what is done --------------------------------------------------------------------------------------------------


class Records:
    """Finished results of a folder: a line of JSON each, appended whole, and a file of ranks; one process at a time.

    `rows` are the rows of the table by `Configuration.key`. InputError for a folder of other options or contents.
    """

    def __init__(self, options: Options, contents: str) -> None:
        out = options.out
        file = out / "results.jsonl"
        if not file.exists() and out.exists() and {path.name for path in out.iterdir()} - {"options.json", "places"}:
            raise InputError(f"--out {out} is not empty and holds no ablation; give another name")
        wanted = plain(options) | {"contents_of_features": contents}
        make_folder(out / "places")
        self._out = out
        self._file = os.open(file, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            self.rows = self._open(file, wanted)
        except BaseException:
            os.close(self._file)
            raise

    def _open(self, file: Path, wanted: dict[str, Any]) -> dict[str, dict[str, Any]]:
        """Lock the folder, read what is done, write the options."""
        from aggregate.ablation.grid import key_of
        from aggregate.training.run import refuse_other_options

        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunError(f"another process works in {self._out}; wait for it or give another --out") from None
        content = file.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]  # the end of a line that a kill cut off is no result
        os.truncate(self._file, len(whole))
        if whole:
            refuse_other_options(self._out, wanted, Options, free=_FREE_ON_RESUME)
        replace_file(self._out / "options.json", json.dumps(wanted, indent=1) + "\n")
        lines = [json.loads(line) for line in whole.splitlines()]
        today = plain(train.Options(agg="tsn"))
        return {key_of(completed(json.loads(line["key"]), today, train.Options)): line["row"] for line in lines}

    def add(self, result: "Result") -> None:
        """Keep a result: on disk when this returns."""
        import numpy as np

        if result.places is not None:
            content = io.BytesIO()
            np.save(content, result.places)
            replace_file(self._places_file(result.key), content.getvalue())
        line = json.dumps({"key": result.key, "row": result.row}) + "\n"
        append(self._file, self._out / "results.jsonl", line.encode())
        self.rows[result.key] = result.row

    def places(self, key: str) -> "np.ndarray | None":
        """`Result.places`."""
        import numpy as np

        file = self._places_file(key)
        return np.load(file) if file.exists() else None

    def _places_file(self, key: str) -> Path:
        return self._out / "places" / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.npy"

    def __enter__(self) -> "Records":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)


def _write_table(out: Path, chosen: Plan, records: Records) -> list[dict[str, Any]]:
    """ablation.csv of what is done, in the order of the plan; its rows."""
    rows = [records.rows[one.key] for one in chosen.configurations if one.key in records.rows]
    replace_file(out / "ablation.csv", csv_of(rows))
    return rows


# -- the work ----------------------------------------------------------------------------------------------------------


def _trained(
    options: Options, chosen: Plan, store: "FeatureStore", *, done: Collection[str]
) -> "Iterator[list[Result]]":
    """Results of the configurations that are not done, a pass at a time: in this process, or by Ray workers."""
    if _spread(options):
        yield from _by_ray(options, chosen, store, list(done))
        return
    from tqdm import tqdm

    from aggregate.ablation.grid import GridTrainer
    from aggregate.training.splits import choose_rows

    passes = chosen.passes(at_once=options.at_once, done=done)
    if not passes:
        return
    init = None if options.init is None else str(options.init)
    trainer = GridTrainer(options.features, device=options.device, placement=options.placement, init=init)
    for number, share in enumerate(passes, 1):
        first = share[0]
        videos = len(choose_rows(store, first.options, first.options.seed)[0])
        total = first.recipe.epochs * -(-videos // first.recipe.batch_size)
        with tqdm(
            total=total, unit="step", file=sys.stderr, desc=f"pass {number}/{len(passes)}, {len(share)} models"
        ) as bar:
            yield trainer.run(share, bar.update)


def _spread(options: Options) -> bool:
    return options.address is not None or (options.workers or 1) > 1


def _by_ray(options: Options, chosen: Plan, store: "FeatureStore", done: list[str]) -> "Iterator[list[Result]]":
    """Each pass in as many shares as there are workers; a share whose worker is lost is trained again by another."""
    import ray

    from aggregate.ablation.grid import contents_of, run_elsewhere
    from extract.workers.actor_pool import connect

    started = connect(options.address)
    waiting: list[ray.ObjectRef] = []
    try:
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        resources = ray.cluster_resources()
        gpus = int(resources.get("GPU", 0)) if options.device.startswith(("auto", "cuda")) else 0
        workers = options.workers or gpus or len(nodes)
        largest = max(int(node.get("CPU", 0)) for node in nodes)
        cores = max(1, min(largest, int(resources.get("CPU", 1)) // workers))
        parts = chosen.passes(at_once=options.at_once, done=done, shares=workers)
        print(f"workers   {workers} of {cores} cores{' and a GPU' if gpus else ''}: {len(parts)} shares")
        task = ray.remote(run_elsewhere).options(num_cpus=cores, num_gpus=1 if gpus else 0, max_retries=3)
        where = (
            os.path.abspath(options.features),
            contents_of(store),
            options.device,
            options.placement,
            None if options.init is None else os.path.abspath(options.init),
            cores,
        )
        waiting += [task.remote(part, *where) for part in parts]
        while waiting:
            ready, waiting = ray.wait(waiting)
            try:
                yield ray.get(ready[0])
            except ray.exceptions.RayTaskError as error:
                raise error.cause if isinstance(error.cause, Exception) else error from None
            except ray.exceptions.RayError as error:
                raise RunError(f"a share was lost four times; the last time: {str(error).splitlines()[0]}") from None
    finally:
        for call in waiting:
            ray.cancel(call)
        if started:
            ray.shutdown()


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m aggregate.ablate"))
