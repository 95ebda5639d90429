"""Report sections about videos: extraction, sample frames, the map of features, and attention over
time."""

import io
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
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
from aggregate.inference import attention as attention_use
from aggregate.inference import attention_text
from aggregate.models import ATTENTION_AGGREGATORS, VideoClassifier
from aggregate.training.checkpoint import Checkpoint
from aggregate.training.manifest import validated_rows
from aggregate.training.options import SplitOptions
from aggregate.training.splits import choose_rows
from extract import InputError, Record, RunError
from extract.decode import VideoError, decode
from extract.store import FAILED, PARTIAL, STATUS_NAMES, FeatureStore
from extract.store.summary import failure_reasons, human_bytes
from pipelines.report.find import Contents, read_json

REASONS = 8
SAMPLES = 16  # number of videos with a sample frame on the page
MAP_VIDEOS = 2000  # more points would only hide each other
FILM_CANDIDATES = 512  # number of videos from which the filmstrips are chosen
ROWS_AT_ONCE = 64


def sample_rows(rows: np.ndarray, most: int) -> np.ndarray:
    """At most `most` of `rows`, sorted; the same rows on every call."""
    return np.sort(np.random.default_rng(0).permutation(rows)[:most])


def file_of_row(store: FeatureStore, row: int) -> str:
    """The file of a row; the row may be a span of it."""
    return store.ids[row] if np.isnan(store.starts[row]) else store.ids[row].rpartition("#")[0]


def class_name(store: FeatureStore, row: int) -> str:
    label = int(store.labels[row])
    return store.classes[label] if label >= 0 else "no label"


# -- extraction ----------------------------------------------------------------------------------


def extracted(contents: Contents) -> list[Record]:
    """For each store, counts by split, failures with their reasons, and a frame of some videos."""
    sections = []
    for name, store in contents.stores.items():
        counts = pd.crosstab(store.splits, store.status)
        counts = counts.rename(index={"": "(no split)"}, columns=dict(enumerate(STATUS_NAMES)))
        counts = counts.reindex(columns=list(figures.STATUS), fill_value=0)
        labels = Counter(store.labels[store.labels >= 0].tolist()).most_common()
        spans: dict[str, Any] = {}
        if len(rows := np.flatnonzero(np.isfinite(store.starts))):
            spans = {
                "rows": len(rows),
                "files": len({file_of_row(store, row) for row in rows.tolist()}),
                "seconds": np.median((store.ends - store.starts)[rows]),
            }
        sections.append(
            {
                "name": name,
                "store": store,
                "counts": counts,
                "sizes": [(store.classes[label], count) for label, count in labels],
                "spans": spans,
                "reasons": [
                    (STATUS_NAMES[kind], *reason)
                    for kind in (FAILED, PARTIAL)
                    for reason in failure_reasons(store, kind)[:REASONS]
                ],
                "size": human_bytes(len(store) * store.video_bytes),
                "picture": figures.bars(counts, list(figures.STATUS.values()), x_label="videos"),
                "samples": list(sample_frames(store, contents.videos)),
            }
        )
    return sections


