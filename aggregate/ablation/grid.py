"""Several configurations trained in one pass: each batch is gathered once and feeds all models.

    batch -> model 1, model 2, ... model k        same videos, seed, frames, batch size and epochs

A configuration gives the same model as `aggregate.train` with its options, bit for bit, on one
machine and with one number of threads: start, batches, dropout and best epoch are the same.
"""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from aggregate.ablation.compare import ATTENTION
from aggregate.ablation.probes import video_vectors
from aggregate.data.features import Placement, StoredFeatures, training_views
from aggregate.data.joined import open_features
from aggregate.inference import check_finite
from aggregate.madds import count_aggregator, count_parameters, madds_by_formula
from aggregate.metrics import ranks, summarize_ranks
from aggregate.training.checkpoint import Checkpoint
from aggregate.training.configurations import Configuration
from aggregate.training.learner import Learner
from aggregate.training.loop import fit
from aggregate.training.options import HEAD_FLAGS, own_flags
from aggregate.training.sources import CachedFeatures
from aggregate.training.splits import choose_rows
from extract import Record
from extract.device import choose_device
from extract.store import FeatureStore


class Result(NamedTuple):
    """A finished configuration.

    `label_ranks` int32 [3, N] has three rows: each validation video's row of the store, the rank of
    its true label with the segments of training, and that rank with all segments. It is None for a
    model that diverged.
    """

    row: Record
    label_ranks: np.ndarray | None


class GridTrainer:
    """Trains configurations that share a pass, and keeps features in memory for the next pass."""

    def __init__(
        self,
        store: FeatureStore,
        *,
        device: str,
        placement: Placement = "auto",
        init: Checkpoint | None = None,
    ) -> None:
        self.store, self.init = store, init
        self.device, self.placement = choose_device(device), placement
        self._loaded: dict[bool, StoredFeatures] = {}  # by `training`
        self._vectors: dict[tuple[int, str], np.ndarray] = {}

    def _features(self, rows: np.ndarray, *, training: bool) -> StoredFeatures:
        """The features of `rows`, from those already loaded if these include all of them."""
        loaded = self._loaded.get(training)
        if loaded is None or not np.isin(rows, loaded.rows).all():
            loaded = self._loaded[training] = StoredFeatures(
                self.store, rows, device=self.device, placement=self.placement, training=training
            )
        return loaded.subset(rows)

    def preload(self, rows: np.ndarray) -> None:
        """Load all of `rows` for training and testing; only once if both use the same views."""
        testing = self._features(rows, training=False)
        if np.array_equal(training_views(self.store), testing.views):
            self._loaded[True] = testing
        self._features(rows, training=True)

    def vectors(self, rows: np.ndarray, segments: int, vector: str) -> np.ndarray:
        """The vector of each video of `rows` (`probes.video_vectors`), which `preload` has loaded.

        RunError if one is not finite, although its video did not fail.
        """
        loaded = self._loaded[False]
        if (segments, vector) not in self._vectors:
            vectors = video_vectors(loaded, segments, vector)
            finite = np.isfinite(vectors).all(axis=1)
            check_finite(self.store, loaded.rows[loaded.usable & ~finite])
            self._vectors[segments, vector] = vectors
        return self._vectors[segments, vector][np.searchsorted(loaded.rows, rows)]

    def make_learners(
        self, group: Sequence[Configuration], rows: np.ndarray, val_rows: np.ndarray
    ) -> tuple[list[Learner], CachedFeatures]:
        """Learners of `group` and their source: `rows` to train, `val_rows` to validate."""
        training = self._features(rows, training=True)
        testing = self._features(val_rows, training=False)
        learners = [
            configuration.learner(
                self.store, self.device, init=self.init, labels=training.labels, log=_discard
            )
            for configuration in group
        ]
        return learners, CachedFeatures(training, testing, group[0].options.frames)

    def run(
        self, group: Sequence[Configuration], on_step: Callable[[], object] = lambda: None
    ) -> list[Result]:
        """Train `group` in one pass; test each at its best epoch, with the segments of training and
        with all."""
        started = time.perf_counter()
        chosen = choose_rows(self.store, group[0].options, group[0].options.seed)
        learners, source = self.make_learners(group, chosen.train, chosen.validate)
        for _ in fit(learners, source, on_step=on_step, strict=False):
            pass
        alive = [learner for learner in learners if not learner.diverged]
        for learner in alive:
            learner.load_best()
        models = [learner.model for learner in alive]
        label_ranks: dict[Learner, list[np.ndarray]] = {learner: [] for learner in alive}
        for segments in (source.frames, self.store.frames_per_video) if alive else ():
            tested = source.validate(models, segments, alive[0])
            for learner, logits in zip(alive, tested, strict=True):
                label_ranks[learner].append(ranks(logits, source.labels))
        measured = {learner: _measured(learner, label_ranks[learner], source) for learner in alive}
        seconds = time.perf_counter() - started
        step_seconds = max(sum(learner.seconds for learner in learners), 1e-9)
        results = []
        for configuration, learner in zip(group, learners, strict=True):
            row = describe(configuration, self.store) | {"status": learner.diverged or "done"}
            row |= measured.get(learner, {})
            # The time of the pass is divided among models in proportion to their steps.
            row["seconds"] = round(seconds * learner.seconds / step_seconds, 3)
            row |= {"pass_seconds": round(seconds, 3), "pass_models": len(group)}
            array = None
            if learner in label_ranks:
                array = np.stack([chosen.validate, *label_ranks[learner]]).astype(np.int32)
            results.append(Result(row, array))
        return results


