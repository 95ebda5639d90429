"""Compare the models of a folder: by split, the best one, and the commands to run next."""

from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from aggregate.metrics import Interval, paired_bootstrap, ranks
from aggregate.metrics import summarize as summarize_scores
from aggregate.models import sees_order
from aggregate.training.checkpoint import Checkpoint
from ensemble.align import align
from extract import InputError, Record
from extract.commands import command_line
from pipelines.report.find import Contents, random_backbones, read_json

if TYPE_CHECKING:
    from aggregate.scores import Scores
    from extract.store import FeatureStore

# `aggregate.metrics.Summary` as a record, by number of segments ("" for ensembles).
Summaries = dict[str, Record]
UNNAMED = "not named"
ORDER = {"test": 0, "val": 1}  # of the splits on the page


@dataclass(frozen=True)
class Model:
    """A model on a split: measures by number of segments, and its scores if a file holds them.

    Several may have one `name`. They differ in their keys in `models_by_split`.
    """

    name: str
    summaries: Summaries
    scores: "Scores | None" = None
    file: str = ""

    @property
    def segments(self) -> str:
        """The largest number of segments that it was tested with; models are compared at it."""
        return list(self.summaries)[-1]

    @property
    def measures(self) -> Record:
        return self.summaries[self.segments]

    @property
    def top1(self) -> float:
        return self.measures["top1"]["value"]


@lru_cache(maxsize=1)  # three sections need it
def models_by_split(contents: Contents) -> dict[str, dict[str, Model]]:
    """The models by split and name, test before val. They come from scores files with labels, and
    from the measures of training."""
    splits: dict[str, dict[str, Model]] = {}
    for (split, key), (name, file) in _names_of_files(contents).items():
        summaries = {}
        for scores in contents.scores[file]:
            if scores.labels is not None:
                segments = "" if "members" in scores.source else str(scores.segments)
                summary = summarize_scores(scores.logits, scores.labels, scores.groups)
                summaries[segments] = asdict(summary)
        model = Model(name, summaries, contents.scores[file][-1], file)
        splits.setdefault(split, {})[key] = model
    for run, results_file in contents.run_files("results.json"):
        options = read_json(results_file.with_name("options.json"))
        split = options.get("val_split", "val")
        if options.get("val_groups"):
            split = f"groups {', '.join(options['val_groups'])}"
        _add_run(splits.setdefault(split, {}), run, read_json(results_file), options)
    return dict(sorted(splits.items(), key=lambda item: (ORDER.get(item[0], len(ORDER)), item[0])))


def _names_of_files(contents: Contents) -> dict[tuple[str, str], tuple[str, str]]:
    """The scores files with labels, and the names of their models, by split and key.

    The key is the name. If models have the same name, the name of the file is appended.
    """
    files: dict[tuple[str, str], list[str]] = {}
    for file, [*_, scores] in contents.scores.items():
        if scores.labels is not None and (scores.labels >= 0).any():
            name = str(scores.source.get("model") or PurePosixPath(file).stem)
            if len(set(scores.source.get("weights", "ab"))) == 1:  # of an ensemble
                name += ", equal weights"
            split = str(scores.source.get("split") or UNNAMED)
            files.setdefault((split, name), []).append(file)
    named: dict[tuple[str, str], tuple[str, str]] = {}
    for (split, name), same_name in files.items():
        for file in same_name:
            stem = PurePosixPath(file).stem.removesuffix(f"_{split}")
            key = name if len(same_name) == 1 else f"{name} ({stem})"
            named[split, key] = (name, file)
    return named


def _add_run(models: dict[str, Model], run: str, results: Record, options: Record) -> None:
    """Add the results of a training run to the models of its split.

    The run's own model is left out if one of its name has the same measures: its scores file has
    been read. Its baseline is left out if an equal one was added before.
    """
    for name, summaries in results.items():
        model = Model(name, summaries)
        segments = model.segments
        if name == options.get("agg", options.get("model")):
            namesakes = [added for added in models.values() if added.name == name]
            is_known = model.measures in [added.summaries.get(segments) for added in namesakes]
        else:
            at_segments = [added.summaries.get(segments, {}) for added in models.values()]
            is_known = model.measures["top1"] in [added.get("top1") for added in at_segments]
        if not is_known:
            models[name if name not in models else f"{name} ({run})"] = model


def choose(splits: dict[str, dict[str, Model]], split: str) -> tuple[str, str]:
    """The best model of a split, and how it was chosen: by top-1 on val, if that was measured."""
    models, validation = splits[split], splits.get("val", {})
    validated = [name for name in models if name in validation]
    if split != "val" and validated:
        name = max(validated, key=lambda name: validation[name].top1)
        if len(validated) == 1:
            return name, "the only model that was validated"
        return name, f"chosen on val, among {len(validated)}"
    name = max(models, key=lambda name: models[name].top1)
    if len(models) == 1:
        return name, "the only model"
    chosen = (
        f"the best of {len(models)} on these videos themselves, "
        "so its figure is a little optimistic"
    )
    top1 = models[name].top1
    ties = [other for other, model in models.items() if other != name and model.top1 == top1]
    return name, f"equal to {', '.join(ties)}; {chosen}" if ties else chosen


