"""EVIDENCE.md: what aggregators are worth on real data, and the questions that the paper leaves
open.

    make evidence          python tests/benchmarks/evidence.py --work runs/evidence [--sets ...] [--page-only]

Features come from the pretrained EfficientNet-Lite0, for the shipped clips (`pipelines/clips`) and
untrimmed videos joined of them (`pipelines.untrimmed`). JapaneseVowels is used if it is next to the
project (`../shared/features`). Every model is trained with the default recipe on the same batches.
The last epoch counts, so nothing is chosen on the test videos. Results are kept in --work: the same
command continues where it stopped, and the page is written from the results that exist.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from evidence_page import Facts, write_page
from evidence_time import render

from aggregate.ablation.processes import run_side_by_side
from aggregate.data.features import StoredFeatures
from aggregate.inference import attention, logits_of
from aggregate.models import build, carry_over
from aggregate.training.learner import Learner
from aggregate.training.loop import train_epoch
from aggregate.training.recipes import head_options, recipe
from extract.cores import available_cores
from extract.store import FeatureStore

ROOT = Path(__file__).parent.parent.parent
CLIPS = ROOT / "pipelines" / "clips"
BACKBONE = "tf_efficientnet_lite0"

Folds = list[tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class Task:
    """Videos to train and test on, `folds` of rows, and the number of segments in training."""

    name: str
    title: str
    store: FeatureStore
    folds: Folds
    frames: int
    more_seeds: int = 0  # of models of CHEAP seeds: few videos say little with three


@dataclass(frozen=True)
class Model:
    """A head with options that differ from the recipe's. `recipe` is that of its initial weights;
    all models have the cached schedule."""

    name: str
    agg: str
    options: dict = field(default_factory=dict)
    recipe: str = "cached"
    standardize: bool = True
    init: str = ""  # name of the model from whose state it starts
    seeds: int = 3


CHEAP = 3  # seeds
HEADS = [
    *(Model(name, name) for name in ("tsn", "max", "weighted", "hgnl")),
    *(Model(name, name, seeds=2) for name in ("nl", "txb", "gru")),
    *(Model(name, name, seeds=1) for name in ("attentive", "attentive-time", "nextvlad")),
]
ORDER = [Model(name, name) for name in ("tsn", "hgnl", "txb", "gru", "attentive", "attentive-time")]
SOFTMAX = Model("hgnl, softmax", "hgnl", {"attention": "softmax", "norm": "none"})
PAPER = {"recipe": "paper", "standardize": False}
VARIANTS = [
    Model("hgnl as the paper's", "hgnl", **PAPER),
    Model("hgnl, frames not normalized", "hgnl", {"normalize": False}),
    Model("hgnl, random start", "hgnl", {"start": "random"}),
    Model("hgnl, s from 0", "hgnl", {"scale_init": 0.0}),
    Model("hgnl, not standardized", "hgnl", standardize=False),
    Model("hgnl, shared", "hgnl", {"shared": True}),
    *(Model(f"hgnl, g2={g2}", "hgnl", {"g1": 16, "g2": g2}) for g2 in (1, 2, 4, 16)),
    Model("tsn, as many epochs more", "tsn", init="tsn"),
    Model("hgnl from that TSN", "hgnl", init="tsn"),
]
MODELS = list({model.name: model for model in (*HEADS, SOFTMAX, *VARIANTS)}.values())
VARIED = ("untrimmed_3", "untrimmed_16")


# -- training ----------------------------------------------------------------------------------------------------------


def trained(
    task: Task, rows: np.ndarray, models: list[Model], seed: int, started: dict
) -> dict[str, torch.nn.Module]:
    """Train all `models` on the same batches of videos `rows`; `started` are finished models that
    others start from."""
    features, learners = StoredFeatures(task.store, rows, training=True), []
    for model in models:
        how = recipe("cached", model.agg, videos=len(rows), standardize=model.standardize)
        options = head_options(
            model.recipe, model.agg, small(task.store.dim, model.agg) | model.options
        )
        if model.agg == "hgnl":
            options["train_frames"] = task.frames
        torch.manual_seed(seed)
        classes = task.store.classes
        net = build(
            model.agg,
            dim=task.store.dim,
            num_classes=len(classes),
            dropout=how.dropout,
            standardize=how.standardize,
            **options,
        )
        if model.init:
            carry_over(
                net, started[model.init].state_dict(), classes=classes, source_classes=classes
            )
        steps = -(-len(features) // how.batch_size)
        learners.append(Learner(model.name, net, how, steps, seed, torch.device("cpu")))
    how = learners[0].recipe
    for epoch in range(how.epochs):
        batches = features.train_batches(
            epoch=epoch, frames=task.frames, batch_size=how.batch_size, seed=seed
        )
        train_epoch(learners, batches, epoch)
    return {learner.name: learner.model for learner in learners}


def small(dim: int, agg: str) -> dict:
    """Options that divide the 12 channels of the vowels."""
    if dim > 16:
        return {}
    return {
        "nl": {"inner_dim": 4},
        "hgnl": {"inner_dim": 4, "g1": 4, "g2": 2},
        "nextvlad": {"groups": 4},
    }.get(agg, {})


def missing(
    work: Path, task: Task, models: list[Model]
) -> Iterator[tuple[str, tuple[str, ...], int]]:
    """The task, models and seed of each pass over the videos whose results are not in `work`
    yet."""
    seeds = {m.name: m.seeds + task.more_seeds * (m.seeds == CHEAP) for m in models}
    for seed in range(max(seeds.values())):
        names = tuple(
            name
            for name, count in seeds.items()
            if seed < count and not (work / "results" / task.name / f"{name}_{seed}.npz").exists()
        )
        if names:
            yield task.name, names, seed


def run(
    state: tuple[Path, dict[str, Task]], job: tuple[str, tuple[str, ...], int]
) -> tuple[str, float]:
    """Train the models of a job. Scores at few and at all segments go to
    `<task>/<model>_<seed>.npz`."""
    (work, tasks_by_name), (name, model_names, seed) = state, job
    task = tasks_by_name[name]
    segments = sorted({min(3, task.store.frames_per_video), task.store.frames_per_video})
    folder = work / "results" / task.name
    folder.mkdir(parents=True, exist_ok=True)
    models = [model for model in MODELS if model.name in model_names]
    began = time.perf_counter()
    roots = [m for m in MODELS if m.name in {model.init for model in models}]
    parts: dict[str, list] = {model.name: [] for model in models}
    for train, test in task.folds:
        first = {m.name: m for m in (*roots, *models) if not m.init}
        nets = trained(task, train, list(first.values()), seed, {})
        if later := [m for m in models if m.init]:
            nets |= trained(task, train, later, seed, nets)
        features = StoredFeatures(task.store, test)
        scores_at = {
            n: logits_of([nets[m.name] for m in models], features, segments=n, batch_size=64)
            for n in segments
        }
        for number, model in enumerate(models):
            batches = features.test_batches(frames=segments[0], batch_size=64)
            use = attention(nets[model.name], ((views[0].x, views[0].mask) for views in batches))
            scores = [scores_at[n][number].mean(1) for n in segments]
            parts[model.name].append(
                (test, task.store.labels[test], *scores, use.get("changed", np.nan))
            )
    for model_name, folds in parts.items():
        rows, labels, *scores, changed = (list(column) for column in zip(*folds, strict=True))
        joined = {f"at{n}": np.concatenate(part) for n, part in zip(segments, scores, strict=True)}
        np.savez(
            folder / f"{model_name}_{seed}.npz",
            rows=np.concatenate(rows),
            labels=np.concatenate(labels),
            attention=np.mean(changed),
            **joined,
        )
    return f"{task.name}, seed {seed}: {len(models)} models", time.perf_counter() - began


# -- data --------------------------------------------------------------------------------------------------------------


def subjects(store: FeatureStore) -> Folds:
    """Leave one subject out."""
    good, groups = store.usable, sorted(set(store.groups.tolist()))
    return [
        (np.flatnonzero(good & (store.groups != one)), np.flatnonzero(store.groups == one))
        for one in groups
    ]


def split(store: FeatureStore) -> Folds:
    """Train on split train, test on all others."""
    test = store.splits != "train"
    return [(np.flatnonzero(~test & store.usable), np.flatnonzero(test))]


def folds(store: FeatureStore, count: int = 4) -> Folds:
    """Folds of all videos, with the classes divided evenly."""
    from sklearn.model_selection import StratifiedKFold

    cut = StratifiedKFold(count, shuffle=True, random_state=0)
    return list(cut.split(store.labels, store.labels))


def vowels(work: Path) -> FeatureStore | None:
    """270 training and 370 test utterances of 9 speakers, 7 to 29 frames of 12 coefficients; None
    if they are not there."""
    path, source = work / "vowels.zarr", ROOT.parent / "shared" / "features" / "JapaneseVowels.npz"
    if path.exists():
        return FeatureStore.open(path)
    if not source.exists():
        return None
    data = np.load(source)
    lengths = np.concatenate([data["train_len"], data["test_len"]])
    labels = np.concatenate([data["train_y"], data["test_y"]])
    frames = np.concatenate([data["train_x"], data["test_x"]])
    padded = np.zeros((len(lengths), lengths.max(), frames.shape[1]), np.float32)
    for row, (stop, length) in enumerate(zip(np.cumsum(lengths), lengths, strict=True)):
        padded[row, :length] = frames[stop - length : stop]
    classes = sorted(set(labels.tolist()))
    return FeatureStore.from_arrays(
        path,
        padded,
        lengths=lengths,
        labels=[classes.index(label) for label in labels],
        classes=classes,
        splits=["train"] * len(data["train_len"]) + ["test"] * len(data["test_len"]),
    )


def planted(work: Path, source: FeatureStore, others: FeatureStore, *, carry: int) -> FeatureStore:
    """Videos of 25 real frames of which `carry` show their class.

    The frames of the class come from a clip of `source`, the rest from random clips of `others`
    (another data set, so that they say nothing about the class). Frames go through the backbone one
    by one, so joining features is the same as joining pictures.
    """
    path = work / f"planted_{carry}.zarr"
    if path.exists():
        return FeatureStore.open(path)
    rng = np.random.default_rng(0)
    good, distract = np.flatnonzero(source.usable), np.flatnonzero(others.usable)
    pool = others.read(distract)[:, 0].reshape(-1, others.dim)
    rows = np.repeat(good, 4)
    features = np.empty((len(rows), 25, source.dim), "<f2")
    for place, row in enumerate(rows):
        features[place] = pool[rng.choice(len(pool), 25, replace=False)]
        shown = source.gather(
            np.array([row]), rng.choice(source.frames_per_video, carry, replace=False)
        )[0]
        features[place, rng.choice(25, carry, replace=False)] = shown
    return FeatureStore.from_arrays(
        path,
        features,
        lengths=np.full(len(rows), 25),
        labels=source.labels[rows],
        classes=source.classes,
        splits=source.splits[rows].tolist(),
        groups=source.ids[rows].tolist(),
    )


def extracted(work: Path, videos: Path, frames: int, passes: int) -> FeatureStore:
    from extract.__main__ import Options
    from extract.__main__ import main as extract

    out = str(work / f"{videos.name}.zarr")
    if Path(out).exists() and (store := FeatureStore.open(out)).usable.all():
        return store
    table = videos / "labels.csv"
    source = {"videos": table, "root": videos / "clips"} if table.exists() else {"videos": videos}
    options = Options(**source, out=out, frames=frames, backbone=BACKBONE, augment_passes=passes)
    if extract(options):
        raise SystemExit(f"extraction of {videos} failed")
    return FeatureStore.open(out)


def tasks(work: Path) -> Iterator[Task]:
    from pipelines import untrimmed

    if not (work / "untrimmed" / "labels.csv").exists():
        untrimmed.main(untrimmed.Options(work / "untrimmed"))
    joined = extracted(work, work / "untrimmed", 16, 0)
    for frames in (3, 16):
        title = f"untrimmed: 1 s of action in 8 s, trained on {frames}"
        yield Task(f"untrimmed_{frames}", title, joined, split(joined), frames)
    daily, exercise = (
        extracted(work, CLIPS / "daily_actions", 25, 4),
        extracted(work, CLIPS / "exercise_mini", 16, 3),
    )
    for frames in (3, 25):
        store = planted(work, exercise, daily, carry=3)
        title = f"3 of 25 frames carry the class, trained on {frames}"
        yield Task(f"planted3_{frames}", title, store, split(store), frames)
    yield Task("exercise", "exercise_mini, 4 folds", exercise, folds(exercise), 3)
    yield Task("daily", "daily_actions, leave one subject out", daily, subjects(daily), 3, 7)
    if (store := vowels(work)) is not None:
        yield Task("vowels", "JapaneseVowels, trained on 3", store, split(store), 3)
        frames = store.frames_per_video
        yield Task("order_vowels", "JapaneseVowels, trained on all", store, split(store), frames)
    for motion in ("pan", "zoom"):
        render(motion, work / motion)
        store = extracted(work, work / motion, 4, 0)
        yield Task(f"order_{motion}", f"{motion}: there or back", store, split(store), 4)


def opened(work: Path) -> tuple[Path, dict[str, Task]]:
    """The state of a training process: the folder, and its tasks by name."""
    return work, {task.name: task for task in tasks(work)}


def plan(known: list[Task]) -> Iterator[tuple[Task, list[Model]]]:
    """The models to train: the cheap heads, heads that may see order, variants of HG-NL, and the
    other heads."""
    apart = [task for task in known if not task.name.startswith("order_")]
    for task in apart:
        yield task, [*(head for head in HEADS if head.seeds == CHEAP), SOFTMAX]
    for task in known:
        if task not in apart:
            yield task, ORDER
    for task in apart:
        if task.name in VARIED:
            yield task, VARIANTS
    for head in HEADS:
        for task in apart if head.seeds < CHEAP else ():
            yield task, [head]


def scenes(task: Task) -> np.ndarray:
    """The scene of each video: videos of one scene are not independent."""
    if task.name.startswith("order_"):
        return np.array([Path(name).stem for name in task.store.ids], object)
    return task.store.groups


def groups_grid(work: Path) -> None:
    """An ablation of g1 and g2 on exercise_mini; it is resumed, or skipped if it is finished."""
    from aggregate import ablate

    features, groups = str(work / "exercise_mini.zarr"), {"g1": (4, 8, 16), "g2": (1, 2, 4)}
    ablate.main(
        ablate.Options(
            agg=("tsn", "hgnl"), features=features, out=work / "ablation", seeds=(0, 1), **groups
        )
    )


def commits(work: Path, *, add: bool) -> str:
    """The commits at which the results in `work` were measured; with `add`, the current one is
    added."""
    path = work / "commits.txt"
    names = path.read_text().split() if path.exists() else []
    if add:
        git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
        current = subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
        names = list(dict.fromkeys([*names, current]))
        path.write_text("\n".join(names) + "\n")
    return ", ".join(names)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"))
    parser.add_argument(
        "--sets", nargs="*", default=[], help="only these tasks, e.g. untrimmed_3 vowels"
    )
    parser.add_argument(
        "--page-only", action="store_true", help="train nothing, write the page of what there is"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "EVIDENCE.md")
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    known = list(tasks(chosen.work))
    commits(chosen.work, add=not chosen.page_only)
    jobs = [
        job
        for task, models in ([] if chosen.page_only else plan(known))
        if task.name in chosen.sets or not chosen.sets
        for job in missing(chosen.work, task, models)
    ]
    processes = min(available_cores(), len(jobs) or 1)
    import evidence  # this module by a name that another process can import

    results = run_side_by_side(
        evidence.run,
        jobs,
        prepare=partial(evidence.opened, chosen.work),
        processes=processes,
        threads=1,
    )
    for _, (name, seconds) in results:
        print(f"{name} in {seconds:.0f} s", flush=True)
    facts = [
        Facts(t.name, t.title, t.store.frames_per_video, len(t.folds), scenes(t)) for t in known
    ]
    if not chosen.page_only:
        groups_grid(chosen.work)
    write_page(chosen.work / "results", facts, chosen.out, commit=commits(chosen.work, add=False))
    print(json.dumps({"written": str(chosen.out)}))


if __name__ == "__main__":
    main()
