"""StNet and its Temporal Xception Block against loops over frames, written from the paper and the
released code."""

import copy

import pytest
import timm
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from timm.models.resnet import BasicBlock, Bottleneck, ResNet
from timm.models.senet import SENet, SEResNeXtBottleneck
from torch import Tensor, nn

from aggregate.models import build, carry_over
from aggregate.stnet import StNet, TemporalBlock, TemporalXception
from extract import InputError
from tolerance import assert_close

# The four stages of each family of timm, small; zero_init_last would keep gradients from half of
# the trunk.
TRUNKS = {
    "resnet": lambda **options: ResNet(
        BasicBlock,
        (1, 1, 1, 1),
        channels=(4, 6, 8, 10),
        stem_width=4,
        zero_init_last=False,
        **options,
    ),
    "seresnext": lambda **options: ResNet(
        Bottleneck,
        (1, 1, 1, 1),
        cardinality=4,
        base_width=4,
        block_args={"attn_layer": "se"},
        **options,
    ),
    "legacy_seresnext": lambda **options: SENet(
        SEResNeXtBottleneck, (1, 1, 1, 1), groups=32, reduction=16, drop_rate=0.2, **options
    ),
}


def stnet(trunk="resnet", num_classes=5, frames_per_segment=1, *, seed=0, **options):
    torch.manual_seed(seed)
    return StNet(TRUNKS[trunk](), num_classes, frames_per_segment, **options)


