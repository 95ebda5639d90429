"""Decode videos on a GPU with NVDEC (torchcodec); frames are resized and cropped there.

The list of frames and their times come from the packets, as for PyAV (`PacketDecoder`), so both
decode the same frames. Only the colors differ, because NVDEC converts them in another way. Child
processes decode with PyAV what NVDEC cannot, and a note in the store says so.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from extract import InputError
from extract.commands import install_command
from extract.decode.container import VideoError, time_limit
from extract.decode.packets import PacketDecoder, UnreliablePacketsError, VideoFile
from extract.sources import read_source

if TYPE_CHECKING:
    from torch import Tensor

    from extract.decode.pool import JobResult, SubprocessPool

# The largest mean difference between a prepared frame and PyAV's, in levels of 255. torchcodec's
# own tests allow 2 levels between NVDEC and FFmpeg; tests/gpu/test_extract.py asserts ours.
TOLERANCE = 2
_FRAMES_PER_CALL = 32  # that are on the GPU in their original size


class TorchcodecFile(VideoFile):
    """The frames of `PacketDecoder` as uint8 tensors [H, W, 3] on `device`."""

    def __init__(self, path: Any, *, device: str):
        from torchcodec.decoders import VideoDecoder

        packets = PacketDecoder(path)
        self.times, self.end = packets.times, packets.end
        self.offset, self.clock_note = packets.offset, packets.clock_note
        with _runtime_errors_as_unreliable():
            self._decoder = VideoDecoder(os.fspath(path), device=device, dimension_order="NHWC")
        if self._decoder.cpu_fallback:
            video = self._decoder.metadata
            reason = str(self._decoder.cpu_fallback).rpartition(": ")[-1]
            raise UnreliablePacketsError(
                f"NVDEC does not decode {video.codec} of {video.width} x {video.height} ({reason})"
            )
        if len(self._decoder) != len(self.times):
            raise UnreliablePacketsError(
                f"torchcodec finds {len(self._decoder)} frames of {len(self.times)}"
            )

    def pictures(self, indices: list[int]) -> Iterator[tuple[int, Any]]:
        first = self._decoder.metadata.begin_stream_seconds
        for start in range(0, len(indices), _FRAMES_PER_CALL):
            chunk = indices[start : start + _FRAMES_PER_CALL]
            with _runtime_errors_as_unreliable():
                frames = self._decoder.get_frames_at(chunk)
            if abs(frames.pts_seconds.numpy() - first - self.times[chunk]).max() > 1e-3:
                raise UnreliablePacketsError("torchcodec shows its frames at other times")
            yield from zip(chunk, frames.data, strict=True)


@contextmanager
def _runtime_errors_as_unreliable() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torchcodec's errors begin with `function, file:line, `
        message = str(error).splitlines()[0].split(", ", 2)[-1]
        raise UnreliablePacketsError(f"torchcodec: {message}") from None


class GpuDecoder:
    """Runs decode jobs on a GPU, and in child processes if the GPU cannot.

    Each job has the deadline of a child (`time_limit`), after which its thread is abandoned. A job
    whose plan asks for pyav goes to the children at once: it was in progress when workers died, and
    a crash on a GPU takes its whole process along.
    """

    def __init__(
        self,
        children: "SubprocessPool",
        function: Callable[..., list[Any]],
        device: str,
        *,
        timeout: float,
    ):
        self._children, self._function = children, function
        self._device, self._timeout = device, timeout

    def __call__(self, job: tuple[str, Any, Any]) -> "JobResult":
        path, _, plan = job
        if os.path.isdir(path):  # numbered pictures, which no video decoder reads
            return self._fall_back(job)
        if plan.decoder == "pyav":
            return self._fall_back(job, "workers died with it in hand")
        future: Future[JobResult] = Future()
        threading.Thread(target=self._decode, args=(job, future), daemon=True).start()
        allowed = time_limit(self._timeout, path)
        try:
            return future.result(timeout=allowed)
        except TimeoutError:
            reason = f"{self._device} gave no answer in {allowed:.3g} s (--video-timeout)"
        except Exception as error:  # PyAV may still decode what fails on the GPU
            first_line = f"{type(error).__name__}: {error}".splitlines()[0]
            reason = getattr(error, "reason", None) or first_line
        return self._fall_back(job, reason)

    def _fall_back(self, job: tuple[str, Any, Any], reason: str = "") -> "JobResult":
        path, rows, plan = job
        by_pyav = self._children.submit((path, rows, replace(plan, decoder="pyav"))).result()
        note = f"decoded by PyAV: {reason}" if reason else ""
        results = [
            row
            if isinstance(row, VideoError)
            else replace(row, note="; ".join(filter(None, (note, row.note))))
            for row in by_pyav.result or ()
        ]
        return replace(by_pyav.detach(), result=results)

    def _decode(self, job: tuple[str, Any, Any], future: Future) -> None:
        import torch

        # Not at the top: children run pool.py as a program, which nothing may import before.
        from extract.decode.pool import JobResult

        path, rows, plan = job
        source = read_source(path)
        try:
            out = torch.empty(plan.slot_bytes, dtype=torch.uint8, device=self._device)
            on_gpu = replace(plan, decoder=f"torchcodec-{self._device}")
            prepared = self._function((path, rows, on_gpu), out)
            for row in prepared:
                if isinstance(row, VideoError):
                    raise row
            if out.is_cuda:  # batches are copied on another stream than this thread's
                torch.cuda.current_stream(out.device).synchronize()
            future.set_result(JobResult(prepared, out, source=source))
        except Exception as error:
            future.set_exception(error)


def torchcodec_version(device: str) -> str:
    """For the store. Raises InputError without a CUDA device or a working torchcodec."""
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            "--decoder torchcodec-cuda: PyTorch sees no CUDA device here; use --decoder pyav"
        )
    try:
        import torchcodec

        # Since 0.17 it can be imported without FFmpeg, and fails when it opens a video.
        if getattr(torchcodec, "ffmpeg_major_version", "unknown") is None:
            raise ImportError("it finds no shared libraries of FFmpeg")
    except (ImportError, RuntimeError) as error:  # RuntimeError: earlier versions without FFmpeg
        first_line = str(error).strip().partition("\n")[0]
        raise InputError(
            f"--decoder torchcodec-cuda: torchcodec cannot be used ({first_line}); "
            f"{install_command('gpu')}, and FFmpeg's shared libraries; or use --decoder pyav"
        ) from None
    return (
        f"torchcodec {torchcodec.__version__}, within {TOLERANCE} of 255 levels of pyav in the mean"
    )


def stacked(pictures: "list[Tensor]") -> "Tensor":
    import torch

    return torch.stack(pictures)


def resized(
    frames: "Tensor", size: tuple[int, int], interpolation: str, *, antialias: bool = True
) -> "Tensor":
    """uint8 [..., H, W, 3] -> [..., size[1], size[0], 3], within one level of Pillow."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    mode = InterpolationMode(interpolation)
    return resize(
        frames.movedim(-1, -3), [size[1], size[0]], interpolation=mode, antialias=antialias
    ).movedim(-3, -1)
