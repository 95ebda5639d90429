"""HG-NL: the pooled form in use against eq. 7, 8, 5, 6 as written, against plain loops, and its
properties."""

from typing import get_args

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregate.hgnl import Attention, HGNonLocal, Norm
from aggregate.nl import NonLocal
from attention import attention_by_loops, gradients, some_mask
from extract import InputError
from literal import literal_form
from tolerance import assert_close


@st.composite
def cases(draw) -> tuple[HGNonLocal, torch.Tensor]:
    """A module with s != 0 and features, float64, with any group structure, sharing, norm,
    attention and sizes."""
    g2, ratio = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    g1 = g2 * ratio
    attention = draw(st.sampled_from(get_args(Attention)))
    torch.manual_seed(draw(st.integers(0, 2**31)))
    module = HGNonLocal(
        g1 * draw(st.integers(1, 3)),
        g1 * draw(st.integers(1, 2)),
        g1,
        g2,
        draw(st.booleans()),
        draw(st.sampled_from(get_args(Norm))) if attention == "relu" else "none",
        attention=attention,
        train_frames=draw(st.integers(1, 5)),
        normalize=draw(st.booleans()),
        scale_init=0.7,
        scale_scores=draw(st.booleans()),
    ).double()
    batch, time = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    return module, torch.randn(batch, time, module.out_dim, dtype=torch.float64)


def hgnl(*args, seed: int = 0, **options) -> HGNonLocal:
    torch.manual_seed(seed)
    return HGNonLocal(*args, **{"scale_init": 0.7} | options).double()


@given(cases())
@settings(max_examples=60)
def test_pooled_equals_literal_in_values_and_gradients(case):
    module, x = case
    x.requires_grad_()
    pooled, literal = module(x), literal_form(module, x.transpose(1, 2))
    assert_close(pooled, literal)
    cotangent = torch.randn_like(pooled)
    references = gradients(module, x, literal, cotangent)
    magnitude = max(
        gradient.abs().max().item() for gradient in references
    )  # some are exactly 0: a sum that cancels
    for ours, reference in zip(gradients(module, x, pooled, cotangent), references, strict=True):
        assert_close(ours, reference, magnitude=magnitude)


@given(cases())
@settings(max_examples=30)
def test_literal_equals_loops(case):
    module, x = case
    expected = torch.stack([torch.from_numpy(attention_by_loops(module, video)) for video in x])
    assert_close(literal_form(module, x.transpose(1, 2)), expected)


@given(cases())
@settings(max_examples=60)
def test_a_mask_leaves_what_the_valid_frames_alone_give(case):
    """So n counts valid frames only, with every norm."""
    module, x = case
    mask = some_mask(*x.shape[:2])
    alone = torch.cat([module(video[valid][None]) for video, valid in zip(x, mask, strict=True)])
    poisoned = x.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    out = module(poisoned, mask)
    assert_close(out, alone)
    weights = module.frame_weights(poisoned, mask)
    assert weights.shape == (len(x), module.g2, x.shape[1])
    assert (weights.transpose(1, 2)[~mask] == 0).all()
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in (poisoned, *module.parameters()))
    assert (poisoned.grad[~mask] == 0).all()


@given(cases(), st.randoms(use_true_random=False))
@settings(max_examples=30)
def test_order_does_not_matter(case, random):
    module, x = case
    order = list(range(x.shape[1]))
    random.shuffle(order)
    assert_close(module(x[:, order]), module(x))


def test_block_diagonal_over_secondary_groups():
    """The channels of one secondary group influence only the output of the same channels."""
    module, x = hgnl(24, 12, 6, 3), torch.randn(2, 4, 24, dtype=torch.float64)
    for group in range(3):
        changed = x.clone()
        changed[..., group * 8 : (group + 1) * 8] += 1
        same = (module(changed) == module(x)).all(0).unflatten(0, (3, 8))
        assert same[[h for h in range(3) if h != group]].all()
        assert not same[group].any()


