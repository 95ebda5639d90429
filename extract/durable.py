"""Files that are whole and on the disk once they have their names, whatever becomes of the process
or of the power.

    write `a.<32 hex digits>.partial` -> fsync it -> rename it to `a` -> fsync the folder

Without the first fsync a name may be on the disk before what it names; without the second the name
may be lost again.
"""

import contextlib
import errno
import fcntl
import os
import re
import shutil
import socket
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from extract import RunError, StrPath
from extract.cli import describe_os_error

LOCK = ".lock"
# Only we name files like this: what looks so and belongs to no running process was left by a run
# that was killed.
_LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.partial$")


@contextlib.contextmanager
def writing(path: StrPath) -> Iterator[None]:
    """What keeps `path` from being written (a full disk, a quota, no permission) comes out as a
    RunError naming it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error  # torch raises a RuntimeError over what the system said
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None or isinstance(error, RunError):
            raise
        raise RunError(describe_os_error(cause, path)) from error


@contextlib.contextmanager
def replacing(path: StrPath) -> Iterator[Path]:
    """A name next to `path`, to make a file or a folder there; on the way out it is on the disk as
    `path`, or gone.

    The name is unique, so that several processes may write `path` at the same time, and no file of
    the user's has it. Missing folders are made. Raises RunError.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    with writing(path):
        make_folder(path.parent)
        try:
            yield partial
            sync_tree(partial)
            os.replace(partial, path)
        except BaseException:
            with contextlib.suppress(OSError):
                _remove(partial)
            raise
        sync(path.parent)


def remove_leftovers(folder: Path, of: str = "") -> None:
    """Remove what killed runs left half-written in `folder`, or only what was to become `of`. For
    the lock's holder."""
    for path in folder.iterdir():
        if is_leftover(path.name) and (not of or _LEFTOVER.sub("", path.name) == of):
            _remove(path)


def is_leftover(name: str) -> bool:
    """Whether a file of this name is one that `replacing` was writing."""
    return bool(_LEFTOVER.search(name))


def take_lock(file: IO) -> bool:
    """Whether this open file could be locked; the kernel releases it when the file is closed or the
    process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def locked(folder: StrPath) -> Iterator[None]:
    """Hold a folder that one process at a time may write; it is made if it is missing.

    The kernel releases the lock when the process ends, however it ends. A folder that was made for
    this and into which nothing was written is removed again. RunError names the process that holds
    it already.
    """
    folder = Path(folder)
    existed = folder.is_dir()
    make_folder(folder)
    lock = folder / LOCK
    with writing(lock):
        file = lock.open("a+", encoding="utf-8")
    with file:
        if not take_lock(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RunError(
                f"{folder} is being written by {holder}; wait for it, stop it, or give another name"
            ) from None
        if not os.fstat(file.fileno()).st_nlink:
            raise RunError(
                f"{folder} was just removed by another process; run the same command again"
            )
        remove_leftovers(folder)
        with contextlib.suppress(OSError):  # a full disk: only the message of others is poorer
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()  # a process that opened it meanwhile sees that it is gone
                if not existed:
                    folder.rmdir()  # if nothing is in it


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_file(path: StrPath, content: Any) -> None:
    """Write `content` (text, or bytes of any kind) to a file that appears whole or not at all.
    Raises RunError."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def append(file: int, path: StrPath, content: bytes) -> None:
    """Append all of `content` to an open file and sync it. Raises RunError naming `path`."""
    with writing(path):
        while content:
            content = content[
                os.write(file, content) :
            ]  # a disk that becomes full takes a part first
        os.fsync(file)


def make_folder(path: Path) -> None:
    """Make a folder and those above it; each new name is on the disk. Raises RunError."""
    if not path.is_dir():
        make_folder(path.parent)
        with writing(path):
            path.mkdir(exist_ok=True)
            sync(path.parent)


def sync(path: StrPath) -> None:
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
