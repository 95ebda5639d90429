"""Checkpoints: torch files of plain values, from which a trained classifier is built again.

format, version
state_dict      tensors; those of a backbone trained end to end start with `backbone.`
options         of `aggregate.models.build`
classes         names, in the order of the classifier's rows
features        provenance of the features: backbone, weights, preprocessing
frames          segments in training
metrics         validation measures at this epoch
data            the videos it was trained on (aggregate/training/manifest.py); not in version 1
training        optimizers and history, in `last.pt` only, to resume
"""

import os
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from aggregate.models import VideoClassifier, build, sees_order
from extract import InputError, Record, StrPath
from extract.commands import command_line
from extract.durable import replacing
from extract.sources import sha256_of

FORMAT, VERSION = "hgnl-checkpoint", 2
# A model depends on these parts of a store's provenance. Decoder, views and versions may differ.
_DEPENDS_ON = ("backbone", "weights", "preprocessing", "clips", "config")
# Options that earlier versions recorded under another spelling.
_RENAMED = {"normalise": "normalize", "standardise": "standardize"}


@dataclass(frozen=True)
class Checkpoint:
    """A trained model as plain values; `model()` builds it."""

    options: Record
    classes: list[str]
    state_dict: dict[str, Tensor] = field(repr=False)
    features: Record
    frames: int
    metrics: dict[str, float] = field(default_factory=dict)
    data: Record | None = field(default=None, repr=False)
    training: Record | None = field(default=None, repr=False)
    path: str = ""  # the file that it was read from; not saved

    def usual_segments(
        self, usual: tuple[int, ...], log: Callable[[str], object] = print
    ) -> tuple[int, ...]:
        """The numbers of segments to test with: `usual`. A head that sees the order of frames is
        tested with the number of segments that it was trained with.

        Such a head has learned how far apart frames are: trained on 3 and tested on 16, TXB loses
        16 points of top-1.
        """
        if not sees_order(self.options["name"], self.options):
            return usual
        log(
            f"{self.options['name']} sees the order of frames, so it is tested with {self.frames}, "
            "as it was trained"
        )
        return (self.frames,)

    def save(self, path: StrPath) -> None:
        """Write the checkpoint; the file appears whole or not at all. Raises RunError."""
        content = {name: value for name, value in vars(self).items() if name != "path"}
        # To an open file: torch's own writer does not report a full disk.
        with replacing(path) as partial, open(partial, "wb") as file:
            torch.save({"format": FORMAT, "version": VERSION, **content}, file)

    @classmethod
    def load(cls, path: StrPath) -> "Checkpoint":
        """Read a checkpoint; only tensors and plain values are unpickled. InputError names the
        file."""
        if not Path(path).is_file():
            raise InputError(
                f"the checkpoint {path} does not exist; "
                f"`{command_line('aggregate.train')}` makes one (best.pt)"
            )
        try:
            # torch does not check the checksums that it writes.
            with zipfile.ZipFile(path) as records:
                if damaged := records.testzip():
                    raise ValueError(f"the checksum of {damaged} does not match")
            content = torch.load(path, map_location="cpu", weights_only=True)
        # torch raises half a dozen types for a damaged, foreign or unsafe file.
        except Exception as error:
            raise InputError(
                f"{path} is not a checkpoint that can be read safely "
                f"({type(error).__name__}: {error!s:.80})"
            ) from error
        if not isinstance(content, dict) or content.get("format") != FORMAT:
            raise InputError(f"{path} is not a checkpoint of aggregate.train or aggregate.finetune")
        if content.get("version") not in (1, VERSION):
            raise InputError(
                f"{path} has version {content.get('version')}; this program reads 1 to {VERSION}"
            )
        if content["version"] == 1:
            content["data"] = None
        content["path"] = os.fspath(path)
        names = [each.name for each in fields(cls)]
        if missing := sorted(set(names) - content.keys()):
            raise InputError(f"{path} is not a whole checkpoint: it holds no {missing[0]!r}")
        checkpoint = cls(**{name: content[name] for name in names})
        for before, now in _RENAMED.items():
            if before in checkpoint.options:
                checkpoint.options[now] = checkpoint.options.pop(before)
        return checkpoint

    @property
    def holds_backbone(self) -> bool:
        """Whether the model was trained end to end, with its backbone."""
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

    def check_features(self, provenance: Record, dim: int, where: str) -> None:
        """InputError if the model was not trained on features of this provenance.

        A model trained end to end takes the features of its own backbone (`extract --weights
        best.pt`).
        """
        if dim != self.options["dim"]:
            raise InputError(
                f"{where} holds features of width {dim}; the checkpoint takes {self.options['dim']}"
            )
        ours, theirs = (record.get("joined", [record]) for record in (self.features, provenance))
        if len(ours) != len(theirs):
            raise InputError(
                f"{where}: the checkpoint was trained on {len(ours)} joined stores, not "
                f"{len(theirs)}"
            )
        for recorded, present in zip(ours, theirs, strict=True):
            self._check_store(recorded, present, where)

    def _check_store(self, recorded: Record, present: Record, where: str) -> None:
        for name in _DEPENDS_ON:
            ours, theirs = recorded.get(name), present.get(name)
            if name == "weights" and self.holds_backbone:
                # The file itself holds the weights; its name at extraction does not matter.
                ours = {**(theirs or {}), "sha256": sha256_of(self.path)}
            if ours != theirs:
                raise InputError(
                    f"{where} was made with {name} {theirs}, the checkpoint was trained on {ours}; "
                    "extract with the same backbone, or train on this store"
                )


def rows_for_classes(
    labels: np.ndarray, theirs: list[str], ours: list[str], where: str
) -> np.ndarray:
    """Translate labels from the classes `theirs` to `ours`, by class name (int [N], -1 stays).

    InputError names the first class that has a video and is not one of the checkpoint's.
    """
    index = {name: label for label, name in enumerate(ours)}
    mapping = np.array([index.get(name, -2) for name in theirs] + [-1])  # the last: label -1
    mapped = mapping[labels]
    if (mapped == -2).any():
        name = theirs[int(labels[int((mapped == -2).argmax())])]
        raise InputError(
            f"{where} has class {name!r}, which is not one of the checkpoint's {len(ours)}; "
            "give a checkpoint that was trained with this class, or correct the label"
        )
    return mapped
