"""Average, max and weighted average against plain loops, with and without masks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from aggregate.models import build
from aggregate.pooling import Average, Max, WeightedAverage
from tolerance import assert_close


def features(batch: int, time: int, dim: int, *, seed: int) -> torch.Tensor:
    return torch.randn(
        batch, time, dim, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )


def some_mask(batch: int, time: int, *, seed: int) -> torch.Tensor:
    """A random mask with at least one valid frame per row."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(batch, time, generator=generator) < 0.5
    mask[torch.arange(batch), torch.randint(time, (batch,), generator=generator)] = True
    return mask


def trained_weighted(dim: int, *, seed: int) -> WeightedAverage:
    module = WeightedAverage(dim).double()
    with torch.no_grad():
        module.score.weight.copy_(features(1, 1, dim, seed=seed)[0])
    return module


def by_loop(module: torch.nn.Module, frames: list[torch.Tensor]) -> torch.Tensor:
    """One video's vector from the list of its valid frames."""
    if isinstance(module, Average):
        return sum(frames) / len(frames)
    if isinstance(module, Max):
        best = frames[0].clone()
        for frame in frames:
            for channel, value in enumerate(frame):
                best[channel] = max(best[channel], value)
        return best
    powers = [
        torch.exp(sum(w * f for w, f in zip(module.score.weight[0], frame, strict=True)))
        for frame in frames
    ]
    return sum(power * frame for power, frame in zip(powers, frames, strict=True)) / sum(powers)


@given(
    st.integers(1, 4), st.integers(1, 6), st.integers(1, 7), st.booleans(), st.integers(0, 2**31)
)
@settings(max_examples=40)
def test_against_a_loop(batch, time, dim, masked, seed):
    x = features(batch, time, dim, seed=seed)
    mask = some_mask(batch, time, seed=seed) if masked else None
    for module in (Average(dim), Max(dim), trained_weighted(dim, seed=seed)):
        valid = [
            [f for t, f in enumerate(video) if mask is None or mask[v, t]]
            for v, video in enumerate(x)
        ]
        with torch.no_grad():
            assert_close(
                module(x, mask), torch.stack([by_loop(module, frames) for frames in valid])
            )
        assert module.out_dim == dim


@pytest.mark.parametrize("build", [Average, Max, lambda dim: trained_weighted(dim, seed=3)])
def test_masked_frames_count_for_nothing_not_even_nan(build):
    module, mask = build(5), torch.tensor([[True, False, True], [False, True, False]])
    x = features(2, 3, 5, seed=0)
    poisoned = x.masked_fill(~mask[..., None], torch.nan).requires_grad_()
    out = module(poisoned, mask)
    assert torch.equal(out, module(x, mask))
    out.sum().backward()
    assert poisoned.grad.isfinite().all()
    assert (poisoned.grad[~mask] == 0).all()
    assert (poisoned.grad[mask].abs().sum(-1) > 0).any()


def test_weighted_average_starts_as_tsn_and_its_weights_sum_to_one():
    x, mask = features(3, 4, 6, seed=1), some_mask(3, 4, seed=1)
    assert_close(WeightedAverage(6).double()(x, mask), Average(6)(x, mask))
    weights = trained_weighted(6, seed=2).frame_weights(x, mask)
    assert weights.shape == (3, 1, 4)
    assert_close(weights.sum(-1), torch.ones(3, 1, dtype=torch.float64))
    assert (weights[:, 0][~mask] == 0).all()
    assert weights[:, 0][mask].std() > 0.01


def test_weighted_average_learns_from_its_uniform_start():
    module = WeightedAverage(6).double()
    module(features(2, 3, 6, seed=1)).square().sum().backward()
    assert module.score.weight.grad.abs().max() > 1e-3


@pytest.mark.parametrize("build", [Average, Max, WeightedAverage])
def test_a_bad_mask_is_refused(build):
    x = torch.randn(3, 4, 5)
    with pytest.raises(
        ValueError, match=r"the mask is \[3, 5\]; for features \[3, 4, 5\] it must be \[3, 4\]"
    ):
        build(5)(x, torch.ones(3, 5, dtype=torch.bool))
    mask = torch.ones(3, 4, dtype=torch.bool)
    mask[1:] = False
    with pytest.raises(
        ValueError, match=r"no frame is valid in row 1 of the mask \(2 such rows of 3\)"
    ):
        build(5)(x, mask)


def test_how_much_attention_is_used_by_hand():
    """Weights (1, 0) of two frames are a single frame, and (1/2, 1/2) are even. A video with one
    frame counts as even. The second video changes its class."""
    from aggregate.inference import attention, attention_text

    model = build("weighted", dim=2, num_classes=2)
    with torch.no_grad():
        model.aggregator.score.weight.copy_(torch.tensor([[100.0, 0.0]]))
        model.classifier.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        model.classifier.bias.zero_()
    x = torch.tensor([[[1, 0], [1, 0]], [[1, 0], [0, 3]], [[1, 0], [0, 3]]], dtype=torch.float32)
    mask = torch.tensor([[1, 1], [1, 1], [1, 0]], dtype=torch.bool)
    measured = attention(model, [(x, mask)])
    assert measured == {"unevenness": pytest.approx(1 / 3), "changed": pytest.approx(1 / 3)}
    assert "33.3% of the predictions change" in attention_text(measured)
    even = attention(model, [(x[:1], None)])
    assert even == {"unevenness": pytest.approx(0, abs=1e-6), "changed": 0}
    assert "attention is not used" in attention_text(even)
    assert attention(build("tsn", dim=2, num_classes=2), [(x, mask)]) == {}
