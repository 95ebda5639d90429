"""Several configurations trained in one pass over the features: each batch is gathered once and
feeds all models.

    batch -> model 1, model 2, ... model k        the same videos, seed, frames, batch size and epochs

A configuration is an `Options` of `aggregate.train` and gives what that command gives for it, bit
for bit (on one machine, with one number of threads): the same start, batches, dropout and choice of
the best epoch.
"""

import functools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from aggregate.ablation.compare import ATTENTION
from aggregate.ablation.probes import video_vectors
from aggregate.data.features import Placement, StoredFeatures, training_views
from aggregate.data.joined import open_features
from aggregate.madds import count_aggregator, madds_by_formula
from aggregate.metrics import ranks, summarize_ranks
from aggregate.training.checkpoint import Checkpoint
from aggregate.training.configurations import Configuration
from aggregate.training.learner import Learner
from aggregate.training.loop import fit
from aggregate.training.options import AGGREGATOR_FLAGS, HEAD_FLAGS
from aggregate.training.sources import CachedFeatures, check_finite
from aggregate.training.splits import choose_rows
from extract.device import choose_device
from extract.store import FeatureStore


@dataclass(frozen=True)
class Result:
    """A finished configuration. `label_ranks` int32 [3, N]: of each validation video its row of the
    store and the rank of its true label with the segments of training and with all; None for a
    model that diverged."""

    row: dict[str, Any]
    label_ranks: np.ndarray | None


class GridTrainer:
    """Trains configurations that share a pass. Features it has read once it keeps for the next
    pass.

    `log` gets what `init` carried over, each text once.
    """

    def __init__(
        self,
        store: FeatureStore,
        *,
        device: str,
        placement: Placement = "auto",
        init: Checkpoint | None = None,
        log: Callable[[str], object] = print,
    ) -> None:
        self.store, self.init = store, init
        self.device, self.placement = choose_device(device), placement
        self._held: dict[bool, StoredFeatures] = {}
        self._log_once = functools.cache(log)
        self._vectors: dict[tuple[int, str], np.ndarray] = {}

    def _features(self, rows: np.ndarray, *, training: bool) -> StoredFeatures:
        """Those of `rows`, from what is held where they are among it."""
        held = self._held.get(training)
        if held is None or not np.isin(rows, held.rows).all():
            held = StoredFeatures(
                self.store, rows, device=self.device, placement=self.placement, training=training
            )
            self._held[training] = held
        return held.subset(rows)

    def hold(self, rows: np.ndarray) -> None:
        """Read all of `rows` once, to train and to test on; where both see the same views, into one
        place."""
        testing = self._features(rows, training=False)
        if np.array_equal(training_views(self.store), testing.views):
            self._held[True] = testing
        self._features(rows, training=True)

    def vectors(self, rows: np.ndarray, segments: int, vector: str) -> np.ndarray:
        """A vector per video of `rows`, which `hold` has read (`probes.video_vectors`). RunError if
        one is not finite, though its video did not fail."""
        held = self._held[False]
        if (segments, vector) not in self._vectors:
            every = video_vectors(held, segments, vector)
            check_finite(self.store, held.rows[held.usable & ~np.isfinite(every).all(axis=1)])
            self._vectors[segments, vector] = every
        return self._vectors[segments, vector][np.searchsorted(held.rows, rows)]

    def log_init(self, configurations: Sequence[Configuration]) -> None:
        """Log what each kind of model takes over from `init`, if other processes train them."""
        for one in {one.options.agg: one for one in configurations}.values():
            one.learner(
                self.store, self.device, init=self.init, log=self._log_once, labels=np.empty(0, int)
            )

    def begin(
        self, share: Sequence[Configuration], rows: np.ndarray, val_rows: np.ndarray
    ) -> tuple[list[Learner], CachedFeatures]:
        """Learners of `share` and the batches that they share: to train on `rows`, and those that
        validate."""
        training, testing = (
            self._features(rows, training=True),
            self._features(val_rows, training=False),
        )
        how: dict[str, Any] = {"init": self.init, "log": self._log_once, "labels": training.labels}
        return [one.learner(self.store, self.device, **how) for one in share], share[0].source(
            training, testing
        )

    def run(
        self, share: Sequence[Configuration], on_step: Callable[[], object] = lambda: None
    ) -> list[Result]:
        """Train `share` in one pass and test each at its best epoch, with the segments of training
        and with all."""
        started = time.perf_counter()
        rows, val_rows, _ = choose_rows(self.store, share[0].options, share[0].options.seed)
        learners, source = self.begin(share, rows, val_rows)
        for _ in fit(learners, source, on_step=on_step, strict=False):
            pass
        alive = [learner for learner in learners if not learner.lost]
        for learner in alive:
            learner.load_best()
        models, segments = (
            [learner.model for learner in alive],
            (source.frames, self.store.frames_per_video),
        )
        tested = [source.validate(models, count) if alive else [] for count in segments]
        ranked = [
            [ranks(scores, source.labels) for scores in two] for two in zip(*tested, strict=True)
        ]
        measured = {
            one: _measured(one, two, source) for one, two in zip(alive, ranked, strict=True)
        }
        places = {
            one: np.stack([val_rows, *two]).astype(np.int32)
            for one, two in zip(alive, ranked, strict=True)
        }
        wall, stepping = time.perf_counter() - started, sum(learner.seconds for learner in learners)
        results = []
        for one, learner in zip(share, learners, strict=True):
            row = (
                describe(one, self.store)
                | {"status": learner.lost or "done"}
                | measured.get(learner, {})
            )
            # A pass is timed as a whole; a model's part of it is as its steps' of all steps.
            row["seconds"] = round(wall * learner.seconds / max(stepping, 1e-9), 3)
            row |= {"pass_seconds": round(wall, 3), "pass_models": len(share)}
            results.append(Result(row, places.get(learner)))
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
    """The trainer of one of `processes`: several of them map the store, and the page cache holds it
    once.

    `rows` are read at once, for all that is trained.
    """
    several = processes > 1
    trainer = GridTrainer(
        open_features(features, log=_discard if several else print),
        device=device,
        placement="mmap" if several and placement == "auto" else placement,
        init=None if init is None else Checkpoint.load(init),
        log=_discard if several else print,
    )
    if rows is not None:
        trainer.hold(rows)
    return trainer


