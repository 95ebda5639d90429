"""Report sections about models: training, results, confusion, cross-validations, ablations,
ensembles, provenance."""

from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aggregate import figures
from aggregate.ablation.compare import MEASURES, heat_maps, summarize
from aggregate.metrics import describe_units
from aggregate.training.checkpoint import Checkpoint
from extract import Record
from pipelines.report.compared import choose, models_by_split, segments_that_count
from pipelines.report.find import Contents, random_backbones, read_json

PAIRS = 10
MATRIX_CLASSES = 20
CURVES = (
    ("Training loss", "loss", 1),
    ("Validation top-1 %", "val_top1", 100),
    ("Validation average error %", "val_average_error", 100),
    ("Attention: frame weights from even (0) to a single frame (100), %", "unevenness", 100),
    ("Attention: predictions that it changes, %", "changed", 100),
)


def training(contents: Contents) -> Record:
    """A chart per quantity, with a color per run; baseline and control are dashed and dotted."""
    tables = {
        run: pd.read_csv(file, index_col="epoch") for run, file in contents.run_files("metrics.csv")
    }
    styles = {"": "-", "baseline": "--", "control": ":"}
    charts = {}
    for title, column, factor in CURVES:
        lines = {}
        for (color, (run, epochs)), model in product(enumerate(tables.items()), styles):
            values = epochs.get(f"{model}_{column}".strip("_"))
            if values is not None and np.isfinite(values).any():
                name = f"{run}, {model}" if model else run
                lines[name] = factor * values, f"C{color}{styles[model]}"
        if lines:
            charts[title] = figures.curves(lines, title=title)
    return charts


def results(contents: Contents) -> list[Record]:
    """For each split, a table of its models with four measures, and a chart of their top-1."""
    splits = models_by_split(contents)
    sections = []
    for split, models in splits.items():
        points = {
            f"{name}, {segments} segments" if segments else name: measures["top1"]
            for name, model in models.items()
            for segments, measures in model.summaries.items()
        }
        best, chosen = choose(splits, split)
        measures = models[best].measures
        # Runs of earlier versions resampled videos.
        units = measures.get("units") or measures["listed"]
        sections.append(
            {
                "name": split,
                "models": models,
                "best": best,
                "chosen": chosen,
                "resampled": describe_units(units, measures["listed"]),
                "picture": figures.forest(points, x_label="top-1 %, with its 95 % interval"),
            }
        )
    return sections


def confusion(contents: Contents) -> Record:
    """A matrix of the classes that the best model of the first split confuses, and the pairs that
    it confuses most often."""
    splits = {}
    for split, models in models_by_split(contents).items():
        scored = {name: model for name, model in models.items() if model.scores is not None}
        if scored:
            splits[split] = scored
    if not splits:
        return {}
    split = next(iter(splits))
    name, chosen_by = choose(splits, split)
    scores: Any = splits[split][name].scores
    rows = (scores.labels >= 0) & ~scores.failed
    labels, guesses = scores.labels[rows], scores.logits[rows].argmax(1)
    predictions = pd.DataFrame(
        {
            "true": pd.Categorical.from_codes(labels, scores.classes),
            "predicted": pd.Categorical.from_codes(guesses, scores.classes),
            "id": np.array(scores.ids, object)[rows],
        }
    )
    wrong = predictions[labels != guesses]
    pairs = wrong.groupby(["true", "predicted"], observed=True)["id"].agg(["size", "first"])
    pairs = pairs.sort_values("size", ascending=False, kind="stable")
    sizes = predictions["true"].value_counts()
    present = {*predictions["true"], *predictions["predicted"]}
    confused = dict.fromkeys(name for pair in pairs.index for name in pair)
    is_cut = len(present) > MATRIX_CLASSES
    chosen = set(list(confused)[:MATRIX_CLASSES]) if is_cut else present
    shown = [name for name in scores.classes if name in chosen]
    segments = "" if "members" in scores.source else f"{scores.segments} segments, "
    caption = (
        f"{name} ({chosen_by}): {segments}{len(predictions):,} videos of split {split}. "
        "Each row is a true class; the numbers are the percentage of its videos that were given "
        "each class."
    )
    if is_cut:
        caption += f" Of {len(present):,} classes, the {len(shown)} confused most."
    section: Record = {
        "name": name,
        "caption": caption,
        "pairs": [
            (true, guess, size, example, sizes[true])
            for (true, guess), size, example in pairs[:PAIRS].itertuples()
        ],
    }
    if not shown:
        return section
    matrix = 100 * pd.crosstab(predictions["true"], predictions["predicted"], normalize="index")
    matrix = matrix.reindex(index=shown, columns=shown)
    is_large = len(shown) > 10  # a phone scrolls such a matrix sideways
    width = 9 if is_large else figures.WIDE
    picture = figures.heat_map(matrix.where(matrix > 0), ".0f", low=0, width=width)
    return section | {"picture": picture, "large": is_large}


