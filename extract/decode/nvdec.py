"""Videos decoded on a GPU: torchcodec's NVDEC, resized and cropped there, straight into the
backbone's batches.

Which frames there are, and when they are shown, is learned as for PyAV (`PacketDecoder`), so the
same frames are seen; only their colors differ, since NVDEC converts them in its own way. What it
cannot decode, PyAV's children do, and the record of the video says so.
"""

import os
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
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

    from extract.decode.pool import Finished, SubprocessPool

# Levels of 255: the mean difference of a prepared frame from PyAV's, at most. torchcodec's own
# tests hold every value of NVDEC's pictures to 2 levels of FFmpeg's; tests/gpu/test_extract.py
# asserts ours.
TOLERANCE = 2
_AT_ONCE = 32  # frames in their own size on the GPU


class TorchcodecFile(VideoFile):
    """Frames as `PacketDecoder` finds them, as uint8 tensors [H, W, 3] on `device`."""

    def __init__(self, path: Any, *, device: str):
        from torchcodec.decoders import VideoDecoder

        packets = PacketDecoder(path)
        self.times, self.end = packets.times, packets.end
        self.offset, self.clock_note = packets.offset, packets.clock_note
        with _runtime_errors_as_unreliable():
            self._decoder = VideoDecoder(os.fspath(path), device=device, dimension_order="NHWC")
        if self._decoder.cpu_fallback:
            about = self._decoder.metadata
            why = str(self._decoder.cpu_fallback).rpartition(": ")[-1]
            raise UnreliablePacketsError(
                f"NVDEC does not decode {about.codec} of {about.width} x {about.height} ({why})"
            )
        if len(self._decoder) != len(self.times):
            raise UnreliablePacketsError(
                f"torchcodec finds {len(self._decoder)} frames of {len(self.times)}"
            )

    def pictures(self, indices: list[int]) -> Iterator[tuple[int, Any]]:
        first = self._decoder.metadata.begin_stream_seconds
        for start in range(0, len(indices), _AT_ONCE):
            some = indices[start : start + _AT_ONCE]
            with _runtime_errors_as_unreliable():
                frames = self._decoder.get_frames_at(some)
            if abs(frames.pts_seconds.numpy() - first - self.times[some]).max() > 1e-3:
                raise UnreliablePacketsError("torchcodec shows its frames at other times")
            yield from zip(some, frames.data, strict=True)


@contextmanager
def _runtime_errors_as_unreliable() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # torchcodec's for everything: `function, file:line, words`
        raise UnreliablePacketsError(
            f"torchcodec: {str(error).splitlines()[0].split(', ', 2)[-1]}"
        ) from None


class GpuDecoder:
    """Does `function`, which `children` do, on `device`, as `SubprocessPool.help` asks; they do
    what it cannot.

    A job is (path, rows, plan), its results are VideoErrors or have a `note` (see jobs.py). After
    the time that a child would have (`time_limit`) no answer is waited for; its thread is left to
    itself. A plan that asks for pyav goes to the children at once: workers died over it, and a
    crash on a GPU is one of its process.
    """

    def __init__(
        self,
        children: "SubprocessPool",
        function: Callable[..., list[Any]],
        device: str,
        *,
        timeout: float,
    ):
        self._children, self._function, self._device, self._timeout = (
            children,
            function,
            device,
            timeout,
        )

    def __call__(self, job: tuple[str, Any, Any]) -> "Finished":
        path, rows, plan = job
        if os.path.isdir(path):  # of pictures, which no video decoder reads
            return (
                self._children.submit((path, rows, replace(plan, decoder="pyav"))).result().taken()
            )
        if plan.decoder == "pyav":
            return self._fall_back(job, "workers died with it in hand")
        answer: Future[Finished] = Future()
        threading.Thread(target=self._decode, args=(job, answer), daemon=True).start()
        allowed = time_limit(self._timeout, job[0])
        wait([answer], timeout=allowed)
        try:
            return answer.result(timeout=0)
        except TimeoutError:
            why = f"{self._device} gave no answer in {allowed:.3g} s (--video-timeout)"
        except Exception as error:  # of the GPU, say: whatever it is, PyAV has the last word
            why = (
                getattr(error, "reason", None) or f"{type(error).__name__}: {error}".splitlines()[0]
            )
        return self._fall_back(job, why)

    def _fall_back(self, job: tuple[str, Any, Any], why: str) -> "Finished":
        path, rows, plan = job
        note = f"decoded by PyAV: {why}"
        finished = self._children.submit((path, rows, replace(plan, decoder="pyav"))).result()
        done = [
            one
            if isinstance(one, VideoError)
            else replace(one, note="; ".join(filter(None, (note, one.note))))
            for one in finished.result or ()
        ]
        return replace(finished.taken(), result=done)

    def _decode(self, job: tuple[str, Any, Any], answer: Future) -> None:
        import torch

        from extract.decode.pool import (
            Finished,
        )  # which its own process runs as a program

        path, rows, plan = job
        source = read_source(path)
        try:
            out = torch.empty(plan.slot_bytes, dtype=torch.uint8, device=self._device)
            done = self._function(
                (path, rows, replace(plan, decoder=f"torchcodec-{self._device}")), out
            )
            for one in done:
                if isinstance(one, VideoError):
                    raise one
            if out.is_cuda:  # batches are copied on another stream than this thread's
                torch.cuda.current_stream(out.device).synchronize()
            answer.set_result(Finished(done, out, source=source))
        except Exception as error:
            answer.set_exception(error)


def torchcodec_version(device: str) -> str:
    """For the store's record. Raises InputError where there is no CUDA device or no torchcodec that
    loads."""
    import torch

    if device.startswith("cuda") and not torch.cuda.is_available():
        raise InputError(
            "--decoder torchcodec-cuda: PyTorch sees no CUDA device here; use --decoder pyav"
        )
    try:
        import torchcodec
    except (ImportError, RuntimeError) as error:  # RuntimeError: there is no FFmpeg it can load
        raise InputError(
            f"--decoder torchcodec-cuda: torchcodec cannot be used ({str(error).strip().partition(chr(10))[0]}); "
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
    """uint8 [..., H, W, 3] -> [..., size[1], size[0], 3], as Pillow does within a level."""
    from torchvision.transforms.v2 import InterpolationMode
    from torchvision.transforms.v2.functional import resize

    mode = InterpolationMode(interpolation)
    return resize(
        frames.movedim(-1, -3), [size[1], size[0]], interpolation=mode, antialias=antialias
    ).movedim(-3, -1)
