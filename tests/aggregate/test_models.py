"""build() and carry_over(): names and options, recorded options, precision, and weights from other
models."""

import math

import pytest
import torch

from aggregate.models import AGGREGATORS, build, carry_over
from extract import InputError
from tolerance import assert_close

OPTIONS = {
    "hgnl": {"inner_dim": 8, "g1": 4, "g2": 2, "norm": "n", "scale_init": 0.5},
    "nl": {"inner_dim": 4, "scale_init": 0.5, "normalize": True},
    "attentive": {"depth": 3, "heads": 2, "frame_time": True},
    "attentive-time": {"heads": 2},
    "gru": {"inner_dim": 8},
    "nextvlad": {"clusters": 3, "groups": 4},
}


def small(name: str, **options):
    return build(name, dim=16, num_classes=5, **{**OPTIONS.get(name, {}), **options})


@pytest.mark.parametrize("name", AGGREGATORS)
def test_recorded_options_and_state_dict_rebuild_the_model(name):
    torch.manual_seed(0)
    model = small(name).eval()
    again = build(**model.options).eval()
    again.load_state_dict(model.state_dict())
    for time in (1, 3, 25):
        x = torch.randn(4, time, 16)
        assert torch.equal(again(x), model(x))
        assert model(x).shape == (4, 5)
        assert model.features(x).shape == (4, model.classifier.in_features)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_a_mask_leaves_what_the_valid_frames_alone_give(name):
    """It also holds if valid frames are apart, such as the first of each run of repeats in a short
    video."""
    model = small(name).double().eval()
    torch.nn.init.normal_(model.classifier.weight)
    x = torch.randn(3, 6, 16, dtype=torch.float64)
    mask = torch.tensor(
        [[1, 0, 1, 0, 0, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 1, 0, 0]], dtype=torch.bool
    )
    alone = torch.cat([model(video[valid][None]) for video, valid in zip(x, mask, strict=True)])
    assert_close(model(x.masked_fill(~mask[..., None], torch.nan), mask), alone)


