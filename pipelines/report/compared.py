"""The models of a folder by the split they were tested on, which of them is best, and what to do
next."""

from dataclasses import asdict, dataclass
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np

from aggregate.metrics import Interval, paired_bootstrap, ranks
from aggregate.metrics import summarize as summarize_scores
from aggregate.models import AGGREGATORS
from extract.commands import command_line
from pipelines.report.find import Found, read_json

if TYPE_CHECKING:
    from aggregate.scores import Scores

Summaries = dict[
    str, dict[str, Any]
]  # `aggregate.metrics.Summary` as a record, by number of segments ("": fused)
UNNAMED = "not named"
ORDER = {"test": 0, "val": 1}  # of the splits on the page


@dataclass(frozen=True)
class Model:
    """A model on a split: its measures by number of segments, and its scores if a file holds
    them."""

    summaries: Summaries
    scores: "Scores | None" = None
    file: str = ""

    @property
    def segments(self) -> str:
        """The number of segments that counts: the largest that it was tested with."""
        return list(self.summaries)[-1]

    @property
    def measures(self) -> dict[str, Any]:
        return self.summaries[self.segments]

    @property
    def top1(self) -> float:
        return self.measures["top1"]["value"]


def models_by_split(found: Found) -> dict[str, dict[str, Model]]:
    """The models by split and name, test before val: from scores files with labels, and what
    training measured."""
    splits: dict[str, dict[str, Model]] = {}
    for (split, name), file in _names_of_files(found).items():
        with_labels = [scores for scores in found.scores[file] if scores.labels is not None]
        summaries = {
            # An ensemble has no number of segments of its own.
            "" if "members" in scores.source else str(scores.segments): asdict(
                summarize_scores(scores.logits, scores.labels, scores.groups)
            )
            for scores in with_labels
            if scores.labels is not None  # for mypy
        }
        splits.setdefault(split, {})[name] = Model(summaries, with_labels[-1], file)
    for run, results in found.files("results.json"):
        _add_run(splits, run, read_json(results), read_json(results.with_name("options.json")))
    return dict(sorted(splits.items(), key=lambda item: (ORDER.get(item[0], len(ORDER)), item[0])))


def _names_of_files(found: Found) -> dict[tuple[str, str], str]:
    """The scores files that hold labels, by split and the name of their model; equal names get
    their file's."""
    files: dict[tuple[str, str], list[str]] = {}
    for file, several in found.scores.items():
        if any(scores.labels is not None and (scores.labels >= 0).any() for scores in several):
            source = several[-1].source
            kind = str(source.get("model") or PurePosixPath(file).stem)
            if len(set(source.get("weights", "ab"))) == 1:  # of an ensemble
                kind += ", equal weights"
            files.setdefault((str(source.get("split") or UNNAMED), kind), []).append(file)
    named: dict[tuple[str, str], str] = {}
    for (split, kind), same in files.items():
        for file in same:
            stem = PurePosixPath(file).stem.removesuffix(f"_{split}")
            named[split, kind if len(same) == 1 else f"{kind} ({stem})"] = file
    return named


def _add_run(
    splits: dict[str, dict[str, Model]], run: str, results: dict[str, Any], options: dict[str, Any]
) -> None:
    """What a run measured when it ended, unless a scores file says it already; equal baselines
    once."""
    split = options.get("val_split", "val")
    if options.get("val_groups"):
        split = f"groups {', '.join(options['val_groups'])}"
    models = splits.setdefault(split, {})
    for name, summaries in results.items():
        main = name == options.get("agg", options.get("model"))
        same = [
            model
            for model in models.values()
            if model.summaries.get(list(summaries)[-1], {}).get("top1")
            == list(summaries.values())[-1]["top1"]
        ]
        if (main and name in models) or (not main and same):
            continue
        models[name if name not in models else f"{name} ({run})"] = Model(summaries)


def choose(splits: dict[str, dict[str, Model]], split: str) -> tuple[str, str]:
    """The best model of a split and how it was chosen: by its top-1 on val, wherever that can be
    had."""
    models, validation = splits[split], splits.get("val", {})
    both = [name for name in models if name in validation]
    if split != "val" and both:
        name = max(both, key=lambda name: validation[name].top1)
        return name, f"chosen on val, among {len(both)}" if len(
            both
        ) > 1 else "the only model that was validated"
    name = max(models, key=lambda name: models[name].top1)
    if len(models) == 1:
        return name, "the only model"
    return (
        name,
        f"the best of {len(models)} on these videos themselves, so its figure is a little optimistic",
    )


