"""What an ablation's results say: means and intervals over seeds, differences, the Pareto front, g1
x g2 maps.

Rows are those of ablation.csv: a configuration and seed each. matplotlib is needed for the figures
only.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from aggregate.metrics import (
    ENDS,
    Interval,
    bootstrap,
    csv_of,
    describe_units,
    independent_units,
    text_table,
)
from extract.commands import install_command
from extract.durable import replace_file

if TYPE_CHECKING:
    import pandas as pd

Row = dict[str, Any]
MEASURES = tuple(
    f"{name}_{segments}"
    for segments in ("at_frames", "at_all")
    for name in ("top1", "top5", "average_error")
)
ATTENTION = ("s", "unevenness", "changed")  # of `aggregate.training.sources.attention`
_OWN_TO_A_SEED = {
    "seed",
    "status",
    "best_epoch",
    *ATTENTION,
    "seconds",
    "pass_seconds",
    "pass_models",
}


Places = Mapping[tuple[str, int], np.ndarray | None]


def summarize(rows: Sequence[Row], places: Places, groups: np.ndarray | None = None) -> list[Row]:
    """One row a configuration, in the order of `rows`: means over seeds, of each measure with its
    95 % interval.

    `interval_over` says what an interval is about: "seeds" (Student's t over the seeds), or, with
    one seed, "videos" (the bootstrap of that row). `difference` is top-1 with all segments minus
    the first configuration's, of the same seeds and videos, with a bootstrap interval over
    `groups`, the keys of the store's rows: `places` are `Result.label_ranks` by name and seed.
    """
    names = list(dict.fromkeys(row["name"] for row in rows))
    summary = []
    for name in names:
        own = [row for row in rows if row["name"] == name]
        done = [row for row in own if row["status"] == "done"]
        line = {
            k: v
            for k, v in own[0].items()
            if k not in _OWN_TO_A_SEED and not k.startswith(MEASURES)
        }
        over = "seeds" if len(done) > 1 else "videos" if done else ""
        line |= {"seeds": len(done), "diverged": len(own) - len(done), "interval_over": over}
        for measure in MEASURES if done else ():
            several = len(done) > 1
            found = (
                over_seeds([row[measure] for row in done])
                if several
                else Interval.of(done[0], measure)
            )
            line |= found.columns(measure)
        for column in (*ATTENTION, "seconds"):
            values = [row[column] for row in done if row[column] is not None]
            line[column] = statistics.fmean(values) if values else None
        gain = (
            None
            if name == names[0]
            else difference(places, name, names[0], [row["seed"] for row in done], groups)
        )
        line |= (
            gain.columns("difference")
            if gain
            else dict.fromkeys(f"difference{end}" for end in ENDS)
        )
        summary.append(line)
    front = pareto(summary)
    return [line | {"pareto": line["name"] in front} for line in summary]


def over_seeds(fractions: Sequence[float]) -> Interval:
    """The mean of two or more, and its 95 % interval by Student's t, which does not know that they
    are fractions."""
    from scipy.special import stdtrit

    mean = statistics.fmean(fractions)
    half = (
        float(stdtrit(len(fractions) - 1, 0.975))
        * statistics.stdev(fractions)
        / len(fractions) ** 0.5
    )
    return Interval(mean, max(mean - half, 0.0), min(mean + half, 1.0))


def difference(
    places: Places, name: str, other: str, seeds: Sequence[int], groups: np.ndarray | None = None
) -> Interval | None:
    """Top-1 with all segments of `name` minus that of `other`: the mean over the seeds that both
    have, of each video, and its bootstrap interval over `groups` of the store's rows. None if no
    seed is common."""
    gained, videos = [], []
    for seed in seeds:
        ours, theirs = places.get((name, seed)), places.get((other, seed))
        if ours is not None and theirs is not None:
            gained.append((ours[2] == 0).astype(float) - (theirs[2] == 0))
            videos.append(ours[0])
    if not gained:
        return None
    # With held-out videos the seeds validate on different ones: each video's mean is over the seeds
    # that have it.
    rows, which = np.unique(np.concatenate(videos), return_inverse=True)
    means = np.bincount(which, np.concatenate(gained)) / np.bincount(which)
    return bootstrap(means, None if groups is None else groups[rows])


def pareto(summary: Sequence[Row]) -> list[str]:
    """Names of the configurations that no other one beats: none has at most its parameters and a
    better top-1 (or as good a one with fewer). By parameters, rising."""
    front: list[Row] = []
    done = [line for line in summary if "top1_at_all" in line]
    for line in sorted(done, key=lambda line: (line["parameters"], -line["top1_at_all"])):
        if not front or line["top1_at_all"] > front[-1]["top1_at_all"]:
            front.append(line)
    return [line["name"] for line in front]


def heat_maps(summary: Sequence[Row]) -> "dict[str, pd.DataFrame]":
    """Mean top-1 % with all segments over g1 (rows) and g2 (columns), where either takes several
    values; NaN where a pair is invalid or not done. A map for each setting of the other options,
    which is its title."""
    import pandas as pd

    lines = pd.DataFrame(
        [line | {"top1": 100 * line.get("top1_at_all", math.nan)} for line in summary]
    )
    lines = lines.dropna(subset="g1").astype({"g1": int, "g2": int})
    if lines["g1"].nunique() * lines["g2"].nunique() < 2:
        return {}
    titles = lines["name"].str.replace(r" g[12]=\d+", "", regex=True)
    axes = {"index": sorted(lines["g1"].unique()), "columns": sorted(lines["g2"].unique())}
    return {
        str(title): part.pivot(index="g1", columns="g2", values="top1").reindex(**axes)
        for title, part in lines.groupby(titles, sort=False)
    }


# -- in words ------------------------------------------------------------------------------------------------------

_ABOUT = {
    "seeds": "With several seeds: 95 % intervals of the mean over seeds (Student's t), not of other videos.",
    "videos": "With one seed: 95 % bootstrap intervals over {units}, not of other seeds.",
    "epoch": "Each model at its best epoch, chosen on the same videos.",
    "difference": "Differences are paired, of the same seeds and videos, with bootstrap intervals over {units}.\n"
    "front: no other has at most its parameters and a better top-1.\n"
    "unevenness: how far frame weights are from even (0 %) to a single frame (100 %); "
    "changed: predictions that differ if they are made even.",
}


def summary_text(summary: Sequence[Row], units: str = "videos") -> str:
    """The table of the terminal: percent, differences in points; `units` are what intervals are
    over."""
    frames, every = sorted({line["frames"] for line in summary}), summary[0]["all_frames"]
    few = str(frames[0]) if len(frames) == 1 else "few"
    shown = {
        "top1_at_frames": f"top-1 % @{few}",
        "top1_at_all": f"top-1 % @{every}",
        "top5_at_all": f"top-5 % @{every}",
        "average_error_at_all": f"average error % @{every}",
    }
    if frames == [every]:
        del shown["top1_at_frames"]
    rows = [
        [
            "",
            "seeds",
            "parameters",
            "MAdds",
            *shown.values(),
            "top-1 - first's",
            "s",
            "unevenness",
            "changed",
            "seconds",
            "",
        ]
    ]
    for line in summary:
        cells = [
            *(percent(line, measure) for measure in shown),
            percent(line, "difference", sign="+"),
        ]
        numbers = ("s", ".2g"), ("unevenness", ".1%"), ("changed", ".1%"), ("seconds", ".1f")
        cells += ["" if line[name] is None else format(line[name], spec) for name, spec in numbers]
        notes = ["front"] * line["pareto"] + [f"{line['diverged']} DIVERGED"] * bool(
            line["diverged"]
        )
        size = [f"{line['seeds']}", f"{line['parameters']:,}", f"{line['madds']:,}"]
        rows.append([line["name"], *size, *cells, ", ".join(notes)])
    about = sorted({line["interval_over"] for line in summary} - {""})
    about_them = "\n".join([_ABOUT["epoch"], *(_ABOUT[one] for one in about), _ABOUT["difference"]])
    return f"{text_table(rows)}\n\n{about_them.format(units=units)}"


def percent(line: Row, measure: str, *, sign: str = "") -> str:
    """`61.83 [61.3, 62.4]`, or nothing where it was not measured."""
    return "" if line.get(measure) is None else format(Interval.of(line, measure), sign)


def heat_map_text(title: str, top1: "pd.DataFrame") -> str:
    """The map as a table: percent, a dot where there is none."""
    rows = [[f"top-1 %, {title}", *(f"g2={g2}" for g2 in top1.columns)]]
    for g1, *values in top1.itertuples():
        rows.append(
            [f"g1={g1}", *("." if math.isnan(value) else f"{value:.2f}" for value in values)]
        )
    return text_table(rows)


# -- as files ------------------------------------------------------------------------------------------------------


def report(
    out: Path, rows: Sequence[Row], places: Places, groups: np.ndarray, skipped: Sequence[str]
) -> None:
    """Print the summary; write summary.csv, summary.txt and, with matplotlib, heatmap.png and
    pareto.png.

    `groups` are the keys of the store's rows (`group_keys`)."""
    summary = summarize(rows, places, groups)
    maps = heat_maps(summary)
    validated = [known[0] for known in places.values() if known is not None]
    units = "videos"
    if validated:
        keys = groups[np.unique(np.concatenate(validated))]
        units = describe_units(len(np.unique(independent_units(keys))), len(keys))
    parts = [summary_text(summary, units), *(heat_map_text(*one) for one in maps.items())]
    if skipped:
        parts.append("\n  ".join(["skipped:", *skipped]))
    text = "\n\n".join(parts)
    print(f"{text}\n")
    replace_file(out / "summary.txt", f"{text}\n")
    replace_file(out / "summary.csv", csv_of(summary))
    files = ["ablation.csv", "summary.csv", "summary.txt", *_figures(out, summary, maps)]
    print(f"files: {', '.join(str(out / name) for name in files)}")


def _figures(out: Path, summary: Sequence[Row], maps: "Mapping[str, pd.DataFrame]") -> list[str]:
    """The figures written; without matplotlib none, which is said."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        print(f"no figures: matplotlib is not installed ({install_command('demo')})")
        return []
    from aggregate import figures

    heat = [figures.heat_map(top1, ".1f", width=figures.HALF) for top1 in maps.values()]
    drawn = {f"heatmap{number or ''}.png": figure for number, figure in enumerate(heat)}
    if done := [line for line in summary if line["seeds"]]:
        drawn["pareto.png"] = figures.pareto(done)
    for name, figure in drawn.items():
        replace_file(out / name, figures.png(figure))
    return list(drawn)
