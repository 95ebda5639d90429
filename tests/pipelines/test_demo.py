"""What the demo says of its own results."""

from pipelines.demo import EXPECTED, MODELS, compared_with_expected


def test_the_demo_prints_what_it_expects_beside_what_it_got():
    assert set(EXPECTED) == set(MODELS)
    rows = [
        {"name": f"{name}_test", "summary": {"top1": {"value": 0.5}}}
        for name in (*MODELS, "tsn_test + hgnl")
    ]
    lines = compared_with_expected({"table": rows}).splitlines()
    assert "  tsn    50.0   expected 25 to 39" in lines
    assert sum("expected" in line for line in lines) == 3
