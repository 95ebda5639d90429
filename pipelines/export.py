"""python -m pipelines.export: a checkpoint as ONNX, from pixels to logits, for any program with an
ONNX runtime.

    frames uint8 [batch, frames, size, size, 3], RGB      any batch, any number of frames
        -> normalization -> backbone -> aggregator -> classifier -> logits float32 [batch, classes]

Decoding, resizing and cropping stay outside: short side to `resize` pixels with the `interpolation`
(antialiased), the middle square of `size`, all as `preprocessing` in the file's metadata says.
StNet takes [batch, segments, N, size, size, 3], its N fixed.
"""

import contextlib
import io
import json
import os
import sys
import warnings
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from extract import InputError, RunError, StrPath
from extract.cli import run_command
from extract.commands import install_command
from extract.durable import replacing

if TYPE_CHECKING:
    import torch

    from aggregate.endtoend import FrameModel
    from aggregate.training.checkpoint import Checkpoint

INPUT, OUTPUT = "frames", "logits"
# How far a runtime may be from PyTorch, relative to the largest logit: both compute in fp32, in
# other orders of sums.
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Options:
    """Write a trained model as ONNX: uint8 frames in, logits out, any batch and number of frames.

    Classes, preprocessing and options stand in the file's metadata.
    """

    checkpoint: Path
    """A best.pt of aggregate.train or aggregate.finetune."""
    out: Path
    """The ONNX file."""
    weights: Path | None = None
    """The backbone's weights, where the checkpoint records a file of one's own (its SHA-256 is
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
            f"{options.checkpoint} sees clips of {checkpoint.features['backbone']}; only checkpoints that see single "
            "frames are exported to ONNX"
        )
    model = model_from_record(checkpoint, options.weights)
    see, shape = model.preprocessing, _shape(model, checkpoint)
    checked = export(model, checkpoint, options.out)
    print(
        f"{options.out}: {describe(checkpoint)}, {options.out.stat().st_size / 1e6:.1f} MB\n"
        f"in:  {INPUT} uint8 [batch, {', '.join(map(str, shape))}], RGB: resized to {see.resize} (crop mode "
        f"{see.crop_mode}, {see.interpolation}, antialiased), the middle of it; normalization is in the graph\n"
        f"out: {OUTPUT} float32 [batch, {len(checkpoint.classes)}]\n"
        f"{checked}"
    )
    return 0


def export(model: "FrameModel", checkpoint: "Checkpoint", out: StrPath) -> str:
    """Write `model` (of `model_from_record`) with the checkpoint's metadata; returns what `_check`
    says of it.

    The file appears whole and checked or not at all. Raises RunError where PyTorch cannot express
    the model in ONNX, or where a runtime computes something else from it.
    """
    import torch

    network: torch.nn.Module = model
    shape = _shape(model, checkpoint)[1:]
    if "frames_per_segment" not in checkpoint.options:
        network = torch.nn.Sequential(
            torch.nn.Unflatten(1, (-1, 1)), model
        ).eval()  # one frame a segment
    with torch.inference_mode(False), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the exporter's own insides
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                program = torch.onnx.export(
                    network,
                    (_noise(2, 3, *shape),),
                    dynamo=True,
                    dynamic_shapes=({0: torch.export.Dim("batch"), 1: torch.export.Dim("frames")},),
                    input_names=[INPUT],
                    output_names=[OUTPUT],
                    verbose=False,
                )
        except Exception as error:  # the exporter's own types, which are many
            first = str(error).strip().splitlines()[:1] or [type(error).__name__]
            raise RunError(
                f"PyTorch {torch.__version__} cannot export this model to ONNX: {first[0]}"
            ) from error
    assert program is not None
    program.model.metadata_props.update(_metadata(model, checkpoint))
    with replacing(out) as partial:
        program.save(partial)
        return _check(network, partial, shape)


def _shape(model: "FrameModel", checkpoint: "Checkpoint") -> tuple[Any, ...]:
    """Of the input behind the batch: frames, or segments and N of StNet, then size, size, 3."""
    N = checkpoint.options.get("frames_per_segment")
    return (*(["frames"] if N is None else ["segments", N]), *model.preprocessing.frame_shape)


def _metadata(model: "FrameModel", checkpoint: "Checkpoint") -> dict[str, str]:
    """The file's metadata_props, each a JSON text: classes in the order of the logits,
    preprocessing, options ..."""
    record = {"name": checkpoint.features["backbone"], "weights": checkpoint.features["weights"]}
    values = {
        "classes": checkpoint.classes,
        "preprocessing": asdict(model.preprocessing),
        "options": checkpoint.options,
        "backbone": {"name": record["name"], "weights": record["weights"]},
        "frames_in_training": checkpoint.frames,
        "input": "uint8 RGB, resized and cropped as preprocessing says; normalization is in the graph",
    }
    return {name: json.dumps(value, ensure_ascii=False) for name, value in values.items()}


def _noise(*shape: int) -> "torch.Tensor":
    import torch

    return torch.randint(
        0, 256, shape, dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def _check(network: "torch.nn.Module", file: Path, shape: tuple[int, ...]) -> str:
    """Run the file beside PyTorch, with batches and numbers of frames it was not traced with; what
    came of it.

    Raises RunError where they differ.
    """
    try:
        import onnxruntime
    except ImportError:
        return "not checked: onnxruntime is not installed (pip install onnxruntime)"
    import torch

    runtime = f"onnxruntime {onnxruntime.__version__}"
    session = onnxruntime.InferenceSession(os.fspath(file), providers=["CPUExecutionProvider"])
    worst = 0.0
    for batch, frames in ((1, 1), (3, 2)):
        noise = _noise(batch, frames, *shape)
        (got,) = session.run(None, {INPUT: noise.numpy()})
        with torch.inference_mode():
            expected = network(noise)
        error = float(
            (torch.from_numpy(got) - expected).abs().max() / expected.abs().max().clamp_min(1e-6)
        )
        worst = max(worst, error)
        if not error <= TOLERANCE:
            raise RunError(
                f"{runtime} differs from PyTorch by {error:.2g} of the largest logit, more than {TOLERANCE:g}, "
                f"for {batch} x {frames} frames; nothing was written"
            )
    return f"checked with {runtime}: differs from PyTorch by {worst:.1g} of the largest logit"


if __name__ == "__main__":
    sys.exit(run_command(main, Options, prog="python -m pipelines.export"))
