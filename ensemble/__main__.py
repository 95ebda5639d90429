"""python -m ensemble: fuse the scores of several models, and measure what each contributes; also
writes a submission."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ensemble.submission import PRETRAINED, check_submission, submission_ids, write_submission
from extract import InputError, Record
from extract.cli import run_as_script
from extract.commands import command_line
from extract.durable import replace_file

# numpy and scipy are imported in functions, so that --help answers at once.
if TYPE_CHECKING:
    import numpy as np

    from aggregate.scores import Scores
    from ensemble.align import Aligned
    from ensemble.search import Dropped

SCHEMA = "hgnl-ensemble/1"
CHOSEN_BY = ("equal", "select", "search")  # other weights are numbers


@dataclass(frozen=True)
class Options:
    """Fuse the scores of several models, joined by video id; with labels, measure what each of them
    contributes.

    A summary with the extension .json is written next to --out: the weights, the table, and the
    cross-validated measures.
    """

    scores: tuple[Path, ...]
    """Scores files of the same videos and classes: evaluate's .h5, or .npz, .npy, .csv, .pkl of
    other tools."""
    out: Path
    """The fused scores file; the softmax of its logits is the fused probabilities."""
    weights: str = "equal"
    """equal, select (equal weights, without the models that do not help on these labeled videos),
    search (on labeled videos, judged on held-out folds), or one number per model: 0.5,0.3,0.2"""
    submission: Path | None = None
    """Also write a submission to the challenge, and check it."""
    missing: Literal["error", "drop", "worst"] = "error"
    """What to do with videos that one model lacks: stop, leave them out, or count them as wrong."""
    classes: str = ""
    """For scores of other tools that do not name their classes: kinetics700, or a file with one
    class per line, in the order of the columns."""
    segments: int | None = None
    """Which scores of each file to use (default: those of the most segments)."""
    seed: int = 0
    """The seed of the five folds on which --weights search is judged."""
    external_data: str = PRETRAINED
    """Other data that the models have seen, for the submission ("" for none)."""


def main(options: Options) -> int:
    from ensemble.align import align
    from ensemble.foreign import load_scores
    from ensemble.fuse import checked_weights, fuse_aligned

    summary_path = _checked_paths(options)
    # A wrong number of weights is reported before a gigabyte is read.
    weights = checked_weights(_given_weights(options.weights), len(options.scores))
    aligned = align(
        [
            load_scores(path, segments=options.segments, classes=options.classes)
            for path in options.scores
        ],
        missing=options.missing,
        names=_names(options.scores),
    )
    print(aligned.report())
    if options.submission is not None:
        submission_ids(aligned.ids)  # refuses ids that cannot be submitted before the work

    measures: Record = {"table": []}
    if options.weights in ("select", "search") or (aligned.labels >= 0).any():
        weights, measures = _measure(options, aligned, weights)
    else:
        print("no video has a label: there is nothing to measure")
    used = zip(aligned.names, weights, strict=True)
    print(f"fused with the weights {', '.join(f'{name} {weight:.4g}' for name, weight in used)}")

    fused = fuse_aligned(aligned, weights)
    fused.save(options.out)
    print(f"{options.out}: {len(fused):,} videos, {int(fused.failed.sum()):,} without scores")
    record = {
        "schema": SCHEMA,
        "scores": [str(path) for path in options.scores],
        "models": list(aligned.names),
        "weights": weights.tolist(),
        "weights_from": options.weights if options.weights in CHOSEN_BY else "given",
        "videos": {
            "joined": len(aligned.ids),
            "labeled": int((aligned.labels >= 0).sum()),
            "missing": options.missing,
            "dropped": aligned.dropped,
            **aligned.counts.to_dict("list"),
        },
        **measures,
    }
    if options.submission is not None:
        record["submission"] = _submit(fused, options, aligned.dropped)
    replace_file(summary_path, json.dumps(record, indent=1, ensure_ascii=False))
    print(f"{summary_path}: weights, table and measures")
    folder = options.out.parent
    print(f"Next: {command_line('pipelines.report', folder, out=folder / 'report.html')}")
    return 0


def _measure(
    options: Options, aligned: "Aligned", weights: "np.ndarray"
) -> "tuple[np.ndarray, Record]":
    """Choose the weights, if --weights names a method, and measure what each model contributes.

    Prints the measures. Returns the weights, and the measures for the summary: fractions, and
    intervals with value, low and high.
    """
    from aggregate.metrics import summary_table
    from ensemble.fuse import checked_weights
    from ensemble.search import Ranking, Row, contributions, search, select, signed

    ranking = Ranking.of(aligned)
    dropped: tuple[Dropped, ...] = ()
    if options.weights == "select":
        selected, dropped = select(ranking)
        weights = checked_weights(selected, ranking.models)
    rows = contributions(ranking, None if options.weights in ("equal", "search") else weights)
    measures: Record = {}
    notes = [member.statement() for member in dropped]
    if options.weights == "search":
        result = search(ranking, seed=options.seed)
        weights = checked_weights(result.weights, ranking.models)
        measured = result.weights, result.summary, result.against_equal
        rows.append(Row("all, searched, held out", *measured))
        measures["search"] = result.record()
        notes = [result.statement(), result.advice(aligned.names)]
    if options.weights == "select":
        measures["left_out"] = [asdict(member) for member in dropped]
    lines = [([row.name, signed(row.against_equal)], row.summary) for row in rows]
    print("\n".join([summary_table(["", "error against equal"], lines), *notes]))
    return weights, {"table": [asdict(row) for row in rows], **measures}


def _submit(fused: "Scores", options: Options, left_out: int) -> Record:
    """Write the submission and check it; returns its entry in the summary."""
    assert options.submission is not None
    neutral = write_submission(fused, options.submission, external_data=options.external_data)
    checked = check_submission(options.submission, fused.classes, fused.ids)
    print(f"{options.submission} passes the check: {checked}")
    if left_out:
        print(
            f"it lacks the {left_out:,} videos that were left out; "
            "the challenge counts them as wrong"
        )
    return {"path": str(options.submission), "videos": checked.videos, "neutral": neutral}


def _checked_paths(options: Options) -> Path:
    """The path of the summary. InputError if one file would be written over another."""
    summary = options.out.with_suffix(".json")
    taken: dict[Path, str] = {}
    for path in options.scores:
        if path.resolve() in taken:
            raise InputError(f"--scores: {path} is given twice; give its model more weight instead")
        taken[path.resolve()] = "an input"
    for path in filter(None, (options.out, summary, options.submission)):
        if (real := path.resolve()) in taken:
            raise InputError(
                f"{path} would be written over {taken[real]}; the summary goes to {summary}"
            )
        taken[real] = f"another output, {path}"
    return summary


def _given_weights(text: str) -> list[float] | None:
    """The numbers of --weights; None if it names a method."""
    if text in CHOSEN_BY:
        return None
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"--weights {text}: known are {', '.join(CHOSEN_BY)}, "
            "or a number per model as in 0.5,0.3,0.2"
        ) from None


def _names(paths: Sequence[Path]) -> list[str]:
    """Short names of models: the names of their files, with folders if two names are equal."""
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path.with_suffix("")) for path in paths]


if __name__ == "__main__":
    run_as_script()
