"""The report's figures, drawn with matplotlib.

Each function returns a `Figure`; `svg`, `jpeg` and `png` encode it. A number that is not finite is
not drawn: a curve has a gap there, a heat map an empty cell. Colors are `C0` to `C7` of
figures.mplstyle.
"""

import io
import math
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
SHAPES = ("o", "s", "^")  # the shape changes after 8 colors, so there are 24 kinds
KINDS = COLORS * len(SHAPES)
STATUS = {"ok": "#2a7f62", "partial": "#e0a92e", "failed": "#b3402c", "pending": LINE}

FILM_FRAMES = 25
# Inches, at 72 px each, so that both fit a phone unscaled.
WIDE = 5.4  # width of a single figure
HALF = 4.8  # width of each of a pair


# -- encoding ------------------------------------------------------------------------------------


@contextmanager
def _styled() -> Iterator[None]:
    with mpl.rc_context(fname=Path(__file__).with_suffix(".mplstyle")), warnings.catch_warnings():
        # The reader's font may have glyphs that ours lacks.
        warnings.filterwarnings("ignore", "Glyph .* missing")
        yield


def _encoded(figure: Figure, kind: str, **options: Any) -> bytes:
    file = io.BytesIO()
    with _styled():
        figure.savefig(file, format=kind, **options)
    return file.getvalue()


def svg(figure: Figure) -> bytes:
    """Encode as SVG. Equal figures give equal bytes, since the file holds no date. The XML prolog
    is left out, because its URL needs a network."""
    dates = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    content = _encoded(figure, "svg", metadata=dates)
    return content[content.index(b"<svg") :]


def jpeg(figure: Figure) -> bytes:
    """Encode as JPEG, for figures that hold photographs."""
    return _encoded(figure, "jpeg", dpi=160, pil_kwargs={"quality": 82, "optimize": True})


def png(figure: Figure) -> bytes:
    """Encode as PNG, for a folder of pictures."""
    return _encoded(figure, "png", dpi=160, facecolor="white")


# -- set-up --------------------------------------------------------------------------------------


@contextmanager
def _axes(width: float, height: float, *, boxed: bool = False) -> Iterator[tuple[Figure, Axes]]:
    """A figure with a single plot; the size is in inches. A boxed plot has a frame and no grid."""
    with _styled():
        figure = Figure(figsize=(width, height), layout="constrained")
        axes = figure.add_subplot()
        if boxed:
            axes.grid(visible=False)
            axes.spines[:].set_visible(True)
        yield figure, axes


@contextmanager
def _rows(
    names: Sequence[str], x_label: str, row_height: float
) -> Iterator[tuple[Figure, Axes, np.ndarray]]:
    """A plot with a row per name, the first at the top, and the y of each row."""
    with _axes(WIDE, 0.9 + row_height * len(names)) as (figure, axes):
        y = np.arange(len(names))[::-1]
        axes.set_yticks(y, [short(name, 30) for name in names])
        axes.set(xlabel=x_label, ylim=(-0.6, len(names) - 0.4))
        axes.grid(visible=False, axis="y")
        yield figure, axes, y


def short(name: str, most: int = 26) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


# -- charts --------------------------------------------------------------------------------------


def curves(lines: Mapping[str, tuple["pd.Series", str]], *, title: str) -> Figure:
    """Curves over epochs (counted from 0), each with its matplotlib line format, such as `C0--`.

    The legend is below the plot, so that it hides no curve.
    """
    legend_rows = math.ceil(len(lines) / 2)
    with _axes(HALF, 2.9 + 0.19 * legend_rows) as (figure, axes):
        for name, (values, style) in lines.items():
            marker = "o" if np.isfinite(values).sum() < 2 else None
            label = name if len(name) <= 28 else f"…{name[-27:]}"  # the end tells the model
            axes.plot(values.index + 1, values, style, marker=marker, markersize=4, label=label)
        axes.set(xlabel="epoch", title=title)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        figure.legend(loc="outside lower left", ncols=2)
        return figure