def noise(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(module: nn.Module, *, seed: int = 2) -> nn.Module:
    """`module` in float64, with all weights and statistics away from their initial values."""
    generator = torch.Generator().manual_seed(seed)
    module.double()
    with torch.no_grad():
        for tensor in module.state_dict().values():
            if tensor.is_floating_point():
                tensor += 0.1 * torch.rand(tensor.shape, generator=generator, dtype=tensor.dtype)
    return module


# The reference: one frame after the other.


def batch_norm(norm: nn.Module, x: Tensor) -> Tensor:
    """Batch norm over all axes but the channels, which come last."""
    mean, var = norm.running_mean, norm.running_var
    if norm.training:
        rows = x.reshape(-1, x.shape[-1])
        mean = rows.sum(0) / len(rows)
        var = ((rows - mean) ** 2).sum(0) / len(rows)
    return (x - mean) / (var + norm.eps).sqrt() * norm.weight + norm.bias


def over_time(x: Tensor, at) -> Tensor:
    """out[:, t] = the sum over k = -1, 0, 1 of at(k, x[:, t + k]), with zeros before and after the
    video."""
    time = x.shape[1]
    return torch.stack(
        [sum(at(k + 1, x[:, t + k]) for k in (-1, 0, 1) if 0 <= t + k < time) for t in range(time)],
        dim=1,
    )


def literal_block(block: TemporalBlock, x: Tensor) -> Tensor:
    """x [batch, time, height, width, channels]"""
    weight = block.conv.weight[..., 0]
    convolved = over_time(x, lambda k, frame: frame @ weight[:, :, k].T) + block.conv.bias
    return x + batch_norm(block.norm, convolved.clamp(min=0))


def literal_txb(txb: TemporalXception, x: Tensor) -> Tensor:
    """x [batch, time, dim]"""

    def depthwise(conv, x):
        return over_time(x, lambda k, frame: frame * conv.weight[:, 0, k]) + conv.bias

    def pointwise(linear, x):
        return x @ linear.weight.T + linear.bias

    x = batch_norm(txb.norm_in, x)
    long = pointwise(txb.pointwise1, depthwise(txb.depthwise1, x))
    long = batch_norm(txb.norm_long, long).clamp(min=0)
    long = pointwise(txb.pointwise2, depthwise(txb.depthwise2, long))
    out = batch_norm(txb.norm_out, long + pointwise(txb.short, x)).clamp(min=0)
    return torch.stack([torch.stack(list(video)).max(0).values for video in out])


def literal_stnet(model: StNet, frames: Tensor) -> Tensor:
    batch, time, N = frames.shape[:3]
    images = torch.stack(
        [
            torch.cat([frames[b, t, i] for i in range(N)], dim=0)
            for b in range(batch)
            for t in range(time)
        ]
    )
    trunk = model.backbone
    if isinstance(trunk, SENet):
        x = trunk.pool0(trunk.layer0(images))
    else:
        x = trunk.maxpool(trunk.act1(trunk.bn1(trunk.conv1(images))))

    def temporal(block, x):
        channels_last = x.reshape(batch, time, *x.shape[1:]).permute(0, 1, 3, 4, 2)
        return literal_block(block, channels_last).permute(0, 1, 4, 2, 3).reshape(x.shape)

    x = temporal(model.after_res3, trunk.layer2(trunk.layer1(x)))
    x = temporal(model.after_res4, trunk.layer3(x))
    pooled = trunk.layer4(x).mean((2, 3)).reshape(batch, time, -1)
    return literal_txb(model.aggregator, pooled) @ model.classifier.weight.T + model.classifier.bias


# StNet as a whole


@pytest.mark.parametrize(
    ("trunk", "frames_per_segment", "num_classes", "parameters"),
    [
        ("legacy_seresnext101_32x4d", 1, 700, 56_827_116),
        ("seresnext101_32x4d", 1, 700, 56_827_116),
        ("resnet50", 5, 400, 33_158_864),
    ],
)
def test_parameter_counts(trunk, frames_per_segment, num_classes, parameters):
    with torch.device("meta"):
        model = StNet(timm.create_model(trunk), num_classes, frames_per_segment)

    def count(module):
        return sum(parameter.numel() for parameter in module.parameters())

    assert count(model) == parameters
    assert (count(model.after_res3), count(model.after_res4)) == (787_968, 3_148_800)
    assert count(model.aggregator) == 5_266_432


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("trunk", TRUNKS)
def test_at_the_start_the_trunk_is_kept_bit_for_bit(trunk, layout, training):
    model = stnet(trunk, frames_per_segment=2).to(memory_format=layout).train(training)
    for batch, time in ((2, 3), (1, 4), (3, 1)):
        images = torch.randn(batch * time, 6, 64, 64).to(memory_format=layout)
        frames = images.view(batch, time, 2, 3, 64, 64)
        expected = model.backbone.forward_features(images)
        maps = model.maps(frames)
        assert torch.equal(maps, expected)
        assert maps.stride() == expected.stride()
        assert expected.std() > 0.01
    nn.init.ones_(model.after_res3.norm.weight)
    assert not torch.equal(model.maps(frames), expected)


def test_at_the_start_the_trunk_is_kept_in_half_precision_and_the_head_is_computed_in_full():
    model, frames = stnet().eval(), torch.randn(2, 3, 1, 3, 64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        maps, features = model.maps(frames), model.features(frames)
        assert torch.equal(maps, model.backbone.forward_features(frames.flatten(0, 2)))
    assert maps.dtype == torch.bfloat16
    assert torch.equal(features, model.aggregator(maps.mean((2, 3)).float().view(2, 3, -1)))


@settings(max_examples=12)
@given(
    trunk=st.just("resnet"),
    batch=st.integers(2, 3),
    time=st.integers(1, 5),
    frames_per_segment=st.integers(1, 3),
    training=st.booleans(),
    seed=st.integers(0, 9),
)
@example(trunk="seresnext", batch=2, time=2, frames_per_segment=1, training=False, seed=0)
@example(trunk="legacy_seresnext", batch=2, time=3, frames_per_segment=2, training=True, seed=0)
def test_it_is_the_literal_form(trunk, batch, time, frames_per_segment, training, seed):
    model = trained(stnet(trunk, frames_per_segment=frames_per_segment, seed=seed)).train(training)
    frames = noise(batch, time, frames_per_segment, 3, 32, 40, seed=seed)
    logits, expected = model(frames), literal_stnet(model, frames)
    assert_close(logits, expected)
    cotangent = noise(*logits.shape)
    found, wanted = (
        torch.autograd.grad((out * cotangent).sum(), model.parameters())
        for out in (logits, expected)
    )
    largest = max(
        gradient.abs().max().item() for gradient in wanted
    )  # the sum cancels, so only rounding is left
    for ours, theirs in zip(found, wanted, strict=True):
        assert_close(ours, theirs, magnitude=largest)


def test_the_pool_is_the_average_whatever_the_trunk_was_built_with():
    frames = noise(2, 3, 1, 3, 64, 64)
    for pool in ("", "max", "avg"):
        model = trained(StNet(TRUNKS["resnet"](global_pool=pool), 5)).eval()
        assert_close(model(frames), literal_stnet(model, frames))


@pytest.mark.parametrize("time", [1, 2, 3, 7, 25])
def test_any_number_of_segments(time):
    model = trained(stnet(frames_per_segment=2)).eval()
    frames = noise(2, time, 2, 3, 32, 32)
    assert_close(model(frames), literal_stnet(model, frames))


def test_videos_of_a_batch_do_not_mix():
    model = trained(stnet()).eval()
    frames = noise(3, 4, 1, 3, 32, 32)
    assert_close(model(frames), torch.cat([model(video[None]) for video in frames]))


def test_the_order_of_segments_is_seen_through_the_temporal_blocks_and_the_aggregator():
    frames = noise(1, 4, 1, 3, 32, 32)
    for silent in ("aggregator", "blocks", "none"):
        model = trained(stnet()).eval()
        if silent in ("aggregator", "none"):
            for block in (model.after_res3, model.after_res4):
                nn.init.zeros_(block.norm.weight)
        if silent in ("blocks", "none"):
            for depthwise in (model.aggregator.depthwise1, model.aggregator.depthwise2):
                depthwise.weight.data[..., 0] = depthwise.weight.data[..., 2] = 0
        same = torch.allclose(model(frames), model(frames.flip(1)), rtol=1e-9, atol=1e-9)
        assert same is (silent == "none"), silent


def test_gradients_reach_everything_from_the_second_step_on():
    model = stnet().train()
    frames, labels = torch.randn(4, 3, 1, 3, 64, 64), torch.arange(4)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    still: list[set[str]] = []
    for _ in range(2):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(frames), labels).backward()
        still.append(
            {
                name
                for name, p in model.named_parameters()
                if p.grad is None or not p.grad.abs().sum() > 0
            }
        )
        optimizer.step()
    # gamma is 0 at first and shuts the convolutions off; it moves at the first step itself
    assert still[0] == {
        f"after_res{stage}.conv.{part}" for stage in (3, 4) for part in ("weight", "bias")
    }
    assert still[1] == set()


def test_the_trunk_s_activation_checkpointing_is_kept():
    model, frames = trained(stnet()).train(), noise(2, 3, 1, 3, 64, 64)

    def step():
        kept = 0

        def keep(tensor):
            nonlocal kept
            kept += tensor.numel() * (
                tensor.ndim == 4 and tensor.shape[:2] in {(6, 4), (6, 6), (6, 8), (6, 10)}
            )  # stages
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            logits = model(frames)
        return logits, torch.autograd.grad(logits.square().sum(), model.parameters()), kept

    logits, gradients, kept = step()
    model.backbone.set_grad_checkpointing(True)
    again, gradients_again, kept_again = step()
    assert torch.equal(again, logits)
    for one, other in zip(gradients_again, gradients, strict=True):
        assert_close(one, other)
    assert 0 < kept_again < 0.5 * kept


def test_a_few_steps_learn_the_direction_of_a_movement():
    """Pan left or right over the same picture: each class holds the frames of the other, in
    reverse."""
    model = stnet(num_classes=2).train()
    picture = torch.randn(8, 3, 32, 48)
    right = torch.stack([picture[..., start : start + 32] for start in (0, 5, 10, 15)], dim=1)[
        :, :, None
    ]
    frames, labels = torch.cat([right, right.flip(1)]), torch.tensor([0] * 8 + [1] * 8)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(frames), labels)
        loss.backward()
        optimizer.step()
    assert loss < 0.1  # chance is 0.69


