"""python -m aggregate.complexity: parameters and MAdds, and the paper's Tables 1 and 2.

Parameters are counted on the modules. MAdds are computed by the formulas of Table 2, and counted on
the pooled form that runs (`aggregate/madds.py`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from extract import InputError
from extract.cli import run_as_script, text_table

if TYPE_CHECKING:
    from aggregate.hgnl import HGNonLocal

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
# Heads that are not in the paper, with the options for which they are counted.
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
    """Print parameters and MAdds of the heads, with Tables 1 and 2 of the paper."""

    dim: tuple[int, ...] = (1024, 2048)
    """m, one or more: 1024 is the paper's, 2048 the width of SE-ResNeXt101."""
    g1: int = PAPER_G1
    """g1, the primary groups: those of W_q and W_k."""
    g2: int = PAPER_G2
    """g2, the secondary groups: those of W_v and of the attention maps."""
    frames: int = 25
    """n, the number of frames that MAdds are counted for."""


def main(options: Options) -> None:
    if not options.dim:
        raise InputError("--dim needs at least one width, such as 1024")
    for dim in options.dim:
        models = columns(dim, g1=options.g1, g2=options.g2)
        title, frames = f"m = {dim}, g1 = {options.g1}, g2 = {options.g2}", options.frames
        print(f"Table 1: parameters, {title}\n\n{text_table(table_1(models))}\n")
        print(f"Table 2: multiplications and additions per video, {title}, n = {frames}\n")
        print(f"{text_table(table_2(models, frames=frames))}\n")
        print(f"Heads that are not in the paper, m = {dim}, n = {frames}, counted as they run\n")
        print(f"{text_table(other_heads(dim=dim, frames=frames))}\n")


def columns(dim: int, *, g1: int, g2: int) -> "dict[str, HGNonLocal]":
    """The models of Table 1's columns, on the meta device. Raises InputError as HGNonLocal does."""
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
    """Parameters of the three layers and their sum, with biases but without s, as in Table 1."""
    from aggregate.madds import count_parameters

    counts = [count_parameters(layer) for layer in (module.query, module.key, module.value)]
    return dict(zip(PAPER_TABLE_1, [*counts, sum(counts)], strict=True))


def number(printed: str) -> float:
    """Parse a figure of Table 1: "8.32K" -> 8320."""
    return round(float(printed[:-1]) * {"M": 1e6, "K": 1e3}[printed[-1].upper()], 3)


def table_1(models: "dict[str, HGNonLocal]") -> list[Sequence[str]]:
    """Rows of text: counted parameters and, at the paper's setting, the paper's figures."""
    counted = [parameters(module) for module in models.values()]
    shared = models["HG-NL shared"]
    printed = (shared.out_dim, shared.g1, shared.g2) == (PAPER_DIM, PAPER_G1, PAPER_G2)
    rows: list[Sequence[str]] = [("parameters", *models)]
    for title, paper in PAPER_TABLE_1.items():
        ours = [figures[title] for figures in counted]
        own = _row(f"{title}, counted", ours)
        agree = (
            "exact" if number(text) == figure else "DIFFERS"
            for text, figure in zip(paper, ours, strict=True)
        )
        rows += [(f"{title}, paper", *paper), own, ("", *agree)] if printed else [own]
    return rows


def table_2(models: "dict[str, HGNonLocal]", *, frames: int) -> list[Sequence[str]]:
    """Rows of text: Table 2's formulas with their values, then the counts of the pooled form.

    Shared parameters have no column: they do not change the number of MAdds.
    """
    from aggregate.madds import count_aggregator, madds_by_formula

    printed = dict(list(models.items())[:3])
    formulas = [madds_by_formula(module, frames=frames) for module in printed.values()]
    pooled = [
        count_aggregator(module, dim=module.out_dim, frames=frames) for module in printed.values()
    ]
    rows: list[Sequence[str]] = [("MAdds", *printed)]
    for (title, paper), values in zip(
        PAPER_TABLE_2.items(), zip(*formulas, strict=True), strict=True
    ):
        rows += [(title, *paper), _row(f"  n = {frames}", values)]
    literal, products = map(sum, formulas), [sum(counts.products) for counts in pooled]
    fewer = [sum(formula) / ours for formula, ours in zip(formulas, products, strict=True)]
    return [
        *rows,
        _row("all rows", literal),
        _row("products of the pooled form, counted", products),
        ("  times fewer", *(f"{ratio:.1f}x" for ratio in fewer)),
        _row("element-wise, pooled form", (counts.rest for counts in pooled)),
    ]


def other_heads(*, dim: int, frames: int) -> list[Sequence[str]]:
    """Rows of text: parameters and counted MAdds per video of the HEADS."""
    import torch

    from aggregate.madds import count_aggregator, count_parameters
    from aggregate.models import build

    rows: list[Sequence[str]] = [("", "parameters", "MAdds")]
    for title, name, options in HEADS:
        with torch.device("meta"):
            head = build(name, dim=dim, num_classes=1, **options).aggregator
        madds = count_aggregator(head, dim=dim, frames=frames).total
        rows.append(_row(title, [count_parameters(head), madds]))
    return rows


def _row(title: str, figures: Iterable[int]) -> Sequence[str]:
    return (title, *(f"{figure:,}" for figure in figures))


if __name__ == "__main__":
    run_as_script()
