"""Frames in, features out, in batches of a constant size, several of them under way on a device at
once.

    frames -> [ being filled | copied to the device | computed, copied back ] -> features

A slot is the memory of one batch. While one is filled the others are under way, so a device never
waits for the host where there are three; a device that computes at once (the CPU) has one.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import numpy as np

from extract.decode.transform import Clips


def inputs_per_batch(frames: int, clips: Clips | None) -> int:
    """The inputs in a batch of at most `frames` frames: frames, or clips (one at least)."""
    return frames if clips is None else max(1, frames // clips.frames)


class Batches:
    """Frames of any number of videos, collected into whole batches; features go where `add` was
    told, in its order.

    Of the frames that were `added` the first `completed` have their features, or were dropped.
    `check` sees the features of each batch, without padding, and raises where they are bad. After
    any error what was under way is waited for and dropped, and the slots can be used again.
    """

    def __init__(self, slots: Sequence[Any], *, check: Callable[[np.ndarray], None]):
        self.seconds = 0.0  # that the device computed
        self.added = self.completed = 0
        self._free, self._check = deque(slots), check
        self._under_way: deque[tuple[Any, list[np.ndarray]]] = deque()
        self._filled, self._targets = 0, list[np.ndarray]()

    def add(self, frames: Any, into: np.ndarray) -> None:
        """Frames uint8 [n, size, size, 3], whose features will be `into` float16 [n, dim], when
        `finish` returns at the latest."""
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
        """Compute what waits for a whole batch, and wait for all that is under way."""
        if self._filled:
            self._launch()
        while self._under_way:
            self._collect()

    def _launch(self) -> None:
        slot, count = self._free.popleft(), self._filled
        self._under_way.append((slot, self._targets))
        self._filled, self._targets = 0, []
        with self._discard_on_error():
            slot.launch(count)
        if not self._free:
            self._collect()

    def _collect(self) -> None:
        slot, targets = self._under_way[0]
        with self._discard_on_error():
            features, seconds = slot.wait()
            self._check(features[: sum(map(len, targets))])
        start = 0
        for into in targets:
            into[:] = features[start : start + len(into)]
            start += len(into)
        self.completed += start
        self.seconds += seconds
        self._under_way.popleft()
        self._free.append(slot)

    @contextmanager
    def _discard_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException:
            while self._under_way:
                slot, _ = self._under_way.popleft()
                with suppress(Exception):
                    slot.wait()
                self._free.append(slot)
            self.completed = self.added
            raise
