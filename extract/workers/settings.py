"""The settings of a store, which a command that continues it must keep.

Options that are not given are taken from the store. An option that is given and differs is refused
before weights are loaded.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from extract import InputError
from extract.backbone.networks import absolute_name
from extract.listing.windows import resolve_windowing
from extract.options import DEFAULTS, Options
from extract.sources import sha256_of
from extract.store import FeatureStore, RunLog, difference


def continue_options(options: Options, store: FeatureStore) -> Any:
    """Fill missing options from the settings of a store. InputError names those that differ."""
    recorded = recorded_options(store)
    if options.backbone is not None:
        options = replace(options, backbone=absolute_name(options.backbone))
    current = {name: getattr(options, name) for name in recorded}
    missing = {name: recorded[name] for name, value in current.items() if value is None}
    missing |= {name: recorded[name] for name in ("precision", "engine") if current[name] == "auto"}
    lines = _weights_difference(options.weights, store)
    refuse_other_settings(store, recorded, current | missing, lines)
    if options.weights is None:
        missing["weights"] = _recorded_weights(store)
    completed = replace(options, **missing)
    if options.fps is not None:  # it sets the window, or the frames in a window
        frames = options.frames if options.window is not None else completed.frames
        completed = resolve_windowing(replace(completed, window=options.window, frames=frames))
        refuse_other_settings(
            store, recorded, {name: getattr(completed, name) for name in recorded}
        )
    flags = [
        f"--{name.replace('_', '-')} {value}"
        for name, value in missing.items()
        if value != DEFAULTS.get(name)
    ]
    if flags:
        print(f"settings  as {store.path} was begun: {' '.join(flags)}")
    return completed.with_defaults()


def check_provenance(store: FeatureStore, provenance: dict[str, Any]) -> None:
    """Raise InputError if settings differ that are known only once the backbone is loaded.

    Stores of earlier versions do not record the configuration of a model of transformers.
    """
    recorded = store.provenance
    if "config" not in recorded:
        provenance = {name: value for name, value in provenance.items() if name != "config"}
    refuse_other_settings(store, recorded, provenance)


def refuse_other_settings(
    store: FeatureStore,
    recorded: dict[str, Any],
    current: dict[str, Any],
    lines: Sequence[str] = (),
) -> None:
    """Raise InputError with the settings that differ, and with `lines`, if there are any."""
    if lines := [*difference(recorded, current), *lines]:
        text = "\n  ".join(lines)
        raise InputError(
            f"{store.path} was made with other settings:\n  {text}\nuse those, or another --out"
        )


def recorded_options(store: FeatureStore) -> dict[str, Any]:
    """The options that a store records, except for its weights.

    Raises InputError for features that another tool made.
    """
    record = store.provenance
    if "precision" not in record:
        raise InputError(
            f"{store.path} holds features that were made elsewhere "
            f"({record.get('source', 'no source recorded')}); `extract` cannot continue it, give "
            "another --out"
        )
    views = record.get("views", store.views)
    augment_passes = sum(name.startswith("augment_") for name in views)
    sampling = record.get("sampling", {})
    clips = record.get("clips") or {}  # of clip-wise backbones
    image_sizes = [run["image_size"] for run in logged_options(store) if "image_size" in run]
    options = {
        "processor": _recorded_processor(record),
        "clip_frames": clips.get("frames"),
        "clip_fps": clips.get("fps"),
        "per_clip": clips.get("per_clip"),
        "image_size": image_sizes[0] if image_sizes else None,
        "backbone": record.get("backbone"),
        "decoder": record.get("decoder", {}).get("name"),
        "seed": record.get("seed"),
        "form": record.get("form"),
    }
    return {name: value for name, value in options.items() if value is not None} | {
        "precision": record["precision"],
        # Stores of PyTorch, and all from before there was OpenVINO, record no engine.
        "engine": "openvino" if "engine" in record else "torch",
        "frames": sampling.get("frames", store.frames_per_video),
        "window": sampling.get("window"),
        "stride": sampling.get("stride"),
        "frame_rate": sampling.get("frame_rate"),
        "crops": len(views) - augment_passes,
        "augment_passes": augment_passes,
        "block_size": store.block_size,
    }


def _recorded_processor(record: dict[str, Any]) -> str | None:
    """The option that continues a store in which Pillow resized for a model of transformers.

    None for other stores. Before stores recorded it, Pillow resized for all models.
    """
    is_hf = record.get("backbone", "").startswith("hf/")
    return "torchvision" if is_hf and "processor" not in record["preprocessing"] else None


def logged_options(store: FeatureStore) -> list[dict[str, Any]]:
    """The options of earlier extractions, from the store's log, the latest first."""
    runs = [run.get("options") for run in RunLog.records(store.path) if run["event"] == "start"]
    return [options for options in reversed(runs) if isinstance(options, dict)]


def _recorded_weights(store: FeatureStore) -> str:
    """The option --weights that a store was begun with. InputError if its file is missing."""
    record = store.provenance.get("weights", {"name": "random"})
    if "sha256" not in record:
        return "random" if record["name"].startswith("random") else "pretrained"
    for weights in {str(run.get("weights")): None for run in logged_options(store)}:
        # timm's name is enough to find weights in a Python package.
        if weights == "pretrained" or not _weights_difference(weights, store):
            return weights
    raise InputError(
        f"{store.path} was made with the weights {record['name']} (SHA-256 "
        f"{record['sha256'][:12]}...), which are not where they were; give them with --weights FILE"
    )


def _weights_difference(weights: str | None, store: FeatureStore) -> list[str]:
    """A line for the error message if these weights differ from a store's in name or digest."""
    record = store.provenance.get("weights")
    if weights is None or record is None:
        return []
    if Path(weights).is_file():
        recorded = {"sha256": record.get("sha256")}
        return difference({"weights": recorded}, {"weights": {"sha256": sha256_of(weights)}})
    recorded_option = "random" if record["name"].startswith("random") else "pretrained"
    if weights == recorded_option:
        return []
    return [f"weights: {record['name']} in the store, {weights} now"]
