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
from extract.backbone.weights import first_sentence, offline_at_once, published_file
from extract.decode.transform import Preprocessing

_HUB = "hf-hub:"


def registry_name(name: str) -> str:
    """timm's own name of a model that it publishes (`timm/NAME`, `hf-hub:timm/NAME`), else `name`,
    checked."""
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
    known = (
        f"did you mean {', '.join(near[:5])}?"
        if near
        else "timm.list_models() lists the known ones"
    )
    raise InputError(f"--backbone {name}: timm {timm.__version__} has no such model; {known}")


def create(name: str, *, pretrained: bool = False) -> nn.Module:
    """The module without classifier, its weights random unless `pretrained`."""
    if name.startswith(_HUB) and not pretrained:  # its architecture is in a file on the hub
        return _from_hub(name, name, pretrained=False)
    # drop_rate: some models drop out before the classifier by default.
    return timm.create_model(name, pretrained=pretrained, num_classes=0, drop_rate=0.0)


def pretrained(name: str) -> nn.Module:
    """The module with timm's published weights. Raises InputError if they cannot be had."""
    if name.startswith(_HUB):
        return _from_hub(name, name, pretrained=True)
    config = timm.get_pretrained_cfg(name)
    file, hub = published_file(name), getattr(config, "hf_hub_id", None)
    if not (file or hub):
        raise InputError(
            f"--weights pretrained: timm knows no published weights of {name}; give --weights FILE"
        )
    choices = [file] if file else []
    choices += [f"model.safetensors of {hub} on the Hugging Face hub"] if hub else []
    return _from_hub(name, " or ".join(choices), pretrained=True)


def _from_hub(name: str, what: str, *, pretrained: bool) -> nn.Module:
    try:
        with offline_at_once():
            return timm.create_model(name, pretrained=pretrained, num_classes=0, drop_rate=0.0)
    except (
        Exception
    ) as error:  # no network, no such file, a damaged download: each library has its own types
        why = f"{type(error).__name__}: {first_sentence(error)}"
        if name.startswith(_HUB):
            raise InputError(
                f"--backbone {name}: cannot be had from the Hugging Face hub ({why}); "
                "without a network, give timm's own name of the model and --weights FILE"
            ) from error
        raise InputError(
            f"--weights pretrained: the weights of {name} cannot be had ({why}); where "
            f"there is a network, fetch {what}, and pass it as --weights FILE"
        ) from error


def published(module: nn.Module) -> str:
    """What a record calls the published weights of a module: its name with tag, and where they
    are."""
    config = cast(dict[str, Any], module.pretrained_cfg)
    name = (
        f"{config['architecture']}.{config['tag']}" if config.get("tag") else config["architecture"]
    )
    return f"{name} ({config.get('hf_hub_id') or published_file(name)})"


def set_image_size(module: nn.Module, name: str, size: int) -> None:
    """Make a module see `size` x `size` pixels. Raises InputError if it cannot."""
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
            with warnings.catch_warnings():  # timm's own, of how it indexes tensors
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
    """What weights were trained to see, from timm's record of them (`pretrained_cfg`)."""
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
        known = ", ".join(Image.Resampling.__members__).lower()
        raise InputError(
            f"--backbone {name}: its interpolation is {interpolation}; supported are {known}"
        )
    resize = [floor(side / record["crop_pct"]) for side in size]
    square = size[0] == size[1]
    return Preprocessing(
        size=size[0] if square else (size[0], size[1]),
        resize=resize[0] if square else (resize[0], resize[1]),
        interpolation=interpolation,
        mean=tuple(record["mean"]),
        std=tuple(record["std"]),
        crop_mode=mode,
    )
