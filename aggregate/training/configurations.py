"""Configurations: the options of a model to train, its recipe, and the learner they describe."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from aggregate.models import VideoClassifier, build, carry_over
from aggregate.training.checkpoint import Checkpoint
from aggregate.training.learner import Learner
from aggregate.training.options import TrainOptions, aggregator_options, changes_of
from aggregate.training.recipes import Recipe, choose_precision, class_weights, recipe
from extract.device import choose_device
from extract.store import FeatureStore


@dataclass(frozen=True)
class Configuration:
    """A model to train: its options of aggregate.train, and the recipe that follows from them."""

    name: str
    options: TrainOptions
    recipe: Recipe
    videos: int  # number of videos to train on

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.videos // self.recipe.batch_size)

    @property
    def steps(self) -> int:
        return self.recipe.epochs * self.steps_per_epoch

    @property
    def batch_key(self) -> Hashable:
        """Everything that decides the batches: configurations with equal keys can share a pass."""
        return (
            self.options.seed,
            self.options.frames,
            self.recipe.batch_size,
            self.recipe.epochs,
            self.recipe.balance == "sampler",
        )

    def with_seed(self, seed: int, *, videos: int) -> "Configuration":
        """The same configuration with another seed and number of videos to train on."""
        return configured(self.name, replace(self.options, seed=seed), videos=videos)

    def model(self, store: FeatureStore, init: Checkpoint | None = None) -> VideoClassifier:
        """The untrained model. Options on which the meaning of `init`'s weights depends come from
        `init`. Raises InputError as `build` does."""
        own = aggregator_options(self.options.agg, self.options, init.options if init else None)
        own |= {"dropout": self.recipe.dropout, "standardize": self.recipe.standardize}
        return build(self.options.agg, dim=store.dim, num_classes=len(store.classes), **own)

    def learner(
        self,
        store: FeatureStore,
        device: torch.device,
        *,
        init: Checkpoint | None = None,
        labels: np.ndarray,
        file: str = "best.pt",
        log: Callable[[str], object] = print,
    ) -> Learner:
        """The model with its optimizer, started from `init` if that is given.

        Args:
            labels: int [N], of the videos that the model is trained on.
            file: name of the file for the model's best state, in the folder of the run.
            log: called with a text about the weights that were carried over from `init`.
        """
        # Initial weights depend on the seed only, not on the other models that are trained.
        torch.manual_seed(self.options.seed)
        model = self.model(store, init)
        if init is not None:
            carried = carry_over(
                model, init.state_dict, classes=store.classes, source_classes=init.classes
            )
            log(f"{self.options.agg}: from {self.options.init}: {carried}")
        counts = np.bincount(labels, minlength=len(store.classes)).tolist()
        return Learner(
            self.name,
            model,
            self.recipe,
            steps_per_epoch=self.steps_per_epoch,
            seed=self.options.seed,
            device=device,
            file=file,
            precision=self.recipe.precision,
            class_weights=class_weights(counts, self.recipe.balance),
        )


def configured(name: str, options: TrainOptions, *, videos: int) -> Configuration:
    """The configuration of `options`, with their recipe for `videos` videos to train on."""
    chosen = recipe(options.recipe, options.agg, videos=videos, **changes_of(options))
    device = choose_device(options.device)
    precision: Any = choose_precision(chosen.precision, device, chosen.batch_size)
    return Configuration(name, options, replace(chosen, precision=precision), videos)
