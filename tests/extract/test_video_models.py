"""Clip-wise backbones: features equal those of torchvision's and transformers' own modules with
their own presets."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchvision import models

from extract import InputError
from extract.backbone.frozen import load_backbone
from extract.backbone.model import Trunk, load_trunk
from extract.backbone.networks import absolute_name
from extract.backbone.video_models import _hf_preprocessing
from extract.decode import decode
from extract.decode.transform import Preprocessing, crop_boxes, cut, resize_frame
from thorough import THOROUGH
from video_transformers import KINDS, make_folder

VIDEO_MODELS = models.list_models(module=models.video)
# The same code as other models, with weights that take long to draw.
LARGER = ("mvit_v1_b", "swin3d_b", "swin3d_s")
FEWEST_FRAMES = {"s3d": 14, "mvit_v1_b": 16, "mvit_v2_s": 16}  # of others, 2


def raw_frames(count: int, height: int = 120, width: int = 160) -> np.ndarray:
    rng = np.random.default_rng(0)
    y, x = np.mgrid[:height, :width]
    waves = np.stack([np.sin(x / 7 + y / 11), np.cos(x / 5), np.sin(y / 3)], axis=-1) * 90 + 128
    moving = np.stack([np.roll(waves, 3 * k, axis=1) for k in range(count)])
    return (moving + rng.normal(0, 20, moving.shape)).clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def real_clips(demo_clips: Path) -> list[np.ndarray]:
    """16 frames each of a landscape, a portrait and a small video."""
    path = sorted((demo_clips / "exercise_mini" / "clips").rglob("*.mp4"))[0]
    clip = decode(path, lambda num_frames: np.arange(16) * (num_frames // 16)).frames
    return [clip, np.ascontiguousarray(clip.transpose(0, 2, 1, 3)), clip[:, 5:40, 7:78]]


def prepared(frames: np.ndarray, see: Preprocessing) -> np.ndarray:
    resized = np.stack([resize_frame(frame, see) for frame in frames])
    [(box, _)] = crop_boxes(*resized.shape[1:3], see, 1)
    return cut(resized, box)


def features_of(trunk: Trunk, frames: np.ndarray) -> Tensor:
    """Features [rows, dim] of one clip, uint8 [L, H, W, 3]."""
    see = trunk.preprocessing
    pixels = torch.from_numpy(prepared(frames, see)).float() / 255
    pixels = (pixels - torch.tensor(see.mean)) / torch.tensor(see.std)
    with torch.inference_mode():
        return trunk.module(pixels.movedim(-1, 0)[None]).reshape(trunk.clips.rows, -1)


def assert_near(got: Tensor, expected: Tensor, relative: float = 1e-4) -> None:
    assert got.shape == expected.shape
    assert ((got - expected).norm() / expected.norm()).item() < relative


# -- torchvision -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", [m for m in VIDEO_MODELS if THOROUGH or m not in LARGER])
def test_features_are_torchvisions_before_its_classifier(name: str, real_clips: list) -> None:
    frames = FEWEST_FRAMES.get(name, 2)
    trunk = load_trunk(f"torchvision/{name}", weights="random", seed=3, clip_frames=frames)
    torch.manual_seed(3)
    net: Any = models.get_model(name, weights=None).eval()
    seen = []
    classifier = (
        net.fc if hasattr(net, "fc") else net.head if hasattr(net, "head") else net.classifier
    )
    classifier.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    clip = real_clips[0][:frames]
    preset = models.get_model_weights(name).DEFAULT.transforms()
    with torch.inference_mode():
        net(preset(torch.from_numpy(clip).movedim(-1, 1))[None])
    expected = seen[0].flatten(2).mean(2) if seen[0].ndim == 5 else seen[0]
    assert_near(features_of(trunk, clip), expected)
    assert trunk.preprocessing.antialias is False


@pytest.mark.parametrize("name", ["r3d_18", "s3d", "swin3d_t"])
def test_rows_per_temporal_position_have_the_mean_of_the_clip(name: str) -> None:
    frames = 16 if name != "swin3d_t" else 4
    options = {"weights": "random", "clip_frames": frames}
    mean = load_trunk(f"torchvision/{name}", **options)
    rows = load_trunk(f"torchvision/{name}", per_clip="time", **options)
    assert (mean.clips.rows, rows.clips.rows) == (1, {"r3d_18": 2, "s3d": 1, "swin3d_t": 2}[name])
    clip = raw_frames(frames)
    of_rows = features_of(rows, clip)
    assert_near(of_rows.mean(0, keepdim=True), features_of(mean, clip))
    if rows.clips.rows > 1:
        assert (of_rows[0] - of_rows[1]).norm() > 1e-3 * of_rows.norm()


def test_presets_are_those_of_the_published_weights() -> None:
    clips = {
        name: load_trunk(f"torchvision/{name}", weights="random").clips
        for name in ("r3d_18", "mvit_v2_s")
    }
    assert (clips["r3d_18"].frames, clips["r3d_18"].fps) == (16, 15.0)
    assert (clips["mvit_v2_s"].frames, clips["mvit_v2_s"].fps) == (16, 7.5)
    for (
        name
    ) in VIDEO_MODELS:  # "with parameters `frame_rate=15`, `clips_per_video=5`, and `clip_len=16`."
        from extract.backbone.video_models import _TORCHVISION_CLIPS

        frames, fps = next(
            clip for prefix, clip in _TORCHVISION_CLIPS.items() if name.startswith(prefix)
        )
        documented = models.get_model_weights(name).DEFAULT.meta["_docs"]
        assert f"frame_rate={fps:g}`" in documented
        assert f"clip_len={frames}`" in documented


def test_a_file_of_a_whole_model_is_loaded_without_its_classifier(tmp_path: Path) -> None:
    torch.manual_seed(5)
    net = models.video.r3d_18(weights=None)
    torch.save(net.state_dict(), tmp_path / "r3d.pth")
    trunk = load_trunk("torchvision/r3d_18", weights=tmp_path / "r3d.pth", clip_frames=2)
    assert trunk.weights["name"] == "r3d.pth"
    assert len(trunk.weights["sha256"]) == 64
    own = [value for key, value in net.state_dict().items() if not key.startswith("fc.")]
    assert all(
        torch.equal(a, b) for a, b in zip(trunk.module.state_dict().values(), own, strict=True)
    )
    with pytest.raises(
        InputError, match=r"does not fit --backbone torchvision/mc3_18: .* of another shape"
    ):
        load_trunk("torchvision/mc3_18", weights=tmp_path / "r3d.pth")


def test_the_engines_agree_with_the_module() -> None:
    trunk = load_trunk("torchvision/r3d_18", weights="random", clip_frames=2)
    see = trunk.preprocessing
    clips = np.stack([prepared(raw_frames(2), see), prepared(raw_frames(2)[::-1], see)])
    expected = torch.cat(
        [features_of(trunk, raw_frames(2)), features_of(trunk, raw_frames(2)[::-1])]
    )
    for engine in ("torch", "openvino"):
        options = {"device": "cpu", "precision": "fp32", "engine": engine, "clip_frames": 2}
        backbone = load_backbone("torchvision/r3d_18", weights="random", **options)
        assert_near(torch.from_numpy(backbone(clips)).float(), expected, 1e-3)  # float16
        record = backbone.provenance()
        assert record["clips"] == {"frames": 2, "fps": 15.0, "per_clip": "mean", "rows": 1}
        assert json.loads(json.dumps(record)) == record


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        (
            "torchvision/r3d",
            {},
            "torchvision/r3d: unknown; torchvision has the video models mc3_18, ",
        ),
        (
            "torchvision/r3d_18",
            {"image_size": 96},
            "--image-size 96: torchvision/r3d_18 is clip-wise",
        ),
        (
            "torchvision/s3d",
            {"clip_frames": 5},
            "does not take 5 x 224 x 224 .*; change --clip-frames",
        ),
        (
            "torchvision/mvit_v2_s",
            {"clip_frames": 8},
            "does not take 8 x 224 x 224 .*; change --clip-frames",
        ),
        (
            "torchvision/mvit_v2_s",
            {"per_clip": "time"},
            "--per-clip time: an MViT has a class token",
        ),
        (
            "resnet10t",
            {"clip_frames": 8},
            "are for clip-wise backbones .*; resnet10t sees single frames",
        ),
        ("resnet10t", {"per_clip": "time"}, "are for clip-wise backbones"),
        ("hf/no/such/folder", {}, "hf/no/such/folder: there is no such folder; if it was moved"),
        (
            "hf/none/such",
            {},
            "hf/none/such: is not a folder, and cannot be downloaded from the Hugging Face hub",
        ),
    ],
)
def test_what_a_backbone_does_not_take(name: str, options: dict, message: str, monkeypatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match=message):
        load_trunk(name, weights="random", **options)


def test_int8_is_for_image_models() -> None:
    with pytest.raises(InputError, match="--precision int8: torchvision/r3d_18 is clip-wise"):
        load_backbone("torchvision/r3d_18", weights="random", device="cpu", precision="int8")


def test_torchvisions_weights_without_a_network_say_what_to_fetch(
    monkeypatch, tmp_path: Path
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("there is no network in this test")

    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        InputError, match=r"download r3d_18-b3b3357e\.pth, and pass it as --weights FILE"
    ):
        load_trunk("torchvision/r3d_18", weights="pretrained")


# -- transformers ----------------------------------------------------------------------------------------------------

transformers = pytest.importorskip("transformers")
NORM = "encoder.layer.0.layernorm_before.weight"


def tokens_of(model: Any, folder: Path, frames: np.ndarray) -> Tensor:
    """Tokens of transformers' own module with its own processor."""
    processor = transformers.AutoVideoProcessor.from_pretrained(folder)
    inputs = processor(list(frames), return_tensors="pt")
    with torch.inference_mode():
        extra = {"skip_predictor": True} if model.config.model_type == "vjepa2" else {}
        return model(**inputs, **extra).last_hidden_state[0]


