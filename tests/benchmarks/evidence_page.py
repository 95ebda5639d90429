"""EVIDENCE.md, EVIDENCE.csv and their figure, written from the scores that
tests/benchmarks/evidence.py keeps.

The page has one table per question, with all segments. The CSV has every model on every task at few
and all segments.
"""

import csv
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import softmax

from aggregate.metrics import Interval, bootstrap, csv_of, paired_bootstrap, ranks
from extract.durable import replace_file

PARTS = {
    "softmax instead of ReLU": "hgnl, softmax",
    "all as the paper's": "hgnl as the paper's",
    "frames not normalized": "hgnl, frames not normalized",
    "random start": "hgnl, random start",
    "s from 0": "hgnl, s from 0",
    "not standardized": "hgnl, not standardized",
    "weights shared by groups": "hgnl, shared",
    "g1 = 16, g2 = 1": "hgnl, g2=1",
    "g1 = 16, g2 = 2": "hgnl, g2=2",
    "g1 = 16, g2 = 4": "hgnl, g2=4",
    "g1 = 16, g2 = 16": "hgnl, g2=16",
}
HEADS = ("max", "weighted", "nl", "hgnl", "txb", "gru", "attentive", "attentive-time", "nextvlad")
SEES_ORDER = ("txb", "gru", "attentive-time")
FIGURE = "pipelines/evidence.png"


@dataclass(frozen=True)
class Facts:
    """A task as the page needs it. `groups` are those of the store, for every row."""

    name: str
    title: str
    segments: int
    folds: int
    groups: np.ndarray


class Results:
    """Scores of a task's models: logits float32 [videos, classes] by model, seed and segments."""

    def __init__(self, folder: Path, facts: Facts) -> None:
        self.facts, self.few = facts, min(3, facts.segments)
        self.files: dict[str, dict[int, dict[str, np.ndarray]]] = {}
        for path in sorted(folder.glob("*.npz")):
            name, _, seed = path.stem.rpartition("_")
            self.files.setdefault(name, {})[int(seed)] = dict(np.load(path))

    def right(self, name: str, segments: int, seeds: Sequence[int]) -> np.ndarray:
        """How often a video's class comes first over `seeds`: float [videos], or a mean for each clip where several
        videos show the same one."""
        several = [self.files[name][seed] for seed in seeds]
        values = np.mean(
            [ranks(one[f"at{segments}"], one["labels"]) == 0 for one in several], axis=0
        )
        if not self.facts.name.startswith(("planted", "order_")):
            return values
        _, which = np.unique(self.facts.groups[several[0]["rows"]], return_inverse=True)
        return np.bincount(which, values) / np.bincount(which)

    def top1(self, name: str, segments: int) -> Interval:
        return bootstrap(self.right(name, segments, sorted(self.files[name])))

    def difference(self, name: str, other: str, segments: int) -> Interval | None:
        """`name` minus `other`, over the seeds that both have; None if one was not trained."""
        seeds = sorted(self.files.get(name, {}).keys() & self.files.get(other, {}).keys())
        if not seeds:
            return None
        return paired_bootstrap(
            self.right(name, segments, seeds), self.right(other, segments, seeds)
        )

    def records(self) -> Iterator[dict[str, object]]:
        """A row of EVIDENCE.csv per model and number of segments."""
        for name, segments in itertools.product(
            self.files, sorted({self.few, self.facts.segments})
        ):
            top1 = self.top1(name, segments)
            gain = None if name == "tsn" else self.difference(name, "tsn", segments)
            changed = [float(one["attention"]) for one in self.files[name].values()]
            used = np.nanmean(changed) if np.isfinite(changed).any() else None
            yield {
                "task": self.facts.title,
                "videos": len(next(iter(self.files[name].values()))["labels"]),
                "model": name,
                "seeds": len(self.files[name]),
                "segments": segments,
                **percent("top1", top1),
                **percent("minus_tsn", gain),
                "changed_by_attention": "" if used is None else f"{100 * used:.1f}",
            }


def percent(name: str, found: Interval | None) -> dict[str, str]:
    ends = {name: "value", f"{name}_low": "low", f"{name}_high": "high"}
    return {
        column: "" if found is None else f"{100 * getattr(found, end):.1f}"
        for column, end in ends.items()
    }


def said(found: Interval) -> str:
    """A difference in points, with the conclusion that it supports."""
    verdict = (
        "better"
        if found.low > 0
        else "worse"
        if found.high < 0
        else "no difference beyond the interval"
    )
    return f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]: {verdict}"


