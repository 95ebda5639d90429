"""The report's figures, drawn with matplotlib; each function returns a `Figure`, `svg` and `jpeg` make pictures of one.

A number that is not finite is no point: a curve has a gap there, a heat map an empty cell.
"""

import io
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator, NullFormatter

INK, SOFT, LINE = "#1d2329", "#5d6670", "#dfe2e3"
# Okabe and Ito's colours, which colour-blind people can tell apart, a little darker.
COLOURS = ("#12698f", "#d05f00", "#2a7f62", "#a64d84", "#8a6d00", "#3b92c9", "#7a4a2b", "#5b55a8")
SHAPES = ("o", "s", "^")  # after 8 colours the shape changes: 24 kinds can be told apart
STATUS = {"ok": "#2a7f62", "partial": "#e0a92e", "failed": "#b3402c", "pending": LINE}
KINDS = len(COLOURS) * len(SHAPES)

FILM_FRAMES = 25
WIDE, HALF = 6.8, 4.8  # inches: figures that fill the page, and those of which two stand beside each other

_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif",
    "font.size": 9,
    "text.parse_math": False,  # a class may be named "$5"
    "text.color": INK,
    "axes.edgecolor": LINE,
    "axes.labelcolor": SOFT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": LINE,
    "grid.linewidth": 0.7,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
    "legend.frameon": False,
    "legend.fontsize": 8,
    "lines.linewidth": 1.6,
    "svg.fonttype": "none",  # the reader's own font: small files, and every alphabet
    "svg.hashsalt": "report",
}


@dataclass(frozen=True)
class Curve:
    """A line through points x, y of colour `colour`; curves without a name are not in the legend."""

    name: str
    x: np.ndarray
    y: np.ndarray
    colour: int
    dashed: bool = False


@dataclass(frozen=True)
class Point:
    """A value with its interval (NaN: none)."""

    name: str
    value: float
    low: float
    high: float


# -- pictures ------------------------------------------------------------------------------------------------------


@contextmanager
def _styled() -> Iterator[None]:
    with mpl.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # the reader's font may have what ours lacks
        yield


def svg(figure: Figure) -> bytes:
    """The same bytes for the same figure: no date, no addresses."""
    file = io.BytesIO()
    with _styled():
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    whole = file.getvalue()
    return whole[whole.index(b"<svg") :]  # the prolog names a DTD, which a page that stands alone does not need


def jpeg(figure: Figure) -> bytes:
    """For figures that hold photographs."""
    file = io.BytesIO()
    with _styled():
        figure.savefig(file, format="jpeg", dpi=160, pil_kwargs={"quality": 82, "optimize": True})
    return file.getvalue()


def png(figure: Figure) -> bytes:
    """For a folder of pictures."""
    file = io.BytesIO()
    with _styled():
        figure.savefig(file, format="png", dpi=160, facecolor="white")
    return file.getvalue()


@contextmanager
def _axes(width: float, height: float) -> Iterator[tuple[Figure, Axes]]:
    """A figure of one plot, in inches (72 to the inch on a screen)."""
    with _styled():
        figure = Figure(figsize=(width, height), layout="constrained")
        yield figure, figure.add_subplot()


def short(name: str, most: int = 26) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def colour(index: int) -> str:
    return COLOURS[index % len(COLOURS)]


# -- charts --------------------------------------------------------------------------------------------------------


def curves(lines: Sequence[Curve], *, y_label: str, log: bool = False) -> Figure:
    """Lines over epochs."""
    with _axes(HALF, 3.0) as (figure, axes):
        for line in lines:
            style = "--" if line.dashed else "-"
            single = "o" if np.isfinite(line.y).sum() < 2 else None
            axes.plot(line.x, line.y, style, color=colour(line.colour), marker=single, markersize=4, label=line.name)
        axes.set(xlabel="epoch", title=y_label, yscale="log" if log else "linear")
        axes.title.set(fontsize=9, color=INK)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        axes.legend(fontsize=7.5)
        return figure


