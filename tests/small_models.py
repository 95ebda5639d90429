"""Checkpoints of small models with weights that mean nothing, in the form in which training saves
them."""

from pathlib import Path
from typing import Any

import torch

from aggregate.endtoend import backbone_record, build_net
from aggregate.models import build
from aggregate.training.checkpoint import Checkpoint
from extract.backbone.model import Trunk, load_trunk

BACKBONE = "test_resnet"  # timm's: four stages, 160 x 160, 96 features
CLASSES = ["barbell", "dumbbell", "kettlebells", "none", "reading", "walking", "drinking"]
# Options under which all aggregators differ.
AGGREGATORS: dict[str, dict[str, Any]] = {
    "tsn": {},
    "max": {},
    "weighted": {},
    "nl": {"scale_init": 0.7},
    "hgnl": {"g1": 4, "g2": 2, "scale_init": 0.7, "norm": "n_over_train"},
    "txb": {},
    "attentive": {"depth": 2, "heads": 4, "frame_time": True},
    "attentive-time": {"heads": 4},
    "gru": {"inner_dim": 8},
    "nextvlad": {"clusters": 4, "groups": 4},
}


def trunk_of(weights: str | Path = "random", seed: int = 3) -> Trunk:
    return load_trunk(BACKBONE, weights=weights, seed=seed)


def cached(folder: Path, name: str = "hgnl", *, trunk: Trunk | None = None, **changes: Any) -> Path:
    """A checkpoint like that of `aggregate.train`: without backbone; `features` names it. Random
    weights by default."""
    trunk = trunk or trunk_of()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options = {"dim": trunk.dim, "num_classes": len(CLASSES), **AGGREGATORS[name], **changes}
        model = _lively(build(name, **options))
    return _save(
        folder, Checkpoint(model.options, CLASSES, model.state_dict(), provenance(trunk), 3)
    )


def tuned(folder: Path, name: str = "hgnl", **changes: Any) -> Path:
    """A checkpoint like that of `aggregate.finetune`, with its backbone in it."""
    trunk = trunk_of()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if name == "stnet":
            plain = {"name": name, "dim": trunk.dim, "num_classes": len(CLASSES), "dropout": 0.5}
            options = {**plain, "frames_per_segment": 2, "form": "released", **changes}
        else:
            options = build(
                name, dim=trunk.dim, num_classes=len(CLASSES), **{**AGGREGATORS[name], **changes}
            ).options
        net = _lively(build_net(options, trunk.module))
    return _save(folder, Checkpoint(options, CLASSES, net.state_dict(), provenance(trunk), 3))


def provenance(trunk: Trunk) -> dict[str, Any]:
    """The provenance that a store of its features would record."""
    return {**backbone_record(trunk), "precision": "fp32"}


def _lively(model: torch.nn.Module) -> torch.nn.Module:
    """Weights far enough from their initial values that every part matters and logits differ."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.startswith("classifier"):
                parameter.normal_(std=0.3)
            elif name.startswith(("aggregator", "after")) and not name.endswith("scale"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for name, value in model.named_buffers():
            if name.startswith("norm.running"):
                value.uniform_(0.5, 1.5)
        aggregator = model.aggregator
        if hasattr(
            aggregator, "key"
        ):  # otherwise all scores may be below 0, and the ReLU leaves no attention
            aggregator.key.load_state_dict(aggregator.query.state_dict())
    return model.eval()


def _save(folder: Path, checkpoint: Checkpoint) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "best.pt"
    checkpoint.save(file)
    return file
