"""The attentive probe against plain loops written from its equations; which frames it sees, and how
many parameters it has."""

import math

import pytest
import torch
from torch.nn.functional import gelu, layer_norm

from aggregate.attentive import FASTEST, SLOWEST, AttentiveProbe, AttentiveTimeProbe
from extract import InputError
from tolerance import assert_close


def probe(dim=12, **options) -> AttentiveProbe:
    """A probe whose weights all differ from their initial values, so that each of them matters."""
    torch.manual_seed(0)
    made = AttentiveProbe(dim, **options).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return made


def normed(norm, row):
    return layer_norm(row, row.shape, norm.weight, norm.bias)


def looked_at(layer, asking, frames):
    """One query's multi-head attention over LN(frames), one head and one frame at a time; and its
    weights [heads, n]."""
    dim, heads = len(asking), layer.heads
    width = dim // heads
    weight_k, weight_v = layer.to_key_value.weight.split(dim)
    bias_k, bias_v = layer.to_key_value.bias.split(dim)
    q = layer.to_query.weight @ asking + layer.to_query.bias
    joined, weights = [], []
    for head in range(heads):
        part = slice(head * width, (head + 1) * width)
        keys = [(weight_k @ normed(layer.norm_frames, x) + bias_k)[part] for x in frames]
        values = [(weight_v @ normed(layer.norm_frames, x) + bias_v)[part] for x in frames]
        exps = [math.exp(float(q[part] @ key) / math.sqrt(width)) for key in keys]
        weights.append([one / sum(exps) for one in exps])
        joined.append(sum(w * value for w, value in zip(weights[-1], values, strict=True)))
    return layer.project.weight @ torch.cat(joined) + layer.project.bias, weights


def mlp(layer, row):
    inner = layer.mlp[0].weight @ normed(layer.norm_mlp, row) + layer.mlp[0].bias
    return layer.mlp[2].weight @ gelu(inner) + layer.mlp[2].bias


def by_loops(made, video):
    """F_v of one video [n, D] as in the module's docstring, and the query's weights [heads, n]."""
    frames = list(video)
    n, dim = video.shape
    if made.norm_in is not None:
        half = (dim + 1) // 2
        for i, x in enumerate(frames):
            t = (i + 0.5) / n
            f = [SLOWEST * (FASTEST / SLOWEST) ** (k / (half - 1)) for k in range(half)]
            e = [math.sin(2 * math.pi * one * t) for one in f] + [
                math.cos(2 * math.pi * one * t) for one in f
            ]
            frames[i] = normed(made.norm_in, x) + torch.tensor(e[:dim], dtype=video.dtype)
    *before, last = made.layers
    for layer in before:
        frames = [x + looked_at(layer, normed(layer.norm_frames, x), frames)[0] for x in frames]
        frames = [x + mlp(layer, x) for x in frames]
    q = made.query[0, 0]
    attended, weights = looked_at(last, q, frames)
    return q + attended + mlp(last, q + attended), weights


@pytest.mark.parametrize("depth", [1, 3])
@pytest.mark.parametrize("frame_time", [False, True])
@pytest.mark.parametrize("dim", [12, 9])
def test_the_probe_is_its_equations_frame_by_frame(dim, depth, frame_time):
    made = probe(dim, depth=depth, heads=3, frame_time=frame_time)
    x = torch.randn(3, 5, dim, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 1, 0]], dtype=torch.bool)
    with torch.no_grad():
        got, weights = made(x, mask), made.frame_weights(x, mask)
        for video, valid, row, shares in zip(x, mask, got, weights, strict=True):
            expected, by_hand = by_loops(made, video[valid])
            assert_close(row, expected)
            assert_close(shares[:, valid], torch.tensor(by_hand, dtype=torch.float64))
            assert not shares[:, ~valid].any()


@pytest.mark.parametrize("depth", [1, 2])
def test_only_with_frame_time_is_order_seen(depth):
    x = torch.randn(2, 6, 12, dtype=torch.float64)
    without, within = (probe(depth=depth, heads=2, frame_time=flag) for flag in (False, True))
    with torch.no_grad():
        assert_close(without(x.flip(1)), without(x))
        assert (within(x.flip(1)) - within(x)).abs().max() > 0.01


def test_parameters_are_those_of_the_docstring():
    for dim, depth, frame_time in ((64, 1, False), (64, 4, False), (96, 2, True)):
        made = AttentiveProbe(dim, depth=depth, frame_time=frame_time)
        counted = sum(parameter.numel() for parameter in made.parameters())
        assert counted == depth * (12 * dim**2 + 13 * dim) + dim + (2 * dim if frame_time else 0)


@pytest.mark.parametrize(("dim", "heads"), [(12, 1), (128, 2), (1280, 20), (2048, 32), (200, 2)])
def test_heads_are_about_64_channels_wide(dim, heads):
    with torch.device("meta"):
        assert AttentiveProbe(dim).layers[0].heads == heads


def test_it_starts_as_v_jepa_s_smaller_with_depth():
    torch.manual_seed(0)
    for number, layer in enumerate(AttentiveProbe(256, depth=3).layers, 1):
        assert not layer.project.bias.any()
        for weight, std in (
            (layer.to_query.weight, 0.02),
            (layer.mlp[2].weight, 0.02 / math.sqrt(2 * number)),
        ):
            assert weight.std().item() == pytest.approx(std, rel=0.02)


def test_what_cannot_be_is_refused():
    with pytest.raises(InputError, match="depth is 0"):
        AttentiveProbe(12, depth=0)
    for heads in (5, 0):
        with pytest.raises(InputError, match=f"heads {heads} does not divide dim 12"):
            AttentiveProbe(12, heads=heads)


def test_the_head_with_time_is_the_probe_with_frame_time():
    torch.manual_seed(0)
    with_time = AttentiveTimeProbe(12, heads=2).double()
    plain = AttentiveProbe(12, heads=2, frame_time=True).double()
    plain.load_state_dict(with_time.state_dict())
    x = torch.randn(2, 5, 12, dtype=torch.float64)
    assert torch.equal(with_time(x), plain(x))
