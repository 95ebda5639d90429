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
from aggregate.data.features import Placement
from aggregate.literal import count
from aggregate.metrics import ranks, summarise_places
from aggregate.models import VideoClassifier, build
from aggregate.training.checkpoint import Checkpoint
from aggregate.training.learner import Learner, choose_device
from aggregate.training.loop import fit
from aggregate.training.options import AGGREGATOR_FLAGS, HEAD_FLAGS, aggregator_options, plain
from aggregate.training.recipes import Recipe
from aggregate.training.sources import CachedFeatures
from aggregate.training.splits import choose_rows
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
        return key_of(plain(self.options))

    @property
    def shares_batches(self) -> tuple[int, int, int, int]:
        """What its batches are a function of: configurations where this is equal can share a pass."""
        return self.options.seed, self.options.frames, self.recipe.batch_size, self.recipe.epochs

    def build(self, store: FeatureStore) -> VideoClassifier:
        """The model without memory behind its weights. InputError as `aggregate.models.build`."""
        options = aggregator_options(self.options.agg, self.options)
        classes, dropout = len(store.classes), self.recipe.dropout
        with torch.device("meta"):
            return build(self.options.agg, dim=store.dim, num_classes=classes, dropout=dropout, **options)


def key_of(options: dict[str, Any]) -> str:
    """`Configuration.key` of plain options of `aggregate.train`."""
    kept = {name: value for name, value in options.items() if name not in ("out", "device", "placement")}
    return json.dumps(kept, sort_keys=True)


@dataclass(frozen=True)
class Result:
    """A finished configuration. `places` int32 [3, N]: of each validation video its row of the store and the rank of
    its true label with the segments of training and with all; None for a model that diverged."""

    key: str
    row: dict[str, Any]
    places: np.ndarray | None


class GridTrainer:
    """Trains configurations that share a pass. Features it has read once it keeps for the next pass."""

    def __init__(self, features: str, *, device: str, placement: Placement, init: str | None = None) -> None:
        self.store = FeatureStore.open(features)
        self.device, self.placement = choose_device(device), placement
        self.init = None if init is None else Checkpoint.load(init)
        if self.init is not None:
            self.init.check_features(self.store.provenance, self.store.dim, features)
        self._source: CachedFeatures | None = None
        self._told: set[str] = set()

    def run(self, share: Sequence[Configuration], on_step: Callable[[], object] = lambda: None) -> list[Result]:
        """Train `share` in one pass and test each at its best epoch, with the segments of training and with all."""
        started = time.perf_counter()
        source, learners = self.fit(share, on_step)
        places, measured = self._test(source, learners)
        wall = time.perf_counter() - started
        stepping = sum(learner.seconds for learner in learners)
        results = []
        for one, learner in zip(share, learners, strict=True):
            row = describe(one, self.store) | {"status": learner.lost or "done"} | measured.get(learner, {})
            # A pass is timed as a whole; a model's part of it is as its steps' of all steps.
            row["seconds"] = round(wall * learner.seconds / max(stepping, 1e-9), 3)
            row |= {"pass_seconds": round(wall, 3), "pass_models": len(share)}
            results.append(Result(one.key, row, places.get(learner)))
        return results

    def fit(
        self, share: Sequence[Configuration], on_step: Callable[[], object] = lambda: None
    ) -> tuple[CachedFeatures, list[Learner]]:
        """One pass: the batches it was over, and learners with the states of their best epochs."""
        first = share[0]
        rows, val_rows, _ = choose_rows(self.store, first.options, first.options.seed)
        self._source = CachedFeatures(
            self.store,
            rows,
            val_rows,
            frames=first.options.frames,
            batch_size=first.recipe.batch_size,
            seed=first.options.seed,
            device=self.device,
            placement=self.placement,
            shared=self._source,
        )
        learners = [self._learner(one, len(rows)) for one in share]
        for _ in fit(learners, self._source, on_step=on_step, strict=False):
            pass
        return self._source, learners

    def _test(
        self, source: CachedFeatures, learners: list[Learner]
    ) -> tuple[dict[Learner, np.ndarray], dict[Learner, dict[str, Any]]]:
        """`Result.places` and the measured columns of the learners that did not diverge, at their best epochs."""
        alive = [learner for learner in learners if not learner.lost]
        few, every = source.frames, self.store.frames_per_video
        ranked: dict[int, list[np.ndarray]] = {}
        for learner in alive:
            learner.load_best()
        for segments in {few, every} if alive else ():
            scores = source.validate([learner.model for learner in alive], segments)
            ranked[segments] = [ranks(one, source.labels) for one in scores]
        places: dict[Learner, np.ndarray] = {}
        measured: dict[Learner, dict[str, Any]] = {}
        for learner, at_few, at_all in zip(alive, ranked.get(few, ()), ranked.get(every, ()), strict=True):
            places[learner] = np.stack([source.val_rows, at_few, at_all]).astype(np.int32)
            attention = source.attention(learner.model)
            measured[learner] = {
                "best_epoch": learner.best_epoch,
                **_measures("at_frames", at_few, source.labels, len(self.store.classes)),
                **_measures("at_all", at_all, source.labels, len(self.store.classes)),
                "s": attention.get("scale"),
                "attention_ratio": attention.get("attention_ratio"),
            }
        return places, measured

    def _learner(self, one: Configuration, videos: int) -> Learner:
        learner = train.make_learner(
            one.options,
            self.store,
            one.recipe,
            one.options.agg,
            aggregator_options(one.options.agg, one.options),
            videos=videos,
            device=self.device,
            init=self.init,
            label=one.options.agg,
            tell=self._tell_once,
        )
        learner.name = one.key
        return learner

    def _tell_once(self, text: str) -> None:
        if text not in self._told:
            self._told.add(text)
            print(text)


@functools.lru_cache(maxsize=1)
def _trainer(features: str, contents: str, device: str, placement: Placement, init: str | None) -> GridTrainer:
    try:
        trainer = GridTrainer(features, device=device, placement=placement, init=init)
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
    """`GridTrainer.run` in a worker process, which keeps its trainer for the next share."""
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
    own = AGGREGATOR_FLAGS.get(options.agg, ())
    flags = {flag: getattr(options, flag) if flag in own else None for flag in HEAD_FLAGS}
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
