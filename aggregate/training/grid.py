"""Several configurations trained in one pass over the features: each batch is gathered once and feeds all models.

    batch -> model 1, model 2, ... model k        the same seed, frames, batch size and epochs

A configuration is an `Options` of `aggregate.train` and gives what that command gives for it, bit for bit (on one
machine, with one number of threads): the same start, batches, dropout and choice of the best epoch.
"""

import functools
import hashlib
import json
import math
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from aggregate import train
from aggregate.complexity import Column, madds_by_formula
from aggregate.data.features import Placement, StoredFeatures, find_non_finite
from aggregate.evaluate import DamagedModelError, choose_device, held_for_test, logits_of
from aggregate.literal import count
from aggregate.metrics import challenge_error, ranks, summarise_places
from aggregate.models import VideoClassifier, build
from aggregate.training.checkpoint import Checkpoint
from aggregate.training.learner import DivergedError, Learner, train_epoch
from aggregate.training.recipes import Recipe
from extract.cli import InputError, RunError
from extract.store import FeatureStore


@dataclass(frozen=True)
class Configuration:
    """One model to train: what `aggregate.train` would be told, and the recipe that follows from it."""

    name: str  # its options that differ from the others', without the seed
    options: train.Options
    recipe: Recipe

    @property
    def key(self) -> str:
        """Equal where results are: all options but those of place and speed, as JSON."""
        plain = train.plain(self.options)
        return json.dumps({k: v for k, v in plain.items() if k not in ("out", "device", "placement")}, sort_keys=True)

    @property
    def sees(self) -> tuple[int, int, int, int]:
        """What its batches are a function of: configurations where this is equal can share a pass."""
        return self.options.seed, self.options.frames, self.recipe.batch_size, self.recipe.epochs

    def build(self, store: FeatureStore) -> VideoClassifier:
        """The model without memory behind its weights. InputError as `aggregate.models.build`."""
        options = train.aggregator_options(self.options)
        classes, dropout = len(store.classes), self.recipe.dropout
        with torch.device("meta"):
            return build(self.options.agg, dim=store.dim, num_classes=classes, dropout=dropout, **options)


@dataclass(frozen=True)
class Result:
    """A finished configuration. `places` int32 [3, N]: of each validation video its row of the store and the rank of
    its true label with the segments of training and with all; None for a model that diverged."""

    key: str
    row: dict[str, Any]
    places: np.ndarray | None


