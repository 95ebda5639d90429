"""The backbone's input: torchvision's resize and center crop, TSN's crops, and views that match
their names."""

import hashlib
import itertools
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from decode_jobs import prepare_row
from extract.decode import VideoError, decode
from extract.decode.jobs import Plan, decode_job
from extract.decode.transform import (
    Preprocessing,
    augmentation_rng,
    crop_boxes,
    cut,
    resize_frame,
    training_view,
    view_names,
)
from extract.sampling import segment_centers

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
SMALL = Preprocessing(size=32, resize=40, interpolation="bilinear", **IMAGENET)
SEE_224 = Preprocessing(size=224, resize=224, interpolation="bilinear", **IMAGENET)
FILTERS = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """Smooth shapes under noise, uint8 [H, W, 3]: no two crops are equal."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 7 + y / 11), np.cos(x / 5), np.sin(y / 3)], axis=-1) * 90 + 128
    return (waves + rng.normal(0, 20, waves.shape)).clip(0, 255).astype(np.uint8)


# -- resize ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize(
    "shape",
    [(256, 340), (340, 256), (320, 568), (89, 159), (161, 91), (16, 16), (1080, 1919), (50, 500)],
)
def test_resize_is_torchvisions_on_uint8(shape, interpolation):
    import torch
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2 import functional as torchvision

    frame = picture(*shape)
    ours = resize_frame(
        frame, Preprocessing(size=224, resize=232, interpolation=interpolation, **IMAGENET)
    )
    theirs = torchvision.resize(
        torch.from_numpy(frame).permute(2, 0, 1),
        [232],
        InterpolationMode(interpolation),
        antialias=True,
    )
    assert ours.dtype == np.uint8
    assert ours.shape == tuple(theirs.permute(1, 2, 0).shape)
    assert min(ours.shape[:2]) == 232
    difference = np.abs(ours.astype(int) - theirs.permute(1, 2, 0).numpy().astype(int))
    # Each rounds twice (rows, then columns), with weights of its own width; the sizes of cubic
    # weights sum to over 1, so that a few samples in 10^5 differ by 2.
    assert (difference > 1).mean() <= (1e-4 if interpolation == "bicubic" else 0)
    assert difference.max() <= 2


def test_resize_antialiases():
    """A fine checkerboard shrunk to a third becomes gray. Without antialiasing it would stay black
    and white."""
    board = np.broadcast_to(
        ((np.indices((96, 120)).sum(0) % 2) * 255)[..., None], (96, 120, 3)
    ).astype(np.uint8)
    shrunk = resize_frame(board, replace(SMALL, resize=32))
    assert 100 < shrunk.min() <= shrunk.max() < 155


def test_a_frame_of_the_right_size_is_left_as_it_is():
    frame = picture(40, 71)
    assert resize_frame(frame, SMALL) is frame


# -- evaluation crops ------------------------------------------------------------------------------------------------

SIDES = st.integers(0, 300).map(lambda extra: 224 + extra)


@given(SIDES, SIDES)
def test_the_centre_crop_is_torchvisions(height, width):
    import torch
    from torchvision.transforms.v2.functional import center_crop

    places = torch.arange(height * width).reshape(1, height, width)
    [((top, left, tall, wide), flip)] = crop_boxes(height, width, SEE_224, 1)
    assert not flip
    assert torch.equal(
        places[:, top : top + tall, left : left + wide], center_crop(places, [224, 224])
    )


@given(SIDES, SIDES)
def test_three_crops_are_the_centre_and_both_ends_of_the_long_side(height, width):
    boxes = crop_boxes(height, width, SEE_224, 3)
    center = crop_boxes(height, width, SEE_224, 1)[0][0]
    assert [flip for _, flip in boxes] == [False] * 3
    top, left = center[:2]
    if height > width:
        ends = [(0, left, 224, 224), (height - 224, left, 224, 224)]
    else:
        ends = [(top, 0, 224, 224), (top, width - 224, 224, 224)]
    assert [box for box, _ in boxes] == [center, *ends]


@given(SIDES, SIDES)
def test_ten_crops_have_tsns_offsets_each_with_its_mirror_image(height, width):
    """tsn-pytorch's GroupOverSample: fill_fix_offset(False, w, h, crop, crop), then every crop
    flipped."""
    w_step, h_step = (width - 224) // 4, (height - 224) // 4
    offsets = {  # (left, top), in the order of that code
        "crop_tl": (0, 0),
        "crop_tr": (4 * w_step, 0),
        "crop_bl": (0, 4 * h_step),
        "crop_br": (4 * w_step, 4 * h_step),
        "center": (2 * w_step, 2 * h_step),
    }
    boxes = dict(zip(view_names(10, 0), crop_boxes(height, width, SEE_224, 10), strict=True))
    for name, (left, top) in offsets.items():
        assert boxes.pop(name) == ((top, left, 224, 224), False)
        assert boxes.pop(f"{name}_flip") == ((top, left, 224, 224), True)
    assert not boxes


@given(SIDES, SIDES, st.sampled_from([1, 3, 10]))
def test_every_crop_lies_within_the_frame_and_has_a_name(height, width, crops):
    boxes = crop_boxes(height, width, SEE_224, crops)
    assert len(boxes) == len(view_names(crops, 0)) == crops
    for (top, left, tall, wide), _ in boxes:
        assert (tall, wide) == (224, 224)
        assert 0 <= top <= height - 224
        assert 0 <= left <= width - 224


def test_views_are_named_in_their_order():
    assert view_names(1, 2) == ("center", "augment_0", "augment_1")
    assert view_names(3, 0) == ("center", "crop_left", "crop_right")
    assert view_names(10, 1)[:4] == ("center", "center_flip", "crop_tl", "crop_tl_flip")
    assert view_names(10, 1)[-1] == "augment_0"
    for crops, passes in itertools.product((1, 3, 10), (0, 3)):
        assert view_names(crops, passes)[0] == "center"
        assert len(set(view_names(crops, passes))) == crops + passes


# -- the training view -----------------------------------------------------------------------------------------------


def all_training_views(frame: np.ndarray, see: Preprocessing) -> dict[bytes, set[tuple]]:
    """Every training view of a frame by its bytes, by tsn-pytorch's GroupMultiScaleCrop as written
    there.

    The values are the choices (width, height, left, top, flip) that give the view: several, if two
    offsets coincide.
    """
    height, width = frame.shape[:2]
    sides = [int(min(height, width) * scale) for scale in (1, 0.875, 0.75, 0.66)]
    views: dict[bytes, set[tuple]] = {}
    for i, h in enumerate(sides):
        for j, w in enumerate(sides):
            if abs(i - j) > 1:
                continue
            w_step, h_step = (width - w) // 4, (height - h) // 4
            offsets = [(0, 0), (4, 0), (0, 4), (4, 4), (2, 2)]
            offsets += [(0, 2), (4, 2), (2, 4), (2, 0), (1, 1), (3, 1), (1, 3), (3, 3)]
            for across, down in offsets:
                left, top = across * w_step, down * h_step
                crop = Image.fromarray(frame).crop((left, top, left + w, top + h))
                view = crop.resize((see.size, see.size), FILTERS[see.interpolation])
                for flip in (False, True):
                    turned = view.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flip else view
                    views.setdefault(turned.tobytes(), set()).add((w, h, left, top, flip))
    return views


@pytest.mark.parametrize("shape", [(40, 71), (53, 40), (60, 60)])
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_training_views_are_tsns_multi_scale_corner_crops_all_of_them(shape, interpolation):
    see = replace(SMALL, interpolation=interpolation)
    frame = picture(*shape)
    views = all_training_views(frame, see)
    rng = np.random.default_rng(0)
    seen = dict.fromkeys(views, 0)
    for _ in range(3000):
        seen[training_view(*shape, see, rng)(frame).tobytes()] += (
            1  # KeyError: a view that TSN does not have
        )
    missing = [views[view] for view, count in seen.items() if not count]
    assert not missing
    flipped = sum(
        count for view, count in seen.items() if all(choice[-1] for choice in views[view])
    )
    assert abs(flipped - 1500) < 150


def test_there_are_ten_pairs_of_scales_at_thirteen_places_mirrored_or_not():
    choices = set().union(
        *all_training_views(picture(200, 300), replace(SMALL, resize=200)).values()
    )
    # If the crop is as high as the frame, the 13 positions coincide in 3 columns and 2 between
    # them.
    full = {choice for choice in choices if choice[1] == 200}
    assert len({choice[:2] for choice in choices}) == 10
    assert len(choices - full) == (10 - 2) * 13 * 2
    assert len(full) == 2 * 5 * 2


def test_all_frames_of_a_clip_get_the_same_crop():
    first, second = picture(60, 80, seed=1), picture(60, 80, seed=2)
    choices_of_first, choices_of_second = (
        all_training_views(first, SMALL),
        all_training_views(second, SMALL),
    )
    rng = np.random.default_rng(3)
    for _ in range(100):
        view = training_view(60, 80, SMALL, rng)
        assert choices_of_first[view(first).tobytes()] == choices_of_second[view(second).tobytes()]
        assert np.array_equal(view(first), view(first))


# -- the random numbers of a pass ------------------------------------------------------------------------------------

TRIPLES = st.tuples(st.integers(0, 99), st.text("ab/1 ä.\u52a8", max_size=6), st.integers(0, 99))


@given(TRIPLES, TRIPLES)
def test_augmentation_is_a_function_of_seed_id_and_pass(one, other):
    draws = [
        augmentation_rng(*triple).integers(0, 2**62, 4).tolist() for triple in (one, other, one)
    ]
    assert draws[0] == draws[2]
    assert (draws[0] == draws[1]) == (one == other)


def test_augmentation_is_the_same_in_every_process_and_version():
    """A store that is resumed next year must continue with the same random numbers, so the test
    spells out the recipe."""
    digest = hashlib.sha256(b"7\0train/walking/a.mp4\x002").digest()
    expected = np.random.Generator(np.random.PCG64(int.from_bytes(digest[:16], "little"))).random(5)
    assert augmentation_rng(7, "train/walking/a.mp4", 2).random(5).tolist() == expected.tolist()


# -- a whole video ---------------------------------------------------------------------------------------------------


def plan(frames: int = 4, crops: int = 1, augment_passes: int = 0, **changed) -> Plan:
    return Plan(frames, crops, augment_passes, SMALL, **({"seed": 0, "decoder": "pyav"} | changed))


def prepared(path: Path, what: Plan, video_id: str = "id"):
    size = what.preprocessing.size
    out = np.zeros(
        (len(view_names(what.crops, what.augment_passes)), what.frames, size, size, 3), np.uint8
    )
    return out, prepare_row(str(path), video_id, what, out)


def whole_video(path: Path) -> tuple[list[np.ndarray], list[float]]:
    """Every frame as RGB, and its time in seconds, by plain PyAV."""
    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        return [frame.to_ndarray(format="rgb24") for frame in frames], [
            frame.time - frames[0].time for frame in frames
        ]


CLIPS = [
    "h264_long_gop.mp4",
    "h264_portrait.mp4",
    "h264_odd_size_yuv444.mp4",
    "h264_1frame.mp4",
    "h264_vfr.mp4",
]


@pytest.fixture(params=CLIPS)
def clip(request, codec_clips) -> Path:
    return codec_clips / request.param


def small_frames(frames: list[np.ndarray]) -> list[np.ndarray]:
    """Frames resized by Pillow to torchvision's size: short side 40, the long side rounded down."""
    height, width = frames[0].shape[:2]
    short = min(height, width)
    size = (int(40 * width / short), int(40 * height / short))
    return [
        np.asarray(Image.fromarray(frame).resize(size, Image.Resampling.BILINEAR))
        for frame in frames
    ]


