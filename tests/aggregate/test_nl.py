"""NL: the pooled form in use against eq. 3-6 as written, and against plain loops."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregate.nl import NonLocal
from attention import attention_by_loops, gradients, some_mask
from extract import InputError
from literal import literal_form
from tolerance import assert_close


def case(
    batch: int, time: int, dim: int, inner: int, *, seed: int, **options
) -> tuple[NonLocal, torch.Tensor]:
    torch.manual_seed(seed)
    return NonLocal(dim, inner, scale_init=0.7, **options).double(), torch.randn(
        batch, time, dim, dtype=torch.float64
    )


def linear(x: torch.Tensor, layer: torch.nn.Module) -> torch.Tensor:
    return torch.nn.functional.linear(x, layer.weight, layer.bias)


SIZES = (
    st.integers(1, 3),
    st.integers(1, 6),
    st.integers(1, 6),
    st.integers(1, 4),
    st.booleans(),
    st.integers(0, 2**31),
)


@given(*SIZES)
@settings(max_examples=30)
def test_pooled_equals_literal_in_values_and_gradients(batch, time, dim, inner, scale_scores, seed):
    module, x = case(batch, time, dim, inner, seed=seed, scale_scores=scale_scores)
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


@given(*SIZES)
@settings(max_examples=20)
def test_literal_equals_loops(batch, time, dim, inner, scale_scores, seed):
    module, x = case(batch, time, dim, inner, seed=seed, scale_scores=scale_scores)
    expected = torch.stack([torch.from_numpy(attention_by_loops(module, video)) for video in x])
    assert_close(literal_form(module, x.transpose(1, 2)), expected)


@given(*SIZES)
@settings(max_examples=30)
def test_a_mask_leaves_what_the_valid_frames_alone_give(
    batch, time, dim, inner, scale_scores, seed
):
    module, x = case(batch, time, dim, inner, seed=seed, scale_scores=scale_scores)
    mask = some_mask(batch, time)
    alone = torch.cat([module(video[valid][None]) for video, valid in zip(x, mask, strict=True)])
    poisoned = x.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    out = module(poisoned, mask)
    assert_close(out, alone)
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in (poisoned, *module.parameters()))
    assert (poisoned.grad[~mask] == 0).all()


def test_softmax_over_the_last_index_would_leave_no_attention():
    """Over the last index, the mean of F_o is the mean of V for all Q and K. Over the first, it is
    not."""
    module, x = case(2, 5, 8, 3, seed=0)
    with torch.no_grad():
        scores = torch.bmm(linear(x, module.query), linear(x, module.key).transpose(1, 2))
        V = linear(x, module.value).transpose(1, 2)
        assert_close(torch.bmm(V, scores.softmax(2)).mean(2), V.mean(2))
        attended = (module(x) - x.mean(1)) / module.scale
        assert_close(torch.bmm(V, scores.softmax(1)).mean(2), attended)
        assert (attended - V.mean(2)).abs().max() > 1e-3


def test_order_does_not_matter():
    module, x = case(2, 6, 8, 4, seed=1)
    assert_close(module(x[:, torch.randperm(6)]), module(x))


def test_scale_zero_is_tsn_bit_for_bit():
    torch.manual_seed(0)
    x = torch.randn(3, 4, 16)
    assert torch.equal(NonLocal(16, 8)(x), x.mean(1))


def test_frame_weights():
    module, x = case(3, 5, 8, 4, seed=2)
    mask = some_mask(3, 5)
    weights = module.frame_weights(x, mask)
    assert weights.shape == (3, 1, 5)
    assert_close(weights.sum(-1), torch.ones(3, 1, dtype=torch.float64))
    assert (weights[:, 0][~mask] == 0).all()


def test_default_inner_dim_and_a_state_dict_round_trip():
    module = NonLocal(16)
    assert module.query.weight.shape == (8, 16)
    other = NonLocal(16)
    other.load_state_dict(module.state_dict())
    for time in (1, 3, 25):
        x = torch.randn(2, time, 16)
        assert torch.equal(other(x), module(x))


def test_inner_dim_below_one_is_refused():
    with pytest.raises(
        InputError, match="dim 16, inner_dim 0, g1 1 and g2 1 must all be at least 1"
    ):
        NonLocal(16, 0)
