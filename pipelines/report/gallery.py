"""What the report shows of the videos: what was extracted, sample frames, the map of features, attention over time."""

import io
import json
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aggregate import figures
from extract.cli import InputError, RunError
from extract.store import FAILED, OK, PARTIAL, STATUS_NAMES, FeatureStore
from extract.store.summary import human_bytes
from pipelines.report import page

if TYPE_CHECKING:
    from aggregate.models import VideoClassifier
    from pipelines.report.find import Found

REASONS = 8
SAMPLES = 16  # videos of which a frame is shown
MAP_VIDEOS = 2000  # more points only hide each other
FILM_CANDIDATES = 512  # videos among which the clips of a film are chosen
ROWS_AT_ONCE = 64
WEIGHING = ("hgnl", "nl", "weighted", "attentive", "nextvlad")  # the aggregators with a weight a frame
ATTENTION_UNUSED = 1e-3  # below this |s F_o| / |F| attention changes nothing that matters


def usable_rows(store: FeatureStore) -> np.ndarray:
    """Rows that hold features."""
    return np.flatnonzero((store.status == OK) | (store.status == PARTIAL))


def draw(rows: np.ndarray, most: int, *, seed: int) -> np.ndarray:
    """At most `most` of `rows`, in their order."""
    if len(rows) <= most:
        return rows
    return np.sort(np.random.default_rng(seed).choice(rows, most, replace=False))


def class_name(store: FeatureStore, row: int) -> str:
    label = int(store.labels[row])
    return store.classes[label] if label >= 0 else "no label"


# -- what was extracted ---------------------------------------------------------------------------------------------


def extracted(found: "Found", videos: tuple[Path, ...], seed: int) -> str:
    """Counts by split, failures with their reasons and a frame of some videos, of each store."""
    body = ""
    for name, store in found.stores.items():
        splits = sorted(set(store.splits.tolist()))
        counts = [[int(((store.splits == split) & (store.status == s)).sum()) for s in range(4)] for split in splits]
        kinds = figures.STATUS
        rows = [[count[STATUS_NAMES.index(kind)] for kind in kinds] for count in counts]
        names = [split or "(no split)" for split in splits]
        shape = f"{store.num_views} views x {store.frames_per_video} frames x {store.dim} numbers"
        body += page.heading(name) + page.paragraph(
            f"{len(store):,} videos of {len(store.classes):,} classes, each {shape}, "
            f"{human_bytes(len(store) * store.video_bytes)} in all. {_per_class(store)}"
        )
        picture = figures.svg(figures.bars(names, rows, kinds, x_label="videos"))
        body += page.figure(picture, f"Videos of {name} by split and status")
        table = [[split, *(f"{n:,}" for n in row)] for split, row in zip(names, rows, strict=True)]
        body += page.table(["split", *kinds], table, numbers=(1, 2, 3, 4))
        reasons = _reasons(store)
        if reasons:
            body += page.table(["videos", "", "reason, and an example"], reasons, numbers=(0,))
        samples = sample_frames(store, videos, seed=seed) if videos else ""
        if videos and not samples:
            samples = page.paragraph("No frames are shown: none of its videos lies below --videos.")
        body += samples
    if found.stores and not videos:
        body += page.paragraph("No frames are shown: --videos DIR says where the videos lie.")
    return body


def _per_class(store: FeatureStore) -> str:
    sizes = Counter(store.labels[store.labels >= 0].tolist())
    if not sizes:
        return "No video has a label."
    least, most = min(sizes, key=lambda c: (sizes[c], c)), max(sizes, key=lambda c: (sizes[c], -c))
    without = len(store.classes) - len(sizes)
    return (
        f"A class has {sizes[least]:,} ({store.classes[least]}) to {sizes[most]:,} ({store.classes[most]}) videos"
        + (f"; {without:,} have none." if without else ".")
    )


