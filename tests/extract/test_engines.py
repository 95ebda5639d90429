"""Engines of backbones: OpenVINO on CPUs, PyTorch for the rest, and the same bytes on every
rerun."""

import functools
import gc
import importlib.util
import inspect
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import psutil
import pytest
import timm
import torch
from PIL import Image
from torch import Tensor, nn

from extract import InputError
from extract.backbone import frozen, networks, openvino_engine
from extract.backbone.frozen import Backbone, NotFiniteError, load_backbone
from extract.backbone.inference import fold_batch_norms, relative_error
from extract.backbone.model import Trunk, load_trunk
from extract.backbone.torch_engine import spread_evenly
from extract.decode import decode
from extract.decode.transform import Preprocessing
from extract.sampling import segment_centers

# Measured relative error (2-norm of the features of frames of real clips) against PyTorch in fp32;
# three times that is allowed. In fp32 only the rounding to float16 is left.
NETWORKS = {
    "tf_efficientnet_lite0": ("pretrained", {"fp32": 2e-4, "bf16": 5e-2}),
    "resnet18": ("random", {"fp32": 2e-4, "bf16": 3e-3}),
    "vit_tiny_patch16_224": ("random", {"fp32": 2e-4, "bf16": 1e-2}),
}


@pytest.fixture(scope="module")
def frames(demo_clips: Path) -> np.ndarray:
    """uint8 [12, 224, 224, 3], from six clips: a batch of 8 and a part of one."""

    def square(frame: np.ndarray) -> np.ndarray:
        return np.asarray(Image.fromarray(frame).resize((224, 224)))

    paths = sorted((demo_clips / "exercise_mini" / "clips").rglob("*.mp4"))[::7][:6]
    return np.concatenate(
        [
            decode(path, lambda count: segment_centers(count, 2), resize=square).frames
            for path in paths
        ]
    )


def error(features: np.ndarray, expected: np.ndarray) -> float:
    return float(
        np.linalg.norm(features.astype(np.float64) - expected)
        / np.linalg.norm(expected.astype(np.float64))
    )


@pytest.fixture(scope="module")
def expected(frames: np.ndarray) -> Callable[[str], np.ndarray]:
    """The features of the frames by PyTorch in fp32, of a network by name."""

    @functools.cache
    def features_of(name: str) -> np.ndarray:
        weights, _ = NETWORKS[name]
        options = {"device": "cpu", "precision": "fp32", "engine": "torch", "threads": 1}
        return load_backbone(name, weights=weights, **options)(frames)

    return features_of


# OpenVINO


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("name", NETWORKS)
def test_features_are_pytorchs_and_the_same_bytes_again(
    name: str, precision: str, frames: np.ndarray, expected: Callable[[str], np.ndarray]
) -> None:
    """For any number of streams, any position in a batch, any neighbors, and any amount of
    padding."""
    weights, measured = NETWORKS[name]
    backbone = load_backbone(name, weights=weights, device="cpu", precision=precision, threads=2)
    features = backbone(frames)
    print(f"{name} {precision}: {error(features, expected(name)):.2e}")
    assert error(features, expected(name)) < 3 * measured[precision]

    assert np.array_equal(backbone(frames), features)
    order = np.random.default_rng(0).permutation(len(frames))
    assert np.array_equal(backbone(frames[order]), features[order])
    for start, count in ((0, 1), (7, 1), (3, 7), (2, 10)):
        assert np.array_equal(
            backbone(frames[start : start + count]), features[start : start + count]
        )
    for threads in (1, 3):
        again = load_backbone(
            name, weights=weights, device="cpu", precision=precision, threads=threads
        )
        assert np.array_equal(again(frames), features)


def test_what_runs_is_recorded_and_shown() -> None:
    backbone = load_backbone(
        "test_resnet", weights="random", device="cpu", precision="fp32", threads=2
    )
    version = openvino_engine.openvino_version()
    assert backbone.provenance()["engine"] == {"name": "openvino", "version": version}
    assert backbone.describe().endswith(f"on cpu in fp32, OpenVINO {version}, 2 streams")


