"""The report's figures, drawn with matplotlib; each function returns a `Figure`, `svg` and `jpeg`
make pictures of one.

A number that is not finite is not a point: a curve has a gap there, a heat map an empty cell. Colors
are `C0` to `C7` of figures.mplstyle.
"""

import io
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from extract import InputError
from extract.commands import install_command

try:
    import matplotlib as mpl
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter
except ImportError:
    raise InputError(
        "figures need matplotlib, which is not installed: " + install_command("demo")
    ) from None

if TYPE_CHECKING:
    import pandas as pd

INK, SOFT, LINE = "#1d2329", "#5d6670", "#dfe2e3"
COLORS = 8
SHAPES = ("o", "s", "^")  # after 8 colors the shape changes: 24 kinds can be told apart
KINDS = COLORS * len(SHAPES)
STATUS = {"ok": "#2a7f62", "partial": "#e0a92e", "failed": "#b3402c", "pending": LINE}

FILM_FRAMES = 25
WIDE, HALF = (
    5.4,
    4.8,
)  # inches: figures on their own, and those in pairs; 72 px per inch, so both fit a phone unscaled


# -- pictures ------------------------------------------------------------------------------------------------------


@contextmanager
def _styled() -> Iterator[None]:
    with mpl.rc_context(fname=Path(__file__).with_suffix(".mplstyle")), warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "Glyph .* missing"
        )  # the reader's font may have what ours lacks
        yield


def _saved(figure: Figure, kind: str, **how: Any) -> bytes:
    file = io.BytesIO()
    with _styled():
        figure.savefig(file, format=kind, **how)
    return file.getvalue()


def svg(figure: Figure) -> bytes:
    """The same bytes for the same figure: no date, no addresses."""
    whole = _saved(figure, "svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    return whole[
        whole.index(b"<svg") :
    ]  # the prolog names a DTD, which a page that stands alone does not need


def jpeg(figure: Figure) -> bytes:
    """For figures that hold photographs."""
    return _saved(figure, "jpeg", dpi=160, pil_kwargs={"quality": 82, "optimize": True})


def png(figure: Figure) -> bytes:
    """For a folder of pictures."""
    return _saved(figure, "png", dpi=160, facecolor="white")


@contextmanager
def _axes(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure of one plot, in inches (72 to the inch on a screen)."""
    with _styled():
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


@contextmanager
def _rows(
    names: Sequence[str], x_label: str, tall: float
) -> Iterator[tuple[Figure, Axes, np.ndarray]]:
    """A plot of one row a name, the first one at the top, and where the rows are."""
    with _axes(WIDE, 0.9 + tall * len(names)) as (figure, axes):
        at = np.arange(len(names))[::-1]
        axes.set_yticks(at, [short(name, 30) for name in names])
        axes.set(xlabel=x_label, ylim=(-0.6, len(names) - 0.4))
        axes.grid(visible=False, axis="y")
        yield figure, axes, at


def short(name: str, most: int = 26) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def evenly(count: int) -> np.ndarray:
    """Which of `count` frames a film shows: at most FILM_FRAMES, evenly spread, with the first and
    the last."""
    return np.unique(np.linspace(0, count - 1, FILM_FRAMES).round().astype(int))


# -- charts --------------------------------------------------------------------------------------------------------


def curves(lines: Mapping[str, tuple["pd.Series", str]], *, y_label: str) -> Figure:
    """Values over epochs (counted from 0), each with matplotlib's format of its line (`C0--`)."""
    with _axes(HALF, 3.0) as (figure, axes):
        for name, (y, style) in lines.items():
            single = "o" if np.isfinite(y).sum() < 2 else None
            axes.plot(y.index + 1, y, style, marker=single, markersize=4, label=name)
        axes.set(xlabel="epoch", title=y_label)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.legend(fontsize=7.5)
        return figure


def forest(
    intervals: Mapping[str, Mapping[str, float]], *, x_label: str, zero: bool = False
) -> Figure:
    """Fractions (value, low and high of each name) in percent, one below the other; `zero` draws a
    line there."""
    with _rows(list(intervals), x_label, 0.28) as (figure, axes, at):
        ends = [(one["value"], one["low"], one["high"]) for one in intervals.values()]
        value, low, high = 100 * np.array(ends, float).reshape(-1, 3).T
        if zero:
            axes.axvline(0, color=SOFT, linewidth=0.9)
        axes.hlines(at, low, high, color="C0", linewidth=2.2, alpha=0.45)
        axes.plot(value, at, "o", color="C0", markersize=5)
        return figure


def bars(table: "pd.DataFrame", colors: Sequence[str], *, x_label: str) -> Figure:
    """A bar a row, of a piece a column."""
    with _rows(list(table.index), x_label, 0.3) as (figure, axes, at):
        left = table.cumsum(axis=1) - table
        for (kind, widths), color in zip(table.items(), colors, strict=True):
            axes.barh(at, widths, left=left[kind], height=0.66, color=color, label=kind)
        if len(colors) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(colors))
        return figure