def _discard(text: str) -> None:
    pass


def training_cost(configurations: Sequence[Any], store: FeatureStore) -> int:
    """Proportional to the time that small batches take: parameters times epochs. A probe is
    fast."""
    with torch.device("meta"):
        return sum(
            one.recipe.epochs
            * sum(parameter.numel() for parameter in one.model(store).parameters())
            for one in configurations
            if isinstance(one, Configuration)
        )


def _measured(learner: Learner, ranked: list[np.ndarray], source: CachedFeatures) -> dict[str, Any]:
    """The measured columns of a learner at its best epoch: `ranked` are the places of the true
    labels with few segments and with all."""
    row: dict[str, Any] = {"best_epoch": learner.best_epoch}
    for suffix, places in zip(("at_frames", "at_all"), ranked, strict=True):
        summary = summarize_ranks(
            places, source.labels, len(source.testing.store.classes), source.groups
        )
        for name in ("top1", "top5", "average_error"):
            row |= getattr(summary, name).columns(f"{name}_{suffix}")
    return row | dict.fromkeys(ATTENTION) | source.attention(learner.model)


def describe(one: Configuration, store: FeatureStore) -> dict[str, Any]:
    """The columns that say what a configuration is: its options as they came out, its size and its
    cost.

    `parameters` are all that are trained, `aggregator_parameters` those before the classifier.
    `madds` are the aggregator's multiplications and additions of one video with all stored
    segments, counted on what runs; `madds_table2` by the paper's formulas, for those that have one.
    None where an option means nothing.
    """
    with torch.device("meta"):
        model = one.model(store)
    options, aggregator = one.options, model.aggregator
    own = AGGREGATOR_FLAGS.get(options.agg, ())
    flags = {flag: model.options.get(flag) if flag in own else None for flag in HEAD_FLAGS}
    frames, table_2 = store.frames_per_video, None
    if options.agg in ("nl", "hgnl"):
        flags["m1"] = options.m1 or store.dim // 8
        if options.agg == "nl":
            flags["m1"] = len(aggregator.key.weight)  # type: ignore
        table_2 = sum(madds_by_formula(aggregator, frames=frames))  # type: ignore[arg-type]
    recipe = ("optimizer", "lr", "weight_decay", "epochs", "batch_size", "dropout", "standardize")
    return {
        "name": one.name,
        "seed": options.seed,
        "agg": options.agg,
        **flags,
        "frames": options.frames,
        "all_frames": frames,
        **{name: getattr(one.recipe, name) for name in recipe},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "aggregator_parameters": sum(parameter.numel() for parameter in aggregator.parameters()),
        "madds": count_aggregator(aggregator, dim=store.dim, frames=frames).total,
        "madds_table2": table_2,
    }
