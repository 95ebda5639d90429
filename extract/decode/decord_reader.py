"""Read videos with decord (`--decoder decord`)."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from extract.decode.container import VideoError
from extract.decode.packets import VideoFile


class DecordFile(VideoFile):
    """A video that decord reads."""

    time_tolerance = 1e-4  # its times are float32

    def __init__(self, path):
        decord = import_decord()
        self._path, self._errors = path, (decord.DECORDError, RuntimeError)
        with self._translated_errors():
            self._reader = decord.VideoReader(os.fspath(path), num_threads=1)
            shown = np.asarray(
                self._reader.get_frame_timestamp(np.arange(len(self._reader))), np.float64
            )
        if not len(shown):
            raise VideoError(path, "decord finds no frame in it")
        self.times, self.end = shown[:, 0] - shown[0, 0], float(shown[-1, 1] - shown[0, 0])

    def pictures(self, indices: list[int]) -> Iterator[tuple[int, np.ndarray]]:
        with self._translated_errors():
            for index in indices:
                yield index, self._reader[index].asnumpy()

    @contextmanager
    def _translated_errors(self) -> Iterator[None]:
        try:
            yield
        except self._errors as error:
            lines = str(error).partition("\nStack")[0].splitlines()
            message = next(filter(None, map(str.strip, lines)), type(error).__name__)
            raise VideoError(self._path, f"decord cannot read it: {message}") from None


def import_decord():
    try:
        import decord
    except ImportError:
        raise VideoError(
            "decord", "is not installed; it has wheels for x86-64 only, use --decoder pyav"
        ) from None
    decord.logging.set_level(decord.logging.QUIET)
    return decord
