"""python -m pipelines.demo: the whole road on real clips the package ships, in minutes on a laptop.

    clips -> untrimmed videos -> features -> TSN, HG-NL, TXB -> scores -> ensemble -> submission
                                     an ablation of HG-NL's groups against TSN -> a page to look at

The videos are joined of the shipped clips (pipelines/untrimmed.py): a second of action among other scenes, so that
there is something for attention to find. The backbone is the pretrained EfficientNet-Lite0 of its pip package. What is
done is not done again, so a second run takes seconds.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extract.cli import RunError, run_command

FRAMES = 16  # of 64, and all are trained on: the action has two of them
MODELS = ("tsn", "hgnl", "txb")


@dataclass(frozen=True)
class Options:
    """The whole road on videos joined of the real clips that come with the package."""

    workdir: Path = Path("runs/demo")
    """Where everything goes; run again to resume."""


def main(options: Options) -> int:
    import pipelines.report.__main__ as report
    from pipelines import untrimmed

    started = time.perf_counter()
    videos, page = options.workdir / "untrimmed", options.workdir / "report.html"
    store = str(options.workdir / "untrimmed.zarr")
    if not (videos / "labels.csv").exists():  # written last
        _step("untrimmed videos, joined of the shipped clips", untrimmed.main, untrimmed.Options(videos))
    _extract(videos, store)
    for name in MODELS:
        _train(name, store, options.workdir)
    _ablate(store, options.workdir)
    for split, weights in (("val", "search"), ("test", "equal")):
        _ensemble(store, options.workdir, split, weights)
    shown = report.Options(options.workdir, out=page, videos=(videos / "clips",))
    _step("a page to look at", report.main, shown)
    print(f"\nThe whole road took {time.perf_counter() - started:.0f} s. Look at {page} in a browser.")
    return 0


def _step(what: str, command: Callable[[Any], int | None], options: Any) -> None:
    print(f"\n== {what} ==", flush=True)
    if status := command(options):
        raise RunError(f"the demo ends here: {what}: exit status {status}; what it said stands above")


def _extract(videos: Path, store: str) -> None:
    from extract.__main__ import Options, main

    chosen = Options(
        videos / "labels.csv", store, root=videos / "clips", backbone="tf_efficientnet_lite0", frames=FRAMES
    )
    _step("frame features", main, chosen)


def _train(name: str, store: str, workdir: Path) -> None:
    from aggregate import train

    asked = train.Options(agg=name, features=store, out=workdir / name, frames=FRAMES)  # type: ignore[arg-type]
    _step(f"{name} on cached features", train.main, asked)


def _ablate(store: str, workdir: Path) -> None:
    from aggregate import ablate

    lists: dict[str, Any] = {"agg": ("tsn", "hgnl"), "g1": (4, 16), "g2": (2, 4, 8), "frames": (FRAMES,)}
    grid = ablate.Options(features=store, out=workdir / "ablation", **lists)
    _step("a small ablation of g1 and g2, against TSN", ablate.main, grid)


def _ensemble(store: str, workdir: Path, split: str, weights: str) -> None:
    import ensemble.__main__ as fusion
    from aggregate import evaluate

    files = [workdir / "scores" / f"{name}_{split}.h5" for name in MODELS]
    for name, file in zip(MODELS, files, strict=True):
        asked = evaluate.Options(workdir / name / "best.pt", store, split=split, segments=(3, FRAMES), out=file)
        _step(f"the {split} split's scores of {name}", evaluate.main, asked)
    submission = workdir / "submission.json" if split == "test" else None
    fused = fusion.Options(
        scores=tuple(files), out=workdir / f"fused_{split}.h5", weights=weights, submission=submission
    )
    _step(f"split {split}, fused with weights: {weights}", fusion.main, fused)


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m pipelines.demo"))
