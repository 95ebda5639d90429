"""The progress of an extraction: a bar that moves every second, and at the end where time went."""

import contextlib
import sys
import threading
from collections import Counter
from collections.abc import Iterator
from typing import Protocol

from extract.cli import progress

SECONDS_PER_MOVE = 1.0  # of the progress bar


class Pool(Protocol):
    def settled(self) -> int:
        """The number of frames that the backbone has received, or never will."""


@contextlib.contextmanager
def shown_progress(pool: Pool, totals: Counter[str], videos: int, frames: int) -> Iterator[None]:
    """A progress bar over the videos to do, of `frames` each.

    It moves every second, not only after a block.
    """
    stop = threading.Event()

    def move() -> None:
        settled = max(totals["videos"] * frames, min(pool.settled(), videos * frames))
        done = f"{settled // frames:,.0f} of {videos:,} videos, {totals['failed']:,} failed"
        bar.set_postfix_str(done, refresh=False)
        bar.update(settled - bar.n)  # negative after a worker was lost
        if sys.stderr.isatty():
            bar.refresh()  # updates the time even if nothing has changed

    def move_each_second() -> None:
        while not stop.wait(SECONDS_PER_MOVE):
            move()

    with progress(total=videos * frames, unit="frame") as bar:
        mover = threading.Thread(target=move_each_second, name="progress", daemon=True)
        mover.start()
        try:
            yield
        finally:
            stop.set()
            mover.join()
            move()


def time_breakdown(totals: Counter[str], *, wall: float, workers: int) -> str:
    if not totals["frames"]:
        return f"no frame was computed in {wall:.1f} s: no video could be read"
    busy = max(wall * workers, 1e-9)
    limit = "decoding" if totals["wait"] > totals["device"] else "the backbone"
    return (
        f"{totals['frames']:,} frames in {wall:.1f} s: {totals['frames'] / wall:.0f} frames/s. Of "
        f"the workers' time the device computed {totals['device'] / busy:.0%} and waited for "
        f"frames {totals['wait'] / busy:.0%}; decoding took {totals['decode']:.1f} CPU s, and "
        f"writing {totals['write']:.1f} s at the same time. The limit was {limit}."
    )