def heat_map(
    table: "pd.DataFrame", spec: str, *, low: float | None = None, width: float = WIDE
) -> Figure:
    """Values as shades of blue, from `low` (or the least one) on, written as `spec` says; NaN is
    empty.

    The axes have the names of the table's index and columns.
    """
    values, rows, columns = (
        table.to_numpy(),
        list(map(str, table.index)),
        list(map(str, table.columns)),
    )
    turn = max(map(len, columns), default=0) > 4
    tall = 0.33 if len(columns) > 8 else 0.46
    with _axes(width, (1.7 if turn else 0.9) + tall * len(rows)) as (figure, axes):
        edges = [np.arange(count + 1) - 0.5 for count in (len(columns), len(rows))]
        mesh = axes.pcolormesh(
            *edges, values, cmap="Blues", vmin=low, edgecolor="white", linewidth=1.5
        )
        shades = np.asarray(mesh.norm(np.nan_to_num(values)), float)
        for row, column in np.argwhere(np.isfinite(values)):
            look: dict[str, Any] = {
                "color": "white" if shades[row, column] > 0.6 else INK,
                "size": 8,
            }
            axes.text(
                column, row, format(values[row, column], spec), ha="center", va="center", **look
            )
        turned: dict[str, Any] = (
            {"rotation": 55, "ha": "right", "rotation_mode": "anchor"} if turn else {}
        )
        axes.set_xticks(range(len(columns)), [short(name) for name in columns], **turned)
        axes.set_yticks(range(len(rows)), [short(name) for name in rows])
        axes.set(xlabel=table.columns.name, ylabel=table.index.name)
        axes.invert_yaxis()
        axes.grid(visible=False)
        axes.spines[:].set_visible(True)
        return figure


