"""What the aggregators are worth on real data at hand: the tables of LOG.md, "Aggregators on real features".

    python tests/benchmarks/evidence.py --work runs/evidence [--only recipe daily exercise vowels planted norms]

Features: the shipped clips through the pretrained EfficientNet-Lite0 (`pipelines/clips`), and JapaneseVowels beside the
project (`../shared/features`). Five seeds each; a video counts once a seed; intervals are bootstraps over videos of the
mean over seeds. Every aggregator is trained by the same recipe, on the same batches; the last epoch counts, so nothing
is chosen on the test videos.
"""

import argparse
import itertools
import os
from dataclasses import replace
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import torch

from aggregate.data.features import StoredFeatures, usable
from aggregate.metrics import bootstrap, challenge_errors, paired_bootstrap, ranks
from aggregate.models import build
from aggregate.training.learner import Learner
from aggregate.training.loop import train_epoch
from aggregate.training.recipes import Recipe, recipe
from aggregate.training.sources import attention, logits_of
from extract.store import FeatureStore

ROOT = Path(__file__).parent.parent.parent
SEEDS = range(5)
MODELS: dict[str, dict] = {"tsn": {}, "max": {}, "weighted": {}, "nl": {}, "hgnl": {}}


def fitted(
    store: FeatureStore,
    rows: np.ndarray,
    models: dict[str, dict],
    seed: int,
    *,
    frames: int = 3,
    chosen: Recipe | None = None,
) -> dict[str, torch.nn.Module]:
    """Every model trained on the same batches of videos `rows`."""
    features = StoredFeatures(store, rows, training=True)
    learners = []
    for name, options in models.items():
        torch.manual_seed(seed)
        how = chosen or recipe("cached", name, videos=len(rows))
        agg = options.get("agg", name)
        extra = {key: value for key, value in options.items() if key != "agg"}
        model = build(agg, dim=store.dim, num_classes=len(store.classes), dropout=how.dropout, **extra)
        steps = features.steps(how.batch_size)
        learners.append(Learner(name, model, how, steps, seed, torch.device("cpu")))
    for epoch in range(how.epochs):
        batches = features.train_batches(epoch=epoch, frames=frames, batch_size=how.batch_size, seed=seed)
        train_epoch(learners, batches, epoch)
    return {learner.name: learner.model for learner in learners}


def table(title: str, store: FeatureStore, folds, models: dict[str, dict], *, frames=3, chosen=None) -> None:
    """Train and test over `folds` of (train rows, test rows); print top-1 and average error at few and all segments."""
    segments = sorted({min(3, store.frames_per_video), store.frames_per_video})
    first: dict = {}
    errors: dict = {}
    used = {name: [] for name in models}
    for seed in SEEDS:
        for train, test in folds:
            trained = fitted(store, train, models, seed, frames=frames, chosen=chosen)
            for count in segments:
                held = StoredFeatures(store, test)
                several = logits_of(list(trained.values()), held, segments=count, batch_size=64)
                for name, crops in zip(trained, several, strict=True):
                    scores, labels = crops.mean(1), store.labels[test]
                    first.setdefault((name, count, seed), []).append(ranks(scores, labels) == 0)
                    errors.setdefault((name, count, seed), []).append(challenge_errors(scores, labels))
            seen = StoredFeatures(store, test[usable(store)[test]])
            for name, model in trained.items():
                found = attention(model, seen.test_batches(frames=segments[0], batch_size=64))
                if found:
                    used[name].append(found[1])
    videos = sum(len(test) for _, test in folds)
    print(f"\n### {title}\n\n{videos} test videos, {len(SEEDS)} seeds, {len(folds)} fold(s), {store!r}\n", flush=True)
    print(
        "| model | segments | top-1 % | seeds' spread | average error % | top-1 minus TSN's | \\|s F_o\\| / \\|F\\| |"
    )
    print("|---|---|---|---|---|---|---|")

    def over_seeds(values: dict, name: str, count: int) -> np.ndarray:
        return np.stack([np.concatenate(values[name, count, seed]) for seed in SEEDS]).astype(float)

    for count, name in itertools.product(segments, models):
        right = over_seeds(first, name, count)
        difference = (
            "" if name == "tsn" else f"{paired_bootstrap(right.mean(0), over_seeds(first, 'tsn', count).mean(0))}"
        )
        spread = f"{100 * right.mean(1).min():.1f} to {100 * right.mean(1).max():.1f}"
        ratio = f"{np.mean(used[name]):.3f}" if used[name] else ""
        print(
            f"| {name} | {count} | {bootstrap(right.mean(0))} | {spread} | "
            f"{bootstrap(over_seeds(errors, name, count).mean(0))} | {difference} | {ratio} |",
            flush=True,
        )


def grouped(dim: int) -> dict[str, dict]:
    """The five aggregators with groups that divide `dim`."""
    if dim == 12:
        return MODELS | {"nl": {"inner_dim": 4}, "hgnl": {"inner_dim": 4, "g1": 4, "g2": 2}}
    return MODELS


def subjects(store: FeatureStore) -> list[tuple[np.ndarray, np.ndarray]]:
    good = usable(store)
    return [
        (np.flatnonzero(good & (store.groups != name)), np.flatnonzero(store.groups == name))
        for name in sorted(set(store.groups.tolist()))
    ]


def split(store: FeatureStore) -> list[tuple[np.ndarray, np.ndarray]]:
    test = store.splits != "train"
    return [(np.flatnonzero(~test & usable(store)), np.flatnonzero(test))]


