"""NeXtVLAD against plain loops written from its equations; which frames it sees, and how many
parameters it has."""

import pytest
import torch

from aggregate.nextvlad import NeXtVLAD
from extract import InputError
from tolerance import assert_close


def vlad(dim=12, **options) -> NeXtVLAD:
    """A module whose weights and statistics all differ from their initial values, so that each of
    them matters."""
    torch.manual_seed(0)
    made = NeXtVLAD(dim, **options).double().eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for norm in (made.norm_in, made.norm_descriptor, made.norm_gate):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return made


def normed(norm, row):
    return (row - norm.running_mean) / (
        norm.running_var + norm.eps
    ).sqrt() * norm.weight + norm.bias


def by_loops(made, video):
    """F_v of one video [n, D] as in the module's docstring, and a [groups, n]."""
    wide = made.expand.out_features
    width = wide // made.groups
    v = torch.zeros(made.clusters, width, dtype=video.dtype)
    attention = torch.zeros(made.groups, len(video), dtype=video.dtype)
    for i, frame in enumerate(video):
        x = made.expand.weight @ normed(made.norm_in, frame) + made.expand.bias
        for g in range(made.groups):
            a = torch.sigmoid(made.attend.weight[g] @ x + made.attend.bias[g])
            rows = slice(g * made.clusters, (g + 1) * made.clusters)
            exps = (made.assign.weight[rows] @ x + made.assign.bias[rows]).exp()
            attention[g, i] = a
            for k in range(made.clusters):
                v[k] += (
                    a * exps[k] / exps.sum() * (x[g * width : (g + 1) * width] - made.centers[k])
                )
    descriptor = normed(
        made.norm_descriptor, torch.cat([row / row.square().sum().sqrt() for row in v])
    )
    y = made.reduce.weight @ descriptor + made.reduce.bias
    inner = normed(made.norm_gate, made.squeeze.weight @ y + made.squeeze.bias).clamp(min=0)
    return y * torch.sigmoid(made.gate.weight @ inner + made.gate.bias), attention


@pytest.mark.parametrize(("groups", "expansion", "out_dim"), [(1, 1, None), (4, 2, 16), (3, 1, 5)])
def test_the_module_is_its_equations_number_by_number(groups, expansion, out_dim):
    made = vlad(clusters=3, groups=groups, expansion=expansion, out_dim=out_dim)
    x = torch.randn(3, 5, 12, dtype=torch.float64)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 1, 0], [0, 0, 0, 1, 0]], dtype=torch.bool)
    with torch.no_grad():
        got, weights = made(x, mask), made.frame_weights(x, mask)
        for video, valid, row, shares in zip(x, mask, got, weights, strict=True):
            expected, attention = by_loops(made, video[valid])
            assert_close(row, expected)
            assert_close(shares[:, valid], attention)
            assert not shares[:, ~valid].any()


def test_in_training_masked_frames_and_dropout_stay_apart_from_the_rest():
    """Batch statistics are taken over valid frames only. The values of masked frames change
    nothing, gradients included."""
    made, x = (
        vlad(clusters=3, groups=4, descriptor_dropout=0.0).train(),
        torch.randn(4, 5, 12, dtype=torch.float64),
    )
    mask = torch.rand(4, 5, generator=torch.Generator().manual_seed(1)) < 0.6
    mask[:, 0] = True
    gradients = []
    for blank in (0.0, torch.nan):
        made.zero_grad()
        made(x.masked_fill(~mask[..., None], blank), mask).square().sum().backward()
        gradients.append([parameter.grad.clone() for parameter in made.parameters()])
    for one, other in zip(*gradients, strict=True):
        assert_close(other, one)
        assert one.isfinite().all()


def test_a_batch_of_one_video_with_one_frame_can_be_trained_on():
    made = vlad(clusters=3, groups=4).train()
    before = made.norm_descriptor.running_mean.clone()
    made(torch.randn(1, 1, 12, dtype=torch.float64)).sum().backward()
    assert made.expand.weight.grad.isfinite().all()
    assert torch.equal(made.norm_descriptor.running_mean, before)


def test_order_is_not_seen():
    made, x = vlad(clusters=3, groups=4), torch.randn(2, 6, 12, dtype=torch.float64)
    with torch.no_grad():
        assert_close(made(x.flip(1)), made(x))


@pytest.mark.parametrize(("D", "K", "G", "expansion", "H"), [(64, 16, 8, 2, 64), (32, 5, 4, 1, 24)])
def test_parameters_are_those_of_the_docstring(D, K, G, expansion, H):
    made = NeXtVLAD(D, clusters=K, groups=G, expansion=expansion, out_dim=H)
    wide, R = expansion * D, H // 8
    before = wide * D + wide + G * (wide + 1) + G * K * (wide + 1) + K * wide // G
    after = H * (K * wide // G + 1) + R * (H + 1) + H * (R + 1)
    norms = 2 * (D + K * wide // G + R)
    assert sum(parameter.numel() for parameter in made.parameters()) == before + after + norms


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"groups": 7}, "groups 7 does not divide expansion x dim 24"),
        ({"clusters": 0}, "clusters 0, groups 8, expansion 2 and out_dim 12 must be at least 1"),
        ({"descriptor_dropout": 1.0}, "descriptor_dropout is 1.0"),
    ],
)
def test_what_cannot_be_is_refused(options, message):
    with pytest.raises(InputError, match=message):
        NeXtVLAD(12, **options)
