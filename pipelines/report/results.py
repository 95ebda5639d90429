"""What the report shows of models: training, results, what is confused, ablations, ensembles, provenance."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aggregate import figures
from aggregate.metrics import summarise
from pipelines.report import page
from pipelines.report.find import Found, columns_of, read_json, read_rows

if TYPE_CHECKING:
    from aggregate.scores import Scores

PAIRS = 10
MATRIX_CLASSES = 20
CURVES = (
    ("Training loss", "loss", 1),
    ("Validation top-1 %", "val_top1", 100),
    ("Validation average error %", "val_average_error", 100),
    ("Attention: |s F_o| / |F|", "attention_ratio", 1),
)


def training(found: Found) -> str:
    """One chart a quantity, one colour a run; the models trained beside it (baseline, control) are dashed."""

    columns = {name: columns_of(read_rows(f)) for name, f in found.files("metrics.csv")}
    charts = []
    for label, column, factor in CURVES:
        lines = []
        for at, (name, values) in enumerate(columns.items()):
            for beside in ("", "baseline_", "control_"):
                if f"{beside}{column}" in values:
                    words = f"{name}, {beside.rstrip('_')}" if beside else name
                    epochs = values["epoch"] + 1
                    lines.append(
                        figures.Curve(words, epochs, factor * values[f"{beside}{column}"], at, dashed=bool(beside))
                    )
        if lines:
            charts.append(page.figure(figures.svg(figures.curves(lines, y_label=label)), f"{label} over epochs"))
    return page.side_by_side(charts) if charts else ""


@dataclass
class Model:
    """A model's summaries (`aggregate.metrics.Summary` as a record) on one split, by number of segments ("": fused)."""

    name: str
    summaries: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def last(self) -> tuple[str, dict[str, Any]]:
        return list(self.summaries.items())[-1]


MEASURES = {"top1": "top-1 %", "top5": "top-5 %", "mean_class": "mean class %", "average_error": "average error %"}


def results(found: Found) -> str:
    """A part for each split: its best model, intervals of all, and a table of models and measures over segments."""
    body = ""
    for split, models in _by_split(found).items():
        best = max(models, key=lambda model: model.last[1]["top1"]["value"])
        segments, summary = best.last
        words = f"Best of {len(models)}: " if len(models) > 1 else ""
        words += f"{best.name}, top-1 {_percent(summary['top1'])} %{_with(segments)}, {summary['listed']:,} videos."
        points = [
            figures.Point(f"{model.name}{_with(count)}", *(100 * one["top1"][k] for k in ("value", "low", "high")))
            for model in models
            for count, one in model.summaries.items()
        ]
        body += page.heading(f"Split {split}") + page.paragraph(words)
        body += page.figure(
            figures.svg(figures.forest(points, x_label="top-1 %, with its 95 % interval")),
            f"Top-1 of every model with its interval, split {split}",
            "Intervals: bootstrap over videos, 95 %. A video without scores counts as wrong.",
        )
        columns = sorted({count for model in models for count in model.summaries}, key=lambda count: int(count or 0))
        rows = [
            (model.name if at == 0 else "", words, *(_cell(model, count, measure) for count in columns), _scored(model))
            for model in models
            for at, (measure, words) in enumerate(MEASURES.items())
        ]
        head = (
            "model",
            "measure",
            *(f"{count} segments" if count else "fused" for count in columns),
            "scored / listed",
        )
        body += page.table(head, rows, numbers=tuple(range(2, len(head))))
    return body and body + page.paragraph(
        "A run's models are those of its best epoch, chosen on the validation videos that they are measured on here; "
        "scores of split all hold the training videos too."
    )


def _by_split(found: Found) -> dict[str, list[Model]]:
    """The models by the split they were tested on: of the runs' own validation, and of scores files with labels."""
    splits: dict[str, list[Model]] = {}
    for run, file in found.files("results.json"):
        options = read_json(file.with_name("options.json"))
        split = f"{options.get('val_split', 'val')!r}, in training"
        if options.get("val_groups"):
            split = f"of the groups {', '.join(options['val_groups'])}, in training"
        for name, summaries in read_json(file).items():
            splits.setdefault(split, []).append(Model(run if name == run else f"{run}: {name}", summaries))
    for name, several in found.scores.items():
        model = Model(name)
        for scores in several:
            if scores.labels is not None and (known := scores.labels >= 0).any():
                model.summaries[_segments(scores)] = asdict(summarise(scores.logits[known], scores.labels[known]))
        if model.summaries:
            splits.setdefault(f"{_split_of(several[0], found)!r}", []).append(model)
    return splits


