"""python -m ensemble.submit: check a submission to the challenge before it is sent, or grade it
against a truth.

    {"version": "...", "results": {youtube_id: [{"label": ..., "score": ...}, ...]},
     "external_data": {"used": true, "details": "..."}}

The official script (activitynet/ActivityNet, Evaluation/eval_kinetics.py) stops at a label it does
not know, ranks NaN first, breaks ties at will and lets a repeated label use up places. So a video's
entry is the five best labels with falling scores, and `check_submission` takes nothing less. A
video that failed gets a neutral entry: the first five classes at very nearly 1/classes each, which
`external_data.details` counts.
"""

import json
import math
import sys
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ensemble.entries import Entries, is_clip, is_scores, read_submission, submission_ids
from extract import InputError, StrPath
from extract.cli import run_command
from extract.durable import replace_file
from extract.listing.labels import choose_labels

if (
    TYPE_CHECKING
):  # numpy and what needs it are imported where used: --help is asked for more often than scores
    import numpy as np

    from aggregate.scores import Scores

PLACES = 5  # labels a video: as many as the challenge looks at
PRETRAINED = "backbones pre-trained on ImageNet, models as the scores files record them"


@dataclass(frozen=True)
class Checked:
    """A submission that passed: its videos, those of them with a neutral entry, and those that
    nobody asked for."""

    videos: int
    neutral: int
    extra: int

    def __str__(self) -> str:
        more = f", {self.neutral:,} of them neutral (the video failed)" * bool(self.neutral)
        more += f", {self.extra:,} of them not listed (the challenge ignores these)" * bool(
            self.extra
        )
        return f"{self.videos:,} videos{more}"


def write_submission(scores: "Scores", path: StrPath, *, external_data: str = PRETRAINED) -> int:
    """Write the five best labels of every video; returns how many failed ones got a neutral entry.

    Scores written are probabilities. `external_data` says what else the models have seen, "" is
    nothing. The file appears whole or not at all. Raises InputError for fewer than five classes and
    as `submission_ids` does.
    """
    classes = scores.classes
    if len(classes) < PLACES:
        raise InputError(
            f"a submission names {PLACES} distinct labels a video, and there are {len(classes)} classes"
        )
    results = {}
    best, falling = _five_best(scores.logits)
    for name, failed, labels, row in zip(
        submission_ids(scores.ids), scores.failed, best, falling, strict=True
    ):
        # The digits of a float32: falling in single precision too, and half as long.
        entries = [
            (classes[label], float(str(score))) for label, score in zip(labels, row, strict=True)
        ]
        entries = neutral_entries(classes) if failed else entries
        results[name] = [{"label": label, "score": score} for label, score in entries]
    details, lost = [external_data] * bool(external_data), int(scores.failed.sum())
    if lost:
        details.append(
            f"{lost} of {len(results)} videos could not be read and hold a neutral entry "
            f"(the first {PLACES} labels at nearly 1/{len(classes)})"
        )
    external = {"used": bool(external_data), "details": "; ".join(details)}
    submission = {"version": "VERSION 1.0", "results": results, "external_data": external}
    replace_file(path, json.dumps(submission, ensure_ascii=False, allow_nan=False))
    return lost


def neutral_entries(classes: Sequence[str]) -> Entries:
    """What a video that failed gets: the first five classes, falling by a thousandth of
    1/classes."""
    return [
        (name, float(f"{(1 - place / 1000) / len(classes):.6g}"))
        for place, name in enumerate(classes[:PLACES])
    ]


def check_submission(
    path: StrPath, classes: Sequence[str], ids: Collection[str] | None = None
) -> Checked:
    """Raise InputError, naming the first bad entry, unless the challenge would accept and rank the
    file as it is meant.

    Every video has at least five labels, all of `classes` and none twice, with finite, strictly
    falling scores; every video of `ids` is there, under its id as `submission_ids(ids)` gives it.
    Without `ids`, every video must be an 11-character youtube id, and nobody can say which are
    missing. Videos that are not in `ids` are counted: the challenge ignores them.
    """
    results = read_submission(path)
    known, neutral = frozenset(classes), neutral_entries(classes)
    for video, entries in results.items():
        if ids is None and not is_clip(f"{video}_000000_000010"):
            raise InputError(
                f"{path}: {video!r} is not a youtube id, which has 11 characters; "
                "for videos of another data set say which there are (--ids)"
            )
        _check_entries(f"{path}: {video!r}", entries, known)
    listed = list(results) if ids is None else submission_ids(list(ids))
    if missing := [video for video in listed if video not in results]:
        hint = (
            f"; the file begins with {next(iter(results))!r}" if len(missing) == len(listed) else ""
        )
        raise InputError(
            f"{path}: {len(missing):,} of {len(listed):,} videos are missing, the first is {missing[0]!r}{hint}"
        )
    return Checked(len(results), list(results.values()).count(neutral), len(results) - len(listed))


