"""The settings that a store was begun with, and the options of the command that continues it.

A store is continued with the settings that it was begun with, or not at all. Options that were not
given are taken from it. One that was given and differs is refused before weights are loaded.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from extract import InputError
from extract.backbone.networks import absolute_name
from extract.listing.windows import resolve_windowing
from extract.options import DEFAULTS, Options
from extract.store import FeatureStore, RunLog, difference


def continue_options(options: Options, store: FeatureStore) -> Any:
    """`options`, completed by the settings of `store`. InputError names what was given and
    differs."""
    recorded = recorded_options(store)
    if options.backbone is not None:
        options = replace(options, backbone=absolute_name(options.backbone))
    given = {name: getattr(options, name) for name in recorded}
    missing = {name: recorded[name] for name, value in given.items() if value is None}
    missing |= {name: recorded[name] for name in ("precision", "engine") if given[name] == "auto"}
    refuse_other_settings(store, recorded, given | missing, _other_weights(options.weights, store))
    if options.weights is None:
        missing["weights"] = _recorded_weights(store)
    completed = replace(options, **missing)
    if options.fps is not None:  # says the window, or the frames in one
        frames = options.frames if options.window is not None else completed.frames
        completed = resolve_windowing(replace(completed, window=options.window, frames=frames))
        refuse_other_settings(
            store, recorded, {name: getattr(completed, name) for name in recorded}
        )
    taken = {name: value for name, value in missing.items() if value != DEFAULTS.get(name)}
    if taken:
        flags = (f"--{name.replace('_', '-')} {value}" for name, value in taken.items())
        print(f"settings  as {store.path} was begun: {' '.join(flags)}")
    return completed.with_defaults()


def check_provenance(store: FeatureStore, provenance: dict[str, Any]) -> None:
    """InputError for settings that are known only once the backbone is loaded, and differ."""
    refuse_other_settings(store, store.provenance, provenance)


def refuse_other_settings(
    store: FeatureStore,
    recorded: dict[str, Any],
    now: dict[str, Any],
    lines: Sequence[str] = (),
) -> None:
    """InputError with the settings that differ, if any; `lines` name further ones."""
    if lines := [*difference(recorded, now), *lines]:
        text = "\n  ".join(lines)
        raise InputError(
            f"{store.path} was made with other settings:\n  {text}\nuse those, or another --out"
        )


def recorded_options(store: FeatureStore) -> dict[str, Any]:
    """The options that a store records, but for its weights. InputError for features that no
    extraction made."""
    record = store.provenance
    if "precision" not in record:
        raise InputError(
            f"{store.path} holds features that were made elsewhere ({record.get('source', 'no source recorded')}); "
            "`extract` cannot continue it, give another --out"
        )
    views = record.get("views", store.views)
    passes = sum(name.startswith("augment_") for name in views)
    sampling = record.get("sampling", {})
    clips = record.get("clips") or {}  # of clip-wise backbones
    options = {
        "clip_frames": clips.get("frames"),
        "clip_fps": clips.get("fps"),
        "per_clip": clips.get("per_clip"),
        "image_size": next(
            (run["image_size"] for run in logged_options(store) if "image_size" in run), None
        ),
        "backbone": record.get("backbone"),
        "decoder": record.get("decoder", {}).get("name"),
        "seed": record.get("seed"),
        "form": record.get("form"),
    }
    return {name: value for name, value in options.items() if value is not None} | {
        "precision": record["precision"],
        # Stores of before OpenVINO ran backbones, and those of PyTorch, record no engine.
        "engine": "openvino" if "engine" in record else "torch",
        "frames": sampling.get("frames", store.frames_per_video),
        "window": sampling.get("window"),
        "stride": sampling.get("stride"),
        "frame_rate": sampling.get("frame_rate"),
        "crops": len(views) - passes,
        "augment_passes": passes,
        "block_size": store.block_size,
    }


def logged_options(store: FeatureStore) -> list[dict[str, Any]]:
    """The options of earlier extractions, the last one first, as the log beside the store has
    them."""
    runs = [run.get("options") for run in RunLog.records(store.path) if run["event"] == "start"]
    return [options for options in reversed(runs) if isinstance(options, dict)]


def _recorded_weights(store: FeatureStore) -> str:
    """The option --weights that a store was begun with. InputError if its file is not there any
    more."""
    record = store.provenance.get("weights", {"name": "random"})
    if "sha256" not in record:
        return "random" if record["name"].startswith("random") else "pretrained"
    for weights in {str(run.get("weights")): None for run in logged_options(store)}:
        # Packages with weights are found by timm's name alone.
        if weights == "pretrained" or not _other_weights(weights, store):
            return weights
    raise InputError(
        f"{store.path} was made with the weights {record['name']} (SHA-256 {record['sha256'][:12]}...), "
        "which are not where they were; give them with --weights FILE"
    )


def _other_weights(weights: str | None, store: FeatureStore) -> list[str]:
    """The line that says that these weights are not those of a store, as far as their name or their
    bytes tell."""
    record = store.provenance.get("weights")
    if weights is None or record is None:
        return []
    if Path(weights).is_file():
        with Path(weights).open("rb") as file:
            now = hashlib.file_digest(file, "sha256").hexdigest()
        return difference(
            {"weights": {"sha256": record.get("sha256")}}, {"weights": {"sha256": now}}
        )
    random = record["name"].startswith("random")
    if (weights == "random") == random and weights in ("random", "pretrained"):
        return []
    return [f"weights: {record['name']} in the store, {weights} now"]
