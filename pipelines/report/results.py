"""What the report shows of models: training, results, what is confused, ablations, ensembles,
provenance."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from aggregate import figures
from aggregate.ablation.compare import heat_maps, percent, summarize
from aggregate.metrics import describe_units
from aggregate.training.checkpoint import Checkpoint
from pipelines.report.compared import choose, models_by_split, segments_that_count
from pipelines.report.find import Found, read_json

PAIRS = 10
MATRIX_CLASSES = 20
CURVES = (
    ("Training loss", "loss", 1),
    ("Validation top-1 %", "val_top1", 100),
    ("Validation average error %", "val_average_error", 100),
    ("Attention: frame weights from even (0) to a single frame (100), %", "unevenness", 100),
    ("Attention: predictions that it changes, %", "changed", 100),
)


def training(found: Found) -> dict[str, Any]:
    """One chart a quantity, one color a run; the models trained beside it (baseline, control) are
    dashed."""
    tables = {run: pd.read_csv(file, index_col="epoch") for run, file in found.files("metrics.csv")}
    charts = {}
    for label, column, factor in CURVES:
        lines = {}
        for at, (run, epochs) in enumerate(tables.items()):
            for beside in ("", "baseline", "control"):
                name = f"{beside}_{column}".strip("_")
                if name in epochs and np.isfinite(epochs[name]).any():
                    values = factor * epochs[name]
                    lines[", ".join(filter(None, [run, beside]))] = (
                        values,
                        f"C{at}{'--' if beside else '-'}",
                    )
        if lines:
            charts[label] = figures.curves(lines, y_label=label)
    return charts


def results(found: Found) -> list[dict[str, Any]]:
    """For each split a table of its models with four measures, and their top-1 with its interval as
    a chart."""
    splits = models_by_split(found)
    shown = []
    for split, models in splits.items():
        points = {
            f"{name}, {count} segments" if count else name: measures["top1"]
            for name, model in models.items()
            for count, measures in model.summaries.items()
        }
        picture = figures.forest(points, x_label="top-1 %, with its 95 % interval")
        best, chosen = choose(splits, split)
        listed = models[best].measures["listed"]
        # Runs of earlier versions resampled videos.
        resampled = describe_units(models[best].measures.get("units", listed), listed)
        record = {
            "name": split,
            "models": models,
            "best": best,
            "chosen": chosen,
            "resampled": resampled,
        }
        shown.append(record | {"picture": picture})
    return shown


def confusion(found: Found) -> dict[str, Any]:
    """What the best model of the first split confuses: a matrix of the classes and the most
    frequent pairs."""
    splits = {
        split: scored
        for split, models in models_by_split(found).items()
        if (scored := {name: model for name, model in models.items() if model.scores is not None})
    }
    if not splits:
        return {}
    split = next(iter(splits))
    name, chosen = choose(splits, split)
    scores: Any = splits[split][name].scores
    scored = (scores.labels >= 0) & ~scores.failed
    columns = {"true": scores.labels[scored], "predicted": scores.logits[scored].argmax(1)}
    seen = pd.DataFrame(columns | {"id": np.array(scores.ids, object)[scored]})
    pairs = (
        seen[seen["true"] != seen["predicted"]]
        .groupby(["true", "predicted"])["id"]
        .agg(["size", "first"])
    )
    pairs = pairs.sort_values("size", ascending=False, kind="stable")
    present = sorted({*seen["true"], *seen["predicted"]})
    worst = sorted(
        list(dict.fromkeys(label for pair in pairs.index for label in pair))[:MATRIX_CLASSES]
    )
    shown = present if len(present) <= MATRIX_CLASSES else worst
    of = "" if "members" in scores.source else f"{scores.segments} segments, "
    rest = (
        ""
        if len(shown) == len(present)
        else f" Of {len(present):,} classes, the {len(shown)} confused most."
    )
    caption = (
        f"{name} ({chosen}): {of}{len(seen):,} videos of split {split}. Each row is a true class; the numbers are "
        f"the percentage of its videos that were given each class.{rest}"
    )
    sizes, classes = seen["true"].value_counts(), scores.classes
    rows = [
        (classes[true], classes[guess], *pair, sizes[true])
        for (true, guess), *pair in pairs[:PAIRS].itertuples()
    ]
    record: dict[str, Any] = {"name": name, "caption": caption, "pairs": rows}
    if not shown:
        return record
    shares = 100 * pd.crosstab(seen["true"], seen["predicted"], normalize="index").reindex(
        index=shown, columns=shown
    )
    shares = shares.where(shares > 0).rename(
        index=dict(enumerate(classes)), columns=dict(enumerate(classes))
    )
    large = len(shown) > 10  # on a phone such a matrix is pushed sideways
    return record | {
        "picture": figures.heat_map(shares, ".0f", low=0, width=9 if large else figures.WIDE),
        "large": large,
    }


def crossvals(found: Found) -> list[dict[str, Any]]:
    """Heads judged on videos that none of their folds trained on: top-1, and what each gains over
    the baseline."""
    shown = []
    for name, record in found.crossvals.items():
        heads = {}
        for head in record["heads"]:
            segments = segments_that_count(head)
            heads[f"{head['name']}, {segments} segments"] = head["segments"][segments]
        points = {head: one["top1"] for head, one in heads.items()}
        gained = {head: one["difference"] for head, one in heads.items() if one["difference"]}
        against = f"top-1 minus that of {record['baseline']}, points"
        picture = figures.forest(points, x_label="top-1 %")
        gains = figures.forest(gained, zero=True, x_label=against) if gained else None
        shown.append(
            {"name": name, "record": record, "heads": heads, "picture": picture, "gains": gains}
        )
    return shown


def ablations(found: Found) -> list[dict[str, Any]]:
    """Of every configuration the mean over seeds with its interval, over g1 and g2 and over the
    parameters."""
    shown = []
    for name, path in found.ablations.items():
        summary = summarize(_records(path), {})
        finished = {
            row["name"]: row for row in _records(path.with_name("summary.csv"))
        }  # none before the end
        for one in summary:
            same = finished.get(one["name"], {})
            one["gain"] = (
                percent(same, "difference", sign="+") if same.get("seeds") == one["seeds"] else ""
            )
        done = [row for row in summary if row["seeds"]]
        maps = heat_maps(summary).items()
        heat = [(title, figures.heat_map(top1, ".1f", width=figures.HALF)) for title, top1 in maps]
        front = figures.pareto(done) if done else None
        shown.append({"name": name, "rows": summary, "heat_maps": heat, "front": front})
    return shown


def _records(path: Path) -> list[dict[str, Any]]:
    """The rows of a CSV, their cells None, whole numbers, numbers or text; none where there is no
    file."""
    if not path.is_file():
        return []
    table = pd.read_csv(path).convert_dtypes().astype(object)
    return table.where(table.notna(), None).to_dict("records")


def ensembles(found: Found) -> list[dict[str, Any]]:
    """Weights, and who adds what: the average error of all models but one against all at equal
    weights."""
    shown = []
    for name, record in found.ensembles.items():
        kind = f"weight ({record['weights_from']})"
        weights = figures.bars(
            pd.DataFrame({kind: record["weights"]}, record["models"]), ["C0"], x_label=kind
        )
        others = {
            row["name"]: row["against_equal"]
            for row in record["table"]
            if row["name"] != "all, equal weights"
        }
        adds = figures.forest(
            others, zero=True, x_label="average error against all at equal weights, points"
        )
        shown.append({"name": name, "record": record, "weights": weights, "differences": adds})
    return shown


def random_backbones(found: Found) -> dict[str, list[str]]:
    """Backbones with random weights, and the stores, runs, scores and cross-validations that rest
    on them."""
    records: dict[str, Any] = {name: store.provenance for name, store in found.stores.items()}
    records |= {
        f"run {name}": Checkpoint.load(file).features for name, file in found.files("best.pt")
    }
    records |= {name: several[0].source for name, several in found.scores.items()}
    records |= {name: record.get("provenance") for name, record in found.crossvals.items()}
    resting: dict[str, list[str]] = {}
    for name, record in records.items():
        for backbone in dict.fromkeys(_random_in(record)):
            resting.setdefault(backbone, []).append(name)
    for names in resting.values():
        stems = {Path(name).stem for name in names if name in found.scores}
        for name, several in found.scores.items():  # ensembles record the names of their members
            if stems.intersection(several[0].source.get("members", ())):
                names.append(name)
    return resting


def _random_in(record: Any) -> Iterator[str]:
    if isinstance(record, list | tuple):
        for part in record:
            yield from _random_in(part)
    elif isinstance(record, dict):
        weights = record.get("weights")
        if isinstance(weights, dict) and str(weights.get("name")).startswith("random weights"):
            yield f"{record.get('backbone')} ({weights['name']})"
        yield from _random_in([*record.values()])


def provenance(found: Found) -> list[tuple[str, list[tuple[str, str]]]]:
    """What made the stores and the scores, and the options of the runs: settings with their
    values."""
    records = {name: store.provenance for name, store in found.stores.items()}
    made = list(records.values())
    records |= {f"run {name}": read_json(file) for name, file in found.files("options.json")}
    for name, several in found.scores.items():
        source = several[0].source
        shown_above = {"features"} if source.get("features") in made else set()
        records[name] = {key: value for key, value in source.items() if key not in shown_above}
    return [(name, list(_flat(record))) for name, record in records.items() if record]


def _flat(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value not in (None, [], ""):
            yield (
                f"{prefix}{key}",
                ", ".join(map(str, value)) if isinstance(value, list) else str(value),
            )
