"""python -m ensemble.submit: check a submission to the challenge before it is sent, or grade it
against the true labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ensemble.submission import check_submission, write_submission
from extract import InputError
from extract.cli import run_as_script
from extract.listing.labels import choose_labels

# numpy is imported in functions, so that --help answers at once.

__all__ = ["check_submission", "write_submission"]


@dataclass(frozen=True)
class Options:
    """Check a submission before it is sent (--check), or grade it (--grade SUBMISSION --truth
    FILE)."""

    check: Path | None = None
    """The submission to check. Prints how many videos passed, or the first bad entry (exit status
    2)."""
    grade: Path | None = None
    """The submission to grade by the challenge's rules."""
    labels: str = "kinetics700"
    """For --check: kinetics700, a file with one label per line, or a scores file with the
    classes."""
    ids: Path | None = None
    """For --check: the videos that must be in the submission: a file with one per line, a Kinetics
    CSV or JSON, or a scores file."""
    truth: Path | None = None
    """For --grade: the Kinetics CSV, or the challenge's JSON."""
    split: str = ""
    """The split of --truth or --ids that counts, if there are several."""


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
        result = check_submission(options.check, _classes(options.labels), ids)
        print(f"{options.check} passes: {result}")
        if ids is None:
            print("missing videos were not checked; --ids FILE lists the expected videos")
    elif options.grade is not None:
        if options.truth is None:
            raise InputError("--grade needs --truth FILE, the Kinetics CSV or the challenge's JSON")
        print(grade_submission(options.grade, read_truth(options.truth, options.split)))
    return 0


def _classes(labels: str) -> Sequence[str]:
    from aggregate.scores import Scores
    from ensemble.foreign import is_scores_file

    if is_scores_file(labels):
        return Scores.load(labels).classes
    if labels == "auto":
        raise InputError(
            "--labels auto: a submission is checked against a list; give kinetics700 or a FILE"
        )
    return choose_labels((), labels)[0]


if __name__ == "__main__":
    run_as_script()