def cell(found: Interval | None) -> str:
    """A difference in points, bold if its interval does not contain 0."""
    if found is None:
        return ""
    text = f"{100 * found.value:+.1f} [{100 * found.low:+.1f}, {100 * found.high:+.1f}]"
    return f"**{text}**" if found.low > 0 or found.high < 0 else text


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def differences(
    results: Sequence["Results"], compared: dict[str, tuple[str, str]], *, baseline: str = ""
) -> str:
    """Rows: each comparison (name minus other); columns: tasks. Rows without a figure are left out."""
    rows = []
    if baseline:
        cells = [f"{one.top1(baseline, one.facts.segments)}" for one in results]
        rows.append([f"{baseline}, top-1 %", *cells])
    for label, (name, other) in compared.items():
        cells = [cell(one.difference(name, other, one.facts.segments)) for one in results]
        if any(cells):
            rows.append([label, *cells])
    if not rows:
        return "Not trained when this was written.\n"
    return markdown(["", *(one.facts.title for one in results)], rows)


def left_out(one: Results, members: Sequence[str]) -> list[str]:
    """The fused scores of `members`, and the cost of leaving out each of them: means over the seeds
    that all have."""
    if any(name not in one.files for name in members):
        return []
    seeds = sorted(set.intersection(*(set(one.files[name]) for name in members)))
    n = one.facts.segments

    def right(names: Sequence[str]) -> np.ndarray:
        several = []
        for seed in seeds:
            files = [one.files[name][seed] for name in names]
            mean = np.mean([softmax(file[f"at{n}"], axis=1) for file in files], axis=0)
            several.append(ranks(mean, files[0]["labels"]) == 0)
        return np.mean(several, axis=0)

    whole = right(members)
    adds = [
        cell(paired_bootstrap(whole, right([other for other in members if other != name])))
        for name in members
    ]
    return [one.facts.title, f"{bootstrap(whole)}", *adds]


def draw(results: Sequence[Results], out: Path) -> None:
    """Plot top-1 minus TSN's with all segments, for every head and task, with intervals."""
    from matplotlib.figure import Figure

    heads: Sequence[str] = HEADS
    figure = Figure(figsize=(9, 0.62 * len(results) + 1.6), layout="constrained")
    axes = figure.subplots()
    heads = [name for name in heads if any(name in one.files for one in results)]
    for place, name in enumerate(heads):
        found = [
            (row, one.difference(name, "tsn", one.facts.segments))
            for row, one in enumerate(results)
        ]
        drawn = [(row, value) for row, value in found if value is not None]
        middle = np.array([100 * value.value for _, value in drawn])
        ends = np.abs([[100 * v.low for _, v in drawn], [100 * v.high for _, v in drawn]] - middle)
        where = [row + 0.1 * (place - (len(heads) - 1) / 2) for row, _ in drawn]
        axes.errorbar(middle, where, xerr=ends, fmt="o", ms=4, lw=1.2, label=name)
    axes.axvline(0, color="0.6", lw=1, zorder=0)
    axes.set_yticks(
        range(len(results)), [f"{one.facts.title}\n{videos(one)}" for one in results], fontsize=8
    )
    axes.invert_yaxis()
    axes.set_xlabel("top-1 minus TSN's, points, all segments; 95 % intervals over videos")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.legend(
        frameon=False, fontsize=8, ncols=len(heads), loc="upper center", bbox_to_anchor=(0.4, 1.1)
    )
    figure.savefig(out, dpi=110)


def videos(one: Results) -> str:
    file = next(iter(one.files["tsn"].values()))
    count = len(file["labels"])
    clips = len(one.right("tsn", one.few, [next(iter(one.files["tsn"]))]))
    folds = f", {one.facts.folds} folds" if one.facts.folds > 1 else ""
    return f"{count} test videos{f' of {clips} clips' if clips < count else ''}{folds}"


def groups_table(folder: Path) -> str:
    """Top-1 of a g1 x g2 ablation, as means over its seeds; empty if there is none."""
    path = folder / "ablation.csv"
    if not path.exists():
        return ""
    with path.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["agg"] == "hgnl"]
    values: dict[tuple[int, int], list[float]] = {}
    for row in rows:
        values.setdefault((int(row["g1"]), int(row["g2"])), []).append(float(row["top1_at_all"]))
    g1s, g2s = (sorted({key[place] for key in values}) for place in (0, 1))
    return markdown(
        ["top-1 %, all segments", *(f"g2 = {g2}" for g2 in g2s)],
        [
            [
                f"g1 = {g1}",
                *(
                    f"{100 * np.mean(values[g1, g2]):.1f}" if (g1, g2) in values else ""
                    for g2 in g2s
                ),
            ]
            for g1 in g1s
        ],
    )


INTRODUCTION = """# Evidence

Written by `make evidence` (tests/benchmarks/evidence.py): what the aggregators are worth on small sets of real data.
Measured at commit {commit}. [EVIDENCE.csv](EVIDENCE.csv) has every model on every task, at 3 segments and at all.

Features come from the pretrained EfficientNet-Lite0. All models are trained with their default recipes, on the same
batches. The last epoch counts, so nothing is chosen on the test videos. Tables show differences of top-1 in points,
with all segments. They are means over seeds (the CSV has their number) with paired 95 % bootstrap intervals over
videos, or over clips or scenes if several videos show the same one. The intervals hold for other videos of these few
people and exercises, not for other data sets, and do not include the variation over seeds. **Bold**: the interval does
not contain 0.

![differences to TSN of every head on every task](pipelines/evidence.png)
"""