@pytest.mark.parametrize("name", AGGREGATORS)
def test_half_precision_features_and_autocast_are_computed_in_the_weights_type(name):
    model, x = small(name).eval(), torch.randn(4, 3, 16).half()
    expected = model.features(x.float())
    assert torch.equal(model.features(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.features(x.float()), expected)
        assert model(x).dtype == torch.bfloat16  # the classifier may use bf16
    assert_close(model(x), model.classifier(expected))


def test_classifier_starts_as_tsn_s_and_dropout_is_before_it():
    torch.manual_seed(0)
    model = build("tsn", dim=512, num_classes=300)
    assert 0.00099 < model.classifier.weight.std() < 0.00101
    assert not model.classifier.bias.any()
    model.classifier.weight.data.fill_(1)
    kept = model(torch.ones(1, 1, 512))[0, 0].item() / 2  # a feature that is kept counts 2
    assert 200 < kept < 312
    assert kept == int(kept)
    assert model.eval()(torch.ones(1, 1, 512))[0, 0] == 512


def test_unknown_names_are_answered_with_the_known_ones():
    with pytest.raises(
        InputError,
        match="'mean' is not known; known are tsn, max, weighted, nl, hgnl, txb, gru, attentive",
    ):
        build("mean", dim=16, num_classes=5)
    with pytest.raises(
        InputError,
        match="nl has no option 'g1'; it has inner_dim, normalize, start, scale_init, scale_scores",
    ):
        build("nl", dim=16, num_classes=5, g1=4)
    with pytest.raises(InputError, match="tsn has no option 'norm'; it has dropout, standardize"):
        build("tsn", dim=16, num_classes=5, norm="n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 0, "num_classes": 5}, "dim 0 and num_classes 5 must both be at least 1"),
        ({"dim": 8, "num_classes": 0}, "dim 8 and num_classes 0 must both be at least 1"),
        ({"dim": 8, "num_classes": 5, "dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_numbers_without_meaning_are_refused(arguments, message):
    with pytest.raises(InputError, match=message):
        build("tsn", **arguments)


@pytest.mark.parametrize("shape", [(4, 3, 12), (4, 16), (4, 3, 2, 16)])
def test_features_of_another_width_are_refused(shape):
    with pytest.raises(
        ValueError, match=rf"got features \[{', '.join(map(str, shape))}\].*\[batch, time, 16\]"
    ):
        small("tsn")(torch.zeros(shape))


def test_hgnl_from_a_tsn_gives_that_tsn_bit_for_bit():
    torch.manual_seed(0)
    tsn = build("tsn", dim=16, num_classes=5).eval()
    torch.nn.init.normal_(tsn.classifier.weight)
    names = ["a", "b", "c", "d", "e"]
    for name in ("nl", "hgnl"):
        model = small(name, scale_init=0.0).eval()
        report = carry_over(model, tsn.state_dict(), classes=names, source_classes=names)
        assert report.startswith("classifier rows: 5 carried over by class name, 0 start fresh\n")
        assert report.endswith("aggregator weights: start fresh")
        for time in (1, 3, 25):
            x = torch.randn(4, time, 16)
            assert torch.equal(model(x), tsn(x))


def standardizing(name: str, steps: int = 30, **options):
    """A model whose batch norm has seen features of another size, and some of these features."""
    torch.manual_seed(1)
    model, x = small(name, standardize=True, **options), 50 * torch.randn(64, 3, 16) + 9
    torch.nn.init.normal_(model.classifier.weight)
    for _ in range(steps):
        model(x)
    return model.eval(), x


def test_standardized_features_have_one_size_whatever_the_backbone_s():
    model, x = standardizing("tsn")
    with torch.no_grad():
        seen = model.norm(model.features(x))
    assert seen.mean(0).abs().max() < 0.2
    assert 0.9 < seen.std(0).mean() < 1.1
    assert not list(model.norm.parameters())
    assert small("tsn").norm is None
    one = model.train()(x[:1])  # the last batch of an epoch may be a single video
    assert one.isfinite().all()


def test_what_starts_from_a_standardized_classifier_gives_its_logits():
    """The norm is copied, or folded into the weights of a model without one."""
    tsn, x = standardizing("tsn")
    names = list("abcde")
    for options in ({"standardize": True}, {"standardize": False}):
        model = small("hgnl", scale_init=0.0, **options).eval()
        carry_over(model, tsn.state_dict(), classes=names, source_classes=names)
        assert_close(model(x), tsn(x))


def test_a_plain_classifier_stays_one():
    tsn, model, names = (
        small("tsn").eval(),
        small("hgnl", scale_init=0.0, standardize=True),
        list("abcde"),
    )
    torch.nn.init.normal_(tsn.classifier.weight)
    carry_over(model, tsn.state_dict(), classes=names, source_classes=names)
    assert model.norm is None
    assert not model.options["standardize"]
    x = torch.randn(4, 3, 16)
    assert torch.equal(model.eval()(x), tsn(x))
    build(**model.options).load_state_dict(model.state_dict())


def test_rows_are_carried_over_by_exact_name_whatever_their_place():
    """From Kinetics-600 to Kinetics-700: most names stay, at other indices, and one changes a
    capital letter."""
    torch.manual_seed(0)
    source, model = build("max", dim=8, num_classes=4), build("max", dim=8, num_classes=5)
    source.classifier.bias.data.copy_(torch.arange(4.0) + 1)
    before = model.classifier.weight.clone()
    theirs, ours = (
        ["zumba", "abseiling", "Yoga", "chess"],
        ["abseiling", "archery", "chess", "yoga", "zumba"],
    )
    report = carry_over(model, source.state_dict(), classes=ours, source_classes=theirs)
    for row, name in enumerate(ours):
        if name in theirs:
            assert torch.equal(
                model.classifier.weight[row], source.classifier.weight[theirs.index(name)]
            )
            assert model.classifier.bias[row] == theirs.index(name) + 1
        else:
            assert torch.equal(model.classifier.weight[row], before[row])
            assert model.classifier.bias[row] == 0
    assert report == (
        "classifier rows: 3 carried over by class name, 2 start fresh\n"
        "  'yoga' starts fresh; the source spells it 'Yoga'\n"
        "aggregator weights: start fresh"
    )


def test_an_aggregator_is_carried_over_whole_or_not_at_all():
    names = list("abcde")
    source = small("hgnl", scale_init=0.25)
    same, other = small("hgnl"), small("hgnl", g1=8, g2=2, scale_init=0.0)
    report = carry_over(same, source.state_dict(), classes=names, source_classes=names)
    assert report.endswith("aggregator weights: carried over")
    assert all(
        torch.equal(a, b) for a, b in zip(same.parameters(), source.parameters(), strict=True)
    )
    before = other.aggregator.value.weight.clone()  # of the same shape in both
    report = carry_over(other, source.state_dict(), classes=names, source_classes=names)
    assert report.endswith("aggregator weights: start fresh")
    assert other.aggregator.scale == 0
    assert torch.equal(other.aggregator.value.weight, before)


def test_carry_over_refuses_what_does_not_fit():
    model, names = small("tsn"), list("abcde")
    with pytest.raises(InputError, match="the source classifies 8 features, this model 16"):
        carry_over(
            model,
            build("tsn", dim=8, num_classes=5).state_dict(),
            classes=names,
            source_classes=names,
        )
    with pytest.raises(InputError, match="the source has 5 classifier rows but 2 class names"):
        carry_over(model, model.state_dict(), classes=names, source_classes=["a", "b"])
    with pytest.raises(InputError, match="the model has 5 classifier rows but 3 class names"):
        carry_over(model, model.state_dict(), classes=names[:3], source_classes=names)


def test_options_are_plain_values_that_a_safe_checkpoint_can_hold():
    for name in AGGREGATORS:
        for value in small(name).options.values():
            assert value is None or isinstance(value, str | int | float | bool)
            assert not isinstance(value, float) or math.isfinite(value)
