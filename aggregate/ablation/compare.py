"""Summary of an ablation: means and intervals over seeds, differences, Pareto front, g1 x g2 maps.

Rows are those of ablation.csv, one per configuration and seed. Only figures need matplotlib.
"""

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from aggregate.metrics import (
    ENDS,
    Interval,
    bootstrap,
    csv_of,
    describe_units,
    independent_units,
)
from extract import Record
from extract.cli import text_table
from extract.commands import install_command
from extract.durable import replace_file

if TYPE_CHECKING:
    import pandas as pd

MEASURES = tuple(
    f"{name}_{segments}"
    for segments in ("at_frames", "at_all")
    for name in ("top1", "top5", "average_error")
)
ATTENTION = ("s", "unevenness", "changed")  # of `aggregate.inference.attention`
_OWN_TO_A_SEED = {
    "seed",
    "status",
    "best_epoch",
    *ATTENTION,
    "seconds",
    "pass_seconds",
    "pass_models",
}
# `Result.label_ranks` by name and seed; None for a model that diverged.
RanksByRun = Mapping[tuple[str, int], np.ndarray | None]


def summarize(
    rows: Sequence[Record], ranks_by_run: RanksByRun, groups: np.ndarray | None = None
) -> list[Record]:
    """One row per configuration, in the order of `rows`: means over seeds, with intervals.

    `interval_over` is "seeds" (Student's t over the seeds), or "videos" with one seed (the
    bootstrap of that row). `difference` is top-1 with all segments minus the first configuration's,
    for the same seeds and videos, with a bootstrap interval over `groups`, the keys of the store's
    rows.
    """
    names = list(dict.fromkeys(row["name"] for row in rows))
    summary = []
    for name in names:
        own = [row for row in rows if row["name"] == name]
        done = [row for row in own if row["status"] == "done"]
        line = {
            column: value
            for column, value in own[0].items()
            if column not in _OWN_TO_A_SEED and not column.startswith(MEASURES)
        }
        over = "seeds" if len(done) > 1 else "videos" if done else ""
        line |= {"seeds": len(done), "diverged": len(own) - len(done), "interval_over": over}
        for measure in MEASURES if done else ():
            if len(done) > 1:
                interval = over_seeds([row[measure] for row in done])
            else:
                interval = Interval.of(done[0], measure)
            line |= interval.columns(measure)
        for column in (*ATTENTION, "seconds"):
            values = [row[column] for row in done if row[column] is not None]
            line[column] = statistics.fmean(values) if values else None
        line |= dict.fromkeys(f"difference{end}" for end in ENDS)
        seeds = [row["seed"] for row in done]
        if name != names[0] and (gain := difference(ranks_by_run, name, names[0], seeds, groups)):
            line |= gain.columns("difference")
        summary.append(line)
    front = pareto(summary)
    return [line | {"pareto": line["name"] in front} for line in summary]


def over_seeds(fractions: Sequence[float]) -> Interval:
    """The mean of two or more fractions, and its 95 % interval by Student's t, cut to 0 to 1."""
    from scipy.special import stdtrit

    mean, count = statistics.fmean(fractions), len(fractions)
    half = float(stdtrit(count - 1, 0.975)) * statistics.stdev(fractions) / count**0.5
    return Interval(mean, max(mean - half, 0.0), min(mean + half, 1.0))


def difference(
    ranks_by_run: RanksByRun,
    name: str,
    baseline: str,
    seeds: Sequence[int],
    groups: np.ndarray | None = None,
) -> Interval | None:
    """Top-1 with all segments of `name` minus that of `baseline`, over the seeds that both have.

    Each video's difference is averaged over seeds, then the videos are averaged, with a bootstrap
    interval over `groups` of the store's rows. None if there is no common seed.
    """
    gains, videos = [], []
    for seed in seeds:
        ours, theirs = ranks_by_run.get((name, seed)), ranks_by_run.get((baseline, seed))
        if ours is not None and theirs is not None:
            gains.append((ours[2] == 0).astype(float) - (theirs[2] == 0))
            videos.append(ours[0])
    if not gains:
        return None
    # With held-out videos, seeds validate on different ones: a video is averaged over the seeds
    # that validated on it.
    rows, video = np.unique(np.concatenate(videos), return_inverse=True)
    means = np.bincount(video, np.concatenate(gains)) / np.bincount(video)
    return bootstrap(means, None if groups is None else groups[rows])


def pareto(summary: Sequence[Record]) -> list[str]:
    """Names of the configurations on the Pareto front, from the fewest parameters to the most.

    A configuration is on the front if no other has at most its parameters and a better top-1, or
    fewer parameters and an equal top-1.
    """
    front: list[Record] = []
    done = [line for line in summary if "top1_at_all" in line]
    for line in sorted(done, key=lambda line: (line["parameters"], -line["top1_at_all"])):
        if not front or line["top1_at_all"] > front[-1]["top1_at_all"]:
            front.append(line)
    return [line["name"] for line in front]


def heat_maps(summary: Sequence[Record]) -> "dict[str, pd.DataFrame]":
    """Mean top-1 % with all segments over g1 (rows) and g2 (columns), if one has several values.

    There is one map for each setting of the other options, and that setting is its title. A pair
    that is invalid or not done is NaN.
    """
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


