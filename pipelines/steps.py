"""Steps that recipes are made of: commands as `python -m` runs them, and the models of a folder fused."""

import importlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from extract.cli import RunError
from extract.commands import command_line


def step(module: str, **options: Any) -> None:
    """One command of a recipe. RunError where it does not end well."""
    command = importlib.import_module(module)
    name = module.removesuffix(".__main__")
    print(f"\n== {name} {options.get('out', '')} ==", flush=True)
    if status := command.main(command.Options(**options)):
        raise RunError(f"the recipe ends here: {command_line(name)} gave exit status {status}; its message is above")


def fuse(
    work: Path,
    models: Mapping[str, dict[str, Any]],
    split: str,
    *,
    weights: str,
    segments: tuple[int, ...],
    submission: Path | None = None,
) -> str:
    """Fuse the models, each with the options that say on what it is tested, on a split; the weights that were used.

    Their scores are made where there are none, or where they are older than the model.
    """
    scores = [scores_file(work, name, split) for name in models]
    for (name, source), out in zip(models.items(), scores, strict=True):
        checkpoint = work / name / "best.pt"
        if not out.exists() or out.stat().st_mtime <= checkpoint.stat().st_mtime:
            step("aggregate.evaluate", checkpoint=checkpoint, split=split, segments=segments, out=out, **source)
    out = work / f"fused_{split}.h5"
    step("ensemble.__main__", scores=tuple(scores), out=out, weights=weights, submission=submission)
    return ",".join(map(repr, json.loads(out.with_suffix(".json").read_text(encoding="utf-8"))["weights"]))


def scores_file(work: Path, model: str, split: str) -> Path:
    return work / "scores" / f"{model}_{split}.h5"