def _split_of(scores: "Scores", found: Found) -> str:
    """What a scores file says; of an ensemble, what those of its members say that lie in the folder."""
    members = scores.source.get("members", [])
    theirs = {several[0].source.get("split") for name, several in found.scores.items() if Path(name).stem in members}
    return str(scores.source.get("split") or (theirs.pop() if len(theirs) == 1 else "") or "not said")


def _with(segments: str) -> str:
    return f", {segments} segments" if segments else ""


def _cell(model: Model, segments: str, measure: str) -> str:
    return _percent(model.summaries[segments][measure]) if segments in model.summaries else ""


def _scored(model: Model) -> str:
    return f"{model.last[1]['scored']:,} / {model.last[1]['listed']:,}"


def _segments(scores: "Scores") -> str:
    """How many; an ensemble has none of its own."""
    return "" if "members" in scores.source else str(scores.segments)


def _percent(interval: dict[str, float], *, sign: str = "") -> str:
    """`61.8 [61.3, 62.4]`, in percent."""
    value, low, high = (100 * interval[key] for key in ("value", "low", "high"))
    return f"{value:{sign}.1f} [{low:{sign}.1f}, {high:{sign}.1f}]"


def confusion(found: Found) -> str:
    """What the scores file with the best top-1 confuses: a matrix of the classes and the most frequent pairs."""

    best: tuple[float, str, Scores] | None = None
    for name, several in found.scores.items():
        scores = several[-1]
        if scores.labels is not None and (known := scores.labels >= 0).any():
            top1 = float((scores.logits.argmax(1) == scores.labels)[known & ~scores.failed].sum() / known.sum())
            best = max(best, (top1, name, scores), key=lambda b: b[0]) if best else (top1, name, scores)
    if best is None:
        return ""
    _, name, scores = best
    assert scores.labels is not None
    scored = (scores.labels >= 0) & ~scores.failed
    truth, guess, count = scores.labels[scored], scores.logits[scored].argmax(1), len(scores.classes)
    matrix = np.zeros((count, count), int)
    np.add.at(matrix, (truth, guess), 1)
    sizes = matrix.sum(1)
    wrong = matrix - np.diag(matrix.diagonal())
    order = np.argsort(-wrong, axis=None, kind="stable")[: max(PAIRS, MATRIX_CLASSES)]
    pairs = [divmod(int(at), count) for at in order if wrong.flat[at]]
    present = np.flatnonzero(sizes + matrix.sum(0)).tolist()
    confused = list(dict.fromkeys(c for pair in pairs for c in pair))[:MATRIX_CLASSES]
    shown = present if len(present) <= MATRIX_CLASSES else sorted(confused)
    body = ""
    if shown:
        shares = np.where(matrix > 0, matrix / np.maximum(sizes, 1)[:, None], np.nan)[np.ix_(shown, shown)]
        names = [scores.classes[c] for c in shown]
        drawn = figures.heat_map(
            shares,
            rows=names,
            columns=names,
            row_label="true",
            column_label="predicted",
            show=lambda share: f"{100 * share:.0f}",
            low=0.0,
        )
        rest = "" if len(shown) == len(present) else f" Of {len(present):,} classes, the {len(shown)} confused most."
        split = f" of split {scores.source['split']!r}" if "split" in scores.source else ""
        of = f"{_segments(scores)} segments, " if _segments(scores) else ""
        best_of = ", the best top-1 of the scores files" if len(found.scores) > 1 else ""
        caption = f"{name}{best_of}: {of}{scored.sum():,} videos{split}; % of a true class (row).{rest}"
        body += page.figure(figures.svg(drawn), f"Confusion matrix of {name}", caption)
    if pairs:
        ids = np.array(scores.ids, object)[scored]
        rows = [
            (scores.classes[true], scores.classes[said], f"{wrong[true, said]:,} of {sizes[true]:,}",
             ids[(truth == true) & (guess == said)][0])
            for true, said in pairs[:PAIRS]
        ]  # fmt: skip
        body += page.heading("Most confused pairs")
        body += page.table(("true", "predicted", "videos", "for example"), rows, numbers=(2,))
    return body or page.paragraph(f"{name}: no video has scores.")


# -- ablation and ensemble -----------------------------------------------------------------------------------------


def ablation(found: Found) -> str:
    """Of every configuration the mean over seeds with its interval, over g1 and g2 and over the parameters."""

    return "".join(page.heading(name) + _ablation(path, name) for name, path in found.ablations.items())


