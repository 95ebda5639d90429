"""Steps that recipes are made of: commands as `python -m` runs them, and the models of a folder
fused."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from extract import InputError, RunError
from extract.commands import command_line


def step(module: str, **options: Any) -> None:
    """One command of a recipe. RunError where it does not end well."""
    command = importlib.import_module(module)
    name = module.removesuffix(".__main__")
    print(f"\n== {name} {options.get('out', '')} ==", flush=True)
    if status := command.main(command.Options(**options)):
        raise RunError(
            f"the recipe ends here: {command_line(name)} gave exit status {status}; its message is above"
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
    """Fuse the models, each with the options that say on what it is tested, on a split; the weights
    that it supports.

    Those are the searched ones only if they beat equal ones on held-out folds. The scores of a
    model are made if there are none, or if they were made of something else than its checkpoint and
    videos are now.
    """
    scores = [scores_file(work, name, split) for name in models]
    for (name, source), out in zip(models.items(), scores, strict=True):
        wanted = {
            "checkpoint": work / name / "best.pt",
            "split": split,
            "segments": segments,
            "out": out,
            **source,
        }
        if not scores_are_of(wanted):
            step("aggregate.evaluate", **wanted)
    out = work / f"fused_{split}.h5"
    step("ensemble.__main__", scores=tuple(scores), out=out, weights=weights, submission=submission)
    record = json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))
    if "search" in record and not record["search"]["beats_equal"]:
        return "equal"
    return ",".join(map(repr, record["weights"]))


def scores_are_of(options: Mapping[str, Any]) -> bool:
    """Whether a scores file holds what `aggregate.evaluate` would make of these options now."""
    from aggregate.evaluate import Options, inputs_now
    from aggregate.scores import Scores

    wanted, out = Options(**options), options["out"]
    if not out.exists():
        return False
    try:
        recorded = Scores.load(out).source.get("inputs")
    except InputError as error:  # damaged: it is made again
        print(f"{out}: {error}")
        return False
    if recorded == inputs_now(wanted):
        return True
    print(
        f"{out} was made of another checkpoint, or of other videos or labels, than there are now; it is made again"
    )
    return False


def scores_file(work: Path, model: str, split: str) -> Path:
    return work / "scores" / f"{model}_{split}.h5"