@pytest.mark.parametrize("crops", [1, 3, 10])
def test_views_are_the_decoded_resized_and_cropped_frames(clip, crops):
    frames, times = whole_video(clip)
    indices = segment_centers(len(frames), 4)
    small = np.stack(small_frames([frames[index] for index in indices]))
    out, seen = prepared(clip, plan(crops=crops))
    height, width = small.shape[1:3]

    def cut(top: int, left: int) -> np.ndarray:
        return small[:, top : top + 32, left : left + 32]

    views = dict(zip(view_names(crops, 0), out, strict=True))
    if crops == 10:
        down, across = (height - 32) // 4, (width - 32) // 4
        assert np.array_equal(views["center"], cut(2 * down, 2 * across))
        assert np.array_equal(views["crop_tr"], cut(0, 4 * across))
        assert np.array_equal(views["crop_bl"], cut(4 * down, 0))
        for name in ("center", "crop_tl", "crop_tr", "crop_bl", "crop_br"):
            assert np.array_equal(views[f"{name}_flip"], views[name][:, :, ::-1]), name
        assert not np.array_equal(views["center_flip"], views["center"])
    else:
        assert np.array_equal(
            views["center"], cut(round((height - 32) / 2), round((width - 32) / 2))
        )
    if crops == 3:
        portrait = height > width
        assert np.array_equal(views["crop_left"], cut(0, 4) if portrait else cut(4, 0))
        assert np.array_equal(
            views["crop_right"], cut(height - 32, 4) if portrait else cut(4, width - 32)
        )
    for name, values, expected in (
        ("indices", seen.indices, indices),
        ("timestamps", seen.timestamps, [times[index] for index in indices]),
    ):
        assert values.shape == (crops, 4), name
        np.testing.assert_allclose(values, np.broadcast_to(expected, (crops, 4)), atol=1e-5)
    assert (seen.indices.dtype, seen.timestamps.dtype) == (np.int32, np.float32)
    assert (seen.num_frames, seen.problem) == (len(frames), "")