def gain_over_tsn(models: dict[str, Model], name: str) -> Interval | None:
    """Top-1 of a model minus that of TSN, paired over the videos of both scores files. None if one
    of the files is missing, or if they do not fit together."""
    ours, tsn = models[name].scores, models["tsn"].scores if "tsn" in models else None
    if ours is None or tsn is None or name == "tsn":
        return None
    try:
        aligned = align([ours, tsn], missing="drop")
    except InputError:
        return None
    rows = aligned.labels >= 0
    if not rows.any():
        return None
    our_ranks, tsn_ranks = (ranks(each[rows], aligned.labels[rows]) for each in aligned.logits)
    return paired_bootstrap(our_ranks == 0, tsn_ranks == 0, aligned.groups[rows])


def verdict(gain: Interval, baseline: str = "TSN") -> str:
    """A gain as text: better, worse, or no difference found."""
    if gain.low > 0:
        return f"better than {baseline}"
    if gain.high < 0:
        return f"worse than {baseline}"
    return "no difference found, since the interval holds 0"


def summary(contents: Contents, attention: list[Record]) -> Record:
    """The first section: the best model of each split, whether attention is used, and the next
    commands."""
    splits = models_by_split(contents)
    best = []
    for split, models in splits.items():
        name, chosen = choose(splits, split)
        gain = gain_over_tsn(models, name)
        best.append(
            {
                "split": split,
                "model": name,
                "chosen": chosen,
                "top1": models[name].measures["top1"],
                "gain": gain and asdict(gain),
                "verdict": gain and verdict(gain),
            }
        )
    section = {
        "best": best,
        "attention": attention,
        "crossvals": [_best_head(name, record) for name, record in contents.crossvals.items()],
        "next": next_commands(contents, splits),
    }
    return section if any(section.values()) else {}


def _best_head(name: str, record: Record) -> Record:
    """The best head of a cross-validation, and its gain over the baseline."""
    heads = {head["name"]: head["segments"][segments_that_count(head)] for head in record["heads"]}
    best = max(heads, key=lambda head: heads[head]["top1"]["value"])
    gain, baseline = heads[best].get("difference"), record["baseline"]
    return {
        "name": name,
        "head": best,
        "top1": heads[best]["top1"],
        "baseline": baseline,
        "gain": gain,
        "verdict": gain and verdict(Interval(**gain), baseline),
    }


def segments_that_count(head: Record) -> str:
    """The number of segments at which a head is compared: all, or as in training if it sees the
    order of frames."""
    return (min if sees_order(head["name"], {}) else max)(head["segments"], key=int)


# -- next commands -------------------------------------------------------------------------------


def next_commands(contents: Contents, splits: dict[str, dict[str, Model]]) -> list[tuple[str, str]]:
    """Up to three commands that would add to the results of this folder, each with its purpose."""
    commands: list[tuple[str, str]] = []

    def add(purpose: str, command: str, out: str, **options: Any) -> None:
        line = command_line(command, **options, out=contents.root / out)
        commands.append((purpose, line))

    stores = _labeled_stores(contents)
    runs = {
        read_json(file.with_name("options.json")).get("agg"): file
        for _, file in contents.run_files("best.pt")
    }
    if stores and not splits:
        add("train a first model", "aggregate.train", "tsn", agg="tsn", features=stores[0].path)
    if stores and splits:
        name = choose(splits, "val")[0] if "val" in splits else ""
        is_tested = any(model.file for model in splits.get("test", {}).values())
        if name in runs and not is_tested and (store := _test_store(runs[name], stores)):
            add(
                "test the best model",
                "aggregate.evaluate",
                f"{name}_test.h5",
                checkpoint=runs[name],
                features=store.path,
                split="test",
            )
        if runs and not contents.crossvals:
            groups = {}
            if "hgnl" in runs:
                options = read_json(runs["hgnl"].with_name("options.json"))
                groups = {flag: options.get(flag) for flag in ("g1", "g2", "m1")}
            add(
                "compare these heads on all videos, each scored by models that never saw it",
                "aggregate.crossval",
                "crossval",
                agg=tuple(dict.fromkeys(["tsn", *(str(agg) for agg in runs if agg)])),
                features=stores[0].path,
                **groups,
            )
    validated = splits.get("val", {}).values()
    scores = [contents.root / model.file for model in validated if model.file and model.segments]
    if len(scores) > 1 and not contents.ensembles:
        add("fuse the models", "ensemble", "fused.h5", scores=tuple(scores), weights="search")
    return commands[:3]


def _labeled_stores(contents: Contents) -> "list[FeatureStore]":
    """Stores with labels of two classes or more. Stores of backbones with random weights are used
    only if there are no others."""
    labeled = [
        store
        for store in contents.stores.values()
        if len(np.unique(store.labels[store.labels >= 0])) > 1
    ]
    trained = [store for store in labeled if not any(random_backbones(store.provenance))]
    return trained or labeled


def _test_store(checkpoint_file: Any, stores: "list[FeatureStore]") -> "FeatureStore | None":
    """The first store with labeled test videos and the features that the checkpoint takes."""
    checkpoint = Checkpoint.load(checkpoint_file)
    for store in stores:
        if "test" in store.splits[store.labels >= 0].tolist():
            try:
                checkpoint.check_features(store.provenance, store.dim, store.path)
                return store
            except InputError:
                continue
    return None