@pytest.mark.parametrize("trunk", TRUNKS)
def test_super_images_of_equal_frames_are_seen_as_one_frame_was(trunk):
    one, three = trained(stnet(trunk)).eval(), stnet(trunk, frames_per_segment=3).double().eval()
    first = (
        "backbone.layer0.conv1.weight" if trunk.startswith("legacy") else "backbone.conv1.weight"
    )
    fresh = stnet(trunk).get_parameter(first)  # of the same seed
    assert torch.equal(
        stnet(trunk, frames_per_segment=3).get_parameter(first), fresh.repeat(1, 3, 1, 1) / 3
    )
    three.load_state_dict(
        one.state_dict() | {first: one.get_parameter(first).repeat(1, 3, 1, 1) / 3}
    )
    frames = noise(2, 3, 1, 3, 64, 64)
    assert_close(three(frames.expand(-1, -1, 3, -1, -1, -1)), one(frames))


def test_frames_of_a_super_image_keep_their_order():
    model = trained(stnet(frames_per_segment=2)).eval()
    frames = noise(2, 3, 2, 3, 32, 32)
    assert not torch.allclose(model(frames), model(frames.flip(2)))


def test_a_state_dict_round_trip_over_a_fresh_trunk():
    model, other = (
        trained(stnet(frames_per_segment=2)).eval(),
        stnet(frames_per_segment=2, seed=5).double().eval(),
    )
    other.load_state_dict(model.state_dict())
    frames = noise(2, 3, 2, 3, 32, 32)
    assert torch.equal(other(frames), model(frames))


