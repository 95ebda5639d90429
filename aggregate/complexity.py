"""Tables 1 and 2 of the paper beside our own figures: `python -m aggregate.complexity [--dim 1024 --g1 16 --g2 8]`.

Parameters are counted on the modules. MAdds are computed by the formulas of Table 2, counted on the literal form of
eq. 3-8, and counted on the pooled form that runs.
"""

import functools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from extract.cli import InputError, run_command

if TYPE_CHECKING:
    from aggregate.hgnl import HGNonLocal
    from aggregate.literal import Count
    from aggregate.nl import NonLocal

# Table 1 as printed, at m = 1024, g1 = 16, g2 = 8; the four columns are those of `columns`.
PAPER_DIM, PAPER_G1, PAPER_G2 = 1024, 16, 8
PAPER_TABLE_1 = {
    "W_q": ("0.5248M", "0.1312M", "8.32K", "0.52k"),
    "W_k": ("0.5248M", "0.1312M", "8.32K", "0.52k"),
    "W_v": ("1.0496M", "1.0496M", "132.096K", "16.512k"),
    "All": ("2.0992M", "1.312M", "148.736K", "17.552k"),
}
# Table 2 as printed; the columns are the first three of `columns`.
PAPER_TABLE_2 = {
    "W_q F": ("m^2 n", "m^2 n/4", "m^2 n/(4 g1)"),
    "W_k F": ("m^2 n", "m^2 n/4", "m^2 n/(4 g1)"),
    "W_v F": ("2 m^2 n", "2 m^2 n", "2 m^2 n/g2"),
    "Q^T K / Gmm(Q, K)": ("n^2 m - n^2", "n^2 m/4 - n^2", "n^2 m/4 - g2 n^2"),
    "V A / Gmm(V, A)": ("m n (2n - 1)",) * 3,
}
# Heads that are not the paper's, with the options that they are counted with.
HEADS: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("weighted", "weighted", {}),
    ("txb", "txb", {}),
    ("attentive, depth 1", "attentive", {}),
    ("attentive, depth 4", "attentive", {"depth": 4}),
    ("nextvlad, K = 16", "nextvlad", {"clusters": 16}),
    ("nextvlad, K = 128", "nextvlad", {"clusters": 128}),
)


@dataclass(frozen=True)
class Options:
    """Tables 1 and 2 of the paper beside our own figures."""

    dim: tuple[int, ...] = (1024, 2048)
    """m, one or more: 1024 is the paper's, 2048 the width of SE-ResNeXt101."""
    g1: int = PAPER_G1
    """Primary groups: of W_q and W_k."""
    g2: int = PAPER_G2
    """Secondary groups: of W_v and of the attention maps."""
    frames: int = 25
    """n, the number of frames that MAdds are counted for."""


class Column(NamedTuple):
    title: str
    module: "NonLocal | HGNonLocal"
    inner_dim: int
    g1: int  # 1 for NL
    g2: int