def forest(
    intervals: Mapping[str, Mapping[str, float]], *, x_label: str, zero: bool = False
) -> Figure:
    """A forest plot: one line per name with its value, low and high, fractions shown in percent.

    Args:
        zero: draw a line at 0.
    """
    with _rows(list(intervals), x_label, 0.28) as (figure, axes, y):
        value, low, high = (
            [100 * interval[end] for interval in intervals.values()]
            for end in ("value", "low", "high")
        )
        if zero:
            axes.axvline(0, color=SOFT, linewidth=0.9)
        axes.hlines(y, low, high, color="C0", linewidth=2.2, alpha=0.45)
        axes.plot(value, y, "o", color="C0", markersize=5)
        return figure


def bars(table: "pd.DataFrame", colors: Sequence[str], *, x_label: str) -> Figure:
    """Stacked bars: one bar per row of the table, with one part per column."""
    with _rows(list(table.index), x_label, 0.3) as (figure, axes, y):
        left = table.cumsum(axis=1) - table
        for (name, widths), color in zip(table.items(), colors, strict=True):
            axes.barh(y, widths, left=left[name], height=0.66, color=color, label=name)
        if len(colors) > 1:
            axes.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(colors))
        return figure


def heat_map(
    table: "pd.DataFrame", number_format: str, *, low: float | None = None, width: float = WIDE
) -> Figure:
    """Values as numbers on shades of blue, the lightest at `low` (default: the smallest value).

    Cells with NaN are empty. The axes have the names of the table's index and columns.
    """
    values = table.to_numpy()
    rows, columns = (list(map(str, names)) for names in (table.index, table.columns))
    rotated = max(map(len, columns), default=0) > 4
    row_height = 0.33 if len(columns) > 8 else 0.46
    height = (1.7 if rotated else 0.9) + row_height * len(rows)
    with _axes(width, height, boxed=True) as (figure, axes):
        edges = [np.arange(count + 1) - 0.5 for count in (len(columns), len(rows))]
        mesh = axes.pcolormesh(
            *edges, values, cmap="Blues", vmin=low, edgecolor="white", linewidth=1.5
        )
        shades = np.asarray(mesh.norm(np.nan_to_num(values)), float)
        for row, column in np.argwhere(np.isfinite(values)):
            text = format(values[row, column], number_format)
            color = "white" if shades[row, column] > 0.6 else INK
            axes.text(column, row, text, ha="center", va="center", color=color, size=8)
        axes.set_xticks(
            range(len(columns)),
            [short(name) for name in columns],
            rotation=55 if rotated else 0,
            ha="right" if rotated else "center",
            rotation_mode="anchor",
        )
        axes.set_yticks(range(len(rows)), [short(name) for name in rows])
        axes.set(xlabel=table.columns.name, ylabel=table.index.name)
        axes.invert_yaxis()
        return figure