def forest(points: Sequence[Point], *, x_label: str, zero: bool = False) -> Figure:
    """Values with their intervals, one below the other; `zero` draws a line there."""
    with _axes(WIDE, 0.8 + 0.28 * len(points)) as (figure, axes):
        at = np.arange(len(points))[::-1]
        if zero:
            axes.axvline(0, color=SOFT, linewidth=0.9)
        axes.hlines(at, [p.low for p in points], [p.high for p in points], color=COLOURS[0], linewidth=2.2, alpha=0.45)
        axes.plot([p.value for p in points], at, "o", color=COLOURS[0], markersize=5)
        axes.set_yticks(at, [short(p.name, 44) for p in points])
        axes.set(xlabel=x_label, ylim=(-0.6, len(points) - 0.4))
        axes.grid(visible=False, axis="y")
        return figure


def bars(names: Sequence[str], values: Sequence[Sequence[float]], kinds: dict[str, str], *, x_label: str) -> Figure:
    """A bar a name, of a piece a kind (name to colour): values [names][kinds]."""
    with _axes(WIDE, 0.9 + 0.3 * len(names)) as (figure, axes):
        at = np.arange(len(names))[::-1]
        left = np.zeros(len(names))
        for index, (kind, paint) in enumerate(kinds.items()):
            width = np.array([row[index] for row in values], float)
            axes.barh(at, width, left=left, height=0.66, color=paint, label=kind)
            left += width
        axes.set_yticks(at, [short(name, 44) for name in names])
        axes.set(xlabel=x_label)
        axes.grid(visible=False, axis="y")
        if len(kinds) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(kinds))
        return figure


