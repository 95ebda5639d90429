"""Tables 1 and 2 of the paper beside our own figures: `python -m aggregate.complexity [--dim 1024
--g1 16 --g2 8]`.

Parameters are counted on the modules. MAdds are computed by the formulas of Table 2, counted on the
literal form of eq. 3-8, and counted on the pooled form that runs.
"""

import functools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from aggregate.metrics import text_table
from extract import InputError
from extract.cli import run_command

if TYPE_CHECKING:
    from aggregate.hgnl import HGNonLocal
    from aggregate.literal import Count

# Table 1 as printed, at m = 1024, g1 = 16, g2 = 8; the columns are those of `columns`.
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
    ("gru", "gru", {}),
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


def columns(dim: int, *, g1: int, g2: int) -> "dict[str, HGNonLocal]":
    """The models of Table 1's columns, without memory behind their weights. Raises InputError as
    HGNonLocal does."""
    import torch

    from aggregate.hgnl import HGNonLocal
    from aggregate.nl import NonLocal

    if dim % 8:
        raise InputError(
            f"dim is {dim}; the tables are about m1 = m/2 and m/8, so it must be a multiple of 8"
        )
    with torch.device("meta"):
        return {
            "NL m1=m/2": NonLocal(dim, dim // 2),
            "NL m1=m/8": NonLocal(dim, dim // 8),
            "HG-NL m1=m/8": HGNonLocal(dim, dim // 8, g1, g2),
            "HG-NL shared": HGNonLocal(dim, dim // 8, g1, g2, shared=True),
        }


def parameters(module: "HGNonLocal") -> dict[str, int]:
    """Parameters of the three layers, biases included, and of all; neither s nor a classifier, as
    in Table 1."""
    counts = [
        sum(p.numel() for p in layer.parameters())
        for layer in (module.query, module.key, module.value)
    ]
    return dict(zip(PAPER_TABLE_1, [*counts, sum(counts)], strict=True))


def madds_by_formula(module: "HGNonLocal", *, frames: int) -> tuple[int, ...]:
    """Table 2's rows for n = frames. Each multiplication and each addition counts, biases
    included."""
    m, n, g1, g2 = module.out_dim, frames, module.g1, module.g2
    m1 = len(module.key.bias) * (g1 if module.key.shared else 1)
    return (
        2 * m * m1 * n // g1,  # W_q F
        2 * m * m1 * n // g1,  # W_k F
        2 * m * m * n // g2,  # W_v F
        n * n * (2 * m1 - g2),  # Q^T K or Gmm(Q, K)
        m * n * (2 * n - 1),  # V A or Gmm(V, A)
    )


def madds_counted(module: "HGNonLocal", *, frames: int) -> tuple["Count", "Count"]:
    """MAdds of one video counted on the literal form, whose products are Table 2's rows, and on the
    pooled form."""
    import torch

    from aggregate.literal import count, literal_form

    x = torch.empty(1, frames, module.out_dim, device="meta")
    return count(lambda: literal_form(module, x.transpose(1, 2))), count(lambda: module(x))


def number(printed: str) -> float:
    """The number behind a figure of Table 1: "8.32K" -> 8320."""
    return round(float(printed[:-1]) * {"M": 1e6, "K": 1e3}[printed[-1].upper()], 3)


def table_1(models: "dict[str, HGNonLocal]") -> list[Sequence[str]]:
    """Rows of text: parameters counted on the modules and, at the paper's setting, the paper's
    figures round them."""
    counted = [parameters(module) for module in models.values()]
    grouped = models["HG-NL shared"]
    printed = (grouped.out_dim, grouped.g1, grouped.g2) == (PAPER_DIM, PAPER_G1, PAPER_G2)
    rows: list[Sequence[str]] = [("parameters", *models)]
    for title, paper in PAPER_TABLE_1.items():
        ours = [figures[title] for figures in counted]
        own = (f"{title}, counted", *(f"{figure:,}" for figure in ours))
        agree = (
            "exact" if number(text) == figure else "DIFFERS"
            for text, figure in zip(paper, ours, strict=True)
        )
        rows += [(f"{title}, paper", *paper), own, ("", *agree)] if printed else [own]
    return rows


def table_2(models: "dict[str, HGNonLocal]", *, frames: int) -> list[Sequence[str]]:
    """Rows of text: Table 2's formula, its value, what the literal form counts; then the sums and
    the pooled form.

    It has no column for shared parameters: they are as many MAdds as unshared ones.
    """
    three = dict(list(models.items())[:3])
    formulas = [madds_by_formula(module, frames=frames) for module in three.values()]
    literal, pooled = zip(
        *(madds_counted(module, frames=frames) for module in three.values()), strict=True
    )
    sums = [[sum(one.products) for one in counts] for counts in (literal, pooled)]

    def row(title: str, figures: Iterable[int]) -> Sequence[str]:
        return (title, *(f"{figure:,}" for figure in figures))

    rows: list[Sequence[str]] = [("MAdds", *three)]
    for place, (title, paper) in enumerate(PAPER_TABLE_2.items()):
        rows.append((f"{title}, paper", *paper))
        rows.append(row("  by that formula", (formula[place] for formula in formulas)))
        rows.append(row("  counted, literal form", (one.products[place] for one in literal)))
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
    """Rows of text: the heads that are not the paper's, with parameters and MAdds of one video
    counted on what runs."""
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


def main(options: Options) -> None:
    if options.frames < 1:
        raise InputError(f"--frames is {options.frames}; MAdds are counted for at least 1 frame")
    if not options.dim:
        raise InputError("--dim needs at least one width, such as 1024")
    for dim in options.dim:
        models = columns(dim, g1=options.g1, g2=options.g2)
        title, frames = f"m = {dim}, g1 = {options.g1}, g2 = {options.g2}", options.frames
        print(f"Table 1: parameters, {title}\n\n{text_table(table_1(models))}\n")
        print(f"Table 2: multiplications and additions of one video, {title}, n = {frames}\n")
        print(f"{text_table(table_2(models, frames=frames))}\n")
        print(f"Heads beside the paper's, m = {dim}, n = {frames}, counted on what runs\n")
        print(f"{text_table(other_heads(dim=dim, frames=frames))}\n")


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m aggregate.complexity"))