def open_trainer(
    features: str | Sequence[str],
    *,
    device: str,
    placement: Placement,
    processes: int,
    init: Path | None = None,
    rows: np.ndarray | None = None,
) -> GridTrainer:
    """The trainer of one of `processes`, with `rows` loaded, if given.

    Several processes map the store, so that the page cache holds it once.
    """
    log: Callable[[str], object] = print
    if processes > 1:
        log = _discard
        placement = "mmap" if placement == "auto" else placement
    trainer = GridTrainer(
        open_features(features, log=log),
        device=device,
        placement=placement,
        init=None if init is None else Checkpoint.load(init),
    )
    if rows is not None:
        trainer.preload(rows)
    return trainer


def _discard(text: str) -> None:
    pass


def training_cost(configurations: Sequence[Any], store: FeatureStore) -> int:
    """Parameters times epochs: the time of training in small batches is proportional to it. Probes
    are fast and count as 0."""
    with torch.device("meta"):
        return sum(
            configuration.recipe.epochs * count_parameters(configuration.model(store))
            for configuration in configurations
            if isinstance(configuration, Configuration)
        )


def _measured(learner: Learner, label_ranks: list[np.ndarray], source: CachedFeatures) -> Record:
    """The measured columns of a learner at its best epoch. `label_ranks` are the ranks of the true
    labels with the segments of training, and with all."""
    row: Record = {"best_epoch": learner.best_epoch}
    classes = len(source.testing.store.classes)
    for suffix, values in zip(("at_frames", "at_all"), label_ranks, strict=True):
        summary = summarize_ranks(values, source.labels, classes, source.groups)
        for name in ("top1", "top5", "average_error"):
            row |= getattr(summary, name).columns(f"{name}_{suffix}")
    return row | dict.fromkeys(ATTENTION) | source.attention(learner)


def describe(configuration: Configuration, store: FeatureStore) -> Record:
    """The columns of a configuration: the options that it was trained with, its size and its cost.

    Options that the aggregator does not have are None.

    Columns:
        parameters: all trained ones; aggregator_parameters are those before the classifier.
        madds: multiplications and additions of the aggregator for one video with all stored
            segments, counted while it runs.
        madds_table2: the same by the paper's formulas, for NL and HG-NL.
    """
    with torch.device("meta"):
        model = configuration.model(store)
    options, aggregator = configuration.options, model.aggregator
    own = own_flags(options.agg)
    flags = {flag: model.options.get(flag) if flag in own else None for flag in HEAD_FLAGS}
    frames, table_2 = store.frames_per_video, None
    if options.agg in ("nl", "hgnl"):
        flags["m1"] = options.m1 or store.dim // 8
        if options.agg == "nl":
            flags["m1"] = len(aggregator.key.weight)  # type: ignore
        table_2 = sum(madds_by_formula(aggregator, frames=frames))  # type: ignore[arg-type]
    schedule = ("optimizer", "lr", "weight_decay", "epochs", "batch_size", "dropout", "standardize")
    return {
        "name": configuration.name,
        "seed": options.seed,
        "agg": options.agg,
        **flags,
        "frames": options.frames,
        "all_frames": frames,
        **{name: getattr(configuration.recipe, name) for name in schedule},
        "parameters": count_parameters(model),
        "aggregator_parameters": count_parameters(aggregator),
        "madds": count_aggregator(aggregator, dim=store.dim, frames=frames).total,
        "madds_table2": table_2,
    }
