"""The backbone that a checkpoint was trained on, found again from its record: never another one, never in silence."""

import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extract.cli import InputError

if TYPE_CHECKING:
    from aggregate.endtoend import Recogniser
    from aggregate.training.checkpoint import Checkpoint
    from extract.backbone.model import Backbone, Trunk


def backbone_from_record(checkpoint: "Checkpoint", weights: Path | None = None, **how: Any) -> "Backbone":
    """The backbone, made fast as `how` says (device, precision, frames: see `load_backbone`).

    `weights`: the file, where the record's is in no package. Raises InputError where the backbone cannot be had, or
    where it is not the recorded one.
    """
    from extract.backbone.model import load_backbone

    backbone = load_backbone(**_source(checkpoint, weights), **how)
    check_backbone(checkpoint, backbone, given=weights)
    return backbone


def model_from_record(checkpoint: "Checkpoint", weights: Path | None = None) -> "Recogniser":
    """The whole model in fp32 on the CPU, in evaluation mode, from a checkpoint of cached features too.

    Raises InputError as `backbone_from_record`.
    """
    from aggregate.endtoend import EndToEnd, Recogniser, build_net
    from extract.backbone.model import load_trunk

    source = _source(checkpoint, weights)
    if checkpoint.backbone is not None:
        net = build_net(checkpoint.options, load_trunk(source["name"], weights="random").module)
        net.load_state_dict(checkpoint.state_dict)
    else:
        trunk = load_trunk(**source)
        check_backbone(checkpoint, trunk, given=weights)
        net = EndToEnd(trunk.module, checkpoint.model())
    return Recogniser(net, preprocessing_of(checkpoint)).eval()


def check_backbone(checkpoint: "Checkpoint", made: "Backbone | Trunk", *, given: Path | None = None) -> None:
    """InputError unless `made` is what the checkpoint was trained on, whatever its file is called now."""
    see = preprocessing_of(checkpoint)
    if made.preprocessing != see:
        raise InputError(
            f"{checkpoint.path} was trained with {see}; the {made.name} of this version of timm takes "
            f"{made.preprocessing}"
        )
    if checkpoint.backbone is not None:
        return  # the checkpoint's own tensors
    name, recorded = checkpoint.features["backbone"], checkpoint.features["weights"]
    key = "sha256" if "sha256" in recorded else "name"
    if name != made.name or made.weights.get(key) != recorded[key]:
        where = f"--weights {given}" if given else f"the weights of {made.name} at hand"
        raise InputError(
            f"{where} are not those {checkpoint.path} was trained on: {_words(made.weights)} in the place of "
            f"{_words(recorded)} of {name}"
        )


def preprocessing_of(checkpoint: "Checkpoint") -> Any:
    """The preprocessing (`extract.decode.transform.Preprocessing`) that a checkpoint records. InputError for none."""
    from extract.decode.transform import Preprocessing

    record = checkpoint.backbone or checkpoint.features
    if not {"weights", "preprocessing"} <= set(record):
        raise InputError(
            f"{checkpoint.path} was trained on features made elsewhere: it records no backbone that could see videos, "
            f"only {record}; give --features to python -m aggregate.evaluate"
        )
    see = record["preprocessing"]
    return Preprocessing(**{**see, "mean": tuple(see["mean"]), "std": tuple(see["std"])})


def _source(checkpoint: "Checkpoint", weights: Path | None) -> dict[str, Any]:
    """Keywords of `load_trunk` and `load_backbone`."""
    if checkpoint.backbone is not None:
        if weights is not None:
            raise InputError(f"--weights {weights}: the fine-tuned {checkpoint.path} holds its own backbone; drop it")
        return {"name": checkpoint.backbone["name"], "weights": checkpoint.path, "seed": 0}
    preprocessing_of(checkpoint)
    name, recorded = checkpoint.features["backbone"], checkpoint.features["weights"]
    seed = re.fullmatch(r"random weights, seed (-?\d+)", recorded["name"])
    if seed and weights is not None:
        raise InputError(f"--weights {weights}: {checkpoint.path} was trained on {recorded['name']}; drop it")
    if seed:
        return {"name": name, "weights": "random", "seed": int(seed[1])}
    file: Path | str = weights or "pretrained"
    if weights is None and "sha256" in recorded:  # not timm's own
        from extract.backbone.model import package_file

        file = package_file(name)
        if Path(file).name != recorded["name"]:
            raise InputError(
                f"{checkpoint.path} was trained on {name} with weights {recorded['name']} "
                f"(SHA-256 {recorded['sha256'][:12]}...); give that file: --weights {recorded['name']}"
            )
    return {"name": name, "weights": file, "seed": 0}


def _words(weights: dict[str, str]) -> str:
    return weights["name"] + (f" (SHA-256 {weights['sha256']})" if "sha256" in weights else "")
