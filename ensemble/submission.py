"""The challenge's submission file: write it, read it, and check it.

    {"version": "...", "results": {youtube_id: [{"label": ..., "score": ...}, ...]},
     "external_data": {"used": true, "details": "..."}}

The official script (activitynet/ActivityNet, Evaluation/eval_kinetics.py) stops at a label that it
does not know, ranks NaN first, breaks ties arbitrarily, and counts a repeated label as one more
guess. So an entry written here holds the five best labels of a video with strictly falling scores,
and `check_submission` accepts nothing less. A video that failed gets a neutral entry: the first
five classes at nearly 1/classes each. `external_data.details` gives the number of such videos.
"""

import json
import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extract import InputError, Record, StrPath
from extract.durable import replace_file
from extract.listing.videos import youtube_id

# numpy and scipy are imported in functions, so that --help answers at once.
if TYPE_CHECKING:
    import numpy as np

    from aggregate.scores import Scores

Entries = list[tuple[str, float]]  # labels and scores that a submission gives one video

LABELS_PER_VIDEO = 5  # the challenge looks at no more
PRETRAINED = "backbones pre-trained on ImageNet, models as the scores files record them"
_ROWS_AT_ONCE = 2048  # keeps memory small


# -- ids -----------------------------------------------------------------------------------------


def submission_ids(names: Sequence[str]) -> list[str]:
    """The ids under which videos are submitted: the youtube ids in the names of Kinetics clips.

    If no name is that of a Kinetics clip (another data set, or youtube ids already), the names stay
    as they are. Raises InputError if only some are clips, and if two names have the same youtube
    id.
    """
    ids = [youtube_id(name) for name in names] if any(map(is_clip, names)) else list(names)
    first_names: dict[str, str] = {}
    for name, video in zip(names, ids, strict=True):
        if video in first_names:
            raise InputError(
                f"{first_names[video]!r} and {name!r} are both video {video!r}; "
                "a submission has one entry per video"
            )
        first_names[video] = name
    return ids


def is_clip(name: str) -> bool:
    """Whether a name is that of a Kinetics clip, which holds a youtube id."""
    try:
        return bool(youtube_id(name))
    except InputError:
        return False


# -- writing -------------------------------------------------------------------------------------


def write_submission(scores: "Scores", path: StrPath, *, external_data: str = PRETRAINED) -> int:
    """Write the five best labels of every video, with their probabilities.

    The file appears whole or not at all. Raises InputError for fewer than five classes, and for ids
    that `submission_ids` refuses.

    Args:
        external_data: other data that the models have seen; "" for none.

    Returns:
        the number of failed videos, which get a neutral entry.
    """
    classes = scores.classes
    if len(classes) < LABELS_PER_VIDEO:
        raise InputError(
            f"a submission names {LABELS_PER_VIDEO} distinct labels per video, "
            f"and there are {len(classes)} classes"
        )
    results: dict[str, Entries] = {}
    for video, failed, labels, probabilities in zip(
        submission_ids(scores.ids), scores.failed, *_five_best(scores.logits), strict=True
    ):
        # Digits of a float32 fall strictly in single precision too, and are half as many.
        best = [
            (classes[label], float(str(probability)))
            for label, probability in zip(labels, probabilities, strict=True)
        ]
        results[video] = neutral_entries(classes) if failed else best
    details = [external_data] if external_data else []
    num_failed = int(scores.failed.sum())
    if num_failed:
        details.append(
            f"{num_failed} of {len(results)} videos could not be read and hold a neutral entry "
            f"(the first {LABELS_PER_VIDEO} labels at nearly 1/{len(classes)})"
        )
    submission = {
        "version": "VERSION 1.0",
        "results": {
            video: [{"label": label, "score": score} for label, score in entries]
            for video, entries in results.items()
        },
        "external_data": {"used": bool(external_data), "details": "; ".join(details)},
    }
    replace_file(path, json.dumps(submission, ensure_ascii=False, allow_nan=False))
    return num_failed


def neutral_entries(classes: Sequence[str]) -> Entries:
    """The entries of a video that failed: the first five classes, falling by a thousandth of
    1/classes."""
    return [
        (name, float(f"{(1 - rank / 1000) / len(classes):.6g}"))
        for rank, name in enumerate(classes[:LABELS_PER_VIDEO])
    ]


