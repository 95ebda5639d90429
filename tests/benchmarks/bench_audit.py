"""Copies and wrong labels planted among real clips: which of them `aggregate.audit` lists.

The clips are the 187 of daily_actions and exercise_mini. For each kind, every twelfth clip gets a
copy: re-encoded at 0.7 of the size and crf 34, cropped to 0.9, mirrored, or cropped, mirrored and
brighter. Features come from the pretrained EfficientNet-Lite0.

Recall is over the planted copies of a kind. Precision counts the planted pairs as right. Pairs of
one exercise or one recording are near-duplicates that were not planted, and are counted separately.

For labels, one in twelve of exercise_mini is exchanged for another class. Scores are those of
`aggregate.crossval --agg logreg` on the exchanged labels.

Run: `python -m pytest -s tests/benchmarks/bench_audit.py`
"""

import json
import re
import subprocess
from pathlib import Path

import numpy as np

from aggregate import audit, crossval
from extract.__main__ import Options as ExtractOptions
from extract.__main__ import main as extract
from extract.store import FeatureStore

CLIPS = Path(__file__).parents[2] / "pipelines" / "clips"
EVERY = 12
KINDS = {
    "re-encoded": ("scale=trunc(iw*0.35)*2:trunc(ih*0.35)*2", 34),
    "cropped": ("crop=trunc(iw*0.45)*2:trunc(ih*0.45)*2", 23),
    "mirrored": ("hflip", 23),
    "all three": ("crop=trunc(iw*0.45)*2:trunc(ih*0.45)*2,hflip,eq=brightness=0.08", 23),
}
TRUE = {"backbone": "tf_efficientnet_lite0", "weights": "pretrained", "frames": 8}


def recording(name: str) -> str:
    """The recording (daily_actions) or exercise (exercise_mini) of a clip."""
    found = re.search(r"s\d_(ADL|Fall)_\d+", name)
    return found[0] if found else Path(name).stem.split("__")[0]


def plant(folder: Path) -> dict[str, str]:
    """Make `folder/originals` with all clips and `folder/KIND` with copies; returns the original of
    each copy."""
    originals = {}
    paths = sorted(CLIPS.glob("*/clips/*/*.mp4"))
    for path in paths:
        out = folder / "originals" / path.parts[-4] / path.parent.name / path.name
        out.parent.mkdir(parents=True, exist_ok=True)
        out.symlink_to(path)
    for place, (kind, (filters, crf)) in enumerate(KINDS.items()):
        for path in paths[place * EVERY // len(KINDS) :: EVERY]:
            out = folder / kind.replace(" ", "_") / path.parent.name / path.name
            out.parent.mkdir(parents=True, exist_ok=True)
            encode = ["-vf", filters, "-c:v", "libx264", "-crf", str(crf), "-an", str(out)]
            subprocess.run(["ffmpeg", "-loglevel", "error", "-i", str(path), *encode], check=True)
            original = folder / "originals" / path.parts[-4] / path.parent.name / path.name
            originals[out.relative_to(folder).as_posix()] = original.relative_to(folder).as_posix()
    return originals


def test_planted_copies(tmp_path):
    originals = plant(tmp_path / "videos")
    store = str(tmp_path / "all.zarr")
    assert extract(ExtractOptions(tmp_path / "videos", store, **TRUE)) == 0
    audit.main(audit.Options(store, out=tmp_path / "audit"))
    lines = json.loads((tmp_path / "audit" / "audit.json").read_text())["duplicates"]
    listed = {frozenset((line["id_a"], line["id_b"])) for line in lines}
    planted = {frozenset(pair) for pair in originals.items()}
    print("\n| copies | planted | found | recall |\n|---|---|---|---|")
    for kind in KINDS:
        pairs = {
            frozenset(pair)
            for pair in originals.items()
            if pair[0].startswith(kind.replace(" ", "_") + "/")
        }
        hits = len(pairs & listed)
        print(f"| {kind} | {len(pairs)} | {hits} | {hits / len(pairs):.2f} |")
    alike = [pair for pair in listed - planted if len({recording(name) for name in pair}) == 1]
    found = len(planted & listed)
    print(
        f"{len(listed)} pairs listed: {found} planted, {len(alike)} of one recording, "
        f"precision {found / len(listed):.2f}, with those {(found + len(alike)) / len(listed):.2f}"
    )
    assert found / len(planted) > 0.4


def test_planted_wrong_labels(tmp_path):
    truth = str(tmp_path / "true.zarr")
    clips = CLIPS / "exercise_mini"
    assert extract(ExtractOptions(clips / "labels.csv", truth, root=clips / "clips", **TRUE)) == 0
    store = FeatureStore.open(truth)
    rng = np.random.default_rng(0)
    wrong = rng.choice(len(store), len(store) // EVERY, replace=False)
    labels = store.labels.copy()
    classes = len(store.classes)
    labels[wrong] = (labels[wrong] + rng.integers(1, classes, len(wrong))) % classes
    exchanged = str(tmp_path / "wrong.zarr")
    FeatureStore.from_arrays(
        exchanged,
        store.read(slice(None))[:, 0],
        lengths=np.full(len(store), store.frames_per_video),
        labels=labels,
        classes=store.classes,
        ids=store.ids.tolist(),
    )
    crossval.main(
        crossval.Options(agg=("logreg",), features=exchanged, seeds=(0,), out=tmp_path / "cv")
    )
    audit.main(audit.Options(exchanged, tmp_path / "cv" / "logreg.h5", out=tmp_path / "audit"))
    lines = json.loads((tmp_path / "audit" / "audit.json").read_text())["labels"]
    listed, planted = {line["id"] for line in lines}, set(store.ids[wrong].tolist())
    hits = planted & listed
    mended = sum(
        store.classes[store.labels[store.ids == line["id"]][0]] == line["suggested"]
        for line in lines
        if line["id"] in planted
    )
    print(
        f"\n{len(planted)} of {len(store)} labels are wrong: {len(lines)} listed, recall "
        f"{len(hits) / len(planted):.2f}, precision {len(hits) / max(len(listed), 1):.2f}, "
        f"the true class suggested for {mended} of {len(hits)}"
    )
    assert len(hits) > len(planted) / 2
