"""Video classifiers on frame features: an aggregator, batch norm if asked for, dropout, a linear
classifier."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from aggregate.attentive import AttentiveProbe, AttentiveTimeProbe
from aggregate.hgnl import HGNonLocal
from aggregate.nextvlad import NeXtVLAD
from aggregate.nl import NonLocal
from aggregate.pooling import Average, Features, Frames, Mask, Max, WeightedAverage
from aggregate.recurrent import GatedRecurrent
from aggregate.stnet import TemporalXception, batch_normed
from extract import InputError

# Each is built from (dim, **options) and says `out_dim`; forward(x [batch, time, dim], mask=None)
# -> [batch, out_dim].
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


def sees_order(agg: str, options: Mapping[str, Any]) -> bool:
    """Whether an aggregator with these options learns how far apart frames are, so that it is
    tested with as many as in training."""
    return getattr(AGGREGATORS.get(agg), "sees_order", False) or bool(options.get("frame_time"))


class Dropout(nn.Dropout):
    """Dropout whose mask a CPU draws in a quarter of the time: from uniform numbers, not by
    `bernoulli_`."""

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and self.p and x.is_cpu):
            return super().forward(x)
        return x * torch.rand(x.shape).ge_(self.p).div_(1 - self.p)


class VideoClassifier(nn.Module):
    """`aggregator` -> `norm` -> dropout -> `classifier`, a Linear that starts at N(0, 0.001) with
    bias 0 as in TSN.

    `norm` is a batch norm without parameters, as before MAE's linear probe, where `standardize` is
    among the options: one learning rate then suits features of any size. `options` rebuild it:
    `build(**model.options)`. Build it with `build`.
    """

    def __init__(
        self, aggregator: nn.Module, *, num_classes: int, dropout: float, options: dict[str, Any]
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
        """F_v: one vector a video. Features may be of half precision; they are computed with in the
        weights' type.

        Raises ValueError for features that are not [batch, time, dim] of this model's width.
        """
        if x.ndim != 3 or x.shape[2] != self.options["dim"]:
            raise ValueError(
                f"got features {list(x.shape)}; this model takes [batch, time, {self.options['dim']}]"
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
            F_v = batch_normed(self.norm, F_v)
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
    """The classifier `name` of AGGREGATORS over features of width `dim`.

    `options` are the aggregator's own, e.g. `g1=16, g2=8, shared=True, norm="n"` for "hgnl",
    `inner_dim=256` for "nl". Raises InputError for an unknown name or option, naming the known
    ones, and for values the aggregator refuses.
    """
    if name not in AGGREGATORS:
        raise InputError(f"aggregator {name!r} is not known; known are {', '.join(AGGREGATORS)}")
    if dim < 1 or num_classes < 1:
        raise InputError(f"dim {dim} and num_classes {num_classes} must both be at least 1")
    if not 0 <= dropout < 1:
        raise InputError(
            f"dropout is {dropout}; it is the fraction of features set to 0, from 0 to below 1"
        )
    signature = inspect.signature(AGGREGATORS[name])
    known = [option for option in signature.parameters if option != "dim"]
    for option in options:
        if option not in known:
            raise InputError(
                f"{name} has no option {option!r}; it has {', '.join([*known, 'dropout', 'standardize'])}"
            )
    arguments = signature.bind(dim, **options)
    arguments.apply_defaults()  # recorded too, so that a checkpoint outlives a change of defaults
    recorded = {
        "name": name,
        "num_classes": num_classes,
        "dropout": dropout,
        "standardize": standardize,
    }
    recorded |= arguments.arguments
    return VideoClassifier(
        AGGREGATORS[name](**arguments.arguments),
        num_classes=num_classes,
        dropout=dropout,
        options=recorded,
    )


def carry_over(
    model: VideoClassifier,
    state_dict: Mapping[str, Tensor],
    *,
    classes: Sequence[str],
    source_classes: Sequence[str],
) -> str:
    """Start `model` (of `classes`) from the weights of another VideoClassifier (of
    `source_classes`); that in words.

    Classifier rows are carried over by exact class name. The aggregator's weights are carried over
    where the source has all of them in the same shapes, else none is: half an attention module is
    no attention module. So an HG-NL that starts from a TSN has TSN's classifier and its own s = 0,
    and gives that TSN's logits. Batch norm before the classifier comes with it; of a source without
    one the model has none either, one that has none takes the source's into its weights. Raises
    InputError where the two classifiers take features of different widths or a class list does not
    fit.
    """
    weight, bias = _adopt_norm(model, state_dict)
    target = model.classifier
    for whose, names, length in (
        ("model", classes, target.out_features),
        ("source", source_classes, len(weight)),
    ):
        if len(names) != length:
            raise InputError(
                f"the {whose} has {length} classifier rows but {len(names)} class names"
            )
    if weight.shape[1] != target.in_features:
        raise InputError(
            f"the source classifies {weight.shape[1]} features, this model {target.in_features}"
        )
    theirs = {name: row for row, name in enumerate(source_classes)}
    rows = [(row, theirs[name]) for row, name in enumerate(classes) if name in theirs]
    own = {f"aggregator.{name}": tensor for name, tensor in model.aggregator.state_dict().items()}
    fits = bool(own) and all(
        name in state_dict and state_dict[name].shape == own[name].shape for name in own
    )
    with torch.no_grad():
        for row, source in rows:
            target.weight[row] = weight[source]
            target.bias[row] = bias[source]
    if fits:
        model.aggregator.load_state_dict(
            {name.removeprefix("aggregator."): state_dict[name] for name in own}
        )
    lines = [
        f"classifier rows: {len(rows)} carried over by class name, {len(classes) - len(rows)} start fresh"
    ]
    folded = {name.casefold(): name for name in source_classes}
    for name in classes:
        if name not in theirs and name.casefold() in folded:
            lines.append(
                f"  {name!r} starts fresh; the source spells it {folded[name.casefold()]!r}"
            )
    return "\n".join([*lines, f"aggregator weights: {'carried over' if fits else 'start fresh'}"])


def _adopt_norm(model: Any, state_dict: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Weight and bias of the source as `model` takes them: over standardized features where both
    have such."""
    weight, bias = state_dict["classifier.weight"], state_dict["classifier.bias"]
    kept = {
        key.removeprefix("norm."): value
        for key, value in state_dict.items()
        if key.startswith("norm.")
    }
    norm: Any = getattr(model, "norm", None)  # StNet has none
    if kept and norm is None:
        weight = weight / (kept["running_var"] + nn.BatchNorm1d(1).eps).sqrt()
        return weight, bias - weight @ kept["running_mean"]
    if norm is not None and kept and len(kept["running_var"]) == norm.num_features:
        norm.load_state_dict(kept)
    elif norm is not None:
        model.norm, model.options["standardize"] = None, False
    return weight, bias