@pytest.mark.parametrize("kind", KINDS)
def test_features_are_those_of_transformers(kind: str, tmp_path: Path, real_clips: list) -> None:
    model = make_folder(tmp_path, kind)
    trunk = load_trunk(f"hf/{tmp_path}", weights="pretrained")
    rows = load_trunk(f"hf/{tmp_path}", weights="pretrained", per_clip="time")
    assert trunk.clips.frames == 4
    for clip in (frames[:4] for frames in real_clips):
        tokens = tokens_of(model, tmp_path, clip)
        patches = tokens if kind in ("videomae", "vjepa2") else tokens[1:]
        expected = patches.mean(0) if kind in ("videomae", "vjepa2") else tokens[0]
        assert_near(features_of(trunk, clip), expected[None])
        positions = {"timesformer": 4}.get(kind, 2)
        if kind == "timesformer":  # frames of a patch follow each other
            by_time = patches.reshape(-1, positions, 32).mean(0)
        else:
            by_time = patches.reshape(positions, -1, 32).mean(1)
        assert_near(features_of(rows, clip), by_time)


@pytest.mark.parametrize(
    "change",
    [
        {},
        {"size": {"shortest_edge": 37}},
        {"size": {"shortest_edge": 20}},  # black is added around it
        {"size": {"height": 40, "width": 50}},
        {"size": {"height": 48, "width": 64}, "do_center_crop": False},
        {"resample": 3},
        {"resample": 1},
        {"do_rescale": False},
        {"do_normalize": False},
        {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.3, 0.2, 0.1]},
        {"offset": False},
    ],
)
@pytest.mark.parametrize("kind", ["videomae", "vivit"])
def test_frames_are_those_of_the_models_own_processor(
    kind: str, change: dict, tmp_path: Path, real_clips: list
) -> None:
    make_folder(tmp_path, kind)
    path = tmp_path / "preprocessor_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    processor: Any = transformers.AutoVideoProcessor.from_pretrained(tmp_path)
    see = _hf_preprocessing(processor, "folder")
    assert Preprocessing.from_record(see.record()) == see
    for clip in (frames[:2] for frames in real_clips):
        expected = processor(list(clip), return_tensors="pt")["pixel_values"][0].movedim(1, -1)
        pixels = torch.from_numpy(prepared(clip, see)) / 255
        pixels = (pixels - torch.tensor(see.mean)) / torch.tensor(see.std)
        torch.testing.assert_close(pixels, expected, rtol=1e-5, atol=1e-5)