def heat_map(
    values: np.ndarray,
    *,
    rows: Sequence[str],
    columns: Sequence[str],
    row_label: str,
    column_label: str,
    show: Callable[[float], str],
    low: float | None = None,
    width: float = WIDE,
) -> Figure:
    """values [rows, columns] as shades of blue with `show(value)` written on each; NaN stays empty."""
    turn = max(map(len, columns), default=0) > 4
    tall = 0.33 if len(columns) > 8 else 0.46
    with _axes(width, (1.7 if turn else 0.9) + tall * len(rows)) as (figure, axes):
        finite = values[np.isfinite(values)]
        low = low if low is not None else float(finite.min(initial=np.inf)) if finite.size else 0.0
        high = float(finite.max()) if finite.size else 1.0
        axes.imshow(values, cmap="Blues", vmin=low, vmax=high if high > low else low + 1, aspect="auto")
        for (row, column), value in np.ndenumerate(values):
            if np.isfinite(value):
                dark = (value - low) > 0.6 * (high - low) > 0
                axes.text(column, row, show(value), ha="center", va="center", color="white" if dark else INK, size=8)
        axes.set_xticks(range(len(columns)), [short(c) for c in columns], rotation=55 if turn else 0)
        if turn:
            for label in axes.get_xticklabels():
                label.set(ha="right", rotation_mode="anchor")
        axes.set_yticks(range(len(rows)), [short(r) for r in rows])
        axes.set(xlabel=column_label, ylabel=row_label)
        axes.grid(visible=False)
        for edge in np.arange(max(values.shape) + 1) - 0.5:
            axes.axvline(edge, color="white", linewidth=1.5)
            axes.axhline(edge, color="white", linewidth=1.5)
        axes.set(xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
        axes.spines[:].set(visible=True)
        return figure


def tradeoff(
    points: Sequence[Point], sizes: Sequence[float], front: Sequence[bool], *, x_label: str, y_label: str
) -> Figure:
    """Values in percent with intervals over `sizes` (logarithmic); those on the Pareto front joined and named."""
    with _axes(HALF, 3.4) as (figure, axes):
        order = np.argsort(sizes, kind="stable")
        x, y = np.asarray(sizes, float)[order], np.array([points[at].value for at in order])
        lead = np.asarray(front, bool)[order]
        ends = np.clip([(points[at].low, points[at].high) for at in order], 0, 100)  # Student's t knows no bounds
        axes.vlines(x, *ends.T, color=SOFT, alpha=0.35, linewidth=1.5)
        axes.plot(x[~lead], y[~lead], "o", color=SOFT, alpha=0.6, markersize=4)
        axes.plot(x[lead], y[lead], "o-", color=COLOURS[1], markersize=6, drawstyle="steps-post", linewidth=1.2)
        for turn, at in enumerate(order[lead]):  # names above and below by turns: neighbours do not collide
            offset, where = (4, -13 if turn % 2 else 6), (sizes[at], points[at].value)
            axes.annotate(points[at].name, where, offset, textcoords="offset points", size=8, color=INK)
        axes.set(xscale="log", xlabel=x_label, ylabel=y_label)
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(x=0.15, y=0.12)
        return figure


def scatter(places: np.ndarray, kinds: np.ndarray, names: Sequence[str]) -> Figure:
    """Points [n, 2] coloured by `kinds` [n], an index in `names` or -1 (grey); directions have no unit."""
    with _axes(WIDE, 4.6) as (figure, axes):
        size = 5.5 if len(places) < 300 else 3
        for kind in range(-1, len(names)):  # grey lies below
            some = places[kinds == kind]
            if len(some):
                look: dict[str, Any] = (
                    {"color": LINE} if kind < 0 else {"color": colour(kind), "label": short(names[kind])}
                )
                shape = SHAPES[max(kind, 0) // len(COLOURS) % len(SHAPES)]
                axes.plot(*some.T, shape, markersize=size, markeredgewidth=0, alpha=0.85, **look)
        axes.set(xticks=[], yticks=[])
        axes.grid(visible=False)
        axes.spines[:].set(visible=True)
        if len(names):
            figure.legend(loc="outside right upper", markerscale=1 if size > 5 else 2)
        return figure


def film(pictures: Sequence[np.ndarray], shares: np.ndarray, moments: Sequence[str], *, even: float) -> Figure:
    """Frames (uint8 [side, side, 3] each, or none) along the timeline over the `shares` [groups, frames] of each group.

    Blue runs from 0 to the largest share; the bars below are the mean of the groups, the dashed line an `even` share.
    """
    groups, count = shares.shape
    room = max(count, FILM_FRAMES)  # frames are as large in a short film
    tall = [1.0] * bool(pictures) + [0.34 * groups, 0.9]  # in widths of a frame
    with _styled():
        wide, high = 0.5 + 0.44 * room, 0.25 + 0.44 * sum(tall) * 1.06
        margins = {"left": 0.5 / wide, "right": 1, "bottom": 0.25 / high, "top": 1, "hspace": 0.06}
        figure = Figure(figsize=(wide, high))
        grid = figure.subplots(len(tall), 1, sharex=True, height_ratios=tall, squeeze=False, gridspec_kw=margins)
        parts = list(grid[:, 0])
        if pictures:
            strip = parts.pop(0)
            strip.imshow(np.hstack(pictures), extent=(-0.5, count - 0.5, 0, 1), aspect="auto")
            strip.set(yticks=[], ylabel="")
        weights, mean = parts
        weights.imshow(shares, cmap="Blues", vmin=0, vmax=np.nan_to_num(shares).max() or 1, aspect="auto")
        weights.set_yticks(range(groups), [str(group + 1) for group in range(groups)] if groups > 1 else [""])
        weights.set_ylabel("group" if groups > 1 else "")
        sounding = np.isfinite(shares).all(1)  # groups that weigh anything
        mean.bar(range(count), np.where(sounding[:, None], shares, 0).sum(0) / max(sounding.sum(), 1), color=COLOURS[1])
        mean.hlines(even, -0.5, count - 0.5, color=INK, linewidth=0.8, linestyle="--")
        mean.set(xlim=(-0.5, room - 0.5), yticks=[], ylabel="mean")
        mean.set_xticks(range(count), moments, fontsize=7)
        for axes in (*parts, *figure.axes):
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
        return figure


def timeline(runs: Sequence[tuple[float, float, str, float]], *, seconds: float) -> Figure:
    """A bar a run (start, end, name, probability) in its class's row; classes in the order they first come."""
    names = list(dict.fromkeys(name for _, _, name, _ in runs))
    with _axes(8.0, 0.9 + 0.3 * len(names)) as (figure, axes):
        for start, end, name, score in runs:
            row = names.index(name)
            axes.barh(row, end - start, left=start, height=0.7, color=colour(row), alpha=0.35 + 0.65 * score)
        axes.set_yticks(range(len(names)), [short(name) for name in names])
        axes.set(xlabel="seconds; the darker, the surer", xlim=(0, seconds), ylim=(len(names) - 0.4, -0.6))
        axes.grid(visible=False, axis="y")
        return figure