def columns(dim: int, *, g1: int, g2: int) -> list[Column]:
    """The models of Table 1's columns, without memory behind their weights. Raises InputError as HGNonLocal does."""
    import torch

    from aggregate.hgnl import HGNonLocal
    from aggregate.nl import NonLocal

    if dim % 8:
        raise InputError(f"dim is {dim}; the tables are about m1 = m/2 and m/8, so it must be a multiple of 8")
    with torch.device("meta"):
        return [
            Column("NL m1=m/2", NonLocal(dim, dim // 2), dim // 2, 1, 1),
            Column("NL m1=m/8", NonLocal(dim, dim // 8), dim // 8, 1, 1),
            Column("HG-NL m1=m/8", HGNonLocal(dim, dim // 8, g1, g2), dim // 8, g1, g2),
            Column("HG-NL shared", HGNonLocal(dim, dim // 8, g1, g2, shared=True), dim // 8, g1, g2),
        ]


def parameters(column: Column) -> dict[str, int]:
    """Parameters of the three layers, biases included, and of all; neither s nor a classifier, as in Table 1."""
    layers = (column.module.query, column.module.key, column.module.value)
    counts = [sum(parameter.numel() for parameter in layer.parameters()) for layer in layers]
    return dict(zip(PAPER_TABLE_1, [*counts, sum(counts)], strict=True))


def madds_by_formula(column: Column, *, dim: int, frames: int) -> tuple[int, ...]:
    """Table 2's rows for m = dim, n = frames. Each multiplication and each addition counts, biases included."""
    m, n, m1 = dim, frames, column.inner_dim
    convolution = 2 * m * m1 * n // column.g1
    return (
        convolution,  # W_q F
        convolution,  # W_k F
        2 * m * m * n // column.g2,  # W_v F
        n * n * (2 * m1 - column.g2),  # Q^T K or Gmm(Q, K)
        m * n * (2 * n - 1),  # V A or Gmm(V, A)
    )


def madds_counted(column: Column, *, dim: int, frames: int) -> tuple["Count", "Count"]:
    """MAdds of one video counted on the literal form, whose products are Table 2's rows, and on the pooled form."""
    import torch

    from aggregate.literal import count, literal_hgnl, literal_nl
    from aggregate.nl import NonLocal

    module = column.module
    x = torch.empty(1, frames, dim, device="meta")
    F = x.transpose(1, 2)
    literal = count(lambda: literal_nl(module, F) if isinstance(module, NonLocal) else literal_hgnl(module, F))
    return literal, count(lambda: module(x))


def number(printed: str) -> float:
    """The number behind a figure of Table 1: "8.32K" -> 8320."""
    return round(float(printed[:-1]) * {"M": 1e6, "K": 1e3}[printed[-1].upper()], 3)


def table_1(models: list[Column], *, dim: int) -> list[Sequence[str]]:
    """Rows of text: parameters counted on the modules and, at the paper's setting, the paper's figures round them."""
    counted = [parameters(column) for column in models]
    printed = (dim, models[2].g1, models[2].g2) == (PAPER_DIM, PAPER_G1, PAPER_G2)
    rows: list[Sequence[str]] = [("parameters", *(column.title for column in models))]
    for title, paper in PAPER_TABLE_1.items():
        ours = [figures[title] for figures in counted]
        own = (f"{title}, counted", *(f"{figure:,}" for figure in ours))
        agree = ("exact" if number(text) == figure else "DIFFERS" for text, figure in zip(paper, ours, strict=True))
        rows += [(f"{title}, paper", *paper), own, ("", *agree)] if printed else [own]
    return rows


def table_2(models: list[Column], *, dim: int, frames: int) -> list[Sequence[str]]:
    """Rows of text: Table 2's formula, its value, what the literal form counts; then the sums and the pooled form."""
    formulas = [madds_by_formula(column, dim=dim, frames=frames) for column in models]
    literal, pooled = zip(*(madds_counted(column, dim=dim, frames=frames) for column in models), strict=True)

    def row(title: str, figures: Iterable[int]) -> Sequence[str]:
        return (title, *(f"{figure:,}" for figure in figures))

    rows: list[Sequence[str]] = [("MAdds", *(column.title for column in models))]
    for place, (title, paper) in enumerate(PAPER_TABLE_2.items()):
        rows.append((f"{title}, paper", *paper))
        rows.append(row("  by that formula", (formula[place] for formula in formulas)))
        rows.append(row("  counted, literal form", (one.products[place] for one in literal)))
    sums = [[sum(one.products) for one in counts] for counts in (literal, pooled)]
    return [
        *rows,
        row("all rows, by formula", map(sum, formulas)),
        row("all rows, literal form", sums[0]),
        row("products, pooled form", sums[1]),
        ("  times fewer", *(f"{one / other:.1f}x" for one, other in zip(*sums, strict=True))),
        row("element-wise, literal", (one.rest for one in literal)),
        row("element-wise, pooled", (one.rest for one in pooled)),
    ]


def other_heads(*, dim: int, frames: int) -> list[Sequence[str]]:
    """Rows of text: the heads that are not the paper's, with parameters and MAdds of one video counted on what runs."""
    import torch

    from aggregate.literal import count
    from aggregate.models import build

    rows: list[Sequence[str]] = [("", "parameters", "MAdds")]
    for title, name, options in HEADS:
        with torch.device("meta"):
            head = build(name, dim=dim, num_classes=1, **options).aggregator.eval()
        counted = count(functools.partial(head, torch.empty(1, frames, dim, device="meta")))
        parameters = sum(parameter.numel() for parameter in head.parameters())
        rows.append((title, f"{parameters:,}", f"{sum(counted.products) + counted.rest:,}"))
    return rows


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of text as a table: the first column to the left, the others to the right."""
    first, *others = ([len(cell) for cell in column] for column in zip(*rows, strict=True))
    widths = [max(lengths) for lengths in others]
    return "\n".join("  ".join([row[0].ljust(max(first)), *map(str.rjust, row[1:], widths)]) for row in rows)


def main(options: Options) -> None:
    if options.frames < 1:
        raise InputError(f"--frames is {options.frames}; MAdds are counted for at least 1 frame")
    if not options.dim:
        raise InputError("--dim needs at least one width, such as 1024")
    for dim in options.dim:
        models = columns(dim, g1=options.g1, g2=options.g2)
        title = f"m = {dim}, g1 = {options.g1}, g2 = {options.g2}"
        # Table 2 has no column for shared parameters: they are as many MAdds as unshared ones.
        print(f"Table 1: parameters, {title}\n\n{aligned(table_1(models, dim=dim))}\n")
        print(f"Table 2: multiplications and additions of one video, {title}, n = {options.frames}\n")
        print(aligned(table_2(models[:3], dim=dim, frames=options.frames)) + "\n")
        print(f"Heads beside the paper's, m = {dim}, n = {options.frames}, counted on what runs\n")
        print(aligned(other_heads(dim=dim, frames=options.frames)) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m aggregate.complexity"))