def test_timesformers_tokens_are_patch_by_patch(tmp_path: Path) -> None:
    """Before any attention mixes them, a change of the last frame changes only the features of the
    last position."""
    make_folder(tmp_path, "timesformer")
    trunk = load_trunk(f"hf/{tmp_path}", weights="pretrained", per_clip="time")
    for layer in trunk.module[0].model.encoder.layer:
        layer.forward = lambda hidden, *_, **__: (hidden,)
    clip = raw_frames(4, height=36, width=45)
    changed = clip.copy()
    changed[3] = 255 - changed[3]
    moved = (features_of(trunk, clip) - features_of(trunk, changed)).norm(dim=1)
    assert moved[:3].max() < 1e-6 < 1e-2 < moved[3]


def test_what_is_recorded_of_a_folder_does_not_depend_on_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_folder(tmp_path / "model", "videomae")
    monkeypatch.chdir(tmp_path)
    name = load_trunk("hf/model", weights="pretrained").name
    backbone = load_backbone("hf/model", weights="pretrained", device="cpu", precision="fp32")
    assert name == backbone.name == f"hf/{tmp_path.resolve() / 'model'}"
    assert "clips of 4 frames, 7.5 per second" in backbone.describe()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_trunk(name, weights="pretrained").weights == backbone.weights
    assert absolute_name("hf/../model") == name
    assert absolute_name("hf/owner/model") == "hf/owner/model"  # of the hub