def test_it_starts_as_a_temporal_xception_network_trained_on_cached_features():
    model = stnet().double().eval()
    cached = trained(build("txb", dim=10, num_classes=5, dropout=0.0)).eval()
    carried = carry_over(model, cached.state_dict(), classes="abcde", source_classes="abcde")
    assert carried.startswith("classifier rows: 5 carried over by class name, 0 start fresh")
    assert carried.endswith("aggregator weights: carried over")
    frames = noise(2, 3, 1, 3, 64, 64)
    features = model.backbone(frames.flatten(0, 2)).view(2, 3, 10)
    assert torch.equal(model(frames), cached(features))


def test_dropout_before_the_classifier_and_nowhere_in_evaluation():
    model, frames = stnet(dropout=0.5), torch.randn(2, 3, 1, 3, 64, 64)
    seen = []
    model.classifier.register_forward_hook(lambda _module, inputs, _out: seen.append(inputs[0]))
    features = model.train().features(frames)
    model(frames)
    kept = seen[0] != 0
    assert torch.equal(seen[0][kept], 2 * features[kept])
    assert (features[~kept] > 0).any()
    model.eval()(frames)
    assert torch.equal(seen[1], model.features(frames))


# Bad input


@pytest.mark.parametrize(
    ("name", "children"),
    [
        ("tf_efficientnet_lite0", "EfficientNet consists of conv_stem, bn1, blocks"),
        ("vit_tiny_patch16_224", "VisionTransformer consists of patch_embed"),
        ("convnext_atto", "ConvNeXt consists of stem, stages"),
        ("hrnet_w18_small", "HighResolutionNet consists of conv1, .* layer1, transition1"),
    ],
)
def test_trunks_without_four_stages_are_refused_by_name(name, children):
    with torch.device("meta"):
        trunk = timm.create_model(name)
    with pytest.raises(InputError, match=f"four stages layer1 .. layer4 .*; {children}"):
        StNet(trunk, 5)