@pytest.mark.parametrize(("native", "expected"), [(True, "bf16"), (False, "fp32")])
def test_auto_is_what_the_cpu_computes_in(
    native: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(frozen, "has_native_bf16", lambda: native)
    for engine in ("openvino", "torch"):
        assert (
            load_backbone("test_resnet", weights="random", device="cpu", engine=engine).precision
            == expected
        )


@pytest.mark.parametrize(
    ("flags", "expected"),
    [("fpu avx512f avx512_bf16 vnni", True), ("fpu amx_bf16", True), ("fpu avx512f", False)],
)
def test_native_bf16_is_read_off_the_cpus_flags(
    flags: str, expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        Path, "read_text", lambda path, **_: f"model name\t: X\nflags\t\t: {flags}\n"
    )
    assert frozen.has_native_bf16() is expected


def test_no_native_bf16_is_known_of_systems_without_cpuinfo(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(*_: object, **__: object) -> str:
        raise FileNotFoundError

    monkeypatch.setattr(Path, "read_text", missing)
    assert frozen.has_native_bf16() is False


# What OpenVINO does not run


class DataDependent(nn.Module):
    """Its path depends on its input, so a trace or graph of it is wrong for some inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(x)
        return y.mean((2, 3)) if x.mean() > 100 else y.amax((2, 3))


class Unconvertible(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy().mean((2, 3))) * np.random.default_rng().random()


def trunk_of(module: nn.Module) -> Trunk:
    see = Preprocessing(16, 16, "bilinear", (0.5,) * 3, (0.5,) * 3)
    weights = {"name": "random weights, seed 0"}
    return Trunk(name="odd", module=module.eval(), dim=3, preprocessing=see, weights=weights)


def test_a_network_that_openvino_answers_otherwise_is_refused() -> None:
    with pytest.raises(
        openvino_engine.ConversionError, match=r"its features differ from PyTorch's by [0-9.]+"
    ):
        openvino_engine.convert(trunk_of(Unconvertible()))


class Silent(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        raise NotImplementedError


def test_an_error_without_a_message_is_told_by_its_type() -> None:
    with pytest.raises(openvino_engine.ConversionError, match=r"^NotImplementedError$"):
        openvino_engine.convert(trunk_of(Silent()))


@pytest.mark.parametrize("reason", ["cannot", "is not installed"])
def test_pytorch_runs_the_rest_and_says_so(reason: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(**_: object) -> None:
        raise openvino_engine.ConversionError("it is odd")

    if reason == "cannot":
        monkeypatch.setattr(openvino_engine, "converted_network", refuse)
        expected = " (OpenVINO cannot run it: it is odd), PyTorch, 1 threads, batch norm folded"
    else:
        find = importlib.util.find_spec
        monkeypatch.setattr(
            importlib.util, "find_spec", lambda name: None if name == "openvino" else find(name)
        )
        expected = (
            " (OpenVINO, which is faster, is not installed), PyTorch, 1 threads, batch norm folded"
        )
    backbone = load_backbone(
        "test_resnet", weights="random", device="cpu", precision="fp32", threads=1
    )
    assert backbone.describe().endswith(f"on cpu in fp32{expected}")
    assert "engine" not in backbone.provenance()
    refused = {
        "cannot": r"--engine openvino: test_resnet .*; use --engine torch and another --out",
        "is not installed": r"--engine openvino needs OpenVINO, which is not installed; pip inst",
    }
    with pytest.raises(InputError, match=refused[reason]):
        load_backbone(
            "test_resnet", weights="random", device="cpu", precision="fp32", engine="openvino"
        )


def test_int8_needs_openvino(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(InputError, match="--precision int8 needs OpenVINO, which is not installed"):
        load_backbone("test_resnet", weights="random", device="cpu", precision="int8")


def test_engines_that_make_no_sense() -> None:
    with pytest.raises(
        InputError, match="--engine onnx: unknown; known are auto, openvino and torch"
    ):
        load_backbone("test_resnet", weights="random", device="cpu", engine="onnx")


# Saved networks


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("HGNL_CACHE", str(tmp_path))
    return tmp_path / "networks"


def small(**changes: object) -> Backbone:
    settings = {"weights": "random", "device": "cpu", "precision": "fp32", "threads": 1}
    return load_backbone("test_resnet", **(settings | changes))


def test_the_second_start_reads_what_the_first_one_saved(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, 160, 160, 3), dtype=np.uint8)
    first = small()
    monkeypatch.setattr(openvino_engine, "convert", lambda trunk: pytest.fail("converted again"))
    second = small()
    assert np.array_equal(second(pixels), first(pixels))
    assert second.provenance() == first.provenance()
    assert second.describe() == first.describe()
    assert second.preprocessing == first.preprocessing
    assert [path.name.partition(".")[2] for path in cache.iterdir()] == [""]


def test_a_network_is_of_its_weights_and_of_what_made_it(
    cache: Path, tmp_path: Path, monkeypatch
) -> None:
    source = {"name": "test_resnet", "weights": "random", "seed": 0}
    keys = {networks.network_key(**source), networks.network_key(**{**source, "seed": 1})}
    for content in (b"one", b"other"):
        (tmp_path / "w.pth").write_bytes(content)
        keys.add(networks.network_key(**{**source, "weights": tmp_path / "w.pth"}))
    assert len(keys) == 4
    assert networks.network_key(**source) in keys
    monkeypatch.setattr("importlib.metadata.version", lambda name: "0.0")
    assert networks.network_key(**source) not in keys


@pytest.mark.parametrize(
    ("name", "same", "other"),
    [
        ("test_resnet", {"image_size": 160}, {"image_size": 192}),
        (
            "torchvision/r3d_18",
            {"clip_frames": 16, "clip_fps": 15.0, "per_clip": "mean", "processor": "torchvision"},
            {"clip_frames": 8},
        ),
    ],
)
def test_options_that_are_the_default_convert_nothing_again(
    name: str, same: dict, other: dict, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """predict gives the options of its checkpoint, the extraction before gave none."""
    convert = Mock(side_effect=lambda trunk: trunk)
    monkeypatch.setattr(openvino_engine, "convert", convert)
    saved: dict[str, tuple] = {}
    monkeypatch.setattr(
        openvino_engine, "save_network", lambda key, *network: saved.setdefault(key, network)
    )
    monkeypatch.setattr(openvino_engine, "load_network", saved.get)
    source = {"name": name, "weights": "random", "seed": 0}
    first = openvino_engine.converted_network(**source, image_size=None, per_clip="mean")
    assert openvino_engine.converted_network(**source, **same) is first
    assert convert.call_count == 1
    changed = openvino_engine.converted_network(**source, **other)
    assert openvino_engine.converted_network(**source, **other) is changed
    assert convert.call_count == 2


@pytest.mark.parametrize("damage", ["bytes", "cut", "record", "byte of the record", "gone"])
def test_a_damaged_network_is_converted_again(damage: str, cache: Path) -> None:
    first = small()
    pixels = np.random.default_rng(0).integers(0, 256, (3, 160, 160, 3), dtype=np.uint8)
    (folder,) = cache.iterdir()
    weights = folder / networks.BIN
    if damage == "bytes":
        content = bytearray(weights.read_bytes())
        content[1000] ^= 1
        weights.write_bytes(content)
    elif damage == "cut":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif damage == "record":
        (folder / networks.RECORD).write_text("{")
    elif damage == "byte of the record":
        record = folder / networks.RECORD
        record.write_text(record.read_text().replace("test_resnet", "test_resnot"))
    else:
        (folder / networks.XML).unlink()
    assert networks.load_network(folder.name) is None
    assert np.array_equal(small()(pixels), first(pixels))
    assert networks.load_network(folder.name) is not None


def test_a_network_that_cannot_be_kept_runs_all_the_same(
    tmp_path: Path, monkeypatch, capsys
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("HGNL_CACHE", str(tmp_path / "file"))
    assert small()(np.zeros((1, 160, 160, 3), np.uint8)).shape == (1, 96)
    assert "the converted network is not kept: " in capsys.readouterr().err


def test_a_network_that_openvino_cannot_write_is_told_with_its_folder(
    cache: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    failed = Mock(side_effect=RuntimeError("a paragraph\nbasic_ios::clear: iostream error"))
    monkeypatch.setattr("openvino.save_model", failed)
    assert small()(np.zeros((1, 160, 160, 3), np.uint8)).shape == (1, 96)
    expected = f"OpenVINO cannot write it to {cache}; is the disk full? (basic_ios::clear: iostream"
    assert expected in capsys.readouterr().err


def test_the_options_by_default_are_those_of_load_trunk() -> None:
    parameters = inspect.signature(load_trunk).parameters
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    assert openvino_engine._DEFAULTS.items() <= defaults.items()
    assert set(defaults) - set(openvino_engine._DEFAULTS) == {"name", "weights", "seed"}


LIGHT = """
import sys
from pathlib import Path
from extract.__main__ import Options, main
assert main(Options(Path(sys.argv[1]), sys.argv[2], backbone="test_resnet", weights="random", frames=3)) == 0
print(*sorted({"torch", "timm", "torchvision"} & sys.modules.keys()))
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="--device auto is a GPU")
def test_the_second_extraction_needs_neither_torch_nor_timm(
    cache: Path, demo_clips: Path, tmp_path: Path
) -> None:
    clip = next((demo_clips / "exercise_mini" / "clips").rglob("*.mp4"))
    for number, expected in enumerate(("timm torch torchvision", "")):
        command = [sys.executable, "-c", LIGHT, str(clip), str(tmp_path / f"{number}.zarr")]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[-1] == expected
        assert ("test_resnet is converted for OpenVINO" in done.stderr) == (number == 0)


# PyTorch


class SharedNorm(nn.Module):
    """One batch norm after two convolutions: folding it into one of them would change the other."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.norm = (
            nn.Conv2d(3, 3, 1),
            nn.Conv2d(3, 3, 1),
            nn.BatchNorm2d(3),
        )
        nn.init.constant_(self.norm.running_var, 4.0)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(self.second(self.norm(self.first(x)))).flatten(1)


def test_what_cannot_be_folded_is_left_alone() -> None:
    frame = torch.rand(1, 3, 8, 8)
    assert fold_batch_norms(DataDependent().eval(), frame) is None
    module = SharedNorm().eval()
    graph = fold_batch_norms(module, frame)
    assert graph is not None
    assert any(isinstance(part, nn.BatchNorm2d) for part in graph.modules())
    torch.testing.assert_close(graph(frame), module(frame))


@pytest.mark.parametrize("name", ["legacy_seresnext26_32x4d", "tf_efficientnet_lite0", "resnet10t"])
def test_folding_keeps_the_answer(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        module = timm.create_model(name, pretrained=False).eval()
        for norm in module.modules():
            if isinstance(norm, nn.BatchNorm2d):
                norm.running_var.uniform_(0.5, 2)
                norm.running_mean.normal_(0, 0.2)
    before = {key: value.clone() for key, value in module.state_dict().items()}
    frame = torch.randn(1, 3, 96, 96, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        graph = fold_batch_norms(module, frame)
        assert graph is not None
        assert not any(isinstance(part, nn.BatchNorm2d) for part in graph.modules())
        assert relative_error(graph(frame), module(frame)) < 1e-4
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


def test_relative_error_of_nothing_finite() -> None:
    assert relative_error(torch.tensor([float("nan")]), torch.ones(1)) == float("inf")
    assert relative_error(torch.tensor([1.5]), torch.ones(1)) == pytest.approx(0.5)


@pytest.mark.parametrize(("frames", "batch"), [(1, 1), (3, 3), (512, 512), (513, 257), (1600, 400)])
def test_a_known_number_of_frames_is_spread_evenly_over_batches(frames: int, batch: int) -> None:
    assert spread_evenly(frames, 512) == batch


# Features that are not numbers


def weights_times(factor: float, path: Path) -> Path:
    state = timm.create_model("test_resnet", pretrained=False).state_dict()
    last = [key for key in state if key.endswith("bn2.weight")][-1]
    state[last] = state[last].abs() * factor + factor
    torch.save(state, path)
    return path


@pytest.mark.parametrize("engine", ["openvino", "torch"])
@pytest.mark.parametrize(
    ("precision", "hint"), [("bf16", "try --precision fp32, into another"), ("fp32", "damaged")]
)
def test_features_that_are_not_finite(
    precision: str, hint: str, engine: str, tmp_path: Path
) -> None:
    weights = weights_times(1e9, tmp_path / "w.pth")
    settings = {
        "weights": weights,
        "device": "cpu",
        "precision": precision,
        "engine": engine,
        "threads": 1,
    }
    backbone = load_backbone("test_resnet", **settings)
    with pytest.raises(
        NotFiniteError, match=rf"^3 of 3 frames have features that are not finite.*{hint}"
    ):
        backbone(np.full((3, 160, 160, 3), 99, np.uint8))


def test_weights_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    weights = weights_times(float("nan"), tmp_path / "w.pth")
    with pytest.raises(
        InputError, match=r"w\.pth: 1 tensors hold values that are not finite \(.*bn2\.weight\)"
    ):
        load_trunk("test_resnet", weights=weights)


def test_a_backbone_that_is_dropped_leaves_no_thread_behind():
    """A callback that holds its slot would be a cycle through C++, which is never collected."""

    def threads() -> int:
        return psutil.Process().num_threads()

    counts = []
    for _ in range(4):
        backbone = load_backbone("test_resnet", weights="random", device="cpu", precision="fp32")
        backbone(np.zeros((3, *backbone.preprocessing.frame_shape), np.uint8))
        del backbone
        gc.collect()
        counts.append(threads())
    assert counts[-1] <= counts[0]
