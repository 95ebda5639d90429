"""A disk that loses power, and a full disk: at every moment of a run, through the functions of
`os`.

Synced data survives a power cut: a file holds its contents at its last fsync, or nothing, and a
folder holds the names of its last fsync. A system may also write names earlier, so each moment
gives two disks: the least and the most that may be left.
"""

import contextlib
import errno
import os
import re
import shutil
import stat
import sys
import threading
from collections.abc import Callable, Hashable, Iterator
from pathlib import Path

import pytest

from thorough import THOROUGH

ROOMS = ("aggregate", "ensemble", "extract", "pipelines")
PROGRAM = tuple(f"{Path(__file__).parents[1] / room}{os.sep}" for room in ROOMS)


class PowerCuts:
    """Records what is synced below `root` during a run, and calls `check(folder)` with every disk
    that a power cut could leave.

    `check` gets a copy of `root` as it would be after the power came back. Equal disks with the
    same `promised()` are checked once. Files in a folder without its final name count as no
    difference, except with `make fuzz`.
    """

    def __init__(
        self,
        root: Path,
        scratch: Path,
        check: Callable[[Path], None],
        promised: Callable[[], Hashable] = lambda: None,
    ):
        self.root, self.moments = root, 0
        self._scratch, self._check, self._promised = scratch, check, promised
        self._checked: set[Hashable] = set()
        self._contents: dict[int, bytes] = {}  # of an inode, when it was synced last
        self._names: dict[
            int, dict[str, int]
        ] = {}  # of a folder's inode: its names and their inodes
        self._held: list[int] = []  # descriptors, so that no inode number is given away twice
        self._kinds: dict[int, bool] = {}  # inode -> whether it is a folder
        self._lock = threading.RLock()
        for folder, _, files in os.walk(root):  # earlier files are on the disk
            for name in (*files, ""):
                self._synced(os.open(os.path.join(folder, name), os.O_RDONLY))

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        """Within this block, the power is cut at every fsync, rename and removal of this
        process."""
        with pytest.MonkeyPatch.context() as patch:
            for name in ("fsync", "replace", "rename", "unlink", "mkdir", "rmdir"):
                patch.setattr(os, name, self._around(name, getattr(os, name)))
            yield
        for descriptor in self._held:
            os.close(descriptor)

    def _around(self, name: str, real: Callable) -> Callable:
        def call(where, *arguments, **named):
            path = (
                os.readlink(f"/proc/self/fd/{where}")
                if isinstance(where, int)
                else os.path.abspath(where)
            )
            if not Path(path).is_relative_to(self.root):
                return real(where, *arguments, **named)
            with self._lock:
                result = real(where, *arguments, **named)
                if name == "fsync":
                    self._synced(os.dup(where))
                self._cut()
                return result

        return call

    def _synced(self, descriptor: int) -> None:
        self._held.append(descriptor)
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        found = os.fstat(descriptor)
        self._kinds[found.st_ino] = stat.S_ISDIR(found.st_mode)
        if not self._kinds[found.st_ino]:
            self._contents[found.st_ino] = os.pread(descriptor, found.st_size, 0)
            return
        self._names[found.st_ino] = {}
        for inside in path.iterdir():
            number = inside.lstat().st_ino
            self._kinds[number] = inside.is_dir()
            self._names[found.st_ino][inside.name] = number
            self._held.append(os.open(inside, os.O_RDONLY))

    def _cut(self) -> None:
        least = dict(self._least(self.root.stat().st_ino, Path()))
        most = {
            path.relative_to(self.root): None
            if path.is_dir()
            else self._contents.get(path.stat().st_ino, b"")
            for path in sorted(self.root.rglob("*"))
        }
        for name, disk in (("least", least), ("most", most)):
            seen = frozenset(item for item in disk.items() if THOROUGH or not _unnamed(item[0]))
            if (seen, self._promised()) in self._checked:
                continue
            self._checked.add((seen, self._promised()))
            folder = self._scratch / name
            folder.mkdir()
            for path, content in disk.items():
                if content is None:
                    (folder / path).mkdir()
                else:
                    (folder / path).write_bytes(content)
            self._check(folder)
            shutil.rmtree(folder)
        self.moments += 1

    def _least(self, inode: int, folder: Path) -> Iterator[tuple[Path, bytes | None]]:
        for name, number in self._names.get(inode, {}).items():
            if self._kinds[number]:
                yield folder / name, None
                yield from self._least(number, folder / name)
            else:
                yield folder / name, self._contents.get(number, b"")


def _unnamed(path: Path) -> bool:
    """Whether this is in a folder to which `durable.replacing` has not given its name yet."""
    return any(folder.suffix == ".partial" for folder in path.parents)


class FullDisk:
    """Allows a number of writing steps below `root` and refuses all later ones, until `room()`.

    A step is an open for writing, a write, an fsync, a rename or a new folder, as the system gets
    the calls. `places` are the steps' targets and the lines of the program that caused them.
    """

    def __init__(self, root: Path, steps: float, code: int = errno.ENOSPC):
        self.root, self.left, self.code, self.refused = root, steps, code, 0
        self.places: list[tuple[str, ...]] = []
        self._lock = threading.Lock()

    @contextlib.contextmanager
    def refusing(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in ("fsync", "replace", "mkdir", "write"):
                patch.setattr(os, name, self._around(getattr(os, name)))
            patch.setattr(Path, "write_bytes", self._around(Path.write_bytes))
            yield

    def _around(self, real: Callable) -> Callable:
        def call(where, *arguments, **named):
            path = (
                os.readlink(f"/proc/self/fd/{where}")
                if isinstance(where, int)
                else os.path.abspath(where)
            )
            if Path(path).is_relative_to(self.root):
                there = real.__name__ == "mkdir" and os.path.isdir(path)  # needs no room
                with self._lock:
                    self.left -= not there
                    if not there:
                        self.places.append(self._place(real.__name__, Path(path)))
                    if self.left < 0 and not there:
                        self.refused += 1
                        raise OSError(self.code, os.strerror(self.code))  # a write has no file name
            return real(where, *arguments, **named)

        return call

    def _place(self, step: str, path: Path) -> tuple[str, ...]:
        """Equal for all blocks of a store, epochs of a run, rows of a table, and files of a folder
        without a name."""
        named = path.relative_to(self.root)
        while _unnamed(named):
            named = named.parent
        written = re.sub(r"[0-9a-f]{32}|\d+", "N", str(named))
        lines, frame = [], sys._getframe()
        while frame := frame.f_back:
            code = frame.f_code
            if code.co_filename.startswith(PROGRAM):
                lines.append(f"{code.co_filename}:{frame.f_lineno}")
        return step, written, *lines