class Trainer:
    """Trains configurations that share a pass. Features it has read once it keeps for the next pass."""

    def __init__(self, features: str, *, device: str, placement: Placement, init: str | None = None) -> None:
        self.store = FeatureStore.open(features)
        self.device, self.placement = choose_device(device), placement
        self.init = None if init is None else Checkpoint.load(init)
        if self.init is not None:
            self.init.check_features(self.store.provenance, self.store.dim, features)
        self._kept: dict[tuple[bool, bytes], StoredFeatures] = {}
        self._said: set[str] = set()

    def run(self, share: Sequence[Configuration], on_step: Callable[[], object] = lambda: None) -> list[Result]:
        """Train `share` in one pass and test each at its best epoch, with the segments of training and with all."""
        started = time.perf_counter()
        entrants, lost = self.fit(share, on_step)
        val_rows, labels = self._validation(share[0])
        alive = [place for place, one in enumerate(share) if one.key not in lost]
        few, every = share[0].options.frames, self.store.frames_per_video
        ranked: dict[int, list[np.ndarray]] = {}
        for place in alive:
            entrants[place].learner.model.load_state_dict(entrants[place].best_state)
        for segments in {few, every} if alive else ():
            scores = self._scores([entrants[place] for place in alive], val_rows, segments)
            ranked[segments] = [ranks(one, labels) for one in scores]
        measured = {}
        for position, place in enumerate(alive):
            at_few, at_all = ranked[few][position], ranked[every][position]
            learner = entrants[place].learner
            attention = train.attention_on(learner, self.store, val_rows, segments=few, device=self.device)
            measured[place] = {
                "best_epoch": entrants[place].best_epoch,
                **_measures("at_frames", at_few, labels, len(self.store.classes)),
                **_measures("at_all", at_all, labels, len(self.store.classes)),
                "s": attention and attention[0],
                "attention_ratio": attention and attention[1],
            }
        wall = time.perf_counter() - started
        stepping = sum(entrant.learner.seconds for entrant in entrants)
        results = []
        for place, (one, entrant) in enumerate(zip(share, entrants, strict=True)):
            row = describe(one, self.store) | {"status": lost.get(one.key, "done")} | measured.get(place, {})
            # A pass is timed as a whole; a model's part of it is as its steps' of all steps.
            row["seconds"] = round(wall * entrant.learner.seconds / max(stepping, 1e-9), 3)
            row |= {"pass_seconds": round(wall, 3), "pass_models": len(share)}
            places = None
            if place in measured:
                position = alive.index(place)
                places = np.stack([val_rows, ranked[few][position], ranked[every][position]]).astype(np.int32)
            results.append(Result(one.key, row, places))
        return results

    def fit(
        self, share: Sequence[Configuration], on_step: Callable[[], object] = lambda: None
    ) -> tuple[list[train.Entrant], dict[str, str]]:
        """One pass: entrants with the states of their best epochs, and by key why those that diverged did."""
        first = share[0]
        train_rows, val_rows, _ = train.choose_rows(self.store, first.options)
        features = self._features(train_rows, training=True)
        entrants = [self._entrant(one, len(features)) for one in share]
        labels = self.store.labels[val_rows]
        lost: dict[str, str] = {}

        def diverged(learner: Learner, error: DivergedError) -> None:
            if name := find_non_finite(self.store, error.rows):
                raise RunError(
                    f"the stored features of {name} are not finite; `python -m extract.verify` checks the store"
                ) from None
            lost[learner.name] = str(error).removeprefix(f"{learner.name}: ")

        running = entrants
        for epoch in range(first.recipe.epochs):
            batches = features.train_batches(
                epoch=epoch, frames=first.options.frames, batch_size=first.recipe.batch_size, seed=first.options.seed
            )
            train_epoch([entrant.learner for entrant in running], batches, epoch, on_step, diverged)
            while running := [entrant for entrant in running if entrant.learner.name not in lost]:
                try:
                    several = self._scores(running, val_rows, first.options.frames)
                except DamagedModelError as error:
                    lost[running[error.place].learner.name] = f"scores are not finite in epoch {epoch}"
                    continue
                for entrant, scores in zip(running, several, strict=True):
                    entrant.judge(challenge_error(scores, labels), epoch)
                break
        return entrants, lost

    def _entrant(self, one: Configuration, videos: int) -> train.Entrant:
        learner = train.make_learner(
            one.options,
            self.store,
            one.recipe,
            one.options.agg,
            train.aggregator_options(one.options),
            videos=videos,
            device=self.device,
            init=self.init,
            say=self._say_once,
        )
        learner.name = one.key
        return train.Entrant(learner, "", {})

    def _say_once(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            print(text)

    def _validation(self, one: Configuration) -> tuple[np.ndarray, np.ndarray]:
        _, rows, _ = train.choose_rows(self.store, one.options)
        return rows, self.store.labels[rows]

    def _scores(self, entrants: Sequence[train.Entrant], rows: np.ndarray, segments: int) -> list[np.ndarray]:
        """Logits of each at its present state, float32 [N, C], the mean over crops."""
        crops = logits_of(
            [entrant.learner.model for entrant in entrants],
            self.store,
            rows,
            segments=segments,
            batch_size=entrants[0].learner.recipe.batch_size,
            device=self.device,
            features=self._features(rows, training=False),
        )
        return [one.mean(axis=1) for one in crops]

    def _features(self, rows: np.ndarray, *, training: bool) -> StoredFeatures:
        key = training, rows.tobytes()
        if key not in self._kept:
            # Of each kind one: seeds that hold out other videos would fill the memory.
            self._kept = {kept: value for kept, value in self._kept.items() if kept[0] != training}
            if training:
                held = StoredFeatures(self.store, rows, device=self.device, placement=self.placement, training=True)
            else:
                held = held_for_test(self.store, rows, device=self.device, placement=self.placement)
            self._kept[key] = held
        return self._kept[key]


@functools.lru_cache(maxsize=1)
def _trainer(features: str, contents: str, device: str, placement: Placement, init: str | None) -> Trainer:
    try:
        trainer = Trainer(features, device=device, placement=placement, init=init)
    except InputError as error:
        raise RunError(f"the worker on {socket.gethostname()}: {error}") from None
    if contents_of(trainer.store) != contents:
        raise RunError(f"the worker on {socket.gethostname()} sees another {features} than this run's")
    return trainer


def run_elsewhere(
    share: Sequence[Configuration],
    features: str,
    contents: str,
    device: str,
    placement: Placement,
    init: str | None,
    threads: int,
) -> list[Result]:
    """`Trainer.run` in a worker process, which keeps its trainer for the next share."""
    torch.set_num_threads(threads)
    return _trainer(features, contents, device, placement, init).run(share)


def contents_of(store: FeatureStore) -> str:
    """A digest of what a store lists and of how it was made (not of every feature): another one is another data set."""
    digest = hashlib.sha256(json.dumps(store.provenance, sort_keys=True, default=str).encode())
    for values in (store.ids, store.splits, store.groups, store.classes):
        digest.update("\0".join(values).encode() + b"\1")
    for numbers in (store.labels, store.status, store.num_frames):
        digest.update(np.ascontiguousarray(numbers).tobytes())
    return digest.hexdigest()[:16]


def describe(one: Configuration, store: FeatureStore) -> dict[str, Any]:
    """The columns that say what a configuration is: its options as they came out, its size and its cost.

    `parameters` are all that are trained, `aggregator_parameters` those before the classifier. `madds` are the
    aggregator's multiplications and additions of one video with all stored segments, counted on what runs;
    `madds_table2` by the paper's formulas, for those that have one. None where an option means nothing.
    """
    model = one.build(store)
    options, aggregator = one.options, model.aggregator
    own = train.AGGREGATOR_FLAGS.get(options.agg, ())
    flags = {flag: getattr(options, flag) if flag in own else None for flag in train.AGGREGATOR_FLAGS["hgnl"]}
    frames, table_2 = store.frames_per_video, None
    if options.agg in ("nl", "hgnl"):
        flags["m1"] = len(aggregator.key.weight) if options.agg == "nl" else options.m1 or store.dim // 8  # type: ignore
        column = Column("", aggregator, flags["m1"], flags["g1"] or 1, flags["g2"] or 1)  # type: ignore
        table_2 = sum(madds_by_formula(column, dim=store.dim, frames=frames))
    counted = count(lambda: aggregator.eval()(torch.empty(1, frames, store.dim, device="meta")))
    recipe = {name: getattr(one.recipe, name) for name in ("optimizer", "lr", "weight_decay", "epochs", "batch_size")}
    return {
        "name": one.name,
        "seed": options.seed,
        "agg": options.agg,
        **flags,
        "frames": options.frames,
        "all_frames": frames,
        **recipe,
        "dropout": one.recipe.dropout,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "aggregator_parameters": sum(parameter.numel() for parameter in aggregator.parameters()),
        "madds": sum(counted.products) + counted.rest,
        "madds_table2": table_2,
    }


def _measures(suffix: str, places: np.ndarray, labels: np.ndarray, classes: int) -> dict[str, float]:
    """Fractions, with their bootstrap intervals over videos, as `aggregate.train` reports them."""
    summary = summarise_places(places, labels, classes)
    measures: dict[str, float] = {}
    for name in ("top1", "top5", "average_error"):
        interval = getattr(summary, name)
        measures |= {f"{name}_{suffix}": interval.value}
        measures |= {f"{name}_{suffix}_low": interval.low, f"{name}_{suffix}_high": interval.high}
    assert all(map(math.isfinite, measures.values()))
    return measures
