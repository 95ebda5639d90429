"""Checkpoints: what a trained classifier needs to be built again, and to be used on the right
features only.

A torch file of plain values: format, version, state_dict, options (of `aggregate.models.build`),
classes, features (the provenance of the features it was trained on: backbone, weights,
preprocessing), frames (segments in training), metrics, data (which videos:
aggregate/training/manifest.py); `training` in `last.pt`, to resume. A model trained end to end has
the tensors of its backbone below `backbone.`. Version 1 spelled the backbone's record twice, and
had no `data`.
"""

import hashlib
import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from aggregate.models import VideoClassifier, build, sees_order
from extract import InputError, StrPath
from extract.commands import command_line
from extract.durable import replacing

FORMAT, VERSION = "hgnl-checkpoint", 2
# Of a store's provenance, what a model depends on; decoder, views and versions may differ.
_DEPENDS_ON = ("backbone", "weights", "preprocessing", "clips")


# Options that earlier versions recorded under another spelling.
RENAMED = {"normalise": "normalize", "standardise": "standardize"}


def _rename(options: Any) -> None:
    """Give recorded options the names that they have now."""
    for before, now in RENAMED.items():
        if isinstance(options, dict) and before in options:
            options[now] = options.pop(before)


@dataclass(frozen=True)
class Checkpoint:
    """A trained model as plain values; `model()` builds it."""

    options: dict[str, Any]
    classes: list[str]
    state_dict: dict[str, Tensor] = field(repr=False)
    features: dict[str, Any]
    frames: int
    metrics: dict[str, float] = field(default_factory=dict)
    data: dict[str, Any] | None = field(default=None, repr=False)
    training: dict[str, Any] | None = field(default=None, repr=False)
    path: str = ""  # where it was read from; not saved

    def usual_segments(
        self, usual: tuple[int, ...], log: Callable[[str], object] = print
    ) -> tuple[int, ...]:
        """How many frames of a video to test with: `usual`, or what a head that sees their order
        was trained with.

        Such a head has learned how far apart frames are: trained on 3 and tested on 16, TXB loses
        16 points of top-1.
        """
        if not sees_order(self.options["name"], self.options):
            return usual
        log(
            f"{self.options['name']} sees the order of frames, so it is tested with {self.frames}, as it was trained"
        )
        return (self.frames,)

    def save(self, path: StrPath) -> None:
        """Write it; the file appears whole or not at all. Raises RunError."""
        content = {name: value for name, value in vars(self).items() if name != "path"}
        # To a file of ours: torch's own says nothing of a disk that is full.
        with replacing(path) as partial, open(partial, "wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **content}, file)

    @classmethod
    def load(cls, path: StrPath) -> "Checkpoint":
        """Read one, never unpickling anything but tensors and plain values. Raises InputError
        naming the file."""
        if not Path(path).is_file():
            raise InputError(
                f"there is no checkpoint {path}; `{command_line('aggregate.train')}` makes one (best.pt)"
            )
        try:
            with zipfile.ZipFile(
                path
            ) as records:  # torch does not look at the checksums that it writes
                if damaged := records.testzip():
                    raise ValueError(f"the checksum of {damaged} does not match")
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (
            Exception
        ) as error:  # torch raises half a dozen types for a damaged, foreign or unsafe file
            raise InputError(
                f"{path} is not a checkpoint that can be read safely ({type(error).__name__}: {error!s:.80})"
            ) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(f"{path} is not a checkpoint of aggregate.train or aggregate.finetune")
        if content.get("version") not in (1, VERSION):
            raise InputError(
                f"{path} has version {content.get('version')}; this program reads 1 to {VERSION}"
            )
        if content["version"] == 1:
            content["data"] = None
        _rename(content.get("options"))
        if missing := sorted(cls.__dataclass_fields__.keys() - content.keys() - {"path"}):
            raise InputError(f"{path} is not a whole checkpoint: it holds no {missing[0]!r}")
        return cls(
            **{name: content[name] for name in cls.__dataclass_fields__ if name != "path"},
            path=os.fspath(path),
        )

    @property
    def holds_backbone(self) -> bool:
        """Whether it was trained end to end."""
        return any(name.startswith("backbone.") for name in self.state_dict)

    def model(self) -> VideoClassifier:
        """The classifier over cached features, without a backbone, in evaluation mode. InputError
        for StNet."""
        if self.options["name"] == "stnet":
            raise InputError(
                "this checkpoint is of StNet, which sees frames, not cached features; give --videos"
            )
        model = build(**self.options)
        model.load_state_dict(
            {k: v for k, v in self.state_dict.items() if not k.startswith("backbone.")}
        )
        return model.eval()

    def check_features(self, provenance: dict[str, Any], dim: int, where: str) -> None:
        """Raises InputError where features of this provenance are not those the model was trained
        on.

        For a model trained end to end these are the features of its own backbone (`extract
        --weights best.pt`).
        """
        if dim != self.options["dim"]:
            raise InputError(
                f"{where} holds features of width {dim}; the checkpoint takes {self.options['dim']}"
            )
        ours, theirs = (record.get("joined", [record]) for record in (self.features, provenance))
        if len(ours) != len(theirs):
            raise InputError(
                f"{where}: the checkpoint was trained on {len(ours)} joined stores, not {len(theirs)}"
            )
        for recorded, present in zip(ours, theirs, strict=True):
            self._check_store(recorded, present, where)

    def _check_store(self, recorded: dict[str, Any], present: dict[str, Any], where: str) -> None:
        for name in _DEPENDS_ON:
            ours, theirs = recorded.get(name), present.get(name)
            if (
                name == "weights" and self.holds_backbone
            ):  # the file is the weights, whatever it was called then
                with open(self.path, "rb") as file:
                    ours = {
                        **(theirs or {}),
                        "sha256": hashlib.file_digest(file, "sha256").hexdigest(),
                    }
            if ours != theirs:
                raise InputError(
                    f"{where} was made with {name} {theirs}, the checkpoint was trained on {ours}; "
                    "extract with the same backbone, or train on this store"
                )


def rows_for_classes(
    labels: np.ndarray, theirs: list[str], ours: list[str], where: str
) -> np.ndarray:
    """Labels over `theirs` as labels over `ours`, by class name (int [N], -1 stays). InputError
    names the first class that has a video and that the checkpoint does not know."""
    places = {name: place for place, name in enumerate(ours)}
    mapping = np.array([places.get(name, -2) for name in theirs] + [-1])  # the last: label -1
    mapped = mapping[labels]
    if (mapped == -2).any():
        name = theirs[int(labels[int((mapped == -2).argmax())])]
        raise InputError(
            f"{where} has class {name!r}, which the checkpoint's {len(ours)} classes do not hold"
        )
    return mapped