def _reasons(store: FeatureStore) -> list[list[str]]:
    """Reasons of failed and partial videos, the frequent ones first; like ones (but for numbers) together."""
    counts: Counter[tuple[int, str]] = Counter()
    examples: dict[tuple[int, str], str] = {}
    for row in ((store.status == FAILED) | (store.status == PARTIAL)).nonzero()[0]:
        key = int(store.status[row]), re.sub(r"\d+(\.\d+)?", "#", str(store.errors[row]))
        counts[key] += 1
        examples.setdefault(key, f"{store.ids[row]}: {store.errors[row]}")
    shown = counts.most_common(REASONS)
    rows = [[f"{count:,}", STATUS_NAMES[key[0]], examples[key]] for key, count in shown]
    others = counts.total() - sum(count for _, count in shown)
    return rows + ([[f"{others:,}", "", f"for {len(counts) - REASONS:,} further reasons"]] if others else [])


# -- frames --------------------------------------------------------------------------------------------------------


def thumbnails(
    store: FeatureStore, row: int, indices: np.ndarray, folders: Sequence[Path], *, height: int, square: bool = False
) -> list[np.ndarray]:
    """The frames `indices` of a video, uint8 [height, width, 3]: whole, or the square in the middle.

    Empty where the video is in none of the folders or cannot be read: a page without pictures is still a page.
    """
    from PIL import Image

    from extract.decode import VideoError, decode

    path = next((folder / store.ids[row] for folder in folders if (folder / store.ids[row]).is_file()), None)
    if path is None:
        return []

    def shrink(frame: np.ndarray) -> np.ndarray:
        picture = Image.fromarray(frame)
        side = min(picture.size)
        if square:
            left, top = (picture.width - side) // 2, (picture.height - side) // 2
            picture = picture.crop((left, top, left + side, top + side))
        return np.asarray(picture.resize((max(1, round(height * picture.width / picture.height)), height)))

    try:
        return list(decode(path, lambda count: np.clip(indices, 0, count - 1), resize=shrink).frames)
    except VideoError:
        return []


