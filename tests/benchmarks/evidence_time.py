"""Which heads see the order of frames, and what fine-tuning adds.

The tables are in LOG.md, "Which heads see the order of frames" and "End to end on real clips".

    python tests/benchmarks/evidence_time.py --work runs/evidence_time [--only order finetune]

order: videos rendered from real pictures. The two classes of a task hold the same frames in
opposite order, to the bit: every frame is coded by itself, and the middles of four segments of five
frames are the same from either end. `pan` moves over a panorama made of a picture of daily_actions
and one of exercise_mini, in one direction or the other. `zoom` moves into a picture or out of it.
Test pictures are not training pictures. A flip keeps the class of both.

finetune: EfficientNet-Lite0 trained end to end against the same backbone frozen, on the shipped
clips.
"""

import argparse
import os
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import av
import numpy as np
from PIL import Image

from aggregate import evaluate, finetune, train
from aggregate.metrics import summarize
from aggregate.scores import Scores
from extract.__main__ import Options as ExtractOptions
from extract.__main__ import main as extract
from extract.decode import decode
from extract.sampling import segment_centers

ROOT = Path(__file__).parents[2]
CLIPS = ROOT / "pipelines" / "clips"
SIZE, FRAMES = 192, 20
PICTURES = {"train": 64, "val": 40}


def pictures(name: str) -> list[np.ndarray]:
    """Some frames of every clip of a set, square, `SIZE` high; those of one clip follow each
    other."""
    found = []
    for path in sorted((CLIPS / name / "clips").rglob("*.mp4")):
        for frame in decode(path, lambda count: segment_centers(count, 6)).frames:
            height, width = frame.shape[:2]
            side = min(height, width)
            top, left = (height - side) // 2, (width - side) // 2
            square = Image.fromarray(frame[top : top + side, left : left + side])
            found.append(np.asarray(square.resize((SIZE, SIZE))))
    return found