# -- frames --------------------------------------------------------------------------------------


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

    The list is empty if the video is in none of the folders or cannot be read: the page is useful
    without pictures too.
    """

    def shrink(frame: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(frame)
        width = height if square else max(1, round(height * picture.width / picture.height))
        return np.asarray(ImageOps.fit(picture, (width, height)))

    def choose_frames(count: int) -> np.ndarray:
        return np.clip(indices, 0, count - 1)

    paths = (folder / file_of_row(store, row) for folder in folders)
    if (path := next(filter(Path.is_file, paths), None)) is not None:
        with suppress(VideoError):
            return list(decode(path, choose_frames, resize=shrink).frames)
    return []


def sample_frames(store: FeatureStore, folders: Sequence[Path]) -> Iterator[tuple[bytes, str, str]]:
    """The middle frame of at most SAMPLES videos, from all classes in turn: JPEG, id, class."""
    rows = pd.Series(np.random.default_rng(0).permutation(np.flatnonzero(store.usable)))
    labels = store.labels[rows]
    turn = rows.groupby(labels).cumcount()  # number of earlier rows of the same class
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


# -- the map -------------------------------------------------------------------------------------


def feature_maps(contents: Contents) -> list[Record]:
    """For each store of three videos or more, mean features of at most MAP_VIDEOS videos in two
    dimensions, colored by class."""
    sections = []
    for name, store in contents.stores.items():
        usable = np.flatnonzero(store.usable)
        if len(usable) < 3:
            continue
        rows = sample_rows(usable, MAP_VIDEOS)
        points, method = project_2d(mean_features(store, rows))
        labels = store.labels[rows]
        most_common = Counter(labels[labels >= 0].tolist()).most_common(figures.KINDS)
        classes = sorted(label for label, _ in most_common)
        kinds = pd.Index(classes).get_indexer(labels)  # -1: other classes, or none
        names = [store.classes[label] for label in classes]
        sections.append(
            {
                "name": name,
                "method": method,
                "has_gray": (kinds < 0).any(),
                "shown": len(rows),
                "all": len(usable),
                "picture": figures.scatter(points, kinds, names),
            }
        )
    return sections


def project_2d(features: np.ndarray) -> tuple[np.ndarray, str]:
    """[n, D] -> [n, 2], and the method: t-SNE for 30 videos or more, else PCA."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    pca = PCA(min(50, *features.shape), svd_solver="full").fit(features)
    points = pca.transform(features)
    if len(features) >= 30:
        tsne = TSNE(perplexity=min(30.0, len(features) / 4), init="pca", random_state=0)
        return tsne.fit_transform(points), "t-SNE (near is alike, far means little)"
    return points[:, :2], f"PCA ({pca.explained_variance_ratio_[:2].sum():.0%} of the variance)"


# -- attention -----------------------------------------------------------------------------------


def attention(contents: Contents) -> list[Record]:
    """Filmstrips of every run whose aggregator weights frames, if its features can be found."""
    sections = []
    for name, file in contents.run_files("best.pt"):
        options = read_json(file.with_name("options.json"))
        if options.get("agg") not in ATTENTION_AGGREGATORS:
            continue
        try:
            checkpoint = Checkpoint.load(file)
            store_name, store = _store_of(contents, checkpoint, options.get("features", ""))
            rows, description = _validated_rows(checkpoint, store, options)
            section = filmstrips(checkpoint.model(), store, rows, contents.videos)
        except (InputError, RunError) as error:
            contents.problems.append(f"attention of {name}: {error}")
            continue
        sections.append(section | {"name": name, "store": store_name, "which": description})
    return sections


def _store_of(
    contents: Contents, checkpoint: Checkpoint, features: str | list[str]
) -> tuple[str, FeatureStore]:
    """The store or joined stores that a run was trained on, or else another store with the same
    kind of features."""
    if isinstance(features, list):
        paths = [contents.store_named(name)[1].path for name in features]
        store = open_features(paths, log=contents.problems.append)
        checkpoint.check_features(store.provenance, store.dim, store.path)
        return store.path, store
    stores = list(contents.stores.items())
    with suppress(InputError):
        stores.insert(0, contents.store_named(features))
    for name, store in stores:
        with suppress(InputError):
            checkpoint.check_features(store.provenance, store.dim, name)
            return name, store
    raise InputError(f"its features {features!r} were not found; copy the store into the folder")


