"""Tables 1 and 2 of the paper: every figure, by formula and by counting; and the counter itself on
known products."""

import functools
import re

import pytest
import torch
from torch.nn.functional import conv1d

from aggregate import complexity
from aggregate.complexity import (
    PAPER_TABLE_1,
    PAPER_TABLE_2,
    Options,
    columns,
    number,
    parameters,
)
from aggregate.madds import count, count_aggregator, madds_by_formula
from extract import InputError
from extract.cli import run_command
from literal import literal_form


def test_table_1_comes_out_exactly():
    models = columns(1024, g1=16, g2=8)
    for title, paper in PAPER_TABLE_1.items():
        assert [number(text) for text in paper] == [
            parameters(module)[title] for module in models.values()
        ]
    assert [parameters(module)["All"] for module in models.values()] == [
        2_099_200,
        1_312_000,
        148_736,
        17_552,
    ]


def test_parameters_at_the_real_width():
    totals = [parameters(module)["All"] for module in columns(2048, g1=16, g2=8).values()]
    assert totals == [8_392_704, 5_245_440, 592_384, 69_920]


@pytest.mark.parametrize(
    ("dim", "g1", "g2", "frames"),
    [(1024, 16, 8, 25), (2048, 16, 8, 3), (96, 12, 4, 1), (64, 4, 4, 7)],
)
def test_the_literal_form_counts_what_table_2_says(dim, g1, g2, frames):
    for module in columns(dim, g1=g1, g2=g2).values():
        x = torch.empty(1, dim, frames, device="meta")
        literal = count(functools.partial(literal_form, module, x))
        pooled = count_aggregator(module, dim=dim, frames=frames)
        assert literal.products == madds_by_formula(module, frames=frames)
        if frames > 1:
            assert sum(pooled.products) < sum(literal.products)


def evaluate(formula: str, **values: int) -> float:
    """Evaluate a formula as the paper prints it. Two factors next to each other are a product: "n^2
    m/4 - g2 n^2"."""
    python = ""
    for token in re.findall(r"\d+|[a-z]\d?|[-+/^()]", formula):
        side_by_side = python and python[-1] not in "-+/*(" and token not in "-+/^)"
        python += ("*" if side_by_side else "") + {"^": "**"}.get(token, token)
    return eval(python, {}, values)


@pytest.mark.parametrize("n", [1, 3, 25])
def test_our_formulas_are_those_that_the_paper_prints(n):
    for place, module in enumerate(list(columns(1024, g1=16, g2=8).values())[:3]):
        printed = [evaluate(row[place], m=1024, n=n, g1=16, g2=8) for row in PAPER_TABLE_2.values()]
        assert printed == list(madds_by_formula(module, frames=n))


def test_the_counter_on_known_products():
    a, b = torch.zeros(3, 4), torch.zeros(4, 5)
    assert count(lambda: a @ b).products == (3 * 5 * (4 + 3),)
    assert count(lambda: torch.addmm(torch.zeros(5), a, b)).products == (3 * 5 * (4 + 3 + 1),)
    assert count(lambda: torch.bmm(a.expand(2, 3, 4), b.expand(2, 4, 5))).products == (
        2 * 3 * 5 * 7,
    )
    x, weight = torch.zeros(2, 6, 10), torch.zeros(4, 3, 1)
    assert count(lambda: conv1d(x, weight, torch.zeros(4), groups=2)).products == (2 * 4 * 10 * 6,)
    assert count(lambda: conv1d(x, weight, groups=2)).products == (2 * 4 * 10 * 5,)
    other = count(lambda: (a * a + a).sum() + b.softmax(1).relu().mean())
    assert other.products == ()
    assert other.rest == 12 + 12 + 12 + 20 + 1


def test_the_papers_words_about_its_tables():
    """The paper's statements hold if M is 2^20, and if "about 70 times fewer" compares with NL with
    m1 = m/8."""
    models = list(columns(1024, g1=16, g2=8).values())
    full, eighth, grouped, shared = (parameters(module)["All"] for module in models)
    assert [round(eighth / grouped, 1), round(full / grouped, 1)] == [
        8.8,
        14.1,
    ]  # "about 8 - 14 times fewer"
    assert [round(eighth / shared, 1), round(full / shared, 1)] == [
        74.7,
        119.6,
    ]  # "roughly 70 times fewer"
    convolutions = [sum(madds_by_formula(module, frames=1)[:3]) / 2**20 for module in models[:3]]
    assert convolutions == [4, 2.5, 0.5 / 16 + 2 / 8]


def test_torchs_own_counter_agrees_where_it_counts_the_same():
    """torch counts 2 k for a product of length k, which is right if a bias is added. Ours counts 2
    k - 1 if there is no bias."""
    from torch.utils.flop_counter import FlopCounterMode

    for module in columns(64, g1=4, g2=2).values():
        F = torch.empty(1, 64, 5, device="meta")
        with FlopCounterMode(display=False) as theirs:
            literal_form(module, F)
        ours = count(functools.partial(literal_form, module, F)).products
        # Q^T K has g2 n^2 sums, V A m n, and no bias.
        assert theirs.get_total_flops() - sum(ours) == module.g2 * 25 + 64 * 5


def test_the_command_prints_both_tables(capsys):
    assert run_command(complexity.main, Options, prog="complexity", args=[]) == 0
    out = capsys.readouterr().out
    assert "DIFFERS" not in out
    assert out.count("exact") == 16
    for text in ("2,099,200", "17,552", "592,384"):
        assert text in out
    # K = 128 and m = 2048, by aggregate/nextvlad.py; the query's layer, by aggregate/attentive.py.
    D, K, L, R = 2048, 128, 512, 256
    vlad = (
        2 * D**2
        + 2 * D
        + (8 + 8 * K) * (2 * D + 1)
        + K * L
        + D * (K * L + 1)
        + R * (D + 1)
        + D * (R + 1)
    )
    vlad += 2 * (D + K * L + R)
    for figure in (vlad, 12 * D**2 + 14 * D, 4 * (12 * D**2 + 13 * D) + D):
        assert f"{figure:,}" in out


def test_the_command_takes_one_width_and_other_groups(capsys):
    assert (
        run_command(
            complexity.main, Options, prog="complexity", args=["--dim", "1024", "--g1", "8"]
        )
        == 0
    )
    out = capsys.readouterr().out
    assert "g1 = 8" in out
    assert "paper" not in out.split("Table 2")[0]  # the paper has another setting
    assert "m = 2048" not in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--dim", "1004"], "dim is 1004"),
        (["--dim", "1000"], "g1 16 does not divide dim 1000"),
        (["--frames", "0"], "--frames 0: expected at least 1"),
        (["--dim"], "--dim needs at least one width"),
    ],
)
def test_wrong_numbers_are_refused(args, message, capsys):
    assert run_command(complexity.main, Options, prog="complexity", args=args) == 2
    assert message in capsys.readouterr().err


def test_wrong_widths_raise():
    with pytest.raises(InputError, match=r"dim is 1004; .* a multiple of 8"):
        columns(1004, g1=4, g2=2)