def gain_over_tsn(models: dict[str, Model], name: str) -> Interval | None:
    """Top-1 of a model minus that of TSN, paired over the videos that both files list; None without
    both."""
    ours, tsn = models[name].scores, models["tsn"].scores if "tsn" in models else None
    if ours is None or tsn is None or name == "tsn":
        return None
    if ours.labels is None or tsn.labels is None:
        return None
    place = {video: row for row, video in enumerate(tsn.ids)}
    rows = [row for row, video in enumerate(ours.ids) if video in place and ours.labels[row] >= 0]
    theirs = [place[ours.ids[row]] for row in rows]
    if not rows:
        return None
    our_ranks = ranks(ours.logits[rows], ours.labels[rows])
    their_ranks = ranks(tsn.logits[theirs], tsn.labels[theirs])
    return paired_bootstrap(our_ranks == 0, their_ranks == 0, np.asarray(ours.groups)[rows])


def verdict(gain: Interval) -> str:
    """A gain in a few words."""
    if gain.low > 0:
        return "better than TSN"
    return "worse than TSN" if gain.high < 0 else "no difference found, since the interval holds 0"


def summary(found: Found, attention: list[dict[str, Any]]) -> dict[str, Any]:
    """What the page says first: the best model of each split, whether attention is used, what to do
    next."""
    splits = models_by_split(found)
    best = []
    for split, models in splits.items():
        name, chosen = choose(splits, split)
        gain = gain_over_tsn(models, name)
        line = {
            "split": split,
            "model": name,
            "chosen": chosen,
            "top1": models[name].measures["top1"],
        }
        best.append(line | {"gain": gain and asdict(gain), "verdict": gain and verdict(gain)})
    shown = {
        "best": best,
        "attention": attention,
        "crossvals": _crossvals(found),
        "next": next_commands(found, splits),
    }
    return shown if any(shown.values()) else {}


def _crossvals(found: Found) -> list[dict[str, Any]]:
    """The best head of each cross-validation, and its gain over the baseline."""
    lines = []
    for name, record in found.crossvals.items():
        heads = {
            head["name"]: head["segments"][segments_that_count(head)] for head in record["heads"]
        }
        best = max(heads, key=lambda head: heads[head]["top1"]["value"])
        gain = heads[best].get("difference")
        line = {
            "name": name,
            "head": best,
            "top1": heads[best]["top1"],
            "baseline": record["baseline"],
            "gain": gain,
        }
        lines.append(
            line
            | {"verdict": gain and verdict(Interval(**gain)).replace("TSN", record["baseline"])}
        )
    return lines


def segments_that_count(head: dict[str, Any]) -> str:
    """Of a head's results by number of segments: all, or as in training if it sees the order of
    frames."""
    sees_order = getattr(AGGREGATORS.get(head["name"]), "sees_order", False)
    return (min if sees_order else max)(head["segments"], key=int)


def next_commands(found: Found, splits: dict[str, dict[str, Model]]) -> list[tuple[str, str]]:
    """Up to three commands that answer what this folder leaves open, and why."""
    commands: list[tuple[str, str]] = []
    store = next(
        (
            store
            for store in found.stores.values()
            if len(np.unique(store.labels[store.labels >= 0])) > 1
        ),
        None,
    )
    runs, groups = {}, {}
    for _, file in found.files("best.pt"):
        options = read_json(file.with_name("options.json"))
        runs[options.get("agg")] = file
        if options.get("agg") == "hgnl":
            groups = {flag: options.get(flag) for flag in ("g1", "g2", "m1")}
    files = [
        model.file for model in splits.get("val", {}).values() if model.file and model.segments
    ]
    if store is not None and not splits:
        out = found.root / "tsn"
        commands.append(
            (
                "train a first model",
                command_line("aggregate.train", agg="tsn", features=store.path, out=out),
            )
        )
    if store is not None and splits:
        labeled = set(store.splits[store.labels >= 0].tolist())
        name = choose(splits, "val")[0] if "val" in splits else ""
        if (
            "test" in labeled
            and not any(model.file for model in splits.get("test", {}).values())
            and name in runs
        ):
            test = {"checkpoint": runs[name], "features": store.path, "split": "test"}
            out = found.root / f"{name}_test.h5"
            commands.append(
                ("test the best model", command_line("aggregate.evaluate", **test, out=out))
            )
        if not found.crossvals and runs:
            heads = tuple(dict.fromkeys(["tsn", *(str(agg) for agg in runs if agg)]))
            line = command_line(
                "aggregate.crossval",
                agg=heads,
                features=store.path,
                out=found.root / "crossval",
                **groups,
            )
            commands.append(
                ("compare these heads on all videos, each scored by models that never saw it", line)
            )
    if len(files) > 1 and not found.ensembles:
        scores = tuple(found.root / file for file in files)
        line = command_line(
            "ensemble", scores=scores, weights="search", out=found.root / "fused.h5"
        )
        commands.append(("fuse the models", line))
    return commands[:3]