def pareto(rows: Sequence[Mapping[str, Any]]) -> Figure:
    """Top-1 % with its interval over parameters, from `ablation.compare.summarize`. A line joins
    the points of the Pareto front, which have names."""
    rows = sorted(rows, key=lambda row: row["parameters"])
    with _axes(HALF, 3.4) as (figure, axes):
        x, is_front = (np.array([row[name] for row in rows]) for name in ("parameters", "pareto"))
        y, low, high = (
            100 * np.array([row[f"top1_at_all{end}"] for row in rows])
            for end in ("", "_low", "_high")
        )
        axes.vlines(x, low, high, color=SOFT, alpha=0.35, linewidth=1.5)
        axes.plot(x[~is_front], y[~is_front], "o", color=SOFT, alpha=0.6, markersize=4)
        front = x[is_front], y[is_front]
        axes.step(*front, "C1o-", where="post", markersize=6, linewidth=1.2)
        for number, row in enumerate(np.flatnonzero(is_front)):
            axes.annotate(
                rows[row]["name"],
                (x[row], y[row]),
                (4, -13 if number % 2 else 6),  # in turn, so that neighbors do not collide
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


def scatter(points: np.ndarray, kinds: np.ndarray, names: Sequence[str]) -> Figure:
    """Points [n, 2] colored by `kinds` [n], an index in `names` or -1 (gray). The axes have no
    unit."""
    with _axes(WIDE, 4.6, boxed=True) as (figure, axes):
        size = 5.5 if len(points) < 300 else 3
        for kind in np.unique(kinds):  # gray first, so it is below the others
            axes.plot(
                *points[kinds == kind].T,
                SHAPES[max(kind, 0) // COLORS % len(SHAPES)],
                color=f"C{kind}" if kind >= 0 else LINE,
                label=short(names[kind]) if kind >= 0 else None,
                markersize=size,
                markeredgewidth=0,
                alpha=0.85,
            )
        axes.set(xticks=[], yticks=[])
        if len(names):
            figure.legend(loc="outside right upper", markerscale=1 if size > 5 else 2)
        return figure


def timeline(runs: Sequence[tuple[float, float, str, float]], *, seconds: float) -> Figure:
    """A bar per run (start, end, name, probability) in its class's row; classes are in the order in
    which they appear."""
    names = list(dict.fromkeys(name for _, _, name, _ in runs))
    with _rows(names, "seconds; darker = more confident", 0.3) as (figure, axes, y):
        for start, end, name, score in runs:
            row = names.index(name)
            color, alpha = f"C{row}", 0.35 + 0.65 * score
            axes.barh(y[row], end - start, left=start, height=0.7, color=color, alpha=alpha)
        axes.set(xlim=(0, seconds))
        return figure


# -- attention -----------------------------------------------------------------------------------


def film_indices(count: int) -> np.ndarray:
    """Indices of the frames, out of `count`, that a filmstrip shows: at most FILM_FRAMES, evenly
    spaced, the first and the last included."""
    return np.unique(np.linspace(0, count - 1, FILM_FRAMES).round().astype(int))


def shares_of(weights: np.ndarray) -> np.ndarray:
    """Weights [..., frames] divided by their sum over frames, float64; NaN for a group without any
    weight."""
    totals = weights.sum(axis=-1, keepdims=True, dtype=np.float64)
    return np.divide(weights, totals, out=np.full(weights.shape, np.nan), where=totals != 0)


def filmstrip(
    pictures: Sequence[np.ndarray], weights: np.ndarray, moments: Sequence[str], title: str = ""
) -> Figure:
    """Frames along the timeline, above each frame's share of each group's weights.

    Blue runs from 0 to the largest share. The bars below show the mean over groups, and the dashed
    line an even share.

    Args:
        pictures: uint8 [side, side, 3] of each of the frames `film_indices(len(moments))`; or none.
        weights: [groups, frames].
        moments: when each frame is shown, as text.
    """
    shown = film_indices(len(moments))
    shares = shares_of(weights)[:, shown]
    num_groups, count = shares.shape
    room = max(count, FILM_FRAMES)  # frames of a short film are no larger
    heights = [1.0] * bool(pictures) + [0.34 * num_groups, 0.9]  # in widths of a frame
    head = 0.22 * len(title.splitlines())
    width, height = 0.5 + 0.44 * room, 0.25 + 0.44 * sum(heights) * 1.06 + head
    margins = {
        "left": 0.5 / width,
        "right": 1,
        "bottom": 0.25 / height,
        "top": 1 - head / height,
        "hspace": 0.06,
    }
    with _styled():
        figure = Figure(figsize=(width, height))
        figure.text(0.5 / width, 1 - 0.06 / height, title, va="top", fontsize=9)
        *strip, blue, mean = figure.subplots(
            len(heights), 1, sharex=True, height_ratios=heights, gridspec_kw=margins
        )
        for axes in strip:
            axes.imshow(np.hstack(pictures), extent=(-0.5, count - 0.5, 0, 1), aspect="auto")
            axes.set(yticks=[])
        largest = np.nan_to_num(shares).max() or 1
        blue.imshow(shares, cmap="Blues", vmin=0, vmax=largest, aspect="auto")
        blue.set_yticks(range(num_groups), range(1, num_groups + 1) if num_groups > 1 else [""])
        blue.set_ylabel("group" if num_groups > 1 else "")
        is_active = np.isfinite(shares).all(axis=1)
        mean_shares = shares[is_active].sum(axis=0) / max(is_active.sum(), 1)
        mean.bar(range(count), mean_shares, color="C1")
        mean.hlines(1 / len(moments), -0.5, count - 0.5, color=INK, linewidth=0.8, linestyle="--")
        mean.set(xlim=(-0.5, room - 0.5), yticks=[], ylabel="mean")
        mean.set_xticks(range(count), [moments[index] for index in shown], fontsize=7)
        for axes in figure.axes:
            axes.grid(visible=False)
            axes.spines[:].set_visible(False)
        return figure