# -- text ------------------------------------------------------------------------------------------

_ABOUT = {
    "seeds": "With several seeds: 95 % intervals of the mean over seeds (Student's t), not of "
    "other videos.",
    "videos": "With one seed: 95 % bootstrap intervals over {units}, not of other seeds.",
    "epoch": "Each model at its best epoch, chosen on the same videos.",
    "difference": "Differences are paired, of the same seeds and videos, with bootstrap intervals "
    "over {units}.\n"
    "front: no other has at most its parameters and a better top-1.\n"
    "unevenness: how far frame weights are from even (0 %) to a single frame (100 %); "
    "changed: predictions that differ if they are made even.",
}


def summary_text(summary: Sequence[Record], units: str = "videos") -> str:
    """The table for the terminal: percent, differences in points; intervals are over `units`."""
    frames = sorted({line["frames"] for line in summary})
    all_frames = summary[0]["all_frames"]
    measures = {
        "top1_at_all": f"top-1 % @{all_frames}",
        "top5_at_all": f"top-5 % @{all_frames}",
        "average_error_at_all": f"average error % @{all_frames}",
    }
    if frames != [all_frames]:
        few = frames[0] if len(frames) == 1 else "few"
        measures = {"top1_at_frames": f"top-1 % @{few}"} | measures
    formats = {"s": ".2g", "unevenness": ".1%", "changed": ".1%", "seconds": ".1f"}
    header = ["", "seeds", "parameters", "MAdds", *measures.values(), "top-1 - first's", *formats]
    rows = [[*header, ""]]
    for line in summary:
        notes = ["front"] if line["pareto"] else []
        if line["diverged"]:
            notes.append(f"{line['diverged']} DIVERGED")
        rows.append(
            [
                line["name"],
                *(f"{line[name]:,}" for name in ("seeds", "parameters", "madds")),
                *(percent(line, measure) for measure in measures),
                percent(line, "difference", sign="+"),
                *(
                    "" if line[name] is None else f"{line[name]:{formats[name]}}"
                    for name in formats
                ),
                ", ".join(notes),
            ]
        )
    over = sorted({line["interval_over"] for line in summary} - {""})
    about = "\n".join(_ABOUT[topic] for topic in ("epoch", *over, "difference"))
    return f"{text_table(rows)}\n\n{about.format(units=units)}"


def percent(line: Record, measure: str, *, sign: str = "") -> str:
    """`61.83 [61.3, 62.4]`, or an empty string if it was not measured."""
    return "" if line.get(measure) is None else format(Interval.of(line, measure), sign)


def heat_map_text(title: str, top1: "pd.DataFrame") -> str:
    """The map as a table of percentages, with a dot for a missing one."""
    named = top1.rename(index="g1={}".format, columns="g2={}".format)
    named = named.rename_axis(index=None, columns=f"top-1 %, {title}")
    return named.to_string(float_format="{:.2f}".format, na_rep=".")


# -- files -----------------------------------------------------------------------------------------


def report(
    out: Path,
    rows: Sequence[Record],
    ranks_by_run: RanksByRun,
    groups: np.ndarray,
    skipped: Mapping[str, str],
) -> None:
    """Print the summary; write summary.csv, summary.txt and, with matplotlib, heatmap.png and
    pareto.png.

    `groups` are the keys of the store's rows (`group_keys`), `skipped` the reasons by name.
    """
    summary = summarize(rows, ranks_by_run, groups)
    maps = heat_maps(summary)
    validated = [ranks[0] for ranks in ranks_by_run.values() if ranks is not None]
    units = "videos"
    if validated:
        keys = groups[np.unique(np.concatenate(validated))]
        units = describe_units(len(np.unique(independent_units(keys))), len(keys))
    parts = [summary_text(summary, units)]
    parts += [heat_map_text(title, top1) for title, top1 in maps.items()]
    if skipped:
        reasons = [f"{name}: {reason}" for name, reason in skipped.items()]
        parts.append("\n  ".join(["skipped:", *reasons]))
    text = "\n\n".join(parts)
    print(f"{text}\n")
    replace_file(out / "summary.txt", f"{text}\n")
    replace_file(out / "summary.csv", csv_of(summary))
    files = ["ablation.csv", "summary.csv", "summary.txt", *_figures(out, summary, maps)]
    print(f"files: {', '.join(str(out / name) for name in files)}")


def _figures(out: Path, summary: Sequence[Record], maps: "Mapping[str, pd.DataFrame]") -> list[str]:
    """Write the figures, or print a note without matplotlib; returns their names."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        print(f"no figures: matplotlib is not installed ({install_command('demo')})")
        return []
    from aggregate import figures

    drawn = {
        f"heatmap{number or ''}.png": figures.heat_map(top1, ".1f", width=figures.HALF)
        for number, top1 in enumerate(maps.values())
    }
    if done := [line for line in summary if line["seeds"]]:
        drawn["pareto.png"] = figures.pareto(done)
    for name, figure in drawn.items():
        replace_file(out / name, figures.png(figure))
    return list(drawn)