@pytest.mark.parametrize(("frames", "rate"), [(8, 0.9375), (16, 1.875), (96, 7.5), (4, 0.9375)])
def test_timesformers_rate_depends_on_its_frames(frames: int, rate: float, tmp_path: Path) -> None:
    """As in the authors' configurations 8 x 32, 16 x 16 and 96 x 4, at 30 frames per second."""
    make_folder(tmp_path, "timesformer")
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_frames": frames}))
    trunk = load_trunk(f"hf/{tmp_path}", weights="random")
    assert (trunk.clips.frames, trunk.clips.fps) == (frames, rate)
    assert load_trunk(f"hf/{tmp_path}", weights="random", clip_frames=5).clips.fps == rate


def test_random_weights_need_no_file_of_weights(tmp_path: Path) -> None:
    make_folder(tmp_path, "vjepa2")
    (tmp_path / "model.safetensors").unlink()
    trunk = load_trunk(f"hf/{tmp_path}", weights="random", clip_frames=2, clip_fps=8.0)
    assert trunk.weights == {"name": "random weights, seed 0"}
    assert (trunk.clips.frames, trunk.clips.fps) == (2, 8.0)
    with pytest.raises(
        InputError, match=r"holds neither model\.safetensors nor pytorch_model\.bin"
    ):
        load_trunk(f"hf/{tmp_path}", weights="pretrained")


@pytest.mark.parametrize("kind", ["videomae", "vivit", "vjepa2"])
def test_frames_that_fill_no_token_are_refused(kind: str, tmp_path: Path) -> None:
    """transformers drops the last frame of 5 in silence."""
    make_folder(tmp_path, kind)
    with pytest.raises(InputError, match=r"--clip-frames 5: hf/.* joins 2 frames .*multiple of 2"):
        load_trunk(f"hf/{tmp_path}", weights="random", clip_frames=5)