def test_augmented_passes_are_one_random_training_view_of_random_frames_each(clip):
    frames, times = whole_video(clip)
    out, seen = prepared(clip, plan(crops=3, augment_passes=5))
    assert seen.indices.shape == seen.timestamps.shape == (8, 4)
    crops_used = []
    for number in range(5):
        indices = seen.indices[3 + number]
        edges = np.arange(5) * len(frames) // 4
        assert ((edges[:-1] <= indices) & (indices < np.maximum(edges[1:], edges[:-1] + 1))).all()
        np.testing.assert_allclose(
            seen.timestamps[3 + number], [times[index] for index in indices], atol=1e-5
        )
        small = small_frames([frames[index] for index in indices])
        choices = [
            all_training_views(frame, SMALL)[view.tobytes()]
            for frame, view in zip(small, out[3 + number], strict=True)
        ]
        crops_used.append(frozenset(set.intersection(*choices)))
        assert crops_used[-1], "frames of one clip are cropped differently"
    assert len(set(crops_used)) > 1
    if len(frames) > 40:
        assert len({tuple(row) for row in seen.indices[3:].tolist()}) > 1


def test_a_pass_does_not_depend_on_what_else_is_prepared(clip):
    alone, seen_alone = prepared(clip, plan(augment_passes=1))
    among, seen_among = prepared(clip, plan(crops=10, augment_passes=3))
    assert np.array_equal(alone[1], among[10])
    assert np.array_equal(seen_alone.indices[1], seen_among.indices[10])