def _five_best(logits: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    """The five highest classes int [N, 5] and their probabilities float32 [N, 5].

    Of equal logits the lower index is first. The probabilities are above 0 and fall strictly: ties
    and zeros are raised to the next float32.
    """
    import numpy as np
    from scipy.special import logsumexp

    best = np.zeros((len(logits), LABELS_PER_VIDEO), np.int64)
    falling = np.empty(best.shape, np.float32)
    for start in range(0, len(logits), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        values = np.nan_to_num(logits[rows])  # failed videos get a neutral entry later
        total = logsumexp(values.astype(np.float64), axis=1, keepdims=True)
        unranked = values.copy()
        for rank in range(LABELS_PER_VIDEO):
            best[rows, rank] = unranked.argmax(axis=1)  # the first of equals
            np.put_along_axis(unranked, best[rows, rank][:, None], -np.inf, axis=1)
        falling[rows] = np.exp(np.take_along_axis(values, best[rows], axis=1) - total)
    np.maximum(falling, np.finfo(np.float32).tiny, out=falling)
    for rank in reversed(range(LABELS_PER_VIDEO - 1)):
        least = np.nextafter(falling[:, rank + 1], np.float32(np.inf))
        falling[:, rank] = np.maximum(falling[:, rank], least)
    return best, falling


# -- reading -------------------------------------------------------------------------------------


def read_text(path: StrPath) -> str:
    """The text of a file. InputError if it does not exist, or is not text."""
    if not Path(path).is_file():
        raise InputError(f"{path} does not exist")
    try:
        return Path(path).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{path} is not UTF-8 text ({error})") from None


def read_json(path: StrPath) -> Any:
    """The content of a JSON file. InputError if it is not JSON, or an object has a key twice."""

    def unique(pairs: Iterable[tuple[str, Any]]) -> Record:
        """Python's reader would silently keep the last of two equal keys."""
        record: Record = {}
        for key, value in pairs:
            if key in record:
                raise InputError(f"{path}: {key!r} appears twice in one object")
            record[key] = value
        return record

    try:
        return json.loads(read_text(path), object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        raise InputError(f"{path} is not JSON: {error}") from None


def read_submission(path: StrPath) -> dict[str, Entries]:
    """The entries of each video. InputError if the file does not have the format above."""
    submission = read_json(path)
    if not isinstance(submission, dict):
        raise InputError(
            f"{path} holds a {type(submission).__name__}, "
            "expected an object with version, results ..."
        )
    _check_types(f"{path}", submission, version=str, results=dict, external_data=dict)
    _check_types(f"{path}: external_data", submission["external_data"], used=bool, details=str)
    if not submission["results"]:
        raise InputError(f"{path}: 'results' holds no video")
    return {
        video: _read_entries(f"{path}: {video!r}", entries)
        for video, entries in submission["results"].items()
    }


def _check_types(location: str, record: Mapping[str, Any], **types: type) -> None:
    for name, expected in types.items():
        value = record.get(name)
        if not isinstance(value, expected):
            raise InputError(
                f"{location}: {name!r} is {value!r:.60}, expected a {expected.__name__}"
            )


def _read_entries(location: str, entries: Any) -> Entries:
    if not isinstance(entries, list):
        raise InputError(f"{location} has {entries!r:.60}, expected a list of labels with scores")
    pairs: Entries = []
    for number, entry in enumerate(entries, start=1):
        match entry:
            case {"label": str(label), "score": score}:
                pairs.append((label, score))
            case _:
                raise InputError(
                    f"{location} entry {number} is {entry!r:.80}, "
                    'expected {"label": ..., "score": ...}'
                )
        if type(score) not in (int, float) or not math.isfinite(score):
            raise InputError(
                f"{location} entry {number} ({label!r}) has the score {score!r}; "
                "scores are finite numbers"
            )
    return pairs


# -- checking ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class CheckResult:
    """A submission that passed: its videos, how many of them have a neutral entry, and how many
    were not expected."""

    videos: int
    neutral: int
    extra: int

    def __str__(self) -> str:
        text = f"{self.videos:,} videos"
        if self.neutral:
            text += f", {self.neutral:,} of them neutral (the video failed)"
        if self.extra:
            text += f", {self.extra:,} of them not listed (the challenge ignores these)"
        return text


def check_submission(
    path: StrPath, classes: Sequence[str], ids: Collection[str] | None = None
) -> CheckResult:
    """Raise InputError naming the first bad entry, unless the challenge would accept the file and
    rank its labels as intended.

    Every video needs at least five labels, all from `classes` and each once, with finite, strictly
    falling scores. Every video of `ids` must be in the file, under its id from
    `submission_ids(ids)`. Other videos are counted; the challenge ignores them. Without `ids`, each
    video must be an 11-character youtube id, and missing videos are not detected.
    """
    results = read_submission(path)
    known_labels = frozenset(classes)
    for video, entries in results.items():
        if ids is None and not is_clip(f"{video}_000000_000010"):
            raise InputError(
                f"{path}: {video!r} is not a youtube id, which has 11 characters; "
                "for another data set, list its videos (--ids)"
            )
        _check_entries(f"{path}: {video!r}", entries, known_labels)
    expected = list(results) if ids is None else submission_ids(list(ids))
    if missing := [video for video in expected if video not in results]:
        message = (
            f"{path}: {len(missing):,} of {len(expected):,} videos are missing, "
            f"the first is {missing[0]!r}"
        )
        if len(missing) == len(expected):
            message += f"; the file begins with {next(iter(results))!r}"
        raise InputError(message)
    num_neutral = list(results.values()).count(neutral_entries(classes))
    return CheckResult(len(results), num_neutral, len(results) - len(expected))


def _check_entries(location: str, entries: Entries, known_labels: Collection[str]) -> None:
    numbers: dict[str, int] = {}
    last = math.inf
    for number, (label, score) in enumerate(entries, start=1):
        if label not in known_labels:
            raise InputError(
                f"{location} entry {number} has the label {label!r}, "
                f"which is none of {len(known_labels):,} classes"
            )
        if label in numbers:
            raise InputError(
                f"{location} has the label {label!r} twice, "
                f"in entries {numbers[label]} and {number}"
            )
        if not score < last:
            raise InputError(
                f"{location} entry {number} ({label!r}) has the score {score!r} after {last!r}; "
                "scores fall from entry to entry"
            )
        numbers[label], last = number, score
    if len(entries) < LABELS_PER_VIDEO:
        raise InputError(
            f"{location} has {len(entries)} labels; at least {LABELS_PER_VIDEO} are needed"
        )
