"""The backbone that a checkpoint was trained on, found again from its record: never another one, never in silence."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extract.cli import InputError

if TYPE_CHECKING:
    from aggregate.endtoend import Recogniser
    from aggregate.training.checkpoint import Checkpoint
    from extract.backbone.model import Backbone, Trunk


@dataclass(frozen=True)
class Source:
    """Arguments of `load_trunk` and `load_backbone`."""

    name: str
    weights: str | Path
    seed: int = 0


def backbone_from_record(
    checkpoint: "Checkpoint",
    weights: Path | None = None,
    *,
    device: str = "auto",
    precision: str = "auto",
    frames: int | None = None,
) -> "Backbone":
    """The backbone, made fast for `frames` a call. `weights`: the file, where the record's is in no package.

    Raises InputError where it cannot be had, or where it is not the recorded one.
    """
    from extract.backbone.model import load_backbone

    source = _source(checkpoint, weights)
    backbone = load_backbone(
        source.name, weights=source.weights, seed=source.seed, device=device, precision=precision, frames=frames
    )
    _check(checkpoint, backbone, given=weights)
    return backbone


def model_from_record(checkpoint: "Checkpoint", weights: Path | None = None) -> "Recogniser":
    """The whole model in fp32 on the CPU, in evaluation mode, from a checkpoint of cached features too.

    Raises InputError as `backbone_from_record`.
    """
    from aggregate.endtoend import EndToEnd, Recogniser, preprocessing_of, rebuild
    from extract.backbone.model import load_trunk

    source = _source(checkpoint, weights)
    if checkpoint.backbone is not None:
        return rebuild(checkpoint)
    trunk = load_trunk(source.name, weights=source.weights, seed=source.seed)
    _check(checkpoint, trunk, given=weights)
    net = EndToEnd(trunk.module, checkpoint.model())
    return Recogniser(net, preprocessing_of(checkpoint.features)).eval()


def _source(checkpoint: "Checkpoint", weights: Path | None) -> Source:
    if checkpoint.backbone is not None:
        if weights is not None:
            raise InputError(f"--weights {weights}: the fine-tuned {checkpoint.path} holds its own backbone; drop it")
        return Source(checkpoint.backbone["name"], checkpoint.path)
    record = checkpoint.features
    if not {"backbone", "weights", "preprocessing"} <= set(record):
        raise InputError(
            f"{checkpoint.path} was trained on features made elsewhere: it records no backbone that could see videos, "
            f"only {record}; give --features to python -m aggregate.evaluate"
        )
    name, recorded = record["backbone"], record["weights"]
    seed = re.fullmatch(r"random weights, seed (-?\d+)", recorded["name"])
    if seed:
        if weights is not None:
            raise InputError(f"--weights {weights}: {checkpoint.path} was trained on {recorded['name']}; drop it")
        return Source(name, "random", int(seed[1]))
    if weights is not None:
        return Source(name, weights)
    if "sha256" not in recorded:  # timm's own
        return Source(name, "pretrained")
    from extract.backbone.model import package_file

    file = package_file(name)
    if Path(file).name != recorded["name"]:
        raise InputError(
            f"{checkpoint.path} was trained on {name} with weights {recorded['name']} "
            f"(SHA-256 {recorded['sha256'][:12]}...); give that file: --weights {recorded['name']}"
        )
    return Source(name, file)


def _check(checkpoint: "Checkpoint", made: "Backbone | Trunk", *, given: Path | None) -> None:
    from aggregate.endtoend import preprocessing_of

    record: dict[str, Any] = checkpoint.backbone or checkpoint.features
    if made.preprocessing != preprocessing_of(record):
        raise InputError(
            f"{checkpoint.path} was trained with {preprocessing_of(record)}; the {made.name} of this version of timm "
            f"takes {made.preprocessing}"
        )
    if checkpoint.backbone is not None:
        return  # the checkpoint's own tensors
    recorded = record["weights"]
    if "sha256" in recorded:
        same = made.weights.get("sha256") == recorded["sha256"]  # whatever the file is called now
    else:
        same = made.weights == recorded
    if not same:
        where = f"--weights {given}" if given else f"the weights of {made.name} at hand"
        raise InputError(
            f"{where} are not those {checkpoint.path} was trained on: "
            f"{_words(made.weights)} in the place of {_words(recorded)}"
        )


def _words(weights: dict[str, str]) -> str:
    return " ".join([weights["name"], *(f"(SHA-256 {digest})" for digest in [weights.get("sha256")] if digest)])
