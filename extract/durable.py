"""Atomic, durable file writes: complete and on the disk across crashes and power loss.

    write `a.<32 hex digits>.partial` -> fsync it -> rename it to `a` -> fsync the folder

Without the first fsync, the name may be on the disk before the content; without the second, the
name may be lost again.
"""

import contextlib
import errno
import fcntl
import json
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
# Only this package names files like this. Without a running writer, a killed run left it.
_LEFTOVER = re.compile(r"\.[0-9a-f]{32}\.partial$")


@contextlib.contextmanager
def os_errors_as_run_error(path: StrPath) -> Iterator[None]:
    """Turn an error of writing `path` (full disk, quota, no permission) into a RunError with it."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        cause: BaseException | None = error  # torch raises a RuntimeError from an OSError
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__context__
        if cause is None or isinstance(error, RunError):
            raise
        raise RunError(describe_os_error(cause, path)) from error


@contextlib.contextmanager
def replacing(path: StrPath) -> Iterator[Path]:
    """Yield a path next to `path` to write a file or a folder to. On exit it is renamed to `path`,
    and on the disk; after an error it is removed.

    The name is unique, so that several processes may write `path` at the same time. Missing folders
    are made. Raises RunError.
    """
    path = Path(path)
    partial = path.with_name(f"{path.name}.{uuid.uuid4().hex}.partial")
    with os_errors_as_run_error(path):
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


def remove_leftovers(folder: Path, target: str = "") -> None:
    """Remove the partial files of killed runs in `folder`, or only those of the name `target`.

    The caller holds the lock.
    """
    for path in folder.iterdir():
        if is_leftover(path.name) and (not target or _LEFTOVER.sub("", path.name) == target):
            _remove(path)


def is_leftover(name: str) -> bool:
    """Whether this is the name of a partial file of `replacing`."""
    return bool(_LEFTOVER.search(name))


def take_lock(file: IO) -> bool:
    """Lock an open file, and return whether that worked. The kernel releases the lock when the file
    is closed or the process ends."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextlib.contextmanager
def locked(folder: StrPath) -> Iterator[None]:
    """Lock a folder that one process at a time may write. It is made if it is missing.

    The kernel releases the lock when the process ends, even if it is killed. A folder that was made
    here and is still empty on exit is removed. RunError names the process that holds the lock.
    """
    folder = Path(folder)
    existed = folder.is_dir()
    make_folder(folder)
    lock = folder / LOCK
    with os_errors_as_run_error(lock):
        file = lock.open("a+", encoding="utf-8")
    with file:
        if not take_lock(file):
            file.seek(0)
            holder = file.read().strip() or "another process"
            raise RunError(
                f"{folder} is being written by {holder}; wait for it, stop it, or give another name"
            )
        if not os.fstat(file.fileno()).st_nlink:
            raise RunError(
                f"{folder} was just removed by another process; run the same command again"
            )
        remove_leftovers(folder)
        # On a full disk, other processes do not see the name of this one.
        with contextlib.suppress(OSError):
            file.truncate(0)
            file.write(f"process {os.getpid()} on {socket.gethostname()}")
            file.flush()
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                lock.unlink()  # a process that has opened it meanwhile sees no link to it
                if not existed:
                    folder.rmdir()  # unless it holds files


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def replace_file(path: StrPath, content: Any) -> None:
    """Write `content` (text or bytes) to a file, completely or not at all. Raises RunError."""
    with replacing(path) as partial:
        partial.write_bytes(content.encode() if isinstance(content, str) else content)


def write_record(path: StrPath, record: Any) -> None:
    """Write a JSON file as `replace_file` does."""
    replace_file(path, json.dumps(record, indent=1) + "\n")


def read_record(path: StrPath) -> Any:
    """The content of a JSON file."""
    return json.loads(Path(path).read_bytes())


def append(file: int, path: StrPath, content: bytes) -> None:
    """Append all of `content` to an open file and sync it. Raises RunError naming `path`."""
    with os_errors_as_run_error(path):
        while content:
            written = os.write(file, content)  # less than all if the disk becomes full
            content = content[written:]
        os.fsync(file)


def make_folder(path: Path) -> None:
    """Make a folder and its parents, and sync each new name to the disk. Raises RunError."""
    if not path.is_dir():
        make_folder(path.parent)
        with os_errors_as_run_error(path):
            path.mkdir(exist_ok=True)
            sync(path.parent)


def sync(path: StrPath) -> None:
    """Wait until a file's content, or a folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # Some network file systems cannot sync a folder, and do not need to.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP) or not os.path.isdir(path):
            raise
    finally:
        os.close(descriptor)


def sync_tree(path: Path) -> None:
    """`sync` a file, or a folder with everything in it."""
    for inside in path.iterdir() if path.is_dir() else ():
        sync_tree(inside)
    sync(path)


def cache_folder() -> Path:
    """The folder for files that can be made again: $HGNL_CACHE, or ~/.cache/hgnl-video."""
    return Path(os.environ.get("HGNL_CACHE", "~/.cache/hgnl-video")).expanduser()