@pytest.mark.parametrize("changed", ["id", "seed", "pass"])
def test_another_id_seed_or_pass_is_another_augmentation(changed, codec_clips):
    clip = codec_clips / "h264_long_gop.mp4"
    out, seen = prepared(clip, plan(augment_passes=2))
    if changed == "pass":
        other, seen_other = out[[0, 2, 1]], seen.indices[[0, 2, 1]]
    else:
        again, seen_again = prepared(
            clip, plan(augment_passes=2, seed=changed == "seed"), "di" if changed == "id" else "id"
        )
        other, seen_other = again, seen_again.indices
    assert np.array_equal(out[0], other[0])
    assert not np.array_equal(out[1], other[1])
    assert not np.array_equal(seen.indices[1], seen_other[1])


def test_pictures_are_handed_over_once(codec_clips):
    """A video of one frame, in three crops and a random pass: four pictures. Each clip repeats one
    of them."""
    what = plan(crops=3, augment_passes=1, clip_length=2)
    out = np.zeros(what.slot_bytes, np.uint8)
    [result] = decode_job((str(codec_clips / "h264_1frame.mp4"), [("id", None)], what), out)
    assert result.frame_indices.tolist() == [0] * 4
    assert result.clips.tolist() == [[[view] * 2] * 4 for view in range(4)]
    assert not out[4 * 32 * 32 * 3 :].any()


def test_clips_are_neighbors_around_the_sampled_frames(codec_clips):
    """At both ends, clips are moved inside the video. Overlapping clips share pictures."""
    what = plan(frames=20, clip_length=8)
    out = np.zeros(what.slot_bytes, np.uint8)
    [result] = decode_job((str(codec_clips / "vp9.webm"), [("id", None)], what), out)
    whole = decode(codec_clips / "vp9.webm", np.arange)
    starts = np.clip(segment_centers(whole.num_frames, 20) - 3, 0, whole.num_frames - 8)
    frames = result.frame_indices[result.clips[0]]
    assert frames.tolist() == (starts[:, None] + np.arange(8)).tolist()
    assert result.indices.tolist() == [(starts + 3).tolist()]
    assert len(result.frame_indices) == len(np.unique(frames)) < frames.size


def test_a_partial_video_says_so_and_an_unreadable_one_raises(broken_clips):
    out, seen = prepared(broken_clips / "truncated_faststart.mp4", plan())
    assert seen.num_frames == 3
    assert seen.indices.tolist() == [segment_centers(3, 4).tolist()]
    assert "3 readable frames" in seen.problem
    assert out.any()
    with pytest.raises(VideoError, match="empty"):
        prepared(broken_clips / "zero_bytes.mp4", plan())


@settings(max_examples=25)
@given(st.integers(1, 90), st.integers(1, 90), st.integers(1, 40), st.data())
def test_every_crop_of_every_resized_frame_is_there(height, width, resize, data):
    """For videos of any size, no crop is outside the frame."""
    size = data.draw(st.integers(1, resize))
    see = Preprocessing(size=size, resize=resize, interpolation="bilinear", **IMAGENET)
    frame = resize_frame(picture(height, width), see)
    assert min(frame.shape[:2]) == resize or max(height, width) > 10 * min(height, width)
    for crops in (1, 3, 10):
        for box, _ in crop_boxes(*frame.shape[:2], see, crops):
            assert cut(frame[None], box).shape == (1, size, size, 3)
    if resize >= 2:  # a side of 1 times 0.66 is not a pixel
        view = training_view(*frame.shape[:2], see, np.random.default_rng(0))(frame)
        assert view.shape == (size, size, 3)