def test_equal_groups_are_runs_on_each_channel_group():
    """The paper's special case g1 = g2: "the same as processing each feature group of F via NL
    module individually"."""
    module, x = hgnl(12, 6, 3, 3), torch.randn(2, 5, 12, dtype=torch.float64)
    outs = []
    for group, part in enumerate(x.chunk(3, -1)):
        single = hgnl(4, 2, 1, 1)
        for name in ("query", "key", "value"):
            rows = getattr(module, name)
            getattr(single, name).weight.data = rows.weight.data.chunk(3)[group]
            getattr(single, name).bias.data = rows.bias.data.chunk(3)[group]
        outs.append(single(part))
    assert_close(torch.cat(outs, 1), module(x))


def test_one_group_with_softmax_is_nl():
    module, nl = hgnl(8, 4, 1, 1, attention="softmax"), NonLocal(8, 4).double()
    nl.load_state_dict(module.state_dict())
    x, mask = torch.randn(3, 5, 8, dtype=torch.float64), some_mask(3, 5)
    assert_close(module(x, mask), nl(x, mask))


def test_scale_zero_is_tsn_bit_for_bit():
    torch.manual_seed(0)
    x = torch.randn(3, 4, 32)
    assert torch.equal(HGNonLocal(32, 16, 4, 2)(x), x.mean(1))


@pytest.mark.parametrize("shared", [False, True])
def test_started_as_the_average_it_is_the_average_and_learns(shared):
    """With softmax, F_o is the mean of F at first. The gradient of W_k is not 0, so attention can
    grow."""
    options = {"attention": "softmax", "start": "average", "scale_init": 1.0, "shared": shared}
    module, x = hgnl(16, 8, 4, 2, **options), torch.randn(3, 5, 16, dtype=torch.float64)
    assert_close(module(x), 2 * x.mean(1))
    assert_close(module.frame_weights(x), torch.full((3, 2, 5), 0.2, dtype=torch.float64))
    (module(x) * torch.randn(3, 16, dtype=torch.float64)).sum().backward()
    assert module.key.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("norm", ["none", "n", "n_over_train"])
@pytest.mark.parametrize(("m1", "g1", "g2"), [(128, 16, 8), (32, 8, 4), (40, 8, 8), (8, 8, 8)])
def test_relu_started_as_the_average_is_nearly_the_average_and_learns_pairs(
    shared, norm, m1, g1, g2
):
    """With W_k = 0 it would be the average exactly. W_k is small, so every frame has nearly the
    same weight. The gradients of W_q and W_k are not 0."""
    torch.manual_seed(0)
    options = {"norm": norm, "start": "average", "scale_init": 1.0, "normalize": True}
    module = hgnl(256 - 256 % g1, m1, g1, g2, shared=shared, **options)
    x = torch.randn(4, 3, module.out_dim, dtype=torch.float64)
    weights = module.frame_weights(x)
    assert_close(weights, weights.mean(-1, keepdim=True).expand_as(weights))
    (module(x) * torch.randn(4, module.out_dim, dtype=torch.float64)).sum().backward()
    for layer in (module.query, module.key):
        assert layer.weight.grad.abs().max() > 1e-3
    with torch.no_grad():
        module.key.weight.zero_()
        assert_close(module.frame_weights(x).float(), torch.full((4, g2, 3), 1 / 3))
        assert_close(module(x).float(), 2 * x.mean(1).float())


def test_gradient_reaches_the_scale_at_its_start():
    module = hgnl(8, 4, 2, 1, scale_init=0.0)
    module(torch.randn(2, 3, 8, dtype=torch.float64)).square().sum().backward()
    assert module.scale.grad.abs() > 1e-4


def test_attention_grows_with_n_for_identical_frames_unless_normalized():
    frame = torch.randn(32, 1, 16, dtype=torch.float64)  # with few, the ReLU may leave none
    by_norm = {norm: hgnl(16, 8, 4, 2, norm=norm, train_frames=3) for norm in get_args(Norm)}
    at = {
        (norm, n): (module(frame.expand(-1, n, -1)) - frame[:, 0]) / module.scale
        for norm, module in by_norm.items()
        for n in (1, 3, 25)
    }
    assert at["none", 1].abs().max() > 1e-3
    assert_close(at["none", 25], 25 * at["none", 1])
    assert_close(at["n", 25], at["n", 1])
    assert_close(at["n_over_train", 25], at["none", 3])
    assert_close(at["n_over_train", 3], at["none", 3])


