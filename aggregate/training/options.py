"""Groups of options that commands share, so that a flag means the same everywhere (tyro makes the
flags)."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, make_dataclass
from pathlib import Path
from typing import Any, Literal, get_args, get_type_hints

from aggregate.training.recipes import head_options
from extract import InputError

Aggregator = Literal[
    "tsn", "max", "weighted", "nl", "hgnl", "txb", "gru", "attentive", "attentive-time", "nextvlad"
]
# The flags that are an aggregator's own; to all others they mean nothing.
AGGREGATOR_FLAGS: dict[str, tuple[str, ...]] = {
    "hgnl": (
        "g1",
        "g2",
        "m1",
        "shared",
        "norm",
        "attention",
        "normalize",
        "start",
        "scale_init",
        "scale_scores",
    ),
    "nl": ("m1", "normalize", "start", "scale_init", "scale_scores"),
    "gru": ("m1",),
    "attentive": ("depth", "heads", "frame_time"),
    "attentive-time": ("depth", "heads"),
    "nextvlad": ("clusters", "groups", "expansion"),
}
WEIGHT_SEMANTICS = (
    "norm",
    "attention",
    "normalize",
)  # the same weights under another of these are another model
HEAD_FLAGS = tuple(dict.fromkeys(flag for own in AGGREGATOR_FLAGS.values() for flag in own))


def foreign_flags(aggregator: str) -> set[str]:
    """Flags of other aggregators that mean nothing to this one."""
    return set(HEAD_FLAGS) - set(AGGREGATOR_FLAGS.get(aggregator, ()))


@dataclass(frozen=True, kw_only=True)
class SplitOptions:
    """Which videos are trained on, and which validate."""

    train_split: str = "train"
    val_split: str = "val"
    val_groups: tuple[str, ...] = ()
    """Validate on these groups (subjects, sources), train on all others."""
    val_fraction: float = 0.2
    """How much to hold out, by the seed, where there is no validation split; whole groups where
    they are known."""
    allow_missing_classes: bool = False
    """Train although some classes have no example."""


@dataclass(frozen=True, kw_only=True)
class HeadOptions:
    """Options of single aggregators."""

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
    """hgnl: what the ReLU map is divided by (default of this and the four below: the recipe's)."""
    attention: Literal["relu", "softmax"] | None = None
    """hgnl: how scores become weights; the paper's is relu."""
    normalize: bool | None = None
    """hgnl, nl: layer norm of the frames that W_q and W_k see."""
    start: Literal["random", "average"] | None = None
    """hgnl, nl: average starts attention as the mean over frames."""
    scale_init: float | None = None
    """hgnl, nl: s before training."""
    scale_scores: bool = False
    """hgnl, nl: divide scores by the root of their length."""
    depth: int = 1
    """attentive, attentive-time: layers of attention; those before the query's are self-attention
    of the frames."""
    heads: int | None = None
    """attentive, attentive-time: heads of attention (default: about m/64)."""
    frame_time: bool = False
    """attentive: add each frame's time in the video, so that order is seen."""
    clusters: int = 16
    """nextvlad: cluster centers; 128 in its paper, on 5 million videos."""
    groups: int = 8
    """nextvlad: groups of channels, each with an attention of its own."""
    expansion: int = 2
    """nextvlad: what the width is multiplied by first."""
    frames: int = 3
    """Segments of a video, in training and in the validation of each epoch."""


@dataclass(frozen=True, kw_only=True)
class ScheduleOptions:
    """What of a recipe can be changed; None keeps the recipe's own."""

    optimizer: Literal["sgd", "adamw"] | None = None
    """Default: the recipe's, as for all below."""
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
    """What can be changed of training on cached features."""

    balance: Literal["none", "sampler", "loss"] = "none"
    """sampler: batches hold all classes equally often; loss: rare classes weigh more, by their
    effective number."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Of matrix products in training; auto: bf16 if the device is fast at it and batches are
    large."""


@dataclass(frozen=True, kw_only=True)
class PlaceOptions:
    """Where a store's features lie, and what computes."""

    device: str = "auto"
    """auto, cpu, cuda, cuda:1 ..."""
    placement: Literal["auto", "device", "memory", "mmap"] = "auto"
    """Where features lie while they are read; auto chooses by size."""


@dataclass(frozen=True, kw_only=True)
class VideoOptions:
    """Where videos come from, and who decodes them."""

    root: Path | None = None
    """With a CSV as --videos: the folder its videos lie in."""
    labels: str = "auto"
    """With --videos: auto, kinetics700, or a file of lines."""
    decode_workers: int | None = None
    """With --videos: decoding processes (default: the cores there are)."""
    video_timeout: float = 60.0
    """With --videos: seconds after which one is given up, plus one for each 10 s of video."""


def listed(*groups: type) -> Any:
    """A dataclass with a list of values for each option of `groups`; an empty one is the option's
    default None."""
    made: list[tuple[str, Any, Any]] = []
    for group in groups:
        for one in fields(group):
            kind: Any = get_type_hints(group)[one.name]
            kind = get_args(kind)[0] if type(None) in get_args(kind) else kind
            default: tuple = () if one.default is None else (one.default,)
            if kind is bool:  # `--shared false true`
                kind, default = (
                    Literal["false", "true"],
                    tuple(str(value).lower() for value in default),
                )
            made.append((one.name, tuple[kind, ...], default))  # type: ignore[valid-type]
    return make_dataclass("Lists", made, bases=groups, frozen=True, kw_only=True)


def changes_of(options: ScheduleOptions) -> dict[str, Any]:
    """What `options` change of a recipe, as keywords of `aggregate.training.recipes.recipe`."""
    groups = [group for group in (ScheduleOptions, CachedOptions) if isinstance(options, group)]
    return {one.name: getattr(options, one.name) for group in groups for one in fields(group)}


def aggregator_options(
    name: str, options: HeadOptions, init: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """Those of the flags that the aggregator `name` has, as keywords of `aggregate.models.build`.

    Of what is not given, that of the model it starts from (`init`, its options) stays where it is
    of the same kind, for its weights mean nothing otherwise; the rest is the recipe's. InputError
    for a flag given to an aggregator that does not have it.
    """
    foreign = foreign_flags(name)
    for one in fields(HeadOptions):
        value = getattr(options, one.name)
        if one.name in foreign and value != one.default:
            raise InputError(
                f"--{one.name.replace('_', '-')} {value} means nothing to --agg {name}"
            )
    own = AGGREGATOR_FLAGS.get(name, ())
    asked = {"inner_dim" if flag == "m1" else flag: getattr(options, flag) for flag in own}
    recipe: Any = getattr(options, "recipe", "paper")  # end-to-end training has no other
    theirs = (
        {flag: init.get(flag) for flag in WEIGHT_SEMANTICS}
        if init is not None and init["name"] == name
        else {}
    )
    asked = {flag: theirs.get(flag) if value is None else value for flag, value in asked.items()}
    chosen = head_options(
        recipe, name, {flag: value for flag, value in asked.items() if value is not None}
    )
    if name == "hgnl":
        chosen["train_frames"] = options.frames
    return chosen


def plain(options: Any) -> dict[str, Any]:
    """A command's options as JSON keeps them."""
    return json.loads(json.dumps(asdict(options), default=str))
