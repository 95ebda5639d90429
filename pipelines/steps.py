"""Steps of recipes: run a command as `python -m` runs it, and fuse the models of a folder."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from extract import InputError, RunError
from extract.commands import command_line
from extract.durable import read_record


def run_command_step(module: str, **options: Any) -> None:
    """Run one command of a recipe. RunError if it fails."""
    command = importlib.import_module(module)
    name = module.removesuffix(".__main__")
    print(f"\n== {name} {options.get('out', '')} ==", flush=True)
    if status := command.main(command.Options(**options)):
        raise RunError(
            f"the recipe ends here: {command_line(name)} gave exit status {status}; "
            "its message is above"
        )


def fuse(
    work: Path,
    models: Mapping[str, dict[str, Any]],
    split: str,
    *,
    weights: str,
    segments: tuple[int, ...],
    submission: Path | None = None,
) -> str:
    """Fuse models on a split.

    The scores of a model are computed if there are none yet, or if its checkpoint or its videos
    have changed since.

    Args:
        models: for each model, the options of `aggregate.evaluate` that name its checkpoint and
            videos.
        weights: as for `ensemble`.

    Returns:
        the weights that this split supports. Searched weights are returned only if they beat equal
        weights on held-out folds.
    """
    scores = []
    for name, source in models.items():
        scores.append(work / "scores" / f"{name}_{split}.h5")
        evaluation = {
            "checkpoint": work / name / "best.pt",
            "split": split,
            "segments": segments,
            "out": scores[-1],
            **source,
        }
        if not scores_are_of(evaluation):
            run_command_step("aggregate.evaluate", **evaluation)
    out = work / f"fused_{split}.h5"
    run_command_step(
        "ensemble.__main__", scores=tuple(scores), out=out, weights=weights, submission=submission
    )
    record = read_record(out.with_suffix(".json"))
    if "search" in record and not record["search"]["beats_equal"]:
        return "equal"
    return ",".join(map(repr, record["weights"]))


def scores_are_of(options: Mapping[str, Any]) -> bool:
    """Whether a scores file holds the scores that `aggregate.evaluate` would compute now with these
    options."""
    from aggregate.evaluate import Options, inputs_now
    from aggregate.scores import Scores

    out = options["out"]
    if not out.exists():
        return False
    try:
        recorded = Scores.load(out).source.get("inputs")
    except InputError as error:  # damaged: it is computed again
        print(f"{out}: {error}")
        return False
    if recorded == inputs_now(Options(**options)):
        return True
    print(
        f"{out} was made of another checkpoint, or of other videos or labels, than there are now; "
        "it is made again"
    )
    return False
