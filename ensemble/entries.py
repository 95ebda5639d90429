"""What submissions and scores files hold, read once for all: entries of videos, JSON, the ids of a
submission."""

import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from extract import InputError, StrPath
from extract.listing.videos import youtube_id

Entries = list[tuple[str, float]]  # label and score of what a submission says of one video


def submission_ids(names: Sequence[str]) -> list[str]:
    """The ids under which videos are submitted: the youtube ids cut from the names of Kinetics
    clips.

    All names stay as they are where none is such a clip (another data set, or youtube ids already).
    Raises InputError for a name that is none where others are, and for two names of one youtube id.
    """
    ids = [youtube_id(name) for name in names] if any(map(is_clip, names)) else list(names)
    first: dict[str, str] = {}
    for name, video in zip(names, ids, strict=True):
        if video in first:
            both = f"{first[video]!r} and {name!r} are both video {video!r}"
            raise InputError(f"{both}; a submission has one entry a video")
        first[video] = name
    return ids


def is_clip(name: str) -> bool:
    """Whether a name is that of a Kinetics clip, from which `youtube_id` can be cut."""
    try:
        return bool(youtube_id(name))
    except InputError:
        return False


def is_scores(path: StrPath) -> bool:
    """Whether a file is meant as a scores file, by its extension."""
    return os.fspath(path).lower().endswith((".h5", ".hdf5"))


def read_text(path: StrPath) -> str:
    """InputError where there is no such file, or it is not text."""
    if not Path(path).is_file():
        raise InputError(f"there is no file {path}")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error})") from None


def read_json(path: StrPath) -> Any:
    """InputError where the file is not JSON, or an object holds a key twice."""

    def once(pairs: Iterable[tuple[str, Any]]) -> dict[str, Any]:
        """JSON readers keep the last of two equal keys and say nothing."""
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise InputError(f"{path}: {key!r} stands twice in one object")
            found[key] = value
        return found

    try:
        return json.loads(read_text(path), object_pairs_hook=once)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def read_submission(path: StrPath) -> dict[str, Entries]:
    """What a submission says of each video; InputError for a file, a video or an entry that is not
    as it must be."""
    submission = read_json(path)
    if not isinstance(submission, dict):
        raise InputError(
            f"{path} holds a {type(submission).__name__}, expected an object with version, results ..."
        )
    _must_be(path, submission, version=str, results=dict, external_data=dict)
    _must_be(f"{path}: external_data", submission["external_data"], used=bool, details=str)
    if not submission["results"]:
        raise InputError(f"{path}: 'results' holds no video")
    return {
        video: _entries(f"{path}: {video!r}", entries)
        for video, entries in submission["results"].items()
    }


def _must_be(where: StrPath, found: Mapping[str, Any], **kinds: type) -> None:
    for name, kind in kinds.items():
        if not isinstance(found.get(name), kind):
            raise InputError(
                f"{where}: {name!r} is {found.get(name)!r:.60}, expected a {kind.__name__}"
            )


def _entries(where: str, entries: Any) -> Entries:
    if not isinstance(entries, list):
        raise InputError(f"{where} has {entries!r:.60}, expected a list of labels with scores")
    for place, entry in enumerate(entries, start=1):
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("label"), str)
            or "score" not in entry
        ):
            raise InputError(
                f'{where} entry {place} is {entry!r:.80}, expected {{"label": ..., "score": ...}}'
            )
        label, score = entry["label"], entry["score"]
        if (
            isinstance(score, bool)
            or not isinstance(score, (int, float))
            or not math.isfinite(score)
        ):
            raise InputError(
                f"{where} entry {place} ({label!r}) has the score {score!r}; scores are finite numbers"
            )
    return [(entry["label"], entry["score"]) for entry in entries]
