"""An exported model in onnxruntime, on the GPU if onnxruntime has CUDA, against PyTorch on the
device."""

import numpy as np
import pytest
import torch

import small_models
import tiny_backbones
from aggregate.endtoend import model_from_record
from aggregate.training.checkpoint import Checkpoint
from device import DEVICE, PRETENDED
from extract.backbone.model import load_trunk
from pipelines import export

pytestmark = pytest.mark.gpu


def test_onnx_gives_the_logits_of_pytorch_on_the_device(tmp_path):
    import onnxruntime

    if PRETENDED:  # tests/pipelines/test_export.py has larger backbones
        trunk = load_trunk(tiny_backbones.CONVOLUTION, weights="random", seed=3)
        checkpoint = Checkpoint.load(small_models.cached(tmp_path / "run", trunk=trunk))
    else:
        checkpoint = Checkpoint.load(small_models.tuned(tmp_path / "run", "hgnl"))
    file = tmp_path / "model.onnx"
    assert export.main(export.Options(checkpoint.path, file)) == 0
    known = onnxruntime.get_available_providers()
    session = onnxruntime.InferenceSession(
        file,
        providers=[
            one for one in ("CUDAExecutionProvider", "CPUExecutionProvider") if one in known
        ],
    )
    print(f"onnxruntime {onnxruntime.__version__}: {session.get_providers()[0]}")
    model = model_from_record(checkpoint).to(DEVICE)
    size = model.preprocessing.size
    frames = np.random.default_rng(0).integers(0, 256, (2, 5, size, size, 3), dtype=np.uint8)
    with torch.inference_mode():
        expected = (
            model(torch.from_numpy(frames)[:, :, None], torch.ones(2, 5, dtype=torch.bool))
            .cpu()
            .numpy()
        )
    (got,) = session.run(None, {export.INPUT: frames})
    assert (
        np.abs(got - expected).max() <= 5e-3 * np.abs(expected).max()
    )  # convolutions of a GPU round to 10 bits
