"""Option groups that commands share, so that a flag means the same everywhere.

tyro makes the flags from the fields and their help from the docstrings. No torch at import time.
"""

import inspect
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, make_dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_type_hints

from aggregate.training.recipes import head_options
from extract import InputError, Record
from extract.commands import flag_of, spaced

if TYPE_CHECKING:
    from extract.store import FeatureStore

Aggregator = Literal[
    "tsn", "max", "weighted", "nl", "hgnl", "txb", "gru", "attentive", "attentive-time", "nextvlad"
]
# Options that change the meaning of the weights: with another value the model is another one.
WEIGHT_SEMANTICS = ("norm", "attention", "normalize")


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """Options that decide which videos are trained on, and which are validated."""

    train_split: str = "train"
    val_split: str = "val"
    val_groups: tuple[str, ...] = ()
    """Validate on these groups (subjects, sources) and train on all others."""
    val_fraction: float = 0.2
    """If no video has the validation split: the fraction to hold out, chosen by the seed, in whole
    groups if the store has groups."""
    allow_missing_classes: bool = False
    """Train although some classes have no example."""


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """Options that apply to some aggregators only."""

    g1: int = 16
    """hgnl: groups of W_q and W_k."""
    g2: int = 8
    """hgnl: groups of W_v, and attention maps."""
    m1: int | None = None
    """hgnl, nl: width of Q and K (default: m/8 for hgnl, m/2 for nl); gru: width of its state
    (256)."""
    shared: bool = False
    """hgnl: one set of weights for all groups."""
    norm: Literal["none", "n", "n_over_train"] | None = None
    """hgnl: divisor of the ReLU map (default of this and the next four: the recipe's)."""
    attention: Literal["relu", "softmax"] | None = None
    """hgnl: how scores become weights; the paper has relu."""
    normalize: bool | None = None
    """hgnl, nl: layer norm of the frames before W_q and W_k."""
    start: Literal["random", "average"] | None = None
    """hgnl, nl: average starts attention as the mean over frames."""
    scale_init: float | None = None
    """hgnl, nl: s before training."""
    scale_scores: bool = False
    """hgnl, nl: divide scores by the square root of their length."""
    depth: int = 1
    """attentive, attentive-time: layers of attention. The query's is the last; the others are
    self-attention of the frames."""
    heads: int | None = None
    """attentive, attentive-time: heads of attention (default: about m/64)."""
    frame_time: bool = False
    """attentive: add each frame's time in the video, so that order is seen."""
    clusters: int = 16
    """nextvlad: cluster centers; 128 in its paper, on 5 million videos."""
    groups: int = 8
    """nextvlad: groups of channels, each with its own attention."""
    expansion: int = 2
    """nextvlad: factor by which the width is expanded first."""
    frames: int = 3
    """Segments per video, in training and in the validation of each epoch."""


HEAD_FLAGS = tuple(field.name for field in fields(HeadOptions) if field.name != "frames")


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """The parts of a recipe that can be changed; None keeps the recipe's own."""

    optimizer: Literal["sgd", "adamw"] | None = None
    """Default: the recipe's, as for all options below."""
    lr: float | None = None
    weight_decay: float | None = None
    epochs: int | None = None
    batch_size: int | None = None
    dropout: float | None = None
    standardize: bool | None = None
    """Batch norm without parameters before the classifier."""
    warmup: float | None = None
    """Epochs of linear warm-up of the learning rate; 0 for none."""
    decay: Literal["cosine", "linear"] | None = None
    """How the learning rate falls to 0."""
    label_smoothing: float | None = None
    """The fraction of each target that is spread over all classes."""


@dataclass(frozen=True, kw_only=True)
class CachedOptions:
    """The parts of training on cached features that can be changed."""

    balance: Literal["none", "sampler", "loss"] = "none"
    """sampler: batches hold all classes equally often; loss: rare classes get more weight, by their
    effective number of videos."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of matrix products in training; auto: bf16 if the device is fast at it and batches
    are large."""


@dataclass(frozen=True, kw_only=True)
class DeviceOptions:
    """Options of the device that computes, and of where it keeps a store's features."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    placement: Literal["auto", "device", "memory", "mmap"] = "auto"
    """Where features are kept while they are read; auto chooses by size."""


@dataclass(frozen=True, kw_only=True)
class VideoOptions:
    """Options of finding and decoding videos."""

    root: Path | None = None
    """With a CSV as --videos: the folder that holds its videos."""
    labels: str = "auto"
    """With --videos: auto, kinetics700, or a file of lines."""
    decode_workers: int | None = None
    """With --videos: decoding processes (default: one per core)."""
    video_timeout: float = 60.0
    """With --videos: seconds after which a video is given up, plus one per 2 MB of its file."""


@dataclass(frozen=True)
class TrainOptions(HeadOptions, ScheduleOptions, CachedOptions, SplitOptions, DeviceOptions):
    """Train an aggregator and its classifier on cached features; run again to resume."""

    agg: Aggregator
    """tsn is the average, txb StNet's temporal block (which sees the order of frames), attentive
    V-JEPA's probe."""
    features: str | tuple[str, ...] = "feats.zarr"
    """The feature store of `python -m extract`; several are joined by id, and their channels
    concatenated."""
    out: Path | None = None
    """The run folder (default: runs/AGG)."""
    init: Path | None = None
    """A checkpoint to start from; classifier rows are matched by class name."""
    recipe: Literal["cached", "paper"] = "cached"
    """cached: works best on a frozen backbone; paper: iQIYI's schedule."""
    control: bool = False
    """Also train the TSN of --init for the same number of epochs, the control the paper lacks."""
    seed: int = 0

    @property
    def folder(self) -> Path:
        return self.out or Path("runs") / self.agg