def sample_frames(store: FeatureStore, folders: Sequence[Path], *, seed: int) -> str:
    """The middle frame of at most SAMPLES videos, classes in turn; empty where none is at hand."""
    from PIL import Image

    rows = np.random.default_rng(seed).permutation(usable_rows(store))
    rows = rows[np.argsort(store.labels[rows], kind="stable")]
    labels = store.labels[rows]
    turn = np.arange(len(rows)) - np.searchsorted(labels, labels)  # how many of its class come before it
    pictures = []
    for row in rows[np.sort(np.argsort(turn, kind="stable")[:SAMPLES])].tolist():
        middle = store.frame_indices[row, 0, [store.frames_per_video // 2]]
        for frame in thumbnails(store, row, middle, folders, height=150):
            file = io.BytesIO()
            Image.fromarray(frame).save(file, "JPEG", quality=75, optimize=True)
            name = class_name(store, row)
            pictures.append((file.getvalue(), f"{name}: {store.ids[row]}", name))
    return page.strip(pictures) if pictures else ""


# -- the map -------------------------------------------------------------------------------------------------------


def feature_maps(found: "Found", seed: int) -> str:
    return "".join(feature_map(store, name, seed=seed) for name, store in found.stores.items())


def feature_map(store: FeatureStore, name: str, *, seed: int) -> str:
    """Mean features of at most MAP_VIDEOS videos in two dimensions, coloured by class; empty below three videos."""
    usable = usable_rows(store)
    if len(usable) < 3:
        return ""
    rows = draw(usable, MAP_VIDEOS, seed=seed)
    places, method = flatten(mean_features(store, rows), seed=seed)
    labels = store.labels[rows]
    shown = sorted(label for label, _ in Counter(labels[labels >= 0].tolist()).most_common(figures.KINDS))
    kinds = np.array([shown.index(label) if label in shown else -1 for label in labels.tolist()])
    picture = figures.svg(figures.scatter(places, kinds, [store.classes[label] for label in shown]))
    sample = f"{len(rows):,} videos" if len(rows) == len(usable) else f"{len(rows):,} of {len(usable):,} videos"
    grey = " Grey: other classes, or none." if (kinds < 0).any() else ""
    caption = f"{name}: {method} of the mean feature of {sample}.{grey}"
    return page.figure(picture, f"Map of the features of {name}, coloured by class", caption)


def mean_features(store: FeatureStore, rows: np.ndarray) -> np.ndarray:
    """The mean over each video's own frames (repeats in a short video count once), view 0: float32 [n, D]."""
    frames = np.arange(store.frames_per_video)
    means = []
    for start in range(0, len(rows), ROWS_AT_ONCE):
        some = rows[start : start + ROWS_AT_ONCE]
        mask = store.mask(some, frames)[..., None]
        means.append((store.gather(some, frames).astype("f4") * mask).sum(1) / np.maximum(mask.sum(1), 1))
    return np.concatenate(means)


def flatten(features: np.ndarray, *, seed: int) -> tuple[np.ndarray, str]:
    """[n, D] -> [n, 2] and how: t-SNE where scikit-learn is installed and there are 30 videos or more, else PCA."""
    left, strengths, _ = np.linalg.svd(features - features.mean(0), full_matrices=False)
    components = left * strengths
    if len(features) >= 30:
        try:
            from sklearn.manifold import TSNE
        except ImportError:
            pass
        else:
            embed = TSNE(perplexity=min(30.0, len(features) / 4), init="pca", random_state=seed)
            return embed.fit_transform(components[:, :50]), "t-SNE (near is alike, far means little)"
    places = np.zeros((len(features), 2))
    places[:, : components.shape[1]] = components[:, :2]
    share = (strengths[:2] ** 2).sum() / max((strengths**2).sum(), 1e-12)
    return places, f"PCA ({share:.0%} of the variance)"


# -- attention -----------------------------------------------------------------------------------------------------


def attention(found: "Found", videos: tuple[Path, ...], seed: int) -> str:
    """Films of every run whose aggregator weighs frames, where a store with its kind of features is there."""
    from aggregate.training.checkpoint import Checkpoint

    body = ""
    for name, file in found.files("best.pt"):
        options = json.loads((file.parent / "options.json").read_text(encoding="utf-8"))
        if options.get("agg") not in WEIGHING:
            continue
        try:
            checkpoint = Checkpoint.load(file)
            where, store = _store_of(found, checkpoint, str(options.get("features", "")))
            rows, which = _validation(store, options)
            shown = films(checkpoint.model(), store, rows, videos, name=name, seed=seed)
        except (InputError, RunError) as error:
            found.problems.append(f"attention of {name}: {error}")
            continue
        body += shown + page.paragraph(f"Clips of {where}, {which}.")
    return body


def _store_of(found: "Found", checkpoint: Any, features: str) -> tuple[str, FeatureStore]:
    """The store a run was trained on, or another one of the same kind of features."""
    stores = sorted(found.stores.items(), key=lambda item: Path(item[0]).name != Path(features).name)
    if features and Path(features).is_dir():  # outside the folder, where the run says
        stores.append((features, FeatureStore.open(features)))
    for name, store in stores:
        try:
            checkpoint.check_features(store.provenance, store.dim, name)
        except InputError:
            continue
        return name, store
    raise InputError(f"its features {features!r} are not at hand; copy the store into the folder")


def _validation(store: FeatureStore, options: dict[str, Any]) -> tuple[np.ndarray, str]:
    """Rows with features that a run was validated on, where that can be told; and that in words."""
    usable = usable_rows(store)
    groups = options.get("val_groups") or []
    held_out = np.isin(store.groups, groups) if groups else store.splits == options.get("val_split", "val")
    rows = usable[held_out[usable]]
    if len(rows):
        return rows, "held out" if groups else f"split {options.get('val_split', 'val')!r}"
    if not len(usable):
        raise InputError(f"{store.path} holds no features")
    return usable, "from training and validation alike"


def films(
    model: "VideoClassifier", store: FeatureStore, rows: np.ndarray, folders: Sequence[Path], *, name: str, seed: int
) -> str:
    """Clips along their timeline with the share of each frame in each group: the two most uneven ones and a usual one.

    Of at most FILM_CANDIDATES of `rows`. Shares are of the attention weights `w = A 1 / n`, each group's divided by
    their sum.
    """
    rows = draw(rows, FILM_CANDIDATES, seed=seed)
    shares, ratio = frame_shares(model, store, rows)
    mean = np.nan_to_num(shares).mean(1)
    uneven = np.argsort(-np.abs(mean - mean.mean(1, keepdims=True)).sum(1), kind="stable")
    chosen = dict.fromkeys((int(uneven[0]), int(uneven[min(1, len(rows) - 1)]), int(uneven[len(rows) // 2])))
    content = page.heading(name) + page.paragraph(_in_words(shares, ratio))
    for at in chosen:
        kind = "among the most uneven" if at in uneven[:2] else "the median"
        content += _film(store, int(rows[at]), shares[at], folders, f"{kind} of {len(rows):,} videos", name)
    return content


def _in_words(shares: np.ndarray, ratio: float) -> str:
    groups, frames = shares.shape[1:]
    silent = int((~np.isfinite(shares).any(2)).all(0).sum())
    words = (
        f"{groups} group{'s' if groups > 1 else ''} over {frames} frames; an even share is {1 / frames:.1%}. "
        f"The attention term is {ratio:.2%} of the mean feature"
    )
    words += ": attention is not used." if ratio < ATTENTION_UNUSED else "."
    return words + (f" {silent} of the groups weigh nothing in any video." if silent else "")


def frame_shares(model: "VideoClassifier", store: FeatureStore, rows: np.ndarray) -> tuple[np.ndarray, float]:
    """Each frame's share of its group's weights [n, groups, T], NaN where a group is silent; and |s F_o| / |F|, median.

    A model without a scale s (the weighted average) has nothing but its attention: 1.
    """
    import torch

    frames = np.arange(store.frames_per_video)
    weights, ratios = [], []
    aggregator = model.eval().aggregator
    with torch.inference_mode():
        for start in range(0, len(rows), ROWS_AT_ONCE):
            some = rows[start : start + ROWS_AT_ONCE]
            x = torch.from_numpy(store.gather(some, frames)).float()
            mask = torch.from_numpy(store.mask(some, frames))
            weights.append(aggregator.frame_weights(x, mask))  # type: ignore[operator]
            if hasattr(aggregator, "attention_ratio"):
                ratios.append(aggregator.attention_ratio(x, mask))  # type: ignore[operator]
    whole = torch.cat(weights).double()
    shares = whole / whole.sum(-1, keepdim=True)
    return shares.numpy(), float(torch.cat(ratios).median()) if ratios else 1.0


def _film(store: FeatureStore, row: int, shares: np.ndarray, folders: Sequence[Path], choice: str, name: str) -> str:
    own = np.flatnonzero(store.mask(np.array([row]), np.arange(store.frames_per_video))[0])  # not a short one's repeats
    shown = own[np.unique(np.linspace(0, len(own) - 1, figures.FILM_FRAMES).round().astype(int))]
    indices, times = store.frame_indices[row, 0, shown], store.timestamps[row, 0, shown]
    pictures = thumbnails(store, row, indices, folders, height=96, square=True)
    moments = [f"{t:.1f} s" if np.isfinite(t) else f"#{i}" for t, i in zip(times, indices, strict=True)]
    drawn = figures.film(pictures, shares[:, shown], moments, even=1 / len(own))
    words = f"{class_name(store, row)}: {store.ids[row]}, {choice}. Blue: a frame's share in its group, up to "
    words += f"{np.nan_to_num(shares).max():.1%}; bars: the mean of the groups; dashed: an even share."
    picture = figures.jpeg(drawn) if pictures else figures.svg(drawn)
    return page.figure(picture, f"Attention of {name} along {store.ids[row]}", words, wide=True)