RECIPE = """`--recipe cached`, the default, is eq. 7 (ReLU; the map is multiplied by n_train / n) with three additions
that training on a frozen cache needs: normalized inputs of W_q and W_k, a start as the average with s = 1, and
standardized features before the classifier. `--recipe paper` has none of these. Each row is the default minus a model
with one change, so a positive figure favors the default. Until commit ed1604d the default was softmax. Results of that
default, and of other heads and variants next to it, were measured at commit bfc3aa5 and are in that commit's
EVIDENCE.md, not here.
"""

CANNOT = """## What these data can show, and what they cannot

- They show whether a head finds the frames that matter if most of a clip shows something else (untrimmed, 3 of 25
  frames). They also show whether it does harm if all frames are alike (exercise_mini, daily_actions, vowels).
- They do not show the gain of HG-NL on Kinetics-700: the paper's gain, 0.3 points, is a tenth of the narrowest interval
  here. If the videos are available, `pipelines.kinetics700` trains the control and writes that table. They also do not
  show which part of the paper's result comes from Kinetics-600, and which from the backbone.
- The actions of the untrimmed tasks are photographs of exercises between films of rooms. The two are easy to tell
  apart, so attention has an easy task. If distractors look like actions, the gain may be smaller.
- Only the order tasks and the vowels have motion: exercise_mini's clips alternate between two photographs.
"""


def write_page(folder: Path, known: Sequence[Facts], out: Path, *, commit: str) -> None:
    """Write `out`, its CSV and its figure from the scores in `folder` and the ablation next to
    it."""
    results = {
        one.name: Results(folder / one.name, one) for one in known if (folder / one.name).exists()
    }
    results = {name: one for name, one in results.items() if "tsn" in one.files}
    videos_apart = [one for name, one in results.items() if not name.startswith("order_")]
    draw(videos_apart, out.parent / FIGURE)
    rows = [row for one in results.values() for row in one.records()]
    replace_file(out.with_suffix(".csv"), csv_of(rows))
    varied = [one for name, one in results.items() if name.startswith("untrimmed")]
    softmax = {"ReLU minus softmax": ("hgnl", "hgnl, softmax")}
    control = {
        "HG-NL from a TSN minus that TSN, trained as long again": (
            "hgnl from that TSN",
            "tsn, as many epochs more",
        ),
        "HG-NL from a TSN minus that TSN": ("hgnl from that TSN", "tsn"),
    }
    ordered = [one for name, one in results.items() if name.startswith("order_")]
    members = ("tsn", "hgnl", "txb")
    teams = [row for one in videos_apart if (row := left_out(one, members))]
    harm = [
        (one.facts.title, count, one.difference("hgnl", "tsn", count))
        for one in videos_apart
        for count in (one.few, one.facts.segments)
    ]
    title, count, worst = min(harm, key=lambda item: item[2].value if item[2] else np.inf)
    missing = [one.title for one in known if one.name not in results]
    parts = [
        INTRODUCTION.format(commit=commit),
        f"Not trained when this was written: {'; '.join(missing)}.\n" if missing else "",
        "## Which head?\n",
        differences(videos_apart, {name: (name, "tsn") for name in HEADS}, baseline="tsn"),
        f"\nThe largest loss of HG-NL against TSN: {title}, at {count} segments: {said(worst)}.\n"
        if worst
        else "",
        "## Is it attention, or the additional epochs?\n",
        differences(varied, control),
        "\n## ReLU or softmax?\n",
        differences(videos_apart, softmax),
        "\n## What does each part of the default recipe gain, and what do groups gain?\n",
        RECIPE,
        differences(varied, {label: ("hgnl", name) for label, name in PARTS.items()}),
        f"\nAn ablation of g1 and g2 on exercise_mini with its own split, 2 seeds:\n\n{grid}\n"
        if (grid := groups_table(folder.parent / "ablation"))
        else "",
        "\n## Which head if order matters?\n",
        'Models are trained and tested with all frames. The two classes of a "there or back" task have '
        "the same frames in opposite order, so heads that do not see order get 50 %. Heads that see it: "
        f"{', '.join(SEES_ORDER)}. Trained on 3 frames, these heads are worse with all frames: see JapaneseVowels, "
        "trained on 3, above.\n",
        differences(
            ordered,
            {name: (name, "tsn") for name in ("hgnl", "attentive", *SEES_ORDER)},
            baseline="tsn",
        ),
        "\n## Which member contributes most to an ensemble?\n",
        "Three kinds of models as in the paper (txb, StNet's block on cached features, replaces StNet) with equal "
        "weights: top-1 %, and the gain of each member over the other two.\n",
        markdown(["", "fused", *(f"{name} adds" for name in members)], teams),
        "\n" + CANNOT,
    ]
    text = "\n".join(part for part in parts if part).rstrip() + "\n"
    replace_file(out, text)
