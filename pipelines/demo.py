"""python -m pipelines.demo: the whole road on the real clips the package ships, in minutes on a laptop.

    clips -> features -> TSN, HG-NL, TXB -> scores -> ensemble -> submission, a small ablation, and a page to look at

The backbone is the pretrained EfficientNet-Lite0 of its pip package. What is done is not done again, so a second run
takes seconds.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path

from extract.cli import RunError, run_command

CLIPS = Path(__file__).parent / "clips"
BACKBONE = "tf_efficientnet_lite0"
FRAMES = 16  # the clips of exercise_mini have no more
MODELS = ("tsn", "hgnl", "txb")


@dataclass(frozen=True)
class Options:
    """The whole road on the real clips that come with the package."""

    workdir: Path = Path("runs/demo")
    """Where everything goes; run again to resume."""


def main(options: Options) -> int:
    started = time.perf_counter()
    options.workdir.mkdir(parents=True, exist_ok=True)
    features = {name: _extract(name, options.workdir) for name in ("daily_actions", "exercise_mini")}
    store = features["exercise_mini"]
    for name in MODELS:
        _train(name, store, options.workdir)
    _ablate(store, options.workdir)
    _ensemble(store, options.workdir)
    page = _report(options.workdir)
    print(f"\nThe whole road took {time.perf_counter() - started:.0f} s. Look at {page} in a browser.")
    return 0


def _say(what: str) -> None:
    print(f"\n== {what} ==", flush=True)


def _done(status: int | None, what: str) -> None:
    if status:
        raise RunError(f"the demo ends here: {what} gave exit status {status}; what it said stands above")


def _extract(name: str, workdir: Path) -> str:
    from extract.__main__ import Options as ExtractOptions
    from extract.__main__ import main as extract

    _say(f"{name}: frame features")
    out = str(workdir / f"{name}.zarr")
    chosen = ExtractOptions(
        videos=CLIPS / name / "labels.csv",
        root=CLIPS / name / "clips",
        out=out,
        backbone=BACKBONE,
        weights="pretrained",
        frames=FRAMES,
        augment_passes=1,
    )
    _done(extract(chosen), f"extraction of {name}")
    return out


def _train(name: str, store: str, workdir: Path) -> None:
    from aggregate import train

    _say(f"exercise_mini: {name} on cached features")
    # HG-NL starts from the TSN, as in the paper, with the control that the paper lacks.
    more = {"init": workdir / "tsn" / "best.pt", "control": True} if name == "hgnl" else {}
    _done(train.main(train.Options(agg=name, features=store, out=workdir / name, **more)), f"training {name}")  # type: ignore[arg-type]


def _ablate(store: str, workdir: Path) -> None:
    from aggregate import ablate

    _say("a small ablation of g1 and g2")
    grid = ablate.Options(
        agg=("hgnl",), features=store, out=workdir / "ablation", g1=(4, 16), g2=(2, 4, 8), seeds=(0,), epochs=(15,)
    )
    _done(ablate.main(grid), "the ablation")


def _ensemble(store: str, workdir: Path) -> None:
    import ensemble.__main__ as fusion
    from aggregate import evaluate

    for split, weights in (("val", "search"), ("test", "equal")):
        _say(f"scores of split {split}, fused with weights: {weights}")
        files = []
        for name in MODELS:
            files.append(workdir / "scores" / f"{name}_{split}.h5")
            asked = evaluate.Options(
                workdir / name / "best.pt", store, split=split, segments=(3, FRAMES), out=files[-1]
            )
            _done(evaluate.main(asked), f"the test of {name}")
        fused = fusion.Options(
            scores=tuple(files),
            out=workdir / f"fused_{split}.h5",
            weights=weights,
            submission=workdir / "submission.json" if split == "test" else None,
        )
        _done(fusion.main(fused), "the ensemble")


def _report(workdir: Path) -> Path:
    import pipelines.report.__main__ as report

    _say("a page to look at")
    page = workdir / "report.html"
    folders = tuple(CLIPS / name / "clips" for name in ("daily_actions", "exercise_mini"))
    _done(report.main(report.Options(workdir, out=page, videos=folders)), "the report")
    return page


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m pipelines.demo"))