def pareto(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Top-1 % with its interval over parameters, of `ablation.compare.summarize`; the front joined
    and named."""
    rows = sorted(rows, key=lambda row: row["parameters"])
    with _axes(HALF, 3.4) as (figure, axes):
        x, lead = (np.array([row[name] for row in rows]) for name in ("parameters", "pareto"))
        y, low, high = (
            100 * np.array([row[f"top1_at_all{end}"] for row in rows])
            for end in ("", "_low", "_high")
        )
        axes.vlines(x, low, high, color=SOFT, alpha=0.35, linewidth=1.5)
        axes.plot(x[~lead], y[~lead], "o", color=SOFT, alpha=0.6, markersize=4)
        axes.plot(
            x[lead], y[lead], "o-", color="C1", markersize=6, drawstyle="steps-post", linewidth=1.2
        )
        for turn, at in enumerate(
            np.flatnonzero(lead)
        ):  # names above and below by turns: neighbors do not collide
            offset = (4, -13 if turn % 2 else 6)
            axes.annotate(
                rows[at]["name"],
                (x[at], y[at]),
                offset,
                textcoords="offset points",
                size=8,
                color=INK,
                bbox={"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 1},
            )
        label = f"top-1 %, {rows[0]['all_frames']} segments"
        axes.set(xscale="log", xlabel="parameters, classifier included", ylabel=label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.15, y=0.12)
        return figure


def scatter(places: np.ndarray, kinds: np.ndarray, names: Sequence[str]) -> Figure:
    """Points [n, 2] colored by `kinds` [n], an index in `names` or -1 (gray); directions have no
    unit."""
    with _axes(WIDE, 4.6) as (figure, axes):
        size = 5.5 if len(places) < 300 else 3
        for kind in [kind for kind in range(-1, len(names)) if kind in kinds]:  # gray lies below
            look: dict[str, Any] = (
                {"color": f"C{kind}", "label": short(names[kind])} if kind >= 0 else {"color": LINE}
            )
            shape = SHAPES[max(kind, 0) // COLORS % len(SHAPES)]
            axes.plot(
                *places[kinds == kind].T,
                shape,
                markersize=size,
                markeredgewidth=0,
                alpha=0.85,
                **look,
            )
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        axes.spines[:].set_visible(True)
        if len(names):
            figure.legend(loc="outside right upper", markerscale=1 if size > 5 else 2)
        return figure


def film(
    pictures: Sequence[np.ndarray], weights: np.ndarray, moments: Sequence[str], title: str = ""
) -> Figure:
    """Frames along the timeline over each frame's share of each group's weights [groups, frames],
    below a `title`.

    Of many frames those that `evenly` says are shown, whose `pictures` (uint8 [side, side, 3] each)
    are given, or none. Blue runs from 0 to the largest share; the bars below are the mean of the
    groups, the dashed line an even share.
    """
    shown = evenly(len(moments))
    shares = shares_of(weights)[:, shown]
    groups, count = shares.shape
    room = max(count, FILM_FRAMES)  # frames are as large in a short film
    tall = [1.0] * bool(pictures) + [0.34 * groups, 0.9]  # in widths of a frame
    with _styled():
        head = 0.22 * len(title.splitlines())
        wide, high = 0.5 + 0.44 * room, 0.25 + 0.44 * sum(tall) * 1.06 + head
        margins = {
            "left": 0.5 / wide,
            "right": 1,
            "bottom": 0.25 / high,
            "top": 1 - head / high,
            "hspace": 0.06,
        }
        figure = Figure(figsize=(wide, high))
        figure.text(0.5 / wide, 1 - 0.06 / high, title, va="top", fontsize=9)
        grid = figure.subplots(
            len(tall), 1, sharex=True, height_ratios=tall, squeeze=False, gridspec_kw=margins
        )
        parts = list(grid[:, 0])
        if pictures:
            strip = parts.pop(0)
            strip.imshow(np.hstack(pictures), extent=(-0.5, count - 0.5, 0, 1), aspect="auto")
            strip.set(yticks=[], ylabel="")
        blue, mean = parts
        blue.imshow(
            shares, cmap="Blues", vmin=0, vmax=np.nan_to_num(shares).max() or 1, aspect="auto"
        )
        blue.set_yticks(
            range(groups), [str(group + 1) for group in range(groups)] if groups > 1 else [""]
        )
        blue.set_ylabel("group" if groups > 1 else "")
        sounding = np.isfinite(shares).all(1)  # groups that weigh anything
        mean.bar(
            range(count),
            np.where(sounding[:, None], shares, 0).sum(0) / max(sounding.sum(), 1),
            color="C1",
        )
        mean.hlines(1 / len(moments), -0.5, count - 0.5, color=INK, linewidth=0.8, linestyle="--")
        mean.set(xlim=(-0.5, room - 0.5), yticks=[], ylabel="mean")
        mean.set_xticks(range(count), [moments[at] for at in shown], fontsize=7)
        for axes in figure.axes:
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
        return figure


def shares_of(weights: np.ndarray) -> np.ndarray:
    """Weights [..., frames] by their sum over the frames, float64; NaN where a group weighs
    nothing."""
    totals = weights.sum(axis=-1, keepdims=True, dtype=np.float64)
    return np.divide(weights, totals, out=np.full(weights.shape, np.nan), where=totals != 0)


def timeline(runs: Sequence[tuple[float, float, str, float]], *, seconds: float) -> Figure:
    """A bar a run (start, end, name, probability) in its class's row; classes in the order they
    first come."""
    names = list(dict.fromkeys(name for _, _, name, _ in runs))
    with _rows(names, "seconds; the darker, the surer", 0.3) as (figure, axes, at):
        for start, end, name, score in runs:
            row = names.index(name)
            axes.barh(
                at[row],
                end - start,
                left=start,
                height=0.7,
                color=f"C{row}",
                alpha=0.35 + 0.65 * score,
            )
        axes.set(xlim=(0, seconds))
        return figure