def write(path: Path, frames: list[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=8, options={"qp": "16", "g": "1"})
        stream.width, stream.height, stream.pix_fmt = SIZE, SIZE, "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame))))
        container.mux(stream.encode(None))


def pan(first: np.ndarray, second: np.ndarray) -> list[np.ndarray]:
    wide = np.concatenate([first, second], axis=1)
    return [wide[:, left : left + SIZE] for left in np.linspace(0, SIZE, FRAMES).astype(int)]


def zoom(picture: np.ndarray) -> list[np.ndarray]:
    frames = []
    for side in np.linspace(SIZE, SIZE * 0.4, FRAMES).astype(int):
        edge = (SIZE - side) // 2
        part = Image.fromarray(picture[edge : edge + side, edge : edge + side])
        frames.append(np.asarray(part.resize((SIZE, SIZE))))
    return frames


def render(task: str, folder: Path) -> None:
    """Write `<folder>/<split>/<class>/<number>.mp4`; each scene is in both classes, once in each
    order."""
    if folder.exists():
        return
    rng = np.random.default_rng(0)
    ours, others = pictures("exercise_mini"), pictures("daily_actions")
    # Train and test share no clip, not only no picture: the first four fifths train, the rest test.
    parts = {"train": slice(0, 0.8), "val": slice(0.8, 1.0)}
    for split, count in PICTURES.items():
        low, high = parts[split].start, parts[split].stop
        mine = ours[int(low * len(ours)) : int(high * len(ours))]
        theirs = others[int(low * len(others)) : int(high * len(others))]
        for number in range(count):
            one = mine[rng.integers(len(mine))]
            frames = pan(theirs[rng.integers(len(theirs))], one) if task == "pan" else zoom(one)
            names = ("pan there", "pan back") if task == "pan" else ("zoom in", "zoom out")
            write(folder / split / names[0] / f"{number:03d}.mp4", frames)
            write(folder / split / names[1] / f"{number:03d}.mp4", frames[::-1])


def top1(path: Path) -> str:
    scores = Scores.load(path)
    return f"{summarize(scores.logits, scores.labels).top1}"


def order(work: Path) -> None:
    rows = []
    for task in ("pan", "zoom"):
        render(task, work / task)
        store = str(work / f"{task}.zarr")
        extract(ExtractOptions(work / task, store, backbone="tf_efficientnet_lite0", frames=4))
        for agg in ("tsn", "hgnl", "txb"):
            out = work / f"{task}_{agg}"
            train.main(train.Options(agg=agg, features=store, out=out, frames=4, epochs=30))
            evaluate.main(
                evaluate.Options(
                    out / "best.pt", store, segments=(4,), out=work / f"{task}_{agg}.h5"
                )
            )
            rows.append(
                (task, f"{agg}, cached EfficientNet-Lite0", top1(work / f"{task}_{agg}.h5"))
            )
        for model in ("tsn", "stnet"):
            out = work / f"{task}_e2e_{model}"
            finetune.main(
                finetune.Options(
                    model=model,
                    videos=work / task,
                    out=out,
                    backbone="test_resnet",
                    weights="random",
                    frames=4,
                    epochs=12,
                    batch_size=16,
                    lr=0.02,
                    dropout=0.0,
                    train_batch_norm=True,
                    micro_batch=16,
                    g1=4,
                    g2=2,
                )
            )
            asked = evaluate.Options(
                out / "best.pt",
                videos=work / task,
                segments=(4,),
                out=work / f"{task}_e2e_{model}.h5",
            )
            evaluate.main(asked)
            rows.append(
                (
                    task,
                    f"{model}, end to end, small ResNet from random",
                    top1(work / f"{task}_e2e_{model}.h5"),
                )
            )
    print(
        "\n### Who sees the order of frames\n\n| task | model | top-1 % of held-out pictures |\n|---|---|---|"
    )
    for row in rows:
        print(f"| {' | '.join(row)} |")


def tuned(work: Path) -> None:
    print(
        "\n### Fine-tuning against the frozen cache\n\n| set | model | top-1 % at 3 segments |\n|---|---|---|",
        flush=True,
    )
    folds = [("exercise_mini", ())] + [
        ("daily_actions", (subject,)) for subject in ("1", "2", "3", "4")
    ]
    parts: dict[tuple[str, str], list[Scores]] = {}
    for name, groups in folds:
        source = {"videos": CLIPS / name / "labels.csv", "root": CLIPS / name / "clips"}
        store = str(work / f"{name}.zarr")
        shared = {"backbone": "tf_efficientnet_lite0", "weights": "pretrained"}
        extract(ExtractOptions(**source, **shared, out=store, frames=16, augment_passes=1))
        tag = f"{name}_{'_'.join(groups)}"
        splits = {"val_groups": groups, "allow_missing_classes": True}
        train.main(train.Options(agg="tsn", features=store, out=work / f"{tag}_cached", **splits))
        init = work / f"{tag}_cached" / "best.pt"
        out = work / f"{tag}_tuned"
        finetune.main(
            finetune.Options(
                model="tsn",
                **source,
                **shared,
                out=out,
                init=init,
                epochs=6,
                batch_size=16,
                lr=0.002,
                backbone_lr=0.2,
                micro_batch=16,
                **splits,
            )
        )
        parts.setdefault((name, "fine-tuned from it"), []).append(
            _scores(out / "best.pt", source, groups, work)
        )
        parts.setdefault((name, "frozen, cached"), []).append(_cached(init, store, groups, work))
    print(
        "\n### Fine-tuning against the frozen cache\n\n| set | model | top-1 % at 3 segments |\n|---|---|---|"
    )
    for (name, model), several in sorted(parts.items()):
        logits = np.concatenate([scores.logits for scores in several])
        labels = np.concatenate([scores.labels for scores in several])
        print(f"| {name} | {model} | {summarize(logits, labels).top1} |")


def _only(scores: Scores, source: dict, groups: tuple[str, ...]) -> Scores:
    """The rows of the held-out subjects, or all of them."""
    from extract.listing.videos import list_videos

    held = {
        video.id
        for video in list_videos(source["videos"], root=source["root"]).videos
        if video.group in groups
    }
    rows = [row for row, name in enumerate(scores.ids) if name in held or not groups]
    return Scores(
        [scores.ids[row] for row in rows], scores.classes, scores.logits[rows], scores.labels[rows]
    )


def _scores(checkpoint: Path, source: dict, groups: tuple[str, ...], work: Path) -> Scores:
    split = "all" if groups else "val"
    evaluate.main(
        evaluate.Options(checkpoint, **source, split=split, segments=(3,), out=work / "one.h5")
    )
    return _only(Scores.load(work / "one.h5"), source, groups)


def _cached(checkpoint: Path, store: str, groups: tuple[str, ...], work: Path) -> Scores:
    split = "all" if groups else "val"
    evaluate.main(
        evaluate.Options(checkpoint, store, split=split, segments=(3,), out=work / "one.h5")
    )
    name = Path(store).stem
    source = {"videos": CLIPS / name / "labels.csv", "root": CLIPS / name / "clips"}
    return _only(Scores.load(work / "one.h5"), source, groups)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=Path("runs/evidence_time"))
    parser.add_argument("--only", nargs="*", default=["order", "finetune"])
    chosen = parser.parse_args()
    chosen.work.mkdir(parents=True, exist_ok=True)
    if "order" in chosen.only:
        order(chosen.work)
    if "finetune" in chosen.only:
        tuned(chosen.work)


if __name__ == "__main__":
    main()
