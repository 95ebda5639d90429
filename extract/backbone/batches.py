"""Frames in, features out, in batches of a constant size, of which a device works on several.

    frames -> [ being filled | copied to the device | computed, copied back ] -> features

A slot is the memory of one batch. While the host fills one slot, the device works on the others. A
GPU has three slots, so it never waits for the host; PyTorch on a CPU computes at once and has one.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from extract.decode.transform import Clips

Check = Callable[[np.ndarray], None]  # gets the features of a batch, float16 [n, dim]


def accept(features: np.ndarray) -> None:
    """The check that accepts all features."""


def inputs_per_batch(frames: int, clips: Clips | None) -> int:
    """How many inputs, frames or clips, are in a batch of at most `frames` frames; at least one."""
    return frames if clips is None else max(1, frames // clips.frames)


class Batches:
    """Collects the frames of any number of videos into whole batches.

    Of the frames that were `added`, the first `completed` have their features, or were dropped.
    `check` gets the features of each batch without padding, and raises if they are bad. After an
    error all batches that have been launched are waited for and dropped; the slots can be used
    again.
    """

    def __init__(self, slots: Sequence[Any], *, check: Check = accept):
        self.seconds = 0.0  # of computing on the device
        self.added = self.completed = 0
        self._free, self._check = deque(slots), check
        self._launched: deque[tuple[Any, list[np.ndarray]]] = deque()
        self._filled, self._targets = 0, list[np.ndarray]()

    def add(self, frames: Any, into: np.ndarray) -> None:
        """Compute the features of frames uint8 [n, size, size, 3] into float16 [n, dim].

        They are complete once `completed` has counted these frames, or `finish` has returned.
        """
        self.added += len(frames)
        while len(frames):
            slot = self._free[0]
            count = min(len(frames), slot.size - self._filled)
            slot.put(self._filled, frames[:count])
            self._targets.append(into[:count])
            self._filled += count
            frames, into = frames[count:], into[count:]
            if self._filled == slot.size:
                self._launch()

    def finish(self) -> None:
        """Compute the last, partly filled batch, and wait for all batches."""
        if self._filled:
            self._launch()
        while self._launched:
            self._collect()

    def _launch(self) -> None:
        slot, count = self._free.popleft(), self._filled
        self._launched.append((slot, self._targets))
        self._filled, self._targets = 0, []
        with self._discard_on_error():
            slot.launch(count)
        if not self._free:
            self._collect()

    def _collect(self) -> None:
        slot, targets = self._launched[0]
        with self._discard_on_error():
            features, seconds = slot.wait()
            self._check(features[: sum(map(len, targets))])
        start = 0
        for into in targets:
            into[:] = features[start : start + len(into)]
            start += len(into)
        self.completed += start
        self.seconds += seconds
        self._launched.popleft()
        self._free.append(slot)

    def discard(self) -> None:
        """Wait for all batches that have been launched, and drop them.

        Python must not end before: OpenVINO, which then calls back, would abort the process.
        """
        while self._launched:
            slot, _ = self._launched.popleft()
            with suppress(Exception):
                slot.wait()
            self._free.append(slot)
        self.completed = self.added

    @contextmanager
    def _discard_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            self.discard()
            raise


def compute_features(
    slots: Sequence[Any], frames: np.ndarray, dim: int, *, check: Check = accept
) -> np.ndarray:
    """The features float16 [n, dim] of all `frames`."""
    features = np.empty((len(frames), dim), np.float16)
    batches = Batches(slots, check=check)
    batches.add(frames, features)
    batches.finish()
    return features
