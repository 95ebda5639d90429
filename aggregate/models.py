"""Video classifiers: an aggregator, optional batch norm, dropout, and a linear layer."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aggregate.attentive import AttentiveProbe, AttentiveTimeProbe
from aggregate.hgnl import HGNonLocal
from aggregate.masks import Features, Frames, Mask, batch_norm_any_size
from aggregate.nextvlad import NeXtVLAD
from aggregate.nl import NonLocal
from aggregate.pooling import Average, Max, WeightedAverage
from aggregate.recurrent import GatedRecurrent
from aggregate.stnet import TemporalXception, check_dropout
from extract import InputError, Record

# Each is built from (dim, **options) and has an `out_dim`;
# forward(x [batch, time, dim], mask=None) -> [batch, out_dim].
AGGREGATORS: dict[str, type[nn.Module]] = {
    "tsn": Average,
    "max": Max,
    "weighted": WeightedAverage,
    "nl": NonLocal,
    "hgnl": HGNonLocal,
    "txb": TemporalXception,
    "gru": GatedRecurrent,
    "attentive": AttentiveProbe,
    "attentive-time": AttentiveTimeProbe,
    "nextvlad": NeXtVLAD,
}
# Aggregators with a weight per frame.
ATTENTION_AGGREGATORS = [
    name for name, kind in AGGREGATORS.items() if hasattr(kind, "frame_weights")
]


def sees_order(agg: str, options: Mapping[str, Any]) -> bool:
    """Whether an aggregator with these options sees the order of frames.

    Such an aggregator learns how far apart frames are, so it is tested with as many as in training.
    """
    return getattr(AGGREGATORS.get(agg), "sees_order", False) or bool(options.get("frame_time"))


class Dropout(nn.Dropout):
    """Dropout that is faster on a CPU.

    `bernoulli_` draws 64 random bits for each value. Here 16 bits decide whether one is dropped, so
    p is rounded to a multiple of 2^-16.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.p and x.is_cpu):
            return super().forward(x)
        words = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(1 << 63), None)
        bits = words.view(torch.int16)[: x.numel()].view(x.shape)  # uniform in -2^15 ... 2^15 - 1
        keep = bits >= min(round(self.p * (1 << 16)), (1 << 16) - 1) - (1 << 15)
        return x * keep.to(x.dtype).div_(1 - self.p)


class VideoClassifier(nn.Module):
    """`aggregator` -> `norm` -> dropout -> `classifier`; use `build` to make one.

    `classifier` is a linear layer that starts at N(0, 0.001) with bias 0, as in TSN. With the
    option `standardize`, `norm` is a batch norm without parameters, as before MAE's linear probe:
    then one learning rate suits features of any scale. `build(**model.options)` builds the same
    model again.
    """

    def __init__(
        self, aggregator: nn.Module, *, num_classes: int, dropout: float, options: Record
    ) -> None:
        super().__init__()
        self.aggregator = aggregator
        width: Any = aggregator.out_dim
        self.norm = nn.BatchNorm1d(width, affine=False) if options.get("standardize") else None
        self.dropout = Dropout(dropout)
        self.classifier = nn.Linear(width, num_classes)
        nn.init.normal_(self.classifier.weight, std=0.001)
        nn.init.zeros_(self.classifier.bias)
        self.options = options

    def features(self, x: Frames, mask: Mask = None) -> Float[Tensor, "batch out_dim"]:
        """F_v: one vector per video.

        `x` may have half precision; it is converted to the weights' type. Raises ValueError for
        features that are not [batch, time, dim] of this model's width.
        """
        if x.ndim != 3 or x.shape[2] != self.options["dim"]:
            raise ValueError(
                f"got features {list(x.shape)}; "
                f"this model takes [batch, time, {self.options['dim']}]"
            )
        # Not in half precision, even under autocast: sums of products of un-normalized features
        # leave float16's range, and next to a backbone the aggregator costs nothing.
        with torch.autocast(x.device.type, enabled=False):
            return self.aggregator(x.to(self.classifier.weight.dtype), mask)

    def forward(self, x: Frames, mask: Mask = None) -> Float[Tensor, "batch classes"]:
        return self.classify(self.features(x, mask))

    def classify(self, F_v: Features) -> Float[Tensor, "batch classes"]:
        """Logits of `features`."""
        if self.norm is not None:
            F_v = batch_norm_any_size(self.norm, F_v)
        return self.classifier(self.dropout(F_v))


