"""The GRU head, held to the equations of a GRU written out one frame at a time."""

import pytest
import torch
from torch.nn.functional import layer_norm

from aggregate.recurrent import GatedRecurrent
from extract import InputError
from tolerance import assert_close


def by_loops(head: GatedRecurrent, frames: torch.Tensor) -> torch.Tensor:
    """The mean state over `frames` [n, D]: reset gate r, update gate z, candidate c (PyTorch's form)."""
    width = head.gru.hidden_size
    w_x, w_h = head.gru.weight_ih_l0, head.gru.weight_hh_l0
    b_x, b_h = head.gru.bias_ih_l0, head.gru.bias_hh_l0
    h = frames.new_zeros(width)
    states = []
    for frame in frames:
        x = layer_norm(frame, frame.shape, head.norm_in.weight, head.norm_in.bias)
        x_r, x_z, x_c = (w_x @ x + b_x).split(width)
        h_r, h_z, h_c = (w_h @ h + b_h).split(width)
        r, z = (x_r + h_r).sigmoid(), (x_z + h_z).sigmoid()
        c = (x_c + r * h_c).tanh()
        h = (1 - z) * c + z * h
        states.append(h)
    return torch.stack(states).mean(0)


def test_it_is_its_equations_over_the_valid_frames():
    torch.manual_seed(0)
    head = GatedRecurrent(6, inner_dim=4).double()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 1, 0]], dtype=torch.bool)
    for video, valid, row in zip(x, mask, head(x, mask), strict=True):
        assert_close(row, by_loops(head, video[valid]))


def test_it_sees_the_order_of_frames():
    torch.manual_seed(0)
    head, x = GatedRecurrent(6, inner_dim=4), torch.randn(2, 5, 6)
    assert (head(x.flip(1)) - head(x)).abs().max() > 0.01


def test_parameters_are_those_of_the_docstring():
    for dim, width in ((6, 4), (32, 256)):
        counted = sum(parameter.numel() for parameter in GatedRecurrent(dim, width).parameters())
        assert counted == 2 * dim + 3 * width * (dim + width + 2)
    assert GatedRecurrent(6).out_dim == 256


def test_a_width_below_one_is_refused():
    with pytest.raises(InputError, match=r"inner_dim \(m1\) is 0"):
        GatedRecurrent(6, inner_dim=0)