def _validated_rows(
    checkpoint: Checkpoint, store: FeatureStore, options: Record
) -> tuple[np.ndarray, str]:
    """The usable rows on which a run was validated, and a description of them."""
    if checkpoint.data is None:  # of an earlier version: choose the same rows again
        names = {option.name for option in fields(SplitOptions)} & options.keys()
        split = SplitOptions(**{name: options[name] for name in names})
        _, rows, description = choose_rows(store, split, options.get("seed", 0))
    else:
        rows = validated_rows(checkpoint, store)
        description = f"the {len(rows):,} videos that the run was validated on"
    rows = rows[store.usable[rows]]
    if not len(rows):
        raise InputError(f"{store.path} holds no features of the videos that it was validated on")
    return rows, description


def filmstrips(
    model: VideoClassifier, store: FeatureStore, rows: np.ndarray, folders: Sequence[Path]
) -> Record:
    """Filmstrips of three videos, with each frame's share of each group's attention: the two most
    uneven videos and a typical one, out of at most FILM_CANDIDATES of `rows`.

    Shares are attention weights `w = A 1 / n`, divided by their sum over the frames of a group.
    """
    rows = sample_rows(rows, FILM_CANDIDATES)
    shares, use = frame_shares(model, store, rows)
    mean = np.nan_to_num(shares).mean(1)
    unevenness = np.abs(mean - mean.mean(1, keepdims=True)).sum(1)
    by_unevenness = np.argsort(-unevenness, kind="stable")
    chosen = by_unevenness[[0, min(1, len(rows) - 1), len(rows) // 2]].tolist()
    films = []
    for index in dict.fromkeys(chosen):
        choice = "among the most uneven" if index in chosen[:2] else "the median"
        film = _filmstrip(store, int(rows[index]), shares[index], folders)
        films.append(film | {"choice": f"{choice} of {len(rows):,} videos"})
    _, num_groups, num_frames = shares.shape
    return {
        "groups": num_groups,
        "frames": num_frames,
        "use": use,
        "silent": int(np.isnan(shares).any(2).all(0).sum()),
        "films": films,
    }


def frame_shares(
    model: VideoClassifier, store: FeatureStore, rows: np.ndarray
) -> tuple[np.ndarray, str]:
    """Each frame's share of its group's weights [n, groups, T], NaN if all weights of a group are
    0. Also a text on how much the model uses its attention; "" for heads that need it."""
    aggregator: Any = model.eval().aggregator
    with torch.inference_mode():
        batches = list(_batches(store, rows))
        weights = torch.cat([aggregator.frame_weights(x, mask) for x, mask in batches])
    use = attention_use(model, batches)
    return figures.shares_of(weights.numpy()), attention_text(use) if use else ""


def _batches(store: FeatureStore, rows: np.ndarray) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Features of view 0, float32 [batch, T, D], and the mask [batch, T]: False for repeats in a
    short video."""
    frames = np.arange(store.frames_per_video)
    for start in range(0, len(rows), ROWS_AT_ONCE):
        batch = rows[start : start + ROWS_AT_ONCE]
        features, mask = store.gather(batch, frames), store.mask(batch, frames)
        yield torch.from_numpy(features).float(), torch.from_numpy(mask)


def _filmstrip(
    store: FeatureStore, row: int, shares: np.ndarray, folders: Sequence[Path]
) -> Record:
    mask = store.mask(np.array([row]), np.arange(store.frames_per_video))[0]
    distinct = np.flatnonzero(mask)  # without the repeats in a short video
    indices, times = store.frame_indices[row, 0, distinct], store.timestamps[row, 0, distinct]
    moments = [
        f"{time:.1f} s" if np.isfinite(time) else f"#{index}"
        for time, index in zip(times, indices, strict=True)
    ]
    shown = indices[figures.film_indices(len(distinct))]
    pictures = thumbnails(store, row, shown, folders, height=96, square=True)
    picture = figures.filmstrip(pictures, shares[:, distinct], moments)
    return {
        "id": store.ids[row],
        "class": class_name(store, row),
        "picture": figures.jpeg(picture) if pictures else picture,
        "largest": np.nan_to_num(shares).max(),
    }
