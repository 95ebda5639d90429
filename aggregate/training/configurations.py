"""A model to train: its options, the recipe that follows, and the learner that both make."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from aggregate.training.options import (
    Aggregator,
    CachedOptions,
    HeadOptions,
    PlaceOptions,
    ScheduleOptions,
    SplitOptions,
    aggregator_options,
    changes_of,
)
from aggregate.training.recipes import Recipe, choose_precision, class_weights, recipe

if TYPE_CHECKING:
    import numpy as np
    import torch

    from aggregate.data.features import StoredFeatures
    from aggregate.models import VideoClassifier
    from aggregate.training.checkpoint import Checkpoint
    from aggregate.training.learner import Learner
    from aggregate.training.sources import CachedFeatures
    from extract.store import FeatureStore


@dataclass(frozen=True)
class TrainOptions(HeadOptions, ScheduleOptions, CachedOptions, SplitOptions, PlaceOptions):
    """Train an aggregator and its classifier on cached features; run again to resume."""

    agg: Aggregator
    """tsn is the average, txb StNet's temporal block (which sees the order of frames), attentive
    V-JEPA's probe."""
    features: str | tuple[str, ...] = "feats.zarr"
    """The feature store of `python -m extract`; several are joined by id, their channels side by
    side."""
    out: Path | None = None
    """The run folder (default: runs/AGG)."""
    init: Path | None = None
    """A checkpoint to start from; classifier rows carry over by class name."""
    recipe: Literal["cached", "paper"] = "cached"
    """cached: what works best on a frozen backbone; paper: iQIYI's schedule."""
    control: bool = False
    """Also train the TSN of --init for as many more epochs, the control the paper lacks."""
    seed: int = 0

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / self.agg


@dataclass(frozen=True)
class Configuration:
    """A model to train: the options of aggregate.train for it, and the recipe that follows."""

    name: str
    options: TrainOptions
    recipe: Recipe
    videos: int  # to train on

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.videos // self.recipe.batch_size)

    @property
    def batch_key(self) -> Hashable:
        """What its batches are a function of: configurations where this is equal can share a
        pass."""
        sampled = self.recipe.balance == "sampler"
        return (
            self.options.seed,
            self.options.frames,
            self.recipe.batch_size,
            self.recipe.epochs,
            sampled,
        )

    def model(self, store: "FeatureStore", init: "Checkpoint | None" = None) -> "VideoClassifier":
        """Untrained, with those options of `init` that give its weights their meaning. InputError
        as `build`."""
        from aggregate.models import build

        own = aggregator_options(self.options.agg, self.options, init.options if init else None)
        own |= {"dropout": self.recipe.dropout, "standardize": self.recipe.standardize}
        return build(self.options.agg, dim=store.dim, num_classes=len(store.classes), **own)

    def learner(
        self,
        store: "FeatureStore",
        device: "torch.device",
        *,
        init: "Checkpoint | None" = None,
        labels: "np.ndarray",
        file: str = "best.pt",
        log: Callable[[str], object] = print,
    ) -> "Learner":
        """The model with its optimizer, started from `init` if there is one; `log`s what that
        carried over.

        `labels` int [N] are those of the videos it is trained on.
        """
        import numpy as np
        import torch

        from aggregate.models import carry_over
        from aggregate.training.learner import Learner

        torch.manual_seed(
            self.options.seed
        )  # a model's start is a function of the seed, not of what is trained next to it
        model = self.model(store, init)
        if init is not None:
            carried = carry_over(
                model, init.state_dict, classes=store.classes, source_classes=init.classes
            )
            log(f"{self.options.agg}: from {self.options.init}: {carried}")
        steps, seed = self.steps_per_epoch, self.options.seed
        counts = np.bincount(labels, minlength=len(store.classes)).tolist()
        return Learner(
            self.name,
            model,
            self.recipe,
            steps_per_epoch=steps,
            seed=seed,
            device=device,
            file=file,
            precision=self.recipe.precision,
            class_weights=class_weights(counts, self.recipe.balance),
        )

    def source(self, training: "StoredFeatures", testing: "StoredFeatures") -> "CachedFeatures":
        """The batches it is trained on, and the videos that validate it."""
        from aggregate.training.sources import CachedFeatures

        recipe, options = self.recipe, self.options
        balanced = recipe.balance == "sampler"
        return CachedFeatures(
            training, testing, options.frames, recipe.batch_size, options.seed, balanced
        )


def configured(name: str, options: TrainOptions, *, videos: int) -> Configuration:
    """The configuration of `options`, with their recipe for `videos` videos to train on."""
    from extract.device import choose_device

    changed = recipe(options.recipe, options.agg, videos=videos, **changes_of(options))
    device = choose_device(options.device)
    precision: Any = choose_precision(changed.precision, device, changed.batch_size)
    changed = replace(changed, precision=precision)
    return Configuration(name, options, changed, videos)
