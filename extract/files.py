"""Files that are whole and on the disk once they have their names, whatever becomes of the process or of the power.

    write `a.partial` -> fsync it -> rename it to `a` -> fsync the folder

Without the first fsync a name may be on the disk before what it names; without the second the name may be lost again.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from extract.cli import RunError, explain


@contextlib.contextmanager
def writing(path: str | os.PathLike[str]) -> Iterator[None]:
    """What keeps `path` from being written (a full disk, a quota, no permission) comes out as a RunError naming it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error  # torch raises a RuntimeError over what the system said
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None or isinstance(error, RunError):
            raise
        raise RunError(explain(cause, path)) from error


@contextlib.contextmanager
def replacing(path: str | os.PathLike[str], mark: str = "") -> Iterator[Path]:
    """A name beside `path`, to make a file or a folder there; on the way out it is on the disk as `path`, or gone.

    `mark` sets those apart who may write `path` at the same time. Missing folders are made. Raises RunError.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}{mark}.partial")
    with writing(path):
        make_folder(path.parent)
        try:
            _remove(partial)  # what a run left that was killed
            yield partial
            sync_tree(partial)
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                _remove(partial)
            raise
        sync(path.parent)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_file(path: str | os.PathLike[str], content: Any, mark: str = "") -> None:
    """Write `content` (text, or bytes of any kind) to a file that appears whole or not at all. Raises RunError."""
    with replacing(path, mark) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def append(file: int, path: str | os.PathLike[str], content: bytes) -> None:
    """Append all of `content` to an open file and sync it. Raises RunError naming `path`."""
    with writing(path):
        while content:
            content = content[os.write(file, content) :]  # a disk that becomes full takes a part first
        os.fsync(file)


def make_folder(path: Path) -> None:
    """Make a folder and those above it; each new name is on the disk. Raises RunError."""
    if not path.is_dir():
        make_folder(path.parent)
        with writing(path):
            path.mkdir(exist_ok=True)
            sync(path.parent)


def sync(path: str | os.PathLike[str]) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some file systems of networks cannot sync a folder, and do not need to.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """`sync` for a file, or for all that is in a folder and the folder itself."""
    for inside in path.iterdir() if path.is_dir() else ():
        sync_tree(inside)
    sync(path)