def vowels(work: Path) -> FeatureStore:
    """270 training and 370 test utterances of 9 speakers, 7 to 29 frames of 12 coefficients."""
    path = work / "vowels.zarr"
    if path.exists():
        return FeatureStore.open(path)
    data = np.load(ROOT.parent / "shared" / "features" / "JapaneseVowels.npz")
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

    The class frames come from a clip of `source`, the rest from random clips of `others` (another data set, so that
    they say nothing). Frames go through the backbone one by one, so joining features is joining pictures.
    """
    path = work / f"planted_{carry}.zarr"
    if path.exists():
        return FeatureStore.open(path)
    rng = np.random.default_rng(0)
    good, distract = np.flatnonzero(usable(source)), np.flatnonzero(usable(others))
    pool = others.read(distract)[:, 0].reshape(-1, others.dim)
    rows = np.repeat(good, 4)
    features = np.empty((len(rows), 25, source.dim), "<f2")
    for place, row in enumerate(rows):
        features[place] = pool[rng.choice(len(pool), 25, replace=False)]
        shown = source.gather(np.array([row]), rng.choice(source.frames_per_video, carry, replace=False))[0]
        features[place, rng.choice(25, carry, replace=False)] = shown
    return FeatureStore.from_arrays(
        path,
        features,
        lengths=np.full(len(rows), 25),
        labels=source.labels[rows],
        classes=source.classes,
        splits=source.splits[rows].tolist(),
    )


def choose_recipe(stores: dict[str, tuple[FeatureStore, list]]) -> None:
    """TSN and HG-NL under optimizers and learning rates: top-1 at all segments, mean over seeds and sets."""
    print(
        "\n### The recipe for cached features\n\n| optimizer | lr | weight decay | "
        + " | ".join(f"{name} {agg}" for name in stores for agg in ("tsn", "hgnl"))
        + " |"
    )
    print("|---" * (3 + 2 * len(stores)) + "|")
    models = {"tsn": {}, "hgnl": {}}
    for optimizer, lr, decay in (
        ("sgd", 1e-3, 5e-4), ("sgd", 1e-2, 5e-4), ("sgd", 1e-1, 5e-4),
        ("adamw", 3e-4, 0.01), ("adamw", 1e-3, 0.01), ("adamw", 3e-3, 0.01), ("adamw", 1e-3, 0.3),
    ):  # fmt: skip
        cells = []
        for store, folds in stores.values():
            right: dict[str, list[float]] = {name: [] for name in models}
            for seed, (train, test) in itertools.product(range(2), folds):
                how = replace(
                    recipe("cached", "tsn", videos=len(train)), optimizer=optimizer, lr=lr, weight_decay=decay
                )
                several = fitted(store, train, models, seed, chosen=how)
                held = StoredFeatures(store, test)
                count = store.frames_per_video
                logits = logits_of(list(several.values()), held, segments=count, batch_size=64)
                for name, crops in zip(several, logits, strict=True):
                    right[name].extend((ranks(crops.mean(1), store.labels[test]) == 0).tolist())
            cells += [f"{100 * np.mean(values):.1f}" for values in right.values()]
        print(f"| {optimizer} | {lr:g} | {decay:g} | {' | '.join(cells)} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/evidence"))
    parser.add_argument("--only", nargs="*", default=["recipe", "daily", "exercise", "vowels", "planted", "norms"])
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    daily, exercise = extracted(chosen.work, "daily_actions", 25), extracted(chosen.work, "exercise_mini", 16)
    if "recipe" in chosen.only:
        choose_recipe({"daily": (daily, subjects(daily)), "exercise": (exercise, split(exercise))})
    if "daily" in chosen.only:
        table("daily_actions, leave one subject out", daily, subjects(daily), grouped(daily.dim))
    if "exercise" in chosen.only:
        table("exercise_mini, its split", exercise, split(exercise), grouped(exercise.dim))
    if "vowels" in chosen.only:
        store = vowels(chosen.work)
        table("JapaneseVowels, its split", store, split(store), grouped(store.dim))
    if "norms" in chosen.only:
        norms(chosen.work, exercise, daily)
    if "planted" in chosen.only:
        for carry in (3, 8):
            store = planted(chosen.work, exercise, daily, carry=carry)
            table(f"{carry} of 25 frames carry the class, trained on 3", store, split(store), grouped(store.dim))
            table(
                f"{carry} of 25 frames carry the class, trained on 25",
                store,
                split(store),
                grouped(store.dim),
                frames=25,
            )


def norms(work: Path, exercise: FeatureStore, daily: FeatureStore) -> None:
    """HG-NL's map as the paper has it, normalised in two ways, and with softmax: trained on 3 frames."""
    for title, store in (
        ("3 of 25 frames carry the class", planted(work, exercise, daily, carry=3)),
        ("JapaneseVowels", vowels(work)),
    ):
        groups = grouped(store.dim)["hgnl"]
        models: dict[str, dict] = {
            "tsn": {},
            "hgnl": {"agg": "hgnl", **groups},
            "hgnl, norm n": {"agg": "hgnl", "norm": "n", **groups},
            "hgnl, norm n_over_train": {"agg": "hgnl", "norm": "n_over_train", **groups},
            "hgnl, softmax": {"agg": "hgnl", "attention": "softmax", **groups},
        }
        table(f"{title}: HG-NL's map", store, split(store), models)


def extracted(work: Path, name: str, frames: int) -> FeatureStore:
    from extract.__main__ import Options
    from extract.__main__ import main as extract

    clips = ROOT / "pipelines" / "clips" / name
    out = str(work / f"{name}.zarr")
    if extract(
        Options(
            videos=clips / "labels.csv", root=clips / "clips", out=out, frames=frames, backbone="tf_efficientnet_lite0",
            augment_passes=4 if name == "daily_actions" else 3,
        )
    ):  # fmt: skip
        raise SystemExit(f"extraction of {name} failed")
    return FeatureStore.open(out)


if __name__ == "__main__":
    main()
