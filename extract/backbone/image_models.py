"""timm's image models: their names, published weights, sizes and preprocessing."""

import difflib
import warnings
from math import floor
from typing import Any, cast

import timm
from PIL import Image
from timm.data import resolve_data_config
from torch import nn

from extract import InputError
from extract.backbone.weights import download_error, offline_at_once, published_file
from extract.decode.transform import Preprocessing
from extract.errors import describe_error

_HUB = "hf-hub:"


def registry_name(name: str) -> str:
    """The name in timm's registry of `timm/NAME` and `hf-hub:timm/NAME`, or else `name` itself.

    Raises InputError for a model that timm does not have.
    """
    short = name.removeprefix(_HUB).removeprefix("timm/")
    if short != name and timm.is_model_pretrained(short):
        return short
    if name.startswith(_HUB):
        return name
    architecture, has_tag, _ = short.partition(".")
    if timm.is_model(architecture):
        if not has_tag or timm.is_model_pretrained(short):
            return short
        near = timm.list_pretrained(f"{architecture}.*")
    else:
        close = difflib.get_close_matches(short, timm.list_models(), n=2)
        near = list(dict.fromkeys(close + timm.list_models(f"*{short}*")))
    hint = "timm.list_models() lists all models"
    if near:
        hint = f"did you mean {', '.join(near[:5])}?"
    raise InputError(f"--backbone {name}: timm {timm.__version__} has no such model; {hint}")


def create(name: str) -> nn.Module:
    """The module without classifier, with random weights."""
    if name.startswith(_HUB):  # its architecture is in a file on the hub
        return _from_hub(name, name, pretrained=False)
    return timm.create_model(name, num_classes=0, drop_rate=0.0)


def pretrained(name: str) -> nn.Module:
    """The module with timm's published weights. Raises InputError if they are not available."""
    if name.startswith(_HUB):
        return _from_hub(name, name, pretrained=True)
    hub = getattr(timm.get_pretrained_cfg(name), "hf_hub_id", None)
    on_hub = hub and f"model.safetensors of {hub} on the Hugging Face hub"
    files = list(filter(None, (published_file(name), on_hub)))
    if not files:
        raise InputError(
            f"--weights pretrained: timm knows no published weights of {name}; give --weights FILE"
        )
    return _from_hub(name, " or ".join(files), pretrained=True)


def _from_hub(name: str, files: str, *, pretrained: bool) -> nn.Module:
    try:
        with offline_at_once():
            # drop_rate: by default, some models drop features before the classifier.
            return timm.create_model(name, pretrained=pretrained, num_classes=0, drop_rate=0.0)
    # No network, no such file or a damaged download: every library has its own types of errors.
    except Exception as error:
        if not name.startswith(_HUB):
            raise download_error(name, files, error) from error
        raise InputError(
            f"--backbone {name}: cannot be downloaded from the Hugging Face hub "
            f"({describe_error(error)}); without a network, give timm's own name of the model and "
            "--weights FILE"
        ) from error


def published(module: nn.Module) -> str:
    """The name of a module's published weights, and the repository or file that they come from."""
    config = cast(dict[str, Any], module.pretrained_cfg)
    name = ".".join(filter(None, (config["architecture"], config.get("tag"))))
    return f"{name} ({config.get('hf_hub_id') or published_file(name)})"


def set_image_size(module: nn.Module, name: str, size: int) -> None:
    """Make a module take `size` x `size` pixels. Raises InputError if it cannot."""
    config = cast(dict[str, Any], module.pretrained_cfg)
    trained = tuple(config["input_size"][1:])
    if trained == (size, size):
        return
    patch = getattr(getattr(module, "patch_embed", None), "patch_size", 1)
    patch = max(patch) if isinstance(patch, tuple | list) else patch
    if size < 1 or size % patch:
        raise InputError(
            f"--image-size {size}: {name} takes multiples of its patch size, {patch} pixels"
        )
    if hasattr(module, "set_input_size"):
        try:
            with warnings.catch_warnings():  # about how timm itself indexes tensors
                warnings.simplefilter("ignore")
                cast(Any, module).set_input_size(img_size=(size, size))
        except (RuntimeError, AssertionError, ValueError) as error:
            raise InputError(f"--image-size {size}: {name} cannot take it ({error})") from None
    elif config.get("fixed_input_size"):
        raise InputError(
            f"--image-size {size}: {name} takes {trained[0]} x {trained[1]} pixels only"
        )


def preprocessing_of(
    config: dict[str, Any], name: str, *, image_size: int | None = None
) -> Preprocessing:
    """The preprocessing that weights were trained with, from timm's record of them
    (`pretrained_cfg`)."""
    record = resolve_data_config(pretrained_cfg=config)
    channels, *size = record["input_size"]
    if channels != 3:
        raise InputError(
            f"--backbone {name}: takes {channels} channels; only RGB frames are supported"
        )
    if image_size is not None:
        size = [image_size, image_size]
    mode, interpolation = record["crop_mode"], record["interpolation"]
    if mode not in ("center", "squash", "border"):
        raise InputError(
            f"--backbone {name}: its crop mode is {mode}; supported are center, squash and border"
        )
    if interpolation.upper() not in Image.Resampling.__members__:
        supported = ", ".join(Image.Resampling.__members__).lower()
        raise InputError(
            f"--backbone {name}: its interpolation is {interpolation}; supported are {supported}"
        )
    resize = [floor(side / record["crop_pct"]) for side in size]
    return Preprocessing(
        size=square_or_sides(*size),
        resize=square_or_sides(*resize),
        interpolation=interpolation,
        mean=tuple(record["mean"]),
        std=tuple(record["std"]),
        crop_mode=mode,
    )


def square_or_sides(height: int, width: int) -> int | tuple[int, int]:
    """A size as `Preprocessing` has it: one number for a square, else both sides."""
    return height if height == width else (height, width)
