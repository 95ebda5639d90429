"""The text that the demo prints about its own results."""

from pipelines.demo import EXPECTED, MODELS, compared_with_expected, story_of_ensemble


def test_the_demo_prints_what_it_expects_beside_what_it_got():
    assert set(EXPECTED) == set(MODELS)
    rows = [
        {"name": f"{name}_test", "summary": {"top1": {"value": 0.5}}}
        for name in (*MODELS, "tsn_test + hgnl")
    ]
    lines = compared_with_expected({"table": rows}).splitlines()
    assert "  tsn    50.0   expected 19 to 42" in lines
    assert sum("expected" in line for line in lines) == 3


def test_the_demo_says_which_members_validation_chose_and_why():
    names = [f"{name}_val" for name in MODELS]
    left_out = [{"name": "tsn_val", "error_with": 0.3, "error_without": 0.25}]
    val = {"models": names, "weights": [0, 0.5, 0.5], "left_out": left_out}
    val["videos"] = {"labeled": 72}
    top1 = {"all, given weights": 0.6, "all, equal weights": 0.5}
    table = [{"name": name, "summary": {"top1": {"value": top1[name]}}} for name in top1]
    story = story_of_ensemble(val, {"table": table})
    assert "ensemble of hgnl, txb, chosen on 72 validation videos" in story
    assert "tsn is left out: validation error 25.0 % without it, 30.0 % with it" in story
    assert "top-1 60.0 % on test; all of tsn, hgnl, txb with equal weights: 50.0" in story
    whole = story_of_ensemble(val | {"weights": [1 / 3] * 3, "left_out": []}, {"table": table})
    assert "no member is left out" in whole
