"""python -m pipelines.export: write a checkpoint as ONNX, from pixels to logits, for any ONNX
runtime.

    frames uint8 [batch, frames, size, size, 3], RGB      any batch, any number of frames
        -> normalization -> backbone -> aggregator -> classifier -> logits float32 [batch, classes]

The caller decodes, resizes and crops, by the values of `preprocessing` in the file's metadata:
resize the short side to `resize` with `interpolation` (antialiased), and cut out the middle square
of `size`. StNet takes [batch, segments, N, size, size, 3] with a fixed N.
"""

import contextlib
import io
import json
import os
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extract import InputError, RunError, StrPath
from extract.cli import run_as_script
from extract.commands import install_command
from extract.durable import replacing

if TYPE_CHECKING:
    import torch

    from aggregate.endtoend import FrameModel
    from aggregate.training.checkpoint import Checkpoint

INPUT, OUTPUT = "frames", "logits"
# Allowed difference between a runtime and PyTorch, relative to the largest logit: both compute in
# fp32, but add in different orders.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Options:
    """Write a trained model as ONNX: uint8 frames in, logits out, any batch and number of frames.

    The file's metadata holds classes, preprocessing and options.
    """

    checkpoint: Path
    """A best.pt of aggregate.train or aggregate.finetune."""
    out: Path
    """The ONNX file."""
    weights: Path | None = None
    """The backbone's weights, if the checkpoint records a file of your own (its SHA-256 is
    checked)."""


def main(options: Options) -> int:
    from aggregate.endtoend import clips_of, model_from_record
    from aggregate.evaluate import describe
    from aggregate.training.checkpoint import Checkpoint

    try:
        import onnx  # noqa: F401
        import onnxscript  # noqa: F401
    except ImportError as error:
        raise InputError(
            f"ONNX needs {error.name}, which is not installed: {install_command('demo')}"
        ) from None
    checkpoint = Checkpoint.load(options.checkpoint)
    if clips_of(checkpoint) is not None:
        raise InputError(
            f"{options.checkpoint} sees clips of {checkpoint.features['backbone']}; "
            "only checkpoints that see single frames are exported to ONNX"
        )
    model = model_from_record(checkpoint, options.weights)
    check = export(model, checkpoint, options.out)
    preprocessing = model.preprocessing
    shape = ", ".join(map(str, _shape(model, checkpoint)))
    print(
        f"{options.out}: {describe(checkpoint)}, {options.out.stat().st_size / 1e6:.1f} MB\n"
        f"in:  {INPUT} uint8 [batch, {shape}], RGB: resized to {preprocessing.resize} "
        f"(crop mode {preprocessing.crop_mode}, {preprocessing.interpolation}, antialiased), "
        "the middle of it; normalization is in the graph\n"
        f"out: {OUTPUT} float32 [batch, {len(checkpoint.classes)}]\n"
        f"{check}"
    )
    return 0


def export(model: "FrameModel", checkpoint: "Checkpoint", out: StrPath) -> str:
    """Write `model` (from `model_from_record`) with the checkpoint's metadata; returns the result
    of the check.

    The file appears whole and checked, or not at all. Raises RunError if PyTorch cannot express the
    model in ONNX, or if a runtime computes other logits.
    """
    import torch

    network: torch.nn.Module = model
    shape = _shape(model, checkpoint)[1:]
    if "frames_per_segment" not in checkpoint.options:
        one_frame_per_segment = torch.nn.Unflatten(1, (-1, 1))
        network = torch.nn.Sequential(one_frame_per_segment, model).eval()
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter warns about its own code
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                program = torch.onnx.export(
                    network,
                    (_random_frames(2, 3, *shape),),
                    dynamo=True,
                    dynamic_shapes=({0: torch.export.Dim("batch"), 1: torch.export.Dim("frames")},),
                    input_names=[INPUT],
                    output_names=[OUTPUT],
                    verbose=False,
                )
        except Exception as error:  # the exporter raises many types
            reason, *_ = str(error).strip().splitlines() or [type(error).__name__]
            raise RunError(
                f"PyTorch {torch.__version__} cannot export this model to ONNX: {reason}"
            ) from error
    assert program is not None
    program.model.metadata_props.update(_metadata(model, checkpoint))
    with replacing(out) as partial:
        program.save(partial)
        return _check(network, partial, shape)


def _shape(model: "FrameModel", checkpoint: "Checkpoint") -> tuple[Any, ...]:
    """The input's shape without the batch: frames (or segments and N for StNet), size, size, 3."""
    frames: list[Any] = ["frames"]
    if "frames_per_segment" in checkpoint.options:
        frames = ["segments", checkpoint.options["frames_per_segment"]]
    return *frames, *model.preprocessing.frame_shape


def _metadata(model: "FrameModel", checkpoint: "Checkpoint") -> dict[str, str]:
    """The file's metadata_props, each a JSON text; classes are in the order of the logits."""
    features = checkpoint.features
    values = {
        "classes": checkpoint.classes,
        "preprocessing": asdict(model.preprocessing),
        "options": checkpoint.options,
        "backbone": {"name": features["backbone"], "weights": features["weights"]},
        "frames_in_training": checkpoint.frames,
        "input": "uint8 RGB, resized and cropped as preprocessing says; "
        "normalization is in the graph",
    }
    return {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}


def _random_frames(*shape: int) -> "torch.Tensor":
    import torch

    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def _check(network: "torch.nn.Module", file: Path, shape: tuple[int, ...]) -> str:
    """Compare the file with PyTorch, on batches and numbers of frames other than the traced ones;
    returns the result as text.

    Raises RunError if they differ.
    """
    try:
        import onnxruntime
    except ImportError:
        return "not checked: onnxruntime is not installed (pip install onnxruntime)"
    import torch

    runtime = f"onnxruntime {onnxruntime.__version__}"
    session = onnxruntime.InferenceSession(os.fspath(file), providers=["CPUExecutionProvider"])
    largest_error = 0.0
    for batch, frames in ((1, 1), (3, 2)):
        x = _random_frames(batch, frames, *shape)
        [logits] = session.run(None, {INPUT: x.numpy()})
        with torch.inference_mode():
            expected = network(x)
        difference = (torch.from_numpy(logits) - expected).abs().max()
        error = float(difference / expected.abs().max().clamp_min(1e-6))
        if not error <= TOLERANCE:
            raise RunError(
                f"{runtime} differs from PyTorch by {error:.2g} of the largest logit, "
                f"more than {TOLERANCE:g}, for {batch} x {frames} frames; nothing was written"
            )
        largest_error = max(largest_error, error)
    return (
        f"checked with {runtime}: differs from PyTorch by {largest_error:.1g} of the largest logit"
    )


if __name__ == "__main__":
    run_as_script()