def as_lists(*groups: type) -> Any:
    """A dataclass with a tuple of values for each option of `groups`.

    An empty tuple means the option's default None.
    """
    columns: list[tuple[str, Any, Any]] = []
    for group in groups:
        hints = get_type_hints(group)
        for field in fields(group):
            kind: Any = hints[field.name]
            if type(None) in get_args(kind):
                kind = get_args(kind)[0]
            default: tuple = () if field.default is None else (field.default,)
            if kind is bool:  # `--shared false true`
                kind = Literal["false", "true"]
                default = tuple(str(value).lower() for value in default)
            columns.append((field.name, tuple[kind, ...], default))  # type: ignore[valid-type]
    doc = "Options that take lists of values; all combinations of the values are trained."
    return make_dataclass(
        "Lists", columns, bases=groups, namespace={"__doc__": doc}, frozen=True, kw_only=True
    )


def to_json(options: Any) -> Record:
    """A command's options as JSON gives them back."""
    return json.loads(json.dumps(asdict(options), default=str))


def changes_of(options: ScheduleOptions) -> dict[str, Any]:
    """The changes that `options` make to a recipe, as keywords of
    `aggregate.training.recipes.recipe`."""
    groups = [group for group in (ScheduleOptions, CachedOptions) if isinstance(options, group)]
    return {field.name: getattr(options, field.name) for group in groups for field in fields(group)}


# -- options of an aggregator ----------------------------------------------------------------------


@cache
def own_flags(aggregator: str) -> tuple[str, ...]:
    """The flags of `HeadOptions` that are arguments of this aggregator."""
    from aggregate.models import AGGREGATORS

    arguments = inspect.signature(AGGREGATORS[aggregator]).parameters
    return tuple(flag for flag in HEAD_FLAGS if _argument(flag) in arguments)


def unused_flags(aggregator: str) -> list[str]:
    """The flags of `HeadOptions` that do not apply to this aggregator."""
    return [flag for flag in HEAD_FLAGS if flag not in own_flags(aggregator)]


def _argument(flag: str) -> str:
    return "inner_dim" if flag == "m1" else flag


def aggregator_options(
    name: str, options: HeadOptions, init: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The flags that the aggregator `name` has, as keywords of `aggregate.models.build`.

    An option that is not given comes from the recipe. If training starts from a model of the same
    kind, WEIGHT_SEMANTICS come from that model, whose options are `init`. InputError for a flag
    that this aggregator does not have.
    """
    for flag in unused_flags(name):
        value = getattr(options, flag)
        if value != getattr(HeadOptions, flag):
            raise InputError(f"{flag_of(flag)} {value} does not apply to --agg {name}")
    inherited = init if init is not None and init["name"] == name else {}
    chosen: dict[str, Any] = {}
    for flag in own_flags(name):
        value = getattr(options, flag)
        if value is None and flag in WEIGHT_SEMANTICS:
            value = inherited.get(flag)
        if value is not None:
            chosen[_argument(flag)] = value
    # End-to-end training has no option `recipe`: it always follows the paper's.
    chosen = head_options(getattr(options, "recipe", "paper"), name, chosen)
    if name == "hgnl":
        chosen["train_frames"] = options.frames
    return chosen


# -- options that depend on a store ----------------------------------------------------------------


def limit_frames(options: Any, store: "FeatureStore") -> Any:
    """`options` with at most as many --frames as are stored, if --frames is the default.

    A number that the user gave is not changed.
    """
    default, stored = HeadOptions.frames, store.frames_per_video
    if stored >= default or options.frames not in (default, (default,)):
        return options
    print(
        f"frames    {store.path} holds {stored} per video, so models train with {stored} instead "
        f"of {default}"
    )
    return replace(options, frames=stored if options.frames == default else (stored,))


def clip_segments(requested: Sequence[int], store: "FeatureStore") -> list[int]:
    """The distinct requested numbers of segments, each at most the number of stored frames."""
    stored = store.frames_per_video
    if min(requested, default=0) < 1:
        raise InputError(f"--segments {spaced(requested)}: each must be at least 1")
    if max(requested) > stored:
        print(
            f"{store.path} holds {stored} frames per video, so {max(requested)} segments become "
            f"{stored}"
        )
    return sorted({min(segments, stored) for segments in requested})
