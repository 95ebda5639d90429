"""What the report shows of the videos: what was extracted, sample frames, the map of features,
attention over time."""

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from PIL import Image, ImageOps

from aggregate import figures
from aggregate.ablation.leaks import mean_features
from aggregate.data.joined import open_features
from aggregate.models import VideoClassifier
from aggregate.training.checkpoint import Checkpoint
from aggregate.training.manifest import rows_of_role
from aggregate.training.options import SplitOptions
from aggregate.training.sources import attention as attention_use
from aggregate.training.sources import attention_text
from aggregate.training.splits import choose_rows
from extract import InputError, RunError
from extract.decode import VideoError, decode
from extract.store import FAILED, PARTIAL, STATUS_NAMES, FeatureStore
from extract.store.summary import human_bytes, reasons
from pipelines.predictor import WEIGHING
from pipelines.report.find import Found, read_json

REASONS = 8
SAMPLES = 16  # videos of which a frame is shown
MAP_VIDEOS = 2000  # more points only hide each other
FILM_CANDIDATES = 512  # videos among which the clips of a film are chosen
ROWS_AT_ONCE = 64


def drawn(rows: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of `rows`, in their order, always the same ones."""
    return np.sort(np.random.default_rng(0).permutation(rows)[:most])


def file_name(store: FeatureStore, row: int) -> str:
    """The file that a row, perhaps a span of it, is of."""
    return store.ids[row] if np.isnan(store.starts[row]) else store.ids[row].rpartition("#")[0]


def class_name(store: FeatureStore, row: int) -> str:
    label = int(store.labels[row])
    return store.classes[label] if label >= 0 else "no label"


# -- what was extracted ---------------------------------------------------------------------------------------------


def extracted(found: Found) -> list[dict[str, Any]]:
    """Counts by split, failures with their reasons and a frame of some videos, of each store."""
    shown = []
    for name, store in found.stores.items():
        counts = pd.crosstab(store.splits, store.status).rename(
            columns=dict(enumerate(STATUS_NAMES))
        )
        counts = counts.reindex(columns=list(figures.STATUS), fill_value=0).rename(
            index={"": "(no split)"}
        )
        why = [
            (STATUS_NAMES[kind], *one)
            for kind in (FAILED, PARTIAL)
            for one in reasons(store, kind)[:REASONS]
        ]
        labels = Counter(store.labels[store.labels >= 0].tolist()).most_common()
        sizes = [(store.classes[label], count) for label, count in labels]
        spans: dict[str, Any] = {}
        if len(rows := np.flatnonzero(np.isfinite(store.starts))):
            files = {file_name(store, row) for row in rows.tolist()}
            spans = {
                "rows": len(rows),
                "files": len(files),
                "seconds": np.median((store.ends - store.starts)[rows]),
            }
        bars = figures.bars(counts, list(figures.STATUS.values()), x_label="videos")
        told = {
            "name": name,
            "store": store,
            "counts": counts,
            "sizes": sizes,
            "spans": spans,
            "reasons": why,
        }
        told |= {"size": human_bytes(len(store) * store.video_bytes), "picture": bars}
        shown.append(told | {"samples": list(sample_frames(store, found.videos))})
    return shown


# -- frames --------------------------------------------------------------------------------------------------------


def thumbnails(
    store: FeatureStore,
    row: int,
    indices: np.ndarray,
    folders: Sequence[Path],
    *,
    height: int,
    square: bool = False,
) -> list[np.ndarray]:
    """The frames `indices` of a video, uint8 [height, width, 3]: whole, or the square in the
    middle.

    Empty where the video is in none of the folders or cannot be read: a page without pictures is
    still a page.
    """

    def shrink(frame: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(frame)
        width = height if square else max(1, round(height * picture.width / picture.height))
        return np.asarray(ImageOps.fit(picture, (width, height)))

    for folder in folders:
        if (path := folder / file_name(store, row)).is_file():
            try:
                return list(
                    decode(path, lambda count: np.clip(indices, 0, count - 1), resize=shrink).frames
                )
            except VideoError:
                break
    return []


def sample_frames(store: FeatureStore, folders: Sequence[Path]) -> Iterator[tuple[bytes, str, str]]:
    """The middle frame of at most SAMPLES videos, classes in turn, as a JPEG, with id and class."""
    rows = pd.Series(np.random.default_rng(0).permutation(np.flatnonzero(store.usable)))
    labels = store.labels[rows]
    turn = rows.groupby(labels).cumcount()  # how many of its class come before it
    first = rows.iloc[np.lexsort([labels, turn])[:SAMPLES]]
    for row in first.iloc[np.argsort(store.labels[first], kind="stable")]:
        if picture := middle_frame(store, row, folders):
            yield picture, store.ids[row], class_name(store, row)


def middle_frame(store: FeatureStore, row: int, folders: Sequence[Path]) -> bytes | None:
    """The middle frame of a video as a JPEG; None if the video is in none of the folders."""
    middle = store.frame_indices[row, 0, [store.frames_per_video // 2]]
    frames = thumbnails(store, row, middle, folders, height=150)
    if not frames:
        return None
    file = io.BytesIO()
    Image.fromarray(frames[0]).save(file, "JPEG", quality=75, optimize=True)
    return file.getvalue()


# -- the map -------------------------------------------------------------------------------------------------------


def feature_maps(found: Found) -> list[dict[str, Any]]:
    """Mean features of at most MAP_VIDEOS videos in two dimensions, colored by class, of stores of
    three or more."""
    shown = []
    for name, store in found.stores.items():
        good = np.flatnonzero(store.usable)
        if len(good) < 3:
            continue
        rows = drawn(good, MAP_VIDEOS)
        places, method = flatten(mean_features(store, rows))
        labels = store.labels[rows]
        classes = sorted(
            label for label, _ in Counter(labels[labels >= 0].tolist()).most_common(figures.KINDS)
        )
        kinds = pd.Index(classes).get_indexer(labels)  # -1: other classes, or none
        picture = figures.scatter(places, kinds, [store.classes[label] for label in classes])
        told = {
            "name": name,
            "method": method,
            "gray": (kinds < 0).any(),
            "shown": len(rows),
            "all": len(good),
        }
        shown.append(told | {"picture": picture})
    return shown


def batches(store: FeatureStore, rows: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Features of view 0, float32 [batch, T, D], and the mask [batch, T]: False for repeats in a
    short video."""
    frames = np.arange(store.frames_per_video)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[start : start + ROWS_AT_ONCE]
        yield (
            torch.from_numpy(store.gather(some, frames)).float(),
            torch.from_numpy(store.mask(some, frames)),
        )


def flatten(features: np.ndarray) -> tuple[np.ndarray, str]:
    """[n, D] -> [n, 2] and how: t-SNE from 30 videos on, else PCA."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    pca = PCA(min(50, *features.shape), svd_solver="full").fit(features)
    places = pca.transform(features)
    if len(features) >= 30:
        embed = TSNE(perplexity=min(30.0, len(features) / 4), init="pca", random_state=0)
        return embed.fit_transform(places), "t-SNE (near is alike, far means little)"
    return places[:, :2], f"PCA ({pca.explained_variance_ratio_[:2].sum():.0%} of the variance)"


# -- attention -----------------------------------------------------------------------------------------------------


def attention(found: Found) -> list[dict[str, Any]]:
    """Films of every run whose aggregator weighs frames, where a store with its kind of features is
    there."""
    runs = []
    for name, file in found.files("best.pt"):
        options = read_json(file.with_name("options.json"))
        if options.get("agg") not in WEIGHING:
            continue
        try:
            checkpoint = Checkpoint.load(file)
            where, store = _store_of(found, checkpoint, options.get("features", ""))
            if checkpoint.data is None:  # of an earlier version: they are chosen as they were then
                split = SplitOptions(
                    **{
                        one.name: options[one.name]
                        for one in fields(SplitOptions)
                        if one.name in options
                    }
                )
                _, rows, words = choose_rows(store, split, options.get("seed", 0))
            else:
                rows = rows_of_role(checkpoint, store, "validate")
                words = f"the {len(rows):,} videos that the run was validated on"
            if not len(rows := rows[store.usable[rows]]):
                raise InputError(
                    f"{store.path} holds no features of the videos that it was validated on"
                )
            run = films(checkpoint.model(), store, rows, found.videos)
        except (InputError, RunError) as error:
            found.problems.append(f"attention of {name}: {error}")
            continue
        runs.append(run | {"name": name, "store": where, "which": words})
    return runs


def _store_of(
    found: Found, checkpoint: Checkpoint, features: str | list[str]
) -> tuple[str, FeatureStore]:
    """The store a run was trained on, or another one of the same kind of features; or the joined
    stores."""
    if isinstance(features, list):
        by_name = {Path(name).name: store.path for name, store in found.stores.items()}
        store = open_features(
            [by_name.get(Path(name).name, name) for name in features], log=found.problems.append
        )
        checkpoint.check_features(store.provenance, store.dim, store.path)
        return store.path, store
    stores = sorted(
        found.stores.items(), key=lambda item: Path(item[0]).name != Path(features).name
    )
    if features and Path(features).is_dir():  # outside the folder, where the run says
        stores.append((features, FeatureStore.open(features)))
    for name, store in stores:
        try:
            checkpoint.check_features(store.provenance, store.dim, name)
        except InputError:
            continue
        return name, store
    raise InputError(f"its features {features!r} are not at hand; copy the store into the folder")


def films(
    model: VideoClassifier, store: FeatureStore, rows: np.ndarray, folders: Sequence[Path]
) -> dict[str, Any]:
    """Clips along their timeline with the share of each frame in each group: the two most uneven
    ones and a usual one.

    Of at most FILM_CANDIDATES of `rows`. Shares are of the attention weights `w = A 1 / n`, each
    group's divided by their sum.
    """
    rows = drawn(rows, FILM_CANDIDATES)
    shares, use = frame_shares(model, store, rows)
    mean = np.nan_to_num(shares).mean(1)
    uneven = np.argsort(-np.abs(mean - mean.mean(1, keepdims=True)).sum(1), kind="stable")
    shown = []
    for at in dict.fromkeys(
        int(uneven[place]) for place in (0, min(1, len(rows) - 1), len(rows) // 2)
    ):
        kind = "among the most uneven" if at in uneven[:2] else "the median"
        shown.append(
            _film(store, int(rows[at]), shares[at], folders, f"{kind} of {len(rows):,} videos")
        )
    _, groups, frames = shares.shape
    silent = int((~np.isfinite(shares).any(2)).all(0).sum())
    told = {"groups": groups, "frames": frames, "use": use, "silent": silent}
    return {**told, "films": shown}


def frame_shares(
    model: VideoClassifier, store: FeatureStore, rows: np.ndarray
) -> tuple[np.ndarray, str]:
    """Each frame's share of its group's weights [n, groups, T], NaN if a group is silent; and how
    much the model uses its attention, "" for heads that cannot do without."""
    aggregator: Any = model.eval().aggregator
    with torch.inference_mode():
        taken = list(batches(store, rows))
        shares = figures.shares_of(
            torch.cat([aggregator.frame_weights(*one) for one in taken]).numpy()
        )
    measured = attention_use(model, taken)
    return shares, attention_text(measured) if measured else ""


def _film(
    store: FeatureStore, row: int, shares: np.ndarray, folders: Sequence[Path], choice: str
) -> dict[str, Any]:
    own = np.flatnonzero(
        store.mask(np.array([row]), np.arange(store.frames_per_video))[0]
    )  # not a short one's repeats
    indices, times = store.frame_indices[row, 0, own], store.timestamps[row, 0, own]
    pictures = thumbnails(
        store, row, indices[figures.evenly(len(own))], folders, height=96, square=True
    )
    moments = [
        f"{t:.1f} s" if np.isfinite(t) else f"#{i}" for t, i in zip(times, indices, strict=True)
    ]
    picture = figures.film(pictures, shares[:, own], moments)
    told = {"id": store.ids[row], "class": class_name(store, row), "choice": choice}
    return {
        **told,
        "picture": figures.jpeg(picture) if pictures else picture,
        "largest": np.nan_to_num(shares).max(),
    }
