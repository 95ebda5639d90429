"""python -m pipelines.demo: the whole road on the real clips the package ships, in minutes on a laptop.

Extracts features of daily_actions and exercise_mini with the pretrained EfficientNet-Lite0 of its pip package. A second
run resumes in seconds.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from extract.cli import run_command

CLIPS = Path(__file__).parent / "clips"
BACKBONE = "tf_efficientnet_lite0"


@dataclass(frozen=True)
class Options:
    """The whole road on the real clips that come with the package."""

    workdir: Path = Path("runs/demo")
    """Where everything goes; run again to resume."""


def main(options: Options) -> int:
    from extract.__main__ import Options as ExtractOptions
    from extract.__main__ import main as extract

    options.workdir.mkdir(parents=True, exist_ok=True)
    for name in ("daily_actions", "exercise_mini"):
        print(f"\n== {name}: features ==", flush=True)
        folder = CLIPS / name
        status = extract(
            ExtractOptions(
                videos=folder / "labels.csv",
                root=folder / "clips",
                out=str(options.workdir / f"{name}.zarr"),
                backbone=BACKBONE,
                weights="pretrained",
                augment_passes=4,
            )
        )
        if status:
            return status
    return 0


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m pipelines.demo"))