def _five_best(logits: "np.ndarray") -> "tuple[np.ndarray, np.ndarray]":
    """Classes int [N, 5] and probabilities float32 [N, 5] of the five highest, the lower index
    first where they tie.

    The probabilities are above 0 and fall strictly: ties and zeros are lifted by the least that a
    float32 can tell.
    """
    import numpy as np
    from scipy.special import logsumexp

    best = np.zeros((len(logits), PLACES), np.int64)
    falling = np.empty(best.shape, np.float32)
    for start in range(0, len(logits), 2048):  # keeps memory small
        rows = slice(start, start + 2048)
        left = np.nan_to_num(logits[rows])  # a copy; what failed gets another entry
        total = logsumexp(left.astype(np.float64), axis=1, keepdims=True)
        for place in range(PLACES):
            best[rows, place] = left.argmax(axis=1)  # the first of equals
            np.put_along_axis(left, best[rows, place][:, None], -np.inf, axis=1)
        falling[rows] = np.exp(
            np.take_along_axis(np.nan_to_num(logits[rows]), best[rows], axis=1) - total
        )
    np.maximum(falling, np.finfo(np.float32).tiny, out=falling)
    for place in range(PLACES - 2, -1, -1):
        falling[:, place] = np.maximum(
            falling[:, place], np.nextafter(falling[:, place + 1], np.float32(np.inf))
        )
    return best, falling


def _check_entries(where: str, entries: Entries, known: Collection[str]) -> None:
    seen: dict[str, int] = {}
    last = math.inf
    for place, (label, score) in enumerate(entries, start=1):
        if label not in known:
            raise InputError(
                f"{where} entry {place} has the label {label!r}, which is none of {len(known):,} classes"
            )
        if label in seen:
            raise InputError(
                f"{where} has the label {label!r} twice, in entries {seen[label]} and {place}"
            )
        if not score < last:
            raise InputError(
                f"{where} entry {place} ({label!r}) has the score {score!r} after {last!r}; "
                "scores fall from entry to entry"
            )
        seen[label], last = place, score
    if len(entries) < PLACES:
        raise InputError(f"{where} has {len(entries)} labels; at least {PLACES} are needed")


@dataclass(frozen=True)
class Options:
    """Check a submission before it is sent (--check), or grade it (--grade SUBMISSION --truth
    FILE)."""

    check: Path | None = None
    """The submission to check: prints how many videos passed, or the first bad entry (exit status
    2)."""
    grade: Path | None = None
    """The submission to grade by the challenge's rules."""
    labels: str = "kinetics700"
    """For --check: kinetics700, a file of labels, one a line, or a scores file with the classes."""
    ids: Path | None = None
    """For --check, the videos that must be there: one a line, a Kinetics CSV or JSON, or a scores
    file."""
    truth: Path | None = None
    """For --grade: the Kinetics CSV, or the challenge's JSON."""
    split: str = ""
    """Which split of --truth or --ids counts, where there are several."""


def main(options: Options) -> int:
    if (options.check is None) == (options.grade is None):
        raise InputError("give either --check SUBMISSION or --grade SUBMISSION --truth FILE")
    from ensemble.grade import grade_submission, read_ids, read_truth

    if options.check is not None:
        if options.truth is not None:
            raise InputError(
                f"--truth {options.truth} belongs to --grade; --check takes --labels and --ids"
            )
        ids = None if options.ids is None else read_ids(options.ids, options.split)
        print(
            f"{options.check} passes: {check_submission(options.check, _classes(options.labels), ids)}"
        )
        if ids is None:
            print("which videos the challenge expects was not checked; --ids FILE says which")
    elif options.grade is not None:
        if options.truth is None:
            raise InputError("--grade needs --truth FILE, the Kinetics CSV or the challenge's JSON")
        print(grade_submission(options.grade, read_truth(options.truth, options.split)))
    return 0


def _classes(labels: str) -> Sequence[str]:
    if is_scores(labels):
        from aggregate.scores import Scores

        return Scores.load(labels).classes
    if labels == "auto":
        raise InputError(
            "--labels auto: a submission is checked against a list; give kinetics700 or a FILE"
        )
    return choose_labels((), labels)[0]


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m ensemble.submit"))