def crossvals(contents: Contents) -> list[Record]:
    """Top-1 of heads by cross-validation, on videos that they were not trained on, and their gain
    over the baseline."""
    sections = []
    for name, record in contents.crossvals.items():
        heads = {}
        for head in record["heads"]:
            segments = segments_that_count(head)
            heads[f"{head['name']}, {segments} segments"] = head["segments"][segments]
        top1 = {head: measures["top1"] for head, measures in heads.items()}
        gains = {
            head: measures["difference"]
            for head, measures in heads.items()
            if measures["difference"]
        }
        x_label = f"top-1 minus that of {record['baseline']}, points"
        sections.append(
            {
                "name": name,
                "record": record,
                "heads": heads,
                "picture": figures.forest(top1, x_label="top-1 %"),
                "gains": figures.forest(gains, zero=True, x_label=x_label) if gains else None,
            }
        )
    return sections


def ablations(contents: Contents) -> list[Record]:
    """The summary of each ablation, over g1 and g2, and over parameters."""
    sections = []
    for name, path in contents.ablations.items():
        rows, summary = _records(path), _records(path.with_name("summary.csv"))
        if len(rows) != sum(row["seeds"] + row["diverged"] for row in summary):
            summary = summarize(rows, {})  # summary.csv is missing, or lacks rows
        done = [row for row in summary if row["seeds"]]
        sections.append(
            {
                "name": name,
                "rows": summary,
                "heat_maps": [
                    (title, figures.heat_map(top1, ".1f", width=figures.HALF))
                    for title, top1 in heat_maps(summary).items()
                ],
                "front": figures.pareto(done) if done else None,
            }
        )
    return sections


def _records(path: Path) -> list[Record]:
    """The rows of a CSV. Empty cells are None, but empty measures are left out. [] if there is no
    file."""
    if not path.is_file():
        return []
    table = pd.read_csv(path).convert_dtypes().astype(object)
    return [
        {
            column: value
            for column, value in row.items()
            if value is not None or not column.startswith(MEASURES)
        }
        for row in table.where(table.notna(), None).to_dict("records")
    ]


def ensembles(contents: Contents) -> list[Record]:
    """The weights of each ensemble, and the contribution of each model: the average error of some
    models minus that of all models at equal weights."""
    sections = []
    for name, record in contents.ensembles.items():
        column = f"weight ({record['weights_from']})"
        weights = pd.DataFrame({column: record["weights"]}, record["models"])
        differences = {
            row["name"]: row["against_equal"]
            for row in record["table"]
            if row["name"] != "all, equal weights"
        }
        x_label = "average error against all at equal weights, points"
        sections.append(
            {
                "name": name,
                "record": record,
                "weights": figures.bars(weights, ["C0"], x_label=column),
                "differences": figures.forest(differences, zero=True, x_label=x_label),
            }
        )
    return sections


def backbones_with_random_weights(contents: Contents) -> dict[str, list[str]]:
    """Backbones with random weights, and the stores, runs, scores and cross-validations that depend
    on them."""
    records: Record = {name: store.provenance for name, store in contents.stores.items()}
    for name, file in contents.run_files("best.pt"):
        records[f"run {name}"] = Checkpoint.load(file).features
    records |= {name: scores[0].source for name, scores in contents.scores.items()}
    records |= {name: record.get("provenance") for name, record in contents.crossvals.items()}
    dependents: dict[str, list[str]] = {}
    for name, record in records.items():
        for backbone in dict.fromkeys(random_backbones(record)):
            dependents.setdefault(backbone, []).append(name)
    for names in dependents.values():
        stems = {Path(name).stem for name in names if name in contents.scores}
        for name, scores in contents.scores.items():  # an ensemble records its models' names
            if stems.intersection(scores[0].source.get("members", ())):
                names.append(name)
    return dependents


def provenance(contents: Contents) -> list[tuple[str, list[tuple[str, str]]]]:
    """Settings and values: how stores and scores were made, and the options of runs."""
    records = {name: store.provenance for name, store in contents.stores.items()}
    stores = list(records.values())
    for name, file in contents.run_files("options.json"):
        records[f"run {name}"] = read_json(file)
    for name, scores in contents.scores.items():
        source = dict(scores[0].source)
        if source.get("features") in stores:  # these are shown above
            del source["features"]
        records[name] = source
    return [(name, list(_flat(record))) for name, record in records.items() if record]


def _flat(record: Record, prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif isinstance(value, list) and value:
            yield f"{prefix}{key}", ", ".join(map(str, value))
        elif value not in (None, [], ""):
            yield f"{prefix}{key}", str(value)