def test_videomaes_biases_arrive(tmp_path: Path) -> None:
    """transformers 5 silently leaves the biases of published VideoMAE files (q_bias, v_bias) at
    0."""
    model = make_folder(tmp_path, "videomae")
    state = load_file(tmp_path / "model.safetensors")
    old = {
        key.replace("query.bias", "q_bias").replace("value.bias", "v_bias"): value.clone()
        for key, value in state.items()
    }
    assert sum(key.endswith("q_bias") for key in old) == 2
    save_file(old, tmp_path / "model.safetensors", metadata={"format": "pt"})
    trunk = load_trunk(f"hf/{tmp_path}", weights="pretrained")
    clip = raw_frames(4, height=36, width=45)
    assert_near(features_of(trunk, clip), tokens_of(model, tmp_path, clip).mean(0)[None])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        (
            "encoder.extra.weight",
            torch.ones(3),
            r"1 tensors of the file were not loaded \(videomae\.encoder\.extra",
        ),
        (NORM, None, r"1 are missing \(encoder\.layer\.0\.layernorm_before"),
        (NORM, torch.ones(7), r"1 have another shape \(encoder\.layer\.0\.layernorm_before"),
    ],
)
def test_a_file_whose_tensors_are_not_the_models_is_refused_by_name(
    name: str, value: Tensor | None, message: str, tmp_path: Path
) -> None:
    make_folder(tmp_path, "videomae")
    state = load_file(tmp_path / "model.safetensors") | {f"videomae.{name}": value}
    state = {key: value for key, value in state.items() if value is not None}
    save_file(state, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=message):
        load_trunk(f"hf/{tmp_path}", weights=tmp_path / "other.safetensors")


def test_folders_that_hold_no_model_we_know(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"the folder holds no config\.json"):
        load_trunk(f"hf/{tmp_path}", weights="random")
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"the folder holds no preprocessor_config\.json"):
        load_trunk(f"hf/{tmp_path}", weights="random")
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(KINDS["videomae"][2]))
    with pytest.raises(InputError, match="its configuration cannot be used"):
        load_trunk(f"hf/{tmp_path}", weights="random")
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    with pytest.raises(
        InputError, match="a model of type vit; supported are vjepa2, videomae, timesformer, vivit"
    ):
        load_trunk(f"hf/{tmp_path}", weights="random")


@pytest.mark.parametrize(
    ("file", "entry", "message"),
    [
        ("config.json", {"num_frames": "many"}, "cannot be used .*num_frames"),
        ("config.json", {"hidden_size": 31}, "cannot be used .*31 is not a multiple"),
        ("config.json", {"tubelet_size": 0}, "cannot be used"),
        ("config.json", {"num_frames": 5}, "--clip-frames 5: .* give a multiple of 2"),
        ("preprocessor_config.json", {"resample": 9}, "cannot be used .9 is not a valid"),
        ("preprocessor_config.json", {"fps": -3}, "its preprocessor's fps is -3; expected more"),
    ],
)
def test_entries_that_make_no_sense(file: str, entry: dict, message: str, tmp_path: Path) -> None:
    make_folder(tmp_path, "videomae")
    path = tmp_path / file
    path.write_text(json.dumps(json.loads(path.read_text()) | entry))
    for weights in ("random", "pretrained"):
        with pytest.raises(InputError, match=message):
            load_trunk(f"hf/{tmp_path}", weights=weights)


def test_code_of_a_folder_is_never_run(tmp_path: Path) -> None:
    make_folder(tmp_path, "videomae")
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {
        "model_type": "own",
        "auto_map": {"AutoConfig": "own.Config", "AutoModel": "own.Model"},
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "own.py").write_text("raise SystemExit('this code ran')")
    with pytest.raises(InputError, match="its configuration cannot be used"):
        load_trunk(f"hf/{tmp_path}", weights="random")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"do_center_crop": False}, "does not crop, so frames have no constant size"),
        ({"do_resize": False}, r"resizes to .*; expected shortest_edge alone"),
        ({"size": {"shortest_edge": 36, "longest_edge": 50}}, r"resizes to .*'longest_edge': 50"),
        ({"resample": 0}, "resizes by nearest; supported are bilinear, bicubic, lanczos"),
    ],
)
def test_another_type_of_preprocessor_is_refused(
    change: dict, message: str, tmp_path: Path
) -> None:
    make_folder(tmp_path, "videomae")
    processor = {**KINDS["videomae"][2], **change}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(InputError, match=f"its preprocessor {message}"):
        load_trunk(f"hf/{tmp_path}", weights="random")