def test_dividing_the_map_by_n_is_scaling_the_query():
    module, x = hgnl(16, 8, 4, 2), torch.randn(2, 5, 16, dtype=torch.float64)
    divided = hgnl(16, 8, 4, 2, norm="n")
    with torch.no_grad():
        module.query.weight /= 5
        module.query.bias /= 5
    assert_close(divided(x), module(x))


def test_normalized_products_do_not_know_the_size_of_features():
    module, x = hgnl(16, 8, 4, 2, normalize=True), torch.randn(2, 5, 16, dtype=torch.float64)
    assert_close(
        module.frame_weights(1000 * x + 7), module.frame_weights(x), precision=torch.float32
    )  # LN's 1e-5
    assert (module.frame_weights(x) - hgnl(16, 8, 4, 2).frame_weights(x)).abs().max() > 1e-3


def test_shapes_of_the_weights_are_those_of_grouped_convolutions():
    module, shared = HGNonLocal(32, 16, 4, 2), HGNonLocal(32, 16, 4, 2, shared=True)
    grouped = torch.nn.Conv1d(32, 16, 1, groups=4)
    assert module.query.weight.shape == grouped.weight.shape[:2] == (16, 8)
    assert module.query.bias.shape == grouped.bias.shape
    assert module.value.weight.shape == (32, 16)
    assert shared.key.weight.shape == (4, 8)
    assert shared.value.weight.shape == (16, 16)
    assert shared.value.bias.shape == (16,)
    bound = 8**-0.5  # Conv1d's: 1 / sqrt(fan in)
    for parameter in (module.query.weight, module.query.bias):
        assert 0.7 * bound < parameter.abs().max() < bound


def test_default_inner_dim_any_time_and_a_state_dict_round_trip():
    module, other = HGNonLocal(128), HGNonLocal(128)
    assert (module.g1, module.g2, module.query.weight.shape) == (16, 8, (16, 8))
    module.scale.data.fill_(0.3)
    other.load_state_dict(module.state_dict())
    for time in (1, 3, 25):
        x = torch.randn(2, time, 128)
        assert torch.equal(other(x), module(x))
    assert not torch.equal(other(x), x.mean(1))


def test_strided_features_are_taken_as_they_are():
    module, x = hgnl(16, 8, 4, 2), torch.randn(2, 5, 16, dtype=torch.float64)
    assert_close(module(x.transpose(1, 2).contiguous().transpose(1, 2)), module(x))


@pytest.mark.parametrize("masked", [False, True])
def test_even_weights_are_those_of_identical_frames(masked):
    """With even weights, F_o is W_v of the mean frame times the sum of the weights."""
    module, x = hgnl(16, 8, 4, 2), torch.randn(3, 5, 16, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 0, 1, 1]] * 3, dtype=torch.bool) if masked else None
    valid = x[:, [0, 1, 3, 4]] if masked else x
    weights = module.frame_weights(x, mask).sum(-1)
    mean = valid.mean(1)
    w_v, b_v = module.value.blocks()
    parts = [
        weights[:, h, None] * (mean[:, 8 * h : 8 * h + 8] @ w_v[h].T + b_v[h]) for h in range(2)
    ]
    expected = mean + module.scale * torch.cat(parts, 1)
    assert_close(module.with_even_weights(x, mask), expected)
    assert (module(x, mask) - expected).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((32, 16, 4, 3), "g2 3 does not divide g1 4"),
        ((30, 16, 4, 2), "g1 4 does not divide dim 30"),
        ((32, 10, 4, 2), r"g1 4 does not divide inner_dim \(m1\) 10"),
        ((32, 16, 0, 2), "g1 0 and g2 2 must all be at least 1"),
        ((12,), r"g1 16 does not divide dim 12"),
    ],
)
def test_groups_that_do_not_divide_are_named(arguments, message):
    with pytest.raises(InputError, match=message):
        HGNonLocal(*arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"norm": "sqrt"}, "norm 'sqrt' is not known; known are none, n, n_over_train"),
        ({"attention": "gelu"}, "attention 'gelu' is not known; known are relu, softmax"),
        ({"start": "tsn"}, "start 'tsn' is not known; known are random, average"),
        ({"attention": "softmax", "norm": "n"}, "norm 'n' is for the ReLU map"),
        ({"norm": "n_over_train", "train_frames": 0}, "train_frames is 0"),
    ],
)
def test_options_without_meaning_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        HGNonLocal(32, 16, 4, 2, **options)
