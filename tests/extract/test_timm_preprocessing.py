"""Frames equal those of timm's own evaluation transform, for the configuration of every published
model."""

import itertools
from dataclasses import replace
from pathlib import Path

import av
import numpy as np
import pytest
import timm
from PIL import Image

from extract import InputError
from extract.backbone.image_models import preprocessing_of
from extract.decode.jobs import Plan
from extract.decode.transform import (
    Preprocessing,
    crop_boxes,
    cut,
    resize_frame,
    training_view,
)

CONFIG = {
    "input_size": (3, 224, 224),
    "crop_pct": 0.9,
    "crop_mode": "center",
    "interpolation": "bicubic",
}
CONFIG |= {"mean": (0.48, 0.46, 0.41), "std": (0.23, 0.22, 0.225)}


def prepared(frame: np.ndarray, see: Preprocessing) -> np.ndarray:
    resized = resize_frame(frame, see)
    [(box, _)] = crop_boxes(*resized.shape[:2], see, 1)
    return cut(resized[None], box)[0]


def by_timm(frame: np.ndarray, config: dict) -> np.ndarray:
    """uint8 [height, width, 3], before mean and std."""
    config = timm.data.resolve_data_config(pretrained_cfg=config)
    transform = timm.data.create_transform(**config, use_prefetcher=True)
    return np.asarray(transform(Image.fromarray(frame))).transpose(1, 2, 0)


@pytest.fixture(scope="module")
def frames(demo_clips: Path) -> list[np.ndarray]:
    """Real frames: landscape, portrait, square, and smaller than the input of models."""
    path = sorted((demo_clips / "exercise_mini" / "clips").rglob("*.mp4"))[0]
    with av.open(str(path)) as container:
        frame = next(container.decode(video=0)).to_ndarray(format="rgb24")
    side = min(frame.shape[:2])
    return [
        frame,
        np.ascontiguousarray(frame.transpose(1, 0, 2)),
        frame[:side, :side],
        frame[5:64, 7:128],
    ]


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize(
    "interpolation", ["nearest", "bilinear", "bicubic", "lanczos", "box", "hamming"]
)
def test_every_crop_mode_interpolation_and_size_is_timms(
    mode: str, interpolation: str, frames
) -> None:
    sizes = [(3, 224, 224), (3, 96, 96), (3, 224, 192), (3, 160, 256)]
    for size, crop_pct, frame in itertools.product(sizes, [1.0, 0.875, 1.15], frames):
        changes = {
            "input_size": size,
            "crop_pct": crop_pct,
            "crop_mode": mode,
            "interpolation": interpolation,
        }
        config = {**CONFIG, **changes}
        ours, theirs = prepared(frame, preprocessing_of(config, "model")), by_timm(frame, config)
        assert ours.shape == (*size[1:], 3)
        assert np.abs(ours.astype(int) - theirs).max() <= 1, (changes, frame.shape)


def test_the_configuration_of_every_published_model_is_timms(frames) -> None:
    """All of timm.list_pretrained(), by configuration: none is refused, and each gets the pictures
    that timm gives it."""
    kinds: dict[Preprocessing, dict] = {}
    names = timm.list_pretrained()
    for name in names:
        config = timm.get_pretrained_cfg(name).to_dict()
        kinds.setdefault(preprocessing_of(config, name), config)
    assert len(names) > 1500
    assert len(kinds) > 50
    modes = {see.crop_mode for see in kinds}
    assert modes == {"center", "squash", "border"}
    for see, config in kinds.items():
        for frame in (frames[0], frames[3]):
            difference = np.abs(prepared(frame, see).astype(int) - by_timm(frame, config))
            assert difference.max() <= 1, config["architecture"]


def test_another_image_size_keeps_the_crop_fraction() -> None:
    see = preprocessing_of(CONFIG, "model", image_size=112)
    assert (see.size, see.resize) == (112, 124)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"crop_mode": "random"}, "its crop mode is random"),
        ({"interpolation": "random"}, "its interpolation is random; supported are nearest, "),
        ({"input_size": (1, 28, 28)}, "takes 1 channels; only RGB"),
    ],
)
def test_preprocessing_we_do_not_do(change: dict, message: str) -> None:
    with pytest.raises(InputError, match=f"--backbone model: {message}"):
        preprocessing_of({**CONFIG, **change}, "model")


# -- records ---------------------------------------------------------------------------------------------------------


def test_records_of_earlier_versions_are_the_same() -> None:
    see = preprocessing_of(CONFIG, "model")
    before = {"size": 224, "resize": 248, "interpolation": "bicubic", "mean": [0.48, 0.46, 0.41]}
    assert see.record() == {**before, "std": [0.23, 0.22, 0.225]}
    assert Preprocessing.from_record(see.record()) == see


@pytest.mark.parametrize(
    "change", [{"size": (224, 192)}, {"crop_mode": "squash"}, {"antialias": False}]
)
def test_records_hold_what_is_new(change: dict) -> None:
    see = replace(preprocessing_of(CONFIG, "model"), **change)
    assert Preprocessing.from_record(see.record()) == see
    assert see.record() != preprocessing_of(CONFIG, "model").record()


# -- crops and training views of these modes ---------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["squash", "border"])
def test_several_crops_of_a_model_that_sees_the_whole_picture_are_refused(mode: str) -> None:
    see = preprocessing_of({**CONFIG, "crop_mode": mode, "crop_pct": 1.0}, "model")
    Plan(4, 1, 2, see)
    for crops in (3, 10):
        with pytest.raises(
            InputError, match=rf"--crops {crops}: .*\(its crop mode is {mode}\).* use --crops 1"
        ):
            Plan(4, crops, 0, see)


def test_crops_of_a_squashed_picture_lie_in_it(frames) -> None:
    see = preprocessing_of({**CONFIG, "crop_mode": "squash", "crop_pct": 0.875}, "model")
    squashed = resize_frame(frames[0], see)
    assert squashed.shape == (256, 256, 3)
    for (top, left, height, width), _ in crop_boxes(256, 256, see, 10):
        crop = cut(squashed[None], (top, left, height, width))[0]
        assert np.array_equal(crop, squashed[top : top + 224, left : left + 224])


@pytest.mark.parametrize("mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(3, 96, 96), (3, 96, 64), (3, 64, 96)])
def test_a_training_view_is_a_large_part_of_what_evaluation_resizes(
    mode: str, size: tuple, frames
) -> None:
    see = preprocessing_of({**CONFIG, "crop_mode": mode, "input_size": size}, "model")
    for frame, seed in itertools.product(frames, range(5)):
        resized = resize_frame(frame, see)
        view = training_view(*resized.shape[:2], see, np.random.default_rng(seed))(resized)
        assert view.shape == (*size[1:], 3)
        assert abs(view.mean() - resized.mean()) < 60
