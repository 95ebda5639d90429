"""A step of training: what it does to gradients and weights."""

import copy

import pytest
import torch
from torch import nn

from aggregate.training.learner import clip_gradients
from aggregate.training.recipes import make_optimizer, parameter_groups, recipe


def small_network() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(40, 30), nn.ReLU(), nn.Linear(30, 5))
    network(torch.randn(8, 40)).square().sum().backward()
    return network


@pytest.mark.parametrize("largest_norm", [0.1, 1e6])
def test_gradients_are_clipped_as_torch_clips_them(largest_norm):
    ours, theirs = small_network(), small_network()
    ours[2].bias.grad = theirs[2].bias.grad = None
    clip_gradients(ours.parameters(), largest_norm)
    before = nn.utils.clip_grad_norm_(theirs.parameters(), largest_norm)
    assert (before > largest_norm) == (largest_norm < 1)
    for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert mine.grad is other.grad is None or torch.equal(mine.grad, other.grad)


def test_the_fused_optimizer_takes_the_steps_of_the_plain_one():
    ours, theirs = small_network(), small_network()
    chosen = recipe("cached", "tsn", videos=100, weight_decay=0.1)
    fused = make_optimizer(parameter_groups(ours, chosen), chosen)
    plain = torch.optim.SGD(parameter_groups(theirs, chosen), lr=chosen.lr, momentum=0.9)
    start = copy.deepcopy(ours.state_dict())
    for _ in range(20):
        fused.step()
        plain.step()
    for name, value in ours.state_dict().items():
        torch.testing.assert_close(value, theirs.state_dict()[name], rtol=1e-5, atol=1e-6)
        assert not torch.equal(value, start[name])