def test_other_modules_are_no_trunk():
    with pytest.raises(InputError, match="Identity consists of nothing"):
        StNet(nn.Identity(), 5)
    trunk = TRUNKS["resnet"]()
    del trunk.layer3
    with pytest.raises(InputError, match=r"ResNet consists of .* layer2, layer4"):
        StNet(trunk, 5)


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        ((0,), {}, "num_classes 0 and frames_per_segment 1 must both be at least 1"),
        ((5, 0), {}, "num_classes 5 and frames_per_segment 0 must both be at least 1"),
        ((5,), {"dropout": 1.0}, "dropout is 1.0"),
    ],
)
def test_numbers_and_options_without_meaning_are_refused(arguments, options, message):
    with pytest.raises(InputError, match=message):
        StNet(TRUNKS["resnet"](), *arguments, **options)


def test_a_trunk_that_is_not_for_rgb_is_refused_and_left_as_it_was():
    trunk = TRUNKS["resnet"](in_chans=15, num_classes=7)
    with pytest.raises(
        InputError, match=r"takes 15 channels; give a trunk for RGB .* for 5 frames"
    ):
        StNet(trunk, 5, 5)
    assert trunk.fc.out_features == 7


@pytest.mark.parametrize(
    "shape", [(2, 3, 3, 32, 32), (2, 3, 1, 3, 32, 32), (2, 3, 2, 1, 32, 32), (2, 0, 2, 3, 32, 32)]
)
def test_frames_of_another_shape_are_refused(shape):
    with pytest.raises(
        ValueError, match=r"got frames \[2, .*takes \[batch, time, 2, 3, height, width\]"
    ):
        stnet(frames_per_segment=2)(torch.zeros(shape))


# The Temporal Xception Block alone


@settings(max_examples=25)
@given(
    batch=st.integers(2, 4),
    time=st.integers(1, 6),
    dim=st.sampled_from([2, 6, 9]),
    out_dim=st.sampled_from([None, 1, 5]),
    training=st.booleans(),
    seed=st.integers(0, 9),
)
def test_txb_is_the_literal_form(batch, time, dim, out_dim, training, seed):
    txb = trained(TemporalXception(dim, out_dim), seed=seed).train(training)
    x = noise(batch, time, dim, seed=seed)
    out = txb(x)
    assert out.shape == (batch, txb.out_dim) == (batch, out_dim or dim // 2)
    assert_close(out, literal_txb(txb, x), magnitude=1.0)


@settings(max_examples=25)
@given(counts=st.lists(st.integers(1, 5), min_size=2, max_size=4), seed=st.integers(0, 99))
def test_txb_on_a_masked_video_is_that_of_its_valid_frames_alone(counts, seed):
    txb = trained(TemporalXception(6)).eval()
    generator = torch.Generator().manual_seed(seed)
    x = torch.full((len(counts), 5, 6), torch.nan, dtype=torch.float64)
    mask = torch.zeros(len(counts), 5, dtype=torch.bool)
    for row, n in enumerate(counts):
        mask[row, torch.randperm(5, generator=generator)[:n]] = True
    x[mask] = noise(sum(counts), 6, seed=seed)
    alone = [literal_txb(txb, video[valid][None])[0] for video, valid in zip(x, mask, strict=True)]
    assert_close(txb(x, mask), torch.stack(alone))


def test_txb_counts_valid_frames_only_in_its_batch_norms():
    mask = torch.tensor([[True, False, True, True], [False, True, True, True]])
    x = noise(2, 4, 6)
    masked = trained(TemporalXception(6)).train()
    dense = copy.deepcopy(masked)
    assert_close(masked(x, mask), dense(x[mask].view(2, 3, 6)))
    for name, statistic in masked.named_buffers():
        assert_close(statistic.double(), dense.get_buffer(name).double())
    assert not torch.allclose(dense(x[mask].view(2, 3, 6)), dense(x), atol=1e-3)


def test_txb_refuses_an_empty_output_and_masks_that_do_not_fit():
    with pytest.raises(InputError, match="out_dim is 0; a Temporal Xception Block over 1 channels"):
        TemporalXception(1)
    with pytest.raises(ValueError, match=r"the mask is \[2, 3\]"):
        TemporalXception(6)(torch.zeros(2, 4, 6), torch.ones(2, 3, dtype=torch.bool))
