"""python -m ensemble: several models' scores in; fused scores, a table of who adds what, and a
submission out."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ensemble.entries import submission_ids
from ensemble.submit import PRETRAINED, check_submission, write_submission
from extract import InputError
from extract.cli import run_command
from extract.commands import command_line
from extract.durable import replace_file

# numpy and scipy are imported in functions, so that --help answers at once.
if TYPE_CHECKING:
    from aggregate.scores import Scores
    from ensemble.align import Aligned
    from ensemble.search import Found, Row

SCHEMA = "hgnl-ensemble/1"
CHOSEN_BY = ("equal", "select", "search")  # other weights are numbers


@dataclass(frozen=True)
class Options:
    """Fuse the scores of several models, joined by video id; with labels, say what each of them
    adds.

    Beside --out stands a summary of the same name with .json: the weights, the table, the
    cross-validated figures.
    """

    scores: tuple[Path, ...]
    """Scores files of the same videos and classes: evaluate's .h5, or .npz, .npy, .csv, .pkl of
    other tools."""
    out: Path
    """The fused scores file; the softmax of its logits is the fused probabilities."""
    weights: str = "equal"
    """equal, select (leave out members that do not help on these labeled videos), search (on
    labeled videos, judged on held-out folds), or one number a model: 0.5,0.3,0.2"""
    submission: Path | None = None
    """Write a submission to the challenge too, and check it."""
    missing: Literal["error", "drop", "worst"] = "error"
    """What to do with videos that one model lacks: stop, leave them out, or count them as wrong."""
    classes: str = ""
    """Of scores made elsewhere that do not name their classes: kinetics700 or a file of lines, as
    the columns are."""
    segments: int | None = None
    """Which scores of each file (default: those of the most segments)."""
    seed: int = 0
    """Of the five folds on which --weights search is judged."""
    external_data: str = PRETRAINED
    """What the submission says that the models have seen besides ("" is nothing)."""


def main(options: Options) -> int:
    from ensemble.align import align
    from ensemble.foreign import load_scores
    from ensemble.fuse import checked_weights, fuse_aligned
    from ensemble.search import Dropped, Ranking, Row, search, select, table

    summary_path = _checked_paths(options)
    given = None if options.weights in CHOSEN_BY else _numbers(options.weights)
    # A wrong number of them is known before a gigabyte is read.
    weights = checked_weights(given, len(options.scores))
    names = _names(options.scores)
    loaded = [
        load_scores(path, segments=options.segments, classes=options.classes)
        for path in options.scores
    ]
    aligned = align(loaded, missing=options.missing, names=names)
    del loaded
    print(aligned.report())
    if options.submission is not None:
        submission_ids(aligned.ids)  # what cannot be submitted is said before the work

    found: Found | None = None
    rows: list[Row] = []
    dropped: tuple[Dropped, ...] = ()
    if options.weights in ("select", "search") or (aligned.labels >= 0).any():
        ranking = Ranking.of(aligned)
        if options.weights == "select":
            selected, dropped = select(ranking)
            weights = checked_weights(selected, len(names))
        chosen = None if options.weights in ("equal", "search") else weights.tolist()
        rows = table(ranking, chosen)
        if options.weights == "search":
            found = search(ranking, seed=options.seed)
            measured = found.weights, found.summary, found.against_equal
            rows.append(Row("all, searched, held out", *measured))
            weights = checked_weights(found.weights, len(names))
        del ranking
        print(_table(rows))
    else:
        print("no video has a label: there is no figure to show")
    if found is not None:
        print(f"{found.statement()}\n{found.advice(names)}")
    for member in dropped:
        print(member.statement())
    used = ", ".join(f"{name} {weight:.4g}" for name, weight in zip(names, weights, strict=True))
    print(f"fused with the weights {used}")

    fused = fuse_aligned(aligned, weights)
    fused.save(options.out)
    print(f"{options.out}: {len(fused):,} videos, {int(fused.failed.sum()):,} without scores")
    record = _record(options, aligned, weights.tolist(), rows, found)
    if options.weights == "select":
        record["left_out"] = [asdict(member) for member in dropped]
    if options.submission is not None:
        record["submission"] = _submit(fused, options, aligned.dropped)
    replace_file(summary_path, json.dumps(record, indent=1, ensure_ascii=False))
    print(f"{summary_path}: weights, table and figures")
    folder = options.out.parent
    print(f"Next: {command_line('pipelines.report', folder, out=folder / 'report.html')}")
    return 0


def _submit(fused: "Scores", options: Options, left_out: int) -> dict[str, Any]:
    """Write the submission and check it; its entry in the summary."""
    assert options.submission is not None
    neutral = write_submission(fused, options.submission, external_data=options.external_data)
    checked = check_submission(options.submission, fused.classes, fused.ids)
    print(f"{options.submission} passes the check: {checked}")
    if left_out:
        print(
            f"it lacks the {left_out:,} videos that were left out; the challenge counts them as wrong"
        )
    return {"path": str(options.submission), "videos": checked.videos, "neutral": neutral}


def _checked_paths(options: Options) -> Path:
    """Where the summary goes; InputError where one file would be written over another."""
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


def _numbers(text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")]
    except ValueError:
        raise InputError(
            f"--weights {text}: known are {', '.join(CHOSEN_BY)}, or a number a model as in 0.5,0.3,0.2"
        ) from None


def _names(paths: Sequence[Path]) -> list[str]:
    """Short names of models: the files', with their folders where those are alike."""
    stems = [path.stem for path in paths]
    return stems if len(set(stems)) == len(stems) else [str(path.with_suffix("")) for path in paths]


def _table(rows: "Sequence[Row]") -> str:
    from aggregate.metrics import Summary
    from ensemble.search import signed

    width = max(len(row.name) for row in rows)
    lines = [f"{'':<{width}} {'error against equal':>22} {Summary.header()}"]
    lines += [f"{row.name:<{width}} {signed(row.against_equal):>22} {row.summary}" for row in rows]
    return "\n".join([*lines, f"intervals: 95 %, bootstrap over {rows[0].summary.resampled()}"])


def _record(
    options: Options,
    aligned: "Aligned",
    weights: list[float],
    rows: "Sequence[Row]",
    found: "Found | None",
) -> dict[str, Any]:
    """The summary beside the fused scores; figures are fractions, intervals have value, low,
    high."""
    videos = {"joined": len(aligned.ids), "labelled": int((aligned.labels >= 0).sum())}
    return {
        "schema": SCHEMA,
        "scores": [str(path) for path in options.scores],
        "models": list(aligned.names),
        "weights": weights,
        "weights_from": options.weights if options.weights in CHOSEN_BY else "given",
        "videos": videos
        | {
            "missing": options.missing,
            "dropped": aligned.dropped,
            **aligned.counts.to_dict("list"),
        },
        "table": [asdict(row) for row in rows],
        **({"search": found.record()} if found else {}),
    }


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m ensemble"))