def _ablation(path: Path, name: str) -> str:
    from aggregate.ablation.compare import heat_map_figure, heat_maps, pareto_figure, summarise

    summary = summarise([_typed(row) for row in read_rows(path)], {})
    every = summary[0]["all_frames"]
    drawn = []
    for heat in heat_maps(summary):
        drawing = heat_map_figure(heat)
        caption = f"{heat.title}: top-1 % with {every} segments, mean over seeds; empty: invalid or not done."
        drawn.append(page.figure(figures.svg(drawing), f"Heat map of {name}: {heat.title} over g1 and g2", caption))
    done = [line for line in summary if line["seeds"]]
    if done:
        drawing = pareto_figure(done)
        caption = "Joined: no other has at most its parameters and a better top-1. Grey lines: intervals."
        drawn.append(page.figure(figures.svg(drawing), f"Pareto front of {name}: top-1 over parameters", caption))
    differences = {row["name"]: row for row in _finished(path.with_name("summary.csv"))}
    rows = []
    for one in summary:
        same = differences.get(one["name"])
        cells = [""] * 5
        if one["seeds"]:
            measures = ("top1_at_all", "top5_at_all", "average_error_at_all")
            cells = [*(_spread(one, measure) for measure in measures), "", f"{one['seconds']:.1f}"]
            if same and same["seeds"] == one["seeds"] and same["difference"] is not None:
                cells[3] = _spread(same, "difference", sign="+")
        notes = ["front"] * one["pareto"] + [f"{one['diverged']} diverged"] * bool(one["diverged"])
        rows.append((one["name"], one["seeds"], f"{one['parameters']:,}", *cells, ", ".join(notes)))
    percents = ("top-1 %", "top-5 %", "average error %", "top-1 - first's")
    head = ("configuration", "seeds", "parameters", *percents, "seconds", "")
    about = "of the mean over seeds" if any(one["seeds"] > 1 for one in summary) else "over videos, of one seed"
    words = (
        f"With {every} segments; intervals: 95 %, {about}; those of differences: paired, over videos. "
        "Each model at its best epoch, chosen on the same videos."
    )
    return page.side_by_side(drawn) + page.table(head, rows, numbers=tuple(range(1, 8))) + page.paragraph(words)


def _finished(path: Path) -> list[dict[str, Any]]:
    """The rows of a summary.csv; none before an ablation's end."""
    return [_typed(row) for row in read_rows(path)] if path.is_file() else []


def _spread(row: dict[str, Any], name: str, *, sign: str = "") -> str:
    return _percent({"value": row[name], "low": row[f"{name}_low"], "high": row[f"{name}_high"]}, sign=sign)


def _typed(row: dict[str, str]) -> dict[str, Any]:
    """The cells of a CSV as what they were before: None, whole numbers, numbers or text."""

    def typed(value: str) -> Any:
        for kind in (int, float):
            try:
                return kind(value)
            except ValueError:
                continue
        return value or None

    return {name: typed(value) for name, value in row.items()}


def ensemble(found: Found) -> str:
    """Weights, and who adds what: the average error of all models but one against all at equal weights."""

    body = ""
    for name, record in found.ensembles.items():
        models, weights = record["models"], record["weights"]
        kind = f"weight ({record['weights_from']})"
        drawn = figures.bars(models, [[w] for w in weights], {kind: figures.COLOURS[0]}, x_label=kind)
        body += page.heading(name) + page.figure(figures.svg(drawn), f"Weights of the models in {name}")
        if record.get("search"):
            body += page.paragraph(record["search"]["statement"])
        rows = [
            (row["name"], _percent(row["summary"]["top1"]), _percent(row["summary"]["average_error"]),
             _percent(row["against_equal"], sign="+"))
            for row in record["table"]
        ]  # fmt: skip
        if rows:
            differences = [
                figures.Point(row["name"], *(100 * row["against_equal"][k] for k in ("value", "low", "high")))
                for row in record["table"]
                if row["name"] != "all, equal weights"
            ]
            drawn = figures.forest(differences, zero=True, x_label="average error against all at equal weights, points")
            body += page.figure(
                figures.svg(drawn),
                f"Who adds what in {name}",
                "Right of 0 is worse than all models together; `without` a model: what that one adds.",
            )
            head = ("models", "top-1 %", "average error %", "error against equal weights, points")
            body += page.table(head, rows, numbers=(1, 2, 3))
    return body


def provenance(found: Found) -> str:
    """What made the stores, and the options of the runs."""

    body = ""
    for name, store in found.stores.items():
        body += page.heading(name) + page.table(("setting", "value"), _flat(store.provenance))
    for name, file in found.files("options.json"):
        body += page.heading(f"run {name}") + page.table(("setting", "value"), _flat(read_json(file)))
    for name, several in found.scores.items():
        source = dict(several[0].source)
        if any(source.get("features") == store.provenance for store in found.stores.values()):
            del source["features"]  # it is shown above
        if source:
            body += page.heading(name) + page.table(("setting", "value"), _flat(source))
    return body


def _flat(record: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        elif value not in (None, [], ""):
            yield f"{prefix}{key}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)
