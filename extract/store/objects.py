"""Small files next to a store's arrays, on a disk or on object storage, and network errors."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from extract import InputError, RunError
from extract.durable import os_errors_as_run_error, replace_file, sync

# Their errors are not OSError; everything else that storage raises is.
_NETWORK_LIBRARIES = {"botocore", "aiobotocore", "aiohttp", "gcsfs", "google", "azure", "requests"}


def is_remote(path: str | Path) -> bool:
    """Whether a store's path is a URL for fsspec (`s3://...`, `memory://...`)."""
    return "://" in str(path)


@contextmanager
def network_errors_as_run_error(url: str | Path) -> Iterator[None]:
    """Turn an error of a library for object storage into one sentence that names the URL.

    Such an error means that the network, the bucket or a permission is missing.
    """
    try:
        yield
    except ImportError as error:
        if not is_remote(url):
            raise
        raise InputError(f"{url}: {error}") from None
    except Exception as error:
        if type(error).__module__.partition(".")[0] not in _NETWORK_LIBRARIES:
            raise
        raise RunError(
            f"{url} cannot be reached ({type(error).__name__}: {error!s:.200}); "
            "check network, address and credentials, and run the same command again"
        ) from None


@contextmanager
def remote_file_system(url: str) -> Iterator[tuple[Any, str]]:
    """fsspec's file system for a URL, and the path in it. Network errors are RunErrors inside."""
    import fsspec

    with network_errors_as_run_error(url):
        yield fsspec.core.url_to_fs(url)


def read_object(path: str) -> bytes | None:
    """The content of a file or an object; None if it does not exist."""
    try:
        if not is_remote(path):
            return Path(path).read_bytes()
        with remote_file_system(path) as (system, name):
            return system.cat_file(name)
    except FileNotFoundError:
        return None


def write_object(path: str, content: bytes) -> None:
    """Write a file or an object, which appears whole or not at all. Raises RunError."""
    if is_remote(path):
        with remote_file_system(path) as (system, name):
            system.pipe_file(name, content)
    else:
        replace_file(path, content)


def remove_object(path: str) -> None:
    """Remove a file or an object, if it exists. Raises RunError."""
    if is_remote(path):
        with remote_file_system(path) as (system, name):
            if system.exists(name):
                system.rm_file(name)
    elif os.path.lexists(path):
        with os_errors_as_run_error(path):
            os.unlink(path)
            sync(os.path.dirname(path))


def object_exists(path: str) -> bool:
    """Whether a file or an object exists at this moment, not when it was last listed."""
    if not is_remote(path):
        return os.path.exists(path)
    with remote_file_system(path) as (system, name):
        system.invalidate_cache()
        return system.exists(name)


def names_in(path: str) -> set[str]:
    """The names directly in a folder or below a prefix; empty if it does not exist."""
    try:
        if not is_remote(path):
            return set(os.listdir(path))
        with remote_file_system(path) as (system, name):
            system.invalidate_cache()
            return {entry.rpartition("/")[2] for entry in system.ls(name, detail=False)}
    except FileNotFoundError:
        return set()
