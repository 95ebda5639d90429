"""python -m pipelines.demo: the whole pipeline on real clips the package ships, in minutes on a
laptop.

    clips -> untrimmed videos -> features -> TSN, HG-NL, TXB -> scores -> ensemble -> submission
                                     an ablation of HG-NL's groups against TSN -> a page to look at

The videos are joined of the shipped clips (pipelines/untrimmed.py): a second of action among other
scenes, so that there is something for attention to find. The backbone is the pretrained
EfficientNet-Lite0 of its pip package. What is done is not done again, so a second run takes
seconds.
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from extract.cli import run_command
from pipelines.steps import fuse, step

FRAMES = 16  # of 64, and all are trained on: the action has two of them
VAL_COPIES = 2
MODELS = ("tsn", "hgnl", "txb")
# top-1 % on test: runs in bf16 and fp32, and one video (2.8 points) more on both sides
EXPECTED = {"tsn": (36, 42), "hgnl": (52, 59), "txb": (47, 53)}


@dataclass(frozen=True)
class Options:
    """The whole pipeline on videos joined of the real clips that come with the package."""

    workdir: Path = Path("runs/demo")
    """Where everything goes; run again to resume."""


def main(options: Options) -> int:
    started = time.perf_counter()
    work = options.workdir
    videos, store, page = work / "untrimmed", str(work / "untrimmed.zarr"), work / "report.html"
    clips: dict[str, Any] = {"videos": videos / "labels.csv", "root": videos / "clips"}
    if not clips["videos"].exists():  # written last
        # Models and members are chosen on validation, so it has more videos than the test.
        step("pipelines.untrimmed", out=videos, val_copies=VAL_COPIES)
    step("extract.__main__", **clips, out=store, backbone="tf_efficientnet_lite0", frames=FRAMES)
    for name in MODELS:
        step("aggregate.train", agg=name, features=store, out=work / name, frames=FRAMES)
    groups = {"g1": (4, 16), "g2": (2, 4, 8)}
    step(
        "aggregate.ablate",
        agg=("tsn", "hgnl"),
        features=store,
        out=work / "ablation",
        frames=(FRAMES,),
        **groups,
    )
    models, segments = {name: {"features": store} for name in MODELS}, (3, FRAMES)
    weights = fuse(work, models, "val", weights="select", segments=segments)
    fuse(
        work,
        models,
        "test",
        weights=weights,
        segments=segments,
        submission=work / "submission.json",
    )
    step("pipelines.report.__main__", rundir=work, out=page, videos=(clips["root"],))
    records = [
        json.loads((work / f"fused_{split}.json").read_text(encoding="utf-8"))
        for split in ("val", "test")
    ]
    print(compared_with_expected(records[1]))
    print(story_of_ensemble(*records))
    print(
        f"\nThe whole pipeline took {time.perf_counter() - started:.0f} s. Look at {page} in a browser."
    )
    return 0


def compared_with_expected(record: dict[str, Any]) -> str:
    """What the models got on the test videos, beside EXPECTED."""
    got = {
        row["name"].removesuffix("_test"): 100 * row["summary"]["top1"]["value"]
        for row in record["table"]
    }
    lines = [
        f"  {name:5} {got[name]:5.1f}   expected {low} to {high}"
        for name, (low, high) in EXPECTED.items()
    ]
    note = "CPUs, precisions and engines differ in the last bits of features, and a test video is 2.8 points."
    return "\n".join(["\ntop-1 % on the 36 test videos:", *lines, note])


def story_of_ensemble(val: dict[str, Any], test: dict[str, Any]) -> str:
    """Which members validation chose and why, and what that gives on test. Nothing was chosen there."""
    names = [name.removesuffix("_val") for name in val["models"]]
    members = [name for name, weight in zip(names, val["weights"], strict=True) if weight]
    top1 = {row["name"]: 100 * row["summary"]["top1"]["value"] for row in test["table"]}
    lines = [
        f"\nensemble of {', '.join(members)}, chosen on {val['videos']['labelled']} validation videos:"
    ]
    for member in val["left_out"]:
        lines.append(
            f"  {member['name'].removesuffix('_val')} is left out: validation error "
            f"{100 * member['error_without']:.1f} % without it, {100 * member['error_with']:.1f} % with it"
        )
    if not val["left_out"]:
        lines.append("  no member is left out: without any of them the validation error rises")
    fused, equal = top1["all, given weights"], top1["all, equal weights"]
    lines.append(
        f"  top-1 {fused:.1f} % on test; all of {', '.join(names)} with equal weights: {equal:.1f}"
    )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m pipelines.demo"))