def build(
    name: str,
    *,
    dim: int,
    num_classes: int,
    dropout: float = 0.5,
    standardize: bool = False,
    **options: Any,
) -> VideoClassifier:
    """Build the classifier `name` of AGGREGATORS over features of width `dim`.

    `options` are the aggregator's own, e.g. `g1=16, g2=8, shared=True, norm="n"` for "hgnl",
    `inner_dim=256` for "nl". Raises InputError for an unknown name or option, naming the known
    ones, and for values that the aggregator refuses.
    """
    if name not in AGGREGATORS:
        raise InputError(f"aggregator {name!r} is not known; known are {', '.join(AGGREGATORS)}")
    if dim < 1 or num_classes < 1:
        raise InputError(f"dim {dim} and num_classes {num_classes} must both be at least 1")
    check_dropout(dropout)
    signature = inspect.signature(AGGREGATORS[name])
    valid = [option for option in signature.parameters if option != "dim"]
    for option in options:
        if option not in valid:
            names = ", ".join([*valid, "dropout", "standardize"])
            raise InputError(f"{name} has no option {option!r}; it has {names}")
    bound = signature.bind(dim, **options)
    bound.apply_defaults()  # defaults are recorded too: they may change after the checkpoint
    recorded = {
        "name": name,
        "num_classes": num_classes,
        "dropout": dropout,
        "standardize": standardize,
        **bound.arguments,
    }
    aggregator = AGGREGATORS[name](**bound.arguments)
    return VideoClassifier(aggregator, num_classes=num_classes, dropout=dropout, options=recorded)


def carry_over(
    model: VideoClassifier,
    state_dict: Mapping[str, Tensor],
    *,
    classes: Sequence[str],
    source_classes: Sequence[str],
) -> str:
    """Start `model` from the weights of another VideoClassifier; returns a description.

    Classifier rows are matched by exact class name: `classes` of `model`, `source_classes` of the
    source. The aggregator's weights are copied only if the source has all of them in the same
    shapes. So an HG-NL that starts from a TSN has TSN's classifier and its own s = 0, and gives
    that TSN's logits.

    The batch norm before the classifier is copied too. If the source has none, `model` loses its
    own; if only the source has one, it is folded into the classifier's weights. Raises InputError
    if the two classifiers take features of different widths, or if a class list does not fit.
    """
    weight, bias = _adopt_norm(model, state_dict)
    target = model.classifier
    for owner, names, length in (
        ("model", classes, target.out_features),
        ("source", source_classes, len(weight)),
    ):
        if len(names) != length:
            raise InputError(
                f"the {owner} has {length} classifier rows but {len(names)} class names"
            )
    if weight.shape[1] != target.in_features:
        raise InputError(
            f"the source classifies {weight.shape[1]} features, this model {target.in_features}"
        )
    source_rows = {name: row for row, name in enumerate(source_classes)}
    fresh = [name for name in classes if name not in source_rows]
    with torch.no_grad():
        for row, name in enumerate(classes):
            if name in source_rows:
                target.weight[row] = weight[source_rows[name]]
                target.bias[row] = bias[source_rows[name]]
    own = model.aggregator.state_dict()
    source = strip_prefix(state_dict, "aggregator.")
    fits = bool(own) and all(
        name in source and source[name].shape == tensor.shape for name, tensor in own.items()
    )
    if fits:
        model.aggregator.load_state_dict({name: source[name] for name in own})
    lines = [
        f"classifier rows: {len(classes) - len(fresh)} carried over by class name, "
        f"{len(fresh)} start fresh"
    ]
    spellings = {name.casefold(): name for name in source_classes}
    for name in fresh:
        if spelling := spellings.get(name.casefold()):
            lines.append(f"  {name!r} starts fresh; the source spells it {spelling!r}")
    return "\n".join([*lines, f"aggregator weights: {'carried over' if fits else 'start fresh'}"])


def _adopt_norm(model: Any, state_dict: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Give `model` the source's batch norm; returns classifier weights and biases that suit it."""
    weight, bias = state_dict["classifier.weight"], state_dict["classifier.bias"]
    source_norm = strip_prefix(state_dict, "norm.")
    norm: Any = getattr(model, "norm", None)  # StNet has none
    if source_norm and norm is None:
        weight = weight / (source_norm["running_var"] + nn.BatchNorm1d(1).eps).sqrt()
        return weight, bias - weight @ source_norm["running_mean"]
    if norm is not None and source_norm and len(source_norm["running_var"]) == norm.num_features:
        norm.load_state_dict(source_norm)
    elif norm is not None:
        model.norm, model.options["standardize"] = None, False
    return weight, bias


def strip_prefix(state_dict: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Entries whose names start with `prefix`, without it."""
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in state_dict.items()
        if name.startswith(prefix)
    }
